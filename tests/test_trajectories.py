"""Trajectories of trained models: closed forms, which codes and noise each arm has, tables, mistakes."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import load
from PIL import Image
from scripts import TINY, run

import diffusion
import trajectories
from configurator import UserError
from data import to_float, to_uint8
from diffusion import heun
from noise import SeededNoise
from trained import load_prior, load_stage1, load_trained_on
from trajectories import NULL, ORACLE, PRIOR, denoisers, draw, levels, mean_and_error, measure, tables

QUICK = ["--num_images=8", "--batch_size=4", "--num_steps=2,4", "--reference_steps=8", "--sigmas=0.3,20.0", "--device=cpu"]


def test_one_gaussian(monkeypatch, g):
    """The error falls at second order, trajectories are straight, and the loss of the exact denoiser is 1."""
    monkeypatch.setattr(trajectories, "num_steps", (16, 32, 64))
    monkeypatch.setattr(trajectories, "reference_steps", 1024)
    noise, y, *n = (torch.randn(8, 3, 6, 6, generator=g, dtype=torch.float64) for _ in range(10))
    found = measure(lambda x, t: 0.25 * x / (0.25 + t ** 2), "", noise, 0.5 * y, torch.stack(n, 1), 0.5)
    first, second, third = found["sampling error"]
    assert 3 < first / second < 6 and 3 < second / third < 6 and third < 3e-3
    assert len(found["curvature"]) == 256 and max(found["curvature"][:200]) < 1e-6  # later, rounding bends them
    assert found["loss"] == pytest.approx([1] * 8, abs=0.15)
    assert {title: len(at) for title, at in levels().items()} == {title: len(values) for title, values in found.items()}


def test_what_each_source_of_codes_is_measured_by(monkeypatch, g):
    monkeypatch.setattr(trajectories, "reference_steps", 20)
    noise, y, *n = (torch.randn(2, 1, 2, 2, generator=g, dtype=torch.float64) for _ in range(10))
    found = {source: {*measure(lambda x, t: 0 * x, source, noise, y, torch.stack(n, 1), 0.5)} for source in (ORACLE, PRIOR, NULL)}
    assert found == {ORACLE: {*levels()}, PRIOR: {"sampling error", "curvature"}, NULL: {"loss"}}


def test_codes_and_classes_of_the_arms(trained):
    """Oracle codes and classes are the images' own; null codes are those of no image; the prior is told the same classes."""
    model, checkpoint = load_stage1(trained)
    prior = load_prior(trained, "ar", "cpu", checkpoint)
    images, labels, _, held_out = load_trained_on(checkpoint["config"], trained)
    chosen, seeds = held_out[:4], np.arange(4)
    arms = denoisers(model, prior, images, labels, chosen, seeds)
    assert [*arms] == [ORACLE, PRIOR, NULL] and [*denoisers(model, None, images, labels, chosen, seeds)] == [ORACLE, NULL]
    c, gumbel = torch.from_numpy(labels[chosen]), SeededNoise("codes", seeds).gumbel(3, 5)
    codes = (model.encoder(to_float(images[chosen])) + gumbel).argmax(2)
    x, sigma = 10 * torch.randn(4, 1, 28, 28), torch.tensor(10.0)
    for source, z, drop in ((ORACLE, codes, False), (NULL, codes, True),
                            (PRIOR, prior.sample(SeededNoise("codes", seeds), c), False)):
        want = model.denoise(x, sigma.expand(4), c, model.condition(z, torch.full((4,), drop)))
        torch.testing.assert_close(arms[source](x, sigma), want)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of plain EDM, without classes."""
    folder = tmp_path_factory.mktemp("plain")
    run("train_stage1.py", f"--out_dir={folder}", *TINY, "--num_latents=0", "--class_cond=False")
    return folder


def test_a_run(trained, plain, tmp_path):
    """Its files; a model beside its copy has the ratio 1; the noise is that of sample.py."""
    copy = shutil.copytree(plain, tmp_path / "copy")
    printed = run("trajectories.py", f"--runs={plain},{copy},{trained}", f"--out_dir={tmp_path}", *QUICK)
    text = (tmp_path / "trajectories.txt").read_text()
    assert text in printed and "nan" not in text
    letters = dict(line.split("  ") for line in text.splitlines()[1:6])
    assert letters == {"A": f"{plain}", "B": f"{copy}", "C": f"{trained}, {ORACLE}", "D": f"{trained}, {PRIOR}", "E": f"{trained}, {NULL}"}
    heads = [line.split("   ") for line in text.splitlines() if "B / A" in line]
    assert [[head.strip() for head in line if head.strip()] for line in heads] == [
        ["A", "B", "C", "D", "B / A", "C / A", "D / A"]] * 2 + [["A", "B", "C", "E", "B / A", "C / A", "E / A"]]
    assert text.count("1.00 +- 0") == 2 + 2 + 2  # numbers of steps, noise levels on the way, and of the loss
    found = json.loads((tmp_path / "trajectories.json").read_text())
    assert [*found] == [*letters.values()] and found[f"{plain}"] == found[f"{copy}"]
    assert [*found[f"{plain}"]["sampling error"]] == ["2", "4"] and [*found[f"{plain}"]["loss"]] == ["0.3", "20"]
    assert min(Image.open(tmp_path / "trajectories.png").size) > 600
    run("sample.py", f"--init_from={plain}", f"--out_dir={tmp_path}", "--device=cpu", "--num_images=8", "--num_steps=8")
    model, _ = load_stage1(plain)
    reference = heun(denoisers(model, None, None, None, None, None)[""], SeededNoise("images", range(8)).randn(1, 28, 28), 8)
    assert np.array_equal(to_uint8(reference), load(tmp_path)["images"])
    rms = [(heun(denoisers(model, None, None, None, None, None)[""], SeededNoise("images", part).randn(1, 28, 28), 2)
            - reference[part]).square().mean().sqrt().item() for part in (range(4), range(4, 8))]
    assert found[f"{plain}"]["sampling error"]["2"] == pytest.approx([np.mean(rms), abs(rms[0] - rms[1]) / 2])


def test_noise_is_of_the_models_process(tmp_path, monkeypatch):
    """Of PFGM++'s, stretched image by image, where trajectories start and in the loss."""
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--num_latents=0", "--process=pfgm++", "--pfgm_D=1")
    given = {"heun": [], "loss_at": []}
    for name, noise_at, function in (("heun", 0, diffusion.heun), ("loss_at", 1, diffusion.loss_at)):
        def recording(denoise, *rest, name=name, noise_at=noise_at, function=function, **options):
            given[name].append(rest[noise_at])
            return function(denoise, *rest, **options)

        monkeypatch.setattr(diffusion, name, recording)
    run("trajectories.py", f"--runs={tmp_path}", f"--out_dir={tmp_path}", *QUICK)
    noise, of_loss = (torch.cat(parts) for parts in given.values())
    assert torch.equal(noise[:4], load_stage1(tmp_path)[0].noise(SeededNoise("images", range(4))))
    assert all(n.square().mean((1, 2, 3)).log().std() > 1 for n in (noise, of_loss))  # of Gaussian noise, 0.05


def test_means_and_errors():
    parts = np.array([[1.0, 5.0], [3.0, 5.0]])
    assert mean_and_error(parts).tolist() == [[2, 1], [5, 0]]  # a standard deviation of sqrt(2), of two parts


def test_tables_have_ratios_of_parts():
    """Parts that differ a lot, with the same ratio: its error is 0. Also a source that has a loss alone."""
    first = np.outer([1.0, 3.0], np.ones(16))
    measured = {"x": {title: first[:, :len(at)] for title, at in levels().items()}, "y": {"loss": first[:, :8] / 4}}
    lines = tables(measured)
    assert lines[:2] == ["A  x", "B  y"] and sum("B / A" in line for line in lines) == 1
    assert lines[-1].split() == "80 2.00 +- 1 0.500 +- 0.2 0.250 +- 0".split()
    assert draw(measured).width > 1200


@pytest.mark.parametrize("changes, message", [
    (["--num_images=10"], "num_images 10 are two parts or more, of batch_size 4"),
    (["--num_images=4"], "two parts or more"),
    (["--num_images=20000"], "num_images is 20000: the data set has 10000"),
    (["--num_steps=(2, 8)"], "below reference_steps 8"),
    (["--num_steps=()"], "num_steps are positive"),
    (["--sigmas=(0.0, 1.0)"], "sigmas are positive"),
    (["--seed=-1"], "seed can't be negative"),
    (["--runs=nowhere"], "there is no checkpoint nowhere/stage1.pt"),
])
def test_mistakes_are_told(changes, message, trained, tmp_path):
    with pytest.raises(UserError, match=message):
        run("trajectories.py", f"--runs={trained}", f"--out_dir={tmp_path}", *QUICK, *changes)


def test_models_of_different_data_are_not_compared(trained, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "other")
    state = torch.load(plain / "stage1.pt")
    torch.save(state | dict(config=state["config"] | dict(data_identity=1)), tmp_path / "other" / "stage1.pt")
    with pytest.raises(UserError, match="trained on different data sets"):
        run("trajectories.py", f"--runs={trained},{tmp_path}/other", f"--out_dir={tmp_path}", *QUICK)
