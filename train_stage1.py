"""
Stage 1 of DisCo-Diff: trains the denoiser and the encoder of the discrete latents together (Alg. 1).

On the embedded data, on a laptop or one GPU:
    python train_stage1.py
One GPU, eight GPUs, two nodes of eight GPUs (the same line on each):
    python train_stage1.py config/cifar10.py
    torchrun --nproc_per_node=8 train_stage1.py config/imagenet64.py
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 \
        --rdzv-id=1 train_stage1.py config/imagenet64.py
    (out_dir on a file system that both share; docs/running.md has what to add for restarts)
Plain EDM, the baseline:
    python train_stage1.py --num_latents=0 --out_dir=out/edm
On the codes of an encoder that train_encoder.py trained, as in Discrete Latent Codes:
    python train_stage1.py config/dlc.py
With continuous latents in place of codes; with the prior, which is stage 2 otherwise, trained along:
    python train_stage1.py config/continuous.py
    python train_stage1.py --prior=ar && python sample.py
From EDM's trained network, the paper's recipe for ImageNet-64:
    torchrun --nproc_per_node=8 train_stage1.py config/imagenet64_finetune.py
From a network of our own, on another data set or with codes added to plain EDM, or from a published DiT's file:
    python train_stage1.py --init_from=out/edm --out_dir=out/finetuned

Writes to out_dir:

    stage1.pt              weights, their moving average, optimiser, settings
    stage1.previous.pt     the checkpoint before
    stage1.jsonl           the log; stage1_curves.png draws it
    coarse.jsonl           the log of the encoder's first phase; coarse_curves.png draws it
    preview_*.png          samples along the way

The same command again, with --overwrite=True or without, continues after a crash, Ctrl-C or SIGTERM.
The last two save first, and end the process with exit code 130 or 143. A larger --total_images
continues a finished run; --change=lr continues with another --lr.
"""

import contextlib
import math
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import onestage
import training
from coarse import warm_up
from configurator import UserError, arguments_of, configure, is_default, require, require_numbers, say
from continuous import kl_divergence
from diffusion import noise_schedule
from encoded import Encoded, read_encoder
from latents import Latents
from model import DENOISERS, DisCoDiff
from noise import BatchNoise, gumbel_noise, seed_of, seeded_generator
from preview import print_losses, save_preview
from processes import max_over_processes
from run import can_compile, progress, running
from start_from import sort_older, start_from
from trained import priors_of

# run
out_dir = "out"
init_from = ""  # initial weights: a run's folder or stage1.pt, "pretrained", EDM's .pkl for ImageNet-64, or a DiT's .pt
overwrite = False  # replace an older or finished run in out_dir; continue an unfinished run of this command
change = ""  # "lr,tau": settings that may change when a run continues
seed = 0
device = "auto"  # "cpu", "cuda", "cuda:1", "mps"; auto: an NVIDIA GPU if there is one
precision = "bf16"  # on a GPU: "bf16", "fp16", "tf32", "fp32"; elsewhere always float32
loss_scale = 1.0  # in fp16, keeps small gradients from vanishing; EDM has 100 for ImageNet-64
compile = True  # torch.compile, on a GPU
# data
dataset = "fashion-mnist-10k"
held_out = -1  # images that neither stage trains on; -1: 500, or a tenth of a data set with fewer than 5,000
class_cond = True  # class labels condition the denoiser (and, in stage 2, the prior)
xflip = False  # mirror half of the images
space = "pixels"  # what is denoised: "pixels", or "vae": latents, which `python data.py NAME --vae=FILE` computes
# process
process = "edm"  # or "pfgm++", "flow" (matching): diffusion.py has them all
pfgm_D = 128.0  # PFGM++'s D, 0.5 or more, or inf, which is EDM
weighting = "edm"  # of noise levels: as the process has it; "edm-monotonic" is VDM++'s
# denoiser
denoiser = "unet"  # or "dit", "uvit"
# U-Net: ADM's; and the levels of a U-ViT above its Transformer, whose width is the last of channel_mult
model_channels = 16
channel_mult = (1, 1, 4)
channel_mult_emb = 4
num_blocks = 1
attn_resolutions = (0,)  # sizes of the feature maps with self- and cross-attention; (0,): the smallest
dropout = 0.0
# DiT; the published sizes S, B, L and XL are 384 x 12, 768 x 12, 1024 x 24 and 1152 x 28, with 6, 12, 16 and 16 heads
patch = 2  # pixels per side
width = 384
depth = 12  # also of the U-ViT
heads = 6
recompute = False  # U-ViT: keep few activations in training, and compute the others again; for large ones
# discrete latents
num_latents = 8  # m; 0: plain EDM
codebook_size = 16  # k
continuous = False  # latents of k numbers each in place of codes, as a variational autoencoder has (continuous.py)
# weight, in the loss, of KL(q(z | y) | p(z)), the nats that an image's latents tell. p is N(0, 1) for continuous
# latents, which need a weight; for codes it is the prior that is trained along, as below
kld_weight = 0.0
codes = ""  # folder of train_encoder.py, whose codes are given: m and k are its own, and no encoder is trained here
conditioning = "auto"  # how codes reach the denoiser: "attention" (DisCo-Diff), "average" (DLC; auto with --codes);
# or what takes their place: the encoder's "embedding", or its "random-mlp" (embedding.py)
tau = 1.0  # Gumbel-Softmax temperature, constant (App. D.2)
null_prob = 0.1  # probability that the null embedding replaces an image's latents (sec. 3.1)
latent_dim = 64
latent_layers = 6
latent_heads = 2
null_token = False  # a key without a code, to which attention can turn (sec. 4.1); needs latents_to_emb = False
latents_to_emb = True  # besides attention, codes join the embedding of noise level and class; not in DisCo-Diff
groups = 0  # U-Net: groups of latents, each for one of attn_resolutions in the up-sampling branch (sec. 3.3); 0: none
# encoder: ViT
encoder_patch = 0  # pixels per side; 0: a quarter of the image
encoder_dim = 128
encoder_layers = 3
encoder_heads = 4
# the encoder's first phase, beside a small denoiser of averaged images; 0 images: none, as in DisCo-Diff
coarse_images = 40_000
coarse_batch = 128
coarse_lr = 1e-3
coarse_spread = 0.003  # weight of the entropy, in nats, of each latent's codes: it keeps all codes in use
# one stage instead of two (onestage.py)
prior = ""  # trained along, a step for each step of stage 1: "ar", "sedd", ... as in train_prior.py
prior_config = ""  # its settings, a config file for train_prior.py; without batch_size there, it is that of stage 1
# optimisation: EDM's
total_images = 40_000  # to train on, in all
batch_size = 8  # over all processes
batch_gpu = 512  # the most images in one process at once; a larger share accumulates gradients
lr = 2e-3
code_lr = 0.0  # of what embeds the codes; 0: lr, and of m averaged ones m lr, since each counts 1 / m in the average
encoder_lr = 0.0  # after its first phase; 0 holds it. A fast encoder collapses to one code (bits go to 0)
warmup_images = 2_000  # linear learning-rate warm-up
ema_halflife_images = 500_000
ema_rampup = 0.1  # the half-life is at most this share of the images seen so far
# ln(sigma) ~ N(P_mean, P_std^2). EDM has -1.2 and 1.2, but a run this short needs more of the high noise
# levels, where the latents help. Flow matching draws its times evenly instead
P_mean = -0.4
P_std = 1.4
shift = 1.0  # all noise levels of training times this: 2 moves EDM's from images of 64 pixels to 128
sigma_data = 0.0  # standard deviation of what is denoised; 0: 0.5 for pixels, 1 for latents
# reports, all in images
log_every = 1_000
save_every = 10_000
keep_every = 0  # snapshots to keep, stage1-000100000.pt and so on; 0: none
preview_every = 15_000  # 0: no previews

# ----------------------------------------------------------------------------------------------------
# Alg. 1. Each step has its own seed, so a resumed run equals an uninterrupted one.


def fetch(run, position, count, flip=None):
    """Line 3: the endless shuffle's next images, mirrored where flip (count,) says so -> y (count, C, H, W) in [-1, 1],
    or their VAE latents; labels (count,) or None; what the encoder reads: the images, or None if there are codes
    """
    training.require_unchanged(run)
    indices = run.batches.take(position, count)
    c = torch.from_numpy(run.labels[indices]).to(run.device, non_blocking=True) if class_cond else None
    if run.latents and (run.encoded or not num_latents):
        return run.latents.of(indices, flip), c, None
    images = data.to_float(run.images[indices], run.device)
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
    return run.latents.of(indices, flip) if run.latents else images, c, images


def draw_step(run, step):
    """Line 4, and all other random numbers of one step, for the whole batch. Each process takes its rows,
    so the result does not depend on the number of processes. (Dropout's masks do.)

    -> noise n (B, C, H, W), sigma (B, 1, 1, 1), Gumbel noise (B, m, k), which images get null latents
    (B,), which are mirrored (B,). Codes that are given are not drawn: m = 0
    """
    g = seeded_generator(run.device, "step", seed, step)
    normal = torch.randn(batch_size, 1, 1, 1, device=run.device, generator=g)
    noise = run.model.noise(BatchNoise(batch_size, g))
    gumbel = gumbel_noise((batch_size, 0 if codes else num_latents, codebook_size), g)
    drop = torch.rand(batch_size, device=run.device, generator=g) < null_prob
    flip = torch.rand(batch_size, device=run.device, generator=g) < (0.5 if xflip else 0)
    sigma = run.levels(normal)
    return noise * sigma, sigma, gumbel, drop, flip


def gradients(run, step):
    """Lines 3 to 7: leaves the gradients of one step, of the whole batch over all processes, in the parameters.

    -> of this process's images: mean loss per pixel; sum of code distributions (m, k); sum of entropies; sum of each
    latent's KL divergence from p(z), (m,)
    """
    noise, sigma, gumbel, drop, flip = draw_step(run, step)
    loss_sum, code_sum, entropy_sum, kld_sum = 0, 0, 0, 0
    for rows in run.micro_batches:
        position, count = step * batch_size + rows.start, rows.stop - rows.start
        y, c, images = fetch(run, position, count, flip[rows])
        z = run.encoded.codes(run.batches.take(position, count), flip[rows]) if run.encoded else None
        torch.manual_seed(seed_of("dropout", seed, step, rows.start))
        exchange = run.world == 1 or rows is run.micro_batches[-1]  # processes exchange gradients once a step
        with contextlib.nullcontext() if exchange else run.forward.no_sync():
            with run.autocast:
                # lines 5 and 6: z ~ E(y) where codes aren't given, then D(y + n, sigma, z, c)
                D, logits = run.forward(y, noise[rows], sigma[rows].flatten(), c, gumbel[rows], drop[rows], tau, z,
                                        images)
                # line 7, Eq. 3: lambda(sigma) |D(y + n, sigma, z, c) - y|^2, here a mean over the batch
                loss = (run.weight(sigma[rows]) * (D - y) ** 2).sum() / run.local_batch
                loss_sum += loss.detach() / y[0].numel()
                if kld_weight and logits is not None:
                    kld = kl_divergence(logits) if continuous else \
                        onestage.rate(run.prior.ema, logits, gumbel[rows], tau, c)
                    loss = loss + kld_weight * kld.sum() / run.local_batch
                    kld_sum += kld.detach().sum(0)
            training.backward(run, loss)
        if logits is not None and not continuous:
            usage, entropies = training.usage(logits.detach().softmax(-1))
            code_sum, entropy_sum = code_sum + usage, entropy_sum + entropies
    training.unscale(run)
    return loss_sum, code_sum, entropy_sum, kld_sum


def update(run, seen):
    """Line 8: Adam, then the moving average of the weights. seen: images before this step. -> gradient norm

    If the norm is not finite, Adam leaves the weights as they are. (EDM replaces NaN by 0 and infinity
    by 1e5, and goes on.)
    """
    for group, peak in zip(run.optimizer.param_groups, (lr, run.code_lr, encoder_lr)):  # U-Net, codes, encoder
        group["lr"] = peak * min(seen / max(warmup_images, 1), 1)
    norm = training.gradient_norm(run)
    training.guarded_step(run.optimizer, norm, run.skipped)
    halflife = min(ema_halflife_images, seen * ema_rampup)
    decay = 0.5 ** (batch_size / max(halflife, 1e-8))
    get_ema_multi_avg_fn(decay)(run.ema_parameters, run.parameters, None)
    return norm


# ----------------------------------------------------------------------------------------------------
# from the settings to a run

# may change when a run continues: the run's course stays the same (batch_gpu changes dropout's masks)
FREE = ("out_dir", "overwrite", "change", "device", "compile", "recompute", "batch_gpu", "codes", "prior_config",
        "total_images", "log_every", "save_every", "keep_every", "preview_every")
# may change if --change names them: they act step by step. Others can't: the prior relies on xflip,
# and batch_size and seed decide which image comes when
CHANGEABLE = ("lr", "code_lr", "encoder_lr", "warmup_images", "ema_halflife_images", "ema_rampup", "P_mean", "P_std",
              "shift", "weighting", "null_prob", "kld_weight", "tau", "dropout", "precision", "loss_scale")


def setup(config):
    """Data, networks, and perhaps a checkpoint to continue -> run, as in training.py

    config: the settings, as `configure` returns them; adaptive ones get their values. Raises UserError
    for settings that don't fit.
    """
    global _checkpoint_path, _micro_batch  # for the line printed when memory runs out
    require_numbers(config, but=("held_out", "P_mean", "pfgm_D"), or_zero=(
        "seed", "num_latents", "latent_layers", "encoder_layers", "encoder_patch", "warmup_images", "ema_rampup",
        "ema_halflife_images", "P_std", "code_lr", "encoder_lr", "coarse_images", "coarse_spread", "keep_every",
        "preview_every", "null_prob", "dropout", "sigma_data", "groups", "kld_weight"))
    require(denoiser in DENOISERS, f"--denoiser is {' or '.join(DENOISERS)}, not {denoiser}")
    require(space in ("pixels", "vae"), f"--space is pixels or vae, not {space}")
    require(math.isfinite(P_mean), f"P_mean must be finite, not {P_mean}")
    require(process == "pfgm++" or is_default(globals(), "pfgm_D"), "pfgm_D is for --process=pfgm++")
    require(denoiser == "uvit" or not recompute, "recompute is for --denoiser=uvit")
    if process == "flow" and not (is_default(globals(), "P_mean") and is_default(globals(), "P_std")):
        say("flow matching draws its times evenly: P_mean and P_std have no effect")
    require(null_prob <= 1 and dropout < 1, f"null_prob {null_prob} and dropout {dropout} are probabilities")
    require(channel_mult and min(channel_mult) > 0,
            f"channel_mult has a positive number for each level, not {channel_mult}")
    onestage.check(config)
    run = training.start(config, "stage1", "train_stage1")
    if num_latents and coarse_images and not codes:
        require(coarse_batch % run.world == 0,
                f"coarse_batch {coarse_batch} can't be shared among {run.world} processes equally")
        require(coarse_batch <= coarse_images, f"coarse_batch {coarse_batch} exceeds coarse_images {coarse_images}")
    run.lower = "--lr or --encoder_lr"  # what may help a run that diverges
    run.micro_batches, _checkpoint_path = training.micro_batches(run), run.path
    _micro_batch = run.local_batch // len(run.micro_batches)

    run.images, run.labels, num_classes = data.load(dataset)
    run.latents = Latents(dataset, run.images.shape, xflip, run.device) if space == "vae" else None
    x_shape = run.latents.shape if run.latents else ()
    fit_to_images(config, run.images.shape, num_classes, x_shape)
    run.levels, run.weight = noise_schedule(**arguments_of(config, noise_schedule))
    config["data_identity"] = data.data_checksum(run.images, run.labels)  # in the checkpoint, to notice changes
    chosen = [name for name in ("num_latents", "codebook_size") if not is_default(globals(), name)]
    encoder = read_encoder(config, run.images.shape, chosen)
    require(not null_token or num_latents and config["conditioning"] == "attention" and not latents_to_emb,
            "null_token is for codes that attention alone reads: --conditioning=attention --latents_to_emb=False")
    require(groups < 2 or not num_latents or denoiser == "unet" and config["conditioning"] == "attention",
            "groups share out a U-Net's cross-attentions: they need --denoiser=unet and --conditioning=attention")
    run.train_indices, run.held_out_indices = data.split(len(run.images), config["held_out"])
    run.to_show = run.held_out_indices if len(run.held_out_indices) else run.train_indices
    run.batches, run.stamp = data.Shuffle(run.train_indices, seed), data.file_stamp(run.images)
    run.classes = data.class_names(dataset)
    run.carries = dict(  # also in the checkpoint
        classes=run.classes, made=data.made_of(dataset), qkv="sorted", coarse=dict(step=0))
    if run.latents:
        run.carries["vae"], config["vae_identity"] = run.latents.vae.state_dict(), run.latents.identity
    run.model_args = arguments_of(config, DisCoDiff, DENOISERS[denoiser]) | dict(
        img_resolution=run.images.shape[1], img_channels=run.images.shape[3], x_shape=x_shape,
        label_dim=num_classes if class_cond else 0)
    torch.manual_seed(seed)
    try:
        run.model, run.ema = (DisCoDiff(**run.model_args).to(run.device, memory_format=torch.channels_last)
                              for _ in range(2))
    except ValueError as error:  # sizes that don't fit each other
        raise UserError(error) from None
    run.ema.eval().requires_grad_(False)
    run.code_lr = code_lr or lr * (run.model.num_latents if config["conditioning"] == "average" else 1)
    if encoder:
        run.model.encoder.load_state_dict(run.model.encoder.state_dict() | encoder)  # a random MLP stays as it is
        run.ema.encoder = run.model.encoder  # one for both, in memory and in the checkpoint
    parts = (run.model.model, run.model.latents, run.model.encoder) if num_latents else (run.model.model,)
    rates = [dict(params=part.parameters()) for part in parts]
    run.optimizer = torch.optim.Adam(rates, betas=(0.9, 0.999), eps=1e-8, fused=True)
    run.prior = onestage.prepare(run) if prior else None
    if not training.resume_run(run, FREE, CHANGEABLE, prepare=partial(take_over, run)):
        if init_from and start_from(init_from, run.model, run.model_args):
            run.carries["coarse"] = dict(step=coarse_images)
        run.ema.load_state_dict(run.model.state_dict())
    if num_latents and not encoder:
        run.model.encoder.requires_grad_(encoder_lr > 0)
    run.encoded = Encoded(run, run.model, 2 if xflip else 1) if encoder else None
    # DDP's, harmless for 1 x 1 convolutions; torch.compile's, of a speed that it forgoes
    warnings.filterwarnings("ignore", r"Grad strides do not match|\s*Online softmax is disabled")
    network = torch.compile(run.model) if compile and can_compile(run.device) else run.model
    run.forward = training.distributed(run, network)
    return run


def take_over(run, checkpoint):
    """What a checkpoint needs before its state is loaded, and what it says besides."""
    sort_older(run.model, checkpoint)
    run.carries["coarse"] = checkpoint.get("coarse", run.carries["coarse"])
    if "prior" in checkpoint:
        training.load_state(run.prior, checkpoint["prior"])


def fit_to_images(config, shape, num_classes, x_shape=()):
    """Replaces adaptive settings by what fits images of this shape, (N, H, W, C), and their latents' (C, h, w), if any.

    Raises UserError for settings that don't fit.
    """
    count, height, width, _ = shape
    require(height == width, f"images must be square, not {height} x {width}: prepare them with "
                             f"--resolution={min(height, width)}")
    side = x_shape[1] if x_shape else height
    levels = len(channel_mult) - 1 if denoiser == "uvit" and len(channel_mult) > 1 else len(channel_mult)
    maps = [side >> level for level in range(levels)]  # sizes of the U-Net's feature maps
    if held_out == -1:
        config["held_out"] = min(500, count // 10)
    if attn_resolutions == (0,):
        config["attn_resolutions"] = (maps[-1],)
    if not encoder_patch:
        config["encoder_patch"] = max(p for p in range(1, 1 + max(1, height // 4)) if height % p == 0)
    config["sigma_data"] = sigma_data or (1.0 if x_shape else 0.5)
    held, at, of_encoder = (config[name] for name in ("held_out", "attn_resolutions", "encoder_patch"))
    misfits = [misfit for misfit, wrong in (  # all in one message, each with what fits
        (f"the data set {dataset} has no class labels: train with --class_cond=False", class_cond and not num_classes),
        (f"held_out is {held}: the data set has {count} images, -1 takes a tenth", not 0 <= held < count),
        (f"attn_resolutions has {sorted({*at} - {*maps})}: the feature maps are {maps}, (0,) takes the last",
         denoiser != "dit" and {*at} - {*maps}),
        (f"{num_latents} latents can't be split into {groups} equal groups: change groups or num_latents",
         groups and not codes and num_latents % groups),
        ((f"{groups} groups of latents need {groups} resolutions with attention, and it is at "
          f"{sorted({*at, maps[-1]})}: name more of the feature maps {maps} in attn_resolutions"),
         denoiser == "unet" and num_latents and len({*at, maps[-1]}) < groups),
        (f"patch {patch} does not divide {side} x {side}, the size of {'latents' if x_shape else 'images'}",
         denoiser == "dit" and side % patch),
        (f"encoder_patch {of_encoder} does not divide images of {height} pixels, 0 takes a quarter",
         num_latents and height % of_encoder)) if wrong]
    require(not misfits, "; ".join(misfits))


# ----------------------------------------------------------------------------------------------------
# the run


def report(run, seen, bar):
    """A line of the log: loss, and what the codes do."""
    steps, (norm, loss, code_sum, entropy_sum, kld_sum) = training.totals(run, f"{run.lower}, and look at the data")
    line = dict(images=seen, loss=loss.item() / steps)
    shown = {"loss": f"{line['loss']:.4f}"}
    count = steps * run.local_batch
    if num_latents and not (codes or continuous):
        usage, used = training.of_usage(code_sum, entropy_sum, count)
        line, shown = line | usage, shown | used
    if num_latents and kld_weight:
        kld, told = training.of_divergence(kld_sum, count)
        line, shown = line | kld, shown | told
    training.write_line(run, line | dict(grad_norm=norm.item() / steps), bar, shown)


def main(argv=()):
    config = configure(globals(), argv)
    with running(f"{out_dir}/stage1") as signals:
        train(setup(config), signals)


def train(run, signals):
    """The encoder's first phase, then Alg. 1 over and over, until total_images are seen or a signal comes."""
    stopped, seen = 0, run.step * batch_size
    if run.master:
        of_network, in_all = (sum(p.numel() for p in part.parameters()) for part in (run.model.model, run.model))
        shape = " x ".join(map(str, run.images.shape[1:]))
        print(f"{dataset}: {len(run.train_indices):,} images to train on, {shape}, {len(run.classes)} classes; "
              f"denoiser {of_network:,} parameters, latents {in_all - of_network:,}; on {run.device}")
        training.open_log(run, "images")
        for snapshot in Path(out_dir).glob("stage1-*.pt") if overwrite and not run.step else ():
            snapshot.unlink()  # of the run that this one replaces
    if num_latents and not run.step:
        warm_up(run, fetch, signals)
    if prior:
        onestage.begin(run)
    bar = progress(total=total_images, initial=seen, unit="img", disable=not run.master, mininterval=1)
    run.model.train()
    while seen < total_images and not stopped:
        measured = gradients(run, run.step)
        norm = update(run, seen)
        training.add_up(run, norm, *measured)
        run.step, seen = run.step + 1, seen + batch_size
        bar.update(batch_size)
        if prior:
            onestage.advance(run)
        if training.due(log_every, seen, run.config):
            report(run, seen, bar)
        stopped = max_over_processes(max(signals, default=0))
        if run.master and (training.due(save_every, seen, run.config) or stopped):
            training.save(run, **onestage.save(run) if prior else {})
        if run.master and training.due(keep_every, seen, run.config):
            training.save(run, keep=f"{out_dir}/stage1-{seen:09d}.pt")
        if run.master and training.due(preview_every, seen, run.config) and not stopped:
            save_preview(run, f"{out_dir}/preview_{seen:09d}.png")
    bar.close()
    if prior:
        onestage.finish(run, seen >= total_images)
    if run.master and seen >= total_images:
        print_losses(run)
        kind = prior or priors_of(run.model_args)[1][0]
        then = f"; next: python {'sample' if prior else 'train_prior'}.py --out_dir={out_dir}"
        print(f"{run.path} is ready" + (then + f" --prior={kind}" * (kind != "ar")) * (num_latents > 0))
    training.finish(run, stopped, "images")


if __name__ == "__main__":
    main(sys.argv[1:])
