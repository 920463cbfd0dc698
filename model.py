"""
The network of DisCo-Diff (Xu et al. 2024), to be read beside the paper.

  gumbel_softmax  relaxed codes, through which the encoder gets its gradient                (App. D.2)
  draw_codes      hard codes                                                                (App. D.2)
  LatentTokens    codes -> codebook embeddings -> 6-layer Transformer -> tokens             (App. D.1)
  CodeTable       codes -> the mean of their embeddings, DLC's way              (Discrete Latent Codes)
  Encoder         ViT with a class token for each latent                          (sec. 3.3, App. D.1)
  GaussianEncoder the same for continuous latents, m of k numbers each                       (Table 3)
  FrozenEncoder   an encoder that was trained before, in place of it            (Discrete Latent Codes)
  DisCoDiff       denoiser and encoder together, in EDM's preconditioning             (Eq. 3, Alg. 1)
  denoiser        a trained DisCoDiff as denoise(x, sigma), for the samplers         (Alg. 3, App. B)

The U-Net is in unet.py. This file knows tensors, not files. Shapes: B images, C channels, H = W pixels,
m latents with k codes each. Images are float (B, C, H, W) in [-1, 1], class labels int64 (B,) with -1
for "no class", hard codes int64 (B, m), soft codes float (B, m, k) with rows that sum to 1.
"""

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from continuous import reparametrised
from diffusion import PROCESSES, guided, within
from dit import DiT
from embedding import EMBEDDINGS, FrozenEmbedding, LinearCondition
from transformer import float32, transformer
from unet import UNet
from uvit import UViT
from vit import SEMEncoder

DENOISERS = {"unet": UNet, "dit": DiT, "uvit": UViT}  # a new denoiser needs a file of its own, and a name here


def gumbel_softmax(logits, tau, gumbel):
    """Relaxed one-hot sample of the categorical with these logits (Jang et al. 2016; App. D.2).

    logits: (..., k); tau > 0: its smoothness; gumbel: Gumbel(0, 1) noise of the logits' shape.
    -> (..., k), rows sum to 1. As tau -> 0 it becomes one-hot at argmax(logits + gumbel), an exact
    sample: `draw_codes` is that limit.
    """
    return torch.softmax((logits + gumbel) / tau, dim=-1)


def draw_codes(logits, gumbel):
    """Hard sample of the categorical with these logits: `gumbel_softmax` at tau -> 0. -> int64 (...)

    App. D.2 extracts codes with tau = 0.01, which is one-hot to rounding: a sample, not argmax(logits).
    Logits of k = 1 are numbers of an embedding (embedding.py), which are returned. For logits (B, m, k, 2), of a
    GaussianEncoder, the sample is float (B, m, k).
    """
    if logits.ndim == 4:
        return reparametrised(logits, gumbel)
    return logits[..., 0] if logits.shape[-1] == 1 else (logits + gumbel).argmax(dim=-1)


class LatentTokens(nn.Module):
    """Codes -> codebook embeddings -> Transformer (App. D.1: 6 layers, width 192). -> (B, m, dim)

    null_token: one more token, (B, m + 1, dim), the same for all codes: attention can turn to it, and so away from
    the codes, where noise is small (sec. 4.1's suggestion). groups: of m / groups latents each, which go through the
    Transformer one by one, each with its null token: no token knows of another group's codes. The tokens depend on
    neither x nor sigma: sampling computes them once per image.
    """

    def __init__(self, num_latents, codebook_size, dim=192, layers=6, heads=3, null_token=False, groups=0):
        super().__init__()
        self.groups = max(groups, 1)
        if num_latents % self.groups:
            raise ValueError(f"{num_latents} latents can't be split into {groups} equal groups: change groups or "
                             "num_latents")
        self.codebook = nn.Parameter(torch.randn(num_latents, codebook_size, dim))
        self.null = nn.Parameter(torch.randn(dim))  # in place of all m embeddings: "no latents"
        self.blocks = transformer(layers, dim, heads)
        self.norm = nn.LayerNorm(dim)
        self.null_token = nn.Parameter(torch.zeros(dim)) if null_token else None

    def forward(self, z, drop=None):
        """z: (B, m, k) relaxed or one-hot; drop: (B,) bool, True for the null embedding (sec. 3.1)."""
        x = torch.einsum("bmk,mkd->bmd", z.to(self.codebook.dtype), self.codebook).float()
        if drop is not None:
            x = torch.where(drop[:, None, None], self.null, x)
        x = x.unflatten(1, (self.groups, -1)).flatten(0, 1)  # (B groups, m / groups, dim)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.null_token is not None:
            x = torch.cat([x, self.null_token.expand(len(x), 1, -1)], dim=1)
        return x.unflatten(0, (-1, self.groups)).flatten(1, 2)


class CodeTable(nn.Module):
    """Codes -> the mean of their embeddings, with a table for each position (DLC sec. 5). -> (B, width)

    The denoiser adds it to its embedding of the noise level, as DiT adds a class label's. The last row of each table
    stands for "no latents". It depends on neither x nor sigma. A row counts 1 / m in the mean: with the learning rate
    of other weights the codes stay unheard for long (train_stage1.py has code_lr). The rows for "no latents" start
    equal, so that their mean is as long as they are, as in the authors' program.
    """

    def __init__(self, num_latents, codebook_size, width):
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_latents, codebook_size + 1, width) / math.sqrt(width))
        with torch.no_grad():
            self.table[:, -1] = self.table[0, -1].clone()

    def forward(self, z, drop=None):
        """z: (B, m, k) relaxed or one-hot, or (B, m) int64 hard codes; drop: (B,) bool, True for no latents."""
        m, rows, _ = self.table.shape
        if z.ndim == 2:  # the same without one-hot codes, which would be (256, 512, 256) at DLC's size
            z = F.embedding_bag(z + rows * torch.arange(m, device=z.device), self.table.flatten(0, 1), mode="mean")
        else:
            z = torch.einsum("bmk,mkd->bd", z.to(self.table.dtype), self.table[:, :-1]).float() / m
        return z if drop is None else torch.where(drop[:, None], self.table[:, -1].mean(0), z)


class Encoder(nn.Module):
    """ViT with a class token and a linear head for each discrete latent (sec. 3.3, App. D.1).

    (B, C, H, W) clean images in [-1, 1] -> logits (B, m, k)
    """

    def __init__(self, img_resolution, img_channels, num_latents, codebook_size, patch=8, dim=768, layers=12, heads=12):
        super().__init__()
        if img_resolution % patch:
            raise ValueError(f"encoder_patch {patch} does not divide images of {img_resolution} pixels")
        self.patches = nn.Conv2d(img_channels, dim, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((img_resolution // patch) ** 2, dim))
        self.class_tokens = nn.Parameter(0.02 * torch.randn(num_latents, dim))
        self.blocks = transformer(layers, dim, heads)
        self.norm = nn.LayerNorm(dim)
        # logits start with standard deviation 2: the codes tell images apart from the first step on,
        # and the denoiser learns to use them before the encoder finds noise in them harmful and collapses
        self.head = nn.Parameter(2 * torch.randn(num_latents, dim, codebook_size) / math.sqrt(dim))

    def forward(self, y):
        x = self.patches(y).flatten(2).transpose(1, 2) + self.position  # (B, patches, dim)
        x = torch.cat([self.class_tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, :len(self.class_tokens)])
        return float32(lambda x: torch.einsum("bmd,mdk->bmk", x, self.head), x)  # a linear head for each latent


class GaussianEncoder(Encoder):
    """`Encoder` for continuous latents, k numbers each (Table 3). -> their means and log-variances (B, m, k, 2)"""

    def __init__(self, img_resolution, img_channels, num_latents, codebook_size, **settings):
        super().__init__(img_resolution, img_channels, num_latents, 2 * codebook_size, **settings)
        self.head.data[..., ::2] /= 2  # means start with standard deviation 1,
        self.head.data[..., 1::2] = 0  # and so do the samples round them

    def forward(self, y):
        return super().forward(y).unflatten(2, (-1, 2))


def certain(codes, codebook_size):
    """Logits of codes that are certain, 0 for these and -inf for all others: `draw_codes` and `gumbel_softmax` give
    exactly these, for any noise. codes: int64 (B, m) -> (B, m, k). (Of an embedding's numbers: themselves.)"""
    return codes[..., None] if codebook_size == 1 else F.one_hot(codes, codebook_size).float().log()


class FrozenEncoder(SEMEncoder):
    """DLC's encoder, trained beforehand, in place of `Encoder`: its codes are the argmax, and it stays as it is."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.eval().requires_grad_(False)

    def train(self, mode=True):  # no drop path
        return super().train(False)

    def forward(self, y):
        return certain(super().forward(y).argmax(-1), self.codebook_size)


class DisCoDiff(nn.Module):
    """Denoiser D(x, sigma, z, c) in EDM's preconditioning, and encoder E(y): stage 1 trains both.

    num_latents = 0 leaves plain EDM: no encoder, no cross-attention.
    continuous: latents are k = codebook_size numbers each; z is float (B, m, k), what the encoder says (B, m, k, 2).
    process: a row of diffusion.PROCESSES, for another preconditioning and noise; pfgm_D: PFGM++'s D, else inf.
    conditioning: how the denoiser reads the codes, by "attention" (DisCo-Diff) or their "average" (DLC); or what it
    reads instead, one of embedding.EMBEDDINGS: then k = 1, and codes are float.
    frozen: the settings of a FrozenEncoder, a dict; None: the encoder is trained too.
    x_shape: (C, H, W) of what is denoised, if not the images themselves: latents of a VAE.
    denoiser: its network, one of DENOISERS, which takes the further arguments.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, num_latents=10, codebook_size=100,
                 conditioning="attention", latent_dim=192, latent_layers=6, latent_heads=3, null_token=False,
                 encoder_patch=8, encoder_dim=768, encoder_layers=12, encoder_heads=12, frozen=None, continuous=False,
                 sigma_data=0.5, process="edm", pfgm_D=math.inf, x_shape=(), denoiser="unet", **network):
        super().__init__()
        self.img_shape = (img_channels, img_resolution, img_resolution)
        self.x_shape = channels, size, _ = tuple(x_shape) or self.img_shape
        self.label_dim, self.num_latents, self.codebook_size = label_dim, num_latents, codebook_size
        self.continuous, self.conditioning, self.sigma_data = continuous, conditioning, sigma_data
        self.process, self.pfgm_D = PROCESSES[process], pfgm_D if process == "pfgm++" else math.inf
        attended = num_latents and conditioning == "attention"
        self.model = DENOISERS[denoiser](size, channels, label_dim, latent_dim=latent_dim if attended else 0, **network)
        if num_latents and conditioning in EMBEDDINGS:
            self.latents = LinearCondition(num_latents, self.model.emb_dim)
            self.encoder = FrozenEmbedding(conditioning, **frozen)
        elif num_latents:
            self.latents = LatentTokens(num_latents, codebook_size, latent_dim, latent_layers, latent_heads, null_token,
                                        network.get("groups", 0)) \
                if attended else CodeTable(num_latents, codebook_size, self.model.emb_dim)
            self.encoder = FrozenEncoder(**frozen) if frozen else (GaussianEncoder if continuous else Encoder)(
                img_resolution, img_channels, num_latents, codebook_size,
                patch=encoder_patch, dim=encoder_dim, layers=encoder_layers, heads=encoder_heads)

    def condition(self, z, drop=None):
        """What the denoiser reads of the codes z. -> the `condition` of `denoise`; {} without latents

        It depends on neither x nor sigma: compute it once per image, not once per evaluation.
        z: (B, m, k) relaxed or continuous, or (B, m) int64 hard codes in 0 ... k - 1.
        drop: (B,) bool, True for null latents.
        """
        if not self.num_latents:
            return {}
        if self.continuous:
            z = z / math.sqrt(self.codebook_size)  # k numbers together make an embedding as large as a code's
        if self.conditioning != "attention":
            return {"emb": [self.latents(z, drop)]}
        if z.ndim == 2:
            z = F.one_hot(z, self.codebook_size)
        return self.model.condition(self.latents(z, drop))

    def denoise(self, x, sigma, labels=None, condition=None):
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM Eq. 7.

        x: (B, C, H, W) = y + sigma n; sigma: (B,) -> (B, C, H, W) float32
        """
        sigma = sigma.float().reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.process.constants(sigma, self.sigma_data)
        return c_skip * x + c_out * self.model(c_in * x, c_noise.flatten(), labels, condition).float()

    def noise(self, source, *count):
        """The process's noise of scale 1 for images, or for `count` of each. -> (B, C, H, W) or (B, *count, C, H, W)

        source: what draws it, one of noise.py's classes, for B images. All noise of an image has the same stretch in
        PFGM++.
        """
        return self.process.kernel(source, (*count, *self.x_shape), self.pfgm_D)

    def forward(self, y, noise, sigma, labels=None, gumbel=None, drop=None, tau=1.0, z=None, images=None):
        """Alg. 1: infers z from the clean images y, and denoises y + noise with it.

        y, noise: (B, C, H, W), noise already scaled by sigma (B,); gumbel: (B, m, k); drop: (B,) bool;
        z: (B, m) codes of y, where these are known: the encoder is not asked;
        images: what the encoder reads, where y are latents of a VAE.
        -> D (B, C, H, W) and the encoder's logits (B, m, k), None if it was not asked
        """
        logits = None
        if self.num_latents and z is None:
            logits = self.encoder(y if images is None else images)
            z = draw_codes(logits, gumbel) if self.continuous else gumbel_softmax(logits, tau, gumbel)
        condition = self.condition(z, drop)
        return self.denoise(y + noise, sigma, labels, condition), logits


def denoiser(model, labels=None, codes=None, guidance=1.0, autocast=contextlib.nullcontext(), interval=(0, math.inf)):
    """-> denoise(x, sigma), for the samplers

    model: a DisCoDiff; labels: (B,) class labels; codes: (B, m) hard codes, or continuous latents (B, m, k), which a
    model with latents needs.
    guidance: w of App. B, which evaluates 2B images per call; 1 is the plain conditional model.
    interval: the noise levels that are guided, from ... to; at others, the model is the plain one, for B images.
    The network runs under `autocast`. x may be on another device (the CPU, if the network's device
    has no float64).
    """
    if (model.num_latents or guidance != 1) and codes is None:
        raise ValueError("discrete latents, and guidance by them, need codes")
    place = next(model.parameters()).device

    def with_condition(condition, labels):
        def denoise(x, sigma):
            with torch.no_grad(), autocast:
                D = model.denoise(x.float().to(place), sigma.float().to(place).expand(len(x)), labels, condition)
            return D.to(x.device)

        return denoise

    condition = model.condition(codes)
    plain = with_condition(condition, labels)
    if guidance == 1:
        return plain
    null = model.condition(codes[:1], drop=torch.ones(1, dtype=torch.bool, device=codes.device))
    both = {part: [torch.cat([t, n.expand_as(t)]) for t, n in zip(condition[part], null[part])] for part in null}
    twice = with_condition(both, None if labels is None else labels.repeat(2))  # with their codes, with null latents
    return within(interval, guided(twice, guidance), plain)
