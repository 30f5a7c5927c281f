"""The text of each token, with and without a fast backend."""

import random

import pytest

from logitcache.inference.token_texts import text_behind, token_texts
from tests.small_tokenizers import PythonBytes, byte_level, facts_of, llama_2

TEXTS = [
    "√1764 = 42",
    "∀n∈ℕ: 42² = 1764, 数学 🙂",  # noqa: RUF001
    "ℝ",  # noqa: RUF001
    "👩‍👩‍👧‍👦 e\u0301 \u200f‮",
    "a real \ufffd replacement character \ufffd\ufffd",
    "spaces  before , punctuation . do n't go\n\n\t end ",
    "",
]


def python_only():
    return facts_of(PythonBytes())


@pytest.mark.parametrize("make", [byte_level, python_only, llama_2], ids=["fast", "python", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_lost(make, text: str) -> None:
    facts = make()
    ids = facts.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_texts(facts, ids)
    assert len(pieces) == len(ids)
    assert "".join(p or "" for p in pieces) == text
    assert text_behind(facts, ids, ids) == (" " + text if make is llama_2 and text else text)


@pytest.mark.parametrize("make", [byte_level, python_only], ids=["fast", "python"])
def test_special_tokens_are_texts_of_their_own(make) -> None:
    facts = make()
    eos = facts.tokenizer.eos_token_id
    ids = [*facts.tokenizer("é", add_special_tokens=False)["input_ids"], eos]
    assert token_texts(facts, ids) == [None, "é", facts.tokenizer.eos_token]


@pytest.mark.parametrize("make", [byte_level, python_only, llama_2], ids=["fast", "python", "sentencepiece"])
def test_bytes_that_are_no_text_decode_as_the_tokenizer_decodes_them(make) -> None:
    """What a model at temperature 1 writes: cut characters, lone continuation bytes, then a whole character."""
    facts = make()
    whole = facts.tokenizer("ab 数🙂 c", add_special_tokens=False)["input_ids"]
    choices = random.Random(0)
    for _ in range(20):
        ids = [i for i in whole * 3 if choices.random() < 0.8]
        expected = facts.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert "".join(p or "" for p in token_texts(facts, ids)) == expected


@pytest.mark.parametrize("make", [byte_level, python_only], ids=["fast", "python"])
def test_ids_of_a_padded_head_have_no_text(make) -> None:
    facts = make()
    ids = facts.tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert token_texts(facts, [ids[0], 10**6, ids[1]]) == ["a", None, "b"]


def test_a_slow_tokenizer_takes_linear_time(monkeypatch) -> None:
    facts = python_only()
    decoded: list[int] = []
    decode = facts.tokenizer.decode
    monkeypatch.setattr(facts.tokenizer, "decode", lambda ids, **k: decoded.append(len(ids)) or decode(ids, **k))
    ids = facts.tokenizer("数学🙂 " * 100, add_special_tokens=False)["input_ids"]
    token_texts(facts, ids)
    assert sum(decoded) < 30 * len(ids)
