"""
The other prior over codes, SEDD-absorb: discrete diffusion that masks tokens (Lou et al. 2024), as
Discrete Latent Codes uses it (Lavoie et al. 2025, sec. 4). It includes remasking (DLC Eq. 4) and
first-hitting (Zheng et al. 2024).

Tokens are 0 ... V - 1, with V = k; the mask is V. Time t runs from 0, the codes, to 1, where the share
1 - EPS is masked; samplers go from t = 1, all masks, to 0. Log-scores are (B, m, V + 1); the last
column, the mask's, means nothing. The true score of token y at a masked position is
p(x0 = y | unmasked tokens) / (e^sigma - 1).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import draw_codes
from noise import has_float64
from prior import class_rows, with_given
from transformer import AdaLNBlock, float32, sinusoids, transformer, zero

EPS = 1e-3

# ----------------------------------------------------------------------------------------------------
# noise and loss


def log_linear(t):
    """Time t in [0, 1] -> sigma, dsigma/dt. The probability of mask is 1 - e^-sigma = (1 - EPS) t."""
    return -torch.log1p(-(1 - EPS) * t), (1 - EPS) / (1 - (1 - EPS) * t)


def absorb(codes, t, u, mask):
    """Codes (B, m) at times t (B,): each token is `mask` with probability (1 - EPS) t.

    u: (B, m), uniform on [0, 1)
    """
    return torch.where(u < (1 - EPS) * t[:, None], mask, codes)


def score_entropy(log_score, sigma, x, x0):
    """How far these scores are from x0's scores (Lou et al. 2024): at least 0; 0 where x is not masked.

    log_score: (B, m, V + 1); sigma: (B,); x: (B, m) noisy tokens; x0: (B, m) the codes.
    -> (B, m) nats, in float32 or better
    """
    log_score = log_score.to(torch.promote_types(log_score.dtype, torch.float32))[..., :-1]
    a = 1 / torch.expm1(sigma)[:, None]  # the true score of x0's token; expm1, as sigma goes down to 1e-3
    own = log_score.gather(2, x0[..., None])[..., 0]
    entropy = log_score.exp().sum(2) - a * own + a * (a.log() - 1)  # sum_y s_y - a ln s_x0 + a (ln a - 1)
    return torch.where(x == log_score.shape[2], entropy, 0)


def sedd_loss(log_score, t, x, x0):
    """Denoising score entropy, weighted by dsigma/dt. -> (B,) nats

    Its mean over t and x bounds -ln p(x0), up to terms of order EPS. (`SEDD.nats` leaves nothing out.)
    """
    sigma, dsigma = log_linear(t)
    return dsigma * score_entropy(log_score, sigma, x, x0).sum(1)


# ----------------------------------------------------------------------------------------------------
# samplers: functions of score(x, t) -> log-scores (B, m, V + 1), for x int64 (B, m) and times t float64
# (B,). They start from x, all masks, or codes with masks where they are to be filled in: given exact scores, the result
# is then distributed as it should be, given the rest. gumbel(*shape) draws Gumbel(0, 1) noise (B, *shape), rand(*shape)
# U(0, 1] noise.


def step_probs(rate, log_score, x):
    """A masked position becomes y with probability rate s_y, or stays masked; other positions stay."""
    p = F.pad(rate[:, None, None] * log_score[..., :-1].exp(), (0, 1))
    p[..., -1] = 1 - p.sum(2)
    return torch.where(x[..., None] == p.shape[2] - 1, p, F.one_hot(x, p.shape[2]).to(p.dtype))


def analytic_probs(log_score, x, t, s):
    """Tweedie tau-leaping from t to s, both (B,) (Lou et al. 2024). -> (B, m, V + 1), rows sum to 1

    A wrong score can make "stays masked" negative, here and in `euler_probs`.
    """
    return step_probs(torch.expm1(log_linear(t)[0] - log_linear(s)[0]), log_score, x)


def euler_probs(log_score, x, t, s):
    """An Euler step from t to s. For log-linear noise it is the analytic step: the rates are equal."""
    return step_probs((t - s) * log_linear(t)[1], log_score, x)


def denoise_probs(log_score, x, t):
    """The last step, to t = 0, without the mask. -> (B, m, V), proportional to the probabilities"""
    return analytic_probs(log_score, x, t, torch.zeros_like(t))[..., :-1]


@torch.no_grad()
def tau_leaping(score, x, num_steps, gumbel, probs=analytic_probs, eta=0.0, t0=0.3, t1=0.55):
    """From t = 1 to 0 in num_steps >= 1 evaluations; the last leaves no mask. -> codes (B, m)

    probs: of a step, `analytic_probs` or `euler_probs`. eta > 0 adds remasking (DLC Eq. 4): at times
    t0 < t < t1, an unmasked token is masked again with probability eta, or less if the schedule has
    no room.
    """
    def times(t):
        return torch.full((len(x),), t, dtype=torch.float64, device=x.device)

    start = x
    for i in reversed(range(1, num_steps)):
        t, s = (i + 1) / num_steps, i / num_steps
        log_score = score(x, times(t))
        # P(masked at t) = t, up to EPS. The share a of the unmasked is masked again, so the masked go
        # beyond s, to s - a (1 - t): then P(masked) = [s - a (1 - t)] + a (1 - t) = s, as scheduled
        a = min(eta, s / (1 - t)) if t0 < t < t1 else 0
        p = probs(log_score, x, times(t), times(s - a * (1 - t)))
        if a:
            unmasked = (x != p.shape[2] - 1) & (start == p.shape[2] - 1)  # what was given stays
            p[unmasked] *= 1 - a
            p[..., -1] += a * unmasked
        x = draw_codes(p.clamp_min(0).log(), gumbel(*p.shape[1:]))
    t = times(1 / num_steps)
    p = denoise_probs(score(x, t), x, t)
    return draw_codes(p.log(), gumbel(*p.shape[1:]))


@torch.no_grad()
def first_hitting(score, x, rand, gumbel):
    """The limit of `tau_leaping` for infinitely many steps, in m evaluations. -> codes (B, m)

    As P(masked at t) = t, each token unmasks at its own time, uniform on (0, 1), the latest time first
    (Zheng et al. 2024). Equivalently: t <- t u^(1/n) for n masked tokens, then a random position. Only
    ratios of scores are used; their sum (the rate) is ignored.
    """
    x, rows = x.clone(), torch.arange(len(x), device=x.device)
    times, order = rand(x.shape[1]).sort(dim=1, descending=True)
    for t, i in zip(times.T, order.T):
        log_p = score(x, t)[rows, i, :-1]
        x[rows, i] = torch.where(x[rows, i] == log_p.shape[1], draw_codes(log_p, gumbel(log_p.shape[1])), x[rows, i])
    return x


# ----------------------------------------------------------------------------------------------------
# the network


class SEDD(nn.Module):
    """Log-scores from a bidirectional Transformer of DiT's blocks, which time and class modulate.

    label_dim = 0: no classes. (Lou et al. have rotary positions, and no class.)
    """

    unit, nats_is_a_bound = "bits", True

    def __init__(self, num_latents, codebook_size, label_dim=0, layers=12, dim=512, heads=8):
        super().__init__()
        if dim % 2:
            raise ValueError(f"the width of this prior must be even, for its sines and cosines: {dim} is not")
        self.num_latents, self.codebook_size, self.label_dim = num_latents, codebook_size, label_dim
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Parameter(0.02 * torch.randn(label_dim + 1, dim))  # the last row: "no class"
        self.codebook = nn.Parameter(0.02 * torch.randn(codebook_size + 1, dim))  # the last row: mask
        self.position = nn.Parameter(0.02 * torch.randn(num_latents, dim))
        self.blocks = transformer(layers, dim, heads, block=AdaLNBlock)
        self.norm = nn.LayerNorm(dim)
        self.modulation = zero(nn.Linear(dim, 2 * dim))
        self.head = zero(nn.Linear(dim, codebook_size))  # starts uniform

    def transformed(self, h, t, labels=None):
        """The network on embedded tokens (B, m, dim), t: (B,), labels: (B,), -1 for none. -> (B, m, k) float32"""
        emb = float32(self.time, sinusoids(1000 * t, self.position.shape[1])) + class_rows(self.label, labels, len(h))
        emb = F.silu(emb)
        h = h + self.position
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=2)
        return float32(self.head, torch.addcmul(shift, self.norm(h), scale + 1))

    def forward(self, x, t, labels=None):
        """-> log-scores (B, m, k + 1)

        x: (B, m) int64, mask = k; t: (B,) in (0, 1]; labels: (B,), -1 for none
        """
        logits = self.transformed(F.embedding(x, self.codebook), t, labels)
        sigma = log_linear(t.float())[0][:, None, None]
        log_score = F.pad(logits - torch.expm1(sigma).log() - math.log(self.codebook_size), (0, 1))
        return log_score.scatter(2, x[..., None], 0)  # the score of the present token is 1

    def loss(self, codes, labels, t, u, network=None):
        """`sedd_loss` (B,) of the codes at times t (B,), masked by u (B, m), uniform on [0, 1).

        network: a wrapper to call in place of this module, such as DistributedDataParallel.
        """
        x = absorb(codes, t, u, mask=self.codebook_size)
        return sedd_loss((network or self)(x, t, labels), t, x, codes)

    def nats(self, codes, labels=None, generator=None):
        """An upper bound on -ln p(codes | labels) of `first_hitting`, on average over the generator. -> (B,)

        This is the negative ELBO of first-hitting, whose latent variables are the times in (0, 1] at
        which tokens unmask. It takes m evaluations.
        """
        nats, rows = 0, torch.arange(len(codes), device=codes.device)
        unmasked_at = 1 - torch.rand(codes.shape, generator=generator, device=codes.device)
        times, order = unmasked_at.sort(dim=1, descending=True)
        for t, i in zip(times.T, order.T):
            x = torch.where(unmasked_at <= t[:, None], self.codebook_size, codes)
            nats += F.cross_entropy(self(x, t, labels)[rows, i, :-1], codes[rows, i], reduction="none")
        return nats

    @torch.no_grad()
    def sample(self, noise, labels=None, sedd_sampler="first-hitting", sedd_steps=128, eta=0.0, t0=0.3, t1=0.55,
               given=None):
        """-> codes int64 (B, m), on the noise's device

        noise: a `SeededNoise` for B codes. sedd_sampler: "first-hitting", in m evaluations;
        "analytic" or "euler", in sedd_steps evaluations, with eta, t0, t1 of `tau_leaping`.
        given: int64 (B, m), codes that are known, -1 where they are to be drawn.
        """
        place = self.position.device
        wide = torch.float64 if has_float64(place) else torch.float32
        labels = labels if labels is None else labels.to(place)

        def score(x, t):
            return self(x.to(place), t.to(place, wide), labels).to(noise.device)

        x = torch.full((len(noise), self.num_latents), self.codebook_size, device=noise.device)
        x = with_given(x, given, self.codebook_size)
        if sedd_sampler == "first-hitting":
            # what is given unmasks first, so that times and masks go together for the rest as in training
            u = noise.rand(self.num_latents)
            order = (u + (x != self.codebook_size)).argsort(dim=1, descending=True)
            u = u.scatter(1, order, u.sort(dim=1, descending=True).values)
            return first_hitting(score, x, lambda m: u, noise.gumbel)
        probs = {"analytic": analytic_probs, "euler": euler_probs}[sedd_sampler]
        return tau_leaping(score, x, sedd_steps, noise.gumbel, probs, eta, t0, t1)
