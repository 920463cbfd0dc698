"""DisCo-Diff: what the codes change, and what they do not; Gumbel-Softmax."""
import ast
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, fill

from model import CodeTable, DisCoDiff, draw_codes, gumbel_softmax
from noise import gumbel_noise, seeded_generator
from unet import UNet
from vit import SEMEncoder

SHAPES = json.loads((ROOT / "tests/reference/edm_shapes.json").read_text())
SMALL = dict(img_resolution=16, img_channels=3, label_dim=10, model_channels=64, channel_mult=(1, 2), num_blocks=1,
             attn_resolutions=(8,), dropout=0.1, num_latents=3, codebook_size=5, latent_dim=12, latent_layers=2,
             latents_to_emb=True, encoder_dim=24, encoder_layers=2, encoder_heads=3)


def test_imagenet64_has_edms_parameters():
    """config/imagenet64.py is EDM's network, and the paper's new layers."""
    config = {}
    for node in ast.parse((Path(__file__).parent.parent / "config" / "imagenet64.py").read_text()).body[1:]:
        config[node.targets[0].id] = ast.literal_eval(node.value)
    network = {k: v for k, v in config.items() if k in inspect.signature(DisCoDiff).parameters
               or k in inspect.signature(UNet).parameters}
    with torch.device("meta"):
        model = DisCoDiff(64, 3, 1000, **network)
    plain = {n: p for n, p in model.model.named_parameters() if ".cross." not in n}
    assert sum(p.numel() for p in plain.values()) == 295_899_267
    assert {f"model.{n}": list(p.shape) for n, p in plain.items()} == SHAPES["imagenet64"]["shapes"]
    assert model.latents.codebook.shape == (10, 100, 192) and len(model.latents.blocks) == 6
    assert len(model.encoder.blocks) == 12 and model.encoder.patches.weight.shape == (768, 3, 8, 8)
    assert model.encoder.blocks[0].heads == 12
    attention = [n for n, _ in model.model.named_modules() if n.endswith(".qkv")]
    cross = [n for n, _ in model.model.named_modules() if n.endswith(".cross")]
    assert [n.removesuffix("qkv") for n in attention] == [n.removesuffix("cross") for n in cross]
    wanted = dict(batch_size=4096, lr=1e-4, encoder_lr=1e-4, warmup_images=10e6, total_images=2.5e9, tau=1, null_prob=0.1,
                  ema_halflife_images=50e6, ema_rampup=0.05, P_mean=-1.2, P_std=1.2, sigma_data=0.5, dropout=0.1)
    assert {k: config[k] for k in wanted} == wanted


@pytest.mark.parametrize("to_emb", [False, True])
def test_latents_change_nothing_at_step_0(to_emb):
    """New layers start as the identity: fine-tuning starts from EDM's output, to the bit."""
    model, plain = (DisCoDiff(**{**SMALL, "latents_to_emb": to_emb, "num_latents": m}).eval() for m in (3, 0))
    state = {n: fill(n, tuple(p.shape)) for n, p in plain.state_dict().items()}
    plain.load_state_dict(state)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("cross" in n or n.startswith(("latents", "encoder", "model.map_latents")) for n in missing)
    x, sigma, c = torch.randn(4, 3, 16, 16), torch.rand(4) + 0.1, torch.arange(4)
    condition = model.condition(torch.randint(5, (4, 3)))
    assert len(condition) == sum("cross.kv.weight" in n for n in missing) + to_emb > 2
    assert ("emb" in condition) == to_emb == ("model.map_latents.weight" in missing)
    assert torch.equal(model.denoise(x, sigma, c, condition), plain.denoise(x, sigma, c))


def used_model():
    """A model whose zero-initialised layers are not zero, so that everything has an effect."""
    torch.manual_seed(1)
    model = DisCoDiff(**SMALL).eval()
    for n, p in model.named_parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
def test_each_latent_matters_and_dropped_ones_do_not():
    model = used_model()
    x, sigma = torch.randn(1, 3, 16, 16), torch.ones(1)

    def D(codes, drop=None):
        return model.denoise(x, sigma, None, model.condition(torch.tensor([codes]), drop))

    for other in ([1, 0, 0], [0, 1, 0], [0, 0, 1]):
        assert (D(other) - D([0, 0, 0])).abs().max() > 1e-4
    dropped = torch.tensor([True])
    assert torch.equal(D([0, 0, 0], dropped), D([4, 2, 1], dropped))
    assert (D([0, 0, 0], dropped) - D([0, 0, 0])).abs().max() > 1e-4


@torch.no_grad()
def test_codes_enter_by_the_embedding():
    """A linear map of the tokens' mean is added to the embedding, as a class label is: alone, with the cross-attentions still
    the identity, it changes D; each code does, and null latents do."""
    model = DisCoDiff(**SMALL).eval()
    for n, p in model.named_parameters():
        if not p.any() and ".cross." not in n:
            torch.nn.init.normal_(p, std=0.2)
    x, sigma, z = torch.randn(2, 3, 16, 16), torch.ones(2), torch.tensor([[1, 4, 0], [2, 2, 3]])
    condition = model.condition(z)
    mean = model.latents(F.one_hot(z, 5)).mean(1)  # (B, latent_dim)
    weight, bias = model.model.map_latents.weight, model.model.map_latents.bias
    assert torch.allclose(condition["emb"][0], mean @ weight.T + bias, atol=1e-6)
    D = model.denoise(x, sigma, None, condition)
    plain = model.denoise(x, sigma, None, {name: part for name, part in condition.items() if name != "emb"})
    assert (D - plain).abs().amax((1, 2, 3)).min() > 1e-3
    for other in (z.flip(0), z.roll(1, 1)):
        assert (model.denoise(x, sigma, None, model.condition(other)) - D).abs().amax((1, 2, 3)).min() > 1e-4
    null = model.denoise(x, sigma, None, model.condition(z, torch.tensor([True, False])))
    assert (null - D)[0].abs().max() > 1e-4 and torch.allclose(null[1], D[1], atol=1e-6)


@torch.no_grad()
def test_hard_codes_equal_one_hot_rows():
    model, z = used_model(), torch.tensor([[1, 4, 0], [2, 2, 3]])
    hard, soft = model.condition(z), model.condition(F.one_hot(z, 5).float())
    assert hard.keys() == soft.keys() and all(torch.equal(a, b) for block in hard for a, b in zip(hard[block], soft[block]))


def test_loss_reaches_every_parameter():
    model = used_model().train()
    y = torch.randn(4, 3, 16, 16)
    D, logits = model(y, torch.randn_like(y), torch.ones(4), torch.arange(4), torch.randn(4, 3, 5),
                      torch.tensor([True, False, False, False]))
    D.square().sum().backward()
    assert logits.shape == (4, 3, 5)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gumbel_softmax():
    logits = torch.tensor([1.0, 0.0, -2.0]).expand(200_000, 3)
    gumbel = gumbel_noise(logits.shape, seeded_generator("cpu", "test", 0))
    soft = gumbel_softmax(logits, 1.0, gumbel)
    assert torch.allclose(soft.sum(-1), torch.ones(()))
    assert torch.allclose(soft[0], ((logits + gumbel)[0].exp() / (logits + gumbel)[0].exp().sum()))
    hard = F.one_hot(draw_codes(logits, gumbel), 3).float()
    assert (gumbel_softmax(logits, 0.001, gumbel) - hard).abs().mean() < 1e-3  # tau -> 0
    # draws are exact: chi-square with 2 degrees of freedom, 13.8 at p = 0.001
    expected = logits[0].softmax(0) * len(logits)
    assert ((hard.sum(0) - expected) ** 2 / expected).sum() < 13.8
    # Gumbel(0, 1) has the mean 0.5772 (Euler's constant) and the variance pi^2 / 6
    assert abs(gumbel.mean() - 0.5772) < 0.01 and abs(gumbel.var() - math.pi ** 2 / 6) < 0.02


@torch.no_grad()
def test_training_sees_codes_that_are_relaxed_by_tau():
    """softmax((logits + gumbel) / tau), with tau = 2, which no power of leaves as it is."""
    model, g = used_model(), torch.Generator().manual_seed(0)
    y, noise, gumbel = (torch.randn(2, *shape, generator=g) for shape in ((3, 16, 16), (3, 16, 16), (3, 5)))
    D, logits = model(y, noise, torch.ones(2), None, gumbel, None, 2.0)
    weights = (logits / 2).exp() * (gumbel / 2).exp()
    z = weights / weights.sum(2, keepdim=True)
    assert (D - model.denoise(y + noise, torch.ones(2), None, model.condition(z))).abs().max() < 1e-4
    assert (D - model(y, noise, torch.ones(2), None, gumbel)[0]).abs().max() > 1e-3  # tau = 1


@pytest.mark.parametrize("changes, message", [
    (dict(img_resolution=15), "15 pixels can't be halved"), (dict(attn_resolutions=(7,)), r"attn_resolutions has \[7\]"),
    (dict(encoder_patch=5), "encoder_patch 5"), (dict(encoder_heads=5), "24 is not by 5")])
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        DisCoDiff(**{**SMALL, **changes})


# codes by their average (DLC), and codes of an encoder that stays as it is


@torch.no_grad()
def test_averaged_codes_equal_the_authors():
    """Numbers of lavoiems/DiscreteLatentCode, with codes, where 5 is the row for "no latents", and with probabilities."""
    table = CodeTable(6, 5, 64)
    table.table.data = fill("sem_embedder.embedding_table", (6, 6, 64))
    with np.load(ROOT / "tests/reference/dit_tiny.npz") as f:
        codes, codes_emb, soft, soft_emb = (torch.from_numpy(f[key]) for key in ("codes", "codes_emb", "soft", "soft_emb"))
    assert (table(codes) - codes_emb).abs().max() < 1e-7 and (table(soft) - soft_emb).abs().max() < 1e-7
    assert (codes[3] == 5).all()
    for z in (codes[:3].repeat(2, 1), soft.repeat(2, 1, 1)[:6]):
        assert (table(z, torch.ones(6, dtype=torch.bool)) - codes_emb[3]).abs().max() < 1e-7


def test_averaged_codes_and_their_gradients_are_those_of_one_hot_rows(g):
    """emb = sum_i table_i[z_i] / m, of an image whose latents are dropped sum_i table_i[k] / m."""
    table, z, drop = CodeTable(3, 5, 16), torch.tensor([[1, 4, 0], [2, 2, 3]]), torch.tensor([False, True])
    assert table.table.std().item() == pytest.approx(1 / 4, rel=0.1)  # N(0, 1 / width)
    wanted = torch.stack([(table.table[0, 1] + table.table[1, 4] + table.table[2, 0]) / 3, table.table[:, 5].mean(0)])
    weights = torch.randn(2, 16, generator=g)
    slopes = [torch.autograd.grad((emb * weights).sum(), table.table)[0]
              for emb in (wanted, table(z, drop), table(F.one_hot(z, 5), drop))]
    for emb, slope in zip((table(z, drop), table(F.one_hot(z, 5).float(), drop)), slopes[1:]):
        assert torch.allclose(emb, wanted, atol=1e-6) and torch.allclose(slope, slopes[0], atol=1e-6)


def test_averaged_codes_can_be_trained_end_to_end(g):
    """They are all that the denoiser reads: there is no cross-attention. The loss reaches every parameter, the encoder's too."""
    torch.manual_seed(1)
    model = DisCoDiff(**SMALL, conditioning="average").train()
    assert not any(".cross." in n or ".map_latents." in n for n, _ in model.named_parameters())
    for n, p in model.named_parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    y = torch.randn(4, 3, 16, 16, generator=g)
    D, logits = model(y, torch.randn(y.shape, generator=g), torch.ones(4), torch.arange(4), torch.randn(4, 3, 5, generator=g),
                      torch.tensor([True, False, False, False]))
    D.square().sum().backward()
    assert logits.shape == (4, 3, 5)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    z = torch.tensor([[0, 1, 2], [4, 3, 2]])
    assert model.condition(z).keys() == {"emb"} and model.condition(z)["emb"][0].shape == (2, 256)


FROZEN = dict(img_resolution=16, img_channels=3, num_latents=3, codebook_size=5, patch=8, dim=8, layers=1, heads=2, registers=1,
              drop_path=0.9, layerscale=1.0)


def test_codes_of_a_frozen_encoder_are_certain(g):
    """The argmax of its logits, whatever noise and temperature, while the denoiser is trained too; and it gets no gradient."""
    torch.manual_seed(1)
    model = DisCoDiff(**SMALL | dict(dropout=0.0), frozen=FROZEN, conditioning="average")
    assert not model.encoder.training
    model.train()
    assert not any(part.training for part in model.encoder.modules()) and model.latents.training
    for n, p in model.named_parameters():
        if n.startswith("encoder.") or not p.any():
            torch.nn.init.normal_(p, std=2.0 if n.startswith("encoder.") else 0.2)
    y, gumbel = torch.randn(32, 3, 16, 16, generator=g), gumbel_noise((32, 3, 5), g)
    codes = SEMEncoder.forward(model.encoder, y).argmax(-1)
    assert len(codes.unique(dim=0)) > 2
    logits = model.encoder(y)
    assert torch.equal(draw_codes(logits, gumbel), codes)
    for tau in (0.1, 1.0, 10.0):
        assert torch.equal(gumbel_softmax(logits, tau, gumbel), F.one_hot(codes, 5).float())
    noise, sigma = torch.randn(y.shape, generator=g), torch.ones(32)
    D, logits = model(y, noise, sigma, None, gumbel)
    given, none = model(y, noise, sigma, z=codes)
    assert none is None and torch.equal(logits.exp(), F.one_hot(codes, 5).float()) and (D - given).abs().max() < 1e-4
    given.sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and model.latents.table.grad.any()
