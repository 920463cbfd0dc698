"""
VAE latents of a data set, which take the place of its pixels in the denoiser (latent diffusion: Rombach et
al. 2022). Encoder and metrics go on reading the uint8 images.

`python data.py NAME --vae=FILE` adds to datasets/NAME/:

    latents.npy     float16 (N, 1, C, h, w); with --xflip=True (N, 2, C, h, w), the second of the mirrored image
    vae.pt          the autoencoder

They are means of the encoder's normal distributions, times 0.18215. (DiT and DLC take a draw from each. The
weight of 1e-6 that the autoencoder's KL term has in its training leaves these distributions narrow.)
"""

import mmap

import numpy as np
import torch

import data
from checkpoint import atomic
from configurator import UserError, require
from npz import write_npy_header
from processes import start_processes
from run import alone, progress
from vae_file import read_vae

AT_ONCE = 32  # images


def encode(name, file, xflip=False, device="auto", root=data.HERE / "datasets"):
    """Adds latents and the autoencoder in `file` to the prepared data set root/name, in place of older ones.

    xflip: also those of mirrored images. Raises UserError if the autoencoder can't read these images.
    """
    require(name != data.EMBEDDED, f"{name} has no folder of its own for latents: --vae= is for prepared data sets")
    images, folder, vae = data.load(name, root=root)[0], root / name, read_vae(file)
    count, height, width, channels = images.shape
    require(channels == vae.in_channels, f"{name} has {channels} channels, the autoencoder takes {vae.in_channels}")
    require(height % vae.factor == 0 == width % vae.factor,
            f"{name} has images of {height} x {width} pixels, which the autoencoder makes {vae.factor} times smaller: "
            f"prepare them with --resolution={max(1, height // vae.factor) * vae.factor}")
    _, _, place = start_processes(device)
    vae = vae.to(place)
    shape = (count, 1 + xflip, vae.z_channels, height // vae.factor, width // vae.factor)
    with alone(folder):
        (folder / "latents.npy").unlink(missing_ok=True)  # they belong to the older vae.pt
        with atomic(folder / "vae.pt") as f:
            torch.save(vae.state_dict(), f)
        with atomic(folder / "latents.npy") as f:
            write_npy_header(f, np.float16, shape)
            for start in progress(range(0, count, AT_ONCE), desc=f"latents of {name}", unit="batch"):
                y = data.to_float(images[start:start + AT_ONCE], place)
                both = torch.stack([vae.encode(x) for x in ([y, y.flip(3)] if xflip else [y])], dim=1)
                require(both.isfinite().all(), f"{file} makes latents that are not finite: is it damaged?")
                f.write(both.half().cpu().numpy().tobytes())
    print(f"{folder}/latents.npy: {' x '.join(map(str, shape))}")


def load_latents(name, count, root=data.HERE / "datasets"):
    """-> the latents of a prepared data set of `count` images, float16 (N, 1 or 2, C, h, w), memory-mapped; its VAE

    Raises UserError if they are missing or damaged.
    """
    folder, mend = root / name, f"`python data.py {name} --vae=FILE` computes them"
    require((folder / "latents.npy").is_file(), f"{name} has no VAE latents: {mend}")
    vae = read_vae(folder / "vae.pt")
    try:
        latents = np.load(folder / "latents.npy", mmap_mode="r")
        if latents.dtype != np.float16 or latents.ndim != 5 or len(latents) != count:
            raise ValueError(f"they are {latents.dtype} {latents.shape}, the images {count}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the latents in {folder} are damaged ({error}): {mend}") from None
    if hasattr(mmap, "MADV_RANDOM"):
        latents.base.madvise(mmap.MADV_RANDOM)
    return latents, vae
