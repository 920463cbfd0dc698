"""
An encoder's outputs for all images, computed once and kept in a file of the run's folder; and the encoder that
`train_stage1.py --codes=FOLDER` names.

DisCo-Diff draws an image's codes anew at each visit: the file has logits, in half precision (2.6 GB for ImageNet-64
with m = 10 and k = 100, twice that for means and variances of continuous latents). The codes of a FrozenEncoder are
certain: the file has these (0.7 GB for ImageNet with m = 512 and k = 256, twice that if images are mirrored). So are
the numbers of a FrozenEmbedding.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch

import data
from checkpoint import atomic, weights_checksum
from configurator import UserError, arguments_of, require, say
from embedding import EMBEDDINGS, FrozenEmbedding, embedding_dim
from model import FrozenEncoder, certain, draw_codes
from npz import write_npy_header
from processes import barrier, on_any_process, sum_over_processes
from run import alone, progress
from trained import load_encoder
from vit import SEMEncoder


def read_encoder(config, shape, chosen):
    """-> the weights of the encoder in the folder config["codes"], which train_encoder.py trained; None if no folder
    is named, or num_latents = 0 asks for plain EDM

    shape: of the images, (N, H, W, C); chosen: those settings of the codes that the user has chosen. Sets in config how
    codes reach the denoiser, and what comes from the encoder: m and k, its own settings, its checksum, by which a run
    that continues knows it, and no first phase. Raises UserError if there is no encoder, or if it doesn't fit.
    """
    folder, dataset, conditioning = (config[name] for name in ("codes", "dataset", "conditioning"))
    require(conditioning in ("auto", "attention", "average", *EMBEDDINGS),
            f"--conditioning is attention, average, {', '.join(EMBEDDINGS)} or auto, not {conditioning}")
    given = bool(folder and config["num_latents"])
    if conditioning == "auto":
        config["conditioning"] = "average" if given else "attention"
    config["encoder_identity"] = 0
    require(config["codebook_size"] > 1 or not config["num_latents"],
            "a code of 1 value says nothing: codebook_size is 2 or more, not 1")
    require(not given or not config["continuous"], "--codes brings codes: leave --continuous out")
    require(given or conditioning not in EMBEDDINGS or not config["num_latents"],
            f"--conditioning={conditioning} is of an encoder that was trained before: name its folder by --codes")
    if not given:
        return None
    require(not chosen, f"--codes brings its encoder's num_latents and codebook_size: leave {' and '.join(chosen)} out")
    require(config["encoder_lr"] == 0,
            f"--codes takes an encoder as it is: encoder_lr must be 0, not {config['encoder_lr']}")
    encoder, checkpoint = load_encoder(folder)
    args, theirs = checkpoint["model_args"], checkpoint["config"]
    size, channels = encoder.img_resolution, args["img_channels"]
    require(shape[3] == channels and shape[1] >= size,
            f"the encoder in {folder} reads {size} pixels and {channels} channels, images of {dataset} have {shape[1]} "
            f"and {shape[3]}: train one, `python train_encoder.py --dataset={dataset}`")
    distinct = checkpoint.get("distinct", 1)
    require(distinct > 0.1, f"the encoder in {folder} has collapsed: {distinct:.1%} of its codes are distinct. Train "
            "one that tells images apart")
    if theirs["data_identity"] != config["data_identity"]:
        say(f"the encoder in {folder} was trained on other images, {theirs['dataset']} as it was then: its codes may "
            f"tell less of {dataset}")
    elif theirs["held_out"] < config["held_out"]:
        say(f"the encoder in {folder} was trained on some of the images that are held out here: it held out "
            f"{theirs['held_out']}")
    config |= dict(num_latents=encoder.num_latents, codebook_size=encoder.codebook_size, coarse_images=0,
                   frozen=arguments_of(args, SEMEncoder), encoder_identity=weights_checksum(encoder.state_dict()))
    if config["conditioning"] in EMBEDDINGS:
        config |= dict(num_latents=embedding_dim(config["conditioning"], **config["frozen"]), codebook_size=1)
    return encoder.state_dict()


class Encoded:
    """The outputs of the encoder of `model`, a DisCoDiff, for run.images.

    It is mapped from out_dir/logits-*.npy or codes-*.npy, named after encoder and images. If it is not there, all
    processes compute it, and process 0 writes it. flips: 2 if images are mirrored, else 1. If the file needs more than
    `limit` bytes there is none, and the encoder runs whenever it is asked. Raises UserError for a damaged file.
    """

    def __init__(self, run, model, flips, limit=math.inf):
        self.model, self.images, self.device, self.kept = model, run.images, run.device, None
        self.certain = isinstance(model.encoder, (FrozenEncoder, FrozenEmbedding))
        of_image = (model.num_latents, model.codebook_size) + (2,) * model.continuous
        kind, shape, dtype = "logits", (flips, len(run.images), *of_image), np.float16
        if self.certain:
            kind, shape, dtype = "codes", shape[:3], np.min_scalar_type(model.codebook_size - 1)
            dtype = np.float32 if isinstance(model.encoder, FrozenEmbedding) else dtype
        if math.prod(shape) * np.dtype(dtype).itemsize > limit:
            return
        folder, of_images = Path(run.config["out_dir"]), data.data_checksum(run.images, run.labels)
        path = folder / f"{kind}-{weights_checksum(model.encoder.state_dict()):08x}-{of_images:08x}.npy"
        if on_any_process(run.master and not path.exists()):
            with alone(folder / kind), atomic(path) if run.master else contextlib.nullcontext() as file:
                if run.master:
                    for old in folder.glob(f"{kind}-*.npy"):
                        old.unlink()
                    write_npy_header(file, dtype, shape)
                for flip in range(flips):
                    for part in self.parts(run, flip, shape[2:]):
                        if run.master:
                            file.write(part.numpy().astype(dtype).tobytes())
        barrier()
        try:
            self.kept = np.load(path, mmap_mode="r")
            if (self.kept.shape, self.kept.dtype) != (shape, dtype):
                raise ValueError
        except (ValueError, AttributeError, EOFError, OSError):  # an .npz has no shape
            raise UserError(f"{path} is damaged: delete it, and start again") from None

    def parts(self, run, flip, shape):
        """Yields the encoder's outputs for all images, in parts; of each part, every process computes `size` images."""
        count, size = len(self.images), 500
        for start in progress(range(0, count, size * run.world), desc="encoding", disable=not run.master):
            output = torch.zeros(min(size * run.world, count - start), *shape, dtype=torch.float32)
            mine = np.arange(start + run.rank * size, min(start + (run.rank + 1) * size, count))
            if len(mine):
                logits = self.encode(mine, np.full(len(mine), bool(flip)))
                output[mine - start] = (draw_codes(logits, 0) if self.certain else logits).cpu().float()
            sum_over_processes(output)
            yield output

    @torch.no_grad()
    def encode(self, indices, flip):
        """-> the encoder's logits (B, m, k), computed; arguments as in `logits`"""
        y = data.to_float(self.images[indices], self.device)
        flip = torch.as_tensor(flip, device=self.device)
        return self.model.encoder(torch.where(flip[:, None, None, None], y.flip(3), y))

    def logits(self, indices, flip):
        """-> logits (B, m, k) of the images with these indices (B,), mirrored where flip (B,), on the CPU, is true"""
        if self.kept is None:
            return self.encode(indices, flip)
        if self.certain:
            return certain(self.codes(indices, torch.as_tensor(flip, device=self.device)), self.model.codebook_size)
        kept = torch.from_numpy(self.kept[np.asarray(flip, dtype=np.int64), indices])
        return kept.to(self.device, non_blocking=True).float()

    def draw(self, indices, flip, gumbel):
        """-> codes (B, m), drawn by Gumbel noise (B, m, k) unless they are certain; other arguments as in `logits`"""
        if self.certain and self.kept is not None:  # no logits, which would be (256, 512, 256) at DLC's size
            return self.codes(indices, torch.as_tensor(flip, device=self.device))
        return draw_codes(self.logits(indices, flip), gumbel)

    def codes(self, indices, flip):
        """-> codes int64 (B, m) of a FrozenEncoder, or embeddings float (B, m), from the file; as in `logits`, but flip
        is on the device"""
        kept = torch.from_numpy(self.kept[:, indices]).to(self.device, non_blocking=True)
        kept = kept if kept.is_floating_point() else kept.long()
        return torch.where(flip[:, None], kept[-1], kept[0])
