"""A process that scores answers with code that computes, or even ``eval``s, them.

It has a limit of time and memory and may not write files, start programs or open connections. That prevents accidents; it
does not stop an attacker.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import Any

from logitcache.errors import first_line

_SECONDS, _MEMORY = 3.0, 4 << 30  # for one verdict


class Unscored(Exception):
    """An answer that a grader could not score, and why."""


class Sandbox:
    """A process that scores answers. It starts with the first question, and again if a question ended it.

    Args:
        scorer: "module:function"; the process calls the function once, and what it returns with each question.
    """

    def __init__(self, scorer: str) -> None:
        self.scorer = scorer
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # a fork must not read its parent's verdicts

    def ask(self, **question: Any) -> bool:
        """The scorer's verdict on a question: its keyword arguments, as JSON.

        Raises: Unscored if the scorer raises, ends, or takes more than its time.
        """
        with self._turn:
            right, reason = self._ask(json.dumps(question))
        if reason is not None:
            raise Unscored(reason)
        return right

    def _ask(self, question: str) -> tuple[Any, str | None]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process, self._owner = self._start(), os.getpid()
        # None until it replies: after an interrupt no process with an unread reply may be asked again.
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # it ended before the question
            process.stdin.write(question + "\n")
            process.stdin.flush()
            if reply := process.stdout.readline():
                self._process = process
                return tuple(json.loads(reply))
        with suppress(OSError), process:  # closes its pipes
            process.kill()
        if process.returncode == -signal.SIGALRM:
            return None, f"no result within {_SECONDS:g} s"
        return None, f"the scorer ended with code {process.returncode}"

    def _start(self) -> subprocess.Popen[str]:
        import atexit

        process = subprocess.Popen(
            [
                sys.executable,
                "-B",
                "-P",
                "-c",
                f"from logitcache.grading.sandbox import serve; serve({self.scorer!r}, {_SECONDS})",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            start_new_session=True,  # a Ctrl-C goes to the command: answers under way are still scored
            text=True,
            encoding="utf-8",
        )
        atexit.register(process.kill)
        return process


def serve(scorer: str, seconds: float) -> None:
    """The loop of a sandbox: reads one question per line, writes one verdict and reason per line, until its parent ends."""
    import resource

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a scorer prints is no verdict
    module, _, function = scorer.partition(":")
    score = getattr(import_module(module), function)()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    sys.addaudithook(_refuse)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # ends this process, whatever it is in
        try:
            reply = (score(**json.loads(line)), None)
        except BaseException as e:
            reply = (None, first_line(e))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: a scorer may read files, and nothing else."""
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    harmless = event in ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
    if writes or (
        event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "signal.")) and not harmless
    ):
        raise PermissionError(f"a scorer may not {event}")
