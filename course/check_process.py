"""
What must hold of answers in toy_measures.py and diffusion.py.

The function with an exercise's name takes the student's module, and gives [(property, check)]. check(rng) gives
"" or None if the property holds, else words for the student. NAME_probe gives outputs at fixed inputs, by which
known wrong answers are recognised.
"""

import math

import torch
from measures import far, fixed, normal, row, tensor, uniform
from source import Wrong

# ----------------------------------------------------------------------------------------------------
# mixtures


def circle(rng, n):
    """n centres (n, 2) somewhere around a circle."""
    angles = 2 * math.pi * (torch.arange(n).double() / n + uniform(rng, 1) / n)
    return (2 + uniform(rng, 1)) * torch.stack([angles.cos(), angles.sin()], 1)


def mixture_probe(toy):
    rng = fixed()
    x, centres = normal(rng, 4, 2), circle(rng, 3)
    denoise = toy.exact_denoiser(centres, 0.3)
    return [toy.log_density(x, centres, 0.4, -1.0), denoise(x, torch.tensor(0.6)), denoise(500 * x, torch.tensor(0.1))]


def mixture(toy):
    def density(rng):
        x, centres = normal(rng, 7, 2), circle(rng, 4)
        for std, weights, of in ((0.7, 0, "one std"), (0.3 + uniform(rng, 4), uniform(rng, 4).log(), "a std for each")):
            wanted = torch.distributions.Normal(centres, torch.as_tensor(std).view(-1, 1)).log_prob(x[:, None]).sum(2)
            found = tensor(toy.log_density(x, centres, std, weights), (7, 4), "log_density")
            if far(found, wanted + weights):
                return (f"with {of}, log_density is {found[0, 0]:.4f} where torch.distributions.Normal's is "
                        f"{(wanted + weights)[0, 0]:.4f}, in the plane")

    def score(rng):
        centres = circle(rng, 5)
        for t in (0.1, 0.8, 3.0):
            x, wide = normal(rng, 40, 2) * 2, math.hypot(0.25, t)
            x.requires_grad_()
            log_p = torch.distributions.Normal(centres, wide).log_prob(x[:, None]).sum(2).logsumexp(1)
            slope, = torch.autograd.grad(log_p.sum(), x)
            D = tensor(toy.exact_denoiser(centres, 0.25)(x.detach(), torch.tensor(t).double()), (40, 2), "denoise")
            if far((D - x) / t ** 2, slope, 1e-5):
                return f"(D - x) / t^2 is not the gradient of ln p at t = {t}: one of them is off"

    def ends(rng):
        centres, x = circle(rng, 6), normal(rng, 10, 2)
        denoise = toy.exact_denoiser(centres, 0.3)
        if far(denoise(x, torch.tensor(1e-4).double()), x, 1e-4):
            return "without noise, the denoiser must leave x as it is"
        if far(denoise(x, torch.tensor(1e5).double()) + 1, centres.mean(0).expand(10, 2) + 1, 1e-4):
            return "in pure noise, the best guess is the mean of all centres"

    def distant(rng):
        x = 1000 * normal(rng, 10, 2)
        D = toy.exact_denoiser(circle(rng, 6), 0.1)(x, torch.tensor(0.05).double())
        if not (D.norm(dim=1) > 0).all() or not D.isfinite().all():
            return "far from all centres the result is NaN: densities underflow, their logarithms don't"

    return [("the log-densities are a Gaussian's", density), ("(D - x) / t^2 is the score", score),
            ("it is right without noise, and in pure noise", ends), ("points far away are no problem", distant)]


# ----------------------------------------------------------------------------------------------------
# noise levels and a step. alpha: where in the step the second slope is taken


def of_gaussian(sd, calls=None):
    """The exact denoiser of N(0, sd^2): x shrinks."""
    def denoise(x, t):
        if calls is not None:
            calls.append(float(t))
        return x / (1 + (t / sd) ** 2)
    return denoise


def bent(x, t):
    """A denoiser whose trajectories bend."""
    return torch.tanh(x) + 0.1 * t


def error(diffusion, x, steps):
    """Of so many even steps along dx/dt = x cos t, whose solution is known; relative."""
    t, y = torch.linspace(3, 0.5, steps + 1).double(), x
    for now, after in zip(t, t[1:]):
        y = diffusion.heun_step(lambda x, t: x - t * t.cos() * x, y, now, after)
    return (y / x * math.exp(math.sin(3) - math.sin(0.5)) - 1).abs().max().item()


def heun_probe(diffusion):
    x, t = normal(fixed(), 3, 2), torch.tensor([2.0, 1.5, 0.0]).double()
    step, ones = diffusion.heun_step, torch.ones_like
    return [step(bent, x, t[0], t[1]), step(bent, x, t[1], t[2]), step(bent, x, t[0], t[1], 0.3, 1.1, ones),
            diffusion.noise_levels(6, 0.01, 50, 5)]


def heun(diffusion, alpha=1.0):
    def ends(rng):
        n = int(rng.integers(5, 40))
        t = tensor(diffusion.noise_levels(n, 0.002, 80, 7), (n,), "noise_levels")
        if t.dtype != torch.float64:
            return f"the levels must have the asked dtype, torch.float64: they are {t.dtype}"
        if far(t[[0, -1]].log(), row([80, 0.002]).log(), 1e-9) or not (t.diff() < 0).all():
            return f"the levels must fall from sigma_max 80 to sigma_min 0.002, not go from {t[0]:.4g} to {t[-1]:.4g}"
        if far(diffusion.noise_levels(1, 0.002, 80, 7), row([80])):
            return "a single level is sigma_max"

    def roots(rng):
        for rho in (1.0, 2.0, 7.0):
            gaps = diffusion.noise_levels(12, 0.1, 30, rho).pow(1 / rho).diff()
            if far(gaps, gaps.mean().expand(11)):
                return f"the rho-th roots of the levels must be evenly spaced: for rho = {rho:g} they are not"

    def last(rng):
        x, t, calls = normal(rng, 4, 3), 0.1 + uniform(rng, 1)[0], []
        x_next = tensor(diffusion.heun_step(of_gaussian(0.5, calls), x, t, torch.zeros_like(t)), (4, 3), "heun_step")
        if far(x_next, of_gaussian(0.5)(x, t)) or len(calls) != 1:
            return "the step to t_next = 0 is one Euler step, whose result is D itself, with one evaluation"

    def where(rng):
        calls, (t_next, t) = [], sorted(uniform(rng, 2) * 5 + 0.1)
        diffusion.heun_step(of_gaussian(0.5, calls), normal(rng, 4, 3), t, t_next)
        wanted = [t, t + alpha * (t_next - t)]
        if len(calls) != 2 or far(row(calls), torch.stack(wanted), 1e-9):
            found = ", ".join(f"{call:.3f}" for call in calls)
            return (f"a step from {t:.3f} to {t_next:.3f} evaluates D at {wanted[0]:.3f} and {wanted[1]:.3f}, "
                    f"not at {found}")

    def order(rng):
        errors = [error(diffusion, normal(rng, 5), steps) for steps in (32, 64, 128)]
        if not 3.3 < errors[1] / max(errors[2], 1e-12) < 5 or errors[2] > 1e-3:
            return (f"with 32, 64, 128 steps the errors are {errors[0]:.2g}, {errors[1]:.2g}, {errors[2]:.2g}: "
                    "halving the step must quarter the error")

    def churn(rng):
        x, t, gamma = normal(rng, 4, 3), 1 + uniform(rng, 1)[0], 0.1 + 0.3 * float(rng.random())
        calls = []

        def still(x, sigma):  # x - D = 0: nothing moves but by noise
            calls.append(float(sigma))
            return x

        y = diffusion.heun_step(still, x, t, t / 2, gamma, 1.5, torch.ones_like)
        if far(row(calls[:1]), t[None] * (1 + gamma), 1e-9):
            return "with churn, D is first evaluated at t (1 + gamma)"
        if far((y - x) ** 2, (1.5 * t) ** 2 * ((1 + gamma) ** 2 - 1) * torch.ones(4, 3)):
            return "churn must raise the noise's variance from t^2 to t_hat^2, with noise scaled by S_noise"
        y = diffusion.heun_step(lambda x, sigma: x - 3 * sigma, x, t, t / 2, gamma, 0, torch.ones_like)  # dx/dt = 3
        if far(y, x + 3 * (t / 2 - t * (1 + gamma))):
            return "with churn the step starts at t_hat, not at t"

    return [("the levels fall from sigma_max to sigma_min", ends), ("their rho-th roots are even", roots),
            ("the last step is Euler's", last), ("D is evaluated where it should be", where),
            ("the error is of second order", order), ("churn adds the right noise", churn)]


# ----------------------------------------------------------------------------------------------------
# preconditioning


def data_and_noise(rng, sigma, sigma_data):
    """Images and noise (B, 1, 8, 8) whose variances over each image are sigma_data^2 and sigma^2, uncorrelated, exactly.

    sigma: (B, 1, 1, 1)
    """
    pair = normal(rng, len(sigma), 64, 2)
    q, _ = torch.linalg.qr(pair - pair.mean(1, keepdim=True))
    y, n = (8 * q).view(len(sigma), 1, 8, 8, 2).unbind(-1)
    return sigma_data * y, sigma * n


def constants(diffusion, sigma, sigma_data):
    found = diffusion.edm_constants(sigma, sigma_data)
    if not isinstance(found, tuple) or len(found) != 4:
        raise Wrong("edm_constants must return four things: c_skip, c_out, c_in, c_noise")
    return [tensor(value, sigma.shape, name) for name, value in zip(("c_skip", "c_out", "c_in", "c_noise"), found)]


def precondition_probe(diffusion):
    return constants(diffusion, torch.tensor([0.1, 1.0, 8.0]), 0.6)


def precondition(diffusion, relative=False):
    def setup(rng):
        sigma = (3 * normal(rng, 6, 1, 1, 1)).exp().clamp(0.01, 80)
        sigma_data = 0.2 + float(rng.random())
        y, n = data_and_noise(rng, sigma, sigma_data)
        return sigma, sigma_data, y, y + n, constants(diffusion, sigma, sigma_data)

    def unit_input(rng):
        sigma, sigma_data, _, x, (_, _, c_in, _) = setup(rng)
        variance = (c_in * x).square().mean((1, 2, 3))
        if far(variance, torch.ones(6), 1e-3):
            return (f"at sigma = {sigma[0].item():.3g} and sigma_data = {sigma_data:.3g}, F's input c_in x has variance "
                    f"{variance[0]:.3g}, not 1")

    def best_guess(rng):
        _, _, y, x, (c_skip, *_) = setup(rng)
        rest = ((c_skip * x - y) * x).mean((1, 2, 3)) / x.square().mean((1, 2, 3))
        if rest.abs().max() > 1e-3:
            return "c_skip x is not the best multiple of x: what is left, c_skip x - y, still correlates with x"

    def unit_target(rng):
        sigma, _, y, x, (c_skip, c_out, _, _) = setup(rng)
        variance = ((y - c_skip * x) / c_out).square().mean((1, 2, 3))
        if far(variance, torch.ones(6), 1e-3) or not (c_out > 0).all():
            return (f"at sigma = {sigma[0].item():.3g}, what F must predict, (y - c_skip x) / c_out, has variance "
                    f"{variance[0]:.3g}, not 1")

    def told(rng):
        sigma, sigma_data, _, _, (*_, c_noise) = setup(rng)
        if far((4 * c_noise).exp(), sigma / (sigma_data if relative else 1), 1e-4):
            return "F is told the wrong c_noise"

    def single(rng):
        sigma, sigma_data, _, _, found = setup(rng)
        if any(far(one, many[2, 0, 0, 0]) for one, many in zip(constants(diffusion, sigma[2, 0, 0, 0], sigma_data), found)):
            return "a single noise level must give the same as one of many"

    return [("F's input has variance 1", unit_input), ("without F, D is the best multiple of x", best_guess),
            ("F's target has variance 1", unit_target), ("F is told the noise level", told),
            ("one noise level or many", single)]


# ----------------------------------------------------------------------------------------------------
# guidance. interval: the noise levels at which it acts


def halves(calls=None):
    """A denoiser of 2B images: the first half goes to 1, the second to -2."""
    def denoise(x, sigma):
        if calls is not None:
            calls.append((x, sigma))
        side = torch.ones(len(x), *[1] * (x.ndim - 1), dtype=x.dtype)
        side[len(x) // 2:] = -2
        return side + 0.1 * x
    return denoise


def guidance_probe(diffusion):
    x = normal(fixed(), 3, 2)
    return [diffusion.guided(halves(), 1.7)(x, torch.tensor(sigma)) for sigma in (1.0, 10.0)]


def guidance(diffusion, interval=(0.0, math.inf)):
    inside = torch.tensor(1.0).double()

    def evaluations(rng):
        x, calls = normal(rng, 3, 1, 4, 4), []
        tensor(diffusion.guided(halves(calls), 2.0)(x, inside), x.shape, "the guided denoiser")
        given, sigma = calls[0] if len(calls) == 1 else (x, inside)
        if given.shape != (6, 1, 4, 4) or far(given, torch.cat([x, x])) or sigma != inside:
            return "denoise must be called once, with all images and then all images once more, and with sigma"

    def none(rng):
        x = normal(rng, 4, 2)
        D, D_null = (diffusion.guided(halves(), w)(x, inside) for w in (1.0, 0.0))
        if far(D, 1 + 0.1 * x) or far(D_null, 0.1 * x - 2):
            return "w = 1 must give D(z), and w = 0 must give D(null)"

    def line(rng):
        x, w = normal(rng, 4, 2), 2 + 3 * float(rng.random())
        if far(diffusion.guided(halves(), w)(x, inside), 1 + 3 * (w - 1) + 0.1 * x):
            return f"w = {w:.2f} must go on from D(null) to D(z) and beyond, on a straight line"

    def outside(rng):
        x, w = normal(rng, 4, 2), 2 + 3 * float(rng.random())
        for sigma in row([interval[0] * 0.9, interval[0], interval[1] * 1.01, 80.0]):
            if far(diffusion.guided(halves(), w)(x, sigma), 1 + 0.1 * x):
                return f"at sigma = {sigma:.3g}, outside of the interval, D must be D(z)"
        if far(diffusion.guided(halves(), w)(x, row(interval)[1]), 1 + 3 * (w - 1) + 0.1 * x):
            return f"at sigma = {interval[1]:.3g}, the end of the interval, there is guidance"

    properties = [("one evaluation, of 2B images", evaluations), ("w = 1 and w = 0 are D(z) and D(null)", none),
                  ("other w lie on the line through both", line)]
    return [*properties, ("there is no guidance outside of the interval", outside)] if interval[0] else properties


# ----------------------------------------------------------------------------------------------------
# curvature. sign: of the time of the step


def turning(centre, radius, speed):
    """A denoiser whose trajectories are circles in the first two coordinates of images (B, 1, 2, 2)."""
    def denoise(x, t):
        offset = (x - centre).flatten(1)
        turned = torch.stack([-offset[:, 1], offset[:, 0], 0 * offset[:, 0], 0 * offset[:, 0]], 1)
        return x - t * speed * turned.view_as(x)
    return denoise


def on_circle(rng, n):
    """-> points (n, 1, 2, 2) of a circle, its centre and radius"""
    centre, radius, angles = normal(rng, 1, 1, 2, 2), 0.3 + 3 * uniform(rng, 1), 6.3 * uniform(rng, n)
    points = torch.stack([angles.cos(), angles.sin(), 0 * angles, 0 * angles], 1).view(n, 1, 2, 2)
    return centre + radius * points, centre, radius


def curvature_probe(diffusion):
    x, t = normal(fixed(), 5, 2), torch.tensor(1.3).double()
    return [diffusion.curvature(bent, x, t, 0.2)]


def curvature(diffusion, sign=-1):
    two = torch.tensor(2.0).double()

    def circles(rng):
        x, centre, radius = on_circle(rng, 6)
        found = tensor(diffusion.curvature(turning(centre, radius, 1), x, two), (6,), "curvature")
        if far(found * radius, torch.ones(6), 5e-3):
            return f"on a circle of radius {radius[0]:.3g} the curvature is {found[0]:.3g}, not {1 / radius[0]:.3g}"

    def speeds(rng):
        x, centre, radius = on_circle(rng, 6)
        for speed, dt in ((5, 1e-4), (0.2, 1e-3), (-1, 1e-3)):
            if far(diffusion.curvature(turning(centre, radius, speed), x, two, dt) * radius, torch.ones(6), 5e-3):
                return f"a point that turns {speed} times as fast must have the same curvature"

    def straight(rng):
        found = diffusion.curvature(of_gaussian(0.5), normal(rng, 6, 1, 3, 3), torch.tensor(0.7).double())
        if not found.abs().max() < 1e-6:
            return "of a single Gaussian, trajectories are straight: the curvature is 0"
        if not diffusion.curvature(bent, normal(rng, 6, 2), two).min() > 1e-6:
            return "a trajectory that bends must have a curvature"

    def step(rng):
        calls, places, x = [], [], normal(rng, 3, 4)

        def steady(x, t):  # dx/dt = 3
            calls.append(float(t))
            places.append(x)
            return x - 3 * t

        diffusion.curvature(steady, x, two, 0.25)
        if far(row(sorted(calls)), row(sorted([2, 2 + sign * 0.25])), 1e-9):
            return f"D must be evaluated at t and t {'+-'[sign < 0]} dt, not at {calls}"
        if far(places[calls.index(max(calls))] - places[calls.index(min(calls))], torch.full((3, 4), 0.75)):
            return f"the second point must be where Euler's step from t to t {'+-'[sign < 0]} dt leads"

    return [("on a circle it is 1 / radius", circles), ("the speed makes no difference", speeds),
            ("a straight line has none", straight), ("two evaluations, one step apart", step)]
