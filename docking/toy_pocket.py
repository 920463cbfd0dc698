"""
Why discrete latents help docking: the same pocket in 2 and in 4 copies, the docking counterpart of toy2d.py.

    python docking/toy_pocket.py
    python docking/toy_pocket.py --seeds=5 --label_sizes="(0,1,5)" --out_dir=out/toy_pocket-seeds   # all of it

Ten residues make a pocket; turned about an axis, copies of it make a protein. A ligand of seven atoms and
three torsions sits in one copy, any with the same probability. A network of DiffDock's kind learns poses,
alone and with one latent that points at a node. Measured are the success within 2 Angstrom of a copy, each
copy's share, the loss at each noise level, also with the codes of another copy, and what codes do:

    bits    that the code tells about the copy; log2 of their number if it names the copy
    told    share of poses within 2 Angstrom of the very copy that the code was drawn for

Writes to out_dir: pocket.png, table.txt, results.json. An interrupted run continues after the last network
that it has measured.
"""

import json
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder

import torch

from checkpoint import atomic
from configurator import UserError, configure, require, require_numbers
from docking.complexes import (
    RESIDUES, Complex, atom_features, bonds_of, conformer, gather, neighbours, read_ligand, rmsd, rotatable,
    symmetries)
from docking.diffusion import disturb, draw, losses, sample, total
from docking.model import DisCoDock, labels_of, straight_through
from docking.noise import rotation_matrix, turn
from docking.picture import RESIDUE, draw_ligand, ring
from model import draw_codes, gumbel_softmax
from noise import SeededNoise, seeded_generator
from plot import COLOURS, Axes, Legend, figure
from run import alone, progress

out_dir = "out/toy_pocket"
seed = 0
seeds = 1  # that many, from this one on
copies = (2, 4)  # of the pocket
label_sizes = (0.0, 5.0)  # a network for each; 0: without latents. The paper has 1
steps = 1000
batch_size = 16
lr = 3e-3  # of the denoiser; it falls to 0 as a cosine, like the encoder's
encoder_lr = 3e-3
tau = 1.0  # Gumbel-Softmax temperature
null_prob = 0.1
num_samples = 32
num_steps = 20  # of the sampler

SHAPE = dict(scalars=16, vectors=4, layers=3, encoder_vectors=4, encoder_layers=3, channelwise=True, dropout=0.0)
LIGAND = "NCCCC(=O)O"
TIMES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)  # where the loss is measured
FREE = ("out_dir", "seed", "seeds", "copies", "label_sizes")  # other settings are the same for all rows of a table


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


def train(complexes, label_size, s):
    """Alg. 1 on the copies, with the seed s. -> DisCoDock, in eval mode; without latents if label_size is 0"""
    num_latents = int(label_size > 0)
    torch.manual_seed(s)
    g = seeded_generator("cpu", "pockets", s)
    model = DisCoDock(num_latents, label_size=label_size, **SHAPE)
    groups = [dict(params=model.score.parameters(), lr=lr)]
    if num_latents:
        groups.append(dict(params=model.encoder.parameters(), lr=encoder_lr))
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress(range(steps), desc=title(len(complexes), label_size), leave=False):
        which = torch.randint(len(complexes), (batch_size,), generator=g)
        chosen = [complexes[i] for i in which]
        draws = draw(batch_size, len(chosen[0].rotatable), num_latents, len(chosen[0]), null_prob, g)
        noisy, targets = disturb(chosen, [c.pos for c in chosen], draws)
        batch, given = gather(chosen), ()
        if num_latents:  # DisCoDock.forward; but the encoder sees each copy once, not once for each noisy pose
            logits = encoded(model, complexes)[which]
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


def encoded(model, complexes):
    """-> the encoder's logits (copies, m, K) of the true poses"""
    return model.encoder(gather(complexes), torch.cat([c.pos for c in complexes]))


def draw_from_encoder(model, complexes, noise):
    """Codes (N, m): row i is of the true pose in copy i % copies, drawn from the encoder."""
    logits = encoded(model, complexes)
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
    chosen = [complexes[i % len(complexes)] for i in range(count)]
    draws = draw(count, len(chosen[0].rotatable), 0, 0, 0.0, seeded_generator("cpu", "loss", s))
    codes = None
    if model.num_latents:
        codes = draw_from_encoder(model, complexes, SeededNoise("codes", range(count))).roll(-shift, 0)
    batch, score, found = gather(chosen), denoiser(model, codes), []
    for t in TIMES:
        draws.t = torch.full((count,), t)
        noisy, targets = disturb(chosen, [c.pos for c in chosen], draws)
        scores = score(batch, noisy, draws.t, slice(0, count))
        found.append(total(losses(scores, targets, draws, batch)).item())
    return found


def measure(model, complexes, s):
    """-> a row of results.json"""
    n = len(complexes)
    noise = SeededNoise("pockets", [1000 * s + i for i in range(num_samples)])
    codes = draw_from_encoder(model, complexes, noise) if model.num_latents else torch.zeros(num_samples, 0).long()
    poses = sample(denoiser(model, codes), complexes[0], noise, num_steps).float()
    errors = torch.stack([rmsd(poses, c.pos, c.symmetries) for c in complexes], 1)
    least, copy = errors.min(1)
    good = least < 2
    row = dict(copies=n, label_size=model.score.net.label_size, seed=s, success=good.float().mean().item(),
               shares=(copy[good].bincount(minlength=n) / max(good.sum(), 1)).tolist(),
               median=least.median().item(), loss=dict(zip(map(str, TIMES), loss_by_time(model, complexes, s))),
               poses=poses[:16].double().round(decimals=2).tolist(), codes=codes[:n].flatten().tolist())
    if model.num_latents:
        p = encoded(model, complexes)[:, 0].softmax(-1)
        entropy = torch.special.entr
        row |= dict(points_at=p.argmax(-1).tolist(), probability=p.max(-1).values.tolist(),
                    bits=((entropy(p.mean(0)).sum() - entropy(p).sum(-1).mean()) / math.log(2)).item(),
                    loss_of_wrong_codes=dict(zip(map(str, TIMES), loss_by_time(model, complexes, s, shift=1))),
                    told=(good & (copy == torch.arange(num_samples) % n)).float().mean().item())
    return row


# ----------------------------------------------------------------------------------------------------
# table and picture

HEAD = ("copies label seed  success  share of each copy                       median RMSD   loss at t=0.5   0.8   0.9"
        "   1.0  wrong codes, 0.9   bits   told  the code points at")


def title(count, label_size):
    return f"{count} copies, " + (f"label size {label_size:g}" if label_size else "no latents")


def line_of(rows, complexes):
    """A line under HEAD: one run, or the means over the seeds of several."""
    def mean(value_of):
        return sum(map(value_of, rows)) / len(rows)

    first, size = rows[0], rows[0]["label_size"]
    shares = "/".join(f"{mean(lambda row: row['shares'][i]):.2f}" for i in range(first["copies"]))
    text = (f"{first['copies']:6d}{size or '-':>6}{first['seed'] if len(rows) == 1 else 'mean':>5}"
            f"{mean(lambda row: row['success']):9.2f}  {shares:39s}{mean(lambda row: row['median']):13.2f}         "
            + "".join(f"{mean(lambda row: row['loss'][t]):{width}.2f}"
                      for t, width in (("0.5", 9), ("0.8", 6), ("0.9", 6), ("1.0", 6))))
    if size:
        text += (f"{mean(lambda row: row['loss_of_wrong_codes']['0.9']):18.2f}{mean(lambda row: row['bits']):7.2f}"
                 f"{mean(lambda row: row['told']):7.2f}  ")
        if len(rows) == 1:
            text += ", ".join(f"{RESIDUES[complexes[0].residues[i - 7]]} of copy {(i - 7) // 10 + 1}" if i >= 7
                              else f"atom {i + 1}" for i in first["points_at"])
    return text


def panel(row, complexes):
    """The protein from above, the first poses in the colours of the copies that their codes were drawn for, the
    nodes that codes point at ringed, the true poses black."""
    c = complexes[0]
    plane = torch.eye(3)[:, :2].numpy()
    axes = Axes((-24, 24), (-24, 24), title(row["copies"], row["label_size"]), "Angstrom")
    axes.scatter(c.rec_pos.numpy() @ plane, RESIDUE, 3)
    for other in complexes:
        draw_ligand(axes, other, other.pos, plane, (0, 0, 0), 3.0)
    for i, pose in enumerate(row["poses"]):
        colour = tuple(COLOURS[i % len(complexes)].tolist()) if row["codes"] else (150, 150, 150)
        draw_ligand(axes, c, pose, plane, colour, 0.8)
    for i, code in enumerate(row["codes"]):
        ring(axes, torch.cat([complexes[i].pos, c.rec_pos])[code], plane, tuple(COLOURS[i].tolist()), 12, 4)
    return axes


def curves(rows):
    """Loss against time, a line for each seed; with wrong codes in a lighter colour. -> the plot, its legend"""
    axes, labels = Axes((0, 1), (0, 1.5), f"{rows[0]['copies']} copies, all seeds", "time t", "loss"), {}
    for row in rows:
        colour = COLOURS[round(row["label_size"]) % 8]
        label = title(row["copies"], row["label_size"]).partition(", ")[2]
        lines = [("loss", colour, label)]
        if row["label_size"]:
            lines.append(("loss_of_wrong_codes", 255 - (255 - colour) // 3, f"{label}, wrong codes"))
        for key, shade, name in lines:
            axes.line([(float(t), value) for t, value in row[key].items()], shade, 1.5, True)
            labels[name] = shade
    return [axes, Legend([*labels.items()])]


# ----------------------------------------------------------------------------------------------------
# the runs


def write(found, same):
    """Table, picture and results of all rows {(copies, label size, seed): row} so far. -> the table's lines"""
    lines, pictures = [HEAD], []
    for n in copies:
        complexes, of_copies = pockets(n), []
        for size in label_sizes:
            rows = [found[n, size, s] for s in range(seed, seed + seeds) if (n, size, s) in found]
            lines += [line_of([row], complexes) for row in rows]
            if len(rows) > 1:
                lines.append(line_of(rows, complexes))
            of_copies += rows
        if of_copies:
            drawn = [row for row in of_copies if row["seed"] == seed]
            pictures.append([*(panel(row, complexes) for row in drawn), *curves(of_copies)])
    results = json.dumps(dict(settings=same, runs=[*found.values()]))
    for name, text in (("table.txt", "\n".join(lines) + "\n"), ("results.json", results)):
        with atomic(f"{out_dir}/{name}") as file:
            file.write(text.encode())
    with atomic(f"{out_dir}/pocket.png") as file:
        figure(pictures).save(file, "png", optimize=True)
    return lines


def read(same):
    """-> {(copies, label size, seed): row} of an earlier run in out_dir, with the same settings"""
    path = Path(out_dir, "results.json")
    try:
        content = json.loads(path.read_text()) if path.exists() else dict(settings=same, runs=[])
        found = {(row["copies"], row["label_size"], row["seed"]): row for row in content["runs"]}
        others = [name for name in same if content["settings"][name] != same[name]]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path} is damaged: delete it, or choose another --out_dir") from None
    require(not others, f"{path} is from a run with another {', '.join(others)}: choose another --out_dir")
    return found


def main(argv=()):
    config = configure(globals(), argv)
    require_numbers(config, or_zero=("seed", "null_prob"))
    require(copies and all(1 < n <= 8 for n in copies), f"copies are numbers from 2 to 8, not {copies}")
    require(label_sizes and all(0 <= size < math.inf for size in label_sizes),
            f"label_sizes are numbers from 0 on, not {label_sizes}")
    require(len({*copies}) == len(copies) and len({*label_sizes}) == len(label_sizes),
            f"copies {copies} and label_sizes {label_sizes} can't have a number twice")
    same = {name: value for name, value in config.items() if name not in FREE}
    with alone(f"{out_dir}/results"):
        Path(out_dir).mkdir(parents=True, exist_ok=True)  # a folder that can't be written shows now
        found = read(same)
        for s in range(seed, seed + seeds):
            for n in copies:
                for size in label_sizes:
                    if (n, size, s) not in found:
                        complexes = pockets(n)
                        found[n, size, s] = measure(train(complexes, size, s), complexes, s)
                        print(HEAD, line_of([found[n, size, s]], complexes), sep="\n", flush=True)
                        write(found, same)
        print("", *write(found, same), f"pocket.png, table.txt and results.json are in {out_dir}", sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
