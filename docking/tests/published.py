"""The release's networks: what they call our parameters, and the values that the reference outputs have."""
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit", reason="docking needs RDKit: pip install -r docking/requirements.txt")

RULES = [(r"\.net\.layers\.(\d+)\.weights\.(\d)\.0\.", r".conv_layers.\1.fc.\2.0."),
         (r"\.net\.layers\.(\d+)\.weights\.(\d)\.3\.", r".conv_layers.\1.fc.\2.4."),
         (r"\.net\.layers\.(\d+)\.norm\.", r".conv_layers.\1.batch_norm."),
         (r"\.net\.atom\.(\d+)\.", r".lig_node_embedding.atom_embedding_list.\1."),
         (r"\.net\.residue\.", ".rec_node_embedding.atom_embedding_list.0."),
         (r"\.net\.atom_mix\.", ".lig_node_embedding.additional_features_embedder."),
         (r"\.net\.residue_mix\.", ".rec_node_embedding.additional_features_embedder."),
         (r"\.net\.ligand_edge\.", ".lig_edge_embedding."), (r"\.net\.protein_edge\.", ".rec_edge_embedding."),
         (r"\.net\.cross_edge\.", ".cross_edge_embedding."), (r"\.centre_edge\.", ".center_edge_embedding."),
         (r"\.centre\.weights\.0\.0\.", ".final_conv.fc.0."), (r"\.centre\.weights\.0\.3\.", ".final_conv.fc.4."),
         (r"\.centre\.norm\.", ".final_conv.batch_norm."), (r"\.translation_length\.", ".tr_final_layer."),
         (r"\.rotation_length\.", ".rot_final_layer."), (r"\.torsion_edge\.", ".final_edge_embedding."),
         (r"\.torsion_weights\.0\.", ".tor_bond_conv.fc.0."), (r"\.torsion_weights\.3\.", ".tor_bond_conv.fc.4."),
         (r"\.torsion_norm\.", ".tor_bond_conv.batch_norm."), (r"\.torsion\.", ".tor_final_layer."),
         (r"\.pointer\.atom\.", ".latent_s_predictor."), (r"\.pointer\.residue\.", ".latent_r_predictor.")]
NULL = ("lig_node", "rec_node", "lig_edge", "rec_edge", "cross_edge")


def reference(name):
    """-> {key: tensor} of a file of the authors' numbers"""
    with np.load(Path(__file__).with_name("reference") / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if file[key].dtype.kind != "U"}


def fill(name, shape):
    """The values that the reference outputs were computed with: a function of name and shape."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        normal = 1 + 0.1 * np.abs(normal)
    elif len(shape) >= 2:
        normal /= math.sqrt(np.prod(shape[1:]))
    else:
        normal = normal * 0.1 + name.endswith("weight")
    return torch.from_numpy(normal.astype(np.float32))


def filled(net, prefix=""):
    """The network with those values; prefix: of its parameters' names."""
    state = {}
    for ours, value in net.state_dict().items():
        name = (prefix + ours).replace("score.", "score_model.", 1).replace("ar.net.", "score_model.net.")
        for rule, theirs in RULES:
            name = re.sub(rule, theirs, name)
        if ours.endswith("num_batches_tracked") or not value.numel():
            pass
        elif ours.endswith("net.null"):
            value = torch.cat([fill(f"score_model.{part}_unconditional_embedding", (1, 24)) for part in NULL])
        else:
            value = fill(name, value.shape)
        if "final_conv.fc.4" in name:  # theirs comes path by path
            sv, vv, vw, ww, wv, pw = value.split((48, 12, 12, 12, 12, 48))
            value = torch.cat([sv, vv, wv, vw, ww, pw])
        if "tor_bond_conv.batch_norm" in name and len(value) == 48:  # theirs has pseudoscalars first
            value = value.roll(24)
        if "tor_final_layer.0" in name:
            value = value.roll(24, 1)
        state[ours] = value
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)
