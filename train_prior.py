"""
Stage 2 of DisCo-Diff: trains a prior on the codes of stage 1's encoder (Alg. 2). The prior is
autoregressive, or SEDD-absorb as in Discrete Latent Codes (sec. 4).

    python train_prior.py
    python train_prior.py --prior=sedd
    python train_prior.py --prior=diffusion    # of continuous latents
    python train_prior.py config/cifar10_prior.py
    torchrun --nproc_per_node=8 train_prior.py config/imagenet64_prior.py

Reads out_dir/stage1.pt, which names the images, their split and classes. Writes out_dir/prior_ar.pt
or prior_sedd.pt, a log and its curves.

onestage.py trains a prior along with stage 1, by the functions here.

Each visit to an image draws its codes anew. The encoder runs only once per image: out_dir/logits-*.npy
keeps what it says, or codes-*.npy after train_stage1.py --codes, where codes are certain (encoded.py). The
same command again continues a run, as in train_stage1.py.
"""

import copy
import math
import sys

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import training
from checkpoint import weights_checksum
from configurator import UserError, arguments_of, configure, require, require_numbers
from encoded import Encoded
from noise import gumbel_noise, seeded_generator
from prior import UNITS, mean_bits
from processes import max_over_processes
from run import progress, running
from trained import PRIORS, load_stage1, load_trained_on, require_fit

# run
out_dir = "out"
overwrite = False  # replace an older or finished prior in out_dir; continue an unfinished run of this command
change = ""  # "lr,ema_decay": settings that may change when a run continues
seed = 0
device = "auto"
precision = "bf16"  # as in train_stage1.py
loss_scale = 1.0
# the Transformer
# autoregressive; "sedd": discrete diffusion. In place of codes, "rdm" draws embeddings, "diffusion" continuous latents
prior = "ar"
layers = 4
dim = 128
heads = 4
# optimisation
total_images = 100_000  # codes to train on, in all
batch_size = 250  # over all processes
lr = 1e-3
warmup_images = 10_000
label_drop = 0.1  # probability of training without the class
grad_clip = 1.0  # as in SEDD, like ema_decay
ema_decay = 0.9999  # of the weights' average, per step; at step n at most (1 + n) / (10 + n)
# memory and reports
cache_gb = 16.0  # if what the encoder says needs more, it is not kept: the encoder runs on every batch
log_every = 10_000  # images; also computes held-out bits
save_every = 50_000

# ----------------------------------------------------------------------------------------------------
# Alg. 2. Each step has its own seed, and draws for the whole batch, as in stage 1.


def gradients(run, step):
    """Leaves the gradients of one step, of the whole batch over all processes, in the parameters.

    -> the mean loss of this process's codes, in nats
    """
    start = run.rank * run.local_batch
    rows = slice(start, start + run.local_batch)
    m, k = run.stage1.num_latents, run.stage1.codebook_size
    numbers = m * k if run.stage1.continuous else m  # in a code
    gumbel = 0 if run.encoded.certain else \
        gumbel_noise((batch_size, m, k), seeded_generator(run.device, "codes", seed, step))[rows]
    coins = torch.rand(batch_size, generator=seeded_generator("cpu", "flip", seed, step))[rows]
    g = seeded_generator(run.device, "noise", seed, step)
    drop, t, *masks = torch.rand(batch_size, numbers + 2, device=run.device, generator=g)[rows].unbind(1)
    indices = run.batches.take(step * batch_size + start, run.local_batch)
    flip = coins < (0.5 if run.flips == 2 else 0)
    z = run.encoded.draw(indices, flip, gumbel)  # line 4: z ~ E(y)
    c = labels_of(run, indices)
    c = torch.where(drop < label_drop, -1, c) if c is not None else None
    t = 1e-3 + (1 - 1e-3) * t  # times, on (1e-3, 1), and masks are for SEDD; other priors make their noise of them
    with run.autocast:
        # line 5, Eq. 4: -ln p(z | c), here a mean over the batch; or SEDD's loss (DLC sec. 4)
        loss = run.model.loss(z, c, t, torch.stack(masks, 1), run.forward).mean()
    training.backward(run, loss)
    training.unscale(run)
    return loss.detach()


def update(run, step):
    """Clipping, Adam, moving average. -> gradient norm; if it is not finite, Adam changes nothing"""
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, grad_clip)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * min(step * batch_size / max(warmup_images, 1), 1)
    training.guarded_step(run.optimizer, norm, run.skipped)
    get_ema_multi_avg_fn(min(ema_decay, (1 + step) / (10 + step)))(run.ema_parameters, run.parameters, None)
    return norm


def advance(run, bar):
    """A step of Alg. 2, and its line of the log where that is due. -> codes seen"""
    loss = gradients(run, run.step)
    norm = update(run, run.step)
    training.add_up(run, norm, loss)
    run.step += 1
    seen = run.step * batch_size
    bar.update(batch_size)
    if training.due(log_every, seen, run.config):
        report(run, seen, bar)
    return seen


def labels_of(run, indices):
    """-> class labels (B,) of these images, None without classes"""
    return torch.from_numpy(run.labels[indices]).to(run.device, non_blocking=True) if run.stage1.label_dim else None


# ----------------------------------------------------------------------------------------------------
# from the settings to a run

# as in train_stage1.py
FREE = ("out_dir", "overwrite", "change", "device", "total_images", "cache_gb", "log_every", "save_every")
CHANGEABLE = ("lr", "warmup_images", "label_drop", "grad_clip", "ema_decay", "precision", "loss_scale")


def setup(config):
    """Stage 1, the prior, and perhaps a checkpoint to continue -> run, as in training.py

    config: the settings, as `configure` returns them. Raises UserError for settings that don't fit.
    """
    global _checkpoint_path  # for the line printed when memory runs out
    check(config)
    run = training.start(config, f"prior_{prior}", "train_prior")
    run.lower, _checkpoint_path = "--lr", run.path
    run.stage1, stage1 = load_stage1(out_dir, run.device)
    require(run.stage1.num_latents,
            f"{out_dir}/stage1.pt has no discrete latents (num_latents=0): there is nothing to train a prior on")
    trained_on = load_trained_on(stage1["config"], f"{out_dir}/stage1.pt")
    run.images, run.labels, run.train_indices, run.held_out_indices = trained_on
    run.flips = 2 if stage1["config"]["xflip"] else 1
    run.carries = dict(encoder=weights_checksum(stage1["ema"]))
    require_fit(prior, stage1["model_args"], f"{out_dir}/stage1.pt")
    build(run)

    def require_same_encoder(checkpoint):
        require(checkpoint["encoder"] == run.carries["encoder"],
                f"{run.path} is of another stage 1 than {out_dir}/stage1.pt: start anew with --overwrite=True")

    training.resume_run(run, FREE, CHANGEABLE, prepare=require_same_encoder, **run.carries)
    run.forward = training.distributed(run, run.model)
    run.encoded = Encoded(run, run.stage1, run.flips, cache_gb * 2 ** 30)
    return run


def check(config):
    """Raises UserError for impossible settings."""
    require(prior in PRIORS, f"--prior is {' or '.join(PRIORS)}, not {prior}")
    require(seed >= 0 and warmup_images >= 0 and cache_gb >= 0,
            "seed, warmup_images and cache_gb can't be negative")
    require(0 <= label_drop <= 1 and 0 <= ema_decay < 1,
            "label_drop must be in 0 ... 1, and ema_decay at least 0 and below 1; "
            f"they are {label_drop} and {ema_decay}")
    require_numbers(config, or_zero=("seed", "warmup_images", "label_drop", "ema_decay"), but=("cache_gb",))


def build(run):
    """Adds to run the order of images, the prior, its average and its optimiser, for codes of the DisCoDiff run.stage1.
    Raises UserError for sizes that don't fit each other."""
    run.batches = data.Shuffle(run.train_indices, seed)
    of_codes = {name: getattr(run.stage1, name) for name in ("num_latents", "codebook_size", "label_dim")}
    run.model_args = of_codes | arguments_of(run.config, PRIORS[prior])
    torch.manual_seed(seed)
    try:
        run.model = PRIORS[prior](**run.model_args).to(run.device)
    except ValueError as error:  # sizes that don't fit each other
        raise UserError(error) from None
    run.ema = copy.deepcopy(run.model).eval().requires_grad_(False)
    run.optimizer = torch.optim.Adam(run.model.parameters(), lr=lr, fused=True)


# ----------------------------------------------------------------------------------------------------
# bits per image


def parts_of(indices):
    return np.array_split(indices, -(-len(indices) // 500))


@torch.no_grad()
def held_out_bits(run, draws=1, with_class=True):
    """-log2 p(z | c), or the prior's bound on it, of held-out images' codes -> mean, standard error"""
    generators = [seeded_generator(run.device, purpose, seed) for purpose in ("held-out", "times")]
    bits = []
    for part in parts_of(run.held_out_indices):
        logits = run.encoded.logits(part, np.zeros(len(part), bool))
        c = labels_of(run, part) if with_class else None
        with run.autocast:
            bits.append(mean_bits(run.ema, logits, c, draws, *generators))
    bits = torch.cat(bits)
    return bits.mean().item(), bits.std(correction=0).item() / len(bits) ** 0.5


@torch.no_grad()
def independent_bits(run):
    """Bits per held-out image of the best priors with independent latents, without and with the class.

    Their p(z_i) and p(z_i | c) are the latents' distributions over the training images.
    """
    m, k, classes = run.stage1.num_latents, run.stage1.codebook_size, max(run.stage1.label_dim, 1)

    def distributions(indices):
        """Yields, in parts, the encoder's p(z | y) (B, m, k), and classes (B,), 0 if there are none."""
        for part in parts_of(indices):
            c = labels_of(run, part)
            no_classes = torch.zeros(len(part), dtype=torch.int64, device=run.device)
            yield run.encoded.logits(part, np.zeros(len(part), bool)).softmax(-1), no_classes if c is None else c

    usage = torch.zeros(classes, m, k, device=run.device)
    for p, c in distributions(run.train_indices):
        usage.index_add_(0, c, p)
    q_class = (usage / usage.sum(2, keepdim=True)).clamp_min(1e-12)
    q = (usage.sum(0) / usage.sum((0, 2), keepdim=True)[0]).clamp_min(1e-12)
    without, given_class = 0, 0
    for p, c in distributions(run.held_out_indices):
        without -= (p * q.log2()).sum().item()
        given_class -= (p * q_class[c].log2()).sum().item()
    return without / len(run.held_out_indices), given_class / len(run.held_out_indices)


def print_bits(run):
    """Prints how well the prior predicts the codes of held-out images, if there are any, and if it has bits."""
    if not len(run.held_out_indices) or run.model.unit != "bits":
        return
    label_dim = run.stage1.label_dim
    without, given_class = independent_bits(run)
    print(f"bits per image on {len(run.held_out_indices)} held-out images"
          + ", this prior's at most" * run.model.nats_is_a_bound)
    print(f"  uniform codes, m log2 k            {run.stage1.num_latents * math.log2(run.stage1.codebook_size):7.2f}")
    print(f"  independent latents                {without:7.2f}")
    if label_drop or not label_dim:
        print("  this prior                         {:7.2f} +- {:.2f}".format(*held_out_bits(run, 8, with_class=False)))
    if label_dim:
        print(f"  independent latents given the class{given_class:7.2f}")
        print("  this prior, given the class        {:7.2f} +- {:.2f}".format(*held_out_bits(run, 8)))


def report(run, seen, bar):
    """A line of the log: bits of the training codes, and of held-out codes."""
    steps, (norm, loss) = training.totals(run, run.lower)
    unit = run.model.unit
    line = {"images": seen, unit: loss.item() / steps / UNITS[unit], "grad_norm": norm.item() / steps}
    shown = {unit: f"{line[unit]:.2f}"}
    if run.master and len(run.held_out_indices):
        line[f"held_out_{unit}"] = held_out_bits(run)[0]
        shown[f"held-out {unit}"] = f"{line[f'held_out_{unit}']:.2f}"
    training.write_line(run, line, bar, shown)


# ----------------------------------------------------------------------------------------------------
# the run


def main(argv=()):
    config = configure(globals(), argv)
    with running(f"{out_dir}/prior_{prior}") as signals:
        train(setup(config), signals)


def train(run, signals):
    """Alg. 2, over and over, until total_images are seen or a signal comes."""
    stopped, seen = 0, run.step * batch_size
    if run.master:
        training.open_log(run, "codes")
    bar = progress(total=total_images, initial=seen, unit="img", disable=not run.master, mininterval=1)
    run.model.train()
    while seen < total_images and not stopped:
        seen = advance(run, bar)
        stopped = max_over_processes(max(signals, default=0))
        if run.master and (training.due(save_every, seen, run.config) or stopped):
            training.save(run)
    bar.close()
    if run.master and seen >= total_images:
        print_bits(run)
        print(f"{run.path} is ready; next: python sample.py --out_dir={out_dir}"
              + f" --prior={prior}" * (prior != "ar"))
    training.finish(run, stopped, "codes")


if __name__ == "__main__":
    main(sys.argv[1:])
