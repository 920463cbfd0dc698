"""
Are samples copies of training images? Their nearest ones, in the features of a classifier and in pixels.

    python sample.py --num_images=1000 --per_code=1 --name=many
    python sample.py --num_images=1000 --per_code=1 --name=oracle --encode=fashion-mnist-10k  # codes of training images
    python neighbours.py --images=out/many.npz,out/oracle.npz

The yardstick is what no model has seen: held-out images, and how far each is from its nearest training image. A model
that generalises draws samples at such distances. One that memorises draws samples that are nearer: then more than 5 %
of them are nearer than the nearest 5 % of the held-out images. (The classifier has not seen the first 500 held-out
images either.)

Two sets of copies show how sharp the test is: training images with noise (of 8 in 255), and shifted by a pixel. Where
few of these are too near, copies among the samples would be missed as well.

Prints a table, and writes it to out_dir/neighbours.txt. In out_dir/neighbours.png each image is above its nearest
training image, by features: for each set of images, the pairs that are nearest, and some at random.
"""

import sys

import numpy as np
import torch

import data
from checkpoint import atomic
from classifier import find_classifier
from configurator import configure, require, require_numbers
from eval_fid import CACHE
from inception import find_inception
from plot import save_grid
from processes import start_processes
from run import progress
from trained import load_stage1, load_trained_on

out_dir = "out"  # folder of the model, and for what is written
init_from = ""  # another folder with the model; "pretrained": the repository's
images = "out/samples.npz"  # of that model: files of sample.py, folders or prepared data sets, separated by commas
features = "classifier"  # or "inception"
shown = 12  # pairs in each line of the picture
batch_size = 500
device = "auto"

HELD_OUT, NOISED, SHIFTED = "held-out images", "training images, noised", "training images, shifted"


def embeddings(dataset, place):
    """-> {space: embed(images uint8 (B, H, W, C)) -> (B, D)}"""
    training, labels, classes = data.load(dataset)
    require(classes or features == "inception", f"the data set {dataset} has no class labels: say --features=inception")
    net = find_inception("", "tf1", place, 0) if features == "inception" else \
        find_classifier(CACHE, dataset, training, labels, classes, place, 0)[0]

    def pixels(part):
        x = data.to_float(part, place).flatten(1)
        return x / x.shape[1] ** 0.5  # so that distances are root mean squares

    return {features: lambda part: net(data.to_float(part, place))[0], "pixels": pixels}


@torch.no_grad()
def nearest(embed, sets, images, indices):
    """For each image of `sets`, {title: images (M, H, W, C)}, the nearest of the training images, which are those of
    images (N, H, W, C) with these indices -> {title: (distances (M,), indices (M,))}"""
    def embedded(x):
        return torch.cat([embed(x[i:i + batch_size]).double() for i in range(0, len(x), batch_size)])

    places = {title: embedded(x) for title, x in sets.items()}
    found = {title: (np.full(len(x), np.inf), np.zeros(len(x), np.int64)) for title, x in places.items()}
    for part in progress(np.split(indices, range(batch_size, len(indices), batch_size)), unit="batch"):
        of_training = embedded(images[part])
        for title, x in places.items():
            distances, which = (t.cpu().numpy() for t in torch.cdist(x, of_training).min(1))
            best, index = found[title]
            found[title] = np.minimum(best, distances), np.where(distances < best, part[which], index)
    return found


def table(space, found):
    """found: as from `nearest`, by distances in this space -> lines"""
    limit, width = np.quantile(found[HELD_OUT][0], 0.05), max(map(len, found)) + 2
    columns = "".join(f"{title:>10}" for title in ("images", "smallest", "1 %", "5 %", "median", "too near"))
    lines = ["", f"{f'distance in {space}':{width}}{columns}"]
    for title, (distances, _) in found.items():
        values = "".join(f"{value:10.4f}" for value in np.quantile(distances, (0, 0.01, 0.05, 0.5)))
        lines.append(f"{title:{width}}{len(distances):10,}{values}{100 * (distances < limit).mean():8.1f} %")
    return lines


def draw(found, sets, training):
    """Writes the picture: of each set, images above their neighbours among the training images, (N, H, W, C)."""
    lines, titles = [], []
    for title, (distances, index) in found.items():
        chosen = {"nearest": np.argsort(distances, kind="stable"),
                  "at random": np.random.default_rng(0).permutation(len(distances))}
        for how, order in chosen.items():
            lines += [sets[title][order[:shown]], training[index[order[:shown]]]]
            titles += [title.split("/")[-1], how]
    save_grid(np.concatenate(lines), f"{out_dir}/neighbours.png", shown, titles)


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config)
    require(features in ("classifier", "inception"), f"--features is classifier or inception, not {features}")
    _, world, place = start_processes(device)
    require(world == 1, "neighbours.py runs as one process, without torchrun")
    folder = init_from or out_dir
    trained_on = load_stage1(folder)[1]["config"]
    training, _, indices, held_out = load_trained_on(trained_on, f"{folder}/stage1.pt")
    names = [*filter(None, map(str.strip, images.split(",")))]
    require(names, "--images are files of sample.py, folders or data sets, separated by commas: it is empty")
    sets = {name: data.open_images(name)[0][:] for name in names}
    for name, x in sets.items():
        require(x.shape[1:] == training.shape[1:],
                f"{name} has images of {x.shape[1:]}, the data set of {training.shape[1:]}")
    require(min(len(held_out), *map(len, sets.values())) >= shown,
            f"{shown} pairs are shown: each set, and the {len(held_out)} held-out images, must have as many")
    copied = training[indices[:len(held_out)]]
    noised = copied + np.random.default_rng(0).normal(0, 8, copied.shape)
    sets |= {HELD_OUT: training[held_out], NOISED: noised.round().clip(0, 255).astype(np.uint8),
             SHIFTED: np.roll(copied, 1, axis=2)}
    lines = [f"the nearest of {len(indices):,} training images; too near: as near as 5 % of the held-out images"]
    for space, embed in embeddings(trained_on["dataset"], place).items():
        found = nearest(embed, sets, training, indices)
        lines += table(space, found)
        if space == features:
            draw(found, sets, training)
    print("\n".join(lines))
    with atomic(f"{out_dir}/neighbours.txt") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print(f"{out_dir}/neighbours.txt and .png are ready")


if __name__ == "__main__":
    main(sys.argv[1:])
