"""
Docks a ligand into a protein, or measures how well trained networks dock a data set.

    python docking/dock.py --protein=x.pdb --ligand="CC(=O)Oc1ccccc1C(=O)O"    # or --ligand=x.sdf
    python docking/dock.py --dataset=shipped                                   # redocks training complexes

Reads stage1.pt and prior.pt of out_dir, and confidence.pt if there is one. Writes --save.sdf, poses ranked
by confidence, and --save.png. Each pose has codes of its own, drawn from the prior. With --truth=x.sdf, the
true pose, RMSDs are added. A data set gives a table, for codes of the prior, of the encoder (which has seen
the true pose: an upper bound), and without codes.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder

import torch

from checkpoint import atomic
from configurator import configure, require, require_numbers
from docking import data
from docking.complexes import RESIDUES, Chem, complex_of, gather, read_ligand, read_protein, rmsd
from docking.diffusion import sample, uniform_rotations
from docking.model import Confidence, Prior, labels_of
from docking.noise import rotation_matrix
from docking.picture import draw_poses
from docking.trained import load_second, load_stage1
from model import draw_codes
from noise import SeededNoise, seed_of
from processes import start_processes
from run import progress

out_dir = "out/docking"  # of the trained networks
protein = ""  # .pdb
ligand = ""  # .sdf, .mol2 or SMILES
truth = ""  # .sdf or .mol2 of the ligand in its true pose
dataset = ""  # in place of a protein and a ligand
save = "out/docking/poses"  # .sdf and .png, or .json of a data set
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

KINDS = ("prior", "oracle", "none")  # of codes


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


def name_of(c, code):
    """What a code points at."""
    atoms = len(c.atoms)
    if code < atoms:
        return f"atom {code + 1} ({Chem.GetPeriodicTable().GetElementSymbol(int(c.atoms[code, 0]) + 1)})"
    return f"residue {code - atoms + 1} ({RESIDUES[c.residues[code - atoms]]})"


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
    c = complex_of(read_protein(protein), mol, seed, pose=bool(truth))
    kind = "prior" if nets.stage1.num_latents else "none"
    poses, codes, confidence = dock(nets, c, kind, 0)
    errors = rmsd(poses, c.pos, c.symmetries) if truth else torch.full((len(poses),), torch.nan)
    with atomic(f"{save}.sdf") as file:
        for i, pose in enumerate(poses):
            copy = Chem.Mol(mol)
            copy.RemoveAllConformers()
            conf = Chem.Conformer(mol.GetNumAtoms())
            conf.SetPositions((pose + c.centre).double().numpy())
            copy.AddConformer(conf)
            notes = {"rank": i + 1, "confidence": f"{confidence[i]:.4f}", "RMSD": f"{errors[i]:.2f}",
                     "codes": "; ".join(name_of(c, code) for code in codes[i].tolist() if code >= 0)}
            lines = [f">  <{key}>\n{value}\n" for key, value in notes.items() if value not in ("nan", "")]
            file.write((Chem.MolToMolBlock(copy) + "\n".join(lines) + "\n$$$$\n").encode())
            print(f"{i + 1:3d}  " + "  ".join(f"{key} {value}" for key, value in notes.items()
                                              if key != "rank" and value not in ("nan", "")))
    title = "first pose" if confidence.isnan().all() else "most confident pose"
    shown = [code for code in codes[0].tolist() if code >= 0]
    draw_poses(f"{save}.png", c, [(title, poses[:1], shown), (f"all {len(poses)}", poses, ())])
    print(f"{save}.sdf has the poses, {save}.png the first"
          + " (not ranked: there is no confidence model)" * bool(confidence.isnan().all()))


# ----------------------------------------------------------------------------------------------------
# a data set


def table(nets):
    names, complexes = data.load(dataset)
    kinds = KINDS if nets.stage1.num_latents else ("none",)
    found = {kind: [] for kind in kinds}
    for key, (name, c) in enumerate(progress(list(zip(names, complexes)), desc="complexes")):
        panels = []
        for kind in kinds:
            poses, codes, _ = dock(nets, c, kind, key)
            errors, off = rmsd(poses, c.pos, c.symmetries), (poses.mean(1) - c.pos.mean(0)).norm(dim=1)
            found[kind].append(dict(id=name, rmsd=errors.tolist(), centroid=off.tolist(), codes=codes.tolist()))
            panels.append((f"{name}: codes of {kind}", poses[:1], [code for code in codes[0].tolist() if code >= 0]))
        draw_poses(f"{save}_{name}.png", c, panels)
    print(f"{dataset}: {len(names)} complexes, {num_samples} poses each; shares of complexes"
          + " (no confidence model: the top pose is any)" * (not nets.confidence))
    print("codes of   top-1 < 2 A  < 5 A   best < 2 A  < 5 A   poses < 2 A  < 5 A   median RMSD  centroid")
    for kind in kinds:
        errors = torch.tensor([row["rmsd"] for row in found[kind]])
        off = torch.tensor([row["centroid"] for row in found[kind]])
        shares = [(x < limit).float().mean().item() for x in (errors[:, 0], errors.min(1).values, errors)
                  for limit in (2, 5)]
        print(f"{kind:8s}" + "".join(f"{s:12.2f}{t:8.2f}" for s, t in zip(shares[::2], shares[1::2]))
              + f"{errors.median():13.1f}{off.median():11.1f}")
    with atomic(f"{save}.json") as file:
        file.write(json.dumps(found, indent=1).encode())


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, or_zero=("seed",))
    require(min(tau) > 0 and min(psi) >= 0, f"tau must be positive and psi not negative: they are {tau} and {psi}")
    require(len(tau) == len(psi) == len(sigma_data) == 3, "tau, psi and sigma_data have three numbers each")
    require(bool(dataset) != bool(protein), "give --protein and --ligand, or --dataset")
    require(dataset or ligand or truth, "give the ligand too: --ligand=x.sdf, or SMILES")
    _, world, place = start_processes(device)
    require(world == 1, "dock.py runs as one process, without torchrun")
    nets = Nets(out_dir, place)
    table(nets) if dataset else one_complex(nets)


if __name__ == "__main__":
    main(sys.argv[1:])
