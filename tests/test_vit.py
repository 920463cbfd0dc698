"""The encoder of Discrete Latent Codes: its authors' numbers, and what it promises stage 1."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, fill

from vit import Block, DINOHead, SEMEncoder, positions


def reference(name):
    with np.load(ROOT / f"tests/reference/{name}.npz") as f:
        return {key: json.loads(str(f[key])) if f[key].dtype.kind == "U" else torch.from_numpy(f[key]) for key in f.files}


def filled(shapes, prefix=""):
    """The weights that the authors' program had for its numbers, without the norm that it never calls."""
    state = {name: fill(prefix + name, shape) for name, shape in shapes.items() if "sem_cls_norm" not in name}
    for name, value in state.items():
        if name.endswith("gamma"):
            value += 0.5
        elif name.endswith("sem_embed.weight"):
            value *= 2
        elif name.endswith("weight_g"):
            value.fill_(1)
    return state


def small(**changes):
    return SEMEncoder(**dict(img_resolution=28, img_channels=1, num_latents=6, codebook_size=5, patch=7, dim=16, layers=2, heads=2,
                             registers=2, layerscale=1.0) | changes).eval()


@torch.no_grad()
def test_encoder_equals_the_authors():
    """Whole crops, masked ones, small ones, whose positions are interpolated."""
    want = reference("sem")
    s = want["settings"]
    encoder = SEMEncoder(s["img"], 3, s["L"], s["V"], s["patch"], s["dim"], s["depth"], s["heads"], s["reg"]).eval()
    encoder.load_state_dict(filled(want["shapes"]))
    for name, y, mask in (("global", want["images"], None), ("masked", want["images"], want["mask"]), ("local", want["local_images"], None)):
        image, patches = encoder.features(y, mask)
        assert (image - want[f"{name}_cls"]).abs().max() < 1e-5
        assert name == "local" or (patches - want[f"{name}_patch"]).abs().max() < 1e-5
    assert (encoder.embed(want["images"]) - want["global_prenorm"].flatten(1)).abs().max() < 1e-5
    assert torch.equal(encoder(want["images"]).argmax(-1), want["image_codes"])


@torch.no_grad()
def test_head_equals_dinov2():
    want = reference("dino_losses")
    head = DINOHead(6, 12, 8, 5)
    head.load_state_dict({name[5:]: value for name, value in want.items() if name.startswith("head.")})
    assert (head(want["head_in"]) - want["head_out"]).abs().max() < 1e-6


@torch.no_grad()
def test_what_stage_1_relies_on():
    """Shapes; one norm over all L V logits; no autocast; images of another size are resized; channels are normalised."""
    encoder, y = small(), torch.rand(3, 1, 28, 28) * 2 - 1
    encoder.sem_embed.weight.normal_()
    logits, embedding = encoder(y), encoder.embed(y)
    assert (encoder.num_latents, encoder.codebook_size, encoder.dim) == (6, 5, 16)
    assert logits.shape == (3, 6, 5) and embedding.shape == (3, 3 * 16)
    assert logits.flatten(1).mean(1).abs().max() < 1e-5 and (logits.flatten(1).std(1, correction=0) - 1).abs().max() < 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(y), logits)
    assert encoder(y.repeat_interleave(2, 2).repeat_interleave(2, 3)).shape == logits.shape
    shifted = small(mean=(0.4,), std=(0.2,))
    shifted.load_state_dict(encoder.state_dict())
    assert torch.allclose(shifted((y * 0.2 + 0.4) * 2 - 1), logits, atol=1e-4)  # pixels (y * 0.2 + 0.4) in [0, 1]


@torch.no_grad()
def test_a_masked_patch_is_not_seen():
    encoder, mask = small(), torch.zeros(1, 16, dtype=torch.bool)
    encoder.mask_token.normal_()
    mask[0, 5] = True
    y, other = torch.randn(1, 1, 28, 28), torch.randn(1, 1, 28, 28)
    other[:], other[..., 7:14, 7:14] = y.clone(), other[..., 7:14, 7:14].clone()
    assert not torch.equal(y, other) and torch.equal(encoder.tokens(y, mask), encoder.tokens(other, mask))
    assert not torch.allclose(encoder.tokens(y), encoder.tokens(other))


def test_positions_of_other_grids():
    """A linear function stays one away from the edge; the class token's stays."""
    grid = torch.arange(8.0).repeat(8, 1)
    pos_embed = torch.cat([torch.tensor([7.0]), grid.flatten()])[None, :, None]
    assert positions(pos_embed, 8) is pos_embed
    half = positions(pos_embed, 4)
    assert half.shape == (1, 17, 1) and half[0, 0] == 7
    assert torch.allclose(half[0, 1:, 0].view(4, 4)[:, 1:3], torch.tensor([2.5, 4.5]), atol=0.05)


def test_drop_path_keeps_the_mean():
    block, x = Block(8, 2, 1.0, 0.25), torch.ones(4000, 1, 8)
    torch.manual_seed(0)
    kept = block.train().kept(x)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3]) and kept.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(kept[:, 0, 0], kept[:, 0, 7]) and torch.equal(block.eval().kept(x), x)


def test_recomputed_gradients_are_the_same():
    """With drop path, to the bit; and less is kept for them."""
    encoder, y, found, kept = small(drop_path=0.5, layers=4), torch.rand(6, 1, 28, 28), [], []
    for encoder.recompute in (False, True):
        encoder.train().zero_grad()
        torch.manual_seed(1)
        kept.append(0)

        def keep(t):
            kept[-1] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            x = encoder.tokens(y)
        x.square().sum().backward()
        found.append([p.grad for p in encoder.blocks.parameters()])
    assert all(torch.equal(*grads) for grads in zip(*found)) and all(grad.any() for grad in found[0][-2:])
    assert kept[1] < kept[0] / 5


@pytest.mark.parametrize("changes, message", [
    (dict(patch=5), "patch 5 does not divide images of 28 pixels"), (dict(heads=3), "16 is not by 3"),
    (dict(mean=(0.1, 0.2, 0.3)), "mean has 3 numbers, the images have 1 channels")])
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
