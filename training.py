"""
What both training scripts do besides their method: share a batch among processes, resume, skip bad
steps, log, save.

A script's `setup` makes `run`, a plain namespace of settings, networks and data. The script owns the
loop, and calls these functions.
"""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

import data
from checkpoint import atomic, previous, read_log, resume, save_checkpoint, write_log
from configurator import UserError, require, say
from plot import save_curves
from processes import mean_over_processes, same_on_all, start_processes
from run import end, set_precision
from sharding import whole

SKIPPED_IN_A_ROW = 20  # a run ends after this many consecutive steps without finite gradients


def start(config, name, made_by):
    """Joins the processes. -> run, with all that is known so far

    config: the script's settings; name: of the checkpoint, out_dir/NAME.pt; made_by: the script's name,
    for the checkpoint. Raises UserError if this machine or this number of processes won't do.
    """
    rank, world, device = start_processes(config["device"])
    require(config["batch_size"] % world == 0,
            f"batch_size {config['batch_size']} can't be shared among {world} processes equally")
    return SimpleNamespace(
        config=config, made_by=made_by, path=f"{config['out_dir']}/{name}.pt",
        log=f"{config['out_dir']}/{name}.jsonl", curves=f"{config['out_dir']}/{name}_curves.png",
        rank=rank, world=world, master=rank == 0, device=device,
        local_batch=config["batch_size"] // world,
        autocast=set_precision(config["precision"], device),
        scale=config["loss_scale"] if config["precision"] == "fp16" and device.type == "cuda" else 1)


def micro_batches(run):
    """The parts of a batch that this process takes one after the other, each of batch_gpu images at most, in a run
    of such a setting. -> slices of the batch's rows. Raises UserError if they can't be equal."""
    steps = -(-run.local_batch // run.config["batch_gpu"])
    require(run.local_batch % steps == 0,
            f"{run.local_batch} images per process can't be split into {steps} equal parts of at most "
            f"{run.config['batch_gpu']}: change batch_size or batch_gpu")
    first, size = run.rank * run.local_batch, run.local_batch // steps
    return [slice(i, i + size) for i in range(first, first + run.local_batch, size)]


def resume_run(run, free, changeable, prepare=None, **others):
    """Continues from the checkpoint at run.path, if any. -> whether there was one

    run.model, run.ema and run.optimizer take the checkpoint's state. free, changeable, others: as in
    `checkpoint.resume`; prepare(checkpoint) looks at it, or changes it, first.
    """
    run.parameters, run.ema_parameters = list(run.model.parameters()), list(run.ema.parameters())
    run.skipped = torch.zeros(2, device=run.device)  # steps without finite gradients: in a row, in all
    run.step = 0
    checkpoint = resume(run.path, run.config, run.model_args, free, changeable, run.made_by, **others)
    if checkpoint:
        if prepare:
            prepare(checkpoint)
        load_state(run, checkpoint)
    require_same(run, run.step)
    run.began = run.step
    reset(run)
    return bool(checkpoint)


def state_of(run):
    """All that changes as a run trains."""
    return dict(step=run.step, model=run.model.state_dict(), ema=run.ema.state_dict(),
                optimizer=run.optimizer.state_dict(), skipped=run.skipped)


def load_state(run, state):
    """The inverse of `state_of`."""
    run.step = state["step"]
    for part in ("model", "ema", "optimizer"):
        getattr(run, part).load_state_dict(state[part])
    run.skipped.copy_(state["skipped"])


def require_same(run, step):
    """Raises UserError if the processes' checkpoints are at different steps."""
    require(same_on_all(step), "the processes found different checkpoints: "
                               f"{run.config['out_dir']} must be on a file system that all nodes share")


def distributed(run, network):
    """-> the network, as all processes train it together"""
    if run.world == 1:
        return network
    return DistributedDataParallel(network, device_ids=[run.device.index] if run.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)  # no second copy of them, unless they accumulate


# ----------------------------------------------------------------------------------------------------
# a step


def require_unchanged(run):
    """Raises UserError if the file of run.images has changed since the run began."""
    require(data.file_stamp(run.images) == run.stamp,
            f"{run.config['dataset']} changed while it was being trained on: prepare it as it was, and give the same "
            f"command again. {run.path} is from before the change, or nearly so")


def backward(run, loss):
    """Adds the loss's gradients; in fp16 scaled until `unscale`, so that small ones don't vanish."""
    (run.scale * loss).backward()


def unscale(run):
    if run.scale != 1:
        for p in run.parameters:
            if p.grad is not None:
                p.grad /= run.scale


def gradient_norm(run):
    """The norm of all gradients; a parameter that is held has none."""
    return get_total_norm([p.grad for p in run.parameters if p.grad is not None])


def guarded_step(optimizer, norm, skipped):
    """The optimiser's step, skipped if the norm of all gradients is not finite.

    A skipped step leaves weights and moments as they are. optimizer: a fused one. norm: scalar tensor.
    skipped: float (2,), counters of consecutive and of all skips, updated in place. Nothing here waits
    for the device.
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
    """Whether something to do every so many images is due after this step; every = 0: never."""
    return every and (seen // every != (seen - config["batch_size"]) // every or seen >= config["total_images"])


def open_log(run, what):
    """Process 0 cuts the log back to the present step, and saves a new run's first checkpoint; of a finished
    run it says that it is finished. All processes call it if the run is sharded. what: "images" or "codes"."""
    seen = run.step * run.config["batch_size"]
    if seen >= run.config["total_images"]:
        if run.master:
            total = next(name for name in run.config if name.startswith("total_"))  # docking's counts poses
            print(f"{run.path} is finished: it has seen {seen:,} {what}. "
                  f"A larger --{total} continues it, --overwrite=True starts anew")
        return
    if run.master:
        write_log(run.log, read_log(run.log, seen) if run.step else [], mode="w")
    if not run.step:
        # a full disk shows now; and a restart by torchrun finds this run, not the one it replaces
        save(run)
        if run.master:
            previous(run.path).unlink(missing_ok=True)  # else a damaged checkpoint could bring back the older run
            Path(run.curves).unlink(missing_ok=True)


def reset(run):
    """Begins a new line of the log."""
    run.sums, run.good, run.steps, run.since = None, 0, 0, time.time()


def usage(p):
    """Of code distributions p (B, m, k) -> sums over the images of these (m, k), and of entropies"""
    p = p.detach()
    return p.sum(0), torch.special.entr(p).sum()


def of_usage(code_sum, entropy_sum, count):
    """What the codes of `count` images say, from `usage`'s sums. -> a part of the log's line, and of the bar's"""
    p = code_sum / count  # (m, k) averaged code distribution
    entropy = torch.special.entr(p).sum(1)
    perplexity = entropy.exp().tolist()  # codes that each latent uses, 1 ... k
    # what each latent tells about the image, I(z_i; y) = H(z_i) - H(z_i | y), added up: codes that repeat each other
    # count twice. 0 where the encoder ignores the image
    bits = (entropy.sum() - entropy_sum / count).item() / math.log(2)
    used = "/".join(f"{u:.0f}" for u in perplexity[:16])
    return dict(perplexity=perplexity, bits=bits), {"codes used": f"{used} of {p.shape[1]}", "bits": f"{bits:.1f}"}


def of_divergence(divergence_sum, count):
    """What `count` images' latents tell, at most: the sums (m,) over the images of each latent's KL divergence from a
    prior, in nats. -> a part of the log's line, and of the bar's"""
    bits = (divergence_sum / count / math.log(2)).tolist()
    of_each = "/".join(f"{of_latent:.1f}" for of_latent in bits[:16])
    return dict(kld=bits), {"KL, bits": f"{sum(bits):.1f} = {of_each}"}


def add_up(run, norm, *measured):
    """Adds a step's measurements, tensors on the device, to the log's sums. Bad steps add nothing."""
    good = norm.isfinite()
    values = [torch.where(good, value, 0) for value in (norm, *measured)]
    run.sums = values if run.sums is None else [total + value for total, value in zip(run.sums, values)]
    run.good, run.steps = run.good + good, run.steps + 1


def totals(run, lower):
    """-> number of good steps since the last line; sums over them of the gradient norm and measurements

    Sums are means over the processes; all must call it. Raises UserError if the run is lost, after too
    many steps in a row without finite gradients; lower: the settings that may help.
    """
    in_a_row = run.skipped[0].item()
    lower = f"--loss_scale or {lower}" if run.scale > 1 else lower
    require(in_a_row < SKIPPED_IN_A_ROW,
            f"the gradients of the last {in_a_row:.0f} steps were not finite, and the weights stayed as they were: "
            f"try a lower {lower}; {run.path} has the weights from before")
    return run.good.item() or math.nan, [mean_over_processes(total) for total in run.sums]


def write_line(run, line, bar, shown):
    """Process 0 writes a line of the log and updates the bar; then a new line begins.

    line: dict, to which learning rate, skipped steps and speed are added; shown: dict of strings
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


def save(run, keep="", **others):
    """Process 0 saves the checkpoint to continue from; keep: a file for a snapshot without the optimiser instead.

    others: more for the checkpoint. All processes call it if the run is sharded. Raises UserError if
    the weights are not finite.
    """
    require(whole(get_total_norm(run.parameters)).isfinite(),
            f"the weights are not finite any more: a lower {run.lower} may help; {run.path} is left as it was")
    state = state_of(run)
    if keep:
        del state["optimizer"], state["skipped"]
    state = dict(made_by=run.made_by, config=run.config, model_args=run.model_args, **state, **run.carries, **others)
    state = whole(state, run.master)
    if not run.master:
        return
    if keep:
        with atomic(keep) as file:
            torch.save(state, file)
    else:
        save_checkpoint(run.path, state)


def finish(run, stopped, what):
    """Draws the curves and ends a run, finished or stopped by a signal. what: it has seen, "images" or "codes"."""
    seen = run.step * run.config["batch_size"]
    if run.step > run.began:
        draw_curves(run)
    end(stopped if seen < run.config["total_images"] else 0, f"{seen:,} {what}", run.path)


def draw_curves(run):
    """Process 0 draws the log."""
    if run.master:
        try:
            lines = [json.loads(line) for line in read_log(run.log, math.inf)]
            save_curves(lines, run.curves)
        except (UserError, ValueError, TypeError) as error:  # a full disk, a log that somebody edited: the run is safe
            say(f"{run.curves} could not be drawn: {error}")
