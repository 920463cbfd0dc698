"""
The masked diffusion language model LLaDA (Nie et al. 2025): its Transformer, under its weights' names; its loss; its
sampler. Discrete Latent Codes makes such a model write codes (text.py).

A token is masked, or as it is. Of a text in which each token is masked with probability p, the network predicts what
the masks hide, all at once; p itself, the time, is not told. Samplers start from masks, and put tokens in their
places, a few in each step; a token once there stays.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from transformer import float32

EPS = 1e-3

# ----------------------------------------------------------------------------------------------------
# loss


def mask_rate(t):
    """Times t in [0, 1) -> the probability of a mask, from EPS to 1."""
    return (1 - EPS) * t + EPS


def token_losses(logits, ids, p):
    """-ln p(token) / p, of masked tokens, in nats. logits: (N, V); ids: (N,) the tokens; p: (N,) their mask_rate.

    Their sum over the masked tokens of a text is, on average over masks and p, an upper bound on -ln p(text).
    (DLC's program divides by the number of masked tokens, which weights texts with few masks more.)
    """
    return F.cross_entropy(logits.float(), ids, reduction="none") / p


# ----------------------------------------------------------------------------------------------------
# sampling


def shares(masks, steps):
    """How many of `masks` tokens to place in each step: equally many, the first ones more. -> list of int"""
    return [masks // steps + (i < masks % steps) for i in range(steps)]


@torch.no_grad()
def unmask(predict, x, mask, steps, gumbel=None, temperature=0.0, rand=None, block=0):
    """Places a token wherever x is `mask`, in `steps` evaluations. -> tokens (B, m)

    predict(x): logits (B, m, V), -inf for tokens that a place can't have; x: int64 (B, m).
    gumbel(*shape) draws Gumbel(0, 1) noise (B, *shape), whose weight is the temperature: 0 takes the likeliest token.
    The most probable of the tokens stay in each step ("low-confidence remasking"), or those of random places, if
    rand(*shape) draws uniform numbers (B, *shape). block: how many places are filled before those to the right of
    them; 0: all. Blocks share the steps by their places: `steps` is from the number of blocks to m.
    """
    m = x.shape[1]
    for start in range(0, m, block or m):
        end = min(start + (block or m), m)
        for count in shares(end - start, steps * end // m - steps * start // m):
            logits = predict(x)
            noise = temperature * gumbel(*logits.shape[1:]) if temperature else 0
            token = (logits + noise).argmax(-1)
            p = logits.softmax(-1).gather(2, token[..., None])[..., 0]  # without the noise
            confidence = torch.where(x == mask, rand(m) if rand else p, -math.inf)
            chosen = start + confidence[:, start:end].topk(count, dim=1).indices
            x = x.scatter(1, chosen, token.gather(1, chosen))
    return x


# ----------------------------------------------------------------------------------------------------
# the network: LLaMA's, without its causal mask


def rotations(length, size, theta, device):
    """Rotary positions (Su et al. 2021). -> cosines, sines (length, size), which turn entries i and i + size / 2"""
    freqs = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * freqs.repeat(2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x: (B, heads, T, size), in float32 as in LLaDA's program"""
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class Block(nn.Module):
    """Attention, then SwiGLU. x: (B, T, dim) -> (B, T, dim)"""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ff_norm = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, cos, sin, seen):
        h = self.attn_norm(x)
        q, k, v = (layer(h).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        a = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=seen)
        x = x + self.attn_out(a.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDA(nn.Module):
    """Tokens int64 (B, T) -> logits (N, V) at N of their places.

    theta: of the rotary positions. places: that many, from the first, have an embedding of their own besides; LLaDA has
    none. recompute: in training, keep only what goes into each block, and compute the rest again for the gradients.
    Raises ValueError for sizes that don't fit each other.
    """

    def __init__(self, vocabulary, layers=32, dim=4096, heads=32, hidden=12_288, theta=500_000.0, places=0,
                 recompute=False):
        super().__init__()
        if dim % (2 * heads):
            raise ValueError(f"each head's width must be an even number, for rotary positions: {dim} / {heads} is not")
        self.size, self.theta, self.recompute = dim // heads, theta, recompute
        self.wte = nn.Embedding(vocabulary, dim)
        self.place = nn.Parameter(0.3 * torch.randn(places, dim)) if places else None
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(layers))
        self.ln_f = nn.RMSNorm(dim, eps=1e-5)
        self.ff_out = nn.Linear(dim, vocabulary, bias=False)
        for name, p in self.blocks.named_parameters():
            if p.ndim == 2:  # products keep the scale of what they are given; so does the residual stream
                last = name.endswith(("attn_out.weight", "ff_out.weight"))
                nn.init.normal_(p, std=p.shape[1] ** -0.5 / (math.sqrt(2 * layers) if last else 1))
        nn.init.normal_(self.wte.weight, std=0.3)
        nn.init.zeros_(self.ff_out.weight)  # starts uniform

    def forward(self, x, real, at):
        """x: (B, T); real: (B, T) bool, False for padding, which no token sees; at: (B, T) bool, the N places"""
        cos, sin = rotations(x.shape[1], self.size, self.theta, x.device)
        seen = real[:, None, None]  # (B, 1, 1, T), for all heads and all tokens
        x = self.wte(x)
        if self.place is not None:
            x = x + F.pad(self.place, (0, 0, 0, x.shape[1] - len(self.place)))
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, cos, sin, seen, use_reentrant=False)
            else:
                x = block(x, cos, sin, seen)
        return float32(self.ff_out, self.ln_f(x[at]))
