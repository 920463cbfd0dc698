"""
Text to codes: trains a masked diffusion language model to write the codes of stage 1 from a caption (DLC sec. 6).

    python train_text.py
    python sample.py --prompt="a dark pullover with long sleeves"
    python train_text.py --out_dir=out/dlc                # on the codes of train_encoder.py
    python train_text.py --captions=captions.txt          # a line for each image; tabs between captions of one image
    torchrun --nproc_per_node=8 train_text.py config/llada.py    # LLaDA-8B, fine-tuned

Reads out_dir/stage1.pt, which names the images, their split and classes. Writes out_dir/text.pt, a log and its curves.

Captions are made of each image's class and of what can be measured in it (captions.py), anew at each visit, or read
from a file. By default the images of some combinations of class and word are left out: a prompt for such a
combination asks for something new. The same command again continues a run, as in train_stage1.py; its learning rate
follows a cosine over total_images, so that --change=total_images continues with a longer one.
"""

import contextlib
import copy
import json
import math
import sys
import zlib

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import sharding
import training
from captions import FileCaptions, MadeCaptions
from checkpoint import atomic, weights_checksum
from configurator import UserError, arguments_of, configure, require, require_numbers
from dino import schedule
from encoded import Encoded
from llada import LLaDA
from model import draw_codes
from noise import gumbel_noise, seeded_generator
from processes import max_over_processes
from run import progress, running
from start_from import start_from_llada
from text import TextModel, padded
from tokens import read_text, tokenizer_of
from trained import load_stage1, load_trained_on

# run
out_dir = "out"
init_from = ""  # initial weights: LLaDA's, a folder of .safetensors files
overwrite = False  # replace an older or finished text model in out_dir; continue an unfinished run of this command
change = ""  # "lr,kept": settings that may change when a run continues
seed = 0
device = "auto"
precision = "bf16"  # as in train_stage1.py
loss_scale = 1.0
fsdp = False  # share the parameters among the processes, for networks that are too large for one GPU
# text
captions = ""  # a file with a line for each image; "": made from the data
hold_out = True  # leave the images of some combinations out, if captions are made from the data
tokenizer = ""  # a published tokenizer.json; "": bytes
vocabulary = 257  # tokens of the text
mask_token = 256
context = 64  # most tokens of a caption; longer ones are cut
# the Transformer
layers = 3
dim = 64
heads = 4
hidden = 160
theta = 100.0  # of the rotary positions
place_embedding = True  # of the codes, besides rotary positions; LLaDA has none
recompute = False  # keep few activations in training, and compute the others again
# masks: of codes and caption at one rate, as in DLC, but for captions that are
kept = 0.5  # probability: never masked, as in LLaDA's fine-tuning
dropped = 0.1  # probability: all masks, for guidance
# optimisation: Adam
total_images = 200_000  # captions and codes to train on, in all
batch_size = 128  # over all processes
batch_gpu = 128  # the most in one process at once; a larger share accumulates gradients
lr = 4e-3  # to 0, by a cosine
warmup_images = 5_000
grad_clip = 1.0
ema_decay = 0.99  # of the weights' average, per step; at step n at most (1 + n) / (10 + n); 0: no average
# memory and reports
cache_gb = 16.0  # as in train_prior.py
log_every = 10_000  # also computes held-out bits
save_every = 50_000

# ----------------------------------------------------------------------------------------------------
# a step. Each has its own seed, and draws for the whole batch, as in stage 1


def gradients(run, step):
    """Leaves the gradients of one step, of the whole batch over all processes, in the parameters.

    -> the mean loss of this process's sequences, in nats
    """
    m, k = run.stage1.num_latents, run.stage1.codebook_size
    gumbel = gumbel_noise((batch_size, m, k), seeded_generator(run.device, "codes", seed, step))
    words = seeded_generator("cpu", "words", seed, step)
    flip, *words = torch.rand(1 + run.captions.draws, batch_size, generator=words)
    words = torch.stack(words, dim=1).numpy()
    g = seeded_generator(run.device, "noise", seed, step)
    # the batch's times are spread evenly over (0, 1), in random order (VDM, App. I.1)
    t = torch.rand(1, device=run.device, generator=g) + torch.randperm(batch_size, device=run.device, generator=g)
    t, fate = t / batch_size, torch.rand(batch_size, device=run.device, generator=g)
    u = torch.rand(batch_size, run.model.places + 1 + context, device=run.device, generator=g)
    loss_sum = 0
    for rows in run.micro_batches:
        indices = run.batches.take(step * batch_size + rows.start, rows.stop - rows.start)
        z = codes_of(run, indices, gumbel[rows], flip[rows] < (0.5 if run.flips == 2 else 0))
        said = tokens_of(run, indices, words[rows])
        with run.autocast:
            whole, masks = fate[rows] < kept, fate[rows] >= 1 - dropped
            loss = run.model.loss(z, said, t[rows], u[rows], whole, masks, run.forward).sum() / run.local_batch
        training.backward(run, loss)
        loss_sum += loss.detach()
    training.unscale(run)
    return loss_sum


def update(run, step):
    """Clipping, Adam, moving average. -> gradient norm; if it is not finite, Adam changes nothing"""
    norm = sharding.whole(torch.nn.utils.clip_grad_norm_(run.parameters, grad_clip))
    for group in run.optimizer.param_groups:
        group["lr"] = schedule(step, lr, 0.0, -(-total_images // batch_size), warmup_images // batch_size)
    training.guarded_step(run.optimizer, norm, run.skipped)
    if ema_decay:
        get_ema_multi_avg_fn(min(ema_decay, (1 + step) / (10 + step)))(run.ema_parameters, run.parameters, None)
    return norm


def codes_of(run, indices, gumbel, flip):
    """-> codes (B, n) of these images, mirrored where flip (B,) is true, drawn anew: z ~ E(y); and their classes"""
    z = draw_codes(run.encoded.logits(indices, flip), gumbel)
    c = torch.from_numpy(run.labels[indices]).to(run.device)[:, None] if run.stage1.label_dim else z[:, :0]
    return torch.cat([z, c], dim=1)


def tokens_of(run, indices, words):
    """-> the tokens (B, T) of captions of these images, which uniform numbers (B, draws) choose"""
    return padded(map(run.tokenizer.encode, run.captions.draw(indices, words)), context).to(run.device)


# ----------------------------------------------------------------------------------------------------
# from the settings to a run

# as in train_stage1.py; files of text are known by what is in them
FREE = ("out_dir", "overwrite", "change", "device", "fsdp", "captions", "tokenizer", "recompute", "batch_gpu",
        "cache_gb", "log_every", "save_every")
CHANGEABLE = ("total_images", "lr", "warmup_images", "kept", "dropped", "grad_clip", "ema_decay", "precision",
              "loss_scale")


def setup(config):
    """Stage 1, captions, the network, and perhaps a checkpoint to continue -> run, as in training.py

    config: the settings, as `configure` returns them. Raises UserError for settings that don't fit.
    """
    global _checkpoint_path, _micro_batch  # for the line printed when memory runs out
    require_numbers(config, or_zero=("seed", "warmup_images", "kept", "dropped", "ema_decay", "cache_gb", "mask_token"))
    require(kept + dropped <= 1, f"kept {kept} and dropped {dropped} are probabilities: their sum is at most 1")
    require(ema_decay < 1, f"ema_decay must be below 1, not {ema_decay}")
    run = training.start(config, "text", "train_text")
    run.lower, _checkpoint_path = "--lr", run.path
    run.micro_batches = training.micro_batches(run)
    _micro_batch = run.micro_batches[0].stop - run.micro_batches[0].start
    run.stage1, stage1 = load_stage1(out_dir, run.device)
    require(run.stage1.num_latents and run.stage1.codebook_size > 1,
            f"{out_dir}/stage1.pt reads no codes: there is nothing to write from captions")
    trained_on = load_trained_on(stage1["config"], f"{out_dir}/stage1.pt")
    run.images, run.labels, run.train_indices, run.held_out_indices = trained_on
    run.captions, run.tokenizer, content = read_texts(run, stage1["config"]["dataset"])
    unseen = run.captions.unseen()
    run.unseen_indices = run.held_out_indices[unseen[run.held_out_indices]]
    run.held_out_indices = run.held_out_indices[~unseen[run.held_out_indices]]
    if hold_out:
        run.train_indices = run.train_indices[~unseen[run.train_indices]]
    run.batches, run.flips = data.Shuffle(run.train_indices, seed), 2 if stage1["config"]["xflip"] else 1

    of_codes = {name: getattr(run.stage1, name) for name in ("num_latents", "codebook_size", "label_dim")}
    run.model_args = of_codes | arguments_of(config, LLaDA, TextModel)
    run.sharded = fsdp and run.world > 1
    torch.manual_seed(seed)
    try:
        with run.device if run.sharded else contextlib.nullcontext():  # a large network is made where it goes
            run.model = TextModel(**run.model_args).to(run.device)
    except ValueError as error:  # sizes that don't fit each other
        raise UserError(error) from None
    run.ema = copy.deepcopy(run.model).eval().requires_grad_(False) if ema_decay else run.model
    for network in {run.model, run.ema} if run.sharded else ():
        sharding.shard(network)
    run.optimizer = torch.optim.Adam(run.model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)

    def prepare(checkpoint):
        require(checkpoint["encoder"] == run.carries["encoder"],
                f"{run.path} is of another stage 1 than {out_dir}/stage1.pt: start anew with --overwrite=True")
        sharding.spread(checkpoint, run.model)

    run.carries = dict(encoder=weights_checksum(stage1["ema"]), tokenizer=content)
    if not training.resume_run(run, FREE, CHANGEABLE, prepare=prepare, encoder=run.carries["encoder"]) and init_from:
        start_from_llada(init_from, run.model)
        run.ema.load_state_dict(run.model.state_dict())
    run.forward = run.model if run.sharded else training.distributed(run, run.model)
    run.encoded = Encoded(run, run.stage1, run.flips, cache_gb * 2 ** 30)
    return run


def read_texts(run, dataset):
    """-> captions, tokenizer, and the content of the latter's file. Checksums of files go into the settings: a run
    continues with the same ones."""
    content = read_text(tokenizer) if tokenizer else ""
    coder = tokenizer_of(content)
    require(max(coder.largest, mask_token) < vocabulary,
            f"the tokenizer has tokens up to {coder.largest}, and mask_token is {mask_token}: vocabulary {vocabulary} "
            "must be larger")
    require(tokenizer or mask_token > coder.largest,
            f"mask_token {mask_token} is a byte, which captions may have: it must be {coder.largest + 1} at least")
    said = read_text(captions) if captions else ""
    run.config |= dict(tokenizer_identity=zlib.crc32(content.encode()), captions_identity=zlib.crc32(said.encode()))
    if captions:
        return FileCaptions(captions, said, len(run.images)), coder, content
    return MadeCaptions(run.images, run.labels, data.class_names(dataset)), coder, content


# ----------------------------------------------------------------------------------------------------
# bits per image


@torch.no_grad()
def bits(run, indices, given="own", draws=16):
    """An upper bound on -log2 p(codes | caption) of images, and of their classes, if stage 1 is told these

    given: "own" captions of the images; "a wrong" one each, that of another image, which may say the same; or "no"
    caption: masks, whose number tells its length. -> mean, standard error
    """
    g, found = seeded_generator(run.device, "held-out", seed), []
    words = np.random.default_rng(seed).random((len(indices), run.captions.draws))
    of = np.roll(indices, 1) if given == "a wrong" else indices
    for part in np.array_split(np.arange(len(indices)), -(-len(indices) // 250)):
        gumbel = gumbel_noise((len(part), run.stage1.num_latents, run.stage1.codebook_size), g)
        z = codes_of(run, indices[part], gumbel, torch.zeros(len(part), dtype=torch.bool))
        said = tokens_of(run, of[part], words[part])
        said = torch.where(said < 0, -1, mask_token) if given == "no" else said
        with run.autocast:
            found.append(run.ema.nats(z, said, g, draws) / math.log(2))
    found = torch.cat(found)
    return found.mean().item(), found.std(correction=0).item() / len(found) ** 0.5


def print_bits(run):
    """Prints how well held-out images' codes are known from captions, and writes it. All processes call it."""
    found = {f"given {given} caption{'s' * (given == 'own')}": bits(run, run.held_out_indices, given)
             for given in ("no", "a wrong", "own")}
    if len(run.unseen_indices):
        found["own, of unseen combinations"] = bits(run, run.unseen_indices, "own")
    if run.master:
        print(f"bits per image on {len(run.held_out_indices)} held-out images, at most")
        for title, (mean, error) in found.items():
            print(f"  {title:35}{mean:7.2f} +- {error:.2f}")
        with atomic(f"{out_dir}/text_bits.json") as f:
            f.write(json.dumps(found).encode())


def report(run, seen, bar):
    """A line of the log: loss of the training sequences, and bits of held-out codes given their captions."""
    steps, (norm, loss) = training.totals(run, run.lower)
    line = {"images": seen, "loss": loss.item() / steps, "grad_norm": norm.item() / steps}
    shown = {"loss": f"{line['loss']:.2f}"}
    if len(run.held_out_indices):
        line["held_out_bits"] = bits(run, run.held_out_indices, draws=2)[0]
        shown["held-out bits"] = f"{line['held_out_bits']:.2f}"
    training.write_line(run, line, bar, shown)


# ----------------------------------------------------------------------------------------------------
# the run


def main(argv=()):
    config = configure(globals(), argv)
    with running(f"{out_dir}/text") as signals:
        train(setup(config), signals)


def train(run, signals):
    """Masked sequences, over and over, until total_images are seen or a signal comes."""
    stopped, seen = 0, run.step * batch_size
    if run.master:
        print(f"{len(run.train_indices):,} images to train on, such as {run.captions.example()!r}; "
              f"{sum(p.numel() for p in run.model.parameters()):,} parameters, on {run.device}")
    training.open_log(run, "captions")
    bar = progress(total=total_images, initial=seen, unit="img", disable=not run.master, mininterval=1)
    run.model.train()
    while seen < total_images and not stopped:
        loss = gradients(run, run.step)
        norm = update(run, run.step)
        training.add_up(run, norm, loss)
        run.step, seen = run.step + 1, seen + batch_size
        bar.update(batch_size)
        if training.due(log_every, seen, run.config):
            report(run, seen, bar)
        stopped = max_over_processes(max(signals, default=0))
        if training.due(save_every, seen, run.config) or stopped:
            training.save(run)
    bar.close()
    if seen >= total_images:
        if len(run.held_out_indices):
            print_bits(run)
        if run.master:
            prompt = run.captions.example()
            if len(run.tokenizer.encode(prompt)) > context or set(prompt) & set('"$`\\|!'):
                prompt = "..."  # sample.py refuses long prompts, and shells change some
            print(f"{run.path} is ready; next: python sample.py --out_dir={out_dir} --prompt=\"{prompt}\"")
    training.finish(run, stopped, "captions")


if __name__ == "__main__":
    main(sys.argv[1:])
