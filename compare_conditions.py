"""
What should a denoiser be told? Codes or embeddings, learned with it or without it (DLC sec. 5.1, 5.2, Table 3).

    python compare_conditions.py
    python compare_conditions.py --seeds="(0,)" --encoder_images=16_000 --total_images=10_000 --ar_images=20_000 \
        --sedd_images=20_000 --rdm_images=300_000 --num_images=500 --pairs=4        # a first look

For each seed, self-supervision trains one encoder, and equal networks train on equally many images, without class
labels, but for "class", a mark (disco's encoder has a first phase on as many averaged images, coarse.py):

    plain           told nothing; and "class", told the class
    disco           codes that an encoder learns beside the denoiser, as in DisCo-Diff
    codes           codes of the self-supervised encoder, as in DLC
    embedding       what this encoder's codes are read from, as numbers
    random-mlp      a random frozen MLP of the embedding, as RCG is described

Each condition is true, that of training images, or drawn by a prior: codes by SEDD and the autoregressive prior,
embeddings by RDM. The gap between the two is DLC's point. RDM trains on more vectors than SEDD on codes, so that it
costs as much; the table has each prior's seconds.

Two images' conditions are composed: codes position by position, anew for each sample; embeddings by their mean. The
Vendi score tells how different the samples of one pair are, beside those of a single image.

The other scripts do the work, in folders in out_dir, and what is finished is kept, as in compare_models.py: an
interrupted comparison continues, and seeds may run side by side. Prints tables, and writes them to
out_dir/compare_conditions.txt, and all rows, as JSON, to out_dir/compare_conditions.jsonl.
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

import data
from checkpoint import atomic, load_checkpoint
from classifier import find_classifier
from compare_models import done, measured, run
from configurator import configure, read_config_file, require, require_numbers
from eval_fid import CACHE, measure
from inception import find_inception
from metrics import vendi_score
from processes import start_processes

out_dir = "out/conditions"
seeds = (0, 1, 2)
encoder_images = 56_000  # that the self-supervised encoder trains on
total_images = 100_000  # that each denoiser trains on
ar_images = 150_000  # codes that the autoregressive prior trains on: on few codes, more overfits
sedd_images = 187_500  # codes that SEDD trains on
rdm_images = 3_000_000  # embeddings that RDM trains on: at these sizes, as much work as SEDD's
num_images = 2_000  # samples measured in each row
pairs = 20  # of images whose conditions are composed
per_pair = 50  # samples of each composition, and of each of its images
features = "classifier"  # for eval_fid.py; or "inception"
device = "auto"  # of the Vendi score's features
encoder_config = ""  # a config file for train_encoder.py
stage1_config = "config/finetune.py"  # for train_stage1.py, of all models
prior_config = ""  # for train_prior.py, of all priors of codes

MODELS = {  # name: its settings of train_stage1.py, its priors
    "plain": (["--num_latents=0"], ()),
    "class": (["--num_latents=0", "--class_cond=True"], ()),
    "disco": ([], ("ar",)),
    "codes": (["--codes=ENCODER"], ("sedd", "ar")),
    "embedding": (["--codes=ENCODER", "--conditioning=embedding"], ("rdm",)),
    "random-mlp": (["--codes=ENCODER", "--conditioning=random-mlp"], ("rdm",))}
PRIORS = {"sedd": "SEDD", "ar": "AR", "rdm": "RDM"}
RDM = ["--layers=6", "--dim=512"]  # its network


def folder_of(model, seed):
    images = encoder_images if model == "encoder" else total_images
    return Path(f"{out_dir}/{model}-{images}-seed{seed}")


def require_held_out(config_file):
    """Raises UserError, before anything is trained, if a config file of stage 1 leaves no images to measure on."""
    for name, value, where in read_config_file(config_file) if config_file else ():
        require(name != "held_out" or value, f"{where}: with held_out = 0 no images are left to measure codes on: "
                "leave it out, and a part of the data set is held out")


def train(seed):
    """Trains the encoder, the models and their priors of a seed, and probes what the denoisers are told."""
    encoder = folder_of("encoder", seed)
    run("train_encoder.py", encoder_config, f"--total_images={encoder_images}", f"--seed={seed}",
        f"--out_dir={encoder}")
    for model, (settings, priors) in MODELS.items():
        folder = folder_of(model, seed)
        settings = [setting.replace("ENCODER", str(encoder)) for setting in settings]
        run("train_stage1.py", stage1_config, f"--total_images={total_images}", f"--seed={seed}",
            f"--out_dir={folder}", *settings)
        for prior in priors:
            images = {"ar": ar_images, "sedd": sedd_images, "rdm": rdm_images}[prior]
            run("train_prior.py", *(RDM if prior == "rdm" else [prior_config]), f"--prior={prior}", f"--seed={seed}",
                f"--total_images={images}", f"--out_dir={folder}", f"--log_every={-(-images // 15)}")
        if priors and not done(folder / "probe.json", folder / "stage1.pt"):
            run("probe.py", f"--out_dir={folder}")


def seconds_of(log):
    """-> how long a training took, from its log"""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    images = np.diff([0] + [line["images"] for line in lines])
    return float(sum(images / [line["images_per_second"] for line in lines]))


# ----------------------------------------------------------------------------------------------------
# compositions


def source_images(dataset, held_out):
    """Writes two files of `pairs` images each, of different classes: out_dir/first.npz and second.npz.
    -> their paths"""
    images, labels, _ = data.load(dataset)
    rest = [*np.concatenate(data.split(len(images), held_out)[::-1])]  # held-out images first
    first, second = rest[:pairs], []
    rest = rest[pairs:]
    for i in first:
        second.append(next((j for j in rest if labels is None or labels[i] != labels[j]), None))
        require(second[-1] is not None, f"{dataset} has too few images for {pairs} pairs of different classes: fewer "
                "--pairs")
        rest.remove(second[-1])
    paths = [Path(f"{out_dir}/{name}-{pairs}.npz") for name in ("first", "second")]
    for path, chosen in zip(paths, (first, second)):
        if not path.exists():
            with atomic(path) as file:
                np.savez(file, images=images[np.array(chosen)])
    return paths


def features_of(path, dataset):
    """-> features (N, D) of the images in an .npz"""
    _, _, place = start_processes(device)
    images, labels, classes = data.load(dataset)
    net = find_inception("", "tf1", place, 0) if features == "inception" else \
        find_classifier(CACHE, dataset, images, labels, classes, place, 0)[0]
    with np.load(path) as f:
        made = f["images"]
    return torch.from_numpy(measure(net, made, None, place, name=str(path), keep=len(made))["features"])


def composed(folder, sources, dataset):
    """Vendi scores of a model's compositions. -> [of two images, mean and standard error over pairs; of one image]"""
    name = f"composed-{pairs}-{per_pair}"
    result, path = folder / f"{name}.vendi.json", folder / f"{name}.npz"
    if not done(path, folder / "stage1.pt", *sources):
        run("sample.py", f"--out_dir={folder}", f"--name={name}", f"--num_images={4 * pairs * per_pair}",
            "--per_code=1", *(f"--{setting}={source}" for setting, source in zip(("encode", "compose"), sources)))
    if not done(result, path):
        x = features_of(path, dataset).unflatten(0, (per_pair, pairs, 4))  # sample.py makes fours, pair after pair
        scores = np.array([[vendi_score(x[:, pair, turn]) for turn in range(4)] for pair in range(pairs)])
        of_pairs = np.stack([scores[:, :2].mean(1), scores[:, 2:].mean(1)])  # of one image; of two
        with atomic(result) as file:
            file.write(json.dumps(dict(single=of_pairs[0].tolist(), composed=of_pairs[1].tolist())).encode())
    return json.loads(result.read_text())


# ----------------------------------------------------------------------------------------------------
# the comparison


def rows_of(seed, dataset, held_out):
    """-> a dict of measures for each model and condition of a seed"""
    rows, sources, how = [], source_images(dataset, held_out), (dataset, num_images, features)
    for model, (_, priors) in MODELS.items():
        folder = folder_of(model, seed)
        stage1 = folder / "stage1.pt"
        if not priors:
            rows.append(dict(seed=seed, model=model, condition="") | measured([stage1], "none", *how))
            continue
        probe = json.loads((folder / "probe.json").read_text())
        vendi = composed(folder, sources, dataset)
        of_model = {"linear probe": probe["codes" if "codes" in probe else "embedding"]["linear"],
                    "Vendi, composed": vendi["composed"], "Vendi, of one image": vendi["single"]}
        true = measured([stage1], "true", *how, f"--encode={dataset}")
        rows.append(dict(seed=seed, model=model, condition="true") | of_model | true)
        for prior in priors:
            made = measured([stage1, folder / f"prior_{prior}.pt"], prior, *how, f"--prior={prior}")
            rows.append(dict(seed=seed, model=model, condition=PRIORS[prior]) | made
                        | {"prior's seconds": seconds_of(folder / f"prior_{prior}.jsonl")})
    return rows


def table(rows, columns):
    """rows: of all seeds, as from `rows_of`. -> lines, one for each model and condition: means over seeds, and their
    standard deviation; a value that is a list counts by its mean"""
    lines = [f"{'':22}" + "".join(f"{column:>20}" for column in columns)]
    for model, condition in dict.fromkeys((row["model"], row["condition"]) for row in rows):
        line = f"{f'{model}, {condition}' if condition else model:22}"
        for column in columns:
            values = [np.mean(row[column]) for row in rows
                      if (row["model"], row["condition"]) == (model, condition) and column in row]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            line += f"{f'{np.mean(values):.4g}{spread}' if values else '':>20}"
        lines.append(line)
    return lines


def main(argv=()):
    config = configure(globals(), argv)
    require(seeds and min(seeds) >= 0 and len(set(seeds)) == len(seeds),
            f"seeds takes different whole numbers, not {seeds}")
    require_numbers(config)
    require(num_images >= 10 and per_pair > 1, f"num_images {num_images} is 10 or more, per_pair {per_pair} 2 or more")
    require(features in ("classifier", "inception"), f"--features is classifier or inception, not {features}")
    require_held_out(stage1_config)
    rows = []
    for seed in seeds:
        train(seed)
        trained = load_checkpoint(folder_of("codes", seed) / "stage1.pt", "train_stage1")["config"]
        rows += rows_of(seed, trained["dataset"], trained["held_out"])
    columns = [key for key, value in rows[0].items()
               if type(value) is float and key not in ("seconds per image", "KID se", "NFE")]
    lines = [f"{trained['dataset']}: {total_images:,} training images of each model, {num_images:,} samples per row, "
             f"encoder {encoder_images:,} images, seeds {seeds}; +-: standard deviation over seeds", "",
             *table(rows, ["linear probe", *columns, "prior's seconds"]), "",
             f"Vendi score of {per_pair} samples, mean over {pairs} pairs of images", "",
             *table([row for row in rows if row["condition"] == "true"], ["Vendi, composed", "Vendi, of one image"])]
    print("\n" + "\n".join(lines))
    for file, text in (("txt", lines), ("jsonl", map(json.dumps, rows))):
        with atomic(f"{out_dir}/compare_conditions.{file}") as f:
            f.write(("\n".join(text) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
