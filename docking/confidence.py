"""
Trains the confidence model, which ranks poses: is the RMSD below 2 Angstrom?

    python docking/confidence.py

Reads stage1.pt and prior.pt of out_dir, docks their training complexes, keeps the poses in poses.pt, and
writes confidence.pt. It sees C-alphas; the paper ranks by DiffDock's own model, which sees all atoms.
"""

import copy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder

import torch
import torch.nn.functional as F

import training
from checkpoint import atomic, read_checkpoint, weights_checksum
from configurator import arguments_of, configure, require, require_numbers
from data import Shuffle
from docking import data, dock, trained
from docking.complexes import gather, rmsd
from docking.model import Confidence
from docking.trained import begin, complexes_of, like_model, load_stage1
from noise import seed_of
from processes import barrier
from run import progress, running

# run
out_dir = "out/docking"
overwrite = False
change = ""
seed = 0
device = "auto"
precision = "fp32"
loss_scale = 1.0
poses_each = 16  # poses of each complex; the paper has 28
close = 2.0  # Angstrom
# network
scalars = 16
vectors = 4
layers = 3
channelwise = True
dropout = 0.1
# optimisation
total_poses = 4_000
batch_size = 8
lr = 1e-3
# reports
log_every = 500
save_every = 2_000


def dock_all(run):
    """-> poses (N, L, 3) of each complex, by the trained networks; kept in out_dir/poses.pt"""
    nets = dock.Nets(out_dir, run.device)
    made_with = [run.carries["complexes"], run.carries["stage1"], seed, poses_each]
    if nets.prior:
        made_with.append(weights_checksum(nets.prior.state_dict()))
    path = Path(out_dir, "poses.pt")
    kept = read_checkpoint(path)
    barrier()  # process 0 may write the file
    if kept and kept.get("made_with") == made_with:
        return kept["poses"]
    nets.confidence = None
    dock.num_samples = dock.batch_size = poses_each
    dock.seed = seed + 1  # not the poses that dock.py shows
    kind = "prior" if nets.stage1.num_latents else "none"
    poses = [dock.dock(nets, c, kind, key)[0] for key, c in enumerate(progress(run.complexes, desc="docking"))]
    if run.master:
        with atomic(path) as file:
            torch.save(dict(poses=poses, made_with=made_with), file)
    return poses


def gradients(run, step):
    """Leaves the gradients of one step in the parameters. -> cross-entropy in nats; share of right answers"""
    start = run.rank * run.local_batch
    pairs = [run.pairs[i] for i in run.batches.take(step * batch_size + start, run.local_batch)]
    batch = gather([run.complexes[i] for i, _ in pairs], run.device)
    pos = torch.cat([run.poses[i][j] for i, j in pairs]).to(run.device)
    target = torch.stack([run.success[i][j] for i, j in pairs]).to(run.device)
    torch.manual_seed(seed_of("dropout", seed, step, start))
    with run.autocast:
        logits = run.forward(batch, pos)
    loss = F.binary_cross_entropy_with_logits(logits, target)
    training.backward(run, loss + 0 * sum(p.sum() for p in run.parameters))  # some lead nowhere: DDP waits for all
    training.unscale(run)
    return loss.detach(), ((logits > 0) == (target > 0.5)).float().mean()


def update(run, step):
    """`trained.update`, without an average. -> gradient norm"""
    return trained.update(run, step, 10.0, 0.0)


def setup(config):
    """Poses, the network, and perhaps a checkpoint to continue -> run, as in training.py of the repository"""
    require_numbers(config, or_zero=("seed", "dropout"))
    require(layers >= 3 and dropout < 1, "layers is 3 or more, dropout below 1")
    run = begin(config, "confidence", "docking/confidence", total_poses)
    run.lower = "--lr"
    _, stage1 = load_stage1(out_dir)
    run.complexes = complexes_of(stage1)
    config["dataset"] = stage1["config"]["dataset"]
    run.carries = dict(features=data.FEATURES, complexes=stage1["complexes"], stage1=weights_checksum(stage1["ema"]))
    run.poses = dock_all(run)
    run.success = [(rmsd(poses, c.pos, c.symmetries) < close).float() for poses, c in zip(run.poses, run.complexes)]
    run.pairs = [(i, j) for i, poses in enumerate(run.poses) for j in range(len(poses))]
    run.batches = Shuffle(list(range(len(run.pairs))), seed)
    run.model_args = arguments_of(config, Confidence)
    torch.manual_seed(seed)
    run.model = Confidence(**run.model_args).to(run.device)
    run.ema = copy.deepcopy(run.model).eval().requires_grad_(False)
    run.optimizer = torch.optim.Adam(run.model.parameters(), lr=lr, fused=True)
    training.resume_run(run, trained.FREE, ("lr",), prepare=like_model(run))
    run.forward = training.distributed(run, run.model)
    return run


def report(run, seen, bar):
    steps, (norm, loss, right) = training.totals(run, run.lower)
    line = dict(images=seen, loss=loss.item() / steps, right=right.item() / steps, grad_norm=norm.item() / steps)
    training.write_line(run, line, bar, {"loss": f"{line['loss']:.3f}", "right": f"{line['right']:.2f}"})


def main(argv=()):
    config = configure(globals(), argv)
    with running(f"{out_dir}/confidence") as signals:
        run = setup(config)
        if run.master:
            print(f"{torch.cat(run.success).mean():.0%} of {len(run.pairs)} poses are within {close:g} Angstrom")
        trained.train(run, signals, gradients, update, report, "poses")


if __name__ == "__main__":
    main(sys.argv[1:])
