"""
The baseline on continuous embeddings: representation-conditioned generation, RCG (Li et al. 2023), as
Discrete Latent Codes compares with it (DLC sec. 5.1).

The denoiser reads an encoder's embedding, one vector for each image, and a small diffusion model, RDM, draws
embeddings: DDPM in 1,000 steps, sampled by DDIM. Vectors are float (B, D), each standardised over its own
entries (embedding.py). Step 0 has the least noise, step 999 the most.
"""

import torch
import torch.nn as nn

from noise import has_float64, normal_of
from prior import class_rows
from transformer import float32, sinusoids, zero

STEPS = 1000
DDIM_STEPS = 250
BETAS = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, STEPS, dtype=torch.float64) ** 2  # linear in their root
ALPHAS = (1 - BETAS).cumprod(0)  # of a noisy vector: the share of the clean one in its variance


def noised(x, t, noise):
    """Vectors x (B, D) at steps t, int64 (B,) in 0 ... 999; noise: N(0, 1), shaped like x. -> (B, D)"""
    alpha = ALPHAS.to(x.device, x.dtype)[t][:, None]
    return alpha.sqrt() * x + (1 - alpha).sqrt() * noise


@torch.no_grad()
def ddim(predict, x, randn, num_steps=DDIM_STEPS, eta=1.0):
    """DDIM (Song et al. 2021, Eq. 12) from noise x (B, D), with noise of its own for eta > 0. -> vectors (B, D)

    predict(x, t): the clean vectors, for a step t; randn(): N(0, 1) noise, drawn once a step. num_steps divides
    1,000. As in RCG's program, steps are 1, 1 + 1000 / num_steps, ...; the last leads to the level of step 0.
    """
    steps = range(1, STEPS, STEPS // num_steps)
    for t, t_next in zip(reversed(steps), [*reversed(steps[:-1]), 0]):
        alpha, alpha_next = ALPHAS[t], ALPHAS[t_next]
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
        x0 = predict(x, t)
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        x = alpha_next.sqrt() * x0 + (1 - alpha_next - sigma ** 2).sqrt() * noise + sigma * randn()
    return x


class Block(nn.Module):
    """A residual MLP (B, dim) -> (B, dim), to which an embedding of the step is added; starts as the identity."""

    def __init__(self, dim, emb_dim):
        super().__init__()
        self.in_layers = nn.Sequential(nn.LayerNorm(dim), nn.SiLU(), nn.Linear(dim, dim))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, dim))
        self.out_layers = nn.Sequential(nn.LayerNorm(dim), nn.SiLU(), nn.Identity(), zero(nn.Linear(dim, dim)))

    def forward(self, x, emb):
        return x + self.out_layers(self.in_layers(x) + self.emb_layers(emb))


class RDM(nn.Module):
    """The clean vector, predicted from a noised one by a residual MLP, under RCG's parameter names.

    A prior as those of prior.py, but of embeddings: "codes" are float (B, m), m = D, and k = 1. label_dim = 0: no
    classes. (RCG's published network: 12 blocks of width 1536, trained by AdamW with a decay of 0.01 at 5.1e-4;
    train_prior.py has Adam, without decay.) Training reports its loss, since it has no bits.
    """

    unit = "loss"

    def __init__(self, num_latents, codebook_size=1, label_dim=0, layers=12, dim=1536, time_dim=256):
        super().__init__()
        if codebook_size != 1:
            raise ValueError("RDM draws embeddings, and this stage 1 has codes: --prior=ar or sedd draws them")
        if dim % 2:
            raise ValueError(f"the width of RDM must be even, for its sines and cosines: {dim} is not")
        self.num_latents, self.label_dim = num_latents, label_dim
        self.time_embed = nn.Sequential(nn.Linear(dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.label = nn.Parameter(torch.zeros(label_dim + 1, time_dim))  # the last row: "no class"
        self.input_proj = nn.Linear(num_latents, dim)
        self.res_blocks = nn.ModuleList(Block(dim, time_dim) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.SiLU(), zero(nn.Linear(dim, num_latents)))

    def forward(self, x, t, labels=None):
        """-> the clean vectors (B, D); x: (B, D) noised; t: (B,) steps 0 ... 999; labels: (B,), -1 for none"""
        emb = sinusoids(t, self.input_proj.out_features)
        emb = float32(self.time_embed, emb) + class_rows(self.label, labels, len(x))
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, emb)
        return float32(self.out, x)

    def loss(self, z, labels, t, u, network=None):
        """The squared error of the clean vectors z (B, D), a mean over their entries, (B,). labels: (B,) or None

        t (B,): the step's number over 1,000; u (B, D), uniform on [0, 1): noise, by way of the normal
        distribution function's inverse; network: as for `Prior.loss`.
        """
        t, noise = (STEPS * t).long(), normal_of(u)
        return ((network or self)(noised(z, t, noise), t, labels) - z).square().mean(1)

    def nats(self, z, labels=None, generator=None):
        """Not nats: the loss of vectors z (B, D) at steps and noise drawn by the generator, (B,).
        DDPM's loss is no bound on bits."""
        u = torch.rand(len(z), 1 + self.num_latents, generator=generator, device=z.device)
        return self.loss(z, labels, u[:, 0], u[:, 1:])

    @torch.no_grad()
    def sample(self, noise, labels=None):
        """By `ddim` in 250 steps, eta 1, as RCG does. -> vectors float (B, D), on the noise's device

        noise: a `SeededNoise` for B vectors
        """
        place = self.label.device
        wide = torch.float64 if has_float64(place) else torch.float32
        labels = labels if labels is None else labels.to(place)

        def predict(x, t):
            t = torch.full((len(x),), t, device=place)
            return self(x.float(), t, labels).to(wide)

        def randn():
            return noise.randn(self.num_latents).to(place, wide)

        return ddim(predict, randn(), randn).float().to(noise.device)
