"""
The Inception network that FID is defined with (Szegedy et al. 2016; weights of 2015-12-05).

eval_fid.py measures with it. The published weights, 91 MB, are downloaded; their hash is checked.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, require
from processes import barrier

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"  # the last eight digits begin its SHA-256
SHA256 = WEIGHTS[-12:-4]
ADDRESS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. same: padded, so that stride 1 keeps the size"""

    def __init__(self, in_channels, out_channels, kernel, stride=1, same=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(side // 2 for side in kernel) if same else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their channels concatenated.

    A branch, name = [(channels, kernel), ...], is a sequence of convolutions, NAME_1, NAME_2 ... An
    item with two kernels, (384, (1, 3), (3, 1)), is two convolutions of the same input, NAMEa and
    NAMEb, concatenated. branch_pool starts with the pool. With "down", that pool and the last
    convolution of every other branch halve the resolution.
    """

    POOLS = {"avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
             "max": lambda x: F.max_pool2d(x, 3, 1, 1),
             "down": lambda x: F.max_pool2d(x, 3, 2)}

    def __init__(self, in_channels, pool, **branches):
        super().__init__()
        self.pool, self.branches = self.POOLS[pool], {}
        for branch, layers in branches.items():
            channels, self.branches[branch] = in_channels, []
            for i, (out_channels, *kernels) in enumerate(layers, 1):
                name = f"{branch}_{i}" if len(layers) > 1 else branch
                names = [name + letter for letter in "ab"] if len(kernels) > 1 else [name]
                down = pool == "down" and i == len(layers)
                for full_name, kernel in zip(names, kernels):
                    self.add_module(full_name, Conv(channels, out_channels, kernel, 2 if down else 1, same=not down))
                self.branches[branch].append(names)
                channels = out_channels

    def forward(self, x):
        outputs = []
        for branch, layers in self.branches.items():
            h = self.pool(x) if branch == "branch_pool" else x
            for names in layers:
                h = torch.cat([self.get_submodule(name)(h) for name in names], dim=1)
            outputs.append(h)
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    """Images (B, 1 or 3, H, W) in [-1, 1] -> pool features (B, 2048), spatial features
    (B, 17 x 17 x 7), class probabilities (B, 1008).

    resize: how images become 299 x 299, "tf1" (`resize_tf1`) or "pytorch" (F.interpolate). The
    names of the parameters are those in the published file.
    """

    pool_dim, spatial_dim = 2048, 17 * 17 * 7

    def __init__(self, resize):
        super().__init__()
        self.resize = resize
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        for name, channels, pooled in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
            self.add_module(f"Mixed_5{name}", Mixed(
                channels, "avg", branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)]))
        self.Mixed_6a = Mixed(288, "down", branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
                              branch_pool=[])
        row, column = (1, 7), (7, 1)
        for name, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            self.add_module(f"Mixed_6{name}", Mixed(
                768, "avg", branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row), (192, column)],
                branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)], branch_pool=[(192, 1)]))
        self.Mixed_7a = Mixed(768, "down", branch3x3=[(192, 1), (320, 3)],
                              branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3)], branch_pool=[])
        for name, channels, pool in (("b", 1280, "avg"), ("c", 2048, "max")):
            self.add_module(f"Mixed_7{name}", Mixed(
                channels, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, (1, 3), (3, 1))],
                branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3), (3, 1))], branch_pool=[(192, 1)]))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = x.expand(-1, 3, -1, -1)
        if self.resize == "tf1":
            x = (resize_tf1(x, 299) * 127.5 - 0.5) / 128  # (v - 128) / 128 for v in 0 ... 255
        else:
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))  # (B, 768, 17, 17)
        # sFID's features (Nash et al. 2021). ADM's program reads TensorFlow's "mixed_6/conv": the
        # 1 x 1 branch of the block called 6d here, so the first channels of its output
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean((2, 3))
        p = F.linear(pool, self.fc.weight).softmax(dim=1)  # no bias: as Salimans et al., ADM and StyleGAN
        return pool, spatial, p


def resize_tf1(x, size):
    """(B, C, H, W) -> (B, C, size, size), bilinear, as TensorFlow 1 did it: output pixel i is taken
    at i H / size, without the usual shift by half a pixel, and without smoothing.
    """
    h, w = (torch.arange(size, device=x.device) * (side / size) * 2 / max(side - 1, 1) - 1 for side in x.shape[2:])
    grid = torch.stack(torch.meshgrid(h, w, indexing="ij")[::-1], dim=-1).to(x.dtype)  # (x, y) in [-1, 1]
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=True)


def load_inception(path, resize, device):
    """-> the network with the published weights at `path`. Raises UserError for another hash."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    require(digest.startswith(SHA256), f"{path} is not {WEIGHTS}, or damaged: its SHA-256 begins with {digest[:8]}, "
            f"not {SHA256}. Put a good copy in its place")
    net = Inception(resize)
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.to(device).eval().requires_grad_(False)


def find_inception(weights, resize, device, rank):
    """-> the network with weights from this file. weights = "" means PyTorch's usual cache, into
    which process 0 downloads them if need be. Raises UserError if they can't be had.
    """
    path = Path(weights or f"{torch.hub.get_dir()}/checkpoints/{WEIGHTS}")
    require(not weights or path.is_file(), f"there is no file {weights}")
    if rank == 0 and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(ADDRESS + WEIGHTS, str(path), SHA256)
        except (OSError, RuntimeError) as error:  # no network; another hash
            raise UserError(f"can't download Inception's weights ({error}): put {ADDRESS}{WEIGHTS} into {path.parent} "
                            "by other means, or name it by --weights=; --features=classifier does without") from None
    barrier()
    return load_inception(path, resize, device)
