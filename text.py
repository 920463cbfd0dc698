"""
Text to codes: a masked diffusion language model whose vocabulary is widened by code tokens (DLC sec. 6).

Its sequences are [codes] [START] [caption]: the first n places always are codes. Its tokens are the text's, the mask
among them, then START, then `values` code tokens, which all places share. If stage 1 is told an image's class, the
class is one more code, in the last of the n places: the model writes it too.

Codes are int64 (B, n) here, in 0 ... values - 1, or `values` for a mask; captions int64 (B, T), -1 after their ends.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from llada import LLaDA, mask_rate, token_losses, unmask


def padded(captions, context):
    """Lists of tokens -> int64 (B, T), -1 after their ends, cut to `context` tokens where they are longer"""
    captions = [torch.tensor(tokens[:context], dtype=torch.int64) for tokens in captions]
    return nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=-1)


class TextModel(LLaDA):
    """p(codes, caption), of m = num_latents codes of k = codebook_size values, and of a class, if label_dim > 0.

    vocabulary: of the text, mask_token included; context: the most tokens of a caption; place_embedding: whether the
    places of codes have embeddings, besides rotary positions; sizes: `LLaDA`'s.
    """

    def __init__(self, num_latents, codebook_size, label_dim=0, vocabulary=257, mask_token=256, context=64,
                 place_embedding=True, **sizes):
        self.places, self.values = num_latents + (label_dim > 0), max(codebook_size, label_dim)
        super().__init__(vocabulary + 1 + self.values, places=self.places * place_embedding, **sizes)
        self.num_latents, self.codebook_size, self.label_dim = num_latents, codebook_size, label_dim
        self.start, self.mask, self.context = vocabulary, mask_token, context

    def sequence(self, z, captions):
        """-> tokens (B, n + 1 + T); bool (B, n + 1 + T), False after the captions' ends"""
        z = torch.where(z == self.values, self.mask, self.start + 1 + z)
        x = torch.cat([F.pad(z, (0, 1), value=self.start), captions], dim=1)
        return x.clamp(min=0), x >= 0

    def loss(self, z, captions, t, u, kept, dropped, network=None):
        """An upper bound on -ln p(codes, caption), on average over t and u (DLC Eq. 5, per sequence). -> (B,) nats

        t: (B,) times, on [0, 1); u: (B, n + 1 + T or more), uniform on [0, 1): masks; START is never masked.
        kept: (B,) bool, True for captions that are never masked: then it bounds -ln p(codes | caption).
        dropped: (B,) bool, True for captions that are all masks, and not predicted: -ln p(codes).
        network: a wrapper to call in place of this module, such as DistributedDataParallel.
        """
        (x, real), n = self.sequence(z, captions), self.places
        p = mask_rate(t)[:, None].expand_as(x)
        masked = (u[:, :x.shape[1]] < p) & real
        masked[:, n] = False
        masked[kept | dropped, n:] = False
        hidden = masked.clone()
        hidden[dropped, n + 1:] = real[dropped, n + 1:]
        logits = (network or self)(torch.where(hidden, self.mask, x), real, masked)
        losses = token_losses(logits, x[masked], p[masked])
        return torch.zeros(len(x), device=x.device).index_add(0, masked.nonzero()[:, 0], losses)

    def predict(self, z, captions, guidance=1.0):
        """-> logits (B, n, values) of all codes, -inf for those that a place can't have

        guidance: w, of un + w (cond - un), where un does not know the caption; 1: none. LLaDA's program counts w - 1.
        """
        if guidance != 1:
            un = self.predict(z, torch.where(captions < 0, -1, self.mask))
            logits = torch.lerp(un, self.predict(z, captions), guidance)
            return torch.where(un == -math.inf, un, logits)
        x, real = self.sequence(z, captions)
        at = torch.zeros_like(real)
        at[:, :self.places] = True
        logits = self(x, real, at)[:, self.start + 1:].unflatten(0, (len(x), self.places))
        logits[:, :self.num_latents, self.codebook_size:] = -math.inf
        logits[:, self.num_latents:, self.label_dim:] = -math.inf
        return logits

    @torch.no_grad()
    def nats(self, z, captions, generator=None, draws=16):
        """An upper bound on -ln p(codes | caption), on average over the generator. -> (B,)

        In each draw, k = 1 ... n codes are masked, and count n / k each: less noise than t and u make.
        """
        nats, n, device = 0, self.places, z.device
        for i in range(draws):
            spread = torch.rand(len(z), generator=generator, device=device)
            k = 1 + ((i + spread) * n / draws).long().clamp(max=n - 1)
            order = torch.rand(z.shape, generator=generator, device=device).argsort(1).argsort(1)
            masked = order < k[:, None]
            logits = self.predict(torch.where(masked, self.values, z), captions)
            losses = F.cross_entropy(logits.transpose(1, 2), z, reduction="none")
            nats += n / k * torch.where(masked, losses, 0).sum(1) / draws
        return nats

    def sample(self, noise, captions, temperature=1.0, text_order="low-confidence", text_steps=0, text_block=0,
               text_guidance=1.0):
        """Codes for captions, by `unmask`. -> codes int64 (B, m); classes (B,), None without classes

        noise: a `SeededNoise` for B codes. text_order: of the places, "low-confidence" or "random"; text_steps: 0 for
        n; text_block: 0 for one block; text_guidance: of `predict`.
        """
        place = self.wte.weight.device
        captions = captions.to(place)

        def predict(z):
            return self.predict(z.to(place), captions, text_guidance).to(noise.device).double()

        z = torch.full((len(noise), self.places), self.values, device=noise.device)
        rand = noise.rand if text_order == "random" else None
        z = unmask(predict, z, self.values, text_steps or self.places, noise.gumbel, temperature, rand, text_block)
        return z[:, :self.num_latents], z[:, -1] if self.label_dim else None
