"""What one call of `logitcache eval --prompts` is given."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.inference.model import ModelSpec
from logitcache.sections import Markers

DEFAULT = ("0", "25%", "50%", "75%", "100%", "none")


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a reasoning is kept: so many tokens, a share of its own length, or, with neither, the natural whole."""

    tokens: int | None = None
    percent: float | None = None

    def __str__(self) -> str:
        if self.percent is not None:
            return f"{self.percent:g}%"
        return "none" if self.tokens is None else str(self.tokens)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """``none``, ``128`` or ``12.5%``."""
        text = text.strip()
        if text == "none":
            return cls()
        if text.isdecimal():
            return cls(tokens=int(text))
        if re.fullmatch(r"\d+(\.\d+)?%", text) and float(text[:-1]) <= 100:
            return cls(percent=float(text[:-1]))
        raise InputError(f"`budgets` {text!r}: write tokens such as 128, a share such as 50%, or none")

    def cut(self, length: int) -> int | None:
        """Tokens that are kept of a reasoning of ``length`` tokens; None where it is left to end by itself."""
        if self.percent is not None:
            return int(self.percent / 100 * length + 1e-9)  # 29% of 100 are 29
        return None if self.tokens is None else min(self.tokens, length)


@dataclass(frozen=True)
class AccuracyOptions:
    """One call of ``logitcache eval --budgets``."""

    prompts: str  # a source as `logitcache.prompts.load` reads it, with gold answers
    model: str  # a model folder, such as a finished run, or a hub id
    out: Path
    budgets: tuple[str, ...] = DEFAULT
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 2048  # of a natural completion
    answer_tokens: int = 256  # after a forced closing
    verifier: str = "exact"  # one of verdicts.KINDS
    limit: int | None = None
    seed: int = 0
    markers: Markers | None = None  # None: found in the tokenizer or the chat template
    answer_regex: str | None = None  # for completions without markers
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)
    template_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.answer_tokens < 1 or (self.limit is not None and self.limit < 1):
            raise InputError("`samples`, `answer_tokens` and `limit` must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise InputError(
                f"`samples` {self.samples} at `temperature` 0 are {self.samples} times the same; set one of the two"
            )
        if not self.budgets:
            raise InputError("`budgets` is empty; give some, such as 0,50%,none")
        _ = self.spec, self.parsed  # refuse what they refuse
        Markers(answer_regex=self.answer_regex)
        verdicts.check(self.verifier)

    @property
    def parsed(self) -> list[Budget]:
        """The budgets, each once, in their order."""
        return list(dict.fromkeys(map(Budget.parse, self.budgets)))

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            self.model,
            option="student",
            dtype=self.dtype,
            top_k=1,  # the engine hands out rows, and nobody reads them here
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed,
            tensor_parallel_size=self.tensor_parallel_size,
            sampling=self.sampling,
            engine_args=self.engine_args,
            template_args=self.template_args,
        )
