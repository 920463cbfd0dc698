"""The encoder's first phase: its step in numbers, what it leaves to stage 1, stops and new starts, processes."""
import copy
import math
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import checkpoint, fill, log_of, same, same_training
from scripts import TINY, Script, outputs, run, start, start_together

import coarse
import data
import training
from coarse import CoarseDenoiser, draw_step, gradients, prepare
from configurator import UserError

PHASE = [*TINY, "--coarse_images=48", "--log_every=8"]  # six steps


class Coming:
    """A list as `catch_signals` returns it, of a signal that comes in this step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.left, self.number = step, number

    def __iter__(self):
        self.left -= 1
        return iter([self.number] * (self.left <= 0))


def stopped(folder, step, settings, number=signal.SIGTERM):
    """Trains until a signal comes in this step, which the run must obey -> the checkpoint"""
    with pytest.raises(SystemExit) as ended:
        Script("train_stage1.py", "default", folder, "cpu", *settings).train(Coming(step, number))
    assert ended.value.code == 128 + number
    return checkpoint(folder)


def encoder_of(state):
    return {name: p for name, p in state.items() if name.startswith("encoder.")}


def untimed(path):
    lines = log_of(path)
    assert all(line.pop("images_per_second") > 0 for line in lines)
    return lines


@pytest.fixture
def saved(monkeypatch):
    """A list that gets all that is saved."""
    states, save = [], training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint",
                        lambda path, state: (states.append(copy.deepcopy(state)), save(path, state)))
    return states


@pytest.fixture
def phases(monkeypatch):
    """A list that gets the step at which each phase begins, or goes on."""
    steps = []
    monkeypatch.setattr(coarse, "prepare", lambda run, state: steps.append(state["step"]) or prepare(run, state))
    return steps


# ----------------------------------------------------------------------------------------------------
# a step


def phase_of(folder, *settings):
    return prepare(Script("train_stage1.py", "default", folder, "cpu", *TINY, *settings).run, dict(step=0))


def denoiser(label_dim):
    """A CoarseDenoiser all of whose weights are something, with a linear encoder."""
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 14 * 14, 15), torch.nn.Unflatten(1, (3, 5)))
    net = CoarseDenoiser(encoder, 14, 3, label_dim, num_latents=3, codebook_size=5, sigma_data=0.4)
    net.load_state_dict({name: fill(name, p.shape) for name, p in net.state_dict().items()})
    return net


@pytest.mark.parametrize("pixels, pool", [(28, 4), (32, 4), (64, 8), (14, 2), (8, 1), (6, 1)])
def test_the_grid_is_the_coarsest_of_at_least_7_by_7(pixels, pool):
    net = CoarseDenoiser(torch.nn.Identity(), pixels, 3, 0, 2, 4)
    y = torch.randn(2, 3, pixels, pixels)
    want = y.numpy().reshape(2, 3, pixels // pool, pool, pixels // pool, pool).mean((3, 5)).reshape(2, -1)
    assert net.pool == pool and net.pixels == want.shape[1] == 3 * (pixels // pool) ** 2
    assert np.abs(net.averaged(y).numpy() - want).max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("label_dim", [0, 10])
def test_the_denoiser_is_edms_of_averaged_images(label_dim, g):
    """D = c_skip x + c_out F(c_in x; ln(sigma) / 4, codes and class), EDM Table 1, here in float64, image by image."""
    net, sd = denoiser(label_dim), 0.4
    y, gumbel = torch.randn(4, 3, 14, 14, generator=g), torch.randn(4, 3, 5, generator=g)
    sigma, labels = torch.tensor([[0.1], [1.0], [5.0], [30.0]]), torch.tensor([3, 0, 9, -1])
    noise, drop = sigma * torch.randn(4, 147, generator=g), torch.tensor([False, False, True, False])
    D, logits = net(y, noise, sigma, labels if label_dim else None, gumbel, drop, 0.7)
    assert torch.equal(logits, net.encoder(y))
    net = copy.deepcopy(net).double()
    for i in range(4):
        z = sum(((logits[i, j] + gumbel[i, j]).double() / 0.7).softmax(0) @ net.codebook[j] for j in range(3))
        z = net.null if drop[i] else z
        if label_dim and labels[i] >= 0:
            z = z + net.classes[labels[i]]
        s = sigma[i].double()
        x = y[i].double().unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)).flatten() + noise[i]
        variance = s ** 2 + sd ** 2
        c_skip, c_out, c_in = sd ** 2 / variance, s * sd / variance ** 0.5, 1 / variance ** 0.5
        F = net.mlp(torch.cat([c_in * x, s.log() / 4, z]))
        assert (D[i] - (c_skip * x + c_out * F)).abs().max() < 1e-4 and F.abs().max() > 0.05


def test_no_class_adds_nothing(g):
    """Label -1: D is that of a network without classes, and no class learns from it, the last one neither."""
    net, plain = denoiser(10), denoiser(10)
    torch.nn.init.zeros_(plain.classes)
    y, noise, gumbel = (torch.randn(4, *shape, generator=g) for shape in ((3, 14, 14), (147,), (3, 5)))
    sigma, drop = torch.ones(4, 1), torch.zeros(4, dtype=torch.bool)

    def D(net, label):
        return net(y, noise, sigma, torch.full((4,), label), gumbel, drop, 1.0)[0]

    assert torch.equal(D(net, -1), D(plain, -1)) and (D(net, 9) - D(net, -1)).abs().max() > 1e-3
    D(net, -1).square().sum().backward()
    assert not net.classes.grad.any() and net.codebook.grad.any()
    D(net, 9).square().sum().backward()
    assert net.classes.grad.any(1).tolist() == [False] * 9 + [True]


def test_the_loss_is_of_averaged_images(tmp_path):
    """lambda(sigma) |D - y|^2 of averaged y, half of them mirrored. The gradients are of it less the bonus, the entropy
    of the batch's mean code distribution, whatever they are scaled by; no parameter has none."""
    settings = ["--coarse_batch=64", "--coarse_images=64", "--coarse_spread=0.5", "--sigma_data=0.4", "--null_prob=0.5", "--xflip=True"]
    phase, found = phase_of(tmp_path, *settings), []
    y, c = data.to_float(phase.images[:64]), torch.from_numpy(phase.labels[:64])
    for scale in (1, 128):
        phase.scale = scale
        phase.optimizer.zero_grad()
        loss, code_sum, entropy_sum = gradients(phase, y, c)
        found.append((loss, [p.grad for p in phase.parameters]))
    assert same(*found) and all(p.grad.any() for p in phase.parameters)
    noise, sigma, gumbel, drop, flip = draw_step(phase)
    y = torch.where(flip[:, None, None, None], torch.from_numpy(y.numpy()[..., ::-1].copy()), y)
    D, logits = phase.model(y, noise, sigma, c, gumbel, drop, 1.0)
    target = y.unflatten(2, (7, 4)).unflatten(4, (7, 4)).mean((3, 5)).flatten(1)
    want = ((sigma ** 2 + 0.16) / (0.4 * sigma) ** 2 * (D - target) ** 2).mean()
    p = logits.softmax(2)
    entropy = -sum((q * q.log()).sum() for q in p.mean(0))
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) and not loss.requires_grad
    for grad, of in zip(found[0][1], torch.autograd.grad(want - 0.5 * entropy, phase.parameters, retain_graph=True)):
        assert (grad - of).abs().max() < 1e-4 * of.abs().max() + 1e-7
    assert torch.allclose(code_sum, p.sum(0), rtol=1e-4)
    assert entropy_sum.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)


def test_what_is_drawn(tmp_path):
    """ln sigma uniform in ln 1 ... ln 30, noise of this size, and coins: 10,240 images."""
    phase = phase_of(tmp_path, "--coarse_batch=128", "--coarse_images=128", "--null_prob=0.3", "--xflip=True")
    steps = [draw_step(SimpleNamespace(**vars(phase) | dict(step=step))) for step in range(80)]
    noise, sigma, gumbel, drop, flip = (torch.cat(drawn) for drawn in zip(*steps))
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.02) and not draw_step(phase_of(tmp_path))[-1].any()
    assert noise.shape == (10_240, 49) and sigma.shape == (10_240, 1) and gumbel.shape == (10_240, 3, 5)
    share = (sigma.flatten().log() / math.log(30)).sort().values
    assert 1 <= sigma.min() and sigma.max() <= 30
    far = (share - torch.linspace(0, 1, 10_240)).abs().max()
    assert far < 1.95 / math.sqrt(10_240)  # Kolmogorov and Smirnov's, at p = 0.001
    assert ((noise / sigma).std(0) - 1).abs().max() < 0.03 and (noise / sigma).mean().abs() < 0.01
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert drop.float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_random_numbers_depend_on_the_step_alone(tmp_path):
    """Not on what was drawn before, nor on the number of processes, each of which has its rows."""
    phase = phase_of(tmp_path)
    phase.step = 3
    drawn = draw_step(phase)
    torch.rand(5)
    draw_step(SimpleNamespace(**vars(phase) | dict(step=4)))
    assert same(drawn, draw_step(phase))
    parts = [draw_step(SimpleNamespace(**vars(phase) | dict(rank=rank, local_batch=4))) for rank in (0, 1)]
    assert same(drawn, [torch.cat(rows) for rows in zip(*parts)])
    for change in (dict(step=4), dict(config=phase.config | dict(seed=1))):
        other = draw_step(SimpleNamespace(**vars(phase) | change))
        assert not any(same(a, b) for a, b in zip(drawn[:3], other[:3]))


def test_the_images_are_those_to_train_on(tmp_path, monkeypatch):
    """In the order of stage 1, whole and with their labels; the rate rises over a twentieth of the phase."""
    script = Script("train_stage1.py", "default", tmp_path, "cpu", *TINY, "--coarse_images=320", "--encoder_lr=0.1")
    given, rates, step = [], [], training.guarded_step
    monkeypatch.setattr(coarse, "gradients", lambda phase, y, c: given.append((y, c)) or gradients(phase, y, c))
    monkeypatch.setattr(training, "guarded_step", lambda optimizer, norm, skipped: rates.append(
        [group["lr"] for group in optimizer.param_groups]) or step(optimizer, norm, skipped))
    coarse.warm_up(script.run, script.all["fetch"], [])
    which = data.Shuffle(data.split(10_000, 16)[0], 0).take(0, 320)
    images, labels, _ = data.load("fashion-mnist-10k")
    assert torch.equal(torch.cat([y for y, _ in given]), data.to_float(images[which]))
    assert torch.cat([c for _, c in given]).tolist() == labels[which].tolist()
    assert rates == [[pytest.approx(1e-3 * min(i / 2, 1))] for i in range(40)]


# ----------------------------------------------------------------------------------------------------
# what it does


@pytest.mark.parametrize("class_cond", [True, False])
def test_the_codes_learn(tmp_path, class_cond):
    """Of 3,000 images, seen twice, a tiny encoder tells more and more, and the denoiser makes use of it."""
    settings = ["--held_out=7000", "--coarse_images=6400", "--coarse_batch=64", "--coarse_lr=0.003", "--log_every=1280"]
    script = Script("train_stage1.py", "default", tmp_path, "cpu", *TINY, *settings, f"--class_cond={class_cond}")
    coarse.warm_up(script.run, script.all["fetch"], [])
    log = log_of(tmp_path / "coarse.jsonl")
    assert [line["images"] for line in log] == [1280, 2560, 3840, 5120, 6400]
    assert log[-1]["bits"] > 2.5 and log[-1]["bits"] > log[1]["bits"] + 0.5
    assert log[-1]["loss"] < 0.5 * log[0]["loss"] and min(log[-1]["perplexity"]) > 1.5


def test_what_stage_1_begins_with(tmp_path, saved):
    """The average has the encoder of the phase, and nothing else has changed."""
    run("train_stage1.py", f"--out_dir={tmp_path / 'none'}", *TINY, "--coarse_images=0", "--save_every=8")
    run("train_stage1.py", f"--out_dir={tmp_path / 'phase'}", *TINY, "--save_every=8", "--total_images=16")
    first, states = saved[0], saved[7:]
    assert [(s["coarse"]["step"], s["step"]) for s in states] == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert same(first["model"], states[0]["model"]) and not (tmp_path / "none" / "coarse.jsonl").exists()
    assert ["model" in s["coarse"] for s in states] == ["optimizer" in s["coarse"] for s in states]
    assert ["model" in s["coarse"] for s in states] == [False, True, False, False, False]
    assert len(states[1]["coarse"]["optimizer"]["state"]) == len(states[1]["coarse"]["model"])
    for state in states:
        assert same(*(encoder_of(state[part]) for part in ("model", "ema")))
    begun, ended = states[2], states[4]
    assert not same(encoder_of(begun["model"]), encoder_of(first["model"])) and not begun["optimizer"]["state"]
    assert all(same(p, first["model"][name]) for name, p in begun["model"].items() if not name.startswith("encoder."))
    assert same(encoder_of(ended["model"]), encoder_of(begun["model"])) and not same(ended["model"], begun["model"])


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_stage_1_holds_the_encoder_or_trains_it(tmp_path, monkeypatch, saved, rate):
    """Of eight images, which every batch is made of, a held encoder always tells the same bits."""
    images, labels, _ = data.load("fashion-mnist-10k")
    monkeypatch.setattr(data, "load", lambda name: (images[:24], labels[:24], 10))
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, f"--encoder_lr={rate}", "--log_every=8")
    begun, ended = (next(s for s in saved if s["coarse"]["step"] == 2), saved[-1])
    bits = [line["bits"] for line in log_of(tmp_path / "stage1.jsonl")]
    assert len(bits) == ended["step"] == 6 and min(bits) > 0
    held = [same(encoder_of(begun[part]), encoder_of(ended[part])) for part in ("model", "ema")]
    assert held == [not rate] * 2 and not same(begun["model"], ended["model"])
    assert (bits == pytest.approx([bits[0]] * 6, rel=1e-4)) == (not rate)
    with_moments = len(ended["model"]) - (0 if rate else len(encoder_of(ended["model"])))
    assert len(ended["optimizer"]["state"]) == with_moments


def test_a_bad_step_of_the_phase_is_skipped(tmp_path, monkeypatch, saved):
    """One bad pixel in the second batch: weights, moments and Adam's step count stay to the bit; the phase goes on."""
    to_float, calls = data.to_float, []

    def injected(images, device="cpu"):
        calls.append(1)
        y = to_float(images, device)
        y[0, 0, 5, 5] = math.nan if len(calls) == 2 else y[0, 0, 5, 5]
        return y

    monkeypatch.setattr(data, "to_float", injected)
    run("train_stage1.py", f"--out_dir={tmp_path}", *PHASE, "--save_every=8")
    states = [s["coarse"] for s in saved[1:6]]
    trained = [(s["model"], s["optimizer"]["state"]) for s in states]
    assert [s["step"] for s in states] == [1, 2, 3, 4, 5]
    assert [same(a, b) for a, b in zip(trained, trained[1:])] == [True, False, False, False]
    log = log_of(tmp_path / "coarse.jsonl")
    assert [line["skipped"] for line in log] == [0, 1, 1, 1, 1, 1]
    assert np.isfinite([[line["loss"], line["bits"]] for line in log[2:]]).all()


# ----------------------------------------------------------------------------------------------------
# stops and new starts


@pytest.mark.parametrize("class_cond", [True, False])
def test_an_interrupted_phase_equals_an_undisturbed_one(tmp_path, capsys, class_cond):
    """To the bit: the phase's own weights and moments, the encoder, stage 1 afterwards, with dropout too, and the log,
    of which lines from after the checkpoint are cut off."""
    settings = [*PHASE, "--dropout=0.2", "--null_prob=0.3", f"--class_cond={class_cond}"]
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    stopped(tmp_path / "parts", 2, settings)
    assert ("stopped by SIGTERM after 16 images of the encoder's first phase, "
            f"which {tmp_path / 'parts' / 'stage1.pt'} has: the same command goes on") in capsys.readouterr().out
    log = tmp_path / "parts" / "coarse.jsonl"
    log.write_text(log.read_text() + '{"images": 24, "loss": 0}\n{"ima')
    parts = stopped(tmp_path / "parts", 2, settings, signal.SIGINT)
    assert "stopped by Ctrl-C after 32 images of the encoder's first phase" in capsys.readouterr().out
    once = stopped(tmp_path / "once", 4, settings)
    assert parts["coarse"]["step"] == 4 and parts["step"] == 0 and same_training(parts, once)
    assert {"model", "optimizer"} < parts["coarse"].keys() and same(*(encoder_of(parts[k]) for k in ("model", "ema")))
    run("train_stage1.py", f"--out_dir={tmp_path / 'parts'}", *settings)
    assert same_training(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    for name in ("coarse", "stage1"):
        whole, parts = (untimed(tmp_path / folder / f"{name}.jsonl") for folder in ("whole", "parts"))
        assert whole == parts and [line["images"] for line in whole] == [8, 16, 24, 32, 40, 48]


def test_a_signal_as_the_phase_ends(tmp_path, capsys, phases):
    """Stage 1 takes a step, and stops."""
    state = stopped(tmp_path, 6, PHASE)
    assert (state["coarse"], state["step"]) == (dict(step=6), 1)
    assert "stopped by SIGTERM after 8 images, which" in capsys.readouterr().out
    run("train_stage1.py", f"--out_dir={tmp_path}", *PHASE)
    assert phases == [0] and checkpoint(tmp_path)["step"] == 6


def test_a_crash_in_the_phase(trained, tmp_path, monkeypatch, phases):
    """The same command goes on, with --overwrite=True too; between phase and stage 1, nothing is repeated."""
    command, save = [f"--out_dir={tmp_path}", *TINY, "--overwrite=True", "--save_every=8"], training.save_checkpoint
    for step in (1, 2):
        def save_and_crash(path, state):
            save(path, state)
            if state["coarse"]["step"] == step:
                raise ZeroDivisionError

        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(training, "save_checkpoint", save_and_crash)
            run("train_stage1.py", *command)
    run("train_stage1.py", *command)
    assert phases == [0, 1] and same_training(checkpoint(trained), checkpoint(tmp_path))
    run("train_stage1.py", *command)  # which has ended, and is replaced
    assert phases == [0, 1, 0] and same_training(checkpoint(trained), checkpoint(tmp_path))


def test_when_there_is_no_phase(trained, tmp_path, phases):
    """Without latents, with coarse_images=0, from a network with an encoder, and after the phase: also when such a run
    goes on before its first step."""
    run("train_stage1.py", f"--out_dir={tmp_path / 'plain'}", *TINY, "--num_latents=0", "--total_images=8")
    for images in (8, 16):
        run("train_stage1.py", f"--out_dir={tmp_path / 'none'}", *TINY, "--coarse_images=0", f"--total_images={images}")
    settings = [*TINY, f"--init_from={trained}", "--total_images=8"]
    training.open_log(Script("train_stage1.py", "default", tmp_path / "from", "cpu", *settings).run, "images")
    assert checkpoint(tmp_path / "from")["step"] == 0
    run("train_stage1.py", f"--out_dir={tmp_path / 'from'}", *settings)
    assert same(*(encoder_of(checkpoint(folder)["ema"]) for folder in (trained, tmp_path / "from")))
    assert not phases and not list(tmp_path.glob("*/coarse*"))
    for images in (8, 16):
        run("train_stage1.py", f"--out_dir={tmp_path / 'added'}", *TINY, f"--init_from={tmp_path / 'plain'}",
            f"--total_images={images}")
    assert phases == [0] and len(log_of(tmp_path / "added" / "coarse.jsonl")) == 1


def test_a_run_that_is_replaced_has_no_log_of_the_other(tmp_path):
    for images in (48, 16):
        run("train_stage1.py", f"--out_dir={tmp_path}", *PHASE, f"--coarse_images={images}", "--overwrite=True")
    assert [line["images"] for line in log_of(tmp_path / "coarse.jsonl")] == [8, 16]


def test_what_can_not_change(trained):
    """The encoder is as it is."""
    settings = [f"--out_dir={trained}", *TINY, "--coarse_images=32"]
    with pytest.raises(UserError, match=r"coarse_batch=8 there, 4 here; coarse_images=16 there, 32 here\): choose"):
        run("train_stage1.py", *settings, "--coarse_batch=4")
    with pytest.raises(UserError, match="coarse_images can't change during a run"):
        run("train_stage1.py", *settings, "--change=coarse_images")


@pytest.mark.parametrize("argument, message", [
    ("--coarse_images=-1", "coarse_images can't be negative: it is -1"),
    ("--coarse_lr=0", "coarse_lr must be positive, not 0.0"), ("--coarse_lr=inf", "coarse_lr must be finite, not inf"),
    ("--coarse_batch=0", "coarse_batch must be positive, not 0"),
    ("--coarse_batch=17", "coarse_batch 17 exceeds coarse_images 16"),
    ("--coarse_spread=-1", "coarse_spread can't be negative: it is -1.0"),
    ("--encoder_lr=-1", "encoder_lr can't be negative: it is -1.0")])
def test_bad_input(tmp_path, argument, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, argument)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------
# processes


def test_a_batch_that_processes_can_not_share(tmp_path, monkeypatch):
    """It is told before anything is written, unless there is no phase."""
    monkeypatch.setattr(training, "start_processes", lambda device: (0, 3, torch.device("cpu")))
    settings = ["default", tmp_path, "cpu", *TINY, "--batch_size=9"]
    with pytest.raises(UserError, match="^coarse_batch 8 can't be shared among 3 processes equally$"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--batch_size=9")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(training, "distributed", lambda run, network: network)
    for no_phase in ("--coarse_images=0", "--num_latents=0"):
        assert Script("train_stage1.py", *settings, no_phase).run.world == 3


def test_a_mistake_ends_the_script_with_one_line(tmp_path):
    process = start("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--coarse_lr=0")
    printed, errors = process.communicate()
    assert (process.returncode, printed, errors) == (2, "", "error: coarse_lr must be positive, not 0.0\n")


def test_two_processes_do_what_one_does_and_go_on(tmp_path):
    """Weights and log are one process's, to rounding; a signal to one of two in the phase stops both, and the same
    command leads to where an undisturbed run of two leads, to the bit."""
    settings = [*TINY, "--coarse_images=240", "--coarse_spread=0.2", "--null_prob=0.3", "--log_every=80"]
    two = start_together(2, "train_stage1.py", f"--out_dir={tmp_path / 'two'}", *settings)
    run("train_stage1.py", f"--out_dir={tmp_path / 'one'}", *settings)
    outputs(two)
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    begun = dict(model=Script("train_stage1.py", "default", tmp_path / "begun", "cpu", *settings).model.state_dict())
    weights = [torch.cat([p.flatten() for p in encoder_of(state["model"]).values()]) for state in (begun, one, two)]
    moved, apart = weights[1] - weights[0], weights[2] - weights[1]
    assert apart.norm() < 0.01 * moved.norm() and moved.abs().median() > 1e-3
    for a, b in zip(*(log_of(tmp_path / name / "coarse.jsonl") for name in ("one", "two")), strict=True):
        assert a["images"] == b["images"] and a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert [a["bits"], *a["perplexity"]] == pytest.approx([b["bits"], *b["perplexity"]], rel=1e-2)
    command = ["train_stage1.py", f"--out_dir={tmp_path / 'parts'}", *settings]
    processes = start_together(2, *command, "--save_every=8")
    while not (tmp_path / "parts" / "stage1.previous.pt").exists():
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    printed = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [143, 143], printed
    step = checkpoint(tmp_path / "parts")["coarse"]["step"]
    assert 0 < step < 30 and f"SIGTERM after {8 * step} images of the encoder's first phase" in printed[0][0]
    outputs(start_together(2, *command))
    assert same_training(two, checkpoint(tmp_path / "parts"))
    assert untimed(tmp_path / "two" / "stage1.jsonl") == untimed(tmp_path / "parts" / "stage1.jsonl")
