"""sample.py: what it writes, seeds, settings, interruptions, mistakes."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, close, load
from PIL import Image
from scripts import SAMPLE, TINY, early, outputs, run, start_together

import data
import noise as noises
import npz
import prior as priors
import run as runs
import sample
import sedd
from configurator import UserError
from model import DisCoDiff
from sedd import SEDD
from trained import class_number, classes_of


@pytest.fixture(scope="module")
def samples(trained):
    run("sample.py", f"--out_dir={trained}", "--name=first", *SAMPLE, "--batch_size=20")
    return load(trained, "first")


def test_what_is_written(trained, samples):
    assert {k: (v.dtype, v.shape) for k, v in samples.items()} == {
        "images": (np.uint8, (20, 28, 28, 1)), "labels": (np.int64, (20,)), "codes": (np.int64, (20, 3)),
        "seeds": (np.int64, (20,)), "nfe": (np.int64, (20,)), "seconds": (np.float32, (20,))}
    assert (samples["nfe"] == 5).all() and 0 < samples["seconds"].min() < 10
    assert samples["seeds"].tolist() == list(range(20)) and samples["labels"].tolist() == [i // 8 for i in range(20)]
    rows = samples["codes"].reshape(5, 4, 3)
    assert (rows == rows[:, :1]).all() and len(np.unique(rows[:, 0], axis=0)) > 1  # a row shares one code
    assert len(np.unique(samples["images"].reshape(20, -1), axis=0)) == 20
    assert Image.open(trained / "first.png").size == (8 * 30 * 2, 3 * 30 * 2)
    assert not (trained / "first.parts").exists()


def test_the_grid_shows_what_was_encoded(trained):
    sources = np.stack([np.full((28, 28, 1), 40 * i, np.uint8) for i in range(1, 6)])
    for name, part in (("a", sources[:2]), ("b", sources[2:])):
        np.savez(trained / f"{name}.npz", images=part)
    for name, more, before in (("encoded", "--seed=4", {0: 2, 5: 1, 10: 2}),  # 4 is the first seed of the second code
                               ("mixed", f"--compose={trained / 'b.npz'}", {0: 1, 5: 3, 10: 255, 15: 255, 20: 2})):
        run("sample.py", f"--out_dir={trained}", f"--name={name}", *SAMPLE, f"--encode={trained / 'a.npz'}", more,
            "--class_label=1")
        grid = np.array(Image.open(trained / f"{name}.png"))
        assert grid.shape == (3 * 30 * 2, 10 * 30 * 2)  # two codes in a row, 4 images each
        cells = grid.reshape(3, 60, 10, 60).swapaxes(1, 2).reshape(30, 60, 60)[:, 2:-2:2, 2:-2:2]
        of_codes = np.delete(cells[:25], range(0, 25, 5), 0)
        assert np.array_equal(of_codes[..., None], load(trained, name)["images"])
        for cell, which in before.items():
            assert (cells[cell] == (which if which == 255 else 40 * which)).all()


def test_a_folder_of_png_files(trained, tmp_path):
    """Which eval_fid.py and data.py read, with the labels; files of another run in it are not mixed with these."""
    arguments = ["sample.py", f"--out_dir={tmp_path}", f"--init_from={trained}", *SAMPLE, "--png=True", "--seed=7"]
    printed = run(*arguments)
    made, folder = load(tmp_path), tmp_path / "samples"
    assert printed.splitlines()[-1].endswith(f"and {folder}/ with a PNG file for each image")
    images, labels = data.open_images(str(folder))
    assert sorted(p.name for p in folder.iterdir()) == [*(f"{i:06d}.png" for i in range(7, 27)), "dataset.json"]
    assert np.array_equal(images[:], made["images"]) and np.array_equal(labels, made["labels"])
    run(*arguments)
    run(*arguments, "--class_label=3")
    assert (data.open_images(str(folder))[1] == 3).all()
    (folder / "mine.png").write_bytes(b"x")
    with pytest.raises(UserError, match="samples has other files in it, such as mine.png: empty it, or choose another --name"):
        run(*arguments)
    (folder / "mine.png").unlink()
    with pytest.raises(UserError, match="other files in it, such as 000007.png"):
        run(*arguments, "--seed=8")


def test_classes_by_name(trained, tmp_path):
    for name, number in (("Bag", 8), ("T-shirt/top", 0), ("3", 3)):
        run("sample.py", f"--out_dir={trained}", "--name=named", *SAMPLE, "--num_images=4", f"--class_label={name}")
        assert (load(trained, "named")["labels"] == number).all()
    with pytest.raises(UserError, match="there is no class 'bags': this model has 10 classes, 0 ... 9: T-shirt/top, Trouser"):
        run("sample.py", f"--out_dir={trained}", *SAMPLE, "--class_label=bags")
    assert class_number("2", ["10", "2", "9"]) == 1 and class_number("0", ["10", "2", "9"]) == 0 and class_number("", []) == -1
    older = torch.load(trained / "stage1.pt")
    assert classes_of(older)[9] == "Ankle boot" and older.pop("classes")
    assert classes_of(older)[9] == "Ankle boot"
    assert classes_of(dict(older, config={"dataset": "mine"})) == [*"0123456789"]


def test_labels_at_random(trained, samples, monkeypatch):
    """Uniform, one for each code, whatever the batch size; and the images in turn stay as they were."""
    monkeypatch.setattr(sample, "random_labels", True)
    wanted = SimpleNamespace(model=SimpleNamespace(label_dim=10), class_label=-1)
    labels = sample.labels_of(wanted, np.arange(20_000))
    assert torch.equal(labels[100:103], sample.labels_of(wanted, np.arange(100, 103)))
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10 and ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square with 9 degrees of freedom, 0.001
    run("sample.py", f"--out_dir={trained}", "--name=random", *SAMPLE, "--random_labels=True")
    made = load(trained, "random")
    assert np.array_equal(made["labels"].reshape(5, 4), made["labels"][::4, None].repeat(4, 1)) and len(set(made["labels"])) > 2
    with pytest.raises(UserError, match="choose one"):
        run("sample.py", f"--out_dir={trained}", *SAMPLE, "--random_labels=True", "--class_label=2")


def test_the_batch_size_changes_nothing(trained, samples):
    run("sample.py", f"--out_dir={trained}", "--name=b", *SAMPLE, "--batch_size=3")
    assert close(load(trained, "b"), samples)


@pytest.mark.parametrize("how", [[], ["--sedd_sampler=analytic", "--sedd_steps=5", "--eta=0.3"], ["--sedd_sampler=euler"]], ids=str)
def test_sedd_codes_do_not_depend_on_the_batch_size(trained, samples, how):
    for name, size in (("f", 20), ("g", 3)):
        printed = run("sample.py", f"--out_dir={trained}", f"--name={name}", *SAMPLE, f"--batch_size={size}", "--prior=sedd", *how)
        assert re.search(r"\d+ codes in \d+\.\d\d s, 20 images in \d+\.\d\d s", printed)
    assert close(load(trained, "f"), load(trained, "g"))
    assert 0 <= load(trained, "f")["codes"].min() and load(trained, "f")["codes"].max() < 5
    assert not np.array_equal(load(trained, "f")["codes"], samples["codes"])


def test_every_setting_of_the_sedd_sampler_arrives(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(SEDD, "forward", lambda self, x, t, labels: (seen.append((x, t)), torch.zeros(*x.shape, 6))[1])
    arguments = [f"--out_dir={trained}", "--name=h", *SAMPLE, "--prior=sedd"]

    def masked_again(*more):
        seen.clear()
        run("sample.py", *arguments, "--sedd_sampler=analytic", "--sedd_steps=10", "--per_code=1", "--num_steps=1", *more)
        return [round(t[0].item(), 1) for (x, t), (x_next, _) in zip(seen, seen[1:]) if ((x != 5) & (x_next == 5)).any()]

    assert masked_again() == [] and len(seen) == 10
    assert set(masked_again("--eta=0.9")) <= {0.5, 0.4} and masked_again("--eta=0.9")
    assert 0.8 in masked_again("--eta=0.9", "--t0=0.05", "--t1=0.95")
    seen.clear()
    run("sample.py", *arguments)
    assert len(seen) == 3


@pytest.mark.parametrize("arguments, nfe", [([str(ROOT / "config" / "restart39.py")], 39), (["--num_steps=4"], 7),
                                            (["--num_steps=4", "--restarts=(3,2,0.06,0.3),(2,1,1,2)"], 17)])
def test_the_script_spends_the_evaluations_that_it_prints(trained, monkeypatch, arguments, nfe):
    calls = []
    monkeypatch.setattr(DisCoDiff, "denoise", lambda self, x, sigma, *_: (calls.append(len(x)), x * 0)[1])
    printed = run("sample.py", f"--out_dir={trained}", "--name=n", "--num_images=5", "--device=cpu", *arguments)
    assert f"5 images, {nfe} evaluations each" in printed and calls == [5] * nfe


@pytest.mark.parametrize("arguments", [["--num_steps=5"], ["--restarts=(3,1,0.06,3.0),", "--num_steps=5"]])
def test_guidance_at_some_noise_levels_costs_two_evaluations_there(trained, monkeypatch, arguments):
    calls = []
    monkeypatch.setattr(DisCoDiff, "denoise", lambda self, x, sigma, *_: (calls.append((len(x), sigma[0].item())), x * 0)[1])
    guided = ["--guidance=2", "--guidance_min=0.1", "--guidance_max=10", "--code=0,1,2"]
    printed = run("sample.py", f"--out_dir={trained}", "--name=n", "--num_images=5", "--device=cpu", *arguments, *guided)
    assert [size for size, _ in calls] == [10 if 0.1 <= sigma <= 10 else 5 for _, sigma in calls]
    nfe = sum(size for size, _ in calls) // 5
    assert len(calls) < nfe < 2 * len(calls) and f"5 images, {nfe} evaluations each, D(z) and D(null)" in printed
    assert (load(trained, "n")["nfe"] == nfe).all()


def test_a_device_without_float64_is_given_none(trained, samples, monkeypatch):
    """As Apple's GPUs, which a CPU stands for: the samplers stay in float64, what networks get is float32; the samples are the same."""
    given = []

    def noted(network, method):
        function = getattr(network, method)

        def noting(*arguments, **options):
            given.extend(t.dtype for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor))
            return function(*arguments, **options)

        monkeypatch.setattr(network, method, noting)

    for module in (noises, priors, sedd):
        monkeypatch.setattr(module, "has_float64", lambda device: False)
    for network, method in ((DisCoDiff, "denoise"), (priors, "draw_codes"), (SEDD, "forward")):
        noted(network, method)
    run("sample.py", f"--out_dir={trained}", "--name=narrow", *SAMPLE)
    assert set(given) == {torch.float32, torch.int64} and close(load(trained, "narrow"), samples)
    run("sample.py", f"--out_dir={trained}", "--name=narrow", *SAMPLE, "--prior=sedd", "--sedd_sampler=analytic", "--sedd_steps=5", "--guidance=2")
    run("sample.py", f"--out_dir={trained}", "--name=narrow", *SAMPLE, "--encode=fashion-mnist-10k")
    assert set(given) == {torch.float32, torch.int64}


def test_images_are_made_in_the_precision_that_is_set(trained, monkeypatch):
    """The context that `set_precision` gives is around the denoiser, and around no more."""
    inside, evaluations = [], []

    class Context:
        def __enter__(self):
            inside.append(1)

        def __exit__(self, *error):
            inside.pop()

    monkeypatch.setattr(runs, "set_precision", lambda precision, device: {"fp16": Context()}[precision])
    monkeypatch.setattr(DisCoDiff, "denoise", lambda self, x, sigma, *_: (evaluations.append(len(inside)), x * 0)[1])
    run("sample.py", f"--out_dir={trained}", "--name=fp16", *SAMPLE, "--precision=fp16")
    assert evaluations == [1] * 5 and not inside


def test_any_seeds_can_be_made_alone(trained, samples):
    run("sample.py", f"--out_dir={trained}", "--name=c", *SAMPLE, "--seed=6", "--num_images=7")
    assert close(load(trained, "c"), {k: v[6:13] for k, v in samples.items()})


def test_churn_is_seeded_too(trained):
    for name, size in (("d", 20), ("e", 7)):
        run("sample.py", f"--out_dir={trained}", f"--name={name}", *SAMPLE, "--S_churn=3", f"--batch_size={size}")
    assert close(load(trained, "d"), load(trained, "e"))


def test_two_processes_make_the_same_images(trained, samples):
    outputs(start_together(2, "sample.py", f"--out_dir={trained}", "--name=two", *SAMPLE, "--batch_size=6"))
    assert close(load(trained, "two"), samples)


def test_mistakes_are_told_under_torchrun():
    process, _ = early("test_mistakes_are_told_under_torchrun")
    _, errors = process.communicate()
    assert process.returncode and "error: class_label 11 is out of range" in errors


def test_an_interrupted_run_goes_on(trained, samples, monkeypatch):
    merge = npz.merge_npz

    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(npz, "merge_npz", power_cut)
    arguments = [f"--out_dir={trained}", "--name=part", *SAMPLE, "--batch_size=8"]
    with pytest.raises(KeyboardInterrupt):
        run("sample.py", *arguments)
    parts = trained / "part.parts"
    assert sorted(p.name for p in parts.glob("*.npz")) == ["000000000.npz", "000000008.npz", "000000016.npz"]
    (parts / "000000008.npz").unlink()
    before = (parts / "000000000.npz").stat().st_mtime_ns
    whole = (parts / "000000016.npz").read_bytes()
    (parts / "000000016.npz").write_bytes(whole[:300] + b"damage" + whole[306:])
    kept = []
    monkeypatch.setattr(npz, "merge_npz", lambda files, path: (kept.append(files[0].stat().st_mtime_ns), merge(files, path)))
    with pytest.raises(UserError, match="unfinished run with other settings"):
        run("sample.py", *arguments, "--num_steps=4")
    settings = (parts / "settings.json").read_bytes()
    for lost in (lambda: (parts / "settings.json").write_bytes(b"\xff"), (parts / "settings.json").unlink):
        lost()
        with pytest.raises(UserError, match="unfinished run with other settings: delete it"):
            run("sample.py", *arguments)
    (parts / "settings.json").write_bytes(settings)
    run("sample.py", *arguments)
    assert kept == [before] and close(load(trained, "part"), samples)
    monkeypatch.setattr(npz, "merge_npz", power_cut)
    for brightness in (10, 200):  # of the image whose code is taken: the second run must not go on with the first's
        Image.new("L", (28, 28), brightness).save(trained / "source.png")
        with pytest.raises(KeyboardInterrupt if brightness == 10 else UserError):
            run("sample.py", *arguments, "--name=source", f"--encode={trained / 'source.png'}", "--class_label=1")


def test_images_that_are_not_finite_are_not_written(trained):
    with pytest.raises(UserError, match="the images are not finite"):
        run("sample.py", f"--out_dir={trained}", "--name=inf", *SAMPLE, "--guidance=1e300")
    assert not (trained / "inf.npz").exists() and not list((trained / "inf.parts").glob("*.npz"))
    run("sample.py", f"--out_dir={trained}", "--name=inf", *SAMPLE, "--num_images=2")  # and nothing is in the way


@pytest.mark.parametrize("arguments, message", [
    (["--class_label=10"], "class_label 10 is out of range: this model has 10 classes, 0 ... 9"),
    (["--class_label=-2"], "out of range"),
    (["--code=1,2"], r"--code takes 3 numbers in 0 ... 4, or -1: the prior draws it, not \(1, 2\)"),
    (["--code=1,2,5"], "--code takes 3 numbers"),
    (["--code=1,2,x"], "code takes a tuple"),
    (["--code=1,2,3", "--encode=x.png"], "choose one"),
    (["--encode=nothing"], "there is no data set 'nothing'"),
    (["--sigma_min=90"], "sigma_min 90.0 must be below sigma_max 80.0"),
    (["--rho=inf"], "rho must be positive and finite, not inf"),
    (["--guidance=inf"], "guidance and temperature must be finite"),
    (["--num_steps=0"], "num_steps must be positive"),
    (["--sedd_steps=0"], "sedd_steps must be positive"),
    (["--prior=sedd", "--encode=fashion-mnist-10k"], "^--prior= draws no part of these codes: leave it out$"),
    (["--prior=gpt"], "--prior is ar or sedd or rdm or diffusion, not gpt"),
    (["--prior=sedd", "--sedd_sampler=tweedie"], "--sedd_sampler is first-hitting, analytic or euler"),
    (["--prior=sedd", "--sedd_sampler=analytic", "--eta=1"], "eta is a probability below 1, not 1.0"),
    (["--prior=sedd", "--sedd_sampler=analytic", "--eta=-0.1"], "eta is a probability below 1"),
    (["--prior=sedd", "--sedd_sampler=analytic", "--eta=nan"], "eta takes a float"),
    (["--name=a/b"], "--name=a/b names the two files in out_dir: it can't have folders"),
    (["--name=.."], "can't have folders"),
    (["--prior=sedd", "--t0=0.6"], "from t1 0.55 down to t0 0.6: 0 <= t0 < t1 <= 1"),
    (["--prior=sedd", "--eta=0.02"], "say --sedd_sampler=analytic"),
    (["--sedd_sampler=analytic"], "sedd_sampler is for --prior=sedd"),
    (["--eta=0.02"], "eta is for --prior=sedd"),
    (["--prior=sedd", "--temperature=0.5"], "temperature is for --prior=ar"),
    (["--code=1,2,3,4"], r"--code takes 3 numbers in 0 ... 4, or -1: the prior draws it, not \(1, 2, 3, 4\)"),
    (["--code=-1,2,-2"], "--code takes 3 numbers"),
    (["--code=-1,2,3"], "the autoregressive prior goes on from the first positions of a code"),
    (["--code=1,2,3", "--free=1"], "goes on from the first positions"),
    (["--code=1,2,3", "--free=2,3"], r"--free takes positions 0 ... 2 of a code, not \(2, 3\)"),
    (["--free=2"], "--free names positions of a code: give one by --code or --encode"),
    (["--code=1,2,3", "--free=2", "--prior=rdm"], "--prior=rdm draws it whole"),
    (["--gamma=0.05"], "gamma is the churn of restarts: there are none"),
    (["--restarts=(3,1,0.06,0.3),", "--S_churn=3"], "the churn of restarts is gamma"),
    (["--restarts=(3,1,0.3,0.06),"], "restarts has .3, 1, 0.3, 0.06.: N_restart and num_steps are 2 or more"),
    (["--restarts=39"], "restarts takes .N_restart, K, t_min, t_max., ..."),
    (["--compose=1,2,3"], "give the first by --code, --encode or --prompt"),
    (["--guidance=2", "--guidance_min=3", "--guidance_max=1"], "0 <= guidance_min < guidance_max is wanted"),
    (["--guidance_max=3"], "bound the noise levels of guidance: say --guidance= too"),
    (["--code=1,2,3", "--compose=1,2"], r"--compose takes 3 numbers in 0 ... 4, not \(1, 2\)"),
    (["--code=1,2,3", "--compose=nothing"], "there is no data set 'nothing'"),
    (["--code=1,2,True"], "--code takes"),
    (["--batch_size=0"], "batch_size must be positive"),
    (["--device=tpu"], "--device=tpu can't be used here: it is auto, cpu, cuda or mps"),
    (["--out_dir=/nowhere"], r"there is no checkpoint /nowhere/stage1.pt: run `python train_stage1.py"),
])
def test_bad_input(trained, arguments, message):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    with pytest.raises(UserError, match=message) as error:
        run("sample.py", f"--out_dir={trained}", "--name=bad", *SAMPLE, *arguments)
    assert "\n" not in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(trained):
    with pytest.raises(UserError, match="--device=cuda can't be used here"):
        run("sample.py", f"--out_dir={trained}", "--name=bad", *SAMPLE, "--device=cuda")


def test_plain_edm(tmp_path):
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY, "--num_latents=0", "--class_cond=False")
    run("sample.py", f"--out_dir={tmp_path}", *SAMPLE)
    made = load(tmp_path)
    assert made["codes"].shape == (20, 0) and (made["labels"] == -1).all()
    with pytest.raises(UserError, match="this model has no discrete latents"):
        run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, "--guidance=2")
    with pytest.raises(UserError, match="trained without classes"):
        run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, "--class_label=0")
    with pytest.raises(UserError, match="nothing to train a prior on"):
        run("train_prior.py", f"--out_dir={tmp_path}", "--device=cpu")
