import ast
import inspect
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill

from model import DisCoDiff, draw_codes, gumbel_softmax
from noise import SeededNoise, gumbel_noise, seed_of, seeded_generator
from prior import Prior
from sedd import SEDD, absorb, analytic_probs, denoise_probs, euler_probs, log_linear, score_entropy, sedd_loss
from unet import CrossAttention, UNet, edm_settings, from_edm

REFERENCE = Path(__file__).parent / "reference"
SHAPES = json.loads((REFERENCE / "edm_shapes.json").read_text())
SMALL = dict(img_resolution=16, img_channels=3, label_dim=10, model_channels=64, channel_mult=(1, 2), num_blocks=1,
             attn_resolutions=(8,), dropout=0.1, num_latents=3, codebook_size=5, latent_dim=12, latent_layers=2,
             encoder_dim=24, encoder_layers=2, encoder_heads=3)


@pytest.mark.parametrize("name", ["adm_tiny", "adm_uncond"])
def test_denoiser_equals_edm(name):
    state = {n: fill(n, shape) for n, shape in SHAPES[name]["shapes"].items()}
    model = DisCoDiff(num_latents=0, **edm_settings(state)).eval()
    model.load_state_dict(from_edm(state))
    with np.load(REFERENCE / f"{name}.npz") as reference:
        x, sigma, one_hot, D = (torch.from_numpy(reference[k]) for k in ("x", "sigma", "labels", "D"))
    labels = torch.where(one_hot.sum(1) > 0, one_hot.argmax(1), -1) if one_hot.shape[1] else None
    with torch.no_grad():
        assert (model.denoise(x, sigma, labels) - D).abs().max() < 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_settings_are_read_off_edms_names_and_shapes(name):
    state = {n: torch.empty(shape, device="meta") for n, shape in SHAPES[name]["shapes"].items()}
    wanted = {k: tuple(v) if isinstance(v, list) else v for k, v in SHAPES[name]["config"].items() if k != "dropout"}
    assert edm_settings(state) == wanted


def test_imagenet64_has_edms_parameters():
    """config/imagenet64.py is EDM's network, and the paper's new layers."""
    config = {}
    for node in ast.parse((Path(__file__).parent.parent / "config" / "imagenet64.py").read_text()).body[1:]:
        config[node.targets[0].id] = ast.literal_eval(node.value)
    network = {k: v for k, v in config.items() if k in inspect.signature(DisCoDiff).parameters
               or k in inspect.signature(UNet).parameters}
    with torch.device("meta"):
        model = DisCoDiff(64, 3, 1000, **network)
    plain = {n: p for n, p in model.model.named_parameters() if ".cross." not in n}
    assert sum(p.numel() for p in plain.values()) == 295_899_267
    assert {f"model.{n}": list(p.shape) for n, p in plain.items()} == SHAPES["imagenet64"]["shapes"]
    assert model.latents.codebook.shape == (10, 100, 192) and len(model.latents.blocks) == 6
    assert len(model.encoder.blocks) == 12 and model.encoder.patches.weight.shape == (768, 3, 8, 8)
    assert model.encoder.blocks[0].heads == 12
    attention = [n for n, _ in model.model.named_modules() if n.endswith(".qkv")]
    cross = [n for n, _ in model.model.named_modules() if n.endswith(".cross")]
    assert [n.removesuffix("qkv") for n in attention] == [n.removesuffix("cross") for n in cross]
    wanted = dict(batch_size=4096, lr=1e-4, encoder_lr=1e-4, warmup_images=10e6, total_images=2.5e9, tau=1, null_prob=0.1,
                  ema_halflife_images=50e6, ema_rampup=0.05, P_mean=-1.2, P_std=1.2, sigma_data=0.5, dropout=0.1)
    assert {k: config[k] for k in wanted} == wanted


def test_latents_change_nothing_at_step_0():
    """New layers start as the identity: fine-tuning starts from EDM's output, to the bit."""
    model, plain = DisCoDiff(**SMALL).eval(), DisCoDiff(**{**SMALL, "num_latents": 0}).eval()
    state = {n: fill(n, tuple(p.shape)) for n, p in plain.state_dict().items()}
    plain.load_state_dict(state)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("cross" in n or n.startswith(("latents", "encoder")) for n in missing)
    x, sigma, c = torch.randn(4, 3, 16, 16), torch.rand(4) + 0.1, torch.arange(4)
    keys_values = model.condition(torch.randint(5, (4, 3)))
    assert len(keys_values) == sum("cross.kv.weight" in n for n in missing) > 2
    assert torch.equal(model.denoise(x, sigma, c, keys_values), plain.denoise(x, sigma, c))


def used_model():
    """A model whose zero-initialised layers are not zero, so that everything has an effect."""
    torch.manual_seed(1)
    model = DisCoDiff(**SMALL).eval()
    for n, p in model.named_parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
def test_cross_attention_is_softmax_of_queries_and_keys_times_values():
    """Written out (sec. 3.3): projections of the pixels as queries, of the tokens as keys and values, two heads."""
    cross = CrossAttention(128, 24)
    for name, p in cross.named_parameters():
        p.data = fill(name, p.shape)
    x, tokens = torch.randn(2, 128, 4, 4), torch.randn(2, 5, 24)
    q = cross.q(cross.norm(x)).flatten(2).unflatten(1, (2, 64))  # (B, heads, c, HW)
    k, v = (t.unflatten(2, (2, 64)) for t in cross.kv(tokens).chunk(2, dim=2))  # (B, m, heads, c)
    weights = (torch.einsum("bhcp,bmhc->bhpm", q, k) / 8).softmax(-1)
    a = torch.einsum("bhpm,bmhc->bhcp", weights, v).reshape(x.shape)
    assert (cross(x, *cross.keys_values(tokens)) - (x + cross.proj(a))).abs().max() < 1e-5


@torch.no_grad()
def test_each_latent_matters_and_dropped_ones_do_not():
    model = used_model()
    x, sigma = torch.randn(1, 3, 16, 16), torch.ones(1)

    def D(codes, drop=None):
        return model.denoise(x, sigma, None, model.condition(torch.tensor([codes]), drop))

    for other in ([1, 0, 0], [0, 1, 0], [0, 0, 1]):
        assert (D(other) - D([0, 0, 0])).abs().max() > 1e-4
    dropped = torch.tensor([True])
    assert torch.equal(D([0, 0, 0], dropped), D([4, 2, 1], dropped))
    assert (D([0, 0, 0], dropped) - D([0, 0, 0])).abs().max() > 1e-4


@torch.no_grad()
def test_hard_codes_equal_one_hot_rows():
    model, z = used_model(), torch.tensor([[1, 4, 0], [2, 2, 3]])
    hard, soft = model.condition(z), model.condition(F.one_hot(z, 5).float())
    assert hard.keys() == soft.keys() and all(torch.equal(a, b) for block in hard for a, b in zip(hard[block], soft[block]))


def test_loss_reaches_every_parameter():
    model = used_model().train()
    y = torch.randn(4, 3, 16, 16)
    D, logits = model(y, torch.randn_like(y), torch.ones(4), torch.arange(4), torch.randn(4, 3, 5),
                      torch.tensor([True, False, False, False]))
    D.square().sum().backward()
    assert logits.shape == (4, 3, 5)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gumbel_softmax():
    logits = torch.tensor([1.0, 0.0, -2.0]).expand(200_000, 3)
    gumbel = gumbel_noise(logits.shape, seeded_generator("cpu", "test", 0))
    soft = gumbel_softmax(logits, 1.0, gumbel)
    assert torch.allclose(soft.sum(-1), torch.ones(()))
    assert torch.allclose(soft[0], ((logits + gumbel)[0].exp() / (logits + gumbel)[0].exp().sum()))
    hard = F.one_hot(draw_codes(logits, gumbel), 3).float()
    assert (gumbel_softmax(logits, 0.001, gumbel) - hard).abs().mean() < 1e-3  # tau -> 0
    # draws are exact: chi-square with 2 degrees of freedom, 13.8 at p = 0.001
    expected = logits[0].softmax(0) * len(logits)
    assert ((hard.sum(0) - expected) ** 2 / expected).sum() < 13.8
    # Gumbel(0, 1) has the mean 0.5772 (Euler's constant) and the variance pi^2 / 6
    assert abs(gumbel.mean() - 0.5772) < 0.01 and abs(gumbel.var() - math.pi ** 2 / 6) < 0.02


@torch.no_grad()
def test_training_sees_codes_that_are_relaxed_by_tau():
    """softmax((logits + gumbel) / tau), with tau = 2, which no power of leaves as it is."""
    model, g = used_model(), torch.Generator().manual_seed(0)
    y, noise, gumbel = (torch.randn(2, *shape, generator=g) for shape in ((3, 16, 16), (3, 16, 16), (3, 5)))
    D, logits = model(y, noise, torch.ones(2), None, gumbel, None, 2.0)
    weights = (logits / 2).exp() * (gumbel / 2).exp()
    z = weights / weights.sum(2, keepdim=True)
    assert (D - model.denoise(y + noise, torch.ones(2), None, model.condition(z))).abs().max() < 1e-5
    assert (D - model(y, noise, torch.ones(2), None, gumbel)[0]).abs().max() > 1e-3  # tau = 1


@pytest.mark.parametrize("changes, message", [
    (dict(img_resolution=15), "15 pixels can't be halved"), (dict(attn_resolutions=(7,)), r"attn_resolutions has \[7\]"),
    (dict(encoder_patch=5), "encoder_patch 5"), (dict(encoder_heads=5), "24 is not by 5")])
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        DisCoDiff(**{**SMALL, **changes})


def random_prior(label_dim=2):
    torch.manual_seed(0)
    prior = Prior(num_latents=3, codebook_size=4, label_dim=label_dim, layers=2, dim=16, heads=2).eval()
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return prior


@torch.no_grad()
def test_prior_is_causal_and_sees_the_class():
    prior, z, c = random_prior(), torch.tensor([[0, 1, 2]]), torch.tensor([0])
    base = prior(z, c)
    for i in range(3):
        other = z.clone()
        other[0, i] = 3
        changed = (prior(other, c) - base).abs().amax(dim=(0, 2)) > 1e-6
        assert changed.tolist() == [j > i for j in range(3)]
    assert ((prior(z, c + 1) - base).abs().amax(dim=(0, 2)) > 1e-4).all()
    assert ((prior(z, c - 1) - base).abs().amax(dim=(0, 2)) > 1e-4).all()  # -1: no class


def given(gumbel):
    """An object that draws this noise (B, m, k)."""
    return SimpleNamespace(gumbel=lambda m, k: gumbel)


@torch.no_grad()
def test_cached_sampling_equals_the_full_network():
    prior, c = random_prior(), torch.tensor([0, 1, -1, 1])
    gumbel = gumbel_noise((4, 3, 4), seeded_generator("cpu", "test", 3))
    z = prior.sample(given(gumbel), c, temperature=0.7)
    assert torch.equal(z, draw_codes(prior(z, c) / 0.7, gumbel))
    mode = prior.sample(given(gumbel), c, temperature=0)
    assert torch.equal(mode, prior(mode, c).argmax(-1))


@torch.no_grad()
def test_the_cache_holds_all_tokens_before():
    """In a network whose attention decides: 1,200 draws, of which rounding may change a few."""
    torch.manual_seed(0)
    prior = Prior(num_latents=6, codebook_size=8, label_dim=2, layers=2, dim=16, heads=2).eval()
    for p in prior.parameters():
        torch.nn.init.normal_(p)
    gumbel, c = gumbel_noise((200, 6, 8), seeded_generator("cpu", "test", 4)), torch.arange(200) % 3 - 1
    z = prior.sample(given(gumbel), c, temperature=3.0)
    assert (z == draw_codes(prior(z, c) / 3, gumbel)).double().mean() > 0.995 and len(z.unique(dim=0)) > 100


@torch.no_grad()
def test_prior_samples_its_own_distribution():
    prior, n = random_prior(label_dim=0), 40_000
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))  # 64 codes
    log_p = prior(every).log_softmax(-1).gather(2, every[..., None]).sum(dim=(1, 2))
    assert abs(log_p.exp().sum() - 1) < 1e-5
    z = prior.sample(given(gumbel_noise((n, 3, 4), seeded_generator("cpu", "test", 5))))
    counts = torch.bincount((z * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    expected = log_p.exp() * n
    assert expected.min() > 1
    assert ((counts - expected) ** 2 / expected).sum() < 103.4  # chi-square, 63 degrees of freedom, p = 0.001


def known_codes(n):
    """z_1 uniform, z_2 = z_1 with probability 0.9, z_3 = the class: entropy 2 + 0.63 + 0 bits."""
    c, first = torch.randint(4, (n,)), torch.randint(4, (n,))
    second = torch.where(torch.rand(n) < 0.9, first, (first + torch.randint(1, 4, (n,))) % 4)
    return torch.stack([first, second, c], 1), c


ENTROPY = 2 - 0.9 * math.log2(0.9) - 0.1 * math.log2(0.1 / 3)


def test_prior_reaches_the_entropy_of_a_known_distribution():
    torch.manual_seed(0)
    prior = Prior(num_latents=3, codebook_size=4, label_dim=4, layers=2, dim=32, heads=2)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)

    def bits(z, c):
        return prior.nats(z, c).mean() / math.log(2)

    assert bits(*known_codes(1000)).item() == pytest.approx(6, abs=1e-4)  # starts uniform: m log2 k
    for _ in range(250):
        optimizer.zero_grad()
        bits(*known_codes(256)).backward()
        optimizer.step()
    assert bits(*known_codes(20_000)).item() == pytest.approx(ENTROPY, abs=0.06)


# SEDD-absorb

ABSORB = {k: torch.from_numpy(v) for k, v in np.load(REFERENCE / "sedd_absorb.npz").items()}


def test_sedd_equals_its_authors():
    """Lou et al.'s program, float64, random log-scores."""
    t, x, x0, log_score = (ABSORB[k] for k in ("t", "x", "x0", "log_score"))
    sigma, dsigma = log_linear(t)
    s = t - ABSORB["step"]
    for mine, theirs in ((sigma, "sigma"), (dsigma, "dsigma"), (score_entropy(log_score, sigma, x, x0), "score_entropy"),
                         (sedd_loss(log_score, t, x, x0), "loss"), (analytic_probs(log_score, x, t, s), "analytic_probs"),
                         (euler_probs(log_score, x, t, s), "euler_probs"), (denoise_probs(log_score, x, t), "denoise_probs")):
        assert mine.dtype == torch.float64 and mine.shape == ABSORB[theirs].shape
        assert torch.allclose(mine, ABSORB[theirs], rtol=1e-6, atol=1e-6 if mine.ndim > 1 else 0), theirs


def test_score_entropy_is_zero_at_the_true_score_alone():
    sigma, x, x0 = torch.tensor([0.01, 3.0], dtype=torch.float64), torch.full((2, 1), 3), torch.tensor([[0], [2]])
    p = torch.nn.functional.one_hot(x0, 3).double().clamp_min(1e-12)
    true = F.pad((p / torch.expm1(sigma)[:, None, None]).log(), (0, 1))
    assert score_entropy(true, sigma, x, x0).abs().max() < 1e-8
    for change in (0.1, -0.1):
        assert (score_entropy(true + change, sigma, x, x0) > 1e-4).all()
    assert (score_entropy(true, sigma, x0, x0) == 0).all()  # no mask, nothing to learn


def test_score_entropy_is_computed_in_float32_or_better():
    """At the smallest sigma of training, against float64: where e^sigma - 1 without expm1 is off by 2e-5 and more."""
    g = torch.Generator().manual_seed(0)
    logits, x0 = torch.randn(200, 5, 8, generator=g).bfloat16(), torch.randint(8, (200, 5), generator=g)
    x, t = torch.full_like(x0, 8), torch.full((200,), 1.0e-3)
    sigma = log_linear(t)[0]

    def loss(logits, t):
        return sedd_loss(F.pad(logits - torch.expm1(log_linear(t)[0]).log()[:, None, None] - math.log(8), (0, 1)), t, x, x0)

    low, high = loss(logits.float(), t), loss(logits.double(), t.double())
    assert low.dtype == torch.float32 and torch.allclose(low.double(), high, rtol=1e-5)
    half = score_entropy(F.pad(logits, (0, 1)), sigma, x, x0)
    assert half.dtype == torch.float32 and torch.equal(half, score_entropy(F.pad(logits.float(), (0, 1)), sigma, x, x0))


def test_what_the_loss_of_uniform_scores_is():
    """(1 - EPS) m ln V on average: the bound on -ln p = m ln V but for the terms of order EPS."""
    t, g = 1e-3 + (1 - 1e-3) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000, torch.Generator().manual_seed(0)
    x0 = torch.randint(4, (100_000, 3), generator=g)
    x = absorb(x0, t, torch.rand(100_000, 3, generator=g), mask=4)
    log_score = (-torch.expm1(log_linear(t)[0]).log() - math.log(4))[:, None, None].expand(-1, 3, 5)
    assert sedd_loss(log_score, t, x, x0).mean().item() == pytest.approx(0.999 * 3 * math.log(4), rel=0.02)
    masks_known = torch.where(x == 4, 1 / (0.999 * t[:, None]), 0).mean()  # the part that the draws of x decide
    assert (sedd_loss(log_score, t, x, x0).mean() / masks_known).item() == pytest.approx(0.999 * 3 * math.log(4), rel=1e-6)


def small_sedd(**settings):
    torch.manual_seed(0)
    return SEDD(**dict(dict(num_latents=3, codebook_size=4, label_dim=4, layers=2, dim=32, heads=2), **settings))


def test_sedd_starts_uniform_and_sees_everything_but_what_is_masked():
    model = small_sedd().eval()
    x, t = torch.tensor([[4, 1, 4], [4, 4, 4]]), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        log_score = model(x, t)
        assert log_score.shape == (2, 3, 5) and log_score[0, 1, 1] == 0 and (log_score[..., 4] == 0).all()
        p = log_score[1, :, :4].exp() * torch.expm1(log_linear(t)[0])[1]
        assert torch.allclose(p, torch.full((3, 4), 0.25))
        z = torch.randint(4, (50, 3))
        assert torch.allclose(model.nats(z, None, torch.Generator()), torch.tensor(3 * math.log(4)))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        base = model(x, t, torch.tensor([0, 1]))
        for other in (model(torch.tensor([[4, 2, 4], [4, 4, 4]]), t, torch.tensor([0, 1])),
                      model(x, torch.tensor([0.6, 0.9]), torch.tensor([0, 1])), model(x, t, torch.tensor([3, 1]))):
            a, b = base[0, [0, 2], :4].log_softmax(1), other[0, [0, 2], :4].log_softmax(1)
            assert (a - b).abs().amax(1).min() > 1e-3 and torch.equal(base[1], other[1])  # token, time and class; both ways
        assert torch.equal(model(x, t), model(x, t, torch.tensor([-1, -1])))  # labels can be left out
    without = small_sedd(label_dim=0)
    assert torch.equal(without(x, t), without(x, t, torch.tensor([2, 3])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sedd_learns_a_known_distribution(dtype):
    """Its bound comes down to the entropy, and first-hitting draws from the distribution; in bfloat16 too."""
    model = small_sedd()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    worst = 0
    for step in range(300):
        z, c = known_codes(128)
        t = 1e-3 + (1 - 1e-3) * torch.rand(128)
        x = absorb(z, t, torch.rand(128, 3), mask=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = sedd_loss(model(x, t, c), t, x, z).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        worst = max(worst, loss.item()) if step > 100 else 0
    assert worst < 3 * 6 * math.log(2)  # no step blew up
    with torch.no_grad():
        z, c = known_codes(5000)
        bound = model.nats(z, c, torch.Generator().manual_seed(0)).mean().item() / math.log(2)
        assert bound == pytest.approx(ENTROPY, abs=0.12)
        codes = model.sample(SeededNoise("test", range(5000)), c)
    assert (codes[:, 2] == c).double().mean() > 0.97
    assert (codes[:, 0] == codes[:, 1]).double().mean().item() == pytest.approx(0.9, abs=0.04)
    assert (torch.bincount(codes[:, 0], minlength=4) / 5000 - 0.25).abs().max() < 0.04


def test_sedd_of_an_odd_width():
    with pytest.raises(ValueError, match="must be even, for its sines and cosines: 7 is not"):
        small_sedd(dim=7, heads=1)


def test_absorb_masks_by_time():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    u = (0.999 * t)[:, None] + torch.tensor([-1e-6, 1e-6])
    assert absorb(torch.tensor([[1, 2]] * 3), t, u.clamp_min(0), mask=7).tolist() == [[1, 2], [7, 2], [7, 2]]


def test_seeds_depend_on_the_whole_key():
    keys = [("a", 0), ("a", 1), ("b", 0), ("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("a", 0, 2 ** 40), ("a",)]
    assert len({seed_of(*key) for key in keys}) == len(keys) and seed_of("a", 0, 1) == seed_of("a", 0, 1)
    draws = {torch.rand(1, generator=seeded_generator("cpu", *key)).item() for key in keys}
    assert len(draws) == len(keys)
