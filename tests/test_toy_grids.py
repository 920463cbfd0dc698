"""Grids of Gaussians: centres, kernel density estimates, EM."""
import itertools
import math

import pytest
import torch
from conftest import randn

from noise import seeded_generator
from toy2d import ring
from toy_grids import fit_gmm, grid, kl_divergence, silverman
from toy_measures import around, log_density


def test_centres():
    torch.testing.assert_close(ring().norm(dim=1), torch.full((8,), 3.0, dtype=torch.float64))
    directions = {tuple(c) for c in (ring() / 3 * 2 ** 0.5).round().int().tolist()}
    assert directions == {*itertools.product((-1, 0, 1), repeat=2)} - {(0, 0)}
    assert grid(9).sum().abs() < 1e-12 and len(grid(9)) == 9
    assert torch.cdist(grid(9), grid(9)).fill_diagonal_(9).amin(1).eq(1).all()


def test_silverman(g):
    x = randn(500, g)[:, :1] * 3
    in_one_dimension = 1.0592 * x.std().item() * 500 ** (-1 / 5)
    assert silverman(x).item() == pytest.approx(in_one_dimension, rel=1e-4)
    wide = randn(500, g) * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(silverman(wide) / wide.std(0), torch.full((2,), 500 ** (-1 / 6), dtype=torch.float64))


def test_kl_of_two_gaussians(g):
    """The kernel density estimate of N(shift, 1) is about N(shift, 1 + h^2)."""
    half, shift, h = randn(500, g), torch.tensor([0.6, 0.8]), torch.tensor([0.3, 0.3], dtype=torch.float64)
    points = torch.cat([half, -half])  # so that the part of ln p - ln q that is linear in x has the mean 0
    samples = randn(20000, g) + shift
    log_p = log_density(points, torch.zeros(1, 2, dtype=torch.float64), 1, 0.0)[:, 0]
    exact = math.log(1.09) + (2 + 1) / (2 * 1.09) - 1
    assert kl_divergence(points, log_p, samples, h) == pytest.approx(exact, abs=0.02)
    assert abs(kl_divergence(points, log_p, samples - shift, silverman(samples))) < 0.02
    points, log_p, samples = points[:100], log_p[:100], samples[:1000]
    stretched = torch.tensor([1.0, 10.0], dtype=torch.float64)  # a coordinate's unit makes no difference
    of_stretched = kl_divergence(points * stretched, log_p - math.log(10), samples * stretched, h * stretched)
    assert of_stretched == pytest.approx(kl_divergence(points, log_p, samples, h))


def test_em_recovers_a_known_mixture(g):
    truth = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    std = torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64)
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
    fits = [fit_gmm(x, 5, seeded_generator("cpu", "em", 0), iterations) for iterations in range(12)]
    likelihoods = [log_density(x, *fit).logsumexp(1).mean().item() for fit in fits]
    assert all(b >= a - 1e-9 for a, b in zip(likelihoods, likelihoods[1:])) and likelihoods[-1] > likelihoods[0] + 0.01
