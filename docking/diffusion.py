"""
Training targets and sampling of poses: what train.py, dock.py and toy_pocket.py share.

  Draws, disturb, losses    a batch of noisy poses, their scores, and the loss (DiffDock sec. 4; DisCo-Diff App. E)
  random_starts, sample     poses of one complex from noise, by the reverse SDE
"""

import math
from dataclasses import dataclass

import torch

from configurator import require
from docking.complexes import gather
from docking.noise import (
    ROTATION, TORSION, TRANSLATION, move, reverse_step, sigma_at, so3_draw, so3_norm, so3_score_vector,
    torus_norm, torus_score)
from noise import gumbel_noise


@dataclass
class Draws:
    """All random numbers of one step, for B complexes."""
    t: torch.Tensor  # (B,) times
    translation: torch.Tensor  # (B, 3)
    axis: torch.Tensor  # (B, 3)
    u: torch.Tensor  # (B,) share of rotations below this one
    torsions: torch.Tensor  # (B, T), of as many bonds as a ligand can have
    drop: torch.Tensor  # bool (B,): without codes
    gumbel: torch.Tensor  # (B, m, K), for as many nodes as a complex can have

    def __getitem__(self, rows):
        return Draws(*(value[rows] for value in vars(self).values()))

    def to(self, device):
        return Draws(*(value.to(device) for value in vars(self).values()))


def draw(count, torsions, latents, nodes, null_prob, g):
    """-> Draws for `count` complexes, from the generator g"""
    u = torch.rand(3, count, generator=g, device=g.device)
    normal = torch.randn(count, 6 + torsions, generator=g, device=g.device)
    return Draws(u[0].sqrt().clamp_min(1e-3),  # Beta(2, 1)
                 normal[:, :3], normal[:, 3:6], u[1], normal[:, 6:], u[2] < null_prob,
                 gumbel_noise((count, latents, nodes), g))


def disturb(complexes, poses, draws):
    """Forward diffusion of clean poses, one (L, 3) for each complex.

    -> noisy poses (n, 3), one after another, and the scores that a denoiser should give: translation (B, 3),
    rotation (B, 3), torsions of all bonds
    """
    sigma = sigma_at(draws.t.double()).to(draws.t)
    translation = draws.translation * sigma[:, :1]
    rotation = so3_draw(draws.axis, draws.u, sigma[:, 1])
    noisy, torsion_scores = [], []
    for i, (c, pos) in enumerate(zip(complexes, poses)):
        torsions = draws.torsions[i, :len(c.rotatable)] * sigma[i, 2]
        noisy.append(move(pos[None], translation[i:i + 1], rotation[i:i + 1], torsions[None], c.rotatable, c.turns)[0])
        torsion_scores.append(torus_score(torsions, sigma[i, 2].expand(len(torsions))))
    targets = -translation / sigma[:, :1] ** 2, so3_score_vector(rotation, sigma[:, 1]), torch.cat(torsion_scores)
    return torch.cat(noisy), targets


def losses(scores, targets, draws, batch):
    """Squared errors in units of the scores' own size -> translation (B,), rotation (B,), torsions (all bonds,)

    A network that returns 0 has about 1 in each.
    """
    sigma = sigma_at(draws.t.double())
    of_bond = sigma[:, 2][batch.graph[batch.rotatable[:, 0]]]
    sizes = (1 / sigma[:, :1], so3_norm(sigma[:, 1:2]), torus_norm(of_bond))
    errors = [((s - target) / size.to(s)) ** 2 for s, target, size in zip(scores, targets, sizes)]
    return errors[0].mean(1), errors[1].mean(1), errors[2]


def total(errors):
    """The loss: a third of each kind's mean; ligands without rotatable bonds add nothing to the third."""
    return sum(e.mean() if len(e) else e.sum() for e in errors) / 3


# ----------------------------------------------------------------------------------------------------
# sampling


def uniform_rotations(q):
    """Rotation vectors (B, 3), uniform among all rotations, from normal draws (B, 4): a random quaternion."""
    q = q / q.norm(dim=1, keepdim=True) * q[:, :1].sign()
    return q[:, 1:] / q[:, 1:].norm(dim=1, keepdim=True) * 2 * q[:, :1].acos()


def random_starts(complex_, noise):
    """Poses (N, L, 3) at t = 1: torsions and rotation uniform, translation N(0, 19^2).

    noise: SeededNoise of N rows, as in noise.py of the repository
    """
    rotation = uniform_rotations(noise.randn(4))
    torsions = 2 * math.pi * noise.rand(len(complex_.rotatable)) - math.pi
    made_up = complex_.conformer.double() - complex_.conformer.double().mean(0)
    return move(made_up.expand(len(noise), -1, -1), TRANSLATION[1] * noise.randn(3), rotation, torsions,
                complex_.rotatable, complex_.turns)


@torch.no_grad()
def sample(score, complex_, noise, num_steps=20, low_temperature=((1.0, 0.0, 0.5),) * 3, batch_size=40, device="cpu"):
    """Poses of one complex: num_steps Euler-Maruyama steps from t = 1, without noise in the last.

    score(batch, pos, t, rows): the denoiser, which runs on `device`; rows: slice of the samples at hand;
    noise: SeededNoise of N rows, one for each sample; low_temperature: (tau, psi, sigma_data) of
    translation, rotation, torsions; batch_size: samples at once. -> (N, L, 3) float64. Raises UserError if
    the poses diverge.
    """
    pos = random_starts(complex_, noise)
    for step in range(num_steps):
        t, dt = 1 - step / num_steps, 1 / num_steps
        sigma = sigma_at(torch.tensor(t, dtype=torch.float64)).tolist()
        parts = [[], [], []]
        for first in range(0, len(pos), batch_size):
            part = pos[first:first + batch_size]
            batch = gather([complex_] * len(part), device)
            out = score(batch, part.flatten(0, 1).float().to(device), torch.full((len(part),), t, device=device),
                        slice(first, first + len(part)))
            for kind, x in zip(parts, out):
                kind.append(x.reshape(len(part), -1).double().to(pos.device))
        last = step == num_steps - 1
        changes = [reverse_step(kind, s, torch.zeros_like(s) if last else noise.randn(s.shape[1]), level, dt, *low)
                   for kind, s, level, low in zip((TRANSLATION, ROTATION, TORSION), map(torch.cat, parts), sigma,
                                                  low_temperature)]
        require(all(x.isfinite().all() for x in changes),
                f"the poses diverge at step {step + 1} of {num_steps}: more num_steps or a tau nearer to 1 may help")
        pos = move(pos, *changes, complex_.rotatable, complex_.turns)
    return pos
