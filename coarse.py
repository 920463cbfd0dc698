"""
Warms the encoder up, before stage 1: Alg. 1 on a coarse grid. (Ours, not the papers'.)

A small batch has few images at whose noise level a code can help, so that the encoder's gradient is
mostly noise, and beside an untrained denoiser the encoder can collapse to one code. The paper has 4,096
images per step instead. Here the encoder first learns beside a small denoiser of averaged images, 7 x 7
pixels of 28 x 28, at high noise alone. There every image needs its code, and a step costs little. The
encoder reads whole images, as ever. A small bonus on the entropy of each latent's codes, averaged over
the batch, keeps a latent from staying with the few codes it began with.

`warm_up` is a run of its own inside stage 1: with its own bar, log and place in the checkpoint.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

import training
from checkpoint import read_log, write_log
from configurator import arguments_of
from continuous import kl_divergence
from diffusion import loss_weight
from model import draw_codes, gumbel_softmax
from noise import gumbel_noise, seeded_generator
from processes import max_over_processes, mean_over_processes
from run import progress

SIGMA_MIN, SIGMA_MAX = 1, 30  # of averaged images: averaging p x p pixels divides their noise by p


class CoarseDenoiser(nn.Module):
    """An MLP as denoiser D(x, sigma, z, c) of averaged images, in EDM's preconditioning, and the encoder.

    The codes' embeddings are summed up: there is no Transformer between codes and denoiser.
    """

    def __init__(self, encoder, img_resolution, img_channels, label_dim, num_latents, codebook_size, sigma_data=0.5,
                 dim=64, width=256):
        super().__init__()
        self.encoder, self.sigma_data = encoder, sigma_data
        # the coarsest grid of at least 7 x 7 pixels
        self.pool = max(p for p in range(1, 1 + max(1, img_resolution // 7)) if img_resolution % p == 0)
        self.pixels = img_channels * (img_resolution // self.pool) ** 2
        self.codebook = nn.Parameter(torch.randn(num_latents, codebook_size, dim) / math.sqrt(num_latents))
        self.null = nn.Parameter(torch.zeros(dim))
        self.classes = nn.Parameter(torch.zeros(label_dim, dim)) if label_dim else None
        sizes = (self.pixels + 1 + dim, width, width, width)
        hidden = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(width, self.pixels))

    def averaged(self, y):
        """(B, C, H, W) -> (B, pixels)"""
        return F.avg_pool2d(y, self.pool).flatten(1)

    def forward(self, y, noise, sigma, labels, gumbel, drop, tau):
        """y: (B, C, H, W) clean images; noise: (B, pixels), scaled by sigma (B, 1); labels: (B,), -1 for none,
        or None if label_dim is 0; gumbel: (B, m, k); drop: (B,) bool, True for the null embedding

        -> D (B, pixels) and the encoder's logits (B, m, k), or (B, m, k, 2)
        """
        logits = self.encoder(y)
        continuous = logits.ndim == 4  # as in DisCoDiff
        z = draw_codes(logits, gumbel) / gumbel.shape[2] ** 0.5 if continuous else gumbel_softmax(logits, tau, gumbel)
        z = torch.einsum("bmk,mkd->bd", z, self.codebook)
        z = torch.where(drop[:, None], self.null, z)
        if self.classes is not None:
            z = z + torch.where(labels[:, None] < 0, 0, F.embedding(labels.clamp(min=0), self.classes))
        x, sd = self.averaged(y) + noise, self.sigma_data
        total = (sigma ** 2 + sd ** 2).sqrt()
        F_x = self.mlp(torch.cat([x / total, sigma.log() / 4, z], dim=1)).float()
        return sd ** 2 / total ** 2 * x + sigma * sd / total * F_x, logits


def prepare(run, state):
    """-> the phase, a run like stage 1's `run`, whose encoder it trains. state: run.carries["coarse"]"""
    config = run.config | dict(batch_size=run.config["coarse_batch"], total_images=run.config["coarse_images"])
    torch.manual_seed(config["seed"])
    model = CoarseDenoiser(run.model.encoder, **arguments_of(run.model_args, CoarseDenoiser)).to(run.device)
    model.requires_grad_(True)
    phase = SimpleNamespace(**vars(run) | dict(
        config=config, model=model, parameters=list(model.parameters()), step=state["step"],
        local_batch=config["batch_size"] // run.world, skipped=torch.zeros(2, device=run.device),
        log=f"{config['out_dir']}/coarse.jsonl", curves=f"{config['out_dir']}/coarse_curves.png"))
    phase.optimizer = torch.optim.Adam(phase.parameters, lr=config["coarse_lr"], fused=True)
    if phase.step:
        phase.model.load_state_dict(state["model"])
        phase.optimizer.load_state_dict(state["optimizer"])
    phase.forward = training.distributed(phase, phase.model)
    training.reset(phase)
    return phase


def draw_step(phase):
    """All random numbers of a step, as in train_stage1.py. -> noise (B, pixels), sigma (B, 1), Gumbel noise (B, m, k),
    which images get null latents (B,), which are mirrored (B,), of this process's images"""
    count, config = phase.config["batch_size"], phase.config
    g = seeded_generator(phase.device, "coarse", config["seed"], phase.step)
    normal = torch.randn(count, phase.model.pixels, device=phase.device, generator=g)
    u = torch.rand(count, 1, device=phase.device, generator=g)
    gumbel = gumbel_noise((count, config["num_latents"], config["codebook_size"]), g)
    drop = torch.rand(count, device=phase.device, generator=g) < config["null_prob"]
    flip = torch.rand(count, device=phase.device, generator=g) < (0.5 if config["xflip"] else 0)
    sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** u
    rows = slice(phase.rank * phase.local_batch, (phase.rank + 1) * phase.local_batch)
    return [t[rows] for t in (normal * sigma, sigma, gumbel, drop, flip)]


def gradients(phase, y, c):
    """Alg. 1, lines 4 to 7, on averaged images. -> mean loss per pixel; sum of code distributions; of entropies; or,
    of continuous latents, sum of KL divergences (m,)"""
    noise, sigma, gumbel, drop, flip = draw_step(phase)
    y = torch.where(flip[:, None, None, None], y.flip(3), y)
    with phase.autocast:
        D, logits = phase.forward(y, noise, sigma, c, gumbel, drop, phase.config["tau"])
        loss = (loss_weight(sigma, phase.model.sigma_data) * (D - phase.model.averaged(y)) ** 2).mean()
    if phase.config["continuous"]:
        divergence = kl_divergence(logits)  # (B, m), to a pixel of the whole image as in stage 1
        training.backward(phase, loss + phase.config["kld_weight"] * divergence.sum(1).mean() / y[0].numel())
        training.unscale(phase)
        return loss.detach(), divergence.detach().sum(0)
    of_images = logits.softmax(-1)  # (B, m, k)
    p = of_images.mean(0)
    used = mean_over_processes(p.detach()).to(p.device).clamp(min=1e-9)
    bonus = -(p * used.log()).sum()  # has the gradient of the entropy
    training.backward(phase, loss - phase.config["coarse_spread"] * bonus)
    training.unscale(phase)
    return loss.detach(), *training.usage(of_images)


def warm_up(run, fetch, signals):
    """Trains run.model.encoder until coarse_images are seen. A signal ends the run before.

    fetch: the one of train_stage1.py. run.carries["coarse"] says in the checkpoint how far the phase is.
    """
    state = run.carries["coarse"]
    training.require_same(run, state["step"])
    total, count = run.config["coarse_images"], run.config["coarse_batch"]
    if state["step"] * count >= total:
        return
    phase, stopped, lower = prepare(run, state), 0, run.lower
    run.lower = "--coarse_lr or --coarse_spread"
    seen = phase.step * count
    if run.master:
        write_log(phase.log, read_log(phase.log, seen), mode="w")
    bar = progress(total=total, initial=seen, unit="img", desc="encoder", disable=not run.master, mininterval=1)
    while seen < total and not stopped:
        _, c, images = fetch(run, seen + phase.rank * phase.local_batch, phase.local_batch)
        measured = gradients(phase, images, c)
        phase.optimizer.param_groups[0]["lr"] = phase.config["coarse_lr"] * min(20 * seen / total, 1)
        norm = training.gradient_norm(phase)
        training.guarded_step(phase.optimizer, norm, phase.skipped)
        training.add_up(phase, norm, *measured)
        phase.step, seen = phase.step + 1, seen + count
        bar.update(count)
        if training.due(phase.config["log_every"], seen, phase.config):
            steps, (norm, loss, *sums) = training.totals(phase, run.lower)
            told = training.of_divergence if phase.config["continuous"] else training.of_usage
            line, shown = told(*sums, steps * phase.local_batch)
            line |= dict(images=seen, loss=loss.item() / steps, grad_norm=norm.item() / steps)
            training.write_line(phase, line, bar, {"loss": f"{line['loss']:.4f}"} | shown)
        stopped = max_over_processes(max(signals, default=0))
        if training.due(phase.config["save_every"], seen, phase.config) or stopped:
            run.ema.encoder.load_state_dict(run.model.encoder.state_dict())
            run.carries["coarse"] = dict(step=phase.step)
            if seen < total:
                run.carries["coarse"] |= dict(model=phase.model.state_dict(), optimizer=phase.optimizer.state_dict())
            if run.master:
                training.save(run)
    bar.close()
    if seen < total:
        training.finish(phase, stopped, "images of the encoder's first phase")
    training.draw_curves(phase)
    run.model.encoder.requires_grad_(run.config["encoder_lr"] > 0)
    run.lower = lower
    training.reset(run)
