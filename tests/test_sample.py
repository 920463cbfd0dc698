import errno
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run
from PIL import Image

import data
import noise as noises
import npz
import prior as priors
import run as runs
import sample
import sedd
from configurator import UserError, configure
from diffusion import heun, noise_levels, restart, restart_loops
from model import DisCoDiff, denoiser
from noise import SeededNoise
from sample import class_number
from sedd import SEDD, euler_probs, first_hitting, log_linear, tau_leaping
from trained import classes_of, load_prior, load_stage1

REFERENCE = np.load(Path(__file__).parent / "reference" / "samplers.npz")
CENTRES = 3 * torch.tensor([(math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)) for i in range(8)], dtype=torch.float64)


def exact_denoiser(calls=None):
    """E[y | y + sigma n] of a mixture of 8 Gaussians of variance 0.04 on a circle of radius 3."""
    def denoise(x, sigma):
        if calls is not None:
            calls.append(float(sigma))
        variance = 0.04 + sigma ** 2
        weights = (-((x[:, None] - CENTRES) ** 2).sum(-1) / (2 * variance)).softmax(1)
        means = (0.04 * x[:, None] + sigma ** 2 * CENTRES) / variance
        return (weights[..., None] * means).sum(1)
    return denoise


@pytest.mark.parametrize("name, nfe, settings", [
    ("heun18", 35, dict(num_steps=18)),
    ("heun40", 79, dict(num_steps=40)),
    ("heun50", 99, dict(num_steps=50)),
    ("churn32", 63, dict(num_steps=32, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003)),
])
def test_heun_equals_edm(name, nfe, settings):
    noise, calls = np.random.RandomState(11), []
    x = heun(exact_denoiser(calls), torch.from_numpy(REFERENCE["latents"]),
             randn_like=lambda x: torch.from_numpy(noise.standard_normal(tuple(x.shape))), **settings)
    assert x.dtype == torch.float64 and np.abs(x.numpy() - REFERENCE[name]).max() < 1e-9
    assert len(calls) == nfe


def test_noise_levels_of_other_rhos():
    """Even for rho = 1; their rho-th roots are even; towards a geometric sequence for a large one (EDM Eq. 5)."""
    assert torch.allclose(noise_levels(5, 2, 10, 1), torch.tensor([10.0, 8, 6, 4, 2], dtype=torch.float64))
    assert torch.allclose(noise_levels(3, 1, 27, 3), torch.tensor([27.0, 8, 1], dtype=torch.float64))
    assert torch.allclose(noise_levels(3, 1, 100, 1e6), torch.tensor([100.0, 10, 1], dtype=torch.float64), rtol=1e-4)


def preset(evaluations):
    """The settings of config/restart39.py and so on."""
    settings = dict(num_steps=0, restarts=(), gamma=0.0, S_min=0.0, S_max=0.0, S_noise=0.0)
    return configure(settings, [str(ROOT / "config" / f"restart{evaluations}.py")])


PUBLISHED = dict(gamma=0.05, S_min=0.01, S_max=1, S_noise=1.003)  # as all of Xu et al.'s for ImageNet-64
RESTARTS = {
    "restart39": (39, preset(39)),
    "restart67": (67, dict(num_steps=18, **PUBLISHED, restarts=(
        (5, 1, 19.35, 40.79), (5, 1, 1.09, 1.92), (5, 1, 0.59, 1.09), (5, 1, 0.06, 0.3)))),
    "restart99": (99, dict(num_steps=18, **PUBLISHED, restarts=(
        (3, 1, 19.35, 40.79), (4, 1, 1.09, 1.92), (4, 4, 0.59, 1.09), (4, 1, 0.3, 0.59), (4, 4, 0.06, 0.3)))),
    "restart165": (165, dict(num_steps=18, **PUBLISHED, restarts=(
        (3, 1, 19.35, 40.79), (4, 1, 1.09, 1.92), (4, 5, 0.59, 1.09), (4, 5, 0.3, 0.59), (4, 10, 0.06, 0.3)))),
    "restart203": (203, preset(203)),
    "restart385": (385, dict(num_steps=36, **PUBLISHED, restarts=(
        (3, 1, 19.35, 40.79), (6, 1, 1.09, 1.92), (6, 5, 0.59, 1.09), (6, 5, 0.3, 0.59), (6, 20, 0.06, 0.3)))),
    "restart535": (535, dict(num_steps=36, **PUBLISHED, restarts=(
        (6, 1, 19.35, 40.79), (6, 1, 1.09, 1.92), (7, 6, 0.59, 1.09), (7, 6, 0.3, 0.59), (7, 25, 0.06, 0.3)))),
    "restart623": (623, preset(623)),
    "restart_simple": (43, dict(num_steps=18, restarts=((3, 2, 0.06, 0.3),))),
}


@pytest.mark.parametrize("name", RESTARTS)
def test_restart_equals_its_authors(name):
    nfe, settings = RESTARTS[name]
    noise, calls = np.random.RandomState(11), []
    x = restart(exact_denoiser(calls), torch.from_numpy(REFERENCE["latents"]),
                randn_like=lambda x: torch.from_numpy(noise.standard_normal(tuple(x.shape))), **settings)
    assert x.dtype == torch.float64 and np.abs(x.numpy() - REFERENCE[name]).max() < 1e-9
    assert len(calls) == nfe


def test_restart_without_restarts_is_heun():
    latents = torch.from_numpy(REFERENCE["latents"])
    assert torch.equal(restart(exact_denoiser(), latents, 18, []), heun(exact_denoiser(), latents, 18))


def test_restart_keeps_the_distribution():
    """Noise up and an ODE down leave the marginals as they are: one Gaussian stays one, whatever goes in between."""
    g = torch.Generator().manual_seed(0)
    x = restart(lambda x, sigma: x * 0.25 / (0.25 + sigma ** 2), torch.randn(20_000, 1, generator=g), 40,
                [(20, 3, 0.3, 2.0), (20, 2, 5.0, 20.0)],
                randn_like=lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64))
    assert abs(x.mean()) < 0.02 and x.std().item() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("restarts, message", [
    ((3, 1, 0.06, 0.3), r"takes \(N_restart, K, t_min, t_max\), ..., the first two whole numbers; not 3"),
    (((3, 1, 0.06),), "not .3, 1, 0.06."),
    (((math.inf, 1, 0.06, 0.3),), "the first two whole numbers"),
    (((3, math.nan, 0.06, 0.3),), "the first two whole numbers"),
    (((3, 1, math.nan, 0.3),), "t_min < t_max"),
    (((1, 1, 0.06, 0.3),), "N_restart and num_steps are 2 or more"),
    (((3, 0, 0.06, 0.3),), "K is 1 or more"),
    (((3, 1.5, 0.06, 0.3),), "the first two whole numbers"),
    (((3, 1, 0.3, 0.06),), "t_min < t_max"),
    (((3, 1, 0.06, math.inf),), "t_min < t_max"),
    (((3, 1, 1e-9, 0.3),), "sigma_min 0.002 <= t_min"),
    (((3, 1, 0.06, 100.0),), "t_max <= sigma_max 80"),
    (((3, 1, 79.0, 80), (3, 1, 70.0, 71.0)), None),
    (((3, 1, 0.061, 0.062), (3, 1, 50.0, 51.0)), "the noise level nearest to t_min, and not below t_max"),
])
def test_restarts_that_do_not_fit(restarts, message):
    if message is None:  # nothing arrives at sigma_max: the next level below is taken
        assert [len(loops) for loops in restart_loops(18, restarts)] == [0, 2] + [0] * 17
        return
    with pytest.raises(UserError, match=message):
        restart_loops(18, restarts)


def test_heun_is_of_second_order():
    """Of one Gaussian the ODE is solved in closed form: x(0) = x(sigma_max) sd / sqrt(sd^2 + sigma_max^2)."""
    latents, sd = torch.randn(5, 1, generator=torch.Generator().manual_seed(0)).double(), 0.5
    exact = latents * 80 * sd / math.sqrt(sd ** 2 + 80 ** 2)
    errors = [(heun(lambda x, sigma: x * sd ** 2 / (sd ** 2 + sigma ** 2), latents, n) - exact).abs().max()
              for n in (32, 64, 128)]
    assert errors[2] < 1e-3 and 3 < errors[0] / errors[1] < 6 and 3 < errors[1] / errors[2] < 6


def test_one_step_is_one_denoising():
    calls = []
    latents = torch.ones(1, 2)
    x = heun(exact_denoiser(calls), latents, num_steps=1)
    assert calls == [80.0] and torch.allclose(x, exact_denoiser()(80 * latents.double(), torch.tensor(80.0)))


# discrete diffusion, with the exact scores of a known distribution of m = 3 tokens with V = 4 values

STATES = torch.cartesian_prod(*[torch.arange(4)] * 3)  # (64, 3)
P = torch.rand(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 3 + 0.02
P /= P.sum()


def exact_score(seen=None):
    """s_y = p(x0 = y | what is unmasked) / (e^sigma - 1)"""
    def score(x, t):
        if seen is not None:
            seen.append((x.clone(), t))
        fits = ((x[:, None] == STATES) | (x[:, None] == 4)).all(2) * P  # (B, 64)
        p = torch.einsum("bs,siy->biy", fits / fits.sum(1, keepdim=True), torch.nn.functional.one_hot(STATES, 4).double())
        p = torch.nn.functional.pad(p / torch.expm1(log_linear(t)[0])[:, None, None], (0, 1))
        return p.log().scatter(2, x[..., None], 0)
    return score


def noise(seed):
    g = np.random.default_rng(seed)
    return (lambda n: (lambda *shape: torch.from_numpy(g.random((n, *shape))))), \
        (lambda n: (lambda *shape: torch.from_numpy(g.gumbel(size=(n, *shape)))))


def chi_square(codes):
    """Of these samples against P: 63 degrees of freedom, so that 103.4 is exceeded with probability 0.001."""
    counts = torch.bincount((codes * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    expected = len(codes) * P
    assert expected.min() > 5
    return ((counts - expected) ** 2 / expected).sum().item()


def all_mask(n):
    return torch.full((n, 3), 4)


def test_first_hitting_samples_the_distribution():
    """Exactly, in one evaluation a token, at falling times whose mean is that of the order statistics."""
    n, seen, (rand, gumbel) = 30_000, [], noise(0)
    start = all_mask(n)
    codes = first_hitting(exact_score(seen), start, rand(n), gumbel(n))
    assert chi_square(codes) < 103.4 and (start == 4).all()
    assert [(x == 4).sum(1).unique().tolist() for x, _ in seen] == [[3], [2], [1]]
    times = torch.stack([t for _, t in seen])
    assert (times[:-1] > times[1:]).all()
    assert torch.allclose(times.mean(1), torch.tensor([3 / 4, 2 / 4, 1 / 4], dtype=torch.float64), atol=0.01)
    unmasked_first = (seen[1][0] != 4).double().mean(0)
    assert torch.allclose(unmasked_first, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.02)


def test_the_bound_is_exact_for_exact_scores():
    """SEDD.nats is then -ln p itself, whatever the times."""
    class Exact:
        codebook_size = 4

        def __call__(self, x, t, labels):
            return exact_score()(x, t.double())

    for seed in range(5):
        nats = SEDD.nats(Exact(), STATES, None, torch.Generator().manual_seed(seed))
        assert torch.allclose(nats, -P.log(), atol=1e-6)


def test_wrong_sums_of_scores_are_survived():
    """30 % too much: tokens unmask early, and probabilities to stay masked are negative; no mask is left all the same."""
    seen, (_, gumbel) = [], noise(0)
    score = exact_score(seen)
    codes = tau_leaping(lambda x, t: score(x, t) + math.log(1.3), all_mask(5000), 10, gumbel(5000), eta=0.1)
    assert codes.min() >= 0 and codes.max() <= 3
    masked = [(x == 4).double().mean().item() for x, _ in seen]
    assert masked[5] < 0.45 and masked == sorted(masked, reverse=True)


def test_a_wrong_sampler_is_found_out():
    """What the chi-square is worth: all tokens in one step have another distribution."""
    n, (_, gumbel) = 30_000, noise(0)
    assert chi_square(tau_leaping(exact_score(), all_mask(n), 1, gumbel(n))) > 1000


def test_analytic_sampler_agrees_in_1000_steps():
    n, seen, (_, gumbel) = 8_000, [], noise(1)
    codes = tau_leaping(exact_score(seen), all_mask(n), 1000, gumbel(n))
    assert chi_square(codes) < 103.4 and len(seen) == 1000


def test_times_of_tau_leaping_are_even():
    """From t = 1 on, where all is mask, to 1 / n, from where the last step goes to 0."""
    seen, (_, gumbel) = [], noise(6)
    tau_leaping(exact_score(seen), all_mask(50), 4, gumbel(50))
    assert [t.unique().tolist() for _, t in seen] == [[1.0], [0.75], [0.5], [0.25]]


@pytest.mark.parametrize("eta, t0, t1", [(0.0, 0.3, 0.55), (0.02, 0.3, 0.55), (0.3, 0.3, 0.55), (0.9, 0.05, 0.99)])
def test_masked_tokens_follow_the_schedule(eta, t0, t1):
    """P(masked at t) = t at every step, with and without remasking; tokens are masked again in (t0, t1) alone."""
    n, steps, seen, (_, gumbel) = 20_000, 40, [], noise(2)
    tau_leaping(exact_score(seen), all_mask(n), steps, gumbel(n), eta=eta, t0=t0, t1=t1)
    assert len(seen) == steps
    for (x, t), (x_next, _) in zip(seen, seen[1:]):
        t = t[0].item()
        assert (x == 4).double().mean().item() == pytest.approx(t, abs=5 * math.sqrt(t * (1 - t) / (3 * n)) + 1e-12)
        again = ((x_next == 4) & (x != 4)).sum() / max((x != 4).sum(), 1)
        wanted = min(eta, (t - 1 / steps) / (1 - t)) if t0 < t < t1 else 0
        assert again.item() == pytest.approx(wanted, abs=5 * math.sqrt(wanted / max((x != 4).sum().item(), 1)))


def test_remasking_ends_in_the_distribution():
    n, (_, gumbel) = 8_000, noise(3)
    assert chi_square(tau_leaping(exact_score(), all_mask(n), 400, gumbel(n), eta=0.02)) < 103.4


def test_euler_and_analytic_are_one_for_the_log_linear_noise():
    n = 500
    a, b = (tau_leaping(exact_score(), all_mask(n), 20, noise(4)[1](n), **how) for how in ({}, dict(probs=euler_probs)))
    assert torch.equal(a, b)


def small_model():
    torch.manual_seed(0)
    model = DisCoDiff(8, 1, 3, num_latents=2, codebook_size=4, latent_dim=8, latent_layers=1, latent_heads=1,
                      encoder_patch=4, encoder_dim=8, encoder_layers=1, encoder_heads=1, model_channels=8,
                      channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def test_guidance():
    model = small_model()
    x, sigma, c, z = torch.randn(3, 1, 8, 8), torch.tensor(2.0), torch.tensor([0, 1, 2]), torch.tensor([[0, 1], [2, 3], [1, 1]])
    batches, condition_calls = [], []
    model.model.register_forward_hook(lambda m, args, out: batches.append(len(args[0])))
    model.latents.register_forward_hook(lambda m, args, out: condition_calls.append(len(args[0])))
    D = denoiser(model, c, z)(x, sigma)
    D_null = model.denoise(x, sigma.expand(3), c, model.condition(z, torch.ones(3, dtype=torch.bool)))
    assert batches == [3, 3]  # w = 1: no second evaluation
    assert (D - D_null).abs().max() > 1e-3
    batches.clear()
    condition_calls.clear()
    guided = denoiser(model, c, z, guidance=2.5)
    result = guided(x, sigma)
    guided(x, sigma / 2)
    assert torch.allclose(result, 2.5 * D - 1.5 * D_null, atol=1e-5)  # App. B
    assert torch.allclose(denoiser(model, c, z, guidance=0.0)(x, sigma), D_null, atol=1e-5)
    assert batches[:2] == [6, 6]  # one batched evaluation each
    assert condition_calls[:2] == [3, 1]  # what depends on z alone: once, not once an evaluation


def test_noise_depends_on_its_seed_alone():
    many, few = SeededNoise("a", range(10), "cpu"), SeededNoise("a", [7, 3], "cpu")
    for _ in range(2):
        a, b = many.randn(2, 2), few.randn(2, 2)
        assert torch.equal(a[[7, 3]], b) and not torch.equal(a[0], a[1])
    assert not torch.equal(SeededNoise("a", [7], "cpu").randn(2), SeededNoise("b", [7], "cpu").randn(2))
    first = SeededNoise("images", range(50_000), "cpu").randn(1)
    assert len(first.unique()) == 50_000  # no two seeds collide


def test_seeded_noise_has_its_distributions():
    noise = SeededNoise("a", range(100), "cpu")
    normal, gumbel = noise.randn(1000), noise.gumbel(1000)
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert abs(gumbel.mean() - 0.5772) < 0.02 and abs(gumbel.var() - math.pi ** 2 / 6) < 0.05


# the script


def load(folder, name="samples"):
    with np.load(folder / f"{name}.npz") as f:
        return {k: f[k] for k in f.files}


SAMPLE = ["--num_steps=3", "--device=cpu", "--num_images=20", "--per_code=4"]


@pytest.fixture(scope="module")
def samples(trained):
    run("sample.py", f"--out_dir={trained}", "--name=first", *SAMPLE, "--batch_size=20")
    return load(trained, "first")


def close(a, b):
    """The same samples: images to rounding, everything else exactly."""
    return all(np.array_equal(a[k], b[k]) for k in ("labels", "codes", "seeds")) and \
        np.abs(a["images"].astype(int) - b["images"]).max() <= 1


def test_what_is_written(trained, samples):
    assert {k: (v.dtype, v.shape) for k, v in samples.items()} == {
        "images": (np.uint8, (20, 28, 28, 1)), "labels": (np.int64, (20,)), "codes": (np.int64, (20, 3)),
        "seeds": (np.int64, (20,)), "nfe": (np.int64, (20,)), "seconds": (np.float32, (20,))}
    assert (samples["nfe"] == 5).all() and 0 < samples["seconds"].min() < 10
    assert samples["seeds"].tolist() == list(range(20)) and samples["labels"].tolist() == [i // 8 for i in range(20)]
    rows = samples["codes"].reshape(5, 4, 3)
    assert (rows == rows[:, :1]).all() and len(np.unique(rows[:, 0], axis=0)) > 1  # a row shares one code
    assert len(np.unique(samples["images"].reshape(20, -1), axis=0)) == 20
    assert Image.open(trained / "first.png").size == (8 * 30 * 2, 3 * 30 * 2)
    assert not (trained / "first.parts").exists()


def test_a_folder_of_png_files(trained, tmp_path):
    """Which eval_fid.py and data.py read, with the labels; files of another run in it are not mixed with these."""
    arguments = ["sample.py", f"--out_dir={tmp_path}", f"--init_from={trained}", *SAMPLE, "--png=True", "--seed=7"]
    printed = run(*arguments)
    made, folder = load(tmp_path), tmp_path / "samples"
    assert printed.splitlines()[-1].endswith(f"and {folder}/ with a PNG file for each image")
    images, labels = data.open_images(str(folder))
    assert sorted(p.name for p in folder.iterdir()) == [*(f"{i:06d}.png" for i in range(7, 27)), "dataset.json"]
    assert np.array_equal(images[:], made["images"]) and np.array_equal(labels, made["labels"])
    run(*arguments)
    run(*arguments, "--class_label=3")
    assert (data.open_images(str(folder))[1] == 3).all()
    (folder / "mine.png").write_bytes(b"x")
    with pytest.raises(UserError, match="samples has other files in it, such as mine.png: empty it, or choose another --name"):
        run(*arguments)
    (folder / "mine.png").unlink()
    with pytest.raises(UserError, match="other files in it, such as 000007.png"):
        run(*arguments, "--seed=8")


def test_classes_by_name(trained, tmp_path):
    for name, number in (("Bag", 8), ("T-shirt/top", 0), ("3", 3)):
        run("sample.py", f"--out_dir={trained}", "--name=named", *SAMPLE, "--num_images=4", f"--class_label={name}")
        assert (load(trained, "named")["labels"] == number).all()
    with pytest.raises(UserError, match="there is no class 'bags': this model has 10 classes, 0 ... 9: T-shirt/top, Trouser"):
        run("sample.py", f"--out_dir={trained}", *SAMPLE, "--class_label=bags")
    assert class_number("2", ["10", "2", "9"]) == 1 and class_number("0", ["10", "2", "9"]) == 0 and class_number("", []) == -1
    older = torch.load(trained / "stage1.pt")
    assert classes_of(older)[9] == "Ankle boot" and older.pop("classes")
    assert classes_of(older)[9] == "Ankle boot"
    assert classes_of(dict(older, config={"dataset": "mine"})) == [*"0123456789"]


def test_labels_at_random(trained, samples, monkeypatch):
    """Uniform, one for each code, whatever the batch size; and the images in turn stay as they were."""
    monkeypatch.setattr(sample, "random_labels", True)
    wanted = SimpleNamespace(model=SimpleNamespace(label_dim=10), class_label=-1)
    labels = sample.labels_of(wanted, np.arange(20_000))
    assert torch.equal(labels[100:103], sample.labels_of(wanted, np.arange(100, 103)))
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10 and ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square with 9 degrees of freedom, 0.001
    run("sample.py", f"--out_dir={trained}", "--name=random", *SAMPLE, "--random_labels=True")
    made = load(trained, "random")
    assert np.array_equal(made["labels"].reshape(5, 4), made["labels"][::4, None].repeat(4, 1)) and len(set(made["labels"])) > 2
    with pytest.raises(UserError, match="choose one"):
        run("sample.py", f"--out_dir={trained}", *SAMPLE, "--random_labels=True", "--class_label=2")


def test_samples_are_of_the_moving_averages(trained):
    model, stage1 = load_stage1(trained, "cpu")
    networks = {"stage1": model, **{f"prior_{kind}": load_prior(trained, kind, "cpu", stage1) for kind in ("ar", "sedd")}}
    for name, network in networks.items():
        state = torch.load(trained / f"{name}.pt")
        assert all(torch.equal(weights, state["ema"][key]) for key, weights in network.state_dict().items())
        assert not all(torch.equal(weights, state["ema"][key]) for key, weights in state["model"].items())


def test_the_batch_size_changes_nothing(trained, samples):
    run("sample.py", f"--out_dir={trained}", "--name=b", *SAMPLE, "--batch_size=3")
    assert close(load(trained, "b"), samples)


@pytest.mark.parametrize("how", [[], ["--sedd_sampler=analytic", "--sedd_steps=5", "--eta=0.3"], ["--sedd_sampler=euler"]], ids=str)
def test_sedd_codes_do_not_depend_on_the_batch_size(trained, samples, how):
    for name, size in (("f", 20), ("g", 3)):
        printed = run("sample.py", f"--out_dir={trained}", f"--name={name}", *SAMPLE, f"--batch_size={size}", "--prior=sedd", *how)
        assert re.search(r"\d+ codes in \d+\.\d\d s, 20 images in \d+\.\d\d s", printed)
    assert close(load(trained, "f"), load(trained, "g"))
    assert 0 <= load(trained, "f")["codes"].min() and load(trained, "f")["codes"].max() < 5
    assert not np.array_equal(load(trained, "f")["codes"], samples["codes"])


def test_every_setting_of_the_sedd_sampler_arrives(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(SEDD, "forward", lambda self, x, t, labels: (seen.append((x, t)), torch.zeros(*x.shape, 6))[1])
    arguments = [f"--out_dir={trained}", "--name=h", *SAMPLE, "--prior=sedd"]

    def masked_again(*more):
        seen.clear()
        run("sample.py", *arguments, "--sedd_sampler=analytic", "--sedd_steps=10", "--per_code=1", "--num_steps=1", *more)
        return [round(t[0].item(), 1) for (x, t), (x_next, _) in zip(seen, seen[1:]) if ((x != 5) & (x_next == 5)).any()]

    assert masked_again() == [] and len(seen) == 10
    assert set(masked_again("--eta=0.9")) <= {0.5, 0.4} and masked_again("--eta=0.9")
    assert 0.8 in masked_again("--eta=0.9", "--t0=0.05", "--t1=0.95")
    seen.clear()
    run("sample.py", *arguments)
    assert len(seen) == 3


@pytest.mark.parametrize("arguments, nfe", [([str(ROOT / "config" / "restart39.py")], 39), (["--num_steps=4"], 7),
                                            (["--num_steps=4", "--restarts=(3,2,0.06,0.3),(2,1,1,2)"], 17)])
def test_the_script_spends_the_evaluations_that_it_prints(trained, monkeypatch, arguments, nfe):
    calls = []
    monkeypatch.setattr(DisCoDiff, "denoise", lambda self, x, sigma, *_: (calls.append(len(x)), x * 0)[1])
    printed = run("sample.py", f"--out_dir={trained}", "--name=n", "--num_images=5", "--device=cpu", *arguments)
    assert f"5 images, {nfe} evaluations each" in printed and calls == [5] * nfe


def test_a_device_without_float64_is_given_none(trained, samples, monkeypatch):
    """As Apple's GPUs, which a CPU stands for: the samplers stay in float64, what networks get is float32; the samples are the same."""
    given = []

    def noted(network, method):
        function = getattr(network, method)

        def noting(*arguments, **options):
            given.extend(t.dtype for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor))
            return function(*arguments, **options)

        monkeypatch.setattr(network, method, noting)

    for module in (noises, priors, sedd):
        monkeypatch.setattr(module, "has_float64", lambda device: False)
    for network, method in ((DisCoDiff, "denoise"), (priors, "draw_codes"), (SEDD, "forward")):
        noted(network, method)
    run("sample.py", f"--out_dir={trained}", "--name=narrow", *SAMPLE)
    assert set(given) == {torch.float32, torch.int64} and close(load(trained, "narrow"), samples)
    run("sample.py", f"--out_dir={trained}", "--name=narrow", *SAMPLE, "--prior=sedd", "--sedd_sampler=analytic", "--sedd_steps=5", "--guidance=2")
    run("sample.py", f"--out_dir={trained}", "--name=narrow", *SAMPLE, "--prior=sedd", "--encode=fashion-mnist-10k")
    assert set(given) == {torch.float32, torch.int64}


def test_images_are_made_in_the_precision_that_is_set(trained, monkeypatch):
    """The context that `set_precision` gives is around the denoiser, and around no more."""
    inside, evaluations = [], []

    class Context:
        def __enter__(self):
            inside.append(1)

        def __exit__(self, *error):
            inside.pop()

    monkeypatch.setattr(runs, "set_precision", lambda precision, device: {"fp16": Context()}[precision])
    monkeypatch.setattr(DisCoDiff, "denoise", lambda self, x, sigma, *_: (evaluations.append(len(inside)), x * 0)[1])
    run("sample.py", f"--out_dir={trained}", "--name=fp16", *SAMPLE, "--precision=fp16")
    assert evaluations == [1] * 5 and not inside


def test_any_seeds_can_be_made_alone(trained, samples):
    run("sample.py", f"--out_dir={trained}", "--name=c", *SAMPLE, "--seed=6", "--num_images=7")
    assert close(load(trained, "c"), {k: v[6:13] for k, v in samples.items()})


def test_churn_is_seeded_too(trained):
    for name, size in (("d", 20), ("e", 7)):
        run("sample.py", f"--out_dir={trained}", f"--name={name}", *SAMPLE, "--S_churn=3", f"--batch_size={size}")
    assert close(load(trained, "d"), load(trained, "e"))


def test_two_processes_make_the_same_images(trained, samples):
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "sample.py",
                    f"--out_dir={trained}", "--name=two", *SAMPLE, "--batch_size=6"], cwd=ROOT, check=True, capture_output=True)
    assert close(load(trained, "two"), samples)


def test_mistakes_are_told_under_torchrun(trained):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "sample.py",
                           f"--out_dir={trained}", "--name=two", *SAMPLE, "--class_label=11"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "error: class_label 11 is out of range" in done.stderr


def test_png_files_on_a_full_disk(samples, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    np.savez(tmp_path / "a.npz", **samples)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="can't write .*pngs: No space left on device"):
        npz.save_pngs([tmp_path / "a.npz"], tmp_path / "pngs")


def test_an_interrupted_run_goes_on(trained, samples, monkeypatch):
    merge = npz.merge_npz

    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(npz, "merge_npz", power_cut)
    arguments = [f"--out_dir={trained}", "--name=part", *SAMPLE, "--batch_size=8"]
    with pytest.raises(KeyboardInterrupt):
        run("sample.py", *arguments)
    parts = trained / "part.parts"
    assert sorted(p.name for p in parts.glob("*.npz")) == ["000000000.npz", "000000008.npz", "000000016.npz"]
    (parts / "000000008.npz").unlink()
    before = (parts / "000000000.npz").stat().st_mtime_ns
    whole = (parts / "000000016.npz").read_bytes()
    (parts / "000000016.npz").write_bytes(whole[:300] + b"damage" + whole[306:])
    kept = []
    monkeypatch.setattr(npz, "merge_npz", lambda files, path: (kept.append(files[0].stat().st_mtime_ns), merge(files, path)))
    with pytest.raises(UserError, match="unfinished run with other settings"):
        run("sample.py", *arguments, "--num_steps=4")
    settings = (parts / "settings.json").read_bytes()
    for lost in (lambda: (parts / "settings.json").write_bytes(b"\xff"), (parts / "settings.json").unlink):
        lost()
        with pytest.raises(UserError, match="unfinished run with other settings: delete it"):
            run("sample.py", *arguments)
    (parts / "settings.json").write_bytes(settings)
    run("sample.py", *arguments)
    assert kept == [before] and close(load(trained, "part"), samples)
    monkeypatch.setattr(npz, "merge_npz", power_cut)
    for brightness in (10, 200):  # of the image whose code is taken: the second run must not go on with the first's
        Image.new("L", (28, 28), brightness).save(trained / "source.png")
        with pytest.raises(KeyboardInterrupt if brightness == 10 else UserError):
            run("sample.py", *arguments, "--name=source", f"--encode={trained / 'source.png'}", "--class_label=1")


def test_images_that_are_not_finite_are_not_written(trained):
    with pytest.raises(UserError, match="the images are not finite"):
        run("sample.py", f"--out_dir={trained}", "--name=inf", *SAMPLE, "--guidance=1e300")
    assert not (trained / "inf.npz").exists() and not list((trained / "inf.parts").glob("*.npz"))
    run("sample.py", f"--out_dir={trained}", "--name=inf", *SAMPLE, "--num_images=2")  # and nothing is in the way


def test_codes_by_hand_and_from_images(trained):
    run("sample.py", f"--out_dir={trained}", "--name=hand", *SAMPLE, "--code=4,0,2", "--class_label=7")
    hand = load(trained, "hand")
    assert (hand["codes"] == [4, 0, 2]).all() and (hand["labels"] == 7).all()
    images, labels, _ = data.load("fashion-mnist-10k")
    np.savez(trained / "given.npz", images=images[:3], labels=labels[:3])
    np.savez(trained / "odd.npz", images=images[:3], labels=labels[:3] + 10)
    with pytest.raises(UserError, match=r"has classes \d+ ... 1\d: this model has 10, 0 ... 9"):
        run("sample.py", f"--out_dir={trained}", "--name=npz", *SAMPLE, f"--encode={trained / 'odd.npz'}")
    run("sample.py", f"--out_dir={trained}", "--name=npz", *SAMPLE, f"--encode={trained / 'given.npz'}")
    assert load(trained, "npz")["labels"].tolist() == labels[[0, 1, 2, 0, 1]].repeat(4).tolist()
    (trained / "given").mkdir()
    for i in range(3):
        Image.fromarray(images[i, ..., 0]).save(trained / "given" / f"{i}.png")
    with pytest.raises(UserError, match="has no class labels: say --class_label="):
        run("sample.py", f"--out_dir={trained}", "--name=folder", *SAMPLE, f"--encode={trained / 'given'}")
    run("sample.py", f"--out_dir={trained}", "--name=folder", *SAMPLE, f"--encode={trained / 'given'}", "--class_label=2")
    assert (load(trained, "folder")["labels"] == 2).all()
    assert np.array_equal(load(trained, "folder")["codes"], load(trained, "npz")["codes"])
    run("sample.py", f"--out_dir={trained}", "--name=set", *SAMPLE, "--encode=fashion-mnist-10k", "--guidance=2")
    assert (load(trained, "set")["nfe"] == 10).all()  # D(z) and D(null)
    assert len(np.unique(load(trained, "set")["labels"])) > 1


def test_composed_codes(trained):
    """Of four rows: one code, the other, and two that take each position from the one or the other."""
    compose = ["--per_code=2", "--num_images=160", "--num_steps=1"]
    run("sample.py", f"--out_dir={trained}", "--name=hands", *SAMPLE, *compose, "--code=0,1,2", "--compose=(3, 4,1)")
    codes = load(trained, "hands")["codes"].reshape(20, 4, 2, 3)
    assert (codes[:, :, 0] == codes[:, :, 1]).all()
    assert (codes[:, 0, 0] == [0, 1, 2]).all() and (codes[:, 1, 0] == [3, 4, 1]).all()
    from_second = codes[:, 2:, 0] == [3, 4, 1]
    assert (from_second | (codes[:, 2:, 0] == [0, 1, 2])).all()
    assert len(np.unique(from_second.reshape(-1, 3), axis=0)) == 8  # all mixtures, in 40 draws
    run("sample.py", f"--out_dir={trained}", "--name=again", *SAMPLE, *compose, "--code=0,1,2", "--compose=3,4,1", "--batch_size=7")
    assert close(load(trained, "hands"), load(trained, "again"))
    run("sample.py", f"--out_dir={trained}", "--name=data", *SAMPLE, *compose, "--encode=fashion-mnist-10k",
        "--compose=fashion-mnist-10k")
    made, labels = load(trained, "data"), data.load("fashion-mnist-10k")[1]
    order = np.concatenate(data.split(10_000, 16))  # what it was trained on, then what was held out
    codes, c = made["codes"].reshape(20, 4, 2, 3)[:, :, 0], made["labels"].reshape(20, 4, 2)[:, :, 0]
    assert (c[:, 0] == labels[order[:20]]).all() and (c[:, 1] == labels[np.roll(order, 1)[:20]]).all()
    assert (c[:, 2:] == c[:, :2]).all() and len(np.unique(codes[:, 0], axis=0)) > 1
    assert ((codes[:, 2:] == codes[:, :1]) | (codes[:, 2:] == codes[:, 1:2])).all()


@pytest.mark.parametrize("arguments, message", [
    (["--class_label=10"], "class_label 10 is out of range: this model has 10 classes, 0 ... 9"),
    (["--class_label=-2"], "out of range"),
    (["--code=1,2"], r"--code takes 3 numbers in 0 ... 4, not \(1, 2\)"),
    (["--code=1,2,5"], "--code takes 3 numbers"),
    (["--code=1,2,x"], "code takes a tuple"),
    (["--code=1,2,3", "--encode=x.png"], "choose one"),
    (["--encode=nothing"], "there is no data set 'nothing'"),
    (["--sigma_min=90"], "sigma_min 90.0 must be below sigma_max 80.0"),
    (["--rho=inf"], "rho must be positive and finite, not inf"),
    (["--guidance=inf"], "guidance and temperature must be finite"),
    (["--num_steps=0"], "num_steps must be positive"),
    (["--sedd_steps=0"], "sedd_steps must be positive"),
    (["--prior=gpt"], "--prior is ar or sedd, not gpt"),
    (["--prior=sedd", "--sedd_sampler=tweedie"], "--sedd_sampler is first-hitting, analytic or euler"),
    (["--prior=sedd", "--sedd_sampler=analytic", "--eta=1"], "eta is a probability below 1, not 1.0"),
    (["--prior=sedd", "--sedd_sampler=analytic", "--eta=-0.1"], "eta is a probability below 1"),
    (["--prior=sedd", "--sedd_sampler=analytic", "--eta=nan"], "eta takes a float"),
    (["--name=a/b"], "--name=a/b names the two files in out_dir: it can't have folders"),
    (["--name=.."], "can't have folders"),
    (["--prior=sedd", "--t0=0.6"], "from t1 0.55 down to t0 0.6: 0 <= t0 < t1 <= 1"),
    (["--prior=sedd", "--eta=0.02"], "say --sedd_sampler=analytic"),
    (["--sedd_sampler=analytic"], "sedd_sampler is for --prior=sedd"),
    (["--eta=0.02"], "eta is for --prior=sedd"),
    (["--prior=sedd", "--temperature=0.5"], "temperature is for --prior=ar"),
    (["--gamma=0.05"], "gamma is the churn of restarts: there are none"),
    (["--restarts=(3,1,0.06,0.3),", "--S_churn=3"], "the churn of restarts is gamma"),
    (["--restarts=(3,1,0.3,0.06),"], "restarts has .3, 1, 0.3, 0.06.: N_restart and num_steps are 2 or more"),
    (["--restarts=39"], "restarts takes a tuple"),
    (["--compose=1,2,3"], "give the first by --code or --encode"),
    (["--code=1,2,3", "--compose=1,2"], r"--compose takes 3 numbers in 0 ... 4, not \(1, 2\)"),
    (["--code=1,2,3", "--compose=nothing"], "there is no data set 'nothing'"),
    (["--code=1,2,True"], "--code takes"),
    (["--batch_size=0"], "batch_size must be positive"),
    (["--device=tpu"], "--device=tpu can't be used here: it is auto, cpu, cuda or mps"),
    (["--out_dir=/nowhere"], r"there is no checkpoint /nowhere/stage1.pt: run `python train_stage1.py"),
])
def test_bad_input(trained, arguments, message):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    with pytest.raises(UserError, match=message) as error:
        run("sample.py", f"--out_dir={trained}", "--name=bad", *SAMPLE, *arguments)
    assert "\n" not in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(trained):
    with pytest.raises(UserError, match="--device=cuda can't be used here"):
        run("sample.py", f"--out_dir={trained}", "--name=bad", *SAMPLE, "--device=cuda")


def test_checkpoints_that_do_not_fit(trained, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken, ignore=shutil.ignore_patterns("*.previous.pt"))
    whole = (trained / "prior_ar.pt").read_bytes()
    (broken / "prior_ar.pt").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="prior_ar.pt is truncated or damaged"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    (broken / "prior_ar.pt").unlink()
    with pytest.raises(UserError, match=r"there is no checkpoint .*prior_ar.pt: run `python train_prior.py"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    (broken / "prior_ar.pt").write_bytes(whole)
    state = torch.load(trained / "stage1.pt")
    other = {**state, "model_args": {**state["model_args"], "model_channels": 16}}
    torch.save(other, broken / "stage1.pt")
    with pytest.raises(UserError, match="another architecture than this DisCoDiff"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    torch.save(state, broken / "stage1.pt")
    prior = torch.load(trained / "prior_ar.pt")
    torch.save({**prior, "model_args": {**prior["model_args"], "dim": 32}}, broken / "prior_ar.pt")
    with pytest.raises(UserError, match="another architecture than this Prior"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    torch.save({k: v for k, v in prior.items() if k != "encoder"}, broken / "prior_ar.pt")
    with pytest.raises(UserError, match="is not a checkpoint of train_prior.py"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    shutil.copy(trained / "prior_sedd.pt", broken / "prior_ar.pt")
    with pytest.raises(UserError, match="prior_ar.pt holds a prior of the kind 'sedd', not 'ar'"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    torch.save({**prior, "model_args": {**prior["model_args"], "num_latents": 4}}, broken / "prior_ar.pt")
    with pytest.raises(UserError, match=r"prior_ar.pt has m, k, classes = \[4, 5, 10\], stage 1 has \[3, 5, 10\]"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)
    (broken / "prior_ar.pt").write_bytes(whole)
    (broken / "prior_sedd.pt").unlink()
    with pytest.raises(UserError, match="prior_sedd.pt: run `python train_prior.py --prior=sedd --out_dir="):
        run("sample.py", f"--out_dir={broken}", *SAMPLE, "--prior=sedd")
    state["ema"]["model.out_conv.bias"] += 1
    torch.save(state, broken / "stage1.pt")
    with pytest.raises(UserError, match="trained on codes of another stage 1"):
        run("sample.py", f"--out_dir={broken}", *SAMPLE)


def test_plain_edm(tmp_path):
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--num_latents=0", "--class_cond=False")
    run("sample.py", f"--out_dir={tmp_path}", *SAMPLE)
    made = load(tmp_path)
    assert made["codes"].shape == (20, 0) and (made["labels"] == -1).all()
    with pytest.raises(UserError, match="this model has no discrete latents"):
        run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, "--guidance=2")
    with pytest.raises(UserError, match="trained without classes"):
        run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, "--class_label=0")
    with pytest.raises(UserError, match="nothing to train a prior on"):
        run("train_prior.py", f"--out_dir={tmp_path}", "--device=cpu")
