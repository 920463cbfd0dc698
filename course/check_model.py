"""
What must hold of answers in model.py.

The function with an exercise's name takes the student's module, and gives [(property, check)]. check(rng) gives
"" or None if the property holds, else words for the student. NAME_probe gives outputs at fixed inputs, by which
known wrong answers are recognised.
"""

import torch
from measures import far, fixed, gumbel, normal, small, tensor, uniform

# ----------------------------------------------------------------------------------------------------
# Gumbel-Softmax


def gumbel_softmax_probe(model):
    rng = fixed()
    return [model.gumbel_softmax(normal(rng, 2, 3, 4), 0.7, gumbel(rng, 2, 3, 4))]


def gumbel_softmax(model):
    def sums(rng):
        for shape in ((5,), (3, 4), (6, 2, 5)):
            logits, noise = normal(rng, *shape), gumbel(rng, *shape)
            y = tensor(model.gumbel_softmax(logits.clone(), 0.8, noise), shape, "gumbel_softmax")
            if far(y, model.gumbel_softmax(logits, 0.8, noise)) or far(y, model.gumbel_softmax(logits, 0.8, noise)):
                return "equal arguments must give the same: take the noise that is given, and change no argument"
            if far(y.sum(-1), torch.ones(shape[:-1])) or y.min() < 0:
                return "entries must be positive, and sum to 1 over the last axis"

    def ratios(rng):
        logits, noise = normal(rng, 50, 4), gumbel(rng, 50, 4)
        sharp, soft = (model.gumbel_softmax(logits, tau, noise).log() for tau in (0.5, 1.5))
        if far(3 * (soft[:, 1:] - soft[:, :1]), sharp[:, 1:] - sharp[:, :1]):
            return "a third of the temperature must triple the logarithms of all ratios: tau divides everything"

    def limit(rng):
        logits, noise = normal(rng, 500, 5), gumbel(rng, 500, 5)
        largest, place = model.gumbel_softmax(logits, 1e-3, noise).max(1)
        if (place != model.draw_codes(logits, noise)).any() or largest.mean() < 0.9:
            return "at a small tau, samples must be one-hot at draw_codes(logits, gumbel)"

    def gradient(rng):
        logits = normal(rng, 6, 4).requires_grad_()
        y = model.gumbel_softmax(logits, 2.0, gumbel(rng, 6, 4))
        if not y.requires_grad:
            return "the output carries no gradient to the logits"
        slope, = torch.autograd.grad(y[:, 0].sum(), logits)
        if not slope.abs().max() > 1e-3 or far(slope.sum(1) + 1, torch.ones(6)):
            return "the gradient is wrong: the same shift of all logits must change nothing, one logit alone something"

    def large(rng):
        y = model.gumbel_softmax(1e4 * normal(rng, 20, 4), 0.01, gumbel(rng, 20, 4))
        if far(y.sum(1), torch.ones(20)):
            return "large logits give NaN: use torch's softmax"

    return [("samples sum to 1, decided by the given noise", sums), ("at a small temperature it is draw_codes", limit),
            ("the temperature divides logits and noise", ratios),
            ("the gradient reaches the logits", gradient), ("large logits are no problem", large)]


# ----------------------------------------------------------------------------------------------------
# encoder and denoiser. lowest: the noise level below which codes never act


def tiny(model, rng, num_latents=3):
    return small(model.DisCoDiff(8, 1, 2, num_latents=num_latents, codebook_size=4, latent_dim=8, latent_layers=1,
                                 latent_heads=1, encoder_patch=4, encoder_dim=8, encoder_layers=1, encoder_heads=1,
                                 model_channels=4, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
                                 dropout=0.0), rng)


def batch(rng, n=4):
    """Clean images, noise scaled by sigma, sigma, classes, Gumbel noise"""
    sigma = 1.5 + uniform(rng, n).float()
    y, noise = normal(rng, n, 1, 8, 8).float(), sigma.view(-1, 1, 1, 1) * normal(rng, n, 1, 8, 8).float()
    return y, noise, sigma, torch.arange(n) % 2, gumbel(rng, n, 3, 4).float()


def forward_probe(model):
    rng = fixed()
    disco, (y, noise, sigma, labels, noise_of_codes) = tiny(model, rng), batch(rng)
    drop = torch.tensor([True, False, False, False])
    D, logits = disco(y, noise, sigma, labels, noise_of_codes, drop, 0.5)
    return [D[:, 0, :2], logits, disco(y, noise, 0.3 * sigma, labels, noise_of_codes, None, 0.5)[0][:, 0, :2]]


def forward(model, lowest=0.0):
    def clean(rng):
        disco, (y, noise, sigma, labels, g) = tiny(model, rng), batch(rng)
        outputs = [disco(y, n, sigma, labels, g) for n in (noise, 3 * noise)]
        logits = [tensor(found, (4, 3, 4), "forward's second result") for _, found in outputs]
        tensor(outputs[0][0], y.shape, "forward's first result")
        if far(logits[0], logits[1]) or far(logits[0], disco.encoder(y)):
            return "the logits must be those of the clean images, whatever the noise"

    def hard(rng):
        disco, (y, noise, sigma, labels, g) = tiny(model, rng), batch(rng)
        D, logits = disco(y, noise, sigma, labels, g, None, 1e-4)
        codes = model.draw_codes(logits, g)
        if far(D, model.denoiser(disco, labels, codes)(y + noise, sigma), 1e-3):
            return "as tau falls, D must become that of hard codes, for y + noise at sigma"

    def gradient(rng):
        disco, (y, noise, sigma, labels, g) = tiny(model, rng), batch(rng)
        D, _ = disco(y, noise, sigma, labels, g)
        (D - y).square().sum().backward()
        slopes = [p.grad for p in disco.encoder.parameters()]
        if any(slope is None for slope in slopes) or not max(slope.abs().max() for slope in slopes) > 0:
            return "the loss of D has no gradient in the encoder"

    def null(rng):
        disco, (y, noise, sigma, labels, g) = tiny(model, rng), batch(rng)
        drop = torch.tensor([True, False, True, False])
        results = [disco(y, noise, sigma, labels, noise_of_codes, drop)[0] for noise_of_codes in (g, g.flip(2))]
        moved = (results[0] - results[1]).abs().amax((1, 2, 3)) > 1e-6
        if moved.tolist() != [False, True, False, True]:
            return "D must depend on the codes' noise where drop is False, and only there"

    def low(rng):
        disco, (y, noise, sigma, labels, g) = tiny(model, rng), batch(rng)
        sigma = sigma * torch.tensor([0.1, 1, 0.1, 1])
        last = torch.tensor([False, False, False, True])
        for drop, wanted in ((None, [False, True, False, True]), (last, [False, True, False, False])):
            results = [disco(y, noise, sigma, labels, noise_of_codes, drop)[0] for noise_of_codes in (g, g.flip(2))]
            if ((results[0] - results[1]).abs().amax((1, 2, 3)) > 1e-6).tolist() != wanted:
                return f"codes must act at sigma >= {lowest:g} alone, with drop and without"

    def plain(rng):
        disco, (y, noise, sigma, labels, _) = tiny(model, rng, 0), batch(rng)
        D, logits = disco(y, noise, sigma, labels)
        if logits is not None or far(D, disco.denoise(y + noise, sigma, labels)):
            return "with num_latents = 0, D is that of plain EDM, and the logits are None"

    properties = [("the encoder reads clean images", clean), ("at a small temperature, codes are hard", hard),
                  ("the gradient reaches the encoder", gradient), ("dropped codes have no effect", null),
                  ("without latents it is plain EDM", plain)]
    return [*properties, ("codes act at high noise alone", low)] if lowest else properties
