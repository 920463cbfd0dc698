"""
Reads files of tensors, .safetensors, without running anything in them: for vae_file.py and start_from.py.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from configurator import UserError, require

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100_000_000  # bytes, as in the format's own library
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)  # what a damaged file may raise


def damaged(path, error):
    """-> the UserError for a file of weights that raised an UNREADABLE error"""
    return UserError(f"{path} is damaged, or not a file of weights: {' '.join(str(error).split())[:200]}")


def read_safetensors(path, wanted=lambda name: True):
    """-> {name: tensor}, of the names for which wanted(name) holds.

    The format: the header's length, 8 bytes; the header, JSON of names, types, shapes and places; the
    numbers. Raises ValueError where file and header do not agree.
    """
    raw = np.memmap(path, np.uint8, mode="r")
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if len(raw) < 8 or length > min(len(raw) - 8, MAX_HEADER):
        raise ValueError(f"its header has {length} bytes, the file {len(raw)}")
    header, data = json.loads(raw[8:8 + length].tobytes()), raw[8 + length:]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or not wanted(name):
            continue
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"{name} has the shape {shape} at {begin} ... {end}")
        if end > len(data) or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is at {begin} ... {end} of {len(data)} bytes, and has the shape {shape}")
        tensors[name] = torch.from_numpy(data[begin:end].copy()).view(dtype).reshape(shape)
    return tensors


def parts_of(path):
    """-> the .safetensors files of a network: the file itself; or those in a folder, of which a large network has
    several, listed in its index. Raises UserError if there are none, or one of them is missing."""
    path = Path(path)
    if path.is_file():
        return [path]
    index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
    files = sorted(path.glob("*.safetensors"))
    if index:
        try:
            files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, LookupError, TypeError, AttributeError):
            require(False, f"{index} is damaged: it lists no files")
    require(files, f"there are no weights {path}: a .safetensors file, or a folder with such files, is wanted")
    missing = [file.name for file in files if not file.is_file()]
    require(not missing, f"{path} lacks {len(missing)} of its {len(files)} files: {', '.join(missing[:3])}")
    return files
