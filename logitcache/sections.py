"""Splits a trace into spans: prompt, reasoning, answer, and the delimiters around the reasoning.

The trace of a reasoning model is ``prompt <think> reasoning </think> answer``. Its five spans follow each other in this
order without gaps, and all but the prompt may be empty. Spans are found in the text of an incremental decode, which tells
the token of each character, so that each span begins and ends at a token.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from logitcache.errors import InputError
from logitcache.runtime.options import Option
from logitcache.runtime.patterns import check_pattern, search

SPANS = ("prompt", "opening", "reasoning", "closing", "answer")
# The names that options use: both delimiters belong to the reasoning.
SECTIONS = {"prompt": ("prompt",), "reasoning": ("opening", "reasoning", "closing"), "answer": ("answer",)}

# Opening and closing markers of published reasoning models, tried in this order.
KNOWN_MARKERS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ, GLM, MiniMax
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<reasoning>", "</reasoning>"),
)


@dataclass(frozen=True, slots=True)
class Sections:
    """Where the sections of one trace begin, as token indices; a section ends where the next begins."""

    prompt_end: int
    reasoning_start: int
    reasoning_end: int
    answer_start: int
    length: int

    def __post_init__(self) -> None:
        bounds = self.bounds()
        if any(a > b for a, b in pairwise(bounds)) or bounds[0] < 0:
            raise InputError(f"section bounds {bounds} are not in ascending order")

    def bounds(self) -> tuple[int, ...]:
        return (self.prompt_end, self.reasoning_start, self.reasoning_end, self.answer_start, self.length)

    def span(self, name: str) -> slice:
        """The tokens of the section ``name``, one of ``SPANS``."""
        i = SPANS.index(name)
        return slice((0, *self.bounds())[i], self.bounds()[i])

    @property
    def prompt(self) -> slice:
        return self.span("prompt")

    @property
    def opening(self) -> slice:
        return self.span("opening")

    @property
    def reasoning(self) -> slice:
        return self.span("reasoning")

    @property
    def closing(self) -> slice:
        return self.span("closing")

    @property
    def answer(self) -> slice:
        return self.span("answer")

    def sizes(self) -> dict[str, int]:
        """Tokens in each section."""
        return {name: (s := self.span(name)).stop - s.start for name in SPANS}


@dataclass(frozen=True, slots=True)
class Markers:
    """How reasoning and answer are separated: by two delimiters, by a pattern at which the answer begins, or not at all."""

    opening: str | None = None
    closing: str | None = None
    answer_regex: str | None = None

    def __post_init__(self) -> None:
        if (self.opening is None) != (self.closing is None):
            raise InputError(f"reasoning markers {self.opening!r} and {self.closing!r}: give both or neither")
        if self.answer_regex is not None:
            try:
                check_pattern(self.answer_regex)
            except ValueError as e:
                raise InputError(f"`answer_regex` {self.answer_regex[:99]!r} {e}") from None

    def __str__(self) -> str:
        return f"{self.opening},{self.closing}" if self.pair else "none"

    @property
    def pair(self) -> list[str] | None:
        """Both delimiters, or None."""
        return [self.opening, self.closing] if self.opening and self.closing else None

    @classmethod
    def parse(cls, text: str) -> "Markers":
        """Parses ``"<think>,</think>"`` or ``"none"``.

        Raises: InputError.
        """
        if text == "none":
            return cls()
        opening, comma, closing = text.partition(",")
        if not comma or not opening.strip() or not closing.strip():
            raise InputError(
                f"`reasoning_markers` {text!r}: give OPENING,CLOSING such as '<think>,</think>', or 'none'"
            )
        return cls(opening.strip(), closing.strip())

    @classmethod
    def detect(cls, vocabulary: Iterable[str], chat_template: str | None) -> "Markers":
        """The first known pair whose closing marker is a single token or appears in the chat template."""
        tokens, template = set(vocabulary), chat_template or ""
        for opening, closing in KNOWN_MARKERS:
            if closing in tokens or closing in template:
                return cls(opening, closing)
        return cls()


# The options of commands that find sections.
SECTIONS_GROUP = "Sections"
ReasoningMarkers = Annotated[
    Markers | None,
    Option(
        "Opening and closing marker of the reasoning, such as '<think>,</think>', or none.",
        SECTIONS_GROUP,
        metavar="OPENING,CLOSING",
        default="found in the tokenizer or the chat template",
    ),
]
AnswerRegex = Annotated[
    str | None,
    Option("For completions without markers: the answer begins at this pattern's first match.", SECTIONS_GROUP),
]


class TokenText:
    """The text of a token sequence, and the token of each character.

    Args:
        pieces: the text that each token adds in an incremental decode; None or "" for a token whose bytes are part of a
            character that a later token completes. Such a token belongs to that character.
    """

    def __init__(self, pieces: Sequence[str | None]) -> None:
        self.text = "".join(piece or "" for piece in pieces)
        self.starts: list[int] = []
        position = 0
        for piece in pieces:
            self.starts.append(position)
            position += len(piece or "")
        self.ends = [*self.starts[1:], position] if pieces else []
        for i in range(len(pieces) - 2, -1, -1):
            if not pieces[i]:
                self.ends[i] = self.ends[i + 1]

    def token_at(self, char: int) -> int:
        """The first token of the character ``char``."""
        return bisect_right(self.ends, char)

    def token_after(self, char: int) -> int:
        """The first token that begins at ``char`` or later."""
        return bisect_left(self.starts, char)


def find(pieces: Sequence[str | None], prompt_length: int, markers: Markers) -> Sections:
    """Finds the sections of a trace.

    The opening marker is recognised at the start of the completion or at the end of the prompt, where a chat template may
    put it (or both markers, if thinking is switched off). A completion cut before the closing marker is all reasoning. A
    completion without markers is all answer. If there is only a closing marker, the reasoning starts with the completion.
    A token with any character of a marker belongs to the delimiter.

    Args:
        pieces: the text that each of the L tokens adds, prompt included, from one incremental decode.
        prompt_length: number of prompt tokens, <= L.
    """
    tokens, length = TokenText(pieces), len(pieces)
    text, split = tokens.text, tokens.starts[prompt_length] if prompt_length < length else len(tokens.text)
    if markers.opening is None or markers.closing is None:
        return _without_markers(tokens, split, prompt_length, markers.answer_regex)

    opening, closing = re.escape(markers.opening), re.escape(markers.closing)
    if head := re.search(rf"{opening}\s*{closing}\s*\Z", text[:split]):
        start = tokens.token_after(head.start() + len(markers.opening))
        end = max(start, tokens.token_at(text.index(markers.closing, head.start())))
        return Sections(tokens.token_at(head.start()), start, end, prompt_length, length)

    prompt_end = reasoning = prompt_length
    if head := re.search(rf"{opening}\s*\Z", text[:split]):
        prompt_end = tokens.token_at(head.start())
    elif head := re.match(rf"\s*{opening}", text[split:]):
        reasoning = tokens.token_after(split + head.end())
    close = text.find(markers.closing, split)
    if close >= 0:
        end = max(reasoning, tokens.token_at(close))
        return Sections(prompt_end, reasoning, end, max(end, tokens.token_after(close + len(markers.closing))), length)
    if head:
        return Sections(prompt_end, reasoning, length, length, length)
    return _without_markers(tokens, split, prompt_length, markers.answer_regex)


def answer_text(text: str, spans: Sections, markers: Markers) -> str:
    """The answer in the text of a completion; empty if the completion ended before it."""
    if spans.answer.start == spans.answer.stop:
        return ""
    if markers.closing is not None and (close := text.find(markers.closing)) >= 0:
        return text[close + len(markers.closing) :]
    if markers.answer_regex is not None and (at := search(markers.answer_regex, text)) is not None:
        return text[at:]
    return text


def _without_markers(tokens: TokenText, split: int, prompt_length: int, pattern: str | None) -> Sections:
    """The answer begins at the first match of the pattern; without a match all is reasoning, without a pattern all is answer."""
    answer, length = prompt_length, len(tokens.starts)
    if pattern is not None:
        at = search(pattern, tokens.text, split)
        answer = length if at is None else max(prompt_length, tokens.token_at(at))
    return Sections(prompt_length, prompt_length, answer, answer, length)
