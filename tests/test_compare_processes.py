"""Processes with codes and without: what is run, what is kept, what the tables and the picture say."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import run
from test_compare_models import aged, scripts_in

import compare_models
import compare_processes
from configurator import UserError


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """With the other scripts replaced by some that only write their files -> a list of what is run."""
    commands = []

    def fake(script, *arguments):
        settings = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--"))
        commands.append((script, settings))
        folder = compare_processes.Path(settings.get("out_dir", ""))
        folder.mkdir(parents=True, exist_ok=True)
        if script in ("train_stage1.py", "train_prior.py"):
            path = folder / ("stage1.pt" if "stage1" in script else "prior_ar.pt")
            if not path.exists():
                torch.save(dict(made_by="train_stage1", config={"dataset": "set"}, model_args={}, step=1, ema={"w": torch.ones(2)}), path)
                aged(path, age=1000)
        elif script == "sample.py":
            (folder / f"{settings['name']}.npz").write_text("")
            aged(folder / f"{settings['name']}.npz", age=500)
        elif script == "trajectories.py":
            found = {}
            for name in settings["runs"].split(","):
                plain = "-plain-" in name
                levels = {f"{s:g}": [1.0 if plain else 1 / (1 + s), 0] for s in (0.1, 1, 10)}
                errors = {f"{n}": [2 / n if plain else 1 / n, 0] for n in (3, 5, 9, 18)}
                found[name + ", oracle codes" * (not plain)] = {"loss": levels, "sampling error": errors}
            (folder / "trajectories.json").write_text(json.dumps(found))
        else:
            images = compare_processes.Path(settings["images"])
            ode, steps, _ = images.stem.rsplit("-", 2)
            seed = int(images.parent.name[-1])
            value = (10 if "-plain-" in images.parent.name else 5 + seed) / int(steps) * (2 if ode == "flow-heun" else 1)
            images.with_suffix(".classifier.json").write_text(json.dumps({"FD-classifier": value}))

    for module in (compare_models, compare_processes):
        monkeypatch.setattr(module, "run", fake)
    monkeypatch.setattr(compare_processes, "out_dir", str(tmp_path))
    return commands


def test_what_is_run(commands, tmp_path, monkeypatch):
    compare_processes.main()
    assert len(compare_processes.ARMS) == 6
    bases, models = 6 * 2, (6 * 2 + 2) * 2
    assert scripts_in(commands) == {"train_stage1.py": bases + models, "train_prior.py": models - 6 * 2, "trajectories.py": 12,
                                    "sample.py": (models + 2 * 2) * 3, "eval_fid.py": (models + 2 * 2) * 3}
    assert {s["num_images"] for script, s in commands if script == "trajectories.py"} == {"64"}
    trained = {settings["out_dir"][len(str(tmp_path)) + 1:]: settings for script, settings in commands if script == "train_stage1.py"}
    of_flow = [trained[f"flow-{name}-seed1"] for name in ("base-24000", "plain-24000+12000", "codes-24000+12000")]
    assert [s["process"] for s in of_flow] == ["flow"] * 3 and [s.get("num_latents") for s in of_flow] == ["0", "0", None]
    assert [s["seed"] for s in of_flow] == ["1", "1001", "1001"] and {s["init_from"] for s in of_flow[1:]} == {f"{tmp_path}/flow-base-24000-seed1"}
    for one, other, cause in (("edm-attended", "edm-null", {"null_token": "True"}),
                              *((f"edm12-{model}", f"monotonic-{model}", {"weighting": "edm-monotonic"}) for model in ("plain", "codes"))):
        a, b = ({k: v for k, v in trained[f"{name}-24000+12000-seed0"].items() if k not in ("out_dir", "init_from")} for name in (one, other))
        assert b == a | cause and a != b  # one cause for each difference
    assert trained["edm-null-24000+12000-seed0"]["latents_to_emb"] == "False"
    assert {trained[f"{arm}-base-24000-seed0"].get("P_mean") for arm in ("edm12", "monotonic")} == {"-1.2"}
    commands.clear()
    compare_processes.main(["--arms=edm, flow,edm12,edm,pfgm32,pfgm512,monotonic"])  # the scripts that train see themselves that they are done
    assert scripts_in(commands) == {"train_stage1.py": bases + models, "train_prior.py": models - 6 * 2}
    commands.clear()
    monkeypatch.setattr(compare_processes, "num_held_out", 96)
    compare_processes.main(["--arms=flow"])  # other images: measured anew
    assert [s["num_images"] for script, s in commands if script == "trajectories.py"] == ["96"] * 2


def test_the_tables_and_the_picture(commands, tmp_path):
    compare_processes.main(["--arms=edm,flow"])
    lines = (tmp_path / "compare_processes.txt").read_text().splitlines()
    assert lines[0] == ("set: 24,000 training images, then 12,000 more of each model; FD of 1,000 samples, errors and losses of 64 "
                        "held-out images; +-: standard deviation over seeds (0, 1)")
    assert lines[2].startswith("FD-classifier: ") and lines[3].split() == ["5", "9", "35"]
    rows = [line[:44].strip() for line in lines[4:16]]
    assert rows == ["EDM                     plain", "EDM                     codes", "ratio to plain", "EDM                     attended codes",
                    "ratio to plain", "EDM                     with a null token", "ratio to plain", "flow matching           plain", "flow matching           codes", "ratio to plain",
                    "flow matching, its ODE  plain", "flow matching, its ODE  codes"]
    assert lines[4].split()[-3:] == "0.556 +- 0".split() and lines[5].split()[-3:] == "0.306 +- 0.04".split()
    assert lines[6].split()[-2:] == ["0.500", "0.600"] and lines[15].split()[-3:] == "0.611 +- 0.08".split()
    assert lines[16].split()[-2:] == ["0.500", "0.600"]  # to plain, by the same ODE
    loss = next(i for i, line in enumerate(lines) if line.startswith("loss: "))
    assert lines[loss + 1].split() == ["0.1", "1", "10"] and lines[loss + 4].split()[-2:] == ["0.091", "0.091"]
    picture = np.array(Image.open(tmp_path / "compare_processes.png").convert("L"))
    assert min(picture.shape) > 700 and picture.std() > 10


@pytest.mark.parametrize("argument, message", [
    ("--arms=edm,ddpm", "--arms are some of edm,pfgm512,pfgm32,flow,edm12,monotonic, not ddpm"), ("--seeds=()", "seeds takes different"),
    ("--base_images=0", "must be positive"), ("--num_images=9", "10 or more"), ("--num_held_out=63", "two parts or more, of 32"), ("--num_held_out=32", "two parts or more, of 32"), ("--num_steps=(0,)", "num_steps are positive")])
def test_mistakes_are_told(argument, message):
    with pytest.raises(UserError, match=message):
        run("compare_processes.py", argument)
