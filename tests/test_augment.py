"""Random views: each step against what it is defined as, and what is drawn."""
import colorsys

import numpy as np
import pytest
import torch

from augment import blur, crop, draw_colours, draw_crops, luma, recolour, shift_hue


def box(left, top, wide, high, flip=False):
    return dict(left=torch.tensor([left]), top=torch.tensor([top]), wide=torch.tensor([wide]), high=torch.tensor([high]), flip=torch.tensor([flip]))


NOTHING = dict(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, grey=False, sigma=0.0, solarise=False)


def recoloured(y, **changes):
    return recolour(y, **{name: torch.full((len(y),), value) for name, value in (NOTHING | changes).items()})


def test_a_crop_is_its_box():
    """Of a picture that is linear, the crop is too, from edge to edge of the box; the whole box gives the image back."""
    at = (torch.arange(40) + 0.5) / 40 - 0.5
    y = torch.stack([at.repeat(40, 1), at[:, None].repeat(1, 40)])[None]  # the first channel is x, the second y
    got = crop(y, 8, **box(0.25, 0.5, 0.5, 0.25))
    centres = (torch.arange(8) + 0.5) / 8
    assert torch.allclose(got[0, 0], (0.25 + 0.5 * centres - 0.5).repeat(8, 1), atol=3e-3)
    assert torch.allclose(got[0, 1], (0.5 + 0.25 * centres - 0.5)[:, None].repeat(1, 8), atol=3e-3)
    assert torch.allclose(crop(y, 8, **box(0.25, 0.5, 0.5, 0.25, True)), got.flip(3), atol=1e-6)
    noise = torch.rand(1, 3, 9, 9) * 2 - 1
    assert torch.allclose(crop(noise, 9, **box(0.0, 0.0, 1.0, 1.0)), noise, atol=1e-5)


def test_boxes_that_are_drawn():
    g = torch.Generator().manual_seed(0)
    drawn = draw_crops((2, 4000), (0.05, 0.32), 0.3, g)
    area, aspect = drawn["wide"] * drawn["high"], drawn["wide"] / drawn["high"]
    assert area.min() >= 0.05 - 1e-6 and area.max() <= 0.32 + 1e-6 and area.mean().item() == pytest.approx(0.185, abs=0.003)
    assert aspect.min() > 0.7499 and aspect.max() < 1.3334 and abs(aspect.log().mean()) < 0.01
    for start, length in (("left", "wide"), ("top", "high")):
        assert drawn[start].min() >= 0 and (drawn[start] + drawn[length]).max() <= 1 + 1e-6
        assert (drawn[start] / (1 - drawn[length])).mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn["flip"].float().mean().item() == pytest.approx(0.3, abs=0.02)
    whole = draw_crops((1000,), (1.0, 1.0), 0.0, g)  # no box of this area and another aspect fits
    assert (whole["wide"] == 1).all() and (whole["high"] == 1).all() and not whole["flip"].any()


def test_nothing_changes_nothing():
    y = torch.rand(3, 3, 8, 8) * 2 - 1
    assert torch.allclose(recoloured(y), y, atol=1e-5) and torch.allclose(recoloured(y[:, :1]), y[:, :1], atol=1e-5)


def test_colours_are_changed_as_they_are_defined():
    y = torch.rand(2, 3, 8, 8) * 0.5 + 0.2  # in [0, 1], far enough from its ends
    changed = {name: (recoloured(2 * y - 1, **{name: value}) + 1) / 2 for name, value in (
        ("brightness", 1.3), ("contrast", 0.6), ("saturation", 0.5), ("grey", True), ("solarise", True))}
    grey = (y * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert torch.allclose(changed["brightness"], 1.3 * y, atol=1e-5)
    assert torch.allclose(changed["contrast"], 0.6 * y + 0.4 * grey.mean((2, 3), keepdim=True), atol=1e-5)
    assert torch.allclose(changed["saturation"], 0.5 * y + 0.5 * grey, atol=1e-5)
    assert torch.allclose(changed["grey"], grey.expand_as(y), atol=1e-5)
    assert torch.allclose(changed["solarise"], torch.where(y >= 0.5, 1 - y, y), atol=1e-5)
    assert torch.equal(luma(y[:, :1]), y[:, :1])


def test_hue_equals_pythons():
    y, turns = torch.rand(2, 3, 4, 4), torch.tensor([0.1, -0.37])
    y[0, :, 0, 0] = 0.4  # a grey pixel has no hue
    got = shift_hue(y, turns[:, None, None, None])
    for b, i, j in np.ndindex(2, 4, 4):
        h, s, v = colorsys.rgb_to_hsv(*y[b, :, i, j].tolist())
        assert got[b, :, i, j].tolist() == pytest.approx(colorsys.hsv_to_rgb((h + turns[b].item()) % 1, s, v), abs=1e-5)


def test_blur_is_gaussian():
    y = torch.zeros(3, 1, 33, 33)
    y[:, :, 16, 16] = 1
    blurred = blur(y, torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(blurred[0], y[0])
    at = torch.arange(33.0) - 16
    for b, sigma in ((1, 1.0), (2, 2.0)):
        want = torch.exp(-(at[:, None] ** 2 + at ** 2) / 2 / sigma ** 2) / (2 * np.pi * sigma ** 2)
        assert torch.allclose(blurred[b, 0], want, atol=1e-5)
    assert torch.allclose(blur(torch.ones(1, 2, 9, 9), torch.tensor([3.0])), torch.ones(1, 2, 9, 9))


def test_colours_that_are_drawn():
    g = torch.Generator().manual_seed(0)
    blur_prob, solarise_prob = torch.tensor([[1.0], [0.1]]), torch.tensor([[0.0], [0.2]])
    drawn = draw_colours((2, 4000), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, blur_prob, (0.1, 2.0), solarise_prob, g)
    for name, most, none in (("brightness", 0.4, 1), ("contrast", 0.4, 1), ("saturation", 0.2, 1), ("hue", 0.1, 0)):
        change = drawn[name] - none
        assert change.abs().max().item() == pytest.approx(most, rel=0.01) and abs(change.mean()) < most / 40
        assert (change != 0).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert drawn["grey"].float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (drawn["sigma"] > 0).float().mean(1).tolist() == pytest.approx([1, 0.1], abs=0.02)
    assert drawn["sigma"][0].min() >= 0.1 and drawn["sigma"].max() <= 2 and drawn["sigma"][0].mean().item() == pytest.approx(1.05, abs=0.03)
    assert drawn["solarise"].float().mean(1).tolist() == pytest.approx([0, 0.2], abs=0.02)


def test_a_view_depends_on_its_own_row_alone():
    y, g = torch.rand(6, 3, 10, 10) * 2 - 1, torch.Generator().manual_seed(0)
    boxes = draw_crops((6,), (0.3, 1.0), 0.5, g)
    colours = draw_colours((6,), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, torch.tensor(0.5), (0.1, 2.0), torch.tensor(0.2), g)

    def views(rows):
        cut = crop(y[rows], 8, **{name: t[rows] for name, t in boxes.items()})
        return recolour(cut, **{name: t[rows] for name, t in colours.items()})

    whole = views(slice(6))
    assert torch.allclose(torch.cat([views(slice(0, 2)), views(slice(2, 6))]), whole, atol=1e-6)
    assert whole.min() >= -1 and whole.max() <= 1 and whole.std() > 0.1
