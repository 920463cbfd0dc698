"""
The networks of DisCo-Diff (Xu et al. 2024), each readable beside its paragraph of the paper.

  U-Net         ADM's, as EDM (Karras et al. 2022) has it, under EDM's parameter names, with a
                cross-attention to the discrete latents after each self-attention   (sec. 3.3)
  LatentTokens  codes -> codebook embeddings -> 6-layer Transformer: keys and values for the U-Net (App. D.1)
  Encoder       ViT with one class token a latent                                   (sec. 3.3, App. D.1)
  DisCoDiff     denoiser and encoder together, EDM's preconditioning: what stage 1 trains (Eq. 3, Alg. 1)
  Prior         causal Transformer over the codes: what stage 2 trains              (Eq. 4, Alg. 2)
  SEDD          the other prior: discrete diffusion with a mask token, as Discrete Latent Codes (Lavoie et al.
                2025, sec. 4) take it from Lou et al. 2024

This file knows tensors and no files. Shapes: B images, C channels, H = W pixels, m latents with k codes each.
Images are float (B, C, H, W) in [-1, 1], class labels int64 (B,) with -1 for "no class", hard codes
int64 (B, m), soft ones float (B, m, k) with rows that sum to 1.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------
# U-Net (ADM: Dhariwal & Nichol 2021, in EDM's form)


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-5)


def zero(module):
    """A layer that starts at zero, so that its residual branch starts as the identity."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def float32(layer, x):
    """layer(x) in float32 under autocast too: bfloat16 can't tell neighbouring noise levels, nor close logits, apart."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


def num_heads(channels):
    return max(1, channels // 64)  # ADM: 64 channels a head


def sinusoids(t, channels):
    """Embeds numbers (B,), cosines first. -> (B, channels) float32"""
    freqs = (1 / 10000) ** (torch.arange(channels // 2, dtype=torch.float32, device=t.device) / (channels // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class CrossAttention(nn.Module):
    """Image features are the queries, latent tokens the keys and values (sec. 3.3).

    Per head, with pixels x, q = W_q x + b, weights = softmax(q . k / sqrt(c)), and W_p (weights v) is added to the image. As
    (W_q x) . k = x . (W_q' k) and W_p (weights v) = weights (W_p v), both projections go to the m tokens, once an image,
    instead of to the HW pixels at every evaluation.
    """

    def __init__(self, channels, latent_dim):
        super().__init__()
        self.heads = num_heads(channels)
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.kv = nn.Linear(latent_dim, 2 * channels)
        self.proj = zero(nn.Conv2d(channels, channels, 1))  # step 0 equals the network without latents

    def keys_values(self, tokens):
        """(B, m, latent_dim) -> projected keys (B, heads m, C), what the queries' bias adds (B, 1, heads m), values (B, heads m, C)."""
        k, v = (t.unflatten(2, (self.heads, -1)) for t in self.kv(tokens).chunk(2, dim=2))  # (B, m, heads, c)
        k = k / math.sqrt(k.shape[3])
        keys = torch.einsum("bmhc,hcd->bhmd", k, self.q.weight.flatten(1).unflatten(0, (self.heads, -1)))
        bias = torch.einsum("bmhc,hc->bhm", k, self.q.bias.unflatten(0, (self.heads, -1)))
        values = torch.einsum("bmhc,dhc->bhmd", v, self.proj.weight.flatten(1).unflatten(1, (self.heads, -1)))
        values = values + self.proj.bias / self.heads  # a head's weights sum to 1
        return keys.flatten(1, 2), bias.flatten(1)[:, None], values.flatten(1, 2)

    def forward(self, x, keys, bias, values):
        queries = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2)).unflatten(2, (self.heads, -1))  # (B, HW, heads, m)
        a = scores.softmax(3).flatten(2) @ values
        return x + a.transpose(1, 2).unflatten(2, x.shape[2:])


class UNetBlock(nn.Module):
    """ADM's residual block: convolutions modulated by the embedding, then self- and cross-attention."""

    def __init__(self, cin, cout, emb_dim, attention=False, latent_dim=0, resample=None, dropout=0.0):
        super().__init__()
        self.cin, self.resample, self.dropout, self.heads = cin, resample, dropout, num_heads(cout)
        self.norm0 = group_norm(cin)
        self.conv0 = nn.Conv2d(cin, cout, 3, padding=1)
        self.affine = nn.Linear(emb_dim, 2 * cout)
        self.norm1 = group_norm(cout)
        self.conv1 = zero(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.qkv = self.cross = None
        if attention:
            self.norm2 = group_norm(cout)
            self.qkv = nn.Conv2d(cout, 3 * cout, 1)
            self.proj = zero(nn.Conv2d(cout, cout, 1))
            if latent_dim:
                self.cross = CrossAttention(cout, latent_dim)

    def resized(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def self_attention(self, x):
        # EDM has q, k and v interleaved in the output channels: head, channel within head, then q/k/v. Sorted here in
        # the weights, which are small: interleaved activations are nothing that flash attention takes
        weight, bias = (p.unflatten(0, (self.heads, -1, 3)).movedim(2, 0).flatten(0, 2) for p in self.qkv.parameters())
        qkv = F.conv2d(x, weight, bias).flatten(2).chunk(3, dim=1)
        a = F.scaled_dot_product_attention(*(t.unflatten(1, (self.heads, -1)).transpose(2, 3) for t in qkv))  # (B, heads, HW, c)
        return self.proj(a.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:]))  # channels last, as it came

    def forward(self, x, emb, keys_values=None):
        h = self.conv0(self.resized(F.silu(self.norm0(x))))
        scale, shift = float32(self.affine, emb).to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        x = self.skip(self.resized(x)) + self.conv1(F.dropout(h, self.dropout, self.training))
        if self.qkv is not None:
            x = x + self.self_attention(self.norm2(x))
        if self.cross is not None:
            x = self.cross(x, *keys_values)
        return x


class UNet(nn.Module):
    """ADM's U-Net under EDM's names ("enc.8x8_block0.conv0.weight"), so that EDM's weights load into it.

    attn_resolutions: feature map sizes at which blocks have attention (the bottleneck always has it).
    latent_dim: width of the latent tokens that the cross-attentions read; 0 builds plain EDM.
    Raises ValueError where the levels do not divide the image.
    """

    def __init__(self, img_resolution, img_channels, label_dim, model_channels=192, channel_mult=(1, 2, 3, 4),
                 channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1, latent_dim=0):
        super().__init__()
        levels = len(channel_mult)
        if img_resolution % 2 ** (levels - 1):
            raise ValueError(f"images of {img_resolution} pixels can't be halved {levels - 1} times: "
                             f"take a size divisible by {2 ** (levels - 1)}, or fewer levels in channel_mult")
        for width in (c * model_channels for c in channel_mult):
            if width < 4 or width % min(32, width // 4) or width % num_heads(width):
                raise ValueError(f"{width} channels can't be shared among the groups of group norm (4 or more channels, "
                                 "32 groups at most) and attention's heads: choose another model_channels")
        resolutions = [img_resolution >> i for i in range(levels)]
        if missing := set(attn_resolutions) - set(resolutions):
            raise ValueError(f"attn_resolutions has {sorted(missing)}: the feature maps are {resolutions}")
        emb_dim = model_channels * channel_mult_emb
        self.map_layer0 = nn.Linear(model_channels, emb_dim)
        self.map_layer1 = nn.Linear(emb_dim, emb_dim)
        self.map_label = nn.Linear(label_dim, emb_dim, bias=False) if label_dim else None
        if label_dim:
            nn.init.normal_(self.map_label.weight)

        def block(cin, cout, attention=False, resample=None):
            return UNetBlock(cin, cout, emb_dim, attention, latent_dim, resample, dropout)

        self.enc = nn.ModuleDict()
        widths = [c * model_channels for c in channel_mult]
        channels, skips = widths[0], [widths[0]]
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = nn.Conv2d(img_channels, channels, 3, padding=1)
        for level, (res, width) in enumerate(zip(resolutions, widths)):
            if level:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, resample="down")
                skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(channels, width, res in attn_resolutions)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (res, width) in reversed(list(enumerate(zip(resolutions, widths)))):
            if level == levels - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, resample="up")
            for i in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(channels + skips.pop(), width, res in attn_resolutions)
                channels = width
        self.out_norm = group_norm(channels)
        self.out_conv = zero(nn.Conv2d(channels, img_channels, 3, padding=1))

    def keys_values(self, tokens):
        """(B, m, latent_dim) -> the keys and values of every cross-attention, in the order of `forward`."""
        blocks = [*self.enc.values(), *self.dec.values()]
        return [b.cross.keys_values(tokens) for b in blocks if getattr(b, "cross", None) is not None]

    def forward(self, x, c_noise, labels=None, keys_values=()):
        """x: (B, C, H, W); c_noise: (B,); labels: (B,) int64, -1 for none; keys_values: see above."""
        emb = F.silu(float32(self.map_layer0, sinusoids(c_noise, self.map_layer0.in_features)))
        emb = float32(self.map_layer1, emb)
        if self.map_label is not None and labels is not None:
            one_hot = labels[:, None] == torch.arange(self.map_label.in_features, device=x.device)
            emb = emb + float32(self.map_label, one_hot)  # label -1: a row of zeros
        emb = F.silu(emb)

        keys_values, skips = iter(keys_values), []

        def run(block, x):
            return block(x, emb, next(keys_values) if block.cross is not None else None)

        for block in self.enc.values():
            x = run(block, x) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if x.shape[1] != block.cin:
                x = torch.cat([x, skips.pop()], dim=1)
            x = run(block, x)
        return self.out_conv(F.silu(self.out_norm(x)))


def edm_settings(state):
    """The arguments of `UNet` that a state dict under EDM's names ("model.enc.64x64_conv.weight", ...) was
    made with, read off its names and shapes. Dropout leaves no trace there, and is not among them."""
    shapes = {name.removeprefix("model."): tuple(t.shape) for name, t in state.items()}
    resolutions = sorted({int(n.split(".")[1].split("x")[0]) for n in shapes if n.startswith("enc.")}, reverse=True)
    image = resolutions[0]
    model_channels = shapes["map_layer0.weight"][1]
    widths = [shapes[f"enc.{r}x{r}_block0.conv0.weight"][0] for r in resolutions]
    return dict(
        img_resolution=image,
        img_channels=shapes[f"enc.{image}x{image}_conv.weight"][1],
        label_dim=shapes.get("map_label.weight", (0, 0))[1],
        model_channels=model_channels,
        channel_mult=tuple(w // model_channels for w in widths),
        channel_mult_emb=shapes["map_layer0.weight"][0] // model_channels,
        num_blocks=sum(n.startswith(f"enc.{image}x{image}_block") and n.endswith(".conv0.weight") for n in shapes),
        attn_resolutions=tuple(r for r in resolutions if f"enc.{r}x{r}_block0.qkv.weight" in shapes),
    )


# ----------------------------------------------------------------------------------------------------
# Transformer blocks, shared by the latent tokens, the encoder and the prior


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, dim, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def attention(self, x, cache=None):
        """x: (B, T, dim). `cache`: a list of this block's (keys, values) so far, for generation one token
        at a time; it is extended in place."""
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
    """One that an embedding (B, dim), after its SiLU, modulates: adaLN-zero (DiT: Peebles & Xie 2023, sec. 3.2). Starts
    as the identity."""

    def __init__(self, dim, heads, causal=False):
        super().__init__(dim, heads, causal)
        self.modulation = zero(nn.Linear(dim, 6 * dim))

    def forward(self, x, emb):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attention(torch.addcmul(shift1, self.norm1(x), scale1 + 1))
        return x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), scale2 + 1))


def transformer(layers, dim, heads, causal=False, block=TransformerBlock):
    if dim % heads:
        raise ValueError(f"a Transformer's width must be divisible by its heads: {dim} is not by {heads}")
    blocks = nn.ModuleList(block(dim, heads, causal) for _ in range(layers))
    for name, p in blocks.named_parameters():
        if name.endswith(("proj.weight", "mlp.2.weight")):
            p.data /= math.sqrt(2 * layers)  # GPT-2's: the residual stream keeps its scale
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return blocks


# ----------------------------------------------------------------------------------------------------
# discrete latents


def gumbel_softmax(logits, tau, gumbel):
    """Relaxed one-hot sample of the categorical with these logits (Jang et al. 2016; App. D.2).

    logits: (..., k); tau > 0: its smoothness; gumbel: Gumbel(0, 1) noise of the logits' shape.
    -> (..., k), rows sum to 1. As tau -> 0 it becomes one-hot at argmax(logits + gumbel), which is an
    exact sample: that limit is `draw_codes`.
    """
    return torch.softmax((logits + gumbel) / tau, dim=-1)


def draw_codes(logits, gumbel):
    """Hard sample of the categorical with these logits: `gumbel_softmax` at tau -> 0. -> int64 (...)

    App. D.2 extracts codes with tau = 0.01, which is one-hot but for rounding: a sample, not argmax(logits).
    """
    return (logits + gumbel).argmax(dim=-1)


def seed_of(purpose, *key):
    """A 64-bit seed that depends on this word and these non-negative integers alone."""
    # the length goes in since numpy takes (1,) and (1, 0) for the same
    words = np.random.SeedSequence((zlib.crc32(purpose.encode()), len(key), *key)).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])


def seeded_generator(device, purpose, *key):
    """A torch generator with that seed (of which torch uses 32 bits on a CPU)."""
    return torch.Generator(device).manual_seed(seed_of(purpose, *key))


def gumbel_noise(shape, generator):
    """Gumbel(0, 1) noise, drawn on the generator's device: -log of an exponential variable."""
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()


class LatentTokens(nn.Module):
    """Codes -> codebook embeddings -> Transformer (App. D.1: 6 layers, width 192). -> (B, m, dim)

    It depends on neither x nor sigma: at sampling time it runs once an image.
    """

    def __init__(self, num_latents, codebook_size, dim=192, layers=6, heads=3):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(num_latents, codebook_size, dim))
        self.null = nn.Parameter(torch.randn(dim))  # in place of all m embeddings: "no latents"
        self.blocks = transformer(layers, dim, heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, z, drop=None):
        """z: (B, m, k) relaxed or one-hot; drop: (B,) bool, images that get the null embedding."""
        x = torch.einsum("bmk,mkd->bmd", z.to(self.codebook.dtype), self.codebook).float()
        if drop is not None:
            x = torch.where(drop[:, None, None], self.null, x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Encoder(nn.Module):
    """ViT that gives each discrete latent a class token and a linear head of its own (sec. 3.3, App. D.1).

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
        # logits of standard deviation 2: codes that tell images apart from the first step on, which the denoiser
        # can learn to use before the encoder learns that noise in its codes does harm, and collapses
        self.head = nn.Parameter(2 * torch.randn(num_latents, dim, codebook_size) / math.sqrt(dim))

    def forward(self, y):
        x = self.patches(y).flatten(2).transpose(1, 2) + self.position  # (B, patches, dim)
        x = torch.cat([self.class_tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, :len(self.class_tokens)])
        return float32(lambda x: torch.einsum("bmd,mdk->bmk", x, self.head), x)


class DisCoDiff(nn.Module):
    """Denoiser D(x, sigma, z, c) in EDM's preconditioning, and encoder E(y): what stage 1 trains together.

    num_latents = 0 leaves plain EDM: no encoder, no cross-attention.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, num_latents=10, codebook_size=100, latent_dim=192,
                 latent_layers=6, latent_heads=3, encoder_patch=8, encoder_dim=768, encoder_layers=12,
                 encoder_heads=12, sigma_data=0.5, **unet):
        super().__init__()
        self.img_shape = (img_channels, img_resolution, img_resolution)
        self.label_dim, self.num_latents, self.codebook_size = label_dim, num_latents, codebook_size
        self.sigma_data = sigma_data
        self.model = UNet(img_resolution, img_channels, label_dim, latent_dim=latent_dim if num_latents else 0, **unet)
        if num_latents:
            self.latents = LatentTokens(num_latents, codebook_size, latent_dim, latent_layers, latent_heads)
            self.encoder = Encoder(img_resolution, img_channels, num_latents, codebook_size,
                                   encoder_patch, encoder_dim, encoder_layers, encoder_heads)

    def condition(self, z, drop=None):
        """Everything about z that depends on neither x nor sigma: once an image, not once an evaluation.

        z: (B, m, k) relaxed, (B, m) int64 hard codes; with drop (B,) bool, null latents where True.
        -> the `keys_values` of `denoise`; () without latents. Hard codes must lie in 0 ... k - 1.
        """
        if not self.num_latents:
            return ()
        if z.ndim == 2:
            z = F.one_hot(z, self.codebook_size)
        return self.model.keys_values(self.latents(z, drop))

    def denoise(self, x, sigma, labels=None, keys_values=()):
        """D(x; sigma), EDM Eq. 7 and Table 1. x: (B, C, H, W) = y + sigma n; sigma: (B,) -> (B, C, H, W) float32."""
        sigma, sd = sigma.float().reshape(-1, 1, 1, 1), self.sigma_data
        c_skip = sd ** 2 / (sigma ** 2 + sd ** 2)
        c_out = sigma * sd / (sigma ** 2 + sd ** 2).sqrt()
        c_in = 1 / (sigma ** 2 + sd ** 2).sqrt()
        c_noise = sigma.flatten().log() / 4
        return c_skip * x + c_out * self.model(c_in * x, c_noise, labels, keys_values).float()

    def forward(self, y, noise, sigma, labels=None, gumbel=None, drop=None, tau=1.0):
        """Alg. 1: infer z from the clean images y, denoise y + noise with it.

        y, noise: (B, C, H, W), noise already scaled by sigma (B,); gumbel: (B, m, k); drop: (B,) bool.
        -> D (B, C, H, W) and the encoder's logits (B, m, k), None without latents.
        """
        logits, keys_values = None, ()
        if self.num_latents:
            logits = self.encoder(y)
            keys_values = self.condition(gumbel_softmax(logits, tau, gumbel), drop)
        return self.denoise(y + noise, sigma, labels, keys_values), logits


# ----------------------------------------------------------------------------------------------------
# what both training scripts do with their gradients


def guarded_step(optimizer, norm, skipped):
    """An optimiser's step, or, where the norm of all gradients is not finite, none: weights and moments stay as they are.

    optimizer: a fused one; skipped: float (2,), which counts the steps that were left out, those in a row and all. Nothing
    here waits for the device. -> whether this one was left out, a bool tensor
    """
    bad = ~norm.isfinite()
    optimizer.found_inf = bad.float()  # GradScaler's way to tell a fused optimiser; 1: change nothing
    optimizer.step()
    optimizer.zero_grad()
    skipped.add_(bad)
    skipped[0] *= bad
    return bad


# ----------------------------------------------------------------------------------------------------
# priors: autoregressive


def class_rows(table, labels, batch):
    """Embeddings (B, dim) of class labels (B,), -1 for none, from a table (classes + 1, dim) whose last row is "no class".

    labels = None, or a table without classes: "no class" for all of the batch.
    """
    if labels is None or len(table) == 1:
        labels = torch.full((batch,), -1, device=table.device)
    return table[labels]


def mean_bits(prior, logits, labels, draws, g_codes, g_times):
    """-log2 p(z | c), or SEDD's bound on it, of codes z drawn from the encoder's logits (B, m, k): means over draws, (B,)"""
    nats = 0
    for _ in range(draws):
        nats += prior.nats(draw_codes(logits, gumbel_noise(logits.shape, g_codes)), labels, g_times)
    return nats / draws / math.log(2)


class Prior(nn.Module):
    """Autoregressive prior over codes, p(z_i | z_<i, c): causal Transformer (Eq. 4, App. D.1).

    label_dim = 0: not class-conditional. Its first token is the class, or "no class".
    """

    def __init__(self, num_latents, codebook_size, label_dim=0, layers=12, dim=512, heads=8):
        super().__init__()
        self.num_latents, self.codebook_size, self.label_dim = num_latents, codebook_size, label_dim
        self.class_token = nn.Parameter(0.02 * torch.randn(label_dim + 1, dim))  # the last one: "no class"
        self.codebook = nn.Parameter(0.02 * torch.randn(codebook_size, dim))
        self.position = nn.Parameter(0.02 * torch.randn(num_latents, dim))
        self.blocks = transformer(layers, dim, heads, causal=True)
        self.norm = nn.LayerNorm(dim)
        self.head = zero(nn.Linear(dim, codebook_size))  # starts uniform: log2 k bits a code

    def first_token(self, labels, batch):
        return class_rows(self.class_token, labels, batch)[:, None]  # (B, 1, dim)

    def forward(self, codes, labels=None):
        """codes: (B, m) int64; labels: (B,) int64, -1 for none -> logits (B, m, k); row i sees codes < i only."""
        x = torch.cat([self.first_token(labels, len(codes)), self.codebook[codes[:, :-1]]], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return float32(self.head, self.norm(x))

    def nats(self, codes, labels=None, generator=None):
        """-ln p(codes | labels), (B,); the generator is for `SEDD.nats`, which has the same signature."""
        return F.cross_entropy(self(codes, labels).transpose(1, 2), codes, reduction="none").sum(1)

    @torch.no_grad()
    def sample(self, gumbel, labels=None, temperature=1.0):
        """Ancestral sampling with a key-value cache (Alg. 3, lines 3-5).

        gumbel: (B, m, k) noise that decides the draws; temperature divides the logits, 0 takes the mode.
        -> codes (B, m) int64
        """
        caches = [[] for _ in self.blocks]
        x, codes = self.first_token(labels, len(gumbel)), []
        for i in range(self.num_latents):
            x = x + self.position[i]
            for block, cache in zip(self.blocks, caches):
                x = block(x, cache)
            logits = float32(self.head, self.norm(x))[:, 0]  # (B, k)
            codes.append(draw_codes(logits, temperature * gumbel[:, i]))  # = logits / T + gumbel
            x = self.codebook[codes[-1]][:, None]
        return torch.stack(codes, dim=1)


# ----------------------------------------------------------------------------------------------------
# priors: SEDD-absorb (Lou et al. 2024; Discrete Latent Codes, sec. 4). Tokens 0 ... V - 1 and a mask token V, with
# V = k; t runs from 0, the codes, to 1, where the share 1 - EPS is masked (samplers start from all mask). Log-scores
# are (B, m, V + 1), of which the last column, the mask's, says nothing; the true score of token y at a masked
# position is p(x0 = y | what is unmasked) / (e^sigma - 1).

EPS = 1e-3


def log_linear(t):
    """Noise of time t in [0, 1] -> sigma, dsigma/dt. The probability of mask, 1 - e^-sigma, is (1 - EPS) t."""
    return -torch.log1p(-(1 - EPS) * t), (1 - EPS) / (1 - (1 - EPS) * t)


def absorb(codes, t, u, mask):
    """Codes (B, m) at times t (B,): each token is `mask` with probability (1 - EPS) t; u: (B, m) uniform on [0, 1)."""
    return torch.where(u < (1 - EPS) * t[:, None], mask, codes)


def score_entropy(log_score, sigma, x, x0):
    """How far these scores are from those that x0 has (Lou et al. 2024): 0 at the least, and where x is no mask.

    log_score: (B, m, V + 1); sigma: (B,); x: (B, m) noisy tokens; x0: (B, m) the codes. -> (B, m) nats, in
    float32 or better
    """
    log_score = log_score.to(torch.promote_types(log_score.dtype, torch.float32))[..., :-1]
    a = 1 / torch.expm1(sigma)[:, None]  # the ratio: expm1, as sigma goes down to 1e-3
    own = log_score.gather(2, x0[..., None])[..., 0]
    entropy = log_score.exp().sum(2) - a * own + a * (a.log() - 1)
    return torch.where(x == log_score.shape[2], entropy, 0)


def sedd_loss(log_score, t, x, x0):
    """Denoising score entropy, weighted by dsigma/dt: on average over t and x a bound on -ln p(x0), but for terms of
    the order of EPS that are left out. `SEDD.nats` leaves out none. -> (B,) nats
    """
    sigma, dsigma = log_linear(t)
    return dsigma * score_entropy(log_score, sigma, x, x0).sum(1)


def step_probs(rate, log_score, x):
    """A masked position becomes y with probability rate_b s_y, the rest stays masked; other positions stay as they are."""
    p = F.pad(rate[:, None, None] * log_score[..., :-1].exp(), (0, 1))
    p[..., -1] = 1 - p.sum(2)
    return torch.where(x[..., None] == p.shape[2] - 1, p, F.one_hot(x, p.shape[2]).to(p.dtype))


def analytic_probs(log_score, x, t, s):
    """Tweedie tau-leaping from t to s, both (B,) (Lou et al. 2024). -> (B, m, V + 1), rows sum to 1

    A wrong score can make "stays masked" negative, as it can for `euler_probs`.
    """
    return step_probs(torch.expm1(log_linear(t)[0] - log_linear(s)[0]), log_score, x)


def euler_probs(log_score, x, t, s):
    """An Euler step from t to s. For the log-linear noise it is the analytic one: both rates are the same number."""
    return step_probs((t - s) * log_linear(t)[1], log_score, x)


def denoise_probs(log_score, x, t):
    """The last step, to t = 0: without the mask. -> (B, m, V), in proportion to the probabilities"""
    return analytic_probs(log_score, x, t, torch.zeros_like(t))[..., :-1]


class SEDD(nn.Module):
    """The network of log-scores: a bidirectional Transformer that time and class modulate, DiT's blocks (Lou et al. have
    rotary positions, and no class).

    label_dim = 0: not class-conditional. Samplers: `first_hitting` and `tau_leaping` in sample.py.
    """

    def __init__(self, num_latents, codebook_size, label_dim=0, layers=12, dim=512, heads=8):
        super().__init__()
        if dim % 2:
            raise ValueError(f"the width of the SEDD prior must be even, for its sines and cosines: {dim} is not")
        self.num_latents, self.codebook_size, self.label_dim = num_latents, codebook_size, label_dim
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Parameter(0.02 * torch.randn(label_dim + 1, dim))  # the last one: "no class"
        self.codebook = nn.Parameter(0.02 * torch.randn(codebook_size + 1, dim))  # the last one: mask
        self.position = nn.Parameter(0.02 * torch.randn(num_latents, dim))
        self.blocks = transformer(layers, dim, heads, block=AdaLNBlock)
        self.norm = nn.LayerNorm(dim)
        self.modulation = zero(nn.Linear(dim, 2 * dim))
        self.head = zero(nn.Linear(dim, codebook_size))  # starts uniform

    def forward(self, x, t, labels=None):
        """x: (B, m) int64, mask = k; t: (B,) in (0, 1]; labels: (B,) int64, -1 for none -> log-scores (B, m, k + 1)"""
        emb = float32(self.time, sinusoids(1000 * t, self.position.shape[1])) + class_rows(self.label, labels, len(x))
        emb = F.silu(emb)
        h = self.codebook[x] + self.position
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=2)
        logits = float32(self.head, torch.addcmul(shift, self.norm(h), scale + 1))
        sigma = log_linear(t.float())[0][:, None, None]
        log_score = F.pad(logits - torch.expm1(sigma).log() - math.log(self.codebook_size), (0, 1))
        return log_score.scatter(2, x[..., None], 0)  # the score of the token that is there is 1

    def nats(self, codes, labels=None, generator=None):
        """At least -ln p(codes | labels) of `first_hitting`, on average over the generator: (B,), m evaluations. Its
        negative ELBO, where what is unseen is the time in (0, 1] at which each token unmasks."""
        nats, rows = 0, torch.arange(len(codes), device=codes.device)
        unmasked_at = 1 - torch.rand(codes.shape, generator=generator, device=codes.device)
        times, order = unmasked_at.sort(dim=1, descending=True)
        for t, i in zip(times.T, order.T):
            x = torch.where(unmasked_at <= t[:, None], self.codebook_size, codes)
            nats += F.cross_entropy(self(x, t, labels)[rows, i, :-1], codes[rows, i], reduction="none")
        return nats
