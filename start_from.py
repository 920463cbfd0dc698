"""
Starts stage 1 from the weights of a trained network, EDM's, DiT's or our own; the encoder of Discrete Latent Codes
from DINOv2's, and its text model from LLaDA's.
"""

import os
import zipfile
from pathlib import Path

import torch

from checkpoint import OLDER, OLDER_CODES, is_of, read_checkpoint, weights_checksum
from configurator import UserError, arguments_of, require, say
from diffusion import PROCESSES
from dit import dit_settings, start_of_dit
from edm_pickle import read_edm
from model import DENOISERS
from noise import seeded_generator
from sharding import like
from tensor_files import UNREADABLE, damaged, parts_of, read_safetensors
from trained import path_of
from unet import edm_settings, from_edm
from vit import positions

# settings of the encoder and its codes
OF_LATENTS = ("num_latents", "codebook_size", "latent_dim", "latent_layers", "latent_heads", "latents_to_emb",
              "encoder_patch", "encoder_dim", "encoder_layers", "encoder_heads", "conditioning", "null_token",
              "groups", "continuous")


def start_from(source, model, model_args):
    """Loads the weights at `source` (see `read_network`) into `model`, a DisCoDiff of these model_args.
    -> whether a trained encoder was among them

    Layers that plain EDM lacks keep their initial weights: the cross-attentions start as the identity
    (sec. 4.1), so D is the source's for any codes; averaged ones change it a little. With another number of
    classes, the class embedding keeps its initial weights too, and a line says so. DiT's networks are a start only:
    they were trained for DDPM's noise prediction and its 1,000 steps. Raises UserError if the networks don't fit.
    """
    path, weights, args, made_by = read_network(source)
    theirs, ours = (of.get("denoiser", "unet") for of in (args, model_args))
    require(theirs == ours, f"{path} has the denoiser {theirs}, this run {ours}: say --denoiser={theirs}")
    of_class = "model.classes.weight" if ours == "dit" else "model.map_label.weight"
    try:
        if made_by == "DiT":
            channels = weights["x_embedder.proj.weight"].shape[1]
            require(channels == model.x_shape[0],
                    f"{path} denoises {channels} channels, this run {model.x_shape[0]}: the published DiTs are of a "
                    "VAE's latents, --space=vae")
            args = model_args | dict(num_latents=0) | dit_settings(weights)  # what its file does not say is as here
            weights = {f"model.{name}": tensor for name, tensor in start_of_dit(weights).items()}
        elif made_by == "EDM":
            weights = from_edm(weights)
        older, names = OLDER | OLDER_CODES, ("sigma_data", "process", *OF_LATENTS)
        there, here = (settings_of(state, of) | {name: (older | of).get(name, 0) for name in names}
                       for state, of in ((weights, args), (model.state_dict(), model_args)))
        if PROCESSES[there["process"]].constants is PROCESSES[here["process"]].constants:
            there["process"] = here["process"]  # all that a network knows of it
        require(here["num_latents"] or not there["num_latents"],
                f"{path} has discrete latents, which its denoiser relies on: it can't go on with num_latents=0. "
                "Start from plain EDM, or keep the latents")
        encoders = [{name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
                    for state in (weights, model.state_dict())]
        require(not there["num_latents"] or not (args.get("frozen") or model_args.get("frozen"))
                or weights_checksum(encoders[0]) == weights_checksum(encoders[1]),
                f"{path} has codes of another encoder than this run, and its denoiser relies on them: "
                "name its encoder by --codes, or start from plain EDM")
        classes, wanted = there.pop("label_dim"), here.pop("label_dim")
        different = [f"{name}={there[name]!r} there, {here[name]!r} here" for name in here
                     if there[name] != here[name] and (there["num_latents"] or name not in OF_LATENTS)]
        require(not different,
                f"give the settings of the network to start from, or another --init_from: {path} is a network "
                f"of other settings: {'; '.join(different)}")
        if classes != wanted:
            weights.pop(of_class, None)
            say(f"{path} has {classes} classes, this run {wanted}: a new class embedding starts afresh")
        if weights.pop("model.map_augment.weight", None) is not None:
            say(f"{path} was trained with augmentation: its map_augment is left out; "
                "it adds nothing without augmentation")

        def starts_afresh(name):
            of_latents = not name.startswith("model.") or ".cross." in name or ".map_latents." in name
            return of_latents and not there["num_latents"] or name == of_class and classes != wanted

        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not starts_afresh(name)]
        if missing or unexpected:
            raise ValueError(f"it has no {missing[0]}" if missing else f"it has {unexpected[0]}, which ours lacks")
        return there["num_latents"] > 0
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        why = " ".join(f"{'it has no ' * isinstance(error, KeyError)}{error}".split())[:200]
        architecture = {"unet": "ADM", "dit": "DiT", "uvit": "U-ViT"}[ours]
        raise UserError(f"{path} is not a network of {architecture}'s architecture: {why}") from None


def settings_of(state, args):
    """The denoiser's settings: a U-Net's are read off its weights, another network's are among `args`."""
    kind = args.get("denoiser", "unet")
    if kind == "unet":
        return edm_settings(state)
    settings = arguments_of(args, DENOISERS[kind]) | dict(x_shape=tuple(args["x_shape"]))
    return {name: value for name, value in settings.items() if name not in ("dropout", "recompute")}


def read_network(source):
    """-> path of the file, its averaged weights, its settings as in `model_args` (EDM's network: sigma_data
    alone; DiT's: denoiser alone), and whose names and order of channels the weights have: "EDM", "DiT", or "" for ours.

    source: a run's folder, its stage1.pt or a snapshot, "pretrained" (the repository's folder), EDM's pickle, or
    DiT's file, a state dict. For anything else raises UserError, which says what the file is.
    """
    path = Path(path_of(source))
    require(os.path.exists(path), f"there is no file or folder {path} to start from")
    if path.is_dir():
        require((path / "stage1.pt").is_file(),
                f"{path} has no stage1.pt in it: name the folder of a trained stage 1")
        path /= "stage1.pt"
    kind = kind_of(path)
    wanted = "a stage1.pt, or one of EDM's networks or DiT's, is wanted"
    require(kind, f"{path} is neither a checkpoint nor one of EDM's networks: {wanted}")
    if kind == "pickle":
        weights, sigma_data = read_edm(path)
        return path, weights, dict(sigma_data=sigma_data), "EDM"
    require(kind != "arrays", f"{path} holds images or other arrays, not a network: {wanted}")
    state = read_checkpoint(path)
    require(state is not None, f"{path} is truncated or damaged, or holds more than tensors: {wanted}")
    require(not is_of("train_prior", state), f"{path} is a prior: {wanted}")
    if is_dit(state):
        return path, state, dict(denoiser="dit"), "DiT"
    require(is_of("train_stage1", state), f"{path} is not a checkpoint of train_stage1.py: {wanted}")
    return path, state["ema"], state["model_args"], "" if "qkv" in state else "EDM"


def is_dit(state):
    """Whether this is a dict of tensors, with patches under DiT's names."""
    return isinstance(state, dict) and "x_embedder.proj.weight" in state and all(map(torch.is_tensor, state.values()))


def sort_older(model, checkpoint):
    """Puts the channels of qkv into our order in a checkpoint that has EDM's: weights, their average, Adam's
    moments. model: the optimiser has its parameters, in their order."""
    if "qkv" not in checkpoint:
        for part in ("model", "ema"):
            checkpoint[part] = from_edm(checkpoint[part])
        for i, (name, _) in enumerate(model.named_parameters()):
            moments = checkpoint["optimizer"]["state"].get(i, {})  # none before the first step
            moments |= {key: from_edm({name: moments[key]})[name] for key in ("exp_avg", "exp_avg_sq") if moments}


def kind_of(path):
    """-> "pickle", "checkpoint" (perhaps truncated), "arrays" (an .npz, or a .zip of images), or ""."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start[:2] == b"PK" and zipfile.is_zipfile(path):
            names = zipfile.ZipFile(path).namelist()
            return "checkpoint" if any(name.endswith("data.pkl") for name in names) else "arrays"
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    return "checkpoint" if start[:2] == b"PK" else "pickle" if start[:1] == b"\x80" else ""


def start_from_dinov2(path, encoder):
    """Loads a ViT with registers that DINOv2 published (dinov2_vitl14_reg4_pretrain.pth, say) into `encoder`, a
    SEMEncoder of its sizes. Position embeddings are interpolated to the encoder's grid; the SEMs keep their initial
    weights (DLC sec. 5). Raises UserError if the file does not fit.
    """
    require(os.path.isfile(path), f"there is no file {path} to start from")
    weights = read_checkpoint(path)
    require(isinstance(weights, dict) and all(hasattr(value, "shape") for value in weights.values()),
            f"{path} is damaged, or no file of weights: a ViT with registers of DINOv2 is wanted")
    here = {name: p for name, p in encoder.state_dict().items() if not name.startswith("sem_")}
    missing, unknown = sorted(here.keys() - weights.keys()), sorted(weights.keys() - here.keys())
    mend = "Change layers, registers or stem, or give another --init_from"
    require(not missing, f"{path} lacks {len(missing)} of the {len(here)} weights of this ViT, {missing[:1]}. {mend}")
    require(not unknown, f"{path} has {len(unknown)} weights that this ViT lacks, {unknown[:1]}. {mend}")
    try:
        weights["pos_embed"] = positions(weights["pos_embed"].float(), encoder.img_resolution // encoder.patch)
    except (RuntimeError, ValueError):
        pass  # its shape is reported below
    other = [f"{name} is {[*weights[name].shape]} there, {[*p.shape]} here" for name, p in here.items()
             if weights[name].shape != p.shape]
    require(not other, f"{path} is a ViT of other sizes: {'; '.join(other[:2])}. Change dim, patch or registers, or "
                       "give another --init_from")
    encoder.load_state_dict(encoder.state_dict() | weights)


@torch.no_grad()
def start_from_llada(source, model):
    """Loads LLaDA's published weights into `model`, a TextModel of its sizes, which may be sharded.

    source: a folder with .safetensors files and their index, or a file. START and the codes have no rows there: theirs
    are drawn, as wide as the published ones. Places get no embedding. Raises UserError if the files do not fit.
    """
    here = dict(model.named_parameters())
    left, mend = here.keys() - {"place"}, "change layers, dim, hidden or vocabulary, or give another --init_from"
    if "place" in here:
        here["place"].zero_()
    for path in parts_of(source):
        try:
            tensors = read_safetensors(path)
        except UNREADABLE as error:
            raise damaged(path, error) from None
        for name, tensor in tensors.items():
            name, tensor = name.removeprefix("model.transformer."), tensor.float()
            require(name in here, f"{path} has {name}, which this network lacks: {mend}")
            rows, *rest = here[name].shape
            wanted = [model.start if name in ("wte.weight", "ff_out.weight") else rows, *rest]
            require([*tensor.shape] == wanted,
                    f"{path} is a network of other sizes: {name} is {[*tensor.shape]} there, {wanted} here: {mend}")
            new = torch.randn(rows - len(tensor), *rest, generator=seeded_generator("cpu", name)) * tensor.std()
            here[name].copy_(like(torch.cat([tensor, new]), here[name]))
            left.discard(name)
    require(not left, f"{source} lacks {len(left)} of this network's weights, {sorted(left)[:1]}: {mend}")
