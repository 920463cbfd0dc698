"""
Why discrete latents help diffusion, in two dimensions: DisCo-Diff sec. 3.2 and App. F, Discrete Latent Codes sec. 3.

    python toy2d.py                          # everything, one seed: under ten minutes on two CPU cores
    python toy2d.py --quick=True             # under a minute: every picture, but networks that have hardly learned
    python toy2d.py --seeds=5 --modes="()"   # part 1 alone, with seeds 0 ... 4; pictures of the first

Part 1 has eight Gaussians: with one 8-way code that an encoder learns together with the denoiser, each code takes one
mode, and the trajectories from noise to data, bent before, are straight. Part 2 has grids of ever more Gaussians: a
network of fixed size fits them when it is told a code, and less and less when it is not.
Leaves in out_dir: eight.png, curves.png, sampling.gif, grid.png, grid_samples.png, fields.png, table.txt, results.json.
"""

import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from configurator import configure, require
from model import Prior, draw_codes, gumbel_noise, gumbel_softmax, seeded_generator, zero
from plot import COLOURS, Axes, figure
from sample import heun

out_dir = "out/toy2d"
seed = 0
seeds = 1  # that many seeds, from this one on
quick = False
# training
width = 64  # of the networks: denoiser with four layers, encoder with three
batch_size = 512
lr = 1e-3  # of the denoiser
encoder_lr = 1e-2
embedding_lr = 1.0  # of F(z), in units of the data: it keeps up with what its code stands for, while codes still move
tau = 20.0  # the Gumbel-Softmax goes from this temperature to the paper's 1 in the first half of training, and stays there
num_steps = 50  # of Heun's method
# part 1
steps = 5000
num_samples = 4000  # drawn from each model
sizes = (250, 500, 1000, 2000)  # of the parts of them whose distance to true samples is measured
# part 2
modes = (4, 16, 64, 144, 400)
std = 0.1  # of a Gaussian; the distance between neighbours is 1
other_stds = (0.05, 0.2)  # for the third of the grids
spare = 2  # two latents of spare sqrt(K) values each
grid_steps = 5000
grid_lr = 3e-3
num_points = 10_000  # in the data set, and drawn from each model

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

    F(z): an embedding in the plane, of m codes their sum. H: four layers; std: of the Gaussian that a code stands for.
    Without codes that is all of the data (F = 0, std = scale), which makes it EDM's preconditioning (Table 1): the first
    term with a smaller std would pull to 0 so hard that H would have to undo it first.
    """

    def __init__(self, num_latents, codebook_size, std, scale):
        super().__init__()
        self.std, self.scale = std, scale
        self.F = nn.Parameter(torch.randn(num_latents, codebook_size, 2))
        self.H = mlp(3, width, width, width, 2)
        zero(self.H[-1])

    def embed(self, z):
        """z: (B, m, k), rows sum to 1 -> F(z) (B, 2)"""
        return torch.einsum("bmk,mkd->bd", z, self.F)

    def forward(self, x, t, embedding):
        """x: (B, 2); t: (B, 1) or one for all; embedding: F(z), (B, 2) -> D (B, 2)"""
        t = t.expand(len(x), 1)
        H = self.H(torch.cat([x / (t ** 2 + self.scale ** 2).sqrt(), (t ** 2 + self.std ** 2).log() / 8], 1))
        if len(self.F):  # H is in units of the data
            return x + t ** 2 * (embedding - x + H) / (t ** 2 + self.std ** 2)
        return x - t ** 2 * x / (t ** 2 + self.scale ** 2) + t * self.scale / (t ** 2 + self.scale ** 2).sqrt() * H

    def given(self, codes):
        """The denoiser for these codes, (B, m), or (1, m) for all."""
        embedding = self.embed(F.one_hot(codes, self.F.shape[1]).to(self.F.dtype))
        return lambda x, t: self(x, t, embedding)


def train(points, num_latents, codebook_size, std, steps, lr, seed, codes=None):
    """Alg. 1 in two dimensions -> denoiser, and encode(points, g), which draws codes (N, m) from the encoder's distribution.

    points: (N, 2); codes: (N, m) where they are known, else the encoder learns them. Adam, learning rates fall to 0 as a
    cosine; EDM's loss weighting; ln t is normal, with 95 % of the levels between std / 2 and 5 times the data's scale.
    """
    torch.manual_seed(seed)
    g = seeded_generator("cpu", "train", seed)
    points = points.float()
    scale = points.std().item()
    model, encoder = Denoiser(num_latents, codebook_size, std, scale), mlp(2, width, width, max(1, num_latents * codebook_size))
    optimizer = torch.optim.Adam([{"params": model.H.parameters(), "lr": lr}, {"params": [model.F], "lr": embedding_lr},
                                  {"params": encoder.parameters(), "lr": encoder_lr}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    low, high = math.log(std / 2), math.log(5 * scale)
    for step in tqdm(range(steps), desc=f"m = {num_latents}, k = {codebook_size}", leave=False):
        rows = torch.randint(len(points), (batch_size,), generator=g)
        y = points[rows]
        t = ((low + high) / 2 + (high - low) / 4 * torch.randn(batch_size, 1, generator=g)).exp()
        if codes is None:
            logits = encoder(y / scale).view(-1, num_latents, codebook_size)
            z = gumbel_softmax(logits, tau ** max(0, 1 - 2 * step / steps), gumbel_noise(logits.shape, g))
        else:
            z = F.one_hot(codes[rows], codebook_size).float()
        D = model(y + t * torch.randn(y.shape, generator=g), t, model.embed(z))
        loss = ((t ** 2 + scale ** 2) / (t * scale) ** 2 * (D - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.double().requires_grad_(False)

    def encode(x, g):
        logits = encoder(x / scale).view(-1, num_latents, codebook_size)
        return draw_codes(logits, gumbel_noise(logits.shape, g))

    return model.double().requires_grad_(False), encode


def trace(denoise, latents):
    """Heun's method of sample.py on N(0, 1) latents (B, 2) -> noise levels t (num_steps + 1,), path (num_steps + 1, B, 2)."""
    seen = []

    def spy(x, t):
        seen.append((t, x))
        return denoise(x, t)

    x = heun(spy, latents, num_steps)
    t, path = zip(*seen[::2], (torch.zeros(()), x))  # of the two evaluations of a step, the first is at its start
    return torch.stack([*map(torch.as_tensor, t)]), torch.stack(path)


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
    """Cheapest matching of rows with columns of cost (n, n), by shortest augmenting paths -> the row of each column."""
    n = len(cost)
    u, v, row_of = np.zeros(n), np.zeros(n), np.full(n, -1)  # cost - u - v >= 0, and = 0 where matched
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
            row_of[column], column = row, np.flatnonzero(row_of == row)[0] if row != first else -1
    return row_of


def wasserstein2(a, b):
    """W-2 between two samples (n, 2) of equal size, by exact optimal transport."""
    cost = torch.cdist(a, b).square().numpy()
    return cost[assignment(cost), np.arange(len(cost))].mean() ** 0.5


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

    It starts from k-means++: each next centre is a point, drawn by its squared distance to the nearest so far.
    """
    centres, nearest = x[:1], torch.full((len(x),), math.inf, dtype=x.dtype)
    while len(centres) < K:
        nearest = torch.minimum(nearest, (x - centres[-1]).square().sum(1))
        centres = torch.cat([centres, x[torch.multinomial(nearest, 1, generator=g)]])
    std, log_weights = nearest.mean().sqrt().expand(K), torch.full((K,), -math.log(K), dtype=x.dtype)
    for _ in range(iterations):
        r = log_density(x, centres, std, log_weights).softmax(1)  # E: p(component | x), (N, K)
        n = r.sum(0).clamp_min(1e-9)  # M
        log_weights, centres = (n / len(x)).log(), r.T @ x / n[:, None]
        variance = r.T @ x.square().sum(1) / n - centres.square().sum(1)  # of both coordinates
        std = (variance / 2).clamp_min(1e-6).sqrt()
    return centres, std, log_weights


# ----------------------------------------------------------------------------------------------------
# part 1: eight Gaussians, one latent (DisCo-Diff sec. 3.2, App. F)


def eight_gaussians(seed):
    """-> results of the models; what `draw_eight` draws"""
    g = seeded_generator("cpu", "eight", seed)
    centres, component = ring(), torch.arange(8000) % 8  # 1000 points of each; any 8 in a row are one of each
    points = around(centres[component], 0.2, g)
    plain, _ = train(points, 0, 1, 0.2, steps, lr, seed, codes=torch.empty(8000, 0, dtype=torch.int64))
    disco, encode = train(points, 1, 8, 0.2, steps, lr, seed)
    codes = encode(points, g)

    # samples, from the same noise, and what their trajectories are like
    latents = torch.randn(num_samples, 2, generator=g, dtype=torch.float64)
    at_random, in_turn = torch.randint(8000, (num_samples,), generator=g), torch.arange(num_samples) % 8000
    denoisers = {"exact score": exact_denoiser(centres, 0.2), "plain": plain.given(torch.empty(1, 0, dtype=torch.int64)),
                 "DisCo-Diff": disco.given(codes[at_random])}
    paths, curves = {}, {}
    for name, denoise in denoisers.items():
        t, paths[name] = trace(denoise, latents)
        found = [(curvature(denoise, x, s), *jacobian_norms(denoise, x, s)) for s, x in zip(t[:-1], paths[name])]
        curves[name] = [torch.stack(values) for values in zip(*found)]  # three of (num_steps, num_samples)
    bends = curves["exact score"][0].mean(1) > 0.1  # where the radius of a bend is less than 10

    # W-2 to true samples whose components are drawn at random, and to true samples with equally many of each; the codes
    # are those of training points drawn at random, and of the training points in turn. The floor has their components.
    floor, floor_in_turn = (around(centres[component[which]], 0.2, g) for which in (at_random, in_turn))
    truth, even_truth = (around(centres[c], 0.2, g) for c in (torch.randint(8, (num_samples,), generator=g), in_turn % 8))
    samples = {"true samples: the floor": (floor, floor_in_turn), **{name: (path[-1], path[-1]) for name, path in paths.items()}}
    samples["DisCo-Diff"] = paths["DisCo-Diff"][-1], trace(disco.given(codes[in_turn]), latents)[1][-1]
    results = {}
    for name, (made, made_in_turn) in tqdm(samples.items(), desc="W-2", leave=False):
        jobs = [(made, truth, n) for n in sizes] + [(made_in_turn, even_truth, max(sizes) // 2)]
        results[name] = {"W-2": [[wasserstein2(a, b) for a, b in zip(x.split(n), y.split(n)) if len(a) == n] for x, y, n in jobs]}
    for name, (kappa, of_score, of_denoiser) in curves.items():
        results[name] |= {"mean curvature": kappa[bends].mean().item(), "median curvature": kappa[bends].median().item(),
                          "|grad score|^2": of_score[bends].mean().item(), "|grad D|^2": of_denoiser[bends].mean().item()}
    results = {"purity": purity(codes[:, 0], component), "codes used": len(codes.unique()),
               "bends": [t[:-1][bends].min().item(), t[:-1][bends].max().item()], "models": results}
    return results, (points, codes[at_random, 0], centres, t, paths, curves)


def eight_table(results, seed):
    """Its lines."""
    low, high = results["bends"]
    yield (f"Eight Gaussians, seed {seed}: {results['codes used']} codes, purity {results['purity']:.4f}. Trajectories bend for "
           f"{low:.2f} <= t <= {high:.2f}")
    columns = {"mean curvature": 17, "median curvature": 18, "|grad score|^2": 16, "|grad D|^2": 13}
    yield f"{'':24}" + "".join(f"{key:>{w}}" for key, w in columns.items())
    floor, exact, plain, disco = results["models"].values()
    for name, row in list(results["models"].items())[1:]:
        yield f"{name:24}" + "".join(f"{row[key]:{w}.4f}" for key, w in columns.items())
    yield f"{'plain / DisCo-Diff':24}" + "".join(f"{plain[key] / disco[key]:{w}.1f}" for key, w in columns.items())
    yield f"{'W-2 to n true samples':24}" + "".join(f"{n:>18}" for n in (*sizes, f"{max(sizes) // 2}, even"))
    for name, row in results["models"].items():
        yield f"{name:24}" + "".join(f"{np.mean(v):9.3f} +- {np.std(v) / len(v) ** 0.5:.3f}" for v in row["W-2"])
    for name, row in (("plain / floor", plain), ("DisCo-Diff / floor", disco)):
        yield f"{name:24}" + "".join(f"{np.mean(a) / np.mean(b):18.2f}" for a, b in zip(row["W-2"], floor["W-2"]))


def draw_eight(points, codes, centres, t, paths, curves):
    """-> eight.png, curves.png, frames of sampling.gif"""
    dark, pale = (40, 40, 40), (120, 170, 215)
    rows = []
    for centre, extent, lines in ((torch.zeros(2), 4.5, 12), (centres[0], 0.8, 24)):
        row = []
        for name, x in {"data": points, **{name: path[-1] for name, path in paths.items()}}.items():
            axes = Axes(*((c - extent, c + extent) for c in centre.tolist()), name, size=(300, 300))
            axes.scatter(x[:2000], COLOURS[codes[:2000] % 8] if name == "DisCo-Diff" else pale, 4 / extent ** 0.7)
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

    frames = []
    for i in range(len(t)):
        extent = 4.5 + 2.5 * t[i].item()
        row = []
        for name in ("plain", "DisCo-Diff"):
            axes = Axes((-extent, extent), (-extent, extent), f"{name}, t = {t[i]:.3g}", size=(300, 300))
            ends = torch.cdist(paths[name][-1][:1000], centres).argmin(1)
            axes.scatter(paths[name][i][:1000], COLOURS[ends])
            row.append(axes)
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
    for _ in tqdm(range(500), desc="prior", leave=False):
        loss = prior.nats(codes[torch.randint(len(codes), (batch_size,), generator=g)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return prior


def mixture_grid(K, std, kinds, seed):
    """-> results of these kinds of models, their samples, and their denoisers for the code of the first point"""
    g = seeded_generator("cpu", "grid", seed, K)
    centres = grid(K)

    def true_samples(n):
        component = torch.randint(K, (n,), generator=g)
        return around(centres[component], std, g), component

    (points, component), (test, _) = true_samples(num_points), true_samples(2000)
    log_p = log_density(test, centres, std, -math.log(K)).logsumexp(1)
    latents = torch.randn(num_points, 2, generator=g, dtype=torch.float64)
    results, samples, denoisers = {}, {}, {}
    for kind in kinds:
        results[kind] = {}
        if kind == "true samples":
            samples[kind] = points  # other points than those of the test
        elif kind == "learned codes":
            k = spare * math.isqrt(K)
            model, encode = train(points, 2, k, std, grid_steps, grid_lr, seed)
            codes = encode(points, g)
            given = train_prior(codes, k, seed).sample(gumbel_noise((num_points, 2, k), g))
            number = codes[:, 0] * k + codes[:, 1]
        else:
            number = {"unconditional": None, "true component": component}[kind] if kind != "GMM component" else \
                log_density(points, *fit_gmm(points, K, g)).argmax(1)
            codes = torch.empty(num_points, 0, dtype=torch.int64) if number is None else number[:, None]
            model, _ = train(points, codes.shape[1], K, std, grid_steps, grid_lr, seed, codes)
            given = codes[torch.randint(num_points, (num_points,), generator=g)]
        if kind != "true samples":
            samples[kind] = trace(model.given(given), latents)[1][-1]
            denoisers[kind] = model.given(codes[:1])
            if codes.shape[1]:
                results[kind] = {"purity": purity(number, component), "codes used": len(number.unique())}
        far = torch.cdist(samples[kind], centres).amin(1) > 3 * std
        results[kind] |= {"KL": kl_divergence(test, log_p, samples[kind], silverman(samples[kind])),
                          "fine KL": kl_divergence(test, log_p, samples[kind], torch.full((2,), std, dtype=torch.float64)),
                          "stray": far.double().mean().item()}
    return results, samples, denoisers


def draw_grids(results, samples, denoisers):
    """-> grid.png (means over seeds), grid_samples.png, fields.png"""
    panels = []
    for key, title in (("KL", "KL, Silverman's bandwidth"), ("fine KL", "KL, bandwidth std"), ("stray", "stray samples")):
        found = {kind: [np.mean([r[str(K)][kind][key] for r in results]) for K in modes] for kind in KINDS}
        axes = Axes((modes[0] * 0.8, modes[-1] * 1.25), (0, 1.4 * max(map(max, found.values()))), title, "modes K", log_x=True, size=(420, 340))
        for kind, colour in KINDS.items():
            axes.line(np.stack([modes, found[kind]], 1), colour, 2.5, dots=True, label=kind)
        panels.append(axes)

    rows = []
    for K in samples:
        extent = math.isqrt(K) / 2 + 0.5
        rows.append([Axes((-extent, extent), (-extent, extent), f"{kind}, K = {K}", size=(300, 300)) for kind in KINDS])
        for axes, x in zip(rows[-1], samples[K].values()):
            axes.scatter(x[:5000], COLOURS[4], 0.6)

    K, t = modes[1], torch.tensor(0.5, dtype=torch.float64)
    extent = math.isqrt(K) / 2 + 0.5
    x = torch.cartesian_prod(*[torch.linspace(-extent, extent, 17, dtype=torch.float64)[1:-1]] * 2)
    row = []
    for kind, denoise in denoisers.items():
        axes = Axes((-extent, extent), (-extent, extent), f"{kind}: D - x at t = {t:g}", size=(300, 300))
        axes.scatter(grid(K), COLOURS[0], 3)
        towards = denoise(x, t) - x
        axes.arrows(x, 0.4 * towards / (1 + towards.norm(dim=1, keepdim=True)), COLOURS[4])
        row.append(axes)
    return {"grid": figure([panels]), "grid_samples": figure(rows), "fields": figure([row])}


def grid_table(results):
    """Its lines."""
    yield "Grids. KL of the data from the model in nats, by KDE with Silverman's bandwidth and with std for bandwidth; stray: share"
    yield f"of samples beyond 3 std of all centres; purity and number of the codes. Means over {len(results)} seeds"
    keys = {"KL": 8, "fine KL": 9, "stray": 8, "purity": 9, "codes used": 12}
    yield f"{'K':>4}{'std':>6}  {'':16}" + "".join(f"{key:>{w}}" for key, w in keys.items())
    for at, kinds in results[0].items():
        K, _, other = at.partition(", std ")
        for kind in kinds:
            mean = {key: np.mean([r[at][kind][key] for r in results]) for key in kinds[kind]}
            yield f"{K:>4}{other or f'{std:g}':>6}  {kind:16}" + "".join(
                f"{mean[key]:{w}.{0 if key == 'codes used' else 3}f}" for key, w in keys.items() if key in mean)


# ----------------------------------------------------------------------------------------------------
# the run


def main():
    for name in ("seeds", "width", "batch_size", "lr", "encoder_lr", "embedding_lr", "steps", "num_samples", "std", "spare", "grid_steps", "grid_lr"):
        require(globals()[name] > 0, f"{name} must be positive, not {globals()[name]}")
    require(seed >= 0 and tau >= 1, f"seed can't be negative, nor tau below 1: they are {seed} and {tau}")
    require(num_steps > 1, f"num_steps must be 2 or more, not {num_steps}")
    require(len(modes) != 1 and all(math.isqrt(max(K, 0)) ** 2 == K > 1 for K in modes),
            f"modes are square numbers from 4 on, two of them or more; or none, to leave part 2 out; not {modes}")
    require(sizes and all(1 < n <= num_samples for n in sizes), f"sizes are numbers from 2 to num_samples {num_samples}, not {sizes}")
    require(all(other > 0 for other in other_stds), f"other_stds must be positive, not {other_stds}")
    require(num_points > max(modes, default=1), f"num_points {num_points} must be more than there are modes")
    began, lines = time.time(), []
    results = {"settings": {name: globals()[name] for name in config}, "eight Gaussians": [], "grids": []}

    def save(**pictures):
        """These pictures, and what has been found so far."""
        for name, picture in pictures.items():
            with data.atomic(f"{out_dir}/{name}.{'gif' if isinstance(picture, list) else 'png'}") as file:
                if isinstance(picture, list):
                    picture[0].save(file, "gif", save_all=True, append_images=picture[1:], duration=[80] * (len(picture) - 1) + [2000], loop=0)
                else:
                    picture.save(file, "png", optimize=True)
        for name, text in (("table.txt", "\n".join(lines)), ("results.json", json.dumps(results, indent=1))):
            with data.atomic(f"{out_dir}/{name}") as file:
                file.write(text.encode())

    def report(table):
        lines.extend([*table, ""])
        tqdm.write("\n".join([*table, ""]))

    save()  # a folder that can't be written is noticed here, not after minutes
    for s in range(seed, seed + seeds):
        found, drawn = eight_gaussians(s)
        results["eight Gaussians"].append({"seed": s, **found})
        report([*eight_table(found, s)])
        save(**draw_eight(*drawn) if s == seed else {})
        grids = {str(K): mixture_grid(K, std, KINDS, s) for K in modes}
        if modes:
            middle = modes[len(modes) // 2]
            others = {f"{middle}, std {other:g}": mixture_grid(middle, other, list(KINDS)[:3], s)[0] for other in other_stds}
            results["grids"].append({K: found for K, (found, _, _) in grids.items()} | others)
        if s == seed:
            first = grids
    if modes:
        report([*grid_table(results["grids"])])
        save(**draw_grids(results["grids"], {K: first[str(K)][1] for K in (middle, modes[-1])}, first[str(modes[1])][2]))
    print(f"{time.time() - began:.0f} s; the pictures, table.txt and results.json are in {out_dir}")


if __name__ == "__main__":
    config = configure(globals())
    if quick:
        steps, sizes, num_samples, modes, other_stds, grid_steps, num_points = 300, (250,), 1000, (4, 16, 36), (0.2,), 150, 2000
    main()
