"""Codes by hand, of images, composed: by sample.py."""

import numpy as np
import pytest
import torch
from conftest import close, load
from PIL import Image
from scripts import SAMPLE, run

import data
from codes import code_usage
from configurator import UserError


def test_codes_by_hand_and_from_images(trained):
    run("sample.py", f"--out_dir={trained}", "--name=hand", *SAMPLE, "--code=4,0,2", "--class_label=7")
    hand = load(trained, "hand")
    assert (hand["codes"] == [4, 0, 2]).all() and (hand["labels"] == 7).all()
    images, labels, _ = data.load("fashion-mnist-10k")
    np.savez(trained / "given.npz", images=images[:3], labels=labels[:3])
    np.savez(trained / "odd.npz", images=images[:3], labels=labels[:3] + 10)
    with pytest.raises(UserError, match=r"has classes \d+ ... 1\d: this model has 10, 0 ... 9"):
        run("sample.py", f"--out_dir={trained}", "--name=npz", *SAMPLE, f"--encode={trained / 'odd.npz'}")
    run("sample.py", f"--out_dir={trained}", "--name=npz", *SAMPLE, f"--encode={trained / 'given.npz'}")
    assert load(trained, "npz")["labels"].tolist() == labels[[0, 1, 2, 0, 1]].repeat(4).tolist()
    (trained / "given").mkdir()
    for i in range(3):
        Image.fromarray(images[i, ..., 0]).save(trained / "given" / f"{i}.png")
    with pytest.raises(UserError, match="has no class labels: say --class_label="):
        run("sample.py", f"--out_dir={trained}", "--name=folder", *SAMPLE, f"--encode={trained / 'given'}")
    run("sample.py", f"--out_dir={trained}", "--name=folder", *SAMPLE, f"--encode={trained / 'given'}", "--class_label=2")
    assert (load(trained, "folder")["labels"] == 2).all()
    assert np.array_equal(load(trained, "folder")["codes"], load(trained, "npz")["codes"])
    run("sample.py", f"--out_dir={trained}", "--name=set", *SAMPLE, "--encode=fashion-mnist-10k", "--guidance=2")
    assert (load(trained, "set")["nfe"] == 10).all()  # D(z) and D(null)
    assert len(np.unique(load(trained, "set")["labels"])) > 1


def test_free_positions_are_drawn_by_the_prior(trained):
    """The last ones by the autoregressive prior, any by SEDD, anew for each row; the others stay."""
    samples = [*SAMPLE, "--num_images=80", "--num_steps=1"]
    for name, how, fixed in (("ar", ["--code=4,-1,-1"], [0]), ("sedd", ["--code=-1,0,-1", "--prior=sedd"], [1]),
                             ("free", ["--code=4,0,2", "--free=0,1", "--prior=sedd"], [2])):
        run("sample.py", f"--out_dir={trained}", f"--name={name}", *samples, *how)
        codes = load(trained, name)["codes"].reshape(20, 4, 3)
        assert (codes == codes[:, :1]).all() and (codes[..., fixed] == np.array([4, 0, 2])[fixed]).all()
        assert codes.min() >= 0 and len(np.unique(codes[:, 0], axis=0)) > 5
        run("sample.py", f"--out_dir={trained}", "--name=again", *samples, *how, "--batch_size=7")
        assert close(load(trained, name), load(trained, "again"))
    for name, more in (("whole", []), ("half", ["--free=1,2"])):  # of images, with their classes
        run("sample.py", f"--out_dir={trained}", f"--name={name}", *samples, "--encode=fashion-mnist-10k", *more)
    whole, half = load(trained, "whole"), load(trained, "half")
    assert np.array_equal(whole["labels"], half["labels"]) and np.array_equal(whole["codes"][:, 0], half["codes"][:, 0])
    assert not np.array_equal(whole["codes"][:, 1:], half["codes"][:, 1:])


def test_composed_codes(trained):
    """Of four rows: one code, the other, and two that take each position from the one or the other."""
    compose = ["--per_code=2", "--num_images=160", "--num_steps=1"]
    run("sample.py", f"--out_dir={trained}", "--name=hands", *SAMPLE, *compose, "--code=0,1,2", "--compose=(3, 4,1)")
    codes = load(trained, "hands")["codes"].reshape(20, 4, 2, 3)
    assert (codes[:, :, 0] == codes[:, :, 1]).all()
    assert (codes[:, 0, 0] == [0, 1, 2]).all() and (codes[:, 1, 0] == [3, 4, 1]).all()
    from_second = codes[:, 2:, 0] == [3, 4, 1]
    assert (from_second | (codes[:, 2:, 0] == [0, 1, 2])).all()
    assert len(np.unique(from_second.reshape(-1, 3), axis=0)) == 8  # all mixtures, in 40 draws
    run("sample.py", f"--out_dir={trained}", "--name=again", *SAMPLE, *compose, "--code=0,1,2", "--compose=3,4,1", "--batch_size=7")
    assert close(load(trained, "hands"), load(trained, "again"))
    run("sample.py", f"--out_dir={trained}", "--name=data", *SAMPLE, *compose, "--encode=fashion-mnist-10k",
        "--compose=fashion-mnist-10k")
    made, labels = load(trained, "data"), data.load("fashion-mnist-10k")[1]
    order = np.concatenate(data.split(10_000, 16))  # what it was trained on, then what was held out
    codes, c = made["codes"].reshape(20, 4, 2, 3)[:, :, 0], made["labels"].reshape(20, 4, 2)[:, :, 0]
    assert (c[:, 0] == labels[order[:20]]).all() and (c[:, 1] == labels[np.roll(order, 1)[:20]]).all()
    assert (c[:, 2:] == c[:, :2]).all() and len(np.unique(codes[:, 0], axis=0)) > 1
    assert ((codes[:, 2:] == codes[:, :1]) | (codes[:, 2:] == codes[:, 1:2])).all()


def test_usage_of_codes():
    """Perplexity of each position; entries that no image has count, as zeros; codes are distinct as a whole."""
    codes = torch.tensor([[0, 0, 1], [1, 0, 1], [2, 0, 2], [2, 0, 2]])
    perplexity, distinct = code_usage(codes, 4)
    assert torch.allclose(perplexity, torch.tensor([2 ** 1.5, 1, 2], dtype=torch.float64)) and distinct == 3 / 4
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(7, (500, 5), generator=g)
    p = torch.nn.functional.one_hot(codes, 7).double().mean(0)
    assert torch.equal(code_usage(codes, 7)[0], torch.special.entr(p).sum(1).exp())
