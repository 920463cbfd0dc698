"""Stage 1: a step in numbers, what the script leaves and prints, data of every kind, mistakes."""
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import checkpoint, same
from PIL import Image
from scripts import PRIOR, TINY, Script, run

import data
import diffusion
import preview
from configurator import UserError

# a step: what is drawn, what the network is given, the loss, the rates, the averages


SETTINGS = [*TINY, "--held_out=1000", "--batch_size=128", "--batch_gpu=32", "--xflip=True", "--P_mean=-0.7", "--P_std=1.6",
            "--null_prob=0.3", "--tau=0.5", "--lr=0.002", "--encoder_lr=0.0001", "--warmup_images=1000", "--sigma_data=0.4",
            "--ema_halflife_images=1280", "--ema_rampup=0.1"]


@pytest.fixture
def stage1(tmp_path):
    return Script("train_stage1.py", "default", tmp_path, "cpu", *SETTINGS)


def test_what_is_drawn_in_stage_1(stage1, monkeypatch):
    """ln sigma ~ N(P_mean, P_std^2), noise of this size, and coins: 10,240 images."""
    noise, sigma, gumbel, drop, flip = (torch.stack(drawn) for drawn in zip(*map(stage1.draw_step, range(80))))
    log = sigma.log()
    assert log.mean().item() == pytest.approx(-0.7, abs=0.06) and log.std().item() == pytest.approx(1.6, rel=0.03)
    unit = noise / sigma  # (steps, B, C, H, W)
    assert unit.mean().abs() < 0.01 and (unit.std((2, 3, 4)) - 1).abs().max() < 0.15
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.02)
    for coins, share in ((drop, 0.3), (flip, 0.5)):
        of_rows = coins.double().mean(0)  # (B,): no image of the batch is spared, or always taken
        assert of_rows.mean().item() == pytest.approx(share, abs=0.02)
        assert of_rows.var().item() == pytest.approx(share * (1 - share) / 80, rel=0.5)
    assert (drop & flip).double().mean().item() == pytest.approx(0.15, abs=0.02)
    monkeypatch.setitem(stage1.all, "xflip", False)
    assert not stage1.draw_step(0)[4].any()


def test_what_the_network_is_given_and_its_loss(stage1, monkeypatch):
    """A new network's last layer is zero: D = c_skip x (EDM, Table 1), and the loss is known. In four micro-steps."""
    images, labels, _ = data.load("fashion-mnist-10k")
    given = stage1.recorded(monkeypatch, "forward")
    loss, code_sum, entropy_sum, _ = stage1.gradients(3)
    assert [len(arguments[0]) for arguments in given] == [32] * 4 and {arguments[6] for arguments in given} == {0.5}
    y, noise, sigma, c, gumbel, drop = (torch.cat(parts) for parts in list(zip(*given))[:6])
    drawn = stage1.draw_step(3)
    for mine, theirs in zip((noise, sigma, gumbel, drop), drawn):
        assert torch.equal(mine, theirs.reshape(mine.shape))
    which = stage1.batches.take(3 * 128, 128)
    mirrored = np.where(drawn[4].numpy()[:, None, None, None], images[which][:, :, ::-1], images[which])
    assert torch.equal(y, data.to_float(mirrored)) and c.tolist() == labels[which].tolist()
    variance = sigma.double() ** 2 + 0.4 ** 2
    errors = ((0.4 ** 2 / variance)[:, None, None, None] * (y + noise) - y).square().mean((1, 2, 3))
    assert loss.item() == pytest.approx((errors * variance / (0.4 * sigma) ** 2).mean().item(), rel=1e-4)
    with torch.no_grad():
        p = stage1.model.encoder(y).softmax(2)
    assert torch.allclose(code_sum, p.sum(0), rtol=1e-3)
    assert entropy_sum.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-3)


OTHERS = {"pfgm++": ["--process=pfgm++", "--pfgm_D=2"], "flow": ["--process=flow"], "shift": ["--shift=3"],
          "monotonic": ["--weighting=edm-monotonic", "--shift=2"]}


@pytest.mark.parametrize("name", ["pfgm++", "flow"])
def test_the_encoder_learns_from_the_loss_of_the_process(name, tmp_path):
    """Once the denoiser reads codes: a new network's last layer is zero, and so are its cross-attentions'."""
    stage1 = Script("train_stage1.py", "default", tmp_path, "cpu", *SETTINGS, *OTHERS[name])
    for p in stage1.model.model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    stage1.gradients(0)
    grads = [p.grad for p in stage1.model.encoder.parameters()]
    assert all(grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)


@pytest.mark.parametrize("name", OTHERS)
def test_training_is_of_the_process(name, tmp_path, monkeypatch, capsys):
    """Its noise, its noise levels, and its weight, by the loss of a new network, whose D is c_skip x, or whose velocity is 0."""
    stage1 = Script("train_stage1.py", "default", tmp_path, "cpu", *SETTINGS, "--batch_gpu=128", *OTHERS[name])
    assert ("P_mean and P_std have no effect" in capsys.readouterr().err) == (name == "flow")
    noise, sigma = (torch.cat(drawn).double().flatten(1) for drawn in list(zip(*map(stage1.draw_step, range(40))))[:2])
    inverse = 1 / (noise / sigma).square().mean(1)  # of 5,120 images; in PFGM++ chi-square with 2 degrees of freedom, over 2
    assert inverse.mean().item() == pytest.approx(1, abs=0.05) and inverse.std().item() == pytest.approx(1 if name == "pfgm++" else 0.05, rel=0.1)
    log, shift = sigma.log(), {"shift": 3, "monotonic": 2}.get(name, 1)
    mean, std = (0, np.pi / 3 ** 0.5) if name == "flow" else (-0.7 + np.log(shift), 1.6)
    assert log.mean().item() == pytest.approx(mean, abs=0.08) and log.std().item() == pytest.approx(std, rel=0.05)

    given = stage1.recorded(monkeypatch, "forward")
    loss, *_ = stage1.gradients(3)
    y, noise, sigma = (t.double() for t in given[0][:3])
    sd2, each = 0.4 ** 2, (slice(None), None, None, None)
    if name == "flow":
        want = (y - noise / sigma[each]).square()
    else:
        want = (sd2 / (sigma ** 2 + sd2))[each] * (y + noise) - y
        weight = (sigma ** 2 + sd2) / (sd2 * sigma ** 2)
        if name == "monotonic":
            def objective(s):
                return torch.exp(-((s.log() + 1.2) / 1.2) ** 2 / 2) / 1.2 * (s ** 2 + sd2)

            s, grid = sigma / shift, torch.linspace(-6, 6, 100_001, dtype=torch.float64).exp()
            peak = objective(grid).argmax()
            density = torch.exp(-((s.log() + 0.7) / 1.6) ** 2 / 2) / 1.6
            weight = torch.where(s < grid[peak], objective(s), objective(grid[peak])) / density / (sd2 * sigma ** 2)
        want = weight[each] * want ** 2
    assert loss.item() == pytest.approx(want.mean().item(), rel=1e-4)


def test_previews_and_losses_are_of_the_process(tmp_path, monkeypatch):
    stage1, given = Script("train_stage1.py", "default", tmp_path, "cpu", *TINY, "--process=pfgm++", "--pfgm_D=1"), []
    monkeypatch.setattr(preview, "heun", lambda denoise, noise: given.append(noise) or noise)
    monkeypatch.setattr(preview, "loss_at", lambda denoise, y, n, *_: given.append(n) or n.mean((1, 2, 3)))
    stage1.save_preview(tmp_path / "preview.png")
    stage1.print_losses(16, (0.3, 3))
    assert len(given) == 1 + 2 * 2 and all(n.square().mean((1, 2, 3)).log().std() > 1 for n in given)  # of Gaussian noise, 0.05


def test_stage_1_trains_on_what_is_not_held_out(stage1):
    train, held_out = data.split(10_000, 1000)
    assert sorted(stage1.batches.take(0, 9000)) == sorted(train) and not set(stage1.batches.take(9000, 9000)) & set(held_out)


def test_rates_and_averages_of_stage_1(stage1):
    """Warm-up is linear. After its half-life, in images, the average has gone half the way; the half-life is at most a tenth
    of the images seen."""
    for seen, share in ((0, 0), (250, 0.25), (1000, 1), (5000, 1)):
        stage1.averages_of_ones([seen])
        rates = [group["lr"] for group in stage1.optimizer.param_groups]
        assert rates == pytest.approx([0.002 * share, 0.002 * share, 1e-4 * share])
    groups = [{*map(id, group["params"])} for group in stage1.optimizer.param_groups]
    model = stage1.model
    assert stage1.optimizer.defaults["betas"] == (0.9, 0.999) and stage1.optimizer.defaults["eps"] == 1e-8  # EDM's
    assert groups == [{*map(id, part.parameters())} for part in (model.model, model.latents, model.encoder)]
    assert stage1.averages_of_ones([10 ** 9] * 10)[-1] == pytest.approx(0.5, rel=1e-5)  # 10 x 128 images
    assert stage1.averages_of_ones([1280])[0] == pytest.approx(0.5, rel=1e-5)  # a half-life of 128
    assert stage1.averages_of_ones([0])[0] == 1


def test_the_table_of_losses(stage1, monkeypatch, capsys):
    """For D = c_skip x the loss at sigma is (sigma^2 <y^2> / sd^2 + sd^2) / (sigma^2 + sd^2), of held-out images; the first
    column has their own codes, the second none."""
    condition, dropped = stage1.ema.condition, []
    monkeypatch.setattr(stage1.ema, "condition", lambda z, drop=None: dropped.append(drop is not None) or condition(z, drop))
    stage1.print_losses(64, (0.3, 3))
    assert dropped == [False, False, True] * 4  # 32 images at once; guidance with w = 0 takes both
    y = data.to_float(data.load("fashion-mnist-10k")[0][data.split(10_000, 1000)[1][:64]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loss on 64 held-out images")
    for line, sigma in zip(lines[2:], (0.3, 3), strict=True):
        want = (sigma ** 2 * y.square().mean().item() / 0.16 + 0.16) / (sigma ** 2 + 0.16)
        assert [float(number) for number in line.split()] == pytest.approx([sigma, want, want, 1], rel=0.03)


def test_what_is_shown_has_codes_of_the_average(stage1):
    y = data.to_float(data.load("fashion-mnist-10k")[0][:8])
    codes = preview.codes_of(stage1.run, y, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(stage1.model.encoder.head, std=100)
    assert torch.equal(preview.codes_of(stage1.run, y, torch.Generator().manual_seed(0)), codes)


def test_dropout_differs_from_step_to_step(stage1, monkeypatch):
    """Each micro-step has a seed of its own, the same one when the step is repeated."""
    seeds = []

    def forward(y, *_):
        seeds.append(torch.initial_seed())
        return (0 * y).requires_grad_(), torch.zeros(len(y), 3, 5)

    monkeypatch.setattr(stage1.run, "forward", forward)
    for step in (0, 1, 2, 0):
        stage1.gradients(step)
    assert len(set(seeds)) == 12 and seeds[12:] == seeds[:4]


# the script


def test_what_stage_1_leaves_and_prints(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "heun", partial(diffusion.heun, num_steps=4))  # of previews
    printed = run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--log_every=24", "--preview_every=24", "--coarse_images=48")
    assert {p.name for p in tmp_path.iterdir()} == {"stage1.pt", "stage1.previous.pt", "stage1.jsonl", "stage1_curves.png", "coarse.jsonl",
                                                   "coarse_curves.png", "preview_000000024.png", "preview_000000048.png"}
    rows, coarse = ([json.loads(line) for line in open(tmp_path / f"{name}.jsonl")] for name in ("stage1", "coarse"))
    assert [r["images"] for r in rows] == [r["images"] for r in coarse] == [24, 48] and rows[0].keys() == coarse[0].keys()
    assert all(1 <= u <= 5 for r in rows for u in r["perplexity"]) and len(rows[0]["perplexity"]) == 3
    assert 0 <= rows[0]["bits"] <= 3 * np.log2(5)
    assert all(r["grad_norm"] > 0 and r["lr"] == 2e-3 and r["skipped"] == 0 for r in rows)
    table = printed[printed.index("own codes"):].splitlines()[1:9]
    assert [float(line.split()[0]) for line in table] == [0.02, 0.1, 0.3, 1, 3, 10, 30, 80]


def test_checkpoints_that_stay(tmp_path):
    """Weights and average of their step, without the optimiser: they can be sampled from, be trained on from, and get a prior."""
    run("train_stage1.py", f"--out_dir={tmp_path / 'short'}", *TINY, "--total_images=24")
    run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *TINY, "--keep_every=24")
    path, short = tmp_path / "run" / "stage1-000000024.pt", checkpoint(tmp_path / "short")
    kept = torch.load(path)
    assert all(same(kept[key], short[key]) for key in ("model", "ema", "step", "model_args")) and not {"optimizer", "skipped"} & kept.keys()
    sample = ["--num_images=4", "--num_steps=2", "--device=cpu", "--seed=3"]
    run("sample.py", f"--out_dir={tmp_path / 'run'}", *sample, f"--checkpoint={path}", "--code=0,1,2")
    run("sample.py", f"--out_dir={tmp_path / 'short'}", *sample, "--code=0,1,2")
    made = [np.load(tmp_path / name / "samples.npz")["images"] for name in ("run", "short")]
    assert np.array_equal(*made)
    with pytest.raises(UserError, match=r"there is no prior .*prior_ar.pt: give codes by --code or --encode"):
        run("sample.py", f"--out_dir={tmp_path / 'run'}", *sample, f"--checkpoint={path}")
    run("train_prior.py", f"--out_dir={tmp_path / 'run'}", *PRIOR, "--total_images=50")
    with pytest.raises(UserError, match="another stage 1: give codes by --code or --encode, .* copy .*24.pt into a folder of its own as stage1.pt"):
        run("sample.py", f"--out_dir={tmp_path / 'run'}", *sample, f"--checkpoint={path}")
    with pytest.raises(UserError, match="--checkpoint=nothing.pt: there is no such file"):
        run("sample.py", f"--out_dir={tmp_path / 'run'}", *sample, "--checkpoint=nothing.pt")
    (tmp_path / "own").mkdir()
    shutil.copy(path, tmp_path / "own" / "stage1.pt")
    run("train_prior.py", f"--out_dir={tmp_path / 'own'}", *PRIOR, "--total_images=50")
    run("sample.py", f"--out_dir={tmp_path / 'own'}", *sample)
    with pytest.raises(UserError, match=r"stage1.pt has weights alone, .* --init_from=.*own/stage1.pt, or start anew"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'own'}", *TINY)


def test_images_of_ones_own_at_the_first_try(tmp_path, monkeypatch):
    """Two dozen photographs of two classes, 64 pixels: every default fits, up to the samples; names are where classes are named."""
    for i in range(24):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((100, 70), 50 + i).convert("RGB").save(path)
    root, titles = tmp_path / "datasets", []
    data.prepare("pets", str(tmp_path / "photos"), transform="center-crop-dhariwal", root=root)
    for function in (data.load, data.class_names, data.made_of):
        monkeypatch.setattr(data, function.__name__, partial(function, root=root))
    monkeypatch.setattr(preview, "save_grid", lambda images, path, columns, names=(): titles.append(names))
    monkeypatch.setattr(preview, "heun", partial(diffusion.heun, num_steps=2))  # of previews
    run("train_stage1.py", "--dataset=pets", f"--out_dir={tmp_path / 'out'}", "--coarse_images=128", "--total_images=32", "--device=cpu")
    state = checkpoint(tmp_path / "out")
    assert {k: state["config"][k] for k in ("held_out", "attn_resolutions", "encoder_patch")} == dict(
        held_out=2, attn_resolutions=(16,), encoder_patch=16)
    assert state["classes"] == ["cat", "dog"] and set(titles[0]) <= {"cat", "dog"} and len(titles[0]) == 2
    run("train_prior.py", f"--out_dir={tmp_path / 'out'}", *PRIOR, "--total_images=250")
    run("sample.py", f"--out_dir={tmp_path / 'out'}", "--num_images=2", "--num_steps=2", "--class_label=dog", "--device=cpu")
    with np.load(tmp_path / "out" / "samples.npz") as made:
        assert made["images"].shape == (2, 64, 64, 3) and (made["labels"] == 1).all()
    assert data.made_of(str(tmp_path / "out" / "samples.npz"))["transform"] == "center-crop-dhariwal"
    with pytest.raises(UserError) as error:  # what does not fit is said at once
        run("train_stage1.py", "--dataset=pets", f"--out_dir={tmp_path / 'no'}", "--held_out=500", "--attn_resolutions=7,", "--encoder_patch=7")
    assert str(error.value) == ("held_out is 500: the data set has 24 images, -1 takes a tenth; attn_resolutions has [7]: the feature maps are "
                                "[64, 32, 16], (0,) takes the last; encoder_patch 7 does not divide images of 64 pixels, 0 takes a quarter")


@pytest.mark.parametrize("arguments, message", [
    (["--channel_mult=1,2,2,2"], "28 pixels can't be halved 3 times"),
    (["--attn_resolutions=8,"], r"attn_resolutions has \[8\]: the feature maps are \[28, 14\]"),
    (["--encoder_patch=5"], "encoder_patch 5 does not divide"),
    (["--dataset=nothing"], "there is no data set 'nothing'"),
    (["--held_out=10000"], "held_out is 10000: the data set has 10000 images"),
    (["--batch_size=0"], "batch_size must be positive"),
    (["--encoder_heads=0"], "encoder_heads must be positive"),
    (["--seed=-1"], "seed can't be negative"),
    (["--P_mean=inf"], "P_mean must be finite, not inf"),
    (["--null_prob=2"], "null_prob 2.0 and dropout 0.0 are probabilities"),
    (["--channel_mult=()"], "channel_mult has a positive number"),
    (["--model_channels=2"], "2 channels can't be split"),
    (["--encoder_heads=3"], "16 is not by 3"),
    (["--batch_size=10", "--batch_gpu=4"], "10 images per process can't be split into 3 equal parts of at most 4"),
    (["--device=cuda:99"], "--device=cuda:99 can't be used here"),
    (["--nun_latents=3"], "the nearest is 'num_latents'"),
    (["--groups=2"], "^3 latents can't be split into 2 equal groups: .*; 2 groups of latents need 2 resolutions"),
    (["--groups=3"], r"3 groups of latents need 3 resolutions with attention, and it is at \[14\]: name more of .* attn_resolutions"),
    (["--groups=2", "--attn_resolutions=14,28"], "3 latents can't be split into 2 equal groups"),
    (["--groups=3", "--denoiser=dit"], "they need --denoiser=unet and --conditioning=attention"),
])
def test_bad_input(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, *arguments)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_data_set_that_has_changed(tmp_path, monkeypatch):
    images, labels, _ = data.load("fashion-mnist-10k")
    monkeypatch.setattr(data, "load", lambda name: (images[:100], labels[:100], 10))
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY)
    monkeypatch.setattr(data, "load", lambda name: (images[100:200], labels[100:200], 10))
    with pytest.raises(UserError, match="data_identity=.* there"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--total_images=80")
    with pytest.raises(UserError, match="has changed since"):
        run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR)


def test_a_data_set_without_labels(tmp_path, monkeypatch):
    images, _, _ = data.load("fashion-mnist-10k")
    monkeypatch.setattr(data, "load", lambda name: (images[:100], None, 0))
    with pytest.raises(UserError, match="no class labels: train with --class_cond=False"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY)
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--class_cond=False")
    for prior in ("ar", "sedd"):
        run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, f"--prior={prior}", "--total_images=100")
        run("sample.py", f"--out_dir={tmp_path}", f"--prior={prior}", "--num_images=4", "--num_steps=2", "--device=cpu")
    printed = run("compare_priors.py", f"--out_dir={tmp_path}", "--num_codes=50", "--sedd_steps=2", "--etas=0.1,", "--device=cpu")
    assert "bits per image on 16 held-out images" in printed
