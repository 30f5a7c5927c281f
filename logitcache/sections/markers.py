"""How a model separates its reasoning from its answer, as an option and in a cache's identity."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from logitcache.errors import InputError
from logitcache.runtime.options import Option
from logitcache.runtime.patterns import check_pattern
from logitcache.sections.formats import Format, detect, format_of


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

    @property
    def format(self) -> Format | None:
        """The format that has this pair; None without a pair."""
        return format_of(self.opening, self.closing) if self.opening and self.closing else None

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
    def detect(cls, vocabulary: Collection[str], chat_template: str | None) -> "Markers":
        """The pair of the first known format whose closing is a single token, or else appears in the chat template."""
        found = detect(vocabulary, chat_template or "")
        return cls(*found.pair) if found else cls()


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
