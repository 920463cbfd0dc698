import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run
from PIL import Image

import bench
import data
import plot
import training
from checkpoint import previous as previous_of
from checkpoint import resume
from compare_priors import distances, shuffled_in_class
from configurator import UserError
from trained import load_prior, load_stage1

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
    """To the bit: weights, average and optimiser, with dropout and mirroring too."""
    settings = [*TINY, "--dropout=0.2", "--xflip=True", "--log_every=16"]
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    for images in (16, 40, 48):
        run("train_stage1.py", f"--out_dir={tmp_path / 'parts'}", *settings, f"--total_images={images}")
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["step"] == 6 and same_training(whole, parts)
    run("train_stage1.py", f"--out_dir={tmp_path / 'other'}", *settings, "--seed=1")
    assert not same(whole["ema"], checkpoint(tmp_path / "other")["ema"])
    for prior in ("ar", "sedd"):
        for name, images in (("whole", 200), ("parts", 100), ("parts", 200)):
            run("train_prior.py", f"--out_dir={tmp_path / name}", *PRIOR, f"--prior={prior}", f"--total_images={images}")
        whole, parts = (checkpoint(tmp_path / name, f"prior_{prior}.pt") for name in ("whole", "parts"))
        assert whole["step"] == 4 and same_training(whole, parts) and not same(whole["model"], whole["ema"])


@pytest.mark.soak
def test_a_killed_run_continues(tmp_path):
    """SIGKILL in the middle, then the same command line."""
    settings = [*TINY, "--total_images=240", "--save_every=16", "--log_every=16"]
    command = [sys.executable, "train_stage1.py", f"--out_dir={tmp_path / 'killed'}", *settings]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "stage1.previous.pt").exists() or checkpoint(tmp_path / "killed")["step"] == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = checkpoint(tmp_path / "killed")["step"]
    assert 2 <= stopped < 30
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "is ready" in done.stdout
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    assert same_training(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed"))
    logs = [[json.loads(line) for line in open(tmp_path / name / "stage1.jsonl")] for name in ("whole", "killed")]
    assert [r["images"] for r in logs[0]] == [r["images"] for r in logs[1]] == list(range(16, 241, 16))


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


@contextlib.contextmanager
def a_crash(monkeypatch, step):
    """Inside, a run crashes once it has saved this step. -> a list that gets the steps that are saved"""
    save, saved = training.save_checkpoint, []

    def save_and_crash(path, state):
        save(path, state)
        saved.append(state["step"])
        if state["step"] == step:
            raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_checkpoint", save_and_crash)
        yield saved


def test_overwrite_replaces_once_and_then_goes_on(tmp_path, monkeypatch):
    """What was there before the command was first given is replaced; the run that it began is continued, and replaced when it has ended."""
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *TINY)
    command = [f"--out_dir={tmp_path / 'run'}", *TINY, "--overwrite=True", "--save_every=8"]
    run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *TINY, "--seed=1", "--keep_every=24")
    assert {p.name for p in (tmp_path / "run").glob("stage1-*")} == {"stage1-000000024.pt", "stage1-000000048.pt"}
    with a_crash(monkeypatch, 3) as saved, pytest.raises(ZeroDivisionError):
        run("train_stage1.py", *command)
    assert saved == [0, 1, 2, 3] and not list((tmp_path / "run").glob("stage1-*"))
    with a_crash(monkeypatch, -1) as saved:
        run("train_stage1.py", *command)
    assert saved == [4, 5, 6] and same_training(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "run"))
    with monkeypatch.context() as patched:  # torchrun's second attempt, after a worker died when all was done
        patched.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert "is finished: it has seen 48 images" in run("train_stage1.py", *command)
    with a_crash(monkeypatch, -1) as saved:
        run("train_stage1.py", *command)
    assert saved == [0, 1, 2, 3, 4, 5, 6]


def test_overwrite_and_the_stage_1_of_a_prior(trained, tmp_path, monkeypatch):
    """A prior that was begun goes on, unless it is of another stage 1."""
    command = [f"--out_dir={tmp_path}", *PRIOR, "--total_images=200", "--save_every=50", "--overwrite=True"]
    stage1 = checkpoint(trained)
    for bias in (0, 1):
        stage1["ema"]["model.out_conv.bias"] += bias
        torch.save(stage1, tmp_path / "stage1.pt")
        with a_crash(monkeypatch, 2) as saved, pytest.raises(ZeroDivisionError):
            run("train_prior.py", *command)
        assert saved == [0, 1, 2]
    with a_crash(monkeypatch, -1) as saved:
        run("train_prior.py", *command)
    assert saved == [3, 4]


def test_which_checkpoints_are_continued(tmp_path, capsys):
    """Of `resume` alone: what --overwrite=True makes of other, finished, damaged and strange checkpoints; settings of old ones."""
    config = dict(overwrite=True, change="", lr=1.0, batch_size=8, total_images=48)
    path = tmp_path / "stage1.pt"

    def resumed(**changes):
        return resume(path, config | changes, dict(m=3), ("total_images", "overwrite", "change"), ("lr",), "train_stage1", encoder=7)

    def write(file=path, **changes):
        torch.save(dict(made_by="train_stage1", config=config, model_args=dict(m=3), step=5, ema={}, model={}, optimizer={}, encoder=7)
                   | changes, file)
        return file

    assert resumed() is None
    write()
    assert resumed()["step"] == 5
    for changes in (dict(lr=2.0), dict(total_images=40), dict(total_images=100)):
        assert resumed(**changes) is None
    for other in (dict(model_args=dict(m=4)), dict(encoder=8), dict(config=config | dict(overwrite=False)), dict(made_by="train_prior"), dict(step=6)):
        write(**other)
        assert resumed() is None, other
    write(previous := previous_of(path), step=4)
    path.write_bytes(b"damaged")
    assert resumed()["step"] == 4 and "using the previous one" in capsys.readouterr().err
    assert resumed(lr=2.0) is None and not capsys.readouterr().err
    previous.write_bytes(b"damaged")
    assert resumed() is None
    write(config={key: value for key, value in config.items() if key != "lr"})  # from before there was such a setting
    assert resumed()["step"] == 5 and resumed(overwrite=False)["step"] == 5


def test_settings_that_may_change(tmp_path):
    """The new rate is used, and recorded; what is no such setting is named."""
    settings = [f"--out_dir={tmp_path / 'run'}", *TINY, "--warmup_images=0"]
    run("train_stage1.py", *settings, "--total_images=16")
    state = checkpoint(tmp_path / "run")
    for group in state["optimizer"]["param_groups"]:
        group["peak_lr"] = 123.0  # which older checkpoints carry
    torch.save(state, tmp_path / "run" / "stage1.pt")
    with pytest.raises(UserError, match="dropout=0.0 there, 0.1 here; lr=0.002 there, 0.01 here.: say --change=dropout,lr to continue"):
        run("train_stage1.py", *settings, "--lr=0.01", "--dropout=0.1")
    with pytest.raises(UserError, match="say --change=lr,dropout to continue with the new values"):
        run("train_stage1.py", *settings, "--lr=0.01", "--dropout=0.1", "--change=lr")
    with pytest.raises(UserError) as error:
        run("train_stage1.py", *settings, "--lr=0.01", "--seed=1")
    assert "--change" not in str(error.value)
    with pytest.raises(UserError, match="--change=lr,seed: seed can't change during a run; these can: lr, encoder_lr, warmup_images"):
        run("train_stage1.py", *settings, "--change=lr,seed")
    with pytest.raises(UserError, match="--overwrite=True begins anew, --change goes on"):
        run("train_stage1.py", *settings, "--change=lr", "--overwrite=True")
    run("train_stage1.py", *settings, "--lr=0.01", "--dropout=0.1", "--change=lr, dropout", "--total_images=24")
    state = checkpoint(tmp_path / "run")
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == [0.01, 0.01, 5e-5]
    assert state["config"]["lr"] == 0.01 and state["model_args"]["dropout"] == 0.1
    run("train_stage1.py", *settings, "--lr=0.01", "--dropout=0.1", "--total_images=32")
    assert checkpoint(tmp_path / "run")["step"] == 4
    shutil.copy(tmp_path / "run" / "stage1.pt", tmp_path)
    settings = [f"--out_dir={tmp_path}", *PRIOR, "--warmup_images=0"]
    run("train_prior.py", *settings, "--total_images=50")
    with pytest.raises(UserError, match="say --change=lr to continue with the new values"):
        run("train_prior.py", *settings, "--total_images=100", "--lr=0.5")
    run("train_prior.py", *settings, "--total_images=100", "--lr=0.5", "--change=lr")
    assert checkpoint(tmp_path, "prior_ar.pt")["optimizer"]["param_groups"][0]["lr"] == 0.5


def test_checkpoints_that_stay(tmp_path):
    """Weights and average of their step, without the optimiser: they can be sampled from, be trained on from, and get a prior."""
    run("train_stage1.py", f"--out_dir={tmp_path / 'short'}", *TINY, "--total_images=24")
    run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *TINY, "--keep_every=24")
    path, short = tmp_path / "run" / "stage1-000000024.pt", checkpoint(tmp_path / "short")
    kept = torch.load(path)
    assert all(same(kept[key], short[key]) for key in ("model", "ema", "step", "model_args")) and not {"optimizer", "skipped"} & kept.keys()
    sample = ["--num_images=4", "--num_steps=2", "--device=cpu", "--seed=3"]
    run("sample.py", f"--out_dir={tmp_path / 'run'}", *sample, f"--checkpoint={path}", "--code=0,1,2")
    run("sample.py", f"--out_dir={tmp_path / 'short'}", *sample, "--code=0,1,2")
    made = [np.load(tmp_path / name / "samples.npz")["images"] for name in ("run", "short")]
    assert np.array_equal(*made)
    with pytest.raises(UserError, match=r"there is no prior .*prior_ar.pt: give codes by --code or --encode"):
        run("sample.py", f"--out_dir={tmp_path / 'run'}", *sample, f"--checkpoint={path}")
    run("train_prior.py", f"--out_dir={tmp_path / 'run'}", *PRIOR, "--total_images=50")
    with pytest.raises(UserError, match="another stage 1: give codes by --code or --encode, .* copy .*24.pt into a folder of its own as stage1.pt"):
        run("sample.py", f"--out_dir={tmp_path / 'run'}", *sample, f"--checkpoint={path}")
    with pytest.raises(UserError, match="--checkpoint=nothing.pt: there is no such file"):
        run("sample.py", f"--out_dir={tmp_path / 'run'}", *sample, "--checkpoint=nothing.pt")
    (tmp_path / "own").mkdir()
    shutil.copy(path, tmp_path / "own" / "stage1.pt")
    run("train_prior.py", f"--out_dir={tmp_path / 'own'}", *PRIOR, "--total_images=50")
    run("sample.py", f"--out_dir={tmp_path / 'own'}", *sample)
    with pytest.raises(UserError, match=r"stage1.pt has weights alone, .* --init_from=.*own/stage1.pt, or start anew"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'own'}", *TINY)


def test_gradients_are_those_of_the_loss_whatever_its_scale(trained, tmp_path):
    """As fp16 has it: scaled for the backward pass alone, by a power of two here, which changes no bit."""
    shutil.copy(trained / "stage1.pt", tmp_path)
    for script, settings in (("train_stage1.py", TINY), ("train_prior.py", PRIOR)):
        found = []
        for scale in (1, 128):
            folder = tmp_path if script == "train_prior.py" else tmp_path / str(scale)
            scope, ready = bench.prepared(script, "default", folder, "cpu", *settings)
            ready.scale = scale
            loss = scope["gradients"](ready, 0)
            found.append((loss, [p.grad for p in ready.parameters]))
        assert same(*found) and any(g.any() for g in found[0][1])


def test_what_stage_1_leaves_and_prints(tmp_path):
    printed = run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--log_every=24", "--preview_every=24")
    assert {p.name for p in tmp_path.iterdir()} == {"stage1.pt", "stage1.previous.pt", "stage1.jsonl", "stage1_curves.png",
                                                   "preview_000000024.png", "preview_000000048.png"}
    rows = [json.loads(line) for line in open(tmp_path / "stage1.jsonl")]
    assert [r["images"] for r in rows] == [24, 48]
    assert all(1 <= u <= 5 for r in rows for u in r["perplexity"]) and len(rows[0]["perplexity"]) == 3
    assert 0 <= rows[0]["bits"] <= 3 * np.log2(5)
    assert all(r["grad_norm"] > 0 and r["lr"] == 2e-3 and r["skipped"] == 0 for r in rows)
    table = printed[printed.index("own codes"):].splitlines()[1:9]
    assert [float(line.split()[0]) for line in table] == [0.02, 0.1, 0.3, 1, 3, 10, 30, 80]


def test_processes_and_accumulation_change_nothing(tmp_path):
    """One step: Adam's first moment is 0.1 times the gradient of the whole batch. Then the weights after ten, and the logs."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_stage1.py"]
    for images in (8, 80):
        settings = [*TINY, "--log_every=8", f"--total_images={images}", "--overwrite=True"]
        run("train_stage1.py", f"--out_dir={tmp_path / 'one'}", *settings)
        run("train_stage1.py", f"--out_dir={tmp_path / 'micro'}", *settings, "--batch_gpu=2")
        subprocess.run([*torchrun, f"--out_dir={tmp_path / 'two'}", *settings, "--batch_gpu=2"], cwd=ROOT, check=True,
                       capture_output=True)
        if images == 8:
            gradients = {name: [s["exp_avg"] for s in checkpoint(tmp_path / name)["optimizer"]["state"].values()]
                         for name in ("one", "micro", "two")}
            largest = max(g.abs().max() for g in gradients["one"])
            for name in ("micro", "two"):
                for a, b in zip(gradients["one"], gradients[name], strict=True):
                    assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-7 * largest
    begin, one, micro, two = (torch.cat([p.flatten() for p in checkpoint(tmp_path / name, file)["model"].values()]) for name, file in (
        ("one", "stage1.previous.pt"), ("one", "stage1.pt"), ("micro", "stage1.pt"), ("two", "stage1.pt")))
    assert (one - begin).norm() > 0.5
    for other in (micro, two):
        apart = (other - one).abs()  # Adam divides by the gradient's size: where that is nothing but rounding, so is the step
        assert apart.quantile(0.99) < 1e-6 and apart.norm() < 0.01 * (one - begin).norm()
    logs = {name: [json.loads(line) for line in open(tmp_path / name / "stage1.jsonl")] for name in ("one", "micro", "two")}
    for name in ("micro", "two"):
        for a, b in zip(logs["one"], logs[name], strict=True):
            assert a["images"] == b["images"] and a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-3)
            assert a["bits"] == pytest.approx(b["bits"], rel=1e-2, abs=1e-3)


def test_kept_logits_are_the_encoders(tmp_path):
    """In half precision, of each image and of its mirror image; and the prior does without them."""
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--xflip=True")
    run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, "--total_images=50", "--cache_gb=0")
    assert not list(tmp_path.glob("logits-*"))
    (tmp_path / "logits-00000000.npy").write_bytes(b"of an older encoder")
    run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, "--total_images=100")
    (file,) = tmp_path.glob("logits-*.npy")
    whole = file.read_bytes()
    for other in (np.zeros((1, 5, 3, 5), np.float16), np.zeros((2, 10_000, 3, 5), np.int8)):
        np.save(file, other)
        with pytest.raises(UserError, match="logits-.*npy is damaged: delete it, and start again"):
            run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, "--total_images=150")
    file.write_bytes(whole)
    kept, (images, _, _) = np.load(file), data.load("fashion-mnist-10k")
    assert kept.shape == (2, 10_000, 3, 5) and kept.dtype == np.float16
    encoder = load_stage1(tmp_path, "cpu")[0].encoder
    for i in (0, 1234, 9999):
        both = np.stack([images[i], images[i][:, ::-1]])
        assert torch.allclose(encoder(data.to_float(both)), torch.from_numpy(kept[:, i]).float(), atol=4e-3)
    assert np.abs(kept[0] - kept[1]).max() > 0.1


def test_bits_are_what_they_say(trained):
    """Against sums over the kept logits, written out with NumPy."""
    printed = run("train_prior.py", f"--out_dir={trained}", *PRIOR, "--total_images=500", "--overwrite=True")
    bits = {line[:37].strip(): float(line[37:].split()[0]) for line in printed.splitlines() if line.startswith("  ")}
    assert bits["uniform codes, m log2 k"] == pytest.approx(3 * np.log2(5), abs=0.01)
    logits = np.load(next(trained.glob("logits-*.npy")))[0].astype(float)  # (N, m, k)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels, (train, held_out) = data.load("fashion-mnist-10k")[1], data.split(10_000, 16)
    q = p[train].mean(0)
    assert bits["independent latents"] == pytest.approx(-(p[held_out] * np.log2(q)).sum() / 16, abs=0.01)
    q = np.stack([p[train][labels[train] == c].mean(0) for c in range(10)])
    wanted = -(p[held_out] * np.log2(q[labels[held_out]])).sum() / 16
    assert bits["independent latents given the class"] == pytest.approx(wanted, abs=0.01)
    model = load_prior(trained, "ar", "cpu", load_stage1(trained, "cpu")[1])
    codes = torch.from_numpy((p + 0.0).argmax(-1))[held_out]
    nats = torch.nn.functional.cross_entropy(model(codes, torch.from_numpy(labels[held_out])).flatten(0, 1), codes.flatten())
    assert bits["this prior, given the class"] == pytest.approx(3 * nats.item() / np.log(2), rel=0.1)


def test_images_of_ones_own_at_the_first_try(tmp_path, monkeypatch):
    """Two dozen photographs of two classes, 64 pixels: every default fits, up to the samples; names are where classes are named."""
    for i in range(24):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((100, 70), 50 + i).convert("RGB").save(path)
    root, titles = tmp_path / "datasets", []
    data.prepare("pets", str(tmp_path / "photos"), transform="center-crop-dhariwal", root=root)
    for function in (data.load, data.class_names, data.made_of):
        monkeypatch.setattr(data, function.__name__, partial(function, root=root))
    monkeypatch.setattr(plot, "save_grid", lambda images, path, columns, names=(): titles.append(names))
    run("train_stage1.py", "--dataset=pets", f"--out_dir={tmp_path / 'out'}", "--total_images=32", "--device=cpu")
    state = checkpoint(tmp_path / "out")
    assert {k: state["config"][k] for k in ("held_out", "attn_resolutions", "encoder_patch")} == dict(
        held_out=2, attn_resolutions=(16,), encoder_patch=16)
    assert state["classes"] == ["cat", "dog"] and set(titles[0]) <= {"cat", "dog"} and len(titles[0]) == 2
    run("train_prior.py", f"--out_dir={tmp_path / 'out'}", *PRIOR, "--total_images=250")
    run("sample.py", f"--out_dir={tmp_path / 'out'}", "--num_images=2", "--num_steps=2", "--class_label=dog", "--device=cpu")
    with np.load(tmp_path / "out" / "samples.npz") as made:
        assert made["images"].shape == (2, 64, 64, 3) and (made["labels"] == 1).all()
    assert data.made_of(str(tmp_path / "out" / "samples.npz"))["transform"] == "center-crop-dhariwal"
    with pytest.raises(UserError) as error:  # what does not fit is said at once
        run("train_stage1.py", "--dataset=pets", f"--out_dir={tmp_path / 'no'}", "--held_out=500", "--attn_resolutions=7,", "--encoder_patch=7")
    assert str(error.value) == ("held_out is 500: the data set has 24 images, -1 takes a tenth; attn_resolutions has [7]: the feature maps are "
                                "[64, 32, 16], (0,) takes the last; encoder_patch 7 does not divide images of 64 pixels, 0 takes a quarter")


@pytest.mark.parametrize("arguments, message", [
    (["--channel_mult=1,2,2,2"], "28 pixels can't be halved 3 times"),
    (["--attn_resolutions=8,"], r"attn_resolutions has \[8\]: the feature maps are \[28, 14\]"),
    (["--encoder_patch=5"], "encoder_patch 5 does not divide"),
    (["--dataset=nothing"], "there is no data set 'nothing'"),
    (["--held_out=10000"], "held_out is 10000: the data set has 10000 images"),
    (["--batch_size=0"], "batch_size must be positive"),
    (["--encoder_heads=0"], "encoder_heads must be positive"),
    (["--seed=-1"], "seed can't be negative"),
    (["--P_mean=inf"], "P_mean must be finite, not inf"),
    (["--null_prob=2"], "null_prob 2.0 and dropout 0.0 are probabilities"),
    (["--channel_mult=()"], "channel_mult has a positive number"),
    (["--model_channels=2"], "2 channels can't be split"),
    (["--encoder_heads=3"], "16 is not by 3"),
    (["--batch_size=10", "--batch_gpu=4"], "10 images per process can't be split into 3 equal parts of at most 4"),
    (["--device=cuda:99"], "--device=cuda:99 can't be used here"),
    (["--nun_latents=3"], "the nearest is 'num_latents'"),
])
def test_bad_input(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, *arguments)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_data_set_that_has_changed(tmp_path, monkeypatch):
    images, labels, _ = data.load("fashion-mnist-10k")
    monkeypatch.setattr(data, "load", lambda name: (images[:100], labels[:100], 10))
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY)
    monkeypatch.setattr(data, "load", lambda name: (images[100:200], labels[100:200], 10))
    with pytest.raises(UserError, match="data_identity=.* there"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--total_images=80")
    with pytest.raises(UserError, match="has changed since"):
        run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR)


def test_a_data_set_without_labels(tmp_path, monkeypatch):
    images, _, _ = data.load("fashion-mnist-10k")
    monkeypatch.setattr(data, "load", lambda name: (images[:100], None, 0))
    with pytest.raises(UserError, match="no class labels: train with --class_cond=False"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY)
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--class_cond=False")
    for prior in ("ar", "sedd"):
        run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, f"--prior={prior}", "--total_images=100")
        run("sample.py", f"--out_dir={tmp_path}", f"--prior={prior}", "--num_images=4", "--num_steps=2", "--device=cpu")
    printed = run("compare_priors.py", f"--out_dir={tmp_path}", "--num_codes=50", "--sedd_steps=2", "--etas=0.1,", "--device=cpu")
    assert "bits per image on 16 held-out images" in printed


def test_mistakes_end_with_one_line_and_exit_code_2(tmp_path):
    for script, argument, message in (("train_stage1.py", "--lr=fast", "error: --lr=fast: lr takes a float"),
                                      ("sample.py", f"--out_dir={tmp_path}", "error: there is no checkpoint"),
                                      ("train_prior.py", f"--out_dir={tmp_path}", "error: there is no checkpoint"),
                                      ("data.py", "mnits", "error: mnits can't be downloaded, only mnist"),
                                      ("data.py", "pets photos", "error: one name is wanted: `python data.py NAME")):
        done = subprocess.run([sys.executable, script, *argument.split()], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done
        assert not done.stdout


def test_help_shows_the_settings():
    for script in ("train_stage1.py", "train_prior.py", "sample.py", "data.py", "compare_priors.py", "bench.py"):
        printed = run(script, "--help")
        assert "python " + script in printed
        assert "overwrite = False" in printed or script in ("sample.py", "compare_priors.py", "bench.py")
        assert "num_steps = 18" in printed or script != "sample.py"


def test_processes_change_nothing_for_the_priors(tmp_path, trained):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_prior.py"]
    for prior in ("ar", "sedd"):
        settings = [*PRIOR, f"--prior={prior}", "--total_images=200"]
        for name in ("one", "two"):
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(trained / "stage1.pt", tmp_path / name)
        run("train_prior.py", f"--out_dir={tmp_path / 'one'}", *settings)
        subprocess.run([*torchrun, f"--out_dir={tmp_path / 'two'}", *settings], cwd=ROOT, check=True, capture_output=True)
        one, two = (checkpoint(tmp_path / name, f"prior_{prior}.pt") for name in ("one", "two"))
        moved = False
        for name, p in one["model"].items():
            assert torch.allclose(p, two["model"][name], atol=1e-4), name
            moved = moved or (p - one["ema"][name]).abs().max() > 1e-5
        assert moved


def test_sedd_training_prints_bounds_and_starts_uniform(trained):
    settings = [*PRIOR, "--prior=sedd", "--overwrite=True", "--total_images=50"]
    before = (trained / "prior_sedd.pt").read_bytes()
    printed = run("train_prior.py", f"--out_dir={trained}", *settings, "--lr=1e-12")
    (trained / "prior_sedd.pt").write_bytes(before)
    assert "on 16 held-out images, this prior's at most\n" in printed
    bits = {line[:37].strip(): float(line[37:].split()[0]) for line in printed.splitlines() if line.startswith("  ")}
    assert bits["this prior"] == bits["this prior, given the class"] == pytest.approx(3 * np.log2(5), abs=0.01)
    assert printed.endswith(f"next: python sample.py --out_dir={trained} --prior=sedd\n")


def test_the_class_is_dropped_as_often_as_said(trained, tmp_path):
    """With probability 1 the class can't have been learned from; with 0, "no class" has not."""
    shutil.copy(trained / "stage1.pt", tmp_path)
    for prior, name in (("ar", "class_token"), ("sedd", "label")):
        for drop, used in ((0.0, slice(0, 10)), (1.0, slice(10, 11))):
            settings = [*PRIOR, f"--prior={prior}", "--total_images=250", f"--label_drop={drop}", "--overwrite=True"]
            printed = run("train_prior.py", f"--out_dir={tmp_path}", *settings)
            assert ("\n  this prior  " in printed) == (drop > 0)  # bits without the class, where it has learned them
            state = checkpoint(tmp_path, f"prior_{prior}.pt")["optimizer"]["state"]
            model = load_prior(tmp_path, prior, "cpu", checkpoint(tmp_path))
            index = [n for n, _ in model.named_parameters()].index(name)
            moment = state[index]["exp_avg"].abs().amax(1)
            assert (moment[used] > 0).all() and moment.sum() == moment[used].sum()


@pytest.mark.parametrize("arguments, message", [
    (["--prior=gpt"], "--prior is ar or sedd, not gpt"),
    (["--label_drop=1.5"], "label_drop must be in 0 ... 1, .* they are 1.5 and 0.9999"),
    (["--ema_decay=1"], "ema_decay at least 0 and below 1"),
    (["--grad_clip=0"], "grad_clip must be positive"),
    (["--dim=14", "--heads=4"], "14 is not by 4"),
    (["--layers=3", "--dim=16"], "layers=1 there, 3 here"),
])
def test_bad_input_to_the_priors(trained, arguments, message):
    for prior in ("ar", "sedd"):
        with pytest.raises(UserError, match=message) as error:
            run("train_prior.py", f"--out_dir={trained}", *PRIOR, f"--prior={prior}", *arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("prior", ["ar", "sedd"])
def test_a_prior_that_diverges_is_not_saved(trained, tmp_path, prior):
    shutil.copy(trained / "stage1.pt", tmp_path)
    with pytest.raises(UserError, match="the weights are not finite any more: a lower --lr may help; .* is left as it was"):
        run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, f"--prior={prior}", "--lr=1e38", "--total_images=200")
    assert checkpoint(tmp_path, f"prior_{prior}.pt")["step"] == 0


def test_a_prior_of_the_other_kind_is_not_continued(trained, tmp_path):
    shutil.copy(trained / "stage1.pt", tmp_path)
    shutil.copy(trained / "prior_ar.pt", tmp_path / "prior_sedd.pt")
    with pytest.raises(UserError, match="prior='ar' there, 'sedd' here"):
        run("train_prior.py", f"--out_dir={tmp_path}", "--prior=sedd", "--layers=1", "--dim=16", "--heads=2", "--device=cpu")


def test_compare_priors(trained, tmp_path):
    shutil.copy(trained / "stage1.pt", tmp_path)
    bits = {}
    for kind, name in (("ar", "AR"), ("sedd", "SEDD, first-hitting")):
        table = run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, f"--prior={kind}", "--total_images=100")
        bits[name] = [line for line in table.splitlines() if line.startswith("  this prior, given the class")][0][37:].split()[0]
    settings = [f"--out_dir={tmp_path}", "--num_codes=300", "--batch_size=128", "--sedd_steps=4", "--etas=0.1,", "--device=cpu"]
    printed = run("compare_priors.py", *settings, "--samples=2")
    assert (tmp_path / "compare_priors.txt").read_text() in printed and (tmp_path / "compare_priors.png").stat().st_size > 1000
    rows = {line[:36].strip(): line[36:].replace("+-", "").split() for line in printed.splitlines()[2:-1]}
    assert list(rows) == ["real codes (the floor)", "independent latents given the class", "AR", "SEDD, first-hitting",
                          "SEDD, analytic, 3 steps", "SEDD, analytic, 4 steps", "and remasking, eta = 0.1"]
    assert [row[-6] for row in list(rows.values())[2:]] == ["3", "3", "3", "4", "4"]  # evaluations
    assert all(0 < float(v) < 1 for row in rows.values() for v in (row[-4], row[-2]))
    floor, ar = rows["real codes (the floor)"], rows["AR"]
    assert float(ar[-4]) > 1.5 * float(floor[-4])  # a prior after two steps is no good, and that shows
    for name, said in bits.items():
        assert float(said) == pytest.approx(float(rows[name][-8]), abs=0.02), name
    for changes, message in ((["--etas=1.0,"], "etas are probabilities below 1"), (["--sedd_steps=0"], "sedd_steps must be positive"),
                             (["--out_dir=/nowhere"], "there is no checkpoint")):
        with pytest.raises(UserError, match=message):
            run("compare_priors.py", *settings, *changes)


def test_distances_between_codes():
    """Total variation where it is known: z_2 = z_1 against independent ones, both uniform; and shuffling undoes pairs."""
    equal, every = torch.tensor([[0, 0], [1, 1]]), torch.cartesian_prod(torch.arange(2), torch.arange(2))
    assert distances(equal, every, k=2) == (0, 0.5)
    assert distances(torch.tensor([[0, 0]]), torch.tensor([[1, 0]]), k=2) == (0.5, 1)
    codes, labels = equal.repeat(4000, 1), torch.zeros(8000, dtype=torch.int64)
    labels[:4000] = 1
    codes[labels == 1] += 2
    shuffled = shuffled_in_class(codes, labels, torch.Generator().manual_seed(0))
    single, pairs = distances(codes, shuffled, k=4)
    assert single == 0 and pairs == pytest.approx(0.5, abs=0.02) and (shuffled[labels == 1] >= 2).all()
