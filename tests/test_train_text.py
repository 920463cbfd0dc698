"""Text to codes: a step in numbers, runs that go on, several processes, mistakes."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, fill, log_of, same, same_training
from scripts import SAMPLE, TEXT, Script, outputs, run, start_together
from vaes import safetensors

from configurator import UserError
from llada import LLaDA
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


def test_clipping_averages_and_flips(folder, monkeypatch):
    """Adam's first moment is a tenth of gradients of the norm grad_clip at most; at step n the average keeps
    (1 + n) / (10 + n) of itself, at most ema_decay; half of the images are mirrored if stage 1's were."""
    script = Script("train_text.py", "default", folder, "cpu", *TEXT, "--batch_size=400", "--batch_gpu=400",
                    "--grad_clip=0.5", "--ema_decay=0.9", "--warmup_images=400", "--total_images=4000")
    assert script.averages_of_ones([0]) == pytest.approx([0.9]) and script.averages_of_ones([2]) == pytest.approx([0.75])
    assert script.averages_of_ones([1000] * 2) == pytest.approx([0.1, 0.19])
    count = sum(p.numel() for p in script.parameters)
    for norm, clipped in ((3.0, 0.5), (0.2, 0.2)):
        script.optimizer.state.clear()
        for p in script.parameters:
            p.grad = torch.full_like(p, norm / count ** 0.5)
        assert script.update(0).item() == pytest.approx(norm, rel=1e-4)
        moments = torch.cat([state["exp_avg"].flatten() for state in script.optimizer.state.values()])
        assert moments.norm().item() == pytest.approx(0.1 * clipped, rel=1e-4)
    flips = []
    monkeypatch.setitem(script.all, "codes_of", lambda run, indices, gumbel, flip: flips.append(flip) or torch.zeros(
        400, 4, dtype=torch.int64))
    for script.run.flips in (1, 2):
        script.gradients(0)
    assert not flips[0].any() and flips[1].double().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("given", ["own", "a wrong", "no"])
def test_bits_are_the_averages(folder, monkeypatch, given):
    """Of the images' codes and classes, with the images' captions, those of the images before, or as many masks."""
    script = Script("train_text.py", "default", folder, "cpu", *TEXT)
    indices, seen = script.run.train_indices[:300], []
    monkeypatch.setattr(script.run.ema, "nats", lambda z, said, g, draws: seen.append((z, said)) or z[:, 3] * math.log(2))
    mean, error = script.bits(indices, given)
    classes = script.run.labels[indices]
    assert mean == pytest.approx(classes.mean()) and error == pytest.approx(classes.std() / 300 ** 0.5)
    assert [row[3] for z, _ in seen for row in z.tolist()] == classes.tolist()
    said = [[token for token in row if token >= 0] for _, part in seen for row in part.tolist()]
    words = np.random.default_rng(0).random((300, 3))
    captions = script.run.captions.draw(np.roll(indices, given == "a wrong"), words)
    assert said == [[256] * len(text) if given == "no" else list(text.encode()) for text in captions]


def test_weights_and_tokenizer_of_llada(folder):
    """Where a run starts, and what is sampled with."""
    net = LLaDA(501, layers=1, dim=16, heads=2, hidden=24)
    state = {name: fill(name, p.shape) for name, p in net.named_parameters()}
    path = folder / "llada.safetensors"
    path.write_bytes(safetensors({f"model.transformer.{name}": p for name, p in state.items()}))
    reference = json.loads((ROOT / "tests/reference/bpe_tiny.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(reference["tokenizer"]))
    run("train_text.py", f"--out_dir={folder}", *TEXT, f"--init_from={path}", f"--tokenizer={folder}/tokenizer.json",
        "--vocabulary=501", "--mask_token=500", "--place_embedding=False", "--lr=1e-9", "--total_images=40")
    found = checkpoint(folder, "text.pt")
    for part in ("model", "ema"):
        assert all(torch.allclose(found[part][name][:len(p)], p, atol=1e-6) for name, p in state.items())
    (folder / "tokenizer.json").unlink()
    tokenizer = load_text(folder, "cpu", load_stage1(folder)[1])[1]
    assert [tokenizer.encode(text) for text in reference["texts"]] == reference["ids"]
    assert "are ready" in run("sample.py", f"--out_dir={folder}", *SAMPLE, "--prompt=a dark coat")


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
    bits = [[line["held_out_bits"] for line in log_of(path / "text.jsonl")] for path in (written[0], folder)]
    assert bits[0] == pytest.approx(bits[1], abs=2e-4)
    moments = [state["optimizer"]["state"][0]["exp_avg"] for state in (one, two)]
    assert moments[0].shape == moments[1].shape
    model = load_text(folder, "cpu", load_stage1(folder)[1])[0]
    assert not model.training and same(dict(model.state_dict()), two["ema"])
    shutil.copy(written[0] / "text.pt", folder)
    if fsdp:
        outputs(start_together(2, *settings, "--total_images=240", "--change=total_images"))
        assert checkpoint(folder, "text.pt")["step"] == 6


@pytest.mark.parametrize("arguments, message", [
    (["--mask_token=100"], "mask_token 100 is a byte, which captions may have: it must be 256 at least"),
    (["--vocabulary=256"], "the tokenizer has tokens up to 255, and mask_token is 256: vocabulary 256 must be larger"),
    (["--kept=0.7", "--dropped=0.4"], "kept 0.7 and dropped 0.4 are probabilities: their sum is at most 1"),
    (["--heads=3"], "each head's width must be an even number, for rotary positions: 16 / 3 is not"),
    (["--ema_decay=1"], "ema_decay must be below 1"),
    (["--captions=nowhere.txt"], "can't read nowhere.txt: No such file"),
    (["--init_from=nowhere"], "there are no weights nowhere")])
def test_bad_settings(folder, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_text.py", f"--out_dir={folder}", *TEXT, *arguments)
    assert "\n" not in str(error.value) and not (folder / "text.pt").exists()


def test_captions_of_ones_own(folder):
    """What is read is known by its content: a run goes on with a copy, and not with other captions."""
    said = folder / "captions.txt"
    said.write_bytes(b"\xef\xbb\xbf" + "a coat\tAN É\r\n".encode() * 10_000)
    settings = [f"--out_dir={folder}", *TEXT]
    printed = run("train_text.py", *settings, f"--captions={said}", "--total_images=40")
    assert "9,984 images to train on, such as 'a coat'" in printed and "unseen" not in printed
    assert printed.endswith(f"next: python sample.py --out_dir={folder} --prompt=\"a coat\"\n")
    copy = said.rename(folder / "copy.txt")
    run("train_text.py", *settings, f"--captions={copy}", "--total_images=80", "--change=total_images")
    assert checkpoint(folder, "text.pt")["step"] == 2
    copy.write_text("a coat\n" * 10_000)
    with pytest.raises(UserError, match="captions_identity=.*--overwrite=True"):
        run("train_text.py", *settings, f"--captions={copy}", "--total_images=80", "--change=total_images")
    copy.write_text('a coat of 5"\n' * 10_000)  # not a prompt to type
    assert "--prompt=\"...\"" in run("train_text.py", *settings, f"--captions={copy}", "--overwrite=True", "--total_images=40")
