"""The diffusion prior of continuous latents: its loss, and distributions that are known."""
import pytest
import torch

from diffusion_prior import DiffusionPrior
from noise import SeededNoise


def test_a_new_one_is_the_denoiser_of_normal_numbers(g):
    """D = c_skip z, since its last layer is 0: the loss of N(0, 1) is 1, and samples are N(0, 1)."""
    prior = DiffusionPrior(4, 5, layers=1, dim=16, heads=2)
    z, t, u = torch.randn(2000, 4, 5, generator=g), torch.rand(2000, generator=g), torch.rand(2000, 20, generator=g)
    assert prior.loss(z, None, t, u).mean().item() == pytest.approx(1, abs=0.03)
    assert prior.nats(z, None, g).mean().item() == pytest.approx(1, abs=0.03)
    shifted = prior.loss(z + 3, None, t, u).mean().item()  # lambda (1 - c_skip)^2 3^2 more, as 1 - c_skip is
    # sigma^2 / (1 + sigma^2)
    sigma = (-1.2 + torch.tensor(2.0).log() + 1.2 * torch.special.ndtri(t)).exp()
    assert shifted == pytest.approx(1 + (9 / (1 + sigma ** 2) * sigma ** 2).mean().item(), rel=0.1)
    made = prior.sample(SeededNoise("test", range(1000)))
    assert made.shape == (1000, 4, 5) and made.mean().abs() < 0.03 and made.std().item() == pytest.approx(1, rel=0.03)


def test_it_learns_two_clusters_each_of_its_class(g):
    """And a sample depends on its seed alone."""
    torch.manual_seed(0)
    means = torch.randn(2, 3, 4, generator=g)
    prior = DiffusionPrior(3, 4, label_dim=2, layers=1, dim=32, heads=2)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    for _ in range(200):
        c = torch.randint(2, (64,), generator=g)
        z = means[c] + 0.1 * torch.randn(64, 3, 4, generator=g)
        drop, t, *u = torch.rand(64, 14, generator=g).unbind(1)
        prior.loss(z, torch.where(drop < 0.3, -1, c), t, torch.stack(u, 1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    c = torch.arange(40) % 2
    made = prior.sample(SeededNoise("test", range(40)), c)
    distances = torch.cdist(made.flatten(1), means.flatten(1))
    assert (distances.argmin(1) == c).sum() >= 36 and distances.min(1).values.mean() < 1
    assert torch.allclose(prior.sample(SeededNoise("test", [3, 7]), c[[3, 7]]), made[[3, 7]], atol=1e-4)
    free = torch.cdist(prior.sample(SeededNoise("test", range(40))).flatten(1), means.flatten(1)).argmin(1)
    assert 8 < free.sum() < 32  # without a class, both


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        DiffusionPrior(3, 4, dim=15, heads=3)
