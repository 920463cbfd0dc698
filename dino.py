"""
Self-distillation without labels: the losses, targets, masks and schedules of DINOv2 (Oquab et al. 2023), with which
Discrete Latent Codes trains its encoder. Pure functions of tensors, outside autocast; sums go over all processes
where it says so.

The student sees crops of an image, some with patches hidden. From each it predicts which prototypes the teacher,
a moving average of the student, gives another crop of the image (DINO), and hidden patches (iBOT). Two
things keep the teacher from giving all images the same answer: it is sharper than the student, and `centred` or
`sinkhorn` spread its answers over the prototypes.
"""

import math

import torch
import torch.nn.functional as F

from processes import sum_over_processes

# ----------------------------------------------------------------------------------------------------
# the teacher's targets


def centred(logits, center, temp):
    """Softmax of the teacher's logits (n, K), less their running mean `center` (K,), at temperature `temp` > 0 (DINO,
    Alg. 1). -> (n, K), rows sum to 1"""
    return ((logits.float() - center) / temp).softmax(-1)


def mean_of_all(x):
    """The mean of the rows of x (n, K) over all processes, which may have different n. -> (K,); of none: 0"""
    total = torch.cat([x.float().sum(0), x.new_tensor([len(x)], dtype=torch.float32)])
    sum_over_processes(total)
    return total[:-1] / total[-1].clamp(min=1)


def sinkhorn(logits, temp, rounds=3):
    """The teacher's logits (n, K) -> targets (n, K): rows sum to 1, and all processes' rows together use the
    prototypes nearly equally (SwAV; Sinkhorn-Knopp)."""
    q = (logits.float() / temp).exp()
    for _ in range(rounds):
        of_prototypes = q.sum(0)
        sum_over_processes(of_prototypes)
        q = q / of_prototypes
        q = q / q.sum(1, keepdim=True)
    return q


# ----------------------------------------------------------------------------------------------------
# losses


def class_loss(student, targets, temp):
    """Cross-entropies over all pairs of a teacher's global crop and another crop of the student (DINO, Eq. 3).

    student: logits (2 + n, B, K), global crops first; targets: (2, B, K); temp: the student's temperature
    -> the mean over pairs and images in two parts, that of local crops and that of global ones
    """
    crops, count, _ = student.shape
    pairs = -torch.einsum("ibk,jbk->ij", targets, (student.float() / temp).log_softmax(-1)) / count
    number = 2 * (crops - 1)
    return pairs[:, 2:].sum() / number, (pairs[0, 1] + pairs[1, 0]) / number


def patch_loss(student, targets, weights, temp):
    """Cross-entropies of hidden patches (iBOT, Eq. 2). student: logits (M, K); targets: (M, K); weights: (M,)
    -> their weighted sum, a scalar"""
    return -((student.float() / temp).log_softmax(-1) * targets).sum(-1) @ weights


def patch_weights(mask):
    """For `patch_loss`: the mean over an image's hidden patches, then over all images, also those without any.

    mask: (b, N) bool -> (M,), in the order of mask.flatten().nonzero()
    """
    return (1 / mask.sum(1).clamp(min=1) / len(mask))[:, None].expand_as(mask)[mask]


def koleo(x):
    """-mean ln(distance to the nearest neighbour) of l2-normed rows x (B, D): keeps images apart (DINOv2, sec. 4).
    B is 2 or more. -> a scalar"""
    x = F.normalize(x.float(), dim=-1, eps=1e-8)
    nearest = (x @ x.mT).fill_diagonal_(-1).argmax(1)
    return -(F.pairwise_distance(x, x.index_select(0, nearest), eps=1e-8) + 1e-8).log().mean()


# ----------------------------------------------------------------------------------------------------
# masks


def draw_masks(count, side, g, share=(0.1, 0.5), least=4):
    """Hides patches in half of `count` crops of side x side patches. -> (count, side^2) bool, on the CPU

    Of this half, chosen at random, the k-th crop hides a share from the k-th slice of `share`. least = 1 hides single
    patches. With more, rectangles of about so many patches or more, and an aspect of 0.3 ... 1 / 0.3, are added, until
    the number is reached or ten in a row don't fit (BEiT, DINOv2).
    """
    number = count // 2
    edges = torch.linspace(*share, number + 1)
    ratio = edges[:-1] + edges.diff() * torch.rand(number, generator=g)
    wanted = (ratio * side ** 2).long()
    if least == 1:
        hidden = torch.rand(number, side ** 2, generator=g).argsort(1).argsort(1) < wanted[:, None]
    else:
        hidden = rectangles(wanted, side, g, least)
    masks = torch.zeros(count, side ** 2, dtype=torch.bool)
    masks[torch.randperm(count, generator=g)[:number]] = hidden
    return masks


def rectangles(wanted, side, g, least, tries=10, aspect=0.3):
    """Rectangles that together hide about `wanted` (number,) patches. -> (number, side^2) bool"""
    hidden = torch.zeros(len(wanted), side, side, dtype=torch.bool)
    failures = torch.zeros_like(wanted)
    at = torch.arange(side)
    while True:
        left = wanted - hidden.sum((1, 2))
        going = (left > 0) & (failures < tries)
        if not going.any():
            return hidden.flatten(1)
        u = torch.rand(4, len(wanted), generator=g)
        area, ratio = least + (left - least) * u[0], ((2 * u[1] - 1) * math.log(aspect)).exp()
        high, wide = ((area * r).sqrt().round().long() for r in (ratio, 1 / ratio))
        top, start = ((v * (side - size + 1)).long() for v, size in ((u[2], high), (u[3], wide)))
        rows, columns = ((at >= a[:, None]) & (at < (a + size)[:, None]) for a, size in ((top, high), (start, wide)))
        new = rows[:, :, None] & columns[:, None] & ~hidden
        count = new.sum((1, 2))
        fits = going & (high < side) & (wide < side) & (count > 0) & (count <= left)
        hidden |= new & fits[:, None, None]
        failures = torch.where(fits, 0, failures + 1)


# ----------------------------------------------------------------------------------------------------
# schedules


def schedule(step, value, end, steps, warmup=0, start=0.0):
    """Linear from `start` to `value` over the first `warmup` steps, then a cosine to `end` at `steps` (DINOv2)."""
    if step < warmup:
        return start + (value - start) * step / max(warmup - 1, 1)
    if step >= steps:
        return end
    return end + (value - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
