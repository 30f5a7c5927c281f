"""The process of a sandbox. It reads one question per line and writes one verdict per line, until its parent ends.

It scores nothing itself: a confined child does. The child is replaced after a text became code in it, which may have changed
the scorer, and after a question that did not end.
"""

import gc
import json
import os
import re
import secrets
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from logitcache.errors import first_line
from logitcache.grading.confinement import confine, rules
from logitcache.grading.sandbox import FAILED, LATE

_LONGEST = 2_000  # bytes of a child's reply
_CODE = b"!"  # a child writes it before a text becomes code, so that the code cannot hide it

Scorer = Callable[..., bool]
Reply = list[Any]  # a verdict and None, or None and [reason, why]


def serve(scorer: str, seconds: float) -> None:
    """Writes null once it is ready, or why it is not; then answers questions, each in ``seconds``."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a scorer prints is no verdict

    def reply(value: Any) -> None:
        print(json.dumps(value), file=replies, flush=True)

    try:
        module, _, function = scorer.partition(":")
        score: Scorer = getattr(import_module(module), function)()
        prepare = getattr(score, "prepare", None)
        rules()
        gc.collect()
        gc.freeze()  # children share these pages
    except Exception as e:
        return reply(first_line(e))
    reply(None)
    child = _Child(score)
    for line in sys.stdin.buffer:
        ticket, question = json.loads(line)
        try:
            if prepare and prepare(**question):
                child.end()
                child = _Child(score)
            answer = child.ask(question, seconds)
        except Exception as e:
            answer = _unscored(first_line(e))
        reply([ticket, *answer])
        if child.spent:  # after the reply, so that nobody waits for the fork
            child.end()
            child = _Child(score)
    return None


class _Child:
    """A confined child of this process."""

    def __init__(self, score: Scorer) -> None:
        asked, self._questions = os.pipe()
        self._verdicts, answered = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _be_child(score, asked, answered, parent)
        os.close(asked)
        os.close(answered)
        self.spent = False  # may not be asked again

    def ask(self, question: dict[str, Any], seconds: float) -> Reply:
        until, ticket = time.monotonic() + seconds, secrets.token_hex(16)
        with open(self._questions, "wb", closefd=False) as questions:
            questions.write(json.dumps([ticket, question]).encode() + b"\n")
        found, late = self._read(until)
        self.spent = found.startswith(_CODE)
        with suppress(ValueError, RecursionError):
            match json.loads(found.removeprefix(_CODE)):
                case [str(given), bool(right), None] if given == ticket:
                    return [right, None]
                case [str(given), None, [str(reason), str(why)]] if given == ticket:
                    return _unscored(reason, why)
        self.spent = True
        if late:
            return _unscored(f"no result within {seconds:g} s", LATE)
        return _unscored(f"the scorer ended with code {self.end()}")

    def _read(self, until: float) -> tuple[bytes, bool]:
        """A line, or what comes of it before the child ends or a time is over; and whether the time is over."""
        found = b""
        while len(found) < _LONGEST and not found.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._verdicts], [], [], left)[0]:
                return found, True
            if not (part := os.read(self._verdicts, _LONGEST)):
                break
            found += part
        return found, False

    def end(self) -> int:
        """Kills it; returns its exit code."""
        if self._pid:
            os.close(self._questions)
            os.close(self._verdicts)
            os.kill(self._pid, signal.SIGKILL)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._pid = 0
        return self._code


def _be_child(score: Scorer, asked: int, answered: int, parent: int) -> NoReturn:
    """Answers questions from descriptor 0 on descriptor 3, its only ones besides /dev/null."""
    try:
        os.dup2(asked, 0)
        os.dup2(os.dup(answered), 3)
        os.closerange(4, 1 << 20)
        sys.addaudithook(_code_hook())
        confine(parent)
        for line in os.fdopen(0, "rb"):
            ticket, question = json.loads(line)
            os.write(3, json.dumps([ticket, *_verdict(score, question)]).encode() + b"\n")
    finally:
        os._exit(0)


# What sympy makes of the numbers in a formula.
_HARMLESS = re.compile(rb"from sympy import \*|(Integer|Float) \('?[\d.]+(e[+-]?\d+)?'? \)")


def _code_hook() -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that says, once, that a text becomes code."""
    said = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal said
        if event == "compile" and not said:
            source = arguments[0]
            text = source.encode(errors="replace") if isinstance(source, str) else source
            if not (isinstance(text, bytes) and _HARMLESS.fullmatch(text)):
                said = True
                os.write(3, _CODE)

    return hook


def _verdict(score: Scorer, question: dict[str, Any]) -> Reply:
    try:
        return [bool(score(**question)), None]
    except BaseException as e:
        return _unscored(first_line(e), getattr(e, "why", FAILED))


def _unscored(reason: str, why: str = FAILED) -> Reply:
    return [None, [reason[:400], why]]
