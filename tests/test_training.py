"""What both training scripts share: runs that go on, begin anew or change their settings."""
import contextlib
import math
import shutil
import signal
import time

import pytest
import torch
from conftest import checkpoint, log_of, same, same_training
from scripts import PRIOR, TINY, outputs, run, start

import bench
import training
from configurator import UserError


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    """To the bit: weights, average and optimiser, with dropout and mirroring too; a prior's log but for the speed."""
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
            run("train_prior.py", f"--out_dir={tmp_path / name}", *PRIOR, f"--prior={prior}", "--log_every=50",
                f"--total_images={images}")
        whole, parts = (checkpoint(tmp_path / name, f"prior_{prior}.pt") for name in ("whole", "parts"))
        assert whole["step"] == 4 and same_training(whole, parts) and not same(whole["model"], whole["ema"])
        whole, parts = (log_of(tmp_path / name / f"prior_{prior}.jsonl") for name in ("whole", "parts"))
        assert all(line.pop("images_per_second") > 0 for line in whole + parts) and whole == parts
        assert all(line.keys() == {"images", "bits", "held_out_bits", "grad_norm", "lr", "skipped"} for line in whole)
        assert [line["images"] for line in whole] == [50, 100, 150, 200] and {line["skipped"] for line in whole} == {0}
        assert [line["lr"] for line in whole] == pytest.approx([0, 0.5e-3, 1e-3, 1e-3])  # linear warm-up
        assert whole[0]["held_out_bits"] == pytest.approx(3 * math.log2(5), abs=1e-3)  # uniform still
        assert all(line["grad_norm"] > 0 and 0 < line["bits"] < 30 for line in whole)


@pytest.mark.soak
def test_a_killed_run_continues(tmp_path):
    """SIGKILL in the middle, then the same command line."""
    settings = [*TINY, "--total_images=240", "--save_every=16", "--log_every=16"]
    command = ["train_stage1.py", f"--out_dir={tmp_path / 'killed'}", *settings]
    process = start(*command)
    while not (tmp_path / "killed" / "stage1.previous.pt").exists() or checkpoint(tmp_path / "killed")["step"] == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = checkpoint(tmp_path / "killed")["step"]
    assert 2 <= stopped < 30
    assert "is ready" in outputs([start(*command)])[0][0]
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    assert same_training(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed"))
    logs = [log_of(tmp_path / name / "stage1.jsonl") for name in ("whole", "killed")]
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


def test_overwrite_replaces_once_and_then_goes_on(trained, tmp_path, monkeypatch):
    """What was there before the command was first given is replaced; the run that it began is continued, and replaced when it has ended."""
    command = [f"--out_dir={tmp_path / 'run'}", *TINY, "--overwrite=True", "--save_every=8"]
    run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *TINY, "--seed=1", "--keep_every=24")
    assert {p.name for p in (tmp_path / "run").glob("stage1-*")} == {"stage1-000000024.pt", "stage1-000000048.pt"}
    with a_crash(monkeypatch, 3) as saved, pytest.raises(ZeroDivisionError):
        run("train_stage1.py", *command)
    assert saved == [0, 0, 0, 1, 2, 3] and not list((tmp_path / "run").glob("stage1-*"))  # twice in the encoder's phase
    with a_crash(monkeypatch, -1) as saved:
        run("train_stage1.py", *command)
    assert saved == [4, 5, 6] and same_training(checkpoint(trained), checkpoint(tmp_path / "run"))
    with monkeypatch.context() as patched:  # torchrun's second attempt, after a worker died when all was done
        patched.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert "is finished: it has seen 48 images" in run("train_stage1.py", *command)
    with a_crash(monkeypatch, -1) as saved:
        run("train_stage1.py", *command)
    assert saved == [0, 0, 0, 1, 2, 3, 4, 5, 6]


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


def test_settings_that_may_change(tmp_path):
    """The new rate is used, and recorded; what is no such setting is named."""
    settings = [f"--out_dir={tmp_path / 'run'}", *TINY, "--warmup_images=0", "--encoder_lr=5e-5"]
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
    with pytest.raises(UserError, match="--change=lr,seed: seed can't change during a run; these can: lr, code_lr, encoder_lr, warmup_images"):
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


def test_what_is_due_where_batches_do_not_divide_it():
    """Every 1,000 images, in batches of 128: after the step that passes them, and after the last one."""
    config = dict(batch_size=128, total_images=2_600)
    steps = [128 * i for i in range(1, 22)]
    assert [seen for seen in steps if training.due(1_000, seen, config)] == [1024, 2048, 2688]
    assert [seen for seen in steps if training.due(50, seen, config)] == steps
    assert not any(training.due(0, seen, config) for seen in steps)


def test_a_log_that_somebody_edited_or_a_picture_in_the_way_harms_no_run(tmp_path, capsys):
    """The run ends well, and says that there are no curves."""
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--log_every=8", "--total_images=24")
    curves, log = tmp_path / "stage1_curves.png", tmp_path / "stage1.jsonl"
    assert curves.exists()
    curves.unlink()
    for line in ('{"images": 8, "loss": "x"}', '{"images": 8, "loss": null}', '{"images": 8, "perplexity": []}'):
        log.write_text(line + "\n" + log.read_text())
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--log_every=8", "--total_images=32")
    assert "stage1_curves.png could not be drawn" in capsys.readouterr().err and not curves.exists()
    curves.mkdir()
    log.write_text("")
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--log_every=8")
    assert "stage1_curves.png could not be drawn" in capsys.readouterr().err
    assert checkpoint(tmp_path)["step"] == 6
