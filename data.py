"""
Image data sets: as the training scripts see them, and preparing them. Nothing here knows a network.

    python data.py fashion-mnist                                    # downloads; also mnist, cifar10
    python data.py cifar10 --source=cifar-10-batches-bin            # files that are already here
    python data.py imagenet64 --source=ILSVRC/train --resolution=64 # a folder or .zip with one subfolder a class
    python data.py imagenet64 --source=imagenet-64x64.zip           # a .zip or folder of EDM's dataset_tool.py
    python data.py holiday --source=~/photographs --exif=True       # one's own photographs

Each turns a source into datasets/NAME/ with images.npy, uint8 (N, H, W, C), labels.npy, int64 (N,), classes.json (the
classes' names) and made.json (how the images were made), which train_stage1.py then reads as --dataset=NAME through a
memory map. The 10,000 images of Fashion-MNIST's test split come with the repository: fashion-mnist-10k.
"""

import hashlib
import json
import mmap
import os
import shutil
import sys
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import atomic
from configurator import UserError, configure, require
from npz import NpzImages, open_npz, write_npy_header
from run import hold, progress, release
from sources import TRANSFORMS, Pictures, is_zip, list_images, open_source, read_idx, require_images

name = ""  # of the data set; `python data.py NAME` is short for --name=NAME
source = ""  # file or folder to read; "" downloads a public set
resolution = 0  # pixels a side; 0: 64 for a folder; a .zip, or a folder of EDM's dataset_tool.py, keeps its size
transform = "center-crop"  # how images get that size: as in EDM, cropped, then Lanczos; "center-crop-dhariwal": as in ADM
exif = False  # turn photographs upright, as EXIF says; EDM and ADM don't, so leave it off for ImageNet
workers = os.cpu_count() or 1  # processes that decode images
overwrite = False  # replace an existing datasets/NAME

HERE = Path(__file__).resolve().parent
EMBEDDED = "fashion-mnist-10k"
UNREADABLE_SHARE = 0.01  # of the images: more than this is an error
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

# ----------------------------------------------------------------------------------------------------
# data sets, as the training scripts see them


def load(name, root=HERE / "datasets"):
    """-> images uint8 (N, H, W, C), labels int64 (N,) or None, number of classes (0 without labels).

    Prepared sets are memory-mapped: the operating system's file cache holds the pages, not the process.
    Raises UserError where there is no such data set.
    """
    if name == EMBEDDED:
        images, labels = read_idx(root / "embedded" / "t10k-images-idx3-ubyte.gz")
        return images, labels, 10
    folder = root / name
    if not name or not (folder / "classes.json").is_file():
        have = sorted([EMBEDDED] + [p.parent.name for p in root.glob("*/classes.json")])
        how = name if name in PUBLIC else "NAME --source=FOLDER"
        raise UserError(f"there is no data set {name!r}, nor a file or folder (there are: {', '.join(have)}); "
                        f"`python data.py {how}` prepares one")
    try:
        classes = json.loads((folder / "classes.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy") if classes else None
        if not isinstance(classes, list) or not isinstance(images, np.memmap) or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError("classes.json is not a list, or images.npy not uint8 (N, H, W, C)")
        whole = not classes or labels.dtype.kind in "iu" and labels.ndim == 1
        if not whole or classes and not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels.npy has labels outside 0 ... {len(classes) - 1}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}): prepare it anew with --overwrite=True") from None
    if classes:
        require(len(labels) == len(images), f"{folder} is damaged ({len(images)} images, {len(labels)} labels): "
                                            "prepare it anew with --overwrite=True")
    if hasattr(mmap, "MADV_RANDOM"):
        images.base.madvise(mmap.MADV_RANDOM)  # no read-ahead: batches are drawn from all over the file
    return images, labels, len(classes)


def class_names(name, root=HERE / "datasets"):
    """The names of the classes of a data set that `load` knows, [] without labels."""
    return FASHION if name == EMBEDDED else [*map(str, json.loads((root / name / "classes.json").read_text()))]


def classes_of(checkpoint):
    """The names of the classes that a checkpoint of stage 1 was trained with; [] without. Older ones do not have them."""
    count, known = checkpoint["model_args"]["label_dim"], FASHION if checkpoint["config"]["dataset"] == EMBEDDED else []
    return (checkpoint.get("classes") or known or [str(c) for c in range(count)])[:count]


def made_of(source, root=HERE / "datasets"):
    """How the images of a prepared data set were made, or the training images behind the samples in an .npz: the dict of
    made.json, or None where it is not recorded."""
    try:
        if Path(source).suffix != ".npz":
            made = json.loads((root / source / "made.json").read_text())
        else:
            with open_npz(source, large=("images.npy", "arr_0.npy")) as found:
                # ADM's reference batches, or sample.py's
                made = dict(transform="center-crop-dhariwal") if "mu_s" in found else json.loads(str(found["made"]))
        return made if isinstance(made, dict) else None
    except Exception:  # whatever a broken or foreign file makes the decoders raise
        return None


def load_trained_on(config, path):
    """The data set of the run with this configuration, whose checkpoint is `path` -> images, labels, and the indices of
    those that it was trained on and of those held out. Raises UserError where it has changed since.
    """
    images, labels, _ = load(config["dataset"])
    require(data_checksum(images, labels) == config["data_identity"], f"the data set {config['dataset']} has changed since "
            f"{path} was trained on it: prepare it as it was, or train stage 1 anew with --overwrite=True")
    return images, labels, *split(len(images), config["held_out"])


def data_checksum(images, labels):
    """CRC-32 of a data set's shape, labels and 1,000 of its images: tells whether it is still the same."""
    some = images[np.linspace(0, len(images) - 1, min(len(images), 1000), dtype=np.int64)]
    return zlib.crc32(repr(images.shape).encode() + (b"" if labels is None else labels.tobytes()) + some.tobytes())


def file_stamp(images):
    """What changes when somebody writes to the file that these images are mapped from; None for images in memory."""
    if not isinstance(images, np.memmap):
        return None
    try:
        found = os.stat(images.filename)
        return found.st_ino, found.st_size, found.st_mtime_ns
    except OSError:
        return "it is gone"


def split(count, held_out):
    """Indices of `count` images -> (training, held-out), the same split for every run and script."""
    order = np.random.default_rng(0).permutation(count)
    return order[held_out:], order[:held_out]


class Shuffle:
    """The endless sequence of `indices`, shuffled anew each epoch by `seed`. Item i is always the same,
    so that a run can go on at any i, and any process can take any part."""

    def __init__(self, indices, seed):
        self.indices, self.seed, self.epoch = indices, seed, -1

    def take(self, start, count):
        """-> items start ... start + count - 1, int64 (count,)"""
        parts = []
        while count:
            epoch, offset = divmod(start, len(self.indices))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.indices)
            parts.append(self.order[offset:offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)


def to_float(images, device="cpu"):
    """uint8 array (B, H, W, C) -> float32 tensor (B, C, H, W) in [-1, 1], channels last in memory."""
    x = torch.from_numpy(np.require(images, requirements="W"))  # a copy of what is mapped from a file and read-only
    if torch.device(device).type == "cuda":
        x = x.pin_memory().to(device, non_blocking=True)
    return x.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """The inverse of `to_float`: float (B, C, H, W) in [-1, 1], clipped -> uint8 array (B, H, W, C)"""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def read_images(source, img_shape, **settings):
    """Images to take codes from: an image file, a folder or .zip of them, an .npz with `images` (and `labels`), or the name
    of a prepared data set. img_shape: (C, H, W), to which image files are brought by `decode`, with these settings.

    -> uint8 (N, H, W, C), labels int64 (N,) or None, and the order to take them in: a data set's is shuffled
    """
    channels, size, _ = img_shape
    prepared = is_prepared(source)
    if Path(source).suffix != ".npz" and Path(source).exists() and not prepared:
        images, labels = open_pictures(source, size=size, channels=channels, **settings)
    else:
        images, labels = open_images(source)
    require(images.shape[1:] == (size, size, channels) and len(images),
            f"{source} has images of the shape {images.shape}: this model's are (N, {size}, {size}, {channels})")
    return images[:], labels, split(len(images), 0)[0] if prepared else np.arange(len(images))


def is_prepared(source, root=HERE / "datasets"):
    return source == EMBEDDED or (root / source / "classes.json").is_file()


def open_pictures(source, **settings):
    """An image file, or all in a folder or .zip -> `Pictures` with these settings, and the labels of dataset.json, int64
    (N,), or None."""
    if Path(source).is_file() and not is_zip(source):
        return Pictures([(source, Path(source))], **settings), None
    files, labels, _, _ = list_images(source, data_set=False)
    return Pictures(files, **settings), None if labels is None else np.array(labels, np.int64)


def open_images(source):
    """The images of an .npz, of a prepared data set, or of a folder or .zip of image files, as they are: uint8
    (N, H, W, C), read in slices, and labels int64 (N,) or None.

    An .npz is one of sample.py's, with `images` and perhaps `labels`, or of ADM's programs: arr_0, arr_1.
    """
    if Path(source).suffix != ".npz":
        return open_pictures(source, channels=0) if Path(source).exists() and not is_prepared(source) else load(source)[:2]
    try:
        images = NpzImages(source)
        with open_npz(source, large=("images.npy", "arr_0.npy")) as found:
            labels = next((found[key] for key in ("labels", "arr_1") if key in found), None)
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
            raise ValueError(f"its labels are {labels.dtype} {labels.shape}, not one integer an image")
    except Exception as error:  # whatever a broken file makes the decoders raise
        raise UserError(f"{source} is not an .npz with `images`: {getattr(error, 'strerror', None) or error}") from None
    return images, None if labels is None else labels.astype(np.int64)


# ----------------------------------------------------------------------------------------------------
# preparing

PUBLIC = {  # name -> address, {file: MD5}
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
}
OURS = {"images.npy", "labels.npy", "classes.json", "made.json"}  # all that a prepared data set's folder has


def download(name, root):
    """Fetches a public set's files that are not there yet, checks their MD5 -> the folder they are in."""
    address, files = PUBLIC[name]
    folder = root / "downloads" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from None
    for file, md5 in files.items():
        path = folder / file
        if not path.exists():
            by_hand = f"put {address}{file} into {folder} by other means, and start again"
            try:
                with urllib.request.urlopen(address + file, timeout=30) as response, atomic(path) as f, \
                        progress(total=int(response.headers.get("Content-Length", 0)), unit="B", unit_scale=True,
                             desc=file) as bar:
                    while block := response.read(1 << 20):
                        f.write(block)
                        bar.update(len(block))
            except OSError as error:  # URLError is one, so are time-outs
                raise UserError(f"can't download {address}{file} ({getattr(error, 'reason', error)}): {by_hand}") from None
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "md5").hexdigest() if hasattr(hashlib, "file_digest") \
                else hashlib.md5(f.read()).hexdigest()
        require(found == md5, f"{path} is damaged: its MD5 is {found} instead of {md5}. Delete it, and start again")
    return folder


def overlap(a, b):
    """Whether one of two paths is the other, or lies in it, by whatever links."""
    a, b = Path(a).resolve(), Path(b).resolve()
    return any(outer.exists() and part.exists() and part.samefile(outer)
               for inner, outer in ((a, b), (b, a)) for part in (inner, *inner.parents))


def is_ours(folder, complete=True):
    """Whether this folder has only files that `prepare` writes; complete=False: some may be missing (it was interrupted)."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {None}
    return found <= OURS and (not complete or not found or "classes.json" in found)


def prepare(name, source, resolution=0, transform="center-crop", exif=False, workers=1, overwrite=False,
            root=HERE / "datasets"):
    """Turns a source into root/name, in a folder of another name until it is complete; settings as in `open_source`.

    Images that can't be read are named and skipped, up to UNREADABLE_SHARE of all. Raises UserError where there are more,
    where the source is none, or overlaps the place where the data set goes, for images of different sizes, classes without
    images, and a full disk. What prepare has not made itself is never removed.
    """
    require(Path(name).name == name and name not in ("", ".", "..", "embedded", "downloads", "features", EMBEDDED)
            and not name.endswith(".partial"), f"{name!r} can't be a data set's name: say `python data.py NAME --source=...`")
    folder = (root / name).resolve()  # perhaps a link to a larger disk
    partial = folder.with_name(f"{folder.name}.partial")
    for place in (folder, partial):
        require(not source or not overlap(source, place), f"the images in {source} are where the data set goes, {place}: "
                f"choose another name, as in `python data.py my-{name} --source={source}`, or move the images elsewhere")
        require(not place.exists() or is_ours(place, complete=place == folder), f"{place} is not a data set that data.py "
                "prepared, or has other files in it: move it away, or choose another name")
    require(overwrite or not folder.exists() or not any(folder.iterdir()), f"{folder} exists: --overwrite=True replaces it")
    require(resolution >= 0, f"resolution can't be negative: it is {resolution}")
    require(0 < workers <= 1000, f"workers must be in 1 ... 1000, not {workers}")
    require(transform in TRANSFORMS, f"--transform is {' or '.join(TRANSFORMS)}, not {transform}")
    if not source:
        require(name in PUBLIC, f"{name} is not one of the sets that can be downloaded ({', '.join(PUBLIC)}): "
                                "name its files with --source=")
        source = download(name, root)
    total, classes, items, made = open_source(source, resolution, transform, exif, workers)
    if name == "fashion-mnist" and len(classes) == len(FASHION):
        classes = FASHION
    hold(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted preparation
    try:
        partial.mkdir(parents=True)
        with open(partial / "images.npy", "wb") as f:
            labels, shape, unreadable = [], None, 0
            for file, image, label in progress(items, total=total, desc=name, unit="img"):
                if isinstance(image, str):
                    unreadable += 1
                    tqdm.write(f"skipped {file}: {image}", file=sys.stderr)
                    require(unreadable <= UNREADABLE_SHARE * total, f"{unreadable} of {total} images can't be read, "
                            f"more than {UNREADABLE_SHARE:.0%}: mend or remove those named above; there may be others")
                    continue
                if shape is None:
                    shape = image.shape
                    write_npy_header(f, np.uint8, (total, *shape))
                require(image.shape == shape, f"{file} has the shape {image.shape}, the images before it {shape}: they must "
                        "be of one size, and all grey or all in colour; --resolution=64 makes them so")
                f.write(image.tobytes())
                labels.append(label)
            f.seek(0)
            write_npy_header(f, np.uint8, (len(labels), *shape))
        if classes:
            require_images(labels, classes, f"{source}, without those that can't be read,")
            np.save(partial / "labels.npy", np.array(labels, np.int64))
        (partial / "made.json").write_text(json.dumps(made))
        (partial / "classes.json").write_text(json.dumps(classes))
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from None
    finally:
        items.close()
        shutil.rmtree(partial, ignore_errors=True)
        release(folder)
    names = f" ({', '.join(classes[:3])}{', ...' * (len(classes) > 3)})" if classes else ""
    print(f"{folder}: {len(labels):,} images of {' x '.join(map(str, shape))}, {len(classes)} classes{names}"
          + (f"; {unreadable} could not be read" if unreadable else ""))


def main(argv=()):
    configure(globals(), [a if a.startswith("-") else f"--name={a}" for a in argv])
    require(sum(not a.startswith("-") for a in argv) < 2, "one name is wanted: `python data.py NAME --source=...`")
    prepare(name, source, resolution, transform, exif, workers, overwrite)


if __name__ == "__main__":
    main(sys.argv[1:])
