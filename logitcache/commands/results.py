"""Output and exit codes of commands."""

import json
import os
import signal
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer

from logitcache.errors import with_flags
from logitcache.runtime.options import Option

Json = Annotated[bool, Option("Print one JSON object.", "Output")]


def show(text: str) -> None:
    """Prints a result with the command's flags, once, however many processes torchrun started."""
    _print(with_flags(text))


def show_json(result: Any) -> None:
    """Prints a result as one JSON object, with the names of the Python API."""
    _print(json.dumps(asdict(result) if is_dataclass(result) and not isinstance(result, type) else result, indent=1))


def _print(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(text)


def signal_code(name: str | None) -> int:
    """Exit code of a command that a signal stopped, 128 + its number as in shells; 0 for None."""
    return 128 + signal.Signals[name].value if name else 0
