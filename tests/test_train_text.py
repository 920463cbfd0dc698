"""Text to codes: a step in numbers, runs that go on, several processes, prompts, weights of LLaDA, mistakes."""
import shutil

import numpy as np
import pytest
import torch
from conftest import checkpoint, log_of, same, same_training
from scripts import TEXT, Script, outputs, run, start_together

from configurator import UserError
from trained import load_stage1, load_text


@pytest.fixture
def folder(trained, tmp_path):
    """With a trained stage 1, and what its encoder says."""
    for path in (trained / "stage1.pt", *trained.glob("logits-*.npy")):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_what_a_step_is_given(folder, monkeypatch):
    """Codes with the class behind them; captions of the images; times spread evenly; shares of kept and dropped."""
    script = Script("train_text.py", "default", folder, "cpu", *TEXT, "--batch_size=2000", "--batch_gpu=1000",
                    "--kept=0.3", "--dropped=0.2")
    given, loss = [], script.run.model.loss

    def recording(*arguments):
        given.append(arguments)
        return loss(*arguments)

    monkeypatch.setattr(script.run.model, "loss", recording)
    mean = script.gradients(7).item()
    assert [len(z) for z, *_ in given] == [1000, 1000]
    z, t, u, kept, dropped = (torch.cat([arguments[i] for arguments in given]) for i in (0, 2, 3, 4, 5))
    indices = script.run.batches.take(7 * 2000, 2000)
    assert torch.equal(z[:, 3], torch.from_numpy(script.run.labels[indices])) and z[:, :3].max() == 4
    text = bytes(token for token in given[0][1][5].tolist() if token >= 0).decode()
    captions = script.run.captions
    assert text in captions.draw(np.full(500, indices[5]), np.random.default_rng(0).random((500, 3)))
    assert not captions.unseen()[indices].any() and captions.unseen()[script.run.unseen_indices].all()
    steps = t.sort().values.diff()
    assert torch.allclose(steps, torch.full_like(steps, 1 / 2000), atol=1e-6) and 0 <= t.min() and t.max() < 1
    assert kept.double().mean().item() == pytest.approx(0.3, abs=0.04)
    assert dropped.double().mean().item() == pytest.approx(0.2, abs=0.04) and not (kept & dropped).any()
    assert u.shape == (2000, 4 + 1 + 64)
    lengths = torch.cat([(arguments[1] >= 0).sum(1) for arguments in given]) * ~(kept | dropped)
    tokens = 4 + lengths.double().mean().item()  # to predict; each costs the same: the network starts uniform
    assert mean == pytest.approx(tokens * np.log(257 + 1 + 10), rel=0.1)
    script.gradients(8)
    assert not torch.equal(given[0][2], given[2][2])


def test_parts_of_a_batch_and_rates(folder):
    """A batch in parts has the gradients of a whole one; the rate warms up, then falls by a cosine to 0."""
    norms = []
    for most in (40, 10):
        script = Script("train_text.py", "default", folder, "cpu", *TEXT, f"--batch_gpu={most}", "--total_images=400")
        script.gradients(3)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in script.parameters]).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    rates = []
    for step in range(11):
        script.gradients(step)
        script.update(step)
        rates.append(script.optimizer.param_groups[0]["lr"] / 4e-3)
    assert rates == pytest.approx([0, 1, *(0.5 + 0.5 * np.cos(np.pi * i / 8) for i in range(9))])


def test_a_resumed_run_equals_an_undisturbed_one(written, folder):
    """To the bit. (Shorter runs warm up by the same rates.)"""
    whole, settings = written[0], [f"--out_dir={folder}", *TEXT]
    run("train_text.py", *settings, "--total_images=40")
    for images in (80, 160):
        run("train_text.py", *settings, f"--total_images={images}", "--change=total_images")
    assert same_training(checkpoint(whole, "text.pt"), checkpoint(folder, "text.pt"))
    assert not same(checkpoint(whole, "text.pt")["ema"], checkpoint(folder, "text.pt")["model"])
    with pytest.raises(UserError, match="total_images=160 there, 200 here.*say --change=total_images"):
        run("train_text.py", *settings, "--total_images=200")
    lines = log_of(whole / "text.jsonl")
    assert [line["images"] for line in lines] == [40, 80, 120, 160]
    assert all(line.keys() == {"images", "loss", "held_out_bits", "grad_norm", "lr", "skipped", "images_per_second"}
               for line in lines)


def test_what_is_printed(written):
    folder, printed = written
    lines = printed.splitlines()
    assert lines[0].startswith("8,022 images to train on, such as 'a dark ankle boot'; ")
    bits = {line[:37].strip(): float(line[37:].split()[0]) for line in lines if line.startswith("  ")}
    uniform = 3 * np.log2(5) + np.log2(10)
    assert bits["given no caption"] == pytest.approx(uniform, rel=0.1) and len(bits) == 4
    assert lines[-1] == f"{folder}/text.pt is ready; next: python sample.py --out_dir={folder} --prompt=\"a dark ankle boot\""
    assert "is finished" in run("train_text.py", f"--out_dir={folder}", *TEXT)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_do_what_one_does(written, folder, fsdp):
    """Also if they share the parameters, and if a run goes on that one process began."""
    settings = ["train_text.py", f"--out_dir={folder}", *TEXT, f"--fsdp={fsdp}", "--batch_gpu=20"]
    outputs(start_together(2, *settings))
    one, two = checkpoint(written[0], "text.pt"), checkpoint(folder, "text.pt")
    for part in ("model", "ema"):
        assert all(torch.allclose(one[part][name], p, atol=2e-3) for name, p in two[part].items())
    moments = [state["optimizer"]["state"][0]["exp_avg"] for state in (one, two)]
    assert moments[0].shape == moments[1].shape
    model = load_text(folder, "cpu", load_stage1(folder)[1])[0]
    assert not model.training and same(dict(model.state_dict()), two["ema"])
    shutil.copy(written[0] / "text.pt", folder)
    if fsdp:
        outputs(start_together(2, *settings, "--total_images=240", "--change=total_images"))
        assert checkpoint(folder, "text.pt")["step"] == 6
