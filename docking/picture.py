"""
Pictures of poses in their pocket: ligands in colour, C-alphas in grey, the nodes that codes point at ringed
(DisCo-Diff Fig. 8).
"""

import numpy as np
import torch

from checkpoint import atomic
from plot import COLOURS, Axes, figure

CARBON, TRUE, RESIDUE = (70, 70, 70), (0, 150, 90), (190, 190, 200)
ELEMENTS = {6: CARBON, 7: (40, 80, 220), 8: (220, 40, 40), 9: (90, 190, 90), 15: (240, 140, 20), 16: (200, 170, 0),
            17: (30, 160, 30), 35: (150, 50, 40), 53: (130, 30, 150)}


def view(pos):
    """-> (3, 2), the plane in which points (N, 3) spread most"""
    centred = np.asarray(pos) - np.asarray(pos).mean(0)
    return np.linalg.svd(centred, full_matrices=False)[2][:2].T


def draw_ligand(axes, complex_, pos, plane, carbon=CARBON, width=2.0):
    flat = np.asarray(pos) @ plane
    for u, v in complex_.bonds.T.tolist():
        if u < v:
            axes.line(flat[[u, v]], carbon, width)
    numbers = (complex_.atoms[:, 0] + 1).tolist()
    axes.scatter(flat, [carbon if n == 6 else ELEMENTS.get(n, (0, 0, 0)) for n in numbers], 1.3 * width)


def ring(axes, node, plane, colour, radius, width):
    """A ring around a node's position (3,)."""
    (x, y), = axes.at(node[None].numpy() @ plane)
    axes.draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)


def draw_poses(path, complex_, panels, reach=9.0):
    """One panel for each (title, poses (N, L, 3), codes (m,) or ()); all in the same view, in Angstrom.

    The first pose of a panel is drawn in full, others thinly; what lies farther from the true pose is cut
    off. Where the true pose is known it is green, in every panel; else the first pose of all is the middle.
    Codes are rings in the colours of their latents, each wider than the one before.
    """
    known = complex_.pos.isfinite().all().item()
    middle = complex_.pos if known else panels[0][1][0]
    plane = view(middle)
    near = torch.cdist(complex_.rec_pos, middle).min(1).values < reach
    flat = torch.cat([complex_.rec_pos[near], middle]).numpy() @ plane
    (left, low), (right, high) = flat.min(0) - 4, flat.max(0) + 4
    size = (380, round(min(max(380 * (high - low) / (right - left), 200), 600)))
    row = []
    for title, poses, codes in panels:
        axes = Axes((left, right), (low, high), title, "Angstrom", size=size)
        axes.scatter(complex_.rec_pos[near].numpy() @ plane, RESIDUE, 4)
        if known:
            draw_ligand(axes, complex_, complex_.pos, plane, TRUE, 3.0)
        for pose in poses[1:]:
            draw_ligand(axes, complex_, pose, plane, (150, 150, 150), 0.8)
        draw_ligand(axes, complex_, poses[0], plane)
        nodes = torch.cat([poses[0], complex_.rec_pos.float()])
        for i, code in enumerate(codes):
            colour = tuple(COLOURS[i % 8].tolist())
            ring(axes, nodes[code], plane, colour, 14 + 7 * i, 5)
            axes.legend.append((f"latent {i + 1}", colour))
        if known:
            axes.legend.append(("true pose", TRUE))
        row.append(axes)
    with atomic(path) as file:
        figure([row]).save(file, "png", optimize=True)
