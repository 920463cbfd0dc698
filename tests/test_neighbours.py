"""The memorisation check: copies are found, closed forms, mistakes."""
import numpy as np
import pytest
import torch
from PIL import Image
from scripts import run

import data
import neighbours
from configurator import UserError
from neighbours import HELD_OUT, NOISED, SHIFTED, nearest, table


def test_the_nearest_ones_are_found(monkeypatch):
    """By hand, in parts of two; of equal ones, the first."""
    monkeypatch.setattr(neighbours, "batch_size", 2)
    images = np.array([[0], [10], [20], [33], [10]])
    sets = {"x": np.array([[11], [30]]), "y": np.array([[0], [0], [100]])}
    found = nearest(lambda x: torch.from_numpy(x).float(), sets, images, np.array([1, 3, 4, 2]))
    assert found["x"][0].tolist() == [1, 3] and found["x"][1].tolist() == [1, 3]
    assert found["y"][0].tolist() == [10, 10, 67] and found["y"][1].tolist() == [1, 1, 3]  # image 0 is held out


def test_a_table():
    found = {"set": (np.array([1.0, 3.0]), None), HELD_OUT: (np.arange(2.0, 103.0), None)}
    lines = table("pixels", found)
    assert lines[2].split() == ["set", "2", "1.0000", "1.0200", "1.1000", "2.0000", "100.0", "%"]  # nearer than 7: both
    assert lines[3].split()[-2:] == ["5.0", "%"]


def test_copies_are_noticed(trained, tmp_path, monkeypatch):
    """Of a file with training images, and one of noise; the classifier is replaced by pixels, which takes no training."""
    monkeypatch.setattr(neighbours, "find_classifier", lambda *_: (lambda x: (x.flatten(1),), 1.0))
    images, _, _ = data.load("fashion-mnist-10k")
    train, _ = data.split(10_000, 16)
    np.savez(tmp_path / "copied.npz", images=images[train[50:70]])
    np.savez(tmp_path / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), dtype=np.uint8))
    neighbours.main([f"--init_from={trained}", f"--out_dir={tmp_path}", f"--images={tmp_path}/copied.npz,{tmp_path}/noise.npz",
                     "--shown=4", "--device=cpu"])
    text = (tmp_path / "neighbours.txt").read_text()
    assert "nearest of 9,984 training images" in text and "nan" not in text
    for block in text.split("\n\n")[1:]:
        rows = {" ".join(line.split()[:-7]): line.split()[-7:] for line in block.splitlines()[1:]}
        assert [row.split("/")[-1] for row in rows] == ["copied.npz", "noise.npz", HELD_OUT, NOISED, SHIFTED]
        copied, noise, held_out, noised, shifted = rows.values()
        assert copied[-2:] == noised[-2:] == ["100.0", "%"] and noise[-2:] == ["0.0", "%"]
        assert float(copied[4]) < float(noised[1]) < float(held_out[1]) < float(noise[1]) and float(shifted[1]) > 0
    assert Image.open(tmp_path / "neighbours.png").height == 5 * 4 * 30 * 2


@pytest.mark.parametrize("changes, message", [
    (["--images=nothing"], "there is no data set 'nothing'"),
    (["--features=vgg"], "--features is classifier or inception, not vgg"),
    (["--images=,"], "--images are files of sample.py, folders or data sets, .* it is empty"),
    (["--shown=100"], "100 pairs are shown"),
    (["--shown=0"], "shown must be positive")])
def test_mistakes_are_told(changes, message, trained, tmp_path):
    with pytest.raises(UserError, match=message):
        run("neighbours.py", f"--init_from={trained}", f"--out_dir={tmp_path}", "--images=fashion-mnist-10k", "--device=cpu", *changes)
