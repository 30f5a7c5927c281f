"""What one call of `logitcache eval --prompts` is given."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.inference.model import ModelSpec
from logitcache.runtime.options import Option
from logitcache.sections import Markers

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
class AccuracyOptions:
    """Options of `measure`, which are those of ``logitcache eval --prompts``."""

    prompts: Annotated[
        str,
        Option(
            "Questions with a gold `answer`, as .jsonl, .parquet or gym:NAME. The student answers them with vLLM, which "
            "needs a whole model: merge a LoRA adapter into its base first.",
            group="Answers to prompts",
        ),
    ]
    student: Annotated[str, Option("A finished run, a model folder or a hub id.")]
    out: Annotated[
        Path,
        Option("Directory for the answers: new, or one to resume.", group="Answers to prompts"),
    ]
    budgets: Annotated[
        tuple[str, ...],
        Option(
            "Reasoning budgets to measure, comma-separated: tokens (128), shares of the student's own reasoning (50%), or "
            "none for no limit. At a budget the reasoning is cut and closed, and the student must answer.",
            group="Answers to prompts",
        ),
    ] = DEFAULT_BUDGETS
    verifier: Annotated[str, Option("How to grade an answer: math, exact or gym.", group="Answers to prompts")] = (
        "exact"
    )
    limit: Annotated[int | None, Option("Use only the first N prompts.", group="Answers to prompts", default="all")] = (
        None
    )
    samples: Annotated[int, Option("Completions per prompt.", group="Sampling")] = 1
    temperature: Annotated[float, Option("Sampling temperature; 0 is greedy decoding.", group="Sampling")] = 0.0
    max_tokens: Annotated[int, Option("Maximum tokens of a completion.", group="Sampling")] = 2048
    answer_tokens: Annotated[
        int, Option("Maximum tokens of an answer after its reasoning was cut.", group="Sampling")
    ] = 256
    seed: Annotated[int, Option("Seed of the engine's sampler.", group="Sampling")] = 0
    sampling: Annotated[
        dict[str, Any],
        Option("Any other vLLM sampling parameter, such as top_p=0.95. Repeatable.", group="Sampling"),
    ] = field(default_factory=dict)
    reasoning_markers: Annotated[
        Markers | None,
        Option(
            "OPENING,CLOSING markers of the reasoning, or 'none'.",
            group="Sections",
            default="detected from the tokenizer or chat template",
        ),
    ] = None
    answer_regex: Annotated[
        str | None,
        Option("For completions without markers: the answer begins at this pattern's first match.", group="Sections"),
    ] = None
    dtype: Annotated[str, Option("auto, bfloat16, float16 or float32.", group="Engine")] = "auto"
    tensor_parallel_size: Annotated[int, Option("Number of GPUs to split the model over.", group="Engine")] = 1
    engine_args: Annotated[
        dict[str, Any],
        Option(
            "Any other vLLM engine argument, such as max_model_len=32768. Repeatable.",
            group="Engine",
            flag="--engine-arg",
        ),
    ] = field(default_factory=dict)
    template_args: Annotated[
        dict[str, Any],
        Option(
            "Argument for the chat template, such as enable_thinking=true. Repeatable.",
            group="Engine",
            flag="--template-arg",
        ),
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
        return ModelSpec(
            self.student,
            option="student",
            dtype=self.dtype,
            top_k=1,  # the smallest value the engine takes; rows are not used here
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed,
            tensor_parallel_size=self.tensor_parallel_size,
            sampling=self.sampling,
            engine_args=self.engine_args,
            template_args=self.template_args,
        )
