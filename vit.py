"""
The encoder of Discrete Latent Codes: a ViT with registers and Simplicial Embeddings (DLC sec. 4, Fig. 3), and the
head that self-distillation trains it with. To be read beside the paper.

  SEMEncoder   DINOv2's ViT, then L softmaxes over V numbers (Lavoie et al. 2022); codes are their argmax
  DINOHead     MLP and prototypes: what class tokens and patches are compared by     (DINO, DINOv2)
  Distilled    both together: student and teacher of train_encoder.py

Parameters have the names and shapes of the authors' program, so the encoder also takes the ones that DINOv2
published. Shapes: B images, N patches, D = dim, R registers, L = num_latents, V = codebook_size, K prototypes.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from transformer import float32


class Attention(nn.Module):
    """Self-attention (B, N, dim) -> (B, N, dim), under DINOv2's parameter names."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """(..., dim) -> (..., dim), hidden width 4 dim, exact GELU"""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """(..., dim) -> (..., dim): a factor for each channel, `start` at first (Touvron et al. 2021)."""

    def __init__(self, dim, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x):
        return self.gamma * x


class Block(nn.Module):
    """Pre-norm self-attention and MLP, (B, N, dim) -> (B, N, dim). drop_path: probability in 0 ... 1 that an image
    skips a layer, while training"""

    def __init__(self, dim, heads, layerscale, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), MLP(dim)
        self.ls1, self.ls2 = LayerScale(dim, layerscale), LayerScale(dim, layerscale)
        self.drop_path = drop_path

    def kept(self, x):
        if not (self.training and self.drop_path):
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.kept(self.ls1(self.attn(self.norm1(x))))
        return x + self.kept(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D). stem: channels of two 3 x 3 convolutions before the patches are cut; 0: none

    DINOv2 has none. On 28 x 28 pixels, in minutes, the codes are worth more with it.
    """

    def __init__(self, channels, patch, dim, stem):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, stem, 3, padding=1), nn.GELU(),
                                  nn.Conv2d(stem, stem, 3, padding=1), nn.GELU()) if stem else nn.Identity()
        for name, p in self.stem.named_parameters():  # PyTorch's start is small beside its biases: little of y passes
            nn.init.kaiming_normal_(p) if name.endswith("weight") else nn.init.zeros_(p)
        self.proj = nn.Conv2d(stem or channels, dim, patch, stride=patch)

    def forward(self, y):
        return self.proj(self.stem(y)).flatten(2).transpose(1, 2)


class SEMEncoder(nn.Module):
    """Images -> class token and R registers of a ViT's last block, side by side and not normed (`embed`) -> linear
    layer, one norm over all L V numbers -> logits (B, L, V): SEMs are their softmax, codes their argmax.

    What the head is given comes from the SEMs alone: linear layer back to D, then the ViT's own last norm. (The
    authors' program also has a norm `sem_cls_norm`, which it never calls.)

    img_resolution: H = W that `forward` and `embed` bring images to; mean, std: of the channels, for pixels in
    [0, 1]; recompute: in training, keep only what goes into each block, and compute the rest again. Raises ValueError
    for sizes that don't fit each other.
    """

    def __init__(self, img_resolution, img_channels, num_latents, codebook_size, patch=14, dim=1024, layers=24,
                 heads=16, registers=4, stem=0, layerscale=1e-5, drop_path=0.0, recompute=False, mean=(0.5,),
                 std=(0.5,)):
        super().__init__()
        if img_resolution % patch:
            raise ValueError(f"patch {patch} does not divide images of {img_resolution} pixels")
        if dim % heads:
            raise ValueError(f"a Transformer's width must be divisible by its heads: {dim} is not by {heads}")
        self.img_resolution, self.patch, self.dim, self.registers = img_resolution, patch, dim, registers
        self.num_latents, self.codebook_size, self.recompute = num_latents, codebook_size, recompute
        for name, value in (("mean", mean), ("std", std)):
            if len(value) not in (1, img_channels):
                raise ValueError(f"{name} has {len(value)} numbers, the images have {img_channels} channels")
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), persistent=False)
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (img_resolution // patch) ** 2, dim))
        self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(img_channels, patch, dim, stem)
        self.blocks = nn.ModuleList(Block(dim, heads, layerscale, drop_path) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.sem_embed = nn.Linear((1 + registers) * dim, num_latents * codebook_size, bias=False)
        self.sem_norm = nn.LayerNorm(num_latents * codebook_size, eps=1e-6)
        self.sem_out = nn.Linear(num_latents * codebook_size, dim, bias=False)
        init_linear(self)

    def forward(self, y):
        """y: (B, C, H, W) in [-1, 1] -> logits (B, L, V) float32, never under autocast: codes are their argmax"""
        return float32(lambda y: self.logits(self.embed(y)), y)

    def embed(self, y):
        """y: (B, C, H, W) in [-1, 1] -> (B, (1 + R) D), what the SEMs read"""
        if y.shape[2] != self.img_resolution:
            y = F.interpolate(y, (self.img_resolution,) * 2, mode="bicubic", antialias=True)
        return self.tokens(y)[:, :1 + self.registers].flatten(1)

    def tokens(self, y, mask=None):
        """The last block's tokens, before the norm: class, registers, patches. -> (B, 1 + R + N, D)

        y: crops of any size that patches divide; mask: (B, N) bool, patches that the mask token replaces.
        """
        x = self.patch_embed((y - (2 * self.mean - 1)) / (2 * self.std))
        if mask is not None:
            x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        position = positions(self.pos_embed, y.shape[2] // self.patch)
        first = torch.cat([self.cls_token + position[:, :1], self.register_tokens], dim=1)  # registers have no position
        x = torch.cat([first.to(x.dtype).expand(len(x), -1, -1), x + position[:, 1:]], dim=1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        return x

    def logits(self, embedding):
        """(B, (1 + R) D) -> (B, L, V)"""
        return self.sem_norm(self.sem_embed(embedding)).unflatten(1, (self.num_latents, self.codebook_size))

    def read_out(self, sems):
        """SEMs (B, L, V), whose rows sum to 1 -> what the head is given (B, D)"""
        return self.norm(self.sem_out(sems.flatten(1)))

    def features(self, y, mask=None):
        """As in `tokens` -> what the head is given: of the image, by its SEMs (B, D); of the patches (B, N, D)"""
        x = self.tokens(y, mask)
        first, patches = x[:, :1 + self.registers], x[:, 1 + self.registers:]
        return self.read_out(self.logits(first.flatten(1)).softmax(-1)), self.norm(patches)


def positions(pos_embed, side):
    """Position embeddings (1, 1 + N, D) of the class token and a square grid -> of a grid of side x side patches"""
    grid = pos_embed[:, 1:].unflatten(1, (math.isqrt(pos_embed.shape[1] - 1), -1))
    if grid.shape[1] == side:
        return pos_embed
    grid = F.interpolate(grid.permute(0, 3, 1, 2), (side, side), mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def init_linear(module):
    """Linear layers of the module: weights from N(0, 0.02^2), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Prototypes(nn.Module):
    """(..., dim) -> products (..., K) with K vectors, each a direction times a length. DINO keeps the length at 1;
    DINOv2 trains it."""

    def __init__(self, dim, prototypes):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(nn.init.trunc_normal_(torch.empty(prototypes, dim), std=0.02))

    def forward(self, x):
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """(..., D) -> MLP -> l2-normed bottleneck -> (..., K), cosines with prototypes times their lengths"""

    def __init__(self, dim, prototypes, head_hidden, head_bottleneck):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, head_hidden), nn.GELU(), nn.Linear(head_hidden, head_hidden), nn.GELU(),
                                 nn.Linear(head_hidden, head_bottleneck))
        init_linear(self)
        self.last_layer = Prototypes(head_bottleneck, prototypes)

    def forward(self, x):
        return float32(lambda x: self.last_layer(F.normalize(x, dim=-1)), self.mlp(x))


class Distilled(nn.Module):
    """Encoder and heads. shared_head: one head for images and patches, as DLC has it; DINOv2 has two."""

    def __init__(self, img_resolution, img_channels, num_latents, codebook_size, dim=1024, prototypes=65_536,
                 head_hidden=2048, head_bottleneck=256, shared_head=True, **vit):
        super().__init__()
        self.backbone = SEMEncoder(img_resolution, img_channels, num_latents, codebook_size, dim=dim, **vit)
        self.dino_head = DINOHead(dim, prototypes, head_hidden, head_bottleneck)
        self.ibot_head = None if shared_head else DINOHead(dim, prototypes, head_hidden, head_bottleneck)

    def forward(self, whole, small, mask, masked):
        """whole: (b, C, H, W) global crops; small: local crops, or None; mask: (b, N) bool or None, patches to hide;
        masked: int64 (M,), numbers in 0 ... b N - 1 of the patches to look at

        -> products with the prototypes of: global crops (b, K), local crops, these patches (M, K); and what the
        head was given of the global crops (b, D)
        """
        image, patches = self.backbone.features(whole, mask)
        patches = (self.ibot_head or self.dino_head)(patches.flatten(0, 1)[masked])
        local = None if small is None else self.dino_head(self.backbone.features(small)[0])
        return self.dino_head(image), local, patches, image
