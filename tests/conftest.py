import io
import json
import math
import runpy
import signal
import sys
import zlib
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run import release  # noqa: E402

# a network that takes seconds, on the embedded data
TINY = ["--model_channels=8", "--channel_mult=1,2", "--attn_resolutions=14,", "--num_latents=3", "--codebook_size=5",
        "--latent_dim=8", "--latent_layers=1", "--encoder_dim=16", "--encoder_layers=1", "--encoder_patch=14", "--preview_every=0",
        "--batch_size=8", "--total_images=48", "--warmup_images=16", "--held_out=16", "--device=cpu"]


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
