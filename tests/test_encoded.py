"""Stage 1 on the codes of an encoder that was trained beforehand, all that follows it, and mistakes."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import checkpoint, fill, load, same, same_training
from scripts import PRIOR, SAMPLE, TINY, Script, outputs, run, start_together

import data
from checkpoint import save_checkpoint, weights_checksum
from configurator import UserError
from encoded import Encoded
from model import DisCoDiff
from trained import load_encoder, load_stage1
from vit import Distilled

ENCODER = dict(img_resolution=28, img_channels=1, num_latents=4, codebook_size=6, patch=14, dim=8, layers=1, heads=2, registers=1,
               layerscale=1.0, drop_path=0.5, prototypes=8, head_hidden=8, head_bottleneck=4)
GIVEN = [setting for setting in TINY if not setting.startswith(("--num_latents", "--codebook_size"))]


def make_encoder(folder, name="", dataset="fashion-mnist-10k", **changes):
    """A checkpoint as train_encoder.py leaves it; name: two names make two encoders -> the folder"""
    args = ENCODER | changes
    state = {n: 4 * fill(name + n, p.shape) for n, p in Distilled(**args).state_dict().items()}  # the codes of images differ
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / "encoder.pt", dict(made_by="train_encoder", config=dict(dataset=dataset, data_identity=0, held_out=0), model_args=args, step=1, ema=state))
    return folder


@pytest.fixture
def encoder(tmp_path):
    return make_encoder(tmp_path / "encoder")


@pytest.fixture
def few(monkeypatch):
    """200 images in place of the data set's."""
    images, labels, _ = data.load("fashion-mnist-10k")
    monkeypatch.setattr(data, "load", lambda name: (images[:200], labels[:200], 10))
    return images[:200]


@torch.no_grad()
def codes_of(folder, images):
    """The argmax of the encoder's logits."""
    return load_encoder(folder)[0](data.to_float(images)).argmax(-1)


def test_kept_codes_are_the_argmax(few, encoder, tmp_path):
    """Of each image and of its mirror image; the step gets them, and the encoder is not asked again."""
    stage1 = Script("train_stage1.py", "default", tmp_path, "cpu", *GIVEN, f"--codes={encoder}", "--xflip=True", "--batch_gpu=4")
    (file,) = tmp_path.glob("codes-*.npy")
    kept, both = np.load(file), (few, few[:, :, ::-1].copy())
    assert kept.shape == (2, 200, 4) and kept.dtype == np.uint8
    assert all(np.array_equal(kept[i], codes_of(encoder, both[i])) for i in range(2))
    assert len(np.unique(kept[0], axis=0)) > 20 and not np.array_equal(kept[0], kept[1])
    given, forward = [], stage1.run.forward
    stage1.run.forward = lambda *arguments: given.append(arguments) or forward(*arguments)
    stage1.run.model.encoder.forward = None
    loss, *usage = stage1.gradients(5)
    assert loss > 0 and usage == [0, 0, 0]
    y, _, _, _, gumbel, _, _, z = (torch.cat(parts) if torch.is_tensor(parts[0]) else parts for parts in zip(*(a[:8] for a in given)))
    assert gumbel.shape == (8, 0, 16) and torch.equal(z, codes_of(encoder, data.to_uint8(y)))
    assert (stage1.draw_step(5)[4]).any()


@pytest.mark.parametrize("k, dtype", [(256, np.uint8), (257, np.uint16), (4096, np.uint16)])
def test_codes_are_kept_in_as_few_bytes_as_they_need(few, tmp_path, k, dtype):
    torch.manual_seed(0)
    frozen = dict(img_resolution=28, img_channels=1, num_latents=3, codebook_size=k, patch=14, dim=8, layers=1, heads=2, stem=0)
    model = DisCoDiff(28, 1, num_latents=3, codebook_size=k, conditioning="average", frozen=frozen, model_channels=8,
                      channel_mult=(1,), num_blocks=1, attn_resolutions=())
    place = SimpleNamespace(images=few, labels=None, device=torch.device("cpu"), master=True, rank=0, world=1, config=dict(out_dir=tmp_path))
    model.encoder.sem_norm.bias.data[2 * k - 1] = 99  # the second latent's code is k - 1
    encoded = Encoded(place, model, 1)
    assert encoded.kept.dtype == dtype
    indices, flip = np.array([3, 199, 0]), np.zeros(3, bool)
    codes = encoded.codes(indices, torch.from_numpy(flip))
    assert (codes[:, 1] == k - 1).all() and torch.equal(codes, model.encoder(data.to_float(few[indices])).argmax(-1))
    computed = Encoded(place, model, 1, limit=599)  # 600 bytes or more are too many
    assert computed.kept is None and torch.equal(computed.logits(indices, flip), encoded.logits(indices, flip))


def test_two_processes_do_what_one_does(encoder, tmp_path):
    """They share the images to encode, and all others of the step's numbers are one process's."""
    settings = ["train_stage1.py", *GIVEN, f"--codes={encoder}", "--total_images=16", "--xflip=True"]
    two = start_together(2, *settings, f"--out_dir={tmp_path / 'two'}")
    run(*settings, f"--out_dir={tmp_path / 'one'}")
    outputs(two)
    one, two = (np.load(next((tmp_path / name).glob("codes-*"))) for name in ("one", "two"))
    assert one.shape == (2, 10_000, 4) and np.array_equal(one, two)
    one, two = (checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    assert all((p - two[name]).abs().max() < 1e-4 for name, p in one.items())


def test_a_run_goes_on_to_the_bit(few, encoder, tmp_path):
    """The encoder stays as it was, and is in the checkpoint once, for weights and average. Nothing of a first phase is there."""
    settings = [*GIVEN, f"--codes={encoder}", "--log_every=24"]
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings)
    for images in (24, 48):
        run("train_stage1.py", f"--out_dir={tmp_path / 'parts'}", *settings, f"--total_images={images}")
        next((tmp_path / "parts").glob("codes-*")).unlink()
    whole, parts = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert same_training(whole, parts)
    for part in ("model", "ema"):
        of_stage1 = {n.removeprefix("encoder."): p for n, p in whole[part].items() if n.startswith("encoder.")}
        assert same(of_stage1, dict(load_encoder(encoder)[0].state_dict()))
    assert all(p.data_ptr() == whole["ema"][n].data_ptr() for n, p in whole["model"].items() if n.startswith("encoder."))
    assert whole["model_args"]["conditioning"] == "average" and whole["model"]["latents.table"].shape == (4, 7, 32)
    assert not (tmp_path / "whole" / "coarse.jsonl").exists()
    moved = encoder.rename(tmp_path / "moved")
    run("train_stage1.py", f"--out_dir={tmp_path / 'whole'}", *settings, f"--codes={moved}", "--total_images=56")
    assert checkpoint(tmp_path / "whole")["step"] == 7


def test_the_folder_is_enough_for_all_that_follows(few, encoder, tmp_path):
    """Priors, which train on exactly these codes, and samples of each kind; the encoder's folder is gone."""
    out = f"--out_dir={tmp_path / 'run'}"
    run("train_stage1.py", out, *GIVEN, f"--codes={encoder}")
    codes = codes_of(encoder, few)
    shutil.rmtree(encoder)
    for file in (tmp_path / "run").glob("codes-*"):
        file.unlink()
    for prior in ("ar", "sedd"):
        printed = run("train_prior.py", out, *PRIOR, f"--prior={prior}", "--total_images=50")
        held_out = data.split(200, 16)[1]
        p = torch.nn.functional.one_hot(codes[data.split(200, 16)[0]], 6).float().mean(0).clamp(min=1e-12)  # (m, k)
        bits = -p.log2().gather(1, codes[held_out].T).sum().item() / 16
        assert f"independent latents                {bits:7.2f}" in printed
    assert np.array_equal(np.load(next((tmp_path / "run").glob("codes-*")))[0], codes)
    made = {}
    for name, settings in (("ar", []), ("sedd", ["--prior=sedd", "--sedd_sampler=analytic", "--eta=0.1", "--sedd_steps=4"]),
                           ("code", ["--code=5,0,3,1"]), ("encode", ["--encode=fashion-mnist-10k", "--per_code=1"]),
                           ("compose", ["--encode=fashion-mnist-10k", "--compose=fashion-mnist-10k", "--per_code=1", "--guidance=2"])):
        run("sample.py", out, f"--name={name}", *SAMPLE, *settings)
        made[name] = load(tmp_path / "run", name)["codes"]
        assert made[name].shape == (20, 4)
    own = codes[np.concatenate(data.split(200, 16))]  # training images come first
    assert np.array_equal(made["encode"], own[:20]) and (made["code"] == [5, 0, 3, 1]).all()
    fours = made["compose"].reshape(5, 4, 4)
    first, second = fours[:, 0, None], fours[:, 1, None]
    assert np.array_equal(fours[:, 0], own[:5]) and ((fours == first) | (fours == second)).all()
    model = load_stage1(tmp_path / "run")[0]
    assert not any(p.requires_grad for p in model.parameters()) and model.encoder.num_latents == 4


def test_num_latents_0_is_plain_edm(few, tmp_path):
    """As in compare_models.py, with a configuration that names codes: the encoder need not even be there."""
    for name, settings in (("plain", []), ("codes", [f"--codes={tmp_path / 'nowhere'}"])):
        run("train_stage1.py", f"--out_dir={tmp_path / name}", *TINY, "--num_latents=0", *settings)
    assert same_training(*(checkpoint(tmp_path / name) for name in ("plain", "codes")))


def test_averaged_codes_learn_m_times_as_fast(few, encoder, tmp_path):
    """As rows that are summed up would. So that the table alone has another rate, and the setting says any."""
    for settings, rates in (([], [0.002, 0.008, 0]), (["--conditioning=attention"], [0.002, 0.002, 0]), (["--code_lr=0.5"], [0.002, 0.5, 0])):
        stage1 = Script("train_stage1.py", "default", tmp_path, "cpu", *GIVEN, f"--codes={encoder}", *settings)
        stage1.gradients(3)
        stage1.update(24)
        assert [group["lr"] for group in stage1.optimizer.param_groups] == pytest.approx(rates)


def test_attention_reads_given_codes_too(few, encoder, tmp_path):
    run("train_stage1.py", f"--out_dir={tmp_path}", *GIVEN, f"--codes={encoder}", "--conditioning=attention")
    state = checkpoint(tmp_path)
    assert state["model"]["latents.codebook"].shape == (4, 6, 8) and any(".cross." in n for n in state["model"])


# ----------------------------------------------------------------------------------------------------
# from a network of our own


def test_given_codes_are_added_to_plain_edm(few, encoder, tmp_path):
    """The paper's recipe for ImageNet-64, with DLC's codes: the U-Net starts as plain EDM's, and so do those that go on from there."""
    run("train_stage1.py", f"--out_dir={tmp_path / 'plain'}", *TINY, "--num_latents=0")
    settings = [*GIVEN, f"--codes={encoder}", "--total_images=8", "--lr=1e-9"]
    run("train_stage1.py", f"--out_dir={tmp_path / 'codes'}", *settings, f"--init_from={tmp_path / 'plain'}")
    run("train_stage1.py", f"--out_dir={tmp_path / 'more'}", *settings, f"--init_from={tmp_path / 'codes'}")
    plain, codes, more = (checkpoint(tmp_path / name)["ema"] for name in ("plain", "codes", "more"))
    assert all((codes[name] - p).abs().max() < 1e-7 for name, p in plain.items())
    assert all((more[name] - p).abs().max() < 1e-7 for name, p in codes.items())
    assert weights_checksum(load_encoder(encoder)[0].state_dict()) == checkpoint(tmp_path / "more")["config"]["encoder_identity"]


def test_the_denoiser_of_other_codes_is_no_start(few, encoder, tmp_path):
    run("train_stage1.py", f"--out_dir={tmp_path / 'codes'}", *GIVEN, f"--codes={encoder}", "--total_images=8")
    run("train_stage1.py", f"--out_dir={tmp_path / 'disco'}", *TINY, "--total_images=8")
    other = make_encoder(tmp_path / "other", "other")
    for source, settings in (("codes", [*GIVEN, f"--codes={other}"]), ("codes", TINY), ("disco", [*GIVEN, f"--codes={encoder}"])):
        with pytest.raises(UserError, match=f"{source}/stage1.pt has codes of another encoder than this run, .*name its encoder by --codes") as error:
            run("train_stage1.py", f"--out_dir={tmp_path / 'new'}", *settings, f"--init_from={tmp_path / source}")
        assert "\n" not in str(error.value) and not (tmp_path / "new" / "stage1.pt").exists()


# ----------------------------------------------------------------------------------------------------
# mistakes


def test_encoders_that_do_not_fit(few, encoder, tmp_path, capsys):
    for changes, message in ((dict(img_channels=3), "reads 28 pixels and 3 channels, images of fashion-mnist-10k have 28 and 1: train one, "
                                                    "`python train_encoder.py --dataset=fashion-mnist-10k`"),
                             (dict(img_resolution=42), "reads 42 pixels and 1 channels")):
        make_encoder(tmp_path / "other", **changes)
        with pytest.raises(UserError, match=message) as error:
            run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *GIVEN, f"--codes={tmp_path / 'other'}")
        assert "\n" not in str(error.value) and not list((tmp_path / "run").iterdir())
    path = make_encoder(tmp_path / "other") / "encoder.pt"
    torch.save(torch.load(path) | dict(distinct=0.05), path)
    with pytest.raises(UserError, match="other has collapsed: 5.0% of its codes are distinct"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *GIVEN, f"--codes={tmp_path / 'other'}")
    make_encoder(tmp_path / "other", dataset="digits")
    run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *GIVEN, f"--codes={tmp_path / 'other'}", "--total_images=8")
    assert "other was trained on other images, digits as it was then: its codes may tell less of fashion-mnist-10k" in capsys.readouterr().err
    path = tmp_path / "other" / "encoder.pt"
    state, same_images = torch.load(path), data.data_checksum(*data.load("fashion-mnist-10k")[:2])
    for held_out, said in ((15, True), (16, False)):  # the run holds out 16
        torch.save(state | dict(config=dict(dataset="fashion-mnist-10k", data_identity=same_images, held_out=held_out)), path)
        Script("train_stage1.py", "default", tmp_path / f"{held_out}", "cpu", *GIVEN, f"--codes={tmp_path / 'other'}")
        assert ("trained on some of the images that are held out here" in (err := capsys.readouterr().err)) == said
        assert "other images" not in err


@pytest.mark.parametrize("settings, message", [
    (["--codes=nowhere"], "there is no checkpoint nowhere/encoder.pt: run `python train_encoder.py --out_dir=nowhere` first"),
    (["--codes=ENCODER", "--num_latents=3"], "--codes brings its encoder's num_latents and codebook_size: leave num_latents out"),
    (["--codes=ENCODER", "--codebook_size=5"], "leave codebook_size out"),
    (["--codes=ENCODER", "--encoder_lr=1e-4"], "encoder_lr must be 0, not 0.0001"),
    (["--conditioning=mean"], "--conditioning is attention, average, embedding, random-mlp or auto, not mean"),
])
def test_settings_that_do_not_fit(encoder, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *GIVEN, *(s.replace("ENCODER", str(encoder)) for s in settings))
    assert not list((tmp_path / "run").iterdir())


def test_a_damaged_encoder_and_other_shapes(encoder, tmp_path):
    state = torch.load(encoder / "encoder.pt")
    save_checkpoint(encoder / "encoder.pt", state | dict(model_args=state["model_args"] | dict(num_latents=5)))
    (encoder / "encoder.previous.pt").unlink()
    with pytest.raises(UserError, match="encoder.pt is of another architecture than this Distilled: train anew") as error:
        run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *GIVEN, f"--codes={encoder}")
    assert "\n" not in str(error.value)
    (encoder / "encoder.pt").write_bytes((encoder / "encoder.pt").read_bytes()[:-1000])
    with pytest.raises(UserError, match="encoder.pt is truncated or damaged"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *GIVEN, f"--codes={encoder}")


def test_a_run_goes_on_with_its_encoder_only(few, encoder, tmp_path):
    settings = [f"--out_dir={tmp_path / 'run'}", *GIVEN, "--total_images=8"]
    run("train_stage1.py", *settings, f"--codes={encoder}")
    before = (tmp_path / "run" / "stage1.pt").read_bytes()
    other = make_encoder(tmp_path / "other", "other")
    for codes, difference in ((f"--codes={other}", r"\(encoder_identity=\d+ there, \d+ here\)"), ("--codes=", "encoder_identity=[0-9]+ there, 0 here")):
        with pytest.raises(UserError, match=difference):
            run("train_stage1.py", *settings, codes, "--total_images=16")
    assert (tmp_path / "run" / "stage1.pt").read_bytes() == before
    run("train_prior.py", f"--out_dir={tmp_path / 'run'}", *PRIOR, "--total_images=50")
    run("train_stage1.py", *settings, f"--codes={other}", "--overwrite=True")
    with pytest.raises(UserError, match="prior_ar.pt was trained on codes of another stage 1"):
        run("sample.py", f"--out_dir={tmp_path / 'run'}", *SAMPLE)
    run("train_prior.py", f"--out_dir={tmp_path / 'run'}", *PRIOR, "--total_images=50", "--overwrite=True")
    (file,) = (tmp_path / "run").glob("codes-*")  # the older one is gone
    assert np.array_equal(np.load(file)[0], codes_of(other, few))


def test_a_damaged_file_of_codes(few, encoder, tmp_path):
    settings = [f"--out_dir={tmp_path / 'run'}", *GIVEN, f"--codes={encoder}"]
    run("train_stage1.py", *settings, "--total_images=8")
    (file,) = (tmp_path / "run").glob("codes-*")
    for content in (b"no codes", file.read_bytes()[:-4]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="codes-.*npy is damaged: delete it, and start again"):
            run("train_stage1.py", *settings)
