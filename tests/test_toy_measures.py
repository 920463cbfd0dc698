"""The toy's measures against closed forms; optimal transport against known answers."""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import randn

from toy2d import Denoiser, ring
from toy_measures import (
    around,
    assignment,
    even_parts,
    exact_denoiser,
    exact_pfgm_denoiser,
    jacobian_norms,
    log_density,
    purity,
    stray,
    wasserstein2,
)

ONE = torch.tensor([[1.0, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize("t", [0.05, 1.0, 20.0])
def test_jacobian_norms_of_one_gaussian(t, g):
    """score = (mu - x) / (t^2 + s^2), D = (s^2 x + t^2 mu) / (t^2 + s^2)"""
    x, t, v = ONE + randn(20, g), torch.tensor(t, dtype=torch.float64), t ** 2 + 0.2 ** 2
    fresh = Denoiser(1, 3, 0.2, 2.0).double().requires_grad_(False)  # H = 0: one Gaussian for each code
    for denoise in (exact_denoiser(ONE, 0.2), fresh.with_codes(torch.ones(1, 1, dtype=torch.int64))):
        of_score, of_denoiser = jacobian_norms(denoise, x, t)
        torch.testing.assert_close(of_score, torch.full((20,), 2 / v ** 2, dtype=torch.float64))
        torch.testing.assert_close(of_denoiser, torch.full((20,), 2 * (0.2 ** 2 / v) ** 2, dtype=torch.float64))


def test_exact_denoiser_is_that_of_the_density(g):
    """Tweedie: D = x + t^2 grad ln p_t."""
    x, t = (2 * randn(30, g)).requires_grad_(), torch.tensor(0.7, dtype=torch.float64)
    log_p = log_density(x, ring(), (0.2 ** 2 + t ** 2) ** 0.5, -math.log(8)).logsumexp(1)
    score, = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(exact_denoiser(ring(), 0.2)(x, t), x + t ** 2 * score)


@pytest.mark.parametrize("D", [1, 8, 128])
@pytest.mark.parametrize("t", [0.3, 1.5, 20.0])
def test_exact_pfgm_denoiser_is_the_mean_under_its_kernel(D, t):
    """(|x - y|^2 + D t^2)^(-(2 + D) / 2), summed up over a grid of clean points y; D = inf is Gaussian noise."""
    x = torch.tensor([[2.0, 1.0], [0.0, 0.0], [3.1, 0.05], [5.0, -4.0]], dtype=torch.float64)[:4 if D == 1 or t > 1 else 3]
    side, t = torch.linspace(-1.2, 1.2, 121, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
    around_0 = torch.cartesian_prod(side, side)
    y = (ring()[:, None] + around_0).flatten(0, 1)
    log_p = -(around_0 ** 2).sum(1).repeat(8) / (2 * 0.2 ** 2) - (2 + D) / 2 * (torch.cdist(x, y) ** 2 / (D * t ** 2)).log1p()
    torch.testing.assert_close(exact_pfgm_denoiser(ring(), 0.2, D)(x, t), log_p.softmax(1) @ y, rtol=0, atol=1e-4)
    for many, tolerance in ((1e6, 1e-3), (3e8, 1e-5), (1e20, 1e-8)):
        torch.testing.assert_close(exact_pfgm_denoiser(ring(), 0.2, many)(x, t), exact_denoiser(ring(), 0.2)(x, t), rtol=0, atol=tolerance)


def test_log_density_is_pytorchs(g):
    x, centres, std = randn(5, g), randn(3, g), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    normal = torch.distributions.Normal(centres, std[:, None])
    torch.testing.assert_close(log_density(x, centres, std, -1.0), normal.log_prob(x[:, None]).sum(2) - 1)


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
    assert wasserstein2(a, a + torch.tensor([3.0, -4.0])) == pytest.approx(5)  # a translation: its length
    spread = a.square().sum(1).mean().sqrt().item()
    assert wasserstein2(a, 2 * a) == pytest.approx(spread)  # a -> 2 a is the gradient of a convex function
    line_a, line_b = (torch.stack([randn(200, g)[:, 0], torch.zeros(200, dtype=torch.float64)], 1) for _ in range(2))
    in_order = line_a[:, 0].sort()[0] - line_b[:, 0].sort()[0]
    assert wasserstein2(line_a, line_b) == pytest.approx(in_order.square().mean().item() ** 0.5)


def test_purity():
    modes = torch.tensor([0, 0, 1, 1, 2, 2])
    assert purity(modes, modes) == 1 and purity(torch.tensor([5, 5, 0, 0, 3, 3]), modes) == 1
    assert purity(torch.zeros(6, dtype=torch.int64), modes) == pytest.approx(1 / 3)
    assert purity(torch.tensor([0, 0, 0, 0, 1, 1]), modes) == pytest.approx(4 / 6)


def test_stray_is_the_tail_of_a_rayleigh_distribution(g):
    assert stray(around(ring().repeat(5000, 1), 0.2, g), ring(), 0.2) == pytest.approx(math.exp(-4.5), abs=0.001)
    assert stray(ring() * 1.1, ring(), 0.2) == 0 and stray(ring() * 1.3, ring(), 0.2) == 1


def test_even_parts_take_equally_many_of_each(g):
    x = torch.cat([around(ring()[[i] * (10 + i)], 0.2, g) for i in range(8)])
    parts = even_parts(x[torch.randperm(len(x), generator=g)], ring(), 32)
    assert len(parts) == 2
    assert all(torch.cdist(part, ring()).argmin(1).bincount().tolist() == [4] * 8 for part in parts)
    assert len(torch.cat(parts).unique(dim=0)) == 64
    assert even_parts(x[10:], ring(), 32) == []  # none is left near the first centre
