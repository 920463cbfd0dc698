"""RCG's diffusion of embeddings: its numbers, and a distribution that is known."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, fill

from embedding import standardised
from noise import SeededNoise
from rdm import ALPHAS, RDM, ddim, noised

with np.load(ROOT / "tests/reference/rdm.npz") as f:
    SHAPES = json.loads(str(f["shapes"]))
    REFERENCE = {key: torch.from_numpy(f[key]) for key in f.files if f[key].dtype.kind in "if"}


def reference_network():
    """Two blocks of width 24, with parameters made from their names; ours has a row for "no class" besides."""
    network = RDM(12, layers=2, dim=24, time_dim=16).eval().requires_grad_(False)
    assert {name: list(p.shape) for name, p in network.named_parameters() if name != "label"} == SHAPES
    network.load_state_dict({name: fill(f"rdm.{name}", shape) for name, shape in SHAPES.items()}, strict=False)
    return network


def test_noise_and_loss_equal_rcg(monkeypatch):
    z, t, noise = standardised(REFERENCE["embedding"]), REFERENCE["t"], REFERENCE["noise"]
    assert torch.allclose(z, REFERENCE["standardised"], atol=1e-6)
    assert torch.allclose(ALPHAS[REFERENCE["alphas_cumprod_at"]].float(), REFERENCE["alphas_cumprod"], atol=1e-7)
    assert torch.allclose(noised(z, t, noise), REFERENCE["noisy"], atol=1e-6)
    network, u = reference_network(), torch.special.ndtr(noise.double())
    assert torch.allclose(network(REFERENCE["noisy"], t), REFERENCE["prediction"], atol=1e-5)
    loss = network.loss(z, None, (t + 0.5) / 1000, u.float()).mean()
    assert loss.item() == pytest.approx(REFERENCE["loss"].item(), abs=1e-5)


def test_the_loss_is_a_mean_over_entries_at_random_steps(g, monkeypatch):
    """A new network says 0: the loss is the mean square, (D - 1) / D, whatever step and noise are. These are drawn for each
    vector, all steps alike, and the noise is N(0, 1), finite for the u = 0 that a generator may give."""
    network, z = RDM(8, layers=1, dim=16, time_dim=16), standardised(torch.randn(4000, 8, generator=g))
    assert torch.allclose(network.nats(z, generator=g), torch.full((4000,), 7 / 8))
    given = []
    monkeypatch.setattr("rdm.noised", lambda x, t, noise: given.append((t, noise)) or x)
    network.nats(z, generator=g)
    (t, noise), = given
    assert t.min() >= 0 and t.max() < 1000 and t.double().mean().item() == pytest.approx(499.5, abs=15) and t.unique().numel() > 900
    assert noise.mean().abs() < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    assert network.loss(z[:1], None, torch.zeros(1), torch.zeros(1, 8)).isfinite().all() and given[1][1].isfinite().all()
    assert given[1][1].max() < -5


def test_ddim_equals_rcg():
    network, draws, times = reference_network(), iter(REFERENCE["step_noise"]), []

    def predict(x, t):
        times.append(t)
        return network(x, torch.full((len(x),), t))

    made = ddim(predict, REFERENCE["start"], lambda: next(draws), num_steps=10)
    assert times == REFERENCE["ddim_timesteps"].tolist()[::-1] and next(draws, None) is None
    assert torch.allclose(made, REFERENCE["ddim"], atol=1e-4)
    assert torch.allclose(predict(REFERENCE["start"], 901), REFERENCE["ddim_pred_x0_first"], atol=1e-4)


def test_ddim_samples_a_known_distribution(g):
    """With the exact expectation of N(mu, s^2), entry by entry: mean and deviation come out as step 0 has them."""
    mu, s = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([0.3, 0.1], dtype=torch.float64)

    def predict(x, t):
        a = ALPHAS[t]
        return mu + a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * (x - a.sqrt() * mu)

    def randn():
        return torch.randn(5000, 2, generator=g, dtype=torch.float64)

    def errors(num_steps, eta):
        made = ddim(predict, randn(), randn, num_steps, eta)
        assert torch.allclose(made.mean(0), mu, atol=0.02)
        return (made.std(0) / (ALPHAS[0] * s ** 2 + 1 - ALPHAS[0]).sqrt() - 1).abs()

    for eta, limit in ((0, 0.03), (1, 0.08)):
        fine = errors(1000, eta)
        assert (fine < limit).all() and (errors(50, eta) > 2 * fine).all()


def test_it_learns_two_clusters_each_of_its_class(g):
    """And a sample depends on its seed alone."""
    torch.manual_seed(0)
    means = standardised(torch.randn(2, 8, generator=g))
    network = RDM(8, label_dim=2, layers=2, dim=64, time_dim=32)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(200):
        c = torch.randint(2, (64,), generator=g)
        z = standardised(means[c] + 0.1 * torch.randn(64, 8, generator=g))
        drop, t, *u = torch.rand(64, 10, generator=g).unbind(1)
        network.loss(z, torch.where(drop < 0.3, -1, c), t, torch.stack(u, 1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    c = torch.arange(40) % 2
    made = network.sample(SeededNoise("test", range(40)), c)
    assert made.shape == (40, 8) and torch.equal(torch.cdist(made, means).argmin(1), c)
    assert torch.allclose(network.sample(SeededNoise("test", [3, 7]), c[[3, 7]]), made[[3, 7]], atol=1e-4)
    free = torch.cdist(network.sample(SeededNoise("test", range(40))), means).argmin(1)
    assert 8 < free.sum() < 32  # without a class, both


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        RDM(8, dim=15)
    with pytest.raises(ValueError, match="RDM draws embeddings"):
        RDM(8, codebook_size=4)
