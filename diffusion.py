"""
The continuous process: noise levels, loss, guidance, samplers, trajectories (EDM: Karras et al. 2022).

Everything here calls only `denoise(x, sigma)`, and knows nothing of networks or images: the toy and the
image model share the samplers. x is float64 of any shape (B, ...), with noise of standard deviation
sigma, a float64 scalar tensor. denoise returns D, the expected clean data, and (x - D) / sigma is the
ODE's dx/dsigma.
"""

import math

import torch
from torch.nn.functional import normalize

from configurator import require


def loss_weight(sigma, sigma_data):
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM Table 1)."""
    return (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2


def loss_at(denoise, y, n, sigma, sigma_data):
    """lambda(sigma) (D(y + sigma n) - y)^2 of each image, a mean over its pixels (Eq. 3). -> (B,)

    y: clean images (B, ...); n: N(0, 1), shaped like y; sigma: a scalar tensor.
    """
    return loss_weight(sigma, sigma_data) * (denoise(y + sigma * n, sigma) - y).square().flatten(1).mean(1)


def guided(denoise, w):
    """Guidance by the latents, D~ = w D(x; z) + (1 - w) D(x; null) (App. B). -> denoise(x, sigma)

    denoise: takes 2B images, first with codes z, then with null latents. w = 1 is no guidance. (App. B
    also calls w and cfg interchangeable; by its formula, Table 3's cfg is w - 1.)
    """
    def denoise_guided(x, sigma):
        D, D_null = denoise(torch.cat([x, x]), sigma).chunk(2)
        return w * D + (1 - w) * D_null

    return denoise_guided


def within(interval, inside, outside):
    """-> denoise(x, sigma): `inside` at noise levels of the interval (low, high), ends included, `outside` elsewhere

    Guidance helps at medium noise levels, and harms at others (Kynkaanniemi et al. 2024).
    """
    low, high = interval
    return lambda x, sigma: (inside if low <= sigma <= high else outside)(x, sigma)


# ----------------------------------------------------------------------------------------------------
# samplers


def noise_levels(num_steps, sigma_min, sigma_max, rho, dtype=torch.float64):
    """EDM Eq. 5: from sigma_max down to sigma_min. -> (num_steps,) of this precision"""
    i = torch.arange(num_steps, dtype=dtype) / max(num_steps - 1, 1)
    root = sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    return root.double().pow(rho).to(dtype)  # rounded once, so that float32 levels are the same on every machine


def heun_step(denoise, x, t, t_next, gamma=0, S_noise=1, randn_like=torch.randn_like):
    """From noise level t to t_next, by way of t (1 + gamma) (EDM Alg. 2, lines 4-11). -> x at t_next"""
    t_hat = t + gamma * t
    if gamma > 0:
        x = x + (t_hat ** 2 - t ** 2).sqrt() * S_noise * randn_like(x)
    d = (x - denoise(x, t_hat.double())) / t_hat  # dx/dt (EDM Eq. 3); DisCo-Diff Alg. 3, line 9
    x_next = x + (t_next - t_hat) * d  # Euler; line 10
    if t_next > 0:  # second-order correction; lines 11-13
        d_next = (x_next - denoise(x_next, t_next.double())) / t_next
        x_next = x + (t_next - t_hat) * (d + d_next) / 2
    return x_next


def heun(denoise, noise, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7,
         S_churn=0, S_min=0, S_max=math.inf, S_noise=1, randn_like=torch.randn_like, steps=None):
    """EDM's sampler with stochastic churn (EDM, Alg. 2); S_churn = 0 is Heun's method (Alg. 1).

    denoise(x, sigma): D; x is float64 and shaped like noise, sigma a float64 scalar tensor.
    noise: N(0, 1), of any shape. num_steps: N >= 1; 2 N - 1 evaluations.
    S_churn, S_min, S_max, S_noise: amount of churn, its range of sigma, and the scale of its noise,
    which randn_like(x) draws. steps: a list, gets (t, x) at the start of each step and at t = 0.
    -> the sample, float64, shaped like noise
    """
    t = torch.cat([noise_levels(num_steps, sigma_min, sigma_max, rho), torch.zeros(1)]).to(noise.device)  # t_N = 0
    x = noise.double() * t[0]  # x ~ N(0, t_0^2); DisCo-Diff Alg. 3, line 7
    gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
    for i in range(num_steps):
        if steps is not None:
            steps.append((t[i], x))
        x = heun_step(denoise, x, t[i], t[i + 1], gamma if S_min <= t[i] <= S_max else 0, S_noise, randn_like)
    if steps is not None:
        steps.append((t[-1], x))
    return x


def restart_loops(num_steps, restarts, sigma_min=0.002, sigma_max=80, rho=7):
    """Where `restart` goes back up: at noise level i, for each s in list i, from s[-1] to s[0].

    -> num_steps + 1 lists of noise levels s, to come down again. Raises UserError for restarts that
    don't fit the levels.
    """
    t = noise_levels(num_steps, sigma_min, sigma_max, rho)
    loops = [[] for _ in range(num_steps + 1)]
    for interval in restarts:
        require(isinstance(interval, (tuple, list)) and [*map(type, interval[:2])] == [int, int] and len(interval) == 4
                and all(isinstance(v, (int, float)) for v in interval),
                f"restarts takes (N_restart, K, t_min, t_max), ..., the first two whole numbers; not {interval}")
        n, K, t_min, t_max = interval
        require(n >= 2 and K >= 1 and sigma_min <= t_min < t_max <= sigma_max and num_steps > 1,
                f"restarts has {interval}: N_restart and num_steps are 2 or more, K is 1 or more, and "
                f"sigma_min {sigma_min} <= t_min < t_max <= sigma_max {sigma_max}")
        i = int((t[1:] - t_min).abs().argmin()) + 1
        require(t[i] < t_max,
                f"restarts has {interval}: {t[i]:.3g} is the noise level nearest to t_min, and not below t_max")
        # in float32, as in the authors' program, so that the results are the same to 1e-9
        loops[i] += [noise_levels(n, t[i].item(), t_max, rho, torch.float32)] * K
    return loops


def restart(denoise, noise, num_steps, restarts, sigma_min=0.002, sigma_max=80, rho=7,
            gamma=0, S_min=0, S_max=math.inf, S_noise=1, randn_like=torch.randn_like):
    """Restart sampling (Xu et al. 2023a, Alg. 1; DisCo-Diff App. D.2): Heun's method that goes back up.

    restarts: (N_restart, K, t_min, t_max), ...: at the noise level nearest to t_min, K times, noise
    takes x up to t_max, and Heun's method takes it down again on N_restart noise levels.
    gamma: churn of these steps, for levels in [S_min, S_max]; the main steps have none.
    S_noise: scale of the noise, in churn and on the way up. All else is as in `heun`.
    2 N - 1 + sum of 2 K (N_restart - 1) evaluations. Raises UserError as `restart_loops` does.
    """
    t = torch.cat([noise_levels(num_steps, sigma_min, sigma_max, rho), torch.zeros(1)]).to(noise.device)
    x = noise.double() * t[0]
    for i, loops in enumerate(restart_loops(num_steps, restarts, sigma_min, sigma_max, rho)[1:]):
        x = heun_step(denoise, x, t[i], t[i + 1])
        for s in loops:
            s = s.to(x.device)
            x = x + S_noise * randn_like(x) * (s[0] ** 2 - s[-1] ** 2).sqrt()  # up
            for s_i, s_next in zip(s, s[1:]):
                x = heun_step(denoise, x, s_i, s_next, gamma if S_min <= s_i <= S_max else 0, S_noise, randn_like)
    return x


# ----------------------------------------------------------------------------------------------------
# trajectories (DisCo-Diff App. F.3)


def curvature(denoise, x, t, dt=1e-3):
    """Curvature of the ODE's trajectories through x (B, ...) at noise level t. -> (B,)

    With T the unit tangent, it is |T(t) - T(t - dt)| / |x(t) - x(t - dt)|, and one Euler step leads
    from t to t - dt, which must be positive. On a circle it is 1 / radius.
    """
    drift = (x - denoise(x, t)) / t  # dx/dt
    x_next = x - drift * dt
    drift_next = (x_next - denoise(x_next, t - dt)) / (t - dt)
    drift, drift_next = drift.flatten(1), drift_next.flatten(1)
    return (normalize(drift) - normalize(drift_next)).norm(dim=1) / (drift * dt).norm(dim=1)
