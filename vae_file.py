"""
Reads the weights of Stable Diffusion's autoencoder, without running anything in their files.

Two names are in use for every parameter, CompVis's (ours) and that of diffusers, whose older files have
yet other names in the attention. Files end in .safetensors, or are PyTorch's (.pt, .ckpt, .bin). In a
whole Stable Diffusion of CompVis, the autoencoder is what begins with first_stage_model.
"""

import os
import re

import torch

from checkpoint import read_checkpoint
from configurator import UserError, require
from tensor_files import UNREADABLE, damaged, read_safetensors
from vae import VAE, vae_from, vae_settings

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
COMPVIS = {  # diffusers' names, as patterns -> CompVis's
    r"(down|up)_blocks\.": r"\1.", r"(down|up)samplers\.0\.": r"\1sample.",
    r"mid_block\.attentions\.0\.": "mid.attn_1.",
    r"mid_block\.resnets\.0\.": "mid.block_1.", r"mid_block\.resnets\.1\.": "mid.block_2.", r"resnets\.": "block.",
    r"conv_shortcut\.": "nin_shortcut.", r"conv_norm_out\.": "norm_out.", r"group_norm\.": "norm.",
    r"(to_q|query)\.": "q.", r"(to_k|key)\.": "k.", r"(to_v|value)\.": "v.", r"(to_out\.0|proj_attn)\.": "proj_out."}


def to_compvis(state):
    """A state dict under any of the names -> under CompVis's, attention as 1 x 1 convolutions."""
    levels = len({name.split(".")[2] for name in state if name.startswith("decoder.up_blocks.")})
    renamed = {}
    for name, tensor in state.items():
        if up := re.match(r"decoder\.up_blocks\.(\d+)", name):  # CompVis counts from the last level
            name = f"decoder.up_blocks.{levels - 1 - int(up[1])}{name[up.end():]}"
        for pattern, ours in COMPVIS.items():
            name = re.sub(rf"(?<=\.){pattern}", ours, name)
        is_linear = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) and tensor.ndim == 2
        renamed[name] = tensor[:, :, None, None] if is_linear else tensor
    return renamed


def read_vae(path):
    """-> the trained VAE of a file with Stable Diffusion's autoencoder, float32, in eval mode

    Raises UserError, which says what is wrong with the file.
    """
    require(os.path.isfile(path), f"there is no file {path}")

    def wanted(name):
        return name.startswith((*PARTS, "first_stage_model."))

    try:
        if str(path).endswith(".safetensors"):
            state = read_safetensors(path, wanted)
        else:
            state = read_checkpoint(path)
            require(state is not None, f"{path} is damaged, or holds more than tensors: a .safetensors file, or a .pt, "
                                       ".ckpt or .bin file with tensors alone, is wanted")
            state = state.get("state_dict", state)
            state = {name: tensor for name, tensor in state.items() if wanted(name)}
        state = {name.removeprefix("first_stage_model."): tensor.float() for name, tensor in state.items()}
        state = to_compvis({name: tensor for name, tensor in state.items() if name.startswith(PARTS)})
    except UNREADABLE as error:
        raise damaged(path, error) from None
    try:
        with torch.device("meta"):
            vae = VAE(**vae_settings(state))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, IndexError) as error:  # sizes that don't fit
        raise UserError(f"{path} is not Stable Diffusion's autoencoder: {' '.join(str(error).split())[:200]}") from None
    except LookupError as error:
        some = ", ".join(list(state)[:3]) or "none of its parameters"
        raise UserError(f"{path} is not Stable Diffusion's autoencoder: it has {some}, and lacks {error}") from None
    have, want = ({name: tuple(t.shape) for name, t in s.items()} for s in (state, vae.state_dict()))
    if have != want:
        missing, different = want.keys() - have.keys(), sorted(have.items() - want.items())
        what = (f"lacks {len(missing)} of its parameters: {', '.join(sorted(missing)[:3])}" if missing
                else f"has others: {', '.join(f'{name} {shape}' for name, shape in different[:3])}")
        raise UserError(f"{path} is not a whole autoencoder of Stable Diffusion: it {what}"
                        f"{', ...' * (max(len(missing), len(different)) > 3)}")
    return vae_from(state)
