import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
from configurator import UserError
from conftest import ROOT, TINY, run

PRIOR = ["--layers=1", "--dim=16", "--heads=2", "--batch_size=50", "--warmup_images=100", "--device=cpu"]


def checkpoint(folder, file="stage1.pt"):
    return torch.load(folder / file)


def same(a, b):
    """Equal to the bit: numbers, tensors, and dicts and lists of them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_training(a, b):
    return all(same(a[k], b[k]) for k in a if k != "config")


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    """To the bit: weights, average, optimiser and log, with dropout and mirroring too."""
    settings = [*TINY, "--dropout=0.2", "--xflip=True", "--log_every=16"]
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    for images in (16, 40, 48):
        run("train_stage1.py", f"--out_dir={tmp_path / 'parts'}", *settings, f"--total_images={images}")
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["step"] == 6 and same_training(whole, parts)
    run("train_stage1.py", f"--out_dir={tmp_path / 'other'}", *settings, "--seed=1")
    assert not same(whole["ema"], checkpoint(tmp_path / "other")["ema"])
    for script in ("whole", "parts"):
        run("train_prior.py", f"--out_dir={tmp_path / script}", *PRIOR, f"--total_images={200 if script == 'whole' else 100}")
    run("train_prior.py", f"--out_dir={tmp_path / 'parts'}", *PRIOR, "--total_images=200")
    assert same_training(checkpoint(tmp_path / "whole", "prior.pt"), checkpoint(tmp_path / "parts", "prior.pt"))


def test_a_killed_run_continues(tmp_path):
    """SIGKILL in the middle, then the same command line."""
    settings = [*TINY, "--total_images=160", "--save_every=16", "--log_every=16"]
    command = [sys.executable, "train_stage1.py", f"--out_dir={tmp_path / 'killed'}", *settings]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "stage1.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = checkpoint(tmp_path / "killed")["step"]
    assert 2 <= stopped < 20
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "is ready" in done.stdout
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    assert same_training(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed"))
    logs = [[json.loads(line) for line in open(tmp_path / name / "stage1.jsonl")] for name in ("whole", "killed")]
    assert [r["images"] for r in logs[0]] == [r["images"] for r in logs[1]] == list(range(16, 161, 16))


def test_finished_other_settings_overwrite(trained):
    before = (trained / "stage1.pt").stat().st_mtime_ns
    assert "is finished: it has seen 48 images" in run("train_stage1.py", f"--out_dir={trained}", *TINY)
    with pytest.raises(UserError, match=r"batch_size=8 there, 16 here; lr=0.\d+ there, 0.5 here\).*--overwrite=True"):
        run("train_stage1.py", f"--out_dir={trained}", *TINY, "--batch_size=16", "--lr=0.5")
    assert "is finished" in run("train_prior.py", f"--out_dir={trained}", "--layers=1", "--dim=16", "--heads=2",
                                "--total_images=500", "--device=cpu")
    with pytest.raises(UserError, match="layers=1 there, 2 here"):
        run("train_prior.py", f"--out_dir={trained}", "--layers=2", "--dim=16", "--heads=2", "--device=cpu")
    assert (trained / "stage1.pt").stat().st_mtime_ns == before


def test_overwrite_starts_anew(tmp_path):
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--total_images=16")
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--total_images=16", "--seed=3", "--overwrite=True")
    assert checkpoint(tmp_path)["config"]["seed"] == 3 and checkpoint(tmp_path)["step"] == 2


def test_what_stage_1_leaves_and_prints(tmp_path):
    printed = run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--log_every=24", "--preview_every=24")
    assert {p.name for p in tmp_path.iterdir()} == {"stage1.pt", "stage1.jsonl", "preview_000000024.png",
                                                   "preview_000000048.png"}
    rows = [json.loads(line) for line in open(tmp_path / "stage1.jsonl")]
    assert [r["images"] for r in rows] == [24, 48]
    assert all(1 <= u <= 5 for r in rows for u in r["perplexity"]) and len(rows[0]["perplexity"]) == 3
    assert 0 <= rows[0]["bits"] <= 3 * np.log2(5)
    table = printed[printed.index("own codes"):].splitlines()[1:9]
    assert [float(line.split()[0]) for line in table] == [0.02, 0.1, 0.3, 1, 3, 10, 30, 80]


def train_elsewhere(folder, processes, *settings):
    """Stage 1 with the dropout-free tiny network: weights after 6 steps, and the logged loss."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    subprocess.run([*command, "train_stage1.py", f"--out_dir={folder}", *TINY, "--log_every=8", *settings],
                   cwd=ROOT, check=True, capture_output=True)
    return checkpoint(folder), [json.loads(line) for line in open(folder / "stage1.jsonl")]


def test_processes_and_accumulation_change_nothing(tmp_path):
    """The same data, noise and global batch, to rounding. (SGD-like comparisons are not possible with Adam's
    normalised first steps, so weights are compared loosely, and losses and code statistics tightly.)"""
    run("train_stage1.py", f"--out_dir={tmp_path / 'one'}", *TINY, "--log_every=8")
    one = [json.loads(line) for line in open(tmp_path / "one" / "stage1.jsonl")]
    run("train_stage1.py", f"--out_dir={tmp_path / 'micro'}", *TINY, "--log_every=8", "--batch_gpu=2")
    _, two = train_elsewhere(tmp_path / "two", 2, "--batch_gpu=2")
    micro = [json.loads(line) for line in open(tmp_path / "micro" / "stage1.jsonl")]
    for other in (micro, two):
        for a, b in zip(one, other, strict=True):
            assert a["images"] == b["images"] and a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-3)
            assert a["bits"] == pytest.approx(b["bits"], rel=1e-2, abs=1e-3)
    for name in ("micro", "two"):
        difference = max((a - b).abs().max() for a, b in zip(checkpoint(tmp_path / "one")["model"].values(),
                                                             checkpoint(tmp_path / name)["model"].values()))
        assert difference < 0.01


def test_logits_are_the_same_whether_kept_or_not(trained, tmp_path):
    """In half precision: nearly all draws are the same, and so is the prior to a good approximation."""
    for name, gigabytes in (("kept", 1), ("not", 0)):
        shutil.copytree(trained, tmp_path / name)
        (tmp_path / name / "prior.pt").unlink()
        run("train_prior.py", f"--out_dir={tmp_path / name}", *PRIOR, "--total_images=500", f"--cache_gb={gigabytes}")
    a, b = (checkpoint(tmp_path / name, "prior.pt")["model"] for name in ("kept", "not"))
    assert max((a[k] - b[k]).abs().max() for k in a) < 0.02


def test_bits_are_what_they_say(trained):
    printed = run("train_prior.py", f"--out_dir={trained}", *PRIOR, "--total_images=500", "--overwrite=True")
    bits = {line[:37].strip(): float(line[37:].split()[0]) for line in printed.splitlines() if line.startswith("  ")}
    assert bits["uniform codes, m log2 k"] == pytest.approx(3 * np.log2(5), abs=0.01)
    assert bits["independent latents given the class"] <= bits["independent latents"] + 0.05
    assert bits["independent latents"] <= bits["uniform codes, m log2 k"] + 0.05
    assert 0 < bits["this prior, given the class"] < 8


@pytest.mark.parametrize("arguments, message", [
    (["--channel_mult=1,2,2,2"], "28 pixels can't be halved 3 times"),
    (["--attn_resolutions=8,"], r"attn_resolutions has \[8\]: the feature maps are \[28, 14\]"),
    (["--encoder_patch=5"], "encoder_patch 5 does not divide"),
    (["--dataset=nothing"], "there is no data set 'nothing'"),
    (["--held_out=10000"], "held_out is 10000: the data set has 10000 images"),
    (["--batch_size=0"], "batch_size must be positive"),
    (["--batch_size=10", "--batch_gpu=4"], "10 images a process can't be taken in 3 equal parts of at most 4"),
    (["--device=cuda:99"], "--device=cuda:99 can't be used here"),
    (["--nun_latents=3"], "the nearest is 'num_latents'"),
])
def test_bad_input(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, *arguments)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_data_set_without_labels(tmp_path, monkeypatch):
    images, _, _ = data.load("fashion-mnist-10k")
    monkeypatch.setattr(data, "load", lambda name: (images[:100], None, 0))
    with pytest.raises(UserError, match="no class labels: train with --class_cond=False"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY)
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--class_cond=False")
    run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, "--total_images=100")
    run("sample.py", f"--out_dir={tmp_path}", "--num_images=4", "--num_steps=2", "--device=cpu")


def test_mistakes_end_with_one_line_and_exit_code_2(tmp_path):
    for script, argument, message in (("train_stage1.py", "--lr=fast", "error: --lr=fast: lr takes a float"),
                                      ("sample.py", f"--out_dir={tmp_path}", "error: there is no checkpoint"),
                                      ("train_prior.py", f"--out_dir={tmp_path}", "error: there is no checkpoint"),
                                      ("data.py", "mnits", "error: mnits is not one of the sets")):
        done = subprocess.run([sys.executable, script, argument], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done
        assert not done.stdout


def test_help_shows_the_settings():
    for script in ("train_stage1.py", "train_prior.py", "sample.py", "data.py"):
        done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "python " + script in done.stdout and "overwrite = False" in done.stdout or script == "sample.py"
        assert "num_steps = 18" in done.stdout or script != "sample.py"
