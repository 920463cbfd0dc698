"""
What the checks share: random numbers that are the same on every machine, tests of samples, complaints.
"""

import math

import numpy as np
import torch
from source import Wrong

EVERY = torch.cartesian_prod(*[torch.arange(4)] * 3)  # the 64 codes of m = 3 with k = 4


def numbered(codes):
    """Codes (N, 3) with four values -> their numbers in 0 ... 63"""
    return codes @ torch.tensor([16, 4, 1])


def normal(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def uniform(rng, *shape):
    """On (0, 1]."""
    return 1 - torch.from_numpy(rng.random(shape))


def gumbel(rng, *shape):
    return torch.from_numpy(rng.gumbel(size=shape))


def row(values):
    return torch.tensor(values, dtype=torch.float64)


def fixed():
    """The generator of the inputs whose outputs tell known wrong answers apart."""
    return np.random.default_rng(7)


def tensor(value, shape, who):
    """The value, if it is a tensor of this shape. Raises Wrong otherwise."""
    if type(value) is not torch.Tensor:
        raise Wrong(f"{who} returns {value if value is None else type(value).__name__}, not a tensor")
    if value.shape != tuple(shape):
        raise Wrong(f"{who} returns the shape {tuple(value.shape)}, not {tuple(shape)}")
    return value


def number(value, who):
    """The value as a float, if it is a number. Raises Wrong otherwise."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{who} returns {type(value).__name__}, not a number") from None


def far(a, b, tolerance=1e-6):
    """Whether a and b differ by more than the tolerance, in units of b's largest value, or are not finite."""
    if type(a) not in (torch.Tensor, torch.nn.Parameter):
        raise Wrong(f"a tensor is wanted, not {type(a).__name__}")
    a, b = a.detach().double(), b.detach().double()
    return not bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12))


def chi_square(counts, p):
    """Do these counts (N,) fit the probabilities p (N,)? -> chi-square, and what it exceeds once in a million

    The limit is Wilson and Hilferty's.
    """
    expected = counts.sum() * p
    df = len(p) - 1
    limit = df * (1 - 2 / (9 * df) + 4.75 * math.sqrt(2 / (9 * df))) ** 3
    return (((counts - expected) ** 2 / expected).sum().item()), limit


def misfit(draws, p, what):
    """Words where draws (N,) of 0 ... len(p) - 1 don't fit the probabilities p."""
    if draws.min() < 0 or draws.max() >= len(p):
        return f"{what} leave 0 ... {len(p) - 1}: they go from {draws.min()} to {draws.max()}"
    value, limit = chi_square(torch.bincount(draws.long(), minlength=len(p)), p)
    if value > limit:
        return f"{what} have the wrong frequencies: chi-square is {value:.0f}, and should be below {limit:.0f}"


def small(network, rng):
    """A network in evaluation mode whose parameters are all drawn from rng, so that every layer matters."""
    for p in network.parameters():
        p.data = 0.4 * normal(rng, *p.shape).to(p.dtype)
    return network.eval()
