"""
Scripts of ours: in this process (`run`), before their first step (`Script`), in other processes
(`start`, `start_together`, `torchrun`).
"""
import functools
import gc
import inspect
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

import bench
from run import release

ROOT = Path(__file__).resolve().parent.parent

# a network that takes seconds, on the embedded data
TINY = ["--model_channels=8", "--channel_mult=1,2", "--attn_resolutions=14,", "--num_latents=3", "--codebook_size=5",
        "--latent_dim=8", "--latent_layers=1", "--encoder_dim=16", "--encoder_layers=1", "--encoder_patch=14",
        "--coarse_images=16", "--coarse_batch=8", "--preview_every=0", "--batch_size=8", "--total_images=48",
        "--warmup_images=16", "--held_out=16", "--device=cpu"]
# and a prior for it
PRIOR = ["--layers=1", "--dim=16", "--heads=2", "--batch_size=50", "--warmup_images=100", "--device=cpu"]
# and a text model
TEXT = ["--layers=1", "--dim=16", "--heads=2", "--hidden=24", "--batch_size=40", "--batch_gpu=40", "--warmup_images=80",
        "--total_images=160", "--log_every=40", "--device=cpu"]
# and samples of all
SAMPLE = ["--num_steps=3", "--device=cpu", "--num_images=20", "--per_code=4"]


def write(path, content=b"", age=10):
    """A file of this age, in seconds, unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (time.time() - age,) * 2)


def run(script, *arguments):
    """Runs a script of ours as `python script arguments` does, in this process -> what it printed."""
    argv, hook, printed = sys.argv, sys.excepthook, io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [script, *map(str, arguments)]
    try:
        with redirect_stdout(printed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
    finally:
        sys.argv, sys.excepthook = argv, hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        release()
        torch.manual_seed(0)
    return printed.getvalue()


class Script:
    """A training script before its first step: its run, and its functions, which are given the run where they take one.
    In `all`, its globals can be changed, as its functions see them."""

    def __init__(self, *arguments):
        hook = sys.excepthook
        scope, self.run = bench.prepared(*arguments)
        self.all = scope["gradients"].__globals__
        sys.excepthook = hook

    def __getattr__(self, name):
        if name not in self.all:
            return getattr(self.run, name)
        value = self.all[name]
        takes_run = inspect.isfunction(value) and next(iter(inspect.signature(value).parameters), "") == "run"
        return functools.partial(value, self.run) if takes_run else value

    def recorded(self, monkeypatch, name):
        """-> a list that gets what this function is given from now on"""
        given, function = [], self.all[name] if name in self.all else getattr(self.run, name)

        def recording(run, *arguments):
            given.append(arguments if run is self.run else (run, *arguments))
            return function(run, *arguments)

        monkeypatch.setitem(self.all if name in self.all else vars(self.run), name, recording)
        return given

    def averages_of_ones(self, seen):
        """What the moving average, 0 to begin with, is after `update` at each of these points, of weights that
        stay at 1."""
        averages = self.run.ema_parameters
        with torch.no_grad():
            for p, average in zip(self.parameters, averages):
                p.fill_(1)
                average.zero_()
        self.optimizer.state.clear()
        found = []
        for point in seen:
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
            self.update(point)
            assert all(p.eq(1).all() for p in self.parameters)
            low, high = torch.cat([average.flatten() for average in averages]).aminmax()
            assert high - low < 1e-6
            found.append(low.item())
        return found


# ----------------------------------------------------------------------------------------------------
# other processes


@functools.cache
def warm():
    """-> the process of warm.py, which has imported PyTorch and forks for each script; the folder for its output"""
    process = subprocess.Popen([sys.executable, Path(__file__).parent / "warm.py"], stdin=subprocess.PIPE, text=True)
    return process, tempfile.TemporaryDirectory()


TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
EARLY = {  # tests of processes that take seconds and need nothing from other tests, and what these processes run
    "test_a_quick_run": ["toy2d.py", "--quick=True"],
    "test_a_failure_ends_it": ["compare_models.py", "--stage1_config=nowhere.py"],
    "test_mistakes_are_told_under_torchrun": [*TORCHRUN, "--nproc_per_node=2", "sample.py", "--init_from=pretrained",
                                              "--device=cpu", "--class_label=11"]}


@functools.cache
def early(test):
    """-> the process of such a test, and its out_dir"""
    folder = Path(warm()[1].name) / test
    return start(*EARLY[test], f"--out_dir={folder}"), folder


def begin(tests):
    """Before the first of these tests. If there are many, what takes seconds begins now, on another core, unless tests
    run on all (pytest-xdist)."""
    gc.freeze()  # PyTorch's objects stay: no need to go through them again and again
    if len(tests) > 50:
        warm()
        for test in EARLY.keys() & tests if "PYTEST_XDIST_WORKER" not in os.environ else ():
            early(test)


def end():
    """After the last test: nothing of ours runs any more."""
    if warm.cache_info().currsize:
        process, _ = warm()
        for started in Started.all:
            if process.poll() is None and started.poll() is None:  # where a test failed or was not reached
                started.send_signal(signal.SIGKILL)
        process.stdin.close()
        process.wait()


class Started:
    """A script in a process of its own: a subprocess.Popen, as far as it goes."""

    all, returncode = [], None

    def __init__(self, arguments, cwd, environment):
        process, place = warm()
        Started.all.append(self)
        self.folder = Path(place.name) / str(len(Started.all))
        self.folder.mkdir()
        request = dict(arguments=[str(argument) for argument in arguments], cwd=str(cwd), environment=environment,
                       folder=str(self.folder))
        print(json.dumps(request), file=process.stdin, flush=True)

    @functools.cached_property
    def pid(self):
        while (pid := self.number_in("pid")) is None:
            assert warm()[0].poll() is None
            time.sleep(0.001)
        return pid

    def number_in(self, file):
        return int((self.folder / file).read_text()) if (self.folder / file).exists() else None

    def poll(self):
        self.returncode = self.number_in("exitcode")
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=120):
        began = time.time()
        while self.poll() is None:
            assert warm()[0].poll() is None and time.time() - began < timeout, (self.folder / "stderr").read_text()
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout=120):
        """-> what it has printed, on stdout and stderr, once it has ended"""
        self.wait(timeout)
        return (self.folder / "stdout").read_text(), (self.folder / "stderr").read_text()


def start(*arguments, cwd=ROOT, **environment):
    """`python arguments` as a process of its own."""
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    if not hasattr(os, "fork"):
        return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=environment)
    return Started(arguments, cwd, environment)


def start_together(count, *arguments, cwd=ROOT):
    """That many processes which find each other, as torchrun's do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    of_all = dict(cwd=cwd, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start(*arguments, RANK=rank, LOCAL_RANK=rank, **of_all) for rank in range(count)]


def outputs(processes):
    """Waits until all of these have ended, and well -> what each has printed, on stdout and stderr"""
    found = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), found
    return found


def torchrun(*arguments, cwd=ROOT):
    """torchrun's own process; its workers are `python` as it starts them."""
    return start(*TORCHRUN, *arguments, cwd=cwd)
