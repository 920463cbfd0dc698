"""From one code to another: the ends are the plain runs; pairs, distances, files, mistakes."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load
from PIL import Image
from scripts import run

import data
import interpolate
from configurator import UserError
from diffusion import heun
from interpolate import distances, exchanged, pairs_of, switched

QUICK = ["--num_pairs=5", "--batch_size=3", "--num_steps=4", "--shares=0.5", "--shown=2", "--device=cpu"]


def gaussian(mean):
    """The exact denoiser of N(mean, 0.5^2)."""
    return lambda x, t: (0.25 * x + t ** 2 * mean) / (0.25 + t ** 2)


def test_switching_at_the_ends_is_the_plain_run(monkeypatch):
    """To the bit; in between, the first steps are one denoiser's, the others the other's."""
    monkeypatch.setattr(interpolate, "num_steps", 8)
    noise, seen = torch.randn(3, 1, 2, 2, dtype=torch.float64), []

    def noted(name, denoise):
        return lambda x, t: (seen.append((name, t.item())), denoise(x, t))[1]

    a, b = noted("a", gaussian(1.0)), noted("b", gaussian(-1.0))
    of_a, of_b = heun(a, noise, 8), heun(b, noise, 8)
    seen.clear()
    first, half, last = switched(a, b, noise, (1.0, 0.5, 0.0))
    assert torch.equal(first, of_a) and torch.equal(last, of_b)
    assert [name for name, _ in seen] == ["a"] * 15 + ["b"] * 7 + ["b"] * 15
    assert seen[15][1] == seen[8][1]  # b takes over where a's fifth step began
    assert not (half == first).any() and not (half == last).any()


def test_shares_are_of_whole_steps(monkeypatch):
    """The table and the curve say where the code was in fact changed, once for each step."""
    monkeypatch.setattr(interpolate, "num_steps", 4)
    monkeypatch.setattr(interpolate, "shares", (0.3, 0.2, 0.7, 1.0))
    assert interpolate.share_of_steps() == [1, 0.75, 0.25, 0]


def test_latents_are_exchanged_from_the_first_on():
    a, b = torch.tensor([[1, 2, 3]]), torch.tensor([[7, 8, 9]])
    assert exchanged(a, b)[:, 0].tolist() == [[1, 2, 3], [7, 2, 3], [7, 8, 3], [7, 8, 9]]


def test_pairs_share_a_class():
    labels = np.array([0, 1, 1, 0, 2, 0, 0])
    assert pairs_of(np.arange(7), labels, 3).tolist() == [[1, 2], [0, 3], [5, 6]]
    assert pairs_of(np.arange(7), None, 2).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="4 pairs of images of one class are wanted: the data set has 3"):
        pairs_of(np.arange(7), labels, 4)


def test_distances_to_both_ends():
    """Of two pairs: black, then grey, then white, against black, black, white."""
    images = np.array([[0, 0], [51, 0], [255, 255]], np.uint8).reshape(3, 2, 1, 1, 1)
    means, errors = distances(images)
    assert means == pytest.approx(np.array([[0, 0.2, 2], [2, 1.8, 0]])) and errors[:, 1] == pytest.approx([0.2, 0.2])


def test_the_largest_steps():
    """Of three pairs: even steps, one that goes beyond the end and back, and one latent that does all."""
    images = np.array([[0, 0, 9], [50, 150, 9], [100, 100, 99]], np.uint8).reshape(3, 3, 1, 1, 1)
    largest, changes = interpolate.largest_steps(images)
    assert largest == pytest.approx([0.5, 1.5, 1]) and changes.tolist() == [2, 2, 1]


def test_a_run(trained, tmp_path, capsys):
    """Its ends are what sample.py makes of the codes, from the same noise."""
    interpolate.main([f"--init_from={trained}", f"--out_dir={tmp_path}", *QUICK])
    text = (tmp_path / "interpolate.txt").read_text()
    assert text in capsys.readouterr().out and "nan" not in text
    assert [line.split()[0] for line in text.splitlines() if " % " in line] == ["100", "50", "0", "100", "67", "33", "0"]
    ends = [line.split() for line in text.splitlines() if line.split()[:1] in (["100"], ["0"])]
    assert [(line[2], line[5]) == ("0.0000", "0.0000") for line in ends] == [False] * 4
    assert [line[2] == "0.0000" for line in ends] == [line[5] != "0.0000" for line in ends] == [True, False] * 2
    assert Image.open(tmp_path / "interpolate_switch.png").height == Image.open(tmp_path / "interpolate_latents.png").height
    assert "of 3 latents change the image" in text.splitlines()[-1]
    assert Image.open(tmp_path / "interpolate.png").width > 800
    found, titles = interpolate.measure(torch.device("cpu"))
    images, labels, _ = data.load("fashion-mnist-10k")
    held_out = np.concatenate(data.split(10_000, 16)[::-1])
    pairs = pairs_of(held_out, labels, 5)
    assert titles == [data.FASHION[c] for c in labels[pairs[:, 0]]]
    np.savez(tmp_path / "first.npz", images=images[pairs[:1, 0]], labels=labels[pairs[:1, 0]])
    run("sample.py", f"--init_from={trained}", f"--out_dir={tmp_path}", f"--encode={tmp_path / 'first.npz'}", "--num_images=1",
        "--num_steps=4", "--device=cpu")
    for way in found.values():
        assert np.abs(way[0, 0].astype(int) - load(tmp_path)["images"][0]).max() <= 1


@pytest.mark.parametrize("changes, message", [
    (["--shares=0.5,1.1"], r"shares of the steps are in 0 ... 1, not \(0.5, 1.1\)"),
    (["--shares=-0.1"], "shares of the steps are in 0 ... 1"),
    (["--shown=6"], "shown 6 exceeds num_pairs 5"), (["--num_pairs=0"], "num_pairs must be positive"),
    (["--num_pairs=6000"], "6000 pairs of images of one class are wanted"),
    (["--init_from=nowhere"], "there is no checkpoint nowhere/stage1.pt")])
def test_mistakes_are_told(changes, message, trained, tmp_path):
    with pytest.raises(UserError, match=message):
        run("interpolate.py", f"--init_from={trained}", f"--out_dir={tmp_path}", *QUICK, *changes)


@pytest.mark.parametrize("model_args", [dict(num_latents=0, codebook_size=16), dict(num_latents=3, codebook_size=5, continuous=True),
                                        dict(num_latents=8, codebook_size=1)], ids=["plain EDM", "continuous latents", "embeddings"])
def test_a_model_without_codes(model_args, monkeypatch):
    model = SimpleNamespace(num_latents=model_args["num_latents"])
    monkeypatch.setattr(interpolate, "load_stage1", lambda *_: (model, dict(model_args=model_args)))
    with pytest.raises(UserError, match="stage1.pt has no codes to change$"):
        interpolate.measure("cpu")
