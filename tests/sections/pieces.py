"""Texts as tokens, for tests of sections."""

import re
from collections.abc import Iterable

from logitcache.sections import SPANS, Finder, Found, Markers

HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")


class Vocabulary:
    """Each of ``tokens`` is one token; other text is one ordinary token a character. ``~x~`` spells x with such tokens."""

    def __init__(self, *tokens: str) -> None:
        self.ids = {token: 100 + i for i, token in enumerate(tokens)}

    def encode(self, text: str) -> tuple[list[str], list[int]]:
        control = "|".join(map(re.escape, self.ids)) or r"(?!)"
        pieces = [p for p in re.split(rf"(~.*?~|{control})", text, flags=re.DOTALL) if p]
        tokens = [token for p in pieces for token in ([p] if p in self.ids else p.strip("~"))]
        return tokens, [self.ids.get(token, 0) for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        return self.ids

    def get_added_vocab(self) -> dict[str, int]:
        return self.ids


def spans_of(
    prompt: str, completion: str, markers: Markers, tokens: Iterable[str] = (), context: Iterable[str] = ()
) -> tuple[dict[str, str], str]:
    """The text of each span, and of the answer as it is graded. ``context``: parts of the completion."""
    vocabulary = Vocabulary(*tokens)
    (before, before_ids), (after, after_ids) = vocabulary.encode(prompt), vocabulary.encode(completion)
    found = found_in(vocabulary, before + after, before_ids + after_ids, len(before), markers, context)
    texts = {name: "".join((before + after)[found.sections.span(name)]) for name in SPANS}
    return texts, "".join(after)[found.answer]


def found_in(vocabulary, pieces, ids, prompt_length: int, markers: Markers, context: Iterable[str] = ()) -> Found:
    spans = []
    for part in context:
        words = vocabulary.encode(part)[0]
        starts = [i for i in range(prompt_length, len(pieces)) if pieces[i : i + len(words)] == words]
        spans.append((starts[0], starts[0] + len(words)))
    return Finder.of(vocabulary, markers).find(pieces, prompt_length, ids, spans)
