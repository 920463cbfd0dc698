"""
Do codes help other processes than EDM? PFGM++, flow matching and VDM++'s weighting, each with codes and without.

    python compare_processes.py                                     # two seeds, all arms
    python compare_processes.py --seeds="(0,)" --arms=edm,flow      # a part of it, for a first look, or side by side
    python compare_processes.py --stage1_config=config/finetune.py --base_images=100_000 --total_images=50_000 \
        --num_images=2_000 --num_held_out=256 --num_steps="(3,5,9,18)" --out_dir=out/compare-processes-long

For each seed and arm, as in compare_models.py: a plain model trains on base_images. From there two models see
total_images more, in the same order: the plain one, trained on, and one that gets codes and a prior. All have the same
network, images and settings, but for the arm's. Codes are the same in all arms of a seed, since the encoder learns them
before (coarse.py). Two questions have a pair of their own, so that a difference has one cause:

    edm12, monotonic    EDM's noise levels, N(-1.2, 1.2^2), on which VDM++'s objective builds: EDM's weight and VDM++'s
    attended, null      models of the arm "edm": codes that attention alone reads, and a null token beside them

eval_fid.py measures samples after few and many evaluations of the denoiser (NFE), all by EDM's sampler, and for flow
matching by its own too; trajectories.py measures the loss at each noise level, with EDM's weight, and the sampling
error.

The other scripts do the work, in folders in out_dir, and what is finished is kept: an interrupted comparison
continues. Arms and seeds may run side by side, each with OMP_NUM_THREADS=1, and then all together; prepare what they
share by `python eval_fid.py --features=classifier --images=`. Prints tables, writes them to
out_dir/compare_processes.txt, and draws out_dir/compare_processes.png.
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np

from checkpoint import atomic, load_checkpoint
from compare_models import distance, done, require_seeds, run
from configurator import configure, require
from plot import COLOURS, Axes, Legend, figure

out_dir = "out/compare-processes"
arms = "edm,pfgm512,pfgm32,flow,edm12,monotonic"
seeds = (0, 1)
base_images = 24_000  # that the plain model trains on, from which the others start
total_images = 12_000  # that each of these trains on, from there
num_images = 1_000  # samples measured in each row
num_held_out = 64  # images whose trajectories and losses are measured: parts of 32, two or more
num_steps = (3, 5, 18)  # of Heun's method: 5, 9 and 35 evaluations
stage1_config = "config/processes.py"  # a config file for train_stage1.py, of all models
prior_config = ""  # a config file for train_prior.py

ARMS = {  # name: title, settings of train_stage1.py. An image has 784 dimensions; D / 784 is as in PFGM++'s on CIFAR-10
    "edm": ("EDM", []),
    "pfgm512": ("PFGM++, D = 512", ["--process=pfgm++", "--pfgm_D=512"]),
    "pfgm32": ("PFGM++, D = 32", ["--process=pfgm++", "--pfgm_D=32"]),
    "flow": ("flow matching", ["--process=flow"]),
    "edm12": ("EDM, N(-1.2, 1.2^2)", ["--P_mean=-1.2", "--P_std=1.2"]),
    "monotonic": ("VDM++, N(-1.2, 1.2^2)", ["--P_mean=-1.2", "--P_std=1.2", "--weighting=edm-monotonic"])}
MODELS = {  # the same
    "plain": ("plain", ["--num_latents=0"]),
    "codes": ("codes", []),
    "attended": ("attended codes", ["--latents_to_emb=False"]),
    "null": ("with a null token", ["--latents_to_emb=False", "--null_token=True"])}


def models_of(arm):
    return MODELS if arm == "edm" else ("plain", "codes")


def odes_of(arm):
    return ("edm", "flow-heun") if arm == "flow" else ("edm",)


def train(arm, seed):
    """Trains the models of an arm and seed. -> {model: its folder}"""
    _, settings = ARMS[arm]
    base = f"{out_dir}/{arm}-base-{base_images}-seed{seed}"
    run("train_stage1.py", stage1_config, *settings, "--num_latents=0", f"--total_images={base_images}",
        f"--seed={seed}", f"--out_dir={base}")
    folders = {}
    for model in models_of(arm):
        folders[model] = folder = Path(f"{out_dir}/{arm}-{model}-{base_images}+{total_images}-seed{seed}")
        run("train_stage1.py", stage1_config, *settings, *MODELS[model][1], f"--total_images={total_images}",
            f"--seed={1000 + seed}", f"--init_from={base}", f"--out_dir={folder}")
        if model != "plain":
            run("train_prior.py", prior_config, "--prior=ar", f"--seed={seed}", f"--out_dir={folder}")
    return folders


def measure(arm, folders, dataset):
    """Samples of an arm's models, and their trajectories.

    -> {(measure, ode, model): {evaluations or noise level: value}}
    """
    checkpoints = {model: [*folder.glob("*.pt")] for model, folder in folders.items()}
    trajectories, found = folders["codes"] / f"trajectories-{num_held_out}" / "trajectories.json", {}
    if not done(trajectories, *(path for paths in checkpoints.values() for path in paths)):
        run("trajectories.py", f"--runs={','.join(map(str, folders.values()))}", f"--num_images={num_held_out}",
            f"--out_dir={trajectories.parent}")
    of_arms = json.loads(trajectories.read_text())
    for model, folder in folders.items():
        of_model = of_arms[f"{folder}" + ", oracle codes" * (model != "plain")]
        found["loss", "edm", model] = {float(level): mean for level, (mean, _) in of_model["loss"].items()}
        found["sampling error", "edm", model] = {
            2 * int(steps) - 1: mean for steps, (mean, _) in of_model["sampling error"].items()}
        for ode in odes_of(arm):
            found["FD-classifier", ode, model] = {}
            for steps in num_steps:
                found["FD-classifier", ode, model][2 * steps - 1] = distance(
                    checkpoints[model], f"{ode}-{steps}", dataset, num_images, "classifier", f"--num_steps={steps}",
                    f"--ode={ode}")
    return found


# ----------------------------------------------------------------------------------------------------
# what is shown. measured: {arm: [what `measure` returns, for each seed]}


def rows_of(measured, key):
    """-> [title, model, values (seeds, levels), ratios to the arm's plain model by the same ODE], and the levels"""
    rows = []
    for arm, of_seeds in measured.items():
        kinds = [(ode, model) for ode in odes_of(arm) for model in models_of(arm) if (key, ode, model) in of_seeds[0]]
        for ode, model in kinds:
            values, plain = (np.array([[*found[key, ode, m].values()] for found in of_seeds]) for m in (model, "plain"))
            title = f"{ARMS[arm][0]}{', its ODE' * (ode != 'edm')}"
            rows.append((title, model, values, values / plain))
    return rows, [*next(iter(measured.values()))[0][key, "edm", "plain"]]


def table(measured, key, note):
    """-> lines: for each model a row, with its mean over seeds at each level, and below it the ratios for each seed"""
    rows, levels = rows_of(measured, key)
    lines = ["", f"{key}: {note}", f"{'':44}" + "".join(f"  {level:16g}" for level in levels)]
    for title, model, values, ratios in rows:
        spread = [f" +- {statistics.stdev(v):.1g}" if len(v) > 1 else "" for v in values.T.tolist()]
        cells = [f"{mean:.3g}{of_level}" for mean, of_level in zip(values.mean(0), spread)]
        lines.append(f"{title:24}{MODELS[model][0]:20}" + "".join(f"  {cell:>16}" for cell in cells))
        if model != "plain":
            cells = [" ".join(f"{ratio:.3f}" for ratio in of_level) for of_level in ratios.T]
            lines.append(f"{'':24}{'  ratio to plain':20}" + "".join(f"  {cell:>16}" for cell in cells))
    return lines


def draw(measured):
    """-> the picture: FD-classifier, plain and with codes; below, ratios to plain, of FD-classifier and of the loss

    Lines are means over seeds, dots are seeds.
    """
    def label(title, model):
        return title if model in ("plain", "codes") else f"{title}, {MODELS[model][0]}"

    (samples, nfe), (losses, sigmas) = (rows_of(measured, key) for key in ("FD-classifier", "loss"))
    labels = dict.fromkeys(label(title, model) for title, model, *_ in samples)
    colours = dict(zip(labels, [*COLOURS, (0, 0, 0)]))  # the same in all panels
    plain, codes = ([(label(title, m), values) for title, m, values, _ in samples if (m == "plain") == without]
                    for without in (True, False))
    of_samples, of_losses = ([(label(title, m), ratios) for title, m, _, ratios in rows if m != "plain"]
                             for rows in (samples, losses))

    def panel(title, lines, like, levels=(), ratios=False):  # limits: of all values in `like`; levels: of noise
        low, high = min(values.min() for _, values in like), max(values.max() for _, values in like)
        x = np.array(levels or range(1, 1 + len(nfe)), float)
        ends = (min(x) / 1.5, max(x) * 1.5) if levels else (0.7, len(nfe) + 0.3)
        axes = Axes(ends, (low / 1.1, high * 1.1), title, "noise level" if levels else "evaluations",
                    log_x=bool(levels), log_y=True, size=(420, 340), names=() if levels else [f"{n:g}" for n in nfe])
        if ratios:
            axes.line([(ends[0], 1), (ends[1], 1)], (170, 170, 170), 1)
        for name, values in lines:
            axes.line(np.stack([x, values.mean(0)], 1), colours[name], 2)
            for of_seed in values:
                axes.scatter(np.stack([x, of_seed], 1), colours[name], 2.5)
        return axes

    return figure([
        [panel("FD-classifier, plain", plain, plain + codes),
         panel("FD-classifier, codes of the prior", codes, plain + codes), Legend([*colours.items()])],
        [panel("FD-classifier, codes / plain", of_samples, of_samples, ratios=True),
         panel("loss, own codes / plain", of_losses, of_losses, sigmas, ratios=True)]])


def main(argv=()):
    configure(globals(), argv)
    names = dict.fromkeys(map(str.strip, arms.split(",")))  # each once
    unknown = [name for name in names if name not in ARMS]
    require(not unknown, f"--arms are some of {','.join(ARMS)}, not {', '.join(unknown)}")
    require_seeds(seeds)
    require(min(base_images, total_images) > 0 and num_images >= 10, f"base_images {base_images} and total_images "
            f"{total_images} must be positive, num_images {num_images} 10 or more")
    require(num_held_out >= 64 and num_held_out % 32 == 0,
            f"num_held_out {num_held_out} must be two parts or more, of 32 images each")
    require(num_steps and 0 < min(num_steps), f"num_steps are positive, not {num_steps}")
    measured = {}
    for arm in names:
        for seed in seeds:
            folders = train(arm, seed)
            dataset = load_checkpoint(folders["codes"] / "stage1.pt", "train_stage1")["config"]["dataset"]
            measured.setdefault(arm, []).append(measure(arm, folders, dataset))
    lines = [f"{dataset}: {base_images:,} training images, then {total_images:,} more of each model; FD of "
             f"{num_images:,} samples, errors and losses of {num_held_out} held-out images; "
             f"+-: standard deviation over seeds {seeds}",
             *table(measured, "FD-classifier", "codes of the prior, by evaluations"),
             *table(measured, "sampling error", "rms to 64 steps, an image's own codes, by evaluations"),
             *table(measured, "loss", "lambda(sigma) |D - y|^2 / pixels, own codes, by noise level")]
    print("\n" + "\n".join(lines))
    with atomic(f"{out_dir}/compare_processes.txt") as f:
        f.write(("\n".join(lines) + "\n").encode())
    with atomic(f"{out_dir}/compare_processes.png") as f:
        draw(measured).save(f, "png", optimize=True)
    print(f"{out_dir}/compare_processes.txt and .png are ready")


if __name__ == "__main__":
    main(sys.argv[1:])
