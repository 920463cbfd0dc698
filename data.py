"""
Files: image data sets, checkpoints, picture grids. Nothing here knows a network.

    python data.py fashion-mnist                                    # downloads; also mnist, cifar10
    python data.py cifar10 --source=cifar-10-batches-bin            # files that are already here
    python data.py imagenet64 --source=ILSVRC/train --resolution=64 # a folder with one subfolder a class
    python data.py imagenet64 --source=imagenet-64x64.zip           # a data set .zip from EDM's tools

Each turns a source into datasets/NAME/ with images.npy, uint8 (N, H, W, C), labels.npy, int64 (N,), and
classes.json, which train_stage1.py then reads as --dataset=NAME through a memory map. The 10,000 images
of Fashion-MNIST's test split come with the repository and need no preparation: fashion-mnist-10k.
"""

import gzip
import hashlib
import io
import json
import math
import mmap
import os
import shutil
import struct
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from configurator import UserError, configure, on_any_process, require

name = ""  # of the data set; `python data.py NAME` is short for --name=NAME
source = ""  # file or folder to read; "" downloads a public set
resolution = 64  # for a folder of images: centre-cropped and area-downsampled to this many pixels
workers = os.cpu_count() or 1  # processes that decode a folder of images
overwrite = False  # replace an existing datasets/NAME

HERE = Path(__file__).resolve().parent
EMBEDDED = "fashion-mnist-10k"
UNREADABLE_SHARE = 0.01  # of the images: more than this is an error
LARGEST = 2 ** 30  # bytes that one compressed file may unpack to in memory

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
        raise UserError(f"there is no data set {name!r} (there are: {', '.join(have)}); "
                        f"`python data.py {name or 'NAME'}` prepares one")
    try:
        classes = json.loads((folder / "classes.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy") if classes else None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}): prepare it anew with --overwrite=True") from None
    if classes:
        require(len(labels) == len(images), f"{folder} is damaged ({len(images)} images, {len(labels)} labels): "
                                            "prepare it anew with --overwrite=True")
    if hasattr(mmap, "MADV_RANDOM"):
        images.base.madvise(mmap.MADV_RANDOM)  # no read-ahead: batches are drawn from all over the file
    return images, labels, len(classes)


def load_trained_on(config, path):
    """The data set of the run with this configuration, whose checkpoint is `path` -> images, labels, and the indices of
    those that it was trained on and of those held out. Raises UserError where it has changed since.
    """
    images, labels, _ = load(config["dataset"])
    require(identity(images, labels) == config["data_identity"], f"the data set {config['dataset']} has changed since "
            f"{path} was trained on it: prepare it as it was, or train stage 1 anew with --overwrite=True")
    return images, labels, *split(len(images), config["held_out"])


def identity(images, labels):
    """CRC-32 of a data set's shape, labels and 1,000 of its images: tells whether it is still the same."""
    some = images[np.linspace(0, len(images) - 1, min(len(images), 1000), dtype=np.int64)]
    return zlib.crc32(repr(images.shape).encode() + (b"" if labels is None else labels.tobytes()) + some.tobytes())


def stamp(images):
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


def read_images(source, img_shape):
    """Images to take codes from: an image file, a folder of them, an .npz with `images` (and `labels`), or the
    name of a prepared data set. img_shape: (C, H, W), to which image files are brought as in `from_folder`.

    -> uint8 (N, H, W, C), labels int64 (N,) or None, and the order to take them in: a data set's is shuffled
    """
    channels, size, _ = img_shape
    path, labels = Path(source), None
    if path.suffix == ".npz" and path.is_file():
        images, labels = open_images(source)
        order = np.arange(len(images))
    elif path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        require(files, f"{source} has no images in it")
        images = [decode(p, size) for p in files]
        for file, image in zip(files, images):
            require(not isinstance(image, str), f"{file} can't be read: {image}")
        images = [image if channels == 3 else np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in images]
        images, order = np.stack(images), np.arange(len(images))
    else:
        images, labels, _ = load(source)
        order, _ = split(len(images), 0)
    require(images.shape[1:] == (size, size, channels) and len(images),
            f"{source} has images of the shape {images.shape}: this model's are (N, {size}, {size}, {channels})")
    return images[:], labels, order


def open_images(source):
    """The images of an .npz, or of a prepared data set: uint8 (N, H, W, C), read in slices, and labels int64 (N,) or None.

    An .npz is one of sample.py's, with `images` and perhaps `labels`, or of ADM's programs: arr_0, arr_1.
    """
    if Path(source).suffix != ".npz":
        return load(source)[:2]
    try:
        images = NpzImages(source)
        with open_npz(source, large=("images.npy", "arr_0.npy")) as found:
            labels = next((found[key] for key in ("labels", "arr_1") if key in found), None)
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
            raise ValueError(f"its labels are {labels.dtype} {labels.shape}, not one integer an image")
    except Exception as error:  # whatever a broken file makes the decoders raise
        raise UserError(f"{source} is not an .npz with `images`: {getattr(error, 'strerror', None) or error}") from None
    return images, None if labels is None else labels.astype(np.int64)


def open_npz(path, large=()):
    """np.load of an .npz. Raises ValueError where an array but for those named `large` unpacks to more than LARGEST."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > LARGEST and info.filename not in large:
                raise ValueError(f"{info.filename} unpacks to {info.file_size:,} bytes")
    return np.load(path)


class NpzImages:
    """The images (N, H, W, C) inside an .npz that may be larger than memory: len(), .shape, and slices of step 1, which are
    fastest in order."""

    def __init__(self, path):
        self.path, archive = path, zipfile.ZipFile(path)
        names = [name for name in ("images.npy", "arr_0.npy") if name in archive.namelist()]
        if not names:
            raise ValueError(f"it has {', '.join(archive.namelist()) or 'nothing'} in it")
        self.file = archive.open(names[0])
        version = np.lib.format.read_magic(self.file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, fortran, dtype = read_header(self.file)
        self.start, self.size = self.file.tell(), math.prod(self.shape[1:])
        if len(self.shape) != 4 or dtype != np.uint8 or fortran:
            raise ValueError(f"its images are {dtype} {self.shape}; wanted are uint8, 0 ... 255, (N, H, W, C)")
        if archive.getinfo(names[0]).file_size != self.start + self.shape[0] * self.size:
            raise ValueError(f"its images are cut off: there should be {self.shape[0]:,}")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        try:
            self.file.seek(self.start + start * self.size)
            read = self.file.read(max(stop - start, 0) * self.size)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} is damaged: {error}") from None
        return np.frombuffer(read, np.uint8).reshape(-1, *self.shape[1:])


def merge_npz(files, path):
    """Joins .npz files with the same keys along their arrays' first axis, one file in memory at a time."""
    with np.load(files[0]) as first:
        keys = {key: (first[key].dtype, first[key].shape[1:]) for key in first.files}
    with atomic(path) as f, zipfile.ZipFile(f, "w") as archive:
        for key, (dtype, shape) in keys.items():
            count = sum(len(np.load(file)["seeds"]) for file in files)
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                write_npy_header(member, dtype, (count, *shape))
                for file in files:
                    member.write(np.load(file)[key].tobytes())


def write_npy_header(f, dtype, shape):
    """It is as long for any length of the first axis, so that it can be written over when that is known."""
    np.lib.format.write_array_header_1_0(f, dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape))


def save_grid(images, path, columns):
    """Writes uint8 images (N, H, W, C) as one PNG, row by row; small ones are enlarged to be seen."""
    n, h, w, c = images.shape
    images = np.concatenate([images, np.full((-n % columns, h, w, c), 255, np.uint8)])
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    grid = images.reshape(-1, columns, h + 2, w + 2, c).swapaxes(1, 2).reshape(-1, columns * (w + 2), c)
    picture = Image.fromarray(grid.squeeze(2) if c == 1 else grid)
    scale = max(1, 64 // h)
    with atomic(path) as f:
        picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST).save(f, "png")


# ----------------------------------------------------------------------------------------------------
# checkpoints


class atomic:
    """`with atomic(path) as f`: f becomes `path` when it is complete, and leaves no trace otherwise.
    Raises UserError where the file can't be written (a full disk); what `path` held before is kept."""

    def __init__(self, path):
        self.path, self.partial = Path(path), Path(f"{path}.partial")

    def __enter__(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.partial, "wb")
        except OSError as error:
            raise UserError(f"can't write {self.path}: {error.strerror}") from None
        return self.file

    def __exit__(self, kind, error, traceback):
        try:
            if error is None:
                self.file.flush()
                os.fsync(self.file.fileno())
            self.file.close()
            if error is None:
                os.replace(self.partial, self.path)
                return
        except OSError as failed:
            error = error or failed
        self.partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own on top
        if isinstance(cause, OSError):
            kept = "; the file that was there before is untouched" if self.path.exists() else ""
            raise UserError(f"can't write {self.path}: {cause.strerror}{kept}") from None


CHECKPOINT = {"train_stage1": {"config", "model_args", "step", "ema"},  # and "model" and "optimizer", to train on
              "train_prior": {"config", "model_args", "step", "ema", "encoder"},
              "eval_fid": {"model", "accuracy"}}


def save_checkpoint(path, state):
    """Atomically writes a dict of tensors, numbers, strings, and lists, tuples and dicts of these. The one that was there
    before is kept as NAME.previous.pt, unless it is damaged: at any time, one of the two can be read."""
    with atomic(path) as f:
        torch.save(state, f)
        if read_checkpoint(path, check_only=True):
            previous(path).unlink(missing_ok=True)
            try:
                os.link(path, previous(path))
            except OSError:  # a file system without hard links
                shutil.copyfile(path, previous(path))


def previous(path):
    return Path(path).with_suffix(".previous.pt")


def read_checkpoint(path, check_only=False):
    """-> what is in the file, or None where it is missing or damaged; with check_only, whether it is whole.

    It is a zip file whose entries have a CRC-32 each, which torch.load does not look at. Nothing in it is executed, nor
    unpacked: an entry that is compressed is none of ours.
    """
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        return None
    except OSError as error:  # nothing that another copy would help with
        raise UserError(f"can't read {path}: {error.strerror}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
            if not stored or archive.testzip() is not None:
                return None
        return check_only or torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:  # whatever a broken file makes the decoders raise
        return None


def load_checkpoint(path, made_by, settings=""):
    """-> the dict that `save_checkpoint` wrote, tensors on the CPU; `made_by`: the script that writes it, with `settings`.

    Where it is damaged, the one before it is taken, and a line on stderr says so. Raises UserError where both are, where
    it is missing, or another script's.
    """
    path = Path(path)
    require(path.is_file(), f"there is no checkpoint {path}: run `python {made_by}.py{settings} --out_dir={path.parent}` first")
    state = read_checkpoint(path)
    if state is None:
        state = read_checkpoint(previous(path))
        require(state is not None, f"{path} is truncated or damaged: put a good copy in its place, or delete it and "
                                   f"run {made_by}.py again")
        if os.environ.get("RANK", "0") == "0":
            print(f"{path} is truncated or damaged: the one before it is taken, {previous(path)}", file=sys.stderr)
    require(isinstance(state, dict) and state.get("made_by") == made_by and state.keys() >= CHECKPOINT[made_by],
            f"{path} is not a checkpoint of {made_by}.py: was another file copied over it?")
    return state


def ship(source, target):
    """Copies what sampling needs of a trained run's folder to another: the averaged weights of stage 1 and of the
    autoregressive prior in half precision, their settings, and the training log. Raises UserError where a checkpoint is
    missing, or the prior is of another stage 1.
    """
    stage1, prior = load_checkpoint(f"{source}/stage1.pt", "train_stage1"), load_checkpoint(f"{source}/prior_ar.pt", "train_prior")
    require(prior["encoder"] == fingerprint(stage1["ema"]), f"{source}/prior_ar.pt was trained on codes of another stage 1")
    require(Path(source).resolve() != Path(target).resolve(), f"{target} would lose what training needs: name another folder")
    for state in (stage1, prior):
        state["ema"] = {key: value.half() if value.is_floating_point() else value for key, value in state["ema"].items()}
        state["config"] = state["config"] | dict(out_dir="")  # a path of the machine that trained it
        for key in ("model", "optimizer"):
            state.pop(key, None)
    prior["encoder"] = fingerprint(stage1["ema"])
    for file, state in (("stage1.pt", stage1), ("prior_ar.pt", prior)):
        with atomic(f"{target}/{file}") as f:
            torch.save(state, f)
    write_log(f"{target}/stage1.jsonl", read_log(f"{source}/stage1.jsonl", math.inf), mode="w")


def fingerprint(state):
    """CRC-32 over the tensors of a state dict: tells which weights something was made with."""
    crc = 0
    for tensor in state.values():
        crc = zlib.crc32(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def resume(path, config, model_args, free, made_by):
    """The checkpoint at `path` to continue from, or None where there is none yet.

    `config`, `model_args`: this run's settings, as the checkpoint carries them; `free`: the names of those
    that may change on the way. Raises UserError that names the differences where others did.
    """
    # by torchrun, after a process died; on several nodes some may not have counted it
    restarted = on_any_process(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")
    if config["overwrite"] and not restarted or not Path(path).exists():
        return None
    state = load_checkpoint(path, made_by)
    require({"model", "optimizer"} <= state.keys(), f"{path} has the averaged weights alone, to sample from: it can't be "
            "trained on. Choose another --out_dir, or start anew with --overwrite=True")
    old, new = {**state["model_args"], **state["config"]}, {**model_args, **config}
    changed = [f"{k}={old.get(k)!r} there, {new.get(k)!r} here"
               for k in sorted({*old, *new} - set(free)) if old.get(k) != new.get(k)]
    require(not changed, f"{path} is of a run with other settings ({'; '.join(changed)}): "
                         "choose another --out_dir, or start anew with --overwrite=True")
    return state


def read_log(path, images):
    """The lines of a training log up to that number of images; what a crash cut off is left out."""
    lines = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            if json.loads(line)["images"] <= images:
                lines.append(line)
        except ValueError:
            break
    return lines


def write_log(path, lines, mode="a"):
    """Appends lines to a training log; with mode "w", writes it anew. Raises UserError on a full disk."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode) as f:
            f.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None


# ----------------------------------------------------------------------------------------------------
# reading sources: each function -> number of images, class names, iterator of (name, image, label), where an
# image is uint8 (H, W, C), or a string that says why it can't be read; class names are [] without labels

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
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def download(name, root):
    """Fetches a public set's files that are not there yet, checks their MD5 -> the folder they are in."""
    address, files = PUBLIC[name]
    folder = root / "downloads" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, md5 in files.items():
        path = folder / file
        if not path.exists():
            by_hand = f"put {address}{file} into {folder} by other means, and start again"
            try:
                with urllib.request.urlopen(address + file, timeout=30) as response, atomic(path) as f, \
                        tqdm(total=int(response.headers.get("Content-Length", 0)), unit="B", unit_scale=True,
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


def open_source(source, resolution, workers):
    """Tells the kind of source by its name and content."""
    path = Path(source)
    require(path.exists(), f"there is no file or folder {source}")
    if path.is_dir() and (path / "train-images-idx3-ubyte.gz").exists():
        path /= "train-images-idx3-ubyte.gz"
    if path.name.endswith("-images-idx3-ubyte.gz"):
        return from_idx(path)
    if path.suffix == ".bin":
        return from_cifar({path.name: path.read_bytes()})
    if path.name.endswith(".tar.gz") or (path.is_dir() and (path / "cifar-10-binary.tar.gz").exists()):
        return from_cifar_tar(path / "cifar-10-binary.tar.gz" if path.is_dir() else path)
    if path.is_dir() and (batches := sorted(path.glob("data_batch_*.bin"))):
        return from_cifar({p.name: p.read_bytes() for p in batches})
    if path.suffix == ".zip":
        return from_zip(path)
    require(path.is_dir(), f"{source} is none of the sources that `python data.py --help` lists")
    return from_folder(path, resolution, workers)


def read_idx(path):
    """MNIST's format: .gz of images, and of labels beside it -> uint8 (N, H, W, 1), int64 (N,)"""
    arrays = []
    for p, ndim in ((path, 3), (path.with_name(path.name.replace("images-idx3", "labels-idx1")), 1)):
        try:
            with gzip.open(p) as f:
                raw = f.read(LARGEST + 1)
        except FileNotFoundError:
            raise UserError(f"{p} is missing") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{p} is damaged: {error}") from None
        require(len(raw) <= LARGEST, f"{p} unpacks to more than {LARGEST:,} bytes")
        header = 4 + 4 * ndim
        shape = struct.unpack(f">{ndim}I", raw[4:header]) if len(raw) >= header else ()
        require(raw[:4] == bytes([0, 0, 8, ndim]) and len(raw) == header + np.prod(shape, dtype=int),
                f"{p} is not a complete IDX file of {'images' if ndim == 3 else 'labels'}")
        arrays.append(np.frombuffer(raw, np.uint8, offset=header).reshape(shape))
    require(len(arrays[0]) == len(arrays[1]), f"{path} has {len(arrays[0])} images, but {len(arrays[1])} labels")
    return arrays[0][..., None], arrays[1].astype(np.int64)


def from_idx(path):
    images, labels = read_idx(path)
    return len(images), class_names(labels), ((f"image {i}", x, c) for i, (x, c) in enumerate(zip(images, labels)))


def from_cifar(files):
    """CIFAR-10's binary version: records of a label and 3 x 32 x 32 pixels. files: {name: bytes}"""
    for file, raw in files.items():
        require(raw and len(raw) % 3073 == 0, f"{file} is not a complete file of CIFAR-10's binary version")
    records = np.concatenate([np.frombuffer(raw, np.uint8).reshape(-1, 3073) for raw in files.values()])
    require(records[:, 0].max() < 10, "a label is above 9: is this CIFAR-10's binary version?")
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]
    return len(images), class_names(labels), ((f"image {i}", x, c) for i, (x, c) in enumerate(zip(images, labels)))


def from_cifar_tar(path):
    try:
        with tarfile.open(path) as tar:
            batches = sorted((m for m in tar if Path(m.name).match("data_batch_*.bin")), key=lambda m: m.name)
            require(sum(m.size for m in batches) <= LARGEST, f"{path} unpacks to more than {LARGEST:,} bytes")
            files = {m.name: tar.extractfile(m).read() for m in batches}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    require(files, f"{path} has no data_batch_*.bin in it: CIFAR-10's binary version is wanted")
    return from_cifar(files)


def from_zip(path):
    """EDM's data set: images of one size, and dataset.json with {"labels": [[file, class], ...]} or null."""
    def unpack(file):
        if archive.getinfo(file).file_size > LARGEST:
            raise ValueError(f"{file} unpacks to {archive.getinfo(file).file_size:,} bytes")
        return archive.read(file)

    try:
        archive = zipfile.ZipFile(path)  # read in memory: names in it with ../ lead nowhere
        files = sorted(f for f in archive.namelist() if Path(f).suffix.lower() in IMAGE_SUFFIXES)
        found = json.loads(unpack("dataset.json"))["labels"] if "dataset.json" in archive.namelist() else None
        labels = {file: int(c) for file, c in found} if found else {}
        if any(labels[file] != c for file, c in found or []):
            raise ValueError("its labels are not whole numbers")
    except (zipfile.BadZipFile, zlib.error, OSError, ArithmeticError, ValueError, TypeError, KeyError,
            RecursionError) as error:
        raise UserError(f"{path} is not a data set of EDM's tools, or damaged: {error}") from None
    require(files, f"{path} has no images in it")
    missing = [f for f in files if f not in labels] if labels else []
    require(not missing, f"dataset.json in {path} has no label for {len(missing)} of the images, as {missing[:1]}")
    require(min(labels.values(), default=0) >= 0, f"dataset.json in {path} has negative labels")

    def items():
        for file in files:
            try:
                image = Image.open(io.BytesIO(unpack(file)))
                image = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
                yield file, image.reshape(*image.shape[:2], -1), labels.get(file)
            except Exception as error:  # whatever a broken file makes the decoders raise
                yield file, str(error), None

    return len(files), class_names(list(labels.values())), items()


def from_folder(folder, resolution, workers):
    """One subfolder a class, sorted by name; without subfolders, images without labels."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    require(files, f"{folder} has no images in it")
    tops = [p.relative_to(folder).parts for p in files]
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir()) if max(map(len, tops)) > 1 else []
    number = {c: i for i, c in enumerate(classes)}
    beside = [file for file, parts in zip(files, tops) if len(parts) == 1]
    require(not (classes and beside), f"{folder} has {len(beside)} images beside its class folders, as {beside[:1]}: "
                                      "move them into one, or away")

    def items():
        pool = ProcessPoolExecutor(workers)
        try:
            decoded = pool.map(decode, files, [resolution] * len(files), chunksize=32)
            for path, parts, image in zip(files, tops, decoded):
                yield str(path), image, number.get(parts[0])
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, what is not begun is not done

    return len(files), classes, items()


def decode(path, resolution):
    """An image file -> uint8 (resolution, resolution, 3): centre crop, then area down-sampling (box filter).

    Any mode becomes RGB; what is transparent gets a white background. -> a string if it can't be read.
    """
    try:
        image = Image.open(path)
        image.load()
        if image.mode.startswith("I"):  # 16 bits a pixel, or 8 in 32
            values = np.asarray(image)
            deep = image.mode != "I" or values.max() > 255
            image = Image.fromarray((values // 256 if deep else values).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((resolution, resolution), Image.BOX if side >= resolution else Image.BICUBIC,
                             box=(left, top, left + side, top + side))
        return np.asarray(image)
    except Exception as error:  # whatever a broken file makes the decoders raise
        return f"{type(error).__name__}: {error}"


def class_names(labels):
    require(not len(labels) or max(labels) < 1_000_000, "a label is above 1,000,000: are these class numbers?")
    return [str(c) for c in range(int(max(labels)) + 1)] if len(labels) else []


# ----------------------------------------------------------------------------------------------------
# preparing


def prepare(name, source, resolution=64, workers=1, overwrite=False, root=HERE / "datasets"):
    """Turns a source into root/name, in a folder of another name until it is complete.

    Images that can't be read are named and skipped, up to UNREADABLE_SHARE of all; more raise UserError, as
    do a source that is none, images of different sizes, and a full disk.
    """
    require(Path(name).name == name and name not in ("", ".", "..", "embedded", "downloads", "features", EMBEDDED),
            f"{name!r} can't be a data set's name: say `python data.py NAME --source=...`")
    folder, partial = root / name, root / f"{name}.partial"
    require(overwrite or not folder.exists(), f"{folder} exists: --overwrite=True replaces it")
    if not source:
        require(name in PUBLIC, f"{name} is not one of the sets that can be downloaded ({', '.join(PUBLIC)}): "
                                "name its files with --source=")
        source = download(name, root)
    require(resolution > 0 and workers > 0, f"resolution {resolution} and workers {workers} must be positive")
    total, classes, items = open_source(source, resolution, workers)
    require(total, f"{source} has no images in it")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted preparation
    try:
        partial.mkdir(parents=True)
        with open(partial / "images.npy", "wb") as f:
            labels, shape, unreadable = [], None, 0
            for file, image, label in tqdm(items, total=total, desc=name, unit="img"):
                if isinstance(image, str):
                    unreadable += 1
                    tqdm.write(f"skipped {file}: {image}", file=sys.stderr)
                    require(unreadable <= UNREADABLE_SHARE * total, f"{unreadable} of {total} images can't be read, "
                            f"more than {UNREADABLE_SHARE:.0%}: mend or remove those named above")
                    continue
                if shape is None:
                    shape = image.shape
                    write_npy_header(f, np.uint8, (total, *shape))
                require(image.shape == shape, f"{file} has the shape {image.shape}, those before it {shape}: "
                                              "the images of such a source must be of one size")
                f.write(image.tobytes())
                labels.append(label)
            f.seek(0)
            write_npy_header(f, np.uint8, (len(labels), *shape))
        if classes:
            np.save(partial / "labels.npy", np.array(labels, np.int64))
        (partial / "classes.json").write_text(json.dumps(classes))
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from None
    finally:
        items.close()
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: {len(labels):,} images of {' x '.join(map(str, shape))}, {len(classes)} classes"
          + (f"; {unreadable} could not be read" if unreadable else ""))


if __name__ == "__main__":
    configure(globals(), [a if a.startswith("-") else f"--name={a}" for a in sys.argv[1:]])
    prepare(name, source, resolution, workers, overwrite)
