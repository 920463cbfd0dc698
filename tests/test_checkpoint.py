"""Checkpoints and logs: damage, full disks, which ones are continued."""
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from scripts import start

import checkpoint
from checkpoint import previous as previous_of
from checkpoint import resume
from configurator import UserError


def test_a_checkpoint_is_read_back_and_damage_is_told(tmp_path):
    path = tmp_path / "stage1.pt"
    state = dict(made_by="train_stage1", config=dict(lr=0.1, mult=(1, 2)), model={"w": torch.randn(1000)}, ema={},
                 model_args={}, step=3, optimizer={})
    checkpoint.save_checkpoint(path, state)
    back = checkpoint.load_checkpoint(path, "train_stage1")
    assert torch.equal(back["model"]["w"], state["model"]["w"]) and back["config"] == state["config"]
    with pytest.raises(UserError, match="not a checkpoint of train_prior.py"):
        checkpoint.load_checkpoint(path, "train_prior")
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated or damaged"):
            checkpoint.load_checkpoint(path, "train_stage1")
    with pytest.raises(UserError, match=r"run `python train_stage1.py --out_dir=.*` first"):
        checkpoint.load_checkpoint(tmp_path / "no" / "stage1.pt", "train_stage1")


def test_a_checkpoint_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    with open(tmp_path / "stage1.pt", "wb") as f:
        torch.save({"made_by": "train_stage1", "x": Hostile()}, f)
    with open(tmp_path / "plain.pt", "wb") as f:
        pickle.dump(Hostile(), f)
    for file in ("stage1.pt", "plain.pt"):
        with pytest.raises(UserError):
            checkpoint.load_checkpoint(tmp_path / file, "train_stage1")
    assert not (tmp_path / "executed").exists()


def test_damage_is_detected_and_the_checkpoint_before_is_taken(tmp_path, capsys):
    """Truncated anywhere, or with bits flipped: what is read is what was written, or the one before."""
    path, rng = tmp_path / "stage1.pt", np.random.default_rng(0)
    for step in (1, 2):
        checkpoint.save_checkpoint(path, dict(made_by="train_stage1", config={}, model_args={}, step=step, ema={"w": torch.arange(3000) + step}))
    whole, taken = path.read_bytes(), []
    for i in range(300):
        broken = bytearray(whole)
        if i % 10:
            for at in rng.integers(0, len(whole), rng.integers(1, 4)):
                broken[at] ^= 1 << rng.integers(8)
        else:
            broken = broken[:rng.integers(len(whole))]
        path.write_bytes(broken)
        state, said = checkpoint.load_checkpoint(path, "train_stage1"), capsys.readouterr().err
        assert torch.equal(state["ema"]["w"], torch.arange(3000) + state["step"])
        if state["step"] == 1:
            assert said == f"{path} is truncated or damaged: using the previous one, {tmp_path / 'stage1.previous.pt'}\n"
        taken.append(state["step"])
    assert taken.count(1) > 200  # the rest: zip's padding and names that nothing reads
    path.write_bytes(whole[:100])
    checkpoint.save_checkpoint(path, dict(made_by="train_stage1", config={}, model_args={}, step=3, ema={}))
    assert torch.load(tmp_path / "stage1.previous.pt")["step"] == 1  # the damaged one did not replace it
    path.write_bytes(whole[:100])
    (tmp_path / "stage1.previous.pt").write_bytes(whole[:100])
    with pytest.raises(UserError, match="is truncated or damaged: put a good copy in its place"):
        checkpoint.load_checkpoint(path, "train_stage1")


def test_a_checkpoint_is_not_unpacked(tmp_path):
    """A zip of a few kilobytes that would become a gigabyte, and one with names that lead out of the folder."""
    checkpoint.save_checkpoint(tmp_path / "good.pt", dict(made_by="train_stage1", config={}, model_args={}, step=0, ema={}))
    for name, options in (("bomb", dict(compression=zipfile.ZIP_DEFLATED)), ("../out", {})):
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "stage1.pt", "w", **options) as archive:
            for entry in good.infolist():
                archive.writestr(entry.filename if name == "bomb" else f"../{entry.filename}", good.read(entry))
            archive.writestr(f"{name}/data/0", bytes(10 ** 7))
        with pytest.raises(UserError, match="truncated or damaged"):
            checkpoint.load_checkpoint(tmp_path / "stage1.pt", "train_stage1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.pt", "stage1.pt"] and not (tmp_path.parent / "out").exists()


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """The process may write files of 100 kB at most, as on a disk with so much room."""
    folder, program = tmp_path / "run", tmp_path / "fill.py"
    folder.mkdir()
    program.write_text(f"""
import resource, signal, sys, torch
sys.path.insert(0, ".")
import checkpoint
checkpoint.save_checkpoint({str(folder / 'c.pt')!r}, dict(made_by='x', w=torch.ones(10)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save_checkpoint({str(folder / 'c.pt')!r}, dict(made_by='x', w=torch.ones(1_000_000)))
except checkpoint.UserError as error:
    print(error)
""")
    printed, errors = start(program).communicate()
    assert "File too large" in printed and "untouched" in printed, errors
    assert torch.load(folder / "c.pt")["w"].sum() == 10
    assert [p.name for p in folder.iterdir()] == ["c.pt"]


def test_which_checkpoints_are_continued(tmp_path, capsys):
    """Of `resume` alone: what --overwrite=True makes of other, finished, damaged and strange checkpoints; settings of old ones."""
    config = dict(overwrite=True, change="", lr=1.0, batch_size=8, total_images=48)
    path = tmp_path / "stage1.pt"

    def resumed(**changes):
        return resume(path, config | changes, dict(m=3), ("total_images", "overwrite", "change"), ("lr",), "train_stage1", encoder=7)

    def write(file=path, **changes):
        torch.save(dict(made_by="train_stage1", config=config, model_args=dict(m=3), step=5, ema={}, model={}, optimizer={}, encoder=7)
                   | changes, file)
        return file

    assert resumed() is None
    write()
    assert resumed()["step"] == 5
    for changes in (dict(lr=2.0), dict(total_images=40), dict(total_images=100)):
        assert resumed(**changes) is None
    for other in (dict(model_args=dict(m=4)), dict(encoder=8), dict(config=config | dict(overwrite=False)), dict(made_by="train_prior"), dict(step=6)):
        write(**other)
        assert resumed() is None, other
    write(previous := previous_of(path), step=4)
    path.write_bytes(b"damaged")
    assert resumed()["step"] == 4 and "using the previous one" in capsys.readouterr().err
    assert resumed(lr=2.0) is None and not capsys.readouterr().err
    previous.write_bytes(b"damaged")
    assert resumed() is None
    write(config={key: value for key, value in config.items() if key != "lr"})  # from before there was such a setting
    assert resumed()["step"] == 5 and resumed(overwrite=False)["step"] == 5


# logs


def test_a_log_goes_on_after_the_checkpoint(tmp_path):
    """Lines up to its images, those of the same step too; what is later, or cut off, is written again."""
    lines = [f'{{"images": {images}}}' for images in (8, 16, 24, 32)]
    (tmp_path / "log").write_text("\n".join([*lines, '{"ima']))
    assert checkpoint.read_log(tmp_path / "log", 24) == lines[:3] and checkpoint.read_log(tmp_path / "log", 99) == lines
    assert checkpoint.read_log(tmp_path / "none", 24) == []


def test_a_log_with_foreign_lines_is_cut_there(tmp_path):
    for foreign in (b"5", b"{}", b"null", b'{"images": "a"}', b"\xff\0"):
        (tmp_path / "log").write_bytes(b'{"images": 8}\n' + foreign + b'\n{"images": 16}\n')
        assert checkpoint.read_log(tmp_path / "log", 100) == ['{"images": 8}']
