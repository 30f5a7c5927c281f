"""What one call of `logitcache eval CACHE` is given."""

from dataclasses import dataclass
from pathlib import Path

from logitcache.sections import SECTIONS


@dataclass(frozen=True)
class EvaluationOptions:
    """One call of ``logitcache eval``. The full view by default, as in training: one measure for all students."""

    cache: Path
    student: str  # a run, one of its checkpoints, a model folder, a LoRA adapter's folder, a hub id
    held_out: float | None = None  # None: as the run that the student is of had it, or 0.05
    everything: bool = False
    where: str | None = None
    view: str = "full"
    sections: tuple[str, ...] = tuple(SECTIONS)
    tokens_per_batch: int = 4096
    dtype: str | None = None  # as TrainOptions has it
