"""
How good are samples? The field's image metrics, against a data set.

    python eval_fid.py --reference=imagenet64 --images=out/many.npz
    torchrun --nproc_per_node=8 eval_fid.py --reference=imagenet64 --images=out/many.npz
    python eval_fid.py --reference=imagenet64 --images=pictures     # a folder of images of one size
    python eval_fid.py --reference=VIRTUAL_imagenet64_labeled.npz   # ADM's reference batch
    python eval_fid.py --reference=imagenet-64x64.npz               # EDM's statistics: FID alone
    python eval_fid.py --features=classifier                        # without Inception's weights
    python eval_fid.py --features=classifier --self_check=True      # does it see what it should?
    python eval_fid.py --features=dinov2.npz                        # features of any network

--features=inception: FID, sFID and KID (lower is better), Inception Score (higher), precision and
recall (0 ... 1, higher). Precision and recall follow ADM's protocol: 10,000 reference images
against all samples (at most 100,000). The Vendi score counts how many different samples there are, whatever
the reference.

--features=classifier: a small classifier is trained here on the data set's labels, and its features
are compared. This gives FD-classifier (FID's formula), KID, precision and recall (of equally many
images on both sides), and the share of samples recognised as the class they were asked for. Compare
values of FD-classifier only if the same classifier gave them, and never with FID. The classifier
has seen the data set: fresh real images come out a little further away than those it has seen.

--features=FILE.npz, with two arrays, real (N, D) and generated (M, D): FD, KID, precision and
recall (of equally many rows). Neither images nor a data set are needed.

Prints a table, and writes it next to the images as NAME.inception.json or NAME.classifier.json, or
next to the features as FILE.features.json. What is computed on a data set is kept in
datasets/features/, as .npz files in ADM's format (mu, sigma, mu_s, sigma_s) with additions. With an
empty --images= these files are all that is made.

metrics.py has the formulas, inception.py and classifier.py the networks.
"""

import contextlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from checkpoint import atomic, weights_checksum
from classifier import find_classifier
from configurator import configure, require
from data import HERE, class_names, data_checksum, load, made_of, open_images, split, to_float
from feature_files import IMAGES, array_in, names_in, npz_checksum, read_features, read_statistics, reserved
from inception import find_inception
from metrics import (
    NEIGHBOURS,
    Moments,
    equally_many,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    vendi_score,
)
from npz import open_npz
from processes import barrier, leave_processes, start_processes, sum_over_processes
from run import progress

images = "out/samples.npz"  # an .npz with `images` (and `labels`), a folder or .zip, or a prepared data set's name
reference = "fashion-mnist-10k"  # a prepared data set's name; for Inception also an .npz (EDM's, ADM's, or images)
features = "inception"  # or "classifier", or an .npz of features, `real` and `generated`
resize = "tf1"  # to Inception's 299 x 299, bilinear, as EDM and ADM do; "pytorch": as pytorch-fid does
weights = ""  # of Inception, a file; "": in PyTorch's usual cache, into which they are downloaded
self_check = False  # instead of --images: the data set against half of it, blurred, noised, or short of classes
manifold_images = 10_000  # most of each side for precision, recall and KID; with Inception, of the real side alone
batch_size = 100  # of one process
device = "auto"

CACHE = HERE / "datasets" / "features"
SCORE_SPLITS = 10  # of the Inception Score, in the images' order (ADM's program splits by 5,000: the same for 50,000)
MOST_SAMPLES = 100_000  # for precision and recall with Inception: the time grows as the square
CLASSES_SHOWN = 20  # a data set with more classes has no row for each

# ----------------------------------------------------------------------------------------------------
# one pass over a set of images


@torch.no_grad()
def measure(net, images, labels, device="cpu", rank=0, world=1, name="images", keep=None):
    """What the metrics need to know of a set of images, from one pass that the processes share.

    images: uint8 (N, H, W, C), read in slices, so that they may be larger than memory
    labels: int64 (N,), -1 for none; or None
    keep: of how many images, at most, to keep the features; None: manifold_images

    -> a dict: count; mu, sigma and, from Inception, mu_s, sigma_s, float64; features (kept, D),
    float32; inception_score, its mean and standard deviation; recognised, the share of labelled
    images to which the network gives their label, and recognised_by_class (classes,). A share of
    no images is NaN.
    """
    n = len(images)
    kept = np.sort(np.random.default_rng(0).permutation(n)[:keep or manifold_images])  # for precision, recall and KID
    pool, spatial, p = net(to_float(images[:1], device))  # for the widths
    moments = {key: Moments(x.shape[1], device) for key, x in (("", pool), ("_s", spatial)) if x is not None}
    features_kept = torch.zeros(len(kept), pool.shape[1], device=device)
    prob_sums, log_sums, counts = (torch.zeros(SCORE_SPLITS, *tail, dtype=torch.float64, device=device)
                                   for tail in (p.shape[1:], (), ()))
    labelled, right = torch.zeros(2, p.shape[1], dtype=torch.float64, device=device)  # images of each class

    for start in progress(range(rank * batch_size, n, world * batch_size), desc=name, unit="batch", disable=rank > 0):
        x = to_float(images[start:start + batch_size], device)
        pool, spatial, p = net(x)
        for m, rows in zip(moments.values(), (pool, spatial)):
            m.update(rows)
        first, last = np.searchsorted(kept, [start, start + len(x)])
        features_kept[first:last] = pool[kept[first:last] - start]
        split_of = torch.arange(start, start + len(x), device=device) * SCORE_SPLITS // n
        prob_sums.index_add_(0, split_of, p.double())
        log_sums.index_add_(0, split_of, -torch.special.entr(p.double()).sum(1))
        counts += split_of.bincount(minlength=SCORE_SPLITS)
        if labels is not None:
            c = torch.from_numpy(labels[start:start + len(x)]).to(device)
            labelled += c[(c >= 0) & (c < len(labelled))].bincount(minlength=len(labelled))
            right += c[p.argmax(1) == c].bincount(minlength=len(right))

    if world > 1:
        sums_of_moments = [sums for m in moments.values() for sums in vars(m).values()]
        for sums in [features_kept, prob_sums, log_sums, counts, labelled, right, *sums_of_moments]:
            sum_over_processes(sums)
    result = dict(count=n, features=features_kept.cpu().numpy(),
                  inception_score=inception_score(prob_sums, log_sums, counts),
                  recognised=(right.sum() / labelled.sum()).item(),
                  recognised_by_class=(right / labelled).cpu().numpy())
    for key, m in moments.items():
        result[f"mu{key}"], result[f"sigma{key}"] = m.result()
    return result


# ----------------------------------------------------------------------------------------------------
# the reference: measured once, or read from a file


def reference_statistics(net, made_with, real_images, real_labels, place, rank, world):
    """What the metrics need to know of the reference -> dict of arrays, as from `measure`.

    If the reference is a file with means and covariances, these are taken, and images in the file
    only give the features: ADM's mu and sigma are of a whole data set, its images 10,000 from it.
    """
    stored = {}
    if reference.endswith(".npz") and (real_images is None or "mu" in names_in(reference)):
        stored = read_statistics(reference, made_with, net.pool_dim, net.spatial_dim)
        require("made_with" in stored or "mu_s" not in stored or resize == "tf1",
                f"{reference} has ADM's mu_s, of images resized as with --resize=tf1: compare like with like")
        if rank == 0 and ("made_with" in stored or "mu_s" in stored):
            print(f"mu and sigma are those in {reference}")
        elif rank == 0:
            print(f"{reference} doesn't say how images were resized: EDM's have --resize=tf1, pytorch-fid's "
                  "--resize=pytorch")
    if real_images is None:
        return stored
    measured, path = measured_once(net, made_with, real_images, real_labels, place, rank, world)
    if rank == 0:
        print(f"{'features' if stored else 'statistics'} of {reference}, in ADM's format: {path}")
    return stored | {"features": measured["features"]} if stored else measured


def measured_once(net, made_with, real_images, real_labels, place, rank, world):
    """-> what `measure` says of the reference's images, and the path in CACHE where that is kept"""
    key = npz_checksum(reference) if reference.endswith(".npz") else data_checksum(real_images, real_labels)
    path = CACHE / f"{Path(reference).name.removesuffix('.npz')}-{key:08x}-{made_with}-{manifold_images}.npz"
    missing = not path.exists()
    barrier()  # all have looked
    if missing:
        with reserved(path) if rank == 0 else contextlib.nullcontext():
            measured = measure(net, real_images, real_labels, place, rank, world, name=reference)
            if rank == 0:
                with atomic(path) as f:
                    np.savez(f, made_with=made_with, **measured)
        barrier()
    return read_statistics(path, made_with, net.pool_dim, net.spatial_dim, advice=": delete it, and start again"), path


# ----------------------------------------------------------------------------------------------------
# the comparison


def compare(real, generated, device, classes=()):
    """-> {name: value} of the metrics.

    real, generated: dicts from `measure`; of the real side, mu and sigma are enough
    classes: their names, for the share recognised of each class; (): left out
    """
    result = {"FID" if features == "inception" else "FD-classifier":
              frechet_distance(real["mu"], real["sigma"], generated["mu"], generated["sigma"])}
    if features == "inception":
        if "mu_s" in real:
            result["sFID"] = frechet_distance(real["mu_s"], real["sigma_s"], generated["mu_s"], generated["sigma_s"])
        result["Inception Score"], result["IS std"] = generated["inception_score"]
    if "features" in real:
        result |= compare_rows(real["features"], generated["features"], device)
    if features == "classifier" and math.isfinite(generated["recognised"]):
        result["recognised"] = generated["recognised"]
        if classes:  # NaN: no image was asked to be of this class
            shares = zip(classes, generated["recognised_by_class"].tolist())
            result["recognised by class"] = {name: share for name, share in shares if not math.isnan(share)}
    return result


def compare_rows(real, generated, device):
    """-> {name: value} of the metrics that need single rows of features, arrays (N, D), (M, D)."""
    real, generated = (torch.from_numpy(x).to(device) for x in (real, generated))
    vendi = {"Vendi score": vendi_score(generated),
             "Vendi protocol": f"Vendi score of {len(generated):,} samples, by cosines: compare equal numbers only"}
    if features == "inception":
        protocol = (f"precision and recall as in ADM's program: {len(real):,} reference images, "
                    f"{len(generated):,} samples")
    else:
        real, generated = equally_many(real, generated, manifold_images)
        protocol = f"precision and recall of equally many: {len(real):,} of each side"
    precision, recall = precision_recall(real, generated)
    distance, error = kernel_distance(real, generated)
    return {"precision": precision, "recall": recall, "KID": distance, "KID se": error, "protocol": protocol} | vendi


def too_few(dim, *sides):
    """-> a warning for each side with fewer rows than dimensions. sides: (count or None, what)"""
    return [f"warning: {count:,} {what} are fewer than the {dim:,} dimensions of the features: distances come out "
            "too large" for count, what in sides if count and count < dim]


def shared_codes(codes, labels, count):
    """-> [a warning] if images next to each other often have the same code and label, else [].

    codes: (count, m), or any other array that the file calls so; labels: (count,) or None
    """
    if codes.dtype.kind not in "iu" or codes.ndim != 2 or len(codes) != count or not codes.shape[1]:
        return []  # not from sample.py, or from a model without codes
    differs = (codes[1:] != codes[:-1]).any(1)
    if labels is not None:
        differs |= labels[1:] != labels[:-1]
    drawn = 1 + int(differs.sum())
    return [f"warning: neighbours share codes: {count:,} images have {drawn:,} codes, so the images are not "
            "independent; sample.py --per_code=1 draws a code for each image"] * (drawn < 0.9 * count)


def report(result, warnings, target, **head):
    """Prints the table of results and the warnings; writes head and table to the file `target`."""
    for title, value in result.items():
        if isinstance(value, dict):
            for name, share in value.items():
                print(f"  {name:22}{share:10.4g}")
        elif isinstance(value, str):
            print(f"  {value}")
        elif title == "KID":
            print(f"{title:24}{value:10.4g} +- {result['KID se']:.2g}")
        elif title != "KID se":
            print(f"{title:24}{value:10.4g}")
    for line in warnings:
        print(line)
    with atomic(target) as f:
        f.write(json.dumps(head | result, indent=1).encode())
    print(f"{target} is ready")


# ----------------------------------------------------------------------------------------------------
# does the distance see what it should?


def check_distance(net, real_images, real_labels, place, rank, world):
    """-> whether the distance between two halves of the real images grows as one is made worse.
    Prints the distances."""
    one_half, other_half = (np.sort(half) for half in np.array_split(split(len(real_images), 0)[0][:10_000], 2))
    x = real_images[other_half]
    rng = np.random.default_rng(0)

    def blurred(radius):
        pictures = [Image.fromarray(image.squeeze()).filter(ImageFilter.GaussianBlur(radius)) for image in x]
        return np.stack([np.asarray(picture) for picture in pictures]).reshape(x.shape)

    def noised(std):
        return (x + rng.normal(0, std, x.shape)).round().clip(0, 255).astype(np.uint8)

    ladders = [[("blurred, by 0.5 pixels", blurred(0.5)), ("blurred, by 1 pixel", blurred(1))],
               [("noise of 8 in 255", noised(8)), ("noise of 24 in 255", noised(24))]]
    if real_labels is not None:
        c = real_labels[other_half]
        present = np.unique(c)
        dropped = [(f"{lost} of {len(present)} classes missing", x[~np.isin(c, present[:lost])]) for lost in (1, 3)]
        ladders.append([(name, left) for name, left in dropped if len(left) >= SCORE_SPLITS])
    real = measure(net, real_images[one_half], None, place, rank, world, name="one half")

    def distance(worse, name):
        other = measure(net, worse, None, place, rank, world, name=name)
        return frechet_distance(real["mu"], real["sigma"], other["mu"], other["sigma"])

    floor, rises = distance(x, "the other half"), True
    lines = [f"distance from {len(one_half):,} images of {reference}", f"{'as many others':32}{floor:10.3f}"]
    for ladder in ladders:
        last = floor
        for name, worse in ladder:
            value = distance(worse, name)
            lines.append(f"{name:32}{value:10.3f}" + "   does not rise" * (value <= last))
            rises, last = rises and value > last, value
    if rank == 0:
        print("\n".join(lines))
    return rises


# ----------------------------------------------------------------------------------------------------
# the run


def compare_features(path, device):
    """--features=FILE.npz: reads the features, prints the table."""
    real, generated = read_features(path)
    moments = [value for x in (real, generated) for value in (x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))]
    print(f"features of {path}: {len(generated):,} rows of generated, {len(real):,} of real, "
          f"{real.shape[1]:,} dimensions")
    report({"FD": frechet_distance(*moments)} | compare_rows(real, generated, device),
           too_few(real.shape[1], (len(generated), "rows of generated"), (len(real), "rows of real")),
           f"{path.removesuffix('.npz')}.features.json", features=path, count=len(generated), real_count=len(real))


def find_network(real_images, real_labels, num_classes, samples, sample_labels, place, rank):
    """-> the network that measures, the name of its features, a line that describes it.
    Raises UserError if the classifier can't compare these images."""
    if features == "inception":
        # 6d: the layer of sFID's features. Older files, made with inception-tf1, have those of 6e
        net, made_with = find_inception(weights, resize, place, rank), f"inception-{resize}-6d"
        program = "TensorFlow 1" if resize == "tf1" else "pytorch-fid"
        return net, made_with, f"by Inception, of 299 x 299 x 3: resized as in {program}"
    require(num_classes, f"the data set {reference} has no class labels: --features=classifier needs them")
    require(samples is None or samples.shape[1:] == real_images.shape[1:],
            f"{images} and {reference} have images of different shapes: a classifier compares images of one shape")
    classes = np.unique([-1] if sample_labels is None else sample_labels)
    require(-1 <= classes[0] and classes[-1] < num_classes, f"{images} has labels {classes[0]} ... {classes[-1]}: "
            f"{reference} has {num_classes} classes, 0 ... {num_classes - 1}")
    net, accuracy = find_classifier(CACHE, reference, real_images, real_labels, num_classes, place, rank)
    note = f"by a classifier that recognises {accuracy:.1%} of held-out images: not FID, nor to be compared with it"
    return net, f"classifier-{weights_checksum(net.state_dict()):08x}", note


def compare_images(place, rank, world):
    """Opens the reference and the samples, measures both, prints the table; or the self-check's."""
    real_images, real_labels, num_classes = None, None, 0  # as for a file with statistics alone
    if not reference.endswith(".npz"):
        real_images, real_labels, num_classes = load(reference)
    elif {"images", "arr_0"} & set(names_in(reference)):
        real_images, real_labels = open_images(reference)
    samples, sample_labels = open_images(images) if images and not self_check else (None, None)
    for name, x in ((reference, real_images), (images, samples)):
        if x is not None:
            require(len(x) >= SCORE_SPLITS and x.shape[3] in (1, 3),
                    f"{name} has images {x.shape}: at least {SCORE_SPLITS} of 1 or 3 channels are wanted")
    net, made_with, note = find_network(real_images, real_labels, num_classes, samples, sample_labels, place, rank)

    if self_check:
        require(check_distance(net, real_images, real_labels, place, rank, world),
                "the distance does not rise at every step: don't trust it here")
        return
    real = reference_statistics(net, made_with, real_images, real_labels, place, rank, world)
    if not images:
        return
    generated = measure(net, samples, sample_labels, place, rank, world, name=images,
                        keep=MOST_SAMPLES if features == "inception" else None)
    if rank > 0:
        return

    result = compare(real, generated, place, class_names(reference) if 0 < num_classes <= CLASSES_SHOWN else ())
    counts = dict(count=len(samples), real_count=int(real["count"]) if "count" in real else None)
    warnings = too_few(net.pool_dim, *zip(counts.values(), (f"images of {images}", f"images of {reference}")))
    if images.endswith(".npz"):
        with open_npz(images, large=IMAGES) as f:  # what sample.py adds
            for title, key in (("NFE", "nfe"), ("seconds per image", "seconds")):
                value = array_in(f, key)
                if value.dtype.kind in "iuf" and value.size:
                    result[title] = float(value.mean())
            warnings += shared_codes(array_in(f, "codes"), sample_labels, len(samples))
    ways = [(made_of(source) or {}).get("transform") for source in (images, reference)]
    if all(ways) and ways[0] != ways[1]:
        warnings.append(f"warning: the images behind {images} were resized by {ways[0]}, those of {reference} by "
                        f"{ways[1]}: part of the distance comes from that")
    if features == "classifier" and "recognised" not in result:
        warnings.append(f"{images} has no class labels: the share recognised is left out")

    for name, x in ((images, samples), (reference, real_images)):
        print(name if x is None else f"{len(x):,} images of {name}, {' x '.join(map(str, x.shape[1:]))}")
    print(note)
    report(result, warnings, f"{images.rstrip('/').removesuffix('.npz')}.{features}.json",
           images=images, reference=reference, features=made_with, **counts)


def main(argv=()):
    configure(globals(), argv)
    of_features, of_file = features.endswith(".npz"), reference.endswith(".npz")
    require(features in ("inception", "classifier") or of_features,
            f"--features is an .npz of features, inception or classifier, not {features}")
    require(resize in ("pytorch", "tf1"), f"--resize is pytorch or tf1, not {resize}")
    require(batch_size > 0 and manifold_images > NEIGHBOURS,
            f"batch_size must be positive, manifold_images above {NEIGHBOURS}")
    require(not (of_features and self_check), f"--self_check measures images that it makes, and {features} has "
            "features alone: say --features=inception or classifier")
    require(of_features or not of_file or (features == "inception" and images and not self_check),
            f"--reference={reference} is a file: it needs --features=inception and --images=; --features=classifier "
            "and --self_check need a data set's name")
    rank, world, place = start_processes(device)
    torch.backends.cudnn.allow_tf32 = False  # full precision
    if not of_features:
        compare_images(place, rank, world)
    elif rank == 0:
        compare_features(features, place)
    leave_processes()


if __name__ == "__main__":
    main(sys.argv[1:])
