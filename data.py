"""
Files: image data sets, checkpoints, picture grids. Nothing here knows a network.

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
import math
import mmap
import os
import shutil
import sys
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from configurator import UserError, configure, on_any_process, out_of_memory, require, say
from run import hold, progress, release
from sources import LARGEST, TRANSFORMS, Pictures, is_zip, list_images, open_source, read_idx, require_images

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


def is_whole_npz(path):
    """Whether the file is there, and the checksums of all its arrays are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # whatever a broken file makes the decoders raise
        return False


def merge_npz(files, path, **once):
    """Joins .npz files with the same keys along their arrays' first axis, one file in memory at a time; `once`: more arrays."""
    with np.load(files[0]) as first:
        keys = {key: (first[key].dtype, first[key].shape[1:]) for key in first.files}
    with atomic(path) as f, zipfile.ZipFile(f, "w") as archive:
        for key, (dtype, shape) in keys.items():
            count = sum(len(np.load(file)["seeds"]) for file in files)
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                write_npy_header(member, dtype, (count, *shape))
                for file in files:
                    member.write(np.load(file)[key].tobytes())
        for key, value in once.items():
            with archive.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(value), allow_pickle=False)


def require_pngs_alone(folder, seeds):
    """Raises UserError where this folder has other files than `save_pngs` writes for these seeds: they would be taken for
    images of the same run."""
    ours = {"dataset.json", *map("{:06d}.png".format, seeds)}
    others = {path.name for path in folder.iterdir()} - ours if folder.exists() else ()
    require(not others, f"{folder} has other files in it, as {min(others, default='')}: empty it, or choose another --name")


def save_pngs(files, folder):
    """Writes the images of .npz files of sample.py as PNG files, SEED.png, and the labels as EDM does, dataset.json."""
    found = []
    try:
        folder.mkdir(exist_ok=True)
        for file in files:
            with np.load(file) as part:
                for image, seed, label in zip(part["images"], part["seeds"], part["labels"].tolist()):
                    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(folder / f"{seed:06d}.png")
                    found.append([f"{seed:06d}.png", label])
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from None
    with atomic(folder / "dataset.json") as f:
        f.write(json.dumps({"labels": found if all(label >= 0 for _, label in found) else None}).encode())


def write_npy_header(f, dtype, shape):
    """It is as long for any length of the first axis, so that it can be written over when that is known."""
    np.lib.format.write_array_header_1_0(f, dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape))


def save_grid(images, path, columns, titles=()):
    """Writes uint8 images (N, H, W, C) as one PNG, row by row; small ones are enlarged to be seen. titles: of the rows."""
    n, h, w, c = images.shape
    images = np.concatenate([images, np.full((-n % columns, h, w, c), 255, np.uint8)])
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    grid = images.reshape(-1, columns, h + 2, w + 2, c).swapaxes(1, 2).reshape(-1, columns * (w + 2), c)
    picture = Image.fromarray(grid.squeeze(2) if c == 1 else grid)
    scale = max(1, 64 // h)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
    if titles:
        font = ImageFont.load_default(14)
        titles = [" ".join(title.encode(errors="replace").decode().split())[:24] for title in titles]  # folders may have any name
        margin = 8 + max(math.ceil(font.getlength(title)) for title in titles)
        titled = Image.new(picture.mode, (margin + picture.width, picture.height), "white")
        titled.paste(picture, (margin, 0))
        for row, title in enumerate(titles):
            ImageDraw.Draw(titled).text((margin - 4, (row + 0.5) * (h + 2) * scale), title, "black", font, anchor="rm")
        picture = titled
    with atomic(path) as f:
        picture.save(f, "png")


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
        try:
            self.partial.unlink(missing_ok=True)
        except OSError:  # the disk has become read-only
            pass
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own on top
        if isinstance(cause, OSError):
            kept = "; the file that was there before is untouched" if self.path.exists() else ""
            raise UserError(f"can't write {self.path}: {cause.strerror}{kept}") from None


CHECKPOINT = {"train_stage1": {"config", "model_args", "step", "ema"},
              "train_prior": {"config", "model_args", "step", "ema", "encoder"},
              "eval_fid": {"model", "accuracy"}}
TO_TRAIN_ON = {"model", "optimizer"}


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
    except Exception as error:  # whatever a broken file makes the decoders raise
        if out_of_memory(error):
            raise
        return None


def load_checkpoint(path, made_by, settings=""):
    """-> the dict that `save_checkpoint` wrote, tensors on the CPU; `made_by`: the script that writes it, with `settings`.

    Where it is damaged, the one before it is taken, and a line on stderr says so. Raises UserError where both are, where
    it is missing, or another script's.
    """
    path = Path(path)
    require(os.path.isfile(path),
            f"there is no checkpoint {path}: run `python {made_by}.py{settings} --out_dir={path.parent}` first")
    state = read_checkpoint(path)
    if state is None:
        state = read_checkpoint(previous(path))
        require(state is not None, f"{path} is truncated or damaged: put a good copy in its place, or delete it and "
                                   f"run {made_by}.py again")
        say(f"{path} is truncated or damaged: the one before it is taken, {previous(path)}")
    require(is_of(made_by, state), f"{path} is not a checkpoint of {made_by}.py: was another file copied over it?")
    return state


def is_of(made_by, state):
    return isinstance(state, dict) and state.get("made_by") == made_by and state.keys() >= CHECKPOINT[made_by]


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


def resume(path, config, model_args, free, changeable, made_by, **others):
    """The checkpoint at `path` to continue from, or None where a new run begins.

    config, model_args: this run's settings, as the checkpoint carries them; free: names of settings that may always change;
    changeable: names of settings that may change if --change names them. Settings missing from an older checkpoint are not
    compared. With --overwrite=True, only an unfinished run of the same command is continued: its settings, and the `others`
    in its checkpoint, must be the same. Raises UserError, which names the differences.
    """
    change = [name.strip() for name in config["change"].split(",") if name.strip()]
    unknown = [name for name in change if name not in changeable]
    require(not unknown, f"--change={config['change']}: {', '.join(unknown)} can't change during a run; "
                         f"these can: {', '.join(changeable)}")
    require(not (change and config["overwrite"]), "--overwrite=True begins anew, --change goes on: choose one")
    # by torchrun, after a process died; on several nodes some may not have counted it
    restarted = on_any_process(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")
    if not os.path.exists(path):
        return None
    new = {**model_args, **config}

    def different(state, *but):
        """-> {setting: (its value there, here)}"""
        old = {**state["model_args"], **state["config"]}
        return {k: (old[k], new.get(k)) for k in sorted(old.keys() - {*but}) if old[k] != new.get(k)}

    if config["overwrite"]:
        for file in (path, previous(path)):
            state = read_checkpoint(file)
            if is_of(made_by, state):
                break
        else:
            return None
        ours = TO_TRAIN_ON <= state.keys() and not different(state)
        ours = ours and all(state[key] == value for key, value in others.items())
        if not (ours and (restarted or state["step"] * config["batch_size"] < config["total_images"])):
            return None
        if file != path:
            say(f"{path} is truncated or damaged: the one before it is taken, {previous(path)}")
        return state
    state = load_checkpoint(path, made_by)
    have = "weights" if "model" in state else "the averaged weights"
    require(TO_TRAIN_ON <= state.keys(), f"{path} has {have} alone, to sample from: it can't be trained on. Choose another "
            f"--out_dir, where stage 1 can start from it by --init_from={path}, or start anew with --overwrite=True")
    changed = different(state, *free, *change)
    names = ",".join([*change, *changed])
    goes_on = f"say --change={names} to continue with the new values, " if set(changed) <= set(changeable) else ""
    changes = "; ".join(f"{k}={there!r} there, {here!r} here" for k, (there, here) in changed.items())
    require(not changed, f"{path} is of a run with other settings ({changes}): "
                         f"{goes_on}choose another --out_dir, or start anew with --overwrite=True")
    return state


def read_log(path, images):
    """The lines of a training log up to that number of images; what a crash cut off is left out."""
    lines = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        try:
            if json.loads(line)["images"] <= images:
                lines.append(line)
        except (ValueError, LookupError, TypeError):
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


if __name__ == "__main__":
    configure(globals(), [a if a.startswith("-") else f"--name={a}" for a in sys.argv[1:]])
    require(sum(not a.startswith("-") for a in sys.argv[1:]) < 2, "one name is wanted: `python data.py NAME --source=...`")
    prepare(name, source, resolution, transform, exif, workers, overwrite)
