"""The autoregressive prior: causal, its samples, its entropy."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from model import draw_codes
from noise import gumbel_noise, seeded_generator
from prior import Prior


def random_prior(label_dim=2):
    torch.manual_seed(0)
    prior = Prior(num_latents=3, codebook_size=4, label_dim=label_dim, layers=2, dim=16, heads=2).eval()
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return prior


@torch.no_grad()
def test_prior_is_causal_and_sees_the_class():
    prior, z, c = random_prior(), torch.tensor([[0, 1, 2]]), torch.tensor([0])
    base = prior(z, c)
    for i in range(3):
        other = z.clone()
        other[0, i] = 3
        changed = (prior(other, c) - base).abs().amax(dim=(0, 2)) > 1e-6
        assert changed.tolist() == [j > i for j in range(3)]
    assert ((prior(z, c + 1) - base).abs().amax(dim=(0, 2)) > 1e-4).all()
    assert ((prior(z, c - 1) - base).abs().amax(dim=(0, 2)) > 1e-4).all()  # -1: no class


def given(gumbel):
    """An object that draws this noise (B, m, k)."""
    return SimpleNamespace(gumbel=lambda m, k: gumbel)


@torch.no_grad()
def test_cached_sampling_equals_the_full_network():
    prior, c = random_prior(), torch.tensor([0, 1, -1, 1])
    gumbel = gumbel_noise((4, 3, 4), seeded_generator("cpu", "test", 3))
    z = prior.sample(given(gumbel), c, temperature=0.7)
    assert torch.equal(z, draw_codes(prior(z, c) / 0.7, gumbel))
    mode = prior.sample(given(gumbel), c, temperature=0)
    assert torch.equal(mode, prior(mode, c).argmax(-1))


@torch.no_grad()
def test_the_cache_holds_all_tokens_before():
    """In a network whose attention decides: 1,200 draws, of which rounding may change a few."""
    torch.manual_seed(0)
    prior = Prior(num_latents=6, codebook_size=8, label_dim=2, layers=2, dim=16, heads=2).eval()
    for p in prior.parameters():
        torch.nn.init.normal_(p)
    gumbel, c = gumbel_noise((200, 6, 8), seeded_generator("cpu", "test", 4)), torch.arange(200) % 3 - 1
    z = prior.sample(given(gumbel), c, temperature=3.0)
    assert (z == draw_codes(prior(z, c) / 3, gumbel)).double().mean() > 0.995 and len(z.unique(dim=0)) > 100


@torch.no_grad()
def test_prior_samples_its_own_distribution():
    prior, n = random_prior(label_dim=0), 40_000
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))  # 64 codes
    log_p = prior(every).log_softmax(-1).gather(2, every[..., None]).sum(dim=(1, 2))
    assert abs(log_p.exp().sum() - 1) < 1e-5
    z = prior.sample(given(gumbel_noise((n, 3, 4), seeded_generator("cpu", "test", 5))))
    counts = torch.bincount((z * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    expected = log_p.exp() * n
    assert expected.min() > 1
    assert ((counts - expected) ** 2 / expected).sum() < 103.4  # chi-square, 63 degrees of freedom, p = 0.001


def known_codes(n):
    """z_1 uniform, z_2 = z_1 with probability 0.9, z_3 = the class: entropy 2 + 0.63 + 0 bits."""
    c, first = torch.randint(4, (n,)), torch.randint(4, (n,))
    second = torch.where(torch.rand(n) < 0.9, first, (first + torch.randint(1, 4, (n,))) % 4)
    return torch.stack([first, second, c], 1), c


ENTROPY = 2 - 0.9 * math.log2(0.9) - 0.1 * math.log2(0.1 / 3)


def test_prior_reaches_the_entropy_of_a_known_distribution():
    torch.manual_seed(0)
    prior = Prior(num_latents=3, codebook_size=4, label_dim=4, layers=2, dim=32, heads=2)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)

    def bits(z, c):
        return prior.nats(z, c).mean() / math.log(2)

    assert bits(*known_codes(1000)).item() == pytest.approx(6, abs=1e-4)  # starts uniform: m log2 k
    for _ in range(250):
        optimizer.zero_grad()
        bits(*known_codes(256)).backward()
        optimizer.step()
    assert bits(*known_codes(20_000)).item() == pytest.approx(ENTROPY, abs=0.06)
