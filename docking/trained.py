"""
What docking's training scripts share, and how trained networks are loaded.
"""

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import training
from checkpoint import CHECKPOINT, load_checkpoint, weights_checksum
from configurator import UserError, require
from docking import data
from docking.model import DisCoDock
from processes import max_over_processes
from run import progress

# settings that may change when a run continues
FREE = ("out_dir", "overwrite", "change", "device", "total_poses", "total_images", "log_every", "save_every")
KEYS = {"config", "model_args", "step", "ema", "features", "complexes"}
CHECKPOINT |= {"docking/train": KEYS, "docking/train_prior": KEYS | {"stage1"},
               "docking/confidence": KEYS | {"stage1"}}


def begin(config, name, made_by, total):
    """training.start, for poses: the repository's scripts count images."""
    config["total_images"] = total
    return training.start(config, name, made_by)


def require_features(checkpoint, path):
    require(checkpoint["features"] == data.FEATURES,
            f"{path} was trained on other features of atoms and residues than this version has: train it again")


def like_model(run):
    """-> a check, before a run continues, that its checkpoint is of the same complexes and features"""
    def check(checkpoint):
        require_features(checkpoint, run.path)
        require(checkpoint["complexes"] == run.carries["complexes"],
                f"{run.path} was trained on other complexes than {run.config['dataset']} has now: "
                "choose another --out_dir")
        require(checkpoint.get("stage1") == run.carries.get("stage1"),
                f"{run.path} belongs to another stage 1: start anew with --overwrite=True")
    return check


def load_stage1(folder, device="cpu"):
    """-> the trained DisCoDock of a run's folder, averaged weights in eval mode; its checkpoint"""
    checkpoint = load_checkpoint(f"{folder}/stage1.pt", "docking/train")
    require_features(checkpoint, f"{folder}/stage1.pt")
    return build(DisCoDock, checkpoint, device), checkpoint


def complexes_of(stage1):
    """-> the complexes that a checkpoint of stage 1 was trained on"""
    dataset = stage1["config"]["dataset"]
    _, complexes = data.load(dataset)
    require(data.identity(complexes) == stage1["complexes"],
            f"the data set {dataset} is not what stage 1 was trained on: prepare it as it was")
    return complexes


def load_second(network, folder, name, device, stage1):
    """-> the network that was trained on this stage 1: the prior, or the confidence model"""
    script = {"prior": "train_prior", "confidence": "confidence"}[name]
    checkpoint = load_checkpoint(f"{folder}/{name}.pt", f"docking/{script}")
    require(checkpoint["stage1"] == weights_checksum(stage1["ema"]),
            f"{folder}/{name}.pt belongs to another stage 1: put that one back, or run "
            f"docking/{script}.py --overwrite=True --out_dir={folder}")
    return build(network, checkpoint, device)


def update(run, step, grad_clip, ema_decay):
    """Clipping, Adam, moving average of the weights. -> gradient norm"""
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, grad_clip)
    training.guarded_step(run.optimizer, norm, run.skipped)
    get_ema_multi_avg_fn(min(ema_decay, (1 + step) / (10 + step)))(run.ema_parameters, run.parameters, None)
    for average, buffer in zip(run.ema.buffers(), run.model.buffers()):
        average.copy_(buffer)  # the norms' statistics are averages already
    return norm


def train(run, signals, gradients, update, report, what, then=""):
    """Steps, over and over, until total_poses are seen or a signal comes.

    gradients(run, step) leaves them in the parameters, -> what `report` needs; update(run, step) -> gradient norm;
    report(run, seen, bar) writes a line of the log. what: the run has seen, "poses" or "codes"; then: what is printed
    at the end.
    """
    count, total = run.config["batch_size"], run.config["total_poses"]
    stopped, seen = 0, run.step * count
    if run.master:
        training.open_log(run, what)
    bar = progress(total=total, initial=seen, unit="pose", disable=not run.master, mininterval=1)
    run.model.train()
    while seen < total and not stopped:
        measured = gradients(run, run.step)
        norm = update(run, run.step)
        training.add_up(run, norm, *measured)
        run.step, seen = run.step + 1, seen + count
        bar.update(count)
        if training.due(run.config["log_every"], seen, run.config):
            report(run, seen, bar)
        stopped = max_over_processes(max(signals, default=0))
        if run.master and (training.due(run.config["save_every"], seen, run.config) or stopped):
            training.save(run)
    bar.close()
    if run.master and then and seen >= total:
        print(then)
    training.finish(run, stopped, what)


def build(network, checkpoint, device):
    try:
        model = network(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["ema"])
    except (RuntimeError, TypeError) as error:
        raise UserError(f"the checkpoint is of another architecture than this {network.__name__}: "
                        f"{str(error).splitlines()[-1].strip()}") from None
    return model.to(device).eval().requires_grad_(False)
