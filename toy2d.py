"""
Why discrete latents help diffusion, in two dimensions (DisCo-Diff sec. 3.2 and App. F; Discrete
Latent Codes sec. 3).

    python toy2d.py                         # both parts, one seed: eight minutes on two CPU cores
    python toy2d.py --quick=True            # under a minute: every picture, hardly any training
    python toy2d.py --seeds=5 --modes="()"  # part 1 alone, seeds 0 ... 4; pictures of the first
    python toy2d.py --modes="()" --process=flow --out_dir=out/toy2d-flow    # the same by flow matching

Part 1, in this file, has eight Gaussians. A denoiser learns them alone, then together with an
encoder that gives each point one of eight codes. Each code takes one mode, and the trajectories
from noise to data, bent before, are straight.

Part 2, in toy_grids.py, has grids of ever more Gaussians. A network of fixed size fits them when it
is told each point's component. Told nothing, it fits them less and less; learned codes help with up
to a hundred.

Measures are in toy_measures.py, pictures and tables in toy_pictures.py. Leaves in out_dir:
eight.png, curves.png, sampling.gif, grid.png, grid_samples.png, fields.png, table.txt and
results.json.
"""

import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import one_hot
from tqdm import tqdm

from checkpoint import atomic
from configurator import UserError, configure, is_default, require
from diffusion import PROCESSES, curvature, heun, noise_schedule
from model import draw_codes, gumbel_softmax
from noise import BatchNoise, gumbel_noise, seeded_generator
from processes import start_processes
from run import alone, progress
from toy_grids import KINDS, gaussian_grid
from toy_measures import (
    around,
    even_parts,
    exact_denoiser,
    exact_pfgm_denoiser,
    jacobian_norms,
    purity,
    stray,
    wasserstein2,
)
from toy_pictures import (
    draw_curves,
    draw_eight,
    draw_fields,
    draw_measures,
    draw_samples,
    draw_sampling,
    eight_table,
    grid_table,
    seeds_table,
)
from transformer import zero

out_dir = "out/toy2d"
seed = 0
seeds = 1  # that many seeds, from this one on
quick = False
process = "edm"  # of part 1; or "pfgm++", "flow" (matching): noise, its levels and weights, and where curvature is
# measured. Networks, with EDM's constants, and sampler stay
pfgm_D = 8.0  # PFGM++'s D: of the order of the plane's two dimensions
# training, the same for all
width = 64  # of the networks: denoiser with four layers, encoder with three
steps = 8000
batch_size = 256
lr = 3e-3  # of the denoiser; the paper's 1e-3 needs more steps, above all without codes
encoder_lr = 1e-2
embedding_lr = 1.0  # of F(z): Adam moves it by up to that much a step, soon to the mean of the points with code z
tau = 20.0  # temperature of the Gumbel-Softmax; it falls to the paper's 1 in the first half of training, and stays
num_steps = 50  # of Heun's method
# part 1
num_samples = 4096  # drawn from each model
sizes = (256, 512, 1024, 2048)  # W-2 is measured between samples of these sizes
# part 2
modes = (4, 25, 100, 400)
std = 0.1  # of a Gaussian; the distance between neighbours is 1
other_stds = (0.05, 0.2)  # for the third of the grids
codebook_factor = 2  # of the two latents: this times sqrt(K) values each, so that there are more codes than modes
num_points = 10_000  # in the data set, and drawn from each model
QUICK = ("--steps=250", "--sizes=(256,)", "--num_samples=1024", "--modes=(4,16,36)", "--other_stds=(0.2,)",
         "--num_points=2000")

EIGHT_STD = 0.2  # of the eight Gaussians (App. F.1)

# ----------------------------------------------------------------------------------------------------
# denoiser and encoder (App. F.2)


def mlp(*widths):
    """Linear layers between these widths, with SiLU in between."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


class Denoiser(nn.Module):
    """D(x, t, z) = x + t^2 G, with the score G = (F(z) - x) / (t^2 + std^2) + H(x, t)  (App. F.2).

    F(z) is a point in the plane, the sum of m embeddings. With H = 0, G is the exact score of one
    Gaussian around F(z). H is a network of four layers; its output is divided by t^2 + std^2, so
    that it is in units of the data.

    Without codes F(z) would be 0: a strong pull to 0, which H had to undo. So D is then EDM's
    c_skip x + c_out H (Table 1), whose samples are better.
    """

    def __init__(self, num_latents, codebook_size, std, scale):
        super().__init__()
        self.std, self.scale = std, scale  # of one Gaussian, and of all the data
        self.net = mlp(3, width, width, width, 2)  # H
        zero(self.net[-1])
        self.codebook = nn.Parameter(torch.randn(num_latents, codebook_size, 2))  # F

    def embed(self, z):
        """z: (B, m, k), rows sum to 1. -> F(z), (B, 2)"""
        return torch.einsum("bmk,mkd->bd", z, self.codebook)

    def forward(self, x, t, embedding):
        """x: (B, 2); t: (B, 1) or a scalar; embedding: F(z), (B, 2) or (1, 2). -> D, (B, 2)"""
        t, s = t.expand(len(x), 1), self.scale
        variance = t ** 2 + self.std ** 2  # of a noisy Gaussian
        H = self.net(torch.cat([x / (t ** 2 + s ** 2).sqrt(), variance.log() / 8], 1))
        if len(self.codebook):
            return x + t ** 2 * (embedding - x + H) / variance  # x + t^2 G
        return (s ** 2 * x + t * s * (t ** 2 + s ** 2).sqrt() * H) / (t ** 2 + s ** 2)  # c_skip x + c_out H

    def with_codes(self, codes):
        """The function D(x, t) for these codes: (B, m), or (1, m) for all."""
        embedding = self.embed(one_hot(codes, self.codebook.shape[1]).to(self.codebook.dtype))
        return lambda x, t: self(x, t, embedding)


class Encoder(nn.Module):
    """Three layers: points (N, 2) of standard deviation `scale` -> logits of codes (N, m, k)."""

    def __init__(self, num_latents, codebook_size, scale):
        super().__init__()
        self.shape, self.scale = (num_latents, codebook_size), scale
        self.layers = mlp(2, width, width, num_latents * codebook_size)

    def forward(self, x):
        return self.layers(x / self.scale).view(-1, *self.shape)

    def sample_codes(self, x, g):
        """Codes (N, m) of points, drawn from the encoder's distribution."""
        logits = self(x)
        return draw_codes(logits, gumbel_noise(logits.shape, g))


# ----------------------------------------------------------------------------------------------------
# training


def train(points, num_latents, codebook_size, std, seed, codes=None):
    """Alg. 1 in two dimensions. -> Denoiser, and Encoder (or None): both in float64

    points: (N, 2); std: of one Gaussian; codes: (N, m) where they are known, else an encoder learns
    them. EDM's ln t is normal, with 95 % of the noise levels between std / 2 and 5 times the data's std.
    Adam's learning rates fall to 0 as a cosine. Raises UserError where training diverges.
    """
    torch.manual_seed(seed)
    g = seeded_generator("cpu", "train", seed)
    points, kernel = points.float(), PROCESSES[process].kernel
    scale = points.std().item()
    model = Denoiser(num_latents, codebook_size, std, scale)
    groups = [{"params": model.net.parameters(), "lr": lr}, {"params": [model.codebook], "lr": embedding_lr}]
    encoder = None
    if codes is None:
        encoder = Encoder(num_latents, codebook_size, scale)
        groups.append({"params": encoder.parameters(), "lr": encoder_lr})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    low, high = math.log(std / 2), math.log(5 * scale)
    levels, weight = noise_schedule(process, "edm", (low + high) / 2, (high - low) / 4, 1.0, pfgm_D, scale)
    for step in progress(range(steps), desc=f"m = {num_latents}, k = {codebook_size}", leave=False):
        rows = torch.randint(len(points), (batch_size,), generator=g)
        y = points[rows]  # Alg. 1, line 3
        t = levels(torch.randn(batch_size, 1, generator=g))  # line 4
        if encoder is None:
            z = one_hot(codes[rows], codebook_size).float()
        else:
            logits = encoder(y)
            temperature = tau ** max(0, 1 - 2 * step / steps)
            z = gumbel_softmax(logits, temperature, gumbel_noise(logits.shape, g))  # line 6
        D = model(y + t * kernel(BatchNoise(batch_size, g), (2,), pfgm_D), t, model.embed(z))  # lines 5 and 7
        loss = (weight(t) * (D - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    require(loss.isfinite(), f"training has diverged, with a loss of {loss:g}: lower lr, encoder_lr or embedding_lr")
    return model.double().requires_grad_(False), encoder and encoder.double().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------
# part 1: eight Gaussians, one latent (DisCo-Diff sec. 3.2, App. F)


def ring():
    """Centres of the eight Gaussians (App. F.1): on a circle of radius 3. (8, 2)"""
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return 3 * torch.stack([angles.cos(), angles.sin()], 1)


def trajectories(denoise, noise):
    """Heun's method on noise of scale 1 (B, 2), step by step.

    -> noise levels t (num_steps + 1,), from 80 to 0, and x at each of them (num_steps + 1, B, 2)
    """
    visited = []
    heun(denoise, noise, num_steps, steps=visited)
    t, x = zip(*visited)
    return torch.stack(t), torch.stack(x)


def bend(denoise, x, t):
    """`curvature` in the coordinates of the process: x, or for flow matching x_t = (1 - s) x, s = t / (1 + t), in which
    the ODE is dx_t/ds = (x_t - D) / s."""
    if process != "flow":
        return curvature(denoise, x, t)
    return curvature(lambda x_t, s: denoise(x_t / (1 - s), s / (1 - s)), x / (1 + t), t / (1 + t))


def eight_gaussians(seed):
    """A plain model and DisCo-Diff learn eight Gaussians; trajectories and samples are measured.

    -> results, as they are in results.json; and what is drawn: the data (8000, 2), the codes of
    DisCo-Diff's samples (num_samples,), noise levels t (num_steps + 1,), each model's paths
    (num_steps + 1, num_samples, 2), and along them its curvature, |grad score|^2 and |grad D|^2,
    (num_steps, num_samples) each
    """
    g = seeded_generator("cpu", "eight", seed)
    centres, component = ring(), torch.arange(8).repeat_interleave(1000)
    points = around(centres[component], EIGHT_STD, g)
    no_codes = torch.empty(len(points), 0, dtype=torch.int64)
    plain, _ = train(points, 0, 1, EIGHT_STD, seed, no_codes)
    disco, encoder = train(points, 1, 8, EIGHT_STD, seed)
    codes = encoder.sample_codes(points, g)
    new_codes = codes[torch.randint(len(points), (num_samples,), generator=g)]  # their frequencies are the prior

    # trajectories, all from the same noise
    noise = PROCESSES[process].kernel(BatchNoise(num_samples, g, torch.float64), (2,), pfgm_D)
    of_pfgm = process == "pfgm++" and pfgm_D < math.inf
    exact = exact_pfgm_denoiser(centres, EIGHT_STD, pfgm_D) if of_pfgm else exact_denoiser(centres, EIGHT_STD)
    denoisers = {"exact score": exact, "plain": plain.with_codes(no_codes[:1]),
                 "DisCo-Diff": disco.with_codes(new_codes)}
    paths, curves = {}, {}
    for name, denoise in denoisers.items():
        t, paths[name] = trajectories(denoise, noise)
        measured = [(bend(denoise, x, t_i), *jacobian_norms(denoise, x, t_i))
                    for t_i, x in zip(t[:-1], paths[name])]
        curves[name] = [torch.stack(values) for values in zip(*measured)]
    at_t = [curvature(exact, x, t_i).median() for t_i, x in zip(t[:-1], paths["exact score"])]  # in x always
    bends = torch.stack(at_t) > 0.1  # at these t, half of the bends have a radius below 10
    require(bends.any(), f"the exact score's trajectories bend at none of {num_steps} noise levels: raise num_steps")

    # samples, where the trajectories end
    truth, floor = (around(centres[torch.randint(8, (num_samples,), generator=g)], EIGHT_STD, g) for _ in range(2))
    samples = {"true samples: the floor": floor} | {name: path[-1] for name, path in paths.items()}
    models = {}
    for name, x in progress(samples.items(), desc="W-2", leave=False):
        as_drawn = {n: [wasserstein2(a, b) for a, b in zip(x.split(n), truth.split(n)) if len(a) == n] for n in sizes}
        even = {n: [*map(wasserstein2, even_parts(x, centres, n), even_parts(truth, centres, n))] for n in sizes}
        models[name] = {"W-2": as_drawn, "W-2, even": even, "stray": stray(x, centres, EIGHT_STD)}
    for name in curves:
        kappa, of_score, of_denoiser = (values[bends] for values in curves[name])
        models[name] |= {"mean curvature": kappa.mean().item(), "median curvature": kappa.median().item(),
                         "|grad score|^2": of_score.mean().item(), "|grad D|^2": of_denoiser.mean().item()}
    results = {"seed": seed, "purity": purity(codes[:, 0], component), "codes used": len(codes.unique()),
               "bends": [t[:-1][bends].min().item(), t[:-1][bends].max().item()], "models": models}
    shuffled = points[torch.randperm(len(points), generator=g)]
    return results, shuffled, new_codes[:, 0], t, paths, curves


# ----------------------------------------------------------------------------------------------------
# the run


def check(config):
    """Raises UserError for settings that make no sense."""
    noise_schedule(process, "edm", 0.0, 1.0, 1.0, pfgm_D, 1.0)  # raises
    require(process == "pfgm++" or is_default(globals(), "pfgm_D"), "pfgm_D is for --process=pfgm++")
    require(process == "edm" or not modes, f'part 2 has no --process={process}: leave it out by --modes="()"')
    for name in ("seeds", "width", "batch_size", "lr", "encoder_lr", "embedding_lr", "steps", "num_samples",
                 "codebook_factor"):
        require(0 < config[name] < math.inf, f"{name} must be positive, not {config[name]}")
    require(0 <= seed < 2 ** 62 and 1 <= tau < math.inf,
            f"seed can't be negative or above 2^62, nor tau below 1: they are {seed} and {tau}")
    require(num_steps >= 10, f"num_steps must be 10 or more, for trajectories to be seen, not {num_steps}")
    require(len(modes) != 1 and [*modes] == sorted({K for K in modes if K > 1 and math.isqrt(K) ** 2 == K}),
            "modes are square numbers from 4 on, increasing, two of them or more; or none, to leave part 2 out; "
            f"not {modes}")
    require(sizes and all(0 < n <= num_samples and n % 8 == 0 for n in sizes),
            f"sizes are multiples of 8 up to num_samples {num_samples}, not {sizes}")
    require(all(0.01 <= s <= 1 for s in (std, *other_stds)) and len({std, *other_stds}) == 1 + len(other_stds),
            f"std and other_stds must differ, and lie between 0.01 and 1: they are {std} and {other_stds}")
    require(num_points > max(modes, default=1), f"num_points {num_points} must be more than there are modes")


def main(argv=()):
    config = configure(globals(), argv)
    if quick:  # the command line comes last, so that it overrides QUICK
        config = configure(globals(), [*QUICK, *argv])
    check(config)
    _, world, _ = start_processes("cpu")
    require(world == 1, "toy2d.py runs as one process, without torchrun")
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir={out_dir} can't be used: {error.strerror}") from None
    with alone(f"{out_dir}/results"):
        both_parts(config)


def both_parts(config):
    """Trains, measures and draws all; what has been found so far is always in out_dir."""
    began = time.time()
    lines, eight, grids = [], [], []  # of table.txt; results of part 1 and part 2

    def report(table):
        lines.extend([*table, ""])
        tqdm.write("\n".join([*table, ""]))

    def save(**pictures):
        """Writes these pictures, and the tables and results so far."""
        for name, picture in pictures.items():
            if isinstance(picture, list):  # a film
                with atomic(Path(out_dir, f"{name}.gif")) as file:
                    duration = [80] * (len(picture) - 1) + [2000]  # of each frame, in ms
                    picture[0].save(file, "gif", save_all=True, append_images=picture[1:], duration=duration, loop=0)
            else:
                with atomic(Path(out_dir, f"{name}.png")) as file:
                    picture.save(file, "png", optimize=True)
        results = {"settings": config, "eight Gaussians": eight, "grids": grids}
        for name, text in (("table.txt", "\n".join(lines)), ("results.json", json.dumps(results, indent=1))):
            with atomic(Path(out_dir, name)) as file:
                file.write(text.encode())

    # part 1
    all_seeds = range(seed, seed + seeds)
    for s in all_seeds:
        results, points, codes, t, paths, curves = eight_gaussians(s)
        eight.append(results)
        report(eight_table(results))
        if s == seed:
            save(eight=draw_eight(points, codes, ring()[0], paths), curves=draw_curves(t, curves),
                 sampling=draw_sampling(t, paths, ring()))
        else:
            save()
    if seeds > 1:
        report(seeds_table(eight))
        save()

    # part 2
    if modes:
        learn = partial(gaussian_grid, train=train, num_points=num_points, num_steps=num_steps, batch_size=batch_size,
                        codebook_factor=codebook_factor)
        middle, samples, denoisers = modes[len(modes) // 2], {}, {}
        for s in all_seeds:
            for K in modes:
                results, samples[s, K], denoisers[s, K] = learn(K, std, KINDS, s)
                grids += results
                save()
            for other in other_stds:
                results, _, _ = learn(middle, other, ("true samples", "unconditional"), s)
                grids += results
        report(grid_table(grids, steps))
        save(grid=draw_measures([row for row in grids if row["std"] == std]),
             grid_samples=draw_samples({K: samples[seed, K] for K in (middle, modes[-1])}),
             fields=draw_fields(modes[1], denoisers[seed, modes[1]]))
    print(f"{time.time() - began:.0f} s; the pictures, table.txt and results.json are in {out_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
