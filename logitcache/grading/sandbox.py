"""Scores answers with code that evaluates them, in a confined process."""

import json
import os
import secrets
import signal
import subprocess
import threading
from contextlib import suppress
from typing import Any

from logitcache.grading.confinement import environment, python
from logitcache.runtime.text import visible

_SECONDS = 3.0  # for one verdict
_PREPARE_SECONDS = 30.0  # for what a scorer prepares
_START_SECONDS = 120.0  # for the imports of a scorer
_REPLY = 4_000  # bytes


# Why an answer has no verdict, in the words of the counts at the end of a command.
NO_ANSWER, UNREAD, LATE, FAILED = "without a gold answer", "with a gold answer not parsed", "timed out", "not scored"


class Unscored(Exception):
    """An answer that a grader could not score.

    Attributes:
        why: one of NO_ANSWER, UNREAD, LATE and FAILED.
    """

    def __init__(self, reason: str, why: str = FAILED) -> None:
        super().__init__(reason)
        self.why = why


class Sandbox:
    """A scorer in a confined process. It starts with the first question, and again if a question ended it.

    Args:
        scorer: "module:function"; the function returns the scorer, which is called with each question and returns whether
            the answer is right. If it has a method ``prepare``, that is called first with the same question and returns
            whether it loaded anything; it is not confined, and must evaluate nothing of the question.
    """

    def __init__(self, scorer: str) -> None:
        self.scorer = scorer
        self._turn = threading.Lock()
        self._process: _Process | None = None

    def ask(self, **question: Any) -> bool:
        """The scorer's verdict on a question: its keyword arguments, as JSON.

        Raises: Unscored if the scorer raises, ends, or takes more than its time.
        """
        with self._turn:
            # None until it replies: after an interrupt no process with an unread reply may be asked again.
            process, self._process = self._process, None
            if process and not process.usable:
                process.close()
                process = None
            process = process or _Process(self.scorer)
            right, unscored = process.ask(question)
            self._process = process
        if unscored:
            raise unscored
        return right


class _Process:
    """A process that `worker.serve` runs in."""

    def __init__(self, scorer: str) -> None:
        import atexit

        self._popen = subprocess.Popen(
            python(f"from logitcache.grading.worker import serve; serve({scorer!r}, {_SECONDS})"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd="/",
            start_new_session=True,  # a Ctrl-C goes to the command: answers under way are still scored
        )
        atexit.register(self.end)
        self._owner = os.getpid()
        if refused := self._exchange(b"", _START_SECONDS):
            self.close()
            raise Unscored(f"the scorer does not start: {refused}")

    @property
    def usable(self) -> bool:
        """Whether it is alive and of this process: a fork must not read its parent's verdicts."""
        return self._owner == os.getpid() and self._popen.poll() is None

    def ask(self, question: dict[str, Any]) -> tuple[bool, Unscored | None]:
        """The verdict, or why there is none.

        Raises: Unscored if the process had to be ended.
        """
        ticket = secrets.token_hex(16)
        # `serve` keeps _SECONDS; this is for the case that it does not.
        match self._exchange(json.dumps([ticket, question]).encode() + b"\n", _PREPARE_SECONDS + _SECONDS):
            case [str(given), bool(right), None] if given == ticket:
                return right, None
            case [str(given), None, [str(reason), str(why)]] if given == ticket:
                return False, Unscored(visible(reason), why if why in (UNREAD, LATE) else FAILED)
        self.close()
        raise Unscored("the reply is not the scorer's")

    def _exchange(self, line: bytes, seconds: float) -> Any:
        """Sends a line and reads one, as JSON; ends the process if that takes longer."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), self.end()))
        timer.daemon = True
        timer.start()
        try:
            self._popen.stdin.write(line)
            self._popen.stdin.flush()
            reply = self._popen.stdout.readline(_REPLY)
        except OSError:  # it ended before the question
            reply = b""
        finally:
            timer.cancel()
        if late.is_set():
            self.close()
            raise Unscored(f"no result within {_SECONDS:g} s", LATE)
        if not reply:
            raise Unscored(f"the scorer ended with code {self.close()}")
        try:
            return json.loads(reply)
        except (ValueError, RecursionError):
            return ["not JSON"]

    def close(self) -> int:
        """Ends the process and closes its pipes; not from another thread."""
        code = self.end()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with suppress(OSError):  # of a question that was not sent
                if pipe:
                    pipe.close()
        return code

    def end(self) -> int:
        """Kills the process and what it started; returns its exit code."""
        import atexit

        atexit.unregister(self.end)
        if self._owner != os.getpid():  # a fork ends nothing of its parent
            return 0
        if self._popen.poll() is None:
            with suppress(OSError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        return self._popen.wait()
