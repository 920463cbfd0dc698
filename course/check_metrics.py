"""
What must hold of answers in metrics.py.

The function with an exercise's name takes the student's module, and gives [(property, check)]. check(rng) gives
"" or None if the property holds, else words for the student. NAME_probe gives outputs at fixed inputs, by which
known wrong answers are recognised.
"""

import numpy as np
import torch
from measures import fixed, normal, number

# ----------------------------------------------------------------------------------------------------
# distances


def covariance(rng, rank=4):
    """A random covariance (4, 4) of this rank, as an array."""
    factor = rng.standard_normal((4, rank))
    return factor @ factor.T


def frechet_probe(metrics):
    rng = fixed()
    a, b = ((rng.standard_normal(4), covariance(rng)) for _ in range(2))
    return [torch.tensor(float(metrics.frechet_distance(*a, *b)))]


def frechet(metrics):
    def distance(*arguments):
        return number(metrics.frechet_distance(*arguments), "frechet_distance")

    def means(rng):
        sigma, mu = covariance(rng), rng.standard_normal(4)
        shift = np.array([3.0, 0, -4, 0])
        found = distance(mu, sigma, mu + shift, sigma)
        if abs(found - 25) > 1e-6:
            return f"two Gaussians 5 apart, of one covariance, have the distance 25, not {found:.4g}"

    def one_dimension(rng):
        a, b = 0.1 + 3 * rng.random(2)
        found = distance(np.zeros(1), np.array([[a * a]]), np.ones(1), np.array([[b * b]]))
        if abs(found - 1 - (a - b) ** 2) > 1e-6:
            return f"in one dimension it is (m1 - m2)^2 + (s1 - s2)^2 = {1 + (a - b) ** 2:.4f}, not {found:.4f}"

    def turned(rng):
        """A symmetric positive T is the shortest way from N(0, a) to N(0, T a T): the distance is E|x - T x|^2."""
        a, T, zero = covariance(rng), covariance(rng), np.zeros(4)
        wanted, found = ((a - T @ a) @ (np.eye(4) - T)).trace(), distance(zero, a, zero, T @ a @ T)
        if abs(found - wanted) > 1e-6 * wanted:
            return f"of two covariances with other axes it is {wanted:.4f}, not {found:.4f}"

    def flat(rng):
        a, b, zero = covariance(rng, 2), covariance(rng, 1), np.zeros(4)
        values = [distance(zero, a, zero, a), distance(zero, b, zero, b), distance(zero, 0 * a, zero, b) - b.trace(),
                  distance(zero, a, zero, b) - distance(zero, b, zero, a)]
        if not max(map(abs, values)) < 1e-6:
            return "covariances may lack full rank: the distance to itself is 0, to a point the trace; it is symmetric"

    return [("means enter by their squared distance", means), ("in one dimension it is known", one_dimension),
            ("covariances may have other axes", turned), ("covariances may lack full rank", flat)]


def kernel_probe(metrics):
    rng = fixed()
    return [torch.tensor(metrics.kernel_distance(normal(rng, 6, 2), 1 + normal(rng, 5, 2))).double()]


def kernel(metrics):
    def estimates(rng, count, n, m, spread, shift):
        pairs = [metrics.kernel_distance(normal(rng, n, 1), shift + spread * normal(rng, m, 1)) for _ in range(count)]
        if len(pairs[0]) != 2:
            raise ValueError("kernel_distance returns two numbers")
        return torch.tensor([[number(value, "kernel_distance") for value in pair] for pair in pairs]).double().unbind(1)

    def unbiased(rng):
        found, _ = estimates(rng, 400, 5, 4, 1.0, 0.0)
        error = (found.std() / 20).item()
        if abs(found.mean().item()) > 5 * error:
            return f"between samples of one distribution the mean must be 0: it is {found.mean():.3f} +- {error:.3f}"

    def true_value(rng):
        """(x y + 1)^3 in one dimension compares three moments."""
        spread, shift = 1 + 0.3 * float(rng.random()), 0.5 + 0.5 * float(rng.random())
        gaps = shift, spread ** 2 + shift ** 2 - 1, shift ** 3 + 3 * shift * spread ** 2
        wanted = 3 * gaps[0] ** 2 + 3 * gaps[1] ** 2 + gaps[2] ** 2
        found, _ = estimates(rng, 400, 40, 30, spread, shift)
        error = (found.std() / 20).item()
        if abs(found.mean().item() - wanted) > 5 * error:
            return f"the mean must be {wanted:.3f}: it is {found.mean():.3f} +- {error:.3f}"

    def its_error(rng):
        found, errors = estimates(rng, 200, 200, 150, 1.2, 0.8)
        ratio = (errors.square().mean().sqrt() / found.std()).item()
        if not 0.75 < ratio < 1.5:
            return f"the standard error must be the spread of the estimates: it is {ratio:.2f} times that"

    def dimensions(rng):
        x, y = normal(rng, 7, 3), normal(rng, 6, 3)
        twice = metrics.kernel_distance(torch.cat([x, x], 1), torch.cat([y, y], 1))[0]
        if abs(twice - metrics.kernel_distance(x, y)[0]) > 1e-9 * max(1, abs(twice)):
            return "every feature twice must change nothing: the kernel divides by D"

    return [("there is no bias", unbiased), ("it is the true value on average", true_value),
            ("the standard error is right", its_error), ("the kernel divides by D", dimensions)]
