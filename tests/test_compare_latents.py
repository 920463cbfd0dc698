"""Which latents: what is run, what is kept, and what the tables say."""
import json
import os
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import write

import compare_latents
import compare_models
import data
from configurator import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), np.uint8)


def write_log(path, lines):
    write(path, "\n".join(map(json.dumps, lines)).encode())


def write_prior(folder, kind, step):
    unit = "loss" if kind == "diffusion" else "bits"
    lines = [{"images": i * step, unit: 8.0 - i, f"held_out_{unit}": 9.0 - i} for i in (1, 2)]
    write_log(folder / f"prior_{kind}.jsonl", lines)
    write(folder / f"prior_{kind}.pt")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """With the other scripts replaced by some that only write their files -> a list of what is run."""
    commands = []

    def fake(script, *arguments):
        settings = dict(a[2:].split("=", 1) if a.startswith("--") else ("config", a) for a in arguments if a)
        commands.append((script, settings))
        folder = Path(settings.get("out_dir", ""))
        if script == "train_stage1.py":
            state = dict(made_by="train_stage1", config=dict(dataset="set", held_out=4, batch_size=32), model_args={}, step=1, ema={})
            write_log(folder / "stage1.jsonl", [dict(images=9, kld=[2.5, 0.5])] if "continuous" in settings else
                      [dict(images=9, bits=21.0, perplexity=[9.0, 11.0])])
            torch.save(state, folder / "stage1.pt")
            os.utime(folder / "stage1.pt", (time.time() - 10,) * 2)
            if "prior" in settings:
                write_prior(folder, "ar", 50)
        elif script == "train_prior.py":
            write_prior(folder, settings["prior"], 50)
        elif script == "sample.py":
            order = np.concatenate(data.split(40, 4))
            with open(folder / f"{settings['name']}.npz", "wb") as file:
                np.savez(file, images=IMAGES[order])
            os.utime(folder / f"{settings['name']}.npz", (time.time() - 4,) * 2)
        elif script == "eval_fid.py":
            images = Path(settings["images"])
            write(images.with_suffix(".classifier.json"), json.dumps({"FD-classifier": float(len(images.stem))}).encode(), 2)

    monkeypatch.setattr(data, "load", lambda name: (IMAGES, np.arange(40) % 3, 3))
    for module in (compare_latents, compare_models):
        monkeypatch.setattr(module, "run", fake)
    monkeypatch.setattr(compare_latents, "out_dir", str(tmp_path))
    return commands


def of_script(commands, name):
    return [settings for script, settings in commands if script == name]


def rows_of(path):
    return {line[:12].strip(): line[12:].split() for line in path.read_text().splitlines()[3:]}


def test_sizes_are_compared_once(commands, tmp_path):
    compare_latents.main(["--question=sizes", "--total_images=1000"])
    stage1, priors = of_script(commands, "train_stage1.py"), of_script(commands, "train_prior.py")
    sizes = [(int(s["num_latents"]), int(s["codebook_size"])) for s in stage1]
    assert [m * np.log2(k) for m, k in sizes] == [32, 32, 32, 32, 16, 48] and len({s["out_dir"] for s in stage1}) == 6
    assert {(s["batch_size"], s["total_images"]) for s in priors} == {("32", "1024")}  # as many steps as stage 1
    assert len(of_script(commands, "sample.py")) == len(of_script(commands, "eval_fid.py")) == 12
    rows = rows_of(tmp_path / "sizes.txt")
    assert [*rows] == ["4x256", "8x16", "16x4", "32x2", "8x4", "8x64"]
    assert rows["8x16"] == ["21", "10", "6", "7", "0", "11", "7"]  # copies; the names' lengths: "oracle-2000", "ar-2000"
    assert (tmp_path / "sizes.png").stat().st_size > 1000
    found = [json.loads(line) for line in (tmp_path / "sizes.jsonl").read_text().splitlines()]
    assert found[0]["arm"] == "4x256" and found[0]["log"] == [[50, 7, 8], [100, 6, 7]]
    commands.clear()
    compare_latents.main(["--question=sizes", "--total_images=1000", "--arms=8x4,8x16"])
    assert {script for script, _ in commands} == {"train_stage1.py", "train_prior.py"} and len(commands) == 4


def test_continuous_latents_are_compared_with_codes(commands, tmp_path):
    compare_latents.main(["--question=continuous", "--seeds=(0,1)", "--kld_weights=(0.1,2)"])
    stage1, priors = of_script(commands, "train_stage1.py"), of_script(commands, "train_prior.py")
    assert [(s.get("num_latents"), s.get("kld_weight")) for s in stage1[::2]] == [("0", None), ("8", None), ("8", "0.1"), ("8", "2.0")]
    assert [s["prior"] for s in priors[::2]] == ["ar", "diffusion", "diffusion"] and {s["seed"] for s in stage1} == {"0", "1"}
    rows = rows_of(tmp_path / "continuous.txt")
    assert rows["plain"] == ["-"] * 6 + ["9", "+-", "0"] and rows["kld0.1"][:4] == ["3", "+-", "0", "-"]
    assert (tmp_path / "continuous.png").stat().st_size > 1000
    assert {Path(s["out_dir"]).name for s in priors} == {
        f"{arm}-seed{seed}" for arm in ("8x16-100000", "kld0.1-100000+400000", "kld2-100000+400000") for seed in (0, 1)}


def test_table_3_at_the_papers_sizes(commands, tmp_path, monkeypatch):
    """The command of the docstring: 10 x 100, or 1,000 numbers, and one Transformer for both priors."""
    words = shlex.split(compare_latents.__doc__.replace("\\\n", " ").split("--question=continuous")[2].split("#")[0])
    compare_latents.main(["--question=continuous", *words, f"--out_dir={tmp_path}", "--features=classifier"])
    stage1, priors = of_script(commands, "train_stage1.py"), of_script(commands, "train_prior.py")
    assert [(s["num_latents"], s.get("codebook_size")) for s in stage1] == [("0", None)] + [("10", "100")] * 3
    assert [s.get("kld_weight") for s in stage1] == [None, None, "0.1", "1.0"]
    assert [s["prior"] for s in priors] == ["ar", "diffusion", "diffusion"]
    assert {s["config"] for s in priors} == {"config/imagenet64_prior.py"} and {s["config"] for s in stage1} == {"config/imagenet64.py"}


def test_stages_are_compared(commands, tmp_path):
    compare_latents.main(["--question=stages", "--joint_weights=0.5", "--prior_config=config/dlc_prior.py"])
    stage1 = {Path(s["out_dir"]).name.split("-100000")[0]: s for s in of_script(commands, "train_stage1.py")}
    assert [*stage1] == ["8x16", "8x16-one", "moving", "moving-one", "joint0.5"]
    along = [arm for arm, s in stage1.items() if (s.get("prior"), s.get("prior_config")) == ("ar", "config/dlc_prior.py")]
    assert along == ["8x16-one", "moving-one", "joint0.5"] and stage1["joint0.5"]["kld_weight"] == "0.5"
    assert [s.get("encoder_lr") for s in stage1.values()] == [None, None, "0.0001", "0.0001", "0.0001"]
    afterwards = [Path(s["out_dir"]).name.split("-100000")[0] for s in of_script(commands, "train_prior.py")]
    assert afterwards == ["8x16", "moving"] and len(rows_of(tmp_path / "stages.txt")) == 5


@pytest.mark.parametrize("classes", [0, 3])
def test_near_is_1_for_samples_that_know_nothing(tmp_path, monkeypatch, classes):
    """But the class, which decides the brightness here; and 0 for copies, whatever the order of the data set's split."""
    labels = np.arange(40) % classes if classes else None
    images = IMAGES // 4 + (0 if labels is None else 60 * labels.astype(np.uint8)[:, None, None, None])
    monkeypatch.setattr(data, "load", lambda name: (images, labels, classes))
    order = np.concatenate(data.split(40, 4))
    means = np.stack([images[(np.arange(40) - i) % max(classes, 1) == 0].mean(0) for i in order])
    for name, x, wanted in (("copies", images[order], 0), ("mean", means, 1)):
        np.savez(tmp_path / f"{name}.npz", images=x)
        assert compare_latents.near(tmp_path / f"{name}.npz", "set", 4) == pytest.approx(wanted, abs=1e-6)


def test_without_held_out_images_nothing_is_trained(commands, tmp_path):
    (tmp_path / "none.py").write_text("held_out = 0\n")
    with pytest.raises(UserError, match="none.py, line 1: with held_out = 0 no images are left"):
        compare_latents.main([f"--stage1_config={tmp_path / 'none.py'}", f"--out_dir={tmp_path}"])
    assert not commands


@pytest.mark.parametrize("argument, message", [
    ("--question=why", "--question is sizes, continuous or stages, not why"),
    ("--arms=8x16,9x9", "--arms of the question sizes are some of 4x256,8x16,.*, not 9x9"),
    ("--latents=8", "--latents is a number of latents and of their values, such as 8x16, not 8"),
    ("--num_images=9", "num_images is 10 or more, not 9"), ("--seeds=()", "seeds takes different"),
    ("--total_images=0", "total_images must be positive"), ("--kld_weights=(0.1,-1)", "kld_weights and joint_weights are positive"),
    ("--joint_weights=(1.0,1e999)", "kld_weights and joint_weights are positive, and finite"),
    ("--features=vgg", "--features is classifier or inception")])
def test_mistakes_are_told(argument, message):
    with pytest.raises(UserError, match=message) as error:
        compare_latents.main([argument])
    assert "\n" not in str(error.value)
