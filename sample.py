"""
Samples of a trained DisCo-Diff (Alg. 3): codes from the prior, then the denoiser's ODE.

    python sample.py                                   # out/samples.png and out/samples.npz
    python sample.py --init_from=pretrained            # the same without training
    python sample.py --checkpoint=out/stage1-000100000.pt --encode=fashion-mnist-10k    # of an earlier stage 1
    python sample.py --guidance=2 --class_label=Bag    # stronger latents (App. B), one class, by its name or number
    python sample.py --png=True                        # and a folder of PNG files, out/samples/
    python sample.py --encode=fashion-mnist-10k        # the codes of these images, by the encoder
    python sample.py --code=3,1,4,1,5,9,2,6            # a code by hand
    python sample.py --encode=a.png --compose=b.png --class_label=4   # codes of both, mixed
    python sample.py --prior=sedd --sedd_sampler=analytic --eta=0.02  # the other prior, remasking
    python sample.py config/restart39.py               # the Restart sampler
    torchrun --nproc_per_node=8 sample.py --num_images=50000 --per_code=1 --batch_size=256

Image i comes from the seed `seed + i` alone, whatever the batch size and the number of processes (to rounding). Writes
out_dir/NAME.png, a grid, and out_dir/NAME.npz with images uint8 (N, H, W, C), labels int64 (N,) (-1: none),
codes int64 (N, m), seeds int64 (N,), nfe int64 (N,), the denoiser's evaluations for the image (guidance's D(z) and D(null)
are two), and seconds float32 (N,), its share of its batch's time. An interrupted run continues when it is started again.
"""

import contextlib
import json
import math
import re
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from configurator import UserError, barrier, configure, leave_processes, require, start_processes
from model import DisCoDiff, Prior, SEDD, analytic_probs, denoise_probs, draw_codes, euler_probs, seed_of
from run import has_float64, hold, progress, set_precision

# run
out_dir = "out"  # where the samples go, and the checkpoints are
init_from = ""  # or another folder that has the checkpoints; "pretrained": those that come with the repository
checkpoint = ""  # a file in place of their stage1.pt: a snapshot, such as out/stage1-000100000.pt
name = "samples"  # of the two files
device = "auto"  # "cpu", "cuda", "cuda:1", "mps"; auto: a GPU of NVIDIA's if there is one
precision = "bf16"  # of images on a GPU: "bf16", "fp16", "tf32", "fp32"; elsewhere always float32
num_images = 160
batch_size = 80  # images that one process makes at once
seed = 0
png = False  # also a folder out_dir/NAME with a PNG file for each image, and dataset.json, the labels in EDM's form
# conditions: `per_code` images in a row share one code; as in Fig. 2b, two codes stand side by side for a class
per_code = 8
class_label = ""  # one class for all, its name or number; "": the classes in turn
random_labels = False  # classes at random, as in EDM's protocol; in turn, they are balanced, which flatters FID a little
code = ()  # a code by hand, m numbers in 0 ... k - 1
encode = ""  # codes of these images: an image file, a folder of them, an .npz, or a prepared data set, training images first
exif = False  # turn image files for --encode and --compose as their EXIF orientation says: photographs
compose = ""  # a second code, or images: of four rows in turn, two have the codes of the two, two are mixtures of both
guidance = 1.0  # w in D~ = w D(z) + (1 - w) D(null), App. B; Table 3 counts cfg = w - 1
# codes: which prior, and its sampler
prior = "ar"  # or "sedd"
temperature = 1.0  # of "ar"
sedd_sampler = "first-hitting"  # m evaluations; "analytic" or "euler" (one and the same for this noise): sedd_steps
sedd_steps = 128
eta = 0.0  # probability of masking a token again, in each of these steps from time t1 to t0 (DLC Eq. 4; 0.01, 0.02)
t0 = 0.3
t1 = 0.55
# images: EDM's sampler
num_steps = 18
sigma_min = 0.002
sigma_max = 80.0
rho = 7.0
S_churn = 0.0  # 0: the ODE, by Heun's method
S_min = 0.0
S_max = math.inf
S_noise = 1.0
restarts = ()  # (N_restart, K, t_min, t_max), ...: Restart sampling, as in config/restart*.py
gamma = 0.0  # churn of the restarts' steps: from t by way of t (1 + gamma)

# ----------------------------------------------------------------------------------------------------
# samplers: functions of a denoiser, free of networks and images


def noise_levels(num_steps, sigma_min, sigma_max, rho, dtype=torch.float64):
    """EDM Eq. 5: from sigma_max down to sigma_min. (num_steps,) of this precision"""
    i = torch.arange(num_steps, dtype=dtype) / max(num_steps - 1, 1)
    root = sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    return root.double().pow(rho).to(dtype)  # rounded once, so that float32 levels are the same on every machine


def heun_step(denoise, x, t, t_next, gamma=0, S_noise=1, randn_like=torch.randn_like):
    """From noise level t to t_next, by way of t (1 + gamma) (EDM Alg. 2, lines 4-11). -> x at t_next"""
    t_hat = t + gamma * t
    if gamma > 0:
        x = x + (t_hat ** 2 - t ** 2).sqrt() * S_noise * randn_like(x)
    d = (x - denoise(x, t_hat.double())) / t_hat
    x_next = x + (t_next - t_hat) * d  # Euler
    if t_next > 0:  # second-order correction
        d_next = (x_next - denoise(x_next, t_next.double())) / t_next
        x_next = x + (t_next - t_hat) * (d + d_next) / 2
    return x_next


def heun(denoise, latents, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7,
         S_churn=0, S_min=0, S_max=math.inf, S_noise=1, randn_like=torch.randn_like):
    """EDM's sampler with stochastic churn (Karras et al. 2022, Alg. 2); S_churn = 0 is Heun's method (Alg. 1).

    denoise(x, sigma): D; x is float64 and shaped like latents, sigma a float64 scalar tensor.
    latents: N(0, 1) noise of any shape. num_steps: N >= 1; 2 N - 1 evaluations.
    S_churn, S_min, S_max, S_noise: amount of churn, its range of sigma, and the scale of its noise, which
    randn_like(x) draws. -> the sample, float64, shaped like latents.
    """
    t = torch.cat([noise_levels(num_steps, sigma_min, sigma_max, rho), torch.zeros(1)]).to(latents.device)  # t_N = 0
    x = latents.double() * t[0]
    gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
    for i in range(num_steps):
        x = heun_step(denoise, x, t[i], t[i + 1], gamma if S_min <= t[i] <= S_max else 0, S_noise, randn_like)
    return x


def restart_loops(num_steps, restarts, sigma_min=0.002, sigma_max=80, rho=7):
    """-> num_steps + 1 lists: on arrival at main noise level i, x goes up to s[0] and down again to s[-1], for each s
    in the list i. Raises UserError for restarts that these noise levels have no place for.
    """
    t = noise_levels(num_steps, sigma_min, sigma_max, rho)
    loops = [[] for _ in range(num_steps + 1)]
    for interval in restarts:
        require(isinstance(interval, (tuple, list)) and [*map(type, interval[:2])] == [int, int] and len(interval) == 4
                and all(isinstance(v, (int, float)) for v in interval),
                f"restarts takes (N_restart, K, t_min, t_max), ..., the first two whole numbers; not {interval}")
        n, K, t_min, t_max = interval
        require(n >= 2 and K >= 1 and sigma_min <= t_min < t_max <= sigma_max and num_steps > 1,
                f"restarts has {interval}: N_restart and num_steps are 2 or more, K is 1 or more, and "
                f"sigma_min {sigma_min} <= t_min < t_max <= sigma_max {sigma_max}")
        i = int((t[1:] - t_min).abs().argmin()) + 1
        require(t[i] < t_max, f"restarts has {interval}: {t[i]:.3g} is the noise level nearest to t_min, and not below t_max")
        # in float32, as in the authors' program, so that the results are the same to 1e-9
        loops[i] += [noise_levels(n, t[i].item(), t_max, rho, torch.float32)] * K
    return loops


def restart(denoise, latents, num_steps, restarts, sigma_min=0.002, sigma_max=80, rho=7,
            gamma=0, S_min=0, S_max=math.inf, S_noise=1, randn_like=torch.randn_like):
    """Restart sampling (Xu et al. 2023a, Alg. 1; DisCo-Diff App. D.2): Heun's method that goes back up, and down again.

    restarts: (N_restart, K, t_min, t_max), ...: on arrival at the noise level nearest to t_min, K times: noise takes
    x up to t_max, and Heun's method down again on N_restart noise levels. gamma, in [S_min, S_max], is the churn of
    these steps (the main ones have none), and S_noise scales this noise and that of the way up; the rest as in `heun`.
    2 N - 1 + sum of 2 K (N_restart - 1) evaluations. Raises UserError as `restart_loops` does.
    """
    t = torch.cat([noise_levels(num_steps, sigma_min, sigma_max, rho), torch.zeros(1)]).to(latents.device)
    x = latents.double() * t[0]
    for i, loops in enumerate(restart_loops(num_steps, restarts, sigma_min, sigma_max, rho)[1:]):
        x = heun_step(denoise, x, t[i], t[i + 1])
        for s in loops:
            s = s.to(x.device)
            x = x + S_noise * randn_like(x) * (s[0] ** 2 - s[-1] ** 2).sqrt()
            for s_i, s_next in zip(s, s[1:]):
                x = heun_step(denoise, x, s_i, s_next, gamma if S_min <= s_i <= S_max else 0, S_noise, randn_like)
    return x


# ----------------------------------------------------------------------------------------------------
# samplers of discrete diffusion: functions of score(x, t) -> log-scores (B, m, V + 1), for x int64 (B, m), mask = V,
# and times t float64 (B,). They start from x, all mask; gumbel(*shape) draws Gumbel(0, 1), rand(*shape) U(0, 1]
# noise (B, *shape).


@torch.no_grad()
def tau_leaping(score, x, num_steps, gumbel, probs=analytic_probs, eta=0.0, t0=0.3, t1=0.55):
    """SEDD-absorb (Lou et al. 2024) from t = 1 to 0 in num_steps >= 1 evaluations, the last of which leaves no mask;
    probs: those of a step.

    eta > 0 adds remasking (DLC Eq. 4): while t0 < t < t1, a token that is there is masked again with
    probability eta, or as much of it as the schedule has room for. -> codes (B, m)
    """
    def times(t):
        return torch.full((len(x),), t, dtype=torch.float64, device=x.device)

    for i in reversed(range(1, num_steps)):
        t, s = (i + 1) / num_steps, i / num_steps
        log_score = score(x, times(t))
        # with scores of the right sum, P(masked at t) = t. With `again` of the others masked too, the masked ones go on
        # to s - again (1 - t), so that P(masked at s) = s
        again = min(eta, s / (1 - t)) if t0 < t < t1 else 0
        p = probs(log_score, x, times(t), times(s - again * (1 - t)))
        if again:
            seen = x != p.shape[2] - 1
            p[seen] *= 1 - again
            p[..., -1] += again * seen
        x = draw_codes(p.clamp_min(0).log(), gumbel(*p.shape[1:]))
    t = times(1 / num_steps)
    p = denoise_probs(score(x, t), x, t)
    return draw_codes(p.log(), gumbel(*p.shape[1:]))


@torch.no_grad()
def first_hitting(score, x, rand, gumbel):
    """The limit of `tau_leaping` for infinitely many steps, in m evaluations (Zheng et al. 2024).

    P(masked at t) = t, so that each token unmasks at a time of its own, uniform on (0, 1). The latest comes first;
    going from one to the next is the same as t <- t u^(1/n) for n masked tokens, and a position at random. Of wrong
    scores it takes what they say of the token, not what their sum says of the time. -> codes (B, m)
    """
    x, rows = x.clone(), torch.arange(len(x), device=x.device)
    times, order = rand(x.shape[1]).sort(dim=1, descending=True)
    for t, i in zip(times.T, order.T):
        log_p = score(x, t)[rows, i, :-1]
        x[rows, i] = draw_codes(log_p, gumbel(log_p.shape[1]))
    return x


# ----------------------------------------------------------------------------------------------------
# a network as a denoiser, and noise that depends on seeds


def denoiser(model, labels=None, codes=None, guidance=1.0, autocast=contextlib.nullcontext()):
    """-> denoise(x, sigma) for the samplers: `model` with these class labels (B,) and hard codes (B, m), run under `autocast`.

    x is on the CPU where the network's device has no float64. What depends on the codes alone is computed here, once.
    Guidance (App. B) evaluates both terms in one batch; guidance = 1 is the plain conditional model, and costs one evaluation.
    """
    keys_values = model.condition(codes) if model.num_latents else ()
    place = next(model.parameters()).device
    copies = 1
    if guidance != 1:
        copies = 2
        nulls = model.condition(codes[:1], drop=torch.ones(1, dtype=torch.bool, device=codes.device))
        keys_values = [[torch.cat([t, t0.expand_as(t)]) for t, t0 in zip(kv, kv0)] for kv, kv0 in zip(keys_values, nulls)]
        labels = None if labels is None else labels.repeat(2)

    def denoise(x, sigma):
        home = x.device
        x, sigma = x.float().to(place).repeat(copies, 1, 1, 1), sigma.float().to(place)
        with torch.no_grad(), autocast:
            D = model.denoise(x, sigma.expand(len(x)), labels, keys_values).to(home)
        if copies == 1:
            return D
        D, D_null = D.chunk(2)
        return guidance * D + (1 - guidance) * D_null

    return denoise


class SeededNoise:
    """Noise whose row i depends on the purpose and seeds[i] alone, drawn on the CPU: the same everywhere. It is float64;
    where `device` has no float64, the noise and all that the samplers compute stay on the CPU.
    """

    def __init__(self, purpose, seeds, device):
        self.device = device if has_float64(device) else "cpu"
        self.generators = [np.random.default_rng(seed_of(purpose, int(s))) for s in seeds]

    def randn(self, *shape):
        return torch.from_numpy(np.stack([g.standard_normal(shape) for g in self.generators])).to(self.device)

    def randn_like(self, x):
        return self.randn(*x.shape[1:])

    def rand(self, *shape):
        return 1 - torch.from_numpy(np.stack([g.random(shape) for g in self.generators])).to(self.device)

    def gumbel(self, *shape):
        return torch.from_numpy(np.stack([g.gumbel(size=shape) for g in self.generators])).to(self.device)


PRIORS = {"ar": Prior, "sedd": SEDD}


def load_stage1(out_dir, device, snapshot=""):
    """-> the trained DisCoDiff (its moving average, in eval mode) of a run's folder, or of a snapshot, and its checkpoint."""
    checkpoint = data.load_checkpoint(snapshot or f"{out_dir}/stage1.pt", "train_stage1")
    return build(DisCoDiff, checkpoint, checkpoint["ema"], device), checkpoint


def load_prior(out_dir, kind, device, stage1, snapshot=""):
    """-> the trained Prior ("ar") or SEDD ("sedd"; its moving average) of a run's folder, in eval mode.

    stage1: its checkpoint, or that of the file `snapshot`. Raises UserError if the prior is of the other kind, or of other
    codes.
    """
    path = f"{out_dir}/prior_{kind}.pt"
    mend = f"run `python train_prior.py --prior={kind} --out_dir={out_dir} --overwrite=True`"
    if snapshot:
        mend = (f"give codes by --code or --encode, which need no prior; or copy {snapshot} into a folder of its own as "
                "stage1.pt, and train a prior there")
        require(Path(path).is_file(), f"there is no prior {path}: {mend}")
    checkpoint = data.load_checkpoint(path, "train_prior", f" --prior={kind}")
    have = checkpoint["config"].get("prior")
    require(have == kind, f"{path} holds a prior of the kind {have!r}, not {kind!r}: was another file copied over it?")
    require(checkpoint["encoder"] == data.fingerprint(stage1["ema"]),
            f"{path} was trained on codes of another stage 1: {mend}")
    have, want = [[a.get(key) for key in ("num_latents", "codebook_size", "label_dim")]
                  for a in (checkpoint["model_args"], stage1["model_args"])]
    require(have == want, f"{path} has m, k, classes = {have}, stage 1 has {want}: {mend}")
    return build(PRIORS[kind], checkpoint, checkpoint["ema"], device)


def build(network, checkpoint, state, device):
    try:
        model = network(**checkpoint["model_args"])
        model.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint is of another architecture than this {network.__name__}: "
                        f"{str(error).splitlines()[-1].strip()}") from None
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------
# the run


def codes_of_prior(prior, noise, labels=None, temperature=1.0, sampler="first-hitting", **leaping):
    """A code (B, m) for each generator of `noise`, by a Prior with this temperature or a SEDD with this sampler.

    labels: (B,) int64, -1 for none; leaping: num_steps, eta, t0 and t1 of `tau_leaping`.
    """
    m, k, place = prior.num_latents, prior.codebook_size, next(prior.parameters()).device
    wide = torch.float64 if has_float64(place) else torch.float32
    labels = None if labels is None else labels.to(place)
    if isinstance(prior, Prior):
        return prior.sample(noise.gumbel(m, k).to(place, wide), labels, temperature).to(noise.device)

    def score(x, t):
        return prior(x.to(place), t.to(place, wide), labels).to(noise.device)

    masks = torch.full((len(noise.generators), m), k, device=noise.device)
    if sampler == "first-hitting":
        return first_hitting(score, masks, noise.rand, noise.gumbel)
    probs = {"analytic": analytic_probs, "euler": euler_probs}[sampler]
    return tau_leaping(score, masks, gumbel=noise.gumbel, probs=probs, **leaping)


def read_source(setting, source, model, stage1):
    """What --code, --encode or --compose names, checked: a code, a tuple of m numbers; or images, labels (None where they
    are not to be used) and the order to take them in. The second of two data sets that are one starts with its last image."""
    m, k = model.num_latents, model.codebook_size
    if setting == "compose" and re.fullmatch(r"\(?[\d\s,]+\)?", source):
        source = tuple(map(int, re.findall(r"\d+", source)))
    if isinstance(source, tuple):
        require(len(source) == m and all(type(c) is int and 0 <= c < k for c in source),
                f"--{setting} takes {m} numbers in 0 ... {k - 1}, not {source}")
        return source
    made = stage1.get("made") or {}  # images for an encoder are brought to its size as those that it was trained on
    images, labels, order = data.read_images(source, model.img_shape, exif=exif or made.get("exif", False),
                                             transform=made.get("transform") or "center-crop")
    if source == stage1["config"]["dataset"]:
        order = np.concatenate(data.split(len(images), stage1["config"]["held_out"]))  # those that it was trained on first
    if model.label_dim and class_label < 0:
        require(labels is not None, f"{source} has no class labels: say --class_label=, a class for all images (a "
                "prepared data set has labels, and so has dataset.json)")
        require(0 <= labels.min() and labels.max() < model.label_dim, f"{source} has classes {labels.min()} ... "
                f"{labels.max()}: this model has {model.label_dim}, 0 ... {model.label_dim - 1}")
    else:
        labels = None
    return images, labels, np.roll(order, 1) if setting == "compose" and source == encode else order


def given_conditions(source, which, model, noise):
    """Codes (R, m), and class labels (R,) or None, of a source's items with these numbers (R,), taken modulo their count."""
    if isinstance(source[0], int):
        return torch.tensor(source, device=noise.device).expand(len(which), -1), None
    images, labels, order = source
    chosen = order[which % len(order)]
    with torch.no_grad():
        logits = model.encoder(data.to_float(images[chosen], next(model.parameters()).device))
    codes = draw_codes(logits.to(noise.device), noise.gumbel(model.num_latents, model.codebook_size))
    return codes, None if labels is None else torch.from_numpy(labels[chosen]).to(noise.device)


def row_conditions(rows, model, sources, prior, device):
    """Codes (R, m) and class labels (R,) of the rows with these numbers, each from its number alone.

    sources: [] for the prior's codes, [one], or two to compose: of four rows in turn, two have the codes of the
    two, and in the others each position comes from the one or the other (DLC sec. 5.2).
    """
    which = rows // 4 if len(sources) == 2 else rows
    noise = SeededNoise("codes", which, device)
    device = noise.device
    if not model.label_dim or class_label >= 0:
        labels = torch.full((len(rows),), class_label, device=device)
    elif random_labels:
        labels = (model.label_dim * (1 - SeededNoise("labels", which, device).rand())).long()
    else:  # the classes in turn
        in_turn = which if len(sources) == 2 or per_code == 1 else rows // 2
        labels = torch.from_numpy(in_turn % model.label_dim).to(device)
    if not model.num_latents:
        return torch.empty(len(rows), 0, dtype=torch.int64, device=device), labels
    if not sources:
        return codes_of_prior(prior, noise, labels, temperature, sedd_sampler, num_steps=sedd_steps, eta=eta, t0=t0, t1=t1), labels
    codes, c = zip(*(given_conditions(source, which, model, noise) for source in sources))
    c = [labels if own is None else own for own in c]
    if len(sources) == 1:
        return codes[0], c[0]
    turn = torch.from_numpy(rows % 4).to(device)
    coins = SeededNoise("compose", rows, device).rand(model.num_latents) < 0.5
    first = torch.where(turn[:, None] < 2, turn[:, None] == 0, coins)
    return torch.where(first, *codes), torch.where(turn % 2 == 0, *c)


def class_number(label, names):
    """A class by its name or number -> its number, -1 for "". Raises UserError where there is no such class."""
    if label in names:
        return names.index(label)
    require(names or label in ("", "-1"), f"class_label {label}: this model was trained without classes")
    known = f"this model has {len(names)} classes, 0 ... {len(names) - 1}: {', '.join(names[:20])}{', ...' * (len(names) > 20)}"
    number = re.fullmatch(r"-?\d+", label or "-1")
    require(number, f"there is no class {label!r}: {known}")
    require(-1 <= int(number[0]) < len(names), f"class_label {label} is out of range: {known}")
    return int(number[0])


def main():
    global class_label
    for setting in ("num_images", "batch_size", "per_code", "sedd_steps", "num_steps", "sigma_min", "sigma_max", "rho"):
        require(0 < config[setting] < math.inf, f"{setting} must be positive and finite, not {config[setting]}")
    require(min(temperature, S_churn, gamma, seed) >= 0, "temperature, S_churn, gamma and seed can't be negative")
    require(sigma_min < sigma_max, f"sigma_min {sigma_min} must be below sigma_max {sigma_max}")
    require(math.isfinite(guidance) and math.isfinite(temperature), "guidance and temperature must be finite")
    require(Path(name).name == name and name.strip("."), f"--name={name} names the two files in out_dir: it can't have folders")
    require(not (code and encode), "--code and --encode both give codes: choose one")
    require(code or encode or not compose, "--compose mixes two codes: give the first by --code or --encode")
    require(prior in PRIORS, f"--prior is ar or sedd, not {prior}")
    require(sedd_sampler in ("first-hitting", "analytic", "euler"), "--sedd_sampler is first-hitting, analytic or euler")
    require(0 <= eta < 1, f"eta is a probability below 1, not {eta}")
    require(0 <= t0 < t1 <= 1, f"remasking goes from t1 {t1} down to t0 {t0}: 0 <= t0 < t1 <= 1 is wanted")
    require(prior == "sedd" or (sedd_sampler == "first-hitting" and eta == 0), "sedd_sampler and eta are of --prior=sedd")
    require(eta == 0 or sedd_sampler != "first-hitting", "eta > 0 masks tokens again at every step: "
            "say --sedd_sampler=analytic, since first-hitting has no steps")
    require(prior == "ar" or temperature == 1, "temperature is of --prior=ar")
    require(not (restarts and S_churn), "S_churn is Heun's churn: with restarts, gamma is theirs")
    require(restarts or not gamma, "gamma is the churn of restarts: there are none")
    loops = restart_loops(num_steps, restarts, sigma_min, sigma_max, rho)
    rank, world, place = start_processes(device)
    autocast = set_precision(precision, place)
    trained = str(data.HERE / "pretrained") if init_from == "pretrained" else init_from or out_dir
    require(not checkpoint or Path(checkpoint).is_file(), f"--checkpoint={checkpoint}: there is no such file")
    model, stage1 = load_stage1(trained, place, checkpoint)
    class_label = class_number(class_label, data.classes_of(stage1))
    require(class_label < 0 or not random_labels, "--class_label asks for one class, --random_labels for all: choose one")
    require(model.num_latents or not (code or encode or guidance != 1),
            "this model has no discrete latents (num_latents=0): --code, --encode and --guidance need them")
    sources = [read_source(setting, source, model, stage1)
               for setting, source in (("code", code), ("encode", encode), ("compose", compose)) if source]
    prior_net = load_prior(trained, prior, place, stage1, checkpoint) if model.num_latents and not sources else None

    # one file a batch; a run that was interrupted finds those that it has
    parts = Path(f"{out_dir}/{name}.parts")
    given = [source if isinstance(source[0], int) else data.identity(*source[:2]) for source in sources]
    made_with = json.dumps({**config, "out_dir": "", "init_from": "", "checkpoint": "", "device": "", "given": given,
                            "stage1": data.fingerprint(stage1["ema"]), "prior_net": prior_net and data.fingerprint(prior_net.state_dict())})
    if rank == 0:
        hold(f"{out_dir}/{name}")
        settings = parts / "settings.json"
        if not any(parts.glob("*.npz")):
            with data.atomic(settings) as f:
                f.write(made_with.encode())
        require(settings.is_file() and settings.read_bytes() == made_with.encode(), f"{parts} holds an unfinished run with "
                "other settings: delete it, start that run again to finish it, or choose another --name")
    target = Path(f"{out_dir}/{name}")
    if png:
        data.require_pngs_alone(target, range(seed, seed + num_images))
    starts = range(0, num_images, batch_size)
    missing = [start for start in starts if not data.is_whole_npz(parts / f"{start:09d}.npz")]
    barrier()
    sampler = partial(restart, restarts=restarts, gamma=gamma) if restarts else partial(heun, S_churn=S_churn)
    nfe = 2 * num_steps - 1 + sum(2 * (len(s) - 1) for levels in loops for s in levels)
    nfe *= 2 if guidance != 1 else 1
    if rank == 0:
        print(f"{num_images:,} images, {nfe} evaluations each" + ", D(z) and D(null) in one batch" * (guidance != 1))
        if prior_net:
            steps = model.num_latents if prior == "ar" or sedd_sampler == "first-hitting" else sedd_steps
            print(f"codes of the prior {prior}, {steps} evaluations each" + f", by {sedd_sampler}" * (prior == "sedd"))
    seconds, made = {"codes": 0.0, "images": 0.0}, np.zeros(2, int)
    for start in progress(missing[rank::world], unit="batch", disable=rank > 0):
        seeds = seed + np.arange(start, min(start + batch_size, num_images))
        rows, row_of = np.unique(seeds // per_code, return_inverse=True)
        began = time.perf_counter()
        row_codes, row_labels = (t.cpu() for t in row_conditions(rows, model, sources, prior_net, place))
        seconds["codes"] += time.perf_counter() - began
        began = time.perf_counter()
        codes, labels = row_codes[row_of].to(place), row_labels[row_of].to(place)
        denoise = denoiser(model, labels if model.label_dim else None, codes, guidance, autocast)
        noise = SeededNoise("images", seeds, place)
        x = sampler(denoise, noise.randn(*model.img_shape), num_steps=num_steps, sigma_min=sigma_min, sigma_max=sigma_max,
                    rho=rho, S_min=S_min, S_max=S_max, S_noise=S_noise, randn_like=noise.randn_like)
        require(x.isfinite().all(), "the images are not finite: is a setting of the sampler, or guidance, far too large?")
        images = data.to_uint8(x)
        elapsed = time.perf_counter() - began
        seconds["images"] += elapsed
        made += len(rows), len(seeds)
        with data.atomic(parts / f"{start:09d}.npz") as f:
            np.savez(f, images=images, labels=labels.cpu().numpy(), codes=codes.cpu().numpy(), seeds=seeds,
                     nfe=np.full(len(seeds), nfe), seconds=np.full(len(seeds), elapsed / len(seeds), np.float32))
    barrier()
    if rank == 0:
        files = [parts / f"{start:09d}.npz" for start in starts]
        shown = np.concatenate([np.load(file)["images"] for file in files[:-(-256 // batch_size)]])[:256]
        data.merge_npz(files, f"{target}.npz", **{"made": json.dumps(stage1["made"])} if stage1.get("made") else {})
        if png:
            data.save_pngs(files, target)
        data.save_grid(shown, f"{target}.png", 2 * per_code if 1 < per_code <= 16 else math.isqrt(len(shown)))
        for file in files:  # settings.json last: what is left after a power cut can be gone on with
            file.unlink()
        shutil.rmtree(parts)
        print(f"{made[0]:,} codes in {seconds['codes']:.2f} s, {made[1]:,} images in {seconds['images']:.2f} s"
              + (" (the share of process 0)" if world > 1 else ""))
        print(f"{target}.png and {target}.npz are ready" + f", and {target}/ with a PNG file for each image" * png)
    leave_processes()


if __name__ == "__main__":
    config = configure(globals())
    main()
