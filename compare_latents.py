"""
Which latents? Three questions on equal networks and images, each with its table and picture.

    python compare_latents.py --question=sizes         # how many codes, and how large a codebook: m x k
    python compare_latents.py --question=continuous    # codes or continuous latents (DisCo-Diff Table 3, App. G.5)
    python compare_latents.py --question=stages        # a prior trained afterwards, or along (sec. 5)
    python compare_latents.py --question=sizes --total_images=10_000 --num_images=500 --arms=8x16,32x2    # a first look
    python compare_latents.py --question=continuous --latents=10x100 --kld_weights="(0.1, 1.0)" \
        --stage1_config=config/imagenet64.py --total_images=2_500_000_000 --prior_config=config/imagenet64_prior.py \
        --diffusion_images=400_000_000 --num_images=50_000 --features=inception --out_dir=out/imagenet64-latents
                                                       # Table 3, at the paper's sizes

    sizes       4 x 256, 8 x 16, 16 x 4 and 32 x 2, all of 32 bits; and 8 x 4 and 8 x 64, of as many codes as 8 x 16
    continuous  plain EDM; codes of --latents, 8 x 16; and 8 latents of 16 numbers, with several weights of the KL
                divergence
    stages      8 x 16 in two stages and in one; the same while the encoder goes on learning; and the joint form, with
                several weights of the KL divergence from the prior that is trained along

Priors of codes take as many steps as stage 1, in batches as large, whether trained along or afterwards. For each arm:

    bits            that an image's latents tell, as stage 1's log has them; of continuous ones, their KL divergence
    codes used      of each latent, a mean (perplexity)
    prior, held-out bits of the codes of images that neither stage saw, or the loss of the diffusion prior; and, beside
                    it, the same of training images: a gap shows that the prior overfits
    near            distance of samples to the image whose latents they have, over that to another image of its class:
                    1 where latents say nothing, small where samples are copies (Fig. 17)
    oracle, drawn   FD of samples with latents of training images, and with the prior's

The other scripts do the work, in folders in out_dir, and what is finished is kept, as in compare_models.py. Arms and
seeds may run side by side, by --arms and --seeds, and then all together. Prints the table, writes it and all numbers to
out_dir/QUESTION.txt and .jsonl, and draws out_dir/QUESTION.png.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np

import data
from checkpoint import atomic, load_checkpoint, read_log
from compare_conditions import require_held_out
from compare_models import distance, require_seeds, run
from configurator import configure, require, require_numbers
from plot import COLOURS, Axes, figure

out_dir = "out/latents"
question = "sizes"
latents = "8x16"  # of the questions continuous and stages
arms = ""  # some of a question's arms; "": all
seeds = (0,)
total_images = 100_000  # that stage 1 trains on, and codes that a prior of codes does
diffusion_images = 400_000  # latents that a diffusion prior trains on
kld_weights = (0.1, 1.0, 10.0)  # of continuous latents
joint_weights = (0.3, 1.0, 3.0)  # of one-stage training
encoder_lr = 1e-4  # of an encoder that goes on learning
num_images = 2_000  # samples measured in each number
features = "classifier"  # for eval_fid.py; or "inception"
stage1_config = "config/finetune.py"  # for train_stage1.py
prior_config = ""  # for train_prior.py; its batch_size is the diffusion prior's alone

SIZES = ("4x256", "8x16", "16x4", "32x2", "8x4", "8x64")
COLUMNS = ("bits", "codes used", "prior, training", "held-out", "near", "oracle", "drawn")


def of_size(size):
    m, k = size.split("x")
    return [f"--num_latents={m}", f"--codebook_size={k}"]


def arms_of(question):
    """-> {arm: settings of train_stage1.py}"""
    two, along = of_size(latents), ["--prior=ar"]
    moving = [*two, f"--encoder_lr={encoder_lr}"]
    along += [f"--prior_config={prior_config}"] * (prior_config != "")
    return {
        "sizes": {size: of_size(size) for size in SIZES},
        "continuous": {"plain": ["--num_latents=0"], latents: two} | {
            f"kld{weight:g}": [*two, "--continuous=True", f"--kld_weight={weight}"] for weight in kld_weights},
        "stages": {latents: two, f"{latents}-one": [*two, *along],
                   "moving": moving, "moving-one": [*moving, *along]} | {
            f"joint{weight:g}": [*moving, *along, f"--kld_weight={weight}"] for weight in joint_weights},
    }[question]


def train(arm, settings, seed):
    """Trains stage 1 of an arm and seed, and its prior. -> their folder, the kind of prior, "" without latents"""
    kind = "" if arm == "plain" else "diffusion" if "--continuous=True" in settings else "ar"
    folder = Path(f"{out_dir}/{arm}-{total_images}{f'+{diffusion_images}' * (kind == 'diffusion')}-seed{seed}")
    same = (f"--seed={seed}", f"--out_dir={folder}")
    run("train_stage1.py", stage1_config, *settings, *same, f"--total_images={total_images}")
    if kind == "diffusion":
        run("train_prior.py", prior_config, *same, "--prior=diffusion", f"--total_images={diffusion_images}",
            f"--log_every={-(-diffusion_images // 20)}")
    elif kind and "--prior=ar" not in settings:
        batch = load_checkpoint(folder / "stage1.pt", "train_stage1")["config"]["batch_size"]
        run("train_prior.py", prior_config, *same, "--prior=ar", f"--batch_size={batch}",
            f"--total_images={-(-total_images // batch) * batch}")
    return folder, kind


def near(samples, dataset, held_out):
    """Mean distance of these samples (a file) to the images whose latents they have, over that to other images of the
    same class: a model that is told the class, and nothing else, has 1 too."""
    images, labels, _ = data.load(dataset)
    order = np.concatenate(data.split(len(images), held_out))  # as sample.py has it
    with np.load(samples) as file:
        x = file["images"].astype(np.float32)
    order = order[np.arange(len(x)) % len(order)]
    c = np.zeros(len(x)) if labels is None else labels[order]
    of_classes = [rows for rows in (np.flatnonzero(c == one) for one in np.unique(c)) if len(rows) > 1]
    rows, others = np.concatenate(of_classes), np.concatenate([np.roll(rows, 1) for rows in of_classes])
    own, other = (np.sqrt(((x[rows] - images[order[y]]) ** 2).mean((1, 2, 3))).mean() for y in (rows, others))
    return float(own / other)


def measure(folder, kind):
    """-> a dict of the COLUMNS that an arm has; its prior's "unit"; "log": [[codes seen, training, held-out], ...]"""
    config, stage1 = load_checkpoint(folder / "stage1.pt", "train_stage1")["config"], folder / "stage1.pt"
    dataset, unit = config["dataset"], "loss" if kind == "diffusion" else "bits"
    how = dataset, num_images, features

    def lines_of(log):
        return [json.loads(line) for line in read_log(folder / f"{log}.jsonl", math.inf)]

    if not kind:
        return dict(drawn=distance([stage1], "none", *how))
    last = lines_of("stage1")[-1]
    told = dict(bits=last["bits"]) | {"codes used": statistics.mean(last["perplexity"])} if kind == "ar" else \
        dict(bits=sum(last["kld"]))
    log = [[line["images"], line[unit], line[f"held_out_{unit}"]] for line in lines_of(f"prior_{kind}")]
    oracle = distance([stage1], "oracle", *how, f"--encode={dataset}")
    drawn = distance([stage1, folder / f"prior_{kind}.pt"], kind, *how, f"--prior={kind}")
    return told | {"prior, training": log[-1][1], "held-out": log[-1][2], "oracle": oracle, "drawn": drawn,
                   "near": near(folder / f"oracle-{num_images}.npz", dataset, config["held_out"]),
                   "unit": unit, "log": log}


# ----------------------------------------------------------------------------------------------------
# what is shown. found: {arm: [what `measure` returns, for each seed]}


def table(found):
    """-> lines, one for each arm: means over seeds, and their standard deviation"""
    lines = [f"{'':12}" + "".join(f"{column:>18}" for column in COLUMNS)]
    for arm, rows in found.items():
        line = f"{arm:12}"
        for column in COLUMNS:
            values = [row[column] for row in rows if column in row]
            spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            line += f"{f'{statistics.mean(values):.4g}{spread}' if values else '-':>18}"
        lines.append(line)
    return lines


def draw(found):
    """-> the picture: FD of each arm and seed; the priors' training and held-out curves (first seed), thin and thick"""
    numbers = {arm: i for i, arm in enumerate(found, 1)}

    def panel(title, name, x, y, width=440, **settings):
        room = max(y) + 0.12 * len(found) * (max(y) - min(y) or 1)  # for the legend
        return Axes((min(x), max(x)), (0.95 * min(y), room), title, name, size=(width, 380), **settings)

    points = {column: [(numbers[arm], row[column]) for arm, rows in found.items() for row in rows if column in row]
              for column in ("oracle", "drawn")}
    every = [value for of_column in points.values() for _, value in of_column]
    axes = [panel("FD of each seed", "", (0.5, len(numbers) + 0.5), every, 80 * len(numbers), names=[*found])]
    for (column, of_column), colour, aside in zip(points.items(), COLOURS, (-0.1, 0.1)):
        axes[0].scatter(np.array(of_column).reshape(-1, 2) + (aside, 0), colour, 4, label=column)
    for unit in ("bits", "loss"):
        logs = {arm: np.array(rows[0]["log"]) for arm, rows in found.items() if rows[0].get("unit") == unit}
        if logs:
            seen, *values = np.concatenate([*logs.values()]).T
            axes.append(panel(f"{unit} of the prior: held-out, and of training images (thin)", "codes seen, thousands",
                              (0, seen.max() / 1000), np.concatenate(values)))
            for arm, log in logs.items():
                colour = COLOURS[(numbers[arm] - 1) % len(COLOURS)]
                axes[-1].line(log[:, [0, 2]] / (1000, 1), colour, 2, dots=True, label=arm)
                axes[-1].line(log[:, [0, 1]] / (1000, 1), colour, 0.7)
    return figure([axes])


def main(argv=()):
    config = configure(globals(), argv)
    require(question in ("sizes", "continuous", "stages"), f"--question is sizes, continuous or stages, not {question}")
    require_numbers(config)
    require_seeds(seeds)
    require(re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", latents), f"--latents is a number of latents and of their values, "
            f"such as 8x16, not {latents}")
    require(num_images >= 10, f"num_images is 10 or more, not {num_images}")
    require(features in ("classifier", "inception"), f"--features is classifier or inception, not {features}")
    require(all(0 < weight < math.inf for weight in (*kld_weights, *joint_weights)),
            "kld_weights and joint_weights are positive, and finite")
    require_held_out(stage1_config)
    every = arms_of(question)
    chosen = arms.split(",") if arms else [*every]
    unknown = [arm for arm in chosen if arm not in every]
    require(not unknown, f"--arms of the question {question} are some of {','.join(every)}, not {', '.join(unknown)}")
    found = {arm: [measure(*train(arm, every[arm], seed)) for seed in seeds] for arm in chosen}
    lines = [f"{question}: {total_images:,} training images, {num_images:,} samples per number, seeds {seeds}"
             + "; +-: standard deviation" * (len(seeds) > 1), "", *table(found)]
    print("\n" + "\n".join(lines))
    rows = [json.dumps(dict(arm=arm, seed=seed) | row) for arm in found for seed, row in zip(seeds, found[arm])]
    for kind, text in (("txt", lines), ("jsonl", rows)):
        with atomic(f"{out_dir}/{question}.{kind}") as file:
            file.write(("\n".join(text) + "\n").encode())
    with atomic(f"{out_dir}/{question}.png") as file:
        draw(found).save(file, "png")
    print(f"{out_dir}/{question}.txt, .jsonl and .png are ready")


if __name__ == "__main__":
    main(sys.argv[1:])
