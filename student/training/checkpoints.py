"""A run on disk: its files, its newest complete checkpoint, and the removal of incomplete ones."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from logitcache.errors import StudentError
from logitcache.runtime.files import LOCK
from logitcache.runtime.locks import holder

RUN_FILE, STATE_FILE, SPENT_FILE = "run.json", "trainer_state.json", "spent.json"


def newest_checkpoint(run: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest complete checkpoint and its trainer state; (None, {}) where there is none.

    The state is the last file of a checkpoint. A checkpoint that training removes meanwhile is skipped.
    """
    for path in sorted(_checkpoints(run), key=_step, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            return path, json.loads((path / STATE_FILE).read_text())
    return None, {}


def latest_checkpoint(run: Path) -> str | None:
    """The path of the newest complete checkpoint."""
    path, _ = newest_checkpoint(run)
    return None if path is None else str(path)


def remove_incomplete(run: Path, newest: str | None) -> None:
    """Removes checkpoints after `newest`, which are incomplete: rotation would take one of them for the newest."""
    for path in _checkpoints(run):
        if newest is None or _step(path) > _step(Path(newest)):
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def find_run(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """The run directory of `path`, which is one or one of its checkpoints, and its run.json as it is on disk.

    `RunRecord.from_json` reads the latter. Returns (None, {}) for anything else.
    Raises: StudentError for a run.json that `logitcache train` did not write.
    """
    homes = [path, path.parent] if re.fullmatch(r"checkpoint-\d+", path.name) else [path]
    for home in homes:
        if (file := home / RUN_FILE).is_file():
            try:
                run = json.loads(file.read_text())
                run["status"]
            except (ValueError, TypeError, KeyError, OSError) as e:
                raise StudentError(f"{file} was not written by `logitcache train`; is {home} a run?") from e
            return home, run
    return None, {}


def run_status(home: Path, run: dict[str, Any]) -> str:
    """finished, running or stopped. A run that was killed still says running, but nobody holds its lock."""
    return "finished" if run["status"] == "finished" else "running" if holder(home / LOCK) else "stopped"
