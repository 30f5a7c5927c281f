"""Options of `logitcache experiment`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from logitcache.accuracy.options import DEFAULT_BUDGETS
from logitcache.grading.verdicts import Grading
from logitcache.runtime.options import Option
from logitcache.storage.location import Location, locate
from logitcache.student.experiments.catalog import BEFORE, EXPERIMENTS, Variant

# Options of every run and of its answers, declared by the commands that an experiment calls.
OF_TRAINING = (
    "where",
    "held_out",
    "epochs",
    "max_steps",
    "learning_rate",
    "tokens_per_batch",
    "shuffle",
    "dtype",
    "set",
)
OF_ANSWERS = ("columns", "samples", "temperature", "max_tokens", "answer_tokens", "reasoning_markers", "engine_args")
_ANSWERS = "Answers to prompts"  # a group of options


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """One call of ``logitcache experiment``."""

    name: Annotated[str, Option(f"The experiment: {', '.join(EXPERIMENTS)}.", positional=True)]
    cache: Annotated[
        str | Location, Option("Cache that all variants learn from: a directory or a URL.", metavar="PATH|URL")
    ]
    student: Annotated[str, Option("Model that every run starts from: a folder or hub id.")]
    out: Annotated[Path, Option("Directory of the experiment: a new one, or one to resume.")]
    seeds: Annotated[int, Option("Runs of each variant.")] = 3
    points: Annotated[
        tuple[float, ...] | None,
        Option(
            "Shares of the tokens for lsp and first-derivation, such as 0.25,0.5,1.", default="each experiment's own"
        ),
    ] = None
    teacher: Annotated[str | None, Option("For halves: the model that scores the crops.")] = None
    prompts: Annotated[
        str | None, Option("Questions with a gold `answer`, which every run answers through vLLM.", _ANSWERS)
    ] = None
    verifier: Grading = "exact"
    budgets: Annotated[tuple[str, ...], Option("Reasoning budgets to measure, as in `logitcache eval`.", _ANSWERS)] = (
        DEFAULT_BUDGETS
    )
    by: Annotated[str, Option("Report accuracy by this column of the prompts too, where they have it.", _ANSWERS)] = (
        "family"
    )
    shared: dict[str, Any] = field(default_factory=dict)  # fields of TrainOptions, the same for every variant
    # Further fields of AccuracyOptions, such as samples and engine_args.
    answers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", locate(self.cache))  # a script may give text
        object.__setattr__(self, "out", Path(self.out))

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
