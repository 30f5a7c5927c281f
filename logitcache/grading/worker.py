"""The process of a sandbox: reads one question per line, writes one verdict per line, until its parent ends."""

import gc
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

from logitcache.errors import first_line
from logitcache.grading.confinement import confine
from logitcache.grading.sandbox import FAILED, LATE

_LIFE = 660  # seconds that a reused process lives
_REPLY = 2_000  # bytes of a child's reply

Reply = list[Any]  # a verdict and None, or None and [reason, why]


def serve(scorer: str, seconds: float, reused: bool) -> None:
    """Writes null once it is ready, or why it is not; then answers questions."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a scorer prints is no verdict

    def reply(value: Any) -> None:
        print(json.dumps(value), file=replies, flush=True)

    try:
        module, _, function = scorer.partition(":")
        score: Callable[..., bool] = getattr(import_module(module), function)()
        prepare = getattr(score, "prepare", None)
        gc.collect()
        gc.freeze()  # children share these pages
        if reused:
            confine(_LIFE)
    except Exception as e:
        return reply(first_line(e))
    reply(None)
    for line in sys.stdin.buffer:
        ticket, question = json.loads(line)
        try:
            if prepare:
                prepare(**question)
        except Exception as e:
            reply([ticket, *_unscored(first_line(e))])
            continue
        reply([ticket, *(_verdict(score, question) if reused else _verdict_of_child(score, question, seconds))])
    return None


def _verdict(score: Callable[..., bool], question: dict[str, Any]) -> Reply:
    try:
        return [bool(score(**question)), None]
    except BaseException as e:
        return _unscored(first_line(e), getattr(e, "why", None))


def _unscored(reason: str, why: str | None = None) -> Reply:
    return [None, [reason[:400], why or FAILED]]


def _verdict_of_child(score: Callable[..., bool], question: dict[str, Any], seconds: float) -> Reply:
    """The verdict of a confined child of this process, which has no descriptor but the one that its verdict goes to."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(score, question, writing, int(seconds) + 1)
    os.close(writing)
    try:
        found, late = _read(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    try:
        match json.loads(found):
            case [bool(right), None]:
                return [right, None]
            case [None, [str(reason), str(why)]]:
                return _unscored(reason, why)
    except (ValueError, RecursionError):
        pass
    if late:
        return _unscored(f"no result within {seconds:g} s", LATE)
    return _unscored(f"the scorer ended with code {os.waitstatus_to_exitcode(status)}")


def _be_child(score: Callable[..., bool], question: dict[str, Any], writing: int, seconds: int) -> NoReturn:
    try:
        os.dup2(writing, 0)  # instead of the questions
        os.closerange(3, 1 << 20)
        confine(seconds)
        os.write(0, json.dumps(_verdict(score, question)).encode())
    finally:
        os._exit(0)


def _read(descriptor: int, until: float) -> tuple[bytes, bool]:
    """What comes before the end or a time, and whether the time came first."""
    found = b""
    while len(found) < _REPLY:
        left = until - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return found, True
        part = os.read(descriptor, _REPLY)
        if not part:
            break
        found += part
    return found, False
