"""
Where images come from: the formats that `python data.py NAME --source=...` reads. Data sets, --encode=
and --images= all decode image files here. Nothing here writes a file.

  images in a folder or .zip   one subfolder per class, or dataset.json as from EDM's dataset_tool.py
  MNIST's format               train-images-idx3-ubyte.gz, with the labels beside it
  CIFAR-10's binary version    data_batch_*.bin, or cifar-10-binary.tar.gz
"""

import gzip
import io
import json
import os
import signal
import struct
import sys
import tarfile
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from configurator import UserError, require, say

IMAGE_SUFFIXES = {f".{name}" for name in "apng avif bmp dib gif j2k jfif jp2 jpe jpeg jpg pbm pcx pfm pgm png pnm "
                                         "ppm psd qoi sgi tga tif tiff webp".split()}
NO_DATA = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}  # left by operating systems; skipped, as are names with a leading dot
LARGEST = 2 ** 30  # bytes that one compressed file may unpack to in memory
MOST_WORKERS = 61  # Windows can't wait for more
TRANSFORMS = ("center-crop", "center-crop-dhariwal")  # EDM's names for its own method and for ADM's
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# ----------------------------------------------------------------------------------------------------
# one image file -> pixels


def to_8_bits(image):
    """A Pillow image of any mode -> mode "L" (grey) or "RGB", on white where it is transparent.

    Raises ValueError if the file does not say which values are black and white.
    """
    clear = image.info.get("transparency")
    grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 0 ... 65535
        values = np.asarray(image) >> 8
        values[np.asarray(image) == (-1 if clear is None else clear)] = 255
        image = Image.fromarray(values.astype(np.uint8))
    elif image.mode in ("I", "F"):  # 32 bits: integers in 0 ... 255, floats in 0 ... 255 or 0 ... 1
        values, low, high = np.asarray(image), *image.getextrema()
        if not (low >= 0 and high <= 255) or (image.mode == "F" and 1 < high < 16):  # NaN, too
            raise ValueError(f"its values are {low:g} ... {high:g}, which does not say what is white: "
                             "save it with 8 or 16 bits")
        image = Image.fromarray((values * (255 if image.mode == "F" and high <= 1 else 1)).round().astype(np.uint8))
    elif isinstance(clear, tuple) and max(clear) > 255:  # a PNG with 3 x 16 bits; Pillow reads the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def center_crop(image, size, transform="center-crop"):
    """A Pillow image -> its centre, size x size pixels, made as EDM or ADM made their data sets.

    "center-crop" (EDM's dataset_tool.py): cut the largest square, then resize by Lanczos.
    "center-crop-dhariwal" (ADM): halve by averaging while twice too large, then bicubic, then crop.
    """
    if transform == "center-crop":
        side = min(image.size)
        left, top = ((whole - side) // 2 for whole in image.size)
        return image.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)
    while min(image.size) >= 2 * size:
        image = image.resize([whole // 2 for whole in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(whole * scale) for whole in image.size], Image.BICUBIC)
    left, top = ((whole - size) // 2 for whole in image.size)
    return image.crop((left, top, left + size, top + size))


def decode(file, size=0, transform="center-crop", exif=False, channels=3):
    """An image file -> uint8 (size, size, channels), or a string that says why it can't be read.

    file: its path, its bytes, or the error raised on reading it. size 0: keep the image's size.
    channels 0: 1 for a grey image, 3 for others. exif: turn the image by its EXIF orientation.
    """
    try:
        if isinstance(file, Exception):
            raise file
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        image.load()
        image = to_8_bits(ImageOps.exif_transpose(image) if exif else image)
        if channels == 3:
            image = image.convert("RGB")
        if size:
            image = center_crop(image, size, transform)
        image = np.asarray(image.convert("L") if channels == 1 else image)
        return image.reshape(*image.shape[:2], -1)
    except Exception as error:  # a broken file can make the decoders raise anything
        return f"{type(error).__name__}: {error}"


def content(file):
    """A path, or a function that reads a file in a .zip -> path, bytes or error, for `decode`."""
    try:
        return file() if callable(file) else file
    except Exception as error:  # a broken archive can make the decoders raise anything
        return error


class Pictures:
    """Image files as an array uint8 (N, H, W, C), decoded when sliced: len(), .shape, slices of step 1.

    files: [(name, path, bytes or reading function)], at least one; settings: for `decode`.
    Raises UserError for unreadable files and for images of different shapes.
    """

    def __init__(self, files, **settings):
        self.files, self.settings = files, settings
        self.shape = (len(files), *self.decoded(*files[0]).shape)

    def __len__(self):
        return len(self.files)

    def decoded(self, name, file):
        image = decode(content(file), **self.settings)
        require(not isinstance(image, str), f"{name} can't be read: {image}")
        return image

    def __getitem__(self, part):
        images = [self.decoded(*file) for file in self.files[part]]
        for (name, _), image in zip(self.files[part], images):
            require(image.shape == self.shape[1:],
                    f"{name} is {image.shape}, {self.files[0][0]} is {self.shape[1:]} (height, width, channels): "
                    "images must be of one size; `python data.py NAME --source=...` makes them so")
        return np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)


# ----------------------------------------------------------------------------------------------------
# images in a folder or a .zip


def is_data(name):
    return not any(part in NO_DATA or (part.startswith(".") and part not in (".", ".."))
                   for part in PurePosixPath(name).parts)


def is_image(name):
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def list_folder(folder):
    """-> {name of a file, relative to this folder, with /: its path}, [names of all folders below it].

    Follows links. Raises UserError for an unreadable folder, and for a link to nowhere or in a circle.
    """
    def refuse(error):
        raise UserError(f"can't read {error.filename}: {error.strerror}")

    files, folders = {}, []
    for place, inside, names in os.walk(folder, onerror=refuse, followlinks=True):
        place = Path(place)
        inside[:] = filter(is_data, inside)
        for path in (place / name for name in inside):
            folders.append(path.relative_to(folder).as_posix())
            if path.is_symlink():
                around = [place, *place.parents][:len(place.parts) - len(Path(folder).parts) + 1]
                require(all(path.resolve() != p.resolve() for p in around),
                        f"{path} is a link to a folder that it lies in: remove it")
        for path in (place / name for name in filter(is_data, names)):
            require(is_image(path) or not path.is_symlink() or path.exists(),
                    f"{path} is a link to nothing: mend or remove it")
            files[path.relative_to(folder).as_posix()] = path
    return files, folders


def list_zip(path):
    """As `list_folder`: {name of a file in this .zip: function that reads it}, [names of its folders].

    Names can't lead outside. Raises UserError for a damaged archive, or one that Python can't unpack.
    """
    def reader(entry):
        def read():
            if entry.file_size > LARGEST:
                raise ValueError(f"{entry.filename} unpacks to {entry.file_size:,} bytes")
            return archive.read(entry)
        return read

    files, folders = {}, set()
    try:
        archive = zipfile.ZipFile(path)
        entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is not a .zip, or damaged: {error}") from None
    for entry in entries:
        name = PurePosixPath("/", entry.filename.replace("\\", "/"))
        name = PurePosixPath(*(part for part in name.parts[1:] if part != ".."))
        if not is_data(name):
            continue
        folders |= {str(parent) for parent in name.parents} | ({str(name)} if entry.is_dir() else set())
        if entry.is_dir():
            continue
        require(not entry.flag_bits & 1, f"{path} has a password: unpack it, and name the folder with --source=")
        require(entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA),
                f"{path} is packed in a way that Python can't read (method {entry.compress_type}: {entry.filename}): "
                "unpack it, and name the folder with --source=")
        require(str(name) not in files, f"{path} has two files named {name}, and one would be lost: "
                                        "unpack it, and name the folder with --source=")
        files[str(name)] = reader(entry)
    return files, sorted(folders - {"."})


def list_images(path, data_set=True):
    """The images of a folder or .zip.

    -> [(name, path or reading function)]; labels or None; class names or []; whether EDM made it

    Labels come from dataset.json, at the top or in the only top folder with images. Without one,
    each subfolder is a class, in order of name; one folder may enclose them all. Without subfolders
    there are no classes. data_set=False, for images to measure: only dataset.json gives labels, and
    a class may have no images. Raises UserError for other layouts, and for classes without images.
    """
    files, folders = list_zip(path) if is_zip(path) else list_folder(path)
    names = sorted(filter(is_image, files), key=lambda name: PurePosixPath(name).parts)
    tops = {PurePosixPath(name).parts[0] for name in names}
    places = ["", *(f"{top}/" for top in tops)][:2 if len(tops) == 1 else 1]
    index = next((f"{place}dataset.json" for place in places if f"{place}dataset.json" in files), None)
    elsewhere = [name for name in files if PurePosixPath(name).name == "dataset.json" and name != index]
    require(not elsewhere, f"{path} has a data set of EDM's tools in a subfolder, {elsewhere[:1]}: "
                           "name that subfolder as the source, or remove the file")
    labels, classes = None, []
    if index:
        labels = read_labels(f"{path}: {index}", files[index], index.removesuffix("dataset.json"), names)
        classes = numbered(labels, path) if labels and data_set else []
    others = Counter(PurePosixPath(name).suffix.lower() or "no extension" for name in files.keys() - {*names, index})
    if others:
        kinds = ", ".join(f"{count} with {kind}" for kind, count in others.most_common(5))
        say(f"{path}: skipped files without the extension of a readable image ({kinds})")
    require(names, f"{path} has no images in it")
    if data_set and not index:
        labels, classes = class_folders(path, names, folders)
    shown = (lambda name: name) if is_zip(path) else (lambda name: str(files[name]))
    return [(shown(name), files[name]) for name in names], labels, classes, bool(index)


def class_folders(path, names, folders):
    """-> each image's label by its top folder, and the folders' names; None, [] without folders."""
    parts = [PurePosixPath(name).parts for name in names]
    inside = {PurePosixPath(name).parts for name in folders}
    if len({p[0] for p in inside} | {p[0] for p in parts}) == 1 and min(map(len, parts)) > 2:
        parts, inside = [p[1:] for p in parts], {p[1:] for p in inside} - {()}  # drop a folder around all others
    if max(map(len, parts)) == 1:
        return None, []
    beside = [name for name, p in zip(names, parts) if len(p) == 1]
    require(not beside, f"{path} has {len(beside)} images beside its class folders, such as {beside[:1]}: "
                        "move them into a class folder, or elsewhere")
    classes = sorted({p[0] for p in inside})
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[p[0]] for p in parts]
    require_images(labels, classes, path)
    return labels, classes


def is_zip(path):
    return Path(path).suffix.lower() == ".zip" and Path(path).is_file()


def read_labels(what, file, folder, names):
    """EDM's dataset.json -> the classes of the images `names`, or None if it has no labels.

    The file is {"labels": [[name, class], ...]}, names relative to its folder, or {"labels": null}.
    Raises UserError for any other file, and for an image without a label.
    """
    try:
        labels = json.loads(file() if callable(file) else file.read_bytes())["labels"]
        classes = {folder + name: int(c) for name, c in labels or []}
        if any(classes[folder + name] != c for name, c in labels or []):
            raise ValueError("its labels are not whole numbers, one for each image")
        if min(classes.values(), default=0) < 0:
            raise ValueError("it has negative labels")
    except Exception as error:  # a broken file can make the decoders raise anything
        raise UserError(f"{what} is not one that EDM's tools wrote, or is damaged ({type(error).__name__}: {error}): "
                        "repair, rename or remove it") from None
    if not classes:
        return None
    missing = [name for name in names if name not in classes]
    require(not missing, f"{what} has no label for {len(missing)} of the images, such as {missing[:1]}")
    if gone := classes.keys() - set(names):
        say(f"{what} has labels for {len(gone)} missing images, such as {min(gone)}")
    return [classes[name] for name in names]


def numbered(labels, source):
    """Class names for numbered labels: "0", "1", ... Raises UserError if a number has no images."""
    require(max(labels) < 1_000_000, f"{source} has a label above 1,000,000: are these class numbers?")
    classes = [str(c) for c in range(int(max(labels)) + 1)]
    require_images(labels, classes, source)
    return classes


def require_images(labels, classes, source):
    counts = np.bincount(np.asarray(labels, np.int64), minlength=len(classes))
    empty = [classes[c] for c in np.flatnonzero(counts == 0)]
    require(not empty, f"{source} has no images of {len(empty)} of its {len(classes)} classes "
                       f"({', '.join(empty[:5])}{', ...' * (len(empty) > 5)}): "
                       "remove their folders, or number the classes without gaps")


def from_files(path, resolution, transform, exif, workers):
    files, labels, classes, edm = list_images(path)
    as_they_are = not resolution and (edm or is_zip(path))
    require(not as_they_are or transform == TRANSFORMS[0],
            f"images in {path} keep their size: --transform={transform} needs a --resolution=")
    size = 0 if as_they_are else resolution or 64
    made = dict(source="EDM's dataset_tool.py" if edm else "images", resolution=size,
                transform=transform if size else None, exif=exif)
    decoded = decode_all(files, workers, size=size, transform=transform, exif=exif,
                         channels=0 if as_they_are or edm else 3)

    def items():
        for (name, image), label in zip(decoded, labels or [None] * len(files)):
            yield name, image, label

    return len(files), classes, items(), made


def decode_all(files, workers, **settings):
    """Files from `list_images` -> iterator of (name, result of `decode`), by this many processes.

    They stay only a few files ahead: memory does not grow if writing is slower than decoding.
    """
    if workers == 1:
        for name, file in files:
            yield name, decode(content(file), **settings)
        return
    workers, ahead = min(workers, MOST_WORKERS) if sys.platform == "win32" else workers, deque()
    try:
        pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
        try:
            for name, file in files:
                ahead.append((name, pool.submit(decode, content(file), **settings)))
                if len(ahead) >= 8 * workers:
                    name, image = ahead.popleft()
                    yield name, image.result()
            for name, image in ahead:
                yield name, image.result()
        finally:
            pool.shutdown(cancel_futures=True)  # an error cancels the files still waiting
    except BrokenProcessPool:
        raise UserError("a process that decodes images was killed (too little memory?): "
                        "--workers=1 needs the least") from None
    except OSError as error:
        raise UserError(f"can't start {workers} processes ({error.strerror}): --workers=1 needs none") from None


# ----------------------------------------------------------------------------------------------------
# MNIST's and CIFAR-10's formats


def read_idx(path):
    """MNIST's format: .gz of images, and of labels beside it -> uint8 (N, H, W, 1), int64 (N,)"""
    arrays = []
    for p, ndim in ((path, 3), (path.with_name(path.name.replace("images-idx3", "labels-idx1")), 1)):
        try:
            with gzip.open(p) as f:
                raw = f.read(LARGEST + 1)
        except FileNotFoundError:
            raise UserError(f"{p} is missing") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{p} is damaged: {error}") from None
        require(len(raw) <= LARGEST, f"{p} unpacks to more than {LARGEST:,} bytes")
        header = 4 + 4 * ndim
        shape = struct.unpack(f">{ndim}I", raw[4:header]) if len(raw) >= header else ()
        require(raw[:4] == bytes([0, 0, 8, ndim]) and len(raw) == header + np.prod(shape, dtype=int),
                f"{p} is not a complete IDX file of {'images' if ndim == 3 else 'labels'}")
        arrays.append(np.frombuffer(raw, np.uint8, offset=header).reshape(shape))
    require(len(arrays[0]) == len(arrays[1]), f"{path} has {len(arrays[0])} images, but {len(arrays[1])} labels")
    return arrays[0][..., None], arrays[1].astype(np.int64)


def read_cifar(files):
    """{file: bytes} in CIFAR-10's binary version, a label and 3 x 32 x 32 pixels each -> images, labels"""
    for file, raw in files.items():
        require(raw and len(raw) % 3073 == 0, f"{file} is not a complete file of CIFAR-10's binary version")
    records = np.concatenate([np.frombuffer(raw, np.uint8).reshape(-1, 3073) for raw in files.values()])
    require(records[:, 0].max() < 10, "a label is above 9: is this CIFAR-10's binary version?")
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(np.int64)


def read_cifar_tar(path):
    try:
        with tarfile.open(path) as tar:
            batches = sorted((m for m in tar if Path(m.name).match("data_batch_*.bin")), key=lambda m: m.name)
            require(sum(m.size for m in batches) <= LARGEST, f"{path} unpacks to more than {LARGEST:,} bytes")
            files = {m.name: tar.extractfile(m).read() for m in batches}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    require(files, f"{path} has no data_batch_*.bin in it: it is not CIFAR-10's binary version. "
                   "For other images, unpack it, and name the folder with --source=")
    return read_cifar(files)


def from_arrays(images, labels, source, kind, names=()):
    require(len(images), f"{source} has no images in it")
    classes = numbered(labels, source)
    require(not names or len(classes) == len(names),
            f"{source} has images of {len(classes)} classes: {kind} has {len(names)}")
    items = ((f"image {i}", x, c) for i, (x, c) in enumerate(zip(images, labels)))
    return len(images), list(names) or classes, items, dict(source=kind)


# ----------------------------------------------------------------------------------------------------


def open_source(source, resolution=0, transform="center-crop", exif=False, workers=1):
    """Tells the kind of source by its name and content.

    -> number of images; class names, [] without labels; iterator of (name, image, label); how the
    images were made, a dict for people and for eval_fid.py. An image is uint8 (H, W, C), or a string
    that says why it can't be read.

    resolution, transform, exif: for image files, see `decode`. resolution 0: 64 for a folder;
    images in a .zip, or made by EDM's dataset_tool.py, keep their size.
    """
    path = Path(source)
    require(path.exists(), f"there is no file or folder {source}")
    if path.is_dir() and (path / "train-images-idx3-ubyte.gz").exists():
        path /= "train-images-idx3-ubyte.gz"
    if path.name.endswith("-images-idx3-ubyte.gz"):
        return from_arrays(*read_idx(path), path, "MNIST's format")
    if path.is_dir() and (path / "cifar-10-binary.tar.gz").exists():
        path /= "cifar-10-binary.tar.gz"
    if path.name.endswith(".tar.gz"):
        return from_arrays(*read_cifar_tar(path), path, "CIFAR-10", CIFAR10)
    batches = [path] if path.suffix == ".bin" else sorted(path.glob("data_batch_*.bin")) if path.is_dir() else []
    if batches:
        return from_arrays(*read_cifar({p.name: p.read_bytes() for p in batches}), path, "CIFAR-10", CIFAR10)
    require(path.is_dir() or is_zip(path), f"{source} is none of the sources that `python data.py --help` lists")
    return from_files(path, resolution, transform, exif, workers)
