"""The command line: ``logitcache COMMAND``. The commands are in logitcache/commands."""

import atexit
import importlib
import keyword
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import typer
import typer.core
import typer.main

import logitcache
from logitcache.commands import COMMANDS, Entry
from logitcache.errors import LogitcacheError
from logitcache.runtime.console import say, say_warnings

# What typer raises for options it does not know; it has no public name of its own.
_USAGE_ERROR: Any = typer.BadParameter.__base__


class _Commands(typer.core.TyperGroup):
    """Loads a command when it is called: --help lists summaries and imports nothing else."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and load(name), rest


def load(name: str) -> Any:
    """The command ``name`` with all its options."""
    entry = COMMANDS[name]
    module = importlib.import_module(f"logitcache.commands.{entry.module}")
    own = typer.Typer(add_completion=False, rich_markup_mode="rich")
    attribute = name + "_" * (keyword.iskeyword(name) or name in ("eval", "slice"))
    command = getattr(module, attribute)
    own.command(name, cls=_Command)(command.callback())
    made: Any = typer.main.get_command(own)
    made.spelled_out = command.spelled_out
    return made


class _Command(typer.core.TyperCommand):
    """Takes a flag without its value where that is declared. --help lists both flags of an option in one column, and no
    --no-exact where that is the default."""

    spelled_out: Callable[[list[str]], list[str]]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.spelled_out(args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for param in self.params:
            shown = [] if param.default is False else param.secondary_opts
            param.opts, param.secondary_opts = [*param.opts, *shown], []
        super().format_help(ctx, formatter)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Run the teacher once, store its top-k log-probabilities for every token, train as many students as you like.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"logitcache {logitcache.__version__}")
        raise typer.Exit


@app.callback()
def _logitcache(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def _list(name: str, entry: Entry) -> None:
    def stub() -> None:
        raise AssertionError("a command that was not loaded")

    app.command(name, short_help=entry.summary, help=entry.summary, rich_help_panel=entry.panel)(stub)


for _name, _entry in COMMANDS.items():
    _list(_name, _entry)


def main() -> NoReturn:
    """Entry point.

    The process ends after Python's exit handlers, before the interpreter is torn down: a library's thread that is in C++
    then would abort a command that has done its work (pytorch/pytorch#38228).
    """
    codes: list[int] = []
    atexit.register(lambda: codes and _leave(codes[0]))  # what is registered first runs last
    codes.append(call())
    sys.exit(codes[0])


def call() -> int:
    """Runs the command line and returns its exit code. A deliberate error is one line, a Ctrl-C has no traceback."""
    say_warnings()
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
    except LogitcacheError as e:
        say(f"logitcache: {e}", sys.stderr)
        code = e.exit_code
    except BrokenPipeError:  # the reader has read enough
        code = 1
    except OSError as e:
        say(f"logitcache: {e.strerror or e}" + (f": {e.filename}" if e.filename else ""), sys.stderr)
        code = 1
    except typer.Abort:
        print("logitcache: stopped; run the same command to resume", file=sys.stderr)
        code = 130
    except _USAGE_ERROR as e:
        e.show()
        code = e.exit_code
    return code


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
