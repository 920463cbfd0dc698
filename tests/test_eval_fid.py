"""The metrics: reference numbers, closed forms, known answers; the script and its mistakes."""
import json
import subprocess
import sys
import urllib.error
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval_fid
from configurator import UserError
from conftest import ROOT, fill, run
from eval_fid import (Moments, equally_many, frechet_distance, inception_score, kernel_distance, manifold_radii, measure,
                      precision_recall, root, share_inside, shared_codes)
from inception import Inception, load_inception, resize_tf1
from run import release

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


def test_what_inception_is_given_and_its_classes(inception, monkeypatch):
    """As TensorFlow's program: pixels v as (v - 128) / 128, and class probabilities without the bias of the last layer."""
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


def test_precision_and_recall_take_all_or_equally_many(monkeypatch):
    """Of 400 points in a row 20 are drawn, which are further apart, so that their radii reach what those of all do not."""
    many = torch.stack([torch.arange(400.0), torch.zeros(400)], dim=1)
    few = torch.stack([torch.arange(0, 400, 20.0), torch.full((20,), 10.0)], dim=1)
    assert precision_recall(*equally_many(many, few))[0] > 0.8 and precision_recall(*equally_many(few, many))[1] > 0.8
    assert precision_recall(many, few)[0] == 0 and precision_recall(few, many)[1] == 0  # ADM's protocol: all
    assert share_inside(few, many, manifold_radii(many)) == 0

    def of(features):
        monkeypatch.setattr(eval_fid, "features", features)
        return eval_fid.compare_rows(many.numpy(), few.numpy(), "cpu")

    adm, ours = of("inception"), of("classifier")
    assert adm["precision"] == 0 and ours["precision"] > 0.8
    assert adm["protocol"].endswith("ADM's program: 400 reference images, 20 samples")
    assert ours["protocol"].endswith("equally many: 20 of each side")
    assert (adm["KID"], adm["KID se"]) == kernel_distance(many, few) and (ours["KID"], ours["KID se"]) == kernel_distance(*equally_many(many, few))
    monkeypatch.setattr(eval_fid, "manifold_images", 10)
    assert of("classifier")["protocol"].endswith("10 of each side")


def test_kid_is_the_double_sum():
    x, y = rng.normal(size=(4, 3)), rng.normal(0.5, 1, size=(6, 3))
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    own = [sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1)) for z in (x, y)]
    want = sum(own) - 2 * sum(k(a, b) for a in x for b in y) / 24
    for tile in (1, 3, 1000):
        assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y), tile)[0] == pytest.approx(want, rel=1e-12)
        assert kernel_distance(torch.from_numpy(y), torch.from_numpy(x), tile)[0] == pytest.approx(want, rel=1e-12)
    a, b = torch.zeros(5, 2), torch.ones(7, 2)  # k = 1 within the one, 8 within the other, 1 between: no row differs
    assert kernel_distance(a, b) == (1 + 8 - 2, 0)


@pytest.mark.parametrize("shift, low, high", [(0, 1.3, 1.55), (1, 0.9, 1.1)])
def test_kid_is_unbiased_and_its_error_is_the_spread_or_above(shift, low, high):
    """Between N(0, 1) and N(a, 1) MMD^2 is the sum over j of binom(3, j) (difference of the j-th moments)^2. For a = 0 the
    error should be sqrt(2) times the spread, further apart once."""
    g = torch.Generator().manual_seed(0)
    found = torch.tensor([kernel_distance(torch.randn(80, 1, generator=g), torch.randn(160, 1, generator=g) + shift)
                          for _ in range(1500)])
    spread = found[:, 0].std().item()
    want = 3 * shift ** 2 + 3 * shift ** 4 + (shift ** 3 + 3 * shift) ** 2
    assert abs(found[:, 0].mean().item() - want) < 3 * spread / 1500 ** 0.5
    assert low < found[:, 1].square().mean().sqrt().item() / spread < high


def test_where_neighbours_share_codes():
    codes, labels = rng.integers(0, 9, (10, 6)), np.arange(10)
    (said,) = shared_codes(codes.repeat(8, axis=0), labels.repeat(8), 80)
    assert "80 images have 10" in said and "--per_code=1" in said
    assert shared_codes(codes.repeat(8, axis=0), None, 80)  # as those of sample.py's pictures
    assert not shared_codes(codes, labels, 10) and not shared_codes(codes[:, :0].repeat(8, axis=0), labels.repeat(8), 80)
    assert not shared_codes(codes[:1].repeat(80, axis=0), np.arange(80) % 10, 80)  # one code, of each class in turn
    same = codes[np.r_[0, 0, 1:9]]  # by chance: nine of ten
    assert not shared_codes(same, None, 10) and shared_codes(codes[np.r_[0, 0, 0, 1:8]], None, 10)
    for odd in (np.empty(0), codes[:9], codes[0], codes.astype(float), np.array([["a"]] * 10), np.array(3)):
        assert not shared_codes(odd, None, 10)


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
    for got, want in zip((found["mu_s"], found["sigma_s"]), moments(v[:, 3:7])):
        assert np.allclose(got, want)
    assert np.allclose(found["recognised_by_class"], [1] * 9 + [(6 + 2) / (6 + 20)])
    kept = [int(np.flatnonzero((v[:, :3] == row).all(1))[0]) for row in found["features"]]
    assert len(kept) == 54 and kept == sorted(set(kept)) and np.bincount(np.arange(107)[kept] % 10).min() > 0  # of each class
    assert 9.5 < found["inception_score"][0] < 10  # ten classes, in splits of 10 or 11 images
    assert np.array_equal(measure(Fake(), fake_images, labels, keep=1000)["features"], v[:, :3])


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


# reference batches: by a network with known answers


@pytest.fixture
def reference(fake_images, tmp_path, monkeypatch):
    """reference(arrays) -> what eval_fid.py finds of 60 samples against an .npz of these arrays, and what it prints.

    .seen: the numbers of images that the network was given. .real, .made: the images.
    """
    net, seen = Fake(), []
    net.fc = SimpleNamespace(in_features=3)

    class Counting:
        fc = net.fc

        def __call__(self, x):
            seen.append(len(x))
            return net(x)

    for name, value in dict(find_inception=lambda *settings: Counting(), SPATIAL=4, CACHE=tmp_path / "features", features="inception",
                            device="cpu", batch_size=8, data=f"{tmp_path}/reference.npz", images=f"{tmp_path}/made.npz").items():
        monkeypatch.setattr(eval_fid, name, value)
    np.savez(tmp_path / "made.npz", images=fake_images[47:])

    def evaluate(capsys, **arrays):
        np.savez(tmp_path / "reference.npz", **arrays)
        seen.clear()
        eval_fid.main()
        return json.loads((tmp_path / "made.inception.json").read_text()), capsys.readouterr().out

    evaluate.seen, evaluate.real, evaluate.made = seen, fake_images[:47], fake_images[47:]
    return evaluate


def rows(images):
    return images.reshape(len(images), 8).astype(float)


def test_adms_reference_batch_gives_all_metrics(reference, capsys, monkeypatch):
    """Moments from the file, which are of other images; features of its images, against all samples. The images are read a
    batch at a time, and measured once."""
    stored = rng.normal(100, 50, (200, 7))
    (mu, sigma), (mu_s, sigma_s) = moments(stored[:, :3]), moments(stored[:, 3:])
    adm = dict(arr_0=reference.real, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    real, made = (torch.from_numpy(rows(x)[:, :3]) for x in (reference.real, reference.made))
    found, printed = reference(capsys, **adm)
    assert found["FID"] == pytest.approx(frechet_distance(mu, sigma, *moments(made.numpy())))
    assert found["sFID"] == pytest.approx(frechet_distance(mu_s, sigma_s, *moments(rows(reference.made)[:, 3:7])))
    assert (found["precision"], found["recall"]) == precision_recall(real, made) and 0 < found["recall"] < 1
    assert (found["KID"], found["KID se"]) == pytest.approx(kernel_distance(real, made))
    assert "47 reference images, 60 samples" in found["protocol"] and f"\n  {found['protocol']}\n" in printed
    assert f"\n{'KID':24}{found['KID']:10.4g} +- {found['KID se']:.2g}\n" in printed
    assert (found["count"], found["real_count"]) == (60, None) and "47 images of" in printed
    assert sum(reference.seen) == 47 + 60 + 2 and max(reference.seen) == 8
    assert reference(capsys, **adm)[0] == found and sum(reference.seen) == 60 + 1  # from the cache
    monkeypatch.setattr(eval_fid, "ALL", 50)
    assert "47 reference images, 50 samples" in reference(capsys, **adm)[0]["protocol"]
    monkeypatch.setattr(eval_fid, "ALL", 60)
    monkeypatch.setattr(eval_fid, "manifold_images", 20)
    assert "20 reference images, 60 samples" in reference(capsys, **adm)[0]["protocol"]
    monkeypatch.setattr(eval_fid, "resize", "pytorch")
    with pytest.raises(UserError, match="--resize=tf1"):
        reference(capsys, **adm)


def test_other_files_to_compare_with(reference, capsys):
    """EDM's mu and sigma alone: FID. Images alone: all of it. Others with the same name are told apart."""
    mu, sigma = moments(rows(reference.real)[:, :3])
    mu_s, sigma_s = moments(rows(reference.real)[:, 3:7])
    edm, printed = reference(capsys, mu=mu, sigma=sigma)
    assert edm["FID"] > 0 and not {"sFID", "precision", "KID", "protocol"} & set(edm) and "EDM's have --resize=tf1" in printed
    adm, _ = reference(capsys, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=reference.real)
    alone, printed = reference(capsys, arr_0=reference.real)
    assert adm == {key: pytest.approx(value) if type(value) is float else value for key, value in alone.items()} | dict(real_count=None)
    assert alone["FID"] == pytest.approx(edm["FID"]) and alone["real_count"] == 47 and "47 images of" in printed
    assert reference(capsys, images=reference.real[:20])[0]["real_count"] == 20
    mixed, _ = reference(capsys, mu=mu, sigma=sigma, arr_0=reference.real[:20])
    assert mixed["FID"] == pytest.approx(edm["FID"]) and "sFID" not in mixed and "20 reference images" in mixed["protocol"]


@pytest.mark.parametrize("arrays, words", [
    (dict(mu_s=np.zeros(9), sigma_s=np.eye(9)), r"mu_s \(9,\) and sigma_s \(9, 9\).*of 4 dimensions"),
    (dict(mu_s=np.zeros(4)), "can't be read as statistics.*sigma_s"), (dict(mu=np.zeros(4)), r"mu \(4,\)"),
    (dict(mu=np.full(3, np.nan)), "values that can't be"), (dict(sigma=np.triu(np.ones((3, 3)))), "values that can't be"),
    (dict(mu=np.array([{}])), "can't be read as statistics"), (dict(arr_0=np.zeros((50, 2, 4))), "not an .npz with `images`"),
    (dict(arr_0=np.zeros((5, 2, 4, 1), np.uint8)), "at least 10"),
    (dict(made_with="inception-tf1"), "features inception-tf1, not inception-tf1-6d")])  # with sFID's features of 6e
def test_odd_reference_batches_are_refused(reference, capsys, arrays, words):
    with pytest.raises(UserError, match=words) as error:
        reference(capsys, **(dict(mu=np.zeros(3), sigma=np.eye(3)) | arrays))
    assert "\n" not in str(error.value)


# another network's features


@pytest.fixture
def given(tmp_path, monkeypatch):
    """given(arrays, arguments) -> what eval_fid.py finds of an .npz of these arrays, and what it prints."""
    def evaluate(arrays, *arguments):
        np.savez(tmp_path / "dino.npz", **arrays)
        printed = run("eval_fid.py", f"--features={tmp_path / 'dino.npz'}", "--images=nowhere.npz", "--data=nowhere", *arguments)
        return json.loads((tmp_path / "dino.features.json").read_text()), printed
    return evaluate


def test_features_from_a_file(given, monkeypatch):
    real, generated = rng.integers(-9, 9, (40, 5)), rng.integers(-8, 10, (60, 5))
    found, printed = given(dict(real=real, generated=generated))
    assert found["FD"] == pytest.approx(frechet_distance(*moments(real), *moments(generated))) and "FID" not in found
    pair = equally_many(torch.from_numpy(real), torch.from_numpy(generated))
    assert [len(x) for x in pair] == [40, 40] and (found["precision"], found["recall"]) == precision_recall(*pair)
    assert (found["KID"], found["KID se"]) == kernel_distance(*pair) and found["protocol"].endswith("equally many: 40 of each side")
    assert (found["count"], found["real_count"]) == (60, 40) and "60 rows" in printed and "40 of real" in printed
    for title in ("FD", "precision", "recall", "KID"):
        assert f"\n{title:24}{found[title]:10.4g}" in printed
    assert "warning" not in printed and "dino.features.json is ready" in printed
    for dtype in ("float16", "float32", ">f8", "int8"):
        assert given(dict(real=real.astype(dtype), generated=np.asfortranarray(generated.astype(dtype)), other=np.array([{}])))[0] == found
    assert "10 of each side" in given(dict(real=real, generated=generated), "--manifold_images=10")[0]["protocol"]
    found, printed = given(dict(real=rng.normal(size=(4, 5)), generated=rng.normal(size=(9, 5))))
    assert printed.count("warning: 4 rows of real are fewer than the 5 dimensions") == printed.count("warning") == 1
    assert given(dict(real=real[:, :1], generated=real[:, :1]))[0]["FD"] == 0


@pytest.mark.parametrize("arrays, words", [
    (dict(real=None), "it has generated, not real"), (dict(generated=None, a=1), "it has real, a, not generated"),
    (dict(real=None, generated=None), "it has nothing, not real and generated"), (dict(real=np.zeros(9)), r"real float64 \(9,\)"),
    (dict(generated=np.zeros((9, 2, 3))), r"generated float64 \(9, 2, 3\)"), (dict(real=np.zeros((9, 0))), r"\(9, 0\)"),
    (dict(real=np.zeros((9, 4))), "4 dimensions in real, 3 in generated"), (dict(real=np.full((9, 3), np.nan)), "NaN, infinity .* in real"),
    (dict(generated=np.full((9, 3), -np.inf, np.float16)), "NaN, infinity .* in generated"), (dict(real=np.full((9, 3), 1e200)), "1e50"),
    (dict(real=np.zeros((3, 3))), "3 rows of real: 4 or more"), (dict(real=np.array([[{}]])), "Object arrays"),
    (dict(generated=np.zeros((9, 3), complex)), "complex128"), (dict(real=np.array([["a"] * 3] * 9)), "<U1")])
def test_odd_features_are_refused(given, arrays, words):
    arrays = dict(real=np.ones((9, 3)), generated=np.ones((9, 3))) | arrays
    with pytest.raises(UserError, match=words) as error:
        given({key: value for key, value in arrays.items() if value is not None})
    assert "\n" not in str(error.value)


def test_features_that_are_no_file_are_refused(given, tmp_path):
    with pytest.raises(UserError, match="none.npz is not an .npz with features.*No such file"):
        run("eval_fid.py", f"--features={tmp_path / 'none.npz'}")
    (tmp_path / "text.npz").write_text("features")
    with pytest.raises(UserError, match="text.npz is not an .npz with features"):
        run("eval_fid.py", f"--features={tmp_path / 'text.npz'}")
    with pytest.raises(UserError, match="--self_check.*features alone"):
        given(dict(real=np.ones((9, 3)), generated=np.ones((9, 3))), "--self_check=True")


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
    for function in (data.load, data.class_names, data.made_of, data.is_prepared):
        monkeypatch.setattr(data, function.__name__, partial(function, root=place / "datasets"))
    return partial(run, "eval_fid.py", "--features=classifier", "--data=small", "--device=cpu")


def test_real_images_measured_by_the_classifier(evaluate, place):
    printed = evaluate(f"--images={place / 'samples.npz'}")
    found = json.loads((place / "samples.classifier.json").read_text())
    for title in ("FD-classifier", "precision", "recall", "KID", "recognised", "NFE", "seconds per image"):
        assert f"\n{title:24}{found[title]:10.4g}" in printed
    assert "equally many: 600 of each side" in found["protocol"] and f"\n  {found['protocol']}\n" in printed and "warning" not in printed
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
        for ours, theirs, warned in (("center-crop", "center-crop-dhariwal", True), ("center-crop", "center-crop", False),
                                     (None, "center-crop", False), ("center-crop", None, False)):
            made.write_text(json.dumps({"transform": ours}))
            np.savez(tmp_path / "x.npz", **arrays, **({"made": json.dumps({"transform": theirs})} if theirs else {}))
            printed = evaluate(f"--images={tmp_path / 'x.npz'}")
            assert (f"were resized by {theirs}, those of small by {ours}: part of the distance comes from that" in printed) == warned
    finally:
        made.unlink()


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
    assert not {"recognised", "recognised by class"} & set(json.loads((place / "few.classifier.json").read_text()))
    np.savez(place / "shared.npz", images=images[:80], codes=np.arange(10).repeat(8)[:, None], labels=np.full(80, 3), nfe=[{}])
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


def test_what_is_kept_is_begun_by_one_run_where_it_can_be_written(tmp_path, monkeypatch):
    """Both are told before the classifier is trained, and before the data set is measured."""
    monkeypatch.setattr(eval_fid, "CACHE", tmp_path / "busy")
    path = tmp_path / "busy" / "a.npz"
    eval_fid.reserve(path)
    with pytest.raises(UserError, match="another run is writing .*busy/a.npz: wait"):
        eval_fid.reserve(path)
    release(path)
    assert not list((tmp_path / "busy").iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(eval_fid, "CACHE", tmp_path / "file" / "features")  # nobody can make a folder there
    with pytest.raises(UserError, match="can't write .*, where what is computed on a data set is kept: make it writable"):
        eval_fid.reserve(tmp_path / "file" / "features" / "a.npz")


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
    for title in ("FID", "sFID", "Inception Score", "precision", "recall", "KID"):
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
