"""
What the toy shows: pictures and tables of what toy2d.py and toy_grids.py have measured.

A picture is a Pillow image, a film is a list of images, and a table is a list of lines.
"""

import math

import numpy as np
import torch

from plot import COLOURS, Axes, figure
from toy_grids import KINDS, grid

DARK, PALE = (40, 40, 40), (120, 170, 215)
KIND_COLOURS = dict(zip(KINDS, ((0, 0, 0), COLOURS[0], COLOURS[2], COLOURS[5], COLOURS[4])))


def square(title, extent, centre=(0, 0)):
    """Axes for the plane within `extent` of this centre."""
    return Axes(*((c - extent, c + extent) for c in centre), title, size=(300, 300))


# ----------------------------------------------------------------------------------------------------
# part 1: pictures


def draw_eight(points, codes, centre, paths):
    """The data, and each model's samples with trajectories; below, one mode from near.

    points: data (N, 2); codes: of DisCo-Diff's samples (B,); centre: of that mode (2,);
    paths: {model: (steps + 1, B, 2)}
    """
    rows = []
    for middle, extent, lines in ((torch.zeros(2), 4.5, 12), (centre, 0.8, 24)):
        row = []
        for name, x in ({"data": points} | {name: path[-1] for name, path in paths.items()}).items():
            axes = square(name, extent, middle.tolist())
            axes.scatter(x[:2000], COLOURS[codes[:2000]] if name == "DisCo-Diff" else PALE, 2.5 / extent ** 0.5)
            if name in paths:
                inside = ((x - middle).norm(dim=1) < extent).nonzero()[:, 0]
                for i in inside[:lines]:
                    axes.line(paths[name][:, i], DARK, 0.7, dots=True)
            row.append(axes)
        rows.append(row)
    return figure(rows)


def draw_curves(t, curves):
    """Curvature and Jacobian norms along the trajectories, as in DisCo-Diff's Fig. 4.

    t: (steps + 1,); curves: {model: curvature, |grad score|^2 and |grad D|^2, each (steps, B)}
    """
    limits = {"curvature": (1e-5, 1e5), "|grad score|^2": (1e-7, 1e7), "|grad D|^2": (1e-7, 1e7)}
    panels = [Axes((0.01, 80), ylim, title, "t", "mean; thin: median", log_x=True, log_y=True, size=(420, 340))
              for title, ylim in limits.items()]
    for name, colour in zip(curves, (COLOURS[7], COLOURS[0], COLOURS[4])):
        for axes, values in zip(panels, curves[name]):
            axes.line(torch.stack([t[:-1], values.mean(1)], 1), colour, 2.5, label=name)
            axes.line(torch.stack([t[:-1], values.median(1).values], 1), colour, 0.8)
    return figure([panels])


def draw_sampling(t, paths, centres):
    """A film from noise to data, a frame for each noise level.

    t, paths: as above; a point's colour tells which of the centres (K, 2) it ends nearest to.
    """
    frames, shown = [], {name: paths[name][:, :1000] for name in ("plain", "DisCo-Diff")}
    colours = {name: COLOURS[torch.cdist(path[-1], centres).argmin(1)] for name, path in shown.items()}
    for i in range(len(t)):
        row = []
        for name, path in shown.items():
            axes = square(f"{name}, t = {t[i]:.3g}", 4.5 + 2.5 * t[i].item())
            axes.scatter(path[i], colours[name])
            row.append(axes)
        frames.append(figure([row]).quantize(64, dither=0))
    return frames


# ----------------------------------------------------------------------------------------------------
# part 1: tables


def mean_and_error(values):
    """'mean +- standard error', as far as there are values, in 18 letters."""
    if not values:
        return f"{'-':>9}{'':9}"
    error = f" +- {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):9.3f}{error:9}"


def ratio(values, floor):
    """The ratio of the means, as far as there are values, in 18 letters."""
    return f"{np.mean(values) / np.mean(floor):9.2f}{'':9}" if values and floor else " " * 18


def eight_table(results):
    """One seed's models, from the results of `eight_gaussians`."""
    models = results["models"]
    floor, _, plain, disco = models.values()
    widths = {"mean curvature": 17, "median curvature": 18, "|grad score|^2": 16, "|grad D|^2": 13, "stray": 10}
    low, high = results["bends"]
    lines = [f"Eight Gaussians, seed {results['seed']}: {results['codes used']} codes, purity {results['purity']:.4f}. "
             f"Trajectories bend, and are measured, for {low:.2f} <= t <= {high:.2f}",
             " " * 24 + "".join(f"{key:>{width}}" for key, width in widths.items())]
    for name, model in models.items():
        cells = [f"{model[key]:{width}.4f}" if key in model else " " * width for key, width in widths.items()]
        lines.append(f"{name:24}" + "".join(cells))
    cells = [f"{plain[key] / disco[key]:{width}.1f}" for key, width in widths.items() if key != "stray"]
    lines.append(f"{'plain / DisCo-Diff':24}" + "".join(cells))
    for key in ("W-2", "W-2, even"):
        lines.append(f"{key + ', n =':24}" + "".join(f"{n:>9}{'':9}" for n in floor[key]))
        for name, model in models.items():
            lines.append(f"{name:24}" + "".join(mean_and_error(values) for values in model[key].values()))
    for name, model in (("plain / floor", plain), ("DisCo-Diff / floor", disco)):
        lines.append(f"{name:24}" + "".join(map(ratio, model["W-2, even"].values(), floor["W-2, even"].values())))
    return lines


def seeds_table(results):
    """One line for each seed, from a list of their results."""
    sizes = [*results[0]["models"]["plain"]["W-2, even"]]
    n = sizes[len(sizes) // 2]
    lines = [f"{'':18}plain / DisCo-Diff: curvature{'':20}W-2, even, n = {n}",
             f"seed  purity{'mean':>15}{'median':>9}{'|grad D|^2':>12}"
             f"{'floor':>12}{'exact':>8}{'plain':>8}{'DisCo-Diff':>12}"]
    for r in results:
        plain, disco = r["models"]["plain"], r["models"]["DisCo-Diff"]
        mean, median, grad = (plain[key] / disco[key] for key in ("mean curvature", "median curvature", "|grad D|^2"))
        w2 = [np.mean(model["W-2, even"][n] or math.nan) for model in r["models"].values()]
        lines.append(f"{r['seed']:4}{r['purity']:8.4f}{mean:15.0f}{median:9.0f}{grad:12.0f}"
                     "{:12.3f}{:8.3f}{:8.3f}{:12.3f}".format(*w2))
    return lines


# ----------------------------------------------------------------------------------------------------
# part 2


def draw_measures(results):
    """KL and stray samples against the modes K, for results of `gaussian_grid` with one std."""
    modes = sorted({row["K"] for row in results})
    panels = []
    titles = {"KL": "KL, Silverman's bandwidth", "smoothed KL": "KL, both smoothed by std", "stray": "stray samples"}
    for key, title in titles.items():
        xlim, ylim = (modes[0] * 0.8, modes[-1] * 1.25), (0, 1.5 * max(row[key] for row in results))
        axes = Axes(xlim, ylim, title, "modes K", log_x=True, size=(420, 340))
        for kind, colour in KIND_COLOURS.items():
            means = [np.mean([row[key] for row in results if (row["kind"], row["K"]) == (kind, K)]) for K in modes]
            axes.line(np.stack([modes, means], 1), colour, 2.5, dots=True, label=kind)
        panels.append(axes)
    return figure([panels])


def draw_samples(samples):
    """Samples of each kind, a row for each number of modes. samples: {K: {kind: (N, 2)}}"""
    rows = []
    for K, by_kind in samples.items():
        row = []
        for kind, x in by_kind.items():
            axes = square(f"{kind}, K = {K}", math.isqrt(K) / 2 + 0.5)
            axes.scatter(x[:5000], COLOURS[4], 0.6)
            row.append(axes)
        rows.append(row)
    return figure(rows)


def draw_fields(K, denoisers, t=0.3):
    """Where points at noise level t are expected to come from: arrows along D - x, shortened.

    denoisers: {kind: a function D(x, t)}
    """
    t = torch.tensor(t, dtype=torch.float64)
    extent = math.isqrt(K) / 2 + 0.5
    side = torch.linspace(-extent, extent, 17, dtype=torch.float64)[1:-1]
    x = torch.cartesian_prod(side, side)
    row = []
    for kind, denoise in denoisers.items():
        axes = square(f"{kind}: D - x at t = {t:g}", extent)
        axes.scatter(grid(K), COLOURS[0], 3)
        towards = denoise(x, t) - x
        axes.arrows(x, 0.4 * towards / (1 + towards.norm(dim=1, keepdim=True)), COLOURS[4])
        row.append(axes)
    return figure([row])


def grid_table(results, steps):
    """Means over seeds, from all results of `gaussian_grid`, after this many training steps."""
    widths = {"KL": 8, "smoothed KL": 13, "stray": 8, "purity": 8, "codes used": 12}
    seeds = len({row["seed"] for row in results})
    lines = [f"Grids, {steps} steps, means over {seeds} seed(s). "
             "KL of the data from the model, nats: by KDE with Silverman's bandwidth; and",
             "of the data with noise of std from a KDE of bandwidth std. "
             "stray: share of samples beyond 3 std of all centres",
             f"{'K':>4}{'std':>6}  {'':16}" + "".join(f"{key:>{width}}" for key, width in widths.items())]
    same = {}
    for row in results:
        same.setdefault((row["K"], row["std"], row["kind"]), []).append(row)
    for (K, std, kind), rows in same.items():
        means = {key: np.mean([row[key] for row in rows]) for key in widths if key in rows[0]}
        cells = [f"{mean:{widths[key]}.{0 if key == 'codes used' else 3}f}" for key, mean in means.items()]
        lines.append(f"{K:4}{std:6g}  {kind:16}" + "".join(cells))
    return lines
