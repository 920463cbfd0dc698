"""
From one code to another: in the midst of sampling (DisCo-Diff Fig. 7, right), or one latent at a time.

    python interpolate.py                                       # of the model in out/: three minutes on one CPU core
    python interpolate.py --init_from=pretrained --num_pairs=8 --batch_size=8 --shares=0.5,0.75,0.9     # a quick look

Held-out images, in pairs of one class, give codes A and B. All images of a pair come from the same noise.

    switch      code A for a share of Heun's steps, then B: a share of 0.75 is 75 % in the paper's figure
    latents     latents of A, of which more and more, from the first on, are B's

Writes, in out_dir, interpolate.txt, the distances to the images of A and of B, and interpolate.png, their curves.
interpolate_switch.png and interpolate_latents.png have a pair in each row, from A's image to B's.
"""

import math
import sys

import numpy as np
import torch

import data
from checkpoint import atomic
from codes import of_images
from configurator import configure, require, require_numbers
from diffusion import heun, heun_step
from model import denoiser
from noise import SeededNoise
from plot import COLOURS, Axes, figure, save_grid
from processes import start_processes
from run import alone, progress, set_precision
from trained import classes_of, load_stage1, load_trained_on, load_vae, priors_of

out_dir = "out"  # folder of the model, and for what is written
init_from = ""  # another folder with the model; "pretrained": the repository's
device = "auto"
seed = 0
num_pairs = 64
batch_size = 32  # pairs at once
shown = 6  # pairs in the pictures
# of the steps that have code A, rounded to whole steps; 0 and 1 are always shown
shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
num_steps = 18

WAYS = {"switch": "steps with A", "latents": "latents of A"}


def pairs_of(order, labels, count):
    """-> int64 (count, 2): images, in this order, in pairs of one class; labels: (N,) int64, or None for no classes"""
    waiting, pairs = {}, []
    for i in order:
        label = 0 if labels is None else int(labels[i])
        if label in waiting:
            pairs.append((waiting.pop(label), i))
        else:
            waiting[label] = i
    require(count <= len(pairs), f"{count} pairs of images of one class are wanted: the data set has {len(pairs)}")
    return np.array(pairs[:count])


def codes_of_pairs(pairs, images, model, noises, place):
    """-> codes (B, m) of the first and of the second image of each pair (B, 2), by two `SeededNoise` for B codes"""
    return [of_images(images, None, of_pair, model)(np.arange(len(pairs)), noise)[0].to(place)
            for of_pair, noise in zip(pairs.T, noises)]


def share_of_steps():
    """-> the shares of the steps with code A, in whole steps, from 1 to 0, which are always among them"""
    return sorted({1.0, 0.0, *(round(share * num_steps) / num_steps for share in shares)}, reverse=True)


def switched(first, second, noise, shares):
    """Heun's method by `first` for a share of its steps, then by `second`. -> samples (len(shares), B, ...)

    first, second: denoise(x, sigma); noise: of scale 1, (B, ...). The shares 1 and 0 are `heun` with one of them.
    """
    path, samples = [], []
    heun(first, noise, num_steps, steps=path)  # (t, x) at the start of each step, and at the end
    for share in shares:
        done = round(share * num_steps)
        x = path[done][1]
        for (t, _), (t_next, _) in zip(path[done:], path[done + 1:]):
            x = heun_step(second, x, t, t_next)
        samples.append(x)
    return torch.stack(samples)


def exchanged(a, b):
    """Codes (B, m) -> (m + 1, B, m): a, a with the first latent of b, ..., b."""
    m = a.shape[1]
    return torch.stack([torch.where(torch.arange(m, device=a.device) < n, b, a) for n in range(m + 1)])


def measure(place):
    """-> {way: images uint8 (K, num_pairs, H, W, C), the first those of code A, the last those of B}; names of the
    pairs' classes, () without classes"""
    folder = init_from or out_dir
    model, checkpoint = load_stage1(folder, place)
    require(model.num_latents and priors_of(checkpoint["model_args"])[0] == "codes",
            f"{folder}/stage1.pt has no codes to change")
    vae, names = load_vae(checkpoint, place), classes_of(checkpoint)
    images, labels, train, held_out = load_trained_on(checkpoint["config"], f"{folder}/stage1.pt")
    pairs = pairs_of(np.concatenate([held_out, train]), labels if model.label_dim else None, num_pairs)
    found = {way: [] for way in WAYS}
    for numbers in progress(np.split(np.arange(num_pairs), range(batch_size, num_pairs, batch_size)), unit="batch"):
        noises = [SeededNoise("codes", seed + 2 * numbers + i, place) for i in (0, 1)]
        a, b = codes_of_pairs(pairs[numbers], images, model, noises, place)
        c = torch.from_numpy(labels[pairs[numbers, 0]]).to(place) if model.label_dim else None
        noise = model.noise(SeededNoise("images", seed + numbers, place))
        of_a, of_b, *between = (denoiser(model, c, z) for z in (a, b, *exchanged(a, b)))
        for way, samples in (("switch", switched(of_a, of_b, noise, share_of_steps())),
                             ("latents", [heun(denoise, noise, num_steps) for denoise in between])):
            found[way].append(np.stack([data.to_uint8(x, vae) for x in samples]))
    return {way: np.concatenate(parts, axis=1) for way, parts in found.items()}, \
        [names[c] for c in labels[pairs[:, 0]]] if model.label_dim else ()


# ----------------------------------------------------------------------------------------------------
# what is shown


def distances(images):
    """Images (K, B, H, W, C) -> their distances to the first of the K and to the last, (2, K), and standard errors

    A distance is the root mean square over pixels, in -1 ... 1; means over the B pairs.
    """
    x = images.astype(np.float32) / 127.5
    of_pairs = np.stack([np.sqrt(((x - end) ** 2).mean((2, 3, 4))) for end in (x[0], x[-1])])  # (2, K, B)
    return of_pairs.mean(2), of_pairs.std(2) / math.sqrt(max(of_pairs.shape[2] - 1, 1))


def largest_steps(images):
    """Images (K, B, H, W, C) of one latent after another -> of each pair, (B,): the largest share of the way from the
    first image to the last that one latent goes (1: it alone goes all of it), and how many latents change the image"""
    x = images.reshape(len(images), images.shape[1], -1).astype(np.float32)
    steps, way = np.diff(x, axis=0), x[-1] - x[0]
    shares = (steps * way).sum(2) / np.maximum((way ** 2).sum(1), 1e-9)  # (K - 1, B): they add up to 1
    return shares.max(0), steps.any(2).sum(0)


def points(way, images):
    """-> how much is A's in each of the images (K, ...) of a way, from 1 to 0: of the steps, or of the latents"""
    latents = len(images) - 1
    return share_of_steps() if way == "switch" else [1 - n / latents for n in range(latents + 1)]


def table(found):
    """found: as from `measure` -> lines"""
    lines = [f"{num_pairs} pairs, {num_steps} steps; rms over pixels in -1 ... 1; +-: standard error over pairs"]
    for way, images in found.items():
        lines += ["", f"{WAYS[way]:>14}{'to the image of A':>24}{'to the image of B':>24}"]
        for share, *ends in zip(points(way, images), *np.stack(distances(images), 2)):  # distance and error, to A, to B
            lines.append(f"{100 * share:12.0f} %" + "".join("{:>14.4f} +- {:.4f}".format(*end) for end in ends))
    largest, changes = largest_steps(found["latents"])
    low, median, high = np.quantile(largest, (0.1, 0.5, 0.9))
    return [*lines, "", f"the latent that moves a pair's image most goes {median:.2f} of the way from A to B (median; "
            f"first and last decile: {low:.2f}, {high:.2f}); "
            f"{changes.mean():.1f} of {len(found['latents']) - 1} latents change the image"]


def draw(found):
    """-> the picture of the curves"""
    row = []
    for way, images in found.items():
        to_ends, _ = distances(images)
        axes = Axes((0, 1), (0, 1.3 * max(to_ends.max(), 1e-9)), "", f"share of {WAYS[way]}", "distance",
                    size=(420, 340))
        for values, name, colour in zip(to_ends, "AB", COLOURS):
            axes.line(np.stack([points(way, images), values], 1), colour, dots=True, label=f"to the image of {name}")
        row.append(axes)
    return figure([row])


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, or_zero=("seed",))
    require(all(0 <= share <= 1 for share in shares), f"shares of the steps are in 0 ... 1, not {shares}")
    require(shown <= num_pairs, f"shown {shown} exceeds num_pairs {num_pairs}")
    _, world, place = start_processes(device)
    require(world == 1, "interpolate.py runs as one process, without torchrun")
    set_precision("fp32", place)
    with alone(f"{out_dir}/interpolate"):
        found, titles = measure(place)
        lines = table(found)
        print("\n".join(lines))
        with atomic(f"{out_dir}/interpolate.txt") as file:
            file.write(("\n".join(lines) + "\n").encode())
        with atomic(f"{out_dir}/interpolate.png") as file:
            draw(found).save(file, "png", optimize=True)
        for way, images in found.items():
            rows = images[:, :shown].swapaxes(0, 1).reshape(-1, *images.shape[2:])
            save_grid(rows, f"{out_dir}/interpolate_{way}.png", len(images), titles[:shown])
        print(f"{out_dir}/interpolate.txt and .png, interpolate_switch.png and interpolate_latents.png are ready")


if __name__ == "__main__":
    main(sys.argv[1:])
