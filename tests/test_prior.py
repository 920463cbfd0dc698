"""The autoregressive prior: causal, its samples, its entropy."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from configurator import UserError
from model import draw_codes
from noise import gumbel_noise, seeded_generator
from prior import Prior, with_given
from sedd import SEDD


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


@pytest.mark.parametrize("kind", (Prior, SEDD))
def test_two_threads_sum_a_gradient_in_the_same_order_each_time(kind):
    """The rows of a table have many terms each. The gradient of table[codes] has several values."""
    torch.manual_seed(0)
    prior = kind(num_latents=32, codebook_size=8, label_dim=10, layers=1, dim=64, heads=2)
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.3)
    g, found = seeded_generator("cpu", "test", 1), set()
    z, c = torch.randint(8, (512, 32), generator=g), torch.randint(-1, 10, (512,), generator=g)
    t, u = 1 - torch.rand(512, generator=g), torch.rand(512, 32, generator=g)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for _ in range(8):
        prior.zero_grad()
        prior.loss(z, c, t, u).mean().backward()
        found.add(b"".join(p.grad.numpy().tobytes() for p in prior.parameters()))
    torch.set_num_threads(threads)
    assert len(found) == 1


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


@torch.no_grad()
def test_what_is_given_is_continued_as_it_should_be():
    """20,000 draws of the rest, given one code or two, against p(rest | given, class), and the given ones stay."""
    prior, n = random_prior(), 20_000
    for known in ([2], [2, 1]):
        rest = torch.tensor(list(itertools.product(range(4), repeat=3 - len(known))))
        every = torch.cat([torch.tensor([known]).expand(len(rest), -1), rest], 1)
        log_p = prior(every, torch.ones(len(every), dtype=torch.int64)).log_softmax(-1).gather(2, every[..., None])
        expected = n * log_p[:, len(known):].sum((1, 2)).exp()
        assert abs(expected.sum() - n) < 1 and expected.min() > 1
        start = torch.tensor([known + [-1] * (3 - len(known))]).expand(n, -1)
        gumbel = gumbel_noise((n, 3, 4), seeded_generator("cpu", "test", 6))
        z = prior.sample(given(gumbel), torch.ones(n, dtype=torch.int64), given=start)
        assert (z[:, :len(known)] == torch.tensor(known)).all()
        counts = torch.bincount((z[:, len(known):] * torch.tensor([4, 1])[-len(rest[0]):]).sum(1), minlength=len(rest))
        limit = {4: 16.3, 16: 37.7}[len(rest)]  # chi-square with 3 and 15 degrees of freedom, p = 0.001
        assert ((counts - expected) ** 2 / expected).sum() < limit


@torch.no_grad()
def test_nothing_or_all_may_be_given():
    prior, gumbel, c = random_prior(), gumbel_noise((4, 3, 4), seeded_generator("cpu", "test", 7)), torch.arange(4) % 2
    z = prior.sample(given(gumbel), c)
    assert torch.equal(prior.sample(given(gumbel), c, given=torch.full((4, 3), -1)), z)
    assert torch.equal(prior.sample(given(gumbel), c, given=3 - z), 3 - z)
    mixed = torch.where(torch.arange(3) < torch.arange(4)[:, None], z, -1)  # 0, 1, 2 and 3 of the codes that it draws
    assert torch.equal(prior.sample(given(gumbel), c, given=mixed), z)


def test_what_is_given_may_be_on_another_device():
    """As on Apple's GPUs, where noise, and so codes, are on the CPU."""
    assert with_given(torch.empty(1, 3, dtype=torch.int64, device="meta"), torch.tensor([[-1, 2, 3]]), 4).device.type == "meta"


@pytest.mark.parametrize("codes, message", [
    ([-1, 2, -1], "goes on from the first positions of a code: those that it is to draw come last. --prior=sedd"),
    ([1, 2, 0, -1], r"codes are 3 numbers in 0 ... 3, or -1 where they are to be drawn: 4 are given"),
    ([1, 4, -1], "3 are given, up to 4")])
def test_what_it_can_not_go_on_from(codes, message):
    with pytest.raises(UserError, match=message):
        random_prior().sample(given(torch.zeros(1, 3, 4)), given=torch.tensor([codes]))


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
