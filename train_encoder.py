"""
Stage 0 of Discrete Latent Codes: trains the encoder, without labels and without a denoiser (DLC sec. 4).

On the embedded data, on a laptop or one GPU; then stage 1 on its codes:
    python train_encoder.py
    python train_stage1.py --codes=out/dlc --out_dir=out/dlc
Four GPUs, the authors' settings, from DINOv2's ViT-L/14 with registers:
    torchrun --nproc_per_node=4 train_encoder.py config/imagenet_encoder.py

A student and a teacher, the moving average of the student, see random crops of an image. The student learns to give
the teacher's answers (dino.py). What either answers of a whole crop comes from Simplicial Embeddings (vit.py); the
codes of an image are those of the teacher.

Writes to out_dir:

    encoder.pt             student, teacher ("ema"), optimiser, settings
    encoder.previous.pt    the checkpoint before
    encoder.jsonl          the log; encoder_curves.png draws it

The same command again continues a run, as in train_stage1.py. Rates, temperatures and the teacher's momentum follow
schedules over total_images: --change=total_images continues with longer ones.
"""

import json
import math
import sys

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import training
from augment import crop, draw_colours, draw_crops, recolour
from checkpoint import read_log
from codes import code_usage
from configurator import UserError, arguments_of, configure, require, require_numbers
from dino import (
    centred,
    class_loss,
    draw_masks,
    koleo,
    mean_of_all,
    patch_loss,
    patch_weights,
    schedule,
    sinkhorn,
)
from noise import seed_of, seeded_generator
from processes import max_over_processes
from run import progress, running
from start_from import start_from_dinov2
from vit import Distilled, SEMEncoder

# run
out_dir = "out/dlc"
init_from = ""  # initial weights: the file of a ViT with registers that DINOv2 published
overwrite = False  # as in train_stage1.py
change = ""
seed = 0
device = "auto"
precision = "bf16"
loss_scale = 1.0
# data
dataset = "fashion-mnist-10k"
held_out = -1  # as in train_stage1.py: the same images
# codes
num_latents = 64  # L, the number of SEMs
codebook_size = 8  # V
# encoder: ViT
patch = 0  # pixels per side; 0: a quarter of a global crop
dim = 96
layers = 3
heads = 3
registers = 2
stem = 16  # channels of the convolutions before the patches; 0: none, as in DINOv2
layerscale = 1.0
drop_path = 0.0  # of the student
recompute = False  # keep few activations in training, and compute the others again; for large ones
mean = (0.5,)  # of the channels of pixels in [0, 1], and their standard deviation
std = (0.5,)
# heads
prototypes = 256  # K
head_hidden = 256
head_bottleneck = 64
shared_head = True  # one for images and patches
# views of an image: two global crops, some local ones
global_size = 0  # pixels per side, also of the images that codes are read from; 0: the image's
local_size = 0  # 0: half of that
local_crops = 4
global_area = (0.5, 1.0)  # shares of the image
local_area = (0.25, 0.6)
xflip = True
jitter = (0.4, 0.4, 0.2, 0.1)  # most change of brightness, contrast, saturation, hue
jitter_prob = 0.8
grey_prob = 0.2
blur_prob = (1.0, 0.1, 0.5)  # of the first global crop, the second, local ones
blur_sigma = (0.1, 1.0)  # pixels
solarise_prob = 0.2  # of the second global crop
# what is learned
targets = "sinkhorn"  # or "centring": how the teacher's answers are spread over the prototypes
student_temp = 0.1
teacher_temp = 0.04
teacher_temp_start = 0.04
teacher_temp_images = 0  # linear warm-up from start
teacher_momentum = 0.98  # per step; to 1 by a cosine
center_momentum = 0.9
patch_weight = 1.0
koleo_weight = 0.1
mask_share = (0.1, 0.5)  # of the patches, in half of the global crops
mask_least = 1  # patches that a rectangle has at least; 1: single patches
# optimisation: AdamW
total_images = 56_000  # to train on, in all
batch_size = 64  # over all processes
lr = 2e-3
lr_end = 1e-6  # by a cosine
warmup_images = 5_600
weight_decay = 0.04
weight_decay_end = 0.04  # by a cosine
layer_decay = 1.0  # factor of the learning rate from each block to the one before
patch_lr = 1.0  # factor of the patch embedding's
prototypes_held_images = 2_800  # prototypes stay as they are so long
grad_clip = 3.0  # largest norm, of the gradients of encoder and heads each
# reports, all in images
log_every = 3_200
save_every = 16_000

# ----------------------------------------------------------------------------------------------------
# a step. Each has its own seed, and draws for the whole batch, as in stage 1


def views(run, step):
    """-> of this process's images: global crops (2B, C, H, W), the first ones, then the second; local crops
    (nB, C, h, w), crop by crop, or None; masks of the global crops (2B, N) bool, on the CPU"""
    training.require_unchanged(run)
    rows = slice(run.rank * run.local_batch, (run.rank + 1) * run.local_batch)
    y = data.to_float(run.images[run.batches.take(step * batch_size + rows.start, run.local_batch)], run.device)
    g = seeded_generator(run.device, "views", seed, step)
    side = run.config["global_size"] // run.config["patch"]
    masks = draw_masks(2 * batch_size, side, seeded_generator("cpu", "masks", seed, step), mask_share, mask_least)

    def crops(count, size, area, blur, solarise):
        boxes = draw_crops((count, batch_size), area, 0.5 * xflip, g)
        blur, solarise = (torch.tensor(v, device=run.device)[:, None] for v in (blur, solarise))
        colours = draw_colours((count, batch_size), jitter, jitter_prob, grey_prob, blur, blur_sigma, solarise, g)
        cut = [crop(y, size, **{name: t[i, rows] for name, t in boxes.items()}) for i in range(count)]
        return recolour(torch.cat(cut), **{name: t[:, rows].flatten() for name, t in colours.items()})

    whole = crops(2, run.config["global_size"], global_area, blur_prob[:2], (0.0, solarise_prob))
    small = crops(local_crops, run.config["local_size"], local_area, blur_prob[2:] * local_crops,
                  (0.0,) * local_crops) if local_crops else None
    return whole, small, masks.unflatten(0, (2, batch_size))[:, rows].flatten(0, 1)


def gradients(run, step):
    """Leaves the gradients of one step, of the whole batch over all processes, in the parameters.

    -> of this process's images: the loss; its parts, of images, patches and KoLeo; the mean entropy of the teacher's
    answers, in nats, and their mean (K,). Also sets run.new_centers (2, K).
    """
    whole, small, mask = views(run, step)
    masked = mask.flatten().nonzero().flatten().to(run.device)
    mask = mask.to(run.device)
    torch.manual_seed(seed_of("drop path", seed, step, run.rank))
    with run.autocast, torch.no_grad():
        answers = run.ema(whole, None, None, masked)[::2]  # of global crops (2B, K), of hidden patches (M, K)
    temp = at(step, teacher_temp, teacher_temp, teacher_temp_images, teacher_temp_start)
    answer, patch_answers = (spread(*given, temp) for given in zip(answers, run.carries["centers"]))
    answer = answer.unflatten(0, (2, -1))
    run.new_centers = torch.stack([mean_of_all(x) for x in answers]) if targets == "centring" else None
    with run.autocast:
        of_whole, of_small, of_patches, image = run.forward(whole, small, mask, masked)
    of_crops = of_whole if small is None else torch.cat([of_whole, of_small])
    local_part, global_part = class_loss(of_crops.unflatten(0, (-1, run.local_batch)), answer, student_temp)
    parts = (local_part + global_part, patch_loss(of_patches, patch_answers, patch_weights(mask), student_temp),
             sum(koleo(x) for x in image.chunk(2)))
    loss = parts[0] + patch_weight * parts[1] + koleo_weight * parts[2]
    training.backward(run, loss)
    training.unscale(run)
    entropy = torch.special.entr(answer).sum(-1).mean()
    return loss.detach(), *(part.detach() for part in parts), entropy, answer.mean((0, 1))


def spread(logits, center, temp):
    """The teacher's answers (n, K) -> targets (n, K), whose rows sum to 1"""
    return sinkhorn(logits, temp) if targets == "sinkhorn" else centred(logits, center, temp)


def at(step, value, end, warmup=0, start=0.0):
    """A schedule over the run; warmup: in images"""
    return schedule(step, value, end, -(-total_images // batch_size), warmup // batch_size, start)


def update(run, step):
    """Clipping, AdamW, then teacher and centres. -> gradient norm; if it is not finite, student and centres stay"""
    norms = [torch.nn.utils.clip_grad_norm_(part.parameters(), grad_clip) for part in run.model.children()]
    norm = torch.stack(norms).norm()
    rate, decay = at(step, lr, lr_end, warmup_images), at(step, weight_decay, weight_decay_end)
    held = step * batch_size < prototypes_held_images
    for group in run.optimizer.param_groups:
        scale = layer_decay ** group["blocks_above"] * (patch_lr if group["patches"] else 1)
        group["lr"] = 0.0 if held and group["prototypes"] else rate * scale
        group["weight_decay"] = decay * group["decays"]
    training.guarded_step(run.optimizer, norm, run.skipped)
    get_ema_multi_avg_fn(at(step, teacher_momentum, 1))(run.ema_parameters, run.parameters, None)
    if targets == "centring":
        centers = run.carries["centers"]
        centers.copy_(torch.where(norm.isfinite(), torch.lerp(run.new_centers, centers, center_momentum), centers))
    return norm


# ----------------------------------------------------------------------------------------------------
# from the settings to a run

# as in train_stage1.py
FREE = ("out_dir", "overwrite", "change", "device", "recompute", "log_every", "save_every")
CHANGEABLE = ("total_images", "lr", "lr_end", "warmup_images", "weight_decay", "weight_decay_end", "layer_decay",
              "patch_lr", "drop_path", "teacher_temp", "teacher_momentum", "patch_weight", "koleo_weight", "precision",
              "loss_scale")


def setup(config):
    """Data, student, teacher, and perhaps a checkpoint to continue -> run, as in training.py

    config: the settings, as `configure` returns them; adaptive ones get their values. Raises UserError for settings
    that don't fit.
    """
    global _checkpoint_path  # for the line printed when memory runs out
    probabilities = ("drop_path", "jitter_prob", "grey_prob", "solarise_prob", "teacher_momentum", "center_momentum")
    require_numbers(config, but=("held_out",), or_zero=(
        *probabilities, "seed", "patch", "registers", "stem", "global_size", "local_size", "local_crops", "lr_end",
        "teacher_temp_images", "patch_weight", "koleo_weight", "warmup_images", "weight_decay", "weight_decay_end",
        "prototypes_held_images"))
    require(all(config[name] <= 1 for name in probabilities) and drop_path < 1,
            f"{', '.join(probabilities)} are at most 1, and drop_path is below")
    require(targets in ("sinkhorn", "centring"), f"--targets is sinkhorn or centring, not {targets}")
    for name in ("global_area", "local_area", "mask_share"):
        require(len(config[name]) == 2 and 0 < config[name][0] <= config[name][1] <= 1,
                f"{name} takes two shares, such as 0.1,0.5, not {config[name]}")
    for name, count in (("jitter", 4), ("blur_prob", 3), ("blur_sigma", 2)):
        require(len(config[name]) == count and min(config[name]) >= 0,
                f"{name} has {count} numbers, none negative: not {config[name]}")
    require(max(jitter + blur_prob) <= 1, f"jitter {jitter} and blur_prob {blur_prob} are at most 1")
    require(min(std) > 0, f"std is positive, not {std}")
    run = training.start(config, "encoder", "train_encoder")
    run.lower, _checkpoint_path = "--lr", run.path
    require(targets != "sinkhorn" or batch_size > 1,
            "batch_size 1 is too small for Sinkhorn, which shares prototypes among images: take a larger one, or "
            "--targets=centring")
    require(targets != "sinkhorn" or min(teacher_temp, teacher_temp_start) > 0.012,
            f"teacher_temp {min(teacher_temp, teacher_temp_start)} is too low for Sinkhorn: exp(1 / 0.012) is the "
            "largest number that it can take")
    require(not koleo_weight or run.local_batch > 1,
            f"KoLeo looks for an image's neighbour in each process's batch, and {run.local_batch} image has none: "
            "a larger --batch_size, or --koleo_weight=0")

    run.images, labels, _ = data.load(dataset)
    fit_to_images(config, run.images.shape)
    run.train_indices, held = data.split(len(run.images), config["held_out"])
    require(batch_size <= len(run.train_indices), f"batch_size {batch_size} exceeds the {len(run.train_indices)} "
            "images to train on: an image would be among its own neighbours")
    run.to_encode = (held if len(held) >= 100 else run.train_indices)[:1000]  # few have distinct codes by chance
    run.batches, run.stamp = data.Shuffle(run.train_indices, seed), data.file_stamp(run.images)
    config["data_identity"] = data.data_checksum(run.images, labels)  # in the checkpoint, to notice changes
    run.carries = dict(centers=torch.zeros(2, prototypes, device=run.device))  # of images, of patches

    run.model_args = arguments_of(config, Distilled, SEMEncoder) | dict(
        img_resolution=config["global_size"], img_channels=run.images.shape[3])
    torch.manual_seed(seed)
    try:
        run.model, run.ema = (Distilled(**run.model_args).to(run.device, memory_format=torch.channels_last)
                              for _ in range(2))
    except ValueError as error:  # sizes that don't fit each other
        raise UserError(error) from None
    run.ema.eval().requires_grad_(False)
    run.optimizer = torch.optim.AdamW(groups_of(run.model), betas=(0.9, 0.999), fused=True)
    if not training.resume_run(run, FREE, CHANGEABLE,
                               prepare=lambda checkpoint: run.carries["centers"].copy_(checkpoint["centers"])):
        if init_from:
            start_from_dinov2(init_from, run.model.backbone)
        run.ema.load_state_dict(run.model.state_dict())
    run.forward = training.distributed(run, run.model)
    return run


def groups_of(model):
    """Parameters with the same factors of learning rate and weight decay -> groups, as optimisers take them

    Biases, norms and LayerScale don't decay. `update` lets the learning rate fall by layer_decay with each block, from
    the last to the first, and once more to what comes before the blocks; the patch embedding's also by patch_lr.
    """
    groups = {}
    for name, p in model.named_parameters():
        part, _, rest = name.partition(".")
        above = 0
        if part == "backbone" and not rest.startswith(("norm.", "sem_")):
            above = layers - int(rest.split(".")[1]) if rest.startswith("blocks.") else layers + 1
        decays = not (name.endswith(("bias", "gamma")) or "norm" in name)
        key = dict(blocks_above=above, patches="patch_embed" in name, decays=decays, prototypes="last_layer" in name)
        groups.setdefault(tuple(key.values()), dict(params=[], **key))["params"].append(p)
    # the log has the first group's learning rate
    return sorted(groups.values(), key=lambda group: (group["blocks_above"], group["prototypes"]))


def fit_to_images(config, shape):
    """Replaces adaptive settings by what fits images of this shape, (N, H, W, C).

    Raises UserError for settings that don't fit.
    """
    count, height, width, channels = shape
    require(height == width, f"images must be square, not {height} x {width}: prepare them with "
                             f"--resolution={min(height, width)}")
    if held_out == -1:
        config["held_out"] = min(500, count // 10)
    config["global_size"] = size = global_size or height
    config["patch"] = side = patch or max(p for p in range(1, 1 + max(1, size // 4)) if size % p == 0)
    config["local_size"] = local = local_size or max(side, size // 2 // side * side)
    held, fits = config["held_out"], "change patch, global_size or local_size; 0 takes what fits"
    misfits = [misfit for misfit, wrong in (  # all in one message, each with what fits
        (f"held_out is {held}: the data set has {count} images, -1 takes a tenth", not 0 <= held < count),
        (f"images have {channels} channels: colours are jittered for 1 or 3", channels not in (1, 3)),
        (f"crops of {max(size, local)} pixels are larger than the images, which have {height}: {fits}",
         max(size, local) > height),
        (f"patch {side} does not divide crops of {size} and {local} pixels: {fits}",
         size % side or local % side)) if wrong]
    require(not misfits, "; ".join(misfits))


# ----------------------------------------------------------------------------------------------------
# what a person looks at


@torch.no_grad()
def usage(run, indices):
    """`code_usage` of the teacher's codes of these images (N,), the perplexity as a mean over the SEMs, a float"""
    parts = np.array_split(indices, -(-len(indices) // 250))
    codes = torch.cat([run.ema.backbone(data.to_float(run.images[part], run.device)).argmax(-1) for part in parts])
    perplexity, distinct = code_usage(codes, codebook_size)
    return perplexity.mean().item(), distinct


def possible(count):
    """-> the most that the share of distinct codes of so many images can be"""
    return min(1, codebook_size ** num_latents / count)


def report(run, bar):
    """A line of the log. While the teacher tells images apart, an answer has less entropy than the mean of all."""
    steps, (norm, *losses, entropy, mean_answer) = training.totals(run, run.lower)
    line = dict(images=run.step * batch_size)
    line |= {name: total.item() / steps for name, total in zip(("loss", "class_loss", "patch_loss", "koleo"), losses)}
    line["teacher_entropy"] = entropy.item() / steps
    line["mean_entropy"] = torch.special.entr(mean_answer / steps).sum().item()
    shown = {"loss": f"{line['loss']:.3f}",
             "teacher entropy": f"{line['teacher_entropy']:.2f} of {line['mean_entropy']:.2f}"}
    if run.master:
        line["perplexity"], line["distinct"] = usage(run, run.to_encode)
        run.carries["distinct"] = line["distinct"] / possible(len(run.to_encode))
        shown |= {"codes used": f"{line['perplexity']:.1f} of {codebook_size}", "distinct": f"{line['distinct']:.1%}"}
    training.write_line(run, line | dict(grad_norm=norm.item() / steps), bar, shown)


def collapse(run, line, count=10_000):
    """Prints what the codes of the training images are like. line: the log's last one -> why the run is lost, or "" """
    shown = run.train_indices[:count]
    perplexity, distinct = usage(run, shown)
    print(f"codes of {len(shown):,} training images: {distinct:.1%} are distinct; a SEM uses {perplexity:.1f} of its "
          f"{codebook_size} entries (perplexity)")
    apart = line["mean_entropy"] - line["teacher_entropy"]
    distinct_of_possible = distinct / possible(len(shown))
    if distinct_of_possible > 0.1 and apart > 0.01 * math.log(prototypes):
        if distinct_of_possible < 0.95:
            print("That is less than 95 %: images that share a code can't be told apart by it. More --total_images, or "
                  "more codes, may help")
        return ""
    return (f"the encoder has collapsed: {distinct:.1%} of the codes are distinct, and the teacher's answers tell "
            f"images apart by {apart:.2f} of {math.log(prototypes):.2f} nats. {run.path} is kept. Try images with more "
            "variety, --targets=sinkhorn, a lower --teacher_temp or --lr, a larger --batch_size or --total_images, "
            "or weaker crops (--global_area)")


# ----------------------------------------------------------------------------------------------------
# the run


def main(argv=()):
    config = configure(globals(), argv)
    with running(f"{out_dir}/encoder") as signals:
        train(setup(config), signals)


def train(run, signals):
    """Self-distillation, step by step, until total_images are seen or a signal comes. Raises UserError if the encoder
    has collapsed by then."""
    stopped, seen, lost = 0, run.step * batch_size, ""
    if run.master:
        of_encoder, in_all = (sum(p.numel() for p in part.parameters()) for part in (run.model.backbone, run.model))
        shape = " x ".join(map(str, run.images.shape[1:]))
        print(f"{dataset}: {len(run.train_indices):,} images to train on, {shape}; encoder {of_encoder:,} parameters, "
              f"heads {in_all - of_encoder:,}; codes of {num_latents} x {codebook_size}; on {run.device}")
        training.open_log(run, "images")
    bar = progress(total=total_images, initial=seen, unit="img", disable=not run.master, mininterval=1)
    run.model.train()
    while seen < total_images and not stopped:
        measured = gradients(run, run.step)
        norm = update(run, run.step)
        training.add_up(run, norm, *measured)
        run.step, seen = run.step + 1, seen + batch_size
        bar.update(batch_size)
        if training.due(log_every, seen, run.config):
            report(run, bar)
        stopped = max_over_processes(max(signals, default=0))
        if run.master and (training.due(save_every, seen, run.config) or stopped):
            training.save(run)
    bar.close()
    if run.master and seen >= total_images and (lines := read_log(run.log, math.inf)):
        lost = collapse(run, json.loads(lines[-1]))
    if run.master and seen >= total_images and not lost:
        print(f"{run.path} is ready; next: python train_stage1.py --codes={out_dir} --out_dir={out_dir}")
    training.finish(run, stopped, "images")
    require(not lost, lost)


if __name__ == "__main__":
    main(sys.argv[1:])
