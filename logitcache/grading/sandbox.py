"""Answers that a package computes, or even ``eval``s, are judged in a process of their own, with a limit of time and of
memory, that may not write files, start programs or open connections. That keeps accidents away; it is no sandbox against
an attacker.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from logitcache.errors import first_line

TAIL = 2_000  # characters that are searched where nothing marks a final answer
_SECONDS, _MEMORY = 3.0, 4 << 30  # for one verdict
_RIGHT = 0.99  # of reasoning-gym's score: whatever it gives less for is near the answer, or holds it


class Judge:
    """The process that scores one kind of answers; it starts with the first, and again where one ended it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # a fork must not read its parent's verdicts

    def ask(self, **question: Any) -> tuple[bool | None, str | None]:
        """A verdict; or None, and why there is none."""
        with self._turn:
            return self._ask(json.dumps(question))

    def _ask(self, question: str) -> tuple[bool | None, str | None]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process, self._owner = self._start(), os.getpid()
        process, self._process = self._process, None  # until its reply is in hand: an interrupt must leave none behind
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
            return None, f"no end within {_SECONDS:g} s"
        return None, f"the scorer ended with code {process.returncode}"

    def _start(self) -> subprocess.Popen[str]:
        import atexit

        process = subprocess.Popen(
            [
                sys.executable,
                "-B",
                "-P",
                "-c",
                f"from logitcache.grading.sandbox import serve; serve{self.kind, _SECONDS}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            start_new_session=True,  # a Ctrl-C is ours: what is under way is still judged
            text=True,
            encoding="utf-8",
        )
        atexit.register(process.kill)
        return process


def serve(kind: str, seconds: float) -> None:
    """The judge's life: a question a line in, a verdict and a reason a line out, until its parent is gone."""
    import resource

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a scorer prints is no verdict
    scorer = _math_scorer() if kind == "math" else _gym_scorer()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    sys.addaudithook(_refuse)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # ends this process, whatever it is in
        try:
            reply = (scorer(**json.loads(line)), None)
        except BaseException as e:
            reply = (None, first_line(e))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: a scorer reads its own files, and does nothing else to the machine."""
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    harmless = event in ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
    if writes or (
        event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "signal.")) and not harmless
    ):
        raise PermissionError(f"a scorer may not {event}")


def _math_scorer() -> Callable[..., bool]:
    import logging

    from math_verify import parse, verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    logging.disable(logging.CRITICAL)
    # Their timeouts are ours here, and they work in main threads alone. No fallback: texts were compared before.
    options = {"fallback_mode": "no_fallback", "parsing_timeout": None, "raise_on_error": True}

    def boxed(text: str) -> list[Any]:
        return parse(rf"\boxed{{{_latex(text)}}}", **options)

    def score(final: str, context: str, gold: str) -> bool:
        if not (wanted := boxed(gold)):
            raise ValueError(f"math-verify reads no formula in the gold answer {gold[:80]!r}")
        said = boxed(final) if len(final) <= TAIL and _balanced(final) else []
        if _PROSE.search(final):
            context = _CURRENCY.sub("", context)
            found = parse(context, [LatexExtractionConfig()], **options)
            if not found and not re.search(r"[\\^]|sqrt", context):  # 2\sqrt{3} without its dollars is not the number 2
                found = parse(context, [ExprExtractionConfig()], **options)
            said += found
        return any(verify(wanted, one, timeout_seconds=None, raise_on_error=True) for one in said)

    return score


_PROSE = re.compile(r"(?<![\\\w])(?!sqrt|sin|cos|tan|log|exp)[^\W\d_]{3,}|\$|\\[(\[]")
_CURRENCY = re.compile(r"\\\$|\$(?=\d[\d,]*+(?:\.\d+)?+(?!\s*[-+*/^=<>\\$(]|\s?\w\b|\w))")


def _latex(text: str) -> str:
    """Plain notation that math-verify does not read, as LaTeX."""
    text = re.sub(r"\\?\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text.strip().strip("$").replace("**", "^"))
    return re.sub(r"(?<!\\)\bpi\b", r"\\pi", text)


def _balanced(text: str) -> bool:
    depth = 0
    for bracket in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if bracket == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def _gym_scorer() -> Callable[..., bool]:
    import reasoning_gym

    dataset = cache(lambda name: reasoning_gym.create_dataset(name, seed=0, size=1))

    def score(texts: list[str], gold: str | None, entry: dict[str, Any]) -> bool:
        task = dataset(entry["source_dataset"])
        forms = [{"question": "", "answer": gold, "metadata": m} for m in (entry, _with_tuples(entry))]
        if not any(task.score_answer(text, form) >= _RIGHT for text in texts for form in forms):
            return False
        if _takes(task, "?", forms[0]):  # game_of_life_halting does
            raise ValueError(f"{entry['source_dataset']} takes any answer for right")
        return True

    return score


def _takes(task: Any, text: str, form: dict[str, Any]) -> bool:
    try:
        return task.score_answer(text, form) >= _RIGHT
    except Exception:
        return False


def _with_tuples(value: Any) -> Any:
    """JSON made lists of tuples, and some tasks compare with those."""
    if isinstance(value, dict):
        return {key: _with_tuples(v) for key, v in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
