"""Options of `logitcache eval CACHE`."""

from dataclasses import dataclass
from typing import Annotated

from logitcache.runtime.options import Option
from logitcache.sections import SECTIONS
from logitcache.storage.location import Location, locate

_GROUP = "Comparison with the teacher"


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of `evaluate_run`, which are those of ``logitcache eval CACHE``.

    The view is full by default, whatever view the student was trained on, so that all students are measured alike.
    """

    cache: Annotated[
        str | Location,
        Option("Cache with the teacher's distributions: a directory or a URL.", metavar="CACHE", positional=True),
    ]
    student: Annotated[str, Option("A run, one of its checkpoints, a model folder, a LoRA adapter or a hub id.")]
    held_out: Annotated[
        float | None,
        Option(
            "Share of the prompts to evaluate on: those that train with this share holds out.",
            group=_GROUP,
            default="the run's, else 0.05",
        ),
    ] = None
    everything: Annotated[
        bool, Option("Evaluate on all traces, not only held-out ones.", group=_GROUP, flag="--all")
    ] = False
    where: Annotated[
        str | None,
        Option("Evaluate only on traces that meet a condition such as 'correct'.", group=_GROUP, default="all"),
    ] = None
    view: Annotated[
        str, Option("View of each trace that the student gets; see `logitcache train --help`.", group=_GROUP)
    ] = "full"
    sections: Annotated[
        tuple[str, ...], Option("Sections to evaluate: any of prompt,reasoning,answer.", group=_GROUP)
    ] = tuple(SECTIONS)
    tokens_per_batch: Annotated[int, Option("Tokens per forward pass.", group=_GROUP)] = 4096
    teacher_tokenizer: Annotated[
        str | None,
        Option(
            "Folder or hub id of the teacher's tokenizer, to compare ids with a student that has another.",
            group=_GROUP,
            default="looked for on this machine",
        ),
    ] = None
    dtype: Annotated[str | None, Option("bf16 or fp32.", group=_GROUP, default="bf16 on CUDA")] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", locate(self.cache))  # a script may give text
