"""Output of long commands: a progress bar on a terminal, plain lines elsewhere, output of other libraries in a log."""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from logitcache.errors import WriteError, with_flags
from logitcache.runtime.regular_files import descriptor_of
from logitcache.runtime.secrets import hide
from logitcache.runtime.text import visible

_format_warning = warnings.formatwarning  # Python's own


@contextlib.contextmanager
def redirect_output(log: Path) -> Iterator[TextIO]:
    """Redirects what this process and its children print to ``log``; yields the real standard error.

    Redirects file descriptors, so that C libraries and the engine's processes are included.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.parent.is_symlink():
            raise OSError(errno.ELOOP, "is a link", str(log.parent))
        target = descriptor_of(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as e:
        raise WriteError(f"{log}: {e.filename} {e.strerror}; give `out` a directory that can hold logs") from e
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    terminal = os.fdopen(os.dup(kept[1]), "w", buffering=1, errors="backslashreplace")
    try:
        yield terminal
    finally:
        for stream in (sys.stdout, sys.stderr, terminal):
            with contextlib.suppress(OSError):  # the disk of the log may be full
                stream.flush()
        for descriptor, original in enumerate(kept, 1):
            os.dup2(original, descriptor)
            os.close(original)
        terminal.close()


def say(text: str, out: TextIO) -> None:
    """Prints a line with the flags of the command that runs; what others wrote in it cannot steer the terminal."""
    print(_shown(text), file=out, flush=True)


def _shown(text: str) -> str:
    return visible(hide(with_flags(text)))


def say_warnings() -> None:
    """From now on warnings are printed like `say` does."""
    warnings.formatwarning = lambda message, *where, **more: _format_warning(_shown(str(message)), *where, **more)


class Stop:
    """Records Ctrl-C and SIGTERM in ``signal``. A second signal, or one while not ``patient``, raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.patient = False

    def __enter__(self) -> "Stop":
        main = threading.current_thread() is threading.main_thread()
        caught = (signal.SIGINT, signal.SIGTERM) if main else ()
        self._before = {s: signal.signal(s, self._receive) for s in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        again, self.signal = self.signal, signal.Signals(number).name
        if again or not self.patient:
            raise KeyboardInterrupt


class Progress:
    """Shows traces done, tokens per second and time left. A context manager.

    Args:
        out: a terminal gets a progress bar, anything else a line every ``every`` seconds.
        total: traces to do.
    """

    def __init__(self, out: TextIO, total: int, what: str = "traces", every: float = 10.0) -> None:
        self.out, self.total, self.what, self.every = out, total, what, every
        self.done = self.tokens = 0
        self.note = ""  # shown behind the speed
        self._began = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._began = self._last = time.monotonic()
        if self.out.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [
                "{task.completed}/{task.total} " + self.what,
                BarColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
            ]
            self._bar = Bar(*columns, console=Console(file=self.out), redirect_stdout=False, redirect_stderr=False)
            self._task = self._bar.add_task("", total=self.total, speed="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done:
            self._line()

    def add(self, done: int, tokens: int) -> None:
        """Counts ``done`` more traces with ``tokens`` tokens in all."""
        self.done += done
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=self._shown_speed())
        self.tick()

    def drop(self) -> None:
        """Counts one trace less to do."""
        self.total -= 1
        if self._bar is not None:
            self._bar.update(self._task, total=self.total)

    def tick(self) -> None:
        """Prints a line if it is time for one and there is no bar."""
        if self._bar is None and time.monotonic() - self._last >= self.every:
            self._line()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def speed(self) -> float:
        """Tokens per second since the start."""
        return self.tokens / max(self.seconds, 1e-9)

    def print(self, text: str) -> None:
        """Prints a line, above the bar if there is one, with the flags of the command that runs."""
        if self._bar is not None:
            self._bar.console.print(_shown(text), markup=False, highlight=False, emoji=False)
        else:
            say(text, self.out)

    def _shown_speed(self) -> str:
        return f"{self.speed:,.0f} tokens/s" + (f", {self.note}" if self.note else "")

    def _line(self) -> None:
        self._last = time.monotonic()
        left = _duration((self.total - self.done) * self.seconds / self.done) if self.done else "?"
        self.print(f"{self.done}/{self.total} {self.what}, {self._shown_speed()}, {left} left")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
