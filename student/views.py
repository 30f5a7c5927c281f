"""Views: a pure function from a trace to what a student is fed and which cached rows it is taught.

The student's output at input position t predicts token t + 1, so in an uncut trace row r, the teacher's distribution of
token ``row_start + r``, is taught at position ``row_start + r - 1``. Sections choose among the rows by the token they
belong to. Both delimiters belong to the reasoning: the one opens it, the other ends it, and a student taught reasoning
must do both.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from logitcache.errors import StudentError
from logitcache.schema import Trace

# T input positions of a lesson, L tokens of its trace, R rows.

SECTIONS = {"prompt": ("prompt",), "reasoning": ("opening", "reasoning", "closing"), "answer": ("answer",)}
NOT_TAUGHT = -1


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """What a student sees of one trace. Nothing after the last taught position is fed: it could change no taught row.

    input_ids: int64 [T]; row: int64 [T], the cached row taught at each position, or NOT_TAUGHT;
    kd, ce: float32 [T], weights of the divergence and of the cross-entropy with the realised token, 0 where nothing is
    taught.
    """

    input_ids: np.ndarray
    row: np.ndarray
    kd: np.ndarray
    ce: np.ndarray


def full(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Every token but the last is fed, every cached row is taught: input_ids [L-1] and rows [L-1]."""
    row_T = np.arange(1, len(trace.token_ids)) - trace.row_start
    row_T[(row_T < 0) | (row_T >= len(trace.rows))] = NOT_TAUGHT
    return trace.token_ids[:-1], row_T


VIEWS: dict[str, Callable[[Trace], tuple[np.ndarray, np.ndarray]]] = {"full": full}


@dataclass(frozen=True)
class View:
    """A registered view by its name, taught on some sections only. Equal views give equal lessons.

    Raises: StudentError for a name or a section that does not exist, with the nearest one.
    """

    name: str = "full"
    sections: tuple[str, ...] = tuple(SECTIONS)

    def __post_init__(self) -> None:
        _known("view", [self.name], VIEWS)
        _known("section", self.sections, SECTIONS)
        if not self.sections:
            raise StudentError(f"no section is left to teach: choose some of {', '.join(SECTIONS)}")

    def __call__(self, trace: Trace) -> Lesson:
        input_ids, row_T = VIEWS[self.name](trace)
        row_T = np.where(
            np.isin(section_of(trace, row_T), [list(SECTIONS).index(s) for s in self.sections]), row_T, NOT_TAUGHT
        )
        taught_T = row_T != NOT_TAUGHT
        fed = int(taught_T.nonzero()[0][-1]) + 1 if taught_T.any() else 0
        kd_T = taught_T[:fed].astype(np.float32)
        return Lesson(input_ids[:fed].astype(np.int64), row_T[:fed], kd_T, np.zeros_like(kd_T))


def section_of(trace: Trace, row_N: np.ndarray) -> np.ndarray:
    """int64 [N], the section that each row teaches, as an index into SECTIONS; NOT_TAUGHT stays."""
    section_L = np.empty(len(trace.token_ids) + 1, np.int64)
    for i, spans in enumerate(SECTIONS.values()):
        for span in spans:
            section_L[trace.sections.span(span)] = i
    section_L[-1] = NOT_TAUGHT
    return section_L[np.where(row_N == NOT_TAUGHT, -1, row_N + trace.row_start)]


def _known(kind: str, names: Iterable[str], good: Iterable[str]) -> None:
    for name in names:
        if name not in good:
            near = difflib.get_close_matches(name, good, n=1, cutoff=0.0)
            raise StudentError(f"{kind} {name!r} is unknown: did you mean {near[0]!r}? All: {', '.join(good)}")
