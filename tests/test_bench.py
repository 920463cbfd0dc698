import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import TINY, outputs, run, start

import bench
import data
from configurator import UserError
from model import DisCoDiff


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    for name in ("load", "class_names"):
        monkeypatch.setattr(data, name, getattr(data, name))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def tiny_config(path):
    """TINY as a configuration file."""
    path.write_text("".join("{} = {}\n".format(*s[2:].split("=")) for s in TINY if "device" not in s and "batch_size" not in s))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def table(tmp_path_factory):
    """bench.py's process, which begins with the first test of this file, and its folder."""
    folder = tmp_path_factory.mktemp("bench")
    settings = ["--rounds=1", "--batch_size=2", "--device=cpu", f"--out_dir={folder}"]
    return start("bench.py", f"--config={tiny_config(folder / 'tiny.py')}", *settings), folder


def test_flops_are_counted():
    """Those of a layer, by hand; and of ADM's U-Net at 32 x 32 with 8.0 M parameters: 3.6 GFLOP an image forward."""
    x = torch.randn(7, 20)
    assert bench.count(lambda: torch.nn.Linear(20, 30)(x)) == 2 * 7 * 20 * 30
    net = DisCoDiff(32, 3, 0, num_latents=0, model_channels=64, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(16, 8))
    net.to(memory_format=torch.channels_last)  # as it is trained: attention is counted there too
    images, sigma = torch.zeros(1, 3, 32, 32), torch.ones(1)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(8.0e6, rel=0.01)
    assert bench.count(lambda: net(images, images, sigma)) == pytest.approx(3.64e9, rel=0.01)


def test_a_row_of_each_kind(tmp_path, monkeypatch):
    """Configurations of stage 1, of a prior and of sample.py; beside a small matrix product."""
    a = torch.randn(300, 300)
    monkeypatch.setattr(bench, "matrix_product", lambda device: (lambda: a @ a, 2 * 300 ** 3))
    row = bench.measure(tiny_config(tmp_path / "tiny.py"), "cpu", 4, 2, True)
    assert row["batch"] == 4 and len(row["most_expensive"]) == 10 and 0 < sum(share for _, share, _ in row["most_expensive"]) <= 1
    assert all(np.isfinite(value) and value > 0 for key, value in row.items() if key not in ("config", "most_expensive"))
    assert row["gflop_training"] > 2.5 * row["gflop_evaluation"] and 0 < row["update_share"] < 1
    config = tmp_path / "tiny.py"
    config.write_text(config.read_text().replace("num_latents = 3", "num_latents = 0"))
    plain = bench.measure(str(config), "cpu", 4, 1, False)
    assert plain["gflop_training"] < row["gflop_training"] and plain["gflop_evaluation"] < row["gflop_evaluation"]
    assert "training_x_edm" not in plain
    (tmp_path / "tiny_prior.py").write_text("layers = 1\ndim = 16\nheads = 2\n")
    (tmp_path / "restart_tiny.py").write_text("num_steps = 3\nrestarts = ((3, 1, 1.0, 20.0),)\n")
    prior, restart = (bench.measure(str(tmp_path / f"{name}.py"), "cpu", 2, 1, False) for name in ("tiny_prior", "restart_tiny"))
    assert prior["images_per_second"] > 0 and "training_x_edm" not in prior
    assert "images_per_second" not in restart
    assert len(bench.line_of(row)) == len(bench.line_of(prior)) == len(bench.line_of(restart))


def test_continuous_latents_and_a_prior_trained_along(tmp_path):
    """And plain EDM beside these."""
    config = tmp_path / "tiny.py"
    codes = Path(tiny_config(config)).read_text()
    for others in ("continuous = True\nkld_weight = 1.0\n", 'prior = "ar"\n'):
        config.write_text(codes + others)
        run, functions, _ = bench.stage1(str(config), 4, tmp_path, "cpu")
        assert run.model.num_latents == 3 and functions["evaluation"]().shape == (4, 1, 28, 28)
        plain, functions, _ = bench.stage1(str(config), 4, tmp_path, "cpu", *bench.PLAIN)
        assert plain.model.num_latents == 0 and functions["gradients"]()[0] > 0


def test_the_table_and_the_json(table):
    process, folder = table
    (printed, _), = outputs([process])
    (row,) = json.loads((folder / "bench.json").read_text())["rows"]
    assert row["config"] == "tiny" and bench.line_of(row) in printed


def test_bad_input(tmp_path):
    for argument, message in (("--config=nothing.py", "there is no file nothing.py; --config=default is the default"),
                              ("--rounds=0", "rounds 0 must be positive"), ("--device=tpu", "--device=tpu can't be used here")):
        with pytest.raises(UserError, match=message):
            run("bench.py", argument, f"--out_dir={tmp_path}")


def test_the_loader_alone():
    assert min(bench.loader("cpu", count=1_000)) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu(tmp_path):
    """No synchronisation between host and device in a step, but for the first one."""
    step, ready = bench.prepared("train_stage1.py", "default", tmp_path, "cuda", "--compile=False")
    for i in range(3):
        torch.cuda.set_sync_debug_mode("error" if i else "default")
        try:
            step["gradients"](ready, i)
            step["update"](ready, 32 * i)
        finally:
            torch.cuda.set_sync_debug_mode("default")
