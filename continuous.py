"""
Continuous latents in place of codes: what DisCo-Diff compares its codes with (sec. 4.1, Table 3, App. G.5).

    python train_stage1.py config/continuous.py                                          # m latents of k numbers
    python train_prior.py --prior=diffusion --out_dir=out/continuous                     # diffusion_prior.py draws them
    python sample.py --prior=diffusion --out_dir=out/continuous
    python sample.py --encode=fashion-mnist-10k --out_dir=out/continuous --name=oracle   # those of training images

As in a variational autoencoder, the encoder gives each number a mean and a variance, and the loss gets the KL
divergence from N(0, 1), times kld_weight. Where the weight is small, latents come close to copies of the image, and
a prior can't learn them; where it is large, they say nothing. compare_latents.py shows both.
"""

import torch

from noise import normal_of


def reparametrised(said, gumbel):
    """A sample of the latents, through which the encoder gets its gradient: mean + standard deviation * n.

    said: (..., 2), means and log-variances; gumbel: (...), Gumbel(0, 1) noise as codes have, from which n, N(0, 1), is
    made: what draws codes draws these too. -> (...)
    """
    mean, log_variance = said.unbind(-1)
    return (mean + (log_variance / 2).exp() * normal_of(torch.exp(-torch.exp(-gumbel)))).to(said.dtype)


def kl_divergence(said):
    """KL(N(mean, variance) | N(0, 1)) of each latent, in nats: the sum over its numbers.

    said: (B, m, k, 2), means and log-variances -> (B, m)
    """
    mean, log_variance = said.unbind(-1)
    return (mean ** 2 + log_variance.exp() - 1 - log_variance).sum(2) / 2
