"""
Image data sets: loading and preparing them. Nothing here knows a network.

    python data.py fashion-mnist                                    # downloads; also mnist, cifar10
    python data.py cifar10 --source=cifar-10-batches-bin            # files on this machine
    python data.py imagenet64 --source=ILSVRC/train --resolution=64 # one subfolder per class; also a .zip
    python data.py imagenet64 --source=imagenet-64x64.zip           # made by EDM's dataset_tool.py
    python data.py holiday --source=~/photographs --exif=True       # your own photographs

Each command writes datasets/NAME/:

    images.npy      uint8 (N, H, W, C)
    labels.npy      int64 (N,), if there are classes
    classes.json    their names
    made.json       how the images were made

and, with --vae=FILE, latents of the images for the denoiser (see latents.py), which a prepared set can also get later:

    python data.py imagenet256 --source=ILSVRC/train --resolution=256 --vae=sd-vae-ft-ema.safetensors

`train_stage1.py --dataset=NAME` reads the images through a memory map. The repository includes the
10,000 images of Fashion-MNIST's test split: fashion-mnist-10k.
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
resolution = 0  # pixels per side; 0: 64 for a folder, unchanged for a .zip or what EDM's dataset_tool.py made
transform = "center-crop"  # how to resize: EDM's way (crop, then Lanczos); "center-crop-dhariwal": ADM's
exif = False  # turn photographs upright by their EXIF tag; EDM and ADM don't, so leave it off for ImageNet
workers = os.cpu_count() or 1  # processes that decode images
overwrite = False  # replace an existing datasets/NAME
vae = ""  # file with Stable Diffusion's autoencoder: adds its latents of the images
xflip = False  # and latents of the mirrored images, for train_stage1.py --xflip=True
device = "auto"  # for the autoencoder

HERE = Path(__file__).resolve().parent
EMBEDDED = "fashion-mnist-10k"
UNREADABLE_SHARE = 0.01  # a larger share of unreadable images is an error
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

# ----------------------------------------------------------------------------------------------------
# loading


def load(name, root=HERE / "datasets"):
    """-> images uint8 (N, H, W, C), labels int64 (N,) or None, number of classes (0 without labels).

    Prepared sets are memory-mapped: the operating system's file cache holds the pages, not the process.
    Raises UserError if the data set is missing or damaged.
    """
    if name == EMBEDDED:
        images, labels = read_idx(root / "embedded" / "t10k-images-idx3-ubyte.gz")
        return images, labels, 10
    folder = root / name
    if not name or not (folder / "classes.json").is_file():
        have = sorted([EMBEDDED] + [p.parent.name for p in root.glob("*/classes.json")])
        how = name if name in PUBLIC else "NAME --source=FOLDER"
        raise UserError(f"there is no data set {name!r}, and no file or folder of that name "
                        f"(there are: {', '.join(have)}); `python data.py {how}` prepares one")
    try:
        classes = json.loads((folder / "classes.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy") if classes else None
        is_uint8 = isinstance(images, np.memmap) and images.dtype == np.uint8 and images.ndim == 4
        if not isinstance(classes, list) or not is_uint8:
            raise ValueError("classes.json is not a list, or images.npy not uint8 (N, H, W, C)")
        is_integers = not classes or labels.dtype.kind in "iu" and labels.ndim == 1
        if not is_integers or classes and not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels.npy has labels outside 0 ... {len(classes) - 1}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}): prepare it anew with --overwrite=True") from None
    if classes:
        require(len(labels) == len(images),
                f"{folder} is damaged ({len(images)} images, {len(labels)} labels): "
                "prepare it anew with --overwrite=True")
    if hasattr(mmap, "MADV_RANDOM"):
        images.base.madvise(mmap.MADV_RANDOM)  # no read-ahead: batches are drawn from all over the file
    return images, labels, len(classes)


def class_names(name, root=HERE / "datasets"):
    """The class names of a data set that `load` knows, [] without labels."""
    return FASHION if name == EMBEDDED else [*map(str, json.loads((root / name / "classes.json").read_text()))]


def made_of(source, root=HERE / "datasets"):
    """-> made.json, a dict, of a prepared data set or of the training set behind an .npz of samples.

    None if it is not recorded.
    """
    try:
        if Path(source).suffix != ".npz":
            made = json.loads((root / source / "made.json").read_text())
        else:
            with open_npz(source, large=("images.npy", "arr_0.npy")) as npz:
                # mu_s: one of ADM's reference batches; otherwise sample.py wrote it
                made = dict(transform="center-crop-dhariwal") if "mu_s" in npz else json.loads(str(npz["made"]))
        return made if isinstance(made, dict) else None
    except Exception:  # a broken or foreign file can make the decoders raise anything
        return None


def data_checksum(images, labels):
    """CRC-32 of a data set's shape, labels and up to 1,000 of its images, to notice a change."""
    some = images[np.linspace(0, len(images) - 1, min(len(images), 1000), dtype=np.int64)]
    return zlib.crc32(repr(images.shape).encode() + (b"" if labels is None else labels.tobytes()) + some.tobytes())


def file_stamp(images):
    """A value that changes when the file behind mapped images changes; None for images in memory."""
    if not isinstance(images, np.memmap):
        return None
    try:
        stat = os.stat(images.filename)
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
    except OSError:
        return "it is gone"


def split(count, held_out):
    """Indices of `count` images -> training, held-out. Every run and script gets the same split."""
    order = np.random.default_rng(0).permutation(count)
    return order[held_out:], order[:held_out]


class Shuffle:
    """An endless sequence of `indices`, reshuffled each epoch by `seed`.

    Item i is always the same: a run can resume at any i, and any process can take any part.
    """

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
    x = torch.from_numpy(np.require(images, requirements="W"))  # copies a read-only memory map
    if torch.device(device).type == "cuda":
        x = x.pin_memory().to(device, non_blocking=True)
    return x.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x, vae=None):
    """Inverse of `to_float`: float (B, C, H, W) in [-1, 1], clipped -> uint8 array (B, H, W, C)

    vae: the VAE whose latents x is instead
    """
    x = vae.decode(x) if vae else x
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def read_images(source, img_shape, **settings):
    """Images to encode, from an image file, a folder or .zip of image files, an .npz with `images` (and
    `labels`), or a prepared data set, by its name.

    img_shape: (C, H, W); `decode` brings image files to it, with these settings.
    -> uint8 (N, H, W, C); labels int64 (N,) or None; the order to use them in, shuffled for a data set.
    Raises UserError for images of another shape.
    """
    channels, size, _ = img_shape
    prepared = is_prepared(source)
    if Path(source).suffix != ".npz" and Path(source).exists() and not prepared:
        images, labels = open_pictures(source, size=size, channels=channels, **settings)
    else:
        images, labels = open_images(source)
    require(images.shape[1:] == (size, size, channels) and len(images),
            f"{source} has images of shape {images.shape}: this model's are (N, {size}, {size}, {channels})")
    return images[:], labels, split(len(images), 0)[0] if prepared else np.arange(len(images))


def is_prepared(source, root=HERE / "datasets"):
    return source == EMBEDDED or (root / source / "classes.json").is_file()


def open_pictures(source, **settings):
    """An image file, or a folder or .zip of image files -> `Pictures` with these settings, and the
    labels in dataset.json, int64 (N,), or None."""
    if Path(source).is_file() and not is_zip(source):
        return Pictures([(source, Path(source))], **settings), None
    files, labels, _, _ = list_images(source, data_set=False)
    return Pictures(files, **settings), None if labels is None else np.array(labels, np.int64)


def open_images(source):
    """The images of an .npz, a prepared data set, or a folder or .zip of image files, not resized.

    An .npz comes from sample.py (`images`, perhaps `labels`) or from ADM's programs (arr_0, arr_1).
    -> images uint8 (N, H, W, C), read in slices; labels int64 (N,) or None. Raises UserError for a
    damaged or unsuitable file.
    """
    if Path(source).suffix != ".npz":
        is_files = Path(source).exists() and not is_prepared(source)
        return open_pictures(source, channels=0) if is_files else load(source)[:2]
    try:
        images = NpzImages(source)
        with open_npz(source, large=("images.npy", "arr_0.npy")) as npz:
            labels = next((npz[key] for key in ("labels", "arr_1") if key in npz), None)
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
            raise ValueError(f"its labels are {labels.dtype} {labels.shape}, not one integer per image")
    except Exception as error:  # a broken file can make the decoders raise anything
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
OURS = {"images.npy", "labels.npy", "classes.json", "made.json", "latents.npy", "vae.pt"}  # files of a prepared set


def download(name, root):
    """Downloads a public set's missing files and checks every MD5. -> their folder"""
    address, files = PUBLIC[name]
    folder = root / "downloads" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from None
    for file, md5 in files.items():
        path = folder / file
        if not path.exists():
            try:
                with urllib.request.urlopen(address + file, timeout=30) as response, atomic(path) as f, \
                        progress(total=int(response.headers.get("Content-Length", 0)), unit="B", unit_scale=True,
                                 desc=file) as bar:
                    while block := response.read(1 << 20):
                        f.write(block)
                        bar.update(len(block))
            except OSError as error:  # URLError and time-outs included
                raise UserError(f"can't download {address}{file} ({getattr(error, 'reason', error)}): "
                                f"put the file into {folder} yourself, and start again") from None
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "md5").hexdigest() if hasattr(hashlib, "file_digest") \
                else hashlib.md5(f.read()).hexdigest()
        require(found == md5, f"{path} is damaged: its MD5 is {found}, not {md5}. Delete it, and start again")
    return folder


def overlap(a, b):
    """Whether two paths are the same or one lies inside the other, links followed."""
    a, b = Path(a).resolve(), Path(b).resolve()
    return any(outer.exists() and part.exists() and part.samefile(outer)
               for inner, outer in ((a, b), (b, a)) for part in (inner, *inner.parents))


def is_ours(folder, complete=True):
    """Whether this folder has only files that `prepare` writes; complete=False: some may be missing."""
    names = {path.name.removesuffix(".partial") for path in folder.iterdir()} if folder.is_dir() else {None}
    return names <= OURS and (not complete or not names or "classes.json" in names)


def prepare(name, source, resolution=0, transform="center-crop", exif=False, workers=1, overwrite=False,
            root=HERE / "datasets"):
    """Turns a source into the data set root/name; settings as in `open_source`.

    The folder has a temporary name until it is complete. Unreadable images are named and skipped, up to
    UNREADABLE_SHARE of all. Raises UserError for more of them, for a source that is unsuitable or
    overlaps the destination, for images of different sizes, for classes without images, and for a
    full disk. Never removes a file that it did not write.
    """
    require(Path(name).name == name and name not in ("", ".", "..", "embedded", "downloads", "features", EMBEDDED)
            and not name.endswith(".partial"),
            f"{name!r} can't be a data set's name: say `python data.py NAME --source=...`")
    folder = (root / name).resolve()  # perhaps a link to a larger disk
    partial = folder.with_name(f"{folder.name}.partial")
    for place in (folder, partial):
        require(not source or not overlap(source, place),
                f"the images in {source} are where the data set goes, {place}: choose another name, "
                f"as in `python data.py my-{name} --source={source}`, or move the images elsewhere")
        require(not place.exists() or is_ours(place, complete=place == folder),
                f"{place} is not a data set that data.py prepared, or has other files in it: "
                "move it away, or choose another name")
    require(overwrite or not folder.exists() or not any(folder.iterdir()),
            f"{folder} exists: --overwrite=True replaces it")
    require(resolution >= 0, f"resolution can't be negative: it is {resolution}")
    require(0 < workers <= 1000, f"workers must be in 1 ... 1000, not {workers}")
    require(transform in TRANSFORMS, f"--transform is {' or '.join(TRANSFORMS)}, not {transform}")
    if not source:
        require(name in PUBLIC, f"{name} can't be downloaded, only {', '.join(PUBLIC)}: "
                                "give its files with --source=")
        source = download(name, root)
    total, classes, items, made = open_source(source, resolution, transform, exif, workers)
    if name == "fashion-mnist" and len(classes) == len(FASHION):
        classes = FASHION
    hold(folder)
    shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted preparation
    try:
        partial.mkdir(parents=True)
        with open(partial / "images.npy", "wb") as f:
            labels, shape, unreadable = [], None, 0
            for file, image, label in progress(items, total=total, desc=name, unit="img"):
                if isinstance(image, str):
                    unreadable += 1
                    tqdm.write(f"skipped {file}: {image}", file=sys.stderr)
                    require(unreadable <= UNREADABLE_SHARE * total,
                            f"{unreadable} of {total} images can't be read, more than {UNREADABLE_SHARE:.0%}: "
                            "repair or remove the ones named above; there may be more")
                    continue
                if shape is None:
                    shape = image.shape
                    write_npy_header(f, np.uint8, (total, *shape))
                require(image.shape == shape,
                        f"{file} has the shape {image.shape}, the images before it {shape}: images must be "
                        "of one size, and all grey or all in colour; --resolution=64 makes them so")
                f.write(image.tobytes())
                labels.append(label)
            f.seek(0)
            write_npy_header(f, np.uint8, (len(labels), *shape))
        if classes:
            require_images(labels, classes, f"{source}, without its unreadable images,")
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
    require(sum(not a.startswith("-") for a in argv) < 2,
            "one name is wanted: `python data.py NAME --source=...`")
    if vae:
        from vae_file import read_vae
        read_vae(vae)  # a wrong file is told before the images are prepared
    if source or overwrite or not (vae and is_prepared(name)):
        prepare(name, source, resolution, transform, exif, workers, overwrite)
    if vae:
        from latents import encode  # it imports this file
        encode(name, vae, xflip, device)


if __name__ == "__main__":
    main(sys.argv[1:])
