from pathlib import Path

import pytest
import torch

from docking.tests.published import reference  # skips where RDKit is missing
from configurator import UserError
from docking import data
from docking.complexes import (
    Chem, atom_features, bonds_of, complex_of, conformer, gather, match, neighbours, positions, read_ligand,
    read_protein, rmsd, rotatable, symmetries)
from docking.noise import turn

SHIPPED = Path(data.__file__).with_name("shipped")
REF = reference("model")


def files(name):
    return SHIPPED / name / f"{name}_protein_processed.pdb", SHIPPED / name / f"{name}_ligand.sdf"


def test_features_and_edges_of_the_release():
    protein, ligand = files("5l87")
    residues, rec_pos, names = read_protein(protein)
    assert names[:2] == ["SER A 5", "GLU A 6"] and len(names) == len(residues)
    mol = read_ligand(ligand)
    bonds, types = bonds_of(mol)
    assert torch.equal(residues, REF["0_rec_x"].long())
    torch.testing.assert_close(rec_pos - rec_pos.mean(0), REF["0_rec_pos"], rtol=0, atol=1e-5)
    torch.testing.assert_close(positions(mol) - rec_pos.mean(0), REF["0_lig_pos_crystal"], rtol=0, atol=1e-5)
    assert torch.equal(atom_features(mol), REF["0_lig_x"].long())
    assert torch.equal(bonds, REF["0_bond_index"].long()) and torch.equal(types, REF["0_bond_attr"].argmax(1))
    turning, turns = rotatable(bonds, len(bonds.unique()))
    assert torch.equal(turning, REF["0_bond_index"].long().T[REF["0_edge_mask"]])
    assert torch.equal(turns, REF["0_mask_rotate"])
    ours, theirs = (set(map(tuple, e.T.tolist())) for e in (neighbours(rec_pos), REF["0_rec_edge"].long()))
    assert ours == theirs


@pytest.mark.parametrize("name", ("3ptb", "2ndo"))
def test_symmetric_rmsd_of_spyrmsd(name):
    z = reference("rmsd")
    same = symmetries(z[f"{name}_atomic_numbers"], z[f"{name}_adjacency"].nonzero().T)
    for permutations, kind in ((same, "symmetric"), (same[:1], "plain")):
        ours = rmsd(z[f"{name}_poses"], z[f"{name}_ref"], permutations)
        torch.testing.assert_close(ours, z[f"{name}_{kind}"], rtol=0, atol=1e-6)


def test_matching_undoes_turns():
    """A pose whose bonds were turned by any angles comes back, up to rounding, before any step of Adam."""
    mol = read_ligand(files("5l87")[1])
    pos, (bonds, _) = positions(mol), bonds_of(mol)
    turning, turns = rotatable(bonds, len(pos))
    angles = torch.linspace(-3, 3, len(turning))[None]
    turned = turn(pos[None], angles, turning, turns)[0]
    assert (turned - pos).norm(dim=1).max() > 3
    torch.testing.assert_close(match(turned, pos, turning, turns, bonds, steps=1), pos, rtol=0, atol=1e-3)


def test_matching_a_conformer():
    mol = read_ligand(files("2w0s")[1])
    pos, (bonds, _) = positions(mol), bonds_of(mol)
    turning, turns = rotatable(bonds, len(pos))
    made_up = conformer(mol, 3)
    same = torch.arange(len(pos))[None]
    first, last = (rmsd(match(made_up, pos, turning, turns, bonds, steps)[None], pos, same).item() for steps in (1, 40))
    assert last < first < 2 and last < 1


def test_ligands_without_a_bond_that_turns():
    benzene = read_ligand("c1ccccc1")
    c = complex_of(read_protein(files("5l87")[0]), benzene, pose=False)
    assert len(c.rotatable) == 0 and c.turns.shape == (0, 6) and len(c.symmetries) == 12 and c.pos.isnan().all()
    batch = gather([c, c])
    assert batch.size == 2 and batch.most == 6 + 62 and batch.rank[-1] == 67 and batch.rec_edges.max() == 123


def test_carboxylates_and_rings_turn():
    bonds, _ = bonds_of(read_ligand("NCCCC(=O)O"))
    turning, turns = rotatable(bonds, 7)
    assert turns.sum(1).tolist() == [2, 3, 3]
    assert all(not moving[u] and moving[v] for (u, v), moving in zip(turning.tolist(), turns))


@pytest.mark.parametrize("text, error", [
    ("not a molecule", "RDKit can't read"), ("C1CC", "RDKit can't read"), ("nowhere.sdf", "there is no ligand"),
    ("C", "two heavy atoms"), ("CC.CC", "more than one molecule")])
def test_ligands_that_make_no_sense(text, error):
    with pytest.raises(UserError, match=error):
        read_ligand(text)


def test_files_that_make_no_sense(tmp_path):
    (tmp_path / "x.sdf").write_text("nothing\n")
    with pytest.raises(UserError, match="RDKit can't read"):
        read_ligand(tmp_path / "x.sdf")
    for text, error in (("", "no protein"), ("HETATM    1 CA    CA A   1       0.000   0.000   0.000\n", "no protein"),
                        ("ATOM      1  CA  ALA A   1       0.0xx   0.000   0.000\n", "no position"),
                        ("ATOM      1  CA  ALA A   1         nan   0.000   0.000\n", "no position")):
        (tmp_path / "x.pdb").write_text(text)
        with pytest.raises(UserError, match=error):
            read_protein(tmp_path / "x.pdb")
    with pytest.raises(UserError, match="can't read the protein"):
        read_protein(tmp_path / "y.pdb")


def test_a_ligand_far_from_the_protein():
    residues, rec_pos, _ = read_protein(files("5l87")[0])
    with pytest.raises(UserError, match="Angstrom apart"):
        complex_of((residues, rec_pos + 100), read_ligand(files("5l87")[1]))


def test_alternative_positions_and_models(tmp_path):
    line = "ATOM      1 {:4s}{}ALA A{:4d}    {:8.3f}   0.000   0.000"
    rows = [line.format(atom, alternative, 1, x) for atom, alternative, x in (
        (" N  ", " ", 0), (" CA ", "A", 1), (" CA ", "B", 9), (" C  ", " ", 2), (" O  ", " ", 3))]
    rows += [line.format(" CA ", " ", 2, 5)]
    rows += [line.format(a, " ", 4, 6).replace("A   4 ", "    4B") for a in (" N  ", " CA ", " C  ")]
    rows += ["ENDMDL"] + [line.format(a, " ", 3, 7) for a in (" N  ", " CA ", " C  ")]
    (tmp_path / "x.pdb").write_text("\n".join(rows))
    residues, pos, names = read_protein(tmp_path / "x.pdb")
    assert residues.tolist() == [0, 0] and pos.tolist() == [[1, 0, 0], [6, 0, 0]]  # residue 2 lacks N and C
    assert names == ["ALA A 1", "ALA 4B"]  # the second has no chain


def test_conformers_depend_on_the_seed_alone():
    mol = Chem.MolFromSmiles("NCCCC(=O)O")
    assert torch.equal(conformer(mol, 5), conformer(mol, 5)) and not torch.equal(conformer(mol, 5), conformer(mol, 6))
