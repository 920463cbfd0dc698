"""
ADM's U-Net (Dhariwal & Nichol 2021) in EDM's form and with EDM's parameter names (Karras et al. 2022).
A cross-attention to the discrete latents follows each self-attention (DisCo-Diff sec. 3.3).

A code's way into the picture: `UNet.condition` prepares the latent tokens for every block, once per
image; `UNet.forward` hands each block its part; `UNetBlock.forward` ends in `CrossAttention.forward`.
With latents_to_emb the mean token also joins the embedding of noise level and class, which modulates
every block. DLC's way is that alone (DLC sec. 5): there is no cross-attention, and model.CodeTable
makes the part of the embedding.

With groups of latents, each group has one resolution of the up-sampling branch to itself (sec. 3.3, Fig. 5):
cross-attention and the mean token's part of the embedding act there, and nowhere else.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from transformer import float32, sinusoids, zero


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-5)


def num_heads(channels):
    return max(1, channels // 64)  # ADM: 64 channels per head


def size_of(name):
    """The feature map's size in a block's name: 8x8 for dec.8x8_block0, and for 8x8_block0."""
    return name.split(".")[-1].split("_")[0]


class CrossAttention(nn.Module):
    """Here the codes enter the U-Net: pixels are queries, latent tokens keys and values (sec. 3.3).

    Per head of c channels, with normed pixels x and tokens s, the layer adds W_p a + b_p to the
    image, where

        q = W_q x + b_q;  k, v = W_kv s + b_kv
        a = softmax(q . k / sqrt(c)) v

    Since (W_q x) . k = x . (W_q' k) and W_p (weights v) = weights (W_p v), `keys_values` applies
    W_q and W_p to the m tokens, once per image, instead of to the HW pixels at each evaluation. The
    sums are the same.
    """

    def __init__(self, channels, latent_dim):
        super().__init__()
        self.heads = num_heads(channels)
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.kv = nn.Linear(latent_dim, 2 * channels)
        self.proj = zero(nn.Conv2d(channels, channels, 1))  # at step 0, the latents change nothing

    def keys_values(self, tokens):
        """tokens: (B, m, latent_dim)

        -> W_q' k (B, heads m, C), b_q . k (B, 1, heads m), W_p v + b_p (B, heads m, C)
        """
        k, v = (t.unflatten(2, (self.heads, -1)) for t in self.kv(tokens).chunk(2, dim=2))  # (B, m, heads, c)
        k = k / math.sqrt(k.shape[3])
        keys = torch.einsum("bmhc,hcd->bhmd", k, self.q.weight.flatten(1).unflatten(0, (self.heads, -1)))
        bias = torch.einsum("bmhc,hc->bhm", k, self.q.bias.unflatten(0, (self.heads, -1)))
        values = torch.einsum("bmhc,dhc->bhmd", v, self.proj.weight.flatten(1).unflatten(1, (self.heads, -1)))
        values = values + self.proj.bias / self.heads  # a head's weights sum to 1
        return keys.flatten(1, 2), bias.flatten(1)[:, None], values.flatten(1, 2)

    def forward(self, x, keys, bias, values):
        """x: (B, C, H, W); the rest as `keys_values` returns it"""
        queries = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2))
        scores = scores.unflatten(2, (self.heads, -1))  # (B, HW, heads, m)
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
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for t in self.qkv(x).chunk(3, dim=1))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        return self.proj(a.transpose(1, 2).unflatten(2, x.shape[2:]))  # channels last in memory, as x

    def forward(self, x, emb, keys_values=None):
        """x: (B, cin, H, W); emb: (B, emb_dim); keys_values: from `CrossAttention.keys_values`"""
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
    """ADM's U-Net under EDM's names ("enc.8x8_block0.conv0.weight"): it can load EDM's weights.

    attn_resolutions: sizes of the feature maps with attention (the bottleneck always has it).
    latent_dim: width of the latent tokens that the cross-attentions read; 0 builds plain EDM.
    latents_to_emb: whether the tokens' mean is also added to the embedding.
    groups: of latent tokens, each for one resolution with attention of the up-sampling branch, the lowest first; with
    0 or 1, all tokens go to all blocks with attention. Raises ValueError for sizes that don't fit each other.
    """

    def __init__(self, img_resolution, img_channels, label_dim, model_channels=192, channel_mult=(1, 2, 3, 4),
                 channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1, latent_dim=0,
                 latents_to_emb=False, groups=0):
        super().__init__()
        levels = len(channel_mult)
        if img_resolution % 2 ** (levels - 1):
            raise ValueError(f"images of {img_resolution} pixels can't be halved {levels - 1} times: "
                             f"take a size divisible by {2 ** (levels - 1)}, or fewer levels in channel_mult")
        for width in (c * model_channels for c in channel_mult):
            if width < 4 or width % min(32, width // 4) or width % num_heads(width):
                raise ValueError(f"{width} channels can't be split into the groups of group norm (4 or more channels, "
                                 "32 groups at most) and attention's heads: choose another model_channels")
        resolutions = [img_resolution >> i for i in range(levels)]
        if missing := set(attn_resolutions) - set(resolutions):
            raise ValueError(f"attn_resolutions has {sorted(missing)}: the feature maps are {resolutions}")
        self.groups, attended = max(groups, 1) if latent_dim else 1, sorted({*attn_resolutions, resolutions[-1]})
        if self.groups > len(attended):
            raise ValueError(f"{groups} groups of latents need {groups} resolutions with attention, and it is at "
                             f"{attended}: name more of the feature maps {resolutions} in attn_resolutions")
        self.group_of = {f"{res}x{res}": i for i, res in enumerate(attended[:groups])} if self.groups > 1 else {}
        self.emb_dim = emb_dim = model_channels * channel_mult_emb
        self.map_layer0 = nn.Linear(model_channels, emb_dim)
        self.map_layer1 = nn.Linear(emb_dim, emb_dim)
        self.map_label = nn.Linear(label_dim, emb_dim, bias=False) if label_dim else None
        if label_dim:
            nn.init.normal_(self.map_label.weight)
        self.map_latents = zero(nn.Linear(latent_dim, emb_dim)) if latent_dim and latents_to_emb else None

        def block(cin, cout, attention=False, resample=None, latents=not self.group_of):
            return UNetBlock(cin, cout, emb_dim, attention, latent_dim if latents else 0, resample, dropout)

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
            latents = not self.group_of or f"{res}x{res}" in self.group_of
            if level == levels - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, attention=True, latents=latents)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, resample="up")
            for i in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(channels + skips.pop(), width, res in attn_resolutions,
                                                          latents=latents)
                channels = width
        self.out_norm = group_norm(channels)
        self.out_conv = zero(nn.Conv2d(channels, img_channels, 3, padding=1))

    def condition(self, tokens):
        """Latent tokens (B, m, latent_dim) -> what the network reads of them, {name: tensors (B, ...)}

        "enc.8x8_block0", ...: keys and values of cross-attentions; "emb": a part of the embedding; "emb8x8", ...: such
        a part, for the up-sampling blocks of this size.
        """
        of_group = tokens.chunk(self.groups, dim=1)
        condition = {}
        for name, block in self.named_modules():
            if isinstance(block, UNetBlock) and block.cross is not None:
                condition[name] = block.cross.keys_values(of_group[self.group_of.get(size_of(name), 0)])
        if self.map_latents is not None:
            for size, group in (self.group_of or {"": 0}).items():
                condition[f"emb{size}"] = [float32(self.map_latents, of_group[group].mean(1))]
        return condition

    def embed(self, c_noise, labels, condition):
        """Noise level, class and codes -> what modulates blocks, (B, emb_dim), already through SiLU; and, by the
        feature map's size, what modulates those that have a part of the codes of their own"""
        emb = F.silu(float32(self.map_layer0, sinusoids(c_noise, self.map_layer0.in_features)))
        emb = float32(self.map_layer1, emb)
        if self.map_label is not None and labels is not None:
            one_hot = labels[:, None] == torch.arange(self.map_label.in_features, device=labels.device)
            emb = emb + float32(self.map_label, one_hot)  # label -1: a row of zeros

        def with_codes(part):
            return F.silu(emb + condition[part][0] if part in condition else emb)

        return with_codes("emb"), {size: with_codes(f"emb{size}") for size in self.group_of}

    def forward(self, x, c_noise, labels=None, condition=None):
        """x: (B, C, H, W); c_noise: (B,); labels: (B,) int64, -1 for none, or None

        condition: as above, or "emb" alone; None without latents
        """
        condition = condition or {}
        emb, of_size = self.embed(c_noise, labels, condition)
        skips = []
        for name, block in self.enc.items():
            x = block(x, emb, condition.get(f"enc.{name}")) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if x.shape[1] != block.cin:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, of_size.get(size_of(name), emb), condition.get(f"dec.{name}"))
        return self.out_conv(F.silu(self.out_norm(x)))


def from_edm(state):
    """A state dict in EDM's order of channels -> in ours. EDM interleaves the output channels of each qkv: by head,
    by channel within the head, then q, k, v. Ours are all of q, all of k, all of v."""
    def is_qkv(name):
        return name.startswith(("model.enc.", "model.dec.")) and name.endswith((".qkv.weight", ".qkv.bias"))

    return {name: t.unflatten(0, (num_heads(len(t) // 3), -1, 3)).movedim(2, 0).flatten(0, 2) if is_qkv(name) else t
            for name, t in state.items()}


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
