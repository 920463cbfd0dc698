"""
Part 2 of toy2d.py, which runs it: grids of ever more Gaussians (Discrete Latent Codes sec. 3,
Figs. 2 and 11).

A network of fixed size has a fixed number of training steps to learn K Gaussians on a square grid.
It is told nothing; or the true component of each point; or the component in a mixture fitted by EM;
or two codes, learned together with an encoder. The fit is the KL divergence of the data from the
model, whose density is a kernel density estimate (KDE) on its samples.
"""

import math
from types import SimpleNamespace

import torch

from diffusion import heun
from noise import gumbel_noise, seeded_generator
from prior import Prior
from run import progress
from toy_measures import around, log_density, purity, stray

KINDS = ("true samples",  # no model: the best that can be expected
         "unconditional", "true component", "GMM component", "learned codes")  # what the model is told


def grid(K):
    """K centres on a square grid of spacing 1 around 0. (K, 2)"""
    side = torch.arange(math.isqrt(K), dtype=torch.float64)
    return torch.cartesian_prod(side, side) - side.mean()


# ----------------------------------------------------------------------------------------------------
# measures


def silverman(samples):
    """Silverman's bandwidth of a Gaussian kernel, for each coordinate of samples (N, d). -> (d,)"""
    n, d = samples.shape
    return samples.std(0) * (4 / ((d + 2) * n)) ** (1 / (d + 4))


def kl_divergence(points, log_p, samples, h):
    """KL(p | q) = E_p[ln p - ln q], in nats.

    p, the data: points (N, 2), whose log_p (N,) is known. q, the model: the KDE on its samples
    (M, 2), with a Gaussian kernel of bandwidth h (2,).
    """
    log_q = torch.cat([log_density(part / h, samples / h, 1, -math.log(len(samples))).logsumexp(1) - h.log().sum()
                       for part in points.split(500)])
    return (log_p - log_q).mean().item()


# ----------------------------------------------------------------------------------------------------
# codes: known ones, and a prior for learned ones


def fit_gmm(x, K, g, iterations=50):
    """K round Gaussians, fitted to points x (N, 2) by expectation-maximisation (EM).

    It starts from k-means++: each next centre is a point, drawn in proportion to its squared
    distance from the nearest centre so far. Of a few candidates, the one that leaves the least
    distances is taken.
    -> centres (K, 2), std (K,), log-weights (K,), as `log_density` takes them
    """
    centres, nearest = x[:1], (x - x[0]).square().sum(1)
    while len(centres) < K:
        candidates = x[torch.multinomial(nearest, 2 + int(math.log(K)), replacement=True, generator=g)]
        distances = torch.minimum(nearest, (candidates[:, None] - x).square().sum(2))  # (candidates, N)
        best = distances.sum(1).argmin()
        centres, nearest = torch.cat([centres, candidates[best, None]]), distances[best]
    std, log_weights = (nearest.mean() / 2).sqrt().expand(K), torch.full((K,), -math.log(K), dtype=x.dtype)
    for _ in range(iterations):
        r = log_density(x, centres, std, log_weights).softmax(1)  # E step: p(component | x), (N, K)
        n = r.sum(0).clamp_min(1e-9)  # M step
        log_weights, centres = (n / len(x)).log(), r.T @ x / n[:, None]
        variance = r.T @ x.square().sum(1) / n - centres.square().sum(1)  # of both coordinates together
        std = (variance / 2).clamp_min(1e-6).sqrt()
    return centres, std, log_weights


def known_codes(kind, points, component, K, g):
    """Codes of points (N, 2) that need no encoder: none, (N, 0), or one of K values, (N, 1)."""
    if kind == "unconditional":
        return torch.empty(len(points), 0, dtype=torch.int64)
    if kind == "true component":
        return component[:, None]
    return log_density(points, *fit_gmm(points, K, g)).argmax(1, keepdim=True)


def train_prior(codes, codebook_size, batch_size, seed, steps=500):
    """DisCo-Diff's Alg. 2: a small autoregressive prior on codes (N, m)."""
    torch.manual_seed(seed)
    g = seeded_generator("cpu", "prior", seed)
    prior = Prior(codes.shape[1], codebook_size, layers=1, dim=64, heads=2)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in progress(range(steps), desc="prior", leave=False):
        loss = prior.nats(codes[torch.randint(len(codes), (batch_size,), generator=g)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return prior


# ----------------------------------------------------------------------------------------------------
# one grid


def gaussian_grid(K, std, kinds, seed, train, num_points, num_steps, batch_size, codebook_factor):
    """Models of these kinds learn K Gaussians of this std, and their samples are measured.

    train: that of toy2d.py; num_points: in the data set, and sampled from each model; num_steps: of
    Heun's method; batch_size: of the prior; codebook_factor: each of the two learned codes has this
    times sqrt(K) values.
    -> a list of results, one dict for each kind; {kind: samples (num_points, 2)}; {kind: the
    denoiser D(x, t) for the first point's codes}
    """
    g = seeded_generator("cpu", "grid", seed, K)
    centres = grid(K)

    def true_samples(n):
        component = torch.randint(K, (n,), generator=g)
        return around(centres[component], std, g), component

    points, component = true_samples(num_points)
    test, _ = true_samples(2000)
    smoothed = around(test, std, g)  # true samples of a grid with twice the variance
    log_p = log_density(test, centres, std, -math.log(K)).logsumexp(1)
    smoothed_log_p = log_density(smoothed, centres, 2 ** 0.5 * std, -math.log(K)).logsumexp(1)
    noise = torch.randn(num_points, 2, generator=g, dtype=torch.float64)

    results, samples, denoisers = [], {}, {}
    for kind in kinds:
        row = {"seed": seed, "K": K, "std": std, "kind": kind}
        if kind == "true samples":
            x, _ = true_samples(num_points)
        else:
            if kind == "learned codes":
                k = codebook_factor * math.isqrt(K)
                model, encoder = train(points, 2, k, std, seed)
                codes = encoder.sample_codes(points, g)
                gumbel = SimpleNamespace(gumbel=lambda *shape: gumbel_noise((num_points, *shape), g))
                new_codes = train_prior(codes, k, batch_size, seed).sample(gumbel)
            else:
                codes = known_codes(kind, points, component, K, g)
                model, _ = train(points, codes.shape[1], K, std, seed, codes)
                new_codes = codes[torch.randint(num_points, (num_points,), generator=g)]  # as often as in the data
            x = heun(model.with_codes(new_codes), noise, num_steps)
            denoisers[kind] = model.with_codes(codes[:1])
            if codes.shape[1]:
                _, number = codes.unique(dim=0, return_inverse=True)  # a point's codes, as one number
                row |= {"purity": purity(number, component), "codes used": number.max().item() + 1}
        row |= {"KL": kl_divergence(test, log_p, x, silverman(x)),
                "smoothed KL": kl_divergence(smoothed, smoothed_log_p, x, torch.tensor([std, std])),
                "stray": stray(x, centres, std)}
        results.append(row)
        samples[kind] = x
    return results, samples, denoisers
