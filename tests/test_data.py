"""Data sets: nothing of the user's is lost, what is prepared is whole, order and split."""
import os
import zipfile

import numpy as np
import pytest
import torch
from pictures import edm_folder, png, random_images, save, tree, write_idx
from PIL import Image
from scripts import outputs, start

import data
from configurator import UserError
from run import hold, release

rng = np.random.default_rng(0)


# nothing of the user's is lost


@pytest.mark.parametrize("source, name, message", [
    ("datasets/pets", "pets", "where the data set goes"),
    ("datasets/pets/", "pets", "where the data set goes"),
    ("datasets/pets/cat", "pets", "where the data set goes"),
    ("datasets", "pets", "where the data set goes"),
    (".", "new", "where the data set goes"),
    ("link", "pets", "where the data set goes"),
    ("link/cat", "pets", "where the data set goes"),
    ("datasets/../datasets/pets", "pets", "where the data set goes"),
    ("datasets/pets/all.zip", "pets", "where the data set goes"),
    ("datasets/half.partial", "half", "where the data set goes"),
    ("apart", "pets", "is not a data set that data.py prepared, or has other"),  # its class folders are links into the target
    ("apart", "pets.partial", "can't be a data set's name"),
    ("apart", "mixed", "is not a data set that data.py prepared, or has other"),
    ("apart", "a_file", "is not a data set that data.py prepared, or has other"),
    ("apart", "to_pets", "is not a data set that data.py prepared, or has other"),  # a link to it
    ("apart", "half", "is not a data set that data.py prepared, or has other"),
])
@pytest.mark.parametrize("overwrite", [False, True])
def test_images_are_never_removed(root, tmp_path, monkeypatch, source, name, message, overwrite):
    for folder in ("pets/cat", "pets.partial/cat", "half.partial"):
        save(root / folder / "1.png")
    with zipfile.ZipFile(root / "pets" / "all.zip", "w") as z:
        z.writestr("1.png", png(Image.new("L", (8, 8))))
    data.prepare("mixed", str(save(tmp_path / "one" / "1.png").parent), root=root)
    save(root / "mixed" / "mine.png")
    (root / "a_file").write_text("mine")
    (tmp_path / "link").symlink_to(root / "pets")
    (root / "to_pets").symlink_to(root / "pets")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "cat").symlink_to(root / "pets" / "cat")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        data.prepare(name, source, overwrite=overwrite, root=root)
    assert tree(tmp_path) == before and "\n" not in str(error.value) and "--overwrite" not in str(error.value)


def test_a_data_set_is_replaced_where_a_link_leads(root, tmp_path):
    """Its folder on a larger disk, its images from a link beside it."""
    (tmp_path / "disk").mkdir()
    root.mkdir()
    (root / "set").symlink_to(tmp_path / "disk" / "set")
    save(tmp_path / "images" / "1.png", 10)
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    data.prepare("set", str(tmp_path / "linked"), root=root)
    save(tmp_path / "images" / "1.png", 20)
    data.prepare("set", str(tmp_path / "linked"), overwrite=True, root=root)
    assert data.load("set", root)[0].mean() == 20 and (root / "set").is_symlink() and (tmp_path / "disk" / "set" / "images.npy").exists()


def test_an_empty_folder_may_wait_for_a_data_set(root, tmp_path):
    (tmp_path / "disk").mkdir()
    root.mkdir()
    (root / "set").symlink_to(tmp_path / "disk")
    save(tmp_path / "f" / "1.png")
    data.prepare("set", str(tmp_path / "f"), root=root)
    assert len(data.load("set", root)[0]) == 1


# names


def test_one_rule_for_names(tmp_path, monkeypatch):
    """What is both a prepared data set and a folder here is the data set, for codes and for metrics."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "fashion-mnist-10k" / "1.png", size=(28, 28))
    assert len(data.open_images("fashion-mnist-10k")[0]) == len(data.read_images("fashion-mnist-10k", (1, 28, 28))[0]) == 10_000


def test_names_and_existing_sets(root, tmp_path):
    write_idx(tmp_path / "source", random_images(3, 5, 5), np.zeros(3))
    for workers in (0, 1001):  # each is a process: so many more would take the machine down
        with pytest.raises(UserError, match=f"workers must be in 1 ... 1000, not {workers}"):
            data.prepare("m", str(tmp_path / "source"), workers=workers, root=root)
    for name in ("", "..", "a/b", "embedded", "fashion-mnist-10k"):
        with pytest.raises(UserError, match="can't be a data set's name"):
            data.prepare(name, str(tmp_path / "source"), root=root)
    data.prepare("m", str(tmp_path / "source"), root=root)
    with pytest.raises(UserError, match="--overwrite=True"):
        data.prepare("m", str(tmp_path / "source"), root=root)
    write_idx(tmp_path / "source", random_images(4, 5, 5), np.zeros(4))
    data.prepare("m", str(tmp_path / "source"), overwrite=True, root=root)
    assert len(data.load("m", root)[0]) == 4
    with pytest.raises(UserError, match="there are: fashion-mnist-10k, m"):
        data.load("n", root)


def test_two_preparations_of_one_name(root, tmp_path):
    """The second ends with a line, and leaves alone what the first has written so far; afterwards the name is free."""
    write_idx(tmp_path / "source", random_images(3, 5, 5), np.zeros(3))
    (root / "m.partial").mkdir(parents=True)
    (root / "m.partial" / "images.npy").write_bytes(b"half")
    hold(root / "m")
    with pytest.raises(UserError, match="another run is writing .*m: wait until it has ended"):
        data.prepare("m", str(tmp_path / "source"), root=root)
    assert (root / "m.partial" / "images.npy").read_bytes() == b"half"
    release(root / "m")
    data.prepare("m", str(tmp_path / "source"), root=root)
    assert [p.name for p in root.iterdir()] == ["m"]


def test_how_a_set_was_made_is_said(root, tmp_path):
    save(tmp_path / "f" / "1.png")
    data.prepare("a", str(tmp_path / "f"), resolution=4, transform="center-crop-dhariwal", root=root)
    assert data.made_of("a", root)["transform"] == "center-crop-dhariwal" and data.made_of("nothing", root) is None
    with pytest.raises(UserError, match="--transform is center-crop or center-crop-dhariwal, not box"):
        data.prepare("b", str(tmp_path / "f"), transform="box", root=root)
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8), mu=0, sigma=0, mu_s=0, sigma_s=0)
    assert data.made_of(str(tmp_path / "adm.npz")) == dict(transform="center-crop-dhariwal")


# downloads


def test_without_a_network_the_error_says_what_to_fetch(root, monkeypatch):
    address, files = data.PUBLIC["cifar10"]
    monkeypatch.setitem(data.PUBLIC, "cifar10", ("http://127.0.0.1:9/", files))  # nobody listens there
    with pytest.raises(UserError) as error:
        data.prepare("cifar10", "", root=root)
    assert "http://127.0.0.1:9/cifar-10-binary.tar.gz" in str(error.value)
    assert str(root / "downloads" / "cifar10") in str(error.value) and "\n" not in str(error.value)
    folder = root / "downloads" / "cifar10"
    (folder / "cifar-10-binary.tar.gz").write_bytes(b"something else")
    with pytest.raises(UserError, match="its MD5 is"):
        data.prepare("cifar10", "", root=root)


def test_a_downloads_folder_that_can_not_be_written(root):
    root.write_text("a file")
    with pytest.raises(UserError, match="can't write .*downloads/mnist: Not a directory"):
        data.download("mnist", root)


# what is prepared


def test_embedded_set():
    images, labels, classes = data.load("fashion-mnist-10k")
    assert images.shape == (10_000, 28, 28, 1) and images.dtype == np.uint8 and classes == 10
    assert labels.dtype == np.int64 and (np.bincount(labels) == 1000).all()
    assert round(images.mean(), 2) == 73.15  # as published for the test split: 0.2868 of 255


def test_a_damaged_set_is_told(root, tmp_path):
    write_idx(tmp_path / "source", random_images(30, 9, 9), np.zeros(30))
    data.prepare("m", str(tmp_path / "source"), root=root)
    whole = (root / "m" / "images.npy").read_bytes()
    for size in (0, 20, len(whole) - 1):
        (root / "m" / "images.npy").write_bytes(whole[:size])
        with pytest.raises(UserError, match="m is damaged"):
            data.load("m", root)


def test_a_set_whose_files_do_not_fit_each_other_is_told(root, tmp_path):
    folder = root / "m"
    odd = {"classes.json": [b"5", b'{"a": 1}', b'"ab"', b'["a"]', b"\xff"],
           "labels.npy": [np.zeros(30), np.full(30, -1), np.zeros(0, np.int64), np.zeros((30, 1), np.int64)],
           "images.npy": [np.zeros((30, 9, 9), np.uint8), np.zeros((30, 9, 9, 1))]}
    for name, content in ((name, content) for name, contents in odd.items() for content in contents):
        write_idx(tmp_path / "source", random_images(30, 9, 9), np.arange(30) % 2)
        data.prepare("m", str(tmp_path / "source"), root=root, overwrite=True)
        (folder / "made.json").write_text("[]")
        assert data.load("m", root)[2] == 2 and data.made_of("m", root) is None
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            np.save(folder / name, content)
        with pytest.raises(UserError, match="m is damaged .*: prepare it anew with --overwrite=True"):
            data.load("m", root)


def test_interrupted_preparation_leaves_nothing_that_looks_finished(root, tmp_path):
    """Killed for real while it writes."""
    (tmp_path / "slow").mkdir()
    os.mkfifo(tmp_path / "slow" / "b.png")  # opening it waits for a writer that never comes
    Image.new("RGB", (8, 8)).save(tmp_path / "slow" / "a.png")
    (tmp_path / "prepare.py").write_text(
        "import os, pathlib, sys; os.setsid(); sys.path.insert(0, '.'); import data; "
        f"data.prepare('s', {str(tmp_path / 'slow')!r}, 8, root=pathlib.Path({str(root)!r}))")
    process = start(tmp_path / "prepare.py")
    try:
        while not (root / "s.partial" / "images.npy").exists():
            assert process.poll() is None
    finally:
        os.killpg(process.pid, 9)
    process.wait()
    with pytest.raises(UserError, match="there is no data set 's'"):
        data.load("s", root)
    (tmp_path / "slow" / "b.png").unlink()
    data.prepare("s", str(tmp_path / "slow"), 8, root=root)
    assert len(data.load("s", root)[0]) == 1 and not (root / "s.partial").exists()


def test_a_large_set_takes_no_private_memory(tmp_path):
    """1.28 million images of 64 x 64 x 3, in a sparse file: what `load` and batches add to the process, other
    than pages of the file, which the system can drop at any time."""
    folder = tmp_path / "datasets" / "large"
    folder.mkdir(parents=True)
    n = 1_281_167
    with open(folder / "images.npy", "wb") as f:
        data.write_npy_header(f, np.uint8, (n, 64, 64, 3))
        f.truncate(f.tell() + n * 64 * 64 * 3)
    np.save(folder / "labels.npy", np.zeros(n, np.int64))
    (folder / "classes.json").write_text("[\"0\"]")
    program = f"""
import pathlib, re, sys
sys.path.insert(0, ".")
import data
def private():
    return int(re.search(r'RssAnon:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024
before = private()
images, labels, _ = data.load('large', pathlib.Path({str(tmp_path / 'datasets')!r}))
train, held_out = data.split(len(images), 5000)
shuffle = data.Shuffle(train, 0)
for i in range(8):
    batch = images[shuffle.take(128 * i, 128)]
print(private() - before)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc")
    (tmp_path / "measure.py").write_text(program)
    (megabytes, _), = outputs([start(tmp_path / "measure.py")])
    assert float(megabytes) < 200


def test_pictures_are_read_in_slices(tmp_path):
    for i in range(5):
        save(tmp_path / "f" / "sub" / f"{i}.png", i)
    images, labels = data.open_images(str(tmp_path / "f"))
    assert len(images) == 5 and images.shape == (5, 8, 8, 3) and labels is None
    assert images[1:3][:, 0, 0, 0].tolist() == [1, 2] and images[7:9].shape == (0, 8, 8, 3)
    save(tmp_path / "f" / "sub" / "9.png", 9, (8, 7))
    (tmp_path / "f" / "sub" / "a.png").write_bytes(b"x")
    images = data.open_images(str(tmp_path / "f"))[0]
    with pytest.raises(UserError, match="9.png is .7, 8, 3., .*0.png is .8, 8, 3. .*must be of one size"):
        images[3:6]
    with pytest.raises(UserError, match="a.png can't be read"):
        images[6:7]
    images, labels = data.open_images(str(edm_folder(tmp_path / "edm", [1, 0, 0, 1])))
    assert labels.tolist() == [1, 0, 0, 1] and labels.dtype == np.int64


# order and conversions


def test_shuffle_visits_each_image_once_an_epoch_from_any_start():
    indices = np.arange(100, 110)
    shuffle = data.Shuffle(indices, seed=3)
    whole = shuffle.take(0, 40)
    for epoch in whole.reshape(4, 10):
        assert sorted(epoch) == list(indices)
    assert len({tuple(e) for e in whole.reshape(4, 10)}) == 4
    assert np.array_equal(np.concatenate([data.Shuffle(indices, 3).take(s, 7) for s in range(0, 35, 7)]), whole[:35])
    assert not np.array_equal(data.Shuffle(indices, 4).take(0, 10), whole[:10])


def test_split():
    train, held_out = data.split(1000, 100)
    assert len(held_out) == 100 and sorted([*train, *held_out]) == list(range(1000))
    assert np.array_equal(data.split(1000, 100)[1], held_out) and held_out.max() > 900 > 100 > held_out.min()


def test_split_and_order_are_those_of_older_checkpoints():
    """What was held out yesterday is held out today, and a run goes on with the images that come next."""
    train, held_out = data.split(10_000, 500)
    assert held_out[:5].tolist() == [3577, 8925, 1634, 485, 4753] and train[:3].tolist() == [5787, 1924, 5195]
    assert data.Shuffle(np.arange(10), 3).take(10, 10).tolist() == [4, 1, 2, 8, 5, 0, 7, 9, 6, 3]


def test_float_and_back():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x = data.to_float(images)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert np.array_equal(data.to_uint8(x), images)
    assert np.array_equal(data.to_uint8(torch.tensor([-9.0, 9.0]).reshape(2, 1, 1, 1)).ravel(), [0, 255])
