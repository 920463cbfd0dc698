"""
Samples from a trained DisCo-Diff (Alg. 3): codes from the prior, then the denoiser's ODE.

    python sample.py                                   # out/samples.png and out/samples.npz
    python sample.py --init_from=pretrained            # the same without training
    python sample.py --checkpoint=out/stage1-000100000.pt --encode=fashion-mnist-10k    # a snapshot
    python sample.py --guidance=2 --class_label=Bag    # stronger latents (App. B), one class
    python sample.py --guidance=2 --guidance_max=5     # stronger latents at noise levels up to 5 alone
    python sample.py --png=True                        # also a folder of PNG files, out/samples/
    python sample.py --encode=fashion-mnist-10k        # codes of these images, from the encoder
    python sample.py --code=3,1,4,1,5,9,2,6            # a code by hand
    python sample.py --prompt="a dark pullover with long sleeves"     # codes from text, by train_text.py
    python sample.py --code=3,1,4,1,-1,-1,-1,-1        # its first half; the prior draws the rest, given these
    python sample.py --encode=fashion-mnist-10k --free=4,5,6,7  # codes of these images, whose second half is drawn anew
    python sample.py --encode=a.png --compose=b.png --class_label=4   # the codes of both, mixed
    python sample.py --prior=sedd --sedd_sampler=analytic --eta=0.02  # the other prior, remasking
    python sample.py config/restart39.py               # the Restart sampler
    python sample.py --correct_with=out/edm --correct_steps=50  # plain EDM below a noise level of 10, by DDPM's sampler
    torchrun --nproc_per_node=8 sample.py --num_images=50000 --per_code=1 --batch_size=256

Writes out_dir/NAME.png, a grid, and out_dir/NAME.npz:

    images      uint8 (N, H, W, C)
    labels      int64 (N,), -1 without classes
    codes       int64 (N, m); in their place, embeddings are float32 (N, m), continuous latents (N, m, k)
    prompts     str (N,), where there are prompts
    seeds       int64 (N,): image i comes from the seed `seed + i` alone
    nfe         int64 (N,), the denoiser's evaluations; where guidance acts, D(z) and D(null) are two
    seconds     float32 (N,), the image's share of its batch's time

The batch size and the number of processes change images only by rounding. An interrupted run
continues when it is started again.
"""

import inspect
import json
import math
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
from checkpoint import OLDER, atomic, weights_checksum
from codes import by_hand, composed, of_images
from configurator import arguments_of, configure, is_default, require, say
from diffusion import corrected, flow, heun, restart, within
from diffusion_prior import EVALUATIONS
from model import denoiser
from noise import SeededNoise
from npz import is_whole_npz, merge_npz, require_pngs_alone, save_pngs
from plot import save_grid
from prior import require_prefix
from processes import barrier, leave_processes, start_processes
from prompts import of_prompts, read_prompts
from rdm import DDIM_STEPS
from run import alone, progress, set_precision
from text import TextModel
from trained import PRIORS, class_number, classes_of, load_prior, load_stage1, load_text, load_vae, prior_in

# run
out_dir = "out"  # folder of the checkpoints, and for the samples
init_from = ""  # another folder with checkpoints; "pretrained": the repository's
checkpoint = ""  # a snapshot in place of that folder's stage1.pt, such as out/stage1-000100000.pt
name = "samples"  # NAME.png and NAME.npz
device = "auto"  # "cpu", "cuda", "cuda:1", "mps"; auto: an NVIDIA GPU if there is one
precision = "bf16"  # for images on a GPU: "bf16", "fp16", "tf32", "fp32"; elsewhere always float32
num_images = 160
batch_size = 80  # images that one process makes at once
seed = 0
png = False  # also write a folder out_dir/NAME: a PNG file for each image, the labels in EDM's dataset.json
# conditions: `per_code` images in a row share one code; the grid's rows show two codes of a class each (Fig. 2b)
per_code = 8
class_label = ""  # one class for all images, by name or number; "": the classes in turn
random_labels = False  # random classes, as in EDM's protocol; classes in turn are balanced, and lower FID a little
code = ()  # a code by hand, m numbers in 0 ... k - 1, or -1 where the prior draws, given the others
encode = ""  # codes of images: an image file, folder, .npz, or data set (its training images come first)
exif = False  # turn image files for --encode and --compose by their EXIF orientation, as photographs need
free = ()  # positions, 0 ... m - 1, of the codes given so, which the prior draws anew, given the others
prompt = ""  # codes from text; | between several prompts, each of which has its own rows
prompt_file = ""  # or a file with a prompt on each line
compose = ""  # a second code, or images: makes fours of codes, the first, the second, and two mixtures
guidance = 1.0  # w in D~ = w D(z) + (1 - w) D(null), App. B; 1: none. We read Table 3's cfg as w - 1
guidance_min = 0.0  # noise levels that are guided (Kynkaanniemi et al. 2024; DLC's program has a highest one)
guidance_max = math.inf
# codes: which prior, and its sampler
prior = "auto"  # "ar", "sedd"; "rdm" for embeddings, "diffusion" for continuous latents; auto: the folder's first
temperature = 1.0  # for "ar", and for prompts
sedd_sampler = "first-hitting"  # m evaluations; "analytic" and "euler" (equal for this noise) take sedd_steps
sedd_steps = 128
eta = 0.0  # remasking: probability of masking a token again, per step from t1 to t0 (DLC Eq. 4; 0.01, 0.02)
t0 = 0.3
t1 = 0.55
# codes from prompts, by LLaDA's sampler: m evaluations, each of which writes a code, or text_steps, which write several
text_order = "low-confidence"  # the surest first, or "random"
text_steps = 0
text_block = 0  # of places that are filled before those to their right; 0: one block (semi-autoregressive: several)
text_guidance = 1.0  # w in logits of un + w (cond - un), where un knows no prompt; 1: none (LLaDA's cfg_scale is w - 1)
# images: EDM's sampler
ode = "edm"  # Heun's method on EDM's noise levels; or in equal steps of flow matching's time: "flow-heun", "flow-euler"
num_steps = 18
sigma_min = 0.002
sigma_max = 80.0
rho = 7.0
S_churn = 0.0  # 0: the ODE, by Heun's method
S_min = 0.0
S_max = math.inf
S_noise = 1.0
restarts = ()  # (N_restart, K, t_min, t_max), ...: Restart sampling, as in config/restart*.py
gamma = 0.0  # churn of the restarts' steps, which go from t by way of t (1 + gamma)
# DisCo-Diff's correction (sec. 4.1): another model, without codes, at low noise
correct_with = ""  # its folder
correct_below = 10.0  # it takes over at this noise level
correct_steps = 0  # of DDPM's sampler, down from there; 0: the sampler above goes on

# ----------------------------------------------------------------------------------------------------
# Alg. 3: class labels, codes, then the ODE. `rows` number the codes: `per_code` images share one.


def number_of(rows):
    """-> what is given to rows (R,), by number: four rows belong to one composition"""
    return rows // 4 if compose else rows


def turn(number):
    """The turn of the numbers of codes, int64 (R,): a row of the grid has two codes of one class, or prompt."""
    return number if compose or per_code == 1 else number // 2


def labels_of(run, rows):
    """-> class labels (R,): the chosen class, random classes, or classes in turn; -1 without classes"""
    if not run.model.label_dim or run.class_label >= 0:
        return torch.full((len(rows),), run.class_label)
    if random_labels:
        return (run.model.label_dim * (1 - SeededNoise("labels", number_of(rows)).rand())).long()
    return torch.from_numpy(turn(number_of(rows)) % run.model.label_dim)


def given_codes(run, rows, noise):
    """-> the codes that settings give, (R, m), or none, (R, 0); labels (R,)"""
    labels = labels_of(run, rows).to(noise.device)
    if not run.sources:
        return torch.empty(len(rows), 0, dtype=torch.int64), labels
    given = [source(number_of(rows), noise) for source in run.sources]
    codes, own_labels = zip(*((z, labels if c is None else c) for z, c in given))
    if not compose:
        return codes[0], own_labels[0]
    mixed, of_first = composed(rows, *codes, run.device)
    return mixed, torch.where(of_first, *own_labels)


def codes_of(run, rows):
    """Alg. 3, lines 3-5. -> codes (R, m), labels (R,); each row depends on its number alone"""
    noise = SeededNoise("codes", number_of(rows), run.device)
    codes, labels = given_codes(run, rows, noise)
    if run.prior:
        known = dict(given=codes.masked_fill(run.free.to(codes.device), -1)) if run.sources else {}
        codes = run.prior.sample(noise, labels, **known, **arguments_of(run.config, run.prior.sample))
    return codes, labels


def sampler(denoise, correct, noise, randn_like):
    """Alg. 3, lines 7-15: the sampler that the settings name. correct: the denoiser of low noise. -> x, like noise"""
    levels = dict(num_steps=num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    if correct_steps:
        return corrected(denoise, correct, noise, correct_below, correct_steps, **levels, randn_like=randn_like)
    if correct_with:
        denoise = within((correct_below, math.inf), denoise, correct)
    if ode != "edm":
        times = torch.linspace(1 / (1 + sigma_max), 1, num_steps + 1, dtype=torch.float64)
        return flow(denoise, noise, times, second_order=ode == "flow-heun")
    of_kind = partial(restart, restarts=restarts, gamma=gamma) if restarts else partial(heun, S_churn=S_churn)
    return of_kind(denoise, noise, **levels, S_min=S_min, S_max=S_max, S_noise=S_noise, randn_like=randn_like)


def evaluations():
    """-> how often the sampler evaluates the denoiser for an image, counted; D(z) and D(null) are two"""
    counts = []

    def count(number):
        return lambda x, sigma: counts.append(number) or x

    inside = count(2 if guidance != 1 else 1)
    sampler(within((guidance_min, guidance_max), inside, count(1)), count(1), torch.zeros(1), torch.zeros_like)
    return sum(counts)


def images_of(run, seeds, codes, labels):
    """-> images uint8 (B, H, W, C) of these codes (B, m) and labels (B,)"""
    noise = SeededNoise("images", seeds, run.device)
    c = labels if run.model.label_dim else None
    denoise = denoiser(run.model, c, codes, guidance, run.autocast, (guidance_min, guidance_max))
    correct = run.correct and denoiser(run.correct, c, codes, autocast=run.autocast)
    x = sampler(denoise, correct, run.model.noise(noise), noise.randn_like)
    require(x.isfinite().all(), "the images are not finite: is a setting of the sampler, or guidance, far too large?")
    return data.to_uint8(x, run.vae)


# ----------------------------------------------------------------------------------------------------
# from the settings to a run


def check(config):
    """Raises UserError for impossible settings, and for settings that contradict each other."""
    for setting in ("num_images", "batch_size", "per_code", "sedd_steps", "num_steps", "sigma_min", "sigma_max", "rho"):
        require(0 < config[setting] < math.inf, f"{setting} must be positive and finite, not {config[setting]}")
    require(min(temperature, S_churn, gamma, seed) >= 0, "temperature, S_churn, gamma and seed can't be negative")
    require(sigma_min < sigma_max, f"sigma_min {sigma_min} must be below sigma_max {sigma_max}")
    require(0 <= guidance_min < guidance_max, f"guidance acts from guidance_min {guidance_min} up to "
            f"guidance_max {guidance_max}: 0 <= guidance_min < guidance_max is wanted")
    require(guidance != 1 or (guidance_min, guidance_max) == (0, math.inf),
            "guidance_min and guidance_max bound the noise levels of guidance: say --guidance= too")
    require(math.isfinite(guidance) and math.isfinite(temperature), "guidance and temperature must be finite")
    require(Path(name).name == name and name.strip("."),
            f"--name={name} names the two files in out_dir: it can't have folders")
    first = [f"--{setting}" for setting in ("code", "encode", "prompt", "prompt_file") if config[setting]]
    require(len(first) < 2, f"{' and '.join(first)} both give codes: choose one")
    require(first or not compose, "--compose mixes two codes: give the first by --code, --encode or --prompt")
    require(code or encode or not free, "--free names positions of a code: give one by --code or --encode")
    require(text_order in ("low-confidence", "random"), f"--text_order is low-confidence or random, not {text_order}")
    require(min(text_steps, text_block) >= 0 and math.isfinite(text_guidance),
            "text_steps and text_block can't be negative, and text_guidance must be finite")
    prior = config["prior"]
    require(prior in PRIORS, f"--prior is {' or '.join(PRIORS)}, not {prior}")
    require(sedd_sampler in ("first-hitting", "analytic", "euler"),
            "--sedd_sampler is first-hitting, analytic or euler")
    require(0 <= eta < 1, f"eta is a probability below 1, not {eta}")
    require(0 <= t0 < t1 <= 1, f"remasking goes from t1 {t1} down to t0 {t0}: 0 <= t0 < t1 <= 1 is wanted")
    networks = {f"--prior={kind}": network for kind, network in PRIORS.items()} | {"--prompt": TextModel}
    takes = inspect.signature(networks["--prompt" if prompt or prompt_file else f"--prior={prior}"].sample).parameters
    require("given" in takes or not free, f"--free asks the prior for a part of a code: --prior={prior} draws it whole")
    for kind, network in networks.items():
        for setting, parameter in inspect.signature(network.sample).parameters.items():
            require(setting in takes or config.get(setting, parameter.default) == parameter.default,
                    f"{setting} is for {kind}")
    require(eta == 0 or sedd_sampler != "first-hitting",
            "eta > 0 masks tokens again at every step: say --sedd_sampler=analytic, since first-hitting has no steps")
    require(not (restarts and S_churn), "S_churn is Heun's churn: the churn of restarts is gamma")
    require(restarts or not gamma, "gamma is the churn of restarts: there are none")
    require(ode in ("edm", "flow-heun", "flow-euler"), f"--ode is edm, flow-heun or flow-euler, not {ode}")
    require(ode == "edm" or not (restarts or S_churn), f"churn and restarts are EDM's: they don't go with --ode={ode}")
    require(ode == "edm" or is_default(globals(), "sigma_min") and is_default(globals(), "rho"),
            f"sigma_min and rho place EDM's noise levels: --ode={ode} has equal steps of time, down to 0")
    require(correct_with or not correct_steps and is_default(globals(), "correct_below"),
            "correct_steps and correct_below are of another model: name it by --correct_with=")
    require(not correct_with or correct_steps >= 0 and sigma_min < correct_below < sigma_max,
            f"correct_steps {correct_steps} can't be negative, and correct_below {correct_below} must be above "
            f"sigma_min {sigma_min} and below sigma_max {sigma_max}")
    require(not correct_steps or ode == "edm" and not (restarts or S_churn),
            "--correct_steps follow Heun's method without churn, restarts or another --ode")
    require(not checkpoint or Path(checkpoint).is_file(), f"--checkpoint={checkpoint}: there is no such file")


def source_of(setting, given, run, stage1):
    """A value of --code, --encode or --compose, or prompts -> a source, as in codes.py; its code or checksum; images it
    reads, and their order"""
    if setting == "prompts":
        require(run.class_label < 0 and not random_labels,
                "a prompt says what to draw: leave class_label and random_labels out")
        each = per_code * (4 if compose else min(per_code, 2))
        if num_images <= each * (len(given) - 1):
            say(f"images of {-(-num_images // each)} of {len(given)} prompts: --num_images={each * len(given)} has all")
        text, tokenizer = load_text(init_from or out_dir, run.device, stage1, checkpoint)
        source = of_prompts(given, lambda numbers: turn(numbers) % len(given), text, tokenizer,
                            arguments_of(run.config, text.sample))
        return source, (given, weights_checksum(text.state_dict())), (None, None)
    if setting == "compose" and re.fullmatch(r"\(?[\d\s,]+\)?", given):
        given = tuple(map(int, re.findall(r"\d+", given)))
    if isinstance(given, tuple):
        return by_hand(given, run.model, setting), given, (None, None)
    made = stage1.get("made") or {}  # prepare image files in the way of the encoder's training images
    images, labels, order = data.read_images(given, run.model.img_shape, exif=exif or made.get("exif", False),
                                             transform=made.get("transform") or "center-crop")
    if given == stage1["config"]["dataset"]:
        order = np.concatenate(data.split(len(images), stage1["config"]["held_out"]))  # training images first
    if setting == "compose" and given == encode:
        order = np.roll(order, 1)  # the same images: shift by one so that the pairs differ
    if not run.model.label_dim or run.class_label >= 0:
        labels = None
    else:
        classes = run.model.label_dim
        require(labels is not None,
                f"{given} has no class labels: say --class_label=, a class for all images "
                "(a prepared data set has labels, and so has dataset.json)")
        require(0 <= labels.min() and labels.max() < classes,
                f"{given} has classes {labels.min()} ... {labels.max()}: this model has {classes}, 0 ... {classes - 1}")
    return of_images(images, labels, order, run.model), data.data_checksum(images, labels), (images, order)


def load_correction(run, stage1):
    """-> the model that --correct_with names, and the CRC-32 of its weights. Raises UserError if it does not fit."""
    correct, checkpoint = load_stage1(correct_with, run.device)
    here, there = (dict(images=model.x_shape, classes=model.label_dim, pfgm_D=model.pfgm_D,
                        autoencoder=state["config"].get("vae_identity"), process=(OLDER | state["config"])["process"])
                   | {f"class {i}": name for i, name in enumerate(classes_of(state))}
                   for model, state in ((run.model, stage1), (correct, checkpoint)))
    different = [f"{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]
    require(not different, f"--correct_with={correct_with} is no model to go on with: {', '.join(different[:3])}")
    if checkpoint["config"].get("data_identity") != stage1["config"].get("data_identity"):
        say(f"{correct_with} was trained on other images, {checkpoint['config']['dataset']} as it was then")
    checksum = weights_checksum(checkpoint["ema"])
    require(not correct.num_latents or checksum == run.checksum,
            f"--correct_with={correct_with} has discrete latents of its own: name a model without them (num_latents=0)")
    return correct, checksum


def setup(config):
    """The networks, and where codes come from -> run, a namespace of what the functions above need

    config: the settings, as `configure` returns them. Raises UserError for settings that don't fit.
    """
    folder = init_from or out_dir
    if prior == "auto":
        config["prior"] = prior_in(folder)
    check(config)
    nfe = evaluations()
    rank, world, device = start_processes(config["device"])
    run = SimpleNamespace(config=config, rank=rank, world=world, device=device, nfe=nfe,
                          autocast=set_precision(precision, device))
    run.model, stage1 = load_stage1(folder, device, checkpoint)
    run.checksum = weights_checksum(stage1["ema"])
    require(run.model.pfgm_D == math.inf or not (S_churn or restarts or correct_steps),
            "S_churn, restarts and correct_steps add Gaussian noise, and this model's is PFGM++'s: leave them out")
    run.correct, correction = load_correction(run, stage1) if correct_with else (None, None)
    run.vae, run.made = load_vae(stage1, device), stage1.get("made")  # the second: how the training images were made
    run.class_label = class_number(class_label, classes_of(stage1))
    require(run.class_label < 0 or not random_labels,
            "--class_label asks for one class, --random_labels for all: choose one")
    run.prompts = read_prompts(prompt, prompt_file) if prompt or prompt_file else []
    require(run.model.num_latents or not (code or encode or run.prompts or guidance != 1),
            "this model has no discrete latents (num_latents=0): --code, --encode, --prompt and --guidance need them")
    given = dict(code=code, encode=encode, prompts=run.prompts, compose=compose)
    sources = [source_of(setting, value, run, stage1) for setting, value in given.items() if value]
    run.sources, identities, run.read = zip(*sources) if sources else ((), (), ())
    m = run.model.num_latents
    require(all(0 <= i < m for i in free), f"--free takes positions 0 ... {m - 1} of a code, not {free}")
    run.free = torch.tensor([i in free or code[i:i + 1] == (-1,) for i in range(m)], dtype=torch.bool)
    if config["prior"] == "ar":
        require_prefix(~run.free[None])
    needs_prior = m and (not sources or run.free.any())
    require(needs_prior or is_default(globals(), "prior"), "--prior= draws no part of these codes: leave it out")
    run.prior = load_prior(folder, config["prior"], device, stage1, checkpoint) if needs_prior else None
    # all that the images depend on: an interrupted run continues only if this is the same
    run.made_with = json.dumps({**config, "out_dir": "", "init_from": "", "checkpoint": "", "device": "",
                                "correct_with": correction, "given": identities, "stage1": run.checksum,
                                "prior_net": run.prior and weights_checksum(run.prior.state_dict())})
    return run


# ----------------------------------------------------------------------------------------------------
# the run


def open_parts(run, parts):
    """Process 0 makes the folder for the batches, one file each, or checks an interrupted run's."""
    settings = parts / "settings.json"
    if not any(parts.glob("*.npz")):
        with atomic(settings) as f:
            f.write(run.made_with.encode())
    require(settings.is_file() and settings.read_bytes() == run.made_with.encode(),
            f"{parts} holds an unfinished run with other settings: delete it, start that run again to finish it, "
            "or choose another --name")


def beside_what_was_read(run, images):
    """-> images (N, H, W, C) with, before those of each code, the image that it was read from; a blank before others"""
    rows, shown = (seed + np.arange(len(images))) // per_code, []
    for row in np.unique(rows):
        number, turn = divmod(row, 4) if compose else (row, 0)
        read, order = run.read[turn] if turn < len(run.read) else (None, None)
        shown.append(images[:1] * 0 + 255 if read is None else read[order[number % len(order)]][None])
        shown.append(images[rows == row])
    return np.concatenate(shown)


def join_parts(run, parts, files, target):
    """Turns the batches into the .npz, the grid and the folder of PNG files, and removes them."""
    shown = np.concatenate([np.load(file)["images"] for file in files[:-(-256 // batch_size)]])[:256]
    columns = 2 * per_code if 1 < per_code <= 16 else math.isqrt(len(shown))
    if encode and 1 < per_code <= 16:  # the images that were encoded stand before what is made of their codes
        shown, columns = beside_what_was_read(run, shown), columns + 2
    merge_npz(files, f"{target}.npz", **{"made": json.dumps(run.made)} if run.made else {})
    if png:
        save_pngs(files, target)
    save_grid(shown, f"{target}.png", columns)
    for file in files:  # settings.json goes last: after a power cut, the run can continue from what is left
        file.unlink()
    shutil.rmtree(parts)


def main(argv=()):
    config = configure(globals(), argv)
    require("--prompt=" not in argv, "--prompt= is empty: say what to draw")
    run = setup(config)
    with alone(f"{out_dir}/{name}"):
        sample(run)
    leave_processes()


def sample(run):
    """Alg. 3 for all images, a batch at a time, in each process its share of the batches."""
    target, parts = Path(f"{out_dir}/{name}"), Path(f"{out_dir}/{name}.parts")
    if run.rank == 0:
        open_parts(run, parts)
    if png:
        require_pngs_alone(target, range(seed, seed + num_images))
    files = {start: parts / f"{start:09d}.npz" for start in range(0, num_images, batch_size)}
    missing = [(start, file) for start, file in files.items() if not is_whole_npz(file)]
    barrier()  # until all processes have looked
    if run.rank == 0:
        print(f"{num_images:,} images, {run.nfe} evaluations each"
              + ", D(z) and D(null) in one batch" * (guidance != 1))
        if run.prior:
            prior = run.config["prior"]
            steps = run.model.num_latents if sedd_sampler == "first-hitting" else sedd_steps
            steps = {"rdm": DDIM_STEPS, "diffusion": EVALUATIONS}.get(prior, steps)
            print(f"codes of the prior {prior}, {steps} evaluations each" + f", by {sedd_sampler}" * (prior == "sedd"))
    seconds, made = {"codes": 0.0, "images": 0.0}, np.zeros(2, int)
    for start, file in progress(missing[run.rank::run.world], unit="batch", disable=run.rank > 0):
        seeds = seed + np.arange(start, min(start + batch_size, num_images))
        rows, row_of = np.unique(seeds // per_code, return_inverse=True)
        began = time.perf_counter()
        codes, labels = (t.cpu()[row_of].to(run.device) for t in codes_of(run, rows))
        seconds["codes"] += time.perf_counter() - began
        began = time.perf_counter()
        images = images_of(run, seeds, codes, labels)
        elapsed = time.perf_counter() - began
        seconds["images"] += elapsed
        made += len(rows), len(seeds)
        with atomic(file) as f:
            numbers = turn(number_of(rows))[row_of]
            prompts = {"prompts": np.array(run.prompts)[numbers % len(run.prompts)]} if run.prompts else {}
            np.savez(f, images=images, labels=labels.cpu().numpy(), codes=codes.cpu().numpy(), seeds=seeds, **prompts,
                     nfe=np.full(len(seeds), run.nfe), seconds=np.full(len(seeds), elapsed / len(seeds), np.float32))
    barrier()
    if run.rank == 0:
        join_parts(run, parts, [*files.values()], target)
        print(f"{made[0]:,} codes in {seconds['codes']:.2f} s, {made[1]:,} images in {seconds['images']:.2f} s"
              + " (the share of process 0)" * (run.world > 1))
        print(f"{target}.png and {target}.npz are ready" + f", and {target}/ with a PNG file for each image" * png)


if __name__ == "__main__":
    main(sys.argv[1:])
