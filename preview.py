"""
What a person looks at while stage 1 trains: samples, and the loss at each noise level.

run: as in train_stage1.py.
"""

import numpy as np
import torch

import data
from diffusion import heun, loss_at
from model import denoiser, draw_codes
from noise import BatchNoise, gumbel_noise, has_float64, seeded_generator
from plot import save_grid


def codes_of(run, y, g):
    """Hard codes (B, m) of clean images, drawn from the averaged encoder."""
    logits = run.ema.encoder(y)
    return draw_codes(logits, gumbel_noise(logits.shape[:3], g))


@torch.no_grad()
def save_preview(run, path, rows=8, columns=8):
    """Draws rows of a held-out image, then samples that share its code (and class), as in Fig. 2b."""
    shown = run.to_show[:rows]
    y = data.to_float(run.images[shown], run.device)
    c = torch.from_numpy(run.labels[shown]).to(run.device).repeat_interleave(columns) if run.model.label_dim else None
    g = seeded_generator(run.device, "preview", run.config["seed"])
    z = codes_of(run, y, g).repeat_interleave(columns, dim=0) if run.model.num_latents else None
    noise = run.model.noise(BatchNoise(len(shown) * columns, g))
    noise = noise if has_float64(run.device) else noise.cpu()
    x = heun(denoiser(run.ema, c, z, autocast=run.autocast), noise).float()
    x = np.split(data.to_uint8(x, run.latents and run.latents.vae), len(shown))
    grid = np.concatenate([image for y, samples in zip(run.images[shown], x) for image in (y[None], samples)])
    titles = [run.classes[i] for i in run.labels[shown]] if run.model.label_dim else ()
    save_grid(grid, path, columns + 1, titles)


@torch.no_grad()
def print_losses(run, count=256, sigmas=(0.02, 0.1, 0.3, 1, 3, 10, 30, 80)):
    """The weighted loss per pixel on held-out images, per noise level (Fig. 7, left).

    It is computed with the images' own codes and with null latents: where they differ, the codes help.
    """
    shown, codes = run.to_show[:count], run.model.num_latents
    g = seeded_generator(run.device, "losses", run.config["seed"])
    kind = "held-out" if len(run.held_out_indices) else "training"
    print(f"loss on {len(shown)} {kind} images, lambda(sigma) |D - y|^2 / pixels")
    print("   sigma   own codes  null codes  null / own" if codes else "   sigma        loss")
    for level in sigmas:
        sums = [0.0, 0.0]
        for part in np.array_split(shown, -(-len(shown) // run.config["batch_gpu"])):
            images = data.to_float(run.images[part], run.device)
            y = run.latents.of(part) if run.latents else images
            c = torch.from_numpy(run.labels[part]).to(run.device) if run.model.label_dim else None
            n = run.model.noise(BatchNoise(len(y), g))
            z = codes_of(run, images, g) if codes else None
            for i in range(2 if codes else 1):
                denoise = denoiser(run.ema, c, z, guidance=1 - i, autocast=run.autocast)  # w = 0: null latents
                sums[i] += loss_at(denoise, y, n, torch.tensor(float(level)), run.ema.sigma_data).sum().item()
        own, null = sums[0] / len(shown), sums[1] / len(shown)
        print(f"{level:8g}  {own:10.4f}" + (f"  {null:10.4f}  {null / own:10.2f}" if codes else ""))
