"""What the tests share: scripts in this process (`run`) and in others (`start`, `torchrun`), a trained folder, comparisons."""
import functools
import gc
import io
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks here are tiny, and two processes often run at once

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run import release

# a network that takes seconds, on the embedded data
TINY = ["--model_channels=8", "--channel_mult=1,2", "--attn_resolutions=14,", "--num_latents=3", "--codebook_size=5",
        "--latent_dim=8", "--latent_layers=1", "--encoder_dim=16", "--encoder_layers=1", "--encoder_patch=14", "--preview_every=0",
        "--batch_size=8", "--total_images=48", "--warmup_images=16", "--held_out=16", "--device=cpu"]
# and a prior for it
PRIOR = ["--layers=1", "--dim=16", "--heads=2", "--batch_size=50", "--warmup_images=100", "--device=cpu"]

# ----------------------------------------------------------------------------------------------------
# numbers


def fill(name, shape):
    """The parameter values that the reference outputs were computed with: a function of name and shape."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        normal = 1 + 0.1 * np.abs(normal)
    elif len(shape) >= 2:
        normal /= math.sqrt(np.prod(shape[1:]))
    else:
        normal = normal * 0.1 + name.endswith("weight")
    return torch.from_numpy(normal.astype(np.float32))


def moments(x):
    """Mean and covariance of the rows of an array."""
    return x.mean(0), np.cov(x, rowvar=False)


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


# ----------------------------------------------------------------------------------------------------
# scripts


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


@functools.cache
def warm():
    """The process that has imported PyTorch, and forks for each script (warm.py); where its scripts leave what they print."""
    process = subprocess.Popen([sys.executable, Path(__file__).parent / "warm.py"], stdin=subprocess.PIPE, text=True)
    return process, tempfile.TemporaryDirectory()


@functools.cache
def quick_toy():
    """`python toy2d.py --quick=True` -> its process, and the folder that it fills"""
    folder = Path(warm()[1].name) / "toy"
    return start("toy2d.py", "--quick=True", f"--out_dir={folder}"), folder


def pytest_collection_finish(session):
    gc.freeze()  # PyTorch's objects stay: no need to go through them again and again
    if len(session.items) > 50:  # more than a file or two: on another core, this begins while others are tested
        quick_toy() if any(item.name == "test_a_quick_run" for item in session.items) else warm()


def pytest_sessionfinish(session):
    if warm.cache_info().currsize:
        process, _ = warm()
        process.stdin.close()
        process.wait()


class Started:
    """A script in a process of its own; as subprocess.Popen, as far as it goes."""

    count, returncode = 0, None

    def __init__(self, arguments, cwd, environment):
        process, place = warm()
        Started.count += 1
        self.folder = Path(place.name) / str(Started.count)
        self.folder.mkdir()
        request = dict(arguments=[str(a) for a in arguments], cwd=str(cwd), environment=environment, folder=str(self.folder))
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
            assert time.time() - began < timeout, (self.folder / "stderr").read_text()
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
    return [start(*arguments, cwd=cwd, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank in range(count)]


def outputs(processes):
    """Waits until all of these have ended, and well -> what each has printed, on stdout and stderr"""
    found = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), found
    return found


def torchrun(*arguments, cwd=ROOT):
    """torchrun's own process; its workers are `python` as it starts them."""
    return start("-m", "torch.distributed.run", "--standalone", *arguments, cwd=cwd)


# ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a finished stage 1 and both priors (of a few steps)."""
    folder = tmp_path_factory.mktemp("trained")
    run("train_stage1.py", f"--out_dir={folder}", *TINY)
    for prior in ("ar", "sedd"):
        run("train_prior.py", f"--out_dir={folder}", f"--prior={prior}", "--layers=1", "--dim=16", "--heads=2",
            "--total_images=500", "--device=cpu")
    return folder


@pytest.fixture(scope="session")
def inception():
    """The Inception network with the weights that the reference outputs were computed with."""
    from inception import Inception
    net = Inception("pytorch").eval().requires_grad_(False)
    shapes = {k: list(v.shape) for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert shapes == json.loads((ROOT / "tests/reference/fid_inception_shapes.json").read_text())
    net.load_state_dict({name: fill(name, shape) * (1.4 if len(shape) == 4 else 1) for name, shape in shapes.items()})
    return net
