"""LLaDA: losses, sampler and network against the numbers of its authors' programs."""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, fill

from llada import LLaDA, mask_rate, shares, token_losses, unmask

with np.load(ROOT / "tests/reference/llada.npz") as file:
    REFERENCE = {name: torch.from_numpy(file[name]) for name in file.files}
MASK = REFERENCE["mask_id"].item()
IDS, MASKED, PROMPT = (REFERENCE[name].long() for name in ("ids", "masked", "prompt"))
P = mask_rate(REFERENCE["t"])[:, None].expand(3, 12)


def losses(ids, masked):
    """`token_losses`, 0 where nothing is masked"""
    found = torch.zeros(3, 12)
    found[masked] = token_losses(REFERENCE["logits"][masked], ids[masked], P[masked])
    return found


def test_losses_are_the_authors():
    masked = REFERENCE["u"] < P
    assert torch.equal(masked, MASKED.bool())
    assert losses(IDS, masked).sum().item() / 36 == pytest.approx(REFERENCE["loss_pretrain"].item(), abs=1e-6)
    answer = torch.arange(12) >= REFERENCE["prompt_lengths"][:, None]  # fine-tuning: the prompt is never masked
    of_rows = losses(IDS, masked & answer).sum(1) / answer.sum(1)
    assert of_rows.mean().item() == pytest.approx(REFERENCE["loss_sft"].item(), abs=1e-6)
    real = masked & (REFERENCE["attention"] == 1)  # DLC: padding is never masked; a mean over the masked tokens
    found = losses(REFERENCE["ids_padded"].long(), real).sum() / real.sum()
    assert found.item() == pytest.approx(REFERENCE["loss_dlc"].item(), abs=1e-6)


def model(x):
    """The model of the reference: each token's logits depend on its place and its two neighbours."""
    logits = REFERENCE["P"] + REFERENCE["A"][x.roll(1, 1)] + REFERENCE["C"][x.roll(-1, 1)]
    logits[..., MASK] = -30
    return logits


def after(z, prompt=PROMPT):
    return model(torch.cat([prompt, z], 1))[:, 4:]


START = torch.full((2, 8), MASK)


@pytest.mark.parametrize("name", ["greedy", "half", "blocks", "blocks_half", "uneven", "guided"])
def test_every_step_of_a_generation_is_the_authors(name):
    steps, block, guidance = REFERENCE[f"settings_{name}"].tolist()
    seen = []

    def predict(z):
        seen.append(z)
        without = after(z, torch.full_like(PROMPT, MASK))
        return without + (guidance + 1) * (after(z) - without)

    x = unmask(predict, START, MASK, int(steps), block=int(block))
    assert torch.equal(torch.stack([*seen, x]), REFERENCE[f"trace_{name}"][:, :, 4:].long())
    assert torch.equal(x, REFERENCE[f"x_{name}"][:, 4:].long())


def test_generations_with_noise_are_the_authors():
    gumbel_u, order_u = iter(REFERENCE["gumbel_u"]), iter(REFERENCE["order_u"])
    x = unmask(after, START, MASK, 8, lambda *shape: -(-next(gumbel_u).log()).log(), REFERENCE["tau"].item())
    assert torch.equal(x, REFERENCE["x_gumbel"][:, 4:].long())
    x = unmask(after, START, MASK, 8, rand=lambda count: next(order_u))
    assert torch.equal(x, REFERENCE["x_random_order"][:, 4:].long())


@pytest.mark.parametrize("steps, block, placed", [
    (9, 4, [1] * 9), (3, 4, [4, 4, 1]), (7, 4, [2, 1, 1, 2, 1, 1, 1]), (5, 2, [2, 2, 2, 2, 1]), (2, 8, [8, 1]),
    (4, 0, [3, 2, 2, 2]), (9, 10, [1] * 9)])
def test_blocks_share_the_steps(steps, block, placed):
    """As many evaluations as are asked for; each block is full before the next begins, and the last may be shorter."""
    seen = []

    def predict(x):
        seen.append((x != 3).sum(1).tolist())
        filled = seen[-1][0] // (block or 9) * (block or 9)
        assert (x[:, :filled] != 3).all() and (x[:, filled + (block or 9):] == 3).all()
        return torch.zeros(1, 9, 3)

    unmask(predict, torch.full((1, 9), 3), 3, steps, block=block)
    assert [b - a for (a,), (b,) in itertools.pairwise([*seen, [9]])] == placed


def test_codes_come_before_the_prompt_in_dlc():
    x = unmask(lambda z: model(torch.cat([z, PROMPT], 1))[:, :8], START, MASK, 8)
    assert torch.equal(torch.cat([x, PROMPT], 1), REFERENCE["x_codes_first"].long())


def test_one_step_is_the_authors():
    """Three tokens of twelve places, of which some are filled; and how many are placed in each step."""
    x = REFERENCE["step_x"].long()
    p = torch.where(x == MASK, model(x).softmax(-1).amax(-1), -math.inf)
    assert torch.allclose(p, REFERENCE["step_confidence"])

    class Stop(Exception):
        pass

    calls = []

    def predict(z):
        calls.append(z)
        if len(calls) == 2:
            raise Stop
        return model(z)

    with pytest.raises(Stop):
        unmask(predict, x, MASK, 4)  # twelve places in four steps: three in each
    assert torch.equal(calls[1], REFERENCE["step_next"].long())
    assert shares(10, 4) + shares(8, 8) + shares(7, 3) == REFERENCE["transfer"].tolist()


@torch.no_grad()
def test_the_network_is_llama_without_a_causal_mask():
    with np.load(ROOT / "tests/reference/llama_tiny.npz") as file:
        x, real, logits = (torch.from_numpy(file[name]) for name in ("tokens", "real", "logits"))
    net = LLaDA(40, layers=2, dim=32, heads=4, hidden=48)
    net.load_state_dict({name: fill(name, p.shape) for name, p in net.named_parameters()})
    found = net(x.long(), real, real)
    assert found.shape == (33, 40) and torch.allclose(found[::4], logits, atol=1e-5)


def test_published_names():
    """And 8.0 billion numbers, without codes."""
    with torch.device("meta"):
        state = LLaDA(126_464).state_dict()
    blocks = {name.split(".", 2)[2] for name in state if name.startswith("blocks.")}
    assert blocks == {f"{layer}.weight" for layer in ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm",
                                                     "ff_proj", "up_proj", "ff_out")}
    assert {name for name in state if not name.startswith("blocks.")} == {"wte.weight", "ln_f.weight", "ff_out.weight"}
    assert len(state) == 32 * 9 + 3 and sum(p.numel() for p in state.values()) == 8_015_581_184


@pytest.mark.parametrize("recompute", [False, True])
def test_padding_is_not_seen_and_activations_are_recomputed(recompute, g):
    net = LLaDA(20, layers=2, dim=16, heads=2, hidden=24, places=3, recompute=recompute)
    torch.nn.init.normal_(net.ff_out.weight, generator=g)
    x = torch.randint(0, 20, (2, 8), generator=g)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[:, 6:] = False
    changed = torch.where(real, x, 1)
    logits = net(x, real, real)
    assert torch.equal(logits, net(changed, real, real))
    assert torch.allclose(logits, net(x[:, :6], real[:, :6], real[:, :6]), atol=1e-6)
    logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_it_starts_uniform_and_heads_must_fit():
    net = LLaDA(20, layers=1, dim=16, heads=2, hidden=24)
    ones = torch.ones(1, 4, dtype=torch.bool)
    assert net(ones.long(), ones, ones).eq(0).all()
    with pytest.raises(ValueError, match="each head's width must be an even number, for rotary positions: 18 / 2 is not"):
        LLaDA(20, layers=1, dim=18, heads=2, hidden=24)
