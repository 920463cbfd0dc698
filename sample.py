"""
Samples of a trained DisCo-Diff (Alg. 3): codes from the prior, then the denoiser's ODE.

    python sample.py                                   # out/samples.png and out/samples.npz
    python sample.py --guidance=2 --class_label=9      # stronger latents (App. B), one class
    python sample.py --encode=fashion-mnist-10k        # the codes of these images, by the encoder
    python sample.py --code=3,1,4,1,5,9 --per_code=16  # a code by hand
    torchrun --nproc_per_node=8 sample.py --num_images=50000 --per_code=1 --batch_size=256

Image i comes from the seed `seed + i` alone, whatever the batch size and the number of processes. Writes
out_dir/NAME.png, a grid, and out_dir/NAME.npz with images uint8 (N, H, W, C), labels int64 (N,) (-1: none),
codes int64 (N, m) and seeds int64 (N,). An interrupted run continues when it is started again.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from configurator import UserError, configure, require, start_processes
from model import DisCoDiff, Prior, draw_codes, seed_of

# run
out_dir = "out"  # where the checkpoints are, and the samples go
name = "samples"  # of the two files
device = "auto"
num_images = 160
batch_size = 80  # images that one process makes at once
seed = 0
# conditions: `per_code` images in a row share one code; as in Fig. 2b, two codes stand side by side for a class
per_code = 8
class_label = -1  # one class for all; -1: the classes in turn
code = ()  # a code by hand, m numbers in 0 ... k - 1
encode = ""  # codes of these images: an image file, a folder of them, an .npz, or a prepared data set's name
guidance = 1.0  # w in D~ = w D(z) + (1 - w) D(null), App. B; Table 3 counts cfg = w - 1
temperature = 1.0  # of the prior
# sampler: EDM's
num_steps = 18
sigma_min = 0.002
sigma_max = 80.0
rho = 7.0
S_churn = 0.0  # 0: the ODE, by Heun's method
S_min = 0.0
S_max = math.inf
S_noise = 1.0

# ----------------------------------------------------------------------------------------------------
# samplers: functions of a denoiser, free of networks and images


def heun(denoise, latents, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7,
         S_churn=0, S_min=0, S_max=math.inf, S_noise=1, randn_like=torch.randn_like):
    """EDM's sampler with stochastic churn (Karras et al. 2022, Alg. 2); S_churn = 0 is Heun's method (Alg. 1).

    denoise(x, sigma): D; x is float64 and shaped like latents, sigma a float64 scalar tensor.
    latents: N(0, 1) noise of any shape. num_steps: N >= 1; 2 N - 1 evaluations.
    S_churn, S_min, S_max, S_noise: amount of churn, its range of sigma, and the scale of its noise, which
    randn_like(x) draws. -> the sample, float64, shaped like latents.
    """
    i = torch.arange(num_steps, dtype=torch.float64, device=latents.device)
    t = (sigma_max ** (1 / rho) + i / max(num_steps - 1, 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    t = torch.cat([t, t.new_zeros(1)])  # t_N = 0
    x = latents.double() * t[0]
    for i in range(num_steps):
        # raise the noise level from t_i to t_hat
        t_hat = t[i]
        if S_churn > 0 and S_min <= t[i] <= S_max:
            t_hat = t[i] * (1 + min(S_churn / num_steps, math.sqrt(2) - 1))
            x = x + (t_hat ** 2 - t[i] ** 2).sqrt() * S_noise * randn_like(x)
        # Euler step to t_{i+1}
        d = (x - denoise(x, t_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        # second-order correction
        if i < num_steps - 1:
            d_next = (x_next - denoise(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d + d_next) / 2
        x = x_next
    return x


# ----------------------------------------------------------------------------------------------------
# a network as a denoiser, and noise that depends on seeds


def denoiser(model, labels=None, codes=None, guidance=1.0):
    """-> denoise(x, sigma) for the samplers: `model` with these class labels (B,) and hard codes (B, m).

    What depends on the codes alone is computed here, once. Guidance (App. B) evaluates both terms in one
    batch; guidance = 1 is the plain conditional model, and costs one evaluation.
    """
    keys_values = model.condition(codes) if model.num_latents else ()
    copies = 1
    if guidance != 1:
        copies = 2
        nulls = model.condition(codes[:1], drop=torch.ones(1, dtype=torch.bool, device=codes.device))
        keys_values = [[torch.cat([t, t0.expand_as(t)]) for t, t0 in zip(kv, kv0)] for kv, kv0 in zip(keys_values, nulls)]
        labels = None if labels is None else labels.repeat(2)

    def denoise(x, sigma):
        x = x.float().repeat(copies, 1, 1, 1)
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            D = model.denoise(x, sigma.expand(len(x)), labels, keys_values)
        if copies == 1:
            return D
        D, D_null = D.chunk(2)
        return guidance * D + (1 - guidance) * D_null

    return denoise


class SeededNoise:
    """Noise whose row i depends on the purpose and seeds[i] alone, drawn on the CPU: the same everywhere."""

    def __init__(self, purpose, seeds, device):
        self.device = device
        self.generators = [np.random.default_rng(seed_of(purpose, int(s))) for s in seeds]

    def randn(self, *shape):
        return torch.from_numpy(np.stack([g.standard_normal(shape) for g in self.generators])).to(self.device)

    def randn_like(self, x):
        return self.randn(*x.shape[1:])

    def gumbel(self, *shape):
        return torch.from_numpy(np.stack([g.gumbel(size=shape) for g in self.generators])).to(self.device)


def load_stage1(out_dir, device):
    """-> the trained DisCoDiff (its moving average, in eval mode) of a run's folder, and its checkpoint."""
    checkpoint = data.load_checkpoint(f"{out_dir}/stage1.pt", "train_stage1")
    return build(DisCoDiff, checkpoint, checkpoint["ema"], device), checkpoint


def load_prior(out_dir, device, stage1):
    """-> the trained Prior of a run's folder. Raises UserError if it is of other codes than `stage1`'s."""
    checkpoint = data.load_checkpoint(f"{out_dir}/prior.pt", "train_prior")
    require(checkpoint["encoder"] == data.fingerprint(stage1["ema"]),
            f"{out_dir}/prior.pt was trained on codes of another stage 1: run "
            f"`python train_prior.py --out_dir={out_dir} --overwrite=True`")
    prior = build(Prior, checkpoint, checkpoint["model"], device)
    have, want = [[a[k] for k in ("num_latents", "codebook_size", "label_dim")]
                  for a in (checkpoint["model_args"], stage1["model_args"])]
    require(have == want, f"{out_dir}/prior.pt has m, k, classes = {have}, stage 1 has {want}")
    return prior


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


def row_conditions(rows, model, given, prior, device):
    """Codes (R, m) and class labels (R,) of the rows with these numbers, each from its number alone."""
    gumbel = SeededNoise("codes", rows, device).gumbel(model.num_latents, model.codebook_size)
    if given is not None:
        images, given_labels, order = given
        chosen = order[rows % len(order)]
    if not model.label_dim:
        labels = torch.full((len(rows),), -1)
    elif class_label >= 0:
        labels = torch.full((len(rows),), class_label)
    elif given is not None:
        labels = torch.from_numpy(given_labels[chosen])
    else:  # the classes in turn
        labels = torch.from_numpy(rows // (2 if per_code > 1 else 1) % model.label_dim)
    labels = labels.to(device)
    if not model.num_latents:
        codes = torch.empty(len(rows), 0, dtype=torch.int64)
    elif code:
        codes = torch.tensor([code] * len(rows))
    elif given is not None:
        with torch.no_grad():
            codes = draw_codes(model.encoder(data.to_float(images[chosen], device)), gumbel)
    else:
        codes = prior.sample(gumbel, labels, temperature)
    return codes.to(device), labels


def main():
    for setting in ("num_images", "batch_size", "per_code", "num_steps", "sigma_min", "sigma_max", "rho"):
        require(config[setting] > 0, f"{setting} must be positive, not {config[setting]}")
    require(temperature >= 0 and S_churn >= 0 and seed >= 0, "temperature, S_churn and seed can't be negative")
    require(sigma_min < sigma_max < math.inf, f"sigma_min {sigma_min} must be below sigma_max {sigma_max}")
    require(math.isfinite(guidance) and math.isfinite(temperature), "guidance and temperature must be finite")
    require(name, "--name= is empty: it names the two files")
    require(not (code and encode), "--code and --encode both give codes: choose one")
    rank, world, place = start_processes(device)
    model, stage1 = load_stage1(out_dir, place)
    m, k = model.num_latents, model.codebook_size
    require(-1 <= class_label < max(model.label_dim, 0), f"class_label {class_label} is out of range: "
            f"this model has {model.label_dim} classes, 0 ... {model.label_dim - 1}" if model.label_dim else
            f"class_label {class_label}: this model was trained without classes")
    require(m or not (code or encode or guidance != 1),
            "this model has no discrete latents (num_latents=0): --code, --encode and --guidance need them")
    require(not code or (len(code) == m and all(isinstance(c, int) and 0 <= c < k for c in code)),
            f"--code takes {m} numbers in 0 ... {k - 1}, not {code}")
    given = data.read_images(encode, model.img_shape) if encode else None
    if given and model.label_dim and class_label < 0:
        require(given[1] is not None, f"{encode} has no class labels: say --class_label=, a class for all images")
        require(0 <= given[1].min() and given[1].max() < model.label_dim,
                f"{encode} has classes up to {given[1].max()}: this model has {model.label_dim}, 0 ... {model.label_dim - 1}")
    prior = load_prior(out_dir, place, stage1) if m and not (code or encode) else None

    # one file a batch; a run that was interrupted finds those that it has
    parts = Path(f"{out_dir}/{name}.parts")
    made_with = json.dumps({**config, "out_dir": "", "device": "", "stage1": data.fingerprint(stage1["ema"]),
                            "prior": prior and data.fingerprint(prior.state_dict())})
    if rank == 0:
        if not any(parts.glob("*.npz")):
            with data.atomic(parts / "settings.json") as f:
                f.write(made_with.encode())
        require((parts / "settings.json").read_text() == made_with, f"{parts} holds an unfinished run with other "
                "settings: delete it, start that run again to finish it, or choose another --name")
    starts = range(0, num_images, batch_size)
    missing = [start for start in starts if not (parts / f"{start:09d}.npz").exists()]
    if world > 1:
        dist.barrier()
    nfe = 2 * num_steps - 1
    if rank == 0:
        print(f"{num_images:,} images, {nfe} evaluations each" + (" of D(z) and D(null) in one batch" if guidance != 1 else ""))
    for start in tqdm(missing[rank::world], unit="batch", disable=rank > 0):
        seeds = seed + np.arange(start, min(start + batch_size, num_images))
        rows, row_of = np.unique(seeds // per_code, return_inverse=True)
        row_codes, row_labels = row_conditions(rows, model, given, prior, place)
        codes, labels = row_codes[row_of], row_labels[row_of]
        noise = SeededNoise("images", seeds, place)
        x = heun(denoiser(model, labels if model.label_dim else None, codes, guidance), noise.randn(*model.img_shape),
                 num_steps, sigma_min, sigma_max, rho, S_churn, S_min, S_max, S_noise, noise.randn_like)
        with data.atomic(parts / f"{start:09d}.npz") as f:
            np.savez(f, images=data.to_uint8(x), labels=labels.cpu().numpy(), codes=codes.cpu().numpy(), seeds=seeds)
    if world > 1:
        dist.barrier()
    if rank == 0:
        target = f"{out_dir}/{name}"
        files = [parts / f"{start:09d}.npz" for start in starts]
        shown = np.concatenate([np.load(file)["images"] for file in files[:-(-256 // batch_size)]])[:256]
        data.merge_npz(files, f"{target}.npz")
        data.save_grid(shown, f"{target}.png", 2 * per_code if per_code > 1 else math.isqrt(len(shown)))
        shutil.rmtree(parts)
        print(f"{target}.png and {target}.npz are ready")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    config = configure(globals())
    main()
