"""Each fault is really caused. Those that take minutes: python -m pytest -m soak"""

import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import checkpoint, same, same_training
from scripts import TINY, outputs, run, start, start_together, torchrun

import data
import training
from checkpoint import load_checkpoint
from configurator import UserError


def until(condition, process, timeout=120):
    began = time.time()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() - began < timeout
        time.sleep(0.01)


def step_of(folder):
    return checkpoint(folder)["step"] if (folder / "stage1.pt").exists() else 0


def workers_of(process):
    """Process ids of what torchrun started."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "train_stage1.py" in line]


# ----------------------------------------------------------------------------------------------------
# numbers that are none


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_without_finite_gradients_is_skipped(tmp_path, monkeypatch, value):
    """One bad pixel in the third batch, after the encoder's first phase: weights, moments and Adam's step count stay to the bit, and training goes on."""
    to_float, save, calls, states = data.to_float, training.save_checkpoint, [], []

    def injected(images, device="cpu"):
        calls.append(1)
        y = to_float(images, device)
        if len(calls) == 5:
            y[0, 0, 5, 5] = value
        return y

    run("train_stage1.py", f"--out_dir={tmp_path / 'two'}", *TINY, "--total_images=16", "--log_every=16")
    monkeypatch.setattr(data, "to_float", injected)
    monkeypatch.setattr(training, "save_checkpoint", lambda path, state: (states.append(copy.deepcopy(state)), save(path, state)))
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--save_every=8", "--log_every=24")
    states = states[2:]  # from the end of that phase on
    assert [s["step"] for s in states] == [0, 1, 2, 3, 4, 5, 6]
    trained = [(s["model"], s["optimizer"]["state"]) for s in states]
    assert [same(a, b) for a, b in zip(trained[1:], trained[2:])] == [False, True, False, False, False]
    assert [s["skipped"].tolist() for s in states[2:5]] == [[0, 0], [1, 1], [0, 1]]
    reports = [json.loads(line) for line in open(tmp_path / "stage1.jsonl")]
    assert [r["skipped"] for r in reports] == [1, 1] and all(np.isfinite([r["loss"], r["bits"]]).all() for r in reports)
    two = json.loads(open(tmp_path / "two" / "stage1.jsonl").readline())
    assert reports[0]["loss"] == pytest.approx(two["loss"], rel=1e-6)  # the mean of the two good steps
    assert reports[0]["bits"] == pytest.approx(two["bits"], rel=1e-4)


@pytest.mark.parametrize("script, name, settings", [
    ("train_stage1.py", "stage1.pt", [*TINY, "--coarse_images=0"]), ("train_stage1.py", "stage1.pt", [*TINY, "--coarse_images=800"]),
    ("train_prior.py", "prior_ar.pt", ["--layers=1", "--dim=16", "--heads=2", "--batch_size=8", "--device=cpu"])],
    ids=["stage 1", "the encoder's first phase", "prior"])
def test_a_run_whose_gradients_stay_bad_stops(trained, tmp_path, monkeypatch, script, name, settings):
    """NaN in a gradient of each step from the 20th on: a message, and the weights of before."""
    in_phase = "--coarse_images=800" in settings
    (tmp_path / "stage1.pt").write_bytes((trained / "stage1.pt").read_bytes())
    steps, init, step = [], torch.nn.Linear.__init__, torch.optim.Adam.step

    def poisoned(self, *arguments, **options):
        init(self, *arguments, **options)
        self.weight.register_hook(lambda gradient: gradient * (float("nan") if len(steps) >= 20 else 1))

    monkeypatch.setattr(torch.nn.Linear, "__init__", poisoned)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (steps.append(1), step(self)))
    with pytest.raises(UserError, match=r"the gradients of the last 20 steps were not finite.*has the weights from before") as error:
        run(script, f"--out_dir={tmp_path}", *settings, "--total_images=800", "--log_every=80", "--save_every=80", "--overwrite=True")
    left = checkpoint(tmp_path, name)
    assert len(steps) == 40 and "\n" not in str(error.value) and in_phase == ("try a lower --coarse_lr or --coarse_spread;" in str(error.value))
    assert (left["coarse"]["step"], left["step"]) == (30, 0) if in_phase else \
        (left["step"], left["skipped"].tolist()) == (30, [10, 10])
    assert all(p.isfinite().all() for key in ("model", "ema") for p in left[key].values())


# ----------------------------------------------------------------------------------------------------
# files


def test_a_data_set_that_changes_under_a_run(tmp_path, monkeypatch):
    """Written to, cut off or deleted while it is mapped: the run stops at once, with the checkpoint of before."""
    images, labels, _ = data.load("fashion-mnist-10k")
    load, save = data.load, training.save_checkpoint
    path = tmp_path / "set" / "images.npy"
    monkeypatch.setattr(data, "load", lambda name: load(name, tmp_path))
    monkeypatch.setattr(data, "class_names", lambda name: [*"0123456789"])
    for name, harm in (("cut", lambda: path.write_bytes(path.read_bytes()[:-1000])), ("deleted", path.unlink),
                       ("written", lambda: np.load(path, mmap_mode="r+").__setitem__((0, 0, 0, 0), 77))):
        path.parent.mkdir(exist_ok=True)
        np.save(path, images[:64])
        np.save(tmp_path / "set" / "labels.npy", labels[:64])
        (tmp_path / "set" / "classes.json").write_text(json.dumps(list(range(10))))

        def save_and_harm(path, state):
            save(path, state)
            if state["step"] == 2:
                harm()

        monkeypatch.setattr(training, "save_checkpoint", save_and_harm)
        with pytest.raises(UserError, match="^set changed while it was being trained on: prepare it as it was"):
            run("train_stage1.py", f"--out_dir={tmp_path / name}", *TINY, "--dataset=set", "--save_every=8")
        assert checkpoint(tmp_path / name)["step"] == 2


def test_a_disk_that_fills_while_saving(trained, tmp_path):
    """No file may grow beyond what the first checkpoint, which has no moments, takes: one line, nothing lost, and with more room it goes on."""
    settings = [*TINY, "--save_every=16"]
    size = (trained / "stage1.pt").stat().st_size
    (tmp_path / "limited.py").write_text(
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size * 3 // 4},) * 2); sys.argv.pop(0); sys.path.insert(0, '.'); "
        "runpy.run_path('train_stage1.py', run_name='__main__')")
    arguments = [f"--out_dir={tmp_path / 'full'}", *settings]
    process = start(tmp_path / "limited.py", "train_stage1.py", *arguments)
    _, errors = process.communicate()
    message = f"error: can't write {tmp_path}/full/stage1.pt: File too large; the file that was there before is untouched"
    assert process.returncode == 2 and message in errors and "Traceback" not in errors, errors
    assert checkpoint(tmp_path / "full")["step"] == 0
    run("train_stage1.py", *arguments)
    assert same_training(checkpoint(trained), checkpoint(tmp_path / "full"))


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(trained, tmp_path, capsys):
    settings = [*TINY, "--save_every=16"]
    run("train_stage1.py", f"--out_dir={tmp_path / 'cut'}", *settings, "--total_images=32")
    path = tmp_path / "cut" / "stage1.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    capsys.readouterr()
    run("train_stage1.py", f"--out_dir={tmp_path / 'cut'}", *settings)
    assert "stage1.pt is truncated or damaged: using the previous one" in capsys.readouterr().err
    assert same_training(checkpoint(trained), checkpoint(tmp_path / "cut"))


# ----------------------------------------------------------------------------------------------------
# signals


STOPS = {signal.SIGTERM: ("SIGTERM", 143), signal.SIGINT: ("Ctrl-C", 130)}
LONG = {"train_stage1.py": [*TINY, "--total_images=240"],
        "train_prior.py": ["--layers=1", "--dim=16", "--heads=2", "--batch_size=50", "--total_images=20000", "--device=cpu"]}
BEGUN = {"stage1.pt": "stage1.previous.pt"}  # is there when the encoder's first phase is over


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    """A folder with runs that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(trained / "stage1.pt", folder)
    run("train_prior.py", f"--out_dir={folder}", *LONG["train_prior.py"])
    run("train_stage1.py", f"--out_dir={folder}", *LONG["train_stage1.py"], "--overwrite=True")
    return folder


@pytest.mark.parametrize("script, name, stop", [("train_stage1.py", "stage1.pt", signal.SIGTERM), ("train_prior.py", "prior_ar.pt", signal.SIGTERM),
                                                ("train_stage1.py", "stage1.pt", signal.SIGINT)])
def test_sigterm_and_ctrl_c_save_and_the_same_command_goes_on(trained, undisturbed, tmp_path, script, name, stop):
    if script == "train_prior.py":
        shutil.copy(trained / "stage1.pt", tmp_path)
    command = [f"--out_dir={tmp_path}", *LONG[script], "--save_every=1000000", "--log_every=1000000"]
    process = start(script, *command)
    until((tmp_path / BEGUN.get(name, name)).exists, process)
    time.sleep(0.1)
    process.send_signal(stop)
    printed, errors = process.communicate(timeout=60)
    said, code = STOPS[stop]
    assert process.returncode == code and "Traceback" not in errors, errors
    stopped = checkpoint(tmp_path, name)
    images = stopped["step"] * stopped["config"]["batch_size"]
    assert re.search(rf"stopped by {said} after {images:,} \w+, which .*{name} has: the same command goes on", printed) and images > 0
    run(script, *command)
    assert same_training(checkpoint(undisturbed, name), checkpoint(tmp_path, name))


@pytest.mark.parametrize("to, stop", [pytest.param("torchrun", signal.SIGTERM, marks=pytest.mark.soak),
                                      pytest.param("torchrun", signal.SIGINT, marks=pytest.mark.soak),
                                      pytest.param("one worker", signal.SIGTERM, marks=pytest.mark.soak), ("one worker", signal.SIGINT)])
def test_a_signal_to_several_processes(tmp_path, to, stop):
    """All stop after the same step, with the same exit code, whichever of them has heard the signal."""
    settings = [*TINY, "--total_images=4800", "--save_every=1000000"]
    process = torchrun("--nproc_per_node=2", "train_stage1.py", f"--out_dir={tmp_path}", *settings)
    until((tmp_path / BEGUN["stage1.pt"]).exists, process)
    time.sleep(0.5)
    os.kill(process.pid if to == "torchrun" else workers_of(process)[1], stop)
    printed, errors = process.communicate(timeout=90)
    assert process.returncode
    said = re.search(rf"stopped by {STOPS[stop][0]} after ([\d,]+) images", printed)
    codes, code = re.findall(r"exitcode +: (-?\d+)", errors), str(STOPS[stop][1])
    one_is_enough = torch.__version__ < "2.7"  # whose torchrun may tell of one alone
    assert to == "torchrun" or codes == [code] * 2 or one_is_enough and codes == [code], errors
    assert said and "train_stage1.py\", line" not in errors, (printed, errors)
    assert checkpoint(tmp_path)["step"] * 8 == int(said[1].replace(",", "")) > 0


# ----------------------------------------------------------------------------------------------------
# soak


@pytest.mark.soak
def test_torchrun_starts_a_killed_worker_again(tmp_path):
    """SIGKILL to one of two, in the middle: the run ends by itself, with the weights of one that nobody disturbed; and
    --overwrite=True does not begin a second time."""
    settings = [*TINY, "--total_images=160", "--save_every=16", "--overwrite=True"]
    whole = start_together(2, "train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    assert "is ready" in outputs(whole)[0][0]
    process = torchrun("--nproc_per_node=2", "--max-restarts=2", "train_stage1.py", f"--out_dir={tmp_path / 'killed'}",
                       *settings)
    until(lambda: step_of(tmp_path / "killed") >= 4, process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    printed, errors = process.communicate(timeout=180)
    assert process.returncode == 0 and "is ready" in printed and errors.count("exitcode: -9") == 1, errors
    assert same_training(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed"))


@pytest.mark.soak
@pytest.mark.parametrize("launch", [start, partial(torchrun, "--nproc_per_node=2")], ids=["alone", "torchrun"])
def test_twenty_kills(tmp_path, launch):
    """SIGKILL at 20 random moments, the same command each time: never an unreadable checkpoint, and the same weights in the end."""
    settings = [*TINY, "--total_images=6400", "--save_every=8", "--log_every=80"]
    whole = launch("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    assert "is ready" in whole.communicate(timeout=600)[0]
    rng, kills, steps = random.Random(0), 0, []
    while kills < 20:
        process = launch("train_stage1.py", f"--out_dir={tmp_path / 'killed'}", *settings)
        before = step_of(tmp_path / "killed")
        until(lambda: step_of(tmp_path / "killed") > before or process.poll() is not None, process)
        time.sleep(rng.random() * 2)
        victims = [process.pid, *workers_of(process)]
        if process.poll() is not None:
            break
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        state = load_checkpoint(tmp_path / "killed" / "stage1.pt", "train_stage1")
        steps.append(state["step"])
    assert kills == 20 and steps == sorted(steps), steps
    done = launch("train_stage1.py", f"--out_dir={tmp_path / 'killed'}", *settings)
    assert "is ready" in done.communicate(timeout=600)[0]
    assert same_training(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed"))


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_small_disk(tmp_path):
    """A tmpfs that holds two checkpoints and not a third: one line, the two are whole, and a larger one takes the run to its end."""
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *TINY, "--save_every=16")
    size = (tmp_path / "whole" / "stage1.pt").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 2}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        process = start("train_stage1.py", f"--out_dir={disk / 'run'}", *TINY, "--save_every=16")
        _, errors = process.communicate()
        assert process.returncode == 2 and "No space left on device; the file that was there before is untouched" in errors, errors
        assert {p.name for p in (disk / "run").glob("*.pt*")} == {"stage1.pt", "stage1.previous.pt"} and step_of(disk / "run") > 0
        assert subprocess.run(["mount", "-o", f"remount,size={size * 5}", disk]).returncode == 0
        assert start("train_stage1.py", f"--out_dir={disk / 'run'}", *TINY, "--save_every=16").wait() == 0
        assert same_training(checkpoint(tmp_path / "whole"), checkpoint(disk / "run"))
    finally:
        subprocess.run(["umount", disk])
