"""Linear probe and nearest neighbours: DINO's numbers, closed forms; the script on both kinds of encoder."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from scripts import run

import probe
from configurator import UserError
from probe import Rows, linear_probe, logistic_regression, nearest_neighbours

with np.load(ROOT / "tests/reference/knn.npz") as f:
    KNN = {key: torch.from_numpy(f[key]) for key in f.files}


@pytest.mark.parametrize("k, T, top1", [(*map(float, k_T), float(top1)) for k_T, top1 in zip(KNN["k_T"], KNN["top1"])])
def test_nearest_neighbours_equal_dino(k, T, top1):
    found = nearest_neighbours(KNN["train"], KNN["train_labels"], KNN["test"], int(k), T, tile=30)
    assert 100 * (found == KNN["test_labels"]).double().mean().item() == pytest.approx(top1, abs=1e-9)


def test_equal_neighbours_count_in_their_order():
    """Codes of 10 tokens, of which the norm is no binary fraction: all that share 9 with the test code are equal."""
    code = torch.zeros(10, dtype=torch.int64)
    train = code.repeat(10, 1).fill_diagonal_(1)
    x, x_test = (torch.nn.functional.one_hot(z, 2).flatten(-2).float() for z in (train, code[None]))
    for k in (1, 2, 3):
        c = (torch.arange(10) >= k).long()  # the first k rows are of class 0
        assert nearest_neighbours(x, c, x_test, k, 0.07).tolist() == [0]
        assert nearest_neighbours(x.flip(0), c, x_test, k, 0.07).tolist() == [0]
    assert nearest_neighbours(x, torch.tensor([1, 0] * 5), x_test, 2, 0.07).tolist() == [0]  # a tie: the first class


def test_logistic_regression_finds_the_optimum(g):
    """Where the gradient is 0: the mean of (p - one-hot) x equals -decay W, and biases have no decay."""
    x, c, decay = torch.randn(200, 5, generator=g), torch.randint(3, (200,), generator=g), 0.01
    w = logistic_regression(x, c, 3, decay)
    error = (torch.addmm(w[-1], x, w[:-1]).softmax(1) - torch.nn.functional.one_hot(c, 3)) / len(x)
    assert (x.T @ error + decay * w[:-1]).abs().max() < 1e-4 and error.sum(0).abs().max() < 1e-4


def test_the_probe_does_not_mind_scale_and_offset(g):
    means = 3 * torch.randn(4, 6, generator=g)
    c = torch.arange(400) % 4
    x = means[c] + torch.randn(400, 6, generator=g)
    found = linear_probe(x[:300], c[:300], x[300:])
    assert (found == c[300:]).double().mean() > 0.9
    assert torch.equal(linear_probe(10 * x[:300] + 3000, c[:300], 10 * x[300:] + 3000), found)
    assert linear_probe(torch.ones(40, 2), c[:40], torch.ones(5, 2)).shape == (5,)  # features that say nothing


def test_the_weight_decay_is_the_best_on_a_tenth(monkeypatch):
    """The first of the strongest that are best; then all rows are fitted with it."""
    fits, best = [], 2

    def fit(x, c, classes, decay, start=None, first=0):
        fits.append((decay, first))
        return torch.tensor([[1.0, -1.0], [0, 0]]) if decay == probe.DECAYS[best] else torch.tensor([[-1.0, 1.0], [0, 0]])

    monkeypatch.setattr(probe, "logistic_regression", fit)
    x, c = torch.tensor([[1.0], [-1.0]]).repeat(20, 1), torch.tensor([0, 1]).repeat(20)
    assert linear_probe(x, c, x[:6]).tolist() == [0, 1] * 3
    assert fits == [*((decay, 4) for decay in probe.DECAYS), (probe.DECAYS[best], 0)] and [*probe.DECAYS] == sorted(probe.DECAYS)[::-1]


def test_in_tiles_as_in_one(g, monkeypatch):
    """Few rows are read at once, and the result is the same: of features and of codes, of the probe and of neighbours."""
    c = torch.arange(200) % 4
    features, codes = 2 * torch.randn(4, 6, generator=g)[c] + torch.randn(200, 6, generator=g), torch.randint(3, (200, 10), generator=g)
    codes[:, :3] = torch.where(torch.rand(200, 3, generator=g) < 0.7, c[:, None] % 3, codes[:, :3])
    one_hot, read = torch.nn.functional.one_hot(codes, 3).flatten(1).float(), []
    for x in (features, one_hot):
        monkeypatch.setattr(probe, "TILE", 2 ** 27)
        whole = (logistic_regression(x, c, 4, 0.01, first=20), linear_probe(x[:150], c[:150], x[150:]),
                 nearest_neighbours(x[:150], c[:150], x[150:], 7, 0.07))
        monkeypatch.setattr(probe, "TILE", 17 * x.shape[1])
        parts = [Rows(y.shape, lambda rows, y=y: read.append(len(y[rows])) or y[rows]) for y in (x, x[:150], x[150:])]
        if x is one_hot:
            parts = [probe.rows_of(z, 3, "cpu") for z in (codes, codes[:150], codes[150:])]
        assert torch.allclose(logistic_regression(parts[0], c, 4, 0.01, first=20), whole[0], atol=5e-3)
        assert torch.equal(linear_probe(parts[1], c[:150], parts[2]), whole[1])
        assert torch.equal(nearest_neighbours(parts[1], c[:150], parts[2], 7, 0.07), whole[2])
    assert max(read) == 17 and whole[1].unique().numel() == 4


def test_regression_leaves_out_the_rows_before_the_first(g):
    x, c = torch.randn(60, 3, generator=g), torch.randint(3, (60,), generator=g)
    assert torch.equal(logistic_regression(x, c, 3, 0.01, first=20), logistic_regression(x[20:], c[20:], 3, 0.01))


def test_what_is_read_of_images_and_codes(small_set):
    images, indices = probe.data.load(probe.data.EMBEDDED)[0], np.array([5, 3, 190, 7])
    x = probe.pixels_of(images, indices, "cpu")
    assert x.shape == (4, 784) and torch.allclose(x[1:3], torch.from_numpy(images[[3, 190]]).flatten(1) / 255)
    assert probe.rows_of(torch.tensor([[1, 0], [2, 2]]), 3, "cpu")[0:2].tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]]


def test_a_full_disk_is_told(small_set, monkeypatch, tmp_path):
    def full(dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probe.tempfile, "TemporaryFile", full)
    images = probe.data.load(probe.data.EMBEDDED)[0]
    with pytest.raises(UserError, match="can't keep what the encoder says in .*: No space left on device. .*a smaller --num_train") as error:
        probe.said_of_all(lambda y: torch.zeros(len(y), 3, 4), images, np.arange(20), "cpu", "encoding")
    assert "\n" not in str(error.value)


@pytest.fixture
def small_set(monkeypatch):
    """Sets of 200 images, so that a probe takes a second."""
    import data
    images, labels, _ = data.load(data.EMBEDDED)
    sets = {data.EMBEDDED: (images[:200], labels[:200]), "none": (images[:200], None),
            "colour": (np.repeat(images[:200], 3, axis=3), labels[:200])}
    monkeypatch.setattr(data, "load", lambda name, **_: (*sets[name], 10))


ENCODER = ["--layers=1", "--dim=24", "--heads=2", "--num_latents=4", "--codebook_size=5", "--head_hidden=16", "--stem=0",
           "--prototypes=16", "--batch_size=16", "--total_images=32", "--local_crops=1", "--patch=14", "--device=cpu"]


def test_of_both_encoders(small_set, tmp_path):
    """In a row for each representation, beside the same with random weights; twice the same."""
    from scripts import TINY
    with pytest.raises(UserError, match="there is no checkpoint"):
        run("probe.py", f"--out_dir={tmp_path}", "--device=cpu")
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--total_images=8")
    printed = run("probe.py", f"--out_dir={tmp_path}", "--device=cpu", "--k=3")
    found = json.loads((tmp_path / "probe.json").read_text())
    assert [key for key in found if isinstance(found[key], dict)] == [
        "pixels", "codes", "SEMs", "random weights: codes", "random weights: SEMs"]
    assert found["dataset"] == "fashion-mnist-10k" and found["test"] == 16 and found["train"] == 184 and len(found["codes"]["perplexity"]) == 3
    share = found["pixels"]["linear"]
    assert f"{100 * share:.1f} +- {100 * (share * (1 - share) / 16) ** 0.5:.1f}" in printed
    assert found["codes"] != found["random weights: codes"]  # another network
    run("probe.py", f"--out_dir={tmp_path}", "--device=cpu", "--k=3")
    assert json.loads((tmp_path / "probe.json").read_text()) == found
    assert not list(tmp_path.glob("tmp*"))  # what the encoder said is gone

    try:
        run("train_encoder.py", f"--out_dir={tmp_path}", *ENCODER)
    except UserError as error:  # after two steps it may have collapsed
        assert "collapsed" in str(error)
    run("probe.py", f"--out_dir={tmp_path}", "--device=cpu", "--held_out=60", "--num_train=100")
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["encoder"].endswith("encoder.pt") and (found["train"], found["test"]) == (100, 60)
    assert {"embedding", "random weights: embedding"} < found.keys()
    assert found["pixels"]["linear"] > 0.3  # of ten classes
    for mistake, message in (("--dataset=none", "no class labels"), ("--dataset=colour", "the encoder takes"),
                             ("--k=500", "k is 500 neighbours"), ("--held_out=150", "at most half"),
                             ("--temperature=0", "temperature must be positive")):
        with pytest.raises(UserError, match=message):
            run("probe.py", f"--out_dir={tmp_path}", "--device=cpu", mistake)


def test_a_model_without_codes_has_nothing_to_probe(small_set, tmp_path):
    from scripts import TINY
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--total_images=8", "--num_latents=0")
    with pytest.raises(UserError, match="no discrete latents"):
        run("probe.py", f"--out_dir={tmp_path}", "--device=cpu")
