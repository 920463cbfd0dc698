"""
Transformer blocks for the latent tokens, the encoder and the priors, and three small helpers.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def zero(module):
    """Sets a layer to zero: a residual block that ends in it starts as the identity. -> the layer"""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def float32(layer, x):
    """layer(x) in float32, even under autocast: bfloat16 confuses close noise levels or logits."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


def sinusoids(t, channels):
    """Embeds numbers (B,) as cosines, then sines. -> (B, channels) float32"""
    freqs = (1 / 10000) ** (torch.arange(channels // 2, dtype=torch.float32, device=t.device) / (channels // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP. x: (B, T, dim) -> (B, T, dim)"""

    def __init__(self, dim, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def attention(self, x, cache=None):
        """cache: the keys and values so far, a list updated in place, to generate token by token."""
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            cache[:] = [k, v]
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and cache is None)  # (B, heads, T, c)
        return self.proj(a.transpose(1, 2).flatten(2))

    def forward(self, x, cache=None):
        x = x + self.attention(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class AdaLNBlock(TransformerBlock):
    """adaLN-zero: an embedding (B, emb_dim), already through SiLU, modulates the block, which starts as the
    identity (DiT: Peebles & Xie 2023, sec. 3.2). emb_dim: 0 for dim."""

    def __init__(self, dim, heads, causal=False, emb_dim=0):
        super().__init__(dim, heads, causal)
        self.modulation = zero(nn.Linear(emb_dim or dim, 6 * dim))

    def forward(self, x, emb):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attention(torch.addcmul(shift1, self.norm1(x), scale1 + 1))
        return x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), scale2 + 1))


def transformer(layers, dim, heads, causal=False, block=TransformerBlock):
    """-> a ModuleList of blocks. Raises ValueError if the heads do not divide the width."""
    if dim % heads:
        raise ValueError(f"a Transformer's width must be divisible by its heads: {dim} is not by {heads}")
    blocks = nn.ModuleList(block(dim, heads, causal) for _ in range(layers))
    for name, p in blocks.named_parameters():
        if name.endswith(("proj.weight", "mlp.2.weight")):
            p.data /= math.sqrt(2 * layers)  # as in GPT-2: the residual stream keeps its scale
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return blocks
