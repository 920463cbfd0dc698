"""
Do codes help docking? DiffDock-S and DisCo-DiffDock-S on a few complexes (DisCo-Diff sec. 4.2, Table 4).

    python docking/compare.py
    python docking/compare.py --total_poses=160 --prior_poses=80 --confidence_poses=80 --num_samples=2 --num_steps=5 \
        --out_dir=out/compare-docking-look                                                  # a first look

Both models see the same complexes in the same order, with the same settings, then dock these complexes
again: this measures what a network has learnt, not how it does on new ones. Codes come from the prior, from
the encoder (oracle), or not at all.

The other scripts do the work, in folders in out_dir, and what is finished is kept: an interrupted comparison
continues. Prints a table, and writes it to out_dir/table.txt; rmsd.png has the share of poses below each
RMSD, plain/ and disco/ have a picture of each complex.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder

import numpy as np

from checkpoint import atomic
from compare_models import done, run
from configurator import configure, require_numbers
from docking.dock import HEAD, figures
from plot import COLOURS, Axes, figure

out_dir = "out/compare-docking"
dataset = "shipped"
seed = 0
total_poses = 16_000  # that each model trains on
prior_poses = 4_000
confidence_poses = 2_000
num_samples = 10  # poses of each complex
num_steps = 20

ROWS = {"DiffDock-S": ("plain", "none"), "DisCo-DiffDock-S, codes of the prior": ("disco", "prior"),
        "DisCo-DiffDock-S, oracle codes": ("disco", "oracle"), "DisCo-DiffDock-S, no codes": ("disco", "none")}


def docked(model):
    """Trains a model, "plain" or "disco", and docks. -> {codes: rows}, as in NAME.json of dock.py"""
    folder = Path(out_dir, model)
    where, seeded = f"--out_dir={folder}", f"--seed={seed}"
    run("docking/train.py", where, seeded, f"--dataset={dataset}", f"--total_poses={total_poses}",
        "--num_latents=0" if model == "plain" else "")
    if model == "disco":
        run("docking/train_prior.py", where, seeded, f"--total_poses={prior_poses}", f"--held_poses={prior_poses // 4}")
    run("docking/confidence.py", where, seeded, f"--total_poses={confidence_poses}")
    result = folder / f"poses-{num_samples}-{num_steps}.json"
    if not done(result, *(folder / f"{name}.pt" for name in ("stage1", "confidence"))):
        run("docking/dock.py", where, seeded, f"--dataset={dataset}", f"--name={result.stem}",
            f"--num_samples={num_samples}", f"--batch_size={num_samples}", f"--num_steps={num_steps}")
    return json.loads(result.read_text())


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, or_zero=("seed",))
    found = {model: docked(model) for model in ("plain", "disco")}
    limits = (0, 20), (0, 1.4)  # the legend is above 1
    axes = Axes(*limits, f"all poses of {dataset}", "RMSD, Angstrom", "share of poses below", size=(480, 320))
    lines = [f"{dataset}: {len(found['plain']['none'])} complexes, {total_poses:,} training poses of each model, "
             f"{num_samples} poses per complex and row, seed {seed}", "", f"{'':38}{HEAD}"]
    for i, (title, (model, kind)) in enumerate(ROWS.items()):
        rows = found[model][kind]
        lines.append(f"{title:38}{figures(rows)}")
        errors = np.sort([error for row in rows for error in row["rmsd"]])
        axes.line(np.stack([errors, np.arange(1, len(errors) + 1) / len(errors)], 1), COLOURS[i], label=title)
    print("\n" + "\n".join(lines))
    with atomic(f"{out_dir}/table.txt") as file:
        file.write(("\n".join(lines) + "\n").encode())
    with atomic(f"{out_dir}/rmsd.png") as file:
        figure([[axes]]).save(file, "png")


if __name__ == "__main__":
    main(sys.argv[1:])
