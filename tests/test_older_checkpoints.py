"""Checkpoints of before the channels of qkv were sorted, in which q, k and v are interleaved, as EDM has them; and of before
some settings."""
import pytest
import torch
from conftest import checkpoint, same_training
from scripts import SAMPLE, TINY, run

from configurator import UserError
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


def test_settings_that_they_lack_mean_what_was_done_then(tmp_path):
    """No codes in the embedding, no first phase of the encoder: with these settings they go on, with others they are refused."""
    settings = [*TINY, "--encoder_lr=5e-5"]
    then = [*settings, "--latents_to_emb=False", "--coarse_images=0"]
    for name in ("older", "whole"):
        run("train_stage1.py", f"--out_dir={tmp_path / name}", *then, f"--total_images={24 if name == 'older' else 48}")
    path = tmp_path / "older" / "stage1.pt"
    state = torch.load(path)
    del state["coarse"], state["model_args"]["latents_to_emb"]
    for name in ("latents_to_emb", "coarse_images", "coarse_batch", "coarse_lr", "coarse_spread"):
        del state["config"][name]
    torch.save(state, path)
    run("sample.py", f"--out_dir={tmp_path / 'older'}", *SAMPLE, "--code=0,1,2")
    for arguments, differences in ((settings, "coarse_images=0 there, 16 here; latents_to_emb=False there, True here"),
                                   ([*settings, "--coarse_images=0"], "latents_to_emb=False there, True here"),
                                   ([*settings, "--latents_to_emb=False"], "coarse_images=0 there, 16 here")):
        with pytest.raises(UserError) as error:
            run("train_stage1.py", f"--out_dir={tmp_path / 'older'}", *arguments)
        assert str(error.value) == (f"{path} is from a run with other settings ({differences}): choose another --out_dir, or start anew "
                                    "with --overwrite=True")
    run("train_stage1.py", f"--out_dir={tmp_path / 'older'}", *then)
    assert same_training(checkpoint(tmp_path / "older"), checkpoint(tmp_path / "whole"))
    assert not (tmp_path / "older" / "coarse.jsonl").exists()


def test_older_plain_runs_go_on(tmp_path):
    settings = [*TINY, "--num_latents=0", f"--out_dir={tmp_path}"]
    run("train_stage1.py", *settings, "--total_images=24")
    state = torch.load(tmp_path / "stage1.pt")
    del state["coarse"], state["model_args"]["latents_to_emb"], state["config"]["latents_to_emb"], state["config"]["coarse_images"]
    torch.save(state, tmp_path / "stage1.pt")
    run("train_stage1.py", *settings)
    assert checkpoint(tmp_path)["step"] == 6
