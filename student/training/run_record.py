"""What run.json and a checkpoint's spent.json contain. Imports no torch, so that commands can read them quickly."""

from dataclasses import dataclass, field
from typing import Any, Self

from logitcache.student.model.measures import Evaluation


@dataclass(frozen=True, slots=True)
class Counts:
    """What training has processed so far, over all ranks."""

    input_tokens: int = 0  # without padding
    supervised_tokens: int = 0
    flops: int = 0

    def __add__(self, other: Self) -> "Counts":
        return Counts(
            self.input_tokens + other.input_tokens,
            self.supervised_tokens + other.supervised_tokens,
            self.flops + other.flops,
        )

    def to_json(self) -> dict[str, int]:
        return {"tokens_fed": self.input_tokens, "tokens_taught": self.supervised_tokens, "flops": self.flops}


@dataclass(frozen=True, slots=True)
class Spent:
    """What training has cost so far: counts of all ranks, seconds and peak memory of the first."""

    counts: Counts
    seconds: dict[str, float]  # by part of a step: timers.PARTS
    peak_memory: int | None  # bytes; None where it is not known

    @property
    def total_seconds(self) -> float:
        """Spent in steps, not in evaluations and checkpoints."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        counts, seconds = self.counts, self.total_seconds
        return {
            "tokens_fed": counts.input_tokens,
            "tokens_taught": counts.supervised_tokens,
            "seconds": seconds,
            "tokens_per_second": counts.input_tokens / max(seconds, 1e-9),
            "cost": {"flops": counts.flops, "seconds": self.seconds, "peak_memory": self.peak_memory},
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Spent":
        cost = found["cost"]
        counts = Counts(found["tokens_fed"], found["tokens_taught"], cost["flops"])
        return cls(counts, {part: float(seconds) for part, seconds in cost["seconds"].items()}, cost["peak_memory"])


_SPENT = ("tokens_fed", "tokens_taught", "seconds", "tokens_per_second", "cost")
_OWN = {"status", "signal", "again", "eval_before", "eval_after", "history", "steps", "versions", *_SPENT}


OLDER: dict[str, Any] = {"shuffle": "full"}  # settings that runs of older versions had without recording them


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """run.json: what a run was set to and what it has found. None: not known yet."""

    status: str  # running, stopped or finished
    settings: dict[str, Any]  # all that decides the run's weights, as `run_settings` names it
    eval_before: Evaluation | None = None
    versions: dict[str, str] = field(default_factory=dict)
    spent: Spent | None = None
    steps: int | None = None
    eval_after: Evaluation | None = None
    history: list[dict[str, Any]] | None = None  # Trainer's log
    signal: str | None = None  # that stopped it
    again: bool = False  # whether it was finished before this call

    def to_json(self) -> dict[str, Any]:
        """The contents of run.json; fields that are not known yet are omitted."""
        found: dict[str, Any] = {"status": self.status, **self.settings}
        found |= {"eval_before": self.eval_before and self.eval_before.to_json(), "versions": self.versions}
        found |= self.spent.to_json() if self.spent else {}
        later = {
            "steps": self.steps,
            "eval_after": self.eval_after and self.eval_after.to_json(),
            "history": self.history,
        }
        later |= {"signal": self.signal, "again": self.again or None}
        return found | {name: value for name, value in later.items() if value is not None}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "RunRecord":
        before, after = (
            Evaluation.from_json(e) if (e := found.get(n)) else None for n in ("eval_before", "eval_after")
        )
        return cls(
            status=found["status"],
            settings={name: value for name, value in found.items() if name not in _OWN},
            eval_before=before,
            versions=found.get("versions", {}),
            spent=Spent.from_json(found) if "cost" in found else None,
            steps=found.get("steps"),
            eval_after=after,
            history=found.get("history"),
            signal=found.get("signal"),
            again=found.get("again", False),
        )
