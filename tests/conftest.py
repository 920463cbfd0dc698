"""What the tests share: numbers, comparisons, a trained folder. Scripts are started by scripts.py."""
import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks here are tiny, and two processes often run at once

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import scripts

from noise import seeded_generator


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


@pytest.fixture
def g():
    return seeded_generator("cpu", "test", 0)


def randn(n, g):
    """Points of the plane."""
    return torch.randn(n, 2, generator=g, dtype=torch.float64)


def checkpoint(folder, file="stage1.pt"):
    return torch.load(folder / file)


def log_of(path):
    """The lines of a training log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def load(folder, name="samples"):
    with np.load(folder / f"{name}.npz") as f:
        return {k: f[k] for k in f.files}


def close(a, b):
    """The same samples: images to rounding, everything else exactly."""
    return all(np.array_equal(a[k], b[k]) for k in ("labels", "codes", "seeds")) and \
        np.abs(a["images"].astype(int) - b["images"]).max() <= 1


def pytest_collection_finish(session):
    scripts.begin({item.name for item in session.items})


def pytest_sessionfinish(session):
    scripts.end()


@pytest.fixture
def root(tmp_path):
    """Where data sets go."""
    return tmp_path / "datasets"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a finished stage 1 and both priors (of a few steps)."""
    folder = tmp_path_factory.mktemp("trained")
    scripts.run("train_stage1.py", f"--out_dir={folder}", *scripts.TINY)
    for prior in ("ar", "sedd"):
        scripts.run("train_prior.py", f"--out_dir={folder}", f"--prior={prior}", "--layers=1", "--dim=16", "--heads=2",
                    "--total_images=500", "--device=cpu")
    return folder


@pytest.fixture(scope="session")
def written(trained, tmp_path_factory):
    """A folder with this stage 1, what its encoder says, and a text model (of a few steps); what train_text.py printed."""
    folder = tmp_path_factory.mktemp("written")
    for path in (trained / "stage1.pt", *trained.glob("logits-*.npy")):
        shutil.copy(path, folder)
    return folder, scripts.run("train_text.py", f"--out_dir={folder}", *scripts.TEXT)


@pytest.fixture(scope="session")
def inception():
    """The Inception network with the weights that the reference outputs were computed with."""
    from inception import Inception
    net = Inception("pytorch").eval().requires_grad_(False)
    shapes = {k: list(v.shape) for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert shapes == json.loads((ROOT / "tests/reference/fid_inception_shapes.json").read_text())
    net.load_state_dict({name: fill(name, shape) * (1.4 if len(shape) == 4 else 1) for name, shape in shapes.items()})
    return net
