"""
How good are samples? The field's image metrics, against a data set.

    python eval_fid.py --data=imagenet64 --images=out/imagenet64/samples.npz
    torchrun --nproc_per_node=8 eval_fid.py --data=imagenet64 --images=out/imagenet64/samples.npz
    python eval_fid.py --data=imagenet-64x64.npz --images=out/imagenet64/samples.npz    # EDM's statistics: FID alone
    python eval_fid.py --features=classifier                          # without Inception's weights; on out/samples.npz
    python eval_fid.py --features=classifier --self_check=True        # does the measure see what it should?

With --features=inception: FID, sFID (lower is better), Inception Score (higher), precision and recall (0 ... 1, higher).
With --features=classifier, the same distance between the features of a small classifier that is trained here on the data
set's labels: FD-classifier, precision and recall, and the share of samples recognised as the class they were asked for.
FD-classifier can't be compared with FID, which measures in another network's features, nor between two classifiers. The
classifier has seen the data set: a fresh real image is a little further from it than one of its own.

Prints a table, and writes it next to the images as NAME.inception.json or NAME.classifier.json. What is computed on the
data set is kept in datasets/features/, as .npz files in EDM's format (mu, sigma) with additions; --images= makes these alone.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tqdm import tqdm

from configurator import UserError, barrier, configure, require, start_processes
from data import (HERE, Shuffle, atomic, fingerprint, identity, load, load_checkpoint, open_images, open_npz, save_checkpoint, split,
                  to_float)
from inception import Inception, find_inception, load_inception, resize_tf1  # the tests take them from here

images = "out/samples.npz"  # an .npz with `images` (and `labels`), or a prepared data set's name
data = "fashion-mnist-10k"  # a prepared data set's name, or an .npz of statistics of Inception's features, mu and sigma
features = "inception"  # or "classifier"
resize = "tf1"  # to Inception's 299 x 299, bilinear as in EDM's and ADM's programs and numbers; "pytorch": as in pytorch-fid
weights = ""  # of Inception; "": PyTorch's usual cache, or downloaded into it
self_check = False  # instead of --images: the data set against a half of it that is blurred, noised, or short of classes
manifold_images = 10_000  # precision and recall take at most so many of each side, and equally many
batch_size = 100  # of one process
device = "auto"

CACHE = HERE / "datasets" / "features"
SPLITS = 10  # of the Inception Score, in the images' order (ADM's program splits by 5,000: the same for 50,000)
K = 3  # nearest neighbours of precision and recall

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
    for step in tqdm(range(steps), desc="training the classifier"):
        which = batches.take(step * batch, batch)
        x = to_float(images[which], device).roll(tuple(shifts.integers(-2, 3, 2)), dims=(2, 3))
        loss = F.cross_entropy(net.fc(net.pool(x)), torch.from_numpy(labels[which]).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    test = np.sort(test)
    return net, measure(net.eval(), images[test], labels[test], device, name="its held-out accuracy")["recognised"]


def find_classifier(name, images, labels, num_classes, device, rank, **_):
    """-> the Classifier of this data set, trained by process 0 if that was not done before, and its accuracy."""
    path = CACHE / f"classifier-{name}-{identity(images, labels):08x}.pt"
    if rank == 0 and not path.exists():
        net, accuracy = train_classifier(images, labels, num_classes, device)
        save_checkpoint(path, dict(made_by="eval_fid", model=net.state_dict(), accuracy=accuracy))
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

    Of the larger side as many rows are drawn as there are of the other: radii shrink with their number.
    (The paper's features are VGG-16's; here they are Inception's pool, as in ADM's program, or the classifier's.)
    """
    n = min(len(real), len(generated))
    real, generated = (x[np.random.default_rng(0).permutation(len(x))[:n]].double() for x in (real, generated))
    return share_inside(generated, real, manifold_radii(real)), share_inside(real, generated, manifold_radii(generated))


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
def measure(net, images, labels, device="cpu", rank=0, world=1, name="images"):
    """All that the metrics need to know of a set of images, by one pass over it, shared among the processes.

    images: uint8 (N, H, W, C), sliced, so that it can be larger than memory; labels: int64 (N,), -1 for none, or None.
    -> a dict: count; mu, sigma and, of Inception, mu_spatial, sigma_spatial, float64; features of at most manifold_images,
    float32; inception_score; recognised: the share to which the network gives its label, NaN without labels.
    """
    n = len(images)
    kept = np.sort(np.random.default_rng(0).permutation(n)[:manifold_images])  # for precision and recall
    pool, spatial, p = net(to_float(images[:1], device))  # for the widths
    moments = {key: Moments(x.shape[1], device) for key, x in (("", pool), ("_spatial", spatial)) if x is not None}
    features_kept = torch.zeros(len(kept), pool.shape[1], device=device)
    prob_sums, log_sums, counts = (torch.zeros(SPLITS, *tail, dtype=torch.float64, device=device)
                                   for tail in (p.shape[1:], (), ()))
    labelled, right = torch.zeros(2, dtype=torch.float64, device=device)
    for start in tqdm(range(rank * batch_size, n, world * batch_size), desc=name, unit="batch", disable=rank > 0):
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
            labelled += (c >= 0).sum()
            right += (p.argmax(1) == c).sum()
    if world > 1:
        for sums in [features_kept, prob_sums, log_sums, counts, labelled, right, *(t for m in moments.values() for t in vars(m).values())]:
            dist.all_reduce(sums)
    found = dict(count=n, features=features_kept.cpu().numpy(), inception_score=inception_score(prob_sums, log_sums, counts),
                 recognised=(right / labelled).item())
    for key, m in moments.items():
        found[f"mu{key}"], found[f"sigma{key}"] = m.result()
    return found


def statistics_of(net, made_with, images, labels, rank, **where):
    """What `measure` finds of the data set, kept in CACHE, or read from a file in EDM's format -> dict of arrays.

    Raises UserError where the file is none, or of other features than made_with.
    """
    path = Path(data)
    if images is not None:
        path = CACHE / f"{data}-{identity(images, labels):08x}-{made_with}-{manifold_images}.npz"
        missing = not path.exists()
        barrier()  # all have looked
        if missing:
            found = measure(net, images, labels, rank=rank, name=data, **where)
            if rank == 0:
                with atomic(path) as f:
                    np.savez(f, made_with=made_with, **found)
            barrier()
    try:
        with open_npz(path) as f:
            ours = ("made_with", "count", "mu_spatial", "sigma_spatial", "features") if "made_with" in f else ()
            found = {key: f[key] for key in ("mu", "sigma", *ours) if key in f}
        mu, sigma = found["mu"], found["sigma"] = [found[key].astype(np.float64, casting="safe") for key in ("mu", "sigma")]
        have = str(found.get("made_with", made_with))
    except Exception as error:  # whatever a broken file makes the decoders raise
        raise UserError(f"{path} can't be read as statistics, an .npz with mu and sigma"
                        f"{'' if images is None else ': delete it, and start again'} ({error})") from None
    require(have == made_with, f"{path} was made with the features {have}, not {made_with}: compare like with like")
    dim = net.fc.in_features
    require(mu.shape == (dim,) and sigma.shape == (dim, dim) and np.isfinite(mu).all() and np.allclose(sigma, sigma.T),
            f"{path} has mu {mu.shape} and sigma {sigma.shape}, or values that can't be: a mean and covariance of {dim} "
            "dimensions are wanted")
    if rank == 0 and "made_with" not in found:
        print(f"{path} doesn't say how images were resized: EDM's have --resize=tf1, pytorch-fid's --resize=pytorch")
    elif rank == 0:
        print(f"statistics of {data}, in EDM's format: {path}")
    return found


def compare(real, found, device):
    """The metrics, by name, of what `measure` found of generated images, against that of real ones, or mu and sigma alone."""
    result = {"FID" if features == "inception" else "FD-classifier":
              frechet_distance(real["mu"], real["sigma"], found["mu"], found["sigma"])}
    if features == "inception":
        if "mu_spatial" in real:
            result["sFID"] = frechet_distance(*(side[f"{key}_spatial"] for side in (real, found) for key in ("mu", "sigma")))
        result["Inception Score"], result["IS std"] = found["inception_score"]
    if "features" in real:
        result["precision"], result["recall"] = precision_recall(
            *(torch.from_numpy(side["features"]).to(device) for side in (real, found)))
    if features == "classifier" and math.isfinite(found["recognised"]):
        result["recognised"] = found["recognised"]
    return result


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
    require(features in ("inception", "classifier"), f"--features is inception or classifier, not {features}")
    require(resize in ("pytorch", "tf1"), f"--resize is pytorch or tf1, not {resize}")
    require(batch_size > 0 and manifold_images > K, f"batch_size must be positive, manifold_images above {K}")
    in_file = data.endswith(".npz")
    require(not in_file or (features == "inception" and images and not self_check), f"--data={data} is statistics of Inception's "
            "features, to compare --images= with: --features=classifier and --self_check need a data set's name")
    rank, world, place = start_processes(device)
    where = dict(device=place, rank=rank, world=world)
    torch.backends.cudnn.allow_tf32 = False  # full precision
    real_images, real_labels, num_classes = (None, None, 0) if in_file else load(data)
    made_images, made_labels = open_images(images) if images and not self_check else (None, None)
    for name, x in ((data, real_images), (images, made_images)):
        if x is not None:
            require(len(x) >= SPLITS and x.shape[3] in (1, 3), f"{name} has images {x.shape}: at least {SPLITS} of 1 or 3 channels "
                    "are wanted")

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
    spent = {}
    if images.endswith(".npz"):
        with open_npz(images, large=("images.npy", "arr_0.npy")) as f:
            for title, key in (("NFE", "nfe"), ("seconds per image", "seconds")):
                value = f[key] if key in f else np.empty(0)
                if value.dtype.kind in "iuf" and value.size:
                    spent[title] = float(value.mean())
    real = statistics_of(net, made_with, real_images, real_labels, **where)
    found = measure(net, made_images, made_labels, name=images, **where) if images else None
    if rank > 0 or not images:
        return

    result = compare(real, found, place) | spent
    counts = dict(count=len(made_images), real_count=int(real["count"]) if "count" in real else None)
    for name, x in ((images, made_images), (data, real_images)):
        print(name if x is None else f"{len(x):,} images of {name}, {' x '.join(map(str, x.shape[1:]))}")
    print(note)
    for title, value in result.items():
        print(f"{title:24}{value:10.4g}")
    for name, count in zip((images, data), counts.values()):
        if count and count < net.fc.in_features:
            print(f"warning: {count:,} images of {name} are fewer than the {net.fc.in_features:,} dimensions of the features: "
                  "distances come out too large")
    if features == "classifier" and "recognised" not in result:
        print(f"{images} has no class labels: the share recognised is left out")
    target = f"{images.removesuffix('.npz')}.{features}.json"
    with atomic(target) as f:
        f.write(json.dumps(dict(images=images, data=data, features=made_with, **counts, **result), indent=1).encode())
    print(f"{target} is ready")


if __name__ == "__main__":
    configure(globals())
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
