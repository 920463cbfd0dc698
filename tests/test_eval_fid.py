"""The metrics: reference numbers, closed forms, known answers; the script and its mistakes."""
import json
import subprocess
import sys
import urllib.error
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval_fid
from configurator import UserError
from conftest import ROOT, fill, run
from eval_fid import (Inception, Moments, frechet_distance, inception_score, load_inception, manifold_radii, measure,
                      precision_recall, resize_tf1, root, share_inside)

REFERENCE = Path(__file__).parent / "reference"
SHAPES = json.loads((REFERENCE / "fid_inception_shapes.json").read_text())
rng = np.random.default_rng(0)


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


# the networks


@pytest.fixture(scope="module")
def inception():
    net = Inception("pytorch").eval().requires_grad_(False)
    shapes = {k: list(v.shape) for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert shapes == SHAPES
    net.load_state_dict({name: fill(name, shape) * (1.4 if len(shape) == 4 else 1) for name, shape in SHAPES.items()})
    return net


def test_inception_equals_the_reference(inception):
    with np.load(REFERENCE / "fid_inception.npz") as f:
        x, want = torch.from_numpy(f["images"]).float() / 127.5 - 1, torch.from_numpy(f["features"])
    pool, spatial, p = inception(x)
    assert torch.linalg.norm(pool - want) < 1e-5 * torch.linalg.norm(want) and torch.allclose(pool, want, rtol=1e-4, atol=1e-5)
    assert spatial.shape == (4, 17 * 17 * 7) and p.shape == (4, 1008) and torch.allclose(p.sum(1), torch.ones(4))


def test_spatial_features_are_the_first_channels_of_mixed_6d(inception):
    """TensorFlow's "mixed_6/conv" is the 1 x 1 branch of 6d (of its "mixed_4" ... "mixed_7", ours 6b ... 6e)."""
    seen = []
    handles = [module.register_forward_hook(lambda module, inputs, output: seen.append(output))
               for module in (inception.Mixed_6d.branch1x1, inception.Mixed_6d)]
    spatial = inception(torch.rand(1, 1, 28, 28) * 2 - 1)[1]
    for handle in handles:
        handle.remove()
    assert torch.equal(spatial.unflatten(1, (17, 17, 7)), seen[1][:, :7].permute(0, 2, 3, 1)) and spatial.std() > 0
    assert torch.equal(seen[0][:, :7], seen[1][:, :7])


def test_tensorflow_1_takes_pixels_without_a_shift():
    """Of a ramp f(i) = i, output j of 299 is j H / 299, and the last pixel beyond it. PyTorch's is half a pixel off."""
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


def test_weights_with_another_hash_are_refused(tmp_path):
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="SHA-256 begins with [0-9a-f]{8}, not 6726825d"):
        load_inception(tmp_path / "weights.pth", "pytorch", "cpu")


# the metrics


@pytest.mark.parametrize("a, key", [("a", "distance"), ("a_rank_deficient", "distance_rank_deficient")])
def test_frechet_distance_equals_the_reference(a, key):
    with np.load(REFERENCE / "frechet.npz") as f:
        assert frechet_distance(*moments(f[a]), *moments(f["b"])) == pytest.approx(f[key].item(), rel=1e-6)
        assert frechet_distance(*moments(f["b"]), *moments(f[a])) == pytest.approx(f[key].item(), rel=1e-6)
        assert frechet_distance(*moments(f[a]), *moments(f[a])) < 1e-9


def test_frechet_distance_of_diagonal_gaussians():
    mu, a, b = rng.normal(size=6), rng.uniform(0, 2, 6), np.array([0, 0, 1, 2, 3, 4.0])
    want = (mu ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert frechet_distance(mu, np.diag(a), np.zeros(6), np.diag(b)) == pytest.approx(want, rel=1e-12)
    assert frechet_distance(Q @ mu, Q @ np.diag(a) @ Q.T, np.zeros(6), Q @ np.diag(b) @ Q.T) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(mu, np.zeros((6, 6)), np.zeros(6), np.zeros((6, 6))) == pytest.approx((mu ** 2).sum())


def test_fid_of_a_set_with_itself_is_zero_with_fewer_images_than_dimensions():
    mu, sigma = moments(rng.normal(size=(50, 300)) * 10)
    assert root(sigma).shape == (300, 49) and frechet_distance(mu, sigma, mu, sigma) < 1e-7 * np.trace(sigma)


def test_moments_in_a_stream():
    x = rng.normal(3, 2, (1001, 7))
    stream = Moments(7, "cpu")
    for part in np.split(x, [1, 400, 401]):
        stream.update(torch.from_numpy(part))
    for got, want in zip(stream.result(), moments(x)):
        assert np.allclose(got, want, rtol=1e-12)


def sums(p):
    """(images, classes) in splits of equal size -> what `inception_score` takes"""
    p = torch.as_tensor(p, dtype=torch.float64).unflatten(0, (2, -1))
    return p.sum(1), -torch.special.entr(p).sum((1, 2)), torch.full((2,), p.shape[1])


def test_inception_score():
    """Certain and even over n classes: n. The same for each image: 1. Splits with 2 and 4 classes: 3 +- 1."""
    assert inception_score(*sums(np.eye(5)[np.arange(40) % 5])) == pytest.approx((5, 0))
    assert inception_score(*sums(np.full((40, 5), 0.2))) == pytest.approx((1, 0))
    assert inception_score(*sums(np.eye(8)[np.r_[np.arange(40) % 2, np.arange(40) % 4]])) == pytest.approx((3, 1))
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    marginal = p.mean(0)
    assert inception_score(*sums(np.r_[p, p]))[0] == pytest.approx(np.exp((p * np.log(p / marginal)).sum() / 2))


def test_precision_and_recall():
    grid = torch.arange(20.0)[:, None]  # the third-nearest neighbour of an inner point is 2 away, of the first 3
    assert manifold_radii(grid).tolist() == [3.0] + [2.0] * 18 + [3.0]
    two = torch.cat([grid, grid + 1000])
    assert precision_recall(two, two) == (1, 1)
    one = torch.cat([grid, grid + 0.1])  # as many, in one of two clusters: all real, half of it
    assert precision_recall(two, one) == (1, 0.5) and precision_recall(one, two) == (0.5, 1)
    assert precision_recall(grid, grid + 500) == (0, 0)
    assert precision_recall(grid, grid + 20) == (3 / 20, 3 / 20)  # what is in reach of the end that is 3 wide: 20, 21, 22


def test_precision_and_recall_take_equally_many():
    """Of 400 points in a row 20 are drawn, which are further apart, so that their radii reach what those of all would not."""
    many = torch.stack([torch.arange(400.0), torch.zeros(400)], dim=1)
    few = torch.stack([torch.arange(0, 400, 20.0), torch.full((20,), 10.0)], dim=1)
    assert precision_recall(many, few)[0] > 0.8 and precision_recall(few, many)[1] > 0.8
    assert share_inside(few, many, manifold_radii(many)) == 0


def test_tiles_change_nothing():
    x, y = torch.randn(105, 9, dtype=torch.float64) * 1.5, torch.randn(88, 9, dtype=torch.float64)
    distances = (x[:, None] - y).norm(dim=2)
    own = (y[:, None] - y).norm(dim=2).sort(dim=1).values[:, 3]
    for tile in (1, 10, 1000):
        assert torch.allclose(manifold_radii(y, tile), own)
        assert share_inside(x, y, own, tile) == pytest.approx((distances <= own).any(1).double().mean().item())
    assert 0 < share_inside(x, y, own) < 1


class Fake:
    """A network with known answers: the pool is an image's first 3 pixels, the spatial features the next 4; its class
    is pixel 7."""

    def __call__(self, x):
        v = ((x + 1) * 127.5).round().flatten(1)
        return v[:, :3], v[:, 3:7], torch.eye(10)[v[:, 7].long()]


@pytest.fixture
def fake_images():
    images = rng.integers(0, 256, (107, 2, 4, 1)).astype(np.uint8)
    images[:, 1, 3, 0] = np.arange(107) % 10
    return images


@pytest.mark.parametrize("batch", [1, 10, 1000])
def test_one_pass_finds_it_all(fake_images, monkeypatch, batch):
    monkeypatch.setattr(eval_fid, "batch_size", batch)
    monkeypatch.setattr(eval_fid, "manifold_images", 54)
    labels = np.arange(107) % 10
    labels[:20] = -1  # not asked for
    labels[20:40] = 9  # wrong, but for two
    found, v = measure(Fake(), fake_images, labels), fake_images.reshape(107, 8).astype(float)
    assert found["count"] == 107 and found["recognised"] == pytest.approx((67 + 2) / 87)
    for got, want in zip((found["mu"], found["sigma"]), moments(v[:, :3])):
        assert np.allclose(got, want)
    for got, want in zip((found["mu_spatial"], found["sigma_spatial"]), moments(v[:, 3:7])):
        assert np.allclose(got, want)
    kept = [int(np.flatnonzero((v[:, :3] == row).all(1))[0]) for row in found["features"]]
    assert len(kept) == 54 and kept == sorted(set(kept)) and np.bincount(np.arange(107)[kept] % 10).min() > 0  # of each class
    assert 9.5 < found["inception_score"][0] < 10  # ten classes, in splits of 10 or 11 images


def test_memory_does_not_grow_with_the_images(monkeypatch):
    """They are read a batch at a time, and what is kept is of the size of the features."""
    class Endless:
        shape, read = (10_000, 2, 4, 1), []

        def __len__(self):
            return self.shape[0]

        def __getitem__(self, part):
            self.read.append(len(range(*part.indices(len(self)))))
            return np.full((self.read[-1], 2, 4, 1), 7, np.uint8)

    monkeypatch.setattr(eval_fid, "manifold_images", 20)
    found = measure(Fake(), Endless(), None)
    assert max(Endless.read) == eval_fid.batch_size and sum(Endless.read) == 10_001  # and the first one, for the widths
    assert sum(np.size(value) for value in found.values()) < 200 and found["count"] == 10_000


def test_sfid_of_shifted_images_is_the_shift(fake_images, monkeypatch):
    monkeypatch.setattr(eval_fid, "features", "inception")
    shifted = fake_images.clip(0, 245)
    shifted[:, 1, 3] = fake_images[:, 1, 3]
    one = measure(Fake(), shifted, None)
    shifted = shifted.copy()
    shifted.reshape(107, 8)[:, 3:7] += 10
    found = eval_fid.compare(one, measure(Fake(), shifted, None), "cpu")
    assert found["FID"] < 1e-6 and found["sFID"] == pytest.approx(4 * 10 ** 2)
    assert (found["precision"], found["recall"]) == (1, 1) and "recognised" not in found


# files


def test_images_are_read_in_slices(tmp_path):
    images, labels = rng.integers(0, 256, (23, 4, 5, 3)).astype(np.uint8), np.arange(23, dtype=np.int32)
    np.savez(tmp_path / "ours.npz", images=images, labels=labels)
    np.savez_compressed(tmp_path / "adm.npz", images, labels)
    np.savez(tmp_path / "bare.npz", images=images)
    for name in ("ours", "adm", "bare"):
        found, c = data.open_images(f"{tmp_path}/{name}.npz")
        assert len(found) == 23 and found.shape == (23, 4, 5, 3)
        assert np.array_equal(found[7:12], images[7:12]) and np.array_equal(found[20:40], images[20:]) and np.array_equal(found[:3], images[:3])
        assert c is None if name == "bare" else c.dtype == np.int64 and np.array_equal(c, labels)


def nan_images():
    x = np.zeros((5, 4, 4, 1), np.float32)
    x[0, 0, 0], x[1] = np.nan, 3
    return x


@pytest.mark.parametrize("arrays, words", [
    (dict(images=nan_images()), r"float32 \(5, 4, 4, 1\); wanted are uint8, 0 ... 255"),
    (dict(images=np.zeros((5, 4, 4, 1), np.float64)), "float64"),
    (dict(images=np.full((5, 4, 4, 1), 300)), "int64"),
    (dict(images=np.zeros((5, 4, 4), np.uint8)), r"\(5, 4, 4\)"),
    (dict(pictures=np.zeros((5, 4, 4, 1), np.uint8)), "pictures"),
    (dict(images=np.array([{}])), "object"),
    (dict(images=np.zeros((5, 4, 4, 1), np.uint8), labels=np.zeros(4, int)), "labels"),
    (dict(images=np.zeros((5, 4, 4, 1), np.uint8), labels=np.zeros(5)), "labels")])
def test_arrays_that_are_not_images_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(UserError, match=words):
        data.open_images(str(tmp_path / "odd.npz"))


def test_files_that_are_no_npz_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        data.open_images(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("images")
    np.savez(tmp_path / "whole.npz", images=np.zeros((9, 9, 9, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:1000])
    for name in ("text", "cut"):
        with pytest.raises(UserError, match="is not an .npz with `images`"):
            data.open_images(str(tmp_path / f"{name}.npz"))


# the script, on a small data set of its own


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
    """evaluate(settings) -> what eval_fid.py prints"""
    monkeypatch.setattr(data, "HERE", place)
    monkeypatch.setattr(data, "load", partial(data.load, root=place / "datasets"))
    return partial(run, "eval_fid.py", "--features=classifier", "--data=small", "--device=cpu")


def test_real_images_measured_by_the_classifier(evaluate, place):
    printed = evaluate(f"--images={place / 'samples.npz'}")
    found = json.loads((place / "samples.classifier.json").read_text())
    for title in ("FD-classifier", "precision", "recall", "recognised", "NFE", "seconds per image"):
        assert f"\n{title:24}{found[title]:10.4g}" in printed
    assert "600 images" in printed and "1,500 images of small, 7 x 7 x 1" in printed and "not FID" in printed
    assert found["recognised"] > 0.6 and found["precision"] > 0.6 and found["recall"] > 0.6
    assert (found["count"], found["real_count"], found["NFE"], found["seconds per image"]) == (600, 1500, 35, 0.25)
    assert not {"FID", "sFID", "Inception Score"} & set(found)
    kept = {path: path.stat().st_mtime_ns for path in (place / "datasets" / "features").iterdir()}
    assert len(kept) == 2 and evaluate(f"--images={place / 'samples.npz'}") == printed
    assert kept == {path: path.stat().st_mtime_ns for path in (place / "datasets" / "features").iterdir()}


def test_a_data_set_has_no_distance_from_itself(evaluate, place, monkeypatch):
    monkeypatch.chdir(place)
    printed = evaluate("--images=small")
    found = json.loads((place / "small.classifier.json").read_text())
    assert found["FD-classifier"] < 1e-9 and (found["precision"], found["recall"]) == (1, 1) and "warning" not in printed


def test_two_processes_find_the_same(evaluate, place):
    evaluate(f"--images={place / 'samples.npz'}")
    one = json.loads((place / "samples.classifier.json").read_text())
    for path in (place / "datasets" / "features").glob("small*.npz"):
        path.unlink()  # so that the real images are measured by two as well
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval_fid.py", "--data=small",
                    "--images=samples.npz", "--features=classifier", "--device=cpu", "--batch_size=77"], cwd=place, check=True,
                   capture_output=True)
    two = json.loads((place / "samples.classifier.json").read_text())
    assert two.pop("images") == "samples.npz" and one.pop("images")
    assert two == {key: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for key, value in one.items()}


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
    assert "recognised" not in json.loads((place / "few.classifier.json").read_text())


@pytest.mark.parametrize("arguments, words", [
    (["--images=small", "--features=vgg"], "inception or classifier, not vgg"),
    (["--images=small", "--resize=bicubic"], "pytorch or tf1, not bicubic"),
    (["--images=nowhere"], "no data set 'nowhere'"), (["--images=nowhere.npz"], "nowhere.npz .*No such file"),
    (["--images=small", "--manifold_images=3"], "manifold_images above 3"),
    (["--images=small", "--data=stats.npz"], "need a data set's name"),
    (["--images=small", "--data=stats.npz", "--features=inception", "--self_check=True"], "need a data set's name"),
    (["--images=tiny.npz"], "at least 10 of"), (["--images=wide.npz"], "one shape"),
    (["--images=small", "--features=inception", "--weights=nowhere.pth"], "no file nowhere.pth"),
    (["--images=small", "--features=inception", "--weights=stats.npz"], "SHA-256"),
    (["--images=small", "--data=unlabelled"], "no class labels")])
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
    with pytest.raises(UserError, match="no network.*put https://.*6726825d.pth into .*checkpoints.*--weights=") as error:
        evaluate("--images=small", "--features=inception")
    assert "\n" not in str(error.value) and not list((place / "hub").rglob("*.pth"))


@pytest.fixture
def with_inception(inception, evaluate, place, monkeypatch):
    """evaluate(), with the network of the reference as if it were the published one."""
    state = {key: value for key, value in inception.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, place / "weights-6726825d.pth")
    monkeypatch.setattr("hashlib.sha256", lambda b: type("", (), {"hexdigest": lambda self: "6726825d00"})())
    images, labels, _ = data.load("small")
    few = place / "datasets" / "few"
    few.mkdir(exist_ok=True)
    np.save(few / "images.npy", images[:12])
    (few / "classes.json").write_text("[]")
    monkeypatch.chdir(place)
    return partial(evaluate, "--features=inception", "--data=few", f"--weights={place / 'weights-6726825d.pth'}", "--batch_size=6")


def test_inception_from_images_to_table_and_statistics(with_inception, place):
    images = np.load(place / "samples.npz")["images"]
    np.savez(place / "twelve.npz", images=images[:12])
    printed = with_inception("--images=twelve.npz", "--resize=pytorch")
    found = json.loads((place / "twelve.inception.json").read_text())
    for title in ("FID", "sFID", "Inception Score", "precision", "recall"):
        assert f"\n{title:24}{found[title]:10.4g}" in printed
    assert "resized as in pytorch-fid" in printed and found["features"] == "inception-pytorch-6d" and found["FID"] > 0
    assert printed.count("12 images of") == 4 and printed.count("fewer than the 2,048") == 2 and "7 x 7 x 1" in printed
    (kept,) = (place / "datasets" / "features").glob("few-*inception-pytorch*.npz")
    assert str(kept) in printed
    with np.load(kept) as f:
        np.savez(place / "edm.npz", mu=f["mu"], sigma=f["sigma"])
    printed = with_inception("--images=twelve.npz", "--data=edm.npz", "--resize=pytorch")
    alone = json.loads((place / "twelve.inception.json").read_text())
    assert alone["FID"] == pytest.approx(found["FID"]) and not {"sFID", "precision"} & set(alone) and "EDM's have --resize=tf1" in printed
    with pytest.raises(UserError, match="made with the features inception-pytorch-6d, not inception-tf1-6d"):
        with_inception("--images=twelve.npz", f"--data={kept}")
    with_inception("--images=")
    (tf1,) = (place / "datasets" / "features").glob("few-*inception-tf1*.npz")
    with np.load(tf1) as tf1, np.load(kept) as f:
        assert 0.01 < np.abs(tf1["mu"] - f["mu"]).max() < 1 and f["count"] == tf1["count"] == 12
