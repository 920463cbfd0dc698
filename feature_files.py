"""
Image features in .npz files: their means and covariances, in EDM's and ADM's formats, and features
of any network.
"""

import contextlib
import os
import zipfile
import zlib

import numpy as np

from configurator import UserError, require
from metrics import NEIGHBOURS
from npz import open_npz
from run import alone

IMAGES = ("images.npy", "arr_0.npy")  # these may be larger than memory, in sample.py's files and in ADM's


@contextlib.contextmanager
def reserved(path):
    """For the long work whose result will be `path`: `alone`, and sure of its folder.
    Raises UserError if the folder can't be written, or another run is doing the same work."""
    with alone(path):
        with contextlib.suppress(OSError):  # said in the next line
            path.parent.mkdir(parents=True, exist_ok=True)
        require(os.access(path.parent, os.W_OK), f"can't write {path.parent}, where what is computed on a data set is "
                "kept: make it writable, or work in a copy of the repository")
        yield


def names_in(path):
    """The names of the arrays in an .npz; [] if it can't be read, as reading an array will say."""
    try:
        with open_npz(path, large=IMAGES) as f:
            return f.files
    except Exception:  # whatever a broken file makes the decoders raise
        return []


def array_in(f, key):
    """The array `key` of an open .npz; an empty array if there is none, or it can't be read."""
    try:
        return np.asarray(f[key])
    except Exception:  # whatever a broken file makes the decoders raise
        return np.empty(0)


def npz_checksum(path):
    """CRC-32 of an .npz, from the checksums of its arrays in the archive's directory."""
    with zipfile.ZipFile(path) as archive:
        return zlib.crc32(repr([(info.filename, info.CRC) for info in archive.infolist()]).encode())


def read_statistics(path, made_with, pool_dim, spatial_dim, advice=""):
    """-> dict of arrays from an .npz: mu and sigma (EDM's format), perhaps mu_s and sigma_s
    (ADM's); from files that eval_fid.py wrote also made_with, count and features

    Raises UserError if the file can't be read (`advice` ends that message), if it was made with
    other features than `made_with`, or if mu is not (pool_dim,) or mu_s not (spatial_dim,).
    """
    try:
        with open_npz(path, large=IMAGES) as f:
            more = ("made_with", "count", "features") if "made_with" in f else ()
            stored = {key: f[key] for key in ("mu", "sigma", "mu_s", "sigma_s", *more) if key in f}
        moments = [("mu", "sigma", pool_dim)] + [("mu_s", "sigma_s", spatial_dim)] * ("mu_s" in stored)
        for mu, sigma, _ in moments:
            stored |= {key: stored[key].astype(np.float64, casting="safe") for key in (mu, sigma)}
        theirs = str(stored.get("made_with", made_with))
    except Exception as error:  # whatever a broken file makes the decoders raise
        raise UserError(f"{path} can't be read as statistics, an .npz with mu and sigma{advice} ({error})") from None
    require(theirs == made_with, f"{path} was made with the features {theirs}, not {made_with}: compare like with like")
    for mu, sigma, dim in moments:
        shapes, values = (stored[mu].shape, stored[sigma].shape), stored[sigma]
        require(shapes == ((dim,), (dim, dim)) and np.isfinite(stored[mu]).all() and np.allclose(values, values.T),
                f"{path} has {mu} {shapes[0]} and {sigma} {shapes[1]}, or values that can't be: a mean and covariance "
                f"of {dim} dimensions are wanted")
    return stored


def read_features(path):
    """-> real (N, D), generated (M, D): these arrays of an .npz, as float64. Raises UserError if
    they are not there, have other shapes, too few rows, or values that are not finite."""
    try:
        with open_npz(path, large=("real.npy", "generated.npy")) as f:
            missing = [key for key in ("real", "generated") if key not in f]
            if missing:
                raise ValueError(f"it has {', '.join(f.files) or 'nothing'}, not {' and '.join(missing)}")
            arrays = {key: np.asarray(f[key]) for key in ("real", "generated")}
    except Exception as error:  # whatever a broken file makes the decoders raise
        raise UserError(f"{path} is not an .npz with features, real (N, D) and generated (M, D): "
                        f"{getattr(error, 'strerror', None) or error}") from None
    for key, x in arrays.items():
        require(x.dtype.kind in "iuf" and x.ndim == 2 and x.shape[1],
                f"{path} has {key} {x.dtype} {x.shape}: numbers (rows, dimensions) are wanted, a row for each image")
        require(len(x) > NEIGHBOURS, f"{path} has {len(x)} rows of {key}: {NEIGHBOURS + 1} or more are wanted")
        arrays[key] = x.astype(np.float64, order="C")
        require((np.abs(arrays[key]) < 1e50).all(), f"{path} has NaN, infinity or numbers beyond 1e50 in {key}")
    real, generated = arrays.values()
    require(real.shape[1] == generated.shape[1], f"{path} has {real.shape[1]} dimensions in real, {generated.shape[1]} "
            "in generated: features of one network are wanted")
    return real, generated
