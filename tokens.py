"""
Text as tokens: its bytes, or the tokens of a published byte-level BPE, read from its tokenizer.json without a package.
"""

import functools
import itertools
import json
import re
import unicodedata
from pathlib import Path

from configurator import UserError, require

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel splits by


class Bytes:
    """Tokens 0 ... 255 are the bytes of the text in small letters, in UTF-8."""

    largest = 255

    def encode(self, text):
        return list(text.lower().encode())


@functools.cache
def characters(category):
    """All characters of a Unicode category such as L (letters) or Lu, as ranges for a regular expression."""
    have = [unicodedata.category(chr(c)).startswith(category) for c in range(0x110000)]
    edges = [c for c in range(0x110001) if (c < 0x110000 and have[c]) != (c > 0 and have[c - 1])]
    require(edges, f"a tokenizer's \\p{{{category}}} is not a category of characters that is known here")
    return "".join(f"\\U{first:08x}-\\U{after - 1:08x}" for first, after in zip(edges[::2], edges[1::2]))


def expression(pattern):
    """A tokenizer's pattern, which may have \\p{L} and the like -> a compiled regular expression of Python"""
    inside, parts = False, []
    for part in re.split(r"(\\p\{\w+\}|\\.|[\[\]])", pattern):
        if part in ("[", "]"):
            inside = part == "["
        if part.startswith(r"\p{"):
            part = characters(part[3:-1]) if inside else f"[{characters(part[3:-1])}]"
        parts.append(part)
    return re.compile("".join(parts))


def split(pieces, by):
    """Cuts each piece into matches of the expression and what is between them."""
    cut = []
    for piece in pieces:
        end = 0
        for match in by.finditer(piece):
            cut += [piece[end:match.start()], match[0]]
            end = match.end()
        cut.append(piece[end:])
    return [piece for piece in cut if piece]


@functools.cache
def byte_characters():
    """GPT-2's characters for bytes 0 ... 255: printable ones for themselves, then those from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


class BPE:
    """Byte-pair encoding by the content of a tokenizer.json (str), of the byte-level kind, as LLaDA's is.

    Special tokens in a text, and what the file would add around it, are not regarded: all of it is text. Raises
    UserError for a file of another kind.
    """

    def __init__(self, content):
        try:
            state = json.loads(content)
            model = state["model"]
            require(model.get("type", "BPE") == "BPE" and not model.get("byte_fallback"),
                    "the tokenizer is no byte-level BPE")
            self.ids, self.whole = model["vocab"], model.get("ignore_merges", False)
            self.ranks = {tuple(pair.split(" ") if isinstance(pair, str) else pair): rank
                          for rank, pair in enumerate(model["merges"])}
            self.normal = [step["type"] for step in flat(state.get("normalizer"), "normalizers")]
            steps = flat(state.get("pre_tokenizer"), "pretokenizers")
            self.cuts = [cut for step in steps for cut in self.cuts_of(step)]
            missing = [c for c in byte_characters() if c not in self.ids]
            lost = [pair for pair in self.ranks if len(pair) != 2 or "".join(pair) not in self.ids]
            whole = all(type(token) is int and token >= 0 for token in self.ids.values())
            self.largest = max(self.ids.values())
        except (ValueError, LookupError, TypeError, AttributeError, re.error) as error:
            raise UserError(f"the tokenizer is no tokenizer.json that can be read here: {error!r}"[:300]) from None
        known = {"NFC", "NFD", "NFKC", "NFKD"}
        require({*self.normal} <= known, f"the tokenizer normalises text by {', '.join(self.normal)}: not known here")
        require(not missing, f"the tokenizer is no byte-level BPE: it lacks {len(missing)} of the 256 bytes")
        require(whole and not lost, "the tokenizer is damaged: tokens are whole numbers from 0, and two become one"
                                    + f", not {lost[:1]}" * bool(lost))

    def cuts_of(self, step):
        """A step of the file's pre_tokenizer -> the expressions that cut the text"""
        kind = step["type"]
        if kind == "ByteLevel":
            require(not step.get("add_prefix_space"), "the tokenizer puts a space first, which is not known here")
            return [expression(GPT2)] if step.get("use_regex", True) else []
        if kind == "Digits":
            return [expression(r"\p{N}" + "+" * (not step["individual_digits"]))]
        require(kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"),
                f"the tokenizer cuts text by {kind}, {step.get('behavior')}, which is not known here")
        pattern = step["pattern"]
        return [expression(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))]

    def encode(self, text):
        """-> list of int"""
        for form in self.normal:
            text = unicodedata.normalize(form, text)
        table = byte_characters()
        return [token for piece in functools.reduce(split, self.cuts, [text])
                for token in self.merged("".join(table[b] for b in piece.encode()))]

    def merged(self, piece):
        """Merges the neighbours of the lowest rank, again and again. -> tokens of a piece, which is not empty"""
        if self.whole and piece in self.ids:
            return [self.ids[piece]]
        parts = list(piece)
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            if min(ranks) == len(self.ranks):
                break
            i = ranks.index(min(ranks))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]


def tokenizer_of(content):
    """-> the tokenizer of a tokenizer.json with this content, or of bytes, if it is empty"""
    return BPE(content) if content else Bytes()


def read_text(path):
    """-> the content of a file of text. Raises UserError if it can't be read, or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise UserError(f"{path} is not text in UTF-8: its byte {error.start} is {wrong:#x}") from None


def flat(step, name):
    """The steps of a step of the kind Sequence, or the step itself, or none."""
    return [] if step is None else step[name] if step["type"] == "Sequence" else [step]
