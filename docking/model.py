"""
The networks of DisCo-DiffDock, to be read beside DisCo-Diff App. E.4.

  product        l <= 1 tensor product of nodes with the direction of an edge: the whole of equivariance
  Convolution    messages along edges, their weights from distances and both ends' scalars
  Network        embeddings and convolutions over ligand atoms and residues: shared by all three
  Score          denoiser: scores of translation, rotation and torsions
  Pointer        two MLPs that give each atom and each residue one logit per latent
  DisCoDock      denoiser and encoder together, as stage 1 trains them
  Confidence     whether a pose is within 2 Angstrom of the true one
  Prior          which node the next code points at, from the denoiser's own layers

A node has scalars s, vectors v, pseudovectors w and pseudoscalars p. A rotation turns v and w; a
reflection changes the signs of w and p besides. A torsion's score is a pseudoscalar: in the mirror, bonds
turn the other way.

Shapes: B complexes; N nodes, the atoms of all ligands, then the residues of all proteins; E edges, each
with a receiver and a sender. A code is the number of a node within its complex, atoms first. Soft codes
are (B, m, K) with K nodes in the largest complex, rows sum to 1.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from docking.complexes import ATOM_FEATURES, BONDS, RESIDUES
from docking.noise import sigma_at, so3_norm, torus_norm
from model import gumbel_softmax

# ----------------------------------------------------------------------------------------------------
# one convolution


def product(nodes, direction):
    """Products of nodes' features with unit vectors, by the kind that they have.

    nodes: s (E, S), v (E, V, 3), w (E, W, 3), p (E, P); direction: (E, 3)
    -> s (E, S + V), v (E, S + V + W, 3), w (E, V + W + P, 3), p (E, W + P)
    """
    s, v, w, p = nodes
    u = math.sqrt(3) * direction[:, None]  # (E, 1, 3)
    return (torch.cat([s, (v * u).sum(-1) / math.sqrt(3)], 1),
            torch.cat([s[..., None] * u, v, torch.linalg.cross(w, u, dim=-1) / math.sqrt(2)], 1),
            torch.cat([torch.linalg.cross(v, u, dim=-1) / math.sqrt(2), w, p[..., None] * u], 1),
            torch.cat([(w * u).sum(-1) / math.sqrt(3), p], 1))


def product_widths(widths):
    """Channels of `product`, from those of s, v, w and p."""
    s, v, w, p = widths
    return s + v, s + v + w, v + w + p, w + p


def take(x, rows):
    """x[rows], with a gradient that several threads of a CPU sum in the same order each time."""
    return x.index_select(0, rows)


def mean_at(receivers, x, count):
    """Mean of the rows of x (E, ...) with the same receiver. -> (count, ...)"""
    total = x.new_zeros(count, *x.shape[1:]).index_add_(0, receivers, x)
    rows = x.new_zeros(count).index_add_(0, receivers, x.new_ones(len(x))).clamp_min_(1)
    return total / rows.view(-1, *[1] * (x.ndim - 1))


class EquivariantNorm(nn.Module):
    """Batch norm. Scalars lose their mean; s, v, w and p are divided by the root of their mean square."""

    def __init__(self, widths, momentum=0.1, eps=1e-5):
        super().__init__()
        self.widths, self.momentum, self.eps = widths, momentum, eps
        self.weight = nn.Parameter(torch.ones(sum(widths)))
        self.bias = nn.Parameter(torch.zeros(widths[0]))
        self.register_buffer("running_mean", torch.zeros(widths[0]))
        self.register_buffer("running_var", torch.ones(sum(widths)))

    def forward(self, nodes):
        s, v, w, p = nodes
        if self.training:
            mean = s.mean(0)
            parts = (s - mean, v, w, p)
            var = torch.cat([x.square().mean([i for i in range(x.ndim) if i != 1]) for x in parts])
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        else:
            parts, var = (s - self.running_mean, v, w, p), self.running_var
        scales = (self.weight / (var + self.eps).sqrt()).split(self.widths)
        s, v, w, p = (x * (scale[:, None] if x.ndim == 3 else scale) for x, scale in zip(parts, scales))
        return s + self.bias, v, w, p


def mlp(inside, hidden, outside, dropout):
    return nn.Sequential(nn.Linear(inside, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outside))


class Convolution(nn.Module):
    """Messages are products, mixed by weights that an MLP gives each edge; a node gets their mean.

    widths: channels of s, v, w and p, before and after; features: of an edge; kinds: of edges, each with
    an MLP of its own. channelwise: an edge has one weight for each channel of the product, and the node
    mixes channels after the mean. The symmetry is the same, with 14 times fewer weights.
    """

    def __init__(self, before, after, features, kinds, channelwise, dropout):
        super().__init__()
        self.inside, self.after, self.channelwise = product_widths(before), after, channelwise
        if channelwise:
            self.sizes = self.inside
            self.mix = nn.ParameterList(torch.randn(i, o) / math.sqrt(i) for i, o in zip(self.inside, after))
        else:
            self.sizes = [i * o for i, o in zip(self.inside, after)]
        self.weights = nn.ModuleList(mlp(features, features, sum(self.sizes), dropout) for _ in range(kinds))
        self.norm = EquivariantNorm(after)

    def forward(self, nodes, edges, direction, features, count):
        """nodes: s, v, w, p; edges: receivers and senders (2, E); direction: (E, 3), receiver to sender;
        features: one (E_k, features) for each kind of edges, in the edges' order; count: of receivers
        """
        receivers, senders = edges
        weights = torch.cat([net(x) for net, x in zip(self.weights, features)]).split(self.sizes, 1)
        messages = product([take(x, senders) for x in nodes], direction)
        out = []
        for i, (x, weight) in enumerate(zip(messages, weights)):
            if self.channelwise:
                x = mean_at(receivers, x * (weight[..., None] if x.ndim == 3 else weight), count)
                out.append(torch.einsum("ni...,io->no...", x, self.mix[i]))
            else:
                weight = weight.unflatten(1, (self.inside[i], self.after[i])) / math.sqrt(max(self.inside[i], 1))
                out.append(mean_at(receivers, torch.einsum("ei...,eio->eo...", x, weight), count))
        return self.norm(out)


# ----------------------------------------------------------------------------------------------------
# graphs


def smear(distance, stop, count=32):
    """Distances (E,) -> Gaussians (E, count) around centres from 0 to `stop`, in Angstrom"""
    centres = torch.linspace(0, stop, count, device=distance.device)
    return torch.exp(-0.5 * ((distance[:, None] - centres) / centres[1]) ** 2)


def time_embedding(t, count=32):
    """Times (...) in [0, 1] -> sines, then cosines (..., count)"""
    steps = torch.arange(count // 2, device=t.device, dtype=t.dtype)
    frequencies = torch.exp(-math.log(10_000) / (count // 2 - 1) * steps)
    angles = 1000 * t[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def pairs_within(a, b, graph_a, graph_b, cutoff):
    """Pairs (2, E) of points a, b of the same complex that are closer than its cutoff (B,)."""
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return ((distance < cutoff[graph_a, None]) & (graph_a[:, None] == graph_b)).nonzero().T


def along(pos, edges):
    """-> unit vectors (E, 3) from receivers to senders, 0 between equal points; distances (E,)"""
    vector = pos[edges[1]] - pos[edges[0]]
    return F.normalize(vector, dim=1), vector.norm(dim=1)


def pad(x, batch):
    """One row for each node (N, m) -> (B, m, K), -inf where a complex has fewer than K nodes"""
    out = x.new_full((batch.size, batch.most, x.shape[1]), -torch.inf)
    out[batch.graph, batch.rank] = x
    return out.transpose(1, 2)


class Network(nn.Module):
    """Node features of ligand and protein, from a pose, its time and labels of nodes.

    scalars, vectors: channels of s and p, of v and w; layers: of convolutions; timed: whether there is a
    time; num_latents: labels of a node; label_size: what a label is multiplied by.
    """

    def __init__(self, scalars, vectors, layers, timed, num_latents, channelwise, dropout, label_size=1.0):
        super().__init__()
        self.label_size = label_size
        S, V, m, time = scalars, vectors, num_latents, 32 * timed
        self.scalars, self.timed, self.reach = S, timed, 80 if timed else 30
        self.atom = nn.ModuleList(nn.Embedding(size, S) for size in ATOM_FEATURES)
        self.residue = nn.Embedding(len(RESIDUES), S)
        self.atom_mix, self.residue_mix = (nn.Linear(S + time + m, S) if timed else nn.Identity() for _ in range(2))
        self.ligand_edge = mlp(len(BONDS) + time + 2 * m + 32, S, S, dropout)
        self.protein_edge, self.cross_edge = (mlp(time + 2 * m + 32, S, S, dropout) for _ in range(2))
        if m:
            self.null = nn.Parameter(torch.zeros(5, S))  # of atoms, residues, ligand, protein and cross edges
        widths = [(S, 0, 0, 0), (S, V, 0, 0), (S, V, V, 0)] + [(S, V, V, S)] * layers
        self.layers = nn.ModuleList(Convolution(a, b, 3 * S, 4, channelwise, dropout)
                                    for a, b in zip(widths[:layers], widths[1:]))
        self.widths = widths[layers]

    def forward(self, batch, pos, cutoff, t=None, labels=None, null=None):
        """pos: ligand atoms (n, 3); cutoff: of cross edges, (B,); t: times (B,), if timed; labels: (N, m), and
        null: bool (B,), complexes that get the null embedding, if there are latents.
        -> s (N, S), v, w (N, V, 3), p (N, S)
        """
        n, graph = len(pos), batch.graph
        labels = pos.new_zeros(len(graph), 0) if labels is None else self.label_size * labels
        time = time_embedding(t)[graph] if self.timed else pos.new_zeros(len(graph), 0)
        null = pos.new_zeros(5, len(graph), 1) if null is None else self.null[:, None] * null[graph, None]

        # nodes
        atoms = sum(embed(x) for embed, x in zip(self.atom, batch.atoms.T))
        atoms = self.atom_mix(torch.cat([atoms, time[:n], labels[:n]], 1)) + null[0, :n]
        residues = self.residue_mix(torch.cat([self.residue(batch.residues), time[n:], labels[n:]], 1)) + null[1, n:]
        s = torch.cat([atoms, residues])
        nodes = [s, s.new_zeros(len(s), 0, 3), s.new_zeros(len(s), 0, 3), s.new_zeros(len(s), 0)]

        # edges: within the ligand, from residues to atoms, within the protein, from atoms to residues
        every = torch.cat([pos, batch.rec_pos])
        close = pairs_within(pos, pos, graph[:n], graph[:n], torch.full_like(cutoff, 5.0))
        ligand = torch.cat([batch.bonds, close[:, close[0] != close[1]]], 1)
        bond = F.pad(F.one_hot(batch.bond_types, len(BONDS)), (0, 0, 0, ligand.shape[1] - len(batch.bond_types)))
        cross = pairs_within(pos, batch.rec_pos, graph[:n], graph[n:], cutoff) + torch.tensor([[0], [n]]).to(graph)
        edges = torch.cat([ligand, cross, batch.rec_edges + n, cross.flip(0)], 1)
        parts = [ligand.shape[1], cross.shape[1], batch.rec_edges.shape[1], cross.shape[1]]
        # cross edges keep their direction, from atom to residue, also where the residue receives
        direction, distance = along(every, torch.cat([ligand, cross, batch.rec_edges + n, cross], 1))
        of_ligand, of_cross, of_protein, _ = (
            torch.cat([time[a], smear(d, stop), take(labels, a) * inside, take(labels, b) * inside], 1)
            for a, b, d, stop, inside in zip(*(x.split(parts) for x in (*edges, distance)),
                                             (5, self.reach, 30, self.reach), (1, 0, 1, 0)))  # none on cross edges
        of_cross = self.cross_edge(of_cross) + take(null[4], cross[0])
        features = [self.ligand_edge(torch.cat([bond, of_ligand], 1)) + take(null[2], ligand[0]), of_cross,
                    self.protein_edge(of_protein) + take(null[3], edges[0].split(parts)[2]), of_cross]

        for layer in self.layers:
            s = nodes[0][:, :self.scalars]
            with_ends = [torch.cat([x, take(s, a), take(s, b)], 1)
                         for x, a, b in zip(features, *(x.split(parts) for x in edges))]
            new = layer(nodes, edges, direction, with_ends, len(s))
            nodes = [x + F.pad(old, (0, 0) * (x.ndim - 2) + (0, x.shape[1] - old.shape[1]))
                     for x, old in zip(new, nodes)]
        return nodes


# ----------------------------------------------------------------------------------------------------
# denoiser, encoder, prior


class Score(nn.Module):
    """Scores of a pose: translation (B, 3), rotation (B, 3), and torsions of all bonds (T,)."""

    def __init__(self, scalars, vectors, layers, num_latents, channelwise, dropout, label_size):
        super().__init__()
        S = scalars
        self.net = Network(S, vectors, layers, True, num_latents, channelwise, dropout, label_size)
        self.centre_edge = mlp(32 + 32, S, S, dropout)
        self.centre = Convolution(self.net.widths, (0, 2, 2, 0), 2 * S, 1, False, dropout)
        self.translation_length, self.rotation_length = (mlp(1 + 32, S, 1, dropout) for _ in range(2))
        self.torsion_edge = mlp(32, S, S, dropout)
        self.torsion_weights = mlp(3 * S, 3 * S, 2 * vectors * S, dropout)
        self.torsion_norm = EquivariantNorm((S, 0, 0, S))
        self.torsion = nn.Sequential(nn.Linear(2 * S, S, bias=False), nn.Tanh(), nn.Dropout(dropout),
                                     nn.Linear(S, 1, bias=False))

    def forward(self, batch, pos, t, labels=None, null=None):
        """pos: ligand atoms (n, 3); t: (B,); labels: (N, m), and null: bool (B,), if there are latents"""
        sigma = sigma_at(t.double()).to(pos)
        graph = batch.graph[:len(pos)]
        nodes = [x[:len(pos)] for x in self.net(batch, pos, 3 * sigma[:, 0] + 20, t, labels, null)]
        time = time_embedding(t)

        # translation and rotation, about the ligand's centre
        edges = torch.stack([graph, torch.arange(len(pos), device=graph.device)])
        vector = pos - mean_at(graph, pos, batch.size)[graph]
        features = self.centre_edge(torch.cat([smear(vector.norm(dim=1), 30), time[graph]], 1))
        features = [torch.cat([features, nodes[0]], 1)]
        _, v, w, _ = self.centre(nodes, edges, F.normalize(vector, dim=1), features, batch.size)
        translation, rotation = (v + w).unbind(1)
        for_length = [torch.cat([x.norm(dim=1, keepdim=True), time], 1) for x in (translation, rotation)]
        translation = F.normalize(translation, dim=1) * self.translation_length(for_length[0]) / sigma[:, :1]
        rotation = F.normalize(rotation, dim=1) * self.rotation_length(for_length[1]) * so3_norm(sigma[:, 1:2])

        # torsions: atoms around a bond, seen from its middle
        u, v = batch.rotatable.T
        if not len(u):
            return translation, rotation, pos.new_zeros(0)
        near = pairs_within((pos[u] + pos[v]) / 2, pos, graph[u], graph, pos.new_full((batch.size,), 5.0))
        bond, atom = near
        vector = pos[atom] - (pos[u] + pos[v])[bond] / 2
        features = torch.cat([self.torsion_edge(smear(vector.norm(dim=1), 5)), take(nodes[0], atom),
                              take(take(nodes[0], u) + take(nodes[0], v), bond)], 1)
        e, b = F.normalize(vector, dim=1), F.normalize(pos[v] - pos[u], dim=1)[bond]
        q = math.sqrt(1.5) * (3 * b * (b * e).sum(1, keepdim=True) - e)  # direction times the bond's quadrupole
        weights = self.torsion_weights(features).unflatten(1, (2, nodes[1].shape[1], -1)).unbind(1)
        scalars, pseudo = (
            mean_at(bond, torch.einsum("evi,ei,evo->eo", take(x, atom), q, weight) / math.sqrt(3 * x.shape[1]), len(u))
            for x, weight in zip(nodes[1:3], weights))
        no_vectors = pos.new_zeros(len(u), 0, 3)
        scalars, _, _, pseudo = self.torsion_norm((scalars, no_vectors, no_vectors, pseudo))
        torsions = self.torsion(torch.cat([scalars, pseudo], 1))[:, 0]
        return translation, rotation, torsions * torus_norm(sigma[:, 2]).to(pos)[graph[u]]


class Pointer(nn.Module):
    """Logits of nodes (N, outputs) from s and p: an MLP for atoms, another for residues."""

    def __init__(self, widths, outputs, dropout):
        super().__init__()
        self.atom, self.residue = (nn.Sequential(
            nn.Linear(widths[0] + widths[3], 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(128, outputs)) for _ in range(2))

    def forward(self, nodes, atoms):
        """nodes: s, v, w, p; the first `atoms` of them are the ligands'"""
        x = torch.cat([nodes[0], nodes[3]], 1)
        return torch.cat([self.atom(x[:atoms]), self.residue(x[atoms:])])


class Encoder(nn.Module):
    """The true pose -> logits of all nodes, for each latent (B, m, K)"""

    def __init__(self, scalars, vectors, layers, num_latents, channelwise, dropout):
        super().__init__()
        self.net = Network(scalars, vectors, layers, False, 0, channelwise, dropout)
        self.pointer = Pointer(self.net.widths, num_latents, dropout)

    def forward(self, batch, pos):
        nodes = self.net(batch, pos, pos.new_full((batch.size,), 30.0))
        return pad(self.pointer(nodes, len(pos)), batch)


def straight_through(soft):
    """Soft codes -> one-hot ones with the soft ones' gradient: a label is there or not."""
    return F.one_hot(soft.argmax(-1), soft.shape[-1]) + soft - soft.detach()


def labels_of(z, batch):
    """Codes, int64 (B, m), -1 for none, or one-hot (B, m, K) -> labels of nodes (N, m)"""
    if z.ndim == 2:
        return (z[batch.graph] == batch.rank[:, None]).float()
    return take(z.transpose(1, 2).flatten(0, 1), batch.graph * batch.most + batch.rank)


class DisCoDock(nn.Module):
    """Denoiser and encoder. num_latents = 0 leaves DiffDock-S.

    label_size: 1 in the paper. A label is one input of many, at one node of many; a larger one counts for more
    there (toy_pocket.py compares).
    """

    def __init__(self, num_latents=2, scalars=24, vectors=6, layers=5, encoder_vectors=4, encoder_layers=3,
                 channelwise=False, dropout=0.1, label_size=1.0):
        super().__init__()
        self.num_latents = num_latents
        self.score = Score(scalars, vectors, layers, num_latents, channelwise, dropout, label_size)
        if num_latents:
            self.encoder = Encoder(scalars, encoder_vectors, encoder_layers, num_latents, channelwise, dropout)

    def forward(self, batch, pos, t, true=None, gumbel=None, drop=None, tau=1.0):
        """Alg. 1: z from the true pose, then the scores of the noisy one.

        pos, true: (n, 3); t: (B,); gumbel: (B, m, K); drop: bool (B,), complexes without their codes.
        -> scores of translation, rotation, torsions; the encoder's logits (B, m, K), None without latents
        """
        if not self.num_latents:
            return *self.score(batch, pos, t), None
        logits = self.encoder(batch, true)
        labels = labels_of(straight_through(gumbel_softmax(logits, tau, gumbel)), batch)
        return *self.score(batch, pos, t, torch.where(drop[batch.graph, None], 0, labels), drop), logits


class Prior(nn.Module):
    """Logits of the next code, given a prefix. The layers start as the trained denoiser's (App. E.4)."""

    def __init__(self, num_latents=2, scalars=24, vectors=6, layers=5, channelwise=False, dropout=0.1, label_size=1.0):
        super().__init__()
        self.net = Network(scalars, vectors, layers, True, num_latents, channelwise, dropout, label_size)
        self.pointer = Pointer(self.net.widths, 1, dropout)

    def forward(self, batch, pos, prefix):
        """pos: (n, 3), a conformer at the protein's centre; prefix: (B, m) codes, -1 from the next one on
        -> (B, K). Which latent is next shows in the prefix alone.
        """
        ones = pos.new_ones(batch.size)
        cutoff = 3 * sigma_at(ones.double())[:, 0].to(pos) + 20
        # as in the release: the null embedding is added although there are labels
        nodes = self.net(batch, pos, cutoff, ones, labels_of(prefix, batch), ones.bool())
        return pad(self.pointer(nodes, len(pos)), batch)[:, 0]


class Confidence(nn.Module):
    """A pose -> logit that its RMSD is below 2 Angstrom (B,). It sees C-alphas alone; DiffDock's sees all atoms."""

    def __init__(self, scalars=16, vectors=4, layers=3, channelwise=True, dropout=0.1):
        super().__init__()
        self.net = Network(scalars, vectors, layers, False, 0, channelwise, dropout)
        self.head = mlp(2 * scalars, 4 * scalars, 1, dropout)

    def forward(self, batch, pos):
        s, _, _, p = self.net(batch, pos, pos.new_full((batch.size,), 30.0))
        of_ligand = mean_at(batch.graph[:len(pos)], torch.cat([s, p], 1)[:len(pos)], batch.size)
        return self.head(of_ligand)[:, 0]
