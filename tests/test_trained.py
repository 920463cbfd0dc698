"""Trained folders: moving averages, checkpoints that do not fit, what ships."""
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from scripts import SAMPLE, TINY, run

import data
from checkpoint import weights_checksum
from configurator import UserError
from text import padded
from trained import load_prior, load_stage1, load_text, load_trained_on, prior_in, ship


def test_samples_are_of_the_moving_averages(trained):
    model, stage1 = load_stage1(trained, "cpu")
    networks = {"stage1": model, **{f"prior_{kind}": load_prior(trained, kind, "cpu", stage1) for kind in ("ar", "sedd")}}
    for name, network in networks.items():
        state = torch.load(trained / f"{name}.pt")
        assert all(torch.equal(weights, state["ema"][key]) for key, weights in network.state_dict().items())
        assert not all(torch.equal(weights, state["ema"][key]) for key, weights in state["model"].items())


def test_checkpoints_that_do_not_fit(trained, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken, ignore=shutil.ignore_patterns("*.previous.pt"))
    whole = (trained / "prior_ar.pt").read_bytes()
    (broken / "prior_ar.pt").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="prior_ar.pt is truncated or damaged"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    (broken / "prior_ar.pt").unlink()
    with pytest.raises(UserError, match=r"there is no checkpoint .*prior_ar.pt: run `python train_prior.py"):
        run("sample.py", f"--out_dir={broken}", "--prior=ar", *SAMPLE)
    (broken / "prior_ar.pt").write_bytes(whole)
    state = torch.load(trained / "stage1.pt")
    other = {**state, "model_args": {**state["model_args"], "model_channels": 16}}
    torch.save(other, broken / "stage1.pt")
    with pytest.raises(UserError, match="another architecture than this DisCoDiff"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    torch.save(state, broken / "stage1.pt")
    prior = torch.load(trained / "prior_ar.pt")
    torch.save({**prior, "model_args": {**prior["model_args"], "dim": 32}}, broken / "prior_ar.pt")
    with pytest.raises(UserError, match="another architecture than this Prior"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    torch.save({k: v for k, v in prior.items() if k != "encoder"}, broken / "prior_ar.pt")
    with pytest.raises(UserError, match="is not a checkpoint of train_prior.py"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    shutil.copy(trained / "prior_sedd.pt", broken / "prior_ar.pt")
    with pytest.raises(UserError, match="prior_ar.pt holds a prior of the kind 'sedd', not 'ar'"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    torch.save({**prior, "model_args": {**prior["model_args"], "num_latents": 4}}, broken / "prior_ar.pt")
    with pytest.raises(UserError, match=r"prior_ar.pt has m, k, classes = \[4, 5, 10\], stage 1 has \[3, 5, 10\]"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    (broken / "prior_ar.pt").write_bytes(whole)
    (broken / "prior_sedd.pt").unlink()
    with pytest.raises(UserError, match="prior_sedd.pt: run `python train_prior.py --prior=sedd --out_dir="):
        run("sample.py", f"--out_dir={broken}", *SAMPLE, "--prior=sedd")
    state["ema"]["model.out_conv.bias"] += 1
    torch.save(state, broken / "stage1.pt")
    with pytest.raises(UserError, match="trained on codes of another stage 1"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)


def test_the_prior_that_a_folder_has(tmp_path):
    assert prior_in(tmp_path) == "ar"
    (tmp_path / "prior_sedd.pt").touch()
    assert prior_in(tmp_path) == "sedd"
    (tmp_path / "prior_ar.pt").touch()
    assert prior_in(tmp_path) == "ar"


# what ships


def test_what_ships_samples_like_its_source(trained, tmp_path):
    ship(trained, tmp_path / "best")
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["prior_ar.pt", "stage1.jsonl", "stage1.pt"]
    for file in ("stage1.pt", "prior_ar.pt"):
        assert (tmp_path / "best" / file).stat().st_size < (trained / file).stat().st_size / 5
        whole, half = torch.load(trained / file), torch.load(tmp_path / "best" / file)
        assert half["config"] == whole["config"] | {"out_dir": ""} and not {"model", "optimizer"} & half.keys()
        for key, value in whole["ema"].items():
            assert half["ema"][key].dtype in (torch.float16, torch.int64) and torch.allclose(half["ema"][key].float(), value.float(), atol=1e-3)
    assert half["encoder"] == weights_checksum(torch.load(tmp_path / "best" / "stage1.pt")["ema"])
    run("sample.py", f"--out_dir={trained}", "--name=whole", *SAMPLE)
    run("sample.py", f"--out_dir={tmp_path}", f"--init_from={tmp_path / 'best'}", *SAMPLE)
    with np.load(trained / "whole.npz") as whole, np.load(tmp_path / "samples.npz") as half:
        assert np.array_equal(whole["codes"], half["codes"])
        assert np.abs(whole["images"].astype(int) - half["images"]).mean() < 1


def test_what_does_not_belong_together_is_not_shipped(trained, tmp_path):
    for file in ("stage1.pt", "prior_ar.pt"):
        state = torch.load(trained / file)
        torch.save(state | dict(encoder=0), tmp_path / file)
    with pytest.raises(UserError, match="of another stage 1"):
        ship(tmp_path, tmp_path / "best")
    before = (trained / "stage1.pt").read_bytes()
    with pytest.raises(UserError, match="name another folder"):
        ship(trained, f"{trained}/../{trained.name}")
    assert (trained / "stage1.pt").read_bytes() == before and not (tmp_path / "best").exists()


def test_a_text_model_ships_too(trained, written, tmp_path):
    """And writes what its source writes; one of another stage 1 does not."""
    shutil.copy(trained / "prior_ar.pt", tmp_path)
    for file in ("stage1.pt", "text.pt"):
        shutil.copy(written[0] / file, tmp_path)
    ship(tmp_path, tmp_path / "best")
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["prior_ar.pt", "stage1.jsonl", "stage1.pt", "text.pt"]
    half = torch.load(tmp_path / "best" / "text.pt")
    assert half["ema"]["wte.weight"].dtype == torch.float16 and not {"model", "optimizer"} & half.keys()
    prompt = ["--prompt=a dark coat", "--temperature=0"]
    run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, *prompt)
    run("sample.py", f"--out_dir={tmp_path}", f"--init_from={tmp_path / 'best'}", "--name=half", *SAMPLE, *prompt)
    with np.load(tmp_path / "samples.npz") as whole, np.load(tmp_path / "half.npz") as shipped:
        assert np.array_equal(whole["codes"], shipped["codes"])
    torch.save(torch.load(tmp_path / "text.pt") | dict(encoder=0), tmp_path / "text.pt")
    with pytest.raises(UserError, match="text.pt was trained on codes of another stage 1"):
        ship(tmp_path, tmp_path / "worse")
    assert not (tmp_path / "worse").exists()


def test_what_ships_is_not_trained_on(trained, tmp_path):
    ship(trained, tmp_path)
    with pytest.raises(UserError, match="stage1.pt has the averaged weights alone.*--overwrite=True"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--total_images=64")


@pytest.mark.parametrize("folder, prior", [("pretrained", "ar"), ("pretrained-dlc", "sedd")])
def test_the_shipped_models_make_pictures(tmp_path, folder, prior):
    files = list((ROOT / folder).iterdir())
    assert {"stage1.jsonl", "README.md"} < {path.name for path in files}
    assert sum(path.stat().st_size for path in files if path.name != "text.pt") < 6e6
    printed = run("sample.py", f"--init_from={folder}", f"--out_dir={tmp_path}", "--num_images=4", "--num_steps=5", "--device=cpu")
    assert f"codes of the prior {prior}" in printed
    with np.load(tmp_path / "samples.npz") as f:
        assert f["images"].shape == (4, 28, 28, 1) and f["images"].std() > 30


@torch.no_grad()
def test_the_shipped_model_is_what_it_was():
    """Old checkpoints mean what they meant: codes of held-out images, their bits, and how far D at sigma = 3 is from them."""
    model, state = load_stage1(ROOT / "pretrained", "cpu")
    prior = load_prior(ROOT / "pretrained", "ar", "cpu", state)
    images, labels, _, held_out = load_trained_on(state["config"], "pretrained/stage1.pt")
    y, c = data.to_float(images[held_out[:40]]), torch.from_numpy(labels[held_out[:40]])
    z = model.encoder(y).argmax(2)
    assert z[4].tolist() == [3, 0, 11, 8, 11, 15, 4, 0] and z[19].tolist() == [9, 4, 6, 7, 6, 2, 15, 6]  # by far
    assert [prior.nats(z, labels).mean().item() / np.log(2) for labels in (c, None)] == pytest.approx([12.579, 15.094], abs=0.01)
    x, sigma = y + 3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)), torch.full((40,), 3.0)
    null = model.condition(z, torch.ones(40, dtype=torch.bool))
    errors = [(model.denoise(x, sigma, *given) - y).square().mean().item()
              for given in ((c, model.condition(z)), (c, null), (None, model.condition(z)))]
    assert errors == pytest.approx([0.0690, 0.1105, 0.1226], abs=2e-4)  # without the code, without the class


@torch.no_grad()
def test_the_shipped_model_of_discrete_latent_codes_is_what_it_was():
    """Codes of held-out images, SEDD's bound on their bits, and how far D at sigma = 3 is from the images."""
    model, state = load_stage1("pretrained-dlc")
    prior = load_prior("pretrained-dlc", "sedd", "cpu", state)
    images, _, _, held_out = load_trained_on(state["config"], "pretrained-dlc/stage1.pt")
    y = data.to_float(images[held_out[:40]])
    z = model.encoder(y).argmax(2)
    first = [5, 0, 1, 1, 5, 0, 5, 4, 4, 1, 7, 1, 1, 5, 4, 6, 2, 4, 4, 5, 0, 0, 1, 0, 5, 3, 2, 4, 4, 5, 6, 3]
    assert (z[0, :32] == torch.tensor(first)).float().mean() > 0.9  # some are nearly ties
    bits = prior.nats(z[:10], generator=torch.Generator().manual_seed(0)) / np.log(2)
    assert bits.mean().item() == pytest.approx(71.61, rel=0.02)
    x, sigma = y + 3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)), torch.full((40,), 3.0)
    null = model.condition(z, torch.ones(40, dtype=torch.bool))
    errors = [(model.denoise(x, sigma, None, code) - y).square().mean().item() for code in (model.condition(z), null)]
    assert errors == pytest.approx([0.0732, 0.1285], abs=3e-4)


@torch.no_grad()
def test_the_shipped_text_model_is_what_it_was():
    """The bound on the bits of held-out images' codes, given the class, and given another."""
    model, state = load_stage1("pretrained-dlc")
    text, tokenizer = load_text("pretrained-dlc", "cpu", state)
    images, labels, _, held_out = load_trained_on(state["config"], "pretrained-dlc/stage1.pt")
    z, names = model.encoder(data.to_float(images[held_out[:40]])).argmax(2), data.class_names(state["config"]["dataset"])
    bits = []
    for away in (0, 5):
        prompts = [f"a {names[(label + away) % 10].lower()}" for label in labels[held_out[:40]]]
        captions = padded([tokenizer.encode(prompt) for prompt in prompts], text.context)
        nats = text.nats(z, captions, torch.Generator().manual_seed(0), draws=4)
        bits.append(nats.mean().item() / np.log(2))
    assert [float(b) for b in bits] == pytest.approx([69.71, 88.29], rel=0.01)
