"""Images as strangers have them: every mode, transparency, down-sampling, the processes that decode."""
import json
import os
import subprocess
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from pictures import png, save
from PIL import Image

import data
import sources
from configurator import UserError
from sources import center_crop, decode

rng = np.random.default_rng(0)


# modes


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


# down-sampling


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
