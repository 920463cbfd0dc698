"""The U-Net: EDM's numbers, and cross-attention."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill

from model import DisCoDiff
from unet import CrossAttention, edm_settings, from_edm

REFERENCE = Path(__file__).parent / "reference"
SHAPES = json.loads((REFERENCE / "edm_shapes.json").read_text())


@pytest.mark.parametrize("name", ["adm_tiny", "adm_uncond"])
def test_denoiser_equals_edm(name):
    state = {n: fill(n, shape) for n, shape in SHAPES[name]["shapes"].items()}
    model = DisCoDiff(num_latents=0, **edm_settings(state)).eval()
    model.load_state_dict(from_edm(state))
    with np.load(REFERENCE / f"{name}.npz") as reference:
        x, sigma, one_hot, D = (torch.from_numpy(reference[k]) for k in ("x", "sigma", "labels", "D"))
    labels = torch.where(one_hot.sum(1) > 0, one_hot.argmax(1), -1) if one_hot.shape[1] else None
    with torch.no_grad():
        assert (model.denoise(x, sigma, labels) - D).abs().max() < 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_settings_are_read_off_edms_names_and_shapes(name):
    state = {n: torch.empty(shape, device="meta") for n, shape in SHAPES[name]["shapes"].items()}
    wanted = {k: tuple(v) if isinstance(v, list) else v for k, v in SHAPES[name]["config"].items() if k != "dropout"}
    assert edm_settings(state) == wanted


@torch.no_grad()
def test_cross_attention_is_softmax_of_queries_and_keys_times_values():
    """Written out (sec. 3.3): projections of the pixels as queries, of the tokens as keys and values, two heads."""
    cross = CrossAttention(128, 24)
    for name, p in cross.named_parameters():
        p.data = fill(name, p.shape)
    x, tokens = torch.randn(2, 128, 4, 4), torch.randn(2, 5, 24)
    q = cross.q(cross.norm(x)).flatten(2).unflatten(1, (2, 64))  # (B, heads, c, HW)
    k, v = (t.unflatten(2, (2, 64)) for t in cross.kv(tokens).chunk(2, dim=2))  # (B, m, heads, c)
    weights = (torch.einsum("bhcp,bmhc->bhpm", q, k) / 8).softmax(-1)
    a = torch.einsum("bhpm,bmhc->bhcp", weights, v).reshape(x.shape)
    assert (cross(x, *cross.keys_values(tokens)) - (x + cross.proj(a))).abs().max() < 1e-5
