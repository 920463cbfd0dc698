"""
How fast? Times training steps and sampler evaluations of every configuration, and the data loader.

    python bench.py                                                   # the default and config/, but DLC's and text's
    python bench.py --config=config/imagenet64.py --batch_size=128    # one configuration
    python bench.py --config=default --profile=True                   # also the most expensive operations

It times the scripts' own code, on random images in place of data sets. Seconds differ
between machines and hours. Two ratios hold better, since their parts are timed in turns in one run:

  MFU     FLOP/s, over the FLOP/s of a large matrix product on the same device
  x EDM   time, over the time of the same U-Net without latents

On a GPU, a line below each row of stage 1 has a third ratio: the time over that of the same U-Net without latents,
in fp16 and not compiled. These are the settings of EDM's program; the code is ours.

PyTorch counts the FLOPs: two per multiplication with addition, in attention, convolutions and linear
layers alone. The table's other columns:

  config       settings of train_stage1.py, of train_prior.py (codes instead of images), or of
               sample.py (with the default network)
  update       share of a training step for guard, optimiser and moving average
  evaluation   one call of the denoiser; for a prior, all calls for a code; for Restart, for an image
  peak         memory while training: the process's on a CPU, the allocated memory on a GPU

Writes out_dir/bench.json.
"""

import gc
import json
import math
import multiprocessing
import os
import resource
import runpy
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile as torch_profile
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
from checkpoint import atomic, save_checkpoint
from configurator import configure, require
from diffusion import restart
from model import DisCoDiff, denoiser
from noise import SeededNoise
from processes import start_processes

config = ""  # a file, or "default"; "": all
out_dir = "out/bench"
device = "auto"
batch_size = 0  # 0: on a GPU, the largest of 256, 128, ... that fits; on a CPU, about 1 TFLOP a step, at most 32
rounds = 3  # each times everything in turns; the table has medians
profile = False  # also the ten most expensive operations of a training step

LINE = "{:24}{:>6}{:>10}{:>9}{:>6}{:>7}{:>8}{:>12}{:>10}{:>6}{:>7}{:>8}"  # a line of the table
PLAIN = ("--num_latents=0", "--continuous=False", "--kld_weight=0", "--prior=")  # EDM
FP16 = ("--precision=fp16", "--loss_scale=100", "--compile=False")  # as its program has it
# random images replace these data sets
SHAPES = {"fashion-mnist": (28, 28, 1, 10), "cifar10": (32, 32, 3, 10), "imagenet64": (64, 64, 3, 1000),
          "imagenet128": (128, 128, 3, 1000)}


# ----------------------------------------------------------------------------------------------------
# clocks


def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def matrix_product(device):
    """-> a function that multiplies two large matrices (in bfloat16 on a GPU), and its FLOPs."""
    n = 8192 if device.type == "cuda" else 3072
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return lambda: a @ b, 2 * n ** 3


def count(function):
    """FLOPs of a call. The counter misses flash attention on a CPU: use plain matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def in_turns(functions, rounds, device):
    """-> {name: [seconds of each round]}, after one round to warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: taken[1:] for name, taken in times.items()}


# ----------------------------------------------------------------------------------------------------
# what is measured


def noise_images(name, load=data.load):
    """`data.load`, with random images in place of the large data sets."""
    if name not in SHAPES:
        return load(name)
    *shape, classes = SHAPES[name]
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (10_000, *shape), np.uint8), rng.integers(0, classes, 10_000), classes


def prepared(script, config, folder, device, *settings):
    """-> a training script's globals, and its run with this configuration, ready for the first step."""
    argv = [*([] if config == "default" else [config]), f"--out_dir={folder}", f"--device={device}", *settings]
    scope = runpy.run_path(str(data.HERE / script), run_name="bench")
    return scope, scope["setup"](configure(scope["setup"].__globals__, argv))


def training(scope, run, batch, evaluation):
    """-> run, {name: function}, and a function that counts their FLOPs."""
    functions = {"gradients": lambda: scope["gradients"](run, 0), "update": lambda: scope["update"](run, batch),
                 "evaluation": evaluation}
    return run, functions, lambda: {name: count(function) for name, function in functions.items()}


def of_denoiser(run, batch):
    """The averaged network as sample.py calls it, with codes and classes 0, or continuous latents 0."""
    c = torch.zeros(batch, dtype=torch.int64, device=run.device)
    z = torch.zeros(batch, run.ema.num_latents, run.ema.codebook_size, device=run.device) if run.ema.continuous else \
        c[:, None].expand(-1, run.ema.num_latents)
    return denoiser(run.ema, c if run.ema.label_dim else None, z, autocast=run.autocast)


def stage1(config, batch, folder, device, *settings):
    """`training` of train_stage1.py; the evaluation is one of the denoiser, as sample.py calls it."""
    batches = (f"--batch_size={batch}", f"--batch_gpu={batch}")
    scope, run = prepared("train_stage1.py", config, folder, device, "--init_from=", *batches, *settings)
    denoise = of_denoiser(run, batch)
    x, sigma = torch.randn(batch, *run.ema.x_shape, device=run.device), torch.tensor(1.0, device=run.device)
    return training(scope, run, batch, lambda: denoise(x, sigma))


def prior(config, batch, folder, device):
    """`training` of train_prior.py, on full-size codes of a tiny encoder."""
    name = next((name for name in ("imagenet64", "fashion-mnist") if name.replace("-", "_") in config), "cifar10")
    images, labels, classes = noise_images(name)
    m, k = (8, 16) if name == "fashion-mnist" else (10, 100)
    _, size, _, channels = images.shape
    args = dict(img_resolution=size, img_channels=channels, label_dim=classes, num_latents=m, codebook_size=k,
                model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), latent_dim=4, latent_heads=1,
                latent_layers=1, encoder_patch=size // 2, encoder_dim=8, encoder_layers=1, encoder_heads=1)
    settings = dict(dataset=name, held_out=0, xflip=False, data_identity=data.data_checksum(images, labels))
    save_checkpoint(f"{folder}/stage1.pt", dict(made_by="train_stage1", config=settings, model_args=args, step=0,
                                                ema=DisCoDiff(**args).state_dict()))
    scope, run = prepared("train_prior.py", config, folder, device, f"--batch_size={batch}")
    noise = SeededNoise("bench", range(batch), run.device)
    c = torch.zeros(batch, dtype=torch.int64, device=run.device)
    return training(scope, run, batch, lambda: run.ema.sample(noise, c))


def sampler(config, batch, folder, device):
    """-> as `training`, for a configuration of sample.py, with the default network."""
    settings = configure(dict(vars(sample)), [config])
    settings = {key: settings[key] for key in ("num_steps", "restarts", "gamma", "S_min", "S_max", "S_noise")}
    _, run = prepared("train_stage1.py", "default", folder, device)
    denoise = of_denoiser(run, batch)
    noise, evaluations = torch.randn(batch, *run.model.x_shape, device=run.device), []

    def sampled(denoise):
        restart(denoise, noise, **settings)

    sampled(lambda x, sigma: evaluations.append(sigma) or x)
    return run, {"evaluation": lambda: sampled(denoise)}, lambda: {
        "evaluation": len(evaluations) * count(lambda: denoise(noise, evaluations[0]))}


def peak_memory(device):
    """The most bytes used so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def largest(build, batch, device):
    """-> build(batch) and batch, for the largest of batch, batch / 2, ... that fits."""
    while True:
        torch.compiler.reset()  # else the second batch size gets code for any size
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            return build(batch), batch
        except torch.OutOfMemoryError:
            require(batch > 1, "not even one image fits on this GPU")
        gc.collect()
        torch.cuda.empty_cache()
        batch //= 2


def measure(config, device, batch_size, rounds, profile):
    """-> one configuration's row of the table and of bench.json. Runs in its own process."""
    data.load, data.class_names = noise_images, lambda name: []
    torch.set_float32_matmul_precision("high")
    _, _, place = start_processes(device)
    kind = prior if config.endswith("_prior.py") else sampler if Path(config).name.startswith("restart") else stage1
    eager = ("--compile=False",) if kind is stage1 else ()  # the counter can't see into compiled code
    with tempfile.TemporaryDirectory() as folder:
        flops = kind(config, 1, folder, device, *eager)[2]()
        gc.collect()

        def build(batch):
            """-> functions, each called once already, and the peak memory without plain EDM's."""
            run, functions, _ = kind(config, batch, folder, device)
            for function in functions.values():
                function()
            memory, settings = peak_memory(place), {}
            if kind is stage1 and run.model.num_latents:
                settings["edm"] = PLAIN
            if kind is stage1 and place.type == "cuda":
                settings["fp16"] = (*PLAIN, *FP16)
            for other, changed in settings.items():
                _, plain, _ = stage1(config, batch, folder, device, *changed)
                functions |= {f"{other} {name}": function for name, function in plain.items()}
                for function in plain.values():
                    function()
            return functions, memory

        if not batch_size:
            on_cpu = min(32, 2 ** int(math.log2(max(1, 1e12 / max(flops.values())))))
            batch_size = 256 if place.type == "cuda" else on_cpu
        (functions, memory), batch = largest(build, batch_size, place)
        row = dict(config=Path(config).stem, batch=batch, rounds=rounds, gflop_evaluation=flops["evaluation"] / 1e9)
        multiply, work = matrix_product(place)
        times = in_turns({"product": multiply, **functions}, rounds, place)
        peak = work / np.array(times["product"])  # FLOP/s, in each round
        evaluation = np.array(times["evaluation"])
        row |= dict(product_tflops=statistics.median(peak) / 1e12,
                    evaluations_per_second=batch / statistics.median(evaluation),
                    mfu_evaluation=statistics.median(flops["evaluation"] * batch / evaluation / peak))
        if "gradients" in times:
            step = np.array(times["gradients"]) + times["update"]
            row |= dict(images_per_second=batch / statistics.median(step), gflop_training=flops["gradients"] / 1e9,
                        mfu_training=statistics.median(flops["gradients"] * batch / step / peak),
                        update_share=statistics.median(times["update"] / step), peak_gb=memory / 2 ** 30)
        for other in ("edm", "fp16"):
            if f"{other} evaluation" in times:
                of_other = np.array(times[f"{other} gradients"]) + times[f"{other} update"]
                row |= {f"training_x_{other}": statistics.median(step / of_other),
                        f"evaluation_x_{other}": statistics.median(evaluation / times[f"{other} evaluation"])}
        if profile:
            row["most_expensive"] = most_expensive(functions, place)
    return row


def most_expensive(functions, device, number=10):
    """-> [(operation, share of time, calls), ...] of a training step, or of a sampler's evaluation"""
    with torch_profile(acc_events=True) as profiler:
        for name in ("gradients", "update") if "gradients" in functions else ("evaluation",):
            functions[name]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if device.type == "cuda":  # kernels alone: the operations that launch them count the same time again
        spent = [(e.key, e.self_device_time_total, e.count) for e in profiler.key_averages()
                 if e.device_type == DeviceType.CUDA]
    else:
        spent = [(e.key, e.self_cpu_time_total, e.count) for e in profiler.key_averages()]
    total = sum(time for _, time, _ in spent)
    return [(key, time / total, calls) for key, time, calls in sorted(spent, key=lambda e: -e[1])[:number]]


def loader(device, batch=256, count=20_000):
    """-> images a second (64 x 64 x 3) from a cached memory map: as uint8, as floats on the device"""
    place = start_processes(device)[2]
    with tempfile.TemporaryDirectory() as folder:
        written = np.lib.format.open_memmap(f"{folder}/images.npy", "w+", np.uint8, (count, 64, 64, 3))
        written[:] = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        written.flush()
        images = np.load(f"{folder}/images.npy", mmap_mode="r")
        batches, starts = data.Shuffle(np.arange(count), seed=0), range(0, count, batch)
        gathered = seconds(lambda: [images[batches.take(start, batch)] for start in starts], place)
        floats = seconds(lambda: [data.to_float(images[batches.take(start, batch)], place) for start in starts], place)
    return len(starts) * batch / gathered, len(starts) * batch / floats


# ----------------------------------------------------------------------------------------------------
# the table


def line_of(row):
    def cell(key, form):
        return format(row[key], form) if key in row else ""

    cells = (row["config"], str(row["batch"]), cell("images_per_second", ",.1f"),
             cell("gflop_training", ",.2f"), cell("mfu_training", ".2f"), cell("training_x_edm", ".3f"),
             cell("update_share", ".1%"), cell("evaluations_per_second", ",.1f"), cell("gflop_evaluation", ",.2f"),
             cell("mfu_evaluation", ".2f"), cell("evaluation_x_edm", ".3f"), cell("peak_gb", ".1f"))
    return LINE.format(*cells)


def main(argv=()):
    configure(globals(), argv)
    require(batch_size >= 0 and rounds > 0,
            f"batch_size {batch_size} can't be negative, rounds {rounds} must be positive")
    require(not config or config == "default" or Path(config).is_file(),
            f"there is no file {config}; --config=default is the default")
    _, world, place = start_processes(device)
    require(world == 1, "bench.py measures one process: run it without torchrun")
    of_repository = sorted(str(path) for path in (data.HERE / "config").glob("*.py")
                           if not any(other in path.stem for other in ("encoder", "dlc", "llada")))
    configs = [config] if config else ["default", *of_repository]
    on = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{on}, torch {torch.__version__}; GFLOP per image; medians of {rounds} rounds")
    print(f"{'':30}{'training: images a second':>40}{'evaluation: images a second':>35}{'peak':>8}")
    print(LINE.format(
        "config", "batch", "images/s", "GFLOP", "MFU", "x EDM", "update", "images/s", "GFLOP", "MFU", "x EDM", "GB"))
    os.environ["TQDM_DISABLE"] = "1"  # in the processes started below
    results = dict(device=on, torch=torch.__version__, rows=[])

    def save():
        with atomic(f"{out_dir}/bench.json") as f:
            f.write(json.dumps(results, indent=1).encode())

    for name in configs:
        try:  # in a new process, which has its own peak memory
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(measure, name, device, batch_size, rounds, profile).result()
        except BrokenProcessPool:
            print(f"{name}: its process was killed. Too little memory? A smaller --batch_size= may help",
                  file=sys.stderr)
            continue
        print(line_of(row), flush=True)
        if "training_x_fp16" in row:
            print("    x EDM in fp16, not compiled: training {training_x_fp16:.3f}, evaluation "
                  "{evaluation_x_fp16:.3f}".format(**row))
        for operation, share, calls in row.get("most_expensive", ()):
            print(f"    {share:6.1%}  {calls:6} calls  {operation}")
        results["rows"].append(row)
        save()
    if not config:
        results["loader_images_per_second"] = dict(zip(("gathered", "floats"), loader(device)))
        print("the loader alone, 64 x 64 x 3 from a memory map: {gathered:,.0f} images a second; "
              "{floats:,.0f} as floats on the device".format(**results["loader_images_per_second"]))
        save()
    print(f"{out_dir}/bench.json is ready")


if __name__ == "__main__":
    main(sys.argv[1:])
