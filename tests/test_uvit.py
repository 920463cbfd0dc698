"""U-ViT: its shape, where the codes enter, activation checkpointing, the paper's configuration, runs, mistakes."""
import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, close, load, same, same_training
from scripts import PRIOR, SAMPLE, TINY, Script, run

from configurator import UserError, arguments_of, configure
from diffusion import PROCESSES
from model import DisCoDiff
from trained import load_stage1
from unet import UNetBlock
from uvit import UViT

TINY_UVIT = [*TINY, "--denoiser=uvit", "--channel_mult=1,2,4", "--depth=3"]
SMALL = dict(denoiser="uvit", num_latents=2, codebook_size=4, latent_dim=8, latent_layers=1, latent_heads=1, encoder_patch=4, encoder_dim=8,
             encoder_layers=1, encoder_heads=1, model_channels=8, channel_mult=(1, 2, 4), num_blocks=1, attn_resolutions=(8,), depth=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DisCoDiff(16, 1, 3, **SMALL, dropout=0.1)


X, SIGMA, C, Z = torch.randn(3, 1, 16, 16), torch.tensor([0.1, 1, 10]), torch.tensor([0, 2, -1]), torch.tensor([[0, 1], [2, 3], [1, 1]])


def stirred(model):
    """With what starts at zero no longer there."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def test_a_new_network_adds_nothing_to_its_input(model):
    D = model.denoise(X, SIGMA, C, model.condition(Z))
    assert torch.allclose(D, X * (0.25 / (0.25 + SIGMA ** 2))[:, None, None, None])


@torch.no_grad()
def test_codes_enter_every_convolutional_block_and_every_third_of_the_transformer(model):
    """Each of these reads them, and all of it is in `condition`."""
    stirred(model).eval()
    blocks = [name for name, block in model.model.named_modules() if isinstance(block, UNetBlock)]
    assert len(blocks) == 2 * 1 + 1 + 2 * 2 + 1 + 2 and len(model.model.cross) == 1  # down, up: at 8 and 4 pixels
    condition = model.condition(Z)
    assert condition.keys() == {*blocks, "vit0"}
    D = model.denoise(X, SIGMA, C, condition)
    other = model.condition(Z.flip(0))
    for name in condition:
        assert not torch.allclose(model.denoise(X, SIGMA, C, condition | {name: other[name]}), D, atol=1e-6), name
    assert not torch.allclose(model.denoise(X, SIGMA, C.flip(0), condition), D)
    attending = {name for name, block in model.model.named_modules() if isinstance(block, UNetBlock) and block.qkv is not None}
    assert attending == {name for name in blocks if "8x8_block" in name}  # self-attention is where attn_resolutions says


def test_dropout_acts_in_the_transformer(model):
    stirred(model)
    condition = model.condition(Z)
    one, two = (model.denoise(X, SIGMA, C, condition) for _ in range(2))
    assert not torch.equal(one, two)
    for block in model.model.vit:
        block.mlp[-1].p = 0
    assert torch.equal(*(model.denoise(X, SIGMA, C, condition) for _ in range(2)))


@torch.no_grad()
def test_the_transformer_is_a_residual_branch(model):
    """Where it starts, at zero, what comes down goes up."""
    given = []
    stirred(model).eval()
    model.model.down.register_forward_hook(lambda *arguments: given.append(arguments[2]))
    model.model.up.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    model.denoise(X, SIGMA, C, model.condition(Z))
    torch.nn.init.zeros_(model.model.from_vit.weight)
    torch.nn.init.zeros_(model.model.from_vit.bias)
    model.denoise(X, SIGMA, C, model.condition(Z))
    assert not torch.equal(*given[:2]) and torch.equal(*given[2:])


def test_recomputed_gradients_are_the_same(model):
    """With dropout, to the bit; and little is kept for them."""
    stirred(model)
    found = []
    for model.model.recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            D = model.denoise(X, SIGMA, C, model.condition(Z))
        D.square().sum().backward()
        found.append([p.grad for p in model.model.parameters()])
        found.append(sum(kept))
    assert same(found[0], found[2]) and all(grad is not None for grad in found[0]) and found[3] < found[1] / 2


def test_the_configuration_of_imagenet_128():
    """36 layers of width 2048 at 16 x 16 pixels: 2.25 billion parameters, of which 1.81 billion are the Transformer's, without
    what modulates it."""
    import train_stage1
    config = configure(dict(vars(train_stage1)), [str(ROOT / "config" / "imagenet128.py")])
    with torch.device("meta"):
        model = DisCoDiff(128, 3, 1000, **arguments_of(config, DisCoDiff, UViT) | dict(conditioning="attention"))

    def size(part):
        return sum(p.numel() for p in part.parameters())

    vit = model.model.vit
    assert size(model.model) == 2_254_594_179 and round(size(vit) / 1e9 - sum(size(block.modulation) for block in vit) / 1e9, 2) == 1.81
    assert len(vit) == 36 and len(model.model.cross) == 12 and model.model.position.shape == (256, 2048)
    assert model.encoder.patches.kernel_size == (16, 16) and model.model.recompute


def test_it_trains_goes_on_and_samples(tmp_path):
    """In two parts as in one, to the bit, recomputed or not; plain, and then with codes."""
    for name, images, recompute in (("parts", 8, "True"), ("parts", 16, "False"), ("whole", 16, "False")):
        run("train_stage1.py", f"--out_dir={tmp_path / name}", *TINY_UVIT, "--dropout=0.1", f"--total_images={images}", f"--recompute={recompute}")
    parts, whole = (checkpoint(tmp_path / name) for name in ("parts", "whole"))
    assert same_training({**parts, "model_args": 0}, {**whole, "model_args": 0}) and whole["config"]["attn_resolutions"] == (14,)
    run("sample.py", f"--out_dir={tmp_path / 'whole'}", *SAMPLE, "--code=0,1,2", "--guidance=2", "--class_label=3")
    assert load(tmp_path / "whole")["images"].shape == (20, 28, 28, 1)
    plain = tmp_path / "plain"
    run("train_stage1.py", f"--out_dir={plain}", *TINY_UVIT, "--num_latents=0", "--total_images=16")
    stage1 = Script("train_stage1.py", "default", tmp_path / "codes", "cpu", *TINY_UVIT, f"--init_from={plain}", "--recompute=True")
    x, sigma, z = torch.randn(2, 1, 28, 28), torch.tensor([0.5, 2]), torch.randint(5, (2, 3))
    with torch.no_grad():
        assert torch.equal(stage1.model.denoise(x, sigma, None, stage1.model.condition(z)), load_stage1(plain)[0].denoise(x, sigma))
    with pytest.raises(UserError, match="depth=3 there, 4 here"):
        run("train_stage1.py", f"--out_dir={tmp_path / 'other'}", *TINY_UVIT, "--depth=4", f"--init_from={plain}")


def test_flow_matching_with_codes_of_the_priors_and_guidance(tmp_path):
    """Each prior draws the codes; guidance acts; by either ODE; and no batch size changes an image."""
    run("train_stage1.py", f"--out_dir={tmp_path}", *TINY_UVIT, "--process=flow", "--total_images=96", "--lr=0.02")
    model, _ = load_stage1(tmp_path)
    assert isinstance(model.model, UViT) and model.process is PROCESSES["flow"]
    made = []
    for prior, guidance, ode, size in (("ar", 1, "edm", 12), ("ar", 3, "edm", 12), ("ar", 3, "flow-heun", 12), ("sedd", 3, "edm", 12),
                                       ("sedd", 3, "edm", 7)):
        if not (tmp_path / f"prior_{prior}.pt").exists():
            run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, f"--prior={prior}", "--total_images=100")
        run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, "--num_images=12", f"--prior={prior}", f"--guidance={guidance}", f"--ode={ode}",
            f"--batch_size={size}")
        made.append(load(tmp_path))
    plain, guided, by_flow, of_sedd, in_parts = made
    assert (plain["nfe"] == 5).all() and (guided["nfe"] == 10).all() and np.array_equal(plain["codes"], guided["codes"])
    assert not close(plain, guided) and not close(guided, by_flow)
    assert close(of_sedd, in_parts) and not np.array_equal(of_sedd["codes"], guided["codes"])


@pytest.mark.parametrize("arguments, message", [
    (["--channel_mult=1,2,2,4"], "images of 28 pixels can't be halved 3 times, for a U-ViT of channel_mult"),
    (["--channel_mult=4,", "--attn_resolutions=0,"], "it needs two numbers or more"),
    (["--attn_resolutions=7,"], r"attn_resolutions has \[7\]: the feature maps are \[28, 14\]"),
    (["--channel_mult=1,2,25"], "200 is not by 3"),
])
def test_bad_input(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("train_stage1.py", f"--out_dir={tmp_path}", *TINY_UVIT, *arguments)
    assert "\n" not in str(error.value)
