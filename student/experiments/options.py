"""What one call of `logitcache experiment` is given."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache.accuracy.options import DEFAULT_BUDGETS
from logitcache.student.experiments.catalog import BEFORE, Variant


@dataclass(frozen=True)
class ExperimentOptions:
    """One call of ``logitcache experiment``."""

    name: str
    cache: Path
    student: str
    out: Path
    seeds: int = 3  # runs of each variant
    points: tuple[float, ...] | None = None  # shares of lsp and first-derivation; None: those of variants.py
    prompts: str | None = None  # questions with answers; None: no accuracy
    verifier: str = "exact"
    budgets: tuple[str, ...] = DEFAULT_BUDGETS
    by: str = "family"  # accuracy is told by this column of the prompts too, where they have it
    teacher: str | None = None  # for halves: it reads the crops
    shared: dict[str, Any] = field(default_factory=dict)  # fields of TrainOptions, the same for every variant
    # Further fields of AccuracyOptions, such as samples and engine_args; reasoning_markers "OPENING,CLOSING" for its markers.
    answers: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> float:
        return self.shared.get("held_out", 0.05)

    def place(self, variant: Variant | None, seed: int | None) -> Path:
        """Directory of a run. None for both: of the untrained student, whose evaluations are stored beside it."""
        if variant is None:
            return self.out / "variants" / BEFORE / "student"
        return self.out / "variants" / variant.folder / f"seed-{seed}"

    def crop(self, variant: Variant) -> Path:
        """The cache of a variant's crops."""
        assert variant.crop
        return self.out / "crops" / variant.crop.replace(":", "-")
