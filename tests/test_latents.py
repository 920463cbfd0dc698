"""VAE latents in place of pixels: data sets with latents, training on them, samples, mistakes."""
from functools import partial

import numpy as np
import pytest
import torch
from conftest import checkpoint, load, same, same_training
from scripts import PRIOR, SAMPLE, Script, run
from vaes import state_of, write

import data
import diffusion
import latents
import preview
from configurator import UserError
from pictures import random_images
from test_dit import TINY_DIT
from test_encoded import make_encoder
from trained import load_stage1, load_vae
from vae import vae_from

IMAGES = random_images(40, 16, 16, 3)
SETTINGS = [*TINY_DIT, "--dataset=colours", "--space=vae", "--patch=2", "--encoder_patch=8", "--held_out=8"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Data sets of this test: colours, which has 40 coloured images of 16 x 16 pixels in two classes."""
    root = tmp_path / "datasets"
    np.savez(tmp_path / "colours.npz", images=IMAGES)
    for folder in ("colours", "small"):
        (root / folder).mkdir(parents=True)
        np.save(root / folder / "images.npy", IMAGES if folder == "colours" else IMAGES[:, :10, :10])
        np.save(root / folder / "labels.npy", np.arange(40) % 2)
        (root / folder / "classes.json").write_text('["a", "b"]')
    for module, names in ((data, ("load", "class_names", "made_of", "is_prepared")), (latents, ("encode", "Latents"))):
        for name in names:
            monkeypatch.setattr(module, name, partial(getattr(module, name), root=root))
    monkeypatch.setattr(preview, "heun", partial(diffusion.heun, num_steps=2))  # of previews
    return root


@pytest.fixture
def colours(place, tmp_path):
    latents.encode("colours", write(tmp_path), True, "cpu")
    return place / "colours"


@torch.no_grad()
def test_what_a_data_set_gets(place, tmp_path, capsys):
    """Scaled means of the images, and of mirrored ones if asked for; a prepared set is not prepared again for them."""
    file, vae = write(tmp_path, "bin", "diffusers_old"), vae_from(state_of())
    y = data.to_float(IMAGES)
    data.main(["colours", f"--vae={file}", "--device=cpu"])
    of_set = latents.Latents("colours", IMAGES.shape, False, "cpu")
    found, own = of_set.mapped, of_set.vae
    assert capsys.readouterr().out == f"{place / 'colours'}/latents.npy: 40 x 1 x 4 x 4 x 4\n"
    assert found.dtype == np.float16 and isinstance(found, np.memmap)
    assert torch.allclose(torch.from_numpy(found[:, 0].astype(np.float32)), vae.encode(y), atol=2e-3)
    data.main(["colours", f"--vae={file}", "--device=cpu", "--xflip=True"])
    both = latents.Latents("colours", IMAGES.shape, True, "cpu").mapped
    assert np.array_equal(both[:, :1], found)
    assert torch.allclose(torch.from_numpy(both[:, 1].astype(np.float32)), vae.encode(y.flip(3)), atol=2e-3)
    assert same(dict(own.state_dict()), state_of()) and data.is_ours(place / "colours")
    assert {path.name for path in place.iterdir()} == {"colours", "small"}


def test_training_on_latents(colours, tmp_path):
    """The DiT sees latents, the encoder and the preview pictures; later steps need only the run's folder."""
    settings = [*SETTINGS, "--xflip=True"]
    for name, images in (("parts", 8), ("parts", 16), ("whole", 16)):
        run("train_stage1.py", f"--out_dir={tmp_path / name}", *settings, f"--total_images={images}", f"--preview_every={images // 16 * 16}")
    state = checkpoint(tmp_path / "whole")
    assert same_training(checkpoint(tmp_path / "parts"), state)
    assert state["config"]["sigma_data"] == 1 and tuple(state["model_args"]["x_shape"]) == (4, 4, 4)
    assert state["model"]["model.patches.weight"].shape == (16, 4, 2, 2) and state["model"]["encoder.patches.weight"].shape == (16, 3, 8, 8)
    (colours / "latents.npy").unlink()
    (colours / "vae.pt").unlink()
    for arguments in ([f"--encode={tmp_path / 'colours.npz'}", "--class_label=b"], ["--code=0,1,2"]):
        run("sample.py", f"--out_dir={tmp_path / 'whole'}", *SAMPLE, *arguments, "--name=" + arguments[0][2:6])
    made = load(tmp_path / "whole", "enco")
    assert made["images"].shape == (20, 16, 16, 3) and made["images"].std() > 1


def test_the_denoiser_is_given_latents_and_the_encoder_images(colours, tmp_path, monkeypatch):
    """Of the same images, mirrored alike."""
    stage1 = Script("train_stage1.py", "default", tmp_path, "cpu", *SETTINGS, "--xflip=True")
    given = stage1.recorded(monkeypatch, "forward")
    stage1.gradients(2)
    y, noise, *_, images = given[0]
    flip, which = stage1.draw_step(2)[4], stage1.batches.take(16, 8)
    assert 0 < flip.sum() < 8 and noise.shape == y.shape == (8, 4, 4, 4)
    mirrored = np.where(flip.numpy()[:, None, None, None], IMAGES[which][:, :, ::-1], IMAGES[which])
    stored = latents.Latents("colours", IMAGES.shape, True, "cpu").mapped[which, flip.int().numpy()]
    assert torch.equal(images, data.to_float(mirrored)) and np.array_equal(y.numpy(), stored.astype(np.float32))


def test_discrete_latent_codes_whole_way(colours, tmp_path):
    """Given codes, averaged into a DiT on VAE latents: no pixels are read in a step; then a prior, and guided samples."""
    encoder = make_encoder(tmp_path / "encoder", dataset="colours", img_resolution=16, img_channels=3, patch=8)
    settings = [s for s in SETTINGS if not s.startswith(("--num_latents", "--codebook_size"))]
    settings += [f"--codes={encoder}", "--xflip=True", "--total_images=16", "--class_cond=False"]
    stage1 = Script("train_stage1.py", "default", tmp_path / "steps", "cpu", *settings)
    y, _, images = stage1.fetch(0, 8, stage1.draw_step(0)[4])
    assert y.shape == (8, 4, 4, 4) and images is None and stage1.gradients(0)[0] > 0
    run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *settings)
    run("train_prior.py", f"--out_dir={tmp_path / 'run'}", *PRIOR, "--prior=sedd", "--total_images=50")
    run("sample.py", f"--out_dir={tmp_path / 'run'}", *SAMPLE, "--prior=sedd", "--guidance=1.7", "--guidance_max=5")
    made, (model, _) = load(tmp_path / "run"), load_stage1(tmp_path / "run")
    assert made["images"].shape == (20, 16, 16, 3) and made["codes"].shape == (20, 4) and made["codes"].max() < 6
    assert model.latents.table.shape == (4, 7, 16) and model.conditioning == "average"


def test_samples_are_decoded(colours, tmp_path):
    run("train_stage1.py", f"--out_dir={tmp_path}", *SETTINGS, "--denoiser=unet", "--channel_mult=1,2", "--attn_resolutions=2,", "--total_images=8")
    model, state = load_stage1(tmp_path)
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    decoded = data.to_uint8(x, load_vae(state))
    assert model.x_shape == (4, 4, 4) and model.img_shape == (3, 16, 16) and decoded.shape == (3, 16, 16, 3)
    with torch.no_grad():
        assert np.array_equal(decoded, data.to_uint8(vae_from(state_of()).decode(x)))


def test_latents_of_another_autoencoder(colours, tmp_path):
    run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *SETTINGS, "--total_images=8")
    latents.encode("colours", write(tmp_path, state={name: tensor * 1.1 for name, tensor in state_of().items()}), device="cpu")
    with pytest.raises(UserError, match=r"settings \(vae_identity="):
        run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *SETTINGS)
    with pytest.raises(UserError, match="colours has no latents of mirrored images: `python data.py colours --vae=FILE --xflip=True`"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'other'}", *SETTINGS, "--xflip=True")
    with pytest.raises(UserError, match="patch 3 does not divide 4 x 4, the size of latents"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'other'}", *SETTINGS, "--patch=3")


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "latents.npy").unlink(), "colours has no VAE latents: `python data.py colours --vae=FILE` computes them"),
    (lambda folder: (folder / "vae.pt").unlink(), "there is no file .*vae.pt"),
    (lambda folder: (folder / "vae.pt").write_bytes(b"PK"), "vae.pt is damaged"),
    (lambda folder: (folder / "latents.npy").write_bytes((folder / "latents.npy").read_bytes()[:200]), "the latents in .* are damaged"),
    (lambda folder: np.save(folder / "latents.npy", np.zeros((39, 1, 4, 4, 4), np.float16)),
     r"the latents in .* are damaged \(they are float16 \(39, 1, 4, 4, 4\), images and autoencoder make \(4, 4, 4\) of each of 40\)")])
def test_damaged_latents(colours, tmp_path, damage, message):
    damage(colours)
    with pytest.raises(UserError, match=message):
        run("train_stage1.py", f"--out_dir={tmp_path / 'run'}", *SETTINGS)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("name, message", [
    ("fashion-mnist-10k", "fashion-mnist-10k has no folder of its own for latents"),
    ("small", "small has images of 10 x 10 pixels, which the autoencoder makes 4 times smaller: prepare them with --resolution=8"),
    ("nothing", "there is no data set 'nothing'")])
def test_images_that_do_not_fit(place, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        latents.encode(name, write(tmp_path), device="cpu")
    np.save(place / "small" / "images.npy", IMAGES[:, :, :, :1])
    with pytest.raises(UserError, match="small has 1 channels, the autoencoder takes 3"):
        latents.encode("small", write(tmp_path), device="cpu")


def test_a_full_disk_leaves_no_half_latents(place, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "to_float", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="can't write .*latents.npy: No space left on device"):
        latents.encode("colours", write(tmp_path), device="cpu")
    assert not list((place / "colours").glob("latents*"))
