import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import outputs, start
from PIL import Image

import checkpoint
import data
import npz
import sources
from configurator import UserError
from plot import save_grid
from run import hold, release


@pytest.fixture
def root(tmp_path):
    return tmp_path / "datasets"


def write_idx(folder, images, labels, prefix="train"):
    folder.mkdir(exist_ok=True)
    path = folder / f"{prefix}-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()))
    return path


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def nothing_left(root):
    return not root.exists() or list(root.iterdir()) == []


# sources


def test_embedded_set():
    images, labels, classes = data.load("fashion-mnist-10k")
    assert images.shape == (10_000, 28, 28, 1) and images.dtype == np.uint8 and classes == 10
    assert labels.dtype == np.int64 and (np.bincount(labels) == 1000).all()
    assert round(images.mean(), 2) == 73.15  # as published for the test split: 0.2868 of 255


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


def test_folder_of_images_in_every_mode(root, tmp_path):
    """One red (or grey) picture a mode, with borders that the centre crop removes."""
    source = tmp_path / "train"
    for name in ("b_dogs", "a_cats"):
        (source / name).mkdir(parents=True)
    rgb = np.zeros((40, 80, 3), np.uint8)
    rgb[:, 20:60] = (200, 40, 40)
    rgb[:, :20] = rgb[:, 60:] = (0, 0, 255)
    picture = Image.fromarray(rgb)
    picture.save(source / "a_cats" / "1rgb.png")
    picture.convert("P", palette=Image.ADAPTIVE).save(source / "a_cats" / "2palette.png")
    picture.convert("CMYK").save(source / "a_cats" / "3cmyk.jpg", quality=100, subsampling=0)
    Image.merge("RGBA", [*picture.split(), Image.new("L", (80, 40), 0)]).save(source / "b_dogs" / "4clear.png")
    Image.new("L", (33, 50), 77).save(source / "b_dogs" / "5grey.JPEG", quality=100)
    Image.fromarray(np.full((30, 30), 77 * 256 + 5, np.uint16)).save(source / "b_dogs" / "6deep.png")
    (source / "b_dogs" / "notes.txt").write_text("not an image")
    Image.new("RGB", (9, 9)).save(source / "stray.png")
    with pytest.raises(UserError, match="1 images beside its class folders"):
        data.prepare("pets", str(source), resolution=8, root=root)
    (source / "stray.png").unlink()
    (source / "c_empty").mkdir()
    with pytest.raises(UserError, match=r"no images of 1 of its 3 classes \(c_empty\)"):
        data.prepare("pets", str(source), resolution=8, root=root)
    (source / "c_empty").rmdir()
    data.prepare("pets", str(source), resolution=8, workers=2, root=root)
    x, c, classes = data.load("pets", root)
    assert x.shape == (6, 8, 8, 3) and classes == 2 and c.tolist() == [0, 0, 0, 1, 1, 1]
    wanted = [(200, 40, 40)] * 3 + [(255, 255, 255)] + [(77, 77, 77)] * 2
    for image, colour in zip(x, wanted):
        assert np.abs(image.astype(int) - colour).max() <= 6
    assert json.loads((root / "pets" / "classes.json").read_text()) == ["a_cats", "b_dogs"] == data.class_names("pets", root)


def test_unreadable_images_are_skipped_up_to_a_share(root, tmp_path, capfd):
    (tmp_path / "flat").mkdir()
    for i in range(200):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "flat" / f"{i:03d}.png")
    whole = (tmp_path / "flat" / "007.png").read_bytes()
    (tmp_path / "flat" / "007.png").write_bytes(whole[:40])
    (tmp_path / "flat" / "150.png").write_bytes(b"")
    data.prepare("flat", str(tmp_path / "flat"), resolution=8, root=root)
    printed = capfd.readouterr()
    assert "007.png" in printed.err and "150.png" in printed.err and "2 could not be read" in printed.out
    x, c, classes = data.load("flat", root)
    assert x[:, 0, 0, 0].tolist() == [i for i in range(200) if i not in (7, 150)]
    assert c is None and classes == 0  # no subfolders: no labels
    (tmp_path / "flat" / "099.png").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match="3 of 200 images can't be read, more than 1%"):
        data.prepare("flat2", str(tmp_path / "flat"), resolution=8, root=root)
    assert [p.name for p in root.iterdir()] == ["flat"]


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


def png_that_claims(width, height):
    """A PNG of a few bytes whose header has other dimensions."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "png")
    raw = bytearray(buffer.getvalue())
    raw[16:24] = struct.pack(">II", width, height)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    return bytes(raw)


def test_hostile_sources(root, tmp_path, monkeypatch, capsys):
    """What leads out of the folder leads nowhere; what unpacks to more than memory should take is not unpacked."""
    images = random_images(3, 8, 8, 3)
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as z:
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            z.writestr(f"../../{i}.png", buffer.getvalue())
    before = {p for p in tmp_path.parent.rglob("*") if p.is_file()}
    data.prepare("out", str(tmp_path / "out.zip"), root=root)
    assert np.array_equal(data.load("out", root)[0], images)
    assert {p.parent for p in {p for p in tmp_path.parent.rglob("*") if p.is_file()} - before} == {root / "out"}

    with zipfile.ZipFile(tmp_path / "dims.zip", "w") as z:
        z.writestr("a.png", png_that_claims(60_000, 60_000))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(png_that_claims(60_000, 60_000))
    for source in ("dims.zip", "folder"):
        with pytest.raises(UserError, match="1 of 1 images can't be read"):
            data.prepare("dims", str(tmp_path / source), root=root)
        assert "exceeds limit" in capsys.readouterr().err

    for module in (npz, sources):
        monkeypatch.setattr(module, "LARGEST", 10 ** 6)
    bomb = bytes(10 ** 7)
    for name, message in (("a.png", "1 of 1 images can't be read"), ("dataset.json", "dataset.json unpacks to 10,000,000 bytes")):
        with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr(name, bomb)
        with pytest.raises(UserError, match=message):
            data.prepare("bomb", str(tmp_path / "bomb.zip"), root=root)
    assert "a.png unpacks to 10,000,000 bytes" in capsys.readouterr().err
    for file in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / file).write_bytes(gzip.compress(bomb))
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz unpacks to more than 1,000,000 bytes"):
        data.prepare("bomb", str(tmp_path / "train-images-idx3-ubyte.gz"), root=root)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("../data_batch_1.bin")
        info.size = len(bomb)
        tar.addfile(info, io.BytesIO(bomb))
    with pytest.raises(UserError, match="unpacks to more than 1,000,000 bytes"):
        data.prepare("bomb", str(tmp_path / "cifar-10-binary.tar.gz"), root=root)
    np.savez_compressed(tmp_path / "bomb.npz", images=images, labels=np.zeros(10 ** 7, np.int64))
    with pytest.raises(UserError, match="labels.npy unpacks to 80,000,128 bytes"):
        data.open_images(str(tmp_path / "bomb.npz"))


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


def test_a_downloads_folder_that_can_not_be_written(root):
    root.write_text("a file")
    with pytest.raises(UserError, match="can't write .*downloads/mnist: Not a directory"):
        data.download("mnist", root)


def test_a_log_with_foreign_lines_is_cut_there(tmp_path):
    for foreign in (b"5", b"{}", b"null", b'{"images": "a"}', b"\xff\0"):
        (tmp_path / "log").write_bytes(b'{"images": 8}\n' + foreign + b'\n{"images": 16}\n')
        assert checkpoint.read_log(tmp_path / "log", 100) == ['{"images": 8}']


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


# order, conversions, grids


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


def test_grid(tmp_path):
    images = random_images(5, 70, 70, 3)
    save_grid(images, tmp_path / "g.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (2 * 72, 3 * 72, 3)
    assert np.array_equal(grid[72 + 1:72 + 71, 72 + 1:72 + 71], images[4]) and (grid[73:, 145:] == 255).all()


def test_titles_of_rows(tmp_path):
    """Left of the pictures, which stay as they are; whatever folders are called."""
    images = random_images(6, 70, 70, 1)
    save_grid(images, tmp_path / "plain.png", columns=2)
    save_grid(images, tmp_path / "titled.png", 2, ["a\nb", "\udce9\u732b", "name " * 100])
    plain, titled = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "titled.png"))
    margin = titled.shape[1] - plain.shape[1]
    assert 20 < margin < 250 and np.array_equal(titled[:, margin:], plain)
    assert all((titled[72 * row:72 * row + 72, :margin] < 128).any() for row in range(3))


# checkpoints


def test_a_checkpoint_is_read_back_and_damage_is_told(tmp_path):
    path = tmp_path / "stage1.pt"
    state = dict(made_by="train_stage1", config=dict(lr=0.1, mult=(1, 2)), model={"w": torch.randn(1000)}, ema={},
                 model_args={}, step=3, optimizer={})
    checkpoint.save_checkpoint(path, state)
    back = checkpoint.load_checkpoint(path, "train_stage1")
    assert torch.equal(back["model"]["w"], state["model"]["w"]) and back["config"] == state["config"]
    with pytest.raises(UserError, match="not a checkpoint of train_prior.py"):
        checkpoint.load_checkpoint(path, "train_prior")
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated or damaged"):
            checkpoint.load_checkpoint(path, "train_stage1")
    with pytest.raises(UserError, match=r"run `python train_stage1.py --out_dir=.*` first"):
        checkpoint.load_checkpoint(tmp_path / "no" / "stage1.pt", "train_stage1")


def test_a_checkpoint_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    with open(tmp_path / "stage1.pt", "wb") as f:
        torch.save({"made_by": "train_stage1", "x": Hostile()}, f)
    with open(tmp_path / "plain.pt", "wb") as f:
        pickle.dump(Hostile(), f)
    for file in ("stage1.pt", "plain.pt"):
        with pytest.raises(UserError):
            checkpoint.load_checkpoint(tmp_path / file, "train_stage1")
    assert not (tmp_path / "executed").exists()


def test_damage_is_detected_and_the_checkpoint_before_is_taken(tmp_path, capsys):
    """Truncated anywhere, or with bits flipped: what is read is what was written, or the one before."""
    path, rng = tmp_path / "stage1.pt", np.random.default_rng(0)
    for step in (1, 2):
        checkpoint.save_checkpoint(path, dict(made_by="train_stage1", config={}, model_args={}, step=step, ema={"w": torch.arange(3000) + step}))
    whole, taken = path.read_bytes(), []
    for i in range(300):
        broken = bytearray(whole)
        if i % 10:
            for at in rng.integers(0, len(whole), rng.integers(1, 4)):
                broken[at] ^= 1 << rng.integers(8)
        else:
            broken = broken[:rng.integers(len(whole))]
        path.write_bytes(broken)
        state, said = checkpoint.load_checkpoint(path, "train_stage1"), capsys.readouterr().err
        assert torch.equal(state["ema"]["w"], torch.arange(3000) + state["step"])
        if state["step"] == 1:
            assert said == f"{path} is truncated or damaged: using the previous one, {tmp_path / 'stage1.previous.pt'}\n"
        taken.append(state["step"])
    assert taken.count(1) > 200  # the rest: zip's padding and names that nothing reads
    path.write_bytes(whole[:100])
    checkpoint.save_checkpoint(path, dict(made_by="train_stage1", config={}, model_args={}, step=3, ema={}))
    assert torch.load(tmp_path / "stage1.previous.pt")["step"] == 1  # the damaged one did not replace it
    path.write_bytes(whole[:100])
    (tmp_path / "stage1.previous.pt").write_bytes(whole[:100])
    with pytest.raises(UserError, match="is truncated or damaged: put a good copy in its place"):
        checkpoint.load_checkpoint(path, "train_stage1")


def test_a_checkpoint_is_not_unpacked(tmp_path):
    """A zip of a few kilobytes that would become a gigabyte, and one with names that lead out of the folder."""
    checkpoint.save_checkpoint(tmp_path / "good.pt", dict(made_by="train_stage1", config={}, model_args={}, step=0, ema={}))
    for name, options in (("bomb", dict(compression=zipfile.ZIP_DEFLATED)), ("../out", {})):
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "stage1.pt", "w", **options) as archive:
            for entry in good.infolist():
                archive.writestr(entry.filename if name == "bomb" else f"../{entry.filename}", good.read(entry))
            archive.writestr(f"{name}/data/0", bytes(10 ** 7))
        with pytest.raises(UserError, match="truncated or damaged"):
            checkpoint.load_checkpoint(tmp_path / "stage1.pt", "train_stage1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.pt", "stage1.pt"] and not (tmp_path.parent / "out").exists()


def test_a_log_goes_on_after_the_checkpoint(tmp_path):
    """Lines up to its images, those of the same step too; what is later, or cut off, is written again."""
    lines = [f'{{"images": {images}}}' for images in (8, 16, 24, 32)]
    (tmp_path / "log").write_text("\n".join([*lines, '{"ima']))
    assert checkpoint.read_log(tmp_path / "log", 24) == lines[:3] and checkpoint.read_log(tmp_path / "log", 99) == lines
    assert checkpoint.read_log(tmp_path / "none", 24) == []


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """The process may write files of 100 kB at most, as on a disk with so much room."""
    folder, program = tmp_path / "run", tmp_path / "fill.py"
    folder.mkdir()
    program.write_text(f"""
import resource, signal, sys, torch
sys.path.insert(0, ".")
import checkpoint
checkpoint.save_checkpoint({str(folder / 'c.pt')!r}, dict(made_by='x', w=torch.ones(10)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save_checkpoint({str(folder / 'c.pt')!r}, dict(made_by='x', w=torch.ones(1_000_000)))
except checkpoint.UserError as error:
    print(error)
""")
    printed, errors = start(program).communicate()
    assert "File too large" in printed and "untouched" in printed, errors
    assert torch.load(folder / "c.pt")["w"].sum() == 10
    assert [p.name for p in folder.iterdir()] == ["c.pt"]
