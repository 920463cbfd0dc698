"""
Which prior comes closer to the real codes, and which is faster? Compares both on one encoder's codes.

    python train_prior.py && python train_prior.py --prior=sedd && python compare_priors.py

Reads out_dir/stage1.pt, prior_ar.pt and prior_sedd.pt. Prints a table, writes it to
out_dir/compare_priors.txt, and draws it as bars in out_dir/compare_priors.png.

The measure is the total-variation distance, 0 ... 1, between two samples of equal size: the prior's
codes, and the encoder's codes of other training images with the same distribution of classes. It is
taken for each latent alone (mean over latents) and for pairs of latents (mean over pairs). Two samples
of real codes differ too: their distance is the floor. +- is the standard deviation over samples; for
held-out bits, the standard error. Seconds are for drawing codes, seeded noise included.
"""

import math
import sys
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from checkpoint import atomic
from configurator import configure, require
from model import draw_codes
from noise import SeededNoise, gumbel_noise, seeded_generator
from prior import mean_bits
from processes import start_processes
from run import progress
from trained import load_prior, load_stage1, load_trained_on

out_dir = "out"
device = "auto"
seed = 0
samples = 3
num_codes = 2000  # per sample
batch_size = 1000
sedd_steps = 64  # for the samplers that have steps
etas = (0.01, 0.02, 0.05, 0.1, 0.3)  # remasking probabilities to try

# ----------------------------------------------------------------------------------------------------
# measures


def distances(a, b, k):
    """Total variation of two samples of codes, int64 (N, m). -> mean over latents, mean over pairs"""

    def mean(keys, cells):
        p, q = (np.array([np.bincount(key(z.cpu().numpy()), minlength=cells) / len(z) for key in keys]) for z in (a, b))
        return abs(p - q).sum(1).mean() / 2

    m = a.shape[1]
    pairs = [lambda z, i=i, j=j: z[:, i] * k + z[:, j] for i in range(m) for j in range(i)]
    return mean([lambda z, i=i: z[:, i] for i in range(m)], k), mean(pairs, k * k) if pairs else math.nan


def shuffled_in_class(codes, labels, g):
    """Makes latents independent given the class: each comes from another image of that class."""
    result = codes.clone()
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        for i in range(codes.shape[1]):
            result[rows, i] = codes[rows[torch.randperm(len(rows), generator=g, device=g.device)], i]
    return result


def generate(prior, labels, first_seed, **how):
    """-> codes (N, m) of the prior, for these classes; how: settings of its sampler"""
    codes = []
    for part in torch.arange(len(labels)).split(batch_size):
        noise = SeededNoise("compare", (first_seed + part).tolist(), labels.device)
        codes.append(prior.sample(noise, labels[part], **how).cpu())
    return torch.cat(codes)


def draw_bars(rows, path):
    """rows: [name, distance of single latents, of pairs]. The first is the floor, drawn as lines."""
    font, scale, colours = ImageFont.load_default(22), 640 / max(max(row[1:]) for row in rows), ("#78aadc", "#144682")
    canvas = Image.new("RGB", (1280, 80 + 64 * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((20, 18), "total variation, lower is better:", "black", font)
    draw.text((440, 18), "single latents", colours[0], font)
    draw.text((620, 18), "pairs of latents", colours[1], font)
    for value, colour in zip(rows[0][1:], colours):
        draw.line((440 + scale * value, 60, 440 + scale * value, canvas.height - 10), colour, 2)
    for i, row in enumerate(rows):
        draw.text((20, 80 + 64 * i), row[0].strip(), "black", font)
        for y, value, colour in zip((70 + 64 * i, 94 + 64 * i), row[1:], colours):
            draw.rectangle((440, y, 440 + scale * value, y + 20), colour)
            at, text = (450 + scale * value, y - 4), f"{value:.3f}"
            draw.rectangle(draw.textbbox(at, text, font), "white")
            draw.text(at, text, "black", font)
    with atomic(path) as file:
        canvas.save(file, "png")


# ----------------------------------------------------------------------------------------------------
# the comparison


def main(argv=()):
    config = configure(globals(), argv)
    for setting in ("samples", "num_codes", "batch_size", "sedd_steps"):
        require(config[setting] > 0, f"{setting} must be positive, not {config[setting]}")
    require(seed >= 0, f"seed can't be negative: it is {seed}")
    require(all(0 <= eta < 1 for eta in etas), f"etas are probabilities below 1, not {etas}")
    _, world, place = start_processes(device)
    require(world == 1, "compare_priors.py runs as one process, without torchrun")
    stage1, checkpoint = load_stage1(out_dir, place)
    ar, sedd = (load_prior(out_dir, kind, place, checkpoint) for kind in ("ar", "sedd"))
    images, labels, train, held_out = load_trained_on(checkpoint["config"], f"{out_dir}/stage1.pt")
    require(len(held_out),
            f"{out_dir}/stage1.pt was trained with held_out=0: no images are left to compare bits on")
    m, k, g = stage1.num_latents, stage1.codebook_size, seeded_generator(place, "compare", seed)

    @torch.no_grad()
    def encode(indices):
        """-> the encoder's logits for these images, and their class labels"""
        parts = np.split(indices, range(500, len(indices), 500))
        logits = torch.cat([stage1.encoder(data.to_float(images[part], place)) for part in parts])
        c = torch.from_numpy(labels[indices]) if stage1.label_dim else torch.full((len(indices),), -1)
        return logits, c.to(place)

    @torch.no_grad()
    def held_out_bits(prior):
        """As train_prior.py prints them; both priors get the same codes."""
        generators = [seeded_generator(place, purpose, seed) for purpose in ("held-out", "times")]
        bits = mean_bits(prior, *encode(held_out), 8, *generators)
        return f"{bits.mean():.2f} +- {bits.std(correction=0) / len(bits) ** 0.5:.2f}"

    def real_codes():
        """-> codes of random training images, and their labels"""
        logits, c = encode(train[torch.randint(len(train), (num_codes,), generator=g, device=place).cpu()])
        return draw_codes(logits, gumbel_noise(logits.shape, g)), c

    stepped = dict(sedd_sampler="analytic", sedd_steps=sedd_steps)
    ar_bits, sedd_bits = held_out_bits(ar), "<= " + held_out_bits(sedd)
    methods = [("AR", ar, ar_bits, m, {}),
               ("SEDD, first-hitting", sedd, sedd_bits, m, dict(sedd_sampler="first-hitting")),
               (f"SEDD, analytic, {m} steps", sedd, sedd_bits, m, dict(sedd_sampler="analytic", sedd_steps=m)),
               (f"SEDD, analytic, {sedd_steps} steps", sedd, sedd_bits, sedd_steps, stepped),
               *((f"  and remasking, eta = {eta:g}", sedd, sedd_bits, sedd_steps, stepped | dict(eta=eta))
                 for eta in etas)]
    table = np.empty((len(methods) + 2, samples, 2))
    seconds = np.zeros(len(methods))
    for i in range(samples):
        (real, _), (other, c) = real_codes(), real_codes()
        table[0, i] = distances(real, other, k)
        table[1, i] = distances(real, shuffled_in_class(other, c, g), k)
        bar = progress(methods, desc=f"sample {i + 1} of {samples}", unit="sampler")
        for j, (_, prior, _, _, how) in enumerate(bar):
            began = time.perf_counter()
            made = generate(prior, c, seed + i * num_codes, **how)
            seconds[j] += (time.perf_counter() - began) / samples / num_codes * 1000
            table[j + 2, i] = distances(real, made, k)

    rows = [("real codes (the floor)", "", "", ""), ("independent latents given the class", "", "", ""),
            *((name, bits, n, f"{s:.2f}") for (name, _, bits, n, _), s in zip(methods, seconds))]
    columns = np.stack([table.mean(1), table.std(1)], 2).reshape(len(rows), 4)
    rows = [(*row, *distance) for row, distance in zip(rows, columns)]
    text = "\n".join([
        f"{samples} x {num_codes:,} codes of {m} latents with {k} values; "
        f"bits per image on {len(held_out)} held-out images (<=: a bound)",
        f"{'':36}{'held-out bits':>18}{'evaluations':>12}{'s per 1,000':>12}{'TV single':>18}{'TV pairs':>18}",
        *(f"{name:36}{bits:>18}{n:>12}{s:>12}{v[0]:9.4f} +- {v[1]:.4f}{v[2]:8.4f} +- {v[3]:.4f}"
          for name, bits, n, s, *v in rows)])
    print(text)
    with atomic(f"{out_dir}/compare_priors.txt") as file:
        file.write(text.encode() + b"\n")
    draw_bars([(row[0], row[4], row[6]) for row in rows], f"{out_dir}/compare_priors.png")
    print(f"{out_dir}/compare_priors.txt and {out_dir}/compare_priors.png are ready")


if __name__ == "__main__":
    main(sys.argv[1:])
