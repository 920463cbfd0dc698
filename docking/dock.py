"""
Docks a ligand into a protein, or measures how well trained networks dock a data set.

    python docking/dock.py --protein=x.pdb --ligand="CC(=O)Oc1ccccc1C(=O)O"    # or --ligand=x.sdf
    python docking/dock.py --dataset=shipped                                   # redocks training complexes

Reads stage1.pt and prior.pt of out_dir, and confidence.pt if there is one. Writes NAME.sdf there, poses
ranked by confidence, and NAME.png. Each pose has codes of its own, drawn from the prior. With --truth=x.sdf, the
true pose, RMSDs are added. A data set gives a table, for codes of the prior, of the encoder (oracle: it has
seen the true pose), and without codes; its rows are in NAME.json, a picture of each complex in NAME_ID.png.
"""

import json
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder

import torch

from checkpoint import atomic
from configurator import configure, require, require_numbers
from docking import data
from docking.complexes import Chem, complex_of, gather, read_ligand, read_protein, rmsd
from docking.diffusion import sample, uniform_rotations
from docking.model import Confidence, Prior, labels_of
from docking.noise import rotation_matrix
from docking.picture import draw_poses
from docking.trained import load_second, load_stage1
from model import draw_codes
from noise import SeededNoise, seed_of
from processes import start_processes
from run import alone, progress

out_dir = "out/docking"
protein = ""  # .pdb
ligand = ""  # .sdf, .mol2 or SMILES
truth = ""  # .sdf or .mol2 of the ligand in its true pose
dataset = ""  # in place of a protein and a ligand
name = "poses"  # NAME.sdf and NAME.png, or NAME.json and NAME_ID.png of a data set
seed = 0
device = "auto"
num_samples = 10  # poses of a complex; the paper has 40
batch_size = 10  # of them at once
num_steps = 20
prior_temperature = 1.0  # above 1: codes vary more (App. E.5)
# low-temperature sampling: translation, rotation, torsions (noise.py); tau = 1 is none
tau = (1.0, 1.0, 1.0)
psi = (0.0, 0.0, 0.0)
sigma_data = (0.5, 0.5, 0.5)

KINDS = {"prior": "codes of the prior", "oracle": "oracle codes", "none": "no codes"}


def codes_of(nets, c, kind, noise):
    """Codes (N, m) of N poses: from the prior, from the encoder (oracle), or -1, none"""
    m, n = nets.stage1.num_latents, len(noise)
    codes = torch.full((n, m), -1)
    if kind == "oracle":
        logits = nets.stage1.encoder(gather([c], nets.device), c.pos.to(nets.device)).cpu()
        codes = draw_codes(logits, noise.gumbel(m, logits.shape[2]))
    if kind == "prior":
        turned = c.conformer.double() @ rotation_matrix(uniform_rotations(noise.randn(4))).mT
        gumbel = noise.gumbel(m, len(c))
        for first in range(0, n, batch_size):
            rows = slice(first, min(first + batch_size, n))
            batch = gather([c] * (rows.stop - first), nets.device)
            pos = turned[rows].flatten(0, 1).float().to(nets.device)
            for i in range(m):
                logits = nets.prior(batch, pos, codes[rows].to(nets.device)).cpu()
                codes[rows, i] = draw_codes(logits / prior_temperature, gumbel[rows, i])
    return codes


@torch.no_grad()
def dock(nets, c, kind, key):
    """Poses of one complex, most confident first. key: an integer that seeds this complex's noise

    -> poses (N, L, 3), codes (N, m), confidence (N,), NaN without a confidence model
    """
    noise = SeededNoise("dock", [seed_of("pose", seed, key, i) for i in range(num_samples)])
    codes = codes_of(nets, c, kind, noise)

    def score(batch, pos, t, rows):
        if not nets.stage1.num_latents:
            return nets.stage1.score(batch, pos, t)
        at_hand = codes[rows].to(nets.device)
        return nets.stage1.score(batch, pos, t, labels_of(at_hand, batch), (at_hand < 0).all(1))

    low_temperature = tuple(zip(tau, psi, sigma_data))
    poses = sample(score, c, noise, num_steps, low_temperature, batch_size, device=nets.device).float()
    confidence = torch.full((len(poses),), torch.nan)
    if nets.confidence:
        parts = [nets.confidence(gather([c] * len(part), nets.device), part.flatten(0, 1).to(nets.device))
                 for part in poses.split(batch_size)]
        confidence = torch.cat(parts).sigmoid().cpu()
        order = confidence.argsort(descending=True)
        poses, codes, confidence = poses[order], codes[order], confidence[order]
    return poses, codes, confidence


def name_of(c, code, residues):
    """What a code points at. residues: their names, as from `read_protein`"""
    atoms = len(c.atoms)
    if code < atoms:
        return f"atom {code + 1} ({Chem.GetPeriodicTable().GetElementSymbol(int(c.atoms[code, 0]) + 1)})"
    return residues[code - atoms]


class Nets:
    """The trained networks of a folder; prior and confidence are None where there are none, or no need."""

    def __init__(self, folder, device):
        self.device = device
        self.stage1, checkpoint = load_stage1(folder, device)
        self.prior = self.confidence = None
        if self.stage1.num_latents:
            self.prior = load_second(Prior, folder, "prior", device, checkpoint)
        if Path(folder, "confidence.pt").exists():
            self.confidence = load_second(Confidence, folder, "confidence", device, checkpoint)


# ----------------------------------------------------------------------------------------------------
# one complex


def one_complex(nets):
    mol = read_ligand(truth or ligand)
    if truth and ligand:
        given, true = (Chem.MolToSmiles(m, isomericSmiles=False) for m in (read_ligand(ligand), mol))
        require(given == true, f"--ligand and --truth are different molecules: {given}, {true}")
    read = read_protein(protein)
    c = complex_of(read, mol, seed, pose=bool(truth))
    kind = "prior" if nets.stage1.num_latents else "none"
    poses, codes, confidence = dock(nets, c, kind, 0)
    errors = rmsd(poses, c.pos, c.symmetries) if truth else torch.full((len(poses),), torch.nan)
    with atomic(f"{out_dir}/{name}.sdf") as file:
        for i, pose in enumerate(poses):
            copy = Chem.Mol(mol)
            copy.RemoveAllConformers()
            conf = Chem.Conformer(mol.GetNumAtoms())
            conf.SetPositions((pose + c.centre).double().numpy())
            copy.AddConformer(conf)
            notes = {"rank": i + 1, "confidence": f"{confidence[i]:.4f}", "RMSD": f"{errors[i]:.2f}",
                     "codes": "; ".join(name_of(c, code, read[2]) for code in codes[i].tolist() if code >= 0)}
            lines = [f">  <{key}>\n{value}\n" for key, value in notes.items() if value not in ("nan", "")]
            file.write((Chem.MolToMolBlock(copy) + "\n".join(lines) + "\n$$$$\n").encode())
            print(f"{i + 1:3d}  " + "  ".join(f"{key} {value}" for key, value in notes.items()
                                              if key != "rank" and value not in ("nan", "")))
    title = "first pose" if confidence.isnan().all() else "most confident pose"
    shown = [code for code in codes[0].tolist() if code >= 0]
    draw_poses(f"{out_dir}/{name}.png", c, [(title, poses[:1], shown), (f"all {len(poses)}", poses, ())])
    print(f"{out_dir}/{name}.sdf has the poses, {name}.png the first"
          + " (not ranked: there is no confidence model)" * bool(confidence.isnan().all()))


# ----------------------------------------------------------------------------------------------------
# a data set


HEAD = "top-1 < 2 A  < 5 A   best < 2 A  < 5 A   poses < 2 A  < 5 A   RMSD 25 %   50 %   75 %   centroid 50 %"


def figures(rows):
    """A line under HEAD, of rows as in NAME.json: shares of complexes by their top and by their best pose, share of
    all poses, quartiles of the RMSD, median distance of the ligand's centre from the true one, in Angstrom"""
    errors, off = (torch.tensor([row[key] for row in rows]) for key in ("rmsd", "centroid"))
    a, b, c = ([(x < limit).float().mean().item() for limit in (2, 5)]
               for x in (errors[:, 0], errors.min(1).values, errors))
    quartiles = torch.quantile(errors, torch.tensor([0.25, 0.5, 0.75])).tolist()
    return ("{:11.2f}{:7.2f}{:13.2f}{:7.2f}{:14.2f}{:7.2f}".format(*a, *b, *c)
            + "{:12.1f}{:7.1f}{:7.1f}{:16.1f}".format(*quartiles, off.median()))


def table(nets):
    ids, complexes = data.load(dataset)
    kinds = KINDS if nets.stage1.num_latents else ("none",)
    found = {kind: [] for kind in kinds}
    for key, (one, c) in enumerate(progress(list(zip(ids, complexes)), desc="complexes")):
        panels = []
        for kind in kinds:
            poses, codes, _ = dock(nets, c, kind, key)
            errors, off = rmsd(poses, c.pos, c.symmetries), (poses.mean(1) - c.pos.mean(0)).norm(dim=1)
            found[kind].append(dict(id=one, rmsd=errors.tolist(), centroid=off.tolist(), codes=codes.tolist()))
            panels.append((f"{one}, {KINDS[kind]}", poses[:1], [code for code in codes[0].tolist() if code >= 0]))
        draw_poses(f"{out_dir}/{name}_{one}.png", c, panels)
    print(f"{dataset}: {len(ids)} complexes, {num_samples} poses each"
          + " (no confidence model: the top pose is any)" * (not nets.confidence))
    print(f"codes of  {HEAD}")
    for kind in kinds:
        print(f"{kind:10s}{figures(found[kind])}")
    with atomic(f"{out_dir}/{name}.json") as file:
        file.write(json.dumps(found, indent=1).encode())


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, or_zero=("seed",))
    require(len(tau) == len(psi) == len(sigma_data) == 3, "tau, psi and sigma_data have three numbers each")
    require(min(tau) > 0 and min(psi) >= 0 and all(map(math.isfinite, (*tau, *psi, *sigma_data))),
            f"tau must be positive, psi not negative, all finite: they are {tau}, {psi} and {sigma_data}")
    require(Path(name).name == name and name.strip("."), f"--name={name} names files in out_dir: it can't have folders")
    require(bool(dataset) != bool(protein), "give --protein and --ligand, or --dataset")
    require(dataset or ligand or truth, "give the ligand too: --ligand=x.sdf, or SMILES")
    _, world, place = start_processes(device)
    require(world == 1, "dock.py runs as one process, without torchrun")
    nets = Nets(out_dir, place)
    with alone(f"{out_dir}/{name}"):
        table(nets) if dataset else one_complex(nets)


if __name__ == "__main__":
    main(sys.argv[1:])
