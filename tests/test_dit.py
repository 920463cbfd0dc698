"""The DiT: the published network's numbers and names, codes by average and by attention, training and sampling."""
import ast
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, fill, load, same_training
from scripts import SAMPLE, TINY, Script, run

from configurator import UserError, arguments_of
from dit import CrossAttention, DiT, dit_settings, from_dit
from model import CodeTable, DisCoDiff
from start_from import start_from
from trained import load_stage1

SHAPES = json.loads((ROOT / "tests/reference/dit_shapes.json").read_text())
with np.load(ROOT / "tests/reference/dit_tiny.npz") as file:
    REFERENCE = {name: torch.from_numpy(np.array(file[name])) for name in file.files}
TINY_DIT = [*TINY, "--denoiser=dit", "--patch=7", "--width=16", "--depth=2", "--heads=2"]


def published(name, device="cpu"):
    """-> the network of DiT's authors, whose last layer has a variance for each number besides, and its code table"""
    config, shapes = SHAPES[name]["config"], SHAPES[name]["shapes"]
    state = {n: fill(n, shape) if device == "cpu" else torch.empty(shape, device=device) for n, shape in shapes.items()}
    table = state.pop("sem_embedder.embedding_table", None)
    with torch.device(device):
        net = DiT(config["input_size"], config["in_channels"], 0 if "L" in config else config["num_classes"],
                  patch=config["patch_size"], width=config["hidden_size"], depth=config["depth"],
                  heads=config["num_heads"]).eval()
        net.out = torch.nn.Linear(config["hidden_size"], 2 * net.out.out_features)
    net.load_state_dict(from_dit(state))
    return net, table


def outputs(net, labels=None, emb=None):
    """Of the reference's images, at its time steps"""
    with torch.no_grad():
        return net(REFERENCE["x"], REFERENCE["t"].double() / 1000, labels, None if emb is None else {"emb": [emb]})


def difference(a, b):
    """The largest, as a share of the largest number: processors round differently."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def test_the_network_equals_the_published_one():
    net, _ = published("dit_tiny")
    labels = torch.where(REFERENCE["y"] == 10, -1, REFERENCE["y"])
    out, null = outputs(net, labels), outputs(net, torch.full((4,), -1))
    assert difference(net.positions, REFERENCE["pos_embed"]) < 1e-6
    assert difference(out, REFERENCE["out"]) < 5e-6 and difference(null, REFERENCE["out_null"]) < 5e-6
    w = REFERENCE["cfg_scale"].item()  # which DiT applies to three channels alone
    assert difference(w * out + (1 - w) * null, REFERENCE["out_cfg"]) > 0.3
    assert difference((w * out + (1 - w) * null)[:, :3], REFERENCE["out_cfg"][:, :3]) < 5e-6


def test_averaged_codes_equal_the_published_ones():
    net, table = published("dit_codes_tiny")
    codes = CodeTable(6, 5, 64)
    codes.table.data = table
    z, drop = REFERENCE["codes"].clamp(max=4), (REFERENCE["codes"] == 5).all(1)
    with torch.no_grad():
        emb, soft, null = codes(z, drop), codes(REFERENCE["soft"]), codes(z, torch.ones(4, dtype=torch.bool))
    for found, wanted in ((emb[drop], REFERENCE["codes_emb"][drop]), (soft, REFERENCE["soft_emb"])):
        assert difference(found, wanted) < 1e-6
    assert difference(outputs(net, emb=codes(REFERENCE["codes"])), REFERENCE["out_codes"]) < 5e-6
    assert difference(outputs(net, emb=soft), REFERENCE["out_soft"]) < 5e-6
    w = REFERENCE["sem_cfg_scale"].item()
    guided = w * outputs(net, emb=codes(REFERENCE["codes"])) + (1 - w) * outputs(net, emb=null)
    assert difference(guided[:, :4], REFERENCE["out_codes_cfg"][:, :4]) < 5e-6


def test_the_published_names_load():
    """All names and shapes of DiT-XL/2: 674.8 million numbers, and 0.3 million of positions."""
    net, _ = published("dit_xl_2", "meta")
    assert sum(p.numel() for p in net.parameters()) == 675_129_632 - 294_912


def test_the_configuration_of_dlc():
    """DiT-XL/2 without labels on latents of 4 x 32 x 32, with a table of 512 x 257 rows of codes."""
    tree = ast.parse((ROOT / "config" / "imagenet256_dlc.py").read_text())
    config = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body[1:]}
    with torch.device("meta"):
        model = DisCoDiff(256, 3, 0, 512, 256, x_shape=(4, 32, 32), encoder_patch=16, encoder_layers=1,
                          **arguments_of(config, DisCoDiff, DiT))
    wanted = from_dit(SHAPES["dit_xl_2"]["shapes"])
    wanted |= {"out.weight": [16, 1152], "out.bias": [16]}  # no variances
    del wanted["classes.weight"]
    assert {name: list(p.shape) for name, p in model.model.state_dict().items()} == wanted
    assert model.latents.table.shape == (512, 257, 1152) and model.sigma_data == 1
    per_step = 0.5 ** (config["batch_size"] / config["ema_halflife_images"])
    assert per_step == pytest.approx(0.9999, abs=1e-7) and config["total_images"] == pytest.approx(800 * 1_281_167, rel=1e-3)


@pytest.mark.parametrize("conditioning", ["average", "attention"])
def test_a_new_network_adds_nothing_to_its_input(conditioning):
    """D = c_skip x, whatever class and codes are."""
    model = DisCoDiff(8, 3, 10, 4, 5, conditioning, 8, 1, 2, encoder_patch=4, encoder_dim=8, encoder_layers=1,
                      encoder_heads=2, denoiser="dit", patch=2, width=16, depth=2, heads=2)
    x, sigma = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 1, 10])
    with torch.no_grad():
        D = model.denoise(x, sigma, torch.tensor([3, -1, 9]), model.condition(torch.randint(5, (3, 4))))
    assert torch.allclose(D, x * (0.25 / (0.25 + sigma ** 2))[:, None, None, None])


@torch.no_grad()
def test_cross_attention_is_softmax_of_queries_and_keys_times_values():
    cross = CrossAttention(16, 2, 6)
    x, tokens = torch.randn(2, 9, 16), torch.randn(2, 5, 6)
    q = cross.q(cross.norm(x)).unflatten(2, (2, 8))
    k, v = (t.unflatten(2, (2, 8)) for t in cross.kv(tokens).chunk(2, dim=2))
    weights = (torch.einsum("bphc,bmhc->bhpm", q, k) / 8 ** 0.5).softmax(-1)
    a = torch.einsum("bhpm,bmhc->bphc", weights, v).flatten(2)
    assert difference(cross(x, *cross.keys_values(tokens)), x + cross.proj(a)) < 1e-5


@pytest.mark.parametrize("conditioning", ["average", "attention"])
def test_it_trains_goes_on_and_samples(tmp_path, conditioning):
    """Beside the encoder, on pixels: in two parts as in one, to the bit, and a prior and samples follow."""
    for name, parts in (("parts", (24, 48)), ("whole", (48,))):
        for images in parts:
            printed = run("train_stage1.py", f"--out_dir={tmp_path / name}", *TINY_DIT, f"--total_images={images}", f"--conditioning={conditioning}")
    parts, whole = (checkpoint(tmp_path / name) for name in ("parts", "whole"))
    assert same_training(parts, whole) and whole["model_args"]["denoiser"] == "dit"
    assert whole["config"]["sigma_data"] == 0.5 and whole["model"]["model.patches.weight"].shape == (16, 1, 7, 7)
    losses = printed[printed.index("null / own"):].splitlines()[1:9]
    assert all(0 < float(number) < 30 for line in losses for number in line.split()[1:3])
    run("sample.py", f"--out_dir={tmp_path / 'whole'}", *SAMPLE, "--code=0,1,2", "--guidance=2", "--class_label=3")
    made = load(tmp_path / "whole")
    assert made["images"].shape == (20, 28, 28, 1) and len(np.unique(made["images"].reshape(20, -1), axis=0)) == 20
    with pytest.raises(UserError, match="denoiser='dit' there, 'unet' here"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *TINY)


def test_a_start_from_a_plain_dit(tmp_path):
    """Codes are added to it: D is as it was. A U-Net does not start from it, nor a DiT of other settings."""
    plain, path = [*TINY_DIT, "--num_latents=0", "--total_images=16"], tmp_path / "plain"
    run("train_stage1.py", f"--out_dir={path}", *plain)
    stage1 = Script("train_stage1.py", "default", tmp_path / "codes", "cpu", *TINY_DIT, "--class_cond=False", f"--init_from={path}")
    x, sigma, z = torch.randn(2, 1, 28, 28), torch.tensor([0.5, 2]), torch.randint(5, (2, 3))
    source = load_stage1(path)[0]
    with torch.no_grad():
        D = stage1.model.denoise(x, sigma, None, stage1.model.condition(z))
        assert torch.equal(D, source.denoise(x, sigma)) and source.model.out.weight.all()
    for arguments, message in ((TINY, "has the denoiser dit, this run unet: say --denoiser=dit"),
                               ([*TINY_DIT, "--depth=1"], "of other settings: depth=2 there, 1 here")):
        with pytest.raises(UserError, match=message):
            run("train_stage1.py", f"--out_dir={tmp_path / 'other'}", *arguments, f"--init_from={path}")


def dit_file(path, *without, **changes):
    """A file as DiT's authors published, of the tiny network; changes: shapes, with __ for dots -> its path"""
    shapes = SHAPES["dit_tiny"]["shapes"] | {name.replace("__", "."): shape for name, shape in changes.items()}
    torch.save({name: fill(name, shape) for name, shape in shapes.items() if name not in without}, path)
    return path


def of_dit(resolution=8, channels=4, classes=10, **changes):
    """A new DisCoDiff with codes and such a denoiser, and its settings"""
    args = dict(img_resolution=resolution, img_channels=channels, label_dim=classes, num_latents=3, codebook_size=5, conditioning="average",
                encoder_patch=4, encoder_dim=8, encoder_layers=1, encoder_heads=2, x_shape=(), denoiser="dit", patch=2, width=64, depth=2, heads=4) | changes
    return DisCoDiff(**args).eval(), args


def test_a_start_from_a_published_dit(tmp_path, capsys):
    """F is minus the published network's noise, at the time step 1000 c_noise; variances are dropped. Codes are added to it, and
    another number of classes; images may have any size, since positions are sines."""
    path = dit_file(tmp_path / "DiT.pt")
    model, args = of_dit(conditioning="attention")
    assert start_from(path, model, args) is False  # no trained encoder
    sigma = (4 * REFERENCE["t"].double() / 1000).exp()
    c_skip, c_out, c_in, _ = (c if c.ndim == 0 else c[:, None, None, None] for c in model.process.constants(sigma, 0.5))
    labels = torch.where(REFERENCE["y"] == 10, -1, REFERENCE["y"])
    with torch.no_grad():
        x = (REFERENCE["x"] / c_in).float()
        D = model.denoise(x, sigma, labels, model.condition(torch.randint(5, (4, 3))))
    assert difference((c_skip * x - D) / c_out, REFERENCE["out"][:, :4]) < 5e-6 and not capsys.readouterr().err
    for changes in (dict(resolution=16), dict(classes=7), dict(classes=0)):
        other, args = of_dit(**changes, num_latents=0)
        assert start_from(path, other, args) is False
        assert torch.equal(other.model.blocks[1].qkv.weight, model.model.blocks[1].qkv.weight)
        assert ("has 10 classes, this run" in capsys.readouterr().err) == ("classes" in changes)


def test_the_heads_of_published_sizes_are_known():
    for name, heads in (("dit_xl_2", 16), ("dit_tiny", None)):
        settings = dit_settings({n: torch.empty(shape, device="meta") for n, shape in SHAPES[name]["shapes"].items()})
        config = SHAPES[name]["config"]
        assert settings.get("heads") == heads and (settings["width"], settings["depth"], settings["patch"], settings["label_dim"]) == tuple(
            config[key] for key in ("hidden_size", "depth", "patch_size", "num_classes"))


@pytest.mark.parametrize("file, ours, message", [
    ({}, dict(channels=3), "denoises 4 channels, this run 3: the published DiTs are of a VAE's latents, --space=vae"),
    ({}, dict(denoiser="uvit"), "has the denoiser dit, this run uvit: say --denoiser=dit"),
    ({}, dict(depth=3, patch=4), "is a network of other settings: patch=2 there, 4 here; depth=2 there, 3 here"),
    (dict(t_embedder__mlp__0__bias=[65]), {}, "is not a network of DiT's architecture: .*size mismatch for model.time.0.bias"),
    (dict(final_layer__linear__bias=[31]), {}, "is not a network of DiT's architecture"),
    (dict(sem_embedder__embedding_table=[6, 6, 64]), {}, "it has model.sem_embedder.embedding_table, which ours lacks"),
    ("t_embedder.mlp.0.weight", {}, "it has no model.time.0.weight"),
    ("final_layer.linear.weight", {}, "is not a network of DiT's architecture: it has no 'out.weight'"),
    ("x_embedder.proj.weight", {}, "is not a checkpoint of train_stage1.py: a stage1.pt, or one of EDM's networks or DiT's, is wanted"),
])
def test_published_dits_that_do_not_fit(tmp_path, file, ours, message):
    path = dit_file(tmp_path / "DiT.pt", file) if isinstance(file, str) else dit_file(tmp_path / "DiT.pt", **file)
    model, args = of_dit(**{k: v for k, v in ours.items() if k != "denoiser"})
    with pytest.raises(UserError, match=message) as error:
        start_from(path, model, args | ours)
    assert "\n" not in str(error.value)


def test_training_starts_from_a_published_dit(tmp_path):
    """From the command line; and a file with other objects in it is not unpickled."""
    path = dit_file(tmp_path / "DiT.pt", x_embedder__proj__weight=[64, 1, 7, 7], final_layer__linear__weight=[98, 64], final_layer__linear__bias=[98])
    settings = [*TINY_DIT, "--width=64", "--heads=4", "--total_images=8", "--lr=1e-9", f"--init_from={path}"]
    run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *settings)
    ema = checkpoint(tmp_path / "run")["ema"]
    assert difference(ema["model.blocks.0.proj.weight"], fill("blocks.0.attn.proj.weight", [64, 64])) < 1e-7
    weight = fill("final_layer.linear.weight", [98, 64]).view(7, 7, 2, 64)
    assert difference(ema["model.out.weight"].view(7, 7, 64), -weight[:, :, 0]) < 1e-7
    torch.save(torch.load(path) | dict(args=SimpleNamespace()), path)
    with pytest.raises(UserError, match="is truncated or damaged, or holds more than tensors"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'other'}", *settings)
    assert not list((tmp_path / "other").iterdir())


def test_a_run_of_before_the_dit_keeps_its_u_net(tmp_path):
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--num_latents=0", "--total_images=8")
    state = torch.load(tmp_path / "stage1.pt")
    for settings in (state["config"], state["model_args"]):
        for name in ("denoiser", "space", "x_shape", "patch", "width", "depth", "heads"):
            settings.pop(name, None)
    torch.save(state, tmp_path / "stage1.pt")
    with pytest.raises(UserError, match=r"\(denoiser='unet' there, 'dit' here\)"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY_DIT, "--num_latents=0")
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--num_latents=0", "--total_images=16")
    assert checkpoint(tmp_path)["step"] == 2


@pytest.mark.parametrize("arguments, message", [
    (["--denoiser=mlp"], "--denoiser is unet or dit or uvit, not mlp"),
    (["--patch=5"], "patch 5 does not divide 28 x 28, the size of images"),
    (["--width=6"], "width 6 must be divisible by 4"),
    (["--heads=3"], "16 is not by 3"),
    (["--depth=0"], "depth must be positive"),
    (["--space=latents"], "--space is pixels or vae, not latents"),
    (["--space=vae"], "fashion-mnist-10k has no VAE latents: `python data.py fashion-mnist-10k --vae=FILE` computes them"),
])
def test_bad_input(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY_DIT, *arguments)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
