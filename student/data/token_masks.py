"""The steps of a view: which tokens of a trace are fed, and which of them are taught. Small pure functions, one table.

A cut says both, and a choice takes from what is taught. What is drawn is drawn from the trace id: it depends on no order,
no batch and no seed. A share of n things is int(share * n) of them, but at least one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from logitcache.sections import SECTIONS

if TYPE_CHECKING:
    from logitcache.trace import Trace

# L tokens of a trace.


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a cut makes of a trace: bool [L] each, said of its tokens.

    fed: those that stay, the last of them as a target only; by_row: taught by their cached rows; by_token: taught by
    cross-entropy with the token alone.
    """

    fed: np.ndarray
    by_row: np.ndarray
    by_token: np.ndarray


class Share(float):
    """A number above 0 and at most 1; its text reads back as the same number."""

    label = "P"
    wants = "a share P, 0 < P <= 1"

    @classmethod
    def parse(cls, text: str) -> Share:
        """Raises: ValueError for anything else."""
        if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", text) or not 0 < float(text) <= 1:
            raise ValueError(text)
        return cls(text)

    def __str__(self) -> str:
        return np.format_float_positional(self, trim="-")


@dataclass(frozen=True, slots=True)
class Spread:
    """Shares to draw from: ``0.5``, one of ``0.25,0.5,1``, or uniformly from ``0.1-0.9``."""

    label, wants = (
        "DIST",
        "shares above 0 and at most 1: one as in 0.5, some to draw from as in 0.25,0.5,1 or a range as in 0.1-0.9",
    )

    shares: tuple[Share, ...]
    uniform: bool = False

    @classmethod
    def parse(cls, text: str) -> Spread:
        """Raises: ValueError for anything else."""
        shares = tuple(map(Share.parse, text.split("-" if (uniform := "-" in text) else ",")))
        if uniform and (len(shares) != 2 or shares[0] >= shares[1]):
            raise ValueError(text)
        return cls(shares, uniform)

    def __str__(self) -> str:
        return ("-" if self.uniform else ",").join(map(str, self.shares))

    def at(self, u: float) -> float:
        """The share that u, uniform in [0, 1), draws."""
        if self.uniform:
            return self.shares[0] + u * (self.shares[1] - self.shares[0])
        return self.shares[int(u * len(self.shares))]


# Cuts: (trace, epoch, argument) -> Plan.


def full(trace: Trace, epoch: int = 0, argument: None = None) -> Plan:
    """Every token is fed, every cached row is taught, but for a first token, which nothing predicts."""
    token_L = np.arange(len(trace.token_ids))
    by_row = (token_L >= max(1, trace.row_start)) & (token_L < trace.row_start + len(trace.rows))
    return Plan(np.ones_like(by_row), by_row, np.zeros_like(by_row))


def lsp(trace: Trace, epoch: int, p: Share) -> Plan:
    """The first p of prompt, reasoning and answer together (lead-span); the rest is not fed at all."""
    whole = full(trace)
    fed = np.arange(len(whole.fed)) < _count(p, len(whole.fed))
    return Plan(fed, whole.by_row & fed, whole.by_token)


def reasoning_lsp(trace: Trace, epoch: int, p: Share) -> Plan:
    """The first p of the reasoning, then the closing and the answer.

    Rows up to the cut are taught. The closing is not; the answer's rows were made with the whole reasoning in sight, so
    the answer is taught by its tokens alone. Where nothing is cut this is `full`.
    """
    whole, (before_L, fed_L) = full(trace), _cut_reasoning(trace, p)
    return whole if fed_L.all() else Plan(fed_L, whole.by_row & before_L, _answer(trace))


def trsd(trace: Trace, epoch: int, spread: Spread) -> Plan:
    """The first r of the reasoning, then the closing and the answer; taught are the answer's rows, and no others.

    The student learns to say with less reasoning what the teacher said after all of it: with `trsd_anchored` the only view
    whose rows were made with more context than it feeds. r is drawn from `spread` by trace id and epoch.
    """
    whole, (_, fed_L) = full(trace), _cut_reasoning(trace, _drawn_share(trace, epoch, spread))
    return Plan(fed_L, whole.by_row & _answer(trace), whole.by_token)


def trsd_anchored(trace: Trace, epoch: int, spread: Spread) -> Plan:
    """As `trsd`, and the rows up to the cut are taught too: they hold the student to its reasoning while it learns.

    The closing is not taught where something is cut, since the teacher did not end there. Where nothing is cut this is `full`.
    """
    whole, (before_L, fed_L) = full(trace), _cut_reasoning(trace, _drawn_share(trace, epoch, spread))
    supervised_L = before_L | _answer(trace)
    return whole if fed_L.all() else Plan(fed_L, whole.by_row & supervised_L, whole.by_token)


def crop(trace: Trace, epoch: int, p: Share) -> Plan:
    """All of a trace that was cropped already, when the teacher read it."""
    return full(trace)


def _drawn_share(trace: Trace, epoch: int, spread: Spread) -> float:
    return spread.at(float(_draws(1, "trsd", trace.trace_id, str(epoch))[0] >> np.uint64(11)) / 2**53)


def _cut_reasoning(trace: Trace, p: float) -> tuple[np.ndarray, np.ndarray]:
    """bool [L] twice: the tokens before a cut that keeps the reasoning's first p, and those with all after the reasoning."""
    span, token_L = trace.sections.reasoning, np.arange(len(trace.token_ids))
    before_L = token_L < span.start + _count(p, span.stop - span.start)
    return before_L, before_L | (token_L >= span.stop)


def _answer(trace: Trace) -> np.ndarray:
    """bool [L]"""
    return np.arange(len(trace.token_ids)) >= trace.sections.answer_start


# Choices: (trace, taught bool [L], argument) -> bool [L], those of the taught tokens that still are.


def both_ends(trace: Trace, supervised_L: np.ndarray, p: Share) -> np.ndarray:
    """The first and the last p/2 of what is taught, of all sections together; an odd one goes to the first."""
    index = supervised_L.nonzero()[0]
    kept = _count(p, len(index))
    chosen = np.zeros_like(supervised_L)
    chosen[index[: (kept + 1) // 2]] = True
    chosen[index[len(index) - kept // 2 :]] = True
    return chosen


def random_mask(trace: Trace, supervised_L: np.ndarray, r: Share) -> np.ndarray:
    """A share r of what is taught, of all sections together; what a smaller share draws, a larger one draws too."""
    return _drawn(supervised_L, _count(r, int(supervised_L.sum())), "random-mask", trace.trace_id)


def token_matched(trace: Trace, supervised_L: np.ndarray, argument: None = None) -> np.ndarray:
    """As many of each section's taught tokens as the section with the fewest has; one with none does not count.

    Delimiters count as reasoning, and every section of the trace counts, whether or not it is chosen: so
    ``--sections reasoning`` and ``--sections answer`` teach equally many tokens.
    """
    section_L = sections_of(trace)
    parts = [supervised_L & (section_L == i) for i in range(len(SECTIONS))]
    least = min((int(part.sum()) for part in parts if part.any()), default=0)
    return np.logical_or.reduce([_drawn(part, least, "token-matched", trace.trace_id) for part in parts])


def sections_of(trace: Trace) -> np.ndarray:
    """int64 [L], each token's section as an index into SECTIONS."""
    section_L = np.empty(len(trace.token_ids), np.int64)
    for i, spans in enumerate(SECTIONS.values()):
        for span in spans:
            section_L[trace.sections.span(span)] = i
    return section_L


def _count(p: float, n: int) -> int:
    return min(n, max(1, int(p * n + 1e-9)))  # 0.29 of 100 are 29


def _draws(n: int, *key: str) -> np.ndarray:
    """uint64 [n], uniform, the same on every machine and with every version of numpy."""
    return np.frombuffer(hashlib.shake_128("\0".join(key).encode()).digest(8 * n), "<u8")


def _drawn(supervised_L: np.ndarray, count: int, *key: str) -> np.ndarray:
    """bool [L], `count` of the taught tokens: those with the lowest draws."""
    index = supervised_L.nonzero()[0]
    chosen = np.zeros_like(supervised_L)
    chosen[index[np.argsort(_draws(len(supervised_L), *key)[index], kind="stable")[:count]]] = True
    return chosen


@dataclass(frozen=True, slots=True)
class Step:
    """A line of the table; it cuts or it chooses. `example` is one that works."""

    name: str
    takes: type[Share] | type[Spread] | None
    example: str
    help: str
    cut: Callable[[Trace, int, Any], Plan] | None = None
    choose: Callable[[Trace, np.ndarray, Any], np.ndarray] | None = None

    @property
    def usage(self) -> str:
        return f"{self.name}:{self.takes.label}" if self.takes else self.name


_TABLE = (
    Step("full", None, "full", "all tokens, every cached row", full),
    Step("lsp", Share, "lsp:0.5", "the first P of all tokens", lsp),
    Step("reasoning-lsp", Share, "reasoning-lsp:0.5", "the first P of the reasoning; then the answer, by CE", reasoning_lsp),
    Step("trsd", Spread, "trsd:0.1-0.9", "the answer's rows after the reasoning's first part", trsd),
    Step("trsd-anchored", Spread, "trsd-anchored:0.1-0.9", "the same, and the rows of that part", trsd_anchored),
    Step("left", Share, "left:0.5", "all of a cache of `score --crop left:P`", crop),
    Step("middle", Share, "middle:0.5", "all of a cache of `score --crop middle:P`", crop),
    Step("right", Share, "right:0.5", "all of a cache of `score --crop right:P`", crop),
    Step("both-ends", Share, "both-ends:0.5", "the first and the last P/2 of the rows", None, both_ends),
    Step("random-mask", Share, "random-mask:0.5", "P of the rows, the same in every epoch", None, random_mask),
    Step("token-matched", None, "token-matched", "as many rows of each section as its smallest has", None, token_matched),
)  # fmt: skip
STEPS = {step.name: step for step in _TABLE}


def view_table() -> list[str]:
    """The steps of a view with what they do, a line each: the table of `logitcache train --help`."""
    return [f"{step.usage:<20}{step.help}" for step in STEPS.values()]
