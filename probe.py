"""
What do an encoder's codes know of the classes, which it never saw? Linear probe and nearest neighbours (DLC sec. 5.1).

    python probe.py --out_dir=out/dlc          # of encoder.pt there, or of the encoder in stage1.pt
    python probe.py --out_dir=out/dlc --held_out=2000 --k=10

For an image the encoder gives a code (as L V one-hot numbers), SEMs (the softmax of its logits) and an embedding
(class and register tokens, which the SEMs read). Each is beside that of the same network with random weights, which
already tells images apart, and beside the pixels.

The linear probe is multinomial logistic regression, fitted by L-BFGS; its weight decay is the best of five on a
tenth of the training images. Nearest neighbours are DINO's: k votes of exp(cosine / T). One-hot codes have
many equal cosines, 1/L apart: of equal neighbours the ones that come first count, of equal classes the first.
Test images are those that the encoder was not trained on. +-: standard error over test images.

Also prints how many of V codes each position uses (perplexity), and which share of the images has a code of its own.
Writes out_dir/probe.json.

Features are read in tiles, for few images' fit into memory: SEMs of 512 x 256 take 26 GB. Meanwhile they are in a
nameless file in out_dir, and pixels and one-hot codes are computed anew for each tile.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from checkpoint import atomic
from codes import code_usage
from configurator import UserError, configure, require, require_numbers
from embedding import FrozenEmbedding
from model import DisCoDiff, GaussianEncoder
from processes import start_processes
from run import progress
from trained import load_encoder, load_stage1, load_trained_on
from vit import Distilled

out_dir = "out/dlc"  # the encoder's folder
dataset = ""  # a prepared data set with labels; "": the one that the encoder was trained on
held_out = -1  # test images; -1: as many as in the encoder's training, the same ones. More: they begin with these
num_train = 50_000  # training images, at most
k = 20  # neighbours
temperature = 0.07  # T: a neighbour votes exp(cosine / T)
seed = 0  # of the random weights
batch_size = 500
device = "auto"

DECAYS = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # of features whose mean square norm is 1
TILE = 2 ** 27  # numbers of a tile of features, 512 MB

# ----------------------------------------------------------------------------------------------------
# what is measured. Features are float (N, D), tensors or `Rows`; classes int64 (N,)


class Rows:
    """Features (N, D) that are read, or computed, when they are cut: x[a:b] is a tensor. The last cut is kept.

    shape: (N, D); read(rows): for a slice of rows -> float (n, D), on the device
    """

    def __init__(self, shape, read):
        self.shape, self.read, self.last = shape, read, (None, None)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        if self.last[0] != rows:
            self.last = rows, self.read(rows)
        return self.last[1]


def tiles(x, first=0, end=None, most=1_000_000):
    """Slices of the rows first ... end of x (N, D), each of at most TILE numbers and at most so many rows."""
    size, end = max(1, min(most, TILE // x.shape[1])), len(x) if end is None else end
    return [slice(start, min(start + size, end)) for start in range(first, end, size)]


def logistic_regression(x, c, classes, decay, start=None, first=0):
    """Minimises mean cross-entropy + decay / 2 |W|^2 over the rows from `first` on.
    -> W and, as its last row, the biases: (D + 1, classes)"""
    w = (torch.zeros(x.shape[1] + 1, classes, device=c.device) if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=60, history_size=10, tolerance_grad=1e-5, tolerance_change=1e-7,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = decay / 2 * w[:-1].square().sum()
        loss.backward()
        for rows in tiles(x, first):
            of_tile = F.cross_entropy(torch.addmm(w[-1], x[rows], w[:-1]), c[rows], reduction="sum") / (len(x) - first)
            of_tile.backward()
            loss = loss + of_tile.detach()
        return loss

    optimizer.step(closure)
    return w.detach()


def linear_probe(x, c, x_test):
    """Multinomial logistic regression; weight decay by a tenth of the training images. -> classes of x_test (n,)"""
    mean = sum(x[rows].sum(0) for rows in tiles(x)) / len(x)
    scale = torch.cat([(x[rows] - mean).square().sum(1) for rows in tiles(x)]).mean().sqrt().clamp(min=1e-12)
    x, x_test = (Rows(y.shape, lambda rows, y=y: (y[rows] - mean) / scale) for y in (x, x_test))
    classes, tenth = int(c.max()) + 1, len(x) // 10

    def guesses(w, x, end=None):
        return torch.cat([torch.addmm(w[-1], x[rows], w[:-1]).argmax(1) for rows in tiles(x, end=end)])

    w, best = None, (-1, None, None)
    for decay in DECAYS:  # from the strongest, each fit starts from the last
        w = logistic_regression(x, c, classes, decay, w, first=tenth)
        right = (guesses(w, x, tenth) == c[:tenth]).sum().item()
        best = max(best, (right, decay, w), key=lambda found: found[0])
    w = logistic_regression(x, c, classes, *best[1:])
    return guesses(w, x_test)


def nearest_neighbours(x, c, x_test, k, T, tile=1000):
    """DINO's weighted k-NN: the k rows of x with the largest cosines vote, each with exp(cosine / T).
    -> classes of x_test (n,)

    Cosines of one-hot codes are equal to the bit where codes share equally many tokens: products come before norms.
    """
    votes_of, found = F.one_hot(c).double(), []
    for some in tiles(x_test, most=tile):
        y, norms = x_test[some], x_test[some].norm(dim=1, keepdim=True)
        cosines = torch.cat([y @ x[rows].T / norms / x[rows].norm(dim=1) for rows in tiles(x)], dim=1)
        cosines, nearest = (t[:, :k] for t in cosines.sort(dim=1, descending=True, stable=True))
        found.append(torch.einsum("nk,nkc->nc", (cosines.double() / T).exp(), votes_of[nearest]).argmax(1))
    return torch.cat(found)


# ----------------------------------------------------------------------------------------------------
# the encoder


def find_encoder(place):
    """The encoder in out_dir, and the same network with random weights; its checkpoint; that file's name"""
    if Path(f"{out_dir}/encoder.pt").is_file():
        (encoder, checkpoint), file, network, part = load_encoder(out_dir, place), "encoder.pt", Distilled, "backbone"
    else:
        (model, checkpoint), file, network, part = load_stage1(out_dir, place), "stage1.pt", DisCoDiff, "encoder"
        require(model.num_latents, f"{out_dir}/stage1.pt has no discrete latents (num_latents=0), and so no encoder")
        encoder = model.encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = getattr(network(**checkpoint["model_args"]), part).to(place).eval()
    return encoder, untrained, checkpoint, f"{out_dir}/{file}"


def said(encoder, y):
    """What the encoder says of images y (B, C, H, W). -> {name: codes int64 (B, L), or features (B, D)}"""
    if isinstance(encoder, (FrozenEmbedding, GaussianEncoder)):
        return {"embedding": encoder(y)[..., 0].flatten(1)}  # as the denoiser reads it, or the means of what it reads
    if not hasattr(encoder, "embed"):  # DisCo-Diff's, whose class tokens go straight to the logits
        logits, embedding = encoder(y), {}
    else:
        embedding = {"embedding": encoder.embed(y)}
        logits = encoder.logits(embedding["embedding"])
    return {"codes": logits.argmax(-1), "SEMs": logits.softmax(-1).flatten(1), **embedding}


@torch.no_grad()
def said_of_all(encoder, images, indices, place, title):
    """`said` of the images with these indices (N,), in files that vanish with the program.
    -> {name: codes int64 (N, L), or features float32 (N, D)}, memory-mapped. Raises UserError if a disk is full."""
    files = {}
    try:
        for part in progress(np.split(indices, range(batch_size, len(indices), batch_size)), desc=title, unit="batch"):
            found = {name: x.cpu().numpy() for name, x in said(encoder, data.to_float(images[part], place)).items()}
            for name, x in found.items():
                files[name] = files.get(name) or tempfile.TemporaryFile(dir=out_dir)
                files[name].write(x.tobytes())
        for file in files.values():
            file.flush()
        return {name: torch.from_numpy(np.memmap(files[name], x.dtype, "c", shape=(len(indices), x.shape[1])))
                for name, x in found.items()}
    except OSError as error:
        raise UserError(f"can't keep what the encoder says in {out_dir}: {error.strerror}. SEMs of {len(indices):,} "
                        "images are large: a smaller --num_train needs less") from None


def rows_of(x, codebook_size, place):
    """What `said_of_all` returns, codes int64 (N, L) or features (N, D) -> `Rows`; of codes: one-hot, D = L V"""
    if x.is_floating_point():
        return Rows(x.shape, lambda rows: x[rows].to(place))
    return Rows((len(x), x.shape[1] * codebook_size),
                lambda rows: F.one_hot(x[rows].to(place), codebook_size).flatten(1).float())


def pixels_of(images, indices, place):
    """-> `Rows` of the images with these indices (N,), D = H W C, in [0, 1]"""
    return Rows((len(indices), math.prod(images.shape[1:])),
                lambda rows: data.to_float(images[indices[rows]], place).flatten(1) / 2 + 0.5)


def images_to_probe(of_training, path):
    """The data set to probe on, and its split. of_training, path: the encoder's settings and checkpoint
    -> its name, images, labels, training indices, test indices"""
    name, count = dataset or of_training["dataset"], held_out
    if name == of_training["dataset"]:
        images, labels, *_ = load_trained_on(of_training, path)
        count = of_training["held_out"] if held_out == -1 else held_out
    else:
        images, labels, _ = data.load(name)
        count = min(500, len(images) // 10) if held_out == -1 else held_out
    require(labels is not None, f"the data set {name} has no class labels: --dataset= names one that has")
    require(0 < count <= len(images) // 2, f"held_out is {count} test images: {name} has {len(images)} images, and at "
                                           "most half of them can be held out")
    train, test = data.split(len(images), count)
    return name, images, labels, train[:num_train], test


# ----------------------------------------------------------------------------------------------------
# the run


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, but=("held_out",), or_zero=("seed",))
    _, world, place = start_processes(device)
    require(world == 1, "probe.py runs as one process, without torchrun")
    encoder, untrained, checkpoint, path = find_encoder(place)
    name, images, labels, train, test = images_to_probe(checkpoint["config"], path)
    size, channels, m, codebook_size = (checkpoint["model_args"][key] for key in (
        "img_resolution", "img_channels", "num_latents", "codebook_size"))
    require(images.shape[3] == channels and (hasattr(encoder, "embed") or images.shape[1] == size),
            f"{name} has images of {images.shape[1:]}: the encoder takes ({size}, {size}, {channels})")
    require(k <= len(train), f"k is {k} neighbours: there are {len(train)} training images")

    c, c_test = (torch.from_numpy(labels[part]).to(place) for part in (train, test))
    found = {}
    for title, network in (("", encoder), ("random weights: ", untrained)):
        kept = [said_of_all(network, images, part, place, f"{title}encoding") for part in (train, test)]
        for what in progress([*kept[0]] if title else ["pixels", *kept[0]], desc=f"{title}probing", unit="set"):
            row = found[f"{title}{what}"] = {}
            if what == "codes":
                perplexity, distinct = code_usage(kept[0][what], codebook_size)
                row |= dict(perplexity=perplexity.tolist(), distinct=distinct)
            x, x_test = (pixels_of(images, part, place) for part in (train, test)) if what == "pixels" else (
                rows_of(of.pop(what), codebook_size, place) for of in kept)
            guesses = dict(linear=linear_probe(x, c, x_test), knn=nearest_neighbours(x, c, x_test, k, temperature))
            row |= {how: (guess == c_test).double().mean().item() for how, guess in guesses.items()}

    kind = f"codes of {m} x {codebook_size}" if "codes" in found else f"embeddings of {m * codebook_size}"
    print(f"{path}: {kind}; {name}, "
          f"{len(train):,} images to train on, {len(test):,} to test; k = {k}, T = {temperature:g}; +-: standard error")
    print(f"{'right, per cent':28}{'linear probe':>16}{'k-NN':>16}{'codes in use':>16}{'distinct codes':>16}")
    for title, row in found.items():
        line = f"{title:28}"
        for share in (row["linear"], row["knn"]):
            line += f"{100 * share:9.1f} +- {100 * math.sqrt(share * (1 - share) / len(test)):.1f}"
        if "distinct" in row:
            line += f"{np.mean(row['perplexity']):10.1f} of {codebook_size:2d}{100 * row['distinct']:14.1f} %"
        print(line)
    with atomic(f"{out_dir}/probe.json") as file:
        head = dict(encoder=path, dataset=name, train=len(train), test=len(test), k=k, temperature=temperature)
        file.write(json.dumps(head | found, indent=1).encode())
    print(f"{out_dir}/probe.json is ready")


if __name__ == "__main__":
    main(sys.argv[1:])
