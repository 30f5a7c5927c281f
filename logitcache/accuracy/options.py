"""Options of `logitcache eval --prompts`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.grading.verdicts import Grading
from logitcache.inference.model import SAMPLING, ModelOptions, ModelSpec, Sampling
from logitcache.prompts import Columns
from logitcache.runtime.options import Option, values_of
from logitcache.sections import AnswerRegex, Markers, ReasoningMarkers

_ANSWERS = "Answers to prompts"  # a group of options
DEFAULT_BUDGETS = ("0", "25%", "50%", "75%", "100%", "none")


@dataclass(frozen=True, slots=True)
class Budget:
    """How much reasoning the model may use: a number of tokens, a share of its own reasoning, or (neither) all of it."""

    tokens: int | None = None
    percent: float | None = None

    def __str__(self) -> str:
        if self.percent is not None:
            return f"{self.percent:g}%"
        return "none" if self.tokens is None else str(self.tokens)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """``none``, ``128`` or ``12.5%``. Raises: InputError for anything else."""
        text = text.strip()
        if text == "none":
            return cls()
        if text.isdecimal():
            return cls(tokens=int(text))
        if re.fullmatch(r"\d+(\.\d+)?%", text) and float(text[:-1]) <= 100:
            return cls(percent=float(text[:-1]))
        raise InputError(f"`budgets` {text!r}: give a number of tokens such as 128, a share such as 50%, or none")

    def cut(self, length: int) -> int | None:
        """Tokens to keep of a reasoning of ``length`` tokens; None: do not cut it."""
        if self.percent is not None:
            return int(self.percent / 100 * length + 1e-9)  # 29% of 100 is 29, and 0.29 * 100 is 28.999...
        return None if self.tokens is None else min(self.tokens, length)


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(ModelOptions, Sampling):
    """Options of `measure`, which are those of ``logitcache eval --prompts``."""

    prompts: Annotated[
        str,
        Option(
            "Questions with a gold `answer`, from a source as PROMPTS of generate. The student answers them with vLLM, which "
            "needs a whole model: merge a LoRA adapter into its base first.",
        ),
    ]
    student: Annotated[str, Option("A finished run, a model folder or a hub id.")]
    out: Annotated[Path, Option("With --prompts: directory for the answers, new or one to resume.")]
    budgets: Annotated[
        tuple[str, ...],
        Option(
            "Reasoning budgets to measure, comma-separated: tokens (128), shares of the student's own reasoning (50%), or "
            "none for no limit. At a budget the reasoning is cut and closed, and the student must answer.",
            _ANSWERS,
        ),
    ] = DEFAULT_BUDGETS
    verifier: Grading = "exact"
    limit: Annotated[int | None, Option("Use only the first N prompts.", _ANSWERS, default="all")] = None
    columns: Columns = field(default_factory=dict)
    samples: Annotated[int, Option("Completions per prompt.", SAMPLING)] = 1
    temperature: Annotated[float, Option("Sampling temperature; 0 is greedy decoding.", SAMPLING)] = 0.0
    max_tokens: Annotated[int, Option("Longest completion, in tokens.", SAMPLING)] = 2048
    answer_tokens: Annotated[int, Option("Longest answer after a reasoning that was cut, in tokens.", SAMPLING)] = 256
    reasoning_markers: ReasoningMarkers = None
    answer_regex: AnswerRegex = None

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        object.__setattr__(self, "out", Path(self.out))
        for name in ("samples", "answer_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` {value}: give at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise InputError(
                f"`samples` {self.samples}: at `temperature` 0 all samples of a prompt are the same; give 1 sample, or a "
                "higher temperature"
            )
        if not self.budgets:
            raise InputError("`budgets` is empty: give some, such as 0,50%,none")
        _ = self.spec, self.parsed  # both refuse bad values
        Markers(answer_regex=self.answer_regex)
        verdicts.check(self.verifier)

    @property
    def parsed(self) -> list[Budget]:
        """The budgets in the given order, without duplicates."""
        return list(dict.fromkeys(map(Budget.parse, self.budgets)))

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(model=self.student, option="student", **values_of(ModelOptions, self))

    @property
    def drawn(self) -> Sampling:
        """How answers are sampled."""
        return Sampling(**values_of(Sampling, self))
