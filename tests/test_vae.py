"""Stable Diffusion's autoencoder: its authors' numbers; files of both namings and of every kind; damaged files."""
import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT, same
from vaes import PARAMETERS, packed, safetensors, state_of, write

from configurator import UserError
from vae import SCALE, VAE, vae_from, vae_settings
from vae_file import read_vae, to_compvis

with np.load(ROOT / "tests/reference/vae_tiny.npz") as file:
    REFERENCE = {name: torch.from_numpy(file[name]) for name in file.files}


def difference(a, b):
    return (a - b).abs().max().item()


@torch.no_grad()
def test_it_equals_its_authors_program():
    vae, x = vae_from(state_of()), REFERENCE["x"]
    moments = vae.quant_conv(vae.encoder(x))
    mean, log_variance = moments.chunk(2, dim=1)
    z = mean + (log_variance / 2).exp() * REFERENCE["noise"]
    assert difference(moments, REFERENCE["moments"]) < 1e-5 and difference(z, REFERENCE["z"]) < 1e-5
    assert difference(SCALE * z, REFERENCE["latents"]) < 1e-5 and torch.equal(vae.encode(x), SCALE * mean)
    assert difference(vae.decode(REFERENCE["latents"]), REFERENCE["image"]) < 1e-5
    assert torch.allclose(vae.decode(REFERENCE["latents"].double(), at_once=1), REFERENCE["image"], atol=1e-5)
    assert difference(vae.encoder.down[0]["downsample"](vae.encoder.conv_in(x)), REFERENCE["down0"]) < 1e-5
    middle = vae.decoder.conv_in(vae.post_quant_conv(REFERENCE["z"]))
    assert difference(vae.decoder.mid.attn_1(middle), REFERENCE["mid_attention"]) < 1e-5


@pytest.mark.parametrize("network, numbers", [("sd_vae", 83_653_863), ("vae_tiny", 954_567)])
def test_the_names_of_both_programs(network, numbers):
    """All 83.7 million numbers of Stable Diffusion's, under CompVis's names, diffusers' and its older ones."""
    wanted = {entry["compvis"]: entry["shape"] for entry in PARAMETERS[network]}
    for naming in ("compvis", "diffusers", "diffusers_old"):
        state = {entry.get(naming, entry["diffusers"]):
                 torch.empty(entry["shape"] if naming == "compvis" else entry.get("diffusers_shape", entry["shape"]), device="meta")
                 for entry in PARAMETERS[network]}
        state = to_compvis(state)
        assert {name: list(tensor.shape) for name, tensor in state.items()} == wanted
    with torch.device("meta"):
        vae = VAE(**vae_settings(state))
    assert {name: list(tensor.shape) for name, tensor in vae.state_dict().items()} == wanted
    assert sum(tensor.numel() for tensor in vae.state_dict().values()) == numbers


@pytest.mark.parametrize("kind, naming, around", [
    ("safetensors", "diffusers", ""), ("safetensors", "compvis", "first_stage_model."), ("bin", "diffusers_old", ""),
    ("pt", "compvis", ""), ("ckpt", "compvis", "first_stage_model.")])
def test_every_kind_of_file(tmp_path, kind, naming, around):
    vae = read_vae(write(tmp_path, kind, naming, around))
    assert same(dict(vae.state_dict()), state_of()) and not vae.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_other_precision(tmp_path, dtype):
    """Wherever the header ends: its length need not be a multiple of 8."""
    state = {name: tensor.to(dtype) for name, tensor in state_of().items()}
    (tmp_path / "vae.safetensors").write_bytes(safetensors(state, unaligned=True))
    found = read_vae(tmp_path / "vae.safetensors").state_dict()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, state[name].float()) for name, tensor in found.items())


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
NAME = "quant_conv.bias"


@pytest.mark.parametrize("content, message", [
    (b"", "is damaged"), (b"\0" * 7, "is damaged"), (b"\xff" * 80, "its header has 18446744073709551615 bytes, the file 80"),
    (b"\x80" + b"\0" * 7 + b"{}", "its header has 128 bytes, the file 10"),
    (packed({NAME: ENTRY}, b"")[:20], "its header has"),
    (b"\x08" + b"\0" * 7 + b"no json!", "is damaged, or not a file of weights"),
    (packed([1], b""), "not a file of weights"),
    (packed({NAME: 3}, b""), "not a file of weights"),
    (packed({NAME: ENTRY}, b"\0" * 15), r"quant_conv.bias is at 0 ... 16 of 15 bytes, and has the shape \[4\]"),
    (packed({NAME: ENTRY | {"shape": [5]}}, b"\0" * 16), r"of 16 bytes, and has the shape \[5\]"),
    (packed({NAME: ENTRY | {"shape": [-4], "data_offsets": [16, 0]}}, b"\0" * 16), r"has the shape \[-4\] at 16 ... 0"),
    (packed({NAME: ENTRY | {"shape": [1.5]}}, b"\0" * 16), r"has the shape \[1.5\]"),
    (packed({NAME: ENTRY | {"shape": [2 ** 40, 2 ** 40]}}, b"\0" * 16), "of 16 bytes, and has the shape"),
    (packed({NAME: ENTRY | {"data_offsets": [0]}}, b"\0" * 16), "not a file of weights"),
    (packed({NAME: ENTRY | {"dtype": "I64"}}, b"\0" * 16), "is damaged, or not a file of weights: 'I64'"),
    (packed({NAME: ENTRY}, b"\0" * 16), "is not Stable Diffusion's autoencoder: it has quant_conv.bias, and lacks"),
    (packed({"unet.weight": ENTRY}, b"\0" * 16), "it has none of its parameters, and lacks"),
])
def test_damaged_safetensors(tmp_path, content, message):
    (tmp_path / "vae.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_vae(tmp_path / "vae.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("decoder.conv_out.bias"), "it lacks 1 of its parameters: decoder.conv_out.bias$"),
    (lambda state: [state.pop(name) for name in list(state) if name.startswith("decoder.")],
     r"it lacks 86 of its parameters: decoder.conv_in.bias, decoder.conv_in.weight, decoder.conv_out.bias, \.\.\.$"),
    (lambda state: state.update({"quant_conv.bias": torch.zeros(3)}), r"it has others: quant_conv.bias \(3,\)$"),
    (lambda state: state.update({"decoder.extra": torch.zeros(3)}), r"it has others: decoder.extra \(3,\)$"),
    (lambda state: state.update({"quant_conv.bias": "8 numbers"}), "is damaged, or not a file of weights"),
    (lambda state: state.update({"encoder.conv_in.weight": torch.zeros(7, 3, 3, 3)}), "not Stable Diffusion's autoencoder: num_channels .7. must be divisible"),
    (lambda state: state.pop("encoder.conv_in.weight"), "and lacks 'encoder.conv_in.weight'"),
])
def test_files_that_are_no_whole_autoencoder(tmp_path, change, message):
    state = state_of()
    change(state)
    with pytest.raises(UserError, match=message) as error:
        read_vae(write(tmp_path, "pt", state=state))
    assert "\n" not in str(error.value)


def test_nothing_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    for name, content in (("vae.pt", pickle.dumps(Trap())), ("vae.bin", b"")):
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": state_of(), "callbacks": Trap()}, tmp_path / "vae.ckpt")
    for name in ("vae.pt", "vae.bin", "vae.ckpt"):
        with pytest.raises(UserError, match=f"{name} is damaged, or holds more than tensors"):
            read_vae(tmp_path / name)
    with pytest.raises(UserError, match="there is no file"):
        read_vae(tmp_path / "nothing.safetensors")
    assert not (tmp_path / "trap").exists()
    torch.save([json.dumps({})], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not a file of weights"):
        read_vae(tmp_path / "list.pt")
