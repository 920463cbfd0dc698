"""eval_fid.py with a network of known answers: one pass, the comparison, reference batches."""
import json
import sys

import numpy as np
import pytest
import torch
from conftest import moments

import eval_fid
from classifier import accuracy
from configurator import UserError
from eval_fid import measure, shared_codes
from metrics import equally_many, frechet_distance, kernel_distance, precision_recall

rng = np.random.default_rng(0)


class Fake:
    """A network with known answers: the pool is an image's first 3 pixels, the spatial features the
    next 4; its class is pixel 7."""

    pool_dim, spatial_dim = 3, 4

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
    assert len(kept) == 54 and kept == sorted(set(kept))
    assert np.bincount(np.arange(107)[kept] % 10).min() > 0  # of each class
    assert 9.5 < found["inception_score"][0] < 10  # ten classes, in splits of 10 or 11 images
    assert np.array_equal(measure(Fake(), fake_images, labels, keep=1000)["features"], v[:, :3])
    c = v[:, 7].astype(int)
    c[:30] = 9 - c[:30]
    assert accuracy(Fake(), fake_images, c, batch=batch) == pytest.approx(77 / 107)


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


def test_precision_and_recall_take_all_or_equally_many(monkeypatch):
    """By ADM's protocol all points count, else as many of each side (points of test_metrics.py)."""
    many = torch.stack([torch.arange(400.0), torch.zeros(400)], dim=1)
    few = torch.stack([torch.arange(0, 400, 20.0), torch.full((20,), 10.0)], dim=1)

    def of(features):
        monkeypatch.setattr(eval_fid, "features", features)
        return eval_fid.compare_rows(many.numpy(), few.numpy(), "cpu")

    adm, ours = of("inception"), of("classifier")
    assert adm["precision"] == 0 and ours["precision"] > 0.8
    assert adm["protocol"].endswith("ADM's program: 400 reference images, 20 samples")
    assert ours["protocol"].endswith("equally many: 20 of each side")
    assert (adm["KID"], adm["KID se"]) == kernel_distance(many, few)
    assert (ours["KID"], ours["KID se"]) == kernel_distance(*equally_many(many, few))
    monkeypatch.setattr(eval_fid, "manifold_images", 10)
    assert of("classifier")["protocol"].endswith("10 of each side")


def test_where_neighbours_share_codes():
    codes, labels = rng.integers(0, 9, (10, 6)), np.arange(10)
    (said,) = shared_codes(codes.repeat(8, axis=0), labels.repeat(8), 80)
    assert "80 images have 10" in said and "--per_code=1" in said
    assert shared_codes(codes.repeat(8, axis=0), None, 80)  # as those of sample.py's pictures
    assert not shared_codes(codes, labels, 10)
    assert not shared_codes(codes[:, :0].repeat(8, axis=0), labels.repeat(8), 80)
    assert not shared_codes(codes[:1].repeat(80, axis=0), np.arange(80) % 10, 80)  # one code, of each class in turn
    same = codes[np.r_[0, 0, 1:9]]  # by chance: nine of ten
    assert not shared_codes(same, None, 10) and shared_codes(codes[np.r_[0, 0, 0, 1:8]], None, 10)
    for odd in (np.empty(0), codes[:9], codes[0], codes.astype(float), np.array([["a"]] * 10), np.array(3)):
        assert not shared_codes(odd, None, 10)


# reference batches: by a network with known answers


@pytest.fixture
def reference(fake_images, tmp_path, monkeypatch):
    """reference(arrays) -> what eval_fid.py finds of 60 samples against an .npz of these arrays,
    and what it prints.

    .seen: the numbers of images that the network was given. .real, .made: the images.
    """
    seen = []

    class Counting(Fake):
        def __call__(self, x):
            seen.append(len(x))
            return super().__call__(x)

    for name, value in dict(find_inception=lambda *settings: Counting(), CACHE=tmp_path / "features",
                            features="inception", device="cpu", batch_size=8, images=f"{tmp_path}/made.npz",
                            reference=f"{tmp_path}/reference.npz").items():
        monkeypatch.setattr(eval_fid, name, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which main replaces
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
    """Moments from the file, which are of other images; features of its images, against all
    samples. The images are read a batch at a time, and measured once."""
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
    monkeypatch.setattr(eval_fid, "MOST_SAMPLES", 50)
    assert "47 reference images, 50 samples" in reference(capsys, **adm)[0]["protocol"]
    monkeypatch.setattr(eval_fid, "MOST_SAMPLES", 60)
    monkeypatch.setattr(eval_fid, "manifold_images", 20)
    assert "20 reference images, 60 samples" in reference(capsys, **adm)[0]["protocol"]
    monkeypatch.setattr(eval_fid, "resize", "pytorch")
    with pytest.raises(UserError, match="--resize=tf1"):
        reference(capsys, **adm)


def test_other_files_to_compare_with(reference, capsys):
    """EDM's mu and sigma: FID. Images alone: everything. Files of one name are told apart."""
    mu, sigma = moments(rows(reference.real)[:, :3])
    mu_s, sigma_s = moments(rows(reference.real)[:, 3:7])
    edm, printed = reference(capsys, mu=mu, sigma=sigma)
    assert edm["FID"] > 0 and not {"sFID", "precision", "KID", "protocol"} & set(edm)
    assert "EDM's have --resize=tf1" in printed
    adm, _ = reference(capsys, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=reference.real)
    alone, printed = reference(capsys, arr_0=reference.real)
    near = {key: pytest.approx(value) if type(value) is float else value for key, value in alone.items()}
    assert adm == near | dict(real_count=None)
    assert alone["FID"] == pytest.approx(edm["FID"]) and alone["real_count"] == 47 and "47 images of" in printed
    assert reference(capsys, images=reference.real[:20])[0]["real_count"] == 20
    mixed, _ = reference(capsys, mu=mu, sigma=sigma, arr_0=reference.real[:20])
    assert mixed["FID"] == pytest.approx(edm["FID"]) and "sFID" not in mixed
    assert "20 reference images" in mixed["protocol"]


@pytest.mark.parametrize("arrays, words", [
    (dict(mu_s=np.zeros(9), sigma_s=np.eye(9)), r"mu_s \(9,\) and sigma_s \(9, 9\).*of 4 dimensions"),
    (dict(mu_s=np.zeros(4)), "can't be read as statistics.*sigma_s"), (dict(mu=np.zeros(4)), r"mu \(4,\)"),
    (dict(mu=np.full(3, np.nan)), "values that can't be"),
    (dict(sigma=np.triu(np.ones((3, 3)))), "values that can't be"),
    (dict(mu=np.array([{}])), "can't be read as statistics"),
    (dict(arr_0=np.zeros((50, 2, 4))), "not an .npz with `images`"),
    (dict(arr_0=np.zeros((5, 2, 4, 1), np.uint8)), "at least 10"),
    (dict(made_with="inception-tf1"), "features inception-tf1, not inception-tf1-6d")])  # with sFID's features of 6e
def test_odd_reference_batches_are_refused(reference, capsys, arrays, words):
    with pytest.raises(UserError, match=words) as error:
        reference(capsys, **(dict(mu=np.zeros(3), sigma=np.eye(3)) | arrays))
    assert "\n" not in str(error.value)
