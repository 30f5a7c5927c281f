"""A run on disk: its files, which of its checkpoints is whole, and what to do with those that are not."""

import contextlib
import json
import shutil
from pathlib import Path

RUN_FILE, STATE_FILE, SPENT_FILE, LOCK_FILE = "run.json", "trainer_state.json", "spent.json", ".lock"


def latest_checkpoint(run: Path) -> str | None:
    """The newest checkpoint that was written whole: its state is written after all else."""
    for path in sorted(run.glob("checkpoint-*"), key=_step, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / STATE_FILE).read_text())
            return str(path)
    return None


def drop_after(run: Path, whole: str | None) -> None:
    """Removes checkpoints that were cut short, so that the rotation never takes one for the newest."""
    for path in run.glob("checkpoint-*"):
        if whole is None or _step(path) > _step(Path(whole)):
            shutil.rmtree(path, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
