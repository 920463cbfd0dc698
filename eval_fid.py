"""
How good are samples? The field's image metrics, against a data set.

    python eval_fid.py --data=imagenet64 --images=out/imagenet64/samples.npz
    torchrun --nproc_per_node=8 eval_fid.py --data=imagenet64 --images=out/imagenet64/samples.npz
    python eval_fid.py --data=VIRTUAL_imagenet64_labeled.npz --images=out/imagenet64/samples.npz    # ADM's reference batch
    python eval_fid.py --data=imagenet-64x64.npz --images=out/imagenet64/samples.npz    # EDM's statistics: FID alone
    python eval_fid.py --data=imagenet64 --images=generated           # a folder of image files, all of one size
    python eval_fid.py --features=classifier                          # without Inception's weights; on out/samples.npz
    python eval_fid.py --features=classifier --self_check=True        # does the measure see what it should?
    python eval_fid.py --features=dinov2.npz                          # of any network: its features, `real` and `generated`

With --features=inception: FID, sFID, KID (lower is better), Inception Score (higher), precision and recall (0 ... 1, higher),
these two by ADM's protocol: 10,000 reference images against all samples (at most 100,000).
With --features=classifier, the same distance between the features of a small classifier that is trained here on the data
set's labels: FD-classifier, KID, precision and recall (of equally many on each side), and the share of samples recognised as
the class they were asked for. FD-classifier can't be compared with FID, which measures in another network's features, nor
between two classifiers. The classifier has seen the data set: a fresh real image is a little further from it than one of its
own.
With --features=FILE.npz, of two arrays, real (N, D) and generated (M, D): FD, KID, precision and recall (equally many) of
these features. Nothing else is needed, neither images nor a data set.

Prints a table, and writes it next to the images as NAME.inception.json or NAME.classifier.json, or next to the features as
FILE.features.json. What is computed on the data set is kept in datasets/features/, as .npz files in ADM's format (mu, sigma,
mu_s, sigma_s) with additions; --images= makes these alone.
"""

import contextlib
import json
import math
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter

from configurator import UserError, barrier, configure, leave_processes, require, start_processes, sum_over_processes
from data import (HERE, Shuffle, atomic, class_names, fingerprint, identity, load, load_checkpoint, made_of, open_images, open_npz,
                  save_checkpoint, split, to_float)
from inception import find_inception
from run import hold, progress, release

images = "out/samples.npz"  # an .npz with `images` (and `labels`), a folder or .zip of images, or a prepared data set's name
data = "fashion-mnist-10k"  # a prepared data set's name; for Inception also an .npz: EDM's statistics, ADM's batch, or images
features = "inception"  # or "classifier", or an .npz of features, `real` and `generated`
resize = "tf1"  # to Inception's 299 x 299, bilinear as in EDM's and ADM's programs and numbers; "pytorch": as in pytorch-fid
weights = ""  # of Inception; "": PyTorch's usual cache, or downloaded into it
self_check = False  # instead of --images: the data set against a half of it that is blurred, noised, or short of classes
manifold_images = 10_000  # most real images for precision, recall and KID; as many samples, or with Inception all samples
batch_size = 100  # of one process
device = "auto"

CACHE = HERE / "datasets" / "features"
SPLITS = 10  # of the Inception Score, in the images' order (ADM's program splits by 5,000: the same for 50,000)
K = 3  # nearest neighbours of precision and recall
ALL = 100_000  # where precision and recall take all samples, they take no more: the time grows as the square
CLASSES_SHOWN = 20  # data sets with more have no row for each class
SPATIAL = 17 * 17 * 7  # of Inception's features for sFID
IMAGES = ("images.npy", "arr_0.npy")  # what may be larger than memory in an .npz

# ----------------------------------------------------------------------------------------------------
# the yardstick for those who have no Inception weights


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> pool features (B, 64), None, class probabilities (B, classes)."""

    def __init__(self, img_channels, num_classes):
        super().__init__()
        layers = []
        for c_in, c_out in ((img_channels, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers[:-1])
        self.fc = nn.Linear(64, num_classes)

    def pool(self, x):
        return self.layers(x).mean((2, 3))

    def forward(self, x):
        pool = self.pool(x)
        return pool, None, self.fc(pool).softmax(dim=1)


def train_classifier(images, labels, num_classes, device, steps=1000, batch=100):
    """-> a Classifier of a data set's images uint8 (N, H, W, C) and labels, and its accuracy on up to 500 held-out ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Classifier(images.shape[3], num_classes).to(device)
    train, test = split(len(images), min(500, len(images) // 5))
    batches, shifts = Shuffle(train, 0), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    for step in progress(range(steps), desc="training the classifier"):
        which = batches.take(step * batch, batch)
        x = to_float(images[which], device).roll(tuple(shifts.integers(-2, 3, 2)), dims=(2, 3))
        loss = F.cross_entropy(net.fc(net.pool(x)), torch.from_numpy(labels[which]).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    test = np.sort(test)
    return net, measure(net.eval(), images[test], labels[test], device, name="its held-out accuracy")["recognised"]


def reserve(path):
    """To be called before long work whose result goes into CACHE as `path`: raises UserError where CACHE can't be written,
    and where another run is computing the same."""
    hold(path)
    with contextlib.suppress(OSError):  # said in the next line
        CACHE.mkdir(parents=True, exist_ok=True)
    require(os.access(CACHE, os.W_OK), f"can't write {CACHE}, where what is computed on a data set is kept: make it writable, "
            "or work in a copy of the repository")


def find_classifier(name, images, labels, num_classes, device, rank, **_):
    """-> the Classifier of this data set, trained by process 0 if that was not done before, and its accuracy."""
    path = CACHE / f"classifier-{name}-{identity(images, labels):08x}.pt"
    if rank == 0 and not path.exists():
        reserve(path)
        net, accuracy = train_classifier(images, labels, num_classes, device)
        save_checkpoint(path, dict(made_by="eval_fid", model=net.state_dict(), accuracy=accuracy))
        release(path)
    barrier()
    checkpoint = load_checkpoint(path, "eval_fid")
    net = Classifier(images.shape[3], num_classes)
    net.load_state_dict(checkpoint["model"])
    return net.to(device).eval().requires_grad_(False), checkpoint["accuracy"]


# ----------------------------------------------------------------------------------------------------
# the metrics


class Moments:
    """Mean (D,) and unbiased covariance (D, D) of rows that come in batches, in float64."""

    def __init__(self, dim, device):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, x):  # (B, D)
        x = x.double()
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def result(self):
        mu = self.sum / self.count
        sigma = (self.outer - self.count * mu.outer(mu)) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


def root(sigma):
    """-> F with F F^T = sigma, a column for each direction in which sigma is not 0 to rounding."""
    values, vectors = torch.linalg.eigh(torch.as_tensor(sigma, dtype=torch.float64))
    keep = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Between two Gaussians: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, Eq. 6).

    mu: (D,), sigma: (D, D), symmetric, possibly rank-deficient. The trace of the root of the product is the sum of the
    singular values of F1^T F2, where F F^T = sigma, so that no root of a non-symmetric matrix is needed.
    """
    F1, F2 = root(sigma1), root(sigma2)
    trace = torch.linalg.svdvals(F1.T @ F2).sum().item() if F1.numel() and F2.numel() else 0.0
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2)) - 2 * trace, 0.0)


def manifold_radii(x, tile=1000):
    """The distance of each row of (N, D) to its K-th nearest neighbour, itself not counted. (N,)"""
    return torch.cat([torch.cdist(part, x).topk(K + 1, largest=False).values[:, -1] for part in x.split(tile)])


def share_inside(x, support, radii, tile=1000):
    """The share of the rows of x (N, D) that lie within a radius (M,) of their row of `support` (M, D)."""
    return torch.cat([(torch.cdist(part, support) <= radii).any(1) for part in x.split(tile)]).double().mean().item()


def precision_recall(real, generated):
    """Feature rows (N, D), (M, D) -> precision, recall (Kynkaanniemi et al. 2019, Eq. 2; K = 3), in tiles.

    Radii shrink with the number of rows: only values from like numbers can be compared.
    (The paper's features are VGG-16's; here they are Inception's pool, as in ADM's program, or the classifier's.)
    """
    real, generated = real.double(), generated.double()
    return share_inside(generated, real, manifold_radii(real)), share_inside(real, generated, manifold_radii(generated))


def equally_many(real, generated):
    """Draws as many rows of the one side as of the other, at most manifold_images."""
    n = min(len(real), len(generated), manifold_images)
    return [x[np.random.default_rng(0).permutation(len(x))[:n]] for x in (real, generated)]


def kernel_distance(real, generated, tile=1000):
    """Feature rows (N, D), (M, D) -> KID (Binkowski et al. 2018), its standard error; in tiles.

    KID is the squared MMD with the kernel k(x, y) = (x . y / D + 1)^3, by the unbiased estimate from all pairs (Gretton et
    al. 2012, Eq. 3), without random subsets; it can be negative. It is mean(h_x) + mean(h_y), where h_x(x) is the mean of k
    from x to the other rows of its side less that to the rows of the other side.

    The standard error is that of the first-order terms of Hoeffding's decomposition, 4 var(h_x) / N + 4 var(h_y) / M. It errs
    on the upper side: the measured variances contain the second-order terms as well, twice what they add. Between equal
    distributions (degenerate: the first-order terms are 0) it is therefore sqrt(2) times the spread, far apart just the spread.
    """
    real, generated = real.double(), generated.double()

    def row_sums(x, y):  # of k(x_i, y_j) over j
        return torch.cat([(part @ y.T / x.shape[1] + 1).pow_(3).sum(1) for part in x.split(tile)])

    def first_order(x, y):
        itself = (x.square().mean(1) + 1) ** 3
        return (row_sums(x, x) - itself) / (len(x) - 1) - row_sums(x, y) / len(y)

    h_x, h_y = first_order(real, generated), first_order(generated, real)
    return (h_x.mean() + h_y.mean()).item(), 2 * math.sqrt(h_x.var() / len(h_x) + h_y.var() / len(h_y))


def inception_score(prob_sums, log_sums, counts):
    """exp(E KL(p(y | x) || p(y))) for each of the splits of the images (Salimans et al. 2016): mean, standard deviation.

    prob_sums: sums of p over a split's images (S, Y); log_sums: of sum_y p ln p (S,); counts: images (S,)
    """
    marginal = prob_sums / counts[:, None]
    scores = (log_sums / counts + torch.special.entr(marginal).sum(1)).exp()
    return scores.mean().item(), scores.std(correction=0).item()


# ----------------------------------------------------------------------------------------------------
# one pass over a set of images


@torch.no_grad()
def measure(net, images, labels, device="cpu", rank=0, world=1, name="images", keep=None):
    """All that the metrics need to know of a set of images, by one pass over it, shared among the processes.

    images: uint8 (N, H, W, C), sliced, so that it can be larger than memory; labels: int64 (N,), -1 for none, or None.
    -> a dict: count; mu, sigma and, of Inception, mu_s, sigma_s, float64; features of at most `keep` images (None:
    manifold_images), float32; inception_score; recognised: the share to which the network gives its label, and
    recognised_by_class (classes,), NaN without labels.
    """
    n = len(images)
    kept = np.sort(np.random.default_rng(0).permutation(n)[:keep or manifold_images])  # for precision, recall and KID
    pool, spatial, p = net(to_float(images[:1], device))  # for the widths
    moments = {key: Moments(x.shape[1], device) for key, x in (("", pool), ("_s", spatial)) if x is not None}
    features_kept = torch.zeros(len(kept), pool.shape[1], device=device)
    prob_sums, log_sums, counts = (torch.zeros(SPLITS, *tail, dtype=torch.float64, device=device)
                                   for tail in (p.shape[1:], (), ()))
    labelled, right = torch.zeros(2, p.shape[1], dtype=torch.float64, device=device)
    for start in progress(range(rank * batch_size, n, world * batch_size), desc=name, unit="batch", disable=rank > 0):
        x = to_float(images[start:start + batch_size], device)
        pool, spatial, p = net(x)
        for m, rows in zip(moments.values(), (pool, spatial)):
            m.update(rows)
        first, last = np.searchsorted(kept, [start, start + len(x)])
        features_kept[first:last] = pool[kept[first:last] - start]
        split_of = torch.arange(start, start + len(x), device=device) * SPLITS // n
        prob_sums.index_add_(0, split_of, p.double())
        log_sums.index_add_(0, split_of, -torch.special.entr(p.double()).sum(1))
        counts += split_of.bincount(minlength=SPLITS)
        if labels is not None:
            c = torch.from_numpy(labels[start:start + len(x)]).to(device)
            labelled += c[(c >= 0) & (c < len(labelled))].bincount(minlength=len(labelled))
            right += c[p.argmax(1) == c].bincount(minlength=len(right))
    if world > 1:
        sums_of_moments = [sums for m in moments.values() for sums in vars(m).values()]
        for sums in [features_kept, prob_sums, log_sums, counts, labelled, right, *sums_of_moments]:
            sum_over_processes(sums)
    found = dict(count=n, features=features_kept.cpu().numpy(), inception_score=inception_score(prob_sums, log_sums, counts),
                 recognised=(right.sum() / labelled.sum()).item(), recognised_by_class=(right / labelled).cpu().numpy())
    for key, m in moments.items():
        found[f"mu{key}"], found[f"sigma{key}"] = m.result()
    return found


def names_in(path):
    """The names of the arrays in an .npz; none where it can't be read, which is told when they are wanted."""
    try:
        with open_npz(path, large=IMAGES) as f:
            return f.files
    except Exception:  # whatever a broken file makes the decoders raise
        return []


def checksum(path):
    """CRC-32 of an .npz, from the checksums of its arrays, which stand in its directory."""
    with zipfile.ZipFile(path) as archive:
        return zlib.crc32(repr([(info.filename, info.CRC) for info in archive.infolist()]).encode())


def read_statistics(path, made_with, dim, advice=""):
    """Means and covariances of an .npz: mu and sigma (EDM's format), perhaps mu_s and sigma_s (ADM's), and of ours also
    made_with, count, features -> dict of arrays. Raises UserError where the file is none, or of other features than made_with.
    """
    try:
        with open_npz(path, large=IMAGES) as f:
            ours = ("made_with", "count", "features") if "made_with" in f else ()
            found = {key: f[key] for key in ("mu", "sigma", "mu_s", "sigma_s", *ours) if key in f}
        moments = [("mu", "sigma", dim)] + [("mu_s", "sigma_s", SPATIAL)] * ("mu_s" in found)
        for mu, sigma, _ in moments:
            found |= {key: found[key].astype(np.float64, casting="safe") for key in (mu, sigma)}
        have = str(found.get("made_with", made_with))
    except Exception as error:  # whatever a broken file makes the decoders raise
        raise UserError(f"{path} can't be read as statistics, an .npz with mu and sigma{advice} ({error})") from None
    require(have == made_with, f"{path} was made with the features {have}, not {made_with}: compare like with like")
    for mu, sigma, width in moments:
        shapes, values = (found[mu].shape, found[sigma].shape), found[sigma]
        require(shapes == ((width,), (width, width)) and np.isfinite(found[mu]).all() and np.allclose(values, values.T),
                f"{path} has {mu} {shapes[0]} and {sigma} {shapes[1]}, or values that can't be: a mean and covariance of "
                f"{width} dimensions are wanted")
    return found


def statistics_of(net, made_with, images, labels, rank, **where):
    """What `measure` finds of the real images, kept in CACHE -> dict of arrays.

    Where `data` is a file with means and covariances, these are taken, and its images, if any, give the features alone:
    ADM's are of a whole data set, with 10,000 of its images.
    """
    given, dim = {}, net.fc.in_features
    if data.endswith(".npz") and (images is None or "mu" in names_in(data)):
        given = read_statistics(data, made_with, dim)
        require("made_with" in given or "mu_s" not in given or resize == "tf1",
                f"{data} has ADM's mu_s, of images resized as with --resize=tf1: compare like with like")
        if rank == 0 and ("made_with" in given or "mu_s" in given):
            print(f"mu and sigma are those in {data}")
        elif rank == 0:
            print(f"{data} doesn't say how images were resized: EDM's have --resize=tf1, pytorch-fid's --resize=pytorch")
    if images is None:
        return given
    key = checksum(data) if data.endswith(".npz") else identity(images, labels)
    path = CACHE / f"{Path(data).name.removesuffix('.npz')}-{key:08x}-{made_with}-{manifold_images}.npz"
    missing = not path.exists()
    barrier()  # all have looked
    if missing:
        if rank == 0:
            reserve(path)
        found = measure(net, images, labels, rank=rank, name=data, **where)
        if rank == 0:
            with atomic(path) as f:
                np.savez(f, made_with=made_with, **found)
            release(path)
        barrier()
    found = read_statistics(path, made_with, dim, advice=": delete it, and start again")
    if rank == 0:
        print(f"{'features' if given else 'statistics'} of {data}, in ADM's format: {path}")
    return given | {"features": found["features"]} if given else found


# ----------------------------------------------------------------------------------------------------
# the comparison


def compare_rows(real, generated, device):
    """What is taken of single rows of features, float arrays (N, D), (M, D): precision, recall, KID, and of how many."""
    real, generated = (torch.from_numpy(x).to(device) for x in (real, generated))
    if features == "inception":
        protocol = f"precision and recall as in ADM's program: {len(real):,} reference images, {len(generated):,} samples"
    else:
        real, generated = equally_many(real, generated)
        protocol = f"precision and recall of equally many: {len(real):,} of each side"
    precision, recall = precision_recall(real, generated)
    distance, error = kernel_distance(real, generated)
    return {"precision": precision, "recall": recall, "KID": distance, "KID se": error, "protocol": protocol}


def compare(real, found, device, classes=()):
    """The metrics, by name, of what `measure` found of generated images, against that of real ones, or mu and sigma alone.

    classes: the names of those that the share recognised is given for one by one.
    """
    result = {"FID" if features == "inception" else "FD-classifier":
              frechet_distance(real["mu"], real["sigma"], found["mu"], found["sigma"])}
    if features == "inception":
        if "mu_s" in real:
            result["sFID"] = frechet_distance(*(side[key] for side in (real, found) for key in ("mu_s", "sigma_s")))
        result["Inception Score"], result["IS std"] = found["inception_score"]
    if "features" in real:
        result |= compare_rows(real["features"], found["features"], device)
    if features == "classifier" and math.isfinite(found["recognised"]):
        result["recognised"] = found["recognised"]
        if classes:  # NaN: there is no such image
            shares = zip(classes, found["recognised_by_class"].tolist())
            result["recognised by class"] = {name: share for name, share in shares if not math.isnan(share)}
    return result


def read_features(path):
    """The arrays of an .npz with real (N, D) and generated (M, D), as float64. Raises UserError where they are not."""
    try:
        with open_npz(path, large=("real.npy", "generated.npy")) as f:
            missing = [key for key in ("real", "generated") if key not in f]
            if missing:
                raise ValueError(f"it has {', '.join(f.files) or 'nothing'}, not {' and '.join(missing)}")
            arrays = {key: np.asarray(f[key]) for key in ("real", "generated")}
    except Exception as error:  # whatever a broken file makes the decoders raise
        raise UserError(f"{path} is not an .npz with features, real (N, D) and generated (M, D): "
                        f"{getattr(error, 'strerror', None) or error}") from None
    for key, x in arrays.items():
        require(x.dtype.kind in "iuf" and x.ndim == 2 and x.shape[1],
                f"{path} has {key} {x.dtype} {x.shape}: numbers (rows, dimensions) are wanted, a row for each image")
        require(len(x) > K, f"{path} has {len(x)} rows of {key}: {K + 1} or more are wanted")
        arrays[key] = x.astype(np.float64)
        require((np.abs(arrays[key]) < 1e50).all(), f"{path} has NaN, infinity or numbers beyond 1e50 in {key}")
    real, generated = arrays.values()
    require(real.shape[1] == generated.shape[1], f"{path} has {real.shape[1]} dimensions in real, {generated.shape[1]} in "
            "generated: features of one network are wanted")
    return real, generated


def compare_features(path, device):
    """The table, and its file, of features from any network, in a file."""
    real, generated = read_features(path)
    moments = [value for x in (real, generated) for value in (x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))]
    print(f"features of {path}: {len(generated):,} rows of generated, {len(real):,} of real, {real.shape[1]:,} dimensions")
    report({"FD": frechet_distance(*moments)} | compare_rows(real, generated, device),
           too_few(real.shape[1], (len(generated), "rows of generated"), (len(real), "rows of real")),
           f"{path.removesuffix('.npz')}.features.json", features=path, count=len(generated), real_count=len(real))


def too_few(dim, *sides):
    """-> a warning for each of the sides, (count or None, what), that has fewer rows than dimensions."""
    return [f"warning: {count:,} {what} are fewer than the {dim:,} dimensions of the features: distances come out too large"
            for count, what in sides if count and count < dim]


def shared_codes(codes, labels, count):
    """-> a warning where neighbours among so many images often have the same code, (N, m), and label, (N,) or None."""
    if codes.dtype.kind not in "iu" or codes.ndim != 2 or len(codes) != count or not codes.shape[1]:
        return []  # not sample.py's, or of a model without codes
    differs = (codes[1:] != codes[:-1]).any(1)
    if labels is not None:
        differs |= labels[1:] != labels[:-1]
    drawn = 1 + int(differs.sum())
    return [f"warning: neighbours share codes: {count:,} images have {drawn:,} codes, so the images are not independent; "
            "sample.py --per_code=1 draws a code for each image"] * (drawn < 0.9 * count)


def array_in(f, key):
    """An array of an open .npz; an empty one where it has none of this name, or none that can be read."""
    try:
        return np.asarray(f[key])
    except Exception:  # whatever a broken file makes the decoders raise
        return np.empty(0)


def report(result, warnings, target, **head):
    """Prints the table of results, then the warnings, and writes the table to `target`, after the entries of `head`."""
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


def check_metric(net, real_images, real_labels, **where):
    """Prints how the distance from one half of the real images grows as the other half is made worse. -> whether it does"""
    reference, other = (np.sort(half) for half in np.array_split(split(len(real_images), 0)[0][:10_000], 2))
    x = real_images[other]
    rng = np.random.default_rng(0)

    def blurred(radius):
        pictures = [Image.fromarray(image.squeeze()).filter(ImageFilter.GaussianBlur(radius)) for image in x]
        return np.stack([np.asarray(picture) for picture in pictures]).reshape(x.shape)

    def noised(std):
        return (x + rng.normal(0, std, x.shape)).round().clip(0, 255).astype(np.uint8)

    ladders = [[("blurred, by 0.5 pixels", blurred(0.5)), ("blurred, by 1 pixel", blurred(1))],
               [("noise of 8 in 255", noised(8)), ("noise of 24 in 255", noised(24))]]
    if real_labels is not None:
        c = real_labels[other]
        present = np.unique(c)
        dropped = [(f"{lost} of {len(present)} classes missing", x[~np.isin(c, present[:lost])]) for lost in (1, 3)]
        ladders.append([(name, left) for name, left in dropped if len(left) >= SPLITS])
    real = measure(net, real_images[reference], None, name="one half", **where)

    def distance(images, name):
        found = measure(net, images, None, name=name, **where)
        return frechet_distance(real["mu"], real["sigma"], found["mu"], found["sigma"])

    floor, rises = distance(x, "the other half"), True
    lines = [f"distance from {len(reference):,} images of {data}", f"{'as many others':32}{floor:10.3f}"]
    for ladder in ladders:
        last = floor
        for name, worse in ladder:
            value = distance(worse, name)
            lines.append(f"{name:32}{value:10.3f}" + "   does not rise" * (value <= last))
            rises, last = rises and value > last, value
    if where["rank"] == 0:
        print("\n".join(lines))
    return rises


def main():
    in_file, of_file = data.endswith(".npz"), features.endswith(".npz")
    require(features in ("inception", "classifier") or of_file,
            f"--features is an .npz of features, inception or classifier, not {features}")
    require(resize in ("pytorch", "tf1"), f"--resize is pytorch or tf1, not {resize}")
    require(batch_size > 0 and manifold_images > K, f"batch_size must be positive, manifold_images above {K}")
    require(not (of_file and self_check), f"--self_check measures images that it makes, and {features} has features alone: say "
            "--features=inception or classifier")
    require(of_file or not in_file or (features == "inception" and images and not self_check), f"--data={data} is a file: it "
            "needs --features=inception and --images=; --features=classifier and --self_check need a data set's name")
    rank, world, place = start_processes(device)
    torch.backends.cudnn.allow_tf32 = False  # full precision
    if of_file:
        if rank == 0:
            compare_features(features, place)
        return
    where = dict(device=place, rank=rank, world=world)
    real_images, real_labels, num_classes = (None, None, 0) if in_file else load(data)
    if in_file and {"images", "arr_0"} & set(names_in(data)):
        real_images, real_labels = open_images(data)
    made_images, made_labels = open_images(images) if images and not self_check else (None, None)
    for name, x in ((data, real_images), (images, made_images)):
        if x is not None:
            require(len(x) >= SPLITS and x.shape[3] in (1, 3), f"{name} has images {x.shape}: at least {SPLITS} of 1 or 3 "
                    "channels are wanted")

    if features == "inception":
        # 6d: the layer of sFID's features, which in older files, made with inception-tf1, are another's
        net, made_with = find_inception(weights, resize, place, rank), f"inception-{resize}-6d"
        note = "by Inception, of 299 x 299 x 3: resized as in " + ("TensorFlow 1" if resize == "tf1" else "pytorch-fid")
    else:
        require(num_classes, f"the data set {data} has no class labels: --features=classifier needs them")
        require(made_images is None or made_images.shape[1:] == real_images.shape[1:],
                f"{images} and {data} have images of different shapes: a classifier compares images of one shape")
        classes = np.unique([-1] if made_labels is None else made_labels)
        require(-1 <= classes[0] and classes[-1] < num_classes, f"{images} has labels {classes[0]} ... {classes[-1]}: {data} has "
                f"{num_classes} classes, 0 ... {num_classes - 1}")
        net, accuracy = find_classifier(data, real_images, real_labels, num_classes, **where)
        made_with = f"classifier-{fingerprint(net.state_dict()):08x}"
        note = f"by a classifier that recognises {accuracy:.1%} of held-out images: not FID, nor to be compared with it"
    if self_check:
        require(check_metric(net, real_images, real_labels, **where), "the distance does not rise with each: don't trust it here")
        return
    real = statistics_of(net, made_with, real_images, real_labels, **where)
    if not images:
        return
    found = measure(net, made_images, made_labels, name=images, keep=ALL if features == "inception" else None, **where)
    if rank > 0:
        return

    result = compare(real, found, place, class_names(data) if 0 < num_classes <= CLASSES_SHOWN else ())
    counts = dict(count=len(made_images), real_count=int(real["count"]) if "count" in real else None)
    warnings = too_few(net.fc.in_features, *zip(counts.values(), (f"images of {images}", f"images of {data}")))
    if images.endswith(".npz"):
        with open_npz(images, large=IMAGES) as f:
            for title, key in (("NFE", "nfe"), ("seconds per image", "seconds")):
                value = array_in(f, key)
                if value.dtype.kind in "iuf" and value.size:
                    result[title] = float(value.mean())
            warnings += shared_codes(array_in(f, "codes"), made_labels, len(made_images))
    ways = [(made_of(source) or {}).get("transform") for source in (images, data)]
    if all(ways) and ways[0] != ways[1]:
        warnings.append(f"warning: the images behind {images} were resized by {ways[0]}, those of {data} by {ways[1]}: part of "
                        "the distance comes from that")
    if features == "classifier" and "recognised" not in result:
        warnings.append(f"{images} has no class labels: the share recognised is left out")
    for name, x in ((images, made_images), (data, real_images)):
        print(name if x is None else f"{len(x):,} images of {name}, {' x '.join(map(str, x.shape[1:]))}")
    print(note)
    report(result, warnings, f"{images.rstrip('/').removesuffix('.npz')}.{features}.json",
           images=images, data=data, features=made_with, **counts)


if __name__ == "__main__":
    configure(globals())
    main()
    leave_processes()
