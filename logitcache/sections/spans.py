"""The five spans of a trace as token indices."""

from dataclasses import dataclass
from itertools import pairwise

from logitcache.errors import InputError

SPANS = ("prompt", "opening", "reasoning", "closing", "answer")
# The names that options use: both delimiters belong to the reasoning.
SECTIONS = {"prompt": ("prompt",), "reasoning": ("opening", "reasoning", "closing"), "answer": ("answer",)}


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
