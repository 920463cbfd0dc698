"""
What both training scripts do besides their method: share a batch among processes, resume, skip bad steps, log, save.

A script's `setup` makes `run`, a plain namespace: what is known of the run, its networks and its data. The script owns
the loop, and calls these functions.
"""

import json
import math
import time
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from checkpoint import atomic, previous, read_log, resume, save_checkpoint, write_log
from configurator import require
from plot import save_curves
from processes import mean_over_processes, same_on_all, start_processes
from run import end, hold, set_precision

SKIPPED_IN_A_ROW = 20  # steps without finite gradients that end a run


def start(config, name, made_by):
    """Joins the processes. -> run, as far as it is known yet

    config: the script's settings; name: of the checkpoint, out_dir/NAME.pt; made_by: the script, for the checkpoint. Raises
    UserError where this machine or this number of processes won't do.
    """
    rank, world, device = start_processes(config["device"])
    require(config["batch_size"] % world == 0,
            f"batch_size {config['batch_size']} can't be shared among {world} processes equally")
    run = SimpleNamespace(
        config=config, made_by=made_by, path=f"{config['out_dir']}/{name}.pt", log=f"{config['out_dir']}/{name}.jsonl",
        rank=rank, world=world, master=rank == 0, device=device, local_batch=config["batch_size"] // world,
        autocast=set_precision(config["precision"], device),
        scale=config["loss_scale"] if config["precision"] == "fp16" and device.type == "cuda" else 1)
    return run


def resume_run(run, free, changeable, upgrade=None, **others):
    """Keeps other runs from writing run.path, and goes on from the checkpoint that is there, if it can be continued.

    run has model, ema and optimizer, into which the checkpoint goes; free, changeable, others: as in `checkpoint.resume`;
    upgrade(checkpoint, model): brings an older version's to today's form. -> whether there was a checkpoint
    """
    if run.master:
        hold(run.path.removesuffix(".pt"))
    run.parameters, run.ema_parameters = list(run.model.parameters()), list(run.ema.parameters())
    run.skipped = torch.zeros(2, device=run.device)  # steps whose gradients were not finite: in a row, in all
    run.step = 0
    checkpoint = resume(run.path, run.config, run.model_args, free, changeable, run.made_by, **others)
    if checkpoint:
        if upgrade:
            upgrade(checkpoint, run.model)
        run.step = checkpoint["step"]
        for part in ("model", "ema", "optimizer"):
            getattr(run, part).load_state_dict(checkpoint[part])
        run.skipped.copy_(checkpoint["skipped"])
    require(same_on_all(run.step), f"the processes found different checkpoints: {run.config['out_dir']} must be on a file "
                                   "system that all nodes share")
    reset(run)
    return bool(checkpoint)


def distributed(run, network):
    """The network as all processes train it together."""
    if run.world == 1:
        return network
    return DistributedDataParallel(network, device_ids=[run.device.index] if run.device.type == "cuda" else None)


# ----------------------------------------------------------------------------------------------------
# a step


def backward(run, loss):
    """Adds the gradients of the loss; in fp16 they are scaled, so that small ones don't vanish, until `unscale`."""
    (run.scale * loss).backward()


def unscale(run):
    if run.scale != 1:
        for p in run.parameters:
            p.grad /= run.scale


def guarded_step(optimizer, norm, skipped):
    """An optimiser's step; none where the norm of all gradients is not finite: weights and moments stay as they are.

    optimizer: a fused one. norm: scalar tensor. skipped: float (2,), counts consecutive skips, total skips; in place.
    Nothing here waits for the device.
    """
    bad = ~norm.isfinite()
    optimizer.found_inf = bad.float()  # a fused optimiser skips the step when this is 1
    optimizer.step()
    optimizer.zero_grad()
    skipped.add_(bad)
    skipped[0] *= bad


# ----------------------------------------------------------------------------------------------------
# the log


def due(every, seen, config):
    """Whether something that is done every so many images is due after this step; 0: never."""
    return every and (seen // every != (seen - config["batch_size"]) // every or seen >= config["total_images"])


def open_log(run):
    """What process 0 does before the first step: the log up to here, and a first checkpoint."""
    seen = run.step * run.config["batch_size"]
    write_log(run.log, read_log(run.log, seen) if run.step else [], mode="w")
    if not run.step:
        save(run)  # is there room on the disk? And torchrun restarts from here, not from what --overwrite=True replaces
        previous(run.path).unlink(missing_ok=True)  # nor may a damaged checkpoint of this run lead back to an older run


def reset(run):
    """Begins a new line of the log."""
    run.sums, run.good, run.steps, run.since = None, 0, 0, time.time()


def add_up(run, norm, *measured):
    """Adds what a step measured, scalars or tensors on the device, to the sums for the log. Bad steps add nothing."""
    good = norm.isfinite()
    values = [torch.where(good, value, 0) for value in (norm, *measured)]
    run.sums = values if run.sums is None else [total + value for total, value in zip(run.sums, values)]
    run.good, run.steps = run.good + good, run.steps + 1


def totals(run, lower):
    """-> the number of good steps since the last line, and sums over them: the gradient's norm, then what was measured.

    Sums are means over the processes, which all ask together. Raises UserError where so many steps in a row had no finite
    gradients that the run is lost; lower: the settings that may help.
    """
    in_a_row = run.skipped[0].item()
    lower = f"--loss_scale or {lower}" if run.scale > 1 else lower
    require(in_a_row < SKIPPED_IN_A_ROW, f"the gradients of the last {in_a_row:.0f} steps were not finite, and the weights "
            f"stayed as they were: try a lower {lower}; {run.path} has weights of before")
    return run.good.item() or math.nan, [mean_over_processes(total) for total in run.sums]


def write_line(run, line, bar, shown):
    """A line of the log, by process 0, and what the bar shows; then a new line begins.

    line: dict, to which the learning rate, the skipped steps and the speed are added; shown: dict of strings
    """
    if run.master:
        skipped = int(run.skipped[1].item())
        speed = run.steps * run.config["batch_size"] / (time.time() - run.since)
        line |= dict(lr=run.optimizer.param_groups[0]["lr"], skipped=skipped, images_per_second=speed)
        write_log(run.log, [json.dumps(line)])
        bar.set_postfix(shown | ({"steps skipped": skipped} if skipped else {}))
    reset(run)


# ----------------------------------------------------------------------------------------------------
# checkpoints


def save(run, keep=""):
    """Saves the checkpoint to continue from; with keep, a file name, another that stays, without the optimiser.

    Raises UserError where the weights are not finite.
    """
    require(get_total_norm(run.parameters).isfinite(), f"the weights are not finite any more: a lower {run.lower} may help; "
            f"{run.path} is left as it was")
    state = dict(made_by=run.made_by, config=run.config, model_args=run.model_args, step=run.step,
                 model=run.model.state_dict(), ema=run.ema.state_dict(), **run.carries)
    if keep:
        with atomic(keep) as file:
            torch.save(state, file)
    else:
        save_checkpoint(run.path, state | dict(optimizer=run.optimizer.state_dict(), skipped=run.skipped))


def finish(run, stopped, what):
    """The end of a run, or of the part of it before the signal `stopped`; what: "images", or what else was seen."""
    seen = run.step * run.config["batch_size"]
    if run.master:
        lines = [json.loads(line) for line in read_log(run.log, math.inf)]
        save_curves(lines, f"{run.path.removesuffix('.pt')}_curves.png")
    end(stopped if seen < run.config["total_images"] else 0, f"{seen:,} {what}", run.path)
