"""Results of an evaluation as records. Imports no torch: commands read run.json with them."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TailMass:
    """Mean probability mass outside the teacher's ids; None where there is no row."""

    teacher: float | None
    student: float | None


@dataclass(frozen=True, slots=True)
class Measures:
    """Means over some of the teacher's rows. A mean of nothing is None."""

    kl: float | None  # forward KL with one bucket for the tail, nats per row
    top1: float | None  # share of rows whose best id is the teacher's
    rows: int
    ce: float | None  # cross-entropy with the sampled tokens, nats per token
    ece: float | None  # expected calibration error against the teacher
    tail: TailMass


@dataclass(frozen=True, slots=True)
class Evaluation(Measures):
    """Means over all rows, over those of each section, and over those of each tenth of the completion."""

    sections: dict[str, Measures]
    positions: list[Measures]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Evaluation":
        sections = {name: _measures(part) for name, part in found["sections"].items()}
        positions = [_measures(part) for part in found["positions"]]
        return cls(**_own(found), sections=sections, positions=positions)


def _own(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("kl", "top1", "rows", "ce", "ece")} | {"tail": TailMass(**found["tail"])}


def _measures(found: dict[str, Any]) -> Measures:
    return Measures(**_own(found))
