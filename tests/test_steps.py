"""A step of each training script, in numbers: what is drawn, what the network is given, the loss, the rates, the averages."""
import inspect
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY

import bench
import data
import training
from model import DisCoDiff

SETTINGS = [*TINY, "--held_out=1000", "--batch_size=128", "--batch_gpu=32", "--xflip=True", "--P_mean=-0.7", "--P_std=1.6",
            "--null_prob=0.3", "--tau=0.5", "--lr=0.002", "--encoder_lr=0.0001", "--warmup_images=1000", "--sigma_data=0.4",
            "--ema_halflife_images=1280", "--ema_rampup=0.1"]


class Script:
    """A training script before its first step: its run, and its functions, which are given the run where they take one.
    In `all`, its globals can be changed, as its functions see them."""

    def __init__(self, *arguments):
        hook = sys.excepthook
        scope, self.run = bench.prepared(*arguments)
        self.all = scope["gradients"].__globals__
        sys.excepthook = hook

    def __getattr__(self, name):
        if name not in self.all:
            return getattr(self.run, name)
        value = self.all[name]
        takes_run = inspect.isfunction(value) and next(iter(inspect.signature(value).parameters), "") == "run"
        return partial(value, self.run) if takes_run else value

    def recorded(self, monkeypatch, name):
        """-> a list that gets what this function is given from now on"""
        given, function = [], self.all[name] if name in self.all else getattr(self.run, name)

        def recording(run, *arguments):
            given.append(arguments if run is self.run else (run, *arguments))
            return function(run, *arguments)

        monkeypatch.setitem(self.all if name in self.all else vars(self.run), name, recording)
        return given

    def averages_of_ones(self, seen):
        """What the moving average, 0 to begin with, is after `update` at each of these points, of weights that stay at 1."""
        averages = self.run.ema_parameters
        with torch.no_grad():
            for p, average in zip(self.parameters, averages):
                p.fill_(1)
                average.zero_()
        self.optimizer.state.clear()
        found = []
        for point in seen:
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
            self.update(point)
            assert all(p.eq(1).all() for p in self.parameters)
            low, high = torch.cat([average.flatten() for average in averages]).aminmax()
            assert high - low < 1e-6
            found.append(low.item())
        return found


# stage 1


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
    loss, code_sum, entropy_sum = stage1.gradients(3)
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
    monkeypatch.setattr(stage1.ema, "condition", lambda z, drop: dropped.append(drop.unique().tolist()) or condition(z, drop))
    stage1.print_losses(64, (0.3, 3))
    assert dropped == [[False], [True]] * 4  # 32 images at once
    y = data.to_float(data.load("fashion-mnist-10k")[0][data.split(10_000, 1000)[1][:64]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loss on 64 held-out images")
    for line, sigma in zip(lines[2:], (0.3, 3), strict=True):
        want = (sigma ** 2 * y.square().mean().item() / 0.16 + 0.16) / (sigma ** 2 + 0.16)
        assert [float(number) for number in line.split()] == pytest.approx([sigma, want, want, 1], rel=0.03)


def test_what_is_shown_has_codes_of_the_average(stage1):
    y = data.to_float(data.load("fashion-mnist-10k")[0][:8])
    codes = stage1.codes_of(y, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(stage1.model.encoder.head, std=100)
    assert torch.equal(stage1.codes_of(y, torch.Generator().manual_seed(0)), codes)


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


def test_what_is_due_where_batches_do_not_divide_it(stage1):
    """Every 1,000 images, in batches of 128: after the step that passes them, and after the last one."""
    config = dict(stage1.config, total_images=2_600)
    steps = [128 * i for i in range(1, 22)]
    assert [seen for seen in steps if training.due(1_000, seen, config)] == [1024, 2048, 2688]
    assert [seen for seen in steps if training.due(50, seen, config)] == steps
    assert not any(training.due(0, seen, config) for seen in steps)


# stage 2


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
    taken, drawn = (prior.recorded(monkeypatch, name) for name in ("logits_of", "draw_codes"))
    given, loss_of = [], prior.model.loss
    monkeypatch.setattr(prior.model, "loss", lambda *arguments: given.append(arguments[:4]) or loss_of(*arguments))
    loss = prior.gradients(7).item()
    ((which, flip),), ((z, c, t, u),) = taken, given
    assert sorted(set(which)) == sorted(train) and flip.double().mean().item() == pytest.approx(0.5, abs=0.05)
    logits = prior.logits_of(which, flip)
    with torch.no_grad():
        mirrored = np.where(flip.numpy()[:, None, None, None], images[which][:, :, ::-1], images[which])
        assert torch.allclose(logits, encoder(data.to_float(mirrored)), atol=0.01)
    shares = torch.stack([(z[torch.from_numpy(which == train[0])] == code).double().mean(0) for code in range(5)], 1)
    p = torch.stack([prior.logits_of(train[:1], np.array([mirror])).softmax(-1)[0] for mirror in (False, True)]).mean(0)
    assert (shares - p).abs().max() < 0.3  # of 50 visits
    of_class = torch.from_numpy(labels[which])
    dropped = c == -1
    assert torch.equal(c[~dropped], of_class[~dropped]) and dropped.double().mean().item() == pytest.approx(0.3, abs=0.04)
    prior.gradients(8)
    again = given[1][1] == -1
    assert (dropped & again).double().mean().item() == pytest.approx(0.09, abs=0.03)
    assert not (drawn[0][1] == drawn[1][1]).any()  # nothing is the same in each step
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
