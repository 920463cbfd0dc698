import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from docking.tests.published import filled, reference  # skips where RDKit is missing
from docking.complexes import gather
from docking.model import (
    Convolution, DisCoDock, EquivariantNorm, Prior, labels_of, smear, straight_through, time_embedding)
from docking.noise import rotation_matrix, sigma_at, so3_norm

CONV, REF = reference("conv"), reference("model")
KINDS = {"first": ((5, 0, 0, 0), (5, 3, 0, 0)), "full": ((5, 3, 3, 5), (5, 3, 3, 5))}


def parts(x, widths):
    s, v, w, p = x.split((widths[0], 3 * widths[1], 3 * widths[2], widths[3]), 1)
    return s, v.unflatten(1, (widths[1], 3)), w.unflatten(1, (widths[2], 3)), p


def flat(nodes):
    return torch.cat([x.flatten(1) for x in nodes], 1)


def bare(before, after):
    """A convolution that takes its weights as they are, without norm."""
    conv = Convolution(before, after, 1, 1, False, 0.0)
    conv.weights, conv.norm = nn.ModuleList([nn.Identity()]), nn.Identity()
    return conv


@pytest.mark.parametrize("name", KINDS)
def test_products_and_norms_of_e3nn(name):
    before, after = KINDS[name]
    z = {key.removeprefix(name + "_"): value for key, value in CONV.items() if key.startswith(name)}
    out = bare(before, after)(parts(z["x"], before), (z["receiver"], z["sender"]), F.normalize(z["vec"], dim=1),
                              [z["weight"]], 9)
    torch.testing.assert_close(flat(out), z["out"], rtol=0, atol=1e-6)
    norm = EquivariantNorm(after)
    torch.testing.assert_close(flat(norm(parts(z["out"], after))), z["batchnorm_train"], rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, z["running_mean"])
    torch.testing.assert_close(norm.running_var, z["running_var"])


def test_centre_of_e3nn():
    sv, vv, vw, ww, wv, pw = CONV["center_weight"].split((10, 6, 6, 6, 6, 10), 1)
    each = torch.arange(40)
    out = bare((5, 3, 3, 5), (0, 2, 2, 0))(parts(CONV["center_x"], (5, 3, 3, 5)), (each, each), F.normalize(
        CONV["center_vec"], dim=1), [torch.cat([sv, vv, wv, vw, ww, pw], 1)], 40)
    torch.testing.assert_close(flat(out), CONV["center_message"], rtol=0, atol=1e-5)


def test_embeddings():
    torch.testing.assert_close(smear(CONV["smear_distance"], 5), CONV["smear_5"], rtol=0, atol=1e-6)
    torch.testing.assert_close(time_embedding(CONV["time"]), CONV["time_embedding"], rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# the whole networks


def published_batch():
    """One complex twice: at t = 0.85 with codes, at t = 0.1 without."""
    bonds = REF["0_bond_index"].long()
    one = SimpleNamespace(
        residues=REF["0_rec_x"].long(), rec_pos=REF["0_rec_pos"], rec_edges=REF["0_rec_edge"].long(),
        atoms=REF["0_lig_x"].long(), bonds=bonds, bond_types=REF["0_bond_attr"].argmax(1),
        rotatable=bonds.T[REF["0_edge_mask"]])
    return gather([one, one]), torch.cat([REF["0_lig_pos"], REF["2_lig_pos"]])


@pytest.fixture(scope="module")
def model():
    return filled(DisCoDock())


def test_denoiser_of_the_release(model):
    batch, pos = published_batch()
    assert sum(p.numel() for p in model.score.parameters()) == 2_076_348
    t = torch.stack([REF["0_t"], REF["2_t"]]).float()
    codes = torch.stack([REF["0_latent"], REF["2_latent"]])
    null, sigma = torch.tensor([False, True]), sigma_at(t.double())
    nodes = flat(model.score.net(batch, pos, 3 * sigma[:, 0].float() + 20, t, labels_of(codes, batch), null))
    torch.testing.assert_close(nodes[:4], REF["lig_nodes"], rtol=0, atol=1e-5)
    torch.testing.assert_close(nodes[len(pos):len(pos) + 4], REF["rec_nodes"], rtol=0, atol=1e-5)
    translation, rotation, torsions = model.score(batch, pos, t, labels_of(codes, batch), null)
    torch.testing.assert_close(translation, REF["tr"], rtol=1e-5, atol=1e-6)
    # their norms: another convention and a table for rotations, 10,000 random draws for torsions
    ratio = so3_norm(sigma[:, 1] * 2 ** 0.5) * (3 / math.pi) ** 0.5 / so3_norm(sigma[:, 1])
    factor = rotation * ratio[:, None].float() / REF["rot"]
    torch.testing.assert_close(factor, factor[:, :1].expand(2, 3), rtol=1e-4, atol=0)
    assert (factor - 1).abs().max() < 0.02
    factor = torsions.view(2, 6) / REF["tor"].view(2, 6)
    torch.testing.assert_close(factor, factor[:, :1].expand(2, 6), rtol=1e-4, atol=0)
    assert (factor - 1).abs().max() < 0.05


def test_encoder_and_prior_of_the_release(model):
    batch, pos = published_batch()
    assert sum(p.numel() for p in model.encoder.parameters()) == 821_128
    logits = model.encoder(batch, torch.cat([REF["0_lig_pos_crystal"], REF["2_lig_pos_crystal"]]))
    expected = torch.stack([REF["0_encoder_logits"], REF["2_encoder_logits"]])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    prior = filled(Prior(), "ar.")
    prefix = torch.tensor([[REF[f"{i}_prior_prefix"].item(), -1] for i in (0, 2)])
    centred = (pos.view(2, -1, 3) - pos.view(2, -1, 3).mean(1, keepdim=True)).flatten(0, 1)
    logits = prior(batch, centred, prefix)
    torch.testing.assert_close(logits, torch.cat([REF["0_prior_logits"], REF["2_prior_logits"]]), rtol=0, atol=1e-5)


SMALL = dict(scalars=8, vectors=3, layers=4, encoder_vectors=2, encoder_layers=3, dropout=0.0)


def test_no_gradient_is_summed_in_an_order_that_threads_choose():
    batch, pos = published_batch()
    g = torch.Generator().manual_seed(0)
    gumbel, drop = torch.rand(2, 2, batch.most, generator=g), torch.zeros(2, dtype=torch.bool)
    *scores, _ = DisCoDock(**SMALL)(batch, pos, torch.tensor([0.85, 0.1]), pos, gumbel, drop)
    nodes, seen = [sum(x.sum() for x in scores).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert "IndexSelectBackward0" in names and "IndexBackward0" not in names


@pytest.mark.parametrize("channelwise", (False, True))
def test_rotated_poses_have_rotated_scores(channelwise):
    torch.manual_seed(0)
    model = DisCoDock(channelwise=channelwise, **SMALL)  # in training mode: the norms keep features large
    batch, pos = published_batch()
    t, null = torch.tensor([0.6, 0.3]), torch.tensor([False, True])
    labels = labels_of(torch.tensor([[3, 40], [-1, -1]]), batch)
    R = rotation_matrix(torch.tensor([0.5, -1.0, 2.0]))
    before = *model.score(batch, pos, t, labels, null), model.encoder(batch, pos)
    batch.rec_pos = batch.rec_pos @ R.T + 5
    after = *model.score(batch, pos @ R.T + 5, t, labels, null), model.encoder(batch, pos @ R.T + 5)
    for a, b in zip((before[0] @ R.T, before[1] @ R.T, *before[2:]), after):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a[a.isfinite()].abs().max().item())


@pytest.mark.parametrize("channelwise", (False, True))
def test_mirrored_nodes_change_the_signs_of_vectors_and_pseudoscalars(channelwise):
    torch.manual_seed(0)
    net = DisCoDock(channelwise=channelwise, **SMALL).score.net
    batch, pos = published_batch()
    given = (torch.tensor([60.0, 60.0]), torch.tensor([0.6, 0.3]), labels_of(torch.tensor([[3, 40], [-1, -1]]), batch),
             torch.tensor([False, True]))
    s, v, w, p = net(batch, pos, *given)
    batch.rec_pos = -batch.rec_pos
    mirrored = net(batch, -pos, *given)
    assert min(x.abs().max() for x in (s, v, w, p)) > 0.1
    for ours, expected in zip(mirrored, (s, -v, w, -p)):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_the_order_of_nodes_does_not_matter():
    torch.manual_seed(0)
    model = DisCoDock(channelwise=True, **SMALL)
    bonds = REF["0_bond_index"].long()
    n, r = len(REF["0_lig_x"]), len(REF["0_rec_x"])
    g = torch.Generator().manual_seed(0)
    a, b = torch.randperm(n, generator=g), torch.randperm(r, generator=g)  # new node i is old node a[i]

    def results(atoms, residues, pos, code):
        to_atom, to_residue = atoms.argsort(), residues.argsort()
        batch = gather([SimpleNamespace(
            residues=REF["0_rec_x"].long()[residues], rec_pos=REF["0_rec_pos"][residues],
            rec_edges=to_residue[REF["0_rec_edge"].long()], atoms=REF["0_lig_x"].long()[atoms],
            bonds=to_atom[bonds], bond_types=REF["0_bond_attr"].argmax(1),
            rotatable=to_atom[bonds.T[REF["0_edge_mask"]]])])
        moved = torch.tensor([[to_atom[code[0]].item(), n + to_residue[code[1] - n].item()]])
        scores = model.score(batch, pos[atoms], torch.tensor([0.5]), labels_of(moved, batch), torch.tensor([False]))
        return *scores, model.encoder(batch, pos[atoms])

    same = results(torch.arange(n), torch.arange(r), REF["0_lig_pos"], (5, n + 20))
    other = results(a, b, REF["0_lig_pos"], (5, n + 20))
    nodes = torch.cat([a, n + b])
    for x, y in zip((*same[:3], same[3][..., nodes]), other):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * x.abs().max().item())


def test_straight_through_codes_are_hard_with_a_soft_gradient():
    logits = torch.tensor([[[0.3, 1.0, -torch.inf]]], requires_grad=True)
    z = straight_through(logits.softmax(-1))
    assert z.tolist() == [[[0, 1, 0]]]
    z[0, 0, 0].backward()
    p = logits.softmax(-1)[0, 0, 0].item()
    assert logits.grad[0, 0, 0].item() == pytest.approx(p * (1 - p)) and logits.grad.isfinite().all()
