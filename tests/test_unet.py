"""The U-Net: EDM's numbers, cross-attention, groups of latents."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fill

from configurator import arguments_of, configure
from model import DisCoDiff
from unet import CrossAttention, UNet, edm_settings, from_edm

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


# groups of latents

GROUPS = dict(img_resolution=16, img_channels=1, num_latents=6, codebook_size=4, latent_dim=8, latent_layers=2, latent_heads=2,
              encoder_dim=8, encoder_layers=0, encoder_heads=1, model_channels=8, channel_mult=(1, 2, 2), num_blocks=1,
              attn_resolutions=(16, 8, 4), dropout=0.0)
SIZES = ["4x4", "8x8", "16x16"]  # of the groups


def grouped(**settings):
    """A model without zeros, so that everything has an effect."""
    torch.manual_seed(0)
    model = DisCoDiff(**GROUPS | dict(groups=3) | settings).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("settings", [{}, dict(latents_to_emb=True), dict(null_token=True, latents_to_emb=True)], ids=str)
def test_a_groups_gradient_reaches_its_resolution_alone(settings):
    """The two latents of a group are keys and values of the up-sampling blocks of one size, and, if at all, in their embedding."""
    model = grouped(**settings)
    z = torch.rand(2, 6, 4).softmax(2).requires_grad_()
    condition = model.condition(z)
    by_size = {size: {name for name in condition if name.startswith(f"dec.{size}_") or name == f"emb{size}"} for size in SIZES}
    assert set().union(*by_size.values()) == condition.keys() and [len(names) for names in by_size.values()] == [
        3 + ("latents_to_emb" in settings), *[2 + ("latents_to_emb" in settings)] * 2]  # the smallest has the bottleneck too
    for group, names in enumerate(by_size.values()):
        for name in names:
            for tensor in condition[name]:
                grad, = torch.autograd.grad(tensor.square().sum(), z, retain_graph=True)
                assert [part.abs().max() > 1e-7 for part in grad.split(2, dim=1)] == [g == group for g in range(3)], name


def test_the_configuration_of_imagenet64_in_groups():
    """3 groups of 10, which the up-sampling blocks at 8, 16 and 32 pixels hear, and no others."""
    import train_stage1
    config = configure(dict(vars(train_stage1)), [str(ROOT / "config" / "imagenet64_hierarchical.py")])
    with torch.device("meta"):
        model = DisCoDiff(64, 3, 1000, **arguments_of(config, DisCoDiff, UNet) | dict(conditioning="attention"))
        condition = model.condition(torch.zeros(1, 30, dtype=torch.int64))
    assert config["groups"] == 3 and {name.split("_")[0] for name in condition} == {"dec.8x8", "dec.16x16", "dec.32x32"}


@torch.no_grad()
@pytest.mark.parametrize("to_emb", [False, True])
def test_what_a_group_changes_begins_at_its_resolution(to_emb):
    """Nothing in the down-sampling branch, nor in the up-sampling blocks before: to the bit."""
    model, outputs = grouped(latents_to_emb=to_emb), {}
    for part in ("enc", "dec"):
        for name, block in getattr(model.model, part).items():
            block.register_forward_hook(lambda *args, name=f"{part}.{name}": outputs.update({name: args[2]}))
    x, z = torch.randn(2, 1, 16, 16), torch.randint(4, (2, 6))

    def seen(z):
        model.denoise(x, torch.ones(2), None, model.condition(z))
        return dict(outputs)

    before = seen(z)
    for group, size in enumerate(SIZES):
        other = z.clone()
        other[:, 2 * group:2 * group + 2] = 3 - other[:, 2 * group:2 * group + 2]
        changed = [name for name, output in seen(other).items() if not torch.equal(output, before[name])]
        first = [*before].index(next(name for name in before if name.startswith(f"dec.{size}_")
                                     and (to_emb or getattr(model.model.dec, name[4:]).cross is not None)))
        assert changed == [*before][first:]


def test_no_groups_and_one_group_are_as_ever():
    models = [grouped(groups=groups, latents_to_emb=True) for groups in (0, 1)]
    torch.manual_seed(0)
    never = DisCoDiff(**GROUPS, latents_to_emb=True)
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models)))
    assert [*never.state_dict()] == [*models[0].state_dict()] and "enc.4x4_block0.cross.kv.weight" in never.model.state_dict()
    x, z = torch.randn(2, 1, 16, 16), torch.randint(4, (2, 6))
    with torch.no_grad():
        assert torch.equal(*(model.denoise(x, torch.ones(2), None, model.condition(z)) for model in models))


def test_fewer_groups_than_resolutions():
    """Groups go to the lowest ones, others hear nothing; without latents, groups have no part."""
    condition = grouped(groups=2).condition(torch.randint(4, (1, 6)))
    assert {name.split("_")[0] for name in condition} == {"dec.4x4", "dec.8x8"}
    assert not any(".cross." in name for name in DisCoDiff(**GROUPS | dict(num_latents=0), groups=3).state_dict())


@pytest.mark.parametrize("settings, message", [
    (dict(groups=4), r"4 groups of latents need 4 resolutions with attention, and it is at \[4, 8, 16\]: name more"),
    (dict(attn_resolutions=(16,)), r"3 groups .* it is at \[4, 16\]: name more of the feature maps \[16, 8, 4\] in attn_resolutions"),
    (dict(num_latents=7), "7 latents can't be split into 3 equal groups")])
def test_groups_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        DisCoDiff(**GROUPS | dict(groups=3) | settings)
