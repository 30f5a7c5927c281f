"""Output and exit codes of commands."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer

from logitcache.errors import with_flags
from logitcache.runtime.options import Option
from logitcache.runtime.text import all_visible, visible

Json = Annotated[bool, Option("Print one JSON object.", "Output")]


def show(describe: Callable[..., str], *results: Any) -> None:
    """Prints the text of a result with the command's flags, once, however many processes torchrun started.

    A result holds texts that others wrote, so ``describe`` gets a copy in which they can neither steer the terminal nor begin
    a line.
    """
    _print(visible(with_flags(describe(*map(all_visible, results))), keep="\n"))


def show_json(result: Any) -> None:
    """Prints a result as one JSON object, with the names of the Python API."""
    fields = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    _print(json.dumps(fields, indent=1).replace("\x7f", "\\u007f"))  # the one control character that JSON leaves


def _print(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(text)


def signal_code(name: str | None) -> int:
    """Exit code of a command that a signal stopped, 128 + its number as in shells; 0 for None."""
    return 128 + signal.Signals[name].value if name else 0
