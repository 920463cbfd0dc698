"""The text model: its sequences, masks and bounds; generation keeps to the codes; guidance."""
import itertools
import math

import pytest
import torch

from noise import SeededNoise
from text import TextModel, padded


@pytest.fixture
def model(g):
    """Of 2 codes of 3 values and 4 classes, with weights that say something."""
    torch.manual_seed(0)
    net = TextModel(2, 3, 4, vocabulary=9, mask_token=8, context=5, layers=1, dim=16, heads=2, hidden=24).eval()
    torch.nn.init.normal_(net.ff_out.weight, std=0.5)
    return net.requires_grad_(False)


Z = torch.tensor([[0, 2, 3], [4, 1, 0]])  # 4 is a mask
CAPTIONS = padded([[5, 6, 7], [1]], 5)


def test_sequences(model):
    x, real = model.sequence(Z, CAPTIONS)
    assert x.tolist() == [[10, 12, 13, 9, 5, 6, 7], [8, 11, 10, 9, 1, 0, 0]]
    assert real.tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    assert padded([[1, 2, 3]], 2).tolist() == [[1, 2]]
    assert model.wte.num_embeddings == 9 + 1 + 4 and model.place.shape == (3, 16)
    without = TextModel(2, 3, 4, place_embedding=False, layers=1, dim=16, heads=2, hidden=24)
    assert "place" not in dict(without.named_parameters())


def test_what_is_masked_and_predicted(model):
    """START and padding never; a kept caption is not, a dropped one is all masks and not predicted."""
    z, captions = torch.zeros(4, 3, dtype=torch.int64), padded([[5, 6, 7]] * 3 + [[1]], 5)
    kept, dropped = torch.tensor([[False, True, False, False], [False, False, True, False]])
    u = torch.full((4, 9), 0.7)
    u[:, ::2] = 0.1
    u[:, 3] = 0.1  # START
    given = {}

    def network(x, real, at):
        given.update(x=x, real=real, at=at)
        return model(x, real, at)

    t = torch.full((4,), 0.5)
    loss = model.loss(z, captions, t, u, kept, dropped, network)
    even = [True, False, True, False, True, False, True]
    assert given["at"].tolist() == [even, even[:3] + [False] * 4, even[:3] + [False] * 4, [*even[:5], False, False]]
    assert given["x"].tolist() == [[8, 10, 8, 9, 8, 6, 8], [8, 10, 8, 9, 5, 6, 7], [8, 10, 8, 9, 8, 8, 8],
                                   [8, 10, 8, 9, 8, 0, 0]]
    log_p = model(given["x"], given["real"], given["at"]).log_softmax(-1)
    target = [10, 10, 5, 7, 10, 10, 10, 10, 10, 10, 1]
    nats = -log_p[torch.arange(11), target] / (0.999 * 0.5 + 0.001)
    wanted = torch.stack([part.sum() for part in nats.split([4, 2, 2, 3])])
    assert torch.allclose(loss, wanted, atol=1e-5)


def exact(model, captions):
    """-> for each of the 6 orders of the 3 places, -ln p (3, 3, 4) of all codes, generated one by one in this order"""
    states = torch.cartesian_prod(torch.arange(5), torch.arange(5), torch.arange(5))  # 4 is a mask
    nats = -model.predict(states, captions.expand(125, -1)).log_softmax(-1).reshape(5, 5, 5, 3, 4)
    found = torch.zeros(6, 3, 3, 4)
    for of_order, order in zip(found, itertools.permutations(range(3))):
        for z in itertools.product(range(3), range(3), range(4)):
            x = [4, 4, 4]
            for i in order:
                of_order[z] += nats[(*x, i, z[i])]
                x[i] = z[i]
    return found


def test_bounds(model, g):
    """`nats`, and the loss of a kept caption where none but code tokens can be, are a mean over all orders."""
    wanted = exact(model, CAPTIONS[:1])[:, 2, 0, 3].mean().item()
    z, captions = torch.tensor([[2, 0, 3]]).expand(4000, -1), CAPTIONS[:1].expand(4000, -1)
    found = model.nats(z, captions, g, draws=3)
    assert found.mean().item() == pytest.approx(wanted, abs=4 * found.std().item() / 4000 ** 0.5)

    def network(x, real, at):
        logits, place = model(x, real, at), at.nonzero()[:, 1]
        logits[:, :10] = -math.inf
        logits[place < 2, 13:] = -math.inf
        return logits

    t, u = (torch.arange(4000) + 0.5) / 4000, torch.rand(4000, 9, generator=g)
    loss = model.loss(z, captions, t, u, torch.ones(4000, dtype=torch.bool), torch.zeros(4000, dtype=torch.bool), network)
    assert loss.mean().item() == pytest.approx(wanted, abs=4 * loss.std().item() / 4000 ** 0.5)


def test_tokens_stay_in_range_and_rows_depend_on_their_seeds(model):
    """Codes below 3 and classes below 4, though other tokens are likelier; whatever else is in the batch."""
    model.ff_out.weight[:10] += 10
    captions = padded([[1], [5, 6, 7], [2, 2]] * 30, 5)
    settings = [dict(temperature=3.0), dict(text_order="random", temperature=1.0), dict(text_guidance=3.0),
                dict(text_block=1, temperature=1.0), dict(text_steps=1, temperature=1.0)]
    for setting in settings:
        codes, classes = model.sample(SeededNoise("codes", range(90)), captions, **setting)
        assert codes.shape == (90, 2) and {*codes.unique().tolist()} == {0, 1, 2} and classes.max() == 3
        few, some = model.sample(SeededNoise("codes", range(3, 6)), captions[3:6], **setting)
        assert torch.equal(few, codes[3:6]) and torch.equal(some, classes[3:6])


def test_fewer_classes_than_values():
    model = TextModel(2, 5, 2, vocabulary=9, mask_token=8, layers=1, dim=16, heads=2, hidden=24)
    logits = model.predict(Z, CAPTIONS)
    assert logits.shape == (2, 3, 5) and logits[:, :2].isfinite().all()
    assert logits[:, 2, :2].isfinite().all() and logits[:, 2, 2:].eq(-math.inf).all()


def test_samples_are_from_the_distribution(model):
    """Random order, temperature 1, one code a step: codes have their exact probabilities, a mean over orders."""
    n, captions = 3000, CAPTIONS[1:]
    codes, classes = model.sample(SeededNoise("codes", range(n)), captions.expand(n, -1), text_order="random")
    p = (-exact(model, captions)).exp().mean(0)
    assert p.sum().item() == pytest.approx(1)
    counts = torch.bincount(codes[:, 0] * 12 + codes[:, 1] * 4 + classes, minlength=36)
    chi_square = ((counts - n * p.flatten()) ** 2 / (n * p.flatten())).sum()
    assert chi_square < 66.6  # 35 degrees of freedom: exceeded with probability 0.001


def test_guidance(model):
    """At 1 it is the model; elsewhere on the line through the model without caption; codes out of range stay so."""
    with_caption, masks = model.predict(Z, CAPTIONS), torch.where(CAPTIONS < 0, -1, 8)
    without, guided = model.predict(Z, masks), model.predict(Z, CAPTIONS, 2.5)
    assert torch.allclose(guided[:, :2, :3], (without + 2.5 * (with_caption - without))[:, :2, :3], atol=1e-5)
    assert guided[:, :2, 3].eq(-math.inf).all() and not guided.isnan().any() and guided[:, 2].isfinite().all()
    assert not torch.allclose(without, with_caption)
