"""
Why discrete latents help docking: the same pocket in 2 and in 4 copies, the docking counterpart of toy2d.py.

    python docking/toy_pocket.py                # one seed
    python docking/toy_pocket.py --seeds=5

Ten residues make a pocket; turned about an axis, copies of it make a protein. A ligand of seven atoms and
three torsions sits in one copy, any with the same probability. A network of DiffDock's kind learns poses,
alone and with one latent that points at a node. Measured are the success within 2 Angstrom of a copy, each
copy's share, the loss at each noise level, and what the code points at for each copy.

Writes to out_dir: pocket.png, table.txt, results.json.
"""

import json
import math
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder

import torch

from checkpoint import atomic
from configurator import configure, require, require_numbers
from docking.complexes import (
    RESIDUES, Complex, atom_features, bonds_of, conformer, gather, neighbours, read_ligand, rmsd, rotatable,
    symmetries)
from docking.diffusion import disturb, draw, losses, sample, total
from docking.model import DisCoDock, labels_of, straight_through
from docking.noise import rotation_matrix, turn
from docking.picture import draw_ligand
from model import draw_codes, gumbel_softmax
from noise import SeededNoise, seeded_generator
from plot import COLOURS, Axes, figure
from run import alone, progress

out_dir = "out/toy_pocket"
seed = 0
seeds = 1  # that many, from this one on
copies = (2, 4)  # of the pocket
steps = 1000
batch_size = 16
lr = 3e-3  # of the denoiser; it falls to 0 as a cosine, like the encoder's
encoder_lr = 3e-3
tau = 1.0  # Gumbel-Softmax temperature
label_size = 5.0  # of a label; the paper has 1, and its denoiser finds out too late what labels say
null_prob = 0.1
num_samples = 32
num_steps = 20  # of the sampler

SHAPE = dict(scalars=16, vectors=4, layers=3, encoder_vectors=4, encoder_layers=3, channelwise=True, dropout=0.0)
LIGAND = "NCCCC(=O)O"
TIMES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)  # where the loss is measured


def pockets(count):
    """-> as many Complexes: the same protein, its ligand in each copy of the pocket"""
    g = torch.Generator().manual_seed(1)
    mol = read_ligand(LIGAND)
    made_up, (bonds, types) = conformer(mol, 0), bonds_of(mol)
    turning, turns = rotatable(bonds, len(made_up))
    pose = turn(made_up[None], 2 * math.pi * torch.rand(1, len(turning), generator=g), turning, turns)[0]
    pose = pose - pose.mean(0)
    pocket = []
    while len(pocket) < 10:  # C-alphas 4 to 7 Angstrom from the ligand, apart from each other
        x = torch.randn(3, generator=g)
        x = x / x.norm() * (5 + 5 * torch.rand(1, generator=g))
        if 4 < (pose - x).norm(dim=1).min() < 7 and all((x - other).norm() > 3.8 for other in pocket):
            pocket.append(x)
    kinds = torch.randint(20, (10,), generator=g).repeat(count)
    away = torch.tensor([12.0, 0, 0])  # from the axis
    turned = [rotation_matrix(torch.tensor([0, 0, 2 * math.pi * i / count])) for i in range(count)]
    rec_pos = torch.cat([(torch.stack(pocket) + away) @ R.T for R in turned])
    centre = rec_pos.mean(0)
    rec_pos = rec_pos - centre
    same = symmetries([a.GetAtomicNum() for a in mol.GetAtoms()], bonds)
    poses = [(pose + away) @ R.T - centre for R in turned]
    edges, atoms = neighbours(rec_pos, most=10), atom_features(mol)
    return [Complex(kinds, rec_pos, edges, atoms, bonds, types, turning, turns, same, centre, made_up, pos, pos)
            for pos in poses]


def train(complexes, num_latents, s):
    """Alg. 1 on the copies, with the seed s. -> DisCoDock, in eval mode"""
    torch.manual_seed(s)
    g = seeded_generator("cpu", "pockets", s)
    model = DisCoDock(num_latents, label_size=label_size, **SHAPE)
    groups = [dict(params=model.score.parameters(), lr=lr)]
    if num_latents:
        groups.append(dict(params=model.encoder.parameters(), lr=encoder_lr))
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress(range(steps), desc=f"{len(complexes)} copies, m = {num_latents}", leave=False):
        which = torch.randint(len(complexes), (batch_size,), generator=g)
        chosen = [complexes[i] for i in which]
        draws = draw(batch_size, len(chosen[0].rotatable), num_latents, len(chosen[0]), null_prob, g)
        noisy, targets = disturb(chosen, [c.pos for c in chosen], draws)
        batch, given = gather(chosen), ()
        if num_latents:  # DisCoDock.forward; but the encoder sees each copy once, not once for each noisy pose
            logits = model.encoder(gather(complexes), torch.cat([c.pos for c in complexes]))[which]
            labels = labels_of(straight_through(gumbel_softmax(logits, tau, draws.gumbel)), batch)
            given = torch.where(draws.drop[batch.graph, None], 0, labels), draws.drop
        scores = model.score(batch, noisy, draws.t, *given)
        loss = total(losses(scores, targets, draws, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    require(loss.isfinite(), f"training has diverged, with a loss of {loss:g}: lower lr or encoder_lr")
    return model.eval().requires_grad_(False)


def draw_from_encoder(model, complexes, noise):
    """Codes (N, m): row i is of the true pose in copy i % copies, drawn from the encoder."""
    logits = model.encoder(gather(complexes), torch.cat([c.pos for c in complexes]))
    return draw_codes(logits[torch.arange(len(noise)) % len(complexes)], noise.gumbel(*logits.shape[1:]))


def denoiser(model, codes):
    """-> score(batch, pos, t, rows) with these codes (N, m)"""
    if not model.num_latents:
        return lambda batch, pos, t, rows: model.score(batch, pos, t)
    return lambda batch, pos, t, rows: model.score(batch, pos, t, labels_of(codes[rows], batch),
                                                   torch.zeros(batch.size, dtype=torch.bool))


def loss_by_time(model, complexes, s, shift=0, count=64):
    """Loss (all three kinds) at each of TIMES, with codes that the encoder gives the true copy, or with those of
    the copy `shift` places on: wrong ones."""
    found = []
    for t in TIMES:
        chosen = [complexes[i % len(complexes)] for i in range(count)]
        g = seeded_generator("cpu", "loss", s)
        draws = draw(count, len(chosen[0].rotatable), 0, 0, 0.0, g)
        draws.t = torch.full((count,), t)
        noisy, targets = disturb(chosen, [c.pos for c in chosen], draws)
        codes = None
        if model.num_latents:
            codes = draw_from_encoder(model, complexes, SeededNoise("codes", range(count))).roll(-shift, 0)
        batch = gather(chosen)
        scores = denoiser(model, codes)(batch, noisy, draws.t, slice(0, count))
        found.append(total(losses(scores, targets, draws, batch)).item())
    return found


def measure(model, complexes, s):
    """-> results, as they are in results.json; poses (N, L, 3) and codes (N, m)"""
    n = len(complexes)
    noise = SeededNoise("pockets", [1000 * s + i for i in range(num_samples)])
    codes = draw_from_encoder(model, complexes, noise) if model.num_latents else torch.zeros(num_samples, 0).long()
    poses = sample(denoiser(model, codes), complexes[0], noise, num_steps).float()
    errors = torch.stack([rmsd(poses, c.pos, c.symmetries) for c in complexes], 1)
    least, copy = errors.min(1)
    good = least < 2
    results = dict(copies=n, latents=model.num_latents, seed=s, success=good.float().mean().item(),
                   shares=(copy[good].bincount(minlength=n) / max(good.sum(), 1)).tolist(),
                   median=least.median().item(), loss=dict(zip(map(str, TIMES), loss_by_time(model, complexes, s))))
    if model.num_latents:
        logits = model.encoder(gather(complexes), torch.cat([c.pos for c in complexes]))[:, 0]
        p = logits.softmax(-1)
        entropy = torch.special.entr
        results |= dict(points_at=p.argmax(-1).tolist(), probability=p.max(-1).values.tolist(),
                        bits=((entropy(p.mean(0)).sum() - entropy(p).sum(-1).mean()) / math.log(2)).item(),
                        loss_of_wrong_codes=dict(zip(map(str, TIMES), loss_by_time(model, complexes, s, shift=1))),
                        told=(good & (copy == torch.arange(num_samples) % n)).float().mean().item())
    return results, poses, codes


# ----------------------------------------------------------------------------------------------------
# table and picture


def line_of(row, c):
    shares = "/".join(f"{share:.2f}" for share in row["shares"])
    text = (f"{row['copies']:6d}{row['latents']:3d}{row['seed']:6d}{row['success']:9.2f}  {shares:20s}"
            f"{row['median']:7.2f}{row['loss']['0.5']:8.2f}{row['loss']['0.9']:8.2f}{row['loss']['1.0']:8.2f}")
    if row["latents"]:
        text += f"{row['bits']:7.2f}{row['told']:7.2f}  " + ", ".join(
            f"{RESIDUES[c.residues[i - 7]]} of copy {(i - 7) // 10 + 1}" if i >= 7 else f"atom {i + 1}"
            for i in row["points_at"])
    return text


HEAD = "copies  m  seed  success  share of each copy   median  t=0.5   t=0.9   t=1.0   bits   told  the code points at"


def panel(complexes, poses, codes, title):
    """The protein from above, the first poses of each copy, nodes of the codes ringed."""
    c = complexes[0]
    plane = torch.eye(3)[:, :2].numpy()
    axes = Axes((-24, 24), (-24, 24), title, "Angstrom")
    axes.scatter(c.rec_pos.numpy() @ plane, (190, 190, 200), 3)
    for i, other in enumerate(complexes):
        draw_ligand(axes, other, other.pos, plane, (0, 150, 90), 3.0)
    for i, pose in enumerate(poses[:16]):
        colour = tuple(COLOURS[i % len(complexes)].tolist()) if codes.numel() else (70, 70, 70)
        draw_ligand(axes, c, pose, plane, colour, 0.8)
    for i, code in enumerate(codes[:len(complexes), 0].tolist() if codes.numel() else []):
        nodes = torch.cat([complexes[i].pos, c.rec_pos])
        (x, y), = axes.at(nodes[code:code + 1].numpy() @ plane)
        axes.draw.ellipse((x - 12, y - 12, x + 12, y + 12), outline=tuple(COLOURS[i].tolist()), width=4)
    return axes


def curves(rows, count):
    axes = Axes((0, 1), (0, 1.5), f"{count} copies: loss", "time t")
    for row in rows:
        points = [(float(t), value) for t, value in row["loss"].items()]
        label = "one latent" if row["latents"] else "no latents"
        axes.line(points, COLOURS[4 if row["latents"] else 0], 2, True, label)
        if row["latents"]:
            wrong = [(float(t), value) for t, value in row["loss_of_wrong_codes"].items()]
            axes.line(wrong, COLOURS[7], 1.5, False, "one latent, wrong codes")
    return axes


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, or_zero=("seed", "null_prob"))
    require(copies and all(1 < n <= 8 for n in copies), f"copies are numbers from 2 to 8, not {copies}")
    with alone(f"{out_dir}/results"):
        every_run(config)


def every_run(config):
    """Trains, measures and draws all; what has been found so far is in out_dir."""
    began, lines, found, rows = time.time(), [HEAD], [], []
    print(HEAD, flush=True)
    for s in range(seed, seed + seeds):
        for n in copies:
            complexes, panels, of_pair = pockets(n), [], []
            for m in (0, 1):
                row, poses, codes = measure(train(complexes, m, s), complexes, s)
                found.append(row)
                of_pair.append(row)
                lines.append(line_of(row, complexes[0]))
                print(lines[-1], flush=True)
                panels.append(panel(complexes, poses, codes, f"{n} copies, " + ("one latent" if m else "no latents")))
            if s == seed:
                rows.append([*panels, curves(of_pair, n)])
                with atomic(f"{out_dir}/pocket.png") as file:
                    figure(rows).save(file, "png", optimize=True)
            results = dict(settings=config, runs=found)
            for file_name, text in (("table.txt", "\n".join(lines)), ("results.json", json.dumps(results, indent=1))):
                with atomic(f"{out_dir}/{file_name}") as file:
                    file.write(text.encode())
    print(f"{time.time() - began:.0f} s; pocket.png, table.txt and results.json are in {out_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
