"""Plain EDM and DisCo-Diff side by side: what is run, and what the table says."""
import json
import os

import pytest
import torch
from scripts import early, run

import compare_models
from configurator import UserError


def test_a_comparison_is_made_once(tmp_path, monkeypatch):
    """With the other scripts replaced: what is run, what is not run again, and what the table says."""
    commands, values = [], iter(range(100))

    def fake(script, *arguments):
        settings = dict(a[2:].split("=", 1) for a in arguments if a)
        commands.append((script, settings))
        if script == "train_stage1.py":
            folder = compare_models.Path(settings["out_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "stage1.pt").exists():
                torch.save(dict(made_by="train_stage1", config={"dataset": "set"}, model_args={}, step=1, ema={"w": torch.ones(2)},
                                model={}, optimizer={}), folder / "stage1.pt")
            (folder / "stage1.jsonl").write_text("{}\n")
        elif script == "train_prior.py":
            path = compare_models.Path(settings["out_dir"]) / "prior_ar.pt"
            if not path.exists():
                torch.save(dict(made_by="train_prior", config={}, model_args={}, step=1, ema={}, encoder=0), path)
        elif script == "sample.py":
            compare_models.Path(f"{settings['out_dir']}/{settings['name']}.npz").write_text("")
        else:
            result = compare_models.Path(settings["images"]).with_suffix(".classifier.json")
            result.write_text(json.dumps({"FD-classifier": 100.0 - next(values), "NFE": 35.0, "count": 7, "seconds per image": 1.0}))
            os.utime(result, (result.stat().st_mtime + 1,) * 2)

    monkeypatch.setattr(compare_models, "run", fake)
    monkeypatch.setattr(compare_models, "out_dir", str(tmp_path))
    compare_models.main()
    assert [script for script, _ in commands].count("sample.py") == 14 and [s for s, _ in commands].count("eval_fid.py") == 14
    trained = [(s["seed"], s.get("num_latents"), s["total_images"]) for script, s in commands if script == "train_stage1.py"]
    assert trained == [("0", "0", "100000"), ("0", None, "100000"), ("1", "0", "100000"), ("1", None, "100000")]
    assert [s["encode"] for _, s in commands if "encode" in s] == ["set", "set"]
    table = (tmp_path / "compare_models.txt").read_text().splitlines()
    assert table[2].split() == ["plain", "EDM", "96.500", "+-", "4.950", "35"]  # 100 and 93
    commands.clear()
    compare_models.main()
    assert {script for script, _ in commands} == {"train_stage1.py", "train_prior.py"}


def test_a_failure_ends_it():
    process, _ = early("test_a_failure_ends_it")
    _, errors = process.communicate()
    assert process.returncode == 2 and errors.count("\n") == 1 and "nowhere.py" in errors


@pytest.mark.parametrize("argument", ["--seeds=()", "--seeds=(-1,)", "--seeds=(1, 1)", "--total_images=0", "--num_images=9", "--features=vgg"])
def test_mistakes_are_told(argument):
    with pytest.raises(UserError, match=argument[2:].split("=")[0]):
        run("compare_models.py", argument)
