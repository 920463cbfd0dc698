"""
A picture for each exercise, drawn with the student's functions: what a right answer looks like can be seen.
"""

import math

import numpy as np
import torch
from measures import EVERY, gumbel, normal, numbered

from plot import COLOURS, Axes, figure

BLUE, ORANGE, GREEN, GREY = COLOURS[4], COLOURS[0], COLOURS[2], COLOURS[7]


def rng():
    return np.random.default_rng(0)


def gumbel_softmax(model):
    logits, corners, row = torch.tensor([1.0, 0.5, 0.0]).double(), np.array([(0, 0), (1, 0), (0.5, 0.75 ** 0.5)]), []
    for tau in (3.0, 1.0, 0.2):
        noise = gumbel(rng(), 800, 3)
        y = model.gumbel_softmax(logits.expand(800, 3), tau, noise)
        axes = Axes((-0.1, 1.1), (-0.1, 1.0), f"tau = {tau:g}")
        axes.line(corners[[0, 1, 2, 0]], GREY, 1)
        axes.scatter(y.numpy() @ corners, COLOURS[(logits + noise).argmax(1) % 3], 1.5)
        row.append(axes)
    return figure([row])


def ring(n=8):
    angles = 2 * math.pi * torch.arange(n).double() / n
    return 3 * torch.stack([angles.cos(), angles.sin()], 1)


def mixture(toy):
    side = torch.linspace(-5, 5, 9).double()
    x, denoise, row = torch.cartesian_prod(side, side), toy.exact_denoiser(ring(), 0.2), []
    for t in (0.7, 3.0):
        D = denoise(x, torch.tensor(t).double())
        axes = Axes((-6, 6), (-6, 6), f"x, and where D sends it, at t = {t:g}", size=(400, 400))
        for start, end in zip(x.numpy(), D.numpy()):
            axes.line([start, end], GREY, 0.5)
        axes.scatter(ring().numpy(), ORANGE, 6)
        axes.scatter(D.numpy(), BLUE, 2.5)
        row.append(axes)
    return figure([row])


def heun(diffusion, alpha=1.0):
    from check_process import error
    steps = [8, 16, 32, 64, 128, 256]
    errors = [error(diffusion, normal(rng(), 20), n) for n in steps]
    axes = Axes((6, 350), (min(errors) / 3, 100 * errors[0]), "error at the end of dx/dt = x cos t", "steps",
                log_x=True, log_y=True, size=(460, 360))
    axes.line([(n, 2 * errors[0] * steps[0] / n) for n in steps], GREY, 1, label="order 1")
    axes.line([(n, 2 * errors[0] * (steps[0] / n) ** 2) for n in steps], GREEN, 1, label="order 2")
    axes.line(list(zip(steps, errors)), ORANGE, dots=True, label="your sampler")
    return figure([[axes]])


def precondition(diffusion, relative=False):
    from check_process import constants
    sigma = torch.logspace(-2, 1.9, 60)
    axes = Axes((0.01, 80), (0, 2.6), "sigma_data = 0.5", "sigma", log_x=True, size=(460, 360))
    for name, values, colour in zip(("c_skip", "c_out", "c_in"), constants(diffusion, sigma, 0.5), (BLUE, ORANGE, GREEN)):
        axes.line(torch.stack([sigma, values], 1).detach().numpy(), colour, label=name)
    return figure([[axes]])


def forward(model, lowest=0.0):
    from check_model import batch, tiny
    generator, taus, norms = rng(), np.geomspace(0.05, 10, 16), []
    disco, (y, noise, sigma, labels, g) = tiny(model, generator), batch(generator)
    for tau in taus:
        disco.zero_grad()
        D, _ = disco(y, noise, sigma, labels, g, None, float(tau))
        (D - y).square().mean().backward()
        norms.append(sum(p.grad.square().sum().item() for p in disco.encoder.parameters()) ** 0.5)
    axes = Axes((0.04, 12), (0, 1.2 * max(norms)), "gradient that reaches the encoder", "tau", "norm", log_x=True,
                size=(460, 360))
    axes.line(np.stack([taus, norms], 1), ORANGE, dots=True)
    return figure([[axes]])


def guidance(diffusion, interval=None):
    from toy_measures import exact_denoiser
    given, null, row = exact_denoiser(ring()[:3], 0.5), exact_denoiser(ring(), 0.5), []
    for w in (1.0, 2.0, 4.0):
        def denoise(x, t):
            first, second = x.chunk(2)
            return torch.cat([given(first, t), null(second, t)])

        x = diffusion.heun(diffusion.guided(denoise, w), normal(rng(), 1500, 2), 32)
        axes = Axes((-6, 6), (-6, 6), f"told: one of three modes; w = {w:g}")
        axes.scatter(x.numpy(), BLUE)
        axes.scatter(ring().numpy(), ORANGE, 3)
        row.append(axes)
    return figure([row])


def curvature(diffusion, sign=-1):
    from toy_measures import exact_denoiser
    axes = Axes((0.02, 80), (1e-6, 1e3), "median curvature of 500 trajectories", "noise level", log_x=True, log_y=True,
                size=(460, 360))
    for label, centres, colour in (("eight Gaussians", ring(), ORANGE), ("one Gaussian", ring()[:1], BLUE)):
        path, denoise = [], exact_denoiser(centres, 0.2)
        diffusion.heun(denoise, normal(rng(), 500, 2), 40, steps=path)
        values = [(t.item(), max(diffusion.curvature(denoise, x, t, t / 100).median().item(), 1e-6))
                  for t, x in path[:-1]]
        axes.line(values, colour, label=label)
    return figure([[axes]])


# ----------------------------------------------------------------------------------------------------
# set B


def cells(matrix, title, low, high):
    """A matrix (m, m) as squares, from white at `low` to orange at `high`."""
    n = len(matrix)
    axes = Axes((-0.5, n - 0.5), (-0.5, n - 0.5), title, "code that changes", "row of the logits")
    for i, j in np.ndindex(n, n):
        share = min(max((matrix[i, j] - low) / (high - low), 0), 1)
        axes.scatter([(j, i)], (255 + share * (ORANGE.astype(float) - 255)).astype(np.uint8), 130 / n)
    return axes


@torch.no_grad()
def prior(module, reverse=False):
    from check_prior import small
    network = small(module.Prior(6, 4, layers=2, dim=16, heads=2), rng())
    moved, codes = np.zeros((6, 6)), torch.zeros(1, 6, dtype=torch.int64)
    for j in range(6):
        other = codes.clone()
        other[0, j] = 1
        moved[:, j] = (network(other) - network(codes)).abs().amax((0, 2)).numpy()
    return figure([[cells(np.log10(moved + 1e-9), "which row sees which code", -6, 0)]])


def frequencies(p, draws):
    """How often each of 64 codes was drawn, against its probability."""
    share = torch.bincount(draws, minlength=64).double() / len(draws)
    low, high = p.min().item() / 2, 2 * p.max().item()
    axes = Axes((low, high), (low, high), f"{len(draws):,} draws of 64 codes", "probability", "share of the draws",
                log_x=True, log_y=True, size=(400, 400))
    axes.line([(low, low), (high, high)], GREY, 1)
    axes.scatter(torch.stack([p, share.clamp_min(low)], 1).numpy(), ORANGE, 3)
    return figure([[axes]])


@torch.no_grad()
def sampling(module, reverse=False):
    from check_prior import given, tiny
    network = tiny(module, rng())
    for p in network.parameters():
        p.data *= 0.5
    p = network.loss(EVERY).neg().double().exp()
    return frequencies(p, numbered(network.sample(given(gumbel(rng(), 20_000, 3, 4)))))


def entropy(sedd):
    axes = Axes((0.02, 50), (0, 4), "score entropy", "score of x0's token", "nats / a", log_x=True, size=(460, 360))
    scores = torch.logspace(-2, 2, 200).double()
    for t, colour in ((0.3, BLUE), (0.5, GREEN), (0.8, ORANGE)):
        sigma = sedd.log_linear(torch.tensor([t]).double())[0]
        log_score = torch.full((200, 1, 5), -math.inf).double()
        log_score[:, 0, 0] = scores.log()
        x, x0 = torch.full((200, 1), 4), torch.zeros(200, 1, dtype=torch.int64)
        a = 1 / torch.expm1(sigma).item()
        values = sedd.score_entropy(log_score, sigma.expand(200), x, x0)[:, 0] / a
        axes.line(torch.stack([scores, values], 1).numpy(), colour, label=f"t = {t}: a = {a:.2f}")
        axes.scatter([(a, 0)], colour, 5)
    return figure([[axes]])


def step(sedd):
    from check_sedd import at, independent_scores
    p, t, s = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double(), 0.9, torch.linspace(0, 0.9, 30).double()
    scores = independent_scores(sedd, p, at(t, 30))
    probs = sedd.analytic_probs(scores, torch.full((30, 1), 4), at(t, 30), s)[:, 0]
    axes = Axes((0, 0.9), (0, 1.5), f"what a mask at t = {t} has become", "time s", "probability", size=(460, 360))
    for i, colour in zip(range(5), (BLUE, ORANGE, GREEN, COLOURS[3], GREY)):
        axes.line(torch.stack([s, probs[:, i]], 1).numpy(), colour, label=f"token {i}" if i < 4 else "still a mask")
    return figure([[axes]])


def hitting(sedd):
    from check_sedd import Known, masks, sources
    generator = rng()
    known = Known(sedd, generator)
    codes = sedd.first_hitting(known.score, masks(20_000), *sources(generator, 20_000))
    return frequencies(known.p, numbered(codes))


def remasking(sedd, rescale=False):
    from check_sedd import Known, masks, sources
    row = []
    for title, settings in (("eta = 0", {}), ("eta = 0.3, from 0.6 to 0.2", dict(eta=0.3, t0=0.2, t1=0.6))):
        generator = rng()
        known = Known(sedd, generator)
        sedd.tau_leaping(known.score, masks(3000), 30, sources(generator, 3000)[1], **settings)
        axes = Axes((0, 1), (0, 1.05), title, "time", "share of masks")
        axes.line([(0, 0), (1, 1)], GREY, 1)
        axes.line([(t[0].item(), (x == 4).double().mean().item()) for x, t in known.seen], ORANGE, 1, dots=True)
        again = [(s[0].item(), ((after == 4) & (x != 4)).double().mean().item())
                 for (x, _), (after, s) in zip(known.seen, known.seen[1:])]
        axes.line(again, BLUE, 1, dots=True, label="masked again")
        row.append(axes)
    return figure([row])


def against_rows(distance, title):
    """The mean of a distance between two samples of one distribution, against the number of their rows."""
    generator, counts, lines = rng(), (8, 16, 32, 64, 128, 256), []
    for n in counts:
        values = [distance(normal(generator, n, 4), normal(generator, n, 4)) for _ in range(60)]
        lines.append((np.mean(values), np.std(values) / 60 ** 0.5))
    means, errors = np.array(lines).T
    axes = Axes((6, 340), (min(0, 1.3 * (means - 3 * errors).min()), 1.3 * (means + 3 * errors).max()), title,
                "rows of each sample", log_x=True, size=(460, 360))
    axes.line([(6, 0), (340, 0)], GREY, 1)
    axes.line(np.stack([counts, means], 1), ORANGE, dots=True, label="mean of 60 pairs; 3 standard errors")
    for n, mean, error in zip(counts, means, errors):
        axes.line([(n, mean - 3 * error), (n, mean + 3 * error)], ORANGE, 1)
    return figure([[axes]])


def frechet(metrics):
    def distance(x, y):
        return metrics.frechet_distance(x.mean(0).numpy(), x.T.cov().numpy(), y.mean(0).numpy(), y.T.cov().numpy())

    return against_rows(distance, "Frechet distance, one distribution")


def kernel(metrics):
    return against_rows(lambda x, y: metrics.kernel_distance(x, y)[0], "kernel distance, one distribution")
