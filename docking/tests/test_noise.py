import math

import pytest
import torch

from docking.tests.published import reference  # skips where RDKit is missing
from docking.noise import (
    ROTATION, TORSION, TRANSLATION, align, move, reverse_step, rotation_matrix, sigma_at, so3_angle, so3_density,
    so3_draw, so3_norm, so3_score, so3_score_vector, torus_norm, torus_score, turn)

REF = reference("noise")
S = (3 / math.pi) ** 0.5  # the authors divide by pi where the mean over axes divides by 3


def grid(name, columns):
    return torch.broadcast_tensors(REF[columns][None], REF[name][:, None])


def test_rotations_against_the_authors():
    omega, eps = grid("so3_eps", "so3_omega")
    known = REF["so3_density"] > 1e-6  # elsewhere their series is rounding noise
    f = so3_density(omega, eps)
    for ours, theirs in ((f, REF["so3_series"]), (f * (1 - omega.cos()) / math.pi, REF["so3_density"]),
                         (so3_score(omega, eps), REF["so3_score"])):
        torch.testing.assert_close(ours[known], theirs[known], rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(so3_norm(REF["so3_eps"]) * S, REF["so3_norm"], rtol=1e-3, atol=0)


def test_look_ups_of_the_authors():
    """Their table is of sqrt(2) eps, and takes the nearest of 1,000 entries."""
    eps = REF["lookup_eps"] * 2 ** 0.5
    torch.testing.assert_close(so3_score_vector(REF["lookup_vec"], eps), REF["lookup_score"], rtol=0.05, atol=0)
    torch.testing.assert_close(so3_norm(eps) * S, REF["lookup_score_norm"].double(), rtol=0.05, atol=0)
    torch.testing.assert_close(so3_angle(REF["lookup_u"], eps), REF["lookup_omega"], rtol=0.005, atol=0)


def test_small_rotations_are_a_normal_in_space():
    eps = torch.tensor([0.03], dtype=torch.float64)
    assert so3_norm(eps).item() * 0.03 == pytest.approx(1, abs=1e-3)
    vector = torch.tensor([[0.02, -0.03, 0.01]], dtype=torch.float64)
    torch.testing.assert_close(so3_score_vector(vector, eps), -vector / 0.03 ** 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("eps", (0.05, 0.5, 1.5))
def test_draws_follow_the_density(eps, g=torch.Generator().manual_seed(0)):
    n, level = 2_000, torch.full((2_000,), eps, dtype=torch.float64)
    drawn = so3_draw(torch.randn(n, 3, generator=g, dtype=torch.float64), torch.rand(n, generator=g), level)
    score = so3_score_vector(drawn, level)
    assert score.square().mean().sqrt().item() == pytest.approx(so3_norm(level[:1]).item(), rel=0.05)
    assert drawn.mean(0).abs().max() < 5 * eps / n ** 0.5


def test_torsions_against_the_authors():
    x, sigma = grid("torus_sigma", "torus_x")
    ours, known = torus_score(x, sigma), REF["torus_score"].isfinite()
    torch.testing.assert_close(ours[known], REF["torus_score"][known], rtol=1e-9, atol=1e-9)
    assert ours.isfinite().all()
    torch.testing.assert_close(torus_norm(REF["torus_sigma"]) ** 2, REF["torus_norm"], rtol=1e-9, atol=0)


def test_moves_of_the_authors():
    pos, tr, rot, tor = (REF[f"moves_{part}"].double() for part in ("pos", "tr", "rot", "tor"))
    pos = pos.expand(3, -1, -1)
    bonds, turns = REF["moves_bond_index"].T[REF["moves_edge_mask"]], REF["moves_mask_rotate"]
    for ours, name in ((move(pos, tr, rot, tor, bonds, turns), "moved"),
                       (turn(pos, tor, bonds, turns), "torsions_only"),
                       (move(pos, tr, rot, tor[:, :0], bonds[:0], turns[:0]), "moved_rigid")):
        torch.testing.assert_close(ours, REF[f"moves_{name}"].double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("run", ("steps", "steps_plain"))
def test_steps_of_the_authors(run):
    """Their sampler, at Table 4's temperatures without noise in the last step, and plain."""
    z = {name.removeprefix(f"{run}_"): value for name, value in REF.items() if name.startswith(f"{run}_t")
         or name.startswith(run)}
    times, pos = z["t"].tolist() + [0.0], z["start"].double()
    torch.testing.assert_close(sigma_at(z["t"]), z["sigma"], rtol=1e-12, atol=0)
    trace = []
    for i in range(len(times) - 1):
        changes = []
        low = [z[f"temp_{part}"].tolist() for part in ("sampling", "psi", "sigma_data")]
        for j, (kind, name) in enumerate(((TRANSLATION, "tr"), (ROTATION, "rot"), (TORSION, "tor"))):
            noise = z[f"{name}_z"][i].double() if i < len(z[f"{name}_z"]) else 0.0
            score, level = z[f"{name}_score"][i].double(), z["sigma"][i, j].item()
            changes.append(reverse_step(kind, score, noise, level, times[i] - times[i + 1], *(row[j] for row in low)))
        pos = move(pos, *changes, z["bond_index"].T[z["edge_mask"]], z["mask_rotate"])
        trace.append(pos)
    n = len(trace)
    ours = torch.stack([trace[i] for i in (0, n // 2, n - 1)])
    torch.testing.assert_close(ours, z["trace"].double(), rtol=0, atol=1e-3)


def test_align_never_reflects():
    g = torch.Generator().manual_seed(1)
    pos, rotation = torch.randn(4, 7, 3, generator=g), torch.randn(4, 3, generator=g)
    moved = pos @ rotation_matrix(rotation).mT + 3
    torch.testing.assert_close(align(pos, moved), moved, rtol=0, atol=1e-5)
    assert (align(pos * torch.tensor([1, 1, -1]), pos) - pos).square().sum(-1).mean() > 0.1
