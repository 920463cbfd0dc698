"""The toy: measures against closed forms, EM and optimal transport against known answers, a quick run."""
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import toy2d
from conftest import ROOT, run
from model import seeded_generator
from sample import heun
from toy2d import (Denoiser, around, assignment, curvature, exact_denoiser, fit_gmm, grid, jacobian_norms, kl_divergence, log_density,
                   purity, ring, silverman, trace, train, wasserstein2)

ONE = torch.tensor([[1.0, -2.0]], dtype=torch.float64)


@pytest.fixture
def g():
    return seeded_generator("cpu", "test", 0)


def randn(n, g):
    return torch.randn(n, 2, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("t", [0.01, 0.3, 5.0])
def test_a_single_gaussian_has_straight_trajectories(t, g):
    assert curvature(exact_denoiser(ONE, 0.2), ONE + 3 * randn(50, g), torch.tensor(t, dtype=torch.float64)).max() < 1e-8


@pytest.mark.parametrize("radius", [0.1, 1.0, 7.0])
def test_trajectories_on_circles_have_the_curvature_of_the_circle(radius):
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    angles = torch.arange(6, dtype=torch.float64)
    x = radius * torch.stack([angles.cos(), angles.sin()], 1)
    kappa = curvature(lambda x, t: x - t * (x @ turn), x, torch.tensor(2.0, dtype=torch.float64))  # dx/dt = x @ turn
    torch.testing.assert_close(kappa, torch.full((6,), 1 / radius, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("t", [0.05, 1.0, 20.0])
def test_jacobian_norms_of_one_gaussian(t, g):
    """score = (mu - x) / (t^2 + s^2), D = (s^2 x + t^2 mu) / (t^2 + s^2)"""
    x, t, v = ONE + randn(20, g), torch.tensor(t, dtype=torch.float64), t ** 2 + 0.2 ** 2
    fresh = Denoiser(1, 3, 0.2, 2.0).double().requires_grad_(False)  # H = 0: one Gaussian for each code
    for denoise in (exact_denoiser(ONE, 0.2), fresh.given(torch.ones(1, 1, dtype=torch.int64))):
        of_score, of_denoiser = jacobian_norms(denoise, x, t)
        torch.testing.assert_close(of_score, torch.full((20,), 2 / v ** 2, dtype=torch.float64))
        torch.testing.assert_close(of_denoiser, torch.full((20,), 2 * (0.2 ** 2 / v) ** 2, dtype=torch.float64))


def test_without_codes_it_is_edms_preconditioning(g):
    model = Denoiser(0, 1, 0.2, 2.0).double()
    torch.nn.init.normal_(model.H[-1].weight)
    x, t, s = randn(9, g), torch.tensor(0.7, dtype=torch.float64), 2.0
    H = model.H(torch.cat([x / (t ** 2 + s ** 2).sqrt(), (t ** 2 + 0.2 ** 2).log().expand(9, 1) / 8], 1))
    expected = s ** 2 / (t ** 2 + s ** 2) * x + t * s / (t ** 2 + s ** 2).sqrt() * H  # EDM Table 1: c_skip, c_out
    torch.testing.assert_close(model.given(torch.empty(1, 0, dtype=torch.int64))(x, t), expected)


def test_exact_denoiser_is_that_of_the_density(g):
    """Tweedie: D = x + t^2 grad ln p_t."""
    x, t = (2 * randn(30, g)).requires_grad_(), torch.tensor(0.7, dtype=torch.float64)
    log_p = log_density(x, ring(), (0.2 ** 2 + t ** 2) ** 0.5, -math.log(8)).logsumexp(1)
    score, = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(exact_denoiser(ring(), 0.2)(x, t), x + t ** 2 * score)


def test_log_density_is_pytorchs(g):
    x, centres, std = randn(5, g), randn(3, g), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    normal = torch.distributions.Normal(centres, std[:, None])
    torch.testing.assert_close(log_density(x, centres, std, -1.0), normal.log_prob(x[:, None]).sum(2) - 1)


def test_centres():
    torch.testing.assert_close(ring().norm(dim=1), torch.full((8,), 3.0, dtype=torch.float64))
    assert {tuple(c) for c in (ring() / 3 * 2 ** 0.5).round().int().tolist()} == {*itertools.product((-1, 0, 1), repeat=2)} - {(0, 0)}
    assert grid(9).sum().abs() < 1e-12 and len(grid(9)) == 9
    assert torch.cdist(grid(9), grid(9)).fill_diagonal_(9).amin(1).eq(1).all()


def test_the_trace_is_heuns_path(g):
    denoise, latents = exact_denoiser(ONE, 0.2), randn(4, g)
    t, path = trace(denoise, latents)
    assert path.shape == (toy2d.num_steps + 1, 4, 2) and t[0] == 80 and t[-1] == 0 and (t.diff() < 0).all()
    torch.testing.assert_close(path[0], 80 * latents)
    assert torch.equal(path[-1], heun(denoise, latents, toy2d.num_steps))
    shrunk = ONE + (path[0] - ONE) * ((t ** 2 + 0.04) / (80 ** 2 + 0.04)).sqrt()[:, None, None]  # the exact solution
    torch.testing.assert_close(path, shrunk, rtol=0, atol=0.02)


def test_assignment_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 6):
        for cost in (rng.random((n, n)), rng.integers(0, 3, (n, n)).astype(float)):
            rows = assignment(cost)
            assert sorted(rows) == list(range(n))
            best = min(cost[list(order), range(n)].sum() for order in itertools.permutations(range(n)))
            assert cost[rows, range(n)].sum() == pytest.approx(best)


def test_wasserstein2(g):
    a = randn(100, g)
    assert wasserstein2(a, a[torch.randperm(100, generator=g)]) < 1e-6
    assert wasserstein2(a, a + torch.tensor([3.0, -4.0])) == pytest.approx(5)  # of a translation, its length
    assert wasserstein2(a, 2 * a) == pytest.approx(a.square().sum(1).mean().sqrt().item())  # the gradient of a convex function
    line_a, line_b = (torch.stack([randn(200, g)[:, 0], torch.zeros(200, dtype=torch.float64)], 1) for _ in range(2))
    assert wasserstein2(line_a, line_b) == pytest.approx((line_a[:, 0].sort()[0] - line_b[:, 0].sort()[0]).square().mean().item() ** 0.5)


def test_purity():
    modes = torch.tensor([0, 0, 1, 1, 2, 2])
    assert purity(modes, modes) == 1 and purity(torch.tensor([5, 5, 0, 0, 3, 3]), modes) == 1
    assert purity(torch.zeros(6, dtype=torch.int64), modes) == pytest.approx(1 / 3)
    assert purity(torch.tensor([0, 0, 0, 0, 1, 1]), modes) == pytest.approx(4 / 6)


def test_silverman(g):
    x = randn(500, g)[:, :1] * 3
    assert silverman(x).item() == pytest.approx(1.0592 * x.std().item() * 500 ** (-1 / 5), rel=1e-4)  # the rule of one dimension
    wide = randn(500, g) * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(silverman(wide) / wide.std(0), torch.full((2,), 500 ** (-1 / 6), dtype=torch.float64))


def test_stray_is_the_tail_of_a_rayleigh_distribution(g):
    assert toy2d.stray(around(ring().repeat(5000, 1), 0.2, g), ring(), 0.2) == pytest.approx(math.exp(-4.5), abs=0.001)
    assert toy2d.stray(ring() * 1.1, ring(), 0.2) == 0 and toy2d.stray(ring() * 1.3, ring(), 0.2) == 1


def test_even_takes_equally_many_of_each(g):
    x = torch.cat([around(ring()[[i] * (10 + i)], 0.2, g) for i in range(8)])
    parts = toy2d.even(x[torch.randperm(len(x), generator=g)], ring(), 32)
    assert len(parts) == 2 and all(torch.cdist(part, ring()).argmin(1).bincount().tolist() == [4] * 8 for part in parts)
    assert len(torch.cat(parts).unique(dim=0)) == 64 and toy2d.even(x[10:], ring(), 32) == []  # none is left of the first


def test_kl_of_two_gaussians(g):
    """The kernel density estimate of N(shift, 1) is about N(shift, 1 + h^2)."""
    points, samples, h = randn(4000, g), randn(20000, g) + torch.tensor([0.6, 0.8]), torch.tensor([0.3, 0.3], dtype=torch.float64)
    log_p = log_density(points, torch.zeros(1, 2, dtype=torch.float64), 1, 0.0)[:, 0]
    assert kl_divergence(points, log_p, samples, h) == pytest.approx(math.log(1.09) + (2 + 1) / (2 * 1.09) - 1, abs=0.02)
    assert abs(kl_divergence(points, log_p, samples - torch.tensor([0.6, 0.8]), silverman(samples))) < 0.02
    stretched = torch.tensor([1.0, 10.0], dtype=torch.float64)  # a coordinate's unit makes no difference
    assert kl_divergence(points * stretched, log_p - math.log(10), samples * stretched, h * stretched) == pytest.approx(
        kl_divergence(points, log_p, samples, h))


def test_em_recovers_a_known_mixture(g):
    truth = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    weights, std = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64)
    component = torch.multinomial(weights, 20000, replacement=True, generator=g)
    x = around(truth[component], std[component, None], g)
    centres, found_std, log_weights = fit_gmm(x, 3, g)
    order = torch.cdist(truth, centres).argmin(1)
    assert order.sort()[0].tolist() == [0, 1, 2]
    torch.testing.assert_close(centres[order], truth, rtol=0, atol=0.06)
    torch.testing.assert_close(found_std[order], std, rtol=0.03, atol=0)
    torch.testing.assert_close(log_weights[order].exp(), weights, rtol=0, atol=0.01)


def test_em_never_makes_the_data_less_likely(g):
    x = randn(500, g)
    likelihoods = [log_density(x, *fit_gmm(x, 5, seeded_generator("cpu", "em", 0), n)).logsumexp(1).mean().item() for n in range(12)]
    assert all(b >= a - 1e-9 for a, b in zip(likelihoods, likelihoods[1:])) and likelihoods[-1] > likelihoods[0] + 0.01


def test_embeddings_of_several_latents_add_up():
    model = Denoiser(2, 3, 0.2, 1.0)
    z = torch.nn.functional.one_hot(torch.tensor([[0, 2], [1, 1]]), 3).float()
    torch.testing.assert_close(model.embed(z), torch.stack([model.F[0, 0] + model.F[1, 2], model.F[0, 1] + model.F[1, 1]]))


def test_training_is_repeatable_and_learns_one_code_a_mode(g, monkeypatch):
    monkeypatch.setattr(toy2d, "steps", 300)
    component = torch.arange(400) % 4
    points = around(3 * grid(4)[component], 0.2, g)
    (first, encoder), (second, _) = (train(points, 1, 4, 0.2, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert purity(encoder.draw(points, g)[:, 0], component) > 0.95


def test_a_quick_run(tmp_path):
    printed = run("toy2d.py", "--quick=True", f"--out_dir={tmp_path}")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["quick"] is True and all(line in printed for line in (tmp_path / "table.txt").read_text().splitlines())
    eight, = results["eight Gaussians"]
    models = eight["models"]
    assert eight["seed"] == 0 and eight["purity"] > 0.8 and 0.1 < eight["bends"][0] < eight["bends"][1] < 5
    assert models["DisCo-Diff"]["median curvature"] < models["plain"]["median curvature"] / 5
    assert models["DisCo-Diff"]["|grad D|^2"] < models["plain"]["|grad D|^2"] / 5
    w2 = {name: np.mean(model["W-2, even"]["256"]) for name, model in models.items()}
    assert w2["exact score"] < 1.3 * w2["true samples: the floor"] and w2["DisCo-Diff"] < w2["plain"]
    rows = {(row["K"], row["std"], row["kind"]): row for row in results["grids"]}
    assert rows.keys() == {*itertools.product((4, 16, 36), (0.1,), toy2d.KINDS), *itertools.product((16,), (0.2,), list(toy2d.KINDS)[:2])}
    for (K, std, kind), row in rows.items():
        if kind in ("true samples", "true component", "GMM component"):
            assert abs(row["smoothed KL"]) < (0.2 if kind[0] == "t" else 0.5) and row["stray"] < (0.03 if kind[0] == "t" else 0.3)
        if kind == "unconditional" and std == 0.1:  # after a fortieth of the training
            assert row["stray"] > rows[K, std, "true component"]["stray"] and row["smoothed KL"] > rows[K, std, "true component"]["smoothed KL"]
    assert rows[4, 0.1, "learned codes"]["purity"] > 0.95 and rows[4, 0.1, "learned codes"]["stray"] < rows[4, 0.1, "unconditional"]["stray"]
    for name in ("eight", "curves", "grid", "grid_samples", "fields"):
        picture = np.array(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(picture.shape) > 300 and picture.std() > 10
    with Image.open(tmp_path / "sampling.gif") as gif:
        assert gif.n_frames == toy2d.num_steps + 1


@pytest.mark.parametrize("setting, says", [
    ("--seeds=0", "seeds"), ("--seed=-1", "seed"), ("--modes=(4,10)", "square"), ("--modes=(16,4)", "increasing"), ("--tau=0.5", "tau"),
    ("--steps=0", "steps"), ("--sizes=(8000,)", "sizes"), ("--std=1e-6", "std"), ("--modes=(4,)", "modes"), ("--num_steps=2", "num_steps"),
    ("--other_stds=(0.1,)", "differ"), ("--lr=1e400", "lr"), ("--quick=True --num_points=3", "num_points"), ("--spare=2", "nearest"),
    (f"--out_dir={__file__}", "out_dir"), ("--steps=3 --lr=1e30", "diverged")])
def test_mistakes_are_one_line(setting, says, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "toy2d.py", f"--out_dir={tmp_path}", *setting.split()], capture_output=True, text=True)
    *bars, last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and last.startswith("error:") and says in last and not [bar for bar in bars if "it/s" not in bar and bar.strip()]


def test_quick_takes_what_it_is_given(tmp_path):
    tiny = ["--steps=3", "--num_samples=64", "--sizes=(16,)", "--modes=()", "--seeds=2"]
    printed = run("toy2d.py", "--quick=True", f"--out_dir={tmp_path}", *tiny)
    results = json.loads((tmp_path / "results.json").read_text())
    assert "\nseed  purity" in printed and [r["seed"] for r in results["eight Gaussians"]] == [0, 1]
    assert results["settings"]["steps"] == 3 and results["settings"]["num_points"] == 2000 and results["grids"] == []
    assert {path.name for path in tmp_path.iterdir()} == {"eight.png", "curves.png", "sampling.gif", "table.txt", "results.json"}
