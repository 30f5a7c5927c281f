"""Text that others wrote, made safe to show: on a terminal, and in Markdown."""

import copy
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

# What Python does not print: control and format characters (escape sequences, bidirectional marks, zero widths), spaces and
# line ends other than " ", surrogates, unassigned. These are letters or marks to Unicode, and show nothing:
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
# Markdown gives no meaning to punctuation behind a backslash. Some of it has a meaning only where a line begins.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#+=-]|(?<=^\d)[.)]")


def visible(text: str, keep: str = "") -> str:
    """``text`` on one line with a visible escape, such as ``\\x1b`` or ``\\u202e``, for every character that shows nothing.

    Args:
        keep: characters to leave as they are, such as a newline.
    """
    if text.isprintable() and text.isascii():
        return text
    return "".join(c if c in keep or (c.isprintable() and not _BLANK.match(c)) else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def all_visible(value: Any) -> Any:
    """A copy of a result in which every text is ``visible``: of dataclasses, mappings, lists, tuples and paths, at any depth."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Path):
        return type(value)(visible(str(value)))
    if isinstance(value, Mapping):
        return {all_visible(k): all_visible(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        parts = [all_visible(each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in fields(value):
            object.__setattr__(made, field.name, all_visible(getattr(value, field.name)))
        return made
    return value


def markdown(text: Any) -> str:
    """``text`` in a paragraph, a heading or a cell of a table, with no meaning to Markdown or HTML."""
    return _MARKUP.sub(r"\\\g<0>", visible(str(text)))


def code_span(text: Any, *, in_table: bool = False) -> str:
    """``text`` as a code span. In a table, a bar would end the cell."""
    text = visible(str(text)) or " "
    text = text.replace("|", "\\|") if in_table else text
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    around = " " if longest else ""
    return f"{fence}{around}{text}{around}{fence}"


def markdown_table(head: list[str], lines: list[list[str]], align: str = "---") -> str:
    """A table of cells that are Markdown already; columns after the first are aligned as ``align`` says."""
    rule = ["---", *[align] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))
