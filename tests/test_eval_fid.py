"""eval_fid.py as a script: on a small data set, with both networks; mistakes."""
import json
import urllib.error
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scripts import outputs, run, start_together

import classifier
import data
import inception as network
import metrics
from configurator import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Our files, with a data set of 1,500 coarse images beside them."""
    folder = tmp_path_factory.mktemp("place")
    for path in ROOT.glob("*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    images, labels, _ = data.load(data.EMBEDDED)
    small = folder / "datasets" / "small"
    small.mkdir(parents=True)
    np.save(small / "images.npy", images[:1500, ::4, ::4])
    np.save(small / "labels.npy", labels[:1500])
    (small / "classes.json").write_text(json.dumps([*"0123456789"]))
    np.savez(folder / "samples.npz", images=images[1500:2100, ::4, ::4], labels=labels[1500:2100], nfe=np.full(600, 35),
             seconds=np.full(600, 0.25))
    return folder


@pytest.fixture
def evaluate(place, monkeypatch):
    """evaluate(settings) -> what eval_fid.py prints; its classifier is trained for 300 steps"""
    monkeypatch.setattr(classifier, "train_classifier", partial(classifier.train_classifier, steps=300))
    monkeypatch.setattr(data, "HERE", place)
    for function in (data.load, data.class_names, data.made_of, data.is_prepared):
        monkeypatch.setattr(data, function.__name__, partial(function, root=place / "datasets"))
    return partial(run, "eval_fid.py", "--features=classifier", "--reference=small", "--device=cpu")


def test_real_images_measured_by_the_classifier(evaluate, place):
    printed = evaluate(f"--images={place / 'samples.npz'}")
    found = json.loads((place / "samples.classifier.json").read_text())
    for title in ("FD-classifier", "precision", "recall", "KID", "recognised", "NFE", "seconds per image"):
        assert f"\n{title:24}{found[title]:10.4g}" in printed
    assert "equally many: 600 of each side" in found["protocol"] and f"\n  {found['protocol']}\n" in printed
    assert "warning" not in printed
    labels, by_class = np.load(place / "samples.npz")["labels"], found["recognised by class"]
    assert found["recognised"] == pytest.approx(sum(by_class[str(c)] for c in labels) / 600) and len(by_class) == 10
    rows = "".join(f"  {name:22}{share:10.4g}\n" for name, share in by_class.items())
    assert f"\n{'recognised':24}{found['recognised']:10.4g}\n{rows}NFE" in printed
    assert "600 images" in printed and "1,500 images of small, 7 x 7 x 1" in printed and "not FID" in printed
    assert found["recognised"] > 0.6 and found["precision"] > 0.6 and found["recall"] > 0.6
    assert (found["count"], found["real_count"], found["NFE"], found["seconds per image"]) == (600, 1500, 35, 0.25)
    assert not {"FID", "sFID", "Inception Score"} & set(found)
    kept = {path: path.stat().st_mtime_ns for path in (place / "datasets" / "features").iterdir()}
    assert len(kept) == 2 and evaluate(f"--images={place / 'samples.npz'}") == printed
    assert kept == {path: path.stat().st_mtime_ns for path in (place / "datasets" / "features").iterdir()}


def test_a_folder_of_images_is_measured_as_the_same_in_a_file(evaluate, place, tmp_path):
    with np.load(place / "samples.npz") as f:
        images, labels = f["images"], f["labels"]
    (tmp_path / "made" / "deep").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze(2)).save(tmp_path / "made" / "deep" / f"{i:04d}.png")
    index = [[f"deep/{i:04d}.png", int(c)] for i, c in enumerate(labels)]
    for known in (index, None):
        (tmp_path / "made" / "dataset.json").write_text(json.dumps({"labels": known}))
        printed = evaluate(f"--images={tmp_path / 'made'}/")
        found = json.loads((tmp_path / "made.classifier.json").read_text())
        evaluate(f"--images={place / 'samples.npz'}")
        want = json.loads((place / "samples.classifier.json").read_text())
        assert found["FD-classifier"] == want["FD-classifier"] and found["KID"] == want["KID"]
        assert found.get("recognised") == (want["recognised"] if known else None)
        assert ("has no class labels: the share recognised is left out" in printed) == (not known)
    (tmp_path / "made" / "deep" / "0300.png").write_bytes(b"x")
    with pytest.raises(UserError, match="0300.png can't be read"):
        evaluate(f"--images={tmp_path / 'made'}")


def test_two_ways_of_down_sampling_are_told(evaluate, place, tmp_path):
    """Where both sides say how they were made, and not the same."""
    with np.load(place / "samples.npz") as f:
        arrays = dict(f)
    made = place / "datasets" / "small" / "made.json"
    try:
        for ours, theirs, warned in (("center-crop", "center-crop-dhariwal", True),
                                     ("center-crop", "center-crop", False),
                                     (None, "center-crop", False), ("center-crop", None, False)):
            made.write_text(json.dumps({"transform": ours}))
            np.savez(tmp_path / "x.npz", **arrays, **({"made": json.dumps({"transform": theirs})} if theirs else {}))
            printed = evaluate(f"--images={tmp_path / 'x.npz'}")
            words = f"were resized by {theirs}, those of small by {ours}: part of the distance comes from that"
            assert (words in printed) == warned
    finally:
        made.unlink()


def test_a_data_set_has_no_distance_from_itself(evaluate, place, monkeypatch):
    monkeypatch.chdir(place)
    printed = evaluate("--images=small")
    found = json.loads((place / "small.classifier.json").read_text())
    assert found["FD-classifier"] < 1e-9 and (found["precision"], found["recall"]) == (1, 1)
    assert "warning" not in printed


def test_two_processes_find_the_same(evaluate, place):
    evaluate(f"--images={place / 'samples.npz'}")
    one = json.loads((place / "samples.classifier.json").read_text())
    for path in (place / "datasets" / "features").glob("small*.npz"):
        path.unlink()  # so that the real images are measured by two as well
    outputs(start_together(2, "eval_fid.py", "--reference=small", "--images=samples.npz", "--features=classifier",
                           "--device=cpu", "--batch_size=77", cwd=place))
    two = json.loads((place / "samples.classifier.json").read_text())
    assert two.pop("images") == "samples.npz" and one.pop("images")
    near = {key: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for key, value in one.items()}
    assert two == near


def test_self_check(evaluate):
    printed = evaluate("--self_check=True")
    values = [float(line[32:42]) for line in printed.splitlines()[1:]]
    assert len(values) == 7 and min(values[1:]) > values[0] and "does not rise" not in printed
    assert "3 of 10 classes missing" in printed


def test_what_is_missing_or_small_is_said(evaluate, place):
    images = np.load(place / "samples.npz")["images"]
    np.savez(place / "few.npz", images=images[:40])
    printed = evaluate(f"--images={place / 'few.npz'}")
    assert "fewer than the 64 dimensions" in printed and "no class labels" in printed
    assert not {"recognised", "recognised by class"} & set(json.loads((place / "few.classifier.json").read_text()))
    np.savez(place / "shared.npz", images=images[:80], codes=np.arange(10).repeat(8)[:, None],
             labels=np.full(80, 3), nfe=[{}])
    printed = evaluate(f"--images={place / 'shared.npz'}")
    assert "warning: neighbours share codes: 80 images have 10 codes," in printed and "--per_code=1" in printed
    found = json.loads((place / "shared.classifier.json").read_text())
    assert found["recognised by class"] == {"3": found["recognised"]} and "NFE" not in found
    np.savez(place / "odd.npz", images=images[:80], codes=np.array([{}]))
    assert "codes" not in evaluate(f"--images={place / 'odd.npz'}")


@pytest.mark.parametrize("arguments, words", [
    (["--images=small", "--features=vgg"], "inception or classifier, not vgg"),
    (["--images=small", "--resize=bicubic"], "pytorch or tf1, not bicubic"),
    (["--images=nowhere"], "no data set 'nowhere'"), (["--images=nowhere.npz"], "nowhere.npz .*No such file"),
    (["--images=small", "--manifold_images=3"], "manifold_images above 3"),
    (["--images=small", "--reference=stats.npz"], "need a data set's name"),
    (["--images=small", "--reference=stats.npz", "--features=inception", "--self_check=True"],
     "--reference=stats.npz is a file: .* need a data set's name"),
    (["--images=tiny.npz"], "at least 10 of"), (["--images=wide.npz"], "one shape"),
    (["--images=small", "--features=inception", "--weights=nowhere.pth"], "no file nowhere.pth"),
    (["--images=small", "--features=inception", "--weights=stats.npz"], "SHA-256"),
    (["--images=small", "--reference=unlabelled"], "no class labels")])
def test_mistakes_are_told(evaluate, place, monkeypatch, arguments, words):
    monkeypatch.chdir(place)
    np.savez("tiny.npz", images=np.zeros((3, 7, 7, 1), np.uint8))
    np.savez("wide.npz", images=np.zeros((30, 8, 8, 1), np.uint8))
    np.savez("stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    unlabelled = place / "datasets" / "unlabelled"
    unlabelled.mkdir(exist_ok=True)
    np.save(unlabelled / "images.npy", np.zeros((30, 7, 7, 1), np.uint8))
    (unlabelled / "classes.json").write_text("[]")
    with pytest.raises(UserError, match=words):
        evaluate(*arguments)


def test_without_a_network_it_says_what_to_fetch(evaluate, place, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(place / "hub"))

    def refuse(*arguments, **settings):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    words = "no network.*put https://.*6726825d.pth into .*checkpoints.*--weights="
    with pytest.raises(UserError, match=words) as error:
        evaluate("--images=small", "--features=inception")
    assert "\n" not in str(error.value) and not list((place / "hub").rglob("*.pth"))


def remember(monkeypatch, owner, name, key):
    """From now on, this slow function computes the same thing only once."""
    function, known = getattr(owner, name), {}

    def remembered(*arguments):
        if key(*arguments) not in known:
            known[key(*arguments)] = function(*arguments)
        return known[key(*arguments)]

    monkeypatch.setattr(owner, name, remembered)


@pytest.fixture
def with_inception(inception, evaluate, place, monkeypatch):
    """evaluate(), with the network of the reference as if it were the published one."""
    remember(monkeypatch, network, "load_inception", lambda path, resize, device: resize)
    remember(monkeypatch, network.Inception, "forward", lambda net, x: (net.resize, x.numpy().tobytes()))
    remember(monkeypatch, metrics, "factor", lambda sigma: sigma.tobytes())
    state = {key: value for key, value in inception.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, place / "weights-6726825d.pth")
    monkeypatch.setattr("hashlib.sha256", lambda b: type("", (), {"hexdigest": lambda self: "6726825d00"})())
    images, labels, _ = data.load("small")
    few = place / "datasets" / "few"
    few.mkdir(exist_ok=True)
    np.save(few / "images.npy", images[:12])
    (few / "classes.json").write_text("[]")
    monkeypatch.chdir(place)
    return partial(evaluate, "--features=inception", "--reference=few",
                   f"--weights={place / 'weights-6726825d.pth'}", "--batch_size=6")


def test_inception_from_images_to_table_and_statistics(with_inception, place):
    images = np.load(place / "samples.npz")["images"]
    np.savez(place / "twelve.npz", images=images[:12])
    printed = with_inception("--images=twelve.npz", "--resize=pytorch")
    found = json.loads((place / "twelve.inception.json").read_text())
    for title in ("FID", "sFID", "Inception Score", "precision", "recall", "KID"):
        assert f"\n{title:24}{found[title]:10.4g}" in printed
    assert "resized as in pytorch-fid" in printed and found["features"] == "inception-pytorch-6d" and found["FID"] > 0
    assert printed.count("12 images of") == 4 and printed.count("fewer than the 2,048") == 2 and "7 x 7 x 1" in printed
    (kept,) = (place / "datasets" / "features").glob("few-*inception-pytorch*.npz")
    assert str(kept) in printed
    with np.load(kept) as f:
        np.savez(place / "edm.npz", mu=f["mu"], sigma=f["sigma"])
    printed = with_inception("--images=twelve.npz", "--reference=edm.npz", "--resize=pytorch")
    alone = json.loads((place / "twelve.inception.json").read_text())
    assert alone["FID"] == pytest.approx(found["FID"]) and not {"sFID", "precision"} & set(alone)
    assert "EDM's have --resize=tf1" in printed
    with pytest.raises(UserError, match="made with the features inception-pytorch-6d, not inception-tf1-6d"):
        with_inception("--images=twelve.npz", f"--reference={kept}")
    with_inception("--images=")
    (tf1,) = (place / "datasets" / "features").glob("few-*inception-tf1*.npz")
    with np.load(tf1) as tf1, np.load(kept) as f:
        assert 0.01 < np.abs(tf1["mu"] - f["mu"]).max() < 1 and f["count"] == tf1["count"] == 12
