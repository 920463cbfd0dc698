"""Plain EDM and DisCo-Diff side by side; the model that comes with the repository."""
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run, start

import compare_models
import data
from checkpoint import weights_checksum
from configurator import UserError
from trained import load_prior, load_stage1, load_trained_on, ship

SAMPLE = ["--num_steps=3", "--device=cpu", "--num_images=20", "--per_code=4"]


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


def test_what_ships_is_not_trained_on(trained, tmp_path):
    ship(trained, tmp_path)
    with pytest.raises(UserError, match="stage1.pt has the averaged weights alone.*--overwrite=True"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--total_images=64")


def test_the_shipped_model_makes_pictures(tmp_path):
    files = list((ROOT / "pretrained").iterdir())
    assert sum(path.stat().st_size for path in files) < 6e6 and {"stage1.jsonl", "README.md"} < {path.name for path in files}
    printed = run("sample.py", "--init_from=pretrained", f"--out_dir={tmp_path}", "--num_images=4", "--num_steps=5", "--device=cpu")
    assert "codes of the prior ar" in printed
    with np.load(tmp_path / "samples.npz") as f:
        assert f["images"].shape == (4, 28, 28, 1) and f["images"].std() > 30


def test_a_comparison_is_made_once(tmp_path, monkeypatch):
    """With the other scripts replaced: what is run, what is not run again, and what the table says."""
    commands, values = [], iter(range(100))

    def fake(script, *arguments):
        settings = dict(a[2:].split("=", 1) for a in arguments if a)
        commands.append((script, settings))
        if script == "train_stage1.py":
            folder = compare_models.Path(settings["out_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "stage1.pt").exists():
                torch.save(dict(made_by="train_stage1", config={"dataset": "set"}, model_args={}, step=1, ema={"w": torch.ones(2)},
                                model={}, optimizer={}), folder / "stage1.pt")
            (folder / "stage1.jsonl").write_text("{}\n")
        elif script == "train_prior.py":
            path = compare_models.Path(settings["out_dir"]) / "prior_ar.pt"
            if not path.exists():
                torch.save(dict(made_by="train_prior", config={}, model_args={}, step=1, ema={}, encoder=0), path)
        elif script == "sample.py":
            compare_models.Path(f"{settings['out_dir']}/{settings['name']}.npz").write_text("")
        else:
            result = compare_models.Path(settings["images"]).with_suffix(".classifier.json")
            result.write_text(json.dumps({"FD-classifier": 100.0 - next(values), "NFE": 35.0, "count": 7, "seconds per image": 1.0}))
            os.utime(result, (result.stat().st_mtime + 1,) * 2)

    monkeypatch.setattr(compare_models, "run", fake)
    monkeypatch.setattr(compare_models, "out_dir", str(tmp_path))
    compare_models.main()
    assert [script for script, _ in commands].count("sample.py") == 14 and [s for s, _ in commands].count("eval_fid.py") == 14
    trained = [(s["seed"], s.get("num_latents"), s["total_images"]) for script, s in commands if script == "train_stage1.py"]
    assert trained == [("0", "0", "100000"), ("0", None, "100000"), ("1", "0", "100000"), ("1", None, "100000")]
    assert [s["encode"] for _, s in commands if "encode" in s] == ["set", "set"]
    table = (tmp_path / "compare_models.txt").read_text().splitlines()
    assert table[2].split() == ["plain", "EDM", "96.500", "+-", "4.950", "35"]  # 100 and 93
    commands.clear()
    compare_models.main()
    assert {script for script, _ in commands} == {"train_stage1.py", "train_prior.py"}


def test_a_failure_ends_it(tmp_path):
    process = start("compare_models.py", f"--out_dir={tmp_path}", "--stage1_config=nowhere.py")
    _, errors = process.communicate()
    assert process.returncode == 2 and errors.count("\n") == 1 and "nowhere.py" in errors


@pytest.mark.parametrize("argument", ["--seeds=()", "--seeds=(-1,)", "--seeds=(1, 1)", "--total_images=0", "--num_images=9", "--features=vgg"])
def test_mistakes_are_told(argument):
    with pytest.raises(UserError, match=argument[2:].split("=")[0]):
        run("compare_models.py", argument)


@torch.no_grad()
def test_the_shipped_model_is_what_it_was():
    """Old checkpoints mean what they meant: codes of held-out images, their bits, and how far D at sigma = 3 is from them."""
    model, state = load_stage1(ROOT / "pretrained", "cpu")
    prior = load_prior(ROOT / "pretrained", "ar", "cpu", state)
    images, labels, _, held_out = load_trained_on(state["config"], "pretrained/stage1.pt")
    y, c = data.to_float(images[held_out[:40]]), torch.from_numpy(labels[held_out[:40]])
    z = model.encoder(y).argmax(2)
    assert z[5].tolist() == [13, 9, 11, 0, 12, 5, 13, 15] and z[2].tolist() == [10, 9, 9, 13, 7, 5, 11, 15]  # by far
    assert [prior.nats(z, labels).mean().item() / np.log(2) for labels in (c, None)] == pytest.approx([5.123, 5.672], abs=0.01)
    x, sigma = y + 3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)), torch.full((40,), 3.0)
    null = model.condition(z, torch.ones(40, dtype=torch.bool))
    errors = [(model.denoise(x, sigma, *given) - y).square().mean().item()
              for given in ((c, model.condition(z)), (c, null), (None, model.condition(z)))]
    assert errors == pytest.approx([0.0931, 0.1063, 0.1523], abs=2e-4)  # without the code, without the class
