"""
U-ViT (Hoogeboom et al. 2023, "simple diffusion"), as DisCo-Diff has it for ImageNet-128: EDM's convolutional blocks
where maps are large, a Transformer where they are small (App. D.1).

The codes' cross-attention follows every convolutional block and every third block of the Transformer.

What follows is chosen here, since the paper leaves it open. The last number of channel_mult gives the Transformer's
width, which a 1 x 1 convolution widens the map to, and another narrows it from; these two and the Transformer are
a residual branch, which starts at zero. Positions are learned. The embedding of noise level and class modulates the
Transformer's blocks too, by adaLN-zero. Heads have 64 channels, as elsewhere in ADM. Dropout acts in the Transformer
alone.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dit import CrossAttention as TokenCrossAttention
from transformer import AdaLNBlock, transformer, zero
from unet import CrossAttention, UNet, UNetBlock, num_heads

EVERY = 3  # blocks of the Transformer to a cross-attention


class UViT(UNet):
    """`condition`, `forward` and arguments are `UNet`'s, for which the levels of channel_mult but the last are a U-Net.

    depth: blocks of the Transformer. recompute: in training, keep only what goes into each block, and compute the rest
    again for the gradients: a third more time, and a fraction of the memory. Raises ValueError for sizes that don't fit
    each other.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, model_channels=128, channel_mult=(1, 2, 4, 16),
                 channel_mult_emb=4, num_blocks=3, attn_resolutions=(64, 32), dropout=0.1, latent_dim=0,
                 latents_to_emb=False, depth=36, recompute=False):
        *of_unet, of_vit = channel_mult
        halvings = len(of_unet)
        if not of_unet or img_resolution % 2 ** halvings:
            raise ValueError(f"images of {img_resolution} pixels can't be halved {halvings} times, for a U-ViT of "
                             f"channel_mult {channel_mult}: it needs two numbers or more, and such a size")
        super().__init__(img_resolution, img_channels, label_dim, model_channels, of_unet, channel_mult_emb, num_blocks,
                         attn_resolutions, 0.0, latent_dim, latents_to_emb)
        self.recompute = recompute
        side, channels, width = img_resolution >> halvings, of_unet[-1] * model_channels, of_vit * model_channels
        for name in ("in0", "in1"):  # the U-Net's own middle
            del self.dec[f"{2 * side}x{2 * side}_{name}"]
        self.down = UNetBlock(channels, channels, self.emb_dim, resample="down")
        self.up = UNetBlock(channels, channels, self.emb_dim, resample="up")
        if latent_dim:
            for block in self.modules():
                if isinstance(block, UNetBlock) and block.cross is None:
                    block.cross = CrossAttention(block.conv1.out_channels, latent_dim)

        self.to_vit, self.from_vit = nn.Conv2d(channels, width, 1), zero(nn.Conv2d(width, channels, 1))
        self.position = nn.Parameter(0.02 * torch.randn(side ** 2, width))
        heads = num_heads(width)
        self.vit = transformer(depth, width, heads, block=partial(AdaLNBlock, emb_dim=self.emb_dim))
        for block in self.vit:
            block.mlp.append(nn.Dropout(dropout))
        self.norm = nn.LayerNorm(width)
        count = depth // EVERY if latent_dim else 0
        self.cross = nn.ModuleList(TokenCrossAttention(width, heads, latent_dim) for _ in range(count))
        for cross in self.cross:
            zero(cross.proj)

    def condition(self, tokens):
        return super().condition(tokens) | {f"vit{i}": cross.keys_values(tokens)
                                            for i, cross in enumerate(self.cross)}

    def forward(self, x, c_noise, labels=None, condition=None):
        condition = condition or {}
        emb, _ = self.embed(c_noise, labels, condition)

        def run(block, x, *inputs):
            if self.recompute and self.training:
                return checkpoint(block, x, *inputs, use_reentrant=False)
            return block(x, *inputs)

        skips = []
        for name, block in self.enc.items():
            x = run(block, x, emb, condition.get(f"enc.{name}")) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        x = run(self.down, x, emb, condition.get("down"))
        tokens = self.to_vit(x).flatten(2).transpose(1, 2) + self.position  # (B, h w, width)
        for i, block in enumerate(self.vit):
            tokens = run(block, tokens, emb)
            if i % EVERY == EVERY - 1 and self.cross:
                tokens = run(self.cross[i // EVERY], tokens, *condition[f"vit{i // EVERY}"])
        x = x + self.from_vit(self.norm(tokens).transpose(1, 2).unflatten(2, x.shape[2:]))
        x = run(self.up, x, emb, condition.get("up"))
        for name, block in self.dec.items():
            if x.shape[1] != block.cin:
                x = torch.cat([x, skips.pop()], dim=1)
            x = run(block, x, emb, condition.get(f"dec.{name}"))
        return self.out_conv(F.silu(self.out_norm(x)))
