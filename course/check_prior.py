"""
What must hold of answers in prior.py.

The function with an exercise's name takes the student's module, and gives [(property, check)]. check(rng) gives
"" or None if the property holds, else words for the student. NAME_probe gives outputs at fixed inputs, by which
known wrong answers are recognised.
"""

import math
from types import SimpleNamespace

import torch
from measures import EVERY, far, fixed, gumbel, misfit, numbered, small, tensor

# ----------------------------------------------------------------------------------------------------
# the prior. reverse: whether the last code comes first


def tiny(prior, rng, label_dim=2):
    return small(prior.Prior(num_latents=3, codebook_size=4, label_dim=label_dim, layers=2, dim=16, heads=2), rng)


@torch.no_grad()
def prior_probe(prior):
    rng = fixed()
    network, codes, labels = tiny(prior, rng), torch.tensor([[0, 3, 1], [2, 2, 0]]), torch.tensor([0, 1])
    return [network(codes, labels), network.loss(codes, labels)]


@torch.no_grad()
def prior(module, reverse=False):
    def order(rng):
        network, codes = tiny(module, rng), torch.from_numpy(rng.integers(0, 4, (1, 3)))
        base = tensor(network(codes), (1, 3, 4), "forward")
        for i in range(3):
            other = codes.clone()
            other[0, i] = (other[0, i] + 1) % 4
            moved = (network(other) - base).abs().amax((0, 2)) > 1e-5
            if moved.tolist() != [j < i if reverse else j > i for j in range(3)]:
                rows = [j for j in range(3) if moved[j]]
                side = "before" if reverse else "after"
                return f"code {i} must move the rows {side} it, and no others: it moves {rows}"

    def classes(rng):
        network, codes = tiny(module, rng), torch.from_numpy(rng.integers(0, 4, (1, 3)))
        rows = [network(codes, torch.tensor([c])) for c in (-1, 0, 1)]
        if min((a - b).abs().amax(2).min() for a, b in ((rows[0], rows[1]), (rows[1], rows[2]))) < 1e-5:
            return "the class must move every row"
        if far(rows[0], network(codes)):
            return "without labels, the class token is that of -1, no class"

    def positions(rng):
        network = tiny(module, rng)
        network.codebook.data[:] = network.class_token.data[-1]  # all tokens look alike
        logits = network(torch.zeros(1, 3, dtype=torch.int64))[0]
        if not far(logits[1], logits[0]) or not far(logits[2], logits[1]):
            return "with all tokens alike, the rows must still differ: each has its position"

    def total(rng):
        network = tiny(module, rng)
        nats = tensor(network.loss(EVERY, torch.zeros(64, dtype=torch.int64)), (64,), "loss")
        if far(nats.neg().exp().sum(), torch.tensor(1.0), 1e-4):
            return f"the probabilities of all 64 codes add up to {nats.neg().exp().sum():.4f}, not to 1"

    def uniform_start(rng):
        network = module.Prior(5, 7, layers=1, dim=8, heads=1)  # its head starts at 0
        nats = network.loss(torch.from_numpy(rng.integers(0, 7, (4, 5))))
        if far(nats, torch.full((4,), 5 * math.log(7))):
            return f"a prior that knows nothing needs m ln k nats: {5 * math.log(7):.4f}, not {nats[0]:.4f}"

    return [("a row sees the codes that it should", order), ("and the class", classes), ("and its position", positions),
            ("the probabilities of all codes add up to 1", total), ("untrained, it is uniform", uniform_start)]


def given(noise):
    """An object that draws this Gumbel noise (B, m, k)."""
    return SimpleNamespace(gumbel=lambda m, k: noise)


def decided(module, rng):
    """A prior over six codes, each of which depends on those before it."""
    network = small(module.Prior(num_latents=6, codebook_size=4, label_dim=2, layers=2, dim=16, heads=2), rng)
    for p in network.parameters():
        p.data *= 2
    return network


@torch.no_grad()
def sampling_probe(module):
    rng = fixed()
    return [decided(module, rng).sample(given(gumbel(rng, 12, 6, 4)), torch.arange(12) % 3 - 1, 1.5)]


def sampling(module, reverse=False):
    def draws(rng, temperature, n=300):
        network, noise, labels = decided(module, rng), gumbel(rng, n, 6, 4), torch.arange(n) % 3 - 1
        codes = tensor(network.sample(given(noise), labels, temperature), (n, 6), "sample")
        with torch.no_grad():
            return codes, tensor(network(codes, labels), (n, 6, 4), "forward, the exercise before this one,"), noise

    def by_noise(rng):
        codes, logits, noise = draws(rng, 1.0)
        if codes.dtype != torch.int64:
            return f"codes are int64, not {codes.dtype}"
        wanted = module.draw_codes(logits, noise)
        wrong = (codes != wanted).double().mean(0)
        if wrong.max() > 0.01:  # rounding may change a few
            return (f"{100 * wrong.max():.0f} % of code {wrong.argmax()} are not what its noise decides, given the "
                    "other codes")

    def temperatures(rng):
        for temperature in (0.5, 2.0):
            codes, logits, noise = draws(rng, temperature)
            if (codes != module.draw_codes(logits / temperature, noise)).double().mean() > 0.01:
                return f"at temperature {temperature} the codes are not those of logits / T"
        codes, logits, _ = draws(rng, 0)
        if (codes != logits.argmax(-1)).double().mean() > 0.01:
            return "at temperature 0 each code must be the most likely one"

    def frequencies(rng):
        network, n = tiny(module, rng), 8_000
        for p in network.parameters():
            p.data *= 0.5  # no code is too rare to count
        with torch.no_grad():
            p = network.loss(EVERY).neg().double().exp()
        return misfit(numbered(network.sample(given(gumbel(rng, n, 3, 4)))), p / p.sum(), "codes")

    def cached(rng):
        network, lengths = tiny(module, rng), []
        for block in network.blocks:
            block.register_forward_hook(lambda block, inputs, output: lengths.append(inputs[0].shape[1]))
        network.sample(given(gumbel(rng, 5, 3, 4)))
        if sum(lengths) < 3 * len(network.blocks):
            return "every token must pass through every block"
        if sum(lengths) > 3 * len(network.blocks):
            return (f"right, but plain: {sum(lengths)} tokens pass through the blocks, where a cache needs "
                    f"{3 * len(network.blocks)}")

    return [("each code is what its noise decides", by_noise), ("the temperature divides the logits", temperatures),
            ("codes are as frequent as the prior says", frequencies),
            ("each token passes through a block once", cached)]
