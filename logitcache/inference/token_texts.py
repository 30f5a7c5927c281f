"""The text that each token of a sequence adds."""

from collections.abc import Iterator
from typing import Any

from logitcache.inference.model import ModelFacts

# A character has at most 4 bytes, so no more tokens than this wait for one.
_LONGEST_WAIT = 8


def token_texts(facts: ModelFacts, token_ids: list[int]) -> list[str | None]:
    """The text that each token adds, special tokens included; None while its bytes wait for a later token to become a
    character, and for ids that the tokenizer does not have.

    Joined, the texts are the tokenizer's own decoding of all tokens. Takes linear time.
    """
    known = [i for i in token_ids if i in facts.known_ids]
    backend = getattr(facts.tokenizer, "backend_tokenizer", None)
    streamed = None if backend is None else _streamed(backend, known)
    whole = _decode(facts.tokenizer, known)
    if streamed is None or "".join(piece or "" for piece in streamed) != whole:
        streamed = list(_differences(facts.tokenizer, known, whole))
    pieces = iter(streamed)
    return [next(pieces) if i in facts.known_ids else None for i in token_ids]


def text_behind(facts: ModelFacts, before: list[int], token_ids: list[int]) -> str:
    """The text that tokens add behind others."""
    return "".join(piece or "" for piece in token_texts(facts, [*before, *token_ids])[len(before) :])


def _streamed(backend: Any, token_ids: list[int]) -> list[str | None] | None:
    """The texts by the incremental decoder of the tokenizers library; None where it gives up."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    try:
        return [stream.step(backend, token) for token in token_ids]
    except Exception:  # bytes that are not UTF-8
        return None


def _differences(tokenizer: Any, token_ids: list[int], whole: str) -> Iterator[str | None]:
    """The texts as differences of decodings, each of the few tokens around it."""
    start = read = given = 0  # the window begins at token `start`; the text before token `read` was given
    for end in range(1, len(token_ids) + 1):
        before = _decode(tokenizer, token_ids[start:read])
        text = _decode(tokenizer, token_ids[start:end])
        added = text[len(before) :]
        fits = bool(added) and whole.startswith(added, given)
        if not fits and end < len(token_ids) and end - read < _LONGEST_WAIT:
            yield None
            continue
        if not fits or end == len(token_ids):  # the window's first tokens changed how the others read
            added = _next(tokenizer, token_ids[:end], whole, given)
        given += len(added)
        start, read = read, end
        yield added


def _next(tokenizer: Any, token_ids: list[int], whole: str, given: int) -> str:
    """What comes after the first ``given`` characters in the decoding of these tokens."""
    text = _decode(tokenizer, token_ids)
    length = next((i for i, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b), min(len(text), len(whole)))
    return whole[given : max(given, length)]


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False))
