"""
Stage 2 of DisCo-Diff: trains a prior on the codes of stage 1's encoder (Alg. 2): the autoregressive one, or
SEDD-absorb, as Discrete Latent Codes has it (sec. 4).

    python train_prior.py
    python train_prior.py --prior=sedd
    python train_prior.py config/cifar10_prior.py
    torchrun --nproc_per_node=8 train_prior.py config/imagenet64_prior.py

Reads out_dir/stage1.pt, which says on which images, split and classes; leaves out_dir/prior_ar.pt or
prior_sedd.pt. Codes are drawn afresh each time an image is visited; the encoder itself runs once an image, and
its logits are kept in half precision in out_dir/logits-*.npy (for ImageNet-64, m = 10 and k = 100: 2.6 GB). The
same command again continues where it stopped, by Ctrl-C and SIGTERM too; all as in train_stage1.py.
"""

import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
from configurator import UserError, barrier, configure, max_over_processes, require, same_on_all, start_processes
from model import absorb, draw_codes, guarded_step, gumbel_noise, mean_bits, sedd_loss, seeded_generator
from run import catch_signals, end, hold, progress, release, require_good_steps, set_precision
from sample import PRIORS, load_stage1

# run
out_dir = "out"
overwrite = False  # replace an older or finished prior in out_dir; an unfinished run of this very command continues
change = ""  # "lr,ema": settings that may differ from those of the run that continues
seed = 0
device = "auto"
precision = "bf16"  # as in train_stage1.py
loss_scale = 1.0
# the Transformer
prior = "ar"  # autoregressive; "sedd": discrete diffusion
layers = 4
dim = 128
heads = 4
# optimisation
total_images = 100_000  # codes to train on, in all
batch_size = 250  # over all processes
lr = 1e-3
warmup_images = 10_000
label_drop = 0.1  # probability of training without the class
grad_clip = 1.0  # this and the next: SEDD's
ema = 0.9999  # of the weights, per step; at step n no more than (1 + n) / (10 + n)
# memory and reports
cache_gb = 16.0  # beyond this, logits are not kept: the encoder runs on every batch
log_every = 10_000  # images; held-out bits
save_every = 50_000

config = configure(globals())

# ----------------------------------------------------------------------------------------------------
# stage 1: images, split, classes, encoder

rank, world, device = start_processes(device)
master, on_gpu = rank == 0, device.type == "cuda"
require(prior in PRIORS, f"--prior is ar or sedd, not {prior}")
for setting in ("layers", "dim", "heads", "total_images", "batch_size", "lr", "loss_scale", "grad_clip", "log_every",
                "save_every"):
    require(config[setting] > 0, f"{setting} must be positive, not {config[setting]}")
require(seed >= 0 and warmup_images >= 0 and cache_gb >= 0, "seed, warmup_images and cache_gb can't be negative")
require(0 <= label_drop <= 1 and 0 <= ema < 1, f"label_drop must be in 0 ... 1, and ema in 0 ... below 1; they are {label_drop} and {ema}")
require(batch_size % world == 0, f"batch_size {batch_size} can't be shared among {world} processes equally")
local_batch = batch_size // world
autocast = set_precision(precision, device)
scale = loss_scale if precision == "fp16" and on_gpu else 1

stage1, stage1_checkpoint = load_stage1(out_dir, device)
m, k, label_dim = stage1.num_latents, stage1.codebook_size, stage1.label_dim
require(m, f"{out_dir}/stage1.pt has no discrete latents (num_latents=0): there is nothing to train a prior on")
stage1_config = stage1_checkpoint["config"]
encoder_id = data.fingerprint(stage1_checkpoint["ema"])
images, labels, train_indices, held_out_indices = data.load_trained_on(stage1_config, f"{out_dir}/stage1.pt")
flips = 2 if stage1_config["xflip"] else 1


@torch.no_grad()
def encode(indices, flip):
    """Encoder logits of these images, (B, m, k); flip: (B,) bool, which of them to mirror."""
    y = data.to_float(images[indices], device)
    return stage1.encoder(torch.where(torch.as_tensor(flip, device=device)[:, None, None, None], y.flip(3), y))


logits_path = Path(f"{out_dir}/logits-{encoder_id:08x}.npy")  # (flips, N, m, k)
shape = (flips, len(images), m, k)
cached = np.prod(shape) * 2 <= cache_gb * 2 ** 30
if master and __name__ == "__main__":
    hold(f"{out_dir}/prior_{prior}")
if cached and master and not logits_path.exists():  # the identity of the data was checked above
    hold(f"{out_dir}/logits")
    for old in Path(out_dir).glob("logits-*.npy"):
        old.unlink()
    with data.atomic(logits_path) as file:
        data.write_npy_header(file, np.float16, shape)
        for flip in range(flips):
            for part in progress(np.split(np.arange(len(images)), range(500, len(images), 500)), desc="encoding"):
                file.write(encode(part, np.full(len(part), bool(flip))).half().cpu().numpy().tobytes())
    release(f"{out_dir}/logits")
barrier()
try:
    kept = np.load(logits_path, mmap_mode="r") if cached else None
    if cached and (kept.shape, kept.dtype) != (shape, np.float16):
        raise ValueError
except (ValueError, AttributeError, EOFError, OSError):  # an .npz has no shape
    raise UserError(f"{logits_path} is damaged: delete it, and start again") from None


def logits_of(indices, flip):
    if not cached:
        return encode(indices, flip)
    return torch.from_numpy(kept[np.asarray(flip, dtype=np.int64), indices]).to(device, non_blocking=True).float()


def labels_of(indices):
    return torch.from_numpy(labels[indices]).to(device, non_blocking=True) if label_dim else None


# ----------------------------------------------------------------------------------------------------
# model, optimiser

model_args = dict(num_latents=m, codebook_size=k, label_dim=label_dim, layers=layers, dim=dim, heads=heads)
torch.manual_seed(seed)
try:
    model = PRIORS[prior](**model_args).to(device)
except ValueError as error:  # sizes that don't fit each other
    raise UserError(error) from None
averaged = copy.deepcopy(model).eval().requires_grad_(False)
optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
parameters, averaged_parameters = list(model.parameters()), list(averaged.parameters())
skipped = torch.zeros(2, device=device)  # steps whose gradients were not finite: in a row, in all

checkpoint_path = f"{out_dir}/prior_{prior}.pt"
# as in train_stage1.py
FREE = ("out_dir", "overwrite", "change", "device", "total_images", "cache_gb", "log_every", "save_every")
CHANGEABLE = ("lr", "warmup_images", "label_drop", "grad_clip", "ema", "precision", "loss_scale")
step = 0
if checkpoint := data.resume(checkpoint_path, config, model_args, FREE, CHANGEABLE, "train_prior", encoder=encoder_id):
    require(checkpoint["encoder"] == encoder_id, f"{checkpoint_path} is of another stage 1 than {out_dir}/stage1.pt: "
                                                 "start anew with --overwrite=True")
    step = checkpoint["step"]
    model.load_state_dict(checkpoint["model"])
    averaged.load_state_dict(checkpoint["ema"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    skipped.copy_(checkpoint["skipped"])
require(same_on_all(step), f"the processes found different checkpoints: {out_dir} must be on a file system that all nodes share")
forward = DistributedDataParallel(model, device_ids=[device.index] if on_gpu else None) if world > 1 else model

# ----------------------------------------------------------------------------------------------------
# bits per image


@torch.no_grad()
def held_out_bits(draws=1, with_class=True):
    """-log2 p(z | c) of codes drawn for held-out images, or SEDD's bound on it: mean over images, and its standard error."""
    generators = [seeded_generator(device, purpose, seed) for purpose in ("held-out", "times")]
    bits = []
    for part in np.array_split(held_out_indices, -(-len(held_out_indices) // 500)):
        logits, c = logits_of(part, np.zeros(len(part), bool)), labels_of(part) if with_class else None
        with autocast:
            bits.append(mean_bits(averaged, logits, c, draws, *generators))
    bits = torch.cat(bits)
    return bits.mean().item(), bits.std(correction=0).item() / len(bits) ** 0.5


@torch.no_grad()
def independent_bits():
    """Bits per held-out image of the best priors without dependence between latents, whose p(z_i) and p(z_i | c)
    are the latents' distributions over the training images: without and with the class."""
    usage = torch.zeros(max(label_dim, 1), m, k, device=device)
    for part in np.array_split(train_indices, -(-len(train_indices) // 500)):
        p = logits_of(part, np.zeros(len(part), bool)).softmax(-1)
        usage.index_add_(0, labels_of(part) if label_dim else torch.zeros(len(part), dtype=torch.int64, device=device), p)
    q_class = (usage / usage.sum(2, keepdim=True)).clamp_min(1e-12)
    q = usage.sum(0) / usage.sum((0, 2), keepdim=True)[0]
    without, given_class = 0, 0
    for part in np.array_split(held_out_indices, -(-len(held_out_indices) // 500)):
        p = logits_of(part, np.zeros(len(part), bool)).softmax(-1)
        without -= (p * q.clamp_min(1e-12).log2()).sum().item()
        given_class -= (p * (q_class[labels_of(part)] if label_dim else q_class).log2()).sum().item()
    return without / len(held_out_indices), given_class / len(held_out_indices)


# ----------------------------------------------------------------------------------------------------
# Alg. 2


def loss_of(z, c, t, u):
    """For each code (B,), in nats: the cross-entropy (Eq. 4), or the score entropy at times t (B,) (DLC sec. 4)."""
    if prior == "ar":
        return F.cross_entropy(forward(z, c).transpose(1, 2), z, reduction="none").sum(1)
    x = absorb(z, t, u, mask=k)
    return sedd_loss(forward(x, t, c), t, x, z)


batches = data.Shuffle(train_indices, seed)


def gradients(step):
    """Leaves the gradients of one step, of the whole batch over all processes, in the parameters. -> this process's loss, nats"""
    start = rank * local_batch
    rows = slice(start, start + local_batch)
    # for the whole batch, as in stage 1
    gumbel = gumbel_noise((batch_size, m, k), seeded_generator(device, "codes", seed, step))[rows]
    flip = torch.rand(batch_size, generator=seeded_generator("cpu", "flip", seed, step))[rows] < (0.5 if flips == 2 else 0)
    u = torch.rand(batch_size, m + 2, device=device, generator=seeded_generator(device, "noise", seed, step))[rows]
    indices = batches.take(step * batch_size + start, local_batch)
    z, c = draw_codes(logits_of(indices, flip), gumbel), labels_of(indices)
    c = torch.where(u[:, 0] < label_drop, -1, c) if label_dim else None
    t = 1e-3 + (1 - 1e-3) * u[:, 1]
    with autocast:
        loss = loss_of(z, c, t, u[:, 2:]).mean()
    (scale * loss).backward()
    if scale != 1:
        for p in parameters:
            p.grad /= scale
    return loss.detach()


def update(step):
    """Clipping, Adam, moving average. -> whether the gradients were not finite, and Adam left the weights as they are"""
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr * min(step * batch_size / max(warmup_images, 1), 1)
    bad = guarded_step(optimizer, norm, skipped)
    get_ema_multi_avg_fn(min(ema, (1 + step) / (10 + step)))(averaged_parameters, parameters, None)
    return bad


# ----------------------------------------------------------------------------------------------------
# the run (bench.py measures what is above)


def due(every, seen):
    return seen // every != (seen - batch_size) // every or seen >= total_images


def save(step):
    require(torch.nn.utils.get_total_norm(parameters).isfinite(), f"the weights are not finite any more: a lower --lr may help; "
            f"{checkpoint_path} is left as it was")
    data.save_checkpoint(checkpoint_path, dict(
        made_by="train_prior", config=config, model_args=model_args, encoder=encoder_id, step=step,
        model=model.state_dict(), ema=averaged.state_dict(), optimizer=optimizer.state_dict(), skipped=skipped))


if __name__ == "__main__":
    signals, stopped, seen = catch_signals(), 0, step * batch_size
    if master and seen >= total_images:
        print(f"{checkpoint_path} is finished: it has seen {seen:,} codes. "
              "A larger --total_images trains on, --overwrite=True starts anew")
    if master and not step:
        save(step)  # both as in stage 1
        data.previous(checkpoint_path).unlink(missing_ok=True)
    bar = progress(total=total_images, initial=seen, unit="img", disable=not master, mininterval=1)
    model.train()
    loss_sum, steps = 0, 0
    while seen < total_images and not stopped:
        loss = gradients(step)
        bad = update(step)
        loss_sum, steps = loss_sum + torch.where(bad, 0, loss), steps + ~bad
        step, seen = step + 1, seen + batch_size
        bar.update(batch_size)

        if due(log_every, seen):
            in_a_row, in_all = skipped.tolist()
            require_good_steps(in_a_row, "--lr", scale, checkpoint_path)
            if master:
                shown = {"bits": f"{(loss_sum / steps).item() / math.log(2):.2f}"}
                if len(held_out_indices):
                    shown["held-out bits"] = f"{held_out_bits()[0]:.2f}"
                if in_all:
                    shown["steps skipped"] = int(in_all)
                bar.set_postfix(shown)
            loss_sum, steps = 0, 0
        stopped = max_over_processes(max(signals, default=0))
        if master and (due(save_every, seen) or stopped):
            save(step)

    bar.close()
    if master and seen >= total_images:
        if len(held_out_indices):
            without, given_class = independent_bits()
            print(f"bits per image on {len(held_out_indices)} held-out images" + ", this prior's at most" * (prior == "sedd"))
            print(f"  uniform codes, m log2 k            {m * math.log2(k):7.2f}")
            print(f"  independent latents                {without:7.2f}")
            if label_drop or not label_dim:
                print("  this prior                         {:7.2f} +- {:.2f}".format(*held_out_bits(8, with_class=False)))
            if label_dim:
                print(f"  independent latents given the class{given_class:7.2f}")
                print("  this prior, given the class        {:7.2f} +- {:.2f}".format(*held_out_bits(8)))
        print(f"{checkpoint_path} is ready; next: python sample.py --out_dir={out_dir}" + " --prior=sedd" * (prior == "sedd"))
    end(stopped if seen < total_images else 0, f"{seen:,} codes", checkpoint_path)
