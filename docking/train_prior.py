"""
Stage 2 of DisCo-DiffDock: trains the prior of the codes, given protein and ligand (Alg. 2, App. E.4).

    python docking/train_prior.py
    torchrun --nproc_per_node=2 docking/train_prior.py docking/config/pdbbind_prior.py

Reads out_dir/stage1.pt, writes out_dir/prior.pt. The layers start as the trained denoiser's, and are held
at first. The ligand is a conformer with a random orientation at the protein's centre. Targets are the
encoder's distributions, not samples: the cross-entropy has less noise.
"""

import copy
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder

import torch

import training
from checkpoint import weights_checksum
from configurator import configure, require, require_numbers
from data import Shuffle
from docking import data, trained
from docking.complexes import gather
from docking.diffusion import uniform_rotations
from docking.model import Prior
from docking.noise import rotation_matrix
from docking.trained import begin, complexes_of, like_model, load_stage1
from model import draw_codes
from noise import gumbel_noise, seed_of, seeded_generator
from run import running

# run
out_dir = "out/docking"
overwrite = False
change = ""
seed = 0
device = "auto"
precision = "fp32"
loss_scale = 1.0
# optimisation
total_poses = 8_000
held_poses = 2_000  # for the first so many, the denoiser's layers are held
batch_size = 8
lr = 1e-3
dropout = 0.1
ema_decay = 0.99
# reports
log_every = 1_000
save_every = 4_000

CHANGEABLE = ("lr", "ema_decay", "precision", "loss_scale")


@torch.no_grad()
def encode(run):
    """-> the encoder's distributions (m, nodes) of all complexes"""
    out = []
    for c in run.complexes:
        out.append(run.stage1.encoder(gather([c], run.device), c.pos.to(run.device))[0].softmax(-1))
    return out


def gradients(run, step):
    """Leaves the gradients of one step in the parameters. -> cross-entropy and the targets' own entropy, in bits"""
    start, m = run.rank * run.local_batch, run.stage1.num_latents
    rows = slice(start, start + run.local_batch)
    g = seeded_generator("cpu", "prior", seed, step)
    gumbel = gumbel_noise((batch_size, m, run.most_nodes), g)[rows]
    rotations = rotation_matrix(uniform_rotations(torch.randn(batch_size, 4, generator=g)))[rows]
    following = torch.randint(m, (batch_size,), generator=g)[rows]  # which latent is next
    indices = run.batches.take(step * batch_size + start, run.local_batch)
    chosen = [run.complexes[i] for i in indices]
    batch = gather(chosen, run.device)
    pos = torch.cat([c.conformer @ R.T for c, R in zip(chosen, rotations)]).to(run.device)
    target = torch.zeros(len(chosen), m, batch.most, device=run.device)
    for row, i in enumerate(indices):
        target[row, :, :run.targets[i].shape[1]] = run.targets[i]
    z = draw_codes(target.log(), gumbel[:, :, :batch.most].to(run.device))
    prefix = torch.where(torch.arange(m) < following[:, None], z.cpu(), -1).to(run.device)
    target = target[torch.arange(len(chosen)), following]
    torch.manual_seed(seed_of("dropout", seed, step, start))
    with run.autocast:
        log_p = run.forward(batch, pos, prefix).log_softmax(-1)
    loss = -torch.where(target > 0, target * log_p, 0).sum(-1).mean()
    # the last layer's vectors lead nowhere: zeros for them, since DDP waits for all gradients
    training.backward(run, loss + 0 * sum(p.sum() for p in run.parameters))
    training.unscale(run)
    return loss.detach() / math.log(2), torch.special.entr(target).sum(-1).mean() / math.log(2)


def update(run, step):
    """`trained.update`, with the denoiser's layers held at first. -> gradient norm"""
    run.optimizer.param_groups[0]["lr"] = lr if step * batch_size >= held_poses else 0.0  # the denoiser's layers
    return trained.update(run, step, 10.0, ema_decay)


def setup(config):
    """Stage 1, the prior, and perhaps a checkpoint to continue -> run, as in training.py of the repository"""
    require_numbers(config, or_zero=("seed", "held_poses", "dropout", "ema_decay"))
    require(dropout < 1 and ema_decay < 1, "dropout and ema_decay are below 1")
    run = begin(config, "prior", "docking/train_prior", total_poses)
    run.lower = "--lr"
    run.stage1, stage1 = load_stage1(out_dir, run.device)
    require(run.stage1.num_latents, f"{out_dir}/stage1.pt has no latents: there is nothing to train a prior on")
    run.complexes = complexes_of(stage1)
    config["dataset"] = stage1["config"]["dataset"]
    run.most_nodes = max(map(len, run.complexes))
    run.batches = Shuffle(list(range(len(run.complexes))), seed)
    run.carries = dict(features=data.FEATURES, complexes=stage1["complexes"], stage1=weights_checksum(stage1["ema"]))
    sizes = ("num_latents", "scalars", "vectors", "layers", "channelwise", "label_size")
    run.model_args = {name: stage1["model_args"][name] for name in sizes} | dict(dropout=dropout)
    torch.manual_seed(seed)
    run.model = Prior(**run.model_args).to(run.device)
    run.model.net.load_state_dict(run.stage1.score.net.state_dict())
    run.ema = copy.deepcopy(run.model).eval().requires_grad_(False)
    groups = [run.model.net, run.model.pointer]
    run.optimizer = torch.optim.Adam([dict(params=part.parameters(), lr=lr) for part in groups], fused=True)
    training.resume_run(run, trained.FREE, CHANGEABLE, prepare=like_model(run))
    run.forward = training.distributed(run, run.model)
    run.targets = encode(run)
    return run


def report(run, seen, bar):
    steps, (norm, bits, least) = training.totals(run, run.lower)
    line = dict(images=seen, bits=bits.item() / steps, least_bits=least.item() / steps, grad_norm=norm.item() / steps)
    training.write_line(run, line, bar, {"bits": f"{line['bits']:.2f}", "at least": f"{line['least_bits']:.2f}"})


def main(argv=()):
    config = configure(globals(), argv)
    with running(f"{out_dir}/prior") as signals:
        run = setup(config)
        trained.train(run, signals, gradients, update, report, "codes",
                      f"{run.path} is ready; next: python docking/dock.py --out_dir={out_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
