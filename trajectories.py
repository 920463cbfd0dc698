"""
Are trajectories straighter with codes? Trained image models side by side (DisCo-Diff sec. 3.2, App. F.3).

    python trajectories.py --runs=out/edm,out           # plain EDM and DisCo-Diff: six minutes on one CPU core
    python trajectories.py --runs=pretrained --num_images=64

--runs: folders of train_stage1.py, trained on one data set. A model with codes is measured with those
that its encoder draws for held-out images ("oracle codes") and, where the folder has prior_ar.pt, with
codes of the prior. All models start from the same noise; class-conditional ones are told the same
images' classes. The measures:

    sampling error   rms over pixels, which lie in -1 ... 1, between Heun's method with few steps and with
                     `reference_steps`, from the same noise. A straight trajectory needs one step
    curvature        of the trajectories, 1 / radius in the space of all pixels; the median over images
    loss             lambda(sigma) |D - y|^2 / pixels on held-out images; with null codes too (Fig. 7, left)

Each is taken in parts of `batch_size` images; +- is the standard error of the mean over parts. A ratio
is taken part by part, from the same noise, so that its error is the smaller one. These errors speak of
the models at hand; training with another seed differs too, and compare_models.py has several.

Prints tables. Writes them to out_dir/trajectories.txt, and their numbers to trajectories.json, as
{folder, source of codes: {measure: {steps or noise level: [mean, error]}}}; draws them in trajectories.png.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import data
from checkpoint import atomic
from codes import of_images
from configurator import configure, require, require_numbers
from diffusion import curvature, heun, loss_at, noise_levels
from model import denoiser
from noise import SeededNoise
from plot import COLOURS, Axes, figure
from processes import start_processes
from run import alone, progress, set_precision
from trained import load_prior, load_stage1, load_trained_on, path_of

out_dir = "out"
runs = "out"  # folders, separated by commas; ratios are to the first
device = "auto"
seed = 0
num_images = 256
batch_size = 32  # images in a part
num_steps = (3, 5, 9, 18)  # of Heun's method
reference_steps = 64
sigmas = (0.02, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 80.0)  # of the loss

ORACLE, PRIOR, NULL = "oracle codes", "codes of the prior", "null codes"

# ----------------------------------------------------------------------------------------------------
# measures. An arm is a model with codes from one of these sources.


def denoisers(model, prior, images, labels, chosen, seeds):
    """-> {source of codes: denoise(x, sigma)} of a trained model; without codes, the source is ""

    images, labels: the data set; chosen: the images that give classes and codes, int64 (B,);
    seeds: of the codes, int64 (B,).
    """
    place = next(model.parameters()).device
    c = torch.from_numpy(labels[chosen]).to(place) if model.label_dim else None
    if not model.num_latents:
        return {"": denoiser(model, c)}
    oracle = of_images(images, None, chosen, model)
    codes = {ORACLE: oracle(np.arange(len(chosen)), SeededNoise("codes", seeds, place))[0]}
    if prior:
        codes[PRIOR] = prior.sample(SeededNoise("codes", seeds, place), c)
    found = {source: denoiser(model, c, z.to(place)) for source, z in codes.items()}
    return found | {NULL: denoiser(model, c, codes[ORACLE].to(place), guidance=0)}


def measure(denoise, source, noise, y, loss_noise, sigma_data):
    """-> {title: values}, the measures of a batch at `levels`

    noise: where trajectories start, of scale 1, shaped like the clean images y (B, ...); loss_noise:
    of scale 1, (B, len(sigmas), ...). Null codes have a loss alone. The prior's have none: they are not
    the codes of y.
    """
    found = {}
    if source != NULL:
        path = []
        reference = heun(denoise, noise, reference_steps, steps=path)
        found["sampling error"] = [(heun(denoise, noise, n) - reference).square().mean().sqrt() for n in num_steps]
        found["curvature"] = [curvature(denoise, x, t, t / 100).median() for t, x in path[:-1:4]]
    if source != PRIOR:
        found["loss"] = [loss_at(denoise, y, n, torch.tensor(sigma), sigma_data).mean()
                         for n, sigma in zip(loss_noise.unbind(1), sigmas)]
    return {title: torch.stack(values).tolist() for title, values in found.items()}


def levels():
    """-> {title: where its values are taken}, numbers of steps or noise levels"""
    along = noise_levels(reference_steps, sigma_min=0.002, sigma_max=80, rho=7)[::4].tolist()  # as in `measure`
    return {"sampling error": num_steps, "curvature": along, "loss": sigmas}


def measure_all(place):
    """-> {arm: {title: array (parts, levels)}} of all runs, arms named by folder and source of codes"""
    loaded, measured = {}, {}
    for folder in map(str.strip, runs.split(",")):
        model, checkpoint = load_stage1(folder, place)
        has_prior = model.num_latents and Path(path_of(folder), "prior_ar.pt").is_file()
        loaded[folder] = model, load_prior(folder, "ar", place, checkpoint) if has_prior else None, checkpoint["config"]
    folder, (model, _, config) = next(iter(loaded.items()))
    require(all(m.x_shape == m.img_shape for m, *_ in loaded.values()),
            f"--runs={runs}: denoisers of pixels are wanted")
    images, labels, train, held_out = load_trained_on(config, f"{folder}/stage1.pt")
    require(len({config["data_identity"] for *_, config in loaded.values()}) == 1,
            f"--runs={runs} were trained on different data sets: compare models of one")
    order = np.concatenate([held_out, train])
    require(num_images <= len(order), f"num_images is {num_images}: the data set has {len(order)} images")
    for folder, (model, prior, _) in loaded.items():
        for numbers in progress(np.split(np.arange(num_images), num_images // batch_size), desc=folder, unit="part"):
            chosen, seeds = order[numbers], seed + numbers
            noise = model.noise(SeededNoise("images", seeds, place))
            loss_noise = model.noise(SeededNoise("losses", seeds, place), len(sigmas))
            y = data.to_float(images[chosen]).to(noise.device)
            for source, denoise in denoisers(model, prior, images, labels, chosen, seeds).items():
                of_arm = measured.setdefault(f"{folder}, {source}".removesuffix(", "), {})
                for title, values in measure(denoise, source, noise, y, loss_noise, model.sigma_data).items():
                    of_arm.setdefault(title, []).append(values)
    return {arm: {title: np.array(parts) for title, parts in found.items()} for arm, found in measured.items()}


# ----------------------------------------------------------------------------------------------------
# what is shown. measured: as from `measure_all`


def mean_and_error(values):
    """(parts, levels) -> mean over parts and its standard error, (levels, 2)"""
    return np.stack([values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5], 1)


def tables(measured):
    """-> lines: for each measure a row for each level, a column for each arm, and one for its ratio to the first"""
    letters = dict(zip(measured, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    lines = [f"{letter}  {arm}" for arm, letter in letters.items()]
    notes = {"sampling error": f"rms of the difference to {reference_steps} steps, by number of steps",
             "curvature": "median over images, by noise level",
             "loss": "lambda(sigma) |D - y|^2 / pixels, by noise level"}
    for title, at in levels().items():
        columns = {letters[arm]: found[title] for arm, found in measured.items() if title in found}
        columns |= {f"{letter} / A": values / columns["A"] for letter, values in columns.items() if letter != "A"}
        lines += ["", f"{title}: {notes[title]}", " " * 8 + "".join(f"{head:>20}" for head in columns)]
        for level, *row in zip(at, *map(mean_and_error, columns.values())):
            lines.append(f"{level:8.3g}" + "".join(f"{f'{mean:#.3g} +- {error:.1g}':>20}" for mean, error in row))
    return lines


def draw(measured):
    """-> the picture: means over parts, against evaluations or noise levels; below, ratios to the first arm"""
    rows = []
    for relative in (False, True):
        row = []
        for title, at in levels().items():
            x, name = np.array(at), "noise level"
            if title == "sampling error":
                x, name = 2 * x - 1, "evaluations"
            values = {arm: found[title] for arm, found in measured.items() if title in found}
            first = values[next(iter(values))] if relative else 1
            curves = {arm: (of_arm / first).mean(0) for arm, of_arm in values.items()}
            low, high = np.min([*curves.values()]), np.max([*curves.values()])
            room = 1.5 * (high / low) ** (0.07 * len(curves))  # for the legend
            ylim = (0, 1.1 * high) if relative else (low / 1.5, high * room)
            axes = Axes((min(x) / 1.2, max(x) * 1.2), ylim, title + ", ratio to the first" * relative, name,
                        log_x=True, log_y=not relative, size=(420, 340))
            for arm, colour in zip(measured, COLOURS):
                if arm in curves:
                    label = "" if relative else arm.split("/")[-1]
                    axes.line(np.stack([x, curves[arm]], 1), colour, 2, dots=True, label=label)
            row.append(axes)
        rows.append(row)
    return figure(rows)


# ----------------------------------------------------------------------------------------------------
# the run


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, or_zero=("seed",))
    require(num_images % batch_size == 0 and num_images > batch_size,
            f"num_images {num_images} are two parts or more, of batch_size {batch_size} images each")
    require(num_steps and 0 < min(num_steps) and max(num_steps) < reference_steps,
            f"num_steps are positive and below reference_steps {reference_steps}, not {num_steps}")
    require(sigmas and 0 < min(sigmas) and max(sigmas) < 1e4, f"sigmas are positive and below 10,000, not {sigmas}")
    require(all(map(str.strip, runs.split(","))), f"--runs={runs}: folders of train_stage1.py, separated by commas")
    _, world, place = start_processes(device)
    require(world == 1, "trajectories.py runs as one process, without torchrun")
    set_precision("fp32", place)
    with alone(f"{out_dir}/trajectories"):
        measured = measure_all(place)
        text = "\n".join([f"{num_images} images in parts of {batch_size}; +-: standard error of the mean over parts",
                          *tables(measured)])
        print(text)
        results = {arm: {title: dict(zip(map("{:.3g}".format, levels()[title]), mean_and_error(values).tolist()))
                         for title, values in found.items()} for arm, found in measured.items()}
        for name, content in (("txt", text + "\n"), ("json", json.dumps(results, indent=1))):
            with atomic(f"{out_dir}/trajectories.{name}") as file:
                file.write(content.encode())
        with atomic(f"{out_dir}/trajectories.png") as file:
            draw(measured).save(file, "png", optimize=True)
        print(f"{out_dir}/trajectories.txt, .json and .png are ready")


if __name__ == "__main__":
    main(sys.argv[1:])
