"""
Stage 1 of DisCo-Diff: trains the denoiser and the encoder of the discrete latents together (Alg. 1).

On the embedded data, on a laptop or one GPU:
    python train_stage1.py
One GPU, eight GPUs, two nodes of eight GPUs (the same line on each):
    python train_stage1.py config/cifar10.py
    torchrun --nproc_per_node=8 train_stage1.py config/imagenet64.py
    torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 --rdzv-id=1 --nproc_per_node=8 train_stage1.py config/imagenet64.py
    (out_dir on a file system that both share; the README has what to add for restarts)
Plain EDM, the baseline:
    python train_stage1.py --num_latents=0 --out_dir=out/edm

From EDM's trained network, the paper's recipe for ImageNet-64:
    torchrun --nproc_per_node=8 train_stage1.py config/imagenet64_finetune.py

From a network of our own, on another data set or with codes added to plain EDM:
    python train_stage1.py --init_from=out/edm --out_dir=out/finetuned

Leaves in out_dir: stage1.pt (weights, their moving average, optimiser, settings), the one before it
(stage1.previous.pt), preview_*.png, stage1.jsonl. The same command again, --overwrite=True or not, continues after a
crash, Ctrl-C or SIGTERM; the last two save first, and end the process with exit code 130 or 143. A larger
--total_images trains a finished run on; --change=lr continues with another --lr.
"""

import contextlib
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
from configurator import UserError, configure, max_over_processes, mean_over_processes, require, same_on_all, start_processes
from model import DisCoDiff, draw_codes, guarded_step, gumbel_noise, seed_of, seeded_generator
from run import can_compile, catch_signals, end, has_float64, hold, progress, require_good_steps, set_precision
from sample import denoiser, heun
from start_from import start_from

# run
out_dir = "out"
init_from = ""  # to start from: another run's folder or stage1.pt, "pretrained", or EDM's edm-imagenet-64x64-cond-adm.pkl
overwrite = False  # replace an older or finished run in out_dir; an unfinished run of this very command continues
change = ""  # "lr,tau": settings that may differ from those of the run that continues
seed = 0
device = "auto"  # "cpu", "cuda", "cuda:1", "mps"; auto: a GPU of NVIDIA's if there is one
precision = "bf16"  # on a GPU: "bf16", "fp16", "tf32", "fp32"; elsewhere always float32
loss_scale = 1.0  # in fp16, so that small gradients don't vanish; EDM has 100 for ImageNet-64
compile = True  # torch.compile, on a GPU
# data
dataset = "fashion-mnist-10k"
held_out = -1  # images that neither stage trains on; -1: 500, or a tenth of a data set of fewer than 5,000
class_cond = True  # class labels condition the denoiser (and, in stage 2, the prior)
xflip = False  # mirror half of the images
# denoiser: ADM's U-Net
model_channels = 16
channel_mult = (1, 1, 4)
channel_mult_emb = 4
num_blocks = 1
attn_resolutions = (0,)  # feature maps with self- and cross-attention, by their pixels a side; (0,): the smallest
dropout = 0.0
# discrete latents
num_latents = 8  # m; 0: plain EDM
codebook_size = 16  # k
tau = 1.0  # Gumbel-Softmax temperature, constant (App. D.2)
null_prob = 0.1  # of replacing an image's latents by the null embedding (sec. 3.1)
latent_dim = 64
latent_layers = 6
latent_heads = 2
# encoder: ViT
encoder_patch = 0  # pixels a side; 0: a quarter of the image
encoder_dim = 128
encoder_layers = 3
encoder_heads = 4
# optimisation: EDM's
total_images = 28_000  # to train on, in all
batch_size = 32  # over all processes, whatever their number
batch_gpu = 512  # the most that one process takes at once; beyond it gradients are accumulated
lr = 2e-3
encoder_lr = 5e-5  # beside an untrained denoiser, an encoder that moves fast collapses to one code (bits go to 0)
warmup_images = 2_000  # linear learning-rate warm-up
ema_halflife_images = 500_000
ema_rampup = 0.05  # the half-life is at most this share of the images seen so far
P_mean = -0.4  # ln(sigma) ~ N(P_mean, P_std^2); EDM's are -1.2 and 1.2: so short a run needs more of the high
P_std = 1.4  # noise levels, which are where the latents help
sigma_data = 0.5
# reports, all in images
log_every = 1_000
save_every = 7_000
keep_every = 0  # checkpoints that stay, stage1-000100000.pt and so on; 0: none
preview_every = 14_000  # 0: no previews

config = configure(globals())

# ----------------------------------------------------------------------------------------------------
# processes, device, batch

rank, world, device = start_processes(device)
master, on_gpu = rank == 0, device.type == "cuda"
autocast = set_precision(precision, device)
scale = loss_scale if precision == "fp16" and on_gpu else 1

for setting in ("total_images", "batch_size", "batch_gpu", "lr", "encoder_lr", "loss_scale", "tau", "log_every", "save_every",
                "sigma_data", "model_channels", "channel_mult_emb", "num_blocks", "codebook_size", "latent_dim", "latent_heads",
                "encoder_dim", "encoder_heads"):
    require(config[setting] > 0, f"{setting} must be positive, not {config[setting]}")
for setting in ("seed", "num_latents", "latent_layers", "encoder_layers", "encoder_patch", "warmup_images", "ema_halflife_images",
                "ema_rampup", "P_std", "keep_every", "preview_every", "null_prob", "dropout"):
    require(config[setting] >= 0, f"{setting} can't be negative: it is {config[setting]}")
for setting, value in config.items():
    require(type(value) is not float or math.isfinite(value), f"{setting} must be finite, not {value}")
require(null_prob <= 1 and dropout < 1, f"null_prob {null_prob} and dropout {dropout} are probabilities")
require(channel_mult and min(channel_mult) > 0, f"channel_mult has a positive number for each level, not {channel_mult}")
require(batch_size % world == 0, f"batch_size {batch_size} can't be shared among {world} processes equally")
local_batch = batch_size // world
micro_steps = -(-local_batch // batch_gpu)
require(local_batch % micro_steps == 0, f"{local_batch} images a process can't be taken in {micro_steps} equal parts "
                                        f"of at most {batch_gpu}: change batch_size or batch_gpu")
micro_batch = local_batch // micro_steps

# ----------------------------------------------------------------------------------------------------
# data, model, optimiser

images, labels, num_classes = data.load(dataset)
classes, made = data.class_names(dataset), data.made_of(dataset)  # for people, and for eval_fid.py
img_resolution, img_channels = images.shape[1], images.shape[3]
require(images.shape[1] == images.shape[2], f"images must be square, not {images.shape[1]} x {images.shape[2]}: prepare them "
        f"with --resolution={min(images.shape[1:3])}")
maps = [img_resolution >> level for level in range(len(channel_mult))]  # sizes of the feature maps
held_out = min(500, len(images) // 10) if held_out == -1 else held_out
attn_resolutions = (maps[-1],) if attn_resolutions == (0,) else attn_resolutions
encoder_patch = encoder_patch or max(p for p in range(1, 1 + max(1, img_resolution // 4)) if img_resolution % p == 0)
config |= dict(held_out=held_out, attn_resolutions=attn_resolutions, encoder_patch=encoder_patch)
misfits = [misfit for misfit, found in (  # in one message, each with what fits
    (f"the data set {dataset} has no class labels: train with --class_cond=False", class_cond and not num_classes),
    (f"held_out is {held_out}: the data set has {len(images)} images, -1 takes a tenth", not 0 <= held_out < len(images)),
    (f"attn_resolutions has {sorted({*attn_resolutions} - {*maps})}: the feature maps are {maps}, (0,) takes the last",
     {*attn_resolutions} - {*maps}),
    (f"encoder_patch {encoder_patch} does not divide images of {img_resolution} pixels, 0 takes a quarter",
     num_latents and img_resolution % encoder_patch)) if found]
require(not misfits, "; ".join(misfits))
train_indices, held_out_indices = data.split(len(images), held_out)
batches = data.Shuffle(train_indices, seed)
config["data_identity"] = data.identity(images, labels)  # for the checkpoint: a data set that has changed is noticed
data_stamp = data.stamp(images)

model_args = dict(
    img_resolution=img_resolution, img_channels=img_channels, label_dim=num_classes if class_cond else 0,
    sigma_data=sigma_data, model_channels=model_channels, channel_mult=channel_mult,
    channel_mult_emb=channel_mult_emb, num_blocks=num_blocks, attn_resolutions=attn_resolutions, dropout=dropout,
    num_latents=num_latents, codebook_size=codebook_size, latent_dim=latent_dim, latent_layers=latent_layers,
    latent_heads=latent_heads, encoder_patch=encoder_patch, encoder_dim=encoder_dim, encoder_layers=encoder_layers,
    encoder_heads=encoder_heads)
torch.manual_seed(seed)
try:
    model = DisCoDiff(**model_args).to(device, memory_format=torch.channels_last)
    ema = DisCoDiff(**model_args).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
except ValueError as error:  # sizes that don't fit each other
    raise UserError(error) from None
groups, peak_lrs = [dict(params=model.model.parameters())], [lr, lr, encoder_lr]
if num_latents:
    groups += [dict(params=model.latents.parameters()), dict(params=model.encoder.parameters())]
optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
parameters, ema_parameters = list(model.parameters()), list(ema.parameters())
skipped = torch.zeros(2, device=device)  # steps whose gradients were not finite: in a row, in all

checkpoint_path = f"{out_dir}/stage1.pt"
# may change when a run continues: its course is the same (batch_gpu: but for dropout's masks)
FREE = ("out_dir", "overwrite", "change", "device", "compile", "batch_gpu", "total_images", "log_every", "save_every",
        "keep_every", "preview_every")
# may change if --change names them: they act step by step. Others can't: the prior relies on xflip, and batch_size and seed
# decide which image comes when
CHANGEABLE = ("lr", "encoder_lr", "warmup_images", "ema_halflife_images", "ema_rampup", "P_mean", "P_std", "null_prob", "tau",
              "dropout", "precision", "loss_scale")
step = 0
if master and __name__ == "__main__":
    hold(f"{out_dir}/stage1")
if checkpoint := data.resume(checkpoint_path, config, model_args, FREE, CHANGEABLE, "train_stage1"):
    step = checkpoint["step"]
    model.load_state_dict(checkpoint["model"])
    ema.load_state_dict(checkpoint["ema"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    skipped.copy_(checkpoint["skipped"])
    del checkpoint
else:
    if init_from:
        start_from(init_from, model, model_args)
    ema.load_state_dict(model.state_dict())
require(same_on_all(step),
        f"the processes found different checkpoints: {out_dir} must be on a file system that all nodes share")

forward = torch.compile(model) if compile and can_compile(device) else model
if world > 1:
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1 x 1 convolutions, where they mean nothing
    forward = DistributedDataParallel(forward, device_ids=[device.index] if on_gpu else None)

# ----------------------------------------------------------------------------------------------------
# Alg. 1; every step's randomness is seeded anew, so that a resumed run equals an undisturbed one


def draw_step(step):
    """All random numbers of one step, for the whole batch over all processes, each of which takes its
    rows: the result does not depend on their number. (Dropout's masks do.)"""
    g = seeded_generator(device, "step", seed, step)
    normal = torch.randn(batch_size, 1, 1, 1, device=device, generator=g)
    noise = torch.randn(batch_size, *model.img_shape, device=device, generator=g)
    gumbel = gumbel_noise((batch_size, num_latents, codebook_size), g)
    drop = torch.rand(batch_size, device=device, generator=g) < null_prob
    flip = torch.rand(batch_size, device=device, generator=g) < (0.5 if xflip else 0)
    sigma = (P_mean + P_std * normal).exp()  # EDM, Table 1
    return noise * sigma, sigma, gumbel, drop, flip


def fetch(position, count):
    """-> y (count, C, H, W) in [-1, 1], class labels (count,) or None, of the endless shuffle's next images."""
    require(data.stamp(images) == data_stamp, f"{dataset} changed while it was being trained on: prepare it as it was, and "
            f"give the same command again. {checkpoint_path} is from before that, or nearly so")
    indices = batches.take(position, count)
    c = torch.from_numpy(labels[indices]).to(device, non_blocking=True) if class_cond else None
    return data.to_float(images[indices], device), c


def loss_weight(sigma):
    return (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2  # lambda(sigma), EDM Table 1


def gradients(step):
    """Leaves the gradients of one step, of the whole batch over all processes, in the parameters. -> what the log adds up
    of this process's images: loss, code distributions (m, k), their entropies; on the device."""
    noise, sigma, gumbel, drop, flip = draw_step(step)
    loss_sum, code_sum, entropy_sum = 0, 0, 0
    for micro in range(micro_steps):
        start = rank * local_batch + micro * micro_batch
        rows = slice(start, start + micro_batch)
        y, c = fetch(step * batch_size + start, micro_batch)
        y = torch.where(flip[rows, None, None, None], y.flip(3), y)
        torch.manual_seed(seed_of("dropout", seed, step, start))
        exchange = world == 1 or micro == micro_steps - 1  # gradients meet once a step
        with contextlib.nullcontext() if exchange else forward.no_sync():
            with autocast:
                D, logits = forward(y, noise[rows], sigma[rows].flatten(), c, gumbel[rows], drop[rows], tau)
                loss = (loss_weight(sigma[rows]) * (D - y) ** 2).sum() / local_batch  # Eq. 3
            (scale * loss).backward()
        loss_sum += loss.detach() / y[0].numel()
        if num_latents:
            p = logits.detach().softmax(-1)  # (B, m, k)
            code_sum += p.sum(0)
            entropy_sum += torch.special.entr(p).sum()
    if scale != 1:
        for p in parameters:
            p.grad /= scale
    return loss_sum, code_sum, entropy_sum


def update(seen):
    """Adam and moving average after so many images. -> whether the gradients were not finite, and Adam left the weights as
    they are. (EDM puts 0 for NaN and 1e5 for infinity, and goes on.)"""
    for group, peak_lr in zip(optimizer.param_groups, peak_lrs):
        group["lr"] = peak_lr * min(seen / max(warmup_images, 1), 1)
    bad = guarded_step(optimizer, get_total_norm([p.grad for p in parameters]), skipped)
    halflife = min(ema_halflife_images, seen * ema_rampup)
    get_ema_multi_avg_fn(0.5 ** (batch_size / max(halflife, 1e-8)))(ema_parameters, parameters, None)
    return bad


# ----------------------------------------------------------------------------------------------------
# what a person looks at


def codes_of(y, g):
    """Hard codes of clean images, drawn from the averaged encoder: (B, m)"""
    logits = ema.encoder(y)
    return draw_codes(logits, gumbel_noise(logits.shape, g))


@torch.no_grad()
def save_preview(path, rows=8, columns=8):
    """Each row: an image that was held out, then samples that share its code (and class), as in Fig. 2b."""
    shown = (held_out_indices if held_out else train_indices)[:rows]
    y = data.to_float(images[shown], device)
    c = torch.from_numpy(labels[shown]).to(device).repeat_interleave(columns) if class_cond else None
    g = seeded_generator(device, "preview", seed)
    z = codes_of(y, g).repeat_interleave(columns, dim=0) if num_latents else None
    latents = torch.randn(len(shown) * columns, *model.img_shape, device=device, generator=g)
    latents = latents if has_float64(device) else latents.cpu()
    x = heun(denoiser(ema, c, z, autocast=autocast), latents).float().to(device).unflatten(0, (len(shown), columns))
    grid = torch.cat([y[:, None], x], dim=1).flatten(0, 1)
    data.save_grid(data.to_uint8(grid), path, columns + 1, [classes[label] for label in labels[shown]] if class_cond else ())


@torch.no_grad()
def print_losses(count=256, sigmas=(0.02, 0.1, 0.3, 1, 3, 10, 30, 80)):
    """The weighted loss per pixel on held-out images, per noise level, with their own codes and with null
    codes: which noise levels the latents help at (Fig. 7, left)."""
    shown = (held_out_indices if held_out else train_indices)[:count]
    g = seeded_generator(device, "losses", seed)
    print(f"loss on {len(shown)} {'held-out' if held_out else 'training'} images, lambda(sigma) |D - y|^2 / pixels")
    print("   sigma   own codes  null codes  null / own" if num_latents else "   sigma        loss")
    for level in sigmas:
        sums = [0.0, 0.0]
        for part in np.array_split(shown, -(-len(shown) // batch_gpu)):
            y = data.to_float(images[part], device)
            c = torch.from_numpy(labels[part]).to(device) if class_cond else None
            sigma = torch.full((len(y),), float(level), device=device)
            x = y + level * torch.randn(y.shape, device=device, generator=g)
            z = codes_of(y, g) if num_latents else None
            for i in range(2 if num_latents else 1):
                drop = torch.full((len(y),), bool(i), device=device)
                with autocast:
                    D = ema.denoise(x, sigma, c, ema.condition(z, drop) if num_latents else ())
                sums[i] += (loss_weight(sigma)[:, None, None, None] * (D - y) ** 2).sum().item() / y[0].numel()
        own, null = sums[0] / len(shown), sums[1] / len(shown)
        print(f"{level:8g}  {own:10.4f}" + (f"  {null:10.4f}  {null / own:10.2f}" if num_latents else ""))


# ----------------------------------------------------------------------------------------------------
# the run (bench.py measures what is above)

def due(every, seen):
    """Whether something that is done every so many images is to be done after this step; 0: never."""
    return every and (seen // every != (seen - batch_size) // every or seen >= total_images)


def save(step, keep=False):
    """Saves the checkpoint to continue from; with keep, one that stays, without the optimiser."""
    require(get_total_norm(parameters).isfinite(), f"the weights are not finite any more: a lower --lr or --encoder_lr may help; "
            f"{checkpoint_path} is left as it was")
    state = dict(made_by="train_stage1", config=config, model_args=model_args, step=step, model=model.state_dict(),
                 ema=ema.state_dict(), classes=classes, made=made)
    if keep:
        with data.atomic(f"{out_dir}/stage1-{step * batch_size:09d}.pt") as file:
            torch.save(state, file)
    else:
        data.save_checkpoint(checkpoint_path, state | dict(optimizer=optimizer.state_dict(), skipped=skipped))


if __name__ == "__main__":
    log_path = f"{out_dir}/stage1.jsonl"
    signals, stopped, seen = catch_signals(), 0, step * batch_size
    if master:
        print(f"{dataset}: {len(train_indices):,} images to train on, {img_resolution} x {img_resolution} x {img_channels}, "
              f"{num_classes} classes; U-Net {sum(p.numel() for p in model.model.parameters()):,} parameters, latents "
              f"{sum(p.numel() for n, p in model.named_parameters() if not n.startswith('model.')):,}; on {device}")
        data.write_log(log_path, data.read_log(log_path, seen) if step else [], mode="w")
        if seen >= total_images:
            print(f"{checkpoint_path} is finished: it has seen {seen:,} images. "
                  "A larger --total_images trains on, --overwrite=True starts anew")
        if not step:
            save(step)  # is there room on the disk? And what torchrun restarts is not what --overwrite=True is to replace
            data.previous(checkpoint_path).unlink(missing_ok=True)  # nor what a damaged checkpoint of this run leads back to
            for snapshot in Path(out_dir).glob("stage1-*.pt") if overwrite else ():
                snapshot.unlink()

    sums, skipped_before = [0, 0, 0], skipped[1].item()  # since the last log; on the device
    since, images_since = time.time(), 0
    bar = progress(total=total_images, initial=seen, unit="img", disable=not master, mininterval=1)
    model.train()
    while seen < total_images and not stopped:
        measured = gradients(step)
        bad = update(seen)
        sums = [total + torch.where(bad, 0, value) for total, value in zip(sums, measured)]
        step += 1
        seen += batch_size
        images_since += batch_size
        bar.update(batch_size)

        if due(log_every, seen):
            in_a_row, in_all = skipped.tolist()
            require_good_steps(in_a_row, "--lr or --encoder_lr, and look at the data", scale, checkpoint_path)
            steps = images_since // batch_size - (in_all - skipped_before) or math.nan  # those that were not skipped
            report = dict(images=seen, loss=mean_over_processes(sums[0]).item() / steps)
            if num_latents:
                p = mean_over_processes(sums[1]) / (steps * local_batch)  # (m, k) averaged code distribution
                p_entropy = torch.special.entr(p).sum(1)
                report["perplexity"] = p_entropy.exp().tolist()  # codes that each latent uses, 1 ... k
                # what the codes tell about the image: I(z; y) = H(z) - H(z | y), 0 where the encoder ignores it
                report["bits"] = (p_entropy.sum() - mean_over_processes(sums[2]) / (steps * local_batch)).item() / math.log(2)
            report["skipped"] = int(in_all)
            if master:
                report["images_per_second"] = images_since / (time.time() - since)
                data.write_log(log_path, [json.dumps(report)])
                shown = {"loss": f"{report['loss']:.4f}"}
                if num_latents:
                    used = "/".join(f"{u:.0f}" for u in report["perplexity"][:16])
                    shown |= {"codes used": f"{used} of {codebook_size}", "bits": f"{report['bits']:.1f}"}
                if in_all:
                    shown["steps skipped"] = int(in_all)
                bar.set_postfix(shown)
            sums, skipped_before, images_since, since = [0, 0, 0], in_all, 0, time.time()
        stopped = max_over_processes(max(signals, default=0))
        if master and (due(save_every, seen) or stopped):
            save(step)
        if master and due(keep_every, seen):
            save(step, keep=True)
        if master and due(preview_every, seen) and not stopped:
            save_preview(f"{out_dir}/preview_{seen:09d}.png")

    bar.close()
    if master and seen >= total_images:
        print_losses()
        print(f"{checkpoint_path} is ready" + (f"; next: python train_prior.py --out_dir={out_dir}" if num_latents else ""))
    end(stopped if seen < total_images else 0, f"{seen:,} images", checkpoint_path)
