"""Commands of logitcache that an experiment runs: their arguments, and a process for each."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from logitcache.accuracy.options import AccuracyOptions
from logitcache.capture.score import ScoreOptions
from logitcache.errors import InputError, LogitcacheError, TrainingError, WriteError
from logitcache.identity import Identity
from logitcache.runtime.console import Stop
from logitcache.runtime.options import arguments
from logitcache.runtime.regular_files import descriptor_of
from logitcache.storage.location import Location
from logitcache.student.evaluation.options import EvaluationOptions
from logitcache.student.training.options import TrainOptions

Call = Callable[[list[str], Path, Stop], tuple[int, str]]  # words, log, Stop -> exit code, standard output


def in_process_of_its_own(words: list[str], log: Path, stop: Stop) -> tuple[int, str]:
    """Runs `logitcache WORDS` in a process of its own, with its standard error in `log`.

    The process has a session of its own, so Ctrl-C in the terminal does not reach it. A signal that `stop` has caught is
    passed on once, and the command then shuts down as it always does.

    Returns: exit code and standard output.
    """
    command = [sys.executable, "-P", "-m", "logitcache.cli", *words]
    passed = False
    with _anew(log) as errors, _anew(log.with_suffix(".out")) as out:
        child = subprocess.Popen(command, stdout=out, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            while (code := _wait(child)) is None:
                if stop.signal and not passed:
                    child.send_signal(signal.Signals[stop.signal])
                    passed = True
        except BaseException:  # a second Ctrl-C is passed on as well
            child.terminate()
            child.wait()
            raise
        out.seek(0)
        return code if code >= 0 else 128 - code, out.read()


def _anew(path: Path) -> TextIO:
    """An empty file to write and read. Raises: WriteError where a link or no file stands."""
    try:
        file = os.fdopen(descriptor_of(path, os.O_RDWR | os.O_CREAT), "r+", errors="replace")
    except OSError as e:
        raise WriteError(f"{path}: {e.strerror}; move it away") from e
    file.truncate(0)
    return file


def _wait(child: subprocess.Popen) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(0.2)
    return None


def check(code: int, what: str, log: Path) -> str | None:
    """Returns: the signal that stopped a command (SIGINT or SIGTERM); None if it succeeded.

    Raises: InputError or TrainingError with the last line of the log, for a command that failed.
    """
    signals = {each.value: each.name for each in signal.Signals}
    killed = signals.get(code - 128)
    if killed in ("SIGINT", "SIGTERM"):
        return killed
    if code == 0:
        return None
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if killed:
        memory = " (out of memory?)" if killed == "SIGKILL" else ""
        last = f" after {lines[-1]!r}" if lines else ""
        raise TrainingError(
            f"{what} was killed by {killed}{memory}{last}; run the same command again to resume (its log: {log})"
        )
    own = [line.removeprefix("logitcache: ") for line in lines if line.startswith("logitcache: ")]
    kind: type[LogitcacheError] = InputError if code == 2 else TrainingError
    raise kind(f"{what}: {(own or lines or [f'exit code {code}'])[-1]} (its log: {log})")


def train(cache: str | Location, student: str, out: Path, settings: dict[str, Any]) -> list[str]:
    """`logitcache train` with fields of TrainOptions as its options."""
    given = {"caches": [cache], "student": student, "out": out, **settings}
    return ["train", *arguments(TrainOptions, given)]


def evaluate(cache: str | Location, student: str, settings: dict[str, Any]) -> list[str]:
    """`logitcache eval CACHE` with fields of EvaluationOptions as its options."""
    return ["eval", *arguments(EvaluationOptions, {"cache": cache, "student": student, **settings}), "--json"]


def answer(student: str, prompts: str, out: Path, settings: dict[str, Any]) -> list[str]:
    """`logitcache eval --prompts` with fields of AccuracyOptions as its options."""
    given = {"student": student, "prompts": prompts, "out": out, **settings}
    return ["eval", *arguments(AccuracyOptions, given), "--json"]


def crop(
    source: str | Location, identity: Identity, teacher: str, which: str, out: Path, engine_args: dict[str, Any]
) -> list[str]:
    """`logitcache score` of a crop, with rows that are stored like those of the source."""
    revision = identity.teacher_revision
    is_commit = teacher == identity.teacher and re.fullmatch(r"[0-9a-f]{40}", revision)
    given = {
        "from_cache": source,
        "crop": which,
        "teacher": teacher,
        "out": out,
        "top_k": identity.top_k,
        "top_p": identity.top_p,
        "min_k": identity.min_k,
        "pin_tokens": ",".join(map(str, identity.pin_tokens)) or "none",
        "exact": identity.exact,
        "prompt_logits": identity.prompt_logits,
        "dtype": identity.dtype,
        "revision": revision if is_commit and not Path(teacher).is_dir() else None,
        "engine_args": _trusted_engine_args(identity, engine_args),
    }
    return ["score", *arguments(ScoreOptions, given)]


# Engine arguments that a cache's own record may set: they name no file, no code and no other model.
_FROM_A_CACHE = {
    "max_model_len": int,
    "quantization": str,
    "kv_cache_dtype": str,
    "disable_cascade_attn": bool,
    "disable_sliding_window": bool,
}
_NOT_OF_AN_ENGINE = {"template_args", "distillkit"}  # of prompts, which are rendered already; of an import


def _trusted_engine_args(identity: Identity, given: dict[str, Any]) -> dict[str, Any]:
    """The engine arguments of a cache that a file may set, under those that the user gave.

    Raises: InputError for another argument of the cache that the user did not give.
    """
    own = {k: v for k, v in identity.engine_args.items() if k not in _NOT_OF_AN_ENGINE and k not in given}
    for name, value in own.items():
        kind = _FROM_A_CACHE.get(name)
        plain = not isinstance(value, str) or re.fullmatch(r"[\w.-]{1,64}", value)
        if kind is None or type(value) is not kind or not plain:
            raise InputError(
                f"the cache was made with the engine argument {str(name)[:80]!r}, which is not taken from a file; if you trust "
                "its value, give it yourself in `engine_args`"
            )
    return own | given
