"""Images, folders and archives as the tests need them."""
import gzip
import io
import json
import struct
import zipfile

import numpy as np
from PIL import Image


def save(path, value=77, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)
    return path


def png(image, **settings):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "png", **settings)
    return buffer.getvalue()


def tree(folder):
    """All that there is below a folder: names and contents."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edm_folder(folder, labels, size=9):
    for i in range(4):
        save(folder / f"{i // 2:05d}" / f"img{i:08d}.png", i, (size, size))
    found = labels and [[f"{i // 2:05d}/img{i:08d}.png", c] for i, c in enumerate(labels)]
    (folder / "dataset.json").write_text(json.dumps({"labels": found}))
    return folder


def zipped(folder, path, around=""):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in tree(folder).items():
            z.writestr(around + name, content)
    return path


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder, images, labels, prefix="train"):
    folder.mkdir(exist_ok=True)
    path = folder / f"{prefix}-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()))
    return path
