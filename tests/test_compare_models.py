"""Plain EDM and DisCo-Diff from one start: what is run, what is kept, and what the tables say."""
import json
import os
import time

import pytest
import torch
from scripts import early, run

import compare_models
from configurator import UserError


def aged(path, age):
    """Gives a file this age, in seconds."""
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """With the other scripts replaced by some that only write their files -> a list of what is run."""
    commands, values = [], iter(range(100))

    def fake(script, *arguments):
        settings = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--"))
        commands.append((script, settings | {"config": [a for a in arguments if a and not a.startswith("--")]}))
        folder = compare_models.Path(settings.get("out_dir", ""))
        if script == "train_stage1.py":
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "stage1.pt").exists():
                torch.save(dict(made_by="train_stage1", config={"dataset": "set"}, model_args={}, step=1, ema={"w": torch.ones(2)},
                                model={}, optimizer={}), folder / "stage1.pt")
                aged(folder / "stage1.pt", age=10)
        elif script == "train_prior.py":
            if not (folder / "prior_ar.pt").exists():
                torch.save({}, folder / "prior_ar.pt")
                aged(folder / "prior_ar.pt", age=10)
        elif script == "sample.py":
            (folder / f"{settings['name']}.npz").write_text("")
            aged(folder / f"{settings['name']}.npz", age=8)
        elif script == "trajectories.py":
            arms = {r + source: i + 1 for r in settings["runs"].split(",")
                    for i, source in enumerate((", oracle codes", ", codes of the prior", ", null codes") if "disco" in r else ("",))}
            of_steps = {arm: {f"{n}": [i / n, 0.0] for n in (3, 5, 9, 18)} for arm, i in arms.items()}
            found = {arm: {} if "null" in arm else {"sampling error": of_arm} for arm, of_arm in of_steps.items()}
            (folder / "trajectories.json").write_text(json.dumps(found))
        else:
            images = compare_models.Path(settings["images"])
            nfe = 2.0 * int(images.stem.split("-")[2]) - 1
            row = {"features": "some", "FD-classifier": 100.0 - next(values), "KID": 0.5, "KID se": 0.1, "NFE": nfe, "seconds per image": 1.0}
            images.with_suffix(".classifier.json").write_text(json.dumps(row))

    monkeypatch.setattr(compare_models, "run", fake)
    monkeypatch.setattr(compare_models, "out_dir", str(tmp_path))
    return commands


def scripts_in(commands):
    names = [script for script, _ in commands]
    return {script: names.count(script) for script in names}


def test_a_comparison_is_made_once(commands, tmp_path):
    compare_models.main(["--seeds=(0,)"])
    assert scripts_in(commands) == {"train_stage1.py": 3, "train_prior.py": 1, "trajectories.py": 1, "sample.py": 8, "eval_fid.py": 8}
    base, plain, disco = (settings for script, settings in commands if script == "train_stage1.py")
    assert base == dict(total_images="100000", seed="0", num_latents="0", out_dir=f"{tmp_path}/base-100000-seed0", config=["config/finetune.py"])
    assert disco == dict(total_images="50000", seed="1000", init_from=base["out_dir"], out_dir=f"{tmp_path}/disco-100000+50000-seed0",
                         config=["config/finetune.py"])
    assert plain == disco | dict(num_latents="0", out_dir=f"{tmp_path}/plain-100000+50000-seed0")
    samples = [settings for script, settings in commands if script == "sample.py"]
    assert [(s["encode"], s["num_steps"], s["out_dir"]) for s in samples if "encode" in s] == [("set", "18", disco["out_dir"])]
    commands.clear()
    compare_models.main()  # the other two seeds; of the first, training alone, which says that it is finished
    assert scripts_in(commands) == {"train_stage1.py": 9, "train_prior.py": 3, "trajectories.py": 2, "sample.py": 16, "eval_fid.py": 16}
    commands.clear()
    compare_models.main()
    assert scripts_in(commands) == {"train_stage1.py": 9, "train_prior.py": 3}
    for path in tmp_path.rglob("*"):
        aged(path, age=100 + 100 * (path.suffix == ".pt") - 50 * (path.suffix == ".json"))
    aged(tmp_path / "disco-100000+50000-seed1" / "prior_ar.pt", age=20)
    commands.clear()
    compare_models.main()  # what was made of another prior is made again
    assert scripts_in(commands) == {"train_stage1.py": 9, "train_prior.py": 3, "trajectories.py": 1, "sample.py": 4, "eval_fid.py": 4}


def test_the_tables(commands, tmp_path):
    """Of seed s the FDs are 100 - 8 s, 99 - 8 s, ..., row by row; sampling errors are 1 / steps, doubled by the prior's codes."""
    compare_models.main(["--seeds=(0,1)"])
    lines = (tmp_path / "compare_models.txt").read_text().splitlines()
    assert lines[0] == ("set: 100,000 training images, then 50,000 more of each model, 2,000 samples per row, seeds (0, 1); "
                        "+-: standard deviation")
    assert lines[2].split() == ["NFE", "FD-classifier", "KID", "ratio,", "for", "each", "seed"]
    assert lines[3][:32].strip() == "plain EDM, at the start" and lines[4][:32].strip() == "plain EDM, trained on"
    assert lines[4][32:].split() == "35 95.0000 +- 5.6569 0.5000 +- 0.0000 1.000 1.000".split()  # 99 and 91
    assert lines[7][:32].strip() == "DisCo-Diff, codes of the prior"  # with 9 steps: 95 and 87, against 98 and 90
    assert lines[8].split() == f"17 91.0000 +- 5.6569 0.5000 +- 0.0000 {95 / 98:.3f} {87 / 90:.3f}".split()
    assert len(lines) == 3 + 8 + 2 + 8
    assert lines[12].split()[:3] == ["NFE", "sampling", "error"]
    assert lines[18].split() == f"17 {2 / 9:.4f} +- 0.0000 2.000 2.000".split()


def test_both_models_from_scratch(commands, tmp_path):
    compare_models.main(["--seeds=(3,)", "--base_images=0", "--stage1_config="])
    trained = [settings for script, settings in commands if script == "train_stage1.py"]
    assert [s.get("num_latents") for s in trained] == ["0", None] and not any("init_from" in s or s["config"] for s in trained)
    text = (tmp_path / "compare_models.txt").read_text()
    assert text.startswith("set: 50,000 training images of each model") and "at the start" not in text
    assert "+-" not in text.split("\n", 1)[1]  # one seed has no spread


def test_a_failure_ends_it():
    process, _ = early("test_a_failure_ends_it")
    _, errors = process.communicate()
    assert process.returncode == 2 and errors.count("\n") == 1 and "nowhere.py" in errors


@pytest.mark.parametrize("argument", ["--seeds=()", "--seeds=(-1,)", "--seeds=(1, 1)", "--base_images=-1", "--total_images=0", "--num_images=9",
                                      "--features=vgg"])
def test_mistakes_are_told(argument):
    with pytest.raises(UserError, match=argument[2:].split("=")[0]):
        run("compare_models.py", argument)
