"""Text measured: what is asked of images, what the table and the picture show, what is run."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import SAMPLE, TEXT, run

import compare_models
import compare_text
import data
from captions import MadeCaptions
from configurator import UserError


@pytest.fixture(scope="module")
def made():
    images, labels, _ = data.load("fashion-mnist-10k")
    return MadeCaptions(images, labels, data.FASHION), images, labels


class Known(torch.nn.Module):
    """A classifier that gives all images of one set their labels, all others class 0, and has brightness for a feature."""

    def __init__(self, labels):
        super().__init__()
        self.labels, self.p = labels, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        labels, self.labels = self.labels[:len(x)], self.labels[len(x):]
        return x.mean((1, 2, 3))[:, None], None, torch.eye(10)[labels]


def test_real_images_are_as_their_words(made):
    """All of them, if the classifier knows all; half of the classes wrong, half of the words turned."""
    captions, images, labels = made
    asked, numbers = compare_text.words_of(captions, np.arange(300, 600))
    assert len(asked) == (captions.words[300:600] >= 0).sum() and (asked[:, 0] == labels[300:600][numbers]).all()
    row = compare_text.judged(Known(asked[:, 0]), captions, images[300:600][numbers], asked)
    assert set(row.values()) == {1.0} and len(row) == 6
    wrong = np.where(np.arange(len(asked)) % 2, asked[:, 0], (asked[:, 0] + 1) % 10)
    row = compare_text.judged(Known(wrong), captions, images[300:600][numbers], asked)
    assert row["seen, class"] == row["seen, both"] == pytest.approx(0.5, abs=0.05) and row["seen, word"] == 1
    turned = asked.copy()
    turned[::2, 2] = 1 - turned[::2, 2]
    row = compare_text.judged(Known(asked[:, 0]), captions, images[300:600][numbers], turned)
    assert row["seen, word"] == pytest.approx(0.5, abs=0.1) and row["seen, class"] == 1


def test_nearest():
    distances, which = compare_text.nearest(torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([[3.0, 3], [0, 2], [9, 9]]))
    assert distances.tolist() == [2, 1] and which.tolist() == [1, 0]


def test_the_table():
    rows = {"real": {"seen, class": 0.8, "seen, both": 0.5, "unseen, both": 0.4, "distance": 2.0}, "prior": {"seen, class": 0.5}}
    other = {"real": rows["real"] | {"seen, class": 0.6}, "prior": {"seen, class": 0.5}}
    lines = compare_text.table([rows, other])
    assert lines[1].split() == ["real", "0.700", "+-", "0.141", "0.500", "+-", "0.000", "0.400", "+-", "0.000", "2.000", "+-",
                                "0.000", "0.80", "0.80"]
    assert lines[2].split() == ["prior", "0.500", "+-", "0.000"] and len({len(lines[0]), len(lines[0])}) == 1


def test_a_whole_comparison(trained, written, tmp_path, monkeypatch):
    """Two samples of each prompt, with a text model that is there; the second time, nothing is made anew."""
    folder = tmp_path / "seed0"
    shutil.copytree(written[0], folder)
    shutil.copy(trained / "prior_ar.pt", folder)
    commands = []

    def quick(script, *arguments):
        commands.append(script)
        settings = TEXT if script == "train_text.py" else [word for word in SAMPLE if "num_images" not in word and "per_code" not in word]
        if script in ("train_text.py", "sample.py"):
            run(script, *filter(None, arguments), *settings)

    for module in (compare_models, compare_text):
        monkeypatch.setattr(module, "run", quick)
    monkeypatch.setattr(compare_text, "find_classifier", lambda *arguments: (Known(torch.arange(60_000) % 10), 0.9))
    arguments = [f"--out_dir={tmp_path}", "--seeds=(0,)", "--per_prompt=2", "--device=cpu"]
    compare_text.main(arguments)
    assert commands == ["train_stage1.py", "train_prior.py", "train_text.py"] + ["sample.py"] * 5
    text = (tmp_path / "compare_text.txt").read_text()
    assert "2 samples of each of 40 prompts" in text and "a classifier that recognises 90.0%" in text
    for title in ("real images, held out", "codes of real images", "prior, given the class", "prompts, guidance 2", "given no caption"):
        assert f"\n{title}" in text or f"\n  {title}" in text
    assert Image.open(tmp_path / "compare_text.png").height == 12 * 30 * 2
    asked = np.load(folder / "prompts-80.npz")["prompts"]
    assert asked[1] == asked[41] == "a light t-shirt" and len(set(asked)) == 40
    assert json.loads((folder / "text_bits.json").read_text()).keys() == {
        "given no caption", "given a wrong caption", "given own captions", "own, of unseen combinations"}
    commands.clear()
    compare_text.main(arguments)
    assert "sample.py" not in commands


def test_bad_input(tmp_path):
    for arguments, message in ((["--seeds=(0,0)"], "seeds must be different"), (["--per_prompt=0"], "per_prompt must be positive")):
        with pytest.raises(UserError, match=message):
            compare_text.main([f"--out_dir={tmp_path}", *arguments])
