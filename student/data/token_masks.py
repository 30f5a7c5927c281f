"""The steps of a view, as one table: each decides which tokens of a trace are input and which are supervised.

A cut decides both. A choice comes after a cut, and keeps some of the supervised tokens. Random draws depend on the trace
id (and on the epoch where a step says so), never on order, batch or seed. A share p of n things is int(p * n) of them, but
at least one. Tokens of the trace's context spans, such as the results of tools, are input and never supervised, whatever a
step decides. docs/extending.md adds a step.
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
class TokenMasks:
    """What a cut makes of a trace. A token is supervised by its cached row, by itself, or not at all."""

    input: np.ndarray  # bool [L], tokens that are kept; the last of them is only predicted
    by_row: np.ndarray  # bool [L], supervised by the cached row (divergence)
    by_token: np.ndarray  # bool [L], supervised by the sampled token alone (cross-entropy)


class Share(float):
    """A number above 0 and at most 1. Its text reads back as the same number."""

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
        """The share drawn by u, which is uniform in [0, 1)."""
        if self.uniform:
            return self.shares[0] + u * (self.shares[1] - self.shares[0])
        return self.shares[int(u * len(self.shares))]


# Cuts: (trace, epoch, argument) -> TokenMasks.


def full(trace: Trace, epoch: int = 0, argument: None = None) -> TokenMasks:
    """Every token is input, every cached row is supervised. The first token of a trace has no prediction."""
    token_L = np.arange(len(trace.token_ids))
    by_row = (token_L >= max(1, trace.row_start)) & (token_L < trace.row_start + len(trace.rows))
    return TokenMasks(np.ones_like(by_row), by_row, np.zeros_like(by_row))


def lsp(trace: Trace, epoch: int, p: Share) -> TokenMasks:
    """The first p of all tokens: prompt, reasoning and answer together. The rest is not input."""
    whole = full(trace)
    input_L = np.arange(len(whole.input)) < _count(p, len(whole.input))
    return TokenMasks(input_L, whole.by_row & input_L, whole.by_token)


def reasoning_lsp(trace: Trace, epoch: int, p: Share) -> TokenMasks:
    """The first p of the reasoning, then the closing and the answer.

    Rows before the cut are supervised, the closing delimiter is not. The teacher made the answer's rows from the whole
    reasoning, which the student does not see, so the answer is supervised by its tokens alone. Where nothing is cut this
    is `full`.
    """
    whole, (before_L, input_L) = full(trace), _cut_reasoning(trace, p)
    return whole if input_L.all() else TokenMasks(input_L, whole.by_row & before_L, _answer(trace))


def trsd(trace: Trace, epoch: int, spread: Spread) -> TokenMasks:
    """The first r of the reasoning, then the closing and the answer. Only the answer's rows are supervised.

    The student learns to answer after less reasoning as the teacher answered after all of it. This view and
    `trsd_anchored` are the only ones whose rows were made from more context than the student sees. r is drawn from
    `spread` by trace id and epoch.
    """
    whole, (_, input_L) = full(trace), _cut_reasoning(trace, _drawn_share(trace, epoch, spread))
    return TokenMasks(input_L, whole.by_row & _answer(trace), whole.by_token)


def trsd_anchored(trace: Trace, epoch: int, spread: Spread) -> TokenMasks:
    """Like `trsd`, with the rows before the cut supervised too, so that the student does not unlearn its reasoning.

    The closing delimiter is not supervised where something is cut: the teacher did not stop there. Where nothing is cut
    this is `full`.
    """
    whole, (before_L, input_L) = full(trace), _cut_reasoning(trace, _drawn_share(trace, epoch, spread))
    supervised_L = before_L | _answer(trace)
    return whole if input_L.all() else TokenMasks(input_L, whole.by_row & supervised_L, whole.by_token)


def crop(trace: Trace, epoch: int, p: Share) -> TokenMasks:
    """The whole trace, of a cache whose traces are crops already (`logitcache score --crop`)."""
    return full(trace)


def _drawn_share(trace: Trace, epoch: int, spread: Spread) -> float:
    return spread.at(float(_draws(1, "trsd", trace.trace_id, str(epoch))[0] >> np.uint64(11)) / 2**53)


def _cut_reasoning(trace: Trace, p: float) -> tuple[np.ndarray, np.ndarray]:
    """bool [L] twice: tokens before the end of the reasoning's first p; the same with everything after the reasoning."""
    span, token_L = trace.sections.reasoning, np.arange(len(trace.token_ids))
    before_L = token_L < span.start + _count(p, span.stop - span.start)
    return before_L, before_L | (token_L >= span.stop)


def _answer(trace: Trace) -> np.ndarray:
    """bool [L]"""
    return np.arange(len(trace.token_ids)) >= trace.sections.answer_start


# Choices: (trace, supervised bool [L], argument) -> bool [L], the supervised tokens that are kept.


def both_ends(trace: Trace, supervised_L: np.ndarray, p: Share) -> np.ndarray:
    """The first and the last p/2 of the supervised tokens, counted over all sections; the first half gets an odd one."""
    index = supervised_L.nonzero()[0]
    kept = _count(p, len(index))
    chosen = np.zeros_like(supervised_L)
    chosen[index[: (kept + 1) // 2]] = True
    chosen[index[len(index) - kept // 2 :]] = True
    return chosen


def random_mask(trace: Trace, supervised_L: np.ndarray, r: Share) -> np.ndarray:
    """A random share r of the supervised tokens, over all sections. A larger share contains what a smaller one draws."""
    return _drawn(supervised_L, _count(r, int(supervised_L.sum())), "random-mask", trace.trace_id)


def token_matched(trace: Trace, supervised_L: np.ndarray, argument: None = None) -> np.ndarray:
    """Equally many supervised tokens of each section: as many as the smallest section has; empty ones do not count.

    Delimiters count as reasoning. Every section of the trace counts, whether it is chosen or not, so sections reasoning and
    sections answer supervise equally many tokens.
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
    """uint64 [n], uniform; the same on every machine and with every version of numpy."""
    return np.frombuffer(hashlib.shake_128("\0".join(key).encode()).digest(8 * n), "<u8")


def _drawn(supervised_L: np.ndarray, count: int, *key: str) -> np.ndarray:
    """bool [L], `count` of the supervised tokens: those with the lowest draws."""
    index = supervised_L.nonzero()[0]
    chosen = np.zeros_like(supervised_L)
    chosen[index[np.argsort(_draws(len(supervised_L), *key)[index], kind="stable")[:count]]] = True
    return chosen


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of the table: a step that cuts or that chooses. `example` is a valid text of it."""

    name: str
    takes: type[Share] | type[Spread] | None
    example: str
    help: str
    cut: Callable[[Trace, int, Any], TokenMasks] | None = None
    choose: Callable[[Trace, np.ndarray, Any], np.ndarray] | None = None

    @property
    def usage(self) -> str:
        return f"{self.name}:{self.takes.label}" if self.takes else self.name


_TABLE = (
    Step("full", None, "full", "all tokens and every cached row", full),
    Step("lsp", Share, "lsp:0.5", "the first P of all tokens", lsp),
    Step("reasoning-lsp", Share, "reasoning-lsp:0.5", "the reasoning's first P, then the answer by CE", reasoning_lsp),
    Step("trsd", Spread, "trsd:0.1-0.9", "the answer's rows, after the first part of the reasoning", trsd),
    Step("trsd-anchored", Spread, "trsd-anchored:0.1-0.9", "the same, with the rows of that part", trsd_anchored),
    Step("left", Share, "left:0.5", "a cache made with `score --crop left:P`", crop),
    Step("middle", Share, "middle:0.5", "a cache made with `score --crop middle:P`", crop),
    Step("right", Share, "right:0.5", "a cache made with `score --crop right:P`", crop),
    Step("both-ends", Share, "both-ends:0.5", "the first and the last P/2 of the rows", None, both_ends),
    Step("random-mask", Share, "random-mask:0.5", "a random share P of the rows, the same in every epoch", None, random_mask),
    Step("token-matched", None, "token-matched", "as many rows of each section as the smallest section has", None, token_matched),
)  # fmt: skip
STEPS = {step.name: step for step in _TABLE}


def view_table() -> list[str]:
    """The steps of a view with what they do, a line each: the table of `logitcache train --help`."""
    return [f"{step.usage:<20}{step.help}" for step in STEPS.values()]
