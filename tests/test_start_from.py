"""Training that starts from a network of our own; text models that start from LLaDA."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill, same
from scripts import TINY, run
from vaes import safetensors

from configurator import UserError
from llada import LLaDA
from model import DisCoDiff
from start_from import start_from, start_from_llada
from text import TextModel


def small(**changes):
    """Settings that TINY makes on Fashion-MNIST."""
    return dict(img_resolution=28, img_channels=1, label_dim=10, sigma_data=0.5, model_channels=8, channel_mult=(1, 2), num_blocks=1,
                channel_mult_emb=4, attn_resolutions=(14,), dropout=0.0, num_latents=3, codebook_size=5, latent_dim=8, latent_layers=1,
                latent_heads=2, latents_to_emb=True, encoder_patch=14, encoder_dim=16, encoder_layers=1, encoder_heads=4) | changes


def filled(**changes):
    """A network all of whose weights are something."""
    net = DisCoDiff(**small(**changes)).eval()
    net.load_state_dict({name: fill(name, p.shape) for name, p in net.state_dict().items()})
    return net


def save(path, net, half=False, **changes):
    """As a checkpoint of stage 1 has it: the network is the average, and the weights are others."""
    ema = {name: value.half() if half else value for name, value in net.state_dict().items()}
    path.parent.mkdir(exist_ok=True)
    torch.save(dict(made_by="train_stage1", config={}, model_args=small(**changes), step=1, ema=ema, qkv="sorted",
                    model={name: value * 0 for name, value in ema.items()}), path)
    return path


@torch.no_grad()
def test_plain_edm_of_our_own_gets_codes(tmp_path):
    """At first D is the source's, its averaged weights', to the bit, whatever the codes; from a folder, a file, and in half precision."""
    plain = filled(num_latents=0)
    x, sigma, c = torch.randn(4, 1, 28, 28), torch.tensor([0.1, 1.0, 10.0, 80.0]), torch.tensor([0, 3, 9, -1])
    save(tmp_path / "run" / "stage1.pt", plain, num_latents=0)
    for source in (tmp_path / "run", tmp_path / "run" / "stage1.pt"):
        disco = DisCoDiff(**small()).eval()
        assert start_from(str(source), disco, small()) is False  # no trained encoder
        for z in (torch.tensor([[0, 1, 2]] * 4), torch.tensor([[4, 4, 0]] * 4)):
            assert torch.equal(disco.denoise(x, sigma, c, disco.condition(z)), plain.denoise(x, sigma, c))
    start_from(save(tmp_path / "half.pt", plain, half=True, num_latents=0), again := DisCoDiff(**small(num_latents=0)).eval(), small(num_latents=0))
    assert all(torch.equal(p, q.half().float()) for p, q in zip(again.parameters(), plain.parameters()))


@torch.no_grad()
def test_disco_diff_goes_on(tmp_path, capsys):
    """With all weights; a class embedding of as many classes is kept, another starts afresh."""
    path = save(tmp_path / "run" / "stage1.pt", source := filled())
    assert start_from(path, net := DisCoDiff(**small()), small())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), source.parameters())) and not capsys.readouterr().err
    for classes in (7, 0):
        net = DisCoDiff(**small(label_dim=classes))
        fresh = {name: p.clone() for name, p in net.state_dict().items()}
        start_from(path, net, small(label_dim=classes))
        assert capsys.readouterr().err == f"{path} has 10 classes, this run {classes}: a new class embedding starts afresh\n"
        for name, p in net.state_dict().items():
            assert torch.equal(p, fresh[name] if "map_label" in name else source.state_dict()[name])


@torch.no_grad()
def test_a_process_with_the_same_constants_goes_on(tmp_path):
    """EDM's network is PFGM++'s, whatever D, in both directions, plain or with codes; flow matching's is another."""
    edm, pfgm, other = (dict(process="edm"), dict(process="pfgm++", pfgm_D=128.0), dict(process="pfgm++", pfgm_D=32.0))
    for there, here in ((edm, pfgm), (pfgm, edm), (pfgm, other)):
        for plain in (dict(num_latents=0), {}):
            path = save(tmp_path / "there.pt", source := filled(**plain, **there), **plain, **there)
            start_from(path, net := DisCoDiff(**small(**here)), small(**here))
            x, sigma = torch.randn(2, 1, 28, 28), torch.tensor([0.5, 5.0])
            z = torch.tensor([[0, 1, 2], [4, 0, 1]])
            D = source.denoise(x, sigma, None, source.condition(z))
            assert torch.equal(net.eval().denoise(x, sigma, None, net.condition(z)), D)
    with pytest.raises(UserError, match=r"of other settings: process='pfgm\+\+' there, 'flow' here$"):
        start_from(path, DisCoDiff(**small(process="flow")), small(process="flow"))


def test_networks_of_our_own_that_do_not_fit(tmp_path):
    path, plain = save(tmp_path / "run" / "stage1.pt", filled()), save(tmp_path / "plain.pt", filled(num_latents=0), num_latents=0)
    older = small(latents_to_emb=False)
    del older["latents_to_emb"]  # as before there was such a setting
    torch.save(torch.load(path) | dict(model_args=older, ema=filled(latents_to_emb=False).state_dict()), tmp_path / "older.pt")
    start_from(tmp_path / "older.pt", DisCoDiff(**older), older)
    for source, changes, message in ((tmp_path / "older.pt", {}, "of other settings: latents_to_emb=False there, True here$"),
                                     (path, dict(latents_to_emb=False), "of other settings: latents_to_emb=True there, False here$"),
                                     (path, dict(num_latents=0), "has discrete latents, which its denoiser relies on: it can't go on with num_latents=0"),
                                     (path, dict(codebook_size=6, latent_heads=1), "of other settings: codebook_size=5 there, 6 here; latent_heads=2 there, 1 here$"),
                                     (plain, dict(sigma_data=0.4), "of other settings: sigma_data=0.5 there, 0.4 here$"),
                                     (plain, dict(model_channels=16), "of other settings: model_channels=8 there, 16 here$")):
        with pytest.raises(UserError, match=message) as error:
            start_from(source, DisCoDiff(**small(**changes)), small(**changes))
        assert "\n" not in str(error.value)


def test_what_is_no_network_to_start_from_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text.pkl").write_text("a text")
    Path("cut.pt").write_bytes((trained / "stage1.pt").read_bytes()[:-1000])
    np.savez("images.npz", images=np.zeros((2, 28, 28, 1), np.uint8))
    np.save("images.npy", np.zeros(3))
    torch.save([1, 2], "list.pt")
    for source, message in (("nothing", "there is no file or folder nothing to start from"), ("folder", "folder has no stage1.pt in it"),
                            (trained / "prior_ar.pt", "prior_ar.pt is a prior: a stage1.pt, or one of EDM's networks or DiT's, is wanted"),
                            ("cut.pt", "cut.pt is truncated or damaged"), ("images.npz", "images.npz holds images or other arrays, not a network"),
                            ("text.pkl", "text.pkl is neither a checkpoint nor one of EDM's networks"), ("images.npy", "is neither a checkpoint"),
                            ("list.pt", "list.pt is not a checkpoint of train_stage1.py")):
        with pytest.raises(UserError, match=message) as error:
            start_from(str(source), DisCoDiff(**small()), small())
        assert "\n" not in str(error.value)


def test_training_starts_from_a_run_and_from_what_ships(trained, tmp_path):
    """--init_from with the folder of a run; "pretrained" is found, and its settings differ."""
    settings = [*TINY, "--lr=1e-9", "--encoder_lr=1e-9", "--total_images=8"]
    run("train_stage1.py", f"--out_dir={tmp_path}", *settings, f"--init_from={trained}")
    source, made = (torch.load(folder / "stage1.pt") for folder in (trained, tmp_path))
    assert all((made["ema"][name] - value).abs().max() < 1e-7 for name, value in source["ema"].items())
    with pytest.raises(UserError, match="pretrained/stage1.pt is a network of other settings: .*model_channels=24 there, 8 here"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'b'}", *settings, "--init_from=pretrained")


LLADA = dict(vocabulary=9, mask_token=8, layers=2, dim=16, heads=2, hidden=24)


def llada_files(folder, changes=(), around="model.transformer."):
    """Its weights in two files with an index, in bfloat16, as published"""
    net = LLaDA(9, layers=2, dim=16, heads=2, hidden=24)
    state = {name: fill(name, p.shape) for name, p in net.named_parameters()} | dict(changes)
    state = {around + name: p.bfloat16() for name, p in state.items() if p is not None}
    names, files = [*state], {}
    for i, part in enumerate((names[::2], names[1::2])):
        (folder / f"model-{i}.safetensors").write_bytes(safetensors({name: state[name] for name in part}))
        files |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return state


def test_the_start_from_llada(tmp_path):
    """In several files, in bfloat16; START and codes get rows of their own, always the same; places get none."""
    state = llada_files(tmp_path)
    nets = [TextModel(3, 5, 4, **LLADA) for _ in range(2)]
    for net in nets:
        start_from_llada(tmp_path, net)
    ours = dict(nets[0].named_parameters())
    for name, p in state.items():
        name = name.removeprefix("model.transformer.")
        assert torch.equal(ours[name][:9] if name in ("wte.weight", "ff_out.weight") else ours[name], p.float())
    for name in ("wte.weight", "ff_out.weight"):
        published, new = ours[name][:9], ours[name][9:]
        assert new.shape == (1 + 5, 16) and new.std().item() == pytest.approx(published.std().item(), rel=0.3)
    assert ours["place"].eq(0).all() and same(dict(nets[0].state_dict()), dict(nets[1].state_dict()))
    start_from_llada(tmp_path, TextModel(3, 5, 4, **LLADA, place_embedding=False))


@pytest.mark.parametrize("changes, message", [
    ({"wte.weight": torch.zeros(10, 16)}, r"other sizes: wte.weight is \[10, 16\] there, \[9, 16\] here: change layers, dim"),
    ({"ln_f.weight": torch.zeros(12)}, r"ln_f.weight is \[12\] there, \[16\] here"),
    ({"blocks.2.attn_norm.weight": torch.zeros(16)}, "has blocks.2.attn_norm.weight, which this network lacks"),
    ({"ff_out.weight": None}, r"lacks 1 of this network's weights, \['ff_out.weight'\]")])
def test_weights_of_another_llada(tmp_path, changes, message):
    llada_files(tmp_path, changes)
    with pytest.raises(UserError, match=message) as error:
        start_from_llada(tmp_path, TextModel(3, 5, 4, **LLADA))
    assert "\n" not in str(error.value)


def test_damaged_weights_of_llada(tmp_path):
    llada_files(tmp_path)
    path = tmp_path / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="model-1.safetensors is damaged, or not a file of weights: its header has"):
        start_from_llada(tmp_path, TextModel(3, 5, 4, **LLADA))
