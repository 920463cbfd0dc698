"""
Long codes or short ones (DLC Fig. 5), and remasking on them (Fig. 8): L codes of V values each, L V constant.

    python compare_lengths.py
    python compare_lengths.py --lengths=8,64 --encoder_images=16_000 --total_images=10_000 --sedd_images=20_000 \
        --num_images=500 --etas=0.0,0.05        # a first look

For each length an encoder, a denoiser and a SEDD prior train, each on as many images as the others of its kind. The
denoiser is measured with true codes, those of training images, after a quarter, a half, three quarters and all of
its training; then with SEDD's. At the end, samples of the longest codes with remasking probabilities eta, a few times
each, by the spread of which differences are to be judged.

The other scripts do the work, in folders in out_dir, and what is finished is kept, as in compare_models.py. Lengths may
run side by side, each as by `--lengths=8`, and then all together. Prints tables, writes them to
out_dir/compare_lengths.txt and the numbers to out_dir/compare_lengths.json, and draws out_dir/compare_lengths.png.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from checkpoint import atomic, load_checkpoint, read_log
from compare_conditions import require_held_out
from compare_models import distance, run
from configurator import configure, require, require_numbers
from plot import COLOURS, Axes, figure

out_dir = "out/lengths"
seed = 0
lengths = (8, 16, 32, 64)  # L
entries = 512  # L V
encoder_images = 56_000
total_images = 100_000  # that each denoiser trains on
sedd_images = 187_500  # codes that each prior trains on
num_images = 2_000  # samples measured in each row
etas = (0.0, 0.01, 0.02, 0.05, 0.1, 0.3)  # remasking probabilities
eta_samples = 3  # sets of samples for each
sedd_steps = 64  # of the sampler that remasks
features = "classifier"  # for eval_fid.py; or "inception"
encoder_config = ""  # a config file for train_encoder.py
stage1_config = "config/finetune.py"  # for train_stage1.py
prior_config = "config/dlc_sedd_prior.py"  # for train_prior.py

PARTS = 4  # of the denoiser's training and of the prior's


def train(L):
    """Trains the encoder, the denoiser and the prior of codes of this length. -> their folder"""
    folder = Path(f"{out_dir}/{L}x{entries // L}-{encoder_images}-{total_images}-seed{seed}")
    same = (f"--seed={seed}", f"--out_dir={folder}")
    run("train_encoder.py", encoder_config, *same, f"--total_images={encoder_images}", f"--num_latents={L}",
        f"--codebook_size={entries // L}")
    run("train_stage1.py", stage1_config, *same, f"--total_images={total_images}", f"--codes={folder}",
        f"--keep_every={-(-total_images // PARTS)}")
    run("train_prior.py", prior_config, *same, f"--total_images={sedd_images}", "--prior=sedd",
        f"--log_every={-(-sedd_images // PARTS)}")
    return folder


def measure(folder, dataset):
    """-> a dict: "true", FD after each part of the training, [images, FD]; "sedd", FD with the prior's codes; "bits",
    the prior's on held-out images, [codes, bits]"""
    snapshots = sorted(folder.glob("stage1-*.pt"))
    how = dataset, num_images, features
    true = [[int(file.stem.split("-")[1]), distance([file], f"true-{file.stem}", *how, f"--encode={dataset}",
                                                    f"--checkpoint={file}")] for file in snapshots]
    files = [folder / "stage1.pt", folder / "prior_sedd.pt"]
    lines = [json.loads(line) for line in read_log(folder / "prior_sedd.jsonl", math.inf)]
    return dict(true=true, sedd=distance(files, "sedd", *how, "--prior=sedd"),
                bits=[[line["images"], line["held_out_bits"]] for line in lines])


def remasked(folder, dataset):
    """-> {eta: FD of each set of samples}"""
    files = [folder / "stage1.pt", folder / "prior_sedd.pt"]
    stepped = ["--prior=sedd", "--sedd_sampler=analytic", f"--sedd_steps={sedd_steps}"]
    return {eta: [distance(files, f"eta{eta:g}-{sedd_steps}-{i}", dataset, num_images, features, f"--eta={eta}",
                           f"--seed={i * num_images}", *stepped) for i in range(eta_samples)] for eta in etas}


def table(found, with_eta):
    """found: {L: what `measure` returns}; with_eta: what `remasked` does -> lines"""
    first = found[lengths[0]]
    lines = ["FD with true codes, by images seen; with SEDD's; bits per held-out image, by codes seen", "",
             f"{'L x V':>9}{'L log2 V':>10}" + "".join(f"{images:>10,}" for images, _ in first["true"])
             + f"{'SEDD':>10}" + "".join(f"{images:>10,}" for images, _ in first["bits"])]
    for L, row in found.items():
        lines.append(f"{f'{L} x {entries // L}':>9}{L * math.log2(entries // L):10.0f}"
                     + "".join(f"{value:10.4f}" for _, value in row["true"]) + f"{row['sedd']:10.4f}"
                     + "".join(f"{value:10.2f}" for _, value in row["bits"]))
    lines += ["", f"FD of {max(found)} codes with remasking, {sedd_steps} steps; +-: standard deviation of "
              f"{eta_samples} sets of samples", ""]
    for eta, values in with_eta.items():
        spread = f" +- {np.std(values, ddof=1):.4f}" if eta_samples > 1 else ""
        lines.append(f"{f'eta = {eta:g}':>12}{np.mean(values):10.4f}{spread}")
    return lines


def draw(found, with_eta):
    """-> the picture: distance against training, and against eta; bits against training"""
    curves = {"FD, true codes": ("images seen", {L: row["true"] for L, row in found.items()}),
              "bits per held-out image": ("codes seen", {L: row["bits"] for L, row in found.items()}),
              "FD, remasking": ("eta", {max(found): [[eta, np.mean(values)] for eta, values in with_eta.items()]})}
    row = []
    for title, (name, of_lengths) in curves.items():
        x, y = np.concatenate([np.array(points) for points in of_lengths.values()]).T
        low = 0.9 * y.min()
        limits = (0, max(x.max(), 1e-9) * 1.05), (low, y.max() + 0.4 * (y.max() - low))
        axes = Axes(*limits, title, name, size=(420, 340))
        for (L, points), colour in zip(of_lengths.items(), COLOURS):
            axes.line(points, colour, dots=True, label=f"{L} x {entries // L}")
        row.append(axes)
    return figure([row])


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, or_zero=("seed",))
    require(lengths and all(L > 0 and entries % L == 0 and entries // L > 1 for L in lengths),
            f"each of lengths divides entries, and leaves 2 or more: {lengths} and {entries} don't fit")
    require(etas and all(0 <= eta < 1 for eta in etas), f"etas are probabilities below 1, not {etas}")
    require(num_images >= 10, f"num_images is 10 or more, not {num_images}")
    require(features in ("classifier", "inception"), f"--features is classifier or inception, not {features}")
    require_held_out(stage1_config)
    found = {}
    for L in lengths:
        folder = train(L)
        dataset = load_checkpoint(folder / "stage1.pt", "train_stage1")["config"]["dataset"]
        found[L] = measure(folder, dataset)
        if L == max(lengths):
            with_eta = remasked(folder, dataset)
    lines = [f"{dataset}: encoders {encoder_images:,} images, denoisers {total_images:,}, priors {sedd_images:,} "
             f"codes; {num_images:,} samples per value", *table(found, with_eta)]
    print("\n" + "\n".join(lines))
    for kind, text in (("txt", "\n".join(lines) + "\n"), ("json", json.dumps(found | dict(etas=with_eta), indent=1))):
        with atomic(f"{out_dir}/compare_lengths.{kind}") as file:
            file.write(text.encode())
    with atomic(f"{out_dir}/compare_lengths.png") as file:
        draw(found, with_eta).save(file, "png")
    print(f"{out_dir}/compare_lengths.txt, .json and .png are ready")


if __name__ == "__main__":
    main(sys.argv[1:])
