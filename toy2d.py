"""
Why discrete latents help diffusion, in two dimensions: DisCo-Diff sec. 3.2 and App. F, Discrete Latent Codes sec. 3.

    python toy2d.py                          # everything, one seed: under ten minutes on two CPU cores
    python toy2d.py --quick=True             # under a minute: every picture, but networks that have hardly learned
    python toy2d.py --seeds=5 --modes="()"   # part 1 alone, with seeds 0 ... 4; pictures of the first

Part 1 has eight Gaussians: with one 8-way code that an encoder learns together with the denoiser, each code takes one
mode, and the trajectories from noise to data, bent before, are straight. Part 2 has grids of ever more Gaussians: told
the component, a network of fixed size fits them; told nothing, less and less; told learned codes, up to a hundred.
Leaves in out_dir: eight.png, curves.png, sampling.gif, grid.png, grid_samples.png, fields.png, table.txt, results.json.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from configurator import UserError, configure, require, start_processes
from model import Prior, draw_codes, gumbel_noise, gumbel_softmax, seeded_generator, zero
from plot import COLOURS, Axes, figure
from run import hold, progress
from sample import heun

out_dir = "out/toy2d"
seed = 0
seeds = 1  # that many seeds, from this one on
quick = False
# training, the same for all
width = 64  # of the networks: denoiser with four layers, encoder with three
steps = 8000
batch_size = 256
lr = 3e-3  # of the denoiser; the paper's 1e-3 needs more steps, the plain model above all
encoder_lr = 1e-2
embedding_lr = 1.0  # of F(z): Adam moves it by up to that much a step, so that it is soon at the mean of what z stands for
tau = 20.0  # the Gumbel-Softmax goes from this temperature to the paper's 1 in the first half of training, and stays there
num_steps = 50  # of Heun's method
# part 1
num_samples = 4096  # drawn from each model
sizes = (256, 512, 1024, 2048)  # of the parts of them whose distance to true samples is measured
# part 2
modes = (4, 25, 100, 400)
std = 0.1  # of a Gaussian; the distance between neighbours is 1
other_stds = (0.05, 0.2)  # for the third of the grids
codebook_factor = 2  # of the two latents: this times sqrt(K) values each, so that there are more codes than modes
num_points = 10_000  # in the data set, and drawn from each model
QUICK = ("--steps=250", "--sizes=(256,)", "--num_samples=1024", "--modes=(4,16,36)", "--other_stds=(0.2,)", "--num_points=2000")

# ----------------------------------------------------------------------------------------------------
# data and models. A denoiser is a function of x (B, 2) and the noise level t: D, the expected data; (D - x) / t^2 is
# the score, and dx/dt = (x - D) / t = -t score the ODE.


def ring():
    """Centres of the eight Gaussians (App. F.1): on a circle of radius 3. (8, 2)"""
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return 3 * torch.stack([angles.cos(), angles.sin()], 1)


def grid(K):
    """K centres on a square grid of spacing 1 around 0. (K, 2)"""
    side = torch.arange(math.isqrt(K), dtype=torch.float64)
    return torch.cartesian_prod(side, side) - side.mean()


def around(centres, std, g):
    """A point of N(c, std^2 I) for each of these centres (N, 2)."""
    return centres + std * torch.randn(centres.shape, generator=g, dtype=torch.float64)


def log_density(x, centres, std, log_weights):
    """ln of a mixture's components, weights included, at x. std: a number or (K,). -> (N, K)"""
    variance = torch.as_tensor(std, dtype=x.dtype) ** 2
    distance2 = (x ** 2).sum(1, keepdim=True) - 2 * x @ centres.T + (centres ** 2).sum(1)
    return log_weights - distance2 / (2 * variance) - (2 * math.pi * variance).log()


def exact_denoiser(centres, std):
    """Of the mixture with equal weights: its noisy version is a mixture, too, with variances std^2 + t^2."""
    def denoise(x, t):
        w = log_density(x, centres, (std ** 2 + t ** 2) ** 0.5, 0).softmax(1)
        return (std ** 2 * x + t ** 2 * w @ centres) / (std ** 2 + t ** 2)
    return denoise


def mlp(*widths):
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


class Denoiser(nn.Module):
    """D(x, t, z) = x + t^2 G, with the score G(x, t, z) = (F(z) - x) / (t^2 + std^2) + H(x, t)  (App. F.2).

    F(z): an embedding in the plane, the sum of those of m codes; H: four layers, divided by t^2 + std^2, so that they work
    in units of the data. Without codes it is EDM's D = c_skip x + c_out H (Table 1): the first term would be a strong pull
    to 0 that H had to undo, and the samples would be worse.
    """

    def __init__(self, num_latents, codebook_size, std, scale):
        super().__init__()
        self.std, self.scale = std, scale
        self.H = mlp(3, width, width, width, 2)
        zero(self.H[-1])
        self.F = nn.Parameter(torch.randn(num_latents, codebook_size, 2))

    def embed(self, z):
        """z: (B, m, k), rows sum to 1 -> F(z) (B, 2)"""
        return torch.einsum("bmk,mkd->bd", z, self.F)

    def forward(self, x, t, embedding):
        """x: (B, 2); t: (B, 1) or one for all; embedding: F(z), (B, 2) -> D (B, 2)"""
        t = t.expand(len(x), 1)
        H = self.H(torch.cat([x / (t ** 2 + self.scale ** 2).sqrt(), (t ** 2 + self.std ** 2).log() / 8], 1))
        if len(self.F):
            return x + t ** 2 * (embedding - x + H) / (t ** 2 + self.std ** 2)
        return (self.scale ** 2 * x + t * self.scale * (t ** 2 + self.scale ** 2).sqrt() * H) / (t ** 2 + self.scale ** 2)

    def given(self, codes):
        """The denoiser for these codes, (B, m), or (1, m) for all."""
        embedding = self.embed(F.one_hot(codes, self.F.shape[1]).to(self.F.dtype))
        return lambda x, t: self(x, t, embedding)


class Encoder(nn.Module):
    """Three layers: points (N, 2), whose standard deviation is scale -> logits of their codes (N, m, k)."""

    def __init__(self, num_latents, codebook_size, scale):
        super().__init__()
        self.shape, self.scale = (num_latents, codebook_size), scale
        self.layers = mlp(2, width, width, num_latents * codebook_size)

    def forward(self, x):
        return self.layers(x / self.scale).view(-1, *self.shape)

    def draw(self, x, g):
        """Codes (N, m) from its distribution."""
        logits = self(x)
        return draw_codes(logits, gumbel_noise(logits.shape, g))


def train(points, num_latents, codebook_size, std, seed, codes=None):
    """Alg. 1 in two dimensions -> Denoiser, and Encoder (or None): both in float64.

    points: (N, 2); codes: (N, m) where they are known, else an encoder learns them. Adam, learning rates fall to 0 as a
    cosine; EDM's loss weighting; ln t is normal, with 95 % of the levels between std / 2 and 5 times the data's scale.
    """
    torch.manual_seed(seed)
    g = seeded_generator("cpu", "train", seed)
    points = points.float()
    scale = points.std().item()
    model = Denoiser(num_latents, codebook_size, std, scale)
    groups = [{"params": model.H.parameters(), "lr": lr}, {"params": [model.F], "lr": embedding_lr}]
    encoder = None
    if codes is None:
        encoder = Encoder(num_latents, codebook_size, scale)
        groups.append({"params": encoder.parameters(), "lr": encoder_lr})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    low, high = math.log(std / 2), math.log(5 * scale)
    for step in progress(range(steps), desc=f"m = {num_latents}, k = {codebook_size}", leave=False):
        rows = torch.randint(len(points), (batch_size,), generator=g)
        y = points[rows]
        t = ((low + high) / 2 + (high - low) / 4 * torch.randn(batch_size, 1, generator=g)).exp()
        if encoder is None:
            z = F.one_hot(codes[rows], codebook_size).float()
        else:
            logits = encoder(y)
            z = gumbel_softmax(logits, tau ** max(0, 1 - 2 * step / steps), gumbel_noise(logits.shape, g))
        D = model(y + t * torch.randn(y.shape, generator=g), t, model.embed(z))
        loss = ((t ** 2 + scale ** 2) / (t * scale) ** 2 * (D - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    require(loss.isfinite(), f"training has diverged, with a loss of {loss:g}: lower lr, encoder_lr or embedding_lr")
    return model.double().requires_grad_(False), encoder and encoder.double().requires_grad_(False)


def trace(denoise, latents):
    """Heun's method of sample.py on N(0, 1) latents (B, 2) -> noise levels t (num_steps + 1,), path (num_steps + 1, B, 2)."""
    seen = []

    def spy(x, t):
        seen.append((t, x))
        return denoise(x, t)

    x = heun(spy, latents, num_steps)
    t, path = zip(*seen[::2], (torch.zeros(()), x))  # of the two evaluations of a step, the first is at its start
    return torch.stack(t), torch.stack(path)


# ----------------------------------------------------------------------------------------------------
# measures


def curvature(denoise, x, t, dt=1e-3):
    """Of the ODE's trajectories through x (B, 2) at noise level t (App. F.3): |T(t) - T(t - dt)| / |x(t) - x(t - dt)| for
    the unit tangent T, with one Euler step from t to t - dt. -> (B,), in 1 / units of the data"""
    drift = (x - denoise(x, t)) / t
    before = x - drift * dt
    drift_before = (before - denoise(before, t - dt)) / (t - dt)
    return (F.normalize(drift) - F.normalize(drift_before)).norm(dim=1) / (drift * dt).norm(dim=1)


def jacobian_norms(denoise, x, t):
    """Squared Frobenius norms of the derivatives by x of the score (App. F.3) and of the denoiser D itself, at x (B, 2) and
    noise level t. -> (B,), (B,)"""
    x = x.clone().requires_grad_()
    D = denoise(x, t)
    J = torch.stack([torch.autograd.grad(D[:, i].sum(), x, retain_graph=True)[0] for i in (0, 1)], 1)  # (B, 2, 2)
    return ((J - torch.eye(2)) / t ** 2).square().sum((1, 2)), J.square().sum((1, 2))


def purity(codes, components):
    """The share of points whose component is the most frequent one of their code. Both int64 (N,)."""
    counts = torch.zeros(codes.max() + 1, components.max() + 1).index_put_((codes, components), torch.ones(()), accumulate=True)
    return (counts.amax(1).sum() / len(codes)).item()


def assignment(cost):
    """Cheapest matching of rows with columns of cost (n, n), by shortest augmenting paths -> the row of each column.
    Raises ValueError where a cost is not finite."""
    if not np.isfinite(cost).all():
        raise ValueError("costs must be finite")
    n = len(cost)
    u, v = np.zeros(n), np.zeros(n)  # cost - u - v >= 0, and = 0 where matched
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for first in range(n):
        # Dijkstra, over the columns, until one is free
        distance, before, settled = np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        row, so_far = first, 0.0
        while row >= 0:
            through = so_far + cost[row] - u[row] - v
            shorter = ~settled & (through < distance)
            distance[shorter], before[shorter] = through[shorter], row
            column = np.where(settled, np.inf, distance).argmin()
            so_far, settled[column], row = distance[column], True, row_of[column]
        settled[column] = False
        u[first] += so_far
        u[row_of[settled]] += so_far - distance[settled]
        v[settled] -= so_far - distance[settled]
        while row != first:  # back along the path, each row takes the next column
            row = before[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
    return row_of


def wasserstein2(a, b):
    """W-2 between two samples (n, 2) of equal size, by exact optimal transport."""
    cost = torch.cdist(a, b).square().numpy()
    return cost[assignment(cost), np.arange(len(cost))].mean() ** 0.5


def stray(x, centres, std):
    """The share of samples x (N, 2) that are further than 3 std from all centres; of true samples, e^-4.5 = 0.011."""
    return (torch.cdist(x, centres).amin(1) > 3 * std).double().mean().item()


def silverman(samples):
    """Silverman's bandwidth for a Gaussian kernel, one for each coordinate of samples (N, d). -> (d,)"""
    n, d = samples.shape
    return samples.std(0) * (4 / ((d + 2) * n)) ** (1 / (d + 4))


def kl_divergence(points, log_p, samples, h):
    """KL of the data from a model: mean of ln p - ln q over points (N, 2) of the data, whose log_p (N,) is known; ln q by
    a kernel density estimate of bandwidth h (2,) on samples (M, 2) of the model."""
    log_q = torch.cat([log_density(part / h, samples / h, 1, -math.log(len(samples))).logsumexp(1) - h.log().sum()
                       for part in points.split(500)])
    return (log_p - log_q).mean().item()


def fit_gmm(x, K, g, iterations=50):
    """A mixture of K round Gaussians, fitted to points x (N, 2) by expectation-maximisation -> centres (K, 2), std (K,),
    log-weights (K,): what `log_density` takes.

    It starts from k-means++: each next centre is a point, drawn by its squared distance to the nearest so far; of a few
    draws the one that leaves the least distances.
    """
    centres, nearest = x[:1], (x - x[0]).square().sum(1)
    while len(centres) < K:
        drawn = x[torch.multinomial(nearest, 2 + int(math.log(K)), replacement=True, generator=g)]
        distances = torch.minimum(nearest, (drawn[:, None] - x).square().sum(2))  # (draws, N)
        best = distances.sum(1).argmin()
        centres, nearest = torch.cat([centres, drawn[best, None]]), distances[best]
    std, log_weights = (nearest.mean() / 2).sqrt().expand(K), torch.full((K,), -math.log(K), dtype=x.dtype)
    for _ in range(iterations):
        r = log_density(x, centres, std, log_weights).softmax(1)  # E: p(component | x), (N, K)
        n = r.sum(0).clamp_min(1e-9)  # M
        log_weights, centres = (n / len(x)).log(), r.T @ x / n[:, None]
        variance = r.T @ x.square().sum(1) / n - centres.square().sum(1)  # of both coordinates
        std = (variance / 2).clamp_min(1e-6).sqrt()
    return centres, std, log_weights


# ----------------------------------------------------------------------------------------------------
# part 1: eight Gaussians, one latent (DisCo-Diff sec. 3.2, App. F)


def even(x, centres, n):
    """Of samples x (N, 2), n at a time with equally many nearest to each centre -> list of (n, 2)"""
    ends = torch.cdist(x, centres).argmin(1)
    parts = zip(*(x[ends == i].split(n // len(centres)) for i in range(len(centres))))
    return [torch.cat(part) for part in parts if sum(map(len, part)) == n]


def eight_gaussians(seed):
    """-> results, as they are in results.json; the arguments of `draw_eight`"""
    g = seeded_generator("cpu", "eight", seed)
    centres, component = ring(), torch.arange(8).repeat_interleave(1000)
    points = around(centres[component], 0.2, g)
    plain, _ = train(points, 0, 1, 0.2, seed, codes=torch.empty(8000, 0, dtype=torch.int64))
    disco, encoder = train(points, 1, 8, 0.2, seed)
    codes = encoder.draw(points, g)
    given = codes[torch.randint(8000, (num_samples,), generator=g)]

    # trajectories from the same noise
    latents = torch.randn(num_samples, 2, generator=g, dtype=torch.float64)
    paths, curves = {}, {}
    denoisers = {"exact score": exact_denoiser(centres, 0.2), "plain": plain.given(torch.empty(1, 0, dtype=torch.int64)),
                 "DisCo-Diff": disco.given(given)}
    for name, denoise in denoisers.items():
        t, paths[name] = trace(denoise, latents)
        found = [(curvature(denoise, x, level), *jacobian_norms(denoise, x, level)) for level, x in zip(t[:-1], paths[name])]
        curves[name] = [torch.stack(values) for values in zip(*found)]  # three of (num_steps, num_samples)
    bends = curves["exact score"][0].median(1).values > 0.1  # half of the bends there have a radius of less than 10

    truth, floor = (around(centres[torch.randint(8, (num_samples,), generator=g)], 0.2, g) for _ in range(2))
    samples, models = {"true samples: the floor": floor} | {name: path[-1] for name, path in paths.items()}, {}
    for name, x in progress(samples.items(), desc="W-2", leave=False):
        models[name] = {
            "W-2": {n: [wasserstein2(a, b) for a, b in zip(x.split(n), truth.split(n)) if len(a) == n] for n in sizes},
            "W-2, even": {n: [*map(wasserstein2, even(x, centres, n), even(truth, centres, n))] for n in sizes},
            "stray": stray(x, centres, 0.2)}
    for name, (kappa, of_score, of_denoiser) in curves.items():
        models[name] |= {"mean curvature": kappa[bends].mean().item(), "median curvature": kappa[bends].median().item(),
                         "|grad score|^2": of_score[bends].mean().item(), "|grad D|^2": of_denoiser[bends].mean().item()}
    results = {"seed": seed, "purity": purity(codes[:, 0], component), "codes used": len(codes.unique()),
               "bends": [t[:-1][bends].min().item(), t[:-1][bends].max().item()], "models": models}
    return results, (points[torch.randperm(8000, generator=g)], given[:, 0], centres, t, paths, curves)


def eight_table(results):
    """-> lines"""
    floor, _, plain, disco = results["models"].values()
    columns = {"mean curvature": 17, "median curvature": 18, "|grad score|^2": 16, "|grad D|^2": 13, "stray": 10}
    lines = [f"Eight Gaussians, seed {results['seed']}: {results['codes used']} codes, purity {results['purity']:.4f}. Trajectories bend, "
             "and are measured, for {:.2f} <= t <= {:.2f}".format(*results["bends"]),
             " " * 24 + "".join(f"{key:>{w}}" for key, w in columns.items())]
    for name, row in results["models"].items():
        lines.append(f"{name:24}" + "".join(f"{row[key]:{w}.4f}" if key in row else " " * w for key, w in columns.items()))
    lines.append(f"{'plain / DisCo-Diff':24}" + "".join(f"{plain[key] / disco[key]:{w}.1f}" for key, w in columns.items() if key != "stray"))
    for key in ("W-2", "W-2, even"):
        lines.append(f"{key + ', n =':24}" + "".join(f"{n:>9}{'':9}" for n in sizes))
        for name, row in results["models"].items():
            lines.append(f"{name:24}" + "".join(mean_and_error(values) for values in row[key].values()))
    for name, row in (("plain / floor", plain), ("DisCo-Diff / floor", disco)):
        lines.append(f"{name:24}" + "".join(f"{np.mean(a) / np.mean(b):9.2f}{'':9}" if a and b else " " * 18
                                            for a, b in zip(row["W-2, even"].values(), floor["W-2, even"].values())))
    return lines


def seeds_table(results):
    """One line for each seed -> lines"""
    n = sizes[len(sizes) // 2]
    lines = [f"{'':18}plain / DisCo-Diff: curvature{'':20}W-2, even, n = {n}",
             f"seed  purity{'mean':>15}{'median':>9}{'|grad D|^2':>12}{'floor':>12}{'exact':>8}{'plain':>8}{'DisCo-Diff':>12}"]
    for r in results:
        plain, disco = r["models"]["plain"], r["models"]["DisCo-Diff"]
        w2 = [np.mean(model["W-2, even"][n] or math.nan) for model in r["models"].values()]
        lines.append(f"{r['seed']:4}{r['purity']:8.4f}{plain['mean curvature'] / disco['mean curvature']:15.0f}"
                     f"{plain['median curvature'] / disco['median curvature']:9.0f}{plain['|grad D|^2'] / disco['|grad D|^2']:12.0f}"
                     "{:12.3f}{:8.3f}{:8.3f}{:12.3f}".format(*w2))
    return lines


def mean_and_error(values):
    """'mean +- standard error', as far as there are values, in 18 letters."""
    error = f" +- {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):9.3f}{error:9}" if values else f"{'-':>9}{'':9}"


def square(title, extent, centre=(0, 0)):
    """Axes for the plane within `extent` of this centre."""
    return Axes(*((c - extent, c + extent) for c in centre), title, size=(300, 300))


def draw_eight(points, codes, centres, t, paths, curves):
    """-> pictures by name; "sampling" is a list of frames"""
    dark, pale = (40, 40, 40), (120, 170, 215)
    rows = []
    for centre, extent, lines in ((torch.zeros(2), 4.5, 12), (centres[0], 0.8, 24)):
        row = []
        for name, x in ({"data": points} | {name: path[-1] for name, path in paths.items()}).items():
            axes = square(name, extent, centre.tolist())
            axes.scatter(x[:2000], COLOURS[codes[:2000]] if name == "DisCo-Diff" else pale, 2.5 / extent ** 0.5)
            for i in ((x - centre).norm(dim=1) < extent).nonzero()[:lines, 0] if name in paths else ():
                axes.line(paths[name][:, i], dark, 0.7, dots=True)
            row.append(axes)
        rows.append(row)

    panels = [Axes((0.01, 80), ylim, title, "t", "mean; thin: median", log_x=True, log_y=True, size=(420, 340))
              for title, ylim in (("curvature", (1e-5, 1e5)), ("|grad score|^2", (1e-7, 1e7)), ("|grad D|^2", (1e-7, 1e7)))]
    for name, colour in zip(curves, (COLOURS[7], COLOURS[0], COLOURS[4])):
        for axes, values in zip(panels, curves[name]):
            axes.line(torch.stack([t[:-1], values.mean(1)], 1), colour, 2.5, label=name)
            axes.line(torch.stack([t[:-1], values.median(1).values], 1), colour, 0.8)

    frames, shown = [], {name: paths[name][:, :1000] for name in ("plain", "DisCo-Diff")}
    colours = {name: COLOURS[torch.cdist(path[-1], centres).argmin(1)] for name, path in shown.items()}  # by where they end
    for i in range(len(t)):
        row = [square(f"{name}, t = {t[i]:.3g}", 4.5 + 2.5 * t[i].item()) for name in shown]
        for axes, name in zip(row, shown):
            axes.scatter(shown[name][i], colours[name])
        frames.append(figure([row]).quantize(64, dither=0))
    return {"eight": figure(rows), "curves": figure([panels]), "sampling": frames}


# ----------------------------------------------------------------------------------------------------
# part 2: ever more modes (Discrete Latent Codes sec. 3, Figs. 2 and 11)

KINDS = {"true samples": (0, 0, 0), "unconditional": COLOURS[0], "true component": COLOURS[2], "GMM component": COLOURS[5],
         "learned codes": COLOURS[4]}


def train_prior(codes, k, seed):
    """Alg. 2: a small autoregressive prior on codes (N, m)."""
    torch.manual_seed(seed)
    g = seeded_generator("cpu", "prior", seed)
    prior = Prior(codes.shape[1], k, layers=1, dim=64, heads=2)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 500)
    for _ in progress(range(500), desc="prior", leave=False):
        loss = prior.nats(codes[torch.randint(len(codes), (batch_size,), generator=g)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return prior


def mixture_grid(K, std, kinds, seed):
    """-> results, a dict for each of these kinds of models; samples; denoisers for the code of the first point"""
    g = seeded_generator("cpu", "grid", seed, K)
    centres = grid(K)

    def true_samples(n):
        component = torch.randint(K, (n,), generator=g)
        return around(centres[component], std, g), component

    (points, component), (test, _) = true_samples(num_points), true_samples(2000)
    smoothed = around(test, std, g)
    log_p, smoothed_log_p = (log_density(x, centres, s, -math.log(K)).logsumexp(1) for x, s in ((test, std), (smoothed, 2 ** 0.5 * std)))
    latents = torch.randn(num_points, 2, generator=g, dtype=torch.float64)
    results, samples, denoisers = [], {}, {}
    for kind in kinds:
        row = {"seed": seed, "K": K, "std": std, "kind": kind}
        if kind == "true samples":
            samples[kind] = true_samples(num_points)[0]
        elif kind == "learned codes":
            k = codebook_factor * math.isqrt(K)
            model, encoder = train(points, 2, k, std, seed)
            codes = encoder.draw(points, g)
            given = train_prior(codes, k, seed).sample(gumbel_noise((num_points, 2, k), g))
        else:
            if kind == "unconditional":
                codes = torch.empty(num_points, 0, dtype=torch.int64)
            elif kind == "true component":
                codes = component[:, None]
            else:
                codes = log_density(points, *fit_gmm(points, K, g)).argmax(1, keepdim=True)
            model, _ = train(points, codes.shape[1], K, std, seed, codes)
            given = codes[torch.randint(num_points, (num_points,), generator=g)]
        if kind != "true samples":
            samples[kind], denoisers[kind] = trace(model.given(given), latents)[1][-1], model.given(codes[:1])
            if codes.shape[1]:
                _, number = codes.unique(dim=0, return_inverse=True)
                row |= {"purity": purity(number, component), "codes used": number.max().item() + 1}
        row |= {"KL": kl_divergence(test, log_p, samples[kind], silverman(samples[kind])),
                "smoothed KL": kl_divergence(smoothed, smoothed_log_p, samples[kind], torch.tensor([std, std])),
                "stray": stray(samples[kind], centres, std)}
        results.append(row)
    return results, samples, denoisers


def draw_grids(results, samples, denoisers):
    """results: of all seeds; samples: {K: {kind: points}}; denoisers: {kind: one}, for modes[1] -> three pictures by name"""
    panels = []
    for key, title in (("KL", "KL, Silverman's bandwidth"), ("smoothed KL", "KL, both smoothed by std"), ("stray", "stray samples")):
        highest = max(row[key] for row in results if row["std"] == std)
        axes = Axes((modes[0] * 0.8, modes[-1] * 1.25), (0, 1.5 * highest), title, "modes K", log_x=True, size=(420, 340))
        for kind, colour in KINDS.items():
            means = [np.mean([r[key] for r in results if (r["kind"], r["K"], r["std"]) == (kind, K, std)]) for K in modes]
            axes.line(np.stack([modes, means], 1), colour, 2.5, dots=True, label=kind)
        panels.append(axes)

    rows = []
    for K in samples:
        extent = math.isqrt(K) / 2 + 0.5
        rows.append([square(f"{kind}, K = {K}", extent) for kind in KINDS])
        for axes, x in zip(rows[-1], samples[K].values()):
            axes.scatter(x[:5000], COLOURS[4], 0.6)

    K, t = modes[1], torch.tensor(0.3, dtype=torch.float64)
    extent = math.isqrt(K) / 2 + 0.5
    x = torch.cartesian_prod(*[torch.linspace(-extent, extent, 17, dtype=torch.float64)[1:-1]] * 2)
    row = []
    for kind, denoise in denoisers.items():
        axes = square(f"{kind}: D - x at t = {t:g}", extent)
        axes.scatter(grid(K), COLOURS[0], 3)
        towards = denoise(x, t) - x
        axes.arrows(x, 0.4 * towards / (1 + towards.norm(dim=1, keepdim=True)), COLOURS[4])
        row.append(axes)
    return {"grid": figure([panels]), "grid_samples": figure(rows), "fields": figure([row])}


def grid_table(results):
    """-> lines"""
    keys = {"KL": 8, "smoothed KL": 13, "stray": 8, "purity": 8, "codes used": 12}
    lines = [f"Grids, {steps} steps, means over {seeds} seed(s). KL of the data from the model, nats: by KDE with Silverman's bandwidth; and",
             "of the data with noise of std from a KDE of bandwidth std. stray: share of samples beyond 3 std of all centres",
             f"{'K':>4}{'std':>6}  {'':16}" + "".join(f"{key:>{w}}" for key, w in keys.items())]
    cells = {}
    for row in results:
        cells.setdefault((row["K"], row["std"], row["kind"]), []).append(row)
    for (K, spread, kind), rows in cells.items():
        means = {key: np.mean([row[key] for row in rows]) for key in keys if key in rows[0]}
        lines.append(f"{K:4}{spread:6g}  {kind:16}" + "".join(
            f"{mean:{keys[key]}.{0 if key == 'codes used' else 3}f}" for key, mean in means.items()))
    return lines


# ----------------------------------------------------------------------------------------------------
# the run


def main():
    for name in ("seeds", "width", "batch_size", "lr", "encoder_lr", "embedding_lr", "steps", "num_samples", "codebook_factor"):
        require(0 < config[name] < math.inf, f"{name} must be positive, not {config[name]}")
    require(0 <= seed < 2 ** 62 and 1 <= tau < math.inf,
            f"seed can't be negative or above 2^62, nor tau below 1: they are {seed} and {tau}")
    require(num_steps >= 10, f"num_steps must be 10 or more, for trajectories to be seen, not {num_steps}")
    require(len(modes) != 1 and [*modes] == sorted({K for K in modes if K > 1 and math.isqrt(K) ** 2 == K}),
            f"modes are square numbers from 4 on, increasing, two of them or more; or none, to leave part 2 out; not {modes}")
    require(sizes and all(0 < n <= num_samples and n % 8 == 0 for n in sizes),
            f"sizes are multiples of 8 up to num_samples {num_samples}, not {sizes}")
    require(all(0.01 <= s <= 1 for s in (std, *other_stds)) and len({std, *other_stds}) == 1 + len(other_stds),
            f"std and other_stds must differ, and lie between 0.01 and 1: they are {std} and {other_stds}")
    require(num_points > max(modes, default=1), f"num_points {num_points} must be more than there are modes")
    _, world, _ = start_processes("cpu")
    require(world == 1, "toy2d.py runs as one process, without torchrun")
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir={out_dir} can't be used: {error.strerror}") from None
    hold(f"{out_dir}/results")
    began, lines = time.time(), []
    results = {"settings": config, "eight Gaussians": [], "grids": []}

    def save(**pictures):
        """These pictures, and what has been found so far."""
        for name, picture in pictures.items():
            first, *rest = picture if isinstance(picture, list) else [picture]
            with data.atomic(Path(out_dir, name + (".gif" if rest else ".png"))) as file:
                if rest:
                    first.save(file, "gif", save_all=True, append_images=rest, duration=[80] * len(rest) + [2000], loop=0)
                else:
                    first.save(file, "png", optimize=True)
        for name, text in (("table.txt", "\n".join(lines)), ("results.json", json.dumps(results, indent=1))):
            with data.atomic(Path(out_dir, name)) as file:
                file.write(text.encode())

    def report(table):
        lines.extend([*table, ""])
        tqdm.write("\n".join([*table, ""]))

    for s in range(seed, seed + seeds):
        found, drawn = eight_gaussians(s)
        results["eight Gaussians"].append(found)
        report(eight_table(found))
        save(**draw_eight(*drawn) if s == seed else {})
    if seeds > 1:
        report(seeds_table(results["eight Gaussians"]))
        save()
    samples, denoisers = {}, {}
    for s in range(seed, seed + seeds):
        for K in modes:
            found, made, denoise = mixture_grid(K, std, KINDS, s)
            results["grids"] += found
            if s == seed:
                samples[K], denoisers[K] = made, denoise
            save()
        for other in other_stds if modes else ():
            results["grids"] += mixture_grid(modes[len(modes) // 2], other, list(KINDS)[:2], s)[0]
    if modes:
        report(grid_table(results["grids"]))
        save(**draw_grids(results["grids"], {K: samples[K] for K in (modes[len(modes) // 2], modes[-1])}, denoisers[modes[1]]))
    print(f"{time.time() - began:.0f} s; the pictures, table.txt and results.json are in {out_dir}")


if __name__ == "__main__":
    config = configure(globals())
    if quick:  # what is given on the command line comes after, and has its say
        config = configure(globals(), [*QUICK, *sys.argv[1:]])
    main()
