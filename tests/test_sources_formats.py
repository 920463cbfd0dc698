"""Images as strangers have them: what EDM's tools wrote, MNIST's format, CIFAR-10."""
import gzip
import io
import itertools
import json
import tarfile
import zipfile

import numpy as np
import pytest
from pictures import edm_folder, random_images, save, write_idx, zipped
from PIL import Image

import data
from configurator import UserError


def nothing_left(root):
    return not root.exists() or list(root.iterdir()) == []


# EDM's folders and archives


@pytest.mark.parametrize("labels, classes", [([1, 0, 0, 1], 2), (None, 0)])
def test_edm_folders(root, tmp_path, labels, classes):
    """Shard folders are no classes, and the images stay as they are: in folders and archives, at the top or one folder below."""
    source = edm_folder(tmp_path / "around" / "edm", labels)
    (tmp_path / "around" / "__MACOSX").mkdir()
    (tmp_path / "around" / "README.txt").write_text("x")
    cases = [source, tmp_path / "around", zipped(source, tmp_path / "a.zip"), zipped(source, tmp_path / "b.ZIP", "edm/")]
    for i, case in enumerate(cases):
        data.prepare(f"set{i}", str(case), root=root)
        images, c, count = data.load(f"set{i}", root)
        assert images.shape == (4, 9, 9, 3) and images[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and count == classes
        assert c is None if labels is None else c.tolist() == labels
        data.prepare("small", str(case), resolution=4, overwrite=True, root=root)
        assert data.load("small", root)[0].shape == (4, 4, 4, 3)


@pytest.mark.parametrize("labels, message", [
    ([0, 0, 2, 2], r"no images of 1 of its 3 classes \(1\)"), ([3, 3, 3, 3], r"\(0, 1, 2\)"), ([-1, 0, 0, 0], "negative labels"),
    ([0, 1, 0.5, 0], "not whole numbers"), ([0, 1, None, 0], "TypeError"), ([0, 1, [1, 2], 0], "TypeError"), ([0, 1, 10 ** 9, 0], "above 1,000,000")])
def test_labels_that_no_image_has(root, tmp_path, labels, message):
    for case in (edm_folder(tmp_path / "edm", labels), zipped(tmp_path / "edm", tmp_path / "edm.zip")):
        with pytest.raises(UserError, match=message):
            data.prepare("set", str(case), root=root)
    assert not root.exists()


@pytest.mark.parametrize("content", ["[]", "{}", "", "{\"labels\": 5}", "{\"labels\": [[1]]}", "\xff", "[" * 100_000])
def test_a_dataset_json_that_is_none(root, tmp_path, content):
    (edm_folder(tmp_path / "edm", None) / "dataset.json").write_text(content, encoding="latin-1")
    for case in (tmp_path / "edm", zipped(tmp_path / "edm", tmp_path / "edm.zip")):
        with pytest.raises(UserError, match="dataset.json is not one that EDM's tools wrote, or is damaged"):
            data.prepare("set", str(case), root=root)


def test_dataset_json_and_images_that_do_not_fit(root, tmp_path, capsys):
    source = edm_folder(tmp_path / "edm", [0, 1, 0, 1])
    (source / "00000" / "img00000000.png").unlink()
    data.prepare("set", str(source), root=root)
    assert "dataset.json has labels for 1 missing images, such as 00000/img00000000.png" in capsys.readouterr().err
    save(source / "00000" / "new.png", 0, (9, 9))
    with pytest.raises(UserError, match="has no label for 1 of the images"):
        data.prepare("set", str(source), overwrite=True, root=root)


def test_labels_go_by_name_and_not_by_place(tmp_path):
    source = edm_folder(tmp_path / "edm", [0, 1, 2, 3])
    entries = json.loads((source / "dataset.json").read_text())["labels"]
    for order in itertools.permutations(range(4)):
        (source / "dataset.json").write_text(json.dumps({"labels": [entries[i] for i in order]}))
        images, labels = data.open_images(str(source))
        assert labels.tolist() == images[:][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_two_data_sets_of_edms_are_no_classes(root, tmp_path):
    for name in ("train", "val"):
        edm_folder(tmp_path / "above" / "both" / name, None)
    for case in (tmp_path / "above" / "both", tmp_path / "above"):
        with pytest.raises(UserError, match="has a data set of EDM's tools in a subfolder, .*dataset.json.*: name that subfolder as the source"):
            data.prepare("set", str(case), root=root)


def test_a_transform_that_would_be_ignored(root, tmp_path):
    source = zipped(edm_folder(tmp_path / "edm", None), tmp_path / "edm.zip")
    for case in (source, tmp_path / "edm"):
        with pytest.raises(UserError, match="keep their size: --transform=center-crop-dhariwal needs a --resolution="):
            data.prepare("set", str(case), transform="center-crop-dhariwal", root=root)


def write_zip(path, images, labels, extra=()):
    with zipfile.ZipFile(path, "w") as z:
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            z.writestr(f"00000/img{i:08d}.png", buffer.getvalue())
        for name, content in extra:
            z.writestr(name, content)
        found = None if labels is None else [[f"00000/img{i:08d}.png", c] for i, c in enumerate(labels)]
        z.writestr("dataset.json", json.dumps({"labels": found}))


def test_edm_zip(root, tmp_path):
    images = random_images(5, 16, 16, 3)
    write_zip(tmp_path / "edm.zip", images, [3, 0, 2, 2, 1])
    data.prepare("edm", str(tmp_path / "edm.zip"), root=root)
    x, c, classes = data.load("edm", root)
    assert np.array_equal(x, images) and c.tolist() == [3, 0, 2, 2, 1] and classes == 4
    write_zip(tmp_path / "grey.zip", images[..., 0], None)
    data.prepare("grey", str(tmp_path / "grey.zip"), root=root)
    x, c, classes = data.load("grey", root)
    assert np.array_equal(x, images[..., :1]) and c is None and classes == 0


def test_broken_zip(root, tmp_path):
    images = random_images(5, 16, 16, 3)
    write_zip(tmp_path / "a.zip", images, [4, 0, 2])
    write_zip(tmp_path / "b.zip", [images[0], images[0, :8]], [0, 1])
    (tmp_path / "c.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-100])
    write_zip(tmp_path / "d.zip", images[:2], [0.5, 1])
    write_zip(tmp_path / "e.zip", images[:2], [0, 10 ** 9])
    for file, message in (("d.zip", "not whole numbers"), ("e.zip", "above 1,000,000"), ("a.zip", "no label for 2"), ("b.zip", "of one size"), ("c.zip", "or damaged")):
        with pytest.raises(UserError, match=message):
            data.prepare("x", str(tmp_path / file), root=root)
    assert nothing_left(root)


# MNIST's format and CIFAR-10


def test_idx(root, tmp_path):
    images, labels = random_images(11, 5, 5), np.array([3, 0, 1, 2, 9, 9, 4, 8, 5, 6, 7])
    write_idx(tmp_path / "source", images, labels)
    data.prepare("m", str(tmp_path / "source"), root=root)
    x, c, classes = data.load("m", root)
    assert isinstance(x, np.memmap) and np.array_equal(x, images[..., None])
    assert np.array_equal(c, labels) and c.dtype == np.int64 and classes == 10


def test_broken_idx(root, tmp_path):
    path = write_idx(tmp_path / "source", random_images(7, 5, 5), np.zeros(7))
    whole = path.read_bytes()
    for broken in (whole[:-20], whole[:50] + b"xx" + whole[52:], gzip.compress(gzip.decompress(whole)[:-1])):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is"):
            data.prepare("m", str(path), root=root)
    path.write_bytes(whole)
    write_idx(tmp_path / "other", random_images(6, 5, 5), np.zeros(6))
    (tmp_path / "other" / "train-labels-idx1-ubyte.gz").replace(tmp_path / "source" / "train-labels-idx1-ubyte.gz")
    with pytest.raises(UserError, match="7 images, but 6 labels"):
        data.prepare("m", str(path), root=root)
    assert nothing_left(root)


def test_cifar_files_and_archive(root, tmp_path):
    images, labels = random_images(11, 32, 32, 3), np.array([1, 0, 9, 3, 2, 4, 4, 8, 7, 6, 5], np.uint8)
    records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(11, -1)], axis=1)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes(records[:3].tobytes())
    (folder / "data_batch_2.bin").write_bytes(records[3:].tobytes())
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-bin")
    for name, source in (("folder", folder), ("archive", tmp_path / "cifar-10-binary.tar.gz")):
        data.prepare(name, str(source), root=root)
        x, c, classes = data.load(name, root)
        assert np.array_equal(x, images) and np.array_equal(c, labels) and classes == 10
        assert data.class_names(name, root)[3:5] == ["cat", "deer"]
    (folder / "data_batch_2.bin").write_bytes(records[3:].tobytes()[:-1])
    with pytest.raises(UserError, match="data_batch_2.bin is not a complete file"):
        data.prepare("cut", str(folder), root=root)
