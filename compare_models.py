"""
Do codes help? The paper's experiment: codes added to a trained plain EDM (DisCo-Diff sec. 4.1, Table 3).

    python compare_models.py                              # three seeds, under three hours on two CPU cores
    python compare_models.py --seeds="(0,)" --base_images=28_000 --total_images=14_000 --num_images=500  # a first look
    python compare_models.py --stage1_config= --out_dir=out/compare-classes     # models that are told the class
    python compare_models.py --base_images=0 --total_images=100_000             # both models from scratch
    python compare_models.py --stage1_config=config/cifar10.py --prior_config=config/cifar10_prior.py \
        --base_images=0 --total_images=20_000_000 --num_images=50_000 --features=inception \
        --out_dir=out/compare-cifar10                     # on a GPU

For each seed, a plain EDM trains on base_images. From there two models see total_images more, in the
same order, with the same settings: plain EDM, trained on, and DisCo-Diff, which gets codes and a prior.
Their samples are measured after equally many evaluations of the denoiser (NFE). trajectories.py measures
their sampling error. The ratios, one for each seed, are those of FD and sampling error to plain EDM,
trained on, with as many steps.

The other scripts do the work, in folders in out_dir, and what is finished is kept: an interrupted
comparison continues. So seeds may run side by side, each with its --seeds="(0,)" and
OMP_NUM_THREADS=1, and then all together, which takes two minutes more; prepare what they share by
`python eval_fid.py --features=classifier --images=`. Prints tables, and writes them to out_dir/compare_models.txt.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from checkpoint import atomic, load_checkpoint
from configurator import configure, require
from data import HERE

out_dir = "out/compare"
seeds = (0, 1, 2)
base_images = 100_000  # that the plain EDM trains on, from which both models start; 0: they start from scratch
total_images = 50_000  # that each model trains on, from there
num_images = 2_000  # samples measured in each row
batch_size = 80  # samples made at once; on a GPU, 1,000 are much faster
features = "classifier"  # for eval_fid.py; or "inception"
stage1_config = "config/finetune.py"  # a config file for train_stage1.py, of all models
prior_config = ""  # a config file for train_prior.py

PLAIN = "plain EDM, trained on"
ROWS = {  # title: model, its name in trajectories.json, settings of sample.py, numbers of steps
    "plain EDM, at the start": ("base", "", [], (18,)),
    PLAIN: ("plain", "", [], (18, 9, 5)),
    "DisCo-Diff, codes of the prior": ("disco", ", codes of the prior", [], (18, 9, 5)),
    "DisCo-Diff, oracle codes": ("disco", ", oracle codes", ["--encode=DATASET"], (18,)),
}


def run(script, *arguments):
    """Runs another of our scripts; exits with its exit code if it fails."""
    print("\n$ python", script, *filter(None, arguments), flush=True)
    code = subprocess.run([sys.executable, str(HERE / script), *filter(None, arguments)]).returncode
    if code:
        sys.exit(code)


def done(result, *made_of):
    """Whether `result` exists and is newer than the files it was made of."""
    return result.exists() and result.stat().st_mtime > max(path.stat().st_mtime for path in made_of)


def sampled(files, name, count, *settings):
    """-> the file NAME-COUNT.npz with `count` samples, made if need be

    files: checkpoints of a folder that they depend on; settings: of sample.py
    """
    samples = files[0].parent / f"{name}-{count}.npz"
    if not done(samples, *files):
        run("sample.py", f"--out_dir={samples.parent}", f"--name={samples.stem}", f"--num_images={count}",
            "--per_code=1", *settings)
    return samples


def measured(files, name, dataset, count, by, *settings):
    """-> what eval_fid.py says of the samples that `sampled` makes, kept beside them; by: --features"""
    samples = sampled(files, name, count, *settings)
    result = samples.with_suffix(f".{by}.json")
    if not done(result, samples):
        run("eval_fid.py", f"--images={samples}", f"--reference={dataset}", f"--features={by}")
    return json.loads(result.read_text())


def distance(files, name, dataset, count, by, *settings):
    """-> the FD or FID that `measured` finds"""
    return measured(files, name, dataset, count, by, *settings)["FD-classifier" if by == "classifier" else "FID"]


def train(seed):
    """Trains the models of a seed. -> {model: its folder}"""
    plain, disco = (Path(f"{out_dir}/{model}-{base_images}+{total_images}-seed{seed}") for model in ("plain", "disco"))
    folders = {"plain": plain, "disco": disco}
    more = [f"--total_images={total_images}", f"--seed={1000 + seed}"]  # not the base's order of images, nor its noise
    if base_images:
        base = Path(f"{out_dir}/base-{base_images}-seed{seed}")
        run("train_stage1.py", stage1_config, f"--total_images={base_images}", f"--seed={seed}", f"--out_dir={base}",
            "--num_latents=0")
        folders, more = folders | {"base": base}, [*more, f"--init_from={base}"]
    run("train_stage1.py", stage1_config, *more, f"--out_dir={plain}", "--num_latents=0")
    run("train_stage1.py", stage1_config, *more, f"--out_dir={disco}")
    run("train_prior.py", prior_config, "--prior=ar", f"--seed={seed}", f"--out_dir={disco}")
    return folders


def measure(folders, dataset):
    """Samples of the models in these folders, and their trajectories. -> {(title, steps): {measure: value}}"""
    checkpoints = {model: [*folder.glob("*.pt")] for model, folder in folders.items()}
    trajectories, found = folders["disco"] / "trajectories.json", {}
    if not done(trajectories, *(path for paths in checkpoints.values() for path in paths)):
        run("trajectories.py", f"--runs={','.join(map(str, folders.values()))}", f"--out_dir={folders['disco']}")
    errors = json.loads(trajectories.read_text())
    for i, (title, (model, source, settings, numbers)) in enumerate(ROWS.items()):
        for steps in numbers if model in folders else ():
            row = measured(checkpoints[model], f"compare-{i}-{steps}", dataset, num_images, features,
                           f"--num_steps={steps}", f"--batch_size={batch_size}",
                           *(setting.replace("DATASET", dataset) for setting in settings))
            error, _ = errors[f"{folders[model]}{source}"]["sampling error"][f"{steps}"]
            found[title, steps] = row | {"sampling error": error}
    return found


def table(measured, columns):
    """measured: a list of what `measure` returns, for each seed. -> lines, one for each row with these columns"""
    lines = [f"{'':32}{'NFE':>5}" + "".join(f"{column:>20}" for column in columns) + "   ratio, for each seed"]
    last = ""
    for title, steps in measured[0]:
        rows, plain = ([of_seed[row, steps] for of_seed in measured] for row in (title, PLAIN))
        line, last = f"{'' if title == last else title:32}{rows[0]['NFE']:5.0f}", title
        for column in columns:
            values = [row[column] for row in rows]
            spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            line += f"{f'{statistics.mean(values):.4f}{spread}':>20}"
        ratios = (row[columns[0]] / other[columns[0]] for row, other in zip(rows, plain))
        lines.append(line + "   " + " ".join(f"{ratio:.3f}" for ratio in ratios))
    return lines


def main(argv=()):
    configure(globals(), argv)
    require(seeds and min(seeds) >= 0 and len(set(seeds)) == len(seeds),
            f"seeds must be different and not negative, not {seeds}")
    require(base_images >= 0, f"base_images can't be negative: it is {base_images}")
    require(total_images > 0 and batch_size > 0,
            f"total_images {total_images} and batch_size {batch_size} must be positive")
    require(num_images >= 10, f"num_images must be 10 or more, not {num_images}")
    require(features in ("classifier", "inception"), f"--features is classifier or inception, not {features}")
    measured = []
    for seed in seeds:
        folders = train(seed)
        dataset = load_checkpoint(folders["disco"] / "stage1.pt", "train_stage1")["config"]["dataset"]
        measured.append(measure(folders, dataset))

    columns = [key for key, value in measured[0][PLAIN, 18].items()
               if type(value) is float and key not in ("seconds per image", "KID se", "NFE", "sampling error")]
    training = f"{base_images:,} training images, then {total_images:,} more of each model" if base_images else \
        f"{total_images:,} training images of each model"
    lines = [f"{dataset}: {training}, {num_images:,} samples per row, seeds {seeds}; +-: standard deviation", "",
             *table(measured, columns), "", *table(measured, ["sampling error"])]
    print("\n" + "\n".join(lines))
    with atomic(f"{out_dir}/compare_models.txt") as f:
        f.write(("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
