"""
Mixtures of Gaussians in the plane, where everything is known, and measures of how a model compares.

A denoiser is a function D(x, t): for points x (B, 2) with noise of standard deviation t, the
expected clean points. The score is (D - x) / t^2, and the ODE is dx/dt = (x - D) / t = -t score.
"""

import math

import numpy as np
import torch

# ----------------------------------------------------------------------------------------------------
# mixtures of Gaussians


def around(centres, std, g):
    """One point of N(c, std^2 I) for each centre c in centres (N, 2). -> (N, 2)"""
    return centres + std * torch.randn(centres.shape, generator=g, dtype=torch.float64)


def log_density(x, centres, std, log_weights):
    """ln w_j N(x_i; c_j, std_j^2 I), for points x (N, 2) and centres c (K, 2). -> (N, K)

    std, log_weights = ln w: (K,), or a number for all.
    """
    variance = torch.as_tensor(std, dtype=x.dtype) ** 2
    distance2 = (x ** 2).sum(1, keepdim=True) - 2 * x @ centres.T + (centres ** 2).sum(1)
    return log_weights - distance2 / (2 * variance) - (2 * math.pi * variance).log()


def exact_denoiser(centres, std):
    """D(x, t) of the mixture with equal weights.

    Noise makes it a mixture of wider Gaussians, N(c_j, (std^2 + t^2) I). x is from component j with
    probability w_j, and then the expected clean point is (std^2 x + t^2 c_j) / (std^2 + t^2).
    """
    def denoise(x, t):
        w = log_density(x, centres, (std ** 2 + t ** 2) ** 0.5, 0).softmax(1)  # (B, K)
        return (std ** 2 * x + t ** 2 * w @ centres) / (std ** 2 + t ** 2)

    return denoise


def exact_pfgm_denoiser(centres, std, D, count=48):
    """`exact_denoiser` for PFGM++'s noise, which is Gaussian with the variance t^2 g, where D / g is chi-square with D
    degrees of freedom: a mixture over u = ln g too, whose integrals are sums over evenly spaced u."""
    def denoise(x, t):
        distance2 = torch.cdist(x, centres).amin(1, keepdim=True) ** 2
        room = 10 * (2 / (D + 2)) ** 0.5  # ten standard deviations around 0, and around the u of a point far away
        far = ((D + distance2 / t ** 2) / (D + 2)).log().clamp(min=0)
        u = torch.lerp(-room + 0 * far, far + room, torch.linspace(0, 1, count, dtype=x.dtype))  # (B, count)
        v = t ** 2 * u.exp()[..., None]  # (B, count, 1), of the noise
        log_prior = -D / 2 * (u + (-u).expm1())[..., None]
        to_centres = torch.cdist(x, centres)[:, None] ** 2
        w = log_prior - (std ** 2 + v).log() - to_centres / (2 * (std ** 2 + v))
        w = w.flatten(1).softmax(1).view_as(w)  # p(u, component | x), (B, count, K)
        share = v / (std ** 2 + v)  # of the centre in the expected clean point
        return ((1 - share) * w).sum((1, 2))[:, None] * x + (share * w).sum(1) @ centres

    return denoise


# ----------------------------------------------------------------------------------------------------
# score and denoiser (DisCo-Diff App. F.3)


def jacobian_norms(denoise, x, t):
    """|dG/dx|^2 of the score G, and |dD/dx|^2, at x (B, 2) and noise level t. -> (B,), (B,)

    Both are squared Frobenius norms. The paper has the first, which hardly differs between models;
    the second does.
    """
    x = x.clone().requires_grad_()
    D = denoise(x, t)
    J = torch.stack([torch.autograd.grad(D[:, i].sum(), x, retain_graph=True)[0] for i in (0, 1)], 1)  # (B, 2, 2)
    return ((J - torch.eye(2)) / t ** 2).square().sum((1, 2)), J.square().sum((1, 2))  # G = (D - x) / t^2


# ----------------------------------------------------------------------------------------------------
# codes and samples


def purity(codes, components):
    """The share of points whose component is the commonest of their code. Both int64 (N,)."""
    counts = torch.zeros(codes.max() + 1, components.max() + 1)
    counts.index_put_((codes, components), torch.ones(()), accumulate=True)
    return (counts.amax(1).sum() / len(codes)).item()


def stray(x, centres, std):
    """The share of samples x (N, 2) further than 3 std from every centre.

    Of true samples it is e^-4.5 = 0.011, where the Gaussians don't overlap.
    """
    return (torch.cdist(x, centres).amin(1) > 3 * std).double().mean().item()


def assignment(cost):
    """The cheapest matching of rows with columns, by shortest augmenting paths.

    cost: (n, n) array. -> the row of each column, int64 (n,). Raises ValueError where a cost is not
    finite.
    """
    if not np.isfinite(cost).all():
        raise ValueError("costs must be finite")
    n = len(cost)
    u, v = np.zeros(n), np.zeros(n)  # prices of rows and columns: cost - u - v >= 0, and = 0 where matched
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for first in range(n):
        # Dijkstra's algorithm over the columns, until one is free
        distance, row_before, settled = np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        row, so_far = first, 0.0
        while row >= 0:
            through = so_far + cost[row] - u[row] - v
            shorter = ~settled & (through < distance)
            distance[shorter], row_before[shorter] = through[shorter], row
            column = np.where(settled, np.inf, distance).argmin()
            so_far, settled[column], row = distance[column], True, row_of[column]
        settled[column] = False
        u[first] += so_far
        u[row_of[settled]] += so_far - distance[settled]
        v[settled] -= so_far - distance[settled]
        while row != first:  # back along the path, where each row takes the next column
            row = row_before[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
    return row_of


def wasserstein2(a, b):
    """W-2 between two samples (n, 2) of equal size, by exact optimal transport."""
    cost = torch.cdist(a, b).square().numpy()
    return cost[assignment(cost), np.arange(len(cost))].mean() ** 0.5


def even_parts(x, centres, n):
    """Parts of n samples from x (N, 2), each with equally many near every centre. -> list of (n, 2)

    What does not fill a part is left out.
    """
    nearest = torch.cdist(x, centres).argmin(1)
    parts = zip(*(x[nearest == i].split(n // len(centres)) for i in range(len(centres))))
    return [torch.cat(part) for part in parts if sum(map(len, part)) == n]
