"""
Randomness that depends on seeds alone, not on the device, the batch size or the number of processes.
"""

import zlib

import numpy as np
import torch


def seed_of(purpose, *key):
    """A 64-bit seed that depends on the word `purpose` and these non-negative integers alone."""
    # the key's length goes in, since numpy treats (1,) and (1, 0) alike
    words = np.random.SeedSequence((zlib.crc32(purpose.encode()), len(key), *key)).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])


def seeded_generator(device, purpose, *key):
    """A torch generator with the seed `seed_of(purpose, *key)` (torch uses 32 bits of it on a CPU)."""
    return torch.Generator(device).manual_seed(seed_of(purpose, *key))


def gumbel_noise(shape, generator):
    """Gumbel(0, 1) noise, drawn on the generator's device: -log of an exponential variable."""
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()


class BatchNoise:
    """Noise for a batch of `count` images, all from one torch generator, on its device and in this precision."""

    def __init__(self, count, generator, dtype=None):
        self.count, self.how = count, dict(generator=generator, device=generator.device, dtype=dtype)

    def randn(self, *shape):
        """N(0, 1), (count, *shape)"""
        return torch.randn(self.count, *shape, **self.how)

    def chi_square(self, D):
        """Chi-square with D degrees of freedom, float64 (count,), on the CPU: PyTorch's takes no generator"""
        seed = torch.randint(2 ** 62, (), generator=self.how["generator"], device=self.how["device"])
        return torch.from_numpy(np.random.default_rng(seed.item()).chisquare(D, self.count))


def normal_of(u):
    """Uniform draws on [0, 1] -> N(0, 1), by the inverse of its distribution function; none is beyond 5.5."""
    return torch.special.ndtri(u.clamp(2 ** -25, 1 - 2 ** -24))


def has_float64(device):
    """Whether this device has float64 tensors: Apple's GPUs don't."""
    return torch.device(device).type != "mps"


class SeededNoise:
    """Noise for a batch of B images or codes; row i depends on the purpose and seeds[i] alone.

    Each method takes the shape of one row, and returns (B, *shape) in float64. NumPy draws it on
    the CPU, so all machines agree. If `device` has no float64, noise and samplers stay on the CPU.
    """

    def __init__(self, purpose, seeds, device="cpu"):
        self.device = torch.device(device if has_float64(device) else "cpu")
        self.generators = [np.random.default_rng(seed_of(purpose, int(s))) for s in seeds]

    def __len__(self):
        return len(self.generators)

    def stacked(self, rows):
        return torch.from_numpy(np.stack(list(rows))).to(self.device)

    def randn(self, *shape):
        """N(0, 1)"""
        return self.stacked(g.standard_normal(shape) for g in self.generators)

    def randn_like(self, x):
        return self.randn(*x.shape[1:])

    def rand(self, *shape):
        """Uniform on (0, 1]"""
        return 1 - self.stacked(g.random(shape) for g in self.generators)

    def chi_square(self, D):
        """Chi-square with D degrees of freedom, one number for each row"""
        return self.stacked(g.chisquare(D) for g in self.generators)

    def gumbel(self, *shape):
        """Gumbel(0, 1)"""
        return self.stacked(g.gumbel(size=shape) for g in self.generators)
