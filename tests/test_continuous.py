"""Continuous latents: their draws and divergence, stage 1's loss, and all the way to samples."""
import math

import numpy as np
import pytest
import torch
from conftest import checkpoint, load, log_of, same_training
from scripts import PRIOR, SAMPLE, TINY, Script, run
from torch.distributions import Normal
from torch.distributions import kl_divergence as divergence_of

import coarse
import data
import preview
from configurator import UserError
from continuous import kl_divergence, reparametrised
from model import GaussianEncoder, draw_codes
from noise import gumbel_noise, normal_of
from trained import load_stage1

CONTINUOUS = [*TINY, "--continuous=True", "--kld_weight=0.5"]
DIFFUSION = [*PRIOR, "--prior=diffusion"]


@pytest.fixture(scope="module", autouse=True)
def brief():
    """1,000 images in place of the data set's, and no table of losses."""
    images, labels, _ = data.load("fashion-mnist-10k")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "load", lambda name: (images[:1000], labels[:1000], 10))
        patched.setattr(preview, "print_losses", lambda run: None)
        yield


def test_the_divergence_has_its_closed_form(g):
    said = torch.randn(5, 3, 4, 2, generator=g, dtype=torch.float64)
    wanted = divergence_of(Normal(said[..., 0], (said[..., 1] / 2).exp()), Normal(0, 1)).sum(2)
    assert torch.allclose(kl_divergence(said), wanted, rtol=1e-12) and kl_divergence(torch.zeros(1, 2, 3, 2)).eq(0).all()


def test_noise_is_normal(g):
    """By Kolmogorov and Smirnov's test at p = 0.001, out of uniform draws and out of Gumbel noise; finite at the ends."""
    n = 40_000
    for drawn in (normal_of(torch.rand(n, generator=g)), reparametrised(torch.zeros(n, 2), gumbel_noise((n,), g))):
        far = (torch.special.ndtr(drawn.double().sort().values) - torch.linspace(0, 1, n)).abs().max()
        assert far < 1.95 / math.sqrt(n)
    assert normal_of(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([-5.4, 0, 5.3], abs=0.1)
    assert reparametrised(torch.zeros(2, 2), torch.tensor([math.inf, -math.inf])).isfinite().all()


def test_draws_have_the_encoders_mean_and_variance(g):
    """And the gradient of a draw is 1 for the mean, half its distance from there for the log-variance."""
    said = torch.tensor([[0.7, math.log(0.09)], [-2.0, math.log(4.0)]], requires_grad=True)
    drawn = draw_codes(said.expand(20_000, 1, 2, 2), gumbel_noise((20_000, 1, 2), g))[:, 0]
    assert drawn.mean(0).tolist() == pytest.approx([0.7, -2.0], abs=0.05)
    assert drawn.std(0).tolist() == pytest.approx([0.3, 2.0], rel=0.03)
    grad, = torch.autograd.grad(drawn[7].sum(), said)
    wanted = torch.stack([torch.ones(2), (drawn[7] - said[:, 0]) / 2], 1)
    assert torch.allclose(grad, wanted)


def test_the_encoder_begins_at_unit_scale():
    torch.manual_seed(0)
    said = GaussianEncoder(28, 1, 4, 6, patch=7, dim=32, layers=1, heads=2)(torch.randn(200, 1, 28, 28)).detach()
    assert said.shape == (200, 4, 6, 2) and not said[..., 1].any()
    assert said[..., 0].square().mean().item() == pytest.approx(1, rel=0.3)


# ----------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("network", ["stage 1", "first phase"])
def test_the_weight_of_the_divergence(tmp_path, network):
    """Two weights apart by 2: the encoder's gradients are apart by twice those of the mean divergence of a pixel's share;
    stage 1's loss is a sum over pixels, that of the first phase a mean. Divergences are measured."""
    found = []
    for weight in (1, 3):
        script = Script("train_stage1.py", "default", tmp_path / f"{weight}", "cpu", *TINY, "--continuous=True",
                        f"--kld_weight={weight}", "--encoder_lr=1e-3", "--batch_gpu=4")
        y, c = data.to_float(script.images[script.batches.take(0, 8)]), torch.zeros(8, dtype=torch.int64)
        if network == "stage 1":
            model, (loss, _, _, kld_sum) = script.model, script.gradients(0)
        else:
            phase = coarse.prepare(script.run, dict(step=0))
            model, (loss, kld_sum) = phase.model, coarse.gradients(phase, y, c)
        found.append((loss, [p.grad for p in model.encoder.parameters()]))
    assert found[0][0] == found[1][0]
    kld = kl_divergence(model.encoder(y))
    assert torch.allclose(kld_sum, kld.sum(0), rtol=1e-4)
    mean = kld.sum(1).mean() / (1 if network == "stage 1" else 28 * 28)
    for one, three, of in zip(found[0][1], found[1][1], torch.autograd.grad(2 * mean, [*model.encoder.parameters()])):
        assert torch.allclose(three - one, of, rtol=1e-3, atol=2e-3 * max(one.abs().max(), of.abs().max()))


def test_a_large_weight_makes_the_latents_collapse(tmp_path):
    """The log says so, latent by latent; a small one lets them tell much."""
    bits = {}
    for weight in (0.01, 1000):
        settings = ["--coarse_images=3200", "--coarse_batch=64", "--coarse_lr=0.003", "--log_every=640",
                    "--continuous=True", f"--kld_weight={weight}"]
        script = Script("train_stage1.py", "default", tmp_path / f"{weight}", "cpu", *TINY, *settings)
        coarse.warm_up(script.run, script.all["fetch"], [])
        bits[weight] = [line["kld"] for line in log_of(tmp_path / f"{weight}" / "coarse.jsonl")]
    assert max(bits[1000][-1]) < 0.05 < max(bits[1000][0]) and min(bits[0.01][-1]) > 1


# ----------------------------------------------------------------------------------------------------
# the way to samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a stage 1, and its prior, which has been continued."""
    folder = tmp_path_factory.mktemp("continuous")
    printed = run("train_stage1.py", f"--out_dir={folder}", *CONTINUOUS, "--log_every=24")
    assert printed.endswith(f"is ready; next: python train_prior.py --out_dir={folder} --prior=diffusion\n")
    for images in (150, 300):
        printed = run("train_prior.py", f"--out_dir={folder}", *DIFFUSION, f"--total_images={images}", "--log_every=50")
    assert printed.endswith(f"next: python sample.py --out_dir={folder} --prior=diffusion\n") and "bits" not in printed
    return folder


def test_what_the_logs_say(folder):
    """Of stage 1, the divergence of each latent in bits, and no codes; of the prior, losses of training and of others."""
    for line in (*log_of(folder / "coarse.jsonl"), *log_of(folder / "stage1.jsonl")):
        assert len(line["kld"]) == 3 and min(line["kld"]) > 0 and not {"perplexity", "bits"} & line.keys()
    said = load_stage1(folder)[0].encoder(data.to_float(data.load("fashion-mnist-10k")[0][:500]))
    bits = kl_divergence(said).mean(0) / math.log(2)
    assert log_of(folder / "stage1.jsonl")[-1]["kld"] == pytest.approx(bits.tolist(), rel=0.5)
    lines = log_of(folder / "prior_diffusion.jsonl")
    assert [line["images"] for line in lines] == [50, 100, 150, 200, 250, 300]
    assert all(0 < line["loss"] < 10 and 0 < line["held_out_loss"] < 10 for line in lines)


def test_a_resumed_run_equals_an_undisturbed_one(folder, tmp_path):
    for images in (16, 48):
        run("train_stage1.py", f"--out_dir={tmp_path}", *CONTINUOUS, "--log_every=24", f"--total_images={images}")
    assert same_training(checkpoint(folder), checkpoint(tmp_path))
    run("train_prior.py", f"--out_dir={tmp_path}", *DIFFUSION, "--total_images=300", "--log_every=50")
    assert same_training(*(checkpoint(place, "prior_diffusion.pt") for place in (folder, tmp_path)))


def test_samples_with_latents_of_images_and_of_the_prior(folder):
    """Each row depends on its seed alone; latents of images have the encoder's means; two compose into their mean."""
    printed = run("sample.py", f"--out_dir={folder}", *SAMPLE, "--prior=diffusion", "--per_code=1")
    assert "codes of the prior diffusion, 79 evaluations each" in printed
    made = load(folder)
    assert made["codes"].shape == (20, 3, 5) and made["codes"].dtype == np.float32
    assert len(np.unique(made["codes"][:, 0, 0])) == 20 and made["images"].std() > 0
    run("sample.py", f"--out_dir={folder}", *SAMPLE, "--prior=diffusion", "--per_code=1", "--batch_size=7")
    assert np.allclose(load(folder)["codes"], made["codes"], atol=1e-4)
    run("sample.py", f"--out_dir={folder}", *SAMPLE, "--num_images=400", "--num_steps=1", "--per_code=1",
        "--encode=fashion-mnist-10k", "--guidance=2")
    codes, images = load(folder)["codes"], data.load("fashion-mnist-10k")[0][np.concatenate(data.split(1000, 16))[:400]]
    mean, log_variance = load_stage1(folder)[0].encoder(data.to_float(images)).unbind(-1)
    n = (torch.from_numpy(codes) - mean) / (log_variance / 2).exp()
    assert n.mean().abs() < 0.05 and n.std().item() == pytest.approx(1, abs=0.05)
    run("sample.py", f"--out_dir={folder}", *SAMPLE, "--num_steps=1", "--per_code=1", "--encode=fashion-mnist-10k",
        "--compose=fashion-mnist-10k")
    first, second, *mixed = load(folder)["codes"][:4]
    assert not np.allclose(first, second) and all(np.allclose(of_both, (first + second) / 2, atol=1e-6) for of_both in mixed)


def test_the_encoder_is_probed(folder):
    assert "embeddings of 15" in run("probe.py", f"--out_dir={folder}", "--device=cpu", "--num_train=100", "--k=3")


def test_averaged_latents(tmp_path):
    """Without cross-attention, as Discrete Latent Codes has codes."""
    run("train_stage1.py", f"--out_dir={tmp_path}", *CONTINUOUS, "--conditioning=average", "--total_images=8")
    run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, "--encode=fashion-mnist-10k", "--num_steps=1")
    assert load(tmp_path)["codes"].shape == (20, 3, 5)


def test_plain_edm_has_none(tmp_path):
    run("train_stage1.py", f"--out_dir={tmp_path}", *CONTINUOUS, "--num_latents=0", "--total_images=8", "--log_every=8")
    assert "kld" not in log_of(tmp_path / "stage1.jsonl")[0]


# ----------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize("arguments, message", [
    (["--continuous=True"], "^continuous latents need a --kld_weight above 0"),
    (["--kld_weight=-1"], "kld_weight can't be negative: it is -1.0"),
    (["--continuous=True", "--kld_weight=inf"], "kld_weight must be finite, not inf"),
    (["--kld_weight=1"], "^--kld_weight needs --continuous=True; or, for codes, --prior=ar"),
    (["--continuous=yes"], "continuous takes a bool"),
    (["--continuous=True", "--kld_weight=1", "--codes=out/dlc"], "^--codes brings codes: leave --continuous out$")])
def test_bad_input(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, *arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_codes_and_numbers_are_not_confused(folder, tmp_path):
    codes = tmp_path / "codes"
    run("train_stage1.py", f"--out_dir={codes}", *TINY, "--total_images=8")
    with pytest.raises(UserError, match=r"stage1.pt has codes: say --prior=ar or sedd$"):
        run("train_prior.py", f"--out_dir={codes}", *DIFFUSION)
    for kind in ("ar", "sedd", "rdm"):
        for script, settings in (("train_prior.py", PRIOR), ("sample.py", SAMPLE)):
            with pytest.raises(UserError, match=r"stage1.pt has continuous latents: say --prior=diffusion$"):
                run(script, f"--out_dir={folder}", *settings, f"--prior={kind}")
    with pytest.raises(UserError, match="this model reads continuous latents, not codes: they come from images, not from --code=NUMBERS"):
        run("sample.py", f"--out_dir={folder}", *SAMPLE, "--code=1,2,3")
    with pytest.raises(UserError, match="continuous=False there, True here"):
        run("train_stage1.py", f"--out_dir={codes}", *CONTINUOUS)
    with pytest.raises(UserError, match="continuous=True there, False here"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'other'}", *TINY, f"--init_from={folder}")
    with pytest.raises(UserError, match="kld_weight=0.5 there, 2.0 here"):
        run("train_stage1.py", f"--out_dir={folder}", *CONTINUOUS, "--log_every=24", "--kld_weight=2")
