"""A prompt, the prompts of a source, and what was counted while they were read."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: plain text, or messages that the chat template renders.

    Attributes:
        answer: the gold answer, or several; see ``alternatives``.
        tools: passed to the chat template.
        template_args: variables of the chat template, over those of the whole run.
    """

    id: str
    content: str | Messages
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Content hash of all that the chat template sees: 32 hexadecimal digits."""
        extra = {"tools": self.tools, "chat_template_kwargs": self.template_args}
        given = {name: value for name, value in extra.items() if value}
        return _digest([self.content, given] if given else self.content)


@dataclass
class SourceCounts:
    """What a source has and what of it is not used."""

    prompts: int = 0  # that are used; with completions, a prompt counts once for each
    repeated: int = 0  # rows that were dropped: without an id, and with the content of an earlier row
    unanswered: int = 0  # prompts without a gold answer
    dropped_turns: int = 0  # prompts that were followed by an assistant turn, which was dropped
    metadata: dict[str, int] = field(default_factory=dict)  # prompts that have a value, by column kept as metadata
    unused: dict[str, int] = field(default_factory=dict)  # prompts that have a value, by column that was dropped


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in source order with distinct ids."""

    prompts: list[Prompt]
    counts: SourceCounts = field(default_factory=SourceCounts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
