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
from checkpoint import atomic, weights_checksum
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


class Latents:
    """The latents of a prepared data set, whose images have this shape (N, H, W, C), memory-mapped; `vae`, the
    autoencoder, on this device.

    xflip: those of mirrored images are needed too. Raises UserError if they are missing or damaged.
    """

    def __init__(self, name, shape, xflip, device, root=data.HERE / "datasets"):
        folder, mend = root / name, f"`python data.py {name} --vae=FILE{' --xflip=True' * xflip}` computes them"
        require((folder / "latents.npy").is_file(), f"{name} has no VAE latents: {mend}")
        self.vae, self.device = read_vae(folder / "vae.pt").to(device), device
        self.identity = weights_checksum(self.vae.state_dict())
        try:
            self.mapped = np.load(folder / "latents.npy", mmap_mode="r")
            wanted = self.vae.z_channels, shape[1] // self.vae.factor, shape[2] // self.vae.factor
            found = self.mapped.dtype, len(self.mapped), self.mapped.shape[2:]
            if found != (np.float16, shape[0], wanted):
                raise ValueError(f"they are {found[0]} {self.mapped.shape}, images and autoencoder make {wanted} of "
                                 f"each of {shape[0]}")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"the latents in {folder} are damaged ({error}): {mend}") from None
        require(not xflip or self.mapped.shape[1] == 2, f"{name} has no latents of mirrored images: {mend}")
        if hasattr(mmap, "MADV_RANDOM"):
            self.mapped.base.madvise(mmap.MADV_RANDOM)
        self.shape = self.mapped.shape[2:]  # (C, h, w)

    def of(self, indices, flip=None):
        """-> float32 (B, C, h, w) of the images with these indices (B,), mirrored where flip (B,) is true"""
        both = torch.from_numpy(self.mapped[indices]).to(self.device, non_blocking=True).float()
        return both[:, 0] if flip is None else torch.where(flip[:, None, None, None], both[:, -1], both[:, 0])
