"""
Do codes help? Plain EDM and DisCo-Diff side by side, after equally many images (DisCo-Diff Table 3).

    python compare_models.py                              # two seeds, two hours on two CPU cores
    python compare_models.py --seeds="(0,)" --total_images=28_000 --num_images=500    # a first look
    python compare_models.py --stage1_config=config/cifar10.py --prior_config=config/cifar10_prior.py \
        --total_images=20_000_000 --num_images=50_000 --features=inception \
        --out_dir=out/compare-cifar10                     # on a GPU

For each seed, runs the other scripts in folders in out_dir: trains both models and a prior, draws
samples and measures them. Finished parts are kept, so an interrupted comparison continues. Prints a
table, and writes it to out_dir/compare_models.txt. NFE: the denoiser's evaluations per image;
guidance takes two at a time.
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
seeds = (0, 1)
total_images = 100_000  # that each model trains on
num_images = 2_000  # samples measured in each row
features = "classifier"  # for eval_fid.py; or "inception"
stage1_config = ""  # a config file for train_stage1.py
prior_config = ""  # a config file for train_prior.py

ROWS = {  # title: model, settings of sample.py
    "plain EDM": ("edm", []),
    "DisCo-Diff, codes of the prior": ("disco", []),
    "  guidance w = 1.5": ("disco", ["--guidance=1.5"]),
    "  guidance w = 2": ("disco", ["--guidance=2"]),  # the paper's cfg = 1
    "  w = 1.5, half the steps": ("disco", ["--guidance=1.5", "--num_steps=9"]),
    "  w = 2, half the steps": ("disco", ["--guidance=2", "--num_steps=9"]),
    "DisCo-Diff, oracle codes": ("disco", ["--encode=DATASET"]),
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


def main(argv=()):
    configure(globals(), argv)
    require(seeds and min(seeds) >= 0 and len(set(seeds)) == len(seeds),
            f"seeds takes different whole numbers, not {seeds}")
    require(total_images > 0 and num_images >= 10,
            f"total_images {total_images} must be positive, num_images {num_images} 10 or more")
    require(features in ("classifier", "inception"), f"--features is classifier or inception, not {features}")
    measured = {title: [] for title in ROWS}
    for seed in seeds:
        folders = {model: Path(f"{out_dir}/{model}-{total_images}-seed{seed}") for model in ("edm", "disco")}
        for model, folder in folders.items():
            run("train_stage1.py", stage1_config, f"--seed={seed}", f"--total_images={total_images}",
                f"--out_dir={folder}", *["--num_latents=0"] * (model == "edm"))
        run("train_prior.py", prior_config, "--prior=ar", f"--seed={seed}", f"--out_dir={folders['disco']}")
        dataset = load_checkpoint(folders["disco"] / "stage1.pt", "train_stage1")["config"]["dataset"]
        for i, (title, (model, settings)) in enumerate(ROWS.items()):
            folder, name = folders[model], f"compare-{i}-{num_images}"
            result, checkpoints = folder / f"{name}.{features}.json", list(folder.glob("*.pt"))
            if not done(folder / f"{name}.npz", *checkpoints):
                run("sample.py", f"--out_dir={folder}", f"--name={name}", f"--num_images={num_images}", "--per_code=1",
                    *(setting.replace("DATASET", dataset) for setting in settings))
            if not done(result, folder / f"{name}.npz"):
                run("eval_fid.py", f"--images={folder}/{name}.npz", f"--reference={dataset}", f"--features={features}")
            measured[title].append(json.loads(result.read_text()))

    columns = [key for key, value in measured["plain EDM"][0].items()
               if type(value) is float and key not in ("seconds per image", "KID se")]
    lines = [f"{dataset}: {total_images:,} training images per model, {num_images:,} samples per row, "
             f"seeds {seeds}; +-: standard deviation", " " * 32 + "".join(f"{column:>18}" for column in columns)]
    for title, rows in measured.items():
        cells = []
        for column in columns:
            values = [row[column] for row in rows]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 and column != "NFE" else ""
            cells.append(f"{statistics.mean(values):.{0 if column == 'NFE' else 3}f}{spread}")
        lines.append(f"{title:32}" + "".join(f"{cell:>18}" for cell in cells))
    print("\n" + "\n".join(lines))
    with atomic(f"{out_dir}/compare_models.txt") as f:
        f.write(("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
