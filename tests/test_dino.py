"""Self-distillation: the numbers of DINOv2's program and of the authors' training step; masks, schedules."""
import numpy as np
import pytest
import torch
from test_vit import reference
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino import (
    centred,
    class_loss,
    draw_masks,
    koleo,
    mean_of_all,
    patch_loss,
    patch_weights,
    schedule,
    sinkhorn,
)

WANT = reference("dino_losses")
SIZES, (TEACHER_TEMP, STUDENT_TEMP, CENTER_MOMENTUM, TEACHER_MOMENTUM) = WANT["settings"][:4].int().tolist(), WANT["settings"][4:].tolist()


def near(a, b, tolerance):
    assert np.abs(np.asarray(a, float) - np.asarray(b, float)).max() < tolerance


@pytest.mark.parametrize("kind", ["center", "sinkhorn"])
def test_class_loss_equals_dinov2(kind):
    images, prototypes, local, _ = SIZES
    targets = centred(WANT["teacher_global"], WANT["center"], TEACHER_TEMP) if kind == "center" else sinkhorn(WANT["teacher_global"], TEACHER_TEMP)
    near(targets, WANT[f"probs_{kind}"], 2e-6)
    student = WANT["student_global"].clone().requires_grad_()
    said = torch.cat([student, WANT["student_local"]]).view(2 + local, images, prototypes)
    parts = class_loss(said, targets.view(2, images, prototypes), STUDENT_TEMP)
    near([part.item() for part in parts], WANT[f"dino_{kind}"][:2], 1e-6)
    near(torch.autograd.grad(sum(parts), student)[0], WANT[f"grad_global_{kind}"], 1e-5)


@pytest.mark.parametrize("kind", ["center", "sinkhorn"])
def test_patch_loss_equals_dinov2(kind):
    mask, student = WANT["mask"], WANT["student_patch"].clone().requires_grad_()
    teacher = WANT["teacher_patch"][mask]
    targets = centred(teacher, WANT["center_patch"][0], TEACHER_TEMP) if kind == "center" else sinkhorn(teacher, TEACHER_TEMP)
    near(targets, WANT[f"probs_patch_{kind}"], 2e-6)
    loss = patch_loss(student[mask], targets, patch_weights(mask), STUDENT_TEMP)
    near(loss.item(), WANT[f"ibot_{kind}"], 1e-6)
    near(torch.autograd.grad(loss, student)[0], WANT[f"grad_patch_{kind}"], 1e-5)


def test_koleo_centres_and_averages_equal_dinov2():
    features = WANT["features"].clone().requires_grad_()
    parts = [koleo(half) for half in features.chunk(2)]
    near([part.item() for part in parts], WANT["koleo"], 1e-6)
    near(torch.autograd.grad(sum(parts), features)[0], WANT["grad_koleo"], 1e-4)
    for center, logits in (("center", WANT["teacher_global"]), ("center_patch", WANT["teacher_patch"][WANT["mask"]])):
        near(torch.lerp(mean_of_all(logits), WANT[center].flatten(), CENTER_MOMENTUM), WANT[f"{center}_new"].flatten(), 2e-6)
    teacher = WANT["ema_teacher"].clone()
    get_ema_multi_avg_fn(TEACHER_MOMENTUM)([teacher], [WANT["ema_student"]], None)
    near(teacher, WANT["ema_teacher_new"], 1e-6)


@pytest.mark.parametrize("name", ["lr", "wd", "momentum", "temp"])
def test_schedules_equal_dinov2(name):
    value, end, steps, warmup, start = WANT[f"sched_{name}_settings"].tolist()
    near([schedule(i, value, end, int(steps), int(warmup), start) for i in range(len(WANT[f"sched_{name}"]))], WANT[f"sched_{name}"], 1e-9)


def test_sinkhorn_shares_the_prototypes_out():
    logits = torch.randn(12, 4, dtype=torch.float64) + torch.tensor([3.0, 0, 0, 0])
    q = sinkhorn(logits, 1.0, rounds=50)
    near(q.sum(1), torch.ones(12), 1e-5)
    near(q.sum(0), torch.full((4,), 3.0), 1e-5)
    assert len(sinkhorn(logits[:0], 1.0)) == 0 and mean_of_all(logits[:0]).tolist() == [0] * 4  # a process without hidden patches


# masks


def test_single_patches_are_hidden():
    """Half of the crops, each a share from its slice of 0.1 ... 0.5; every patch equally often."""
    g = torch.Generator().manual_seed(0)
    masks = torch.stack([draw_masks(64, 4, g, (0.1, 0.5), least=1) for _ in range(200)])  # (200, 64, 16)
    hidden = masks.sum(2)
    assert ((hidden > 0).sum(1) == 32).all() and hidden.max() == 7 and hidden[hidden > 0].min() == 1
    assert hidden[hidden > 0].float().mean().item() == pytest.approx(0.3 * 16 - 0.5, abs=0.05)  # rounded down
    for axes in ((0, 1), (0, 2)):  # of patches, of places in the batch
        share = masks.float().mean(axes)
        assert share.min() > 0.1 and share.max() < 0.17
    slices = hidden.sort(1).values[:, 32:]
    assert (slices[:, :8] <= 4).all() and (slices[:, -8:] >= 6).all()


def test_rectangles_are_hidden():
    """A crop's number is reached but for what no rectangle fits; the first one has at least four patches."""
    g = torch.Generator().manual_seed(0)
    masks = draw_masks(400, 16, g, (0.1, 0.5), least=4)
    hidden = masks.sum(1).sort().values[200:]
    wanted = torch.linspace(0.1, 0.5, 200) * 256
    assert (hidden - wanted).max() < 2 and (hidden - wanted).mean() > -4 and not masks.sum(1).sort().values[:200].any()
    grid = masks.view(-1, 16, 16)
    neighbours = (grid[:, :, 1:] & grid[:, :, :-1]).sum().item()
    assert neighbours > 0.6 * hidden.sum()  # single patches at these shares: about 0.33
    small = draw_masks(4000, 4, g, (0.1, 0.5), least=4).sum(1)
    assert small.max() <= 8 and small.sum().item() / 2000 == pytest.approx(4.23, abs=0.1)  # as a loop of DINOv2's rule finds
