"""Stage 2: a step in numbers, kept logits, bits, mistakes."""
import shutil

import numpy as np
import pytest
import torch
from conftest import checkpoint
from scripts import PRIOR, TINY, Script, run

import data
from configurator import UserError
from model import DisCoDiff
from trained import load_prior, load_stage1

# a step: what is drawn, what the network is given, the loss, the rates, the averages


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """The folder of a stage 1 that mirrors, on 60 random images, 20 of them held out; `data.load` gives these."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 8, 8, 1), np.uint8), np.arange(60) % 3
    args = dict(img_resolution=8, img_channels=1, label_dim=3, num_latents=4, codebook_size=5, model_channels=4,
                channel_mult=(1,), num_blocks=1, attn_resolutions=(), latent_dim=4, latent_layers=1, latent_heads=1,
                encoder_patch=4, encoder_dim=8, encoder_layers=1, encoder_heads=1)
    config = dict(dataset="mine", held_out=20, xflip=True, data_identity=data.data_checksum(images, labels))
    folder = tmp_path_factory.mktemp("encoded")
    torch.manual_seed(0)
    state = dict(made_by="train_stage1", config=config, model_args=args, step=0, ema=DisCoDiff(**args).state_dict())
    torch.save(state, folder / "stage1.pt")
    return folder, images, labels


@pytest.fixture(params=["ar", "sedd"])
def prior(request, encoded, monkeypatch):
    folder, images, labels = encoded
    monkeypatch.setattr(data, "load", lambda name: (images, labels, 3))
    return Script("train_prior.py", "default", folder, "cpu", f"--prior={request.param}", "--layers=1", "--dim=16", "--heads=2",
                  "--batch_size=2000", "--lr=0.01", "--warmup_images=8000", "--label_drop=0.3", "--grad_clip=0.5", "--ema_decay=0.75")


def test_what_a_prior_is_given_and_its_loss(prior, encoded, monkeypatch):
    """Codes of each training image, or of its mirror image, without the class as often as said. The loss of uniform
    probabilities is known: ln k a code; of uniform scores, 1 / t of it for each mask (on average as many)."""
    _, images, labels = encoded
    train, held_out = data.split(60, 20)
    encoder = prior.stage1.encoder
    drawn, draw = [], prior.run.encoded.draw
    monkeypatch.setattr(prior.run.encoded, "draw", lambda *arguments: drawn.append(arguments) or draw(*arguments))
    given, loss_of = [], prior.model.loss
    monkeypatch.setattr(prior.model, "loss", lambda *arguments: given.append(arguments[:4]) or loss_of(*arguments))
    loss = prior.gradients(7).item()
    ((which, flip, _),), ((z, c, t, u),) = drawn, given
    assert sorted(set(which)) == sorted(train) and flip.double().mean().item() == pytest.approx(0.5, abs=0.05)
    logits = prior.run.encoded.logits(which, flip)
    with torch.no_grad():
        mirrored = np.where(flip.numpy()[:, None, None, None], images[which][:, :, ::-1], images[which])
        assert torch.allclose(logits, encoder(data.to_float(mirrored)), atol=0.01)
    shares = torch.stack([(z[torch.from_numpy(which == train[0])] == code).double().mean(0) for code in range(5)], 1)
    p = torch.stack([prior.run.encoded.logits(train[:1], np.array([mirror])).softmax(-1)[0] for mirror in (False, True)]).mean(0)
    assert (shares - p).abs().max() < 0.3  # of 50 visits
    of_class = torch.from_numpy(labels[which])
    dropped = c == -1
    assert torch.equal(c[~dropped], of_class[~dropped]) and dropped.double().mean().item() == pytest.approx(0.3, abs=0.04)
    prior.gradients(8)
    again = given[1][1] == -1
    assert (dropped & again).double().mean().item() == pytest.approx(0.09, abs=0.03)
    assert not (drawn[0][2] == drawn[1][2]).any()  # nothing is the same in each step
    assert 1e-3 <= t.min() < 0.02 and 0.98 < t.max() <= 1 and t.mean().item() == pytest.approx(0.5, abs=0.03)
    assert u.shape == (2000, 4) and ((u < t[:, None]).double().mean(0) - 0.5).abs().max() < 0.05  # each token on its own
    masks = torch.ones(2000, 4) if prior.prior == "ar" else (u < 0.999 * t[:, None]) / t[:, None]
    assert loss == pytest.approx(masks.sum(1).mean().item() * np.log(5), rel=1e-4)


def test_rates_clipping_and_averages_of_a_prior(prior):
    """Warm-up is linear; Adam's first moment is a tenth of gradients of the norm grad_clip at most; at step n the average
    keeps (1 + n) / (10 + n) of itself, at most `ema`."""
    for step, share in ((0, 0), (1, 0.25), (4, 1), (20, 1)):
        prior.averages_of_ones([step])
        assert prior.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * share)
    for norm, clipped in ((3.0, 0.5), (0.2, 0.2)):
        prior.optimizer.state.clear()
        count = sum(p.numel() for p in prior.parameters)
        for p in prior.parameters:
            p.grad = torch.full_like(p, norm / count ** 0.5)
        prior.update(0)
        moments = [state["exp_avg"] for state in prior.optimizer.state.values()]
        assert torch.cat([m.flatten() for m in moments]).norm().item() == pytest.approx(0.1 * clipped, rel=1e-4)
    assert prior.averages_of_ones([0]) == pytest.approx([0.9]) and prior.averages_of_ones([2]) == pytest.approx([0.75])
    assert prior.averages_of_ones([10 ** 6] * 2) == pytest.approx([0.25, 0.4375])


def test_held_out_bits_are_the_averages(prior):
    """Which is uniform to begin with, whatever becomes of the weights."""
    with torch.no_grad():
        for p in prior.parameters:
            p.normal_()
    assert prior.held_out_bits(2) == pytest.approx((4 * np.log2(5), 0), abs=1e-4)


# the script


def test_kept_logits_are_the_encoders(tmp_path):
    """In half precision, of each image and of its mirror image; and the prior does without them."""
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--xflip=True")
    run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, "--total_images=50", "--cache_gb=0")
    assert not list(tmp_path.glob("logits-*"))
    (tmp_path / "logits-00000000.npy").write_bytes(b"of an older encoder")
    run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, "--total_images=100")
    (file,) = tmp_path.glob("logits-*.npy")
    whole = file.read_bytes()
    for other in (np.zeros((1, 5, 3, 5), np.float16), np.zeros((2, 10_000, 3, 5), np.int8)):
        np.save(file, other)
        with pytest.raises(UserError, match="logits-.*npy is damaged: delete it, and start again"):
            run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, "--total_images=150")
    file.write_bytes(whole)
    kept, (images, _, _) = np.load(file), data.load("fashion-mnist-10k")
    assert kept.shape == (2, 10_000, 3, 5) and kept.dtype == np.float16
    encoder = load_stage1(tmp_path, "cpu")[0].encoder
    for i in (0, 1234, 9999):
        both = np.stack([images[i], images[i][:, ::-1]])
        assert torch.allclose(encoder(data.to_float(both)), torch.from_numpy(kept[:, i]).float(), atol=4e-3)
    assert np.abs(kept[0] - kept[1]).max() > 0.1


def test_bits_are_what_they_say(trained, tmp_path):
    """Against sums over the kept logits, written out with NumPy."""
    shutil.copy(trained / "stage1.pt", tmp_path)
    printed = run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, "--total_images=500")
    bits = {line[:37].strip(): float(line[37:].split()[0]) for line in printed.splitlines() if line.startswith("  ")}
    assert bits["uniform codes, m log2 k"] == pytest.approx(3 * np.log2(5), abs=0.01)
    logits = np.load(next(tmp_path.glob("logits-*.npy")))[0].astype(float)  # (N, m, k)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels, (train, held_out) = data.load("fashion-mnist-10k")[1], data.split(10_000, 16)
    q = p[train].mean(0)
    assert bits["independent latents"] == pytest.approx(-(p[held_out] * np.log2(q)).sum() / 16, abs=0.01)
    q = np.stack([p[train][labels[train] == c].mean(0) for c in range(10)])
    wanted = -(p[held_out] * np.log2(q[labels[held_out]])).sum() / 16
    assert bits["independent latents given the class"] == pytest.approx(wanted, abs=0.01)
    model = load_prior(tmp_path, "ar", "cpu", load_stage1(tmp_path, "cpu")[1])
    codes = torch.from_numpy((p + 0.0).argmax(-1))[held_out]
    nats = torch.nn.functional.cross_entropy(model(codes, torch.from_numpy(labels[held_out])).flatten(0, 1), codes.flatten())
    assert bits["this prior, given the class"] == pytest.approx(3 * nats.item() / np.log(2), rel=0.1)


def test_sedd_training_prints_bounds_and_starts_uniform(trained, tmp_path):
    shutil.copy(trained / "stage1.pt", tmp_path)
    printed = run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, "--prior=sedd", "--total_images=50", "--lr=1e-12")
    assert "on 16 held-out images, this prior's at most\n" in printed
    bits = {line[:37].strip(): float(line[37:].split()[0]) for line in printed.splitlines() if line.startswith("  ")}
    assert bits["this prior"] == bits["this prior, given the class"] == pytest.approx(3 * np.log2(5), abs=0.01)
    assert printed.endswith(f"next: python sample.py --out_dir={tmp_path} --prior=sedd\n")


def test_the_class_is_dropped_as_often_as_said(trained, tmp_path):
    """With probability 1 the class can't have been learned from; with 0, "no class" has not."""
    shutil.copy(trained / "stage1.pt", tmp_path)
    for prior, name in (("ar", "class_token"), ("sedd", "label")):
        for drop, used in ((0.0, slice(0, 10)), (1.0, slice(10, 11))):
            settings = [*PRIOR, f"--prior={prior}", "--total_images=250", f"--label_drop={drop}", "--overwrite=True"]
            printed = run("train_prior.py", f"--out_dir={tmp_path}", *settings)
            assert ("\n  this prior  " in printed) == (drop > 0)  # bits without the class, where it has learned them
            state = checkpoint(tmp_path, f"prior_{prior}.pt")["optimizer"]["state"]
            model = load_prior(tmp_path, prior, "cpu", checkpoint(tmp_path))
            index = [n for n, _ in model.named_parameters()].index(name)
            moment = state[index]["exp_avg"].abs().amax(1)
            assert (moment[used] > 0).all() and moment.sum() == moment[used].sum()


@pytest.mark.parametrize("arguments, message", [
    (["--prior=gpt"], "--prior is ar or sedd or rdm or diffusion, not gpt"),
    (["--label_drop=1.5"], "label_drop must be in 0 ... 1, .* they are 1.5 and 0.9999"),
    (["--ema_decay=1"], "ema_decay at least 0 and below 1"),
    (["--grad_clip=0"], "grad_clip must be positive"),
    (["--dim=14", "--heads=4"], "14 is not by 4"),
    (["--layers=3", "--dim=16"], "layers=1 there, 3 here"),
])
def test_bad_input_to_the_priors(trained, arguments, message):
    for prior in ("ar", "sedd"):
        with pytest.raises(UserError, match=message) as error:
            run("train_prior.py", f"--out_dir={trained}", *PRIOR, f"--prior={prior}", *arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("prior", ["ar", "sedd"])
def test_a_prior_that_diverges_is_not_saved(trained, tmp_path, prior):
    shutil.copy(trained / "stage1.pt", tmp_path)
    with pytest.raises(UserError, match="the weights are not finite any more: a lower --lr may help; .* is left as it was"):
        run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, f"--prior={prior}", "--lr=1e38", "--total_images=200")
    assert checkpoint(tmp_path, f"prior_{prior}.pt")["step"] == 0


def test_a_prior_of_the_other_kind_is_not_continued(trained, tmp_path):
    shutil.copy(trained / "stage1.pt", tmp_path)
    shutil.copy(trained / "prior_ar.pt", tmp_path / "prior_sedd.pt")
    with pytest.raises(UserError, match="prior='ar' there, 'sedd' here"):
        run("train_prior.py", f"--out_dir={tmp_path}", "--prior=sedd", "--layers=1", "--dim=16", "--heads=2", "--device=cpu")


def test_a_prior_of_another_stage_1_is_not_continued(trained, tmp_path):
    """Nor is one of before, whose setting `ema` is called ema_decay now, with another value of it."""
    for file in ("stage1.pt", "prior_ar.pt"):
        shutil.copy(trained / file, tmp_path)
    state = checkpoint(tmp_path, "prior_ar.pt")
    more = [f"--out_dir={tmp_path}", "--layers=1", "--dim=16", "--heads=2", "--device=cpu", "--total_images=750"]
    torch.save(state | dict(encoder=state["encoder"] + 1), tmp_path / "prior_ar.pt")
    with pytest.raises(UserError, match="prior_ar.pt is of another stage 1 than .*stage1.pt: start anew with --overwrite"):
        run("train_prior.py", *more)
    state["config"]["ema"] = state["config"].pop("ema_decay")
    torch.save(state, tmp_path / "prior_ar.pt")
    with pytest.raises(UserError, match="ema_decay=0.9999 there, 0.5 here"):
        run("train_prior.py", *more, "--ema_decay=0.5")
    run("train_prior.py", *more)
    assert checkpoint(tmp_path, "prior_ar.pt")["step"] == 3


def test_a_finished_prior_needs_no_place_to_write(trained, tmp_path):
    """It prints its bits, and leaves all files as they are."""
    for file in ("stage1.pt", "prior_ar.pt"):
        shutil.copy(trained / file, tmp_path)
    arguments = [f"--out_dir={tmp_path}", "--layers=1", "--dim=16", "--heads=2", "--device=cpu", "--total_images=500"]
    printed = run("train_prior.py", *arguments)
    assert "is finished" in printed and "this prior" in printed
    assert {p.name for p in tmp_path.iterdir()} - {"stage1.pt", "prior_ar.pt"} == {next(tmp_path.glob("logits-*")).name}
