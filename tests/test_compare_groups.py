"""What groups of latents decide: parts of images, shares of variance, variants of codes, files, mistakes."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import PRIOR, TINY, run

import compare_groups
import data
from compare_groups import PARTS, parts_of, ratio, shares, variants
from configurator import UserError
from model import draw_codes
from noise import SeededNoise
from trained import load_stage1

QUICK = ["--references=3", "--draws=2", "--num_steps=2", "--shown=2", "--batch_size=4", "--device=cpu"]


def test_parts_add_up(monkeypatch):
    """As images, and as squares: they are orthogonal."""
    monkeypatch.setattr(compare_groups, "block", 4)
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8)
    parts = parts_of(images).double()
    x = torch.from_numpy(images).permute(0, 1, 4, 2, 3) / 127.5 - 1
    assert parts.shape == (3, *x.shape) and torch.allclose(parts.sum(0), x.double(), atol=1e-6)
    assert parts.square().sum((0, 4, 5)).numpy() == pytest.approx(x.square().sum((3, 4)).numpy(), rel=1e-4)
    intensity, layout, texture = parts
    assert torch.allclose(intensity[..., 0, 0], x.double().mean((3, 4)), atol=1e-6) and (intensity == intensity[..., :1, :1]).all()
    assert layout.mean((3, 4)).abs().max() < 1e-6 and (layout[..., :4, :4] == layout[..., :1, :1]).all()
    assert torch.nn.functional.avg_pool2d(texture.flatten(0, 1), 4).abs().max() < 1e-6


def known_images(codes, noise):
    """Latent 0 decides the intensity, latent 1 the layout, noise the texture: each with the variance 20^2 of bytes."""
    x = np.zeros((*codes.shape[:2], 8, 8, 1))
    x += 20 * codes[..., 0, None, None, None]
    x[:, :, :4] += 20 * codes[..., 1, None, None, None]
    x[:, :, 4:] -= 20 * codes[..., 1, None, None, None]
    x[:, :, ::2] += 20 * noise[..., None, None, None]
    x[:, :, 1::2] -= 20 * noise[..., None, None, None]
    return (x + 128).round().astype(np.uint8)


def test_shares_of_known_images(monkeypatch):
    """Signs as codes: two groups of one latent, and noise, have a part each."""
    monkeypatch.setattr(compare_groups, "block", 4)
    rng, R, D = np.random.default_rng(0), 40, 30

    def signs(*shape):
        return rng.integers(0, 2, shape) * 2 - 1

    a = signs(R, 1, 2) + np.zeros((R, D, 1))
    b = np.where(np.arange(R) % 2, a.T, -a.T).T  # half of the pairs differ by 2, in both latents
    one, both = np.array([True, False]), np.array([True, True])
    noise = signs(R, D)
    found = {("fixed", (1, 2)): known_images(a, noise)}
    for kind in ("ar", "sedd"):
        for these, fixed in (((), ~both), ((1,), one), ((2,), ~one)):
            found[kind, these] = known_images(np.where(fixed, a, signs(R, D, 2)), noise)
    for these, swapped in (((1,), one), ((2,), ~one), ((1, 2), both)):
        found["exchanged", these] = known_images(np.where(swapped, b, a), noise)
    rows = {title: {row: values.mean(1).tolist() for row, values in of_title.items()} for title, of_title in shares(found, 2).items()}
    assert [*rows] == ["in order, AR", "in order, SEDD", "alone, SEDD", "exchanged"]
    for title in ("in order, AR", "in order, SEDD"):
        assert rows[title]["group 1"] == pytest.approx([1, 0, 0, 1 / 3], abs=0.05)
        assert rows[title]["group 2"] == pytest.approx([0, 1, 0, 1 / 3], abs=0.05)
        assert rows[title]["noise"] == pytest.approx([0, 0, 1, 1 / 3], abs=0.05)
        assert np.sum([*rows[title].values()], axis=0) == pytest.approx([1] * 4)
    assert rows["alone, SEDD"]["group 2"] == pytest.approx([0, 1, 0, 1 / 3], abs=0.05)
    for row, want in (("group 1", [1, 0, 0, 1 / 3]), ("group 2", [0, 1, 0, 1 / 3]), ("all groups", [1, 1, 0, 2 / 3])):
        assert rows["exchanged"][row] == pytest.approx(want, abs=0.05)


def test_the_error_of_a_share():
    """What makes all of an image's variance has a share of 1, however much images differ: no error. Else the error is how
    far shares of other images are apart."""
    rng = torch.Generator().manual_seed(0)
    whole = torch.rand(2000, 2, 50, generator=rng).double() + 0.1
    assert torch.allclose(ratio(whole[0], whole[0]), torch.ones(2, 50).double())
    part = whole * (0.5 + 0.1 * torch.randn(whole.shape, generator=rng))
    of_sets = torch.stack([ratio(*both) for both in zip(part, whole)])  # (sets of images, parts, images)
    assert torch.allclose(of_sets.mean(2), part.mean(2) / whole.mean(2))
    errors = of_sets.std(2) / 50 ** 0.5
    assert errors.mean(0).tolist() == pytest.approx(of_sets.mean(2).std(0).tolist(), rel=0.1)


class Recorder:
    """A prior that draws 9 wherever it may."""

    def __init__(self):
        self.given = []

    def sample(self, noise, labels, given):
        self.given.append(given)
        return torch.where(given < 0, 9, given)


def test_variants_of_codes():
    priors = {"ar": Recorder(), "sedd": Recorder()}
    a, b = torch.arange(6)[None], torch.arange(10, 16)[None]
    found = {key: z[0].tolist() for key, z in variants(3, a, b, priors, None, np.arange(1)).items()}
    assert found == {
        ("fixed", (1, 2, 3)): [0, 1, 2, 3, 4, 5],
        ("ar", ()): [9] * 6, ("ar", (1,)): [0, 1, 9, 9, 9, 9], ("ar", (1, 2)): [0, 1, 2, 3, 9, 9],
        ("sedd", ()): [9] * 6, ("sedd", (1,)): [0, 1, 9, 9, 9, 9], ("sedd", (1, 2)): [0, 1, 2, 3, 9, 9],
        ("sedd", (2,)): [9, 9, 2, 3, 9, 9], ("sedd", (3,)): [9, 9, 9, 9, 4, 5],
        ("exchanged", (1,)): [10, 11, 2, 3, 4, 5], ("exchanged", (2,)): [0, 1, 12, 13, 4, 5],
        ("exchanged", (3,)): [0, 1, 2, 3, 14, 15], ("exchanged", (1, 2, 3)): [10, 11, 12, 13, 14, 15]}
    assert len(priors["ar"].given) == 3 and priors["ar"].given[1][0].tolist() == [0, 1, -1, -1, -1, -1]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A folder with a model of two groups of two latents, and its priors."""
    folder = tmp_path_factory.mktemp("grouped")
    run("train_stage1.py", f"--out_dir={folder}", *TINY, "--num_latents=4", "--groups=2", "--channel_mult=1,1,2",
        "--attn_resolutions=14,7", "--total_images=8")
    for prior in ("ar", "sedd"):
        run("train_prior.py", f"--out_dir={folder}", *PRIOR, f"--prior={prior}", "--total_images=50")
    return folder


def test_a_run(grouped, tmp_path):
    """Its table, file and pictures; a second run measures nothing again."""
    printed = run("compare_groups.py", f"--runs={grouped}", f"--out_dir={tmp_path}", *QUICK)
    text = (tmp_path / "compare_groups.txt").read_text()
    assert text in printed and "nan" not in text
    lines = [line.strip() for line in text.splitlines()]
    assert [line.split("  ")[0] for line in lines[4:]] == [
        "in order, AR", "group 1", "group 2", "noise", "in order, SEDD", "group 1", "group 2", "noise",
        "alone, SEDD", "group 1", "group 2", "exchanged", "group 1", "group 2", "all groups"]
    found = json.loads((tmp_path / "compare_groups.json").read_text())[f"{grouped}"]
    for title in ("in order, AR", "in order, SEDD"):
        for part in (*PARTS, "image"):
            assert sum(row[part][0] for row in found[title].values()) == pytest.approx(1)
    sizes = {name: Image.open(grouped / f"groups_{name}.png").height for name in ("exchanged", "fixed")}
    assert sizes == {"exchanged": 2 * 4 * 60, "fixed": 2 * 6 * 60}  # A, 1, 2, B; all; AR: none, 1; SEDD: none, 1, 2
    kept, = grouped.glob("groups-2-*.json")  # the same model may be measured beside others, of three groups
    before = kept.stat().st_mtime_ns
    run("compare_groups.py", f"--runs={grouped}", f"--out_dir={tmp_path}", *QUICK)
    assert kept.stat().st_mtime_ns == before
    for missing in ("exchanged", "fixed"):
        (grouped / f"groups_{missing}.png").unlink()
        run("compare_groups.py", f"--runs={grouped}", f"--out_dir={tmp_path}", *QUICK)
        assert (grouped / f"groups_{missing}.png").exists() and kept.stat().st_mtime_ns > before


def test_samples_of_references(grouped, monkeypatch):
    """A reference's draws share its code and its partner's, each with a noise of its own, which is the same in all
    variants; batches of four don't matter."""
    seen = []
    for name, value in dict(references=3, draws=2, num_steps=2, batch_size=4).items():
        monkeypatch.setattr(compare_groups, name, value)
    monkeypatch.setattr(compare_groups, "variants", lambda groups, a, b, *_: {"a": a, "b": b})
    monkeypatch.setattr(compare_groups, "denoiser", lambda model, labels, z: z)
    monkeypatch.setattr(compare_groups, "heun", lambda z, noise, steps: (seen.append((z, noise)), noise.clamp(-1, 1))[1])
    made, images = compare_groups.samples_of(f"{grouped}", 2, torch.device("cpu"))
    (a, noise), (b, same) = ([torch.cat(parts) for parts in zip(*seen[i::2])] for i in (0, 1))
    encoder = load_stage1(grouped)[0].encoder
    own = draw_codes(encoder(data.to_float(images)), SeededNoise("references", [0, 2, 4]).gumbel(4, 5))
    assert torch.equal(a, own.repeat_interleave(2, 0)) and not torch.equal(a, b)
    assert torch.equal(b[::2], b[1::2]) and torch.equal(noise, same) and len(noise.unique(dim=0)) == 6
    assert made["a"].shape == (3, 2, 28, 28, 1) and np.array_equal(made["a"], made["b"])
    assert np.array_equal(made["a"].reshape(6, 28, 28, 1), data.to_uint8(noise.clamp(-1, 1)))


def test_what_is_trained(monkeypatch, tmp_path):
    """Two models, each with two priors."""
    commands = []
    monkeypatch.setattr(compare_groups, "run", lambda *command: commands.append([word for word in command if word]))
    monkeypatch.setattr(compare_groups, "out_dir", str(tmp_path))
    folders = [compare_groups.train("groups", []), compare_groups.train("together", ["--groups=0"])]
    assert folders == [f"{tmp_path}/groups-100000+100000-seed0", f"{tmp_path}/together-100000+100000-seed0"]
    assert [command[:2] for command in commands] == 2 * [
        ["train_stage1.py", "config/hierarchical.py"], ["train_prior.py", "--prior=ar"], ["train_prior.py", "--prior=sedd"]]
    assert commands[3][2:] == [f"--out_dir={folders[1]}", "--total_images=100000", "--seed=0", "--groups=0"]


@pytest.mark.parametrize("changes, message", [
    (["--references=1"], "references 1 and draws 2 are 2 or more"),
    (["--block=5"], "block 5 must divide images of 28 pixels, and not be 1 or all"),
    (["--block=1"], "block 1 must divide"), (["--block=28"], "block 28 must divide"),  # no texture; no layout
    (["--references=6000"], "6000 pairs of images of one class are wanted")])
def test_mistakes_are_told(grouped, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run("compare_groups.py", f"--runs={grouped}", f"--out_dir={tmp_path}", *QUICK, *changes)


GROUPS = dict(num_latents=6, codebook_size=4, img_resolution=28, groups=3)


@pytest.mark.parametrize("changes, message", [
    ([dict(groups=0)], "^run0: a model with groups of latents is wanted"),
    ([{}, dict(groups=2)], "^run0, run1: .* others have as many groups, or none, and as many latents$"),
    ([{}, dict(groups=0, num_latents=9)], "as many groups, or none, and as many latents"),
    ([{}, dict(groups=0, num_latents=0)], "as many groups, or none, and as many latents"),
    ([dict(continuous=True)], "^run0: priors continue codes, not continuous latents$"),
    ([{}, dict(img_resolution=30)], "block 4 must divide images of 28 and 30 pixels")])
def test_models_that_do_not_fit(changes, message, monkeypatch, tmp_path):
    """Nothing is measured."""
    of_runs = {f"run{i}": GROUPS | change for i, change in enumerate(changes)}
    monkeypatch.setattr(compare_groups, "load_stage1", lambda folder: (None, dict(model_args=of_runs[folder])))
    with pytest.raises(UserError, match=message):
        compare_groups.main([f"--runs={','.join(of_runs)}", f"--out_dir={tmp_path}", *QUICK])
