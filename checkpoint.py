"""
Checkpoints and logs: written whole or not at all, and checked when read.

A checkpoint is one file in a run's folder, NAME.pt, with the run's settings. NAME.previous.pt is the
one before it. A log is NAME.jsonl, one JSON object per line. Reading them executes nothing.
"""

import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path

import torch

from configurator import UserError, out_of_memory, require, say
from processes import on_any_process


class atomic:
    """`with atomic(path) as f`: f becomes `path` once complete, and leaves no trace otherwise.

    Raises UserError if the file can't be written (a full disk, say), and keeps what `path` held before.
    """

    def __init__(self, path):
        self.path, self.partial = Path(path), Path(f"{path}.partial")

    def __enter__(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.partial, "wb")
        except OSError as error:
            raise UserError(f"can't write {self.path}: {error.strerror}") from None
        return self.file

    def __exit__(self, kind, error, traceback):
        try:
            if error is None:
                self.file.flush()
                os.fsync(self.file.fileno())
            self.file.close()
            if error is None:
                os.replace(self.partial, self.path)
                return
        except OSError as failed:
            error = error or failed
        try:
            self.partial.unlink(missing_ok=True)
        except OSError:  # the disk has become read-only
            pass
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own error on top
        if isinstance(cause, OSError):
            kept = "; the file that was there before is untouched" if self.path.exists() else ""
            raise UserError(f"can't write {self.path}: {cause.strerror}{kept}") from None


CHECKPOINT = {"train_encoder": {"config", "model_args", "step", "ema"},
              "train_stage1": {"config", "model_args", "step", "ema"},
              "train_prior": {"config", "model_args", "step", "ema", "encoder"},
              "train_text": {"config", "model_args", "step", "ema", "encoder", "tokenizer"},
              "eval_fid": {"model", "accuracy"}}
TO_TRAIN_ON = {"model", "optimizer"}
RENAMED = {"ema": "ema_decay"}  # settings in older checkpoints, and what they are called now
# settings that older checkpoints lack, and such settings of codes
OLDER = {"denoiser": "unet", "space": "pixels", "process": "edm", "weighting": "edm", "shift": 1.0}
OLDER_CODES = {"latents_to_emb": False, "coarse_images": 0, "conditioning": "attention", "encoder_identity": 0,
               "null_token": False, "groups": 0, "continuous": False, "kld_weight": 0.0, "prior": ""}


def save_checkpoint(path, state):
    """Atomically writes a dict of tensors, numbers, strings, and lists, tuples and dicts of these.

    The checkpoint before it stays as NAME.previous.pt, unless damaged: one of the two is readable at
    any time.
    """
    with atomic(path) as f:
        torch.save(state, f)
        if read_checkpoint(path, check_only=True):
            previous(path).unlink(missing_ok=True)
            try:
                os.link(path, previous(path))
            except OSError:  # a file system without hard links
                shutil.copyfile(path, previous(path))


def previous(path):
    return Path(path).with_suffix(".previous.pt")


def read_checkpoint(path, check_only=False):
    """-> the file's content, or None if it is missing or damaged; with check_only, True if it is whole.

    A checkpoint is a zip file, each entry with a CRC-32 that torch.load does not check. Its entries are
    never compressed: a file with a compressed one counts as damaged. Nothing in it is executed.
    """
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        return None
    except OSError as error:  # another copy would not help
        raise UserError(f"can't read {path}: {error.strerror}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
            if not stored or archive.testzip() is not None:
                return None
        return check_only or torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can make the decoders raise anything
        if out_of_memory(error):
            raise
        return None


def load_checkpoint(path, made_by, settings=""):
    """-> the dict that `save_checkpoint` wrote, tensors on the CPU.

    made_by, settings: the script that writes this checkpoint, and with which settings. If the file is
    damaged, the previous checkpoint is used, and a line on stderr says so. Raises UserError if both are
    damaged, or if the checkpoint is missing or another script's.
    """
    path = Path(path)
    require(os.path.isfile(path),
            f"there is no checkpoint {path}: run `python {made_by}.py{settings} --out_dir={path.parent}` first")
    state = read_checkpoint(path)
    if state is None:
        state = read_checkpoint(previous(path))
        require(state is not None,
                f"{path} is truncated or damaged: put a good copy in its place, or delete it and "
                f"run {made_by}.py again")
        say(f"{path} is truncated or damaged: using the previous one, {previous(path)}")
    require(is_of(made_by, state),
            f"{path} is not a checkpoint of {made_by}.py: was another file copied over it?")
    return state


def is_of(made_by, state):
    return isinstance(state, dict) and state.get("made_by") == made_by and state.keys() >= CHECKPOINT[made_by]


def weights_checksum(state):
    """CRC-32 over the tensors of a state dict, to tell which weights something was made with."""
    crc = 0
    for tensor in state.values():
        crc = zlib.crc32(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def resume(path, config, model_args, free, changeable, made_by, **others):
    """The checkpoint at `path` to continue from, or None to begin a new run.

    config, model_args: this run's settings, as the checkpoint carries them.
    free: settings that may always change. changeable: settings that may change if --change names them.
    Settings that an older checkpoint lacks are compared if `OLDER` or `OLDER_CODES` has them. With --overwrite=True,
    only an unfinished run of the same command continues: its settings, and `others` in its checkpoint, must be
    the same.
    Raises UserError, which names the differences.
    """
    change = [name.strip() for name in config["change"].split(",") if name.strip()]
    unknown = [name for name in change if name not in changeable]
    require(not unknown, f"--change={config['change']}: {', '.join(unknown)} can't change during a run; "
                         f"these can: {', '.join(changeable)}")
    require(not (change and config["overwrite"]),
            "--overwrite=True begins anew, --change goes on: choose one")
    # torchrun restarts all processes after one died; on several nodes, not all may have counted it
    restarted = on_any_process(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")
    if not os.path.exists(path):
        return None
    new = {**model_args, **config}

    def different(state, *but):
        """-> {setting: (its value there, here)}"""
        older = OLDER | OLDER_CODES if state["model_args"].get("num_latents") else OLDER
        had = {**older, **state["model_args"], **state["config"]}
        old = {RENAMED.get(name, name): value for name, value in had.items()}
        return {k: (old[k], new[k]) for k in sorted((old.keys() & new.keys()) - {*but}) if old[k] != new[k]}

    if config["overwrite"]:
        for file in (path, previous(path)):
            state = read_checkpoint(file)
            if is_of(made_by, state):
                break
        else:
            return None
        same = TO_TRAIN_ON <= state.keys() and not different(state)
        same = same and all(state[key] == value for key, value in others.items())
        if not (same and (restarted or state["step"] * config["batch_size"] < config["total_images"])):
            return None
        if file != path:
            say(f"{path} is truncated or damaged: using the previous one, {previous(path)}")
        return state
    state = load_checkpoint(path, made_by)
    have = "weights" if "model" in state else "the averaged weights"
    require(TO_TRAIN_ON <= state.keys(),
            f"{path} has {have} alone, for sampling: training can't continue from it. Choose another --out_dir, "
            f"where stage 1 can start from it by --init_from={path}, or start anew with --overwrite=True")
    changed = different(state, *free, *change)
    names = ",".join([*change, *changed])
    may_change = set(changed) <= set(changeable)
    goes_on = f"say --change={names} to continue with the new values, " if may_change else ""
    changes = "; ".join(f"{k}={there!r} there, {here!r} here" for k, (there, here) in changed.items())
    require(not changed, f"{path} is from a run with other settings ({changes}): "
                         f"{goes_on}choose another --out_dir, or start anew with --overwrite=True")
    return state


def read_log(path, images):
    """The lines of a training log up to this number of images, without one that a crash cut off."""
    lines = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        try:
            if json.loads(line)["images"] <= images:
                lines.append(line)
        except (ValueError, LookupError, TypeError):
            break
    return lines


def write_log(path, lines, mode="a"):
    """Appends lines to a training log; mode "w" writes it anew. Raises UserError on a full disk."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode) as f:
            f.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None
