"""Randomness: seeds, and the distributions that are drawn."""
import math

import torch

from noise import SeededNoise, seed_of, seeded_generator


def test_seeds_depend_on_the_whole_key():
    keys = [("a", 0), ("a", 1), ("b", 0), ("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("a", 0, 2 ** 40), ("a",)]
    assert len({seed_of(*key) for key in keys}) == len(keys) and seed_of("a", 0, 1) == seed_of("a", 0, 1)
    draws = {torch.rand(1, generator=seeded_generator("cpu", *key)).item() for key in keys}
    assert len(draws) == len(keys)


def test_noise_depends_on_its_seed_alone():
    many, few = SeededNoise("a", range(10), "cpu"), SeededNoise("a", [7, 3], "cpu")
    for _ in range(2):
        a, b = many.randn(2, 2), few.randn(2, 2)
        assert torch.equal(a[[7, 3]], b) and not torch.equal(a[0], a[1])
    assert not torch.equal(SeededNoise("a", [7], "cpu").randn(2), SeededNoise("b", [7], "cpu").randn(2))
    first = SeededNoise("images", range(50_000), "cpu").randn(1)
    assert len(first.unique()) == 50_000  # no two seeds collide


def test_seeded_noise_has_its_distributions():
    noise = SeededNoise("a", range(100), "cpu")
    normal, gumbel = noise.randn(1000), noise.gumbel(1000)
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert abs(gumbel.mean() - 0.5772) < 0.02 and abs(gumbel.var() - math.pi ** 2 / 6) < 0.05
