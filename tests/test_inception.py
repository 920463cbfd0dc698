"""The Inception network: reference outputs, resizing, its inputs and outputs, its weights."""
import numpy as np
import pytest
import torch
from conftest import ROOT

import data
from configurator import UserError
from inception import load_inception, resize_tf1


def test_inception_equals_the_reference(inception):
    with np.load(ROOT / "tests/reference/fid_inception.npz") as f:
        x, want = torch.from_numpy(f["images"]).float() / 127.5 - 1, torch.from_numpy(f["features"])
    pool, spatial, p = inception(x)
    assert torch.linalg.norm(pool - want) < 1e-5 * torch.linalg.norm(want)
    assert torch.allclose(pool, want, rtol=1e-4, atol=1e-5)
    assert spatial.shape == (4, 17 * 17 * 7) and p.shape == (4, 1008) and torch.allclose(p.sum(1), torch.ones(4))


def test_spatial_features_are_the_first_channels_of_mixed_6d(inception):
    """TensorFlow's "mixed_6/conv" is the 1 x 1 branch of 6d: its "mixed_4" ... "mixed_7" are 6b ...
    6e."""
    seen = []
    handles = [module.register_forward_hook(lambda module, inputs, output: seen.append(output))
               for module in (inception.Mixed_6d.branch1x1, inception.Mixed_6d)]
    spatial = inception(torch.rand(1, 1, 28, 28) * 2 - 1)[1]
    for handle in handles:
        handle.remove()
    assert torch.equal(spatial.unflatten(1, (17, 17, 7)), seen[1][:, :7].permute(0, 2, 3, 1)) and spatial.std() > 0
    assert torch.equal(seen[0][:, :7], seen[1][:, :7])


def test_tensorflow_1_takes_pixels_without_a_shift():
    """For a ramp f(i) = i, output j of 299 is j H / 299, and the last pixel beyond it. PyTorch's
    output is half a pixel off."""
    x = torch.arange(32.0)[:, None].expand(32, 20)[None, None]
    want = (torch.arange(299) * 32 / 299).clamp(max=31)
    assert torch.allclose(resize_tf1(x, 299)[0, 0], want[:, None].expand(299, 299), atol=1e-4)
    assert torch.allclose(resize_tf1(x.mT, 299)[0, 0], want[None].expand(299, 299), atol=1e-4)
    assert torch.allclose(resize_tf1(noise := torch.rand(1, 3, 299, 299), 299), noise, atol=1e-4)


def test_the_two_resizings_give_different_features(inception):
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    pytorch = inception(x)[0]
    inception.resize = "tf1"
    tf1 = inception(x)[0]
    inception.resize = "pytorch"
    assert 1e-3 < torch.linalg.norm(tf1 - pytorch) / torch.linalg.norm(pytorch) < 1


def test_what_inception_is_given_and_its_classes(inception, monkeypatch):
    """As in TensorFlow's program: pixels v become (v - 128) / 128, and class probabilities are
    computed without the bias of the last layer."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
    monkeypatch.setattr(inception, "resize", "tf1")
    given = []
    handle = inception.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    pool, _, p = inception(data.to_float(pixels))
    handle.remove()
    assert torch.allclose(given[0], (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 128) / 128, atol=1e-3)
    odds = (pool @ (inception.fc.weight - inception.fc.weight[0]).T)[0]
    assert torch.allclose((p[0] / p[0, 0]).log(), odds, atol=1e-4) and inception.fc.bias.std() > 0.01


def test_weights_with_another_hash_are_refused(tmp_path):
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="SHA-256 begins with [0-9a-f]{8}, not 6726825d"):
        load_inception(tmp_path / "weights.pth", "pytorch", "cpu")
