"""
The autoregressive prior over codes, p(z | c) = prod_i p(z_i | z_<i, c), of DisCo-Diff (Eq. 4, Alg. 2).

Every prior is an nn.Module over codes int64 (B, m) with k values each, and class labels int64 (B,), -1
for "no class". It has three methods: `loss`, which training minimises; `nats`, -ln p(z | c) or a bound
on it (`nats_is_a_bound` says which; `unit` is "bits"); and `sample`. The settings of train_prior.py that
its constructor names, and those of sample.py that `sample` names, reach it. The other prior of codes is
in sedd.py; rdm.py draws embeddings, diffusion_prior.py continuous latents; trained.py lists all. Another needs
one new file, and its name in that list.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import require
from model import draw_codes
from noise import gumbel_noise, has_float64
from transformer import float32, transformer, zero

UNITS = {"bits": math.log(2), "loss": 1.0}  # of what training reports: how much of what `nats` gives


def class_rows(table, labels, batch):
    """Embeddings (B, dim) of labels (B,), from a table (classes + 1, dim) whose last row is "no class".

    The whole batch gets "no class" if labels is None or the table has no classes.
    """
    if labels is None or len(table) == 1:
        labels = torch.full((batch,), -1, device=table.device)
    return F.embedding(labels.where(labels >= 0, len(table) - 1), table)


def with_given(x, given, codebook_size):
    """x, int64 (B, m), with the codes that are given in their places: int64 (B, m), -1 where x stays; or None. They may
    be on another device; the result is on x's.

    Raises UserError for codes of another prior.
    """
    if given is None:
        return x
    require(given.shape == x.shape and given.max() < codebook_size,
            f"this prior's codes are {x.shape[1]} numbers in 0 ... {codebook_size - 1}, or -1 where they are to be "
            f"drawn: {given.shape[1]} are given, up to {given.max()}")
    given = given.to(x.device)
    return torch.where(given < 0, x, given)


def require_prefix(fixed):
    """Raises UserError unless what is fixed, bool (B, m), comes first in each row."""
    require((fixed[:, 1:] <= fixed[:, :-1]).all(), "the autoregressive prior goes on from the first positions of a "
            "code: those that it is to draw come last. --prior=sedd fills in any")


def mean_bits(prior, logits, labels, draws, g_codes, g_noise):
    """`prior.nats` in bits, (B,): the mean over draws of codes from the encoder's logits (B, m, k). (Without bits: the
    loss.)"""
    nats = 0
    for _ in range(draws):
        nats += prior.nats(draw_codes(logits, gumbel_noise(logits.shape[:3], g_codes)), labels, g_noise)
    return nats / draws / UNITS[prior.unit]


class Prior(nn.Module):
    """Causal Transformer (App. D.1) whose first token is the class. label_dim = 0: no classes."""

    unit, nats_is_a_bound = "bits", False

    def __init__(self, num_latents, codebook_size, label_dim=0, layers=12, dim=512, heads=8):
        super().__init__()
        self.num_latents, self.codebook_size, self.label_dim = num_latents, codebook_size, label_dim
        self.class_token = nn.Parameter(0.02 * torch.randn(label_dim + 1, dim))  # the last row: "no class"
        self.codebook = nn.Parameter(0.02 * torch.randn(codebook_size, dim))
        self.position = nn.Parameter(0.02 * torch.randn(num_latents, dim))
        self.blocks = transformer(layers, dim, heads, causal=True)
        self.norm = nn.LayerNorm(dim)
        self.head = zero(nn.Linear(dim, codebook_size))  # starts uniform: log2 k bits a code

    def first_token(self, labels, batch):
        return class_rows(self.class_token, labels, batch)[:, None]  # (B, 1, dim)

    def embed(self, codes):
        """Codes (B, n), or relaxed or one-hot ones, float (B, n, k) -> their embeddings (B, n, dim)"""
        return codes @ self.codebook if codes.is_floating_point() else F.embedding(codes, self.codebook)

    def forward(self, codes, labels=None):
        """-> logits (B, m, k); row i sees only the codes before i"""
        x = torch.cat([self.first_token(labels, len(codes)), self.embed(codes[:, :-1])], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return float32(self.head, self.norm(x))

    def loss(self, codes, labels=None, t=None, u=None, network=None):
        """Cross-entropy, -ln p(codes | labels), (B,) (Eq. 4).

        t (B,), u (B, m): noise for `SEDD.loss`, unused here. network: a wrapper to call in place of
        this module, such as DistributedDataParallel.
        """
        logits = (network or self)(codes, labels)
        return F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").sum(1)

    def nats(self, codes, labels=None, generator=None):
        """-ln p(codes | labels), (B,). The generator is for `SEDD.nats`."""
        return self.loss(codes, labels)

    @torch.no_grad()
    def sample(self, noise, labels=None, temperature=1.0, given=None):
        """Ancestral sampling (Alg. 3, lines 3-5). -> codes int64 (B, m), on the noise's device

        noise: a `SeededNoise`, or another object with gumbel(m, k) -> (B, m, k), which decides the
        draws. temperature: divides the logits; 0 takes the mode. given: int64 (B, m), codes to go on
        from, -1 where they are to be drawn, else None; raises UserError unless these come last in each
        row. With a key-value cache, this equals
        the plain loop

            codes = zeros(B, m)
            for i in range(m):
                codes[:, i] = draw_codes(self(codes, labels)[:, i] / temperature, gumbel[:, i])
        """
        place = self.position.device
        gumbel = noise.gumbel(self.num_latents, self.codebook_size)
        home, gumbel = gumbel.device, gumbel.to(place, torch.float64 if has_float64(place) else torch.float32)
        given = with_given(torch.full(gumbel.shape[:2], -1, device=place), given, self.codebook_size)
        require_prefix(given >= 0)
        caches = [[] for _ in self.blocks]
        x, codes = self.first_token(labels if labels is None else labels.to(place), len(gumbel)), []
        for i in range(self.num_latents):
            x = x + self.position[i]
            for block, cache in zip(self.blocks, caches):
                x = block(x, cache)
            logits = float32(self.head, self.norm(x))[:, 0]  # (B, k)
            drawn = draw_codes(logits, temperature * gumbel[:, i])  # = logits / T + gumbel
            codes.append(torch.where(given[:, i] < 0, drawn, given[:, i]))
            x = self.embed(codes[-1])[:, None]
        return torch.stack(codes, dim=1).to(home)
