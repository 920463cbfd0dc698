"""Images as strangers have them: folders, links and archives of every shape."""
import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from pictures import png, random_images, save
from PIL import Image

import data
import npz
import sources
from configurator import UserError
from sources import decode, list_folder

rng = np.random.default_rng(0)


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


# archives


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
