"""
Do images show what their prompts ask for? Classes, words, and combinations of both that no caption has told of
(DLC sec. 6).

    python compare_text.py                                      # everything from scratch: half an hour of one CPU core
    python compare_text.py --source=pretrained --out_dir=out/compare-text-pretrained  # a run's stage 1 and prior
    python compare_text.py --text_images=30_000 --per_prompt=10 # a first look

For each seed, stage 1, its prior and a text model are trained, if they are not there. Each prompt names a class and one
of its words (captions.py); six such combinations are unseen: all images that are both were left out of the text model's
training (stage 1 has seen them, without captions). A classifier says whether the class is recognised, and a measure of
the image, whether it is on the word's side of the median. The table has beside them real images of these words, images
from the codes of real ones, and the prior's, given the class.

The nearest training image of a sample is found by the classifier's features; the picture shows it below the sample. If
samples were copies, they would be nearer to training images than images that were held out are.

The other scripts do the work, in folders in out_dir, and what is finished is kept, as in compare_models.py. Prints a
table, and writes it to out_dir/compare_text.txt, and a picture of the first seed's samples, compare_text.png.
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

import data
from captions import MadeCaptions
from checkpoint import atomic, load_checkpoint
from classifier import find_classifier
from compare_models import require_seeds, run, sampled
from configurator import configure, require, require_numbers
from eval_fid import CACHE
from plot import save_grid
from processes import start_processes
from trained import path_of

out_dir = "out/compare-text"
seeds = (0, 1, 2)
source = ""  # a folder with a trained stage 1 and prior, for all seeds; "": they are trained here
stage1_config = ""  # a config file for train_stage1.py
prior_config = ""  # for train_prior.py
text_config = ""  # for train_text.py
text_images = 0  # captions to train on; 0: as text_config or train_text.py have it
prior = "ar"  # which prior
per_prompt = 50  # samples of each prompt
columns = 12  # of the picture
device = "auto"

SAMPLERS = {"": [], ", random order": ["--text_order=random"], ", guidance 2": ["--text_guidance=2"]}


def train(seed):
    """-> the folder of a seed, with stage 1, its prior and the text model, trained if need be"""
    folder = Path(f"{out_dir}/seed{seed}")
    files = [folder / name for name in ("stage1.pt", f"prior_{prior}.pt")]
    if source:
        for file in files:
            if not file.exists():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(path_of(source)) / file.name, file)
    else:
        run("train_stage1.py", stage1_config, f"--seed={seed}", f"--out_dir={folder}")
        run("train_prior.py", prior_config, f"--prior={prior}", f"--seed={seed}", f"--out_dir={folder}")
    run("train_text.py", text_config, f"--seed={seed}", f"--out_dir={folder}",
        *[f"--total_images={text_images}"] * bool(text_images))
    return folder


def samples(folder, name, count, model, *settings):
    """-> what sample.py writes, a dict of arrays, made if need be; model: the file of the prior or text model"""
    with np.load(sampled([folder / "stage1.pt", folder / model], name, count, *settings)) as file:
        return {key: file[key] for key in ("images", "labels")}


@torch.no_grad()
def seen_by(net, images, at_once=500):
    """-> what the classifier says of images uint8 (N, H, W, C): their features (N, D), and the classes (N,)"""
    device = next(net.parameters()).device
    said = [net(data.to_float(images[i:i + at_once], device)) for i in range(0, len(images), at_once)]
    return torch.cat([pool for pool, _, _ in said]).cpu(), torch.cat([p for _, _, p in said]).argmax(1).cpu().numpy()


def words_of(captions, indices):
    """What captions could say of images: -> asked (K, 3), classes, first or second measure, words; numbers (K,)"""
    numbers, slots = (captions.words[indices] >= 0).nonzero()
    return np.stack([captions.labels[indices][numbers], slots, captions.words[indices][numbers, slots]], 1), numbers


def judged(net, captions, images, asked):
    """Whether images (K,) show what is asked, (K, 3), as of `words_of`. -> a row: shares of classes, words and both,
    of seen and unseen combinations"""
    right, word = seen_by(net, images)[1] == asked[:, 0], np.zeros(len(asked), bool)
    unseen = np.zeros(len(asked), bool)
    for c, slot, w, is_unseen, _ in captions.prompts():
        these = (asked == (c, slot, w)).all(1)
        word[these], unseen[these] = captions.agrees(images[these], c, slot, w), is_unseen
    return {f"{kind}, {what}": float(values[which].mean()) for kind, which in (("seen", ~unseen), ("unseen", unseen))
            for what, values in (("class", right), ("word", word), ("both", right & word))}


def nearest(features, of):
    """-> distances (N,) of features (N, D) to the nearest of (M, D), and its number"""
    return torch.cdist(features, of).min(1)


def measure(folder, net, captions, images, split):
    """-> {title: row} of a seed; samples of all prompts in turn, and their nearest training images"""
    rows, prompts = {}, list(captions.prompts())
    asked, numbers = words_of(captions, split[1])
    rows["real images, held out"] = judged(net, captions, images[split[1]][numbers], asked)
    order = np.concatenate(split)[:per_prompt * len(prompts)]
    dataset = load_checkpoint(folder / "stage1.pt", "train_stage1")["config"]["dataset"]
    made = samples(folder, "oracle", len(order), "stage1.pt", f"--encode={dataset}")
    asked, numbers = words_of(captions, order)
    rows["codes of real images"] = judged(net, captions, made["images"][numbers], asked)
    made = samples(folder, "prior", len(order), f"prior_{prior}.pt", f"--prior={prior}")
    if made["labels"].min() >= 0:
        right = seen_by(net, made["images"])[1] == made["labels"]
        rows["prior, given the class"] = {"seen, class": float(right.mean())}
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompt for *_, prompt in prompts))
    asked = np.resize([prompt[:3] for prompt in prompts], (len(order), 3))
    features = seen_by(net, images[split[0]])[0]
    for title, settings in SAMPLERS.items():
        name = "prompts" + title.replace(", ", "-").replace(" ", "-")
        made = samples(folder, name, len(order), "text.pt", f"--prompt_file={file}", *settings)["images"]
        rows[f"prompts{title}"] = judged(net, captions, made, asked)
        distances, which = nearest(seen_by(net, made)[0], features)
        rows[f"prompts{title}"]["distance"] = distances.median().item()
        if not title:
            pictures = made, images[split[0]][which]
    rows["real images, held out"]["distance"] = nearest(seen_by(net, images[split[1]])[0], features)[0].median().item()
    return rows, pictures


def table(measured):
    """measured: of all seeds, the first part of what `measure` returns. -> lines: means over seeds, their spread"""
    columns = [f"{kind}, {what}" for kind in ("seen", "unseen") for what in ("class", "word", "both")] + ["distance"]
    lines = [f"{'':26}" + "".join(f"{column:>18}" for column in columns) + "   unseen / seen, both"]
    for title in measured[0]:
        line, rows = f"{title:26}", [of_seed[title] for of_seed in measured]
        for column in columns:
            values = [row[column] for row in rows if column in row]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            line += f"{f'{statistics.mean(values):.3f}{spread}' if values else '':>18}"
        lines.append(line + "".join(f"  {row['unseen, both'] / max(row['seen, both'], 1e-9):.2f}" for row in rows
                                    if "unseen, both" in row))
    return lines


def draw(captions, made, near):
    """Rows of samples of the unseen prompts, each above a row of their nearest training images."""
    shown, titles, prompts = [], [], list(captions.prompts())
    for i, (*_, unseen, prompt) in enumerate(prompts):
        if unseen:
            shown += [made[i::len(prompts)][:columns], near[i::len(prompts)][:columns]]
            titles += [prompt, "nearest in training"]
    save_grid(np.concatenate(shown), f"{out_dir}/compare_text.png", min(columns, per_prompt), titles)


def main(argv=()):
    config = configure(globals(), argv)
    require_seeds(seeds)
    require_numbers(config, or_zero=("text_images",))
    folders, measured, bits = [train(seed) for seed in seeds], [], []
    settings = load_checkpoint(folders[0] / "stage1.pt", "train_stage1")["config"]
    dataset, place = settings["dataset"], start_processes(device)[2]
    images, labels, classes = data.load(dataset)
    require(classes > 1, f"{dataset} has no classes, which prompts could name: compare_text.py needs them")
    captions = MadeCaptions(images, labels, data.class_names(dataset))
    net, accuracy = find_classifier(CACHE, dataset, images, labels, classes, place, 0)
    split = data.split(len(images), settings["held_out"])
    for folder in folders:
        rows, pictures = measure(folder, net, captions, images, split)
        measured.append(rows)
        bits.append(json.loads((folder / "text_bits.json").read_text()))
        if folder is folders[0]:
            draw(captions, *pictures)
    what = f"{dataset}: {per_prompt} samples of each of {len(list(captions.prompts()))} prompts, seeds {seeds}; +-: " \
           f"standard deviation over seeds; by a classifier that recognises {accuracy:.1%} of held-out images"
    lines = [what, "", *table(measured), "",
             "bits of the codes of held-out images, at most; a column for each seed; +-: standard error over images"]
    for title in bits[0]:
        of_seeds = ("{:7.2f} +- {:.2f}".format(*of_seed[title]) for of_seed in bits)
        lines.append(f"  {title:35}" + "  ".join(of_seeds))
    print("\n" + "\n".join(lines))
    with atomic(f"{out_dir}/compare_text.txt") as f:
        f.write(("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
