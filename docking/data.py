"""
Prepares complexes: reads proteins and ligands, makes conformers, matches their torsions.

    python docking/data.py                                                    # the shipped ones
    python docking/data.py --source=PDBBind --name=pdbbind --ids=train.txt    # your own copy, PDBBind's layout

Each complex is a folder source/ID with ID_protein_processed.pdb and ID_ligand.sdf (or .mol2). Writes
datasets/docking/NAME.pt, which train.py and dock.py read by --dataset=NAME. Complexes that can't be read
are left out, with a line that says why.
"""

import math
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder

import torch

from checkpoint import atomic, read_checkpoint, weights_checksum
from configurator import UserError, configure, require, say
from docking.complexes import ATOM_FEATURES, RESIDUES, Complex, complex_of, neighbours, read_ligand, read_protein
from noise import seed_of
from processes import barrier
from run import progress

source = "docking/shipped"
ids = ""  # a file with an ID in each line, in `source` or elsewhere; "": every folder of source
name = "mine"  # of the data set
crop = 0.0  # keep residues within this many Angstrom of the ligand: faster, but it gives the pocket away. 0: all
most = 24  # edges from a residue, to its nearest
seed = 0  # of the conformers

HERE = Path(__file__).resolve().parent
FEATURES = [*ATOM_FEATURES, len(RESIDUES)]  # what networks are trained on
SHIPPED = {"shipped": ("train.txt", 15.0, 12), "shipped-test": ("test.txt", 15.0, 12),
           "shipped-whole": ("train.txt", 0.0, 24), "shipped-whole-test": ("test.txt", 0.0, 24)}


def files_of(folder):
    """-> protein and ligand files of a complex's folder; UserError if there are none"""
    for protein in (folder / f"{folder.name}_protein_processed.pdb", folder / f"{folder.name}_protein.pdb"):
        for ligand in (folder / f"{folder.name}_ligand.sdf", folder / f"{folder.name}_ligand.mol2"):
            if protein.is_file() and ligand.is_file():
                return protein, ligand
    raise UserError(f"{folder} has no {folder.name}_protein_processed.pdb and {folder.name}_ligand.sdf (or .mol2)")


def cropped(c, radius, most):
    """The complex with the residues within `radius` of the true pose alone, centred on them. radius 0: all"""
    keep = torch.cdist(c.rec_pos, c.pos).min(1).values < (radius or torch.inf)
    require(keep.any(), f"no residue is within {radius:g} Angstrom of the ligand")
    shift = c.rec_pos[keep].mean(0)
    c.residues, c.rec_pos = c.residues[keep], c.rec_pos[keep] - shift
    c.centre, c.pos, c.matched = c.centre + shift, c.pos - shift, c.matched - shift
    c.rec_edges = neighbours(c.rec_pos, most=most)
    return c


def prepare(folder, chosen, radius, edges, conformer_seed):
    """-> [(ID, Complex)] of the complexes that can be read; of the others a line says why not"""
    read = []
    for one in progress(chosen, desc="complexes"):
        try:
            protein, ligand = files_of(Path(folder) / one)
            try:
                mol = read_ligand(ligand)
            except UserError:  # PDBBind's .sdf files are not all readable
                other = ligand.with_suffix(".mol2")
                if not other.is_file():
                    raise
                mol = read_ligand(other)
            c = complex_of(read_protein(protein), mol, seed_of("conformer", conformer_seed) % 2 ** 31)
            read.append((one, cropped(c, radius, edges)))
        except UserError as error:
            say(f"{one} is left out: {error}")
    require(read, f"no complex in {folder} can be used")
    return read


def save(path, read):
    with atomic(path) as file:
        torch.save({"features": FEATURES, "complexes": [(one, vars(c)) for one, c in read]}, file)


def load(dataset):
    """-> IDs, Complexes of a prepared data set. The shipped ones are prepared when they are first used."""
    path = HERE.parent / "datasets" / "docking" / f"{dataset}.pt"
    content = read_checkpoint(path)
    barrier()  # process 0 may write the file
    if dataset in SHIPPED and not (content and content.get("features") == FEATURES):  # not yet, or damaged
        if os.environ.get("RANK", "0") == "0":
            listed, radius, edges = SHIPPED[dataset]
            chosen = (HERE / "shipped" / listed).read_text().split()
            save(path, prepare(HERE / "shipped", chosen, radius, edges, 0))
        barrier()
        content = read_checkpoint(path)
    require(isinstance(content, dict) and "complexes" in content,
            f"there is no data set {dataset}, or {path} is damaged: python docking/data.py --source=... "
            f"--name={dataset} prepares one; {', '.join(SHIPPED)} need nothing")
    require(content["features"] == FEATURES, f"{path} was prepared with other features: prepare it again")
    names, complexes = zip(*content["complexes"])
    return list(names), [Complex(**c) for c in complexes]


def identity(complexes):
    """A number that tells data sets apart by their residues, atoms and bonds: any machine finds the same."""
    return weights_checksum({(i, part): getattr(c, part) for i, c in enumerate(complexes)
                             for part in ("residues", "atoms", "bonds", "bond_types")})


def main(argv=()):
    configure(globals(), argv)
    require(0 <= crop < math.inf and most > 0, f"crop is 0 or more, most 1 or more: they are {crop:g} and {most}")
    require(name and Path(name).name == name,
            f"--name={name} is no name for a data set: it can't be empty nor have folders")
    require(name not in SHIPPED, f"--name={name} is a data set that comes with docking/: choose another")
    require(Path(source).is_dir(), f"--source={source} is no folder: it has a folder for each complex")
    listed = next((path for path in (Path(source, ids), Path(ids)) if path.is_file()), None)
    require(listed or not ids, f"there is no file {ids} with IDs, neither in {source} nor here")
    chosen = listed.read_text().split() if listed else sorted(p.name for p in Path(source).iterdir() if p.is_dir())
    read = prepare(source, chosen, crop, most, seed)
    path = HERE.parent / "datasets" / "docking" / f"{name}.pt"
    save(path, read)
    print(f"{path}: {len(read)} complexes of {len(chosen)}; next: python docking/train.py --dataset={name}")


if __name__ == "__main__":
    main(sys.argv[1:])
