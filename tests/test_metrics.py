"""The metrics: reference numbers, closed forms, known answers."""
import numpy as np
import pytest
import torch
from conftest import ROOT, moments

from metrics import (
    Moments,
    equally_many,
    factor,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold_radii,
    precision_recall,
    share_inside,
    vendi_score,
)

rng = np.random.default_rng(0)


@pytest.mark.parametrize("a, key", [("a", "distance"), ("a_rank_deficient", "distance_rank_deficient")])
def test_frechet_distance_equals_the_reference(a, key):
    with np.load(ROOT / "tests/reference/frechet.npz") as f:
        assert frechet_distance(*moments(f[a]), *moments(f["b"])) == pytest.approx(f[key].item(), rel=1e-6)
        assert frechet_distance(*moments(f["b"]), *moments(f[a])) == pytest.approx(f[key].item(), rel=1e-6)
        assert frechet_distance(*moments(f[a]), *moments(f[a])) < 1e-9


def test_frechet_distance_of_diagonal_gaussians():
    mu, a, b = rng.normal(size=6), rng.uniform(0, 2, 6), np.array([0, 0, 1, 2, 3, 4.0])
    want = (mu ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert frechet_distance(mu, np.diag(a), np.zeros(6), np.diag(b)) == pytest.approx(want, rel=1e-12)
    turned = frechet_distance(Q @ mu, Q @ np.diag(a) @ Q.T, np.zeros(6), Q @ np.diag(b) @ Q.T)
    assert turned == pytest.approx(want, rel=1e-9)
    assert frechet_distance(mu, np.zeros((6, 6)), np.zeros(6), np.zeros((6, 6))) == pytest.approx((mu ** 2).sum())


def test_fid_of_a_set_with_itself_is_zero_with_fewer_images_than_dimensions():
    mu, sigma = moments(rng.normal(size=(50, 300)) * 10)
    assert factor(sigma).shape == (300, 49) and frechet_distance(mu, sigma, mu, sigma) < 1e-7 * np.trace(sigma)


def test_moments_in_a_stream():
    x = rng.normal(3, 2, (1001, 7))
    stream = Moments(7, "cpu")
    for part in np.split(x, [1, 400, 401]):
        stream.update(torch.from_numpy(part))
    for got, want in zip(stream.result(), moments(x)):
        assert np.allclose(got, want, rtol=1e-12)


def sums(p):
    """(images, classes) in splits of equal size -> what `inception_score` takes"""
    p = torch.as_tensor(p, dtype=torch.float64).unflatten(0, (2, -1))
    return p.sum(1), -torch.special.entr(p).sum((1, 2)), torch.full((2,), p.shape[1])


def test_inception_score():
    """Certain, and even over n classes: n. Equal for all images: 1. Splits of 2 and 4: 3 +- 1."""
    assert inception_score(*sums(np.eye(5)[np.arange(40) % 5])) == pytest.approx((5, 0))
    assert inception_score(*sums(np.full((40, 5), 0.2))) == pytest.approx((1, 0))
    assert inception_score(*sums(np.eye(8)[np.r_[np.arange(40) % 2, np.arange(40) % 4]])) == pytest.approx((3, 1))
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    marginal = p.mean(0)
    assert inception_score(*sums(np.r_[p, p]))[0] == pytest.approx(np.exp((p * np.log(p / marginal)).sum() / 2))


def test_precision_and_recall():
    grid = torch.arange(20.0)[:, None]  # the third-nearest neighbour of an inner point is 2 away, of the first 3
    assert manifold_radii(grid).tolist() == [3.0] + [2.0] * 18 + [3.0]
    two = torch.cat([grid, grid + 1000])
    assert precision_recall(two, two) == (1, 1)
    one = torch.cat([grid, grid + 0.1])  # as many, in one of two clusters: all real, half of it
    assert precision_recall(two, one) == (1, 0.5) and precision_recall(one, two) == (0.5, 1)
    assert precision_recall(grid, grid + 500) == (0, 0)
    assert precision_recall(grid, grid + 20) == (3 / 20, 3 / 20)  # within reach of the end, 3 wide: 20, 21, 22


def test_precision_and_recall_of_equally_many():
    """Of 400 points in a row, 20 are drawn. They are further apart: their radii reach further."""
    many = torch.stack([torch.arange(400.0), torch.zeros(400)], dim=1)
    few = torch.stack([torch.arange(0, 400, 20.0), torch.full((20,), 10.0)], dim=1)
    assert precision_recall(*equally_many(many, few))[0] > 0.8 and precision_recall(*equally_many(few, many))[1] > 0.8
    assert precision_recall(many, few)[0] == 0 and precision_recall(few, many)[1] == 0  # ADM's protocol: all
    assert share_inside(few, many, manifold_radii(many)) == 0


def test_kid_is_the_double_sum():
    x, y = rng.normal(size=(4, 3)), rng.normal(0.5, 1, size=(6, 3))
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    own = [sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
           for z in (x, y)]
    want = sum(own) - 2 * sum(k(a, b) for a in x for b in y) / 24
    for tile in (1, 3, 1000):
        assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y), tile)[0] == pytest.approx(want, rel=1e-12)
        assert kernel_distance(torch.from_numpy(y), torch.from_numpy(x), tile)[0] == pytest.approx(want, rel=1e-12)
    a, b = torch.zeros(5, 2), torch.ones(7, 2)  # k = 1 within the one, 8 within the other, 1 between: no row differs
    assert kernel_distance(a, b) == (1 + 8 - 2, 0)


@pytest.mark.parametrize("shift, low, high", [(0, 1.3, 1.55), (1, 0.9, 1.1)])
def test_kid_is_unbiased_and_its_error_is_the_spread_or_above(shift, low, high):
    """Between N(0, 1) and N(a, 1) MMD^2 is the sum over j of binom(3, j) (difference of the j-th
    moments)^2. For a = 0 the error should be sqrt(2) times the spread, for a = 1 the spread."""
    g = torch.Generator().manual_seed(0)
    found = torch.tensor([kernel_distance(torch.randn(80, 1, generator=g), torch.randn(160, 1, generator=g) + shift)
                          for _ in range(1500)])
    spread = found[:, 0].std().item()
    want = 3 * shift ** 2 + 3 * shift ** 4 + (shift ** 3 + 3 * shift) ** 2
    assert abs(found[:, 0].mean().item() - want) < 3 * spread / 1500 ** 0.5
    assert low < found[:, 1].square().mean().sqrt().item() / spread < high


def test_tiles_change_nothing():
    x, y = torch.randn(105, 9, dtype=torch.float64) * 1.5, torch.randn(88, 9, dtype=torch.float64)
    distances = (x[:, None] - y).norm(dim=2)
    own = (y[:, None] - y).norm(dim=2).sort(dim=1).values[:, 3]
    for tile in (1, 10, 1000):
        assert torch.allclose(manifold_radii(y, tile), own)
        assert share_inside(x, y, own, tile) == pytest.approx((distances <= own).any(1).double().mean().item())
    assert 0 < share_inside(x, y, own) < 1


REFERENCE = np.load(ROOT / "tests/reference/vendi.npz")


@pytest.mark.parametrize("name", ["wide", "tall", "copies", "one", "orthogonal", "offset"])
def test_vendi_score_equals_the_reference(name):
    x = torch.from_numpy(REFERENCE[f"x_{name}"])
    for want in (REFERENCE[f"vs_{name}"], REFERENCE[f"vs_dual_{name}"]):
        assert vendi_score(x) == pytest.approx(want.item(), rel=1e-9)
    assert vendi_score(torch.cat([x, 7 * x])) == pytest.approx(vendi_score(x))  # neither copies nor lengths count


def test_vendi_score_of_another_kernel_equals_the_reference():
    x = torch.from_numpy(REFERENCE["x_wide"])
    K = (-torch.cdist(x, x) ** 2 / (2 * REFERENCE["rbf_bandwidth"] ** 2)).exp()
    assert vendi_score(factor(K)) == pytest.approx(REFERENCE["vs_rbf_q1"].item(), rel=1e-9)


def test_vendi_score_counts():
    """n orthogonal rows are n; with shares 1/2, 1/4, 1/4 they count exp(entropy)."""
    assert vendi_score(torch.eye(6)) == pytest.approx(6) and vendi_score(torch.ones(4, 9)) == pytest.approx(1)
    assert vendi_score(torch.eye(3)[[0, 0, 1, 2]]) == pytest.approx(2 ** 1.5)
