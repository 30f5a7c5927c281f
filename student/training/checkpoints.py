"""A run on disk: its files, which of its checkpoints is whole, and what to do with those that are not."""

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
    """The newest checkpoint that was written whole, and its trainer state; (None, {}) where there is none.

    Its state is written after all else; one that training removes meanwhile, for a newer one, is passed over.
    """
    for path in sorted(_checkpoints(run), key=_step, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            return path, json.loads((path / STATE_FILE).read_text())
    return None, {}


def latest_checkpoint(run: Path) -> str | None:
    path, _ = newest_checkpoint(run)
    return None if path is None else str(path)


def drop_after(run: Path, whole: str | None) -> None:
    """Removes checkpoints that were cut short, so that the rotation never takes one for the newest."""
    for path in _checkpoints(run):
        if whole is None or _step(path) > _step(Path(whole)):
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def find_run(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """The run that a directory is, or is a checkpoint of, and its run.json; (None, {}) for anything else.

    Raises: StudentError for a run.json that is none.
    """
    homes = [path, path.parent] if re.fullmatch(r"checkpoint-\d+", path.name) else [path]
    for home in homes:
        if (file := home / RUN_FILE).is_file():
            try:
                run = json.loads(file.read_text())
                run["status"]
            except (ValueError, TypeError, KeyError, OSError) as e:
                raise StudentError(f"{file} is not what `logitcache train` writes; is {home} a run?") from e
            return home, run
    return None, {}


def standing(home: Path, run: dict[str, Any]) -> str:
    """finished, running or stopped: a kill leaves no word behind."""
    return "finished" if run["status"] == "finished" else "running" if holder(home / LOCK) else "stopped"
