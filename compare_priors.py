"""
The two priors side by side, on the codes of one encoder: how close to the real codes do they come, and how fast?

    python train_prior.py && python train_prior.py --prior=sedd && python compare_priors.py

Reads out_dir/stage1.pt, prior_ar.pt and prior_sedd.pt; prints a table, and writes it to out_dir/compare_priors.txt
and, as bars, to out_dir/compare_priors.png. What is compared is the total-variation distance, 0 ... 1, between the
distributions of a latent's codes (mean over latents), and of two latents' codes (mean over pairs), in two samples of
equal size: the prior's, and the encoder's for training images of the same classes. Two samples of real codes are
some distance apart, too: that is the floor.
"""

import math
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from configurator import configure, require, start_processes
from model import draw_codes, gumbel_noise, seeded_generator
from sample import SeededNoise, codes_of_prior, load_prior, load_stage1

out_dir = "out"
device = "auto"
seed = 0
num_codes = 4000  # of each sample
batch_size = 1000
sedd_steps = 64  # of the samplers that have steps
etas = (0.01, 0.02, 0.05, 0.1, 0.3)  # remasking probabilities to try

# ----------------------------------------------------------------------------------------------------
# measures


def distances(a, b, k):
    """Total variation between the codes of two samples, int64 (N, m): mean over latents, and over pairs of latents."""

    def mean(keys, cells):
        p, q = (np.array([np.bincount(key(z.cpu().numpy()), minlength=cells) / len(z) for key in keys]) for z in (a, b))
        return abs(p - q).sum(1).mean() / 2

    m = a.shape[1]
    pairs = [lambda z, i=i, j=j: z[:, i] * k + z[:, j] for i in range(m) for j in range(i)]
    return mean([lambda z, i=i: z[:, i] for i in range(m)], k), mean(pairs, k * k) if pairs else math.nan


def shuffled_in_class(codes, labels, g):
    """Codes whose latents are independent given the class: each from the code of another image of that class."""
    result = codes.clone()
    for label in labels.unique():
        where = (labels == label).nonzero()[:, 0]
        for i in range(codes.shape[1]):
            result[where, i] = codes[where[torch.randperm(len(where), generator=g, device=g.device)], i]
    return result


def generate(prior, labels, **how):
    """-> codes of these classes (N, m), and seconds per 1,000 of them"""
    began, codes = time.perf_counter(), []
    for part in tqdm(torch.arange(len(labels)).split(batch_size), desc=", ".join(map(str, how.values())) or "ar", leave=False):
        noise = SeededNoise("compare", (seed + part).tolist(), labels.device)
        codes.append(codes_of_prior(prior, noise, labels[part], **how).cpu())
    return torch.cat(codes), (time.perf_counter() - began) / len(labels) * 1000


def draw_bars(rows, path):
    """rows: [name, ..., distance of single latents, of pairs]; the first row's are the floor, drawn as lines."""
    font, scale, colours = ImageFont.load_default(22), 640 / max(max(row[-2:]) for row in rows), ("#78aadc", "#144682")
    canvas = Image.new("RGB", (1280, 80 + 64 * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((20, 18), "total variation, lower is better:", "black", font)
    draw.text((440, 18), "single latents", colours[0], font)
    draw.text((620, 18), "pairs of latents", colours[1], font)
    for value, colour in zip(rows[0][-2:], colours):
        draw.line((440 + scale * value, 60, 440 + scale * value, canvas.height - 10), colour, 2)
    for i, row in enumerate(rows):
        draw.text((20, 80 + 64 * i), row[0].strip(), "black", font)
        for y, value, colour in zip((70 + 64 * i, 94 + 64 * i), row[-2:], colours):
            draw.rectangle((440, y, 440 + scale * value, y + 20), colour)
            at, text = (450 + scale * value, y - 4), f"{value:.3f}"
            draw.rectangle(draw.textbbox(at, text, font), "white")
            draw.text(at, text, "black", font)
    canvas.save(path)


# ----------------------------------------------------------------------------------------------------
# the comparison


def main():
    for setting in ("num_codes", "batch_size", "sedd_steps"):
        require(config[setting] > 0, f"{setting} must be positive, not {config[setting]}")
    require(seed >= 0, f"seed can't be negative: it is {seed}")
    require(all(0 <= eta < 1 for eta in etas), f"etas are probabilities below 1, not {etas}")
    _, world, place = start_processes(device)
    require(world == 1, "compare_priors.py runs as one process, without torchrun")
    stage1, checkpoint = load_stage1(out_dir, place)
    ar, sedd = (load_prior(out_dir, kind, place, checkpoint) for kind in ("ar", "sedd"))
    images, labels, _ = data.load(checkpoint["config"]["dataset"])
    require(data.identity(images, labels) == checkpoint["config"]["data_identity"],
            f"the data set {checkpoint['config']['dataset']} has changed since {out_dir}/stage1.pt was trained on it")
    train, held_out = data.split(len(images), checkpoint["config"]["held_out"])
    require(len(held_out), f"{out_dir}/stage1.pt was trained with held_out=0: there are no images to compare the bits on")
    m, k, g = stage1.num_latents, stage1.codebook_size, seeded_generator(place, "compare", seed)

    @torch.no_grad()
    def real(indices, g=g):
        """Codes of these images, and their labels."""
        logits = torch.cat([stage1.encoder(data.to_float(images[i], place)) for i in np.split(indices, range(500, len(indices), 500))])
        c = torch.from_numpy(labels[indices]) if stage1.label_dim else torch.full((len(indices),), -1)
        return draw_codes(logits, gumbel_noise(logits.shape, g)), c.to(place)

    def real_sample():
        return real(train[torch.randint(len(train), (num_codes,), generator=g, device=place).cpu()])

    @torch.no_grad()
    def held_out_bits(prior, draws=8):
        """As in train_prior.py: the same codes for both priors."""
        g_codes, g_times = (seeded_generator(place, purpose, seed) for purpose in ("held-out", "times"))
        bits = sum(prior.nats(*real(held_out, g_codes), g_times) for _ in range(draws)) / draws / math.log(2)
        return f"{bits.mean():.2f} +- {bits.std() / len(bits) ** 0.5:.2f}"

    (codes, _), (others, c) = real_sample(), real_sample()
    floors = np.array([distances(real_sample()[0], real_sample()[0], k) for _ in range(10)])
    rows = [("real codes (the floor)", "", "", "", *floors.mean(0)),
            ("independent latents given the class", "", "", "", *distances(codes, shuffled_in_class(others, c, g), k))]
    stepped = dict(sampler="analytic", num_steps=sedd_steps)
    ar_bits, sedd_bits = held_out_bits(ar), "<= " + held_out_bits(sedd)
    for name, prior, bits, evaluations, how in [
            ("AR", ar, ar_bits, m, {}),
            ("SEDD, first-hitting", sedd, sedd_bits, m, dict(sampler="first-hitting")),
            (f"SEDD, analytic, {m} steps", sedd, sedd_bits, m, dict(sampler="analytic", num_steps=m)),
            (f"SEDD, analytic, {sedd_steps} steps", sedd, sedd_bits, sedd_steps, stepped),
            *((f"  and remasking, eta = {eta:g}", sedd, sedd_bits, sedd_steps, stepped | dict(eta=eta)) for eta in etas)]:
        made, seconds = generate(prior, c, **how)
        rows.append((name, bits, evaluations, f"{seconds:.2f}", *distances(codes, made, k)))

    table = "\n".join([
        f"{num_codes:,} codes of {m} latents with {k} values; bits per image on {len(held_out)} held-out images (<=: a bound)",
        f"{'':36}{'held-out bits':>19}{'evaluations':>13}{'s per 1,000':>13}{'TV single':>11}{'TV pairs':>10}",
        *(f"{name:36}{bits:>19}{n:>13}{s:>13}{single:11.4f}{pairs:10.4f}" for name, bits, n, s, single, pairs in rows),
        f"the floor is a mean of 10; their standard deviation is {floors.std(0)[0]:.4f} and {floors.std(0)[1]:.4f}"])
    print(table)
    with data.atomic(f"{out_dir}/compare_priors.txt") as file:
        file.write(table.encode() + b"\n")
    draw_bars(rows, f"{out_dir}/compare_priors.png")
    print(f"{out_dir}/compare_priors.txt and {out_dir}/compare_priors.png are ready")


if __name__ == "__main__":
    config = configure(globals())
    main()
