"""Arrays in .npz files: read in slices, refused, written as PNG files."""
import errno
import os

import numpy as np
import pytest
from PIL import Image

import data
import npz
from configurator import UserError

rng = np.random.default_rng(0)


def test_images_are_read_in_slices(tmp_path):
    images, labels = rng.integers(0, 256, (23, 4, 5, 3)).astype(np.uint8), np.arange(23, dtype=np.int32)
    np.savez(tmp_path / "ours.npz", images=images, labels=labels)
    np.savez_compressed(tmp_path / "adm.npz", images, labels)
    np.savez(tmp_path / "bare.npz", images=images)
    for name in ("ours", "adm", "bare"):
        found, c = data.open_images(f"{tmp_path}/{name}.npz")
        assert len(found) == 23 and found.shape == (23, 4, 5, 3)
        for part in (slice(7, 12), slice(20, 40), slice(3)):
            assert np.array_equal(found[part], images[part])
        assert c is None if name == "bare" else c.dtype == np.int64 and np.array_equal(c, labels)


def nan_images():
    x = np.zeros((5, 4, 4, 1), np.float32)
    x[0, 0, 0], x[1] = np.nan, 3
    return x


@pytest.mark.parametrize("arrays, words", [
    (dict(images=nan_images()), r"float32 \(5, 4, 4, 1\), not uint8, 0 ... 255"),
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


def test_png_files_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arrays = dict(images=rng.integers(0, 256, (3, 4, 4, 1), np.uint8), labels=np.arange(3), seeds=np.arange(3))
    np.savez(tmp_path / "a.npz", **arrays)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="can't write .*pngs: No space left on device"):
        npz.save_pngs([tmp_path / "a.npz"], tmp_path / "pngs")
