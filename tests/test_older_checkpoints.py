"""Checkpoints of before the channels of qkv were sorted, in which q, k and v are interleaved, as EDM has them."""
import torch
from scripts import TINY, run

from model import DisCoDiff
from trained import load_stage1
from unet import from_edm, num_heads


def interleaved(state):
    """The inverse of `from_edm`."""
    return {name: t.unflatten(0, (3, num_heads(len(t) // 3), -1)).movedim(0, 2).flatten(0, 2)
            if ".qkv." in name and name.startswith("model.") else t for name, t in state.items()}


def make_older(path):
    """Rewrites a checkpoint as it would have been."""
    state = torch.load(path)
    names = [name for name, _ in DisCoDiff(**state["model_args"]).named_parameters()]
    for part in ("model", "ema"):
        state[part] = interleaved(state[part])
    for i, moments in state["optimizer"]["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = interleaved({names[i]: moments[key]})[names[i]]
    del state["qkv"]
    torch.save(state, path)
    return state


def test_they_are_sampled_from_and_trained_on(trained, tmp_path):
    settings = [*TINY, "--log_every=24"]
    for images in (24, 48):
        run("train_stage1.py", f"--out_dir={tmp_path / 'older'}", *settings, f"--total_images={images}")
        older = make_older(tmp_path / "older" / "stage1.pt")
    whole = torch.load(trained / "stage1.pt")
    sorted_again = [from_edm(older["model"]), from_edm(older["ema"]), load_stage1(tmp_path / "older")[0].state_dict()]
    for state, wanted in zip(sorted_again, (whole["model"], whole["ema"], whole["ema"])):
        assert any(not torch.equal(older["model"][name], state[name]) for name in state if ".qkv.weight" in name)
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
