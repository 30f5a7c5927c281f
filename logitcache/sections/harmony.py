"""The messages of gpt-oss: `Harmony <https://cookbook.openai.com/articles/openai-harmony>`_, a format with channels.

A completion is a sequence of messages ``<|start|>assistant<|channel|>CHANNEL<|message|>TEXT<|end|>``. The reasoning is the
first run of messages on the channel ``analysis``, the answer is the last message if its channel is ``final``. Messages on
the channel ``commentary``, calls of tools and their results are neither: before the reasoning they belong to the opening,
after it to the closing.
"""

import re
from dataclasses import dataclass

from logitcache.sections.text import CONTEXT, MarkerTokens

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
PARTS = (START, CHANNEL, MESSAGE, *ENDS)


@dataclass(frozen=True, slots=True)
class Message:
    """A message in the text of a trace; positions in characters."""

    kind: str  # "analysis", "final" or "other"
    header: int  # where its channel marker begins
    start: int  # of its text
    end: int  # of its text


class Channels:
    """Reads messages; ``tokens`` tells which markers are single tokens."""

    def __init__(self, tokens: MarkerTokens) -> None:
        start, channel, message = (tokens.pattern(marker) for marker in (START, CHANNEL, MESSAGE))
        plain = rf"(?:(?!{CONTEXT}|{tokens.pattern(*PARTS)}).)*"
        self._start = re.compile(start)
        self._end = re.compile(rf"{CONTEXT}|{tokens.pattern(START, *ENDS)}")
        self._header = re.compile(
            rf"(?:{start}(?P<role>{plain}))?(?P<mark>{channel})(?P<channel>{plain}){message}"
            rf"|(?P<bare>{start})(?P<author>{plain}){message}",
            re.DOTALL,
        )
        self._open_header = re.compile(rf"{tokens.pattern(START, *ENDS)}(?:(?!{message}).)*\Z", re.DOTALL)
        # From analysis to final, whatever the header says of the answer's type.
        self.hand_over = rf"{tokens.pattern(*ENDS)}{start}\s*assistant\s*{channel}\s*final\b{plain}{message}"

    def messages(self, text: str, split: int) -> list[Message]:
        """The messages of the completion, which begins at ``split``. The header of the first may be in the prompt."""
        starts = [match.start() for match in self._start.finditer(text, 0, split)]
        found = [self._message(text, match) for match in self._header.finditer(text, starts[-1] if starts else split)]
        return [m for m in found if m.start > split or (m.start <= split <= m.end and m.header < split)]

    def without_header(self, text: str) -> int:
        """The characters of a cut reasoning, without the header of another message that the cut left unfinished."""
        header = self._open_header.search(text)
        return header.start() if header else len(text)

    def _message(self, text: str, match: re.Match[str]) -> Message:
        end = self._end.search(text, match.end())
        author = match["role"] or match["author"] or "assistant"
        channel = match["channel"] or ""
        name = re.match(r"\s*(\w*)", channel)
        mine = author.strip().startswith("assistant") and "to=" not in author + channel
        kind = name[1] if mine and name and name[1] in ("analysis", "final") else "other"
        header = match.start("mark") if match["mark"] else match.start()
        return Message(kind, header, match.end(), end.start() if end else len(text))
