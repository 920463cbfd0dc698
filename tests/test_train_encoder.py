"""Stage 0 of Discrete Latent Codes: its authors' step, what the script leaves, resuming, processes, mistakes."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import checkpoint, log_of, same, same_training
from scripts import Script, outputs, run, start_together
from test_training import a_crash
from test_vit import filled, reference

import data
from configurator import UserError
from start_from import start_from_dinov2
from trained import load_encoder
from vit import Distilled, SEMEncoder

TINY = ["--num_latents=32", "--codebook_size=8", "--dim=32", "--layers=1", "--heads=2", "--stem=4", "--prototypes=16",
        "--head_hidden=32", "--head_bottleneck=16", "--local_crops=1", "--batch_size=8", "--total_images=48", "--warmup_images=16",
        "--prototypes_held_images=8", "--log_every=16", "--held_out=16", "--device=cpu"]

# a step


@pytest.mark.parametrize("heads", ["shared", "separate"])
@pytest.mark.parametrize("targets", ["center", "sinkhorn"])
def test_a_step_equals_the_authors(tmp_path, monkeypatch, heads, targets):
    """Losses of their whole training step, and the norm of each parameter's gradient; the centres move after it."""
    want = reference("dlc_step")
    s, shapes = want["settings"], want[f"shapes_{heads}"]
    script = Script("train_encoder.py", "default", tmp_path, "cpu", "--batch_size=4", f"--prototypes={s['K']}", "--teacher_temp=0.05",
                    "--teacher_temp_start=0.05", f"--targets={'centring' if targets == 'center' else 'sinkhorn'}")
    for name in ("student", "teacher"):
        net = Distilled(s["img"], 3, s["L"], s["V"], s["dim"], s["K"], s["hid"], s["bot"], heads == "shared", patch=s["patch"],
                        layers=s["depth"], heads=s["heads"], registers=s["reg"])
        net.load_state_dict(filled(shapes, f"{name}."))
        setattr(script.run, "model" if name == "student" else "ema", net)
    script.run.forward = script.model
    monkeypatch.setitem(script.all, "views", lambda run, step: (want["global_crops"], want["local_crops"], want["mask"]))
    loss, of_images, of_patches, nearest, *_ = script.gradients(0)
    local, whole, *rest = want[f"{heads}_{targets}"].tolist()
    assert [of_images.item(), 0.1 * nearest.item(), of_patches.item(), loss.item()] == pytest.approx([local + whole, *rest], abs=1e-5)
    parameters = dict(script.model.named_parameters())
    for name, norm in zip(shapes, want[f"gradnorm_{heads}_{targets}"].tolist(), strict=True):
        if "sem_cls_norm" not in name:
            assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-4), name
    if targets == "center":
        script.run.parameters, script.run.ema_parameters = list(script.model.parameters()), list(script.ema.parameters())
        script.update(0)
        moved = torch.stack([want[f"center_{heads}_center"].flatten(), want[f"center_patch_{heads}_center"].flatten()])
        assert torch.allclose(script.run.carries["centers"], moved, atol=1e-6)


def test_rates_decay_and_momentum(tmp_path):
    """Layer by layer, as in DINOv2; norms, biases and LayerScale don't decay; prototypes are held at first."""
    script = Script("train_encoder.py", "default", tmp_path, "cpu", *TINY, "--layers=2", "--layer_decay=0.5", "--patch_lr=0.2", "--lr=1.0",
                    "--weight_decay=0.1", "--weight_decay_end=0.1", "--warmup_images=0", "--total_images=800")
    names = {id(p): name for name, p in script.model.named_parameters()}
    for held, step in ((True, 0), (False, 1)):
        for p in script.parameters:
            p.grad = torch.zeros_like(p)
        script.update(step)
        rate = script.at(step, 1.0, 1e-6)
        found = {names[id(p)]: (group["lr"] / rate, group["weight_decay"]) for group in script.optimizer.param_groups for p in group["params"]}
        assert found.keys() == dict(script.model.named_parameters()).keys()
        for name, expected in (("backbone.patch_embed.proj.weight", (0.2 / 8, 0.1)), ("backbone.patch_embed.stem.0.bias", (0.2 / 8, 0)),
                               ("backbone.pos_embed", (1 / 8, 0.1)), ("backbone.blocks.0.mlp.fc1.weight", (1 / 4, 0.1)),
                               ("backbone.blocks.1.ls2.gamma", (1 / 2, 0)), ("backbone.norm.weight", (1, 0)), ("backbone.sem_norm.weight", (1, 0)),
                               ("backbone.sem_embed.weight", (1, 0.1)), ("dino_head.mlp.0.weight", (1, 0.1)),
                               ("dino_head.last_layer.weight_v", (0 if held else 1, 0.1))):
            assert found[name] == pytest.approx(expected), name
    momentum = script.at(40, 0.98, 1)  # of 100 steps
    assert momentum == pytest.approx(1 - 0.02 * (1 + math.cos(0.4 * math.pi)) / 2)
    for p, average in zip(script.parameters, script.ema_parameters):
        p.data, p.grad = torch.ones_like(p), None
        average.zero_()
    script.optimizer.zero_grad()
    before = [p.clone() for p in script.parameters]
    for p in script.parameters:
        p.grad = torch.full_like(p, float("nan"))
    script.update(40)  # skipped, but for the average
    assert same(before, list(script.parameters)) and all(torch.allclose(a, torch.tensor(1 - momentum), atol=1e-6) for a in script.ema_parameters)


def test_views_are_those_of_the_batch_whatever_the_processes(tmp_path):
    """The first global crops, the second ones, the local ones; a process has its images' rows of each, and of the masks."""
    script = Script("train_encoder.py", "default", tmp_path, "cpu", *TINY, "--local_crops=3")
    whole, small, mask = script.views(5)
    assert whole.shape == (16, 1, 28, 28) and small.shape == (24, 1, 14, 14) and mask.shape == (16, 16) and mask.any(1).sum() == 8
    script.run.local_batch, parts = 4, []
    for rank in range(2):
        script.run.rank = rank
        parts.append(script.views(5))
    for index, crops in ((0, 2), (1, 3), (2, 2)):
        together = torch.cat([part[index].unflatten(0, (crops, 4)) for part in parts], 1).flatten(0, 1)
        assert torch.allclose(together.float(), (whole, small, mask)[index].float(), atol=1e-6)
    assert not torch.equal(script.views(6)[0], script.views(5)[0])


# the script


def test_what_the_script_leaves_and_prints(tmp_path):
    printed = run("train_encoder.py", f"--out_dir={tmp_path}", *TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.pt", "encoder.previous.pt", "encoder.jsonl", "encoder_curves.png"}
    rows = log_of(tmp_path / "encoder.jsonl")
    assert [row["images"] for row in rows] == [16, 32, 48]
    for row in rows:
        assert row["loss"] == pytest.approx(row["class_loss"] + row["patch_loss"] + 0.1 * row["koleo"], rel=1e-5)
        assert 0 < row["teacher_entropy"] < row["mean_entropy"] <= math.log(16) + 1e-5
        assert 1 <= row["perplexity"] <= 8 and 0 < row["distinct"] <= 1 and row["skipped"] == 0
    assert f"next: python train_stage1.py --codes={tmp_path} --out_dir={tmp_path}" in printed and "are distinct" in printed
    encoder, state = load_encoder(tmp_path)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(p, state["ema"][f"backbone.{name}"]) for name, p in encoder.state_dict().items())
    assert not same(state["model"], state["ema"]) and encoder(torch.zeros(2, 1, 28, 28)).shape == (2, 32, 8)
    assert "is finished" in run("train_encoder.py", f"--out_dir={tmp_path}", *TINY)


def test_rates_of_blocks_change_on_request(tmp_path):
    """From no decay, where all blocks have one rate, to 0.5."""
    run("train_encoder.py", f"--out_dir={tmp_path}", *TINY, "--total_images=16")
    settings = [*TINY, "--total_images=32", "--layer_decay=0.5", "--patch_lr=0.2", "--change=total_images,layer_decay,patch_lr"]
    run("train_encoder.py", f"--out_dir={tmp_path}", *settings)
    groups = checkpoint(tmp_path, "encoder.pt")["optimizer"]["param_groups"]
    rates = {(group["blocks_above"], group["patches"]): group["lr"] / groups[0]["lr"] for group in groups}
    assert rates == {(0, False): 1, (1, False): 0.5, (2, False): pytest.approx(0.25), (2, True): pytest.approx(0.05)}


@pytest.mark.parametrize("targets", ["sinkhorn", "centring"])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, monkeypatch, targets):
    """To the bit, drop path and centres too; whether activations are recomputed makes no difference."""
    settings = [*TINY, f"--targets={targets}", "--drop_path=0.3", "--save_every=16"]
    run("train_encoder.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    with a_crash(monkeypatch, 4) as saved, pytest.raises(ZeroDivisionError):
        run("train_encoder.py", f"--out_dir={tmp_path / 'parts'}", *settings, "--recompute=True")
    assert saved == [0, 2, 4]
    run("train_encoder.py", f"--out_dir={tmp_path / 'parts'}", *settings)
    whole, parts = (checkpoint(tmp_path / name, "encoder.pt") for name in ("whole", "parts"))
    assert whole["step"] == 6 and same_training(whole, parts) and bool(whole["centers"].any()) == (targets == "centring")
    whole, parts = (log_of(tmp_path / name / "encoder.jsonl") for name in ("whole", "parts"))
    assert all(line.pop("images_per_second") > 0 for line in whole + parts) and whole == parts


@pytest.mark.parametrize("targets", ["sinkhorn", "centring"])
def test_processes_change_nothing(tmp_path, targets):
    """Adam's first moment, 0.1 times the gradient, after one step; without KoLeo, which looks at each process's images."""
    settings = [*TINY, f"--targets={targets}", "--koleo_weight=0", "--total_images=8", "--log_every=8"]
    processes = start_together(2, "train_encoder.py", f"--out_dir={tmp_path / 'two'}", *settings)
    run("train_encoder.py", f"--out_dir={tmp_path / 'one'}", *settings)
    outputs(processes)
    one, two = (checkpoint(tmp_path / name, "encoder.pt") for name in ("one", "two"))
    moments = [[moment["exp_avg"] for moment in state["optimizer"]["state"].values()] for state in (one, two)]
    largest = max(moment.abs().max() for moment in moments[0])
    for a, b in zip(*moments, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-6 * largest
    assert torch.allclose(one["centers"], two["centers"], atol=1e-6)
    lines = [log_of(tmp_path / name / "encoder.jsonl")[0] for name in ("one", "two")]
    for name in ("loss", "class_loss", "patch_loss", "teacher_entropy", "mean_entropy"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4), name


@pytest.mark.parametrize("shape", [(64, 28, 28, 1), (64, 16, 16, 3)])
def test_images_without_variety(tmp_path, monkeypatch, shape):
    """The run says that it collapsed, and what to try, also if it is given again; its checkpoint stays."""
    monkeypatch.setattr(data, "load", lambda name: (np.full(shape, 90, np.uint8), None, 0))
    for _ in range(2):
        with pytest.raises(UserError, match=r"the encoder has collapsed: .*encoder.pt is kept\. Try images with more variety, --targets") as error:
            run("train_encoder.py", f"--out_dir={tmp_path}", *TINY, "--held_out=4")
    assert "\n" not in str(error.value) and checkpoint(tmp_path, "encoder.pt")["step"] == 6
    encoder, _ = load_encoder(tmp_path)
    assert encoder.patch == shape[1] // 4 and encoder.img_resolution == shape[1]
    if shape[3] == 1:  # and stage 1 refuses such an encoder, however few images are held out
        with pytest.raises(UserError, match="has collapsed: [0-9.]+% of its codes are distinct"):
            run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", f"--codes={tmp_path}", "--class_cond=False", "--held_out=4", "--device=cpu")


# mistakes


@pytest.mark.parametrize("arguments, message", [
    (["--patch=5"], "patch 5 does not divide crops of 28 and 10 pixels: change patch, global_size or local_size; 0 takes what fits"),
    (["--global_size=56"], "crops of 56 pixels are larger than the images, which have 28: change patch"),
    (["--batch_size=1"], "batch_size 1 is too small for Sinkhorn, which shares prototypes among images"),
    (["--batch_size=1", "--targets=centring"], "KoLeo looks for an image's neighbour in each process's batch, and 1 image has none"),
    (["--teacher_temp=0.005"], "teacher_temp 0.005 is too low for Sinkhorn"), (["--std=0"], "std is positive"),
    (["--batch_size=10000"], "batch_size 10000 exceeds the 9984 images to train on"), (["--blur_prob=2,2,2"], "blur_prob .* are at most 1"),
    (["--targets=centering"], "--targets is sinkhorn or centring, not centering"),
    (["--global_area=0.5,1.5"], r"global_area takes two shares, such as 0.1,0.5, not \(0.5, 1.5\)"),
    (["--mask_share=0.5,"], r"mask_share takes two shares"), (["--blur_prob=0.5,"], "blur_prob has 3 numbers"),
    (["--jitter=0.5,"], "jitter has 4 numbers"), (["--drop_path=1.0"], "drop_path is below"), (["--held_out=10000"], "held_out is 10000"),
    (["--dim=33"], "must be divisible by its heads: 33 is not by 2"), (["--mean=0.1,0.2"], "mean has 2 numbers, the images have 1 channels"),
    (["--init_from=nothing.pth"], "there is no file nothing.pth to start from")])
def test_mistakes(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_encoder.py", f"--out_dir={tmp_path}", *TINY, *arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_another_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint .*encoder.pt: run `python train_encoder.py --out_dir="):
        load_encoder(tmp_path)
    state = dict(made_by="train_encoder", config={}, step=0, model_args=dict(
        img_resolution=28, img_channels=1, num_latents=4, codebook_size=4, patch=14, dim=16, layers=1, heads=2, registers=1, prototypes=4,
        head_hidden=8, head_bottleneck=4))
    torch.save(state | dict(ema=Distilled(**state["model_args"] | dict(codebook_size=5)).state_dict()), tmp_path / "encoder.pt")
    with pytest.raises(UserError, match="encoder.pt is of another architecture than this Distilled: train anew.*sem_out") as error:
        load_encoder(tmp_path)
    assert "\n" not in str(error.value)


# the start from DINOv2


def dinov2(**changes):
    """An encoder like a published ViT, but small, and the file's weights for images of 32 pixels"""
    sizes = dict(img_channels=3, num_latents=4, codebook_size=4, patch=4, dim=8, layers=2, heads=2, registers=2)
    published = SEMEncoder(img_resolution=32, **sizes)
    weights = {name: value.normal_() for name, value in published.state_dict().items() if not name.startswith("sem_")}
    return SEMEncoder(**dict(img_resolution=16, **sizes) | changes), weights


def test_the_start_from_dinov2(tmp_path):
    """All its weights are taken, half precision too; positions are those of the smaller grid."""
    encoder, weights = dinov2()
    sems = {name: value.clone() for name, value in encoder.state_dict().items() if name.startswith("sem_")}
    weights["pos_embed"][0, 1:] = torch.arange(8.0).repeat(8)[:, None]
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "weights.pth")
    start_from_dinov2(str(tmp_path / "weights.pth"), encoder)
    for name, value in encoder.state_dict().items():
        if name != "pos_embed":
            assert torch.allclose(value, sems.get(name, weights.get(name)), atol=2e-3), name
    grid = encoder.pos_embed[0, 1:].view(4, 4, 8)
    assert torch.allclose(grid[:, 1:3], torch.tensor([2.5, 4.5])[None, :, None].expand(4, 2, 8), atol=0.05)


@pytest.mark.parametrize("changes, message", [
    (dict(layers=3), r"lacks 14 of the 50 weights of this ViT, \['blocks.2.attn.proj.bias'\]. Change layers, registers or stem"),
    (dict(layers=1), r"has 14 weights that this ViT lacks, \['blocks.1.attn.proj.bias'\]"), (dict(stem=2), "lacks 4 of the 40 weights"),
    (dict(dim=12), r"is a ViT of other sizes: cls_token is \[1, 1, 8\] there, \[1, 1, 12\] here; .*Change dim, patch or registers"),
    (dict(registers=3), r"register_tokens is \[1, 2, 8\] there, \[1, 3, 8\] here")])
def test_weights_that_do_not_fit(tmp_path, changes, message):
    encoder, weights = dinov2(**changes)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as error:
        start_from_dinov2(str(tmp_path / "weights.pth"), encoder)
    assert "\n" not in str(error.value)


def test_files_that_hold_no_weights(tmp_path):
    encoder, weights = dinov2()
    torch.save(weights | dict(pos_embed=torch.zeros(1, 30, 8)), tmp_path / "positions.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text(json.dumps("a text"))
    for name, message in (("positions", r"pos_embed is \[1, 30, 8\] there, \[1, 17, 8\] here"), ("list", "is damaged, or no file of weights"),
                          ("text", "is damaged, or no file of weights")):
        with pytest.raises(UserError, match=message):
            start_from_dinov2(str(tmp_path / f"{name}.pth"), encoder)
