"""Embeddings in place of codes: what the denoiser reads, through stage 1, prior, samples and compositions."""
import numpy as np
import pytest
import torch
from conftest import load
from scripts import PRIOR, SAMPLE, Script, run
from test_encoded import GIVEN, few, make_encoder  # noqa: F401

import data
from codes import composed
from configurator import UserError
from embedding import FrozenEmbedding, LinearCondition, embedding_dim, standardised
from model import draw_codes
from trained import load_encoder, load_stage1
from vit import SEMEncoder

UNCONDITIONAL = [*GIVEN, "--class_cond=False", "--total_images=16"]


def test_an_embedding_is_a_code_of_numbers():
    x = torch.randn(3, 7)
    assert torch.equal(draw_codes(x[..., None], torch.randn(3, 7, 1)), x)
    rows = np.arange(8)
    mixed, of_first = composed(rows, x[:1].expand(8, -1), x[1:2].expand(8, -1), "cpu")
    assert torch.equal(mixed[[0, 4]], x[[0, 0]]) and torch.equal(mixed[[1, 5]], x[[1, 1]])
    assert torch.allclose(mixed[[2, 3, 6, 7]], x[:2].mean(0).expand(4, -1)) and of_first.tolist() == [True, False] * 4


def test_a_vector_is_standardised_over_its_own_entries():
    assert torch.allclose(standardised(torch.tensor([[1.0, 2, 3], [40, 0, 20]])), torch.tensor([[-1.0, 0, 1], [1, -1, 0]]))


def test_the_condition_is_linear_and_can_be_dropped():
    """A product with the weights, in float32 under autocast too; the vector for "no embedding" is as RCG starts it."""
    torch.manual_seed(0)
    layer, z = LinearCondition(5, 4000), torch.randn(4, 5)
    assert torch.allclose(layer(z), z @ layer.linear.weight.T, atol=1e-6) and len([*layer.parameters()]) == 2
    dropped = layer(z, torch.tensor([True, False, False, True]))
    assert torch.equal(dropped[[0, 3]], layer.null.expand(2, -1)) and torch.equal(dropped[1:3], layer(z)[1:3])
    assert layer.null.std().item() == pytest.approx(0.02, rel=0.1) and abs(layer.null.mean().item()) < 0.002
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer(z)
    assert torch.equal(under_autocast, layer(z))


FROZEN = dict(img_resolution=28, img_channels=1, num_latents=3, codebook_size=4, patch=14, dim=8, layers=1, heads=2, registers=2,
              stem=0, layerscale=1.0, drop_path=0.9)


def test_the_embedding_is_what_the_sems_read():
    """Class and register tokens, standardised as one vector; never under autocast, and without drop path in training."""
    torch.manual_seed(0)
    encoder, y = FrozenEmbedding("embedding", **FROZEN).train(), torch.rand(5, 1, 28, 28)
    assert embedding_dim("embedding", **FROZEN) == 24 and encoder.mlp is None
    source = SEMEncoder(**FROZEN).eval()
    source.load_state_dict(encoder.state_dict())
    tokens = source.tokens(y)[:, :3].flatten(1)
    wanted = (tokens - tokens.mean(1, keepdim=True)) / tokens.var(1, keepdim=True).sqrt()
    assert encoder(y).shape == (5, 24, 1) and torch.allclose(encoder(y)[..., 0], wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(encoder(y)[..., 0], wanted, atol=1e-5)


def test_the_random_mlp_reads_the_embedding():
    """Two hidden layers of twice the width; it depends on all the numbers, and is frozen."""
    torch.manual_seed(0)
    encoder, y = FrozenEmbedding("random-mlp", **FROZEN).train(), torch.rand(5, 1, 28, 28)
    assert embedding_dim("random-mlp", **FROZEN) == 6
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    out = encoder(y)
    assert out.shape == (5, 6, 1)
    assert torch.allclose(out.mean(1), torch.zeros(5, 1), atol=1e-5) and torch.allclose(out.std(1), torch.ones(5, 1))
    state, x = encoder.state_dict(), standardised(encoder.embed(y))
    for i, size in ((0, 48), (2, 48), (4, 6)):
        x = x @ state[f"mlp.{i}.weight"].T + state[f"mlp.{i}.bias"]
        assert x.shape == (5, size)
        x = torch.nn.functional.gelu(x) if i < 4 else x
    assert torch.allclose(out[..., 0], standardised(x), atol=1e-5)


@pytest.mark.parametrize("kind, size", [("embedding", 16), ("random-mlp", 4)])
def test_from_stage_1_to_samples(few, tmp_path, kind, size):  # noqa: F811
    """The step gets the embeddings from the file; what is sampled depends on them; a resumed run has the same MLP."""
    encoder = make_encoder(tmp_path / "encoder")
    arguments = [f"--out_dir={tmp_path}", *UNCONDITIONAL, f"--codes={encoder}", f"--conditioning={kind}"]
    run("train_stage1.py", *arguments)
    model, checkpoint = load_stage1(tmp_path)
    assert (model.num_latents, model.codebook_size) == (size, 1)
    (file,) = tmp_path.glob("codes-*.npy")
    kept, x = np.load(file), standardised(load_encoder(encoder)[0].embed(data.to_float(few)))
    if kind == "random-mlp":
        x = standardised(model.encoder.mlp(x))
        other = Script("train_stage1.py", "default", tmp_path / "other", "cpu", *UNCONDITIONAL, f"--codes={encoder}",
                       f"--conditioning={kind}", "--seed=1")
        assert not torch.equal(other.run.model.encoder.mlp[0].weight, model.encoder.mlp[0].weight)
    assert kept.shape == (1, 200, size) and kept.dtype == np.float32 and np.allclose(kept[0], x, atol=1e-4)
    stage1 = Script("train_stage1.py", "default", tmp_path / "step", "cpu", *arguments[1:])
    given, forward = [], stage1.run.forward
    stage1.run.forward = lambda *inputs: given.append(inputs) or forward(*inputs)
    asked = stage1.run.model.encoder
    asked.forward = None  # the step asks the file, not the encoder
    stage1.gradients(3)
    y, z = given[0][0], given[0][7]
    assert torch.allclose(z, type(asked).forward(asked, y)[..., 0], atol=1e-4)
    run("train_stage1.py", *arguments, "--total_images=24")
    assert torch.equal(load_stage1(tmp_path)[0].encoder(data.to_float(few[:9]))[..., 0].double(),
                       model.encoder(data.to_float(few[:9]))[..., 0].double())
    for prior in ("ar", "sedd"):
        with pytest.raises(UserError, match="say --prior=rdm"):
            run("train_prior.py", f"--out_dir={tmp_path}", f"--prior={prior}", *PRIOR)
    run("train_prior.py", f"--out_dir={tmp_path}", "--prior=rdm", *PRIOR, "--total_images=100", "--log_every=50")
    printed = run("sample.py", f"--out_dir={tmp_path}", "--prior=rdm", *SAMPLE, "--per_code=1")
    assert "codes of the prior rdm, 250 evaluations each" in printed
    made = load(tmp_path)
    assert made["codes"].shape == (20, size) and made["codes"].dtype == np.float32
    assert len(np.unique(made["codes"], axis=0)) == 20 and made["images"].std() > 0
    z, noise, sigma = torch.from_numpy(made["codes"][:2]), torch.randn(1, 1, 28, 28).expand(2, -1, -1, -1), torch.full((2,), 2.0)
    with torch.no_grad():
        trained = load_stage1(tmp_path)[0]
        D, dropped = (trained.denoise(noise, sigma, None, trained.condition(z, drop)) for drop in (None, torch.tensor([True, True])))
    assert not torch.equal(D[0], D[1]) and torch.equal(dropped[0], dropped[1]) and not torch.equal(D[0], dropped[0])
    run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, "--per_code=1", "--encode=fashion-mnist-10k", "--batch_size=7")
    rows = np.isclose(load(tmp_path)["codes"][:, None], kept[0][None], atol=1e-4).all(2)
    assert (rows.sum(1) == 1).all()  # each of an image of the data set
    with pytest.raises(UserError, match="reads embeddings"):
        run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, "--code=1,2")


def test_codes_and_embeddings_are_not_confused(trained, tmp_path):
    with pytest.raises(UserError, match="name its folder by --codes"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *UNCONDITIONAL, "--conditioning=embedding")
    with pytest.raises(UserError, match="stage1.pt has codes: say --prior=ar or sedd"):
        run("train_prior.py", f"--out_dir={trained}", "--prior=rdm", *PRIOR)
