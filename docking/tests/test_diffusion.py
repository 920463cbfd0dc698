import math
from types import SimpleNamespace

import pytest
import torch

from docking.tests.published import reference  # skips where RDKit is missing
from configurator import UserError
from docking.complexes import complex_of, gather, read_ligand, rmsd
from docking.diffusion import disturb, draw, losses, sample, total, uniform_rotations
from docking.noise import rotation_matrix, sigma_at, so3_norm
from noise import SeededNoise

REF = reference("model")


def test_losses_of_the_release():
    """Theirs of the network and of a zero network; norms of rotations and torsions differ by up to 3 %."""
    t = torch.stack([REF["0_t"], REF["2_t"]])
    targets = [torch.cat([REF[f"{i}_{kind}_score"] for i in (0, 2)]) for kind in ("tr", "rot", "tor")]
    sigma = sigma_at(t)[:, 1]
    ratio = (so3_norm(sigma * 2 ** 0.5) / so3_norm(sigma)) ** 2 * 3 / math.pi  # theirs has sqrt(2) eps, pi for 3
    graph = torch.arange(2).repeat_interleave(6)
    batch = SimpleNamespace(graph=graph, rotatable=torch.arange(12)[:, None])
    for first, scores in ((1, [REF["tr"], REF["rot"], REF["tor"]]), (4, [torch.zeros_like(x) for x in targets])):
        translation, rotation, torsion = losses(scores, targets, SimpleNamespace(t=t), batch)
        torsion = torch.stack([torsion[graph == i].mean() for i in (0, 1)])
        torch.testing.assert_close(translation, REF["loss"][first], rtol=1e-5, atol=0)
        torch.testing.assert_close(rotation / ratio, REF["loss"][first + 1].double(), rtol=0.05, atol=0)
        torch.testing.assert_close(torsion, REF["loss"][first + 2], rtol=0.05, atol=0)


def a_complex(smiles="NCCCC(=O)O"):
    residues = torch.arange(12)
    pos = 8 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    c = complex_of((residues, pos), read_ligand(smiles), pose=False)
    c.pos = c.matched = c.conformer + torch.tensor([3.0, 0, 0])
    return c


def test_a_network_of_zeros_has_a_loss_of_one():
    c, g = a_complex(), torch.Generator().manual_seed(0)
    sums = torch.zeros(3)
    for _ in range(20):
        draws = draw(32, 3, 1, len(c), 0.1, g)
        _, targets = disturb([c] * 32, [c.pos] * 32, draws)
        errors = losses([torch.zeros_like(x) for x in targets], targets, draws, gather([c] * 32))
        sums += torch.stack([e.mean() for e in errors]) / 20
    torch.testing.assert_close(sums, torch.ones(3), rtol=0.1, atol=0)


@pytest.mark.parametrize("smiles", ("NCCCC(=O)O", "c1ccccc1"))
def test_the_exact_scores_lead_to_the_pose(smiles):
    """Translation's and rotation's scores of one pose, exactly; the sampler ends near it."""
    c = a_complex(smiles)

    def score(batch, pos, t, rows):
        pos = pos.view(batch.size, -1, 3)
        sigma = sigma_at(t.double()).float()
        translation = (c.pos.mean(0) - pos.mean(1)) / sigma[:, :1] ** 2
        return translation, torch.zeros(batch.size, 3), torch.zeros(batch.size * len(c.rotatable))

    poses = sample(score, c, SeededNoise("x", range(6)), 20, batch_size=4)
    assert poses.shape == (6, len(c.atoms), 3)
    assert (poses.mean(1) - c.pos.mean(0)).norm(dim=1).max() < 2.5
    same = sample(score, c, SeededNoise("x", range(2, 5)), 20, batch_size=1)
    torch.testing.assert_close(same, poses[2:5], rtol=0, atol=1e-4)  # a pose depends on its own seed alone


def test_poses_that_diverge_end_in_one_line():
    c = a_complex()

    def score(batch, pos, t, rows):
        return pos.new_zeros(batch.size, 3), pos.new_full((batch.size, 3), torch.inf), pos.new_zeros(3 * batch.size)

    with pytest.raises(UserError, match="diverge at step 1 of 20"):
        sample(score, c, SeededNoise("x", range(2)))


def test_uniform_rotations():
    q = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    R = rotation_matrix(uniform_rotations(q))
    assert R.mean(0).abs().max() < 0.05 and (R.square().mean(0) - 1 / 3).abs().max() < 0.03


def test_ligands_that_cannot_turn_have_a_loss():
    c, g = a_complex("c1ccccc1"), torch.Generator().manual_seed(0)
    draws = draw(2, 3, 0, 0, 0.0, g)
    noisy, targets = disturb([c, c], [c.pos, c.pos], draws)
    errors = losses([torch.zeros_like(x) for x in targets], targets, draws, gather([c, c]))
    assert noisy.shape == (12, 3) and len(errors[2]) == 0 and total(errors).isfinite()
    assert rmsd(noisy[None, :6], c.pos, c.symmetries).item() > 0
