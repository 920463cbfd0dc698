"""
Codes that no prior draws: given by hand, read off images, or composed of two codes; and how many are in use.

A source of codes is a function source(numbers, noise) -> codes int64 (R, m), class labels (R,) or None.
numbers: int64 array (R,). Each row of the result depends on its number and its row of noise alone.
"""

import torch

import data
from configurator import require
from model import draw_codes
from noise import SeededNoise
from trained import priors_of


def by_hand(code, model, setting="code"):
    """-> the source that always gives this code, a tuple of m numbers in 0 ... k - 1, or -1 where a prior is to draw.

    Raises UserError for anything else; setting: its name, for the message.
    """
    m, k = model.num_latents, model.codebook_size
    reads, _ = priors_of(dict(continuous=model.continuous, codebook_size=k))
    require(reads == "codes",
            f"this model reads {reads}, not codes: they come from images, not from --{setting}=NUMBERS")
    require(len(code) == m and all(type(c) is int and -1 <= c < k for c in code),
            f"--{setting} takes {m} numbers in 0 ... {k - 1}{', or -1: the prior draws it' * (setting == 'code')}, "
            f"not {code}")

    def source(numbers, noise):
        return torch.tensor(code, device=noise.device).expand(len(numbers), -1), None

    return source


def of_images(images, labels, order, model):
    """-> the source of codes that the encoder draws for images.

    images: uint8 (N, H, W, C); labels: int64 (N,) or None; order: image of each number, over and over
    """
    def source(numbers, noise):
        chosen = order[numbers % len(order)]
        with torch.no_grad():
            logits = model.encoder(data.to_float(images[chosen], next(model.parameters()).device))
        codes = draw_codes(logits.to(noise.device), noise.gumbel(model.num_latents, model.codebook_size))
        return codes, None if labels is None else torch.from_numpy(labels[chosen]).to(noise.device)

    return source


def composed(rows, first, second, device):
    """Rows in fours: the first code, the second, and two mixtures of both (DLC sec. 5.2).

    A mixture takes each position from either code, by the toss of a coin; of embeddings and continuous latents, which
    are float, it is the mean. rows: row numbers int64 (R,); first, second: codes (R, m) or (R, m, k). -> codes, shaped
    like these; bool (R,), the rows that have the first's class
    """
    if first.ndim == 3:
        mixed, of_first = composed(rows, first.flatten(1), second.flatten(1), device)
        return mixed.view_as(first), of_first
    turn = torch.from_numpy(rows % 4).to(first.device)
    coins = SeededNoise("compose", rows, device).rand(first.shape[1]) < 0.5
    of_first = torch.where(turn[:, None] < 2, turn[:, None] == 0, coins)
    mixed = torch.where(of_first, first, second)
    if first.is_floating_point():
        mixed = torch.where(turn[:, None] < 2, mixed, (first + second) / 2)
    return mixed, turn % 2 == 0


def code_usage(codes, codebook_size):
    """Of codes int64 (N, m) in 0 ... k - 1 -> perplexity of each position's codes, float64 (m,), 1 ... k; the share of
    codes that are distinct, 1 / N ... 1

    Counted without one-hot codes, which would be 26 GB for 50,000 images at DLC's size.
    """
    positions = torch.arange(codes.shape[1], device=codes.device)
    counts = torch.bincount((codes + codebook_size * positions).flatten(), minlength=len(positions) * codebook_size)
    p = counts.cpu().double().unflatten(0, (-1, codebook_size)) / len(codes)
    return torch.special.entr(p).sum(1).exp(), len(codes.unique(dim=0)) / len(codes)
