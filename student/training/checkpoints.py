"""A run on disk: its files, and its checkpoints: which one to use, where a new one is written, which ones are removed.

A checkpoint is written in a hidden folder of the run and renamed when all its files are on disk and hashed.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from logitcache.errors import StudentError, TrainingError
from logitcache.runtime.files import LOCK, sync_directory
from logitcache.runtime.locks import holder
from logitcache.runtime.regular_files import open_regular
from logitcache.student.training.checkpoint_files import (
    RECORD,
    STATE_FILE,
    WEIGHTS,
    checkpoint_damage,
    read_state,
    seal,
    weights_damage,
)

RUN_FILE = "run.json"
WORK = ".logitcache.saving"  # what is in it is incomplete, or being removed


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, newest first, damaged ones included. Other folders of such a name are not of this run."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and _is_ours(p)]
    return sorted(found, key=_step, reverse=True)


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    names = os.listdir(path)
    return not names or any(name in (RECORD, STATE_FILE) or Path(name).suffix in WEIGHTS for name in names)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest_checkpoint(run: Path, weights: bool = False) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint with all its files, and its trainer state; (None, {}) where there is none.

    A checkpoint that training removes meanwhile is skipped.

    Args:
        weights: compare the weights with their hashes, too.
    """
    for path in checkpoints(run):
        try:
            if not (checkpoint_damage(path, hashes=False) or (weights and weights_damage(path))):
                return path, read_state(path)
        except (OSError, ValueError):
            continue
    return None, {}


def checkpoint_to_resume(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest undamaged checkpoint, every file compared with its hash, and what is wrong with the newer ones.

    Raises: TrainingError if there are checkpoints and none can be used, or if one cannot be read.
    """
    damaged: dict[Path, str] = {}
    for path in checkpoints(run):
        try:
            wrong = checkpoint_damage(path)
        except OSError as e:
            raise TrainingError(
                f"{e.filename or path}: {e.strerror or e}; fix the cause, then run the same command to resume"
            ) from e
        if wrong is None:
            return path, damaged
        damaged[path] = wrong
    if damaged:
        what = ", ".join(f"{path.name} ({wrong})" for path, wrong in damaged.items())
        raise TrainingError(
            f"{run}: no checkpoint can be used: {what}; restore one from a copy, or remove them to train from the start"
        )
    return None, {}


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint, so that nothing takes it for one, and returns its new path."""
    aside = checkpoint.with_name(f"{checkpoint.name}.aside")
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.aside-{number}")
    checkpoint.rename(aside)
    return aside


def publish_checkpoint(run: Path, written: Path) -> Path:
    """Makes a complete folder of WORK the checkpoint of its name. Raises: OSError, WriteError."""
    place = run / written.name
    seal(written)
    before = set_aside(place) if place.exists() else None
    written.rename(place)
    sync_directory(run)
    if before is not None and _is_ours(before):  # of the same step
        _remove(run, before)
    return place


def publish_model(out: Path, written: Path) -> None:
    """Moves a complete model from WORK to `out`, file by file; its record of hashes comes last.

    Raises: OSError, WriteError.
    """
    seal(written)
    (out / RECORD).unlink(missing_ok=True)
    files = sorted((p for p in written.rglob("*") if p.is_file()), key=lambda p: p.name == RECORD)
    for path in files:
        place = out / path.relative_to(written)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.name == RECORD:
            sync_directory(out)
        path.replace(place)
    sync_directory(out)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints until `limit` remain, but never the newest or the best one, nor damaged ones."""
    whole = [path for path in checkpoints(run) if checkpoint_damage(path, hashes=False) is None]
    keep = {*whole[:1], *([Path(best)] if best else [])}
    old = [path for path in reversed(whole) if path not in keep]
    for path in old[: max(0, len(whole) - max(limit, len(keep)))] if limit and limit > 0 else []:
        _remove(run, path)


def clear_work(run: Path) -> None:
    """Removes what a process that ended meanwhile left incomplete."""
    shutil.rmtree(run / WORK, ignore_errors=True)


def _remove(run: Path, checkpoint: Path) -> None:
    """Removes a checkpoint; one removed in part has no name of a checkpoint."""
    (run / WORK).mkdir(exist_ok=True)
    old = run / WORK / f"removed-{checkpoint.name}"
    shutil.rmtree(old, ignore_errors=True)
    checkpoint.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def find_run(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """The run directory of `path`, which is one or one of its checkpoints, and its run.json as it is on disk.

    `RunRecord.from_json` reads the latter. Returns (None, {}) for anything else.
    Raises: StudentError for a run.json that `logitcache train` did not write.
    """
    homes = [path, path.parent] if re.fullmatch(r"checkpoint-\d+", path.name) else [path]
    for home in homes:
        if (file := home / RUN_FILE).is_file():
            try:
                with open_regular(file) as record:
                    run = json.load(record)
                run["status"]
            except (ValueError, TypeError, KeyError, OSError, RecursionError) as e:
                raise StudentError(f"{file} was not written by `logitcache train`; is {home} a run?") from e
            return home, run
    return None, {}


def run_status(home: Path, run: dict[str, Any]) -> str:
    """finished, running or stopped. A run that was killed still says running, but nobody holds its lock."""
    return "finished" if run["status"] == "finished" else "running" if holder(home / LOCK) else "stopped"
