"""
Files to tensors: proteins (PDB), ligands (SDF, MOL2, SMILES), and what docking needs to know of them.

  read_protein, read_ligand     files -> residues and C-alphas; an RDKit molecule without hydrogens
  rotatable, symmetries         bonds that turn; the ways in which a molecule looks the same
  conformer, match              a pose that RDKit makes up, and its torsions turned to those of another
  Complex, complex_of, gather   all of it, as tensors; several of them as one batch
  rmsd                          between poses, the least over the symmetries

Positions are in Angstrom. Those of a Complex are relative to the mean of the protein's C-alphas.
Files are read as text, by RDKit or here; a file that makes no sense raises UserError.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import UserError, require
from docking.noise import align, turn

try:
    from rdkit import Chem, RDLogger
    from rdkit.Chem import AllChem
    RDLogger.DisableLog("rdApp.*")  # what it would say, our errors say
except ImportError:  # before any script could turn an exception into one line
    print("error: docking needs RDKit: pip install -r docking/requirements.txt", file=sys.stderr)
    sys.exit(2)

# ----------------------------------------------------------------------------------------------------
# proteins

RESIDUES = ("ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL HIP HIE TPO HID LEV "
            "MEU PTR GLV CYT SEP HIZ CYM GLM ASQ TYS CYX GLZ other").split()


def read_protein(path):
    """-> residue types int64 (R,), indices of RESIDUES; C-alpha positions (R, 3); names, a list: "LYS A 45", by
    the file's chain and number. First model, first alternative"""
    residues = {}  # chain and number: type, {atom: position}
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"can't read the protein {path}: {error.strerror}") from None
    for line in lines:
        if line.startswith("ENDMDL"):
            break
        if line.startswith(("ATOM", "HETATM")) and line[12:16] in (" N  ", " CA ", " C  "):  # calcium is "CA  "
            kind, atoms = residues.setdefault(line[21:27], (line[17:20].strip(), {}))
            try:
                position = [float(line[i:i + 8]) for i in (30, 38, 46)]
            except ValueError:
                position = [torch.nan]
            require(all(abs(x) < 1e5 for x in position), f"{path}: this line has no position: {line.rstrip()}")
            atoms.setdefault(line[12:16].strip(), position)
    whole = [(kind, atoms["CA"], " ".join(f"{kind} {place[0]} {place[1:]}".split()))
             for place, (kind, atoms) in residues.items() if len(atoms) == 3]
    require(whole, f"{path} has no protein: no residue with the atoms N, CA and C, in PDB format")
    kinds, alphas, names = zip(*whole)
    types = [RESIDUES.index(kind) if kind in RESIDUES else len(RESIDUES) - 1 for kind in kinds]
    return torch.tensor(types), torch.tensor(alphas), list(names)


def neighbours(pos, radius=15.0, most=24):
    """Edges (2, E) from each residue to its `most` nearest within `radius`, or to the nearest alone."""
    distance = torch.cdist(pos, pos).fill_diagonal_(torch.inf)
    near = distance.topk(min(most, max(len(pos) - 1, 0)), largest=False)
    keep = near.values <= radius
    keep[:, :1] = True
    receiver = torch.arange(len(pos))[:, None].expand_as(keep)
    return torch.stack([receiver[keep], near.indices[keep]])


# ----------------------------------------------------------------------------------------------------
# ligands


def read_ligand(text):
    """-> an RDKit molecule of heavy atoms, from the first entry of an .sdf or .mol2 file, or from SMILES

    It has a pose if it is from a file.
    """
    reader = {".sdf": Chem.MolFromMolFile, ".mol": Chem.MolFromMolFile,
              ".mol2": Chem.MolFromMol2File}.get(Path(text).suffix.lower())
    try:
        if reader:
            require(Path(text).is_file(), f"there is no ligand {text}")
            mol = reader(str(text))
        else:
            mol = Chem.MolFromSmiles(text)
        mol = mol and Chem.RemoveAllHs(mol)
    except (RuntimeError, ValueError, OSError):
        mol = None
    require(mol is not None, f"RDKit can't read the ligand {text}: it takes an .sdf or .mol2 file, or SMILES")
    require(mol.GetNumAtoms() > 1, f"the ligand {text} must have two heavy atoms or more")
    require(len(Chem.GetMolFrags(mol)) == 1, f"the ligand {text} is more than one molecule")
    return mol


def positions(mol):
    return torch.from_numpy(mol.GetConformer().GetPositions()).float()


# each atom's sixteen features; the last value of a list stands for all others
KINDS = [(lambda a: a.GetAtomicNum(), [*range(1, 120)]),
         (lambda a: str(a.GetChiralTag()), ["CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "other"]),
         (lambda a: a.GetTotalDegree(), [*range(12)]),
         (lambda a: a.GetFormalCharge(), [*range(-5, 7)]),
         (lambda a: a.GetValence(Chem.ValenceType.IMPLICIT), [*range(8)]),
         (lambda a: a.GetTotalNumHs(), [*range(10)]),
         (lambda a: a.GetNumRadicalElectrons(), [*range(6)]),
         (lambda a: str(a.GetHybridization()), ["SP", "SP2", "SP3", "SP3D", "SP3D2", "other"]),
         (lambda a: a.GetIsAromatic(), [False, True]),
         (lambda a: a.GetOwningMol().GetRingInfo().NumAtomRings(a.GetIdx()), [*range(8)]),
         *[(lambda a, n=n: a.GetOwningMol().GetRingInfo().IsAtomInRingOfSize(a.GetIdx(), n), [False, True])
           for n in range(3, 9)]]
ATOM_FEATURES = tuple(len(values) for _, values in KINDS)
BONDS = ["SINGLE", "DOUBLE", "TRIPLE", "AROMATIC"]


def atom_features(mol):
    """-> int64 (L, 16), each column below its size in ATOM_FEATURES"""
    rows = [[(feature(a), values) for feature, values in KINDS] for a in mol.GetAtoms()]
    return torch.tensor([[values.index(v) if v in values else len(values) - 1 for v, values in row] for row in rows])


def bonds_of(mol):
    """-> atoms (2, 2b), every bond both ways, and types (2b,), indices of BONDS"""
    ends = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in mol.GetBonds()]
    types = [str(b.GetBondType()) for b in mol.GetBonds()]
    types = [BONDS.index(kind) if kind in BONDS else 0 for kind in types]
    atoms = torch.tensor([pair for u, v in ends for pair in ((u, v), (v, u))]).T
    return atoms, torch.tensor(types).repeat_interleave(2)


def rotatable(bonds, count):
    """Bonds that turn: without them the molecule falls into two parts, each of two atoms or more.

    bonds: (2, 2b), every bond both ways; count: of atoms. -> (T, 2), atoms u and v; bool (T, count), the
    atoms on v's side, the smaller one, which move
    """
    pairs = bonds.T.tolist()
    found, sides = [], []
    for u, v in pairs[::2]:
        side, new = {v}, {v}
        while new:  # all that v reaches without this bond
            new = {b for a, b in pairs if a in new and (a, b) not in ((u, v), (v, u))} - side
            side |= new
        if u not in side and 2 <= len(side) <= count - 2:
            if 2 * len(side) > count:
                u, v, side = v, u, {*range(count)} - side
            found.append((u, v))
            sides.append([i in side for i in range(count)])
    found = torch.tensor(found, dtype=torch.int64).reshape(-1, 2)
    return found, torch.tensor(sides, dtype=torch.bool).reshape(-1, count)


def symmetries(numbers, bonds, most=1000):
    """Permutations int64 (A, L) that keep elements and bonds, A <= most; the identity is the first.

    numbers: atomic numbers (L,); bonds: (2, 2b), every bond both ways. Bond orders don't count.
    """
    plain = Chem.RWMol()
    for number in numbers:
        atom = Chem.Atom(int(number))
        atom.SetNoImplicit(True)
        plain.AddAtom(atom)
    for u, v in bonds.T.tolist():
        if u < v:
            plain.AddBond(u, v, Chem.BondType.SINGLE)
    found = torch.tensor(plain.GetSubstructMatches(plain.GetMol(), uniquify=False, maxMatches=most))
    return torch.cat([torch.arange(len(numbers))[None], found]).unique(dim=0)  # sorted, so the identity is first


def rmsd(poses, pos, permutations):
    """Root mean square distance of poses (B, L, 3) from a pose (L, 3): the least over its symmetries. -> (B,)"""
    distance2 = (poses[:, None] - pos[permutations]).square().sum(-1).mean(-1)  # (B, A)
    return distance2.min(1).values.sqrt()


def conformer(mol, seed):
    """A pose (L, 3) that RDKit makes up (ETKDGv2), around 0. Raises UserError if it can't."""
    settings = AllChem.ETKDGv2()
    settings.randomSeed = seed % 2 ** 31
    whole = Chem.AddHs(Chem.Mol(mol))
    whole.RemoveAllConformers()
    if AllChem.EmbedMolecule(whole, settings) == -1:
        settings.useRandomCoords = True
        require(AllChem.EmbedMolecule(whole, settings) != -1,
                f"RDKit finds no three-dimensional shape of the ligand {Chem.MolToSmiles(mol)}")
    pos = positions(whole)[:mol.GetNumAtoms()]  # added hydrogens come last
    return pos - pos.mean(0)


def dihedral(pos, bonds, turns, edges):
    """Angles (T,) about rotatable bonds (T, 2), each between one neighbour of either end."""
    angles = []
    for (u, v), side in zip(bonds.tolist(), turns):
        a = next(j for i, j in edges.T.tolist() if i == u and j != v)
        d = next(j for i, j in edges.T.tolist() if i == v and j != u)
        axis = pos[u] - pos[v]
        axis = axis / axis.norm()
        x, y = (w - (w @ axis) * axis for w in (pos[a] - pos[u], pos[d] - pos[v]))
        angles.append(torch.atan2(torch.linalg.cross(x, y) @ axis, x @ y))
    return torch.stack(angles)


def match(made_up, pos, bonds, turns, edges, steps=60):
    """Turns the torsions of a made-up pose (L, 3), so that it fits the true one (L, 3), and aligns it.

    It starts at the true torsions. Since bond lengths and angles differ, Adam then lowers the RMSD: this
    is what the diffusion can reach (DiffDock sec. 4.4 does it by differential evolution).
    """
    if not len(bonds):
        return align(made_up[None], pos[None])[0]
    angles = (dihedral(pos, bonds, turns, edges) - dihedral(made_up, bonds, turns, edges)).requires_grad_()
    optimizer = torch.optim.Adam([angles], lr=0.05)
    best, best_error = None, torch.inf
    for _ in range(steps):
        moved = turn(made_up[None], angles[None], bonds, turns)
        with torch.no_grad():
            fitted = align(moved, pos[None])
        error = (align(pos[None], moved.detach()) - moved).square().sum(-1).mean()
        if error.item() < best_error:
            best, best_error = fitted[0], error.item()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return best


# ----------------------------------------------------------------------------------------------------
# complexes


@dataclass
class Complex:
    """A protein of R residues and a ligand of L atoms, with T rotatable bonds."""
    residues: torch.Tensor  # (R,) types
    rec_pos: torch.Tensor  # (R, 3) C-alphas
    rec_edges: torch.Tensor  # (2, E) receiver, neighbour
    atoms: torch.Tensor  # (L, 16) features
    bonds: torch.Tensor  # (2, 2b)
    bond_types: torch.Tensor  # (2b,)
    rotatable: torch.Tensor  # (T, 2)
    turns: torch.Tensor  # bool (T, L)
    symmetries: torch.Tensor  # (A, L)
    centre: torch.Tensor  # (3,) of the C-alphas, in the files
    conformer: torch.Tensor  # (L, 3) made up by RDKit, around 0
    pos: torch.Tensor  # (L, 3) the true pose; NaN if it is not known
    matched: torch.Tensor  # (L, 3) the conformer with the true torsions, on the true pose; NaN likewise

    def __len__(self):
        """Nodes: the ligand's atoms, then residues. A code is one of these numbers."""
        return len(self.atoms) + len(self.residues)


def complex_of(protein, mol, seed=0, pose=True):
    """protein: as from `read_protein`; mol: as from `read_ligand`; pose: whether it has its true pose.

    seed: of the conformer. Raises UserError if the true pose is not at the protein.
    """
    residues, rec_pos, *_ = protein
    centre = rec_pos.mean(0)
    rec_pos = rec_pos - centre
    bonds, bond_types = bonds_of(mol)
    turning, turns = rotatable(bonds, mol.GetNumAtoms())
    made_up = conformer(mol, seed)
    pos = matched = torch.full_like(made_up, torch.nan)
    if pose:
        require(mol.GetNumConformers() and mol.GetConformer().GetPositions().std() > 0,
                f"the true pose of {Chem.MolToSmiles(mol)} has no positions: it takes an .sdf or .mol2 file")
        pos = positions(mol) - centre
        gap = torch.cdist(pos, rec_pos).min().item()
        require(gap < 15, f"ligand and protein are {gap:.0f} Angstrom apart: are they of the same complex?")
        matched = match(made_up, pos, turning, turns, bonds)
    return Complex(residues, rec_pos, neighbours(rec_pos), atom_features(mol), bonds, bond_types, turning, turns,
                   symmetries([a.GetAtomicNum() for a in mol.GetAtoms()], bonds), centre, made_up, pos, matched)


@dataclass
class Batch:
    """B complexes as one graph: the atoms of all ligands, then the residues of all proteins, N nodes in all."""
    size: int  # B
    most: int  # K, nodes of the largest complex
    graph: torch.Tensor  # (N,) complex of each node
    rank: torch.Tensor  # (N,) number of the node within its complex, atoms first
    residues: torch.Tensor
    rec_pos: torch.Tensor
    rec_edges: torch.Tensor
    atoms: torch.Tensor
    bonds: torch.Tensor
    bond_types: torch.Tensor
    rotatable: torch.Tensor


def gather(complexes, device="cpu"):
    """-> Batch of these complexes; positions of ligands are given separately, one after another, (n, 3)"""
    lig, rec = (torch.tensor([len(getattr(c, part)) for c in complexes]) for part in ("atoms", "residues"))
    first_atom, first_residue = lig.cumsum(0) - lig, rec.cumsum(0) - rec
    number = torch.arange(len(complexes))

    def together(name):
        return torch.cat([getattr(c, name) for c in complexes]).to(device)

    def numbered(name, first, dim):  # these are numbers of atoms or of residues
        return torch.cat([getattr(c, name) + by for c, by in zip(complexes, first)], dim).to(device)

    return Batch(
        size=len(complexes), most=int((lig + rec).max()),
        graph=torch.cat([number.repeat_interleave(lig), number.repeat_interleave(rec)]).to(device),
        rank=torch.cat([torch.arange(n) for n in lig] + [torch.arange(n, n + k) for n, k in zip(lig, rec)]).to(device),
        residues=together("residues"), rec_pos=together("rec_pos"),
        rec_edges=numbered("rec_edges", first_residue, 1), atoms=together("atoms"),
        bonds=numbered("bonds", first_atom, 1), bond_types=together("bond_types"),
        rotatable=numbered("rotatable", first_atom, 0))
