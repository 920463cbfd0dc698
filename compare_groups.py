"""
What does each group of latents decide? Group-hierarchical DisCo-Diff (sec. 3.3, 4.1; Figs. 6, 15, 16).

    python compare_groups.py
    python compare_groups.py --total_images=20_000 --prior_images=20_000 --references=8 --draws=8    # a first look
    python compare_groups.py --runs=out/hierarchical                  # of models that are trained, with both priors

Two models train, each with both kinds of priors: one whose latents are in groups, and one whose latents all go
everywhere, where the same positions are called groups. Held-out images give codes, of which two kinds of variants show
what a group decides:

    fixed        groups of an image's code are fixed, and a prior draws the others, given these: the autoregressive
                 prior if the first groups are fixed, SEDD also if any single one is
    exchanged    a group is another image's, all others stay

An image is the sum of three parts, whose squares add up to its own:

    intensity    the mean of each channel: brightness, colour
    layout       the image averaged over blocks of `block` x `block` pixels, less that mean
    texture      the rest

The table has shares of the variance of an image whose whole code is drawn. "in order": what is gone when a group is
fixed, beyond those before it; noise has the rest. "alone": what is gone when this group alone is fixed. "exchanged":
half the mean square of the change, from the same noise; no prior has a part in it, and shares don't add up.
+-: standard error over images.

Writes compare_groups.txt and .json to out_dir, and two pictures to each model's folder: groups_exchanged.png (Fig. 6,
top) and groups_fixed.png (bottom). What is finished is kept: an interrupted comparison continues.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from checkpoint import atomic
from compare_models import done, run
from configurator import configure, require, require_numbers
from diffusion import heun
from interpolate import codes_of_pairs, pairs_of
from model import denoiser
from noise import SeededNoise
from plot import save_grid
from processes import start_processes
from run import progress, set_precision
from trained import load_prior, load_stage1, load_trained_on, load_vae, priors_of

out_dir = "out/groups"
runs = ""  # folders of trained models, separated by commas, in place of the two that train here
seed = 0
total_images = 100_000  # that each model trains on
prior_images = 100_000  # codes that each prior trains on
stage1_config = "config/hierarchical.py"  # for train_stage1.py
prior_config = ""  # for train_prior.py
references = 32  # held-out images whose codes are fixed
draws = 12  # samples of each, with the rest of the code drawn anew
num_steps = 18
block = 4  # pixels per side that layout averages over
shown = 8  # samples of a row in the pictures
batch_size = 128
device = "auto"

PARTS = ("intensity", "layout", "texture")
PRIORS = {"ar": "AR", "sedd": "SEDD"}

# ----------------------------------------------------------------------------------------------------
# training, and samples


def train(name, settings):
    """-> the folder of a trained model and its two priors"""
    folder = f"{out_dir}/{name}-{total_images}+{prior_images}-seed{seed}"
    run("train_stage1.py", stage1_config, f"--out_dir={folder}", f"--total_images={total_images}", f"--seed={seed}",
        *settings)
    for prior in PRIORS:
        run("train_prior.py", prior_config, f"--prior={prior}", f"--out_dir={folder}", f"--seed={seed}",
            f"--total_images={prior_images}")
    return folder


def variants(groups, a, b, priors, labels, seeds):
    """-> {(how, groups): codes (B, m)}, variants of the codes a (B, m): ("ar", (1, 2)) is what that prior draws given
    groups 1 and 2, ("exchanged", (1,)) group 1 of b

    labels: (B,) or None; seeds: int64 (B,), of what is drawn
    """
    group = torch.arange(a.shape[1], device=a.device) // (a.shape[1] // groups) + 1  # (m,): of each latent
    everything = tuple(range(1, groups + 1))
    prefixes = [everything[:g] for g in range(groups)]
    found = {("fixed", everything): a}
    for kind, prior in priors.items():
        for fixed in prefixes + [(g,) for g in everything[1:]] * (kind == "sedd"):
            given = a.masked_fill(~torch.isin(group, torch.tensor(fixed, device=a.device)), -1)
            found[kind, fixed] = prior.sample(SeededNoise("codes", seeds, a.device), labels, given=given).to(a.device)
    for these in [*((g,) for g in everything), everything]:
        found["exchanged", these] = torch.where(torch.isin(group, torch.tensor(these, device=a.device)), b, a)
    return found


def samples_of(folder, groups, place):
    """-> {(how, groups): images uint8 (references, draws, H, W, C)}, named as in `variants`, all from the same noise;
    the references (references, H, W, C)"""
    model, checkpoint = load_stage1(folder, place)
    vae, priors = load_vae(checkpoint, place), {kind: load_prior(folder, kind, place, checkpoint) for kind in PRIORS}
    images, labels, train, held_out = load_trained_on(checkpoint["config"], f"{folder}/stage1.pt")
    pairs = pairs_of(np.concatenate([held_out, train]), labels if model.label_dim else None, references)
    made = {}
    seeds = np.arange(references * draws)
    for part in progress(np.split(seeds, range(batch_size, len(seeds), batch_size)), desc=folder, unit="batch"):
        of_pair = part // draws
        noises = [SeededNoise("references", 2 * of_pair + i, place) for i in (0, 1)]
        a, b = codes_of_pairs(pairs[of_pair], images, model, noises, place)
        c = torch.from_numpy(labels[pairs[of_pair, 0]]).to(place) if model.label_dim else None
        noise = model.noise(SeededNoise("images", part, place))
        for key, z in variants(groups, a, b, priors, c, part).items():
            made.setdefault(key, []).append(data.to_uint8(heun(denoiser(model, c, z), noise, num_steps), vae))
    return {key: np.concatenate(parts).reshape(references, draws, *images.shape[1:]) for key, parts in made.items()}, \
        images[pairs[:, 0]]


# ----------------------------------------------------------------------------------------------------
# measures


def parts_of(images):
    """Images uint8 (..., H, W, C) -> the parts that add up to them, in -1 ... 1: float (len(PARTS), ..., C, H, W)"""
    x = torch.from_numpy(images).movedim(-1, -3) / 127.5 - 1
    mean = x.mean((-2, -1), keepdim=True).expand_as(x)
    averaged = F.interpolate(F.avg_pool2d(x.flatten(0, -4), block), scale_factor=block).view_as(x)
    return torch.stack([mean, averaged - mean, x - averaged])


def of_parts(values):
    """Squares (len(PARTS), R, ...) -> their means over all but R, and the sum of the parts: (len(PARTS) + 1, R)"""
    values = values.flatten(2).double().mean(2)
    return torch.cat([values, values.sum(0, keepdim=True)])


def ratio(part, whole):
    """Ratio of two means over images, (P, R) each -> (P, R), whose means are the ratio, and whose standard errors are
    the ratio's, to first order: both means are of the same images (delta method)."""
    mean = whole.mean(1, keepdim=True)
    share = part.mean(1, keepdim=True) / mean
    return share + (part - share * whole) / mean


def shares(found, groups):
    """found: as from `samples_of` -> {title: {row: shares (len(PARTS) + 1, references) of the variance, by `ratio`}}"""
    everything = tuple(range(1, groups + 1))
    spread = {key: of_parts(parts_of(x).var(2)) for key, x in found.items() if key[0] != "exchanged"}
    whole = {kind: spread[kind, ()] for kind in PRIORS}
    rows = {}
    for kind, name in PRIORS.items():
        left = [spread[kind, everything[:g]] for g in range(groups)] + [spread["fixed", everything]]
        of_groups = {f"group {g + 1}": ratio(left[g] - left[g + 1], whole[kind]) for g in range(groups)}
        rows[f"in order, {name}"] = of_groups | {"noise": ratio(left[-1], whole[kind])}
    alone = {f"group {g}": ratio(whole["sedd"] - spread["sedd", (g,)], whole["sedd"]) for g in everything}
    changes = {these: of_parts((parts_of(found["exchanged", these]) - parts_of(found["fixed", everything])) ** 2) / 2
               for these in [*((g,) for g in everything), everything]}
    exchanged = {"all groups" if len(these) > 1 else f"group {these[0]}": ratio(change, whole["ar"])
                 for these, change in changes.items()}
    return rows | {"alone, SEDD": alone, "exchanged": exchanged}


def draw(folder, found, images, groups, count=2):
    """Writes the two pictures, of the first `count` references, images (references, H, W, C)."""
    everything = tuple(range(1, groups + 1))
    named = {these: f"group{'s' * (len(these) > 1)} {', '.join(map(str, these))}" if these else "nothing"
             for _, these in found}
    swapped = {key: "code B" if key[1] == everything else f"{named[key[1]]} of B"
               for key in found if key[0] == "exchanged"}
    fixed = {key: f"{named[key[1]]} fixed" + (f", {PRIORS[key[0]]}" if key[0] in PRIORS else "")
             for key in sorted(found) if key[0] != "exchanged"}
    pictures = {"exchanged": {("fixed", everything): "code A"} | swapped, "fixed": fixed}
    for name, rows in pictures.items():
        grid = [np.concatenate([images[i:i + 1]] * (name == "fixed") + [found[key][i, :shown]])
                for i in range(count) for key in rows]
        save_grid(np.concatenate(grid), f"{folder}/groups_{name}.png", len(grid[0]), [*rows.values()] * count)


def measure(folder, groups, place):
    """-> {title: {row: {part: [share, standard error]}}} of a model; draws its pictures"""
    path = Path(f"{folder}/groups-{groups}-{references}x{draws}-{num_steps}-{block}-{shown}.json")
    made = path, *(Path(f"{folder}/groups_{name}.png") for name in ("exchanged", "fixed"))
    trained = Path(f"{folder}/stage1.pt"), *(Path(f"{folder}/prior_{kind}.pt") for kind in PRIORS)
    if not all(done(file, *trained) for file in made):
        found, images = samples_of(folder, groups, place)
        draw(folder, found, images, groups)
        result = {title: {row: {part: [value.mean().item(), value.std().item() / math.sqrt(references)]
                                for part, value in zip((*PARTS, "image"), values)} for row, values in rows.items()}
                  for title, rows in shares(found, groups).items()}
        with atomic(path) as file:
            file.write(json.dumps(result, indent=1).encode())
    return json.loads(path.read_text())


def table(measured):
    """measured: {model: what `measure` returns} -> lines"""
    lines = []
    for model, found in measured.items():
        lines += ["", model, " " * 24 + "".join(f"{part:>18}" for part in (*PARTS, "image"))]
        for title, rows in found.items():
            lines.append(title)
            lines += [f"  {row:22}" + "".join(f"{f'{100 * share:.1f} +- {100 * error:.1f} %':>18}"
                                              for share, error in of_row.values()) for row, of_row in rows.items()]
    return lines


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, or_zero=("seed",))
    require(references > 1 and draws > 1, f"references {references} and draws {draws} are 2 or more")
    _, world, place = start_processes(device)
    require(world == 1, "compare_groups.py runs as one process, without torchrun")
    set_precision("fp32", place)
    folders = [folder.strip() for folder in runs.split(",")] if runs else \
        [train("groups", []), train("together", ["--groups=0"])]
    of_runs = [load_stage1(folder)[1]["model_args"] for folder in folders]
    counts = {args.get("groups", 0) for args in of_runs} - {0, 1}
    require(len(counts) == 1 and len({args["num_latents"] for args in of_runs}) == 1,
            f"{', '.join(folders)}: a model with groups of latents is wanted; others have as many groups, or none, "
            "and as many latents")
    require(all(priors_of(args)[0] == "codes" for args in of_runs),
            f"{', '.join(folders)}: priors continue codes, not continuous latents")
    sizes, groups = {args["img_resolution"] for args in of_runs}, counts.pop()
    require(all(1 < block < size and size % block == 0 for size in sizes),
            f"block {block} must divide images of {' and '.join(map(str, sorted(sizes)))} pixels, and not be 1 or all")
    measured = {f"{folder}" + " (no groups)" * (args.get("groups", 0) < 2): measure(folder, groups, place)
                for folder, args in zip(folders, of_runs)}
    lines = [f"{references} images, {draws} samples of each; shares of the variance; +-: standard error over images",
             *table(measured)]
    print("\n".join(lines))
    for kind, text in (("txt", "\n".join(lines) + "\n"), ("json", json.dumps(measured, indent=1))):
        with atomic(f"{out_dir}/compare_groups.{kind}") as file:
            file.write(text.encode())
    print(f"{out_dir}/compare_groups.txt and .json are ready; the pictures are in the models' folders")


if __name__ == "__main__":
    main(sys.argv[1:])
