"""Runs a function on many paths in several processes, any of which may die."""

import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def each(
    work: Callable[[Path], Result], paths: Sequence[Path], count: int, died: Callable[[Path, str], Result]
) -> list[Result]:
    """``work`` of each path, in order. A process that dies is replaced, and ``died`` gives the result of its path.

    Args:
        work: can be pickled, and raises nothing.
        died: of the path and how its process died, in words.
    """
    context, results = get_context("spawn"), dict[Path, Result]()
    waiting, running = list(reversed(paths)), dict[Connection, tuple[Any, Path]]()
    try:
        while waiting or running:
            while waiting and len(running) < count:
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, work), daemon=True)
                process.start()
                there.close()
                running[here] = process, _send(here, waiting)
            for here in connection.wait(list(running)):
                assert isinstance(here, Connection)
                process, path = running.pop(here)
                try:
                    results[path] = here.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    results[path] = died(path, _how(process.exitcode))
                    continue
                if waiting:
                    running[here] = process, _send(here, waiting)
                else:
                    here.close()  # which ends the process
                    process.join()
    finally:
        for process, _ in running.values():
            process.terminate()
    return [results[path] for path in paths]


def _send(here: Connection, waiting: list[Path]) -> Path:
    path = waiting.pop()
    with suppress(ConnectionError):  # the process is dead, which `recv` finds
        here.send(path)
    return path


def _serve(there: Connection, work: Callable[[Path], Any]) -> None:
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            there.send(work(there.recv()))


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
