"""Rows -> prompts, and prompts with completions."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from logitcache.errors import PromptsError, did_you_mean
from logitcache.prompts.answers import gold_answer
from logitcache.prompts.layouts import check_columns, own_names, renamed, suggestion, take_conversation
from logitcache.prompts.messages import MEDIA, check_order, template_variables, tool_list, turns
from logitcache.prompts.prompt import Messages, Prompt, SourceCounts
from logitcache.prompts.values import finite, kind_of

_GRADED = "gym"  # a column that grading reads, so it is more than metadata


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A row.

    Attributes:
        has_id: whether the row has an id; otherwise its prompt's digest is the id.
        completion: text, or the turns after the last user turn; None where only a prompt was wanted.
        finish_reason: of the completion.
        dropped_turn: whether an assistant turn that answers the prompt was dropped.
        unused: columns with a value that nothing uses.
    """

    prompt: Prompt
    has_id: bool
    completion: str | Messages | None = None
    finish_reason: str = "stop"
    dropped_turn: bool = False
    unused: list[str] = field(default_factory=list)


def parse(place: str, row: dict[str, Any], columns: Mapping[str, str] = {}, *, completed: bool = False) -> ParsedRow:
    """Parses a row.

    Args:
        place: where the row is in its source, for messages.
        columns: the row's own names of columns, by ours; see `layouts`.
        completed: whether a completion is wanted too. Otherwise an assistant turn that ends the messages is dropped, since
            it would show the model an answer.
    Raises: PromptsError.
    """
    try:
        return _parse(row, columns, completed)
    except PromptsError as e:
        raise PromptsError(f"{place}: {e}") from None
    except RecursionError:
        raise PromptsError(f"{place}: nested too deeply; remove the row") from None


def _parse(row: dict[str, Any], columns: Mapping[str, str], completed: bool) -> ParsedRow:
    columns = own_names(row, columns)
    row, unused = renamed(finite(row), columns)
    content, left_out = take_conversation(row, columns)
    for medium in MEDIA:
        if row.get(medium) and not isinstance(row[medium], str):
            raise PromptsError(f"`{medium}`: only text can be asked")
    given, reason = row.pop("completion", None), row.pop("finish_reason", None)
    completion, dropped = None, False
    if completed:
        content, completion = _completed(content, given, row)
    else:
        there = {"completion": given, "finish_reason": reason}
        unused += [columns.get(name, name) for name, value in there.items() if value is not None]
        if isinstance(content, list):
            content, dropped = _asked(content)
    if reason is not None and not isinstance(reason, str):
        raise PromptsError(f"`finish_reason` is {kind_of(reason)}, expected text such as stop or length")
    prompt, has_id = _prompt(content, row)
    return ParsedRow(prompt, has_id, completion, reason or "stop", dropped, unused + left_out)


def _asked(messages: Messages) -> tuple[Messages, bool]:
    """The messages up to the last user or tool turn, and whether an assistant turn followed it."""
    check_order(messages)
    answered = messages[-1]["role"] == "assistant"
    return messages[: len(messages) - answered], answered


def _completed(content: str | Messages, given: Any, row: dict[str, Any]) -> tuple[str | Messages, str | Messages]:
    """Prompt and completion of a row: the column ``completion``, or the turns after the last user turn."""
    if isinstance(content, str):
        if given is None:
            raise PromptsError(_no_completion(row))
        if not isinstance(given, str):
            raise PromptsError(f"`completion` is {kind_of(given)}, expected text, as the prompt is")
        return content, _not_empty(given)
    if given is None:
        check_order(content)
        last = max(i for i, turn in enumerate(content) if turn["role"] == "user") + 1
        content, after = content[:last], content[last:]
        if not after:
            raise PromptsError(_no_completion(row))
    else:
        after = [{"role": "assistant", "content": given}] if isinstance(given, str) else turns("completion", given)
        if content[-1]["role"] == "assistant":
            raise PromptsError("both `completion` and an assistant turn at the end of the messages; remove one of them")
        check_order([*content, *after])
    if strange := [turn["role"] for turn in after if turn["role"] not in ("assistant", "tool")]:
        raise PromptsError(
            f"`completion` has a {strange[0]} turn; put all turns up to the last user turn into the prompt"
        )
    if len(after) == 1 and after[0].keys() == {"role", "content"}:
        return content, _not_empty(after[0]["content"])
    return content, after


def _not_empty(text: str) -> str:
    if not text.strip():
        raise PromptsError("the completion is empty; remove the row")
    return text


def _no_completion(row: dict[str, Any]) -> str:
    way_out = suggestion("completion", row)
    return "no `completion`, and no assistant turn at the end; " + (f"try {way_out}" if way_out else "give one of them")


def _prompt(content: str | Messages, row: dict[str, Any]) -> tuple[Prompt, bool]:
    """The prompt, with what the row still has, and whether the row has an id."""
    tools, variables = None, {}
    if isinstance(content, list):  # text goes through no template
        tools, variables = tool_list(row.pop("tools", None)), template_variables(row.pop("chat_template_kwargs", None))
    given, answer = row.pop("id", None), gold_answer(row.pop("answer", None))
    if isinstance(given, dict | list | bytes):
        raise PromptsError(f"`id` is {kind_of(given)}, expected text or a number")
    try:
        metadata = json.loads(json.dumps(row, default=str))  # dates, decimals and such become text
        prompt = Prompt("", content, answer, metadata, tools, variables)
        prompt = replace(prompt, id=prompt.digest() if given is None else str(given))
        json.dumps(asdict(prompt), ensure_ascii=False).encode()
    except (TypeError, ValueError) as e:
        raise PromptsError(f"not valid Unicode, or not a JSON value ({e}); fix or remove the row") from None
    return prompt, given is not None


class Reading:
    """Parses the rows of one source and counts what it has.

    Args:
        columns: as `parse` takes them.
    Raises: PromptsError for a column that has none of our names.
    """

    def __init__(self, source: str, columns: Mapping[str, str], *, completed: bool = False) -> None:
        check_columns(columns)
        self.source, self.columns, self.completed = source, columns, completed
        self.counts = SourceCounts()
        self._others: dict[str, None] = {}  # columns that rows have
        self._missing = set(columns)

    def parse(self, place: str, row: dict[str, Any]) -> ParsedRow:
        """Raises: PromptsError."""
        if self._missing:
            self._missing -= {name for name, column in self.columns.items() if column in row}
            self._others |= dict.fromkeys(map(str, row))
        return parse(place, row, self.columns, completed=self.completed)

    def count(self, row: ParsedRow) -> None:
        """Counts a row that is used."""
        counts, prompt = self.counts, row.prompt
        counts.prompts += 1
        counts.unanswered += prompt.answer is None
        counts.dropped_turns += row.dropped_turn
        kept = [name for name, value in prompt.metadata.items() if value is not None and name != _GRADED]
        for tally, names in ((counts.metadata, kept), (counts.unused, row.unused)):
            for name in names:
                tally[name] = tally.get(name, 0) + 1

    def finish(self) -> SourceCounts:
        """The counts. Raises: PromptsError for a column of ``columns`` that no row has."""
        for name in self.columns:
            if name in self._missing and self._others:
                column = self.columns[name]
                raise PromptsError(
                    f"{self.source}: `columns` {name}={column}: no row has {column!r}; "
                    f"{did_you_mean(column, self._others)}"
                )
        return self.counts
