"""
Stage 1 of DisCo-DiffDock: trains denoiser and encoder together (DisCo-Diff Alg. 1, App. E).

    python docking/train.py                                   # the shipped complexes, on a CPU
    python docking/train.py --num_latents=0 --out_dir=out/diffdock                          # DiffDock-S
    torchrun --nproc_per_node=2 docking/train.py docking/config/pdbbind.py                  # the paper's sizes

Writes stage1.pt, its log and its curve to out_dir; the same command again continues. The denoiser starts
from a conformer with the true pose's torsions; the encoder sees the true pose itself.
"""

import copy
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder

import torch

import training
from configurator import arguments_of, configure, require, require_numbers
from data import Shuffle
from docking import data, trained
from docking.complexes import gather
from docking.diffusion import disturb, draw, losses, total
from docking.model import DisCoDock
from docking.trained import begin, like_model
from noise import seed_of, seeded_generator
from run import running

# run
out_dir = "out/docking"
overwrite = False  # as in train_stage1.py
change = ""
seed = 0
device = "auto"
precision = "fp32"
loss_scale = 1.0
dataset = "shipped"
# networks
num_latents = 2  # m; 0: DiffDock-S
scalars = 16
vectors = 4
layers = 3
encoder_vectors = 4
encoder_layers = 3
channelwise = True  # one weight for each edge and channel; the paper has False
dropout = 0.0
label_size = 5.0  # of the label at the node that a code points at; the paper has 1
tau = 1.0  # Gumbel-Softmax temperature
null_prob = 0.1  # probability that a complex goes without its codes
# optimisation
total_poses = 40_000  # to train on, in all
batch_size = 8  # over all processes
lr = 2e-3
encoder_lr = 2e-3
warmup_poses = 1_000
ema_decay = 0.999  # of the weights' average, per step; at step n at most (1 + n) / (10 + n)
grad_clip = 10.0
# reports
log_every = 2_000  # poses
save_every = 10_000

CHANGEABLE = ("lr", "encoder_lr", "warmup_poses", "ema_decay", "grad_clip", "null_prob", "tau", "precision",
              "loss_scale")


def gradients(run, step):
    """Leaves the gradients of one step in the parameters. -> losses of translation, rotation, torsions; entropy of
    the codes, in bits; share of the codes that point at the ligand"""
    start = run.rank * run.local_batch
    rows = slice(start, start + run.local_batch)
    draws = draw(batch_size, run.most_torsions, num_latents, run.most_nodes, null_prob,
                 seeded_generator("cpu", "pose", seed, step))[rows]
    chosen = [run.complexes[i] for i in run.batches.take(step * batch_size + start, run.local_batch)]
    noisy, targets = disturb(chosen, [c.matched for c in chosen], draws)
    batch = gather(chosen, run.device)
    draws, targets = draws.to(run.device), [x.to(run.device) for x in targets]
    torch.manual_seed(seed_of("dropout", seed, step, start))
    with run.autocast:
        true = torch.cat([c.pos for c in chosen]).to(run.device)
        *scores, logits = run.forward(batch, noisy.to(run.device), draws.t, true, draws.gumbel[..., :batch.most],
                                      draws.drop, tau)
    errors = losses(scores, targets, draws, batch)
    # parameters without a part in this batch, as of ligands that can't turn, get zeros: DDP waits for all
    training.backward(run, total(errors) + 0 * sum(p.sum() for p in run.parameters))
    training.unscale(run)
    measured = [e.mean() if len(e) else e.sum() for e in errors]
    if logits is None:
        return *measured, *torch.zeros(2, device=run.device)
    p = logits.detach().softmax(-1)
    atoms = torch.tensor([len(c.atoms) for c in chosen], device=run.device)
    of_ligand = p * (torch.arange(batch.most, device=run.device) < atoms[:, None, None])
    return *(e.detach() for e in measured), torch.special.entr(p).sum(-1).mean() / math.log(2), of_ligand.sum(-1).mean()


def update(run, step):
    """Warm-up, then `trained.update`. -> gradient norm"""
    warm = min(step * batch_size / max(warmup_poses, 1), 1)
    for group, peak in zip(run.optimizer.param_groups, (lr, encoder_lr)):
        group["lr"] = peak * warm
    return trained.update(run, step, grad_clip, ema_decay)


def setup(config):
    """Data, networks, and perhaps a checkpoint to continue -> run, as in training.py of the repository"""
    global _checkpoint_path
    require_numbers(config, or_zero=("seed", "num_latents", "dropout", "null_prob", "warmup_poses", "ema_decay",
                                     "encoder_lr"))
    require(dropout < 1 and null_prob <= 1 and ema_decay < 1, "dropout, null_prob and ema_decay are shares of 1")
    require(min(layers, encoder_layers) >= 3,
            "layers and encoder_layers are 3 or more: only then all kinds of features exist")
    run = begin(config, "stage1", "docking/train", total_poses)
    _checkpoint_path, run.lower = run.path, "--lr"
    _, run.complexes = data.load(dataset)
    require(all(c.pos.isfinite().all() for c in run.complexes), f"{dataset} has complexes without a true pose")
    run.most_torsions, run.most_nodes = (max(map(size, run.complexes)) for size in (lambda c: len(c.rotatable), len))
    run.batches = Shuffle(list(range(len(run.complexes))), seed)
    run.carries = dict(features=data.FEATURES, complexes=data.identity(run.complexes))
    run.model_args = arguments_of(config, DisCoDock)
    torch.manual_seed(seed)
    run.model = DisCoDock(**run.model_args).to(run.device)
    run.ema = copy.deepcopy(run.model).eval().requires_grad_(False)
    groups = [run.model.score, run.model.encoder] if num_latents else [run.model.score]
    run.optimizer = torch.optim.Adam([dict(params=part.parameters(), lr=lr) for part in groups], fused=True)
    training.resume_run(run, trained.FREE, CHANGEABLE, prepare=like_model(run))
    run.forward = training.distributed(run, run.model)
    return run


def report(run, seen, bar):
    """A line of the log. A network that returns 0 has a loss of 1."""
    steps, (norm, *sums) = training.totals(run, run.lower)
    names = ("translation", "rotation", "torsion", "code_bits", "codes_on_ligand")
    line = dict(images=seen) | {name: value.item() / steps for name, value in zip(names, sums)}
    line |= dict(loss=sum(line[name] for name in names[:3]) / 3, grad_norm=norm.item() / steps)
    if not num_latents:
        line = {name: value for name, value in line.items() if not name.startswith("code")}
    training.write_line(run, line, bar, {name: f"{line[name]:.2f}" for name in ("loss", *names) if name in line})


def main(argv=()):
    config = configure(globals(), argv)
    with running(f"{out_dir}/stage1") as signals:
        run = setup(config)
        if run.master:
            print(f"{dataset}: {len(run.complexes)} complexes; {sum(p.numel() for p in run.parameters):,} parameters "
                  f"on {run.device}")
        then = "train_prior.py" if num_latents else "dock.py"
        trained.train(run, signals, gradients, update, report, "poses",
                      f"{run.path} is ready; next: python docking/{then} --out_dir={out_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
