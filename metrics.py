"""
Metrics of images, from their features: Frechet distance (FID), kernel distance (KID), precision and
recall, Inception Score, Vendi score.

    from metrics import frechet_distance

Features have a row for each image; which network computed them does not matter here. eval_fid.py
computes features of images and calls these functions.
"""

import math

import numpy as np
import torch

NEIGHBOURS = 3  # of precision and recall: a row's radius reaches to its third-nearest neighbour


class Moments:
    """Mean (D,) and unbiased covariance (D, D) of rows that come in batches, in float64."""

    def __init__(self, dim, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, x):  # (B, D)
        x = x.double()
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def result(self):
        """-> mu, sigma: float64 arrays"""
        mu = self.sum / self.count
        sigma = (self.outer - self.count * mu.outer(mu)) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


def factor(sigma):
    """-> F (D, rank) with F F^T = sigma; no columns for directions where sigma is 0 to rounding."""
    values, vectors = torch.linalg.eigh(torch.as_tensor(sigma, dtype=torch.float64))
    keep = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance between two Gaussians (Heusel et al. 2017, Eq. 6):

        |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))

    mu: arrays (D,); sigma: arrays (D, D), symmetric, perhaps rank-deficient. With sigma = F F^T,
    the trace of the product's root is the sum of the singular values of F1^T F2: no root of a
    non-symmetric matrix is needed.
    """
    F1, F2 = factor(sigma1), factor(sigma2)
    trace = torch.linalg.svdvals(F1.T @ F2).sum().item() if F1.numel() and F2.numel() else 0.0
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2)) - 2 * trace, 0.0)


def kernel_distance(real, generated, tile=1000):
    """-> KID (Binkowski et al. 2018) and its standard error, of feature tensors (N, D), (M, D).

    KID is the squared MMD with the kernel k(x, y) = (x . y / D + 1)^3, by the unbiased estimate
    from all pairs (Gretton et al. 2012, Eq. 3), without random subsets; it can be negative. It
    equals mean(h_x) + mean(h_y), where h_x(x) is the mean of k from x to the other rows of its own
    side, minus the mean of k from x to the rows of the other side.

    The standard error is the root of 4 var(h_x) / N + 4 var(h_y) / M, from the first-order terms of
    Hoeffding's decomposition. It errs on the upper side: the measured variances contain the
    second-order terms as well, twice what these add. Between equal distributions, where the
    first-order terms are 0, it is sqrt(2) times the spread; between distant ones, the spread.

    tile: how many rows are compared with all others at once
    """
    real, generated = real.double(), generated.double()

    def row_sums(x, y):  # of k(x_i, y_j) over j
        return torch.cat([(part @ y.T / x.shape[1] + 1).pow_(3).sum(1) for part in x.split(tile)])

    def first_order(x, y):
        itself = (x.square().mean(1) + 1) ** 3
        return (row_sums(x, x) - itself) / (len(x) - 1) - row_sums(x, y) / len(y)

    h_x, h_y = first_order(real, generated), first_order(generated, real)
    return (h_x.mean() + h_y.mean()).item(), 2 * math.sqrt(h_x.var() / len(h_x) + h_y.var() / len(h_y))


def manifold_radii(x, tile=1000):
    """The distance from each row of x (N, D) to its third-nearest other row. (N,)"""
    return torch.cat([torch.cdist(part, x).topk(NEIGHBOURS + 1, largest=False).values[:, -1]  # the nearest is itself
                      for part in x.split(tile)])


def share_inside(x, centres, radii, tile=1000):
    """The share of the rows of x (N, D) in at least one ball: centres (M, D), radii (M,)."""
    return torch.cat([(torch.cdist(part, centres) <= radii).any(1) for part in x.split(tile)]).double().mean().item()


def precision_recall(real, generated):
    """-> precision, recall (Kynkaanniemi et al. 2019, Eq. 2; k = 3) of tensors (N, D), (M, D)

    Each row has a ball around it that reaches to its third-nearest neighbour. Precision is the
    share of generated rows inside balls of real rows, recall the share of real rows inside balls of
    generated rows. Balls shrink as rows become more: compare only values from equally many rows.
    (The paper's features are VGG-16's; ADM's program takes Inception's pool.)
    """
    real, generated = real.double(), generated.double()
    return share_inside(generated, real, manifold_radii(real)), share_inside(real, generated, manifold_radii(generated))


def equally_many(real, generated, most=10_000):
    """Draws (always alike) as many rows from one side as from the other, at most `most`."""
    n = min(len(real), len(generated), most)
    return [x[np.random.default_rng(0).permutation(len(x))[:n]] for x in (real, generated)]


def inception_score(prob_sums, log_sums, counts):
    """exp(E KL(p(y | x) || p(y))) (Salimans et al. 2016) -> its mean and standard deviation over S
    splits of the images

    prob_sums (S, Y): sums of p over each split's images; log_sums (S,): sums of sum_y p ln p;
    counts (S,): numbers of images
    """
    marginal = prob_sums / counts[:, None]  # p(y)
    scores = (log_sums / counts + torch.special.entr(marginal).sum(1)).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def vendi_score(x):
    """How many different rows x (N, D) has: 1, all alike, ... min(N, D) (Friedman & Dieng 2023, Eq. 2).

    exp of the entropy of the eigenvalues of K / N, K the cosines between rows. Rows are not centred: a common
    offset takes the score towards 1. Few rows can't differ much: compare sets of equal size only. For another
    kernel with K(x, x) = 1, such as a Gaussian one, x is `factor(K)`.
    """
    x = torch.nn.functional.normalize(x.double(), dim=1)
    K = x @ x.T if len(x) < x.shape[1] else x.T @ x  # both have the same eigenvalues, but for zeros
    return torch.special.entr(torch.linalg.eigvalsh(K / len(x)).clamp(min=0)).sum().exp().item()
