"""Images as strangers have them: every mode, folders and archives of every shape, and what must not be lost."""
import io
import itertools
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data
import sources
from configurator import UserError
from sources import center_crop, decode, list_folder

rng = np.random.default_rng(0)


def save(path, value=77, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)
    return path


def png(image, **settings):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "png", **settings)
    return buffer.getvalue()


def tree(folder):
    """All that there is below a folder: names and contents."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "datasets"


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


# EDM's folders and archives


def edm_folder(folder, labels, size=9):
    for i in range(4):
        save(folder / f"{i // 2:05d}" / f"img{i:08d}.png", i, (size, size))
    found = labels and [[f"{i // 2:05d}/img{i:08d}.png", c] for i, c in enumerate(labels)]
    (folder / "dataset.json").write_text(json.dumps({"labels": found}))
    return folder


def zipped(folder, path, around=""):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in tree(folder).items():
            z.writestr(around + name, content)
    return path


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


# folders


def test_what_is_no_data_and_where_links_lead(root, tmp_path, capsys):
    source = tmp_path / "photos"
    for name in ("cat/1.png", "cat/deep/2.jpeg", ".hidden/3.png", "__MACOSX/cat/1.png", "cat/._1.png", "cat/.4.png", "@eaDir/5.png",
                 ".6.png", "cat/.ipynb_checkpoints/7.png"):
        save(source / name, 10)
    (source / "cat" / ".DS_Store").write_bytes(b"x")
    (source / "cat" / "notes.txt").write_text("x")
    save(tmp_path / "elsewhere" / "dogs" / "8.png", 20)
    (source / "dog").symlink_to(tmp_path / "elsewhere" / "dogs")
    (source / "cat" / "9.png").symlink_to(tmp_path / "elsewhere" / "dogs" / "8.png")
    data.prepare("set", str(source), root=root)
    images, labels, _ = data.load("set", root)
    assert data.class_names("set", root) == ["cat", "dog"] and labels.tolist() == [0, 0, 0, 1]
    assert images[:, 0, 0, 0].tolist() == [10, 20, 10, 20] and "skipped files without the extension of a readable image (1 with .txt)" in capsys.readouterr().err


@pytest.mark.parametrize("link, to, message", [
    ("dog", "nowhere", "dog is a link to nothing"), ("cat/loop", "cat", "loop is a link to a folder that it lies in"),
    ("cat/up", ".", "up is a link to a folder that it lies in"), ("dog", "dog", "dog is a link to nothing")])
def test_links_that_lead_nowhere(root, tmp_path, link, to, message):
    source = tmp_path / "photos"
    save(source / "cat" / "1.png")
    (source / link).symlink_to(source / to)
    with pytest.raises(UserError, match=message):
        data.prepare("set", str(source), root=root)


def test_links_in_a_circle(tmp_path):
    """a holds a link to b, and b one to a."""
    for one, other in ("ab", "ba"):
        save(tmp_path / one / "1.png")
        (tmp_path / one / "to").symlink_to(tmp_path / other)
    with pytest.raises(UserError, match="is a link to a folder that it lies in"):
        list_folder(tmp_path / "a")


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "setuid"), reason="permissions are POSIX's")
def test_folders_without_permission_are_told(tmp_path):
    source = tmp_path / "photos"
    save(source / "cat" / "1.png")
    save(source / "dog" / "1.png")
    (source / "dog").chmod(0)
    tmp_path.chmod(0o777)
    program = ("import os, sys; sys.path.insert(0, sys.argv[1])\nimport sources\nif os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
               "try: sources.list_folder(sys.argv[2])\nexcept sources.UserError as error: print(error)")
    parents = [p for p in tmp_path.parents if p.stat().st_mode & 0o005 != 0o005 and p.owner() == "root"]
    modes = {p: p.stat().st_mode for p in parents}
    try:
        for p in parents:
            p.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", program, str(ROOT), str(source)], capture_output=True, text=True)
    finally:
        (source / "dog").chmod(0o755)
        for p, mode in modes.items():
            p.chmod(mode)
    assert done.stdout == f"can't read {source / 'dog'}: Permission denied\n", done


def test_classes_without_images(root, tmp_path):
    """An empty folder, one of other files, one whose only image can't be read."""
    source = tmp_path / "photos"
    for i in range(120):
        save(source / "cat" / f"{i}.png")
    (source / "dog").mkdir()
    for harm in (lambda: None, lambda: (source / "dog" / "notes.txt").write_text("x"), lambda: (source / "dog" / "1.png").write_bytes(b"x")):
        harm()
        with pytest.raises(UserError, match=r"no images of 1 of its 2 classes \(dog\)"):
            data.prepare("set", str(source), workers=1, root=root)
        assert not (root / "set").exists() and not (root / "set.partial").exists()


def test_a_zip_is_read_as_a_folder_is(root, tmp_path):
    """Classes in it, perhaps in one folder around all of them; names of another system; what MacOS adds."""
    images = [png(rng.integers(0, 256, (12, 10, 3), np.uint8)) for _ in range(3)]
    for i, names in enumerate((["cat/a.png", "dog/a.png", "dog/b.png"], ["pets/cat/a.png", "pets/dog/a.png", "pets/dog/b.png"],
                               ["cat\\a.png", "dog\\a.png", "dog\\b.png"])):
        with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
            for name, image in zip(names, images):
                z.writestr(name, image)
            z.writestr("__MACOSX/cat/._a.png", b"x")
            z.writestr("pets/.DS_Store" if i == 1 else ".DS_Store", b"x")
        data.prepare(f"set{i}", str(tmp_path / "z.zip"), resolution=8, workers=1, root=root)
        assert data.class_names(f"set{i}", root) == ["cat", "dog"] and data.load(f"set{i}", root)[1].tolist() == [0, 1, 1]
        assert np.array_equal(data.load(f"set{i}", root)[0], [decode(image, 8) for image in images])
    with zipfile.ZipFile(tmp_path / "z.zip", "a") as z:
        z.writestr("bird/", b"")
    with pytest.raises(UserError, match=r"1 of its 3 classes \(bird\)"):
        data.prepare("bird", str(tmp_path / "z.zip"), root=root)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_two_files_of_one_name(root, tmp_path):
    """Names are stripped of what leads out of the archive: none of two that become one is lost without a word."""
    for twin in ("a/x.png", "/a/x.png", "../a/x.png"):
        with zipfile.ZipFile(tmp_path / "twins.zip", "w") as archive:
            for name in ("a/x.png", "b/y.png", twin):
                archive.writestr(name, b"")
        with pytest.raises(UserError, match=r"twins.zip has two files named a/x.png"):
            data.prepare("twins", str(tmp_path / "twins.zip"), root=root)


def test_archives_that_python_can_not_unpack(root, tmp_path):
    """Deflate64 (method 9), a password, another method; at the front of the archive or in its images."""
    for name in ("dataset.json", "a.png"):
        for offset, value, message in ((8, 1, "has a password"), (10, 9, "method 9"), (10, 93, "method 93")):
            with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
                z.writestr("b.png", png(Image.new("RGB", (4, 4))))
                z.writestr(name, b"{\"labels\": null}")
            raw = bytearray((tmp_path / "z.zip").read_bytes())
            raw[raw.rindex(b"PK\x01\x02") + offset] = value
            (tmp_path / "z.zip").write_bytes(raw)
            with pytest.raises(UserError, match=message):
                data.prepare("set", str(tmp_path / "z.zip"), root=root)
    (tmp_path / "z.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match="is not a .zip, or damaged"):
        data.prepare("set", str(tmp_path / "z.zip"), root=root)


def test_a_folder_around_the_classes_is_none(root, tmp_path):
    """As in an archive; and what was passed over is said before the error that follows from it."""
    for name in ("pets/cat/1.png", "pets/dog/1.png"):
        save(tmp_path / "nest" / name)
    data.prepare("set", str(tmp_path / "nest"), root=root)
    assert data.class_names("set", root) == ["cat", "dog"]
    data.prepare("one", str(tmp_path / "nest" / "pets" / "cat"), root=root)
    assert data.load("one", root)[1] is None


def test_photographs_that_are_not_read_are_said(root, tmp_path, capsys):
    for name in ("cat/1.png", "dog/1.heic"):
        save(tmp_path / "f" / "x.png").rename(Path(tmp_path / "f" / name).parent.mkdir(exist_ok=True) or tmp_path / "f" / name)
    with pytest.raises(UserError, match=r"no images of 1 of its 2 classes \(dog\)"):
        data.prepare("set", str(tmp_path / "f"), root=root)
    assert "(1 with .heic)" in capsys.readouterr().err


def test_an_empty_folder_may_wait_for_a_data_set(root, tmp_path):
    (tmp_path / "disk").mkdir()
    root.mkdir()
    (root / "set").symlink_to(tmp_path / "disk")
    save(tmp_path / "f" / "1.png")
    data.prepare("set", str(tmp_path / "f"), root=root)
    assert len(data.load("set", root)[0]) == 1


def test_a_transform_that_would_be_ignored(root, tmp_path):
    source = zipped(edm_folder(tmp_path / "edm", None), tmp_path / "edm.zip")
    for case in (source, tmp_path / "edm"):
        with pytest.raises(UserError, match="keep their size: --transform=center-crop-dhariwal needs a --resolution="):
            data.prepare("set", str(case), transform="center-crop-dhariwal", root=root)


def test_one_rule_for_names(tmp_path, monkeypatch):
    """What is both a prepared data set and a folder here is the data set, for codes and for metrics."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "fashion-mnist-10k" / "1.png", size=(28, 28))
    assert len(data.open_images("fashion-mnist-10k")[0]) == len(data.read_images("fashion-mnist-10k", (1, 28, 28))[0]) == 10_000


# pixels


def test_every_mode_is_right_or_refused(tmp_path):
    """A grey of 100 (of 255), or a colour, in each of Pillow's modes, from a path and from an archive's bytes."""
    grey, colour = np.full((6, 6), 100, np.uint8), np.tile(np.array([200, 40, 90], np.uint8), (6, 6, 1))
    red = Image.fromarray(colour)
    clear = Image.new("L", (6, 6), 0)
    deep = np.full((6, 6), 100 * 257, np.uint16)
    deep_clear = deep.copy()
    deep_clear[:, :3] = 5
    cases = {
        "1": (Image.fromarray(grey > 50), 255), "L": (Image.fromarray(grey), 100), "P": (red.convert("P", palette=Image.ADAPTIVE), colour),
        "RGB": (red, colour), "CMYK": (red.convert("CMYK"), colour), "YCbCr": (red.convert("YCbCr"), colour),
        "HSV": (red.convert("HSV"), colour), "LAB": (None, None), "RGBA": (Image.merge("RGBA", [*red.split(), clear]), 255),
        "LA": (Image.merge("LA", [Image.fromarray(grey), clear]), 255), "I;16": (Image.fromarray(deep), 100),
        "I;16B": (Image.fromarray(deep.astype(">u2")), 100), "I": (Image.fromarray(grey.astype(np.int32)), 100),
        "I beyond": (Image.fromarray(grey.astype(np.int32) * 1000), "ValueError"), "I below": (Image.fromarray(grey.astype(np.int32) - 200), "ValueError"),
        "I full": (Image.fromarray(np.array([[0, 2 ** 31 - 1]], np.int32)), "ValueError"),
        "F": (Image.fromarray(grey.astype(np.float32) / 255), 100), "F of 255": (Image.fromarray(grey.astype(np.float32)), 100),
        "F beyond": (Image.fromarray(grey.astype(np.float32) * 5), "ValueError"), "F below": (Image.fromarray(-grey.astype(np.float32)), "ValueError"),
        "F a little beyond": (Image.fromarray(grey.astype(np.float32) / 90), "ValueError"), "F none": (Image.fromarray(np.full((6, 6), np.nan, np.float32)), "ValueError"),
        "F infinite": (Image.fromarray(np.full((6, 6), np.inf, np.float32)), "ValueError")}
    formats = {"CMYK": "tiff", "YCbCr": "tiff", "HSV": None, "LAB": None, "I": "tiff", "F": "tiff", "I;16B": "tiff"}
    for name, (image, want) in cases.items():
        kind = formats.get(name.split()[0], "png")
        if image is None:
            continue
        if kind is None:  # no file has it
            got = np.asarray(sources.to_8_bits(image).convert("RGB"))
            assert np.abs(got.astype(int) - want).max() <= 4, name
            continue
        image.save(tmp_path / "x", kind)
        for file in (tmp_path / "x", (tmp_path / "x").read_bytes()):
            got = decode(file)
            if isinstance(want, str):
                assert isinstance(got, str) and got.startswith(want) and "\n" not in got, name
            else:
                assert got.shape == (6, 6, 3) and np.abs(got.astype(int) - want).max() <= 4, name
        if not isinstance(want, (str, np.ndarray)):
            assert decode(tmp_path / "x", channels=0).shape == ((6, 6, 1) if name != "RGBA" else (6, 6, 3)), name


def test_what_is_transparent_is_white():
    """By an alpha channel, a palette entry, a colour of 8 or 16 bits."""
    grey = np.full((4, 4), 100, np.uint8)
    grey[:, 2:] = 7
    want = np.where(grey == 7, 255, 100)
    palette = Image.fromarray(grey).convert("P")
    for image, how in ((Image.fromarray(grey), 7), (palette, palette.getpixel((3, 0))), (Image.fromarray(grey).convert("RGB"), (7, 7, 7))):
        got = decode(png(image, transparency=how))
        assert np.array_equal(got[..., 0], want), image.mode
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(decode(png(deep, transparency=7 * 257))[..., 0], want)
    half = Image.merge("LA", [Image.fromarray(grey), Image.new("L", (4, 4), 128)])
    assert np.abs(decode(png(half))[..., 0].astype(int) - (127 * 255 + 128 * grey.astype(int)) / 255).max() <= 1
    premultiplied = half.convert("La")
    assert np.abs(np.asarray(sources.to_8_bits(premultiplied)).astype(int) - decode(png(half))[..., 0]).max() <= 2


def test_the_same_pixels_by_every_path(root, tmp_path):
    """Folder, archive, --encode and --images: a transparent 16-bit grey image, down-sampled or as it is."""
    deep = rng.integers(0, 65536, (8, 8)).astype(np.uint16)
    deep[0] = 5
    content = png(Image.fromarray(deep), transparency=5)
    save(tmp_path / "f" / "x.png").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        z.writestr("x.png", content)
    for i, source in enumerate((tmp_path / "f", tmp_path / "z.zip")):
        data.prepare(f"set{i}", str(source), resolution=8, root=root)
    want = decode(content, 8)
    assert (want[0] == 255).all() and np.array_equal(want[1:, :, 0], deep[1:] >> 8)
    assert np.array_equal(data.load("set0", root)[0][0], want)
    assert np.array_equal(data.load("set1", root)[0][0, ..., :1], want[..., :1])
    for source in (tmp_path / "f", tmp_path / "z.zip", tmp_path / "f" / "x.png"):
        assert np.array_equal(data.read_images(str(source), (3, 8, 8))[0][0], want)
        assert np.array_equal(data.read_images(str(source), (1, 8, 8))[0][0], want[..., :1])
        assert np.array_equal(data.open_images(str(source))[0][:1][0], want[..., :1])


def lanczos(x, size):
    """Pillow's definition along the first axis, in floating point: sinc(x) sinc(x / 3), stretched when shrinking."""
    scale = len(x) / size
    stretch = max(scale, 1)
    centres = (np.arange(size) + 0.5) * scale
    at = (np.arange(len(x)) + 0.5 - centres[:, None]) / stretch
    weights = np.where(np.abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0)
    return np.tensordot(weights / weights.sum(1, keepdims=True), x, 1)


@pytest.mark.parametrize("shape, size", [((40, 61), 16), ((61, 40), 16), ((33, 33), 32), ((50, 50), 50), ((20, 24), 32), ((3, 200), 2)])
def test_down_sampling_is_edms(shape, size):
    """The largest central square, whose edges see nothing of what was cut off; then Lanczos."""
    pixels = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    square = pixels[top:top + side, left:left + side].astype(float)
    want = lanczos(lanczos(square, size).clip(0, 255).swapaxes(0, 1), size).swapaxes(0, 1).clip(0, 255)
    got = decode(png(pixels), size).astype(float)
    horizontal_first = lanczos(lanczos(square.swapaxes(0, 1), size).clip(0, 255).swapaxes(0, 1), size).clip(0, 255)
    assert np.abs(got - horizontal_first).max() <= 1.6 and np.abs(got - want).mean() < 4
    assert np.array_equal(got, np.asarray(Image.fromarray(square.astype(np.uint8)).resize((size, size), Image.LANCZOS)))


def test_adms_down_sampling(tmp_path):
    """Halved by averaging while it is twice too large, each time to whole numbers; then bicubic, then the central square."""
    pixels = rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)
    means = pixels.reshape(6, 4, 6, 4, 3).mean(axis=(1, 3))
    assert np.abs(decode(png(pixels), 6, "center-crop-dhariwal") - means).max() < 2  # rounded four times
    wide = rng.integers(0, 256, (25, 47, 3)).astype(np.uint8)
    half = Image.fromarray(wide).resize((23, 12), Image.BOX)
    want = np.asarray(half.resize((round(23 * 8 / 12), 8), Image.BICUBIC))[:, 3:11]
    assert np.array_equal(decode(png(wide), 8, "center-crop-dhariwal"), want)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 24, "center-crop-dhariwal"), pixels)


def test_exif_orientation(tmp_path, root):
    pixels = rng.integers(0, 256, (6, 9, 3)).astype(np.uint8)
    turns = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1),
             7: pixels[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(pixels)}
    for orientation, want in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = png(Image.fromarray(pixels), exif=exif)
        assert np.array_equal(decode(content), pixels) and np.array_equal(decode(content, exif=True), want), orientation
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x.png").write_bytes(content)
    data.prepare("set", str(tmp_path / "f"), resolution=6, exif=True, root=root)
    assert np.array_equal(data.load("set", root)[0][0], decode(png(turns[8]), 6))
    assert data.made_of("set", root) == dict(source="images", resolution=6, transform="center-crop", exif=True)


# processes and memory


def test_more_workers_than_windows_can_wait_for(monkeypatch):
    asked = []

    class Pool:
        def __init__(self, workers, **settings):
            asked.append(workers)

        def submit(self, function, *arguments, **settings):
            class Done:
                def result(self):
                    return function(*arguments, **settings)
            return Done()

        def shutdown(self, **settings):
            pass

    monkeypatch.setattr(sources, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(sources.sys, "platform", "win32")
    assert [name for name, _ in sources.decode_all([("a", b""), ("b", b"")], 200)] == ["a", "b"] and asked == [61]


def test_a_decoding_process_that_is_killed(tmp_path, root):
    """For real, while it waits for a file that never comes."""
    os.mkfifo(tmp_path / "slow.png")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "slow.png").symlink_to(tmp_path / "slow.png")

    program = ("before=$(ps -o pid= --ppid $PPID); touch $0; for i in $(seq 3000); do for p in $(ps -o pid= --ppid $PPID); do "
               "echo $before $$ | grep -qw $p || { kill -KILL $p && exit; }; done; sleep 0.01; done")
    killer = subprocess.Popen(["sh", "-c", program, tmp_path / "looks"])
    while not (tmp_path / "looks").exists():
        time.sleep(0.001)
    try:
        with pytest.raises(UserError, match="a process that decodes images was killed .*--workers=1"):
            data.prepare("set", str(tmp_path / "f"), workers=2, root=root)
    finally:
        killer.kill()
        killer.wait()
    assert not (root / "set.partial").exists()


def test_decoded_images_do_not_pile_up():
    """Where writing is slower than decoding: at no time are more than a few decoded and not yet taken."""
    done, taken, most = [], 0, 0

    class Pool(ProcessPoolExecutor):
        def submit(self, *arguments, **settings):
            done.append(1)
            return super().submit(*arguments, **settings)

    content, original = png(Image.new("L", (4, 4))), sources.ProcessPoolExecutor
    sources.ProcessPoolExecutor = Pool
    try:
        for _, image in sources.decode_all([(str(i), content) for i in range(200)], 2):
            most, taken = max(most, len(done) - taken), taken + 1
            assert image.shape == (4, 4, 3)
    finally:
        sources.ProcessPoolExecutor = original
    assert taken == 200 and most <= 17


# images for metrics and codes


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


def test_how_a_set_was_made_is_said(root, tmp_path):
    save(tmp_path / "f" / "1.png")
    data.prepare("a", str(tmp_path / "f"), resolution=4, transform="center-crop-dhariwal", root=root)
    assert data.made_of("a", root)["transform"] == "center-crop-dhariwal" and data.made_of("nothing", root) is None
    with pytest.raises(UserError, match="--transform is center-crop or center-crop-dhariwal, not box"):
        data.prepare("b", str(tmp_path / "f"), transform="box", root=root)
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8), mu=0, sigma=0, mu_s=0, sigma_s=0)
    assert data.made_of(str(tmp_path / "adm.npz")) == dict(transform="center-crop-dhariwal")
