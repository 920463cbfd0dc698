"""The toy: its networks and training, a quick run, mistakes."""
import itertools
import json
import math
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, randn
from PIL import Image
from scripts import early, outputs, run, start

import toy2d
from configurator import UserError
from diffusion import PROCESSES, heun
from noise import BatchNoise, seeded_generator
from run import release
from toy2d import Denoiser, train, trajectories
from toy_grids import KINDS, grid
from toy_measures import around, exact_denoiser, purity

ONE = torch.tensor([[1.0, -2.0]], dtype=torch.float64)


def test_without_codes_it_is_edms_preconditioning(g):
    model = Denoiser(0, 1, 0.2, 2.0).double()
    torch.nn.init.normal_(model.net[-1].weight)
    x, t, s = randn(9, g), torch.tensor(0.7, dtype=torch.float64), 2.0
    H = model.net(torch.cat([x / (t ** 2 + s ** 2).sqrt(), (t ** 2 + 0.2 ** 2).log().expand(9, 1) / 8], 1))
    expected = s ** 2 / (t ** 2 + s ** 2) * x + t * s / (t ** 2 + s ** 2).sqrt() * H  # EDM Table 1: c_skip, c_out
    torch.testing.assert_close(model.with_codes(torch.empty(1, 0, dtype=torch.int64))(x, t), expected)


def test_embeddings_of_several_latents_add_up():
    model = Denoiser(2, 3, 0.2, 1.0)
    F = model.codebook
    z = torch.nn.functional.one_hot(torch.tensor([[0, 2], [1, 1]]), 3).float()
    torch.testing.assert_close(model.embed(z), torch.stack([F[0, 0] + F[1, 2], F[0, 1] + F[1, 1]]))


def test_trajectories_are_heuns_path(g):
    denoise, latents = exact_denoiser(ONE, 0.2), randn(4, g)
    t, path = trajectories(denoise, latents)
    assert path.shape == (toy2d.num_steps + 1, 4, 2) and t[0] == 80 and t[-1] == 0 and (t.diff() < 0).all()
    torch.testing.assert_close(path[0], 80 * latents)
    assert torch.equal(path[-1], heun(denoise, latents, toy2d.num_steps))
    shrunk = ONE + (path[0] - ONE) * ((t ** 2 + 0.04) / (80 ** 2 + 0.04)).sqrt()[:, None, None]  # the exact solution
    torch.testing.assert_close(path, shrunk, rtol=0, atol=0.02)


def test_training_is_repeatable_and_learns_one_code_a_mode(g, monkeypatch):
    monkeypatch.setattr(toy2d, "steps", 300)
    component = torch.arange(400) % 4
    points = around(3 * grid(4)[component], 0.2, g)
    (first, encoder), (second, _) = (train(points, 1, 4, 0.2, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert purity(encoder.sample_codes(points, g)[:, 0], component) > 0.95


def test_a_quick_run():
    process, folder = early("test_a_quick_run")
    (printed, _), = outputs([process])
    table, results = (folder / "table.txt").read_text(), json.loads((folder / "results.json").read_text())
    assert results["settings"]["quick"] is True and all(line in printed for line in table.splitlines())
    eight, = results["eight Gaussians"]
    models = eight["models"]
    assert eight["seed"] == 0 and eight["purity"] > 0.8 and 0.1 < eight["bends"][0] < eight["bends"][1] < 5
    assert models["DisCo-Diff"]["median curvature"] < models["plain"]["median curvature"] / 5
    assert models["DisCo-Diff"]["|grad D|^2"] < models["plain"]["|grad D|^2"] / 5
    w2 = {name: np.mean(model["W-2, even"]["256"]) for name, model in models.items()}
    assert w2["exact score"] < 1.3 * w2["true samples: the floor"] and w2["DisCo-Diff"] < w2["plain"]

    rows = {(row["K"], row["std"], row["kind"]): row for row in results["grids"]}
    assert rows.keys() == {*itertools.product((4, 16, 36), (0.1,), KINDS), *itertools.product((16,), (0.2,), KINDS[:2])}
    for (K, std, kind), row in rows.items():
        if kind in ("true samples", "true component"):
            assert abs(row["smoothed KL"]) < 0.2 and row["stray"] < 0.03
        if kind == "GMM component":
            assert abs(row["smoothed KL"]) < 0.5 and row["stray"] < 0.3
        if kind == "unconditional" and std == 0.1:  # after a thirtieth of the training
            told = rows[K, std, "true component"]
            assert row["stray"] > told["stray"] and row["smoothed KL"] > told["smoothed KL"]
    learned = rows[4, 0.1, "learned codes"]
    assert learned["purity"] > 0.95 and learned["stray"] < rows[4, 0.1, "unconditional"]["stray"]

    for name in ("eight", "curves", "grid", "grid_samples", "fields"):
        picture = np.array(Image.open(folder / f"{name}.png").convert("L"))
        assert min(picture.shape) > 300 and picture.std() > 10
    with Image.open(folder / "sampling.gif") as gif:
        assert gif.n_frames == toy2d.num_steps + 1


def test_quick_takes_what_it_is_given(tmp_path):
    tiny = ["--steps=3", "--num_samples=64", "--sizes=(16,)", "--modes=()", "--seeds=2"]
    printed = run("toy2d.py", "--quick=True", f"--out_dir={tmp_path}", *tiny)
    results = json.loads((tmp_path / "results.json").read_text())
    assert "\nseed  purity" in printed and [r["seed"] for r in results["eight Gaussians"]] == [0, 1]
    assert results["settings"]["steps"] == 3 and results["settings"]["num_points"] == 2000 and results["grids"] == []
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"eight.png", "curves.png", "sampling.gif", "table.txt", "results.json"}


@pytest.mark.parametrize("process", ["pfgm++", "flow"])
def test_other_processes(process, tmp_path, monkeypatch, g):
    """Training draws their noise and levels, and sampling starts from their noise; part 2 is left out."""
    settings = ["--steps=3", "--num_samples=64", "--sizes=(16,)", f"--process={process}", *["--pfgm_D=3"] * (process == "pfgm++")]
    run("toy2d.py", f"--out_dir={tmp_path}", *settings, "--modes=()")
    models = json.loads((tmp_path / "results.json").read_text())["eight Gaussians"][0]["models"]
    assert all(model["median curvature"] > 0 for name, model in models.items() if "floor" not in name)
    with pytest.raises(UserError, match=f"part 2 has no --process={re.escape(process)}"):
        run("toy2d.py", f"--out_dir={tmp_path}", *settings)
    monkeypatch.setattr(toy2d, "process", process)
    monkeypatch.setattr(toy2d, "pfgm_D", 3.0)
    monkeypatch.setattr(toy2d, "steps", 2)
    given, found, forward, backward = [], [], Denoiser.forward, torch.Tensor.backward
    monkeypatch.setattr(Denoiser, "forward", lambda self, x, t, z: given.append((x, t)) or given.append(forward(self, x, t, z)) or given[-1])
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: found.append(loss.item()) or backward(loss))
    points, of_training = torch.randn(10, 2, generator=g), seeded_generator("cpu", "train", 0)
    train(points, 0, 1, 0.2, 0, torch.empty(10, 0, dtype=torch.int64))
    y = points[torch.randint(10, (256,), generator=of_training)]
    low, high = math.log(0.1), math.log(5 * points.std())
    t = PROCESSES[process].levels(torch.randn(256, 1, generator=of_training), (low + high) / 2, (high - low) / 4)
    noise = PROCESSES[process].kernel(BatchNoise(256, of_training), (2,), 3)
    assert torch.equal(given[0][1], t) and torch.allclose(given[0][0], y + t * noise)
    weight = PROCESSES[process].weight(t, points.std().item())
    assert found[0] == pytest.approx((weight * (given[1].detach() - y) ** 2).mean().item(), rel=1e-5)


def test_curvature_in_the_coordinates_of_flow_matching(monkeypatch, g):
    """Of one Gaussian around c: x = c + k sqrt(std^2 + t^2) is a straight line, x_t = (1 - s) c + k h(s) is not."""
    x, t = 3 * randn(50, g), torch.tensor(0.8, dtype=torch.float64)
    assert toy2d.bend(exact_denoiser(ONE, 0.2), x, t).max() < 1e-6
    monkeypatch.setattr(toy2d, "process", "flow")
    k, s = (x - ONE) / (0.04 + t ** 2).sqrt(), t / (1 + t)
    h = (0.04 * (1 - s) ** 2 + s ** 2).sqrt()
    first = (s - 0.04 * (1 - s)) / h
    second = (1.04 - first ** 2) / h
    tangent = k * first - ONE
    want = (tangent[:, 0] * k[:, 1] - tangent[:, 1] * k[:, 0]).abs() * second.abs() / tangent.norm(dim=1) ** 3
    torch.testing.assert_close(toy2d.bend(exact_denoiser(ONE, 0.2), x, t), want, rtol=0.02, atol=1e-6)


def is_one_line(stderr, says):
    *bars, last = stderr.strip().splitlines()
    return last.startswith("error:") and says in last and not [bar for bar in bars if "it/s" not in bar and bar.strip()]


@pytest.mark.parametrize("setting, says", [
    ("--seeds=0", "seeds"), ("--seed=-1", "seed"), ("--modes=(4,10)", "square"), ("--modes=(16,4)", "increasing"),
    ("--tau=0.5", "tau"), ("--steps=0", "steps"), ("--sizes=(8000,)", "sizes"), ("--std=1e-6", "std"),
    ("--modes=(4,)", "modes"), ("--num_steps=2", "num_steps"), ("--other_stds=(0.1,)", "differ"), ("--lr=1e400", "lr"),
    ("--quick=True --num_points=3", "num_points"), ("--spare=2", "nearest"), (f"--out_dir={__file__}", "out_dir"),
    ("--process=ddpm", "--process is one of"), ("--process=pfgm++ --modes=() --pfgm_D=0", "pfgm_D"), ("--pfgm_D=2.5", "pfgm_D is for"),
    ("--steps=3 --lr=1e30", "diverged")])
def test_mistakes_are_one_line(setting, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy2d.py", f"--out_dir={tmp_path}", *setting.split()])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the script sets its own, which we call as Python would
    with pytest.raises(UserError) as error:
        runpy.run_path(str(ROOT / "toy2d.py"), run_name="__main__")
    with pytest.raises(SystemExit) as end:
        sys.excepthook(error.type, error.value, error.tb)
    release()
    assert end.value.code == 2 and is_one_line(capsys.readouterr().err, says)


def test_a_mistake_ends_the_process(tmp_path):
    process = start("toy2d.py", f"--out_dir={tmp_path}", "--steps=3", "--lr=1e30")
    _, errors = process.communicate()
    assert process.returncode == 2 and is_one_line(errors, "diverged")
