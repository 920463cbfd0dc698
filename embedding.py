"""
Embeddings in place of codes: what Discrete Latent Codes compares itself with (DLC sec. 5.1, Table 3).

    python train_stage1.py --codes=FOLDER --conditioning=embedding     # class and register tokens of the encoder
    python train_stage1.py --codes=FOLDER --conditioning=random-mlp    # a random frozen MLP of them, as for RCG
    python train_prior.py --prior=rdm && python sample.py --prior=rdm  # rdm.py draws embeddings

An embedding is D numbers. It goes the way of a code of m = D positions with k = 1: "hard codes" (B, m) are then
float, and logits (B, m, 1) are the numbers themselves.
"""

import torch
import torch.nn as nn

from transformer import float32
from vit import SEMEncoder

EMBEDDINGS = ("embedding", "random-mlp")  # settings of conditioning


def standardised(x):
    """Vectors (..., D) with mean 0 and variance 1 over their own entries, as in RCG's program."""
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


def embedding_dim(kind, registers, dim, **_):
    """D of the EMBEDDINGS of a ViT of these settings. The random MLP has a quarter, as in DLC's repository."""
    return (1 + registers) * dim // (4 if kind == "random-mlp" else 1)


class FrozenEmbedding(SEMEncoder):
    """An encoder's embedding, in place of its codes: what the SEMs read, standardised, perhaps after a random MLP.

    Images (B, C, H, W) in [-1, 1] -> (B, D, 1). The encoder was trained beforehand, the MLP never is. (RCG's program
    takes a trained head's output instead; DLC's repository has the random MLP, with biases of 0, and does not use it.)
    """

    def __init__(self, kind, **settings):
        super().__init__(**settings)
        D = embedding_dim("embedding", **settings)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, 2 * D), nn.GELU(),
                                 nn.Linear(2 * D, embedding_dim(kind, **settings))) if kind == "random-mlp" else None
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, y):
        def vector(y):
            x = standardised(self.embed(y))
            return standardised(self.mlp(x)) if self.mlp else x

        return float32(vector, y)[..., None]


class LinearCondition(nn.Module):
    """Embedding (B, D) -> what the denoiser adds to its embedding of the noise level (B, width), as in RCG and DLC's
    program: a linear layer, without bias; a learned vector for "no embedding"."""

    def __init__(self, dim, width):
        super().__init__()
        self.linear = nn.Linear(dim, width, bias=False)
        self.null = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, z, drop=None):
        """z: (B, D); drop: (B,) bool, True for no embedding. -> (B, width) float32"""
        z = float32(self.linear, z)
        return z if drop is None else torch.where(drop[:, None], self.null, z)
