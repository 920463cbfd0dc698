"""The samplers of images, curvature and loss: the authors' numbers, the order of the error, closed forms."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from configurator import UserError, configure
from diffusion import curvature, heun, loss_at, noise_levels, restart, restart_loops
from model import DisCoDiff, denoiser

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


def test_steps_are_what_the_denoiser_is_given():
    """A list that gets (t, x) at the start of each step, and at the end; the result stays the same."""
    latents, calls, steps = torch.from_numpy(REFERENCE["latents"]), [], []

    def denoise(x, sigma):
        calls.append((sigma, x))
        return exact_denoiser()(x, sigma)

    x = heun(denoise, latents, 18, steps=steps)
    assert torch.equal(x, heun(exact_denoiser(), latents, 18)) and torch.equal(x, steps[-1][1])
    assert [t.item() for t, _ in steps] == [*noise_levels(18, 0.002, 80, 7).tolist(), 0]
    for (t, x), (sigma, given) in zip(steps[:-1], calls[::2], strict=True):  # two evaluations a step, but for the last
        assert t == sigma and torch.equal(x, given)


def test_one_step_is_one_denoising():
    calls = []
    latents = torch.ones(1, 2)
    x = heun(exact_denoiser(calls), latents, num_steps=1)
    assert calls == [80.0] and torch.allclose(x, exact_denoiser()(80 * latents.double(), torch.tensor(80.0)))


def of_gaussian(sd, mean=0.0):
    """The exact denoiser of N(mean, sd^2 I)."""
    return lambda x, t: (sd ** 2 * x + t ** 2 * mean) / (sd ** 2 + t ** 2)


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)])
@pytest.mark.parametrize("t", [0.01, 0.3, 5.0])
def test_a_single_gaussian_has_straight_trajectories(t, shape, g):
    x, mean = (torch.randn(9, *shape, generator=g, dtype=torch.float64) for _ in range(2))
    assert curvature(of_gaussian(0.2, mean[:1]), 3 * x, torch.tensor(t, dtype=torch.float64)).max() < 1e-7
    assert curvature(exact_denoiser(), 3 * x.flatten(1)[:, :2], torch.tensor(0.3, dtype=torch.float64)).max() > 1e-3


@pytest.mark.parametrize("radius", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_trajectories_on_circles_have_the_curvature_of_the_circle(radius, shape, g):
    """Circles in any plane of the space, around any centre; the speed makes no difference."""
    dim, angles = math.prod(shape), torch.arange(6, dtype=torch.float64)
    plane, _ = torch.linalg.qr(torch.randn(dim, 2, generator=g, dtype=torch.float64))  # orthonormal u, v
    turn = plane @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64) @ plane.T
    centre = torch.randn(dim, generator=g, dtype=torch.float64)
    x = (centre + radius * torch.stack([angles.cos(), angles.sin()], 1) @ plane.T).view(6, *shape)
    for speed, dt in ((1, 1e-3), (5, 1e-4)):
        kappa = curvature(lambda x, t: x - t * speed * ((x.flatten(1) - centre) @ turn).view_as(x), x,
                          torch.tensor(2.0, dtype=torch.float64), dt)
        torch.testing.assert_close(kappa, torch.full((6,), 1 / radius, dtype=torch.float64), rtol=2e-3, atol=0)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 10.0])
def test_the_loss_of_the_best_denoiser_of_one_gaussian_is_1(sigma, g):
    """Its mean square error is sd^2 sigma^2 / (sd^2 + sigma^2) = 1 / lambda. D = 0 has sd^2 lambda."""
    y, n = (torch.randn(50, 3, 20, 20, generator=g, dtype=torch.float64) for _ in range(2))
    losses = loss_at(of_gaussian(0.5), 0.5 * y, n, torch.tensor(sigma), 0.5)
    assert losses.shape == (50,) and losses.mean().item() == pytest.approx(1, abs=0.02)
    nothing = loss_at(lambda x, sigma: 0 * x, 0.5 * y, n, torch.tensor(sigma), 0.5)
    assert nothing.mean().item() == pytest.approx(1 + (0.5 / sigma) ** 2, rel=0.02)


def small_model(to_emb):
    torch.manual_seed(0)
    model = DisCoDiff(8, 1, 3, num_latents=2, codebook_size=4, latent_dim=8, latent_layers=1, latent_heads=1,
                      encoder_patch=4, encoder_dim=8, encoder_layers=1, encoder_heads=1, model_channels=8,
                      channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0, latents_to_emb=to_emb).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("to_emb", [False, True])
@torch.no_grad()
def test_guidance(to_emb):
    model = small_model(to_emb)
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


@torch.no_grad()
def test_guidance_at_some_noise_levels_only():
    """From `low` up to `high`, ends included, as without an interval; elsewhere the plain model, of B images instead of 2B."""
    model = small_model(False)
    x, c, z = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]), torch.tensor([[0, 1], [2, 3], [1, 1]])
    plain, everywhere, at_some = (denoiser(model, c, z, **settings) for settings in (
        {}, dict(guidance=2.5), dict(guidance=2.5, interval=(0.5, 5.0))))
    batches = []
    model.model.register_forward_hook(lambda m, args, out: batches.append(len(args[0])))
    for sigma, inside in ((0.49, False), (0.5, True), (2.0, True), (5.0, True), (5.01, False)):
        sigma = torch.tensor(sigma, dtype=torch.float64)
        wanted = (everywhere if inside else plain)(x, sigma)
        batches.clear()
        assert torch.equal(at_some(x, sigma), wanted) and batches == [6 if inside else 3]
        assert (plain(x, sigma) - everywhere(x, sigma)).abs().max() > 1e-4
