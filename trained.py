"""
Loads the trained networks in a run's folder. Later steps need only the folder.
"""

import math
import re
from pathlib import Path

import torch

import data
from checkpoint import atomic, load_checkpoint, read_log, weights_checksum, write_log
from configurator import UserError, require
from diffusion_prior import DiffusionPrior
from model import DisCoDiff
from prior import Prior
from rdm import RDM
from sedd import SEDD
from text import TextModel
from tokens import tokenizer_of
from unet import from_edm
from vae import vae_from
from vit import Distilled

# a new prior needs a file of its own, and a name here
PRIORS = {"ar": Prior, "sedd": SEDD, "rdm": RDM, "diffusion": DiffusionPrior}


def path_of(folder):
    """A run's folder; those that come with the repository are found wherever the user is."""
    return data.HERE / folder if str(folder) in ("pretrained", "pretrained-dlc") else folder


def load_stage1(folder, device="cpu", snapshot=""):
    """-> the trained DisCoDiff of a run's folder, or of the file `snapshot`; its checkpoint, a dict

    The weights are the moving average, in eval mode. Raises UserError if there are none.
    """
    path = snapshot or f"{path_of(folder)}/stage1.pt"
    checkpoint = load_checkpoint(path, "train_stage1")
    return build(DisCoDiff, checkpoint, device, path), checkpoint


def load_vae(checkpoint, device="cpu"):
    """-> the VAE whose latents the denoiser of a stage-1 checkpoint works on, None if it works on pixels"""
    return vae_from(checkpoint["vae"]).to(device) if "vae" in checkpoint else None


def priors_of(model_args):
    """-> what a DisCoDiff of these model_args reads; the kinds of priors that draw it"""
    if model_args.get("continuous"):
        return "continuous latents", ["diffusion"]
    return ("embeddings", ["rdm"]) if model_args["codebook_size"] == 1 else ("codes", ["ar", "sedd"])


def require_fit(kind, model_args, path):
    """Raises UserError unless this kind of prior draws what a DisCoDiff of these model_args, at this path, reads."""
    what, kinds = priors_of(model_args)
    require(kind in kinds, f"{path} has {what}: say --prior={' or '.join(kinds)}")


def class_number(label, names):
    """A class's name or number -> its number, -1 for "". Raises UserError if there is no such class."""
    if label in names:
        return names.index(label)
    require(names or label in ("", "-1"), f"class_label {label}: this model was trained without classes")
    some = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
    known = f"this model has {len(names)} classes, 0 ... {len(names) - 1}: {some}"
    number = re.fullmatch(r"-?\d+", label or "-1")
    require(number, f"there is no class {label!r}: {known}")
    require(-1 <= int(number[0]) < len(names), f"class_label {label} is out of range: {known}")
    return int(number[0])


def load_prior(folder, kind, device, stage1, snapshot=""):
    """-> the trained prior of a run's folder: the moving average of its weights, in eval mode

    kind: its name in PRIORS. stage1: the checkpoint from `load_stage1`, which may be the `snapshot`.
    Raises UserError if the prior is missing, of another kind, or for other codes.
    """
    require_fit(kind, stage1["model_args"], snapshot or f"{path_of(folder)}/stage1.pt")
    path = f"{path_of(folder)}/prior_{kind}.pt"
    mend = f"run `python train_prior.py --prior={kind} --out_dir={folder} --overwrite=True`"
    if snapshot:
        mend = (f"give codes by --code or --encode, which need no prior; or copy {snapshot} into a folder of its own "
                "as stage1.pt, and train a prior there")
        require(Path(path).is_file(), f"there is no prior {path}: {mend}")
    checkpoint = load_checkpoint(path, "train_prior", f" --prior={kind}")
    have = checkpoint["config"].get("prior")
    require(have == kind,
            f"{path} holds a prior of the kind {have!r}, not {kind!r}: was another file copied over it?")
    require(checkpoint["encoder"] == weights_checksum(stage1["ema"]),
            f"{path} was trained on codes of another stage 1: {mend}")
    have, want = [[a.get(key) for key in ("num_latents", "codebook_size", "label_dim")]
                  for a in (checkpoint["model_args"], stage1["model_args"])]
    require(have == want, f"{path} has m, k, classes = {have}, stage 1 has {want}: {mend}")
    return build(PRIORS[kind], checkpoint, device, path)


def prior_in(folder):
    """-> the first of PRIORS that a run's folder has, the first of all if it has none"""
    return next((kind for kind in PRIORS if Path(path_of(folder), f"prior_{kind}.pt").is_file()), "ar")


def load_text(folder, device, stage1, snapshot=""):
    """-> the trained TextModel of a run's folder, as from `load_prior`; its tokenizer. Raises UserError if there is
    none, or if it writes other codes than those of this stage 1."""
    path = f"{path_of(folder)}/text.pt"
    checkpoint = load_checkpoint(path, "train_text")
    require(checkpoint["encoder"] == weights_checksum(stage1["ema"]),
            f"{path} was trained on codes of another stage 1 than {snapshot or path_of(folder)}: run "
            f"`python train_text.py --out_dir={folder} --overwrite=True`")
    return build(TextModel, checkpoint, device, path), tokenizer_of(checkpoint["tokenizer"])


def load_encoder(folder, device="cpu"):
    """-> the SEMEncoder of train_encoder.py's folder, the teacher's; its checkpoint, a dict. Raises UserError if there
    is none."""
    path = f"{folder}/encoder.pt"
    checkpoint = load_checkpoint(path, "train_encoder")
    return build(Distilled, checkpoint, device, path).backbone, checkpoint


def build(network, checkpoint, device, path):
    """-> a network of this class with the averaged weights of the checkpoint at `path`; UserError if they don't fit"""
    older = network is DisCoDiff and "qkv" not in checkpoint
    try:
        model = network(**checkpoint["model_args"])
        model.load_state_dict(from_edm(checkpoint["ema"]) if older else checkpoint["ema"])
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} is of another architecture than this {network.__name__}: train anew, or use the code "
                        f"that made it ({str(error).splitlines()[-1].strip()})") from None
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def classes_of(checkpoint):
    """The class names that a stage-1 checkpoint was trained with, [] without classes.

    An older checkpoint has no names: Fashion-MNIST's, or numbers, take their place.
    """
    count = checkpoint["model_args"]["label_dim"]
    known = data.FASHION if checkpoint["config"]["dataset"] == data.EMBEDDED else []
    return (checkpoint.get("classes") or known or [str(c) for c in range(count)])[:count]


def load_trained_on(config, path):
    """The data set that stage 1, with the settings `config` and the checkpoint `path`, was trained on.

    -> images, labels, training indices, held-out indices. Raises UserError if the set has changed.
    """
    images, labels, _ = data.load(config["dataset"])
    require(data.data_checksum(images, labels) == config["data_identity"],
            f"the data set {config['dataset']} has changed since {path} was trained on it: "
            "prepare it as it was, or train stage 1 anew with --overwrite=True")
    return images, labels, *data.split(len(images), config["held_out"])


def ship(source, target):
    """Copies what sampling needs from a trained run's folder to another.

    This is the averaged weights of stage 1, of the prior that sample.py takes and of the text model, if there is one,
    in half precision, their settings, and stage 1's training log. Raises UserError if a checkpoint is missing, or if
    one was trained on another stage 1.
    """
    made_by = {"stage1.pt": "train_stage1", f"prior_{prior_in(source)}.pt": "train_prior", "text.pt": "train_text"}
    if not Path(source, "text.pt").is_file():
        del made_by["text.pt"]
    states = {name: load_checkpoint(f"{source}/{name}", script) for name, script in made_by.items()}
    encoder = weights_checksum(states["stage1.pt"]["ema"])
    for name, state in states.items():
        require(state.get("encoder", encoder) == encoder, f"{source}/{name} was trained on codes of another stage 1")
    require(Path(source).resolve() != Path(target).resolve(),
            f"{target} would lose what training needs: name another folder")
    for state in states.values():
        state["ema"] = {key: value.half() if value.is_floating_point() else value
                        for key, value in state["ema"].items()}
        state["config"] = state["config"] | dict(out_dir="")  # it is a path on the machine that trained it
        for key in ("model", "optimizer", "prior"):
            state.pop(key, None)
    for name, state in states.items():
        if "encoder" in state:
            state["encoder"] = weights_checksum(states["stage1.pt"]["ema"])
        with atomic(f"{target}/{name}") as f:
            torch.save(state, f)
    write_log(f"{target}/stage1.jsonl", read_log(f"{source}/stage1.jsonl", math.inf), mode="w")
