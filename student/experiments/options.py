"""What one call of `logitcache experiment` is given."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache.accuracy.options import DEFAULT
from logitcache.student.experiments.catalog import Arm

SEED = -1  # of the arm that is not trained


@dataclass(frozen=True)
class ExperimentOptions:
    """One call of ``logitcache experiment``."""

    name: str
    cache: Path
    student: str
    out: Path
    seeds: int = 3  # runs of each arm
    points: tuple[float, ...] | None = None  # shares of lsp and first-derivation; None: those of arms.py
    prompts: str | None = None  # questions with answers; None: no accuracy
    verifier: str = "exact"
    budgets: tuple[str, ...] = DEFAULT
    by: str = "family"  # accuracy is told by this column of the prompts too, where they have it
    teacher: str | None = None  # for halves: it reads the crops
    shared: dict[str, Any] = field(default_factory=dict)  # fields of TrainOptions, the same for every arm
    # Further fields of BudgetOptions, such as samples and engine_args; reasoning_markers "OPENING,CLOSING" for its markers.
    answers: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> float:
        return self.shared.get("held_out", 0.05)

    def place(self, arm: Arm | str, seed: int) -> Path:
        """Of a run; of the student as it was given for SEED."""
        folder = arm.folder if isinstance(arm, Arm) else arm
        return self.out / "arms" / folder / ("student" if seed == SEED else f"seed-{seed}")

    def crop(self, arm: Arm) -> Path:
        assert arm.crop
        return self.out / "crops" / arm.crop.replace(":", "-")
