"""A prior that trains along with stage 1: stage 1 unchanged, the prior that of two stages, the joint form, stops, mistakes."""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import checkpoint, load, log_of, same, same_training
from scripts import SAMPLE, TINY, Script, outputs, run, start_together
from test_coarse import stopped, untimed
from test_encoded import GIVEN, make_encoder

import data
import onestage
import preview
import training
from checkpoint import weights_checksum
from configurator import UserError
from model import draw_codes
from noise import gumbel_noise
from onestage import rate
from prior import Prior
from trained import load_prior, load_stage1, ship

SMALL = "layers = 1\ndim = 16\nheads = 2\nwarmup_images = 16\nlog_every = 8\n"
LOAD = data.load
MOVING = [*TINY, "--encoder_lr=1e-3", "--xflip=True", "--dropout=0.2", "--log_every=8"]


def small_prior(folder):
    """Settings that name a small prior."""
    (folder / "small_prior.py").write_text(SMALL)
    return [f"--prior_config={folder / 'small_prior.py'}", "--prior=ar"]


@pytest.fixture(scope="module", autouse=True)
def brief():
    """200 images in place of the data set's, and no table of losses."""
    images, labels, _ = data.load("fashion-mnist-10k")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "load", lambda name: (images[:200], labels[:200], 10))
        patched.setattr(preview, "print_losses", lambda run: None)
        yield


@pytest.fixture
def along(tmp_path):
    return small_prior(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run("train_stage1.py", f"--out_dir={folder}", *MOVING)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run("train_stage1.py", f"--out_dir={folder}", *MOVING, *small_prior(folder))
    return folder


def networks(state):
    return [state[key] for key in ("model", "ema", "optimizer", "step", "skipped")]


def test_stage_1_stays_to_the_bit(plain, whole, tmp_path, along):
    """Where the encoder moves too, with dropout; and its log."""
    run("train_stage1.py", f"--out_dir={tmp_path}", *MOVING, *along, "--prior=sedd")
    for kind, folder in (("ar", whole), ("sedd", tmp_path)):
        without, with_prior = map(checkpoint, (plain, folder))
        assert same(*map(networks, (without, with_prior))) and with_prior.keys() - without.keys() == {"prior"}
        assert untimed(plain / "stage1.jsonl") == untimed(folder / "stage1.jsonl")
        prior = checkpoint(folder, f"prior_{kind}.pt")
        assert prior["step"] == 6 and prior["config"]["batch_size"] == 8 and prior["config"]["total_images"] == 48


def test_the_prior_is_that_of_two_stages_where_the_encoder_stays(tmp_path, along):
    """To the bit, with its log, and train_prior.py goes on with it; its codes are of what it is saved with; one command
    makes a folder that samples, and that can be shipped."""
    printed = run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, *along)
    assert printed.endswith(f"{tmp_path}/stage1.pt is ready; next: python sample.py --out_dir={tmp_path}\n")
    assert "bits per image on 16 held-out images" in printed
    assert {path.name for path in tmp_path.glob("prior_ar*")} == {"prior_ar.pt", "prior_ar.previous.pt", "prior_ar.jsonl", "prior_ar_curves.png"}
    one, log = checkpoint(tmp_path, "prior_ar.pt"), untimed(tmp_path / "prior_ar.jsonl")
    assert [line["images"] for line in log] == [8, 16, 24, 32, 40, 48] and log[0].keys() > {"bits", "held_out_bits"}
    assert one["encoder"] == weights_checksum(checkpoint(tmp_path)["ema"])
    run("sample.py", f"--out_dir={tmp_path}", *SAMPLE)
    assert len(np.unique(load(tmp_path)["codes"], axis=0)) > 1
    ship(tmp_path, tmp_path / "shipped")
    assert not {"prior", "model"} & checkpoint(tmp_path / "shipped").keys()
    load_prior(tmp_path / "shipped", "ar", "cpu", load_stage1(tmp_path / "shipped")[1])
    afterwards = ["train_prior.py", f"--out_dir={tmp_path}", str(tmp_path / "small_prior.py"), "--batch_size=8", "--device=cpu"]
    run(*afterwards, "--total_images=48", "--overwrite=True")
    assert same_training(one, checkpoint(tmp_path, "prior_ar.pt")) and log == untimed(tmp_path / "prior_ar.jsonl")
    torch.save(one, tmp_path / "prior_ar.pt")
    run(*afterwards, "--total_images=64")
    assert checkpoint(tmp_path, "prior_ar.pt")["step"] == 8


def test_a_prior_of_given_codes(tmp_path, along):
    """The codes of an encoder that was trained before are the same in one stage and in two."""
    given = [*GIVEN, f"--codes={make_encoder(tmp_path / 'encoder')}", "--total_images=16"]
    run("train_stage1.py", f"--out_dir={tmp_path}", *given, *along)
    one = checkpoint(tmp_path, "prior_ar.pt")
    run("train_prior.py", f"--out_dir={tmp_path}", str(tmp_path / "small_prior.py"), "--batch_size=8", "--total_images=16", "--device=cpu",
        "--overwrite=True")
    assert one["step"] == 2 and same_training(one, checkpoint(tmp_path, "prior_ar.pt"))


@pytest.mark.parametrize("settings", [["--kld_weight=100"], ["--continuous=True", "--kld_weight=1", "--prior=diffusion"]],
                         ids=lambda settings: settings[0][2:])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, along, settings):
    """Both checkpoints, both logs, to the bit: stopped, and started again. The joint form is in its log."""
    settings = [*MOVING, *along, *settings]
    kind = next(s for s in reversed(settings) if s.startswith("--prior="))[8:]
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    state = stopped(tmp_path / "parts", 4, [*settings, "--save_every=16"])  # after two steps of the first phase
    assert state["prior"]["step"] == state["step"] == checkpoint(tmp_path / "parts", f"prior_{kind}.pt")["step"] == 2
    run("train_stage1.py", f"--out_dir={tmp_path / 'parts'}", *settings)
    for file in ("stage1", f"prior_{kind}"):
        assert same_training(*(checkpoint(tmp_path / name, f"{file}.pt") for name in ("whole", "parts")))
        assert untimed(tmp_path / "whole" / f"{file}.jsonl") == untimed(tmp_path / "parts" / f"{file}.jsonl")
    assert [len(line["kld"]) for line in log_of(tmp_path / "parts" / "stage1.jsonl")] == [3] * 6


def test_a_crash_between_the_two_checkpoints(whole, tmp_path, along, monkeypatch):
    """The prior's is newer than stage 1's, which sample.py says; the same command mends that."""
    command, save = ["train_stage1.py", f"--out_dir={tmp_path}", *MOVING, *along, "--save_every=8"], training.save_checkpoint

    def save_or_crash(path, state):
        if state["step"] == 3 and "stage1" in path:
            raise ZeroDivisionError
        save(path, state)

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(training, "save_checkpoint", save_or_crash)
            run(*command)
    assert (checkpoint(tmp_path)["step"], checkpoint(tmp_path, "prior_ar.pt")["step"]) == (2, 3)
    with pytest.raises(UserError, match="prior_ar.pt was trained on codes of another stage 1"):
        run("sample.py", f"--out_dir={tmp_path}", *SAMPLE)
    run(*command)
    for file in ("stage1.pt", "prior_ar.pt"):
        assert same_training(*(checkpoint(folder, file) for folder in (whole, tmp_path)))


# ----------------------------------------------------------------------------------------------------
# the joint form


def random_prior():
    torch.manual_seed(0)
    prior = Prior(num_latents=3, codebook_size=4, label_dim=2, layers=1, dim=16, heads=2).eval().requires_grad_(False)
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return prior


def test_the_rate_is_the_divergence_from_the_prior(g):
    """KL(q | p), summed over all 64 codes: the mean over draws, each latent's share at least 0; against a uniform prior,
    ln k less the entropy."""
    prior, logits, c = random_prior(), torch.randn(1, 3, 4, generator=g), torch.tensor([1])
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    log_p = prior(every, c.expand(64)).log_softmax(-1).gather(2, every[..., None]).sum((1, 2))
    log_q = logits.log_softmax(-1).expand(64, -1, -1).gather(2, every[..., None]).sum((1, 2))
    wanted = (log_q.exp() * (log_q - log_p)).sum().item()
    rates = rate(prior, logits.expand(4000, -1, -1), gumbel_noise((4000, 3, 4), g), 1.0, c.expand(4000))
    assert rates.shape == (4000, 3) and rates.min() >= -1e-6 and rates[:, 0].std() < 1e-5
    assert rates.sum(1).mean().item() == pytest.approx(wanted, abs=4 * rates.sum(1).std().item() / 4000 ** 0.5)
    torch.nn.init.zeros_(prior.head.weight)
    torch.nn.init.zeros_(prior.head.bias)
    entropy = torch.special.entr(logits.softmax(-1)).sum(2)
    assert torch.allclose(rate(prior, logits, gumbel_noise((1, 3, 4), g), 1.0, c), math.log(4) - entropy, atol=1e-5)


def test_the_rate_reaches_the_encoder(g):
    """Through each latent's own distribution, and through the codes before: so the first latent learns of the last one's
    share. The prior does not learn; its own codes are hard."""
    prior, logits = random_prior(), torch.randn(2, 3, 4, generator=g, requires_grad=True)
    gumbel, c = gumbel_noise((2, 3, 4), g), torch.tensor([0, 1])
    grad, = torch.autograd.grad(rate(prior, logits, gumbel, 1.0, c)[:, 2].sum(), logits)
    assert grad.abs().amax((0, 2)).gt(1e-6).all() and not any(p.requires_grad for p in prior.parameters())
    z = draw_codes(logits, gumbel)
    one_hot = torch.nn.functional.one_hot(z, 4).float()
    assert torch.allclose(prior(one_hot, c), prior(z, c), atol=1e-6)
    by_hand = (logits.softmax(-1) * (logits.log_softmax(-1) - prior(z, c).log_softmax(-1))).sum(2)
    assert torch.allclose(rate(prior, logits, gumbel, 1.0, c), by_hand, atol=1e-5)


def test_the_weight_of_the_rate(tmp_path, along):
    """Two weights apart by 2: the encoder's gradients are apart by twice those of the mean rate, which is measured."""
    found = []
    for weight in (1, 3):
        script = Script("train_stage1.py", "default", tmp_path / f"{weight}", "cpu", *TINY, *along, "--encoder_lr=1e-3", f"--kld_weight={weight}",
                        "--batch_gpu=4")
        *_, kld_sum = script.gradients(0)
        found.append([p.grad for p in script.model.encoder.parameters()])
    y, c, _ = script.fetch(0, 8)
    gumbel = script.draw_step(0)[2]
    of_images = rate(script.run.prior.ema, script.model.encoder(y), gumbel, 1.0, c)
    assert torch.allclose(kld_sum, of_images.sum(0), rtol=1e-4)
    grads = torch.autograd.grad(2 * of_images.sum(1).mean(), [*script.model.encoder.parameters()])
    for one, three, of in zip(*found, grads):
        assert torch.allclose(three - one, of, rtol=1e-3, atol=2e-3 * max(one.abs().max(), of.abs().max()))


def test_the_codes_are_those_of_the_averaged_encoder(tmp_path, along, monkeypatch):
    models = []

    class Recorded(onestage.Encoded):
        def __init__(self, run, model, *arguments):
            models.append(model)
            super().__init__(run, model, *arguments)

    monkeypatch.setattr(onestage, "Encoded", Recorded)
    run("train_stage1.py", f"--out_dir={tmp_path}", *MOVING, *along)
    model, = models
    of_stage_1 = checkpoint(tmp_path)
    assert weights_checksum(model.state_dict()) == checkpoint(tmp_path, "prior_ar.pt")["encoder"]
    assert same(of_stage_1["ema"], {**model.state_dict()}) and not same(of_stage_1["model"], of_stage_1["ema"])


def test_two_processes_do_what_one_does(tmp_path, monkeypatch):
    """To rounding: stage 1 and the prior, in the joint form."""
    monkeypatch.setattr(data, "load", LOAD)
    settings = [*TINY, *small_prior(tmp_path), "--encoder_lr=1e-3", "--kld_weight=1", "--held_out=0", "--total_images=24"]
    two = start_together(2, "train_stage1.py", f"--out_dir={tmp_path / 'two'}", *settings)
    run("train_stage1.py", f"--out_dir={tmp_path / 'one'}", *settings)
    outputs(two)
    begun = Script("train_stage1.py", "default", tmp_path / "begun", "cpu", *settings)
    for file, network in (("stage1.pt", begun.model), ("prior_ar.pt", begun.run.prior.model)):
        states = [network.state_dict(), *(checkpoint(tmp_path / name, file)["model"] for name in ("one", "two"))]
        start, one, two = (torch.cat([p.flatten() for p in state.values()]) for state in states)
        assert (two - one).norm() < 0.02 * (one - start).norm()


# ----------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize("arguments, message", [
    (["--prior=gpt"], "^--prior is ar or sedd or rdm or diffusion, not gpt$"),
    (["--prior=diffusion"], "^this run has codes: say --prior=ar or sedd$"),
    (["--prior=ar", "--continuous=True", "--kld_weight=1"], "^this run has continuous latents: say --prior=diffusion$"),
    (["--prior=ar", "--num_latents=0"], "^--prior=ar draws codes: with num_latents=0 there are none$"),
    (["--prior_config=config/cifar10_prior.py"], "^--prior_config has the settings of --prior=: say which"),
    (["--prior=ar", "--prior_config=nowhere.py"], "can't read the config file nowhere.py"),
    (["--prior=ar", "--kld_weight=1"], "^--kld_weight needs .* --encoder_lr above 0, and no --codes$"),
    (["--prior=sedd", "--kld_weight=1", "--encoder_lr=1e-3"], "^--kld_weight needs .* for codes, --prior=ar"),
])
def test_bad_input(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, *arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_bad_prior_config(tmp_path):
    for line, message in (("layers = 'two'", "layers takes an int"), ("dim = 15\nheads = 2", "15 is not by 2"), ("depth = 2", "there is no setting 'depth'"),
                          ("label_drop = 2.0", "label_drop must be in 0 ... 1")):
        (tmp_path / "prior.py").write_text(line)
        with pytest.raises(UserError, match=message):
            run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--prior=ar", f"--prior_config={tmp_path / 'prior.py'}")


def test_what_can_not_change(plain, whole, tmp_path, along):
    """A run without a prior gets none later, and one with a prior keeps it and its settings; a finished one goes on."""
    with pytest.raises(UserError, match=r"prior='' there, 'ar' here\): choose another --out_dir"):
        run("train_stage1.py", f"--out_dir={plain}", *MOVING, *along)
    with pytest.raises(UserError, match="prior='ar' there, '' here"):
        run("train_stage1.py", f"--out_dir={whole}", *MOVING)
    (tmp_path / "small_prior.py").write_text(SMALL.replace("layers = 1", "layers = 2") + "lr = 0.5\n")
    with pytest.raises(UserError, match=r"prior_layers=1 there, 2 here; prior_lr=0.001 there, 0.5 here\): choose another --out_dir"):
        run("train_stage1.py", f"--out_dir={whole}", *MOVING, *along)
    (tmp_path / "small_prior.py").write_text(SMALL + "log_every = 16\n")
    run("train_stage1.py", f"--out_dir={whole}", *MOVING, *along, "--total_images=56")
    assert checkpoint(whole)["step"] == checkpoint(whole, "prior_ar.pt")["step"] == 7
