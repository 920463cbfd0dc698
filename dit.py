"""
DiT (Peebles & Xie 2023), a Transformer on patches of the image, as a denoiser beside the U-Net.

`DiT.condition` and `DiT.forward` take and return what `UNet`'s do: preconditioning, losses, guidance and
samplers are shared. Codes reach it in DLC's way, averaged into the embedding (model.CodeTable), or in
DisCo-Diff's: patches attend to the latent tokens before each block.

The published DiT is told one of 1,000 time steps, and frequencies of its sinusoids are made for such numbers.
Here the network is told TIME_SCALE c_noise, where c_noise is the process's: ln(sigma) / 4 (EDM, Table 1), or the time
t of flow matching.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from transformer import AdaLNBlock, float32, sinusoids, transformer, zero

TIME_SCALE = 1000
FREQUENCIES = 128  # of the sinusoids that embed a noise level
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the widths of DiT-S, B, L, XL


def layer_norm(dim):
    """Without parameters. (..., dim) -> (..., dim)"""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def positions(side, dim):
    """Fixed sines of each patch's column (the first half of the channels) and row. -> (side^2, dim)"""
    of_side = sinusoids(torch.arange(side), dim // 2).roll(dim // 4, dims=1)  # (side, dim / 2), sines first
    columns, rows = of_side.expand(side, -1, -1), of_side[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


class CrossAttention(nn.Module):
    """Here the codes enter the DiT: patches are queries, latent tokens keys and values (DisCo-Diff sec. 3.3)."""

    def __init__(self, dim, heads, latent_dim):
        super().__init__()
        self.heads, self.norm = heads, layer_norm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(latent_dim, 2 * dim), nn.Linear(dim, dim)

    def keys_values(self, tokens):
        """(B, m, latent_dim) -> two of (B, heads, m, c), once per image"""
        return [t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.kv(tokens).chunk(2, dim=2)]

    def forward(self, x, keys, values):
        q = self.q(self.norm(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype))
        return x + self.proj(a.transpose(1, 2).flatten(2))


class DiTBlock(AdaLNBlock):
    """(B, N, dim), emb (B, dim) -> (B, N, dim): adaLN-zero in DiT's form: layer norms without parameters, GELU in its
    tanh form."""

    def __init__(self, dim, heads, causal=False):
        super().__init__(dim, heads, causal)
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.mlp[1] = nn.GELU(approximate="tanh")


class DiT(nn.Module):
    """Raises ValueError for sizes that don't fit each other."""

    def __init__(self, img_resolution, img_channels, label_dim=0, latent_dim=0, latents_to_emb=False, patch=2,
                 width=384, depth=12, heads=6):
        super().__init__()
        if img_resolution % patch:
            raise ValueError(f"patch {patch} does not divide {img_resolution} pixels")
        if width % 4:
            raise ValueError(f"width {width} must be divisible by 4: sines and cosines of rows and of columns")
        self.patch, self.side, self.emb_dim = patch, img_resolution // patch, width
        self.patches = nn.Conv2d(img_channels, width, patch, stride=patch)
        self.register_buffer("positions", positions(self.side, width), persistent=False)
        # computed as DiT does: sinusoids rounded elsewhere are off by 3e-5 at the time step 999
        frequencies = torch.exp(-math.log(10000) * torch.arange(FREQUENCIES) / FREQUENCIES)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(label_dim + 1, width) if label_dim else None  # the last one: no class
        self.map_latents = nn.Linear(latent_dim, width) if latent_dim and latents_to_emb else None
        self.blocks = transformer(depth, width, heads, block=DiTBlock)
        self.cross = nn.ModuleList(CrossAttention(width, heads, latent_dim) for _ in range(depth if latent_dim else 0))
        self.norm = layer_norm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch ** 2 * img_channels)
        self.initialise()

    def initialise(self):
        """DiT's initial weights: Xavier's, but 0.02 in what embeds time and class, and 0 in what ends a branch."""
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                nn.init.zeros_(layer.bias)
        for layer in (self.time[0], self.time[2], *([self.classes] if self.classes else [])):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.out, self.modulation, *(block.modulation for block in self.blocks),
                      *(cross.proj for cross in self.cross), *([self.map_latents] if self.map_latents else [])):
            zero(layer)

    def condition(self, tokens):
        """Latent tokens (B, m, latent_dim) -> what the network reads of them, {name: tensors (B, ...)}

        "cross0", ...: keys and values of a block's cross-attention; "emb": a part of the embedding.
        """
        condition = {f"cross{i}": cross.keys_values(tokens) for i, cross in enumerate(self.cross)}
        if self.map_latents is not None:
            condition["emb"] = [float32(self.map_latents, tokens.mean(1))]
        return condition

    def forward(self, x, c_noise, labels=None, condition=None):
        """x: (B, C, H, W); c_noise: (B,); labels: (B,) int64, -1 for none, or None

        condition: as above, or "emb" alone; None without latents -> (B, C, H, W)
        """
        condition = condition or {}
        angles = (TIME_SCALE * c_noise).float()[:, None] * self.frequencies
        emb = float32(self.time, torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.classes is not None and labels is not None:
            emb = emb + self.classes(labels % self.classes.num_embeddings)
        if "emb" in condition:
            emb = emb + condition["emb"][0]
        emb = F.silu(emb)
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions  # (B, patches, width)
        for i, block in enumerate(self.blocks):
            if f"cross{i}" in condition:
                x = self.cross[i](x, *condition[f"cross{i}"])
            x = block(x, emb)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=2)
        x = self.out(torch.addcmul(shift, self.norm(x), scale + 1))
        x = x.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.side, self.side))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # from (B, C, rows, p, columns, p)


OURS = {"x_embedder.proj": "patches", "t_embedder.mlp": "time", "y_embedder.embedding_table": "classes",
        ".attn.": ".", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "adaLN_modulation.1": "modulation",
        "final_layer.linear": "out", "final_layer.": ""}


def from_dit(state):
    """A state dict under DiT's names -> under ours. Their table of positions, which is fixed, is left out."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in OURS.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    renamed.pop("pos_embed", None)
    return renamed


def dit_settings(state):
    """The arguments of `DiT` that a state dict under DiT's names was made with, read off its names and shapes. Heads
    leave no trace there: they are among them for the published widths alone."""
    width, _, patch, _ = state["x_embedder.proj.weight"].shape
    label_dim = len(state.get("y_embedder.embedding_table.weight", (0,))) - 1  # the last row: no class
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = {"heads": PUBLISHED_HEADS[width]} if width in PUBLISHED_HEADS else {}
    return dict(patch=patch, width=width, depth=depth, label_dim=label_dim, **heads)


def start_of_dit(state):
    """The state dict of a published DiT, which predicts noise and its variance -> under our names, as a start for D

    The half of the last layer that predicts variances is dropped. The other half changes its sign: where there is
    little noise n, the F of EDM's Eq. 7 is about -n.
    """
    state = from_dit(state)
    _, channels, patch, _ = state["patches.weight"].shape
    for name in ("out.weight", "out.bias"):
        state[name] = -state[name].unflatten(0, (patch ** 2, -1))[:, :channels].flatten(0, 1)
    return state
