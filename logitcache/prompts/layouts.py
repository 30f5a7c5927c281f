"""The columns of a row that make its prompt, in the layouts that people have.

- ``prompt``: text, or messages (TRL), with ``completion``: text, or messages.
- ``messages``: messages with ``role`` and ``content``; ``conversations``: those of ShareGPT, with ``from`` and ``value``.
- ``instruction``, ``input`` and ``output`` (Alpaca).

A column ``system`` is the first turn of messages. ``--column NAME=THEIRS`` gives a column one of our names.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from logitcache.errors import PromptsError, did_you_mean
from logitcache.prompts.messages import turns
from logitcache.prompts.prompt import Messages
from logitcache.prompts.values import kind_of
from logitcache.runtime.options import Option

Row = dict[str, Any]
NAMES = (
    "id",
    "prompt",
    "messages",
    "completion",
    "answer",
    "system",
    "tools",
    "chat_template_kwargs",
    "finish_reason",
)
Columns = Annotated[
    dict[str, str],
    Option(
        f"Read NAME from the column THEIRS, such as prompt=question or answer=solution. NAME: {', '.join(NAMES)}. "
        "Repeatable.",
        flag="--column",
        metavar="NAME=THEIRS",
    ),
]
# Names that others give such a column, the likeliest first.
_LIKELY = {
    "prompt": ("question", "problem", "instruction", "query", "input", "task", "text"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "completion": ("response", "output", "generation", "solution", "answer", "text"),
    "answer": ("solution", "final_answer", "expected_answer", "ground_truth", "gold", "target", "label", "answers"),
}
_CONVERSATIONS = ("prompt", "messages", "conversations")


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises: PromptsError for a name that is not one of ours."""
    for name in columns:
        if name not in NAMES:
            raise PromptsError(f"`columns` {name}={columns[name]}: unknown name {name!r}; {did_you_mean(name, NAMES)}")


def own_names(row: Row, columns: Mapping[str, str]) -> Mapping[str, str]:
    """``columns``, with ``completion`` for the ``output`` of Alpaca's layout."""
    other = any(row.get(name) is not None for name in (*_CONVERSATIONS, "completion"))
    alpaca = not other and row.get("instruction") is not None and "output" in row
    return {"completion": "output", **columns} if alpaca else columns


def renamed(row: Row, columns: Mapping[str, str]) -> tuple[Row, list[str]]:
    """The row under our names, and those of its columns that another one replaces."""
    theirs = {name: row[column] for name, column in columns.items() if column in row}
    others = {name: value for name, value in row.items() if name not in columns.values()}
    replaced = [name for name in columns if others.pop(name, None) is not None]
    return others | theirs, replaced


def suggestion(name: str, row: Iterable[str]) -> str | None:
    """How to name a column of this row that may be meant, such as "`columns` prompt=question"."""
    by_name = {str(column).lower(): column for column in row}
    likely = next((by_name[n] for n in _LIKELY[name] if n in by_name), None)
    if likely is None and (near := get_close_matches(name, by_name, n=1, cutoff=0.8)):
        likely = by_name[near[0]]
    return None if likely is None else f"`columns` {name}={likely}"


def take_conversation(row: Row, columns: Mapping[str, str]) -> tuple[str | Messages, list[str]]:
    """Removes from a row the columns that make its prompt.

    Returns: text, or the turns of a conversation with the row's ``system``; and the names of columns that say the same and
        are left out, because ``columns`` names another one.
    Raises: PromptsError.
    """
    found = [name for name in _CONVERSATIONS if row.get(name) is not None]
    if not found and row.get("instruction") is not None and "completion" in row:
        return _with_system(_alpaca(row), row), []
    chosen = [name for name in found if name in columns] or found
    if not chosen:
        raise PromptsError(_nothing_found(row))
    if len(chosen) > 1:
        ways = " or ".join(f"`columns` {name}={name}" for name in chosen if name in NAMES)
        raise PromptsError(f"both {' and '.join(f'`{name}`' for name in chosen)}; choose one of them by {ways}")
    value, (name,) = row[chosen[0]], chosen
    for each in _CONVERSATIONS:
        row.pop(each, None)
    if name == "prompt" and not isinstance(value, str | list | dict):
        raise PromptsError(f"`prompt` is {kind_of(value)}, expected text or messages")
    unused = [each for each in found if each != name]
    if name == "prompt" and isinstance(value, str):
        if not value.strip():
            raise PromptsError("the prompt is empty; remove the row")
        return value, unused
    return _with_system(turns(name, value), row), unused


def _with_system(messages: Messages, row: Row) -> Messages:
    system = row.pop("system", None)
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise PromptsError(f"`system` is {kind_of(system)}, expected text")
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise PromptsError("both a column `system` and a system turn; remove one of them")
    return messages


def _alpaca(row: Row) -> Messages:
    """A user turn of Alpaca's columns."""
    parts = [row.pop("instruction"), row.pop("input", None)]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise PromptsError("`instruction` and `input` must be text")
    if row.get("history"):
        raise PromptsError("`history`: earlier turns are not read from this column; give `messages`")
    text = "\n\n".join(part for part in parts if part and part.strip())
    return turns("instruction", [{"role": "user", "content": text}])


def _nothing_found(row: Row) -> str:
    row = {name: value for name, value in row.items() if value is not None}
    columns = ", ".join(map(str, row)) or "none"
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return "a single turn; give one conversation per row, as `messages`"
    ways = [way for name in ("prompt", "messages") if (way := suggestion(name, row))]
    way_out = f"try {ways[0]}" if ways else "give one of them, or name a column by `columns` prompt=THEIRS"
    return f"neither `prompt` nor `messages`; the columns with a value are {columns}: {way_out}"
