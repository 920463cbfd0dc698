"""
The continuous process: how noise is added and removed again.

`PROCESSES` is the table of processes that training knows: EDM (Karras et al. 2022), PFGM++ (Xu et al. 2023b) and
flow matching (Lipman et al. 2023), of which each makes a denoiser. All else here calls only `denoise(x, sigma)`,
and knows nothing of networks or images: loss, guidance, samplers and trajectories are the same for all processes,
and the toy and the image model share them. x is float64 of any shape (B, ...), with noise of scale sigma, a float64
scalar tensor. denoise returns D, the expected clean data, and (x - D) / sigma is the ODE's dx/dsigma.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from configurator import require

# ----------------------------------------------------------------------------------------------------
# processes: x = y + sigma noise, and what a network F learns of it


class Process(NamedTuple):
    """A row of the table.

    kernel(noise, shape, D): noise of scale 1 for images of this shape, (B, *shape), which `noise` draws, one of
    noise.py's classes. levels(normal, P_mean, P_std): a noise level sigma from each draw of N(0, 1). weight(sigma,
    sigma_data): of (D - y)^2 in the loss. constants(sigma, sigma_data): c_skip, c_out, c_in and c_noise in
    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM Eq. 7).
    """

    kernel: Callable
    levels: Callable
    weight: Callable
    constants: Callable


def gaussian(noise, shape, D):
    """N(0, 1)"""
    return noise.randn(*shape)


def student(noise, shape, D):
    """n sqrt(D / chi^2), Student's t with D degrees of freedom: PFGM++'s kernel, (|x - y|^2 + D sigma^2)^(-(N + D) / 2)

    n is N(0, 1) in the N dimensions of an image, chi^2 the squared length of such a vector m in D additional ones. Of a
    single charge at y, where these are 0, the field line in the direction (n, m) reaches the height r = sigma sqrt(D)
    at x = y + n r / |m| (Xu et al. 2023b). As D grows, chi^2 / D goes to 1. D > 0, or inf, which is EDM.
    """
    n = noise.randn(*shape)
    if D == math.inf:
        return n
    stretch = (D / noise.chi_square(D)).sqrt().to(n.dtype).to(n.device)  # one number for each image
    return n * stretch.view(-1, *(1 for _ in shape))


def log_normal(normal, P_mean, P_std):
    """ln(sigma) ~ N(P_mean, P_std^2) (EDM Table 1)"""
    return (P_mean + P_std * normal).exp()


def uniform_time(normal, P_mean, P_std):
    """sigma = (1 - t) / t with t uniform in 0 ... 1, but for 3e-5 at both ends, where float32 gets coarse"""
    normal = normal.clamp(-4, 4)
    return torch.special.ndtr(normal) / torch.special.ndtr(-normal)


def loss_weight(sigma, sigma_data):
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM Table 1)."""
    return (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2


def velocity_weight(sigma, sigma_data):
    """1 / c_out^2, with which the loss is |v - (y - n)|^2."""
    return ((1 + sigma) / sigma) ** 2


def edm_constants(sigma, sigma_data):
    """EDM, Table 1: input and target of F have unit variance."""
    variance = sigma ** 2 + sigma_data ** 2
    return sigma_data ** 2 / variance, sigma * sigma_data / variance.sqrt(), 1 / variance.sqrt(), sigma.log() / 4


def flow_constants(sigma, sigma_data):
    """F is flow matching's velocity v(x_t, t), from noise n at t = 0 to data y at t = 1 (later papers turn t round).

    With t = 1 / (1 + sigma), F reads x_t = t y + (1 - t) n = t x, and D = x_t + (1 - t) v. sigma_data has no part.
    """
    t = 1 / (1 + sigma)
    return t, sigma * t, t, t


PROCESSES = {
    "edm": Process(gaussian, log_normal, loss_weight, edm_constants),
    "pfgm++": Process(student, log_normal, loss_weight, edm_constants),
    "flow": Process(gaussian, uniform_time, velocity_weight, flow_constants)}


@functools.cache
def peak(sigma_data):
    """Where EDM's w(s), below, has its peak: ln s = -1.2 + 2 1.2^2 s^2 / (s^2 + sigma_data^2). -> a float"""
    s = math.exp(-1.2 + 2 * 1.2 ** 2)
    for _ in range(100):
        s = math.exp(-1.2 + 2 * 1.2 ** 2 * s ** 2 / (s ** 2 + sigma_data ** 2))
    return s


def monotonic_weight(sigma, P_mean, P_std, shift=1.0, sigma_data=0.5):
    """VDM++'s "EDM-monotonic" weight of (D - y)^2, for sigma = shift exp(P_mean + P_std n) (Kingma & Gao 2023).

    The objective is a weight w of the noise's squared error, |D - y|^2 / sigma^2. The distribution p of noise levels
    only changes the variance, since the loss is divided by it. EDM's w is N(ln sigma; -1.2, 1.2^2) (sigma^2 +
    sigma_data^2); "monotonic" keeps it at its peak for all sigma above. With EDM's P_mean and P_std, -1.2 and 1.2, the
    weight is EDM's below the peak.

    shift: the factor from noise levels of images of 64 pixels to those of others (simple diffusion, Eq. 5: 2 for 128).
    Here it shifts both w and p, which the papers leave open. Below the peak, the weight is EDM's for shift sigma_data.
    """
    s = sigma / shift
    low = s.clamp(max=peak(sigma_data))
    log_w = -((low.log() + 1.2) / 1.2) ** 2 / 2 - math.log(1.2)
    log_p = -((s.log() - P_mean) / P_std) ** 2 / 2 - math.log(P_std)
    return (log_w - log_p).exp() * (low ** 2 + sigma_data ** 2) / (sigma_data * sigma) ** 2


def noise_schedule(process, weighting, P_mean, P_std, shift, pfgm_D, sigma_data):
    """How stage 1 draws noise levels and weights them, from its settings. -> levels(normal), weight(sigma)

    weighting: "edm" is the process's own weight, "edm-monotonic" VDM++'s. Raises UserError for settings that don't fit
    each other.
    """
    require(process in PROCESSES, f"--process is one of {', '.join(PROCESSES)}, not {process}")
    require(pfgm_D >= 0.5, f"pfgm_D counts the additional dimensions of PFGM++: it is 0.5 or more, or inf, not "
            f"{pfgm_D} (below 0.5, noise is too large for float32)")
    require(weighting in ("edm", "edm-monotonic"), f"--weighting is edm or edm-monotonic, not {weighting}")
    require(weighting == "edm" or process != "flow", "--weighting=edm-monotonic is for EDM's noise levels: choose "
            "another --process than flow")
    require(weighting == "edm" or P_std > 0, "--weighting=edm-monotonic divides by the density of the noise levels: it "
            "needs a P_std above 0")
    row = PROCESSES[process]

    def weight(sigma):
        if weighting == "edm-monotonic":
            return monotonic_weight(sigma, P_mean, P_std, shift, sigma_data)
        return row.weight(sigma, sigma_data)

    return lambda normal: shift * row.levels(normal, P_mean, P_std), weight


# ----------------------------------------------------------------------------------------------------
# loss and guidance


def loss_at(denoise, y, n, sigma, sigma_data):
    """lambda(sigma) (D(y + sigma n) - y)^2 of each image, a mean over its pixels (Eq. 3). -> (B,)

    y: clean images (B, ...); n: noise of scale 1, shaped like y; sigma: a scalar tensor.
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
    """-> denoise(x, sigma): `inside` at noise levels of the interval (low, high), ends included, `outside` at others

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
    noise: of scale 1, of any shape: N(0, 1), or PFGM++'s. num_steps: N >= 1; 2 N - 1 evaluations.
    S_churn, S_min, S_max, S_noise: amount of churn, its range of sigma, and the scale of its noise,
    which randn_like(x) draws: N(0, 1), for Gaussian kernels alone. steps: a list, gets (t, x) at the start of each
    step and at t = 0.
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


def corrected(denoise, correct, noise, below, correct_steps, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7,
              randn_like=torch.randn_like):
    """DisCo-Diff's correction: Heun's method down to the noise level `below`, DDPM's from there (sec. 4.1, App. G.3).

    correct: the denoiser at noise levels from `below` down, on correct_steps of them. A step from t to s draws from
    N(D + (s^2 / t^2) (x - D), s^2 (1 - s^2 / t^2)), which is the distribution of x at s given x at t and the clean
    data D (Ho et al. 2020, Eq. 6, in EDM's terms), where the kernel is Gaussian. All else is as in `heun`.
    Two evaluations for each of the num_steps above `below`, and correct_steps. The paper has 414 in all, and leaves
    open DDPM's noise levels and its variance, of which there is a larger choice, too.
    """
    below = min(below, sigma_max)
    t = noise_levels(num_steps, sigma_min, sigma_max, rho)
    t = torch.cat([t[t > below], t.new_tensor([below])]).to(noise.device)
    x = noise.double() * t[0]
    for t_i, t_next in zip(t, t[1:]):
        x = heun_step(denoise, x, t_i, t_next)
    s = torch.cat([noise_levels(correct_steps, sigma_min, below, rho), torch.zeros(1)]).to(noise.device)
    for s_i, s_next in zip(s, s[1:]):
        D, kept = correct(x, s_i), (s_next / s_i) ** 2
        x = D + kept * (x - D) + s_next * (1 - kept).sqrt() * randn_like(x)
    return x


def flow(denoise, noise, t, second_order=True, steps=None):
    """Flow matching's ODE, dx_t/dt = v = (D - x_t) / (1 - t), by Heun's or Euler's method. -> the sample, float64

    t: increasing times (N + 1,), float64, above 0, the last one 1; `flow_constants` has their relation to sigma.
    noise: of scale 1. Euler's steps are the same as in EDM's terms, Heun's are not. The last one is Euler's, since D
    does not determine v at t = 1. steps: a list, gets x_t at the start of each step.
    2 N - 1 evaluations, or N.
    """
    def velocity(x_t, t):
        return (denoise(x_t / t, (1 - t) / t) - x_t) / (1 - t)

    t = t.to(noise.device)
    x = (1 - t[0]) * noise.double()
    for t_i, t_next in zip(t, t[1:]):
        if steps is not None:
            steps.append(x)
        v = velocity(x, t_i)
        x_next = x + (t_next - t_i) * v
        if second_order and t_next < 1:
            x_next = x + (t_next - t_i) * (v + velocity(x_next, t_next)) / 2
        x = x_next
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
