"""The small autoencoder that the reference outputs were computed with, and files of it."""
import json

import numpy as np
import torch
from conftest import ROOT, fill

PARAMETERS = {name: entry["parameters"]
              for name, entry in json.loads((ROOT / "tests/reference/vae_shapes.json").read_text()).items()}
NUMPY = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def state_of(naming="compvis", network="vae_tiny"):
    """-> its weights under these names: compvis, diffusers, diffusers_old"""
    state = {}
    for entry in PARAMETERS[network]:
        tensor = fill(entry["compvis"], entry["shape"])
        name, shape = entry["compvis"], entry["shape"]
        if naming != "compvis":
            name, shape = entry.get(naming, entry["diffusers"]), entry.get("diffusers_shape", shape)
        state[name] = tensor.reshape(shape)
    return state


def safetensors(state, unaligned=False):
    """-> the bytes of such a file"""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype=NUMPY[tensor.dtype], shape=list(tensor.shape), data_offsets=[len(data), len(data) + len(content)])
        data += content
    return packed(header, data, unaligned)


def packed(header, data, unaligned=False):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + unaligned)
    return np.array(len(text), "<u8").tobytes() + text + data


def write(folder, kind="safetensors", naming="compvis", around="", state=None):
    """-> the path of a file of this kind; around: in front of the names, as in a whole Stable Diffusion"""
    state, path = {around + name: tensor for name, tensor in (state or state_of(naming)).items()}, folder / f"vae.{kind}"
    if around:
        state["model.diffusion_model.out.0.weight"] = torch.ones(3)
    if kind == "safetensors":
        path.write_bytes(safetensors(state))
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "ckpt" else state, path)
    return path
