"""
Images in .npz files that may be larger than memory: read in slices, written in parts, saved as PNG.
"""

import json
import math
import zipfile
import zlib

import numpy as np
from PIL import Image

from checkpoint import atomic
from configurator import UserError, require
from sources import LARGEST


def open_npz(path, large=()):
    """np.load, for an .npz. Raises ValueError for an array, not in `large`, of more than LARGEST bytes."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > LARGEST and info.filename not in large:
                raise ValueError(f"{info.filename} unpacks to {info.file_size:,} bytes")
    return np.load(path)


class NpzImages:
    """The images (N, H, W, C) in an .npz that may be larger than memory.

    It has len(), .shape, and slices of step 1, which are fastest in order.
    """

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
            raise ValueError(f"its images are {dtype} {self.shape}, not uint8, 0 ... 255, (N, H, W, C)")
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
    """Whether the file exists, with the right checksum for every array."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a broken file can make the decoders raise anything
        return False


def merge_npz(files, path, **once):
    """Joins .npz files with the same keys along the first axis, with one array in memory at a time.

    once: arrays to add.
    """
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
    """Raises UserError if the folder has files that `save_pngs` does not write for these seeds: they
    would pass for images of this run."""
    expected = {"dataset.json", *map("{:06d}.png".format, seeds)}
    others = {path.name for path in folder.iterdir()} - expected if folder.exists() else ()
    require(not others, f"{folder} has other files in it, such as {min(others, default='')}: "
                        "empty it, or choose another --name")


def save_pngs(files, folder):
    """Writes sample.py's .npz files as PNG files, SEED.png, with the labels in EDM's dataset.json."""
    labels = []
    try:
        folder.mkdir(exist_ok=True)
        for file in files:
            with np.load(file) as part:
                for image, seed, label in zip(part["images"], part["seeds"], part["labels"].tolist()):
                    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(folder / f"{seed:06d}.png")
                    labels.append([f"{seed:06d}.png", label])
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from None
    with atomic(folder / "dataset.json") as f:
        f.write(json.dumps({"labels": labels if all(label >= 0 for _, label in labels) else None}).encode())


def write_npy_header(f, dtype, shape):
    """The header's length does not depend on N, so it can be overwritten once N is known."""
    np.lib.format.write_array_header_1_0(f, dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape))
