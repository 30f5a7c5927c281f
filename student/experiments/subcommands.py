"""Commands of logitcache as an experiment calls them: their arguments, and a process of its own for each."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from logitcache.errors import InputError, LogitcacheError, TrainingError
from logitcache.identity import Identity
from logitcache.runtime.console import Stop

Call = Callable[[list[str], Path, Stop], tuple[int, str]]  # arguments, log, Stop -> exit code, standard output

_LISTS = {  # settings of several values, by the option that is given once for each
    "set": "--set",
    "section_weights": "--section-weight",
    "sampling": "--sampling",
    "engine_args": "--engine-arg",
    "template_args": "--template-arg",
}


def in_process_of_its_own(arguments: list[str], log: Path, stop: Stop) -> tuple[int, str]:
    """Runs `logitcache ARGUMENTS`; what it says on standard error goes to `log`.

    It is out of the terminal's reach: a signal that `stop` has caught is passed on, once, and the command then ends in
    its own way.
    """
    command = [sys.executable, "-m", "logitcache.cli", *arguments]
    passed = False
    with log.open("w") as errors, log.with_suffix(".out").open("w+") as out:
        child = subprocess.Popen(command, stdout=out, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            while (code := _wait(child)) is None:
                if stop.signal and not passed:
                    child.send_signal(signal.Signals[stop.signal])
                    passed = True
        except BaseException:  # a second Ctrl-C: it is told a second time too
            child.terminate()
            child.wait()
            raise
        out.seek(0)
        return code if code >= 0 else 128 - code, out.read()


def _wait(child: subprocess.Popen) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(0.2)
    return None


def check(code: int, what: str, log: Path) -> str | None:
    """The signal that ended a command, None where it did its work.

    Raises: InputError or TrainingError with what the command said last.
    """
    signals = {each.value: each.name for each in signal.Signals}
    killed = signals.get(code - 128)
    if killed in ("SIGINT", "SIGTERM"):
        return killed
    if code == 0:
        return None
    said = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    )
    if killed:
        memory = " (out of memory?)" if killed == "SIGKILL" else ""
        last = f" after {said[-1]!r}" if said else ""
        raise TrainingError(
            f"{what} was killed by {killed}{memory}{last}; run the same command again to go on (its log: {log})"
        )
    own = [line.removeprefix("logitcache: ") for line in said if line.startswith("logitcache: ")]
    kind: type[LogitcacheError] = InputError if code == 2 else TrainingError
    raise kind(f"{what}: {(own or said or [f'exit code {code}'])[-1]} (its log: {log})")


def train(cache: Path, student: str, out: Path, settings: dict[str, Any]) -> list[str]:
    """`logitcache train` with TrainOptions' fields as its options."""
    return ["train", str(cache), "--student", student, "--out", str(out), *_options(settings)]


def evaluate(cache: Path, student: str, settings: dict[str, Any]) -> list[str]:
    return ["eval", str(cache), "--student", student, *_options(settings), "--json"]


def answer(student: str, prompts: str, out: Path, settings: dict[str, Any]) -> list[str]:
    """`logitcache eval --prompts` with AccuracyOptions' fields as its options, but for `reasoning_markers`, which are text."""
    return ["eval", "--student", student, "--prompts", prompts, "--out", str(out), *_options(settings), "--json"]


def crop(
    source: Path, identity: Identity, teacher: str, which: str, out: Path, engine_args: dict[str, Any]
) -> list[str]:
    """`logitcache score` of a crop, with rows of the source's kind."""
    pinned, engine = map(str, identity.pin_tokens), identity.engine_args | engine_args
    local, revision = Path(teacher).is_dir(), identity.teacher_revision
    settings = {
        "top_k": identity.top_k,
        "top_p": identity.top_p,
        "min_k": identity.min_k,
        "pin_tokens": ",".join(pinned) or "none",
        "exact": identity.exact or None,
        "prompt_logits": identity.prompt_logits,
        "dtype": identity.dtype,
        "revision": None if local or teacher != identity.teacher or revision == "unknown" else revision,
        "template_args": engine.pop("template_args", {}),
        "engine_args": engine,
    }
    return [
        "score",
        "--from-cache",
        str(source),
        "--crop",
        which,
        "--teacher",
        teacher,
        "--out",
        str(out),
        *_options(settings),
    ]


def _options(settings: dict[str, Any]) -> list[str]:
    given: list[str] = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if value is None or (value is False and name in ("gradient_checkpointing", "compile")):
            continue  # these two are off, and have no option that says so
        if isinstance(value, dict):
            for key, each in value.items():
                given += [_LISTS[name], f"{key}={each if isinstance(each, str) else json.dumps(each)}"]
        elif isinstance(value, bool):
            given.append(option if value else option.replace("--", "--no-", 1))
        else:
            several = isinstance(value, list | tuple)
            given += [option, ",".join(map(str, value)) if several else str(value)]
    return given
