"""SEDD-absorb: its authors' numbers, its samplers with exact scores, its network."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_prior import ENTROPY, known_codes

from configurator import UserError
from noise import SeededNoise
from sedd import (
    SEDD,
    absorb,
    analytic_probs,
    denoise_probs,
    euler_probs,
    first_hitting,
    log_linear,
    score_entropy,
    sedd_loss,
    tau_leaping,
)

# samplers, with the exact scores of a known distribution of m = 3 tokens with V = 4 values


STATES = torch.cartesian_prod(*[torch.arange(4)] * 3)  # (64, 3)
P = torch.rand(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 3 + 0.02
P /= P.sum()
NOISY = torch.cartesian_prod(*[torch.arange(5)] * 3)  # (125, 3): and with masks
FITS = ((NOISY[:, None] == STATES) | (NOISY[:, None] == 4)).all(2) * P  # (125, 64)
GIVEN = torch.einsum("ns,siy->niy", FITS / FITS.sum(1, keepdim=True), F.one_hot(STATES, 4).double())  # p(x0 | what is unmasked)


def exact_score(seen=None):
    """s_y = p(x0 = y | what is unmasked) / (e^sigma - 1)"""
    def score(x, t):
        if seen is not None:
            seen.append((x.clone(), t))
        p = GIVEN[(x * torch.tensor([25, 5, 1])).sum(1)]
        p = F.pad(p / torch.expm1(log_linear(t)[0])[:, None, None], (0, 1))
        return p.log().scatter(2, x[..., None], 0)
    return score


def noise(seed):
    g = torch.Generator().manual_seed(seed)
    return (lambda n: (lambda *shape: 1 - torch.rand(n, *shape, generator=g, dtype=torch.float64))), \
        (lambda n: (lambda *shape: -torch.rand(n, *shape, generator=g, dtype=torch.float64).log().neg().log()))


def chi_square(codes):
    """Of these samples against P: 63 degrees of freedom, so that 103.4 is exceeded with probability 0.001."""
    counts = torch.bincount((codes * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    expected = len(codes) * P
    assert expected.min() > 5
    return ((counts - expected) ** 2 / expected).sum().item()


def all_mask(n):
    return torch.full((n, 3), 4)


def test_first_hitting_samples_the_distribution():
    """Exactly, in one evaluation a token, at falling times whose mean is that of the order statistics."""
    n, seen, (rand, gumbel) = 30_000, [], noise(0)
    start = all_mask(n)
    codes = first_hitting(exact_score(seen), start, rand(n), gumbel(n))
    assert chi_square(codes) < 103.4 and (start == 4).all()
    assert [(x == 4).sum(1).unique().tolist() for x, _ in seen] == [[3], [2], [1]]
    times = torch.stack([t for _, t in seen])
    assert (times[:-1] > times[1:]).all()
    assert torch.allclose(times.mean(1), torch.tensor([3 / 4, 2 / 4, 1 / 4], dtype=torch.float64), atol=0.01)
    unmasked_first = (seen[1][0] != 4).double().mean(0)
    assert torch.allclose(unmasked_first, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.02)


def test_the_bound_is_exact_for_exact_scores():
    """SEDD.nats is then -ln p itself, whatever the times."""
    class Exact:
        codebook_size = 4

        def __call__(self, x, t, labels):
            return exact_score()(x, t.double())

    for seed in range(5):
        nats = SEDD.nats(Exact(), STATES, None, torch.Generator().manual_seed(seed))
        assert torch.allclose(nats, -P.log(), atol=1e-6)


def test_wrong_sums_of_scores_are_survived():
    """30 % too much: tokens unmask early, and probabilities to stay masked are negative; no mask is left all the same."""
    seen, (_, gumbel) = [], noise(0)
    score = exact_score(seen)
    codes = tau_leaping(lambda x, t: score(x, t) + math.log(1.3), all_mask(5000), 10, gumbel(5000), eta=0.1)
    assert codes.min() >= 0 and codes.max() <= 3
    masked = [(x == 4).double().mean().item() for x, _ in seen]
    assert masked[5] < 0.45 and masked == sorted(masked, reverse=True)


def test_a_wrong_sampler_is_found_out():
    """What the chi-square is worth: all tokens in one step have another distribution."""
    n, (_, gumbel) = 30_000, noise(0)
    assert chi_square(tau_leaping(exact_score(), all_mask(n), 1, gumbel(n))) > 1000


def test_analytic_sampler_agrees_in_1000_steps():
    n, seen, (_, gumbel) = 6_000, [], noise(1)
    codes = tau_leaping(exact_score(seen), all_mask(n), 1000, gumbel(n))
    assert chi_square(codes) < 103.4 and len(seen) == 1000


def test_times_of_tau_leaping_are_even():
    """From t = 1 on, where all is mask, to 1 / n, from where the last step goes to 0."""
    seen, (_, gumbel) = [], noise(6)
    tau_leaping(exact_score(seen), all_mask(50), 4, gumbel(50))
    assert [t.unique().tolist() for _, t in seen] == [[1.0], [0.75], [0.5], [0.25]]


@pytest.mark.parametrize("eta, t0, t1", [(0.0, 0.3, 0.55), (0.02, 0.3, 0.55), (0.3, 0.3, 0.55), (0.9, 0.05, 0.99)])
def test_masked_tokens_follow_the_schedule(eta, t0, t1):
    """P(masked at t) = t at every step, with and without remasking; tokens are masked again in (t0, t1) alone."""
    n, steps, seen, (_, gumbel) = 20_000, 40, [], noise(2)
    tau_leaping(exact_score(seen), all_mask(n), steps, gumbel(n), eta=eta, t0=t0, t1=t1)
    assert len(seen) == steps
    for (x, t), (x_next, _) in zip(seen, seen[1:]):
        t = t[0].item()
        assert (x == 4).double().mean().item() == pytest.approx(t, abs=5 * math.sqrt(t * (1 - t) / (3 * n)) + 1e-12)
        again = ((x_next == 4) & (x != 4)).sum() / max((x != 4).sum(), 1)
        wanted = min(eta, (t - 1 / steps) / (1 - t)) if t0 < t < t1 else 0
        assert again.item() == pytest.approx(wanted, abs=5 * math.sqrt(wanted / max((x != 4).sum().item(), 1)))


def test_remasking_ends_in_the_distribution():
    n, (_, gumbel) = 6_000, noise(3)
    assert chi_square(tau_leaping(exact_score(), all_mask(n), 400, gumbel(n), eta=0.02)) < 103.4


@pytest.mark.parametrize("known", [[4, 2, 4], [1, 4, 3]], ids=str)
@pytest.mark.parametrize("sampler", ["first-hitting", "remasking"])
def test_any_part_of_a_code_is_filled_in_as_it_should_be(sampler, known):
    """Against p(rest | what is given), by chi-square with 15 or 3 degrees of freedom; what is given stays."""
    n, (rand, gumbel) = (20_000 if sampler == "first-hitting" else 3_000), noise(7)
    start = torch.tensor(known).expand(n, -1)
    codes = first_hitting(exact_score(), start, rand(n), gumbel(n)) if sampler == "first-hitting" else \
        tau_leaping(exact_score(), start, 200, gumbel(n), eta=0.02)
    free = torch.tensor(known) == 4
    assert (codes == start)[:, ~free].all()
    fits = (STATES == torch.tensor(known))[:, ~free].all(1)
    counts = torch.bincount((codes * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    expected = n * P[fits] / P[fits].sum()
    assert counts.sum() == counts[fits].sum() and expected.min() > 1
    assert ((counts[fits] - expected) ** 2 / expected).sum() < {16: 37.7, 4: 16.3}[fits.sum().item()]  # p = 0.001


def test_what_is_given_to_the_network_stays():
    """-1 is free, the rest is visible from the first step on; codes of other sizes are refused."""
    model, c, seen = small_sedd().eval(), torch.tensor([0, 1]), []
    given = torch.tensor([[-1, 3, -1], [2, -1, -1]])
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    for how in ({}, dict(sedd_sampler="analytic", sedd_steps=5, eta=0.9)):
        seen.clear()
        codes = model.sample(SeededNoise("test", range(2)), c, given=given, **how)
        assert all((x[given >= 0] == given[given >= 0]).all() for x in (*seen, codes)) and codes.max() < 4
        assert seen[0].tolist() == [[4, 3, 4], [2, 4, 4]]
    with pytest.raises(UserError, match="codes are 3 numbers in 0 ... 3"):
        model.sample(SeededNoise("test", range(2)), c, given=given.expand(2, 3)[:, :2])


def test_times_of_what_is_not_given_are_those_of_training():
    """Where n of m codes are masked, the next one unmasks at the largest of n uniform times, as the mean shows; and -1 alone
    changes nothing."""
    model, n, seen = small_sedd(label_dim=0).eval(), 4_000, []
    model.register_forward_pre_hook(lambda _, arguments: seen.append((arguments[0].clone(), arguments[1])))
    given = torch.tensor([-1, 3, -1]).expand(n, -1)
    model.sample(SeededNoise("test", range(n)), given=given)
    masked = torch.stack([(x == 4).sum(1) for x, _ in seen]).tolist()
    assert masked == [[2] * n, [2] * n, [1] * n]  # the first evaluation draws what is given
    for (_, t), mean, n_masked in zip(seen[1:], (2 / 4, 1 / 4), (2, 1)):  # of the second and third largest of three
        assert t.mean().item() == pytest.approx(mean, abs=5 * 0.25 / math.sqrt(n)), n_masked
    free = [model.sample(SeededNoise("test", range(9)), given=given) for given in (None, torch.full((9, 3), -1))]
    assert torch.equal(*free)


def test_euler_and_analytic_are_one_for_the_log_linear_noise():
    n = 500
    a, b = (tau_leaping(exact_score(), all_mask(n), 20, noise(4)[1](n), **how) for how in ({}, dict(probs=euler_probs)))
    assert torch.equal(a, b)


# noise and loss


ABSORB = {k: torch.from_numpy(v) for k, v in np.load(ROOT / "tests/reference/sedd_absorb.npz").items()}


def test_sedd_equals_its_authors():
    """Lou et al.'s program, float64, random log-scores."""
    t, x, x0, log_score = (ABSORB[k] for k in ("t", "x", "x0", "log_score"))
    sigma, dsigma = log_linear(t)
    s = t - ABSORB["step"]
    for mine, theirs in ((sigma, "sigma"), (dsigma, "dsigma"), (score_entropy(log_score, sigma, x, x0), "score_entropy"),
                         (sedd_loss(log_score, t, x, x0), "loss"), (analytic_probs(log_score, x, t, s), "analytic_probs"),
                         (euler_probs(log_score, x, t, s), "euler_probs"), (denoise_probs(log_score, x, t), "denoise_probs")):
        assert mine.dtype == torch.float64 and mine.shape == ABSORB[theirs].shape
        assert torch.allclose(mine, ABSORB[theirs], rtol=1e-6, atol=1e-6 if mine.ndim > 1 else 0), theirs


def test_score_entropy_is_zero_at_the_true_score_alone():
    sigma, x, x0 = torch.tensor([0.01, 3.0], dtype=torch.float64), torch.full((2, 1), 3), torch.tensor([[0], [2]])
    p = torch.nn.functional.one_hot(x0, 3).double().clamp_min(1e-12)
    true = F.pad((p / torch.expm1(sigma)[:, None, None]).log(), (0, 1))
    assert score_entropy(true, sigma, x, x0).abs().max() < 1e-8
    for change in (0.1, -0.1):
        assert (score_entropy(true + change, sigma, x, x0) > 1e-4).all()
    assert (score_entropy(true, sigma, x0, x0) == 0).all()  # no mask, nothing to learn


def test_score_entropy_is_computed_in_float32_or_better():
    """At the smallest sigma of training, against float64: where e^sigma - 1 without expm1 is off by 2e-5 and more."""
    g = torch.Generator().manual_seed(0)
    logits, x0 = torch.randn(200, 5, 8, generator=g).bfloat16(), torch.randint(8, (200, 5), generator=g)
    x, t = torch.full_like(x0, 8), torch.full((200,), 1.0e-3)
    sigma = log_linear(t)[0]

    def loss(logits, t):
        return sedd_loss(F.pad(logits - torch.expm1(log_linear(t)[0]).log()[:, None, None] - math.log(8), (0, 1)), t, x, x0)

    low, high = loss(logits.float(), t), loss(logits.double(), t.double())
    assert low.dtype == torch.float32 and torch.allclose(low.double(), high, rtol=1e-5)
    half = score_entropy(F.pad(logits, (0, 1)), sigma, x, x0)
    assert half.dtype == torch.float32 and torch.equal(half, score_entropy(F.pad(logits.float(), (0, 1)), sigma, x, x0))


def test_what_the_loss_of_uniform_scores_is():
    """(1 - EPS) m ln V on average: the bound on -ln p = m ln V but for the terms of order EPS."""
    t, g = 1e-3 + (1 - 1e-3) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000, torch.Generator().manual_seed(0)
    x0 = torch.randint(4, (100_000, 3), generator=g)
    x = absorb(x0, t, torch.rand(100_000, 3, generator=g), mask=4)
    log_score = (-torch.expm1(log_linear(t)[0]).log() - math.log(4))[:, None, None].expand(-1, 3, 5)
    assert sedd_loss(log_score, t, x, x0).mean().item() == pytest.approx(0.999 * 3 * math.log(4), rel=0.02)
    masks_known = torch.where(x == 4, 1 / (0.999 * t[:, None]), 0).mean()  # the part that the draws of x decide
    assert (sedd_loss(log_score, t, x, x0).mean() / masks_known).item() == pytest.approx(0.999 * 3 * math.log(4), rel=1e-6)


def test_absorb_masks_by_time():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    u = (0.999 * t)[:, None] + torch.tensor([-1e-6, 1e-6])
    assert absorb(torch.tensor([[1, 2]] * 3), t, u.clamp_min(0), mask=7).tolist() == [[1, 2], [7, 2], [7, 2]]


# the network


def small_sedd(**settings):
    torch.manual_seed(0)
    return SEDD(**dict(dict(num_latents=3, codebook_size=4, label_dim=4, layers=2, dim=32, heads=2), **settings))


def test_sedd_starts_uniform_and_sees_everything_but_what_is_masked():
    model = small_sedd().eval()
    x, t = torch.tensor([[4, 1, 4], [4, 4, 4]]), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        log_score = model(x, t)
        assert log_score.shape == (2, 3, 5) and log_score[0, 1, 1] == 0 and (log_score[..., 4] == 0).all()
        p = log_score[1, :, :4].exp() * torch.expm1(log_linear(t)[0])[1]
        assert torch.allclose(p, torch.full((3, 4), 0.25))
        z = torch.randint(4, (50, 3))
        assert torch.allclose(model.nats(z, None, torch.Generator()), torch.tensor(3 * math.log(4)))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        base = model(x, t, torch.tensor([0, 1]))
        for other in (model(torch.tensor([[4, 2, 4], [4, 4, 4]]), t, torch.tensor([0, 1])),
                      model(x, torch.tensor([0.6, 0.9]), torch.tensor([0, 1])), model(x, t, torch.tensor([3, 1]))):
            a, b = base[0, [0, 2], :4].log_softmax(1), other[0, [0, 2], :4].log_softmax(1)
            assert (a - b).abs().amax(1).min() > 1e-3 and torch.equal(base[1], other[1])  # token, time and class; both ways
        assert torch.equal(model(x, t), model(x, t, torch.tensor([-1, -1])))  # labels can be left out
    without = small_sedd(label_dim=0)
    assert torch.equal(without(x, t), without(x, t, torch.tensor([2, 3])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sedd_learns_a_known_distribution(dtype):
    """Its bound comes down to the entropy, and first-hitting draws from the distribution; in bfloat16 too."""
    model = small_sedd()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    worst = 0
    for step in range(300):
        z, c = known_codes(128)
        t = 1e-3 + (1 - 1e-3) * torch.rand(128)
        x = absorb(z, t, torch.rand(128, 3), mask=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = sedd_loss(model(x, t, c), t, x, z).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        worst = max(worst, loss.item()) if step > 100 else 0
    assert worst < 3 * 6 * math.log(2)  # no step blew up
    with torch.no_grad():
        z, c = known_codes(5000)
        bound = model.nats(z, c, torch.Generator().manual_seed(0)).mean().item() / math.log(2)
        assert bound == pytest.approx(ENTROPY, abs=0.12)
        codes = model.sample(SeededNoise("test", range(5000)), c)
    assert (codes[:, 2] == c).double().mean() > 0.97
    assert (codes[:, 0] == codes[:, 1]).double().mean().item() == pytest.approx(0.9, abs=0.04)
    assert (torch.bincount(codes[:, 0], minlength=4) / 5000 - 0.25).abs().max() < 0.04
    for known, unknown in ((0, 1), (1, 0)):  # p(the one | the other), which is 0.9 where both are the same
        given = torch.full((5000, 3), -1)
        given[:, known] = z[:, known]
        codes = model.sample(SeededNoise("test", range(5000)), c, given=given)
        assert (codes[:, known] == z[:, known]).all() and (codes[:, 2] == c).double().mean() > 0.97
        assert (codes[:, unknown] == z[:, known]).double().mean().item() == pytest.approx(0.9, abs=0.04)


def test_sedd_of_an_odd_width():
    with pytest.raises(ValueError, match="must be even, for its sines and cosines: 7 is not"):
        small_sedd(dim=7, heads=1)
