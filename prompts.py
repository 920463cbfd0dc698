"""
Codes from prompts, for sample.py: a source of codes, as in codes.py.
"""

import re

from configurator import require
from text import padded
from tokens import read_text


def read_prompts(prompt, prompt_file):
    """The prompts of --prompt, separated by |, or of the lines of a file. -> list of str. Raises UserError."""
    require(not (prompt and prompt_file), "--prompt and --prompt_file both give prompts: choose one")
    parts = prompt.split("|") if prompt else read_text(prompt_file).removesuffix("\n").split("\n")
    prompts = [part.strip() for part in parts]
    empty = next((i for i, line in enumerate(prompts, 1) if not line), None)
    place = f"line {empty} of {prompt_file}" if prompt_file else f"prompt {empty} of --prompt={prompt}"
    require(not empty, f"{place} is empty: say what to draw")
    for line in prompts:  # a terminal's bytes that are no UTF-8 become surrogates
        require(not re.search("[\ud800-\udfff]", line), f"the prompt {line!r} has bytes that are no UTF-8")
    return prompts


def of_prompts(prompts, which, model, tokenizer, settings):
    """-> the source of codes that a TextModel writes for prompts (list of str). Raises UserError if one is too long.

    which(numbers): the prompt of each number, int64 (R,); settings: of `TextModel.sample`
    """
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, of_prompt in zip(prompts, tokens):
        require(len(of_prompt) <= model.context,
                f"the prompt {prompt!r:.100} has {len(of_prompt)} tokens, and this model reads {model.context} at most")
    steps, block = settings["text_steps"] or model.places, settings["text_block"] or model.places
    blocks = -(-model.places // block)
    require(blocks <= steps <= model.places,
            f"text_steps is {steps}: it must be {blocks} at least, a step for each block, and {model.places} at most, "
            "a step for each code")

    def source(numbers, noise):
        return model.sample(noise, padded([tokens[i] for i in which(numbers)], model.context), **settings)

    return source
