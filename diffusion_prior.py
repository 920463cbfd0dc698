"""
The prior of continuous latents: EDM's diffusion, with SEDD's Transformer (DisCo-Diff sec. 4.1, Table 3).

It is a prior as those of prior.py, but "codes" are numbers: float (B, m, k), one token for each latent. (The paper has
"a DiT-based DM" of its autoregressive prior's size, and says no more.) Any kld_weight brings the mean square of each
number to 1 in the end, since the denoiser can undo a factor, and the KL divergence has its minimum there (near it after
a short training): so EDM's sigma_data is 1, and noise levels are twice those of pixels. Training reports the loss, of
training images and of held-out ones: where these part, the prior overfits.
"""

import math

import torch
import torch.nn as nn

from diffusion import edm_constants, heun, log_normal, loss_weight
from noise import normal_of
from sedd import SEDD

P_MEAN, P_STD = -1.2 + math.log(2), 1.2
STEPS = 40  # with 18, as for images, numbers of N(0, 1) come out 4 % too large
EVALUATIONS = 2 * STEPS - 1


class DiffusionPrior(SEDD):
    """SEDD's network as a denoiser D(z; sigma) of k numbers for each token. label_dim = 0: no classes."""

    unit = "loss"

    def __init__(self, num_latents, codebook_size, label_dim=0, layers=12, dim=512, heads=8):
        super().__init__(num_latents, codebook_size, label_dim, layers, dim, heads)
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) / math.sqrt(codebook_size))

    def forward(self, z, sigma, labels=None):
        """-> D (B, m, k), in EDM's preconditioning; z: (B, m, k) noisy; sigma: (B,); labels: (B,), -1 for none"""
        c_skip, c_out, c_in, c_noise = edm_constants(sigma[:, None, None], 1)
        return c_skip * z + c_out * self.transformed((c_in * z) @ self.codebook, c_noise.flatten(), labels)

    def loss(self, z, labels, t, u, network=None):
        """lambda(sigma) (D - z)^2, a mean over the numbers, (B,) (EDM Table 1). Numbers of N(0, 1) have 1.

        t (B,), u (B, m k): uniform on [0, 1), for the noise levels and the noise; network: as for `Prior.loss`.
        """
        sigma, noise = log_normal(normal_of(t), P_MEAN, P_STD), normal_of(u).view_as(z)
        D = (network or self)(z + sigma[:, None, None] * noise, sigma, labels)
        return loss_weight(sigma, 1) * (D - z).square().mean((1, 2))

    def nats(self, z, labels=None, generator=None):
        """Not nats: the loss at noise levels and noise drawn by the generator, (B,)."""
        u = torch.rand(len(z), 1 + z[0].numel(), generator=generator, device=z.device)
        return self.loss(z, labels, u[:, 0], u[:, 1:])

    @torch.no_grad()
    def sample(self, noise, labels=None):
        """By Heun's method, in 40 steps. -> numbers float (B, m, k), on the noise's device

        noise: a `SeededNoise` for B codes
        """
        place = self.position.device
        labels = labels if labels is None else labels.to(place)

        def denoise(z, sigma):
            return self(z.float().to(place), sigma.float().to(place).expand(len(z)), labels).to(z.device)

        return heun(denoise, noise.randn(self.num_latents, self.codebook_size), STEPS).float()
