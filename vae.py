"""
Stable Diffusion's autoencoder (Rombach et al. 2022), under the parameter names of its authors (CompVis).

It turns an image into a few numbers, the latents, on a grid of an eighth of its size. A denoiser trained on
latents costs little, even for 256 x 256 pixels, and knows nothing of all this: images go in once, when
`data.py --vae=` prepares a data set, and come out at the end of sampling.

`vae_file.py` reads the published weights.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

SCALE = 0.18215  # times this, Stable Diffusion's latents have a standard deviation of about 1


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """(B, cin, h, w) -> (B, cout, h, w)"""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = group_norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = group_norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention of all pixels, one head over all channels. (B, C, h, w) -> (B, C, h, w)"""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, HW, C)
        a = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(a.transpose(1, 2).unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    """Two residual blocks around an attention. (B, C, h, w) -> (B, C, h, w)"""

    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels))

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h / 2, w / 2)"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # a column on the right, a row below


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2 h, 2 w)"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(cin, cout, blocks, **resample):
    """-> residual blocks `block`, and perhaps a module that changes the size after them"""
    return nn.ModuleDict(dict(block=nn.ModuleList(ResBlock(cin if i == 0 else cout, cout) for i in range(blocks)),
                              **resample))


class Encoder(nn.Module):
    """(B, C, H, W) -> (B, 2 z_channels, H / 2^(levels - 1), W / 2^(levels - 1))"""

    def __init__(self, ch, ch_mult, num_res_blocks, in_channels, z_channels):
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList(
            level(cin, width, num_res_blocks, **{"downsample": Downsample(width)} if i + 1 < len(widths) else {})
            for i, (cin, width) in enumerate(zip([ch, *widths], widths)))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for part in self.down:
            for block in part["block"]:
                x = block(x)
            if "downsample" in part:
                x = part["downsample"](x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, C, H, W). `up` counts from the last, largest level."""

    def __init__(self, ch, ch_mult, num_res_blocks, in_channels, z_channels):
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            level(cin, width, num_res_blocks + 1, **{"upsample": Upsample(width)} if i else {})
            for i, (cin, width) in enumerate(zip([*widths[1:], widths[-1]], widths)))
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv2d(widths[0], in_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for part in reversed(self.up):
            for block in part["block"]:
                x = block(x)
            if "upsample" in part:
                x = part["upsample"](x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to scaled latents (B, z_channels, h, w) of about unit variance, and back."""

    def __init__(self, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, in_channels=3, z_channels=4):
        super().__init__()
        self.in_channels, self.z_channels, self.factor = in_channels, z_channels, 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, in_channels, z_channels)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, in_channels, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    def encode(self, y):
        """Images (B, C, H, W) in [-1, 1] -> scaled means (B, z_channels, h, w) of the latents; the other half of the
        output, their log-variances, is not used"""
        return SCALE * self.quant_conv(self.encoder(y)).chunk(2, dim=1)[0]

    def decode(self, latents, at_once=16):
        """Scaled latents (B, z_channels, h, w), on any device -> images (B, C, H, W); their values may lie a little
        outside [-1, 1]. at_once: images in one evaluation"""
        place = self.post_quant_conv.weight.device
        return torch.cat([self.decoder(self.post_quant_conv(part.float().to(place) / SCALE))
                          for part in latents.split(at_once)])


def vae_from(state):
    """A state dict under our names -> the trained VAE, in eval mode"""
    vae = VAE(**vae_settings(state))
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)


def vae_settings(state):
    """The arguments of `VAE` that a state dict under our names was made with, read off its shapes."""
    conv_in, conv_out = state["encoder.conv_in.weight"].shape, state["encoder.conv_out.weight"].shape
    levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down.")})
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    return dict(
        ch=conv_in[0], in_channels=conv_in[1], z_channels=conv_out[0] // 2,
        ch_mult=tuple(width // conv_in[0] for width in widths),
        num_res_blocks=sum(name.startswith("encoder.down.0.") and name.endswith(".conv1.weight") for name in state))
