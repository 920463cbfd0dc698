"""Text as tokens: a byte-level BPE against the tokenizers package's numbers; bytes; files of text."""
import json

import pytest
from conftest import ROOT

from configurator import UserError
from tokens import BPE, expression, read_text, tokenizer_of

REFERENCE = json.loads((ROOT / "tests/reference/bpe_tiny.json").read_text())
TOKENIZER = REFERENCE["tokenizer"]


@pytest.mark.parametrize("ids, change", [("ids", {}), ("gpt2_ids", REFERENCE["gpt2"])])
def test_it_equals_the_tokenizers_package(ids, change):
    """On eight texts with letters, digits, spaces and marks of many kinds; cut as LLaDA's is cut, and as GPT-2's."""
    bpe = BPE(json.dumps(TOKENIZER | change))
    assert [bpe.encode(text) for text in REFERENCE["texts"]] == REFERENCE[ids]
    assert bpe.largest == 499


def test_merges_may_be_lists_and_words_may_be_whole():
    model = TOKENIZER["model"]
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    for merges in (pairs, [" ".join(pair) for pair in pairs]):
        bpe = BPE(json.dumps(TOKENIZER | {"model": model | {"merges": merges}}))
        assert bpe.encode(REFERENCE["texts"][0]) == REFERENCE["ids"][0]
    whole = BPE(json.dumps(TOKENIZER | {"model": model | {"merges": [], "ignore_merges": True, "vocab": model["vocab"] | {"dark": 500}}}))
    assert whole.encode("dark")[-1:] == [500] and len(whole.encode("dart")) == 4


def test_categories_of_characters():
    assert expression(r"[^\p{L}\s]+|\p{Lu}").findall("a1!É ß") == ["1!", "É"]


def test_bytes_are_of_small_letters():
    assert tokenizer_of("").encode("Aé") == [97, 195, 169] and tokenizer_of("").largest == 255


@pytest.mark.parametrize("change, message", [
    ({"model": {"type": "Unigram"}}, "no byte-level BPE"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "lacks 255 of the 256 bytes"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "cuts text by Metaspace, None, which is not known here"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "puts a space first"),
    ({"normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase: not known here"),
    ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "("}}}, "no tokenizer.json"),
    ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": r"\p{Han}"}}}, "Han"),
    ({"model": TOKENIZER["model"] | {"merges": [["a", "\u0120"]]}}, "the tokenizer is damaged: .*, not .*'a', '\u0120'"),
    ({"model": TOKENIZER["model"] | {"merges": ["abc"]}}, "the tokenizer is damaged: .*, not .*'abc'"),
    *[({"model": TOKENIZER["model"] | {"vocab": TOKENIZER["model"]["vocab"] | {"zz": token}}}, message)
      for token, message in ((-1, "the tokenizer is damaged: tokens are whole numbers from 0"),
                             (0.5, "the tokenizer is damaged: tokens are whole numbers from 0"), ("1", "no tokenizer.json"))],
    ({"model": 3}, "no tokenizer.json")])
def test_tokenizers_of_other_kinds(change, message):
    with pytest.raises(UserError, match=message) as error:
        BPE(json.dumps(TOKENIZER | change))
    assert "\n" not in str(error.value)


def test_files_of_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffé\n".encode())
    assert read_text(path) == "é\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="text.txt is not text in UTF-8: its byte 2 is 0xff"):
        read_text(path)
    with pytest.raises(UserError, match="can't read .*nowhere: No such file"):
        read_text(tmp_path / "nowhere")
