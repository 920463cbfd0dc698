"""PFGM++, flow matching, VDM++'s weighting and the correction: the authors' numbers, closed forms, runs of the scripts."""
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import checkpoint, close, load, same_training
from scripts import SAMPLE, TINY, run

from configurator import UserError
from diffusion import PROCESSES, corrected, flow, heun, heun_step, loss_weight, monotonic_weight, noise_levels, noise_schedule, peak
from model import DisCoDiff
from noise import BatchNoise, SeededNoise


def reference(name):
    with np.load(Path(__file__).parent / "reference" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


PFGM, FLOW, VDMPP = map(reference, ("pfgmpp", "flow", "vdmpp"))
D, N = PFGM["D"].item(), PFGM["N"].item()


def difference(a, b):
    return (a.double() - b.double()).abs().max().item()


# PFGM++


def pfgm_noise(gauss, beta):
    """Noise of our kernel, from the authors' draws: a direction, and a radius R with R^2 / (R^2 + r^2) = beta."""
    n, beta = gauss.double(), beta.double()
    drawn = SimpleNamespace(randn=lambda *shape: n.view(-1, *shape), chi_square=lambda of: n.square().sum(1) * (1 - beta) / beta)
    return PROCESSES["pfgm++"].kernel(drawn, (3, 4, 4), D)


def test_pfgm_noise_equals_its_authors():
    row = PROCESSES["pfgm++"]
    sigma = row.levels(PFGM["normal"], -1.2, 1.2)
    assert difference(sigma, PFGM["sigma"]) < 1e-6 and difference(sigma * D ** 0.5, PFGM["r"]) < 1e-6
    x = PFGM["y"] + sigma.view(-1, 1, 1, 1) * pfgm_noise(PFGM["gauss"], PFGM["beta"].clamp(1e-3, 1 - 1e-3))  # as their loss clips
    assert difference(x, PFGM["x"]) < 1e-5 * PFGM["x"].abs().max()  # they add 1e-8 in two places
    assert difference(row.weight(sigma.double(), 0.5) / PFGM["weight"], torch.ones(5)) < 1e-6
    prior = 80 * pfgm_noise(PFGM["prior_gauss"], PFGM["prior_beta"])
    assert difference(prior / PFGM["prior"], torch.ones_like(prior)) < 1e-6


@pytest.mark.parametrize("of", [0.5, 1, 4, 100])
def test_pfgm_noise_is_students(of, g):
    """R^2 / (R^2 + D) ~ Beta(N / 2, D / 2); as a whole, the noise stretches each image by one number."""
    noise = PROCESSES["pfgm++"].kernel(BatchNoise(20_000, g), (2, 3), of)
    R2 = noise.double().square().sum((1, 2))
    b = R2 / (R2 + of)
    mean = 6 / (6 + of)
    assert b.mean().item() == pytest.approx(mean, abs=0.01) and b.var().item() == pytest.approx(mean * (1 - mean) / (4 + of / 2), rel=0.05)
    n = SeededNoise("images", range(4000)).randn(2, 3)
    stretched = PROCESSES["pfgm++"].kernel(SeededNoise("images", range(4000)), (2, 3), of)
    stretch = (stretched / n).flatten(1)
    assert torch.allclose(stretch, stretch[:, :1])
    chi2 = of / stretch[:, 0] ** 2
    assert chi2.mean().item() == pytest.approx(of, rel=0.1) and chi2.var().item() == pytest.approx(2 * of, rel=0.25)
    alone = PROCESSES["pfgm++"].kernel(SeededNoise("images", [5]), (2, 3), of)
    assert torch.equal(alone[0], stretched[5])


@pytest.mark.parametrize("of", [3e8, 1e12, 1e300])
def test_pfgm_noise_of_many_dimensions_is_gaussian(of, g):
    """sqrt(D / chi^2) is 1, but for a standard deviation of 1 / sqrt(2 D); it takes no memory."""
    a, b = (draws(BatchNoise(1000, torch.Generator().manual_seed(1), torch.float64)) for draws in (
        lambda noise: PROCESSES["pfgm++"].kernel(noise, (2, 3), of), lambda noise: PROCESSES["edm"].kernel(noise, (2, 3), of)))
    stretch = (a / b)[:, 0, 0] - 1
    assert stretch.std().item() == pytest.approx((2 * of) ** -0.5, rel=0.1, abs=1e-15) and torch.allclose(a, b, rtol=5 * of ** -0.5 + 1e-14)
    seeded = [PROCESSES[name].kernel(SeededNoise("images", range(9)), (2, 3), of) for name in ("pfgm++", "edm")]
    assert torch.allclose(*seeded, rtol=5 * of ** -0.5 + 1e-14)
    single = PROCESSES["pfgm++"].kernel(BatchNoise(1000, g), (2, 3), of)
    assert single.dtype == torch.float32 and single.isfinite().all() and single.std().item() == pytest.approx(1, abs=0.05)


def exact_denoiser(x, sigma):
    """The mean of the points `mu`, given x with PFGM++'s noise."""
    distance2 = (x.flatten(1)[:, None] - PFGM["mu"]).square().sum(2)
    log_p = -(N + D) / 2 * (distance2 / (D * sigma.reshape(-1, 1) ** 2)).log1p()
    return (log_p.softmax(1) @ PFGM["mu"]).view_as(x)


def test_pfgm_trajectories_equal_its_authors():
    """EDM's sampler, from PFGM++'s noise."""
    assert difference(exact_denoiser(PFGM["post_x"], PFGM["post_sigma"]), PFGM["post_mean"]) < 1e-9
    distance2 = (PFGM["post_x"].flatten(1)[:, None] - PFGM["mu"]).square().sum(2)
    gaussian = (-distance2 / (2 * PFGM["post_sigma"].reshape(-1, 1) ** 2)).softmax(1) @ PFGM["mu"]
    assert difference(gaussian, PFGM["post_mean_inf"].flatten(1)) < 1e-9 < difference(PFGM["post_mean"], PFGM["post_mean_inf"])
    steps = []
    heun(exact_denoiser, PFGM["prior"] / 80, 18, steps=steps)
    assert difference(torch.stack([x for _, x in steps[1:]]), PFGM["trajectory"]) < 1e-9


# flow matching


INNER = FLOW["inner"]
T = FLOW["t"][INNER].view(-1, 1, 1, 1)
SIGMA = (1 - T) / T


def test_flow_matching_is_a_row_of_the_table():
    """Its noisy data, its velocity as D and back, and its loss."""
    y, n, v = FLOW["x1"][INNER], FLOW["x0"][INNER], FLOW["v_net"]
    x = y + SIGMA * n
    c_skip, c_out, c_in, c_noise = PROCESSES["flow"].constants(SIGMA, 0.5)
    assert difference(c_in * x, FLOW["x_t"][INNER]) < 1e-12 and difference(c_noise, T) < 1e-12
    denoised = c_skip * x + c_out * v
    assert difference(denoised, FLOW["v_to_x1"]) < 1e-9 and difference((x - denoised) / SIGMA, FLOW["v_to_x0"]) < 1e-9
    loss = PROCESSES["flow"].weight(SIGMA, 0.5) * (denoised - y) ** 2
    assert difference(loss, (v - FLOW["velocity"][INNER]) ** 2) < 1e-12


def test_rectified_flow_is_the_same():
    t = (0.999 * FLOW["rf_u"].double() + 0.001).view(-1, 1, 1, 1)
    sigma, y = (1 - t) / t, FLOW["x1"]
    x = y + sigma * FLOW["x0"]
    c_skip, c_out, c_in, c_noise = PROCESSES["flow"].constants(sigma, 0.5)
    assert difference(c_in * x, FLOW["rf_x"]) < 1e-6 and difference(c_noise.flatten() / FLOW["rf_label"] * 999, torch.ones(5)) < 1e-6
    loss = PROCESSES["flow"].weight(sigma, 0.5) * (c_skip * x + c_out * 0.5 * c_in * x - y) ** 2
    assert loss.mean().item() == pytest.approx(FLOW["rf_loss"].item(), rel=1e-6)


def test_times_of_flow_matching_are_even(g):
    t = 1 / (1 + PROCESSES["flow"].levels(torch.randn(100_000, generator=g), -0.4, 1.4))
    counts = torch.histc(t, 10, 0, 1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-square with 9 degrees of freedom, 0.001
    extremes = PROCESSES["flow"].levels(torch.tensor([-30.0, 30.0]), 0, 1)
    assert extremes.isfinite().all() and difference(1 / (1 + extremes), torch.tensor([1.0, 0.0])) < 4e-5


def of_gaussians(x, sigma):
    """The exact denoiser of flow.npz's mixture."""
    s2, mu = FLOW["s2"], FLOW["mu"]
    variance = s2 + sigma ** 2
    w = (-((x[:, None] - mu) ** 2).sum(2) / (2 * variance)).softmax(1)
    return (s2 * x + sigma ** 2 * w @ mu) / variance


@pytest.mark.parametrize("name, grid, second_order", [("euler", "grid", False), ("heun2", "grid", True),
                                                      ("edm_euler", "edm_grid", False), ("edm_heun2", "edm_grid", True)])
def test_flow_equals_flow_matching(name, grid, second_order):
    """All states. Heun's last needs the velocity at t = 1, which D does not determine: ours is Euler's. Each starts from noise of scale 1, also at t > 0."""
    t = FLOW[grid].clamp(min=1e-12)
    steps, calls = [], []
    x = flow(lambda x, sigma: calls.append(sigma) or of_gaussians(x, sigma), FLOW["latents"] / (1 - t[0]), t, second_order, steps)
    assert difference(torch.stack(steps), FLOW[name][:-1]) < 1e-9 and len(calls) == (31 if second_order else 16)
    if not second_order:
        assert difference(x, FLOW[name][-1]) < 1e-9
    else:  # at t = 1 the velocity is x itself: the noise before has the mean 0, whatever x is
        before, last = steps[-1], t[-2]
        v = (of_gaussians(before / last, (1 - last) / last) - before) / (1 - last)
        assert difference(x, before + (1 - last) * v) < 1e-9
        assert difference(before + (1 - last) * (v + x) / 2, FLOW[name][-1]) < 1e-9


def test_eulers_steps_are_the_same_in_either_time():
    t = torch.linspace(0.02, 1, 9, dtype=torch.float64)
    sigma = (1 - t) / t
    x = FLOW["latents"] * sigma[0]
    for s, s_next in zip(sigma, sigma[1:]):
        x = heun_step(lambda x, s: of_gaussians(x, s), x, s, torch.zeros(())) * (1 - s_next / s) + x * s_next / s
    assert difference(x, flow(of_gaussians, FLOW["latents"], t, second_order=False)) < 1e-12


# VDM++'s weighting


@pytest.mark.parametrize("size, shift", [(64, 1.0), (128, 2.0)])
def test_the_monotonic_weight(size, shift):
    """Of |D - y|^2, where EDM's noise levels are drawn; as a weight of the noise's error; and the noise levels."""
    weight = monotonic_weight(VDMPP["sig"], -1.2, 1.2, shift)
    assert difference(weight / VDMPP[f"weight_{size}"], torch.ones(16)) < 1e-10
    of_noise = VDMPP["w_edm_monotonic" + "_128" * (size == 128)]
    weight = monotonic_weight(VDMPP["sigma"], -1.2, 1.2, shift)
    found = weight * VDMPP[f"p_edm_{size}"] * (VDMPP["sigma"] / 2) ** 2
    assert difference(found, of_noise) < 1e-10
    levels, _ = noise_schedule("edm", "edm-monotonic", -1.2, 1.2, shift, 128.0, 0.5)
    lam = -2 * levels(torch.special.ndtri(VDMPP["u"])).log()
    assert difference(lam, VDMPP[f"lam_edm_{size}"]) < 1e-10


def test_what_is_monotonic_about_it():
    sigma = noise_levels(50, 0.01, 80, 7)
    assert pytest.approx(VDMPP["peak_sigma"].item(), abs=1e-12) == peak(0.5)
    assert torch.equal(loss_weight(VDMPP["sig"], 0.5), VDMPP["weight_edm"])
    ratio = monotonic_weight(sigma, -1.2, 1.2) / loss_weight(sigma, 0.5)
    assert torch.allclose(ratio[sigma < peak(0.5)], torch.ones(()).double()) and (ratio[sigma > peak(0.5)].diff() < 0).all()
    objective = [monotonic_weight(sigma, mean, std) * log_density * sigma ** 2  # whatever the noise levels are drawn from
                 for mean, std in ((-1.2, 1.2), (-0.4, 1.4))
                 for log_density in [(-((sigma.log() - mean) / std) ** 2 / 2).exp() / std]]
    assert torch.allclose(*objective) and (objective[0].diff() <= 1e-12).all()  # sigma falls: it is largest for all above the peak


@pytest.mark.parametrize("settings, message", [
    (dict(process="ddpm"), r"--process is one of edm, pfgm\+\+, flow, not ddpm"),
    (dict(pfgm_D=0.0), "pfgm_D counts .* it is 0.5 or more, or inf, not 0.0"),
    (dict(pfgm_D=0.01), "below 0.5, noise is too large for float32"),
    (dict(pfgm_D=-math.inf), "0.5 or more, or inf, not -inf"),
    (dict(pfgm_D=math.nan), "0.5 or more, or inf, not nan"),
    (dict(weighting="vdm"), "--weighting is edm or edm-monotonic, not vdm"),
    (dict(process="flow", weighting="edm-monotonic"), "choose another --process than flow"),
    (dict(weighting="edm-monotonic", P_std=0.0), "it needs a P_std above 0"),
])
def test_schedules_that_there_are_not(settings, message):
    good = dict(process="edm", weighting="edm", P_mean=-1.2, P_std=1.2, shift=1.0, pfgm_D=128.0, sigma_data=0.5)
    noise_schedule(**good)
    with pytest.raises(UserError, match=message):
        noise_schedule(**good | settings)


# the correction


def test_the_correction(g):
    """Heun's method above, the other denoiser's steps below: of one Gaussian they leave what it should be."""
    calls = {"first": [], "second": []}

    def of(name):
        return lambda x, sigma: calls[name].append(sigma.item()) or x * 0.25 / (0.25 + sigma ** 2)

    x = corrected(of("first"), of("second"), torch.randn(20_000, 1, generator=g), 10.0, 376, 58,
                  randn_like=lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64))
    assert len(calls["first"]) == 38 and len(calls["second"]) == 376  # 414, as config/imagenet128.py has it
    assert min(calls["first"]) == 10 and max(calls["second"]) == pytest.approx(10)
    assert abs(x.mean()) < 0.02 and x.std().item() == pytest.approx(0.5, rel=0.04)
    calls["first"].clear()
    corrected(of("first"), of("second"), torch.ones(1, 1), 100.0, 5)
    assert not calls["first"] and calls["second"][-5] == 80


def test_an_ancestral_step_is_the_posterior(g):
    """At the right D, x at s has mean y and variance s^2 again."""
    y = torch.full((100_000, 1), 0.7, dtype=torch.float64)
    x = corrected(None, lambda x, sigma: y if sigma > 1 else x, (y + 5 * torch.randn(y.shape, generator=g)) / 5, 5.0, 2, sigma_min=1, sigma_max=5,
                  randn_like=lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64))
    assert x.mean().item() == pytest.approx(0.7, abs=0.02) and x.std().item() == pytest.approx(1, abs=0.01)


# the scripts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of each process, all with codes, and plain EDM."""
    folder = tmp_path_factory.mktemp("processes")
    for name, settings in (("edm", []), ("limit", ["--process=pfgm++", "--pfgm_D=inf"]), ("pfgm", ["--process=pfgm++", "--pfgm_D=2"]),
                           ("flow", ["--process=flow"]), ("plain", ["--num_latents=0"])):
        run("train_stage1.py", f"--out_dir={folder / name}", *TINY, *settings)
    return folder


CODE = [*SAMPLE, "--code=0,1,2"]


def test_edm_is_the_limit_of_pfgm(runs):
    assert same_training({**checkpoint(runs / "limit"), "model_args": 0}, {**checkpoint(runs / "edm"), "model_args": 0})
    for name in ("limit", "edm"):
        run("sample.py", f"--out_dir={runs / name}", *CODE, "--S_churn=1")
    limit, edm = load(runs / "limit"), load(runs / "edm")
    assert all(np.array_equal(limit[key], edm[key]) for key in ("images", "labels", "codes", "seeds", "nfe"))


@pytest.mark.parametrize("name", ["pfgm", "flow"])
def test_the_checkpoint_carries_the_process(runs, name, monkeypatch):
    """Sampling is told nothing of it: noise is of its kernel, seeded image by image; and no other process goes on with it."""
    state, noises = checkpoint(runs / name), []
    model = DisCoDiff(**state["model_args"])
    assert model.process is PROCESSES[{"pfgm": "pfgm++"}.get(name, name)] and state["step"] == 6
    monkeypatch.setattr("diffusion.heun", lambda denoise, noise, **_: noises.append(noise) or heun(denoise, noise, 2))
    for size in (20, 7):
        run("sample.py", f"--out_dir={runs / name}", *CODE, "--name=" + f"by-{size}", f"--batch_size={size}")
    assert close(load(runs / name, "by-20"), load(runs / name, "by-7"))
    whole, parts = noises[1], torch.cat(noises[3:])  # one counts evaluations
    assert torch.equal(whole, parts) and torch.equal(whole, model.noise(SeededNoise("images", range(20))))
    plain = SeededNoise("images", range(20)).randn(1, 28, 28)
    stretch = (whole / plain).flatten(1)
    assert torch.allclose(stretch, stretch[:, :1]) and (len(stretch[:, 0].unique()) == 20) == (name == "pfgm")
    with pytest.raises(UserError, match="process='(pfgm\\+\\+|flow)' there, 'edm' here"):
        run("train_stage1.py", f"--out_dir={runs / name}", *TINY, "--total_images=56")
    with pytest.raises(UserError, match="process='edm' there, 'flow' here"):
        run("train_stage1.py", f"--out_dir={runs / 'other'}", *TINY, f"--init_from={runs / 'edm'}", "--process=flow")


def test_older_checkpoints_are_edms(runs, tmp_path):
    state = checkpoint(runs / "plain")
    for name in ("process", "pfgm_D", "weighting", "shift", "null_token", "recompute"):
        state["config"].pop(name)
        state["model_args"].pop(name, None)
    torch.save(state, tmp_path / "stage1.pt")
    with pytest.raises(UserError, match="process='edm' there, 'flow' here"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--num_latents=0", "--process=flow")
    with pytest.raises(UserError, match="weighting='edm' there, 'edm-monotonic' here"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--num_latents=0", "--weighting=edm-monotonic")


def other_model(state, **arguments):
    """-> the entries of the plain checkpoint, of a network with other arguments"""
    model_args = state["model_args"] | arguments
    weights = DisCoDiff(**model_args).state_dict()
    return dict(model_args=model_args, model=weights, ema=weights)


def test_the_correction_has_the_same_kind_of_images(runs, tmp_path, capsys):
    """Classes by their names, and latents by their autoencoder; of other images, a line says so."""
    state = checkpoint(runs / "plain")
    for changes, message in ((dict(classes=[*state["classes"][:9], "Boat"]), "class 9 Boat there, Ankle boot here"),
                             (dict(config=state["config"] | dict(vae_identity=7)), "autoencoder 7 there, None here"),
                             (other_model(state, img_resolution=32, attn_resolutions=(16,)), r"images \(1, 32, 32\) there, \(1, 28, 28\) here"),
                             (other_model(state, label_dim=0), "classes 0 there, 10 here"),
                             (dict(config=state["config"] | dict(data_identity=1)), "")):
        torch.save(state | changes, tmp_path / "stage1.pt")
        arguments = ["sample.py", f"--out_dir={runs / 'edm'}", *CODE, "--name=kind", f"--correct_with={tmp_path}"]
        if message:
            with pytest.raises(UserError, match=f"is no model to go on with: {message}"):
                run(*arguments)
    run(*arguments)
    assert f"{tmp_path} was trained on other images, fashion-mnist-10k as it was then" in capsys.readouterr().err


def test_other_odes_and_the_correction(runs, monkeypatch):
    calls = []
    denoise = DisCoDiff.denoise
    monkeypatch.setattr(DisCoDiff, "denoise", lambda self, x, sigma, *rest: calls.append((self.num_latents, sigma[0].item())) or denoise(self, x, sigma, *rest))

    def evaluations(*settings):
        calls.clear()
        printed = run("sample.py", f"--out_dir={runs / 'edm'}", *CODE, "--name=other", "--num_steps=5", *settings)
        assert f"{len(calls)} evaluations each" in printed
        return list(calls)

    assert len(evaluations("--ode=flow-heun")) == 9 and len(evaluations("--ode=flow-euler")) == 5
    assert [sigma for _, sigma in calls[:2]] == pytest.approx([80, 1 / (1 / 81 + 80 / 81 / 5) - 1])
    correct = f"--correct_with={runs / 'plain'}"
    assert all((latents == 0) == (sigma < 10) for latents, sigma in evaluations(correct)) and len(calls) == 9
    found = evaluations(correct, "--correct_steps=3", "--correct_below=1")
    assert [latents for latents, _ in found] == [3] * (len(found) - 3) + [0] * 3
    assert found[-3][1] == pytest.approx(1) and found[-1][1] == pytest.approx(0.002)
    for size in (20, 6):
        run("sample.py", f"--out_dir={runs / 'edm'}", *CODE, f"--name=c{size}", correct, "--correct_steps=3", f"--batch_size={size}")
    assert close(load(runs / "edm", "c20"), load(runs / "edm", "c6"))
    assert [latents for latents, _ in evaluations(f"--correct_with={runs / 'edm'}", "--correct_steps=2")][-2:] == [3, 3]


@pytest.mark.parametrize("name, settings, message", [
    ("pfgm", ["--S_churn=3"], "add Gaussian noise, and this model's is PFGM"),
    ("pfgm", ["--restarts=(3,1,0.06,0.3),"], "add Gaussian noise, and this model's is PFGM"),
    ("pfgm", ["--correct_with=EDM", "--correct_steps=3"], "add Gaussian noise, and this model's is PFGM"),
    ("pfgm", ["--correct_with=EDM"], "plain is no model to go on with: pfgm_D inf there, 2.0 here"),
    ("flow", ["--correct_with=EDM"], "plain is no model to go on with: process edm there, flow here"),
    ("edm", ["--correct_with=EDM", "--correct_below=100"], "correct_below 100.0 must be above sigma_min 0.002 and below sigma_max 80"),
    ("plain", ["--correct_with=CODES"], "edm has discrete latents of its own: name a model without them"),
    ("edm", ["--correct_with=nowhere"], "there is no checkpoint nowhere/stage1.pt"),
    ("edm", ["--correct_steps=3"], "correct_steps and correct_below are of another model: name it by --correct_with="),
    ("edm", ["--correct_below=3"], "correct_below are of another model: name it by --correct_with="),
    ("edm", ["--ode=flow-heun", "--sigma_min=0.01"], "sigma_min and rho place EDM's noise levels: --ode=flow-heun"),
    ("edm", ["--ode=flow-euler", "--rho=3"], "sigma_min and rho place EDM's noise levels: --ode=flow-euler"),
    ("edm", ["--correct_with=EDM", "--correct_below=0.001"], "correct_below 0.001 must be above sigma_min"),
    ("edm", ["--correct_with=EDM", "--correct_steps=3", "--S_churn=2"], "--correct_steps follow Heun's method without churn"),
    ("edm", ["--correct_with=EDM", "--correct_steps=3", "--ode=flow-heun"], "--correct_steps follow Heun's method without churn"),
    ("edm", ["--ode=dopri5"], "--ode is edm, flow-heun or flow-euler, not dopri5"),
    ("edm", ["--ode=flow-euler", "--S_churn=2"], "they don't go with --ode=flow-euler"),
])
def test_samplers_that_do_not_fit(runs, name, settings, message):
    settings = [s.replace("EDM", str(runs / "plain")).replace("CODES", str(runs / "edm")) for s in settings]
    with pytest.raises(UserError, match=message):
        run("sample.py", f"--out_dir={runs / name}", *SAMPLE, *([] if name == "plain" else ["--code=0,1,2"]), *settings)


@pytest.mark.parametrize("settings, message", [
    (["--pfgm_D=64"], r"pfgm_D is for --process=pfgm\+\+"),
    (["--process=pfgm++", "--pfgm_D=0"], "pfgm_D counts the additional dimensions"),
    (["--shift=0"], "shift must be positive"),
    (["--recompute=True"], "recompute is for --denoiser=uvit"),
    (["--null_token=True", "--conditioning=average", "--latents_to_emb=False"], "null_token is for codes that attention alone reads"),
    (["--null_token=True"], "attention alone reads: --conditioning=attention --latents_to_emb=False"),
    (["--null_token=True", "--num_latents=0", "--latents_to_emb=False"], "null_token is for codes"),
])
def test_training_that_does_not_fit(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, *settings)


def test_a_null_token_is_among_the_keys(monkeypatch):
    """One more key for each cross-attention, the same for all codes, which starts as nothing in particular."""
    settings = dict(num_latents=2, codebook_size=4, latent_dim=8, latent_layers=1, latent_heads=1, encoder_patch=4, encoder_dim=8,
                    encoder_layers=1, encoder_heads=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0)
    models = []
    for null_token in (False, True):
        torch.manual_seed(0)
        models.append(DisCoDiff(8, 1, 0, null_token=null_token, **settings))
    plain, model = models
    tokens = model.latents(torch.eye(4)[torch.tensor([[0, 1], [2, 3]])])
    assert tokens.shape == (2, 3, 8) and not tokens[:, 2].any() and torch.equal(tokens[:, :2], plain.latents(torch.eye(4)[torch.tensor([[0, 1], [2, 3]])]))
    keys, _, values = model.condition(torch.tensor([[0, 1], [2, 3]]))["enc.4x4_block0"]
    assert keys.shape[1] == values.shape[1] == 3
    assert {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()} == {"latents.null_token"}
