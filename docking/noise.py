"""
Diffusion of a ligand's pose: translations in space, rotations in SO(3), torsions on circles (DiffDock,
Corso et al. 2023; DisCo-Diff App. E).

  sigma_at                             noise levels at time t
  so3_density, so3_score, so3_norm     rotations: the isotropic Gaussian on SO(3)
  torus_score, torus_norm              torsions: the wrapped normal
  move, align                          a pose, changed by a translation, a rotation and torsions
  reverse_step                         one step of the reverse SDE, also at low temperature

The rotation noise has the convention of DiffDock's main branch: eps is the standard deviation, per axis,
of a small rotation vector. (Earlier programs, also DisCo-Diff's, have sqrt(2) eps there, which does not
fit the sampler's g^2 = d sigma^2 / dt.)
"""

import math

import torch

# (least, greatest) noise level of each kind; a pose's three numbers are always in this order
TRANSLATION = (0.1, 19.0)  # Angstrom
ROTATION = (0.03, 1.55)
TORSION = (0.03, 3.14)
LEVELS = torch.tensor([TRANSLATION, ROTATION, TORSION], dtype=torch.float64)


def sigma_at(t):
    """Noise levels at times t in [0, 1], any shape -> (..., 3): of translation, rotation, torsion"""
    low, high = LEVELS.to(t.device, t.dtype).unbind(1)
    return low ** (1 - t[..., None]) * high ** t[..., None]


# ----------------------------------------------------------------------------------------------------
# rotations: the isotropic Gaussian on SO(3)


def _images(omega, eps):
    """-> omega + 2 pi n, and (-1)^n exp(-(omega + 2 pi n)^2 / 2 eps^2), for n = -3 ... 3 in a last axis

    The exponents are relative to the largest, n = 0, so that nothing underflows.
    """
    n = torch.arange(-3, 4, device=omega.device, dtype=omega.dtype)
    x = omega[..., None] + 2 * math.pi * n
    return x, (1 - 2 * (n % 2)) * torch.exp((omega[..., None] ** 2 - x ** 2) / (2 * eps[..., None] ** 2))


def so3_density(omega, eps):
    """Density, with respect to the uniform one, of rotations by the angle omega in (0, pi].

    eps: noise level up to 3, of omega's shape. It is the sum over l of (2l + 1) exp(-l (l + 1) eps^2 / 2)
    sin((l + 1/2) omega) / sin(omega / 2), turned by Poisson's formula into one that needs few terms and
    stays exact where the density is tiny.
    """
    x, weight = _images(omega, eps)
    scale = math.sqrt(2 * math.pi) * torch.exp((eps ** 2 / 4 - (omega / eps) ** 2) / 2) / eps ** 3
    return scale * (x * weight).sum(-1) / torch.sin(omega / 2)


def so3_score(omega, eps):
    """d ln density / d omega, for omega in (0, pi]. The score of a rotation vector is along its axis."""
    x, weight = _images(omega, eps)
    slope = (weight * (1 - (x / eps[..., None]) ** 2)).sum(-1) / (x * weight).sum(-1)
    return slope - 0.5 / torch.tan(omega / 2)


def _angles(eps, count=1000):
    """-> count angles (..., count) that cover those of noise eps (...), probability of each (..., count)"""
    eps = eps.double()[..., None]
    middles = (torch.arange(count, device=eps.device, dtype=torch.float64) + 0.5) / count
    omega = middles * (8 * eps).clamp_max(math.pi)
    p = so3_density(omega, eps.expand_as(omega)) * (1 - omega.cos())  # of the angle
    return omega, p / p.sum(-1, keepdim=True)


def so3_norm(eps):
    """Root mean square of a component of the score at noise eps (...): sqrt(E |score|^2 / 3)."""
    omega, p = _angles(eps, 200)
    return ((p * so3_score(omega, eps.double()[..., None].expand_as(omega)) ** 2).sum(-1) / 3).sqrt().to(eps)


def so3_angle(u, eps):
    """The angle that a share u of all rotations at noise eps falls below. u, eps: (...), u in (0, 1)"""
    omega, p = _angles(eps)
    cdf, width = p.cumsum(-1), 2 * omega[..., :1]
    i = torch.searchsorted(cdf, u.double()[..., None].contiguous()).clamp_max(p.shape[-1] - 1)
    cdf, p = cdf.gather(-1, i), p.gather(-1, i)
    return (width * (i + 1 - (cdf - u.double()[..., None]) / p))[..., 0].to(eps)  # linear between two angles


def so3_draw(normal, u, eps):
    """Rotation vectors (B, 3) of noise eps (B,), from normal draws (B, 3), the axes, and uniform u (B,)."""
    return normal / normal.norm(dim=-1, keepdim=True) * so3_angle(u, eps)[:, None]


def so3_score_vector(vector, eps):
    """Score (B, 3) of rotation vectors (B, 3) at noise eps (B,)."""
    omega = vector.norm(dim=-1).clamp_min(1e-8)
    return vector / omega[:, None] * so3_score(omega.double(), eps.double()).to(vector)[:, None]


# ----------------------------------------------------------------------------------------------------
# torsions: the wrapped normal


def torus_score(x, sigma):
    """d ln p / dx of the wrapped normal, p(x) = sum over n of N(x + 2 pi n; 0, sigma^2). Shapes are equal."""
    wrapped = torch.remainder(x + math.pi, 2 * math.pi) - math.pi
    images = wrapped[..., None] + 2 * math.pi * torch.arange(-5, 6, device=x.device, dtype=x.dtype)
    weight = torch.softmax(-images ** 2 / (2 * sigma[..., None] ** 2), -1)
    return -(weight * images).sum(-1) / sigma ** 2


def torus_norm(sigma):
    """Root mean square of the score at noise sigma (...)."""
    sigma = sigma.double()[..., None]
    x = (torch.arange(200, device=sigma.device, dtype=torch.float64) + 0.5) / 200 * (10 * sigma).clamp_max(math.pi)
    images = x[..., None] + 2 * math.pi * torch.arange(-5, 6, device=x.device, dtype=x.dtype)
    p = torch.exp(-images ** 2 / (2 * sigma[..., None] ** 2)).sum(-1)
    return ((p * torus_score(x, sigma.expand_as(x)) ** 2).sum(-1) / p.sum(-1)).sqrt()


# ----------------------------------------------------------------------------------------------------
# poses


def rotation_matrix(vector):
    """Rotation vectors, axis times angle, (..., 3) -> matrices (..., 3, 3)"""
    x, y, z = vector.unbind(-1)
    o = torch.zeros_like(x)
    return torch.linalg.matrix_exp(torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3)))


def align(pos, target):
    """Moves poses (B, L, 3) rigidly onto others, with the least RMSD (Kabsch's algorithm)."""
    a, b = pos.mean(1, keepdim=True), target.mean(1, keepdim=True)
    U, _, V = torch.linalg.svd((pos - a).mT @ (target - b))
    U = torch.cat([U[..., :2], U[..., 2:] * torch.linalg.det(U @ V)[:, None, None]], -1)  # no reflection
    return (pos - a) @ U @ V + b


def turn(pos, angles, bonds, turns):
    """Turns bonds of poses (B, L, 3), one after another, by angles (B, T).

    bonds: (T, 2), atoms u and v; turns: bool (T, L), the atoms on v's side, which move. The axis points
    from v to u.
    """
    for (u, v), moving, angle in zip(bonds.tolist(), turns, angles.T):
        axis = pos[:, u] - pos[:, v]
        R = rotation_matrix(axis / axis.norm(dim=-1, keepdim=True) * angle[:, None])
        origin = pos[:, v, None]
        pos = torch.where(moving[:, None], (pos - origin) @ R.mT + origin, pos)
    return pos


def move(pos, translation, rotation, torsions, bonds, turns):
    """Changes poses (B, L, 3): DiffDock sec. 3.3.

    translation, rotation: (B, 3), the rotation vector about the mean of the atoms; torsions: (B, T);
    bonds, turns: as in `turn`. Torsions neither move nor rotate the ligand as a whole: after the turns it
    is aligned to where it was.
    """
    centre = pos.mean(1, keepdim=True)
    rigid = (pos - centre) @ rotation_matrix(rotation).mT + centre + translation[:, None]
    return align(turn(rigid, torsions, bonds, turns), rigid) if len(bonds) else rigid


# ----------------------------------------------------------------------------------------------------
# the reverse SDE


def reverse_step(kind, score, z, sigma, dt, tau=1.0, psi=0.0, sigma_data=0.5):
    """One Euler-Maruyama step of length dt back in time. -> the change, of the score's shape

    kind: TRANSLATION, ROTATION or TORSION; sigma: its noise level; z: N(0, 1) draws, or 0.
    tau, psi, sigma_data: low-temperature sampling (Ketata et al. 2023), which narrows the distribution by
    tau; 1 is none. A step stays stable while 2 ln(max / min) dt times the drift's factor is below 2.
    """
    low, high = kind
    variance = 2 * math.log(high / low) * sigma ** 2 * dt  # g^2 dt = d sigma^2
    if tau == 1:
        return variance * score + variance ** 0.5 * z
    data = high ** sigma_data * low ** (1 - sigma_data)
    drift = (data + sigma) / (data + sigma / tau) + tau * psi / 2
    return variance * drift * score + (variance * (1 + psi)) ** 0.5 * z
