"""Codes against embeddings, and their lengths: what is run, what is kept, and what the tables say."""
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import run, write

import compare_conditions
import compare_lengths
import compare_models
import data
from configurator import UserError
from metrics import vendi_score


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """With the other scripts replaced by some that only write their files -> a list of what is run."""
    commands = []

    def fake(script, *arguments):
        settings = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--"))
        commands.append((script, settings))
        folder = Path(settings.get("out_dir", ""))
        if script == "train_stage1.py":
            state = dict(made_by="train_stage1", config=dict(dataset="set", held_out=4), model_args={}, step=1, ema={})
            write(folder / "stage1.pt")
            torch.save(state, folder / "stage1.pt")
            os.utime(folder / "stage1.pt", (time.time() - 10,) * 2)
            for images in range(1, 5) if "keep_every" in settings else ():
                write(folder / f"stage1-{images * int(settings['keep_every']):09d}.pt")
        elif script == "train_prior.py":
            write(folder / f"prior_{settings['prior']}.pt")
            lines = [dict(images=i * int(settings["log_every"]), images_per_second=50.0, held_out_bits=9.0 - i) for i in (1, 2)]
            write(folder / f"prior_{settings['prior']}.jsonl", "\n".join(map(json.dumps, lines)).encode())
        elif script == "probe.py":
            kind = {"embedding": dict(linear=0.25)} if "embedding" in str(folder) or "mlp" in str(folder) else \
                {"codes": dict(linear=0.75), "embedding": dict(linear=0.5)}
            write(folder / "probe.json", json.dumps(kind).encode(), age=5)
        elif script == "sample.py":
            write(folder / f"{settings['name']}.npz", age=4)
        elif script == "eval_fid.py":
            images = Path(settings["images"])
            row = {"FD-classifier": float(len(images.stem)), "KID": 0.5, "KID se": 0.1, "Vendi score": 2.0, "NFE": 35.0}
            write(images.with_suffix(".classifier.json"), json.dumps(row).encode(), age=2)

    images = np.arange(12, dtype=np.uint8)[:, None, None, None]
    monkeypatch.setattr(data, "load", lambda name: (images, np.arange(12) % 3, 3))
    for module in (compare_models, compare_conditions, compare_lengths):
        monkeypatch.setattr(module, "run", fake)
        monkeypatch.setattr(module, "out_dir", str(tmp_path))
    return commands


def test_conditions_are_compared_once(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_conditions, "features_of", lambda path, dataset: torch.eye(16).repeat_interleave(2, 0))
    compare_conditions.main(["--seeds=(0,)", "--pairs=2", "--per_pair=4"])
    names = [script for script, _ in commands]
    assert {script: names.count(script) for script in names} == {
        "train_encoder.py": 1, "train_stage1.py": 6, "train_prior.py": 5, "probe.py": 4, "sample.py": 15, "eval_fid.py": 11}
    encoder, *_ = (settings["out_dir"] for script, settings in commands if script == "train_encoder.py")
    models = {Path(s["out_dir"]).name.split("-1")[0]: s for script, s in commands if script == "train_stage1.py"}
    assert [models[m].get("codes") for m in ("plain", "class", "disco", "codes", "embedding", "random-mlp")] == \
        [None, None, None, encoder, encoder, encoder]
    assert models["random-mlp"]["conditioning"] == "random-mlp" and models["class"]["class_cond"] == "True"
    assert len({s["total_images"] for s in models.values()}) == 1
    samples = [s for script, s in commands if script == "sample.py"]
    assert sum("compose" in s for s in samples) == 4 and {s.get("prior") for s in samples} == {None, "ar", "sedd", "rdm"}

    text = (tmp_path / "compare_conditions.txt").read_text()
    lines = text.splitlines()
    assert lines[2].split() == ["linear", "probe", "FD-classifier", "KID", "Vendi", "score", "prior's", "seconds"]
    table = {line[:22].strip(): line[22:].split() for line in lines[3:14]}
    assert table["plain"] == ["9", "0.5", "2"] and table["codes, true"] == ["0.75", "9", "0.5", "2"]  # "none-2000"
    assert table["random-mlp, RDM"] == ["8", "0.5", "2", "8000"] and table["embedding, true"][0] == "0.25"
    rows = [json.loads(line) for line in (tmp_path / "compare_conditions.jsonl").read_text().splitlines()]
    assert len(rows) == 11 and sum(row["condition"] == "true" for row in rows) == 4
    first, second = (np.load(tmp_path / f"{name}-2.npz")["images"].flatten() for name in ("first", "second"))
    assert not {*first} & {*second} and (first % 3 != second % 3).all()  # of different classes
    for name in ("first", "second"):
        os.utime(tmp_path / f"{name}-2.npz", (time.time() - 10,) * 2)
    commands.clear()
    compare_conditions.main(["--seeds=(0,)", "--pairs=2", "--per_pair=4"])
    assert {script for script, _ in commands} == {"train_encoder.py", "train_stage1.py", "train_prior.py"}


def test_the_vendi_score_is_of_one_pair_at_a_time(commands, tmp_path, monkeypatch):
    """Sample i of pair p, in turn t (two single images, two compositions) is image 4 (2 i + p) + t."""
    x = torch.zeros(3, 2, 4, 5)
    x[..., 0] = 1
    x[:, 1, 2:] = torch.eye(5)[:3, None]  # compositions of the second pair: three that have nothing in common
    x[0, 0, :2], x[1, 0, :2] = torch.eye(5)[3], torch.eye(5)[4]  # single images of the first pair: likewise
    monkeypatch.setattr(compare_conditions, "features_of", lambda path, dataset: x.flatten(0, 2))
    monkeypatch.setattr(compare_conditions, "pairs", 2)
    monkeypatch.setattr(compare_conditions, "per_pair", 3)
    write(tmp_path / "model" / "stage1.pt")
    sources = compare_conditions.source_images("set", 4)
    for source in sources:
        os.utime(source, (time.time() - 10,) * 2)
    found = compare_conditions.composed(tmp_path / "model", sources, "set")
    assert found == {"single": pytest.approx([3, 1]), "composed": pytest.approx([1, 3])}
    assert commands[-1][1]["num_images"] == "24" and vendi_score(torch.eye(5)[:3]) == pytest.approx(3)


def test_lengths_are_compared_once(commands, tmp_path):
    compare_lengths.main(["--lengths=8,64", "--etas=0.0,0.05", "--total_images=400", "--sedd_images=1000"])
    encoders = [s for script, s in commands if script == "train_encoder.py"]
    assert [(s["num_latents"], s["codebook_size"]) for s in encoders] == [("8", "64"), ("64", "8")]
    samples = [s for script, s in commands if script == "sample.py"]
    assert sum("checkpoint" in s for s in samples) == 8 and sum("eta" in s for s in samples) == 6
    assert {s["seed"] for s in samples if "eta" in s} == {"0", "2000", "4000"} and len(samples) == 16
    lines = (tmp_path / "compare_lengths.txt").read_text().splitlines()
    assert lines[3].split() == "L x V L log2 V 100 200 300 400 SEDD 250 500".split()
    assert lines[5].split() == ["64", "x", "8", "192", *["26.0000"] * 4, "9.0000", "8.00", "7.00"]
    assert lines[-1].split()[:3] == ["eta", "=", "0.05"] and (tmp_path / "compare_lengths.png").stat().st_size > 1000
    commands.clear()
    compare_lengths.main(["--lengths=8,64", "--etas=0.0,0.05", "--total_images=400", "--sedd_images=1000"])
    assert {script for script, _ in commands} == {"train_encoder.py", "train_stage1.py", "train_prior.py"}


@pytest.mark.parametrize("script, argument", [
    ("compare_conditions.py", "--seeds=()"), ("compare_conditions.py", "--per_pair=1"), ("compare_conditions.py", "--pairs=0"),
    ("compare_conditions.py", "--features=vgg"), ("compare_lengths.py", "--lengths=7,"), ("compare_lengths.py", "--lengths=512,"),
    ("compare_lengths.py", "--etas=1.0,"), ("compare_lengths.py", "--num_images=3"), ("compare_lengths.py", "--features=vgg")])
def test_mistakes_are_told(script, argument):
    with pytest.raises(UserError, match=argument[2:].split("=")[0]):
        run(script, argument)


@pytest.mark.parametrize("module", [compare_conditions, compare_lengths])
def test_without_held_out_images_nothing_is_trained(module, commands, tmp_path):
    (tmp_path / "none.py").write_text("lr = 1e-3\nheld_out = 0\n")
    with pytest.raises(UserError, match="none.py, line 2: with held_out = 0 no images are left to measure codes on"):
        module.main([f"--stage1_config={tmp_path / 'none.py'}", f"--out_dir={tmp_path}"])
    assert not commands
    module.require_held_out("config/finetune.py")
    (tmp_path / "some.py").write_text("held_out = -1\n")
    module.require_held_out(str(tmp_path / "some.py"))
