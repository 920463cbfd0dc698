"""
What must hold of answers in sedd.py.

The function with an exercise's name takes the student's module, and gives [(property, check)]. check(rng) gives
"" or None if the property holds, else words for the student. NAME_probe gives outputs at fixed inputs, by which
known wrong answers are recognised.
"""

import math

import torch
import torch.nn.functional as F
from measures import EVERY, far, fixed, gumbel, misfit, normal, numbered, tensor, uniform

# ----------------------------------------------------------------------------------------------------
# masks and scores of SEDD. Tokens are 0 ... 3, the mask is 4


def entropy_probe(sedd):
    rng, t = fixed(), torch.tensor([0.05, 0.5, 1.0]).double()
    x = torch.tensor([[4, 1, 4], [4, 4, 2], [0, 4, 4]])
    entropy = sedd.score_entropy(normal(rng, 3, 3, 5), sedd.log_linear(t)[0], x, torch.tensor([[0, 1, 3]] * 3))
    return [entropy, sedd.absorb(torch.tensor([[0, 1, 2, 3]] * 3), t, uniform(rng, 3, 4), 4)]


def entropy(sedd):
    def shares(rng):
        t, codes = torch.tensor([0.0, 0.2, 0.7, 1.0]).double(), torch.from_numpy(rng.integers(0, 4, (4, 5000)))
        even = (torch.arange(5000).double() / 5000).expand(4, 5000)
        x = tensor(sedd.absorb(codes, t, even, 4), (4, 5000), "absorb")
        share = (x == 4).double().mean(1)
        if (share - (1 - sedd.EPS) * t).abs().max() > 4e-4:
            return "the share of masks must be (1 - EPS) t: where u is evenly spread, it is " + \
                ", ".join(f"{value:.4f}" for value in share) + " at t = 0, 0.2, 0.7, 1"
        if (x[x != 4] != codes[x != 4]).any():
            return "tokens that are not masked must stay as they are"

    def smallest(rng):
        sigma = sedd.log_linear(0.001 + 0.999 * uniform(rng, 6))[0]
        x0, x = torch.from_numpy(rng.integers(0, 4, (6, 3))), torch.full((6, 3), 4)
        right = F.one_hot(x0, 5).double().log() - torch.expm1(sigma).log()[:, None, None]
        found = tensor(sedd.score_entropy(right, sigma, x, x0), (6, 3), "score_entropy")
        scale = torch.expm1(sigma)[:, None]
        if not (found.abs() * scale).max() < 1e-6:
            return f"x0's own scores must have the entropy 0, not {found.flatten()[0]:.4g}"
        if sedd.score_entropy(right + normal(rng, 6, 3, 1), sigma, x, x0).min() < 0:
            return "no scores may have a negative entropy"

    def closed_form(rng):
        """Of scores that are r times too large, it is a (r - 1 - ln r)."""
        sigma, r = sedd.log_linear(0.001 + 0.999 * uniform(rng, 6))[0], 0.2 + 3 * float(rng.random())
        x0, x = torch.from_numpy(rng.integers(0, 4, (6, 3))), torch.full((6, 3), 4)
        scores = F.one_hot(x0, 5).double().log() - torch.expm1(sigma).log()[:, None, None] + math.log(r)
        found = sedd.score_entropy(scores, sigma, x, x0) * torch.expm1(sigma)[:, None]
        if far(found, torch.full((6, 3), r - 1 - math.log(r))):
            return (f"scores that are {r:.2f} times too large must have the entropy {r - 1 - math.log(r):.4f} a, "
                    f"not {found[0, 0]:.4f} a")

    def others(rng):
        x, x0 = torch.tensor([[0, 4, 2], [4, 4, 4]]), torch.tensor([[0, 1, 2], [3, 1, 2]])
        scores, sigma = normal(rng, 2, 3, 5), torch.ones(2).double()
        found = sedd.score_entropy(scores, sigma, x, x0)
        if found[0, [0, 2]].any():
            return "positions that are not masked must count 0"
        if not found[1].all():
            return "masked positions must count"
        scores[..., 4] += 1
        if far(sedd.score_entropy(scores, sigma, x, x0), found):
            return "the mask's own column must not count"

    def fine(rng):
        x, x0 = torch.full((2, 3), 4), torch.zeros(2, 3, dtype=torch.int64)
        found = sedd.score_entropy(normal(rng, 2, 3, 5).bfloat16(), torch.tensor([1e-3, 1.0]), x, x0)
        if found.dtype == torch.bfloat16 or not found.all():
            return "scores in bfloat16 must be computed with in float32"

    return [("the share of masks is (1 - EPS) t", shares), ("the right scores have entropy 0", smallest),
            ("others have what the formula says", closed_form), ("only masked positions count, and no mask", others),
            ("half precision is widened", fine)]


def at(t, n):
    return torch.full((n,), t, dtype=torch.float64)


def independent_scores(sedd, p, t):
    """Exact log-scores (B, m, 5) at times t (B,) of independent tokens with probabilities p (m, 4)."""
    return F.pad((p / torch.expm1(sedd.log_linear(t)[0])[:, None, None]).log(), (0, 1))


def step_probe(sedd):
    x = torch.tensor([[4, 1, 4], [2, 4, 4]])
    return [sedd.analytic_probs(0.3 * normal(fixed(), 2, 3, 5) - 2, x, at(0.8, 2), at(0.5, 2))]


def step(sedd):
    def setup(rng, n=5):
        p = normal(rng, 3, 4).softmax(1)
        t = 0.3 + 0.7 * uniform(rng, n)
        s = t * uniform(rng, n)
        return p, t, s, sedd.analytic_probs(independent_scores(sedd, p, t), torch.full((n, 3), 4), t, s)

    def stays(rng):
        _, t, s, probs = setup(rng)
        tensor(probs, (5, 3, 5), "analytic_probs")
        if far(probs[..., 4], (s / t)[:, None].expand(5, 3)):
            return (f"from t = {t[0]:.2f} to s = {s[0]:.2f} a mask must stay with probability "
                    f"s / t = {s[0] / t[0]:.3f}, not {probs[0, 0, 4]:.3f}")

    def ratios(rng):
        p, _, _, probs = setup(rng)
        tokens = probs[..., :4] / probs[..., :4].sum(2, keepdim=True)
        if far(probs.sum(2), torch.ones(5, 3)) or far(tokens, p.expand(5, 3, 4)):
            return "rows must sum to 1, and a mask must become each token in proportion to its score"

    def unmasked(rng):
        p, x = normal(rng, 3, 4).softmax(1), torch.tensor([[0, 4, 3], [4, 2, 1]])
        probs = sedd.analytic_probs(independent_scores(sedd, p, at(0.7, 2)), x, at(0.7, 2), at(0.2, 2))
        if far(probs[x != 4], F.one_hot(x, 5)[x != 4]):
            return "a token that is not masked must stay with probability 1"

    def factor(rng):
        rate, scores = uniform(rng, 2) / 20, normal(rng, 2, 3, 5)
        probs = tensor(sedd.step_probs(rate, scores, torch.full((2, 3), 4)), (2, 3, 5), "step_probs")
        if far(probs[..., :4] / scores[..., :4].exp(), rate[:, None, None].expand(2, 3, 4)):
            return "step_probs must take the factor of each row from `rate`"

    return [("a mask stays with probability s / t", stays), ("tokens come in proportion to their scores", ratios),
            ("what is not masked stays", unmasked), ("step_probs takes any factor", factor)]


# ----------------------------------------------------------------------------------------------------
# samplers with the exact scores of a known distribution


class Known:
    """A distribution over 64 codes, and its exact scores."""

    def __init__(self, sedd, rng):
        self.sedd, self.seen = sedd, []
        p = uniform(rng, 64) ** 3 + 0.03
        self.p = p / p.sum()
        noisy = torch.cartesian_prod(*[torch.arange(5)] * 3)  # 125, and with masks
        fits = ((noisy[:, None] == EVERY) | (noisy[:, None] == 4)).all(2) * self.p
        self.given = torch.einsum("ns,siy->niy", fits / fits.sum(1, keepdim=True), F.one_hot(EVERY, 4).double())

    def score(self, x, t):
        self.seen.append((x.clone(), t))
        p = self.given[(x * torch.tensor([25, 5, 1])).sum(1)] / torch.expm1(self.sedd.log_linear(t)[0])[:, None, None]
        return F.pad(p.log(), (0, 1)).scatter(2, x[..., None], 0)


def sources(rng, n):
    """rand(*shape) -> (n, *shape), gumbel(*shape) -> (n, *shape)"""
    return lambda *shape: uniform(rng, n, *shape), lambda *shape: gumbel(rng, n, *shape)


def masks(n):
    return torch.full((n, 3), 4)


def hitting_probe(sedd):
    rng = fixed()
    known, x = Known(sedd, rng), masks(24)
    codes = sedd.first_hitting(known.score, x, *sources(rng, 24))
    return [codes, x, known.seen[0][1]]


def hitting(sedd):
    def run(rng, n):
        known, x = Known(sedd, rng), masks(n)
        codes = tensor(sedd.first_hitting(known.score, x, *sources(rng, n)), (n, 3), "first_hitting")
        return known, x, codes

    def frequencies(rng):
        known, _, codes = run(rng, 20_000)
        if codes.max() > 3:
            return "masks are left"
        return misfit(numbered(codes), known.p, "codes")

    def evaluations(rng):
        known, x, _ = run(rng, 500)
        left = [(seen == 4).sum(1).unique().tolist() for seen, _ in known.seen]
        if left != [[3], [2], [1]]:
            return f"three evaluations must see 3, 2 and 1 masks: yours see {left}"
        if (x != 4).any():
            return "the x that was given must stay all masks"

    def times(rng):
        known, _, _ = run(rng, 4000)
        found = torch.stack([t for _, t in known.seen])
        if found.shape != (3, 4000) or not (found.diff(dim=0) < 0).all():
            return "times must fall from evaluation to evaluation, each code having its own"
        if (found.mean(1) - torch.tensor([0.75, 0.5, 0.25])).abs().max() > 0.03:
            return "the times must be on average 3/4, 2/4 and 1/4, as three uniform ones in order: they are " + \
                ", ".join(f"{value:.2f}" for value in found.mean(1))

    def order(rng):
        known, _, _ = run(rng, 4000)
        first = (known.seen[1][0] != 4).double().mean(0)
        if (first - 1 / 3).abs().max() > 0.05:
            return "each position must be the first in a third of the codes: the shares are " + \
                ", ".join(f"{value:.2f}" for value in first)

    return [("codes follow the distribution", frequencies), ("one evaluation for each token", evaluations),
            ("the times fall, and are uniform", times), ("every position comes first as often", order)]


def remasking_probe(sedd):
    rng = fixed()
    known = Known(sedd, rng)
    sedd.tau_leaping(known.score, masks(24), 8, sources(rng, 24)[1], eta=0.4, t0=0.3, t1=0.9)
    return [x @ torch.tensor([25, 5, 1]) for x, _ in known.seen]


def remasking(sedd, rescale=False):
    def run(rng, n, steps, **settings):
        known = Known(sedd, rng)
        codes = sedd.tau_leaping(known.score, masks(n), steps, sources(rng, n)[1], **settings)
        return known, tensor(codes, (n, 3), "tau_leaping")

    def times(rng):
        known, codes = run(rng, 50, 4)
        found = [[round(value, 9) for value in t.unique().tolist()] for _, t in known.seen]
        if found != [[1.0], [0.75], [0.5], [0.25]]:
            return f"four evaluations must be at the times 1, 0.75, 0.5, 0.25: yours are at {found}"
        if codes.max() > 3:
            return "the last evaluation must leave no mask"

    def share_of_masks(rng, **settings):
        known, _ = run(rng, 1500, 20, **settings)
        for (x, t) in known.seen:
            share, t = (x == 4).double().mean().item(), t[0].item()
            if abs(share - t) > 6 * math.sqrt(t * (1 - t) / 4500) + 1e-9:
                return f"at t = {t:.2f} the share of masks is {share:.3f}: it must follow the schedule"

    def plain(rng):
        return share_of_masks(rng)

    def remasked(rng):
        return share_of_masks(rng, eta=0.3, t0=0.2, t1=0.6) or share_of_masks(rng, eta=0.95, t0=0.05, t1=0.99)

    def window(rng):
        """eta = 1 tells how many the schedule has room for."""
        eta, t0, t1 = 0.2 + 0.6 * float(rng.random()), 0.21, 0.79
        seen, most_seen = (run(rng, 2000, 20, eta=value, t0=t0, t1=t1)[0].seen for value in (eta, 1.0))
        for (x, t), (after, _), (most_x, _), (most_after, _) in zip(seen, seen[1:], most_seen, most_seen[1:]):
            t, tokens = t[0].item(), (x != 4).sum().item()
            share, most = ((b == 4)[a != 4].double().mean().item() for a, b in ((x, after), (most_x, most_after)))
            if t0 < t < t1 and most < 1 and ((most_x == 4) & (most_after == 4)).any():
                return f"at t = {t:.2f}, eta = 1 must mask all tokens again, or as many as masked positions get tokens"
            wanted = (eta * most if rescale else min(eta, most)) if t0 < t < t1 else 0
            if tokens and abs(share - wanted) > 6 * math.sqrt(2 * wanted * (1 - wanted) / tokens) + 1e-9:
                return f"at t = {t:.2f}, {share:.3f} of the tokens are masked again, not {wanted:.3f}: eta is {eta:.2f}"

    def frequencies(rng):
        known, codes = run(rng, 1500, 100, eta=0.02)
        return misfit(numbered(codes), known.p, "codes")

    return [("times are even, and no mask is left", times), ("without remasking, masks follow the schedule", plain),
            ("with remasking too", remasked), ("as many are masked again as should be", window),
            ("codes follow the distribution", frequencies)]
