"""Filters: conditions on the plain columns of traces. Rows are not decoded, and nothing is evaluated as code.

    clause { and clause }       clause = [not] NAME [OP VALUE]       OP = one of  = != < <= > >=

    correct                     the verdict is correct; `not correct`: the verdict is incorrect
    tokens, rows, sample_index  numbers: tokens of the trace, its top-k rows, which completion of its prompt it is
    prompt, opening, reasoning, closing, answer     numbers: tokens of that span
    finish_reason, prompt_id, trace_id, gold        text; gold: the prompt's gold answer
    meta.NAME, meta.NAME.NAME   the prompt's other columns, nested objects by dotted names

A trace without a value does not meet a clause on it, negated or not; `NAME=none` and `NAME!=none` test for that.
Quote a value with spaces, and a word such as none that is meant as text.
"""

import difflib
import json
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.compute import call_function

from logitcache.cache.schema import metadata_of
from logitcache.errors import InputError, ShardCorruptError
from logitcache.sections import SPANS

# N traces of a shard.

_OPERATORS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {  # Arrow's name, and Python's function
    "=": ("equal", operator.eq),
    "!=": ("not_equal", operator.ne),
    "<": ("less", operator.lt),
    "<=": ("less_equal", operator.le),
    ">": ("greater", operator.gt),
    ">=": ("greater_equal", operator.ge),
}
LENGTHS = ("tokens", "rows", *SPANS)
_NUMBERS = (*LENGTHS, "sample_index")
_TEXTS = {"finish_reason": "finish_reason", "prompt_id": "prompt_id", "trace_id": "trace_id", "gold": "answer"}
_ALL = ("correct", *_NUMBERS, *_TEXTS, "meta.NAME")
_CLAUSE = re.compile(
    r"""(?:(?P<negated>not)\s+)?(?P<name>[^\s<>=!"']+)"""
    r"""\s*(?:(?P<op><=|>=|!=|==|=|<|>)\s*(?P<value>"[^"]*"|'[^']*'|[^\s<>=!"']+))?(?=\s|\Z)"""
)
_WORDS = {"true": True, "false": False, "none": None}
_NOTHING = object()  # None is a valid value


@dataclass(frozen=True, slots=True)
class Clause:
    """One condition. Without ``op``: the value itself is true."""

    name: str
    op: str | None = None
    value: str | float | bool | None = None  # None: no value
    negated: bool = False

    def __str__(self) -> str:
        return f"{'not ' * self.negated}{self.name}" + (f"{self.op}{_shown(self.value)}" if self.op else "")

    @property
    def path(self) -> str | None:
        """The dotted name in the metadata; None for the name of a column."""
        return self.name.removeprefix("meta.") if self.name.startswith("meta.") else None


@dataclass(frozen=True, slots=True)
class Filter:
    """Clauses that a trace must all meet."""

    clauses: tuple[Clause, ...]

    def __str__(self) -> str:
        return " and ".join(map(str, self.clauses))

    @property
    def needs_verdicts(self) -> bool:
        """Whether only traces with a verdict can meet it."""
        return any(c.name == "correct" and (c.op, c.value) != ("=", None) for c in self.clauses)

    @property
    def _paths(self) -> set[str]:
        return {c.path for c in self.clauses if c.path}

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """Raises: InputError for a syntax error, for an unknown name with the nearest known one, and for a value of the
        wrong type."""
        clauses, place, text = [], 0, text.strip()
        while True:
            match = _CLAUSE.match(text, place)
            if not match or match["name"] in ("and", "not", "or"):
                raise InputError(
                    f"`where` {text!r}: no condition at {text[place:]!r}; write conditions such as correct, not correct, "
                    "finish_reason=stop, tokens<=4096 or meta.level>=3, joined by `and`"
                )
            clauses.append(_clause(text, match))
            rest = text[match.end() :].lstrip()
            if not rest:
                return cls(tuple(clauses))
            if not re.match(r"and(\s|\Z)", rest):
                raise InputError(f"`where` {text!r}: expected `and`, found {rest!r}; quote values with spaces")
            place = len(text) - len(rest[3:].lstrip())

    def keeps(self, batch: pa.RecordBatch) -> np.ndarray:
        """Which traces of a batch with a shard's plain columns meet it: bool [N].

        Raises: InputError for a comparison that the metadata of a trace does not support.
        """
        return self._keeps(batch, _metadata(batch) if self._paths else [])

    def _keeps(self, batch: pa.RecordBatch, metadata: list[dict[str, Any]]) -> np.ndarray:
        kept = np.ones(batch.num_rows, bool)
        for clause in self.clauses:
            found = _on_metadata(clause, metadata) if clause.path else _on_column(clause, batch)
            found = call_function("invert", [found]) if clause.negated else found
            kept &= found.fill_null(False).to_numpy(zero_copy_only=False)
        return kept

    def select(self, batches: Iterable[pa.RecordBatch]) -> list[np.ndarray]:
        """``keeps`` for each batch of a cache.

        Raises: as ``keeps``, and InputError for a metadata name that no trace has, with the nearest known one.
        """
        masks, wanted, there = [], self._paths, set()
        for batch in batches:
            metadata = _metadata(batch) if self._paths else []
            masks.append(self._keeps(batch, metadata))
            for each in metadata if wanted else []:
                wanted = {path for path in wanted if _dig(each, path, _NOTHING) is _NOTHING}
                there |= each.keys()
        if wanted:
            name, good = f"meta.{min(wanted)}", [f"meta.{key}" for key in sorted(there)]
            raise InputError(f"`where` {name}: no trace has it; " + _nearest(name, good, "the prompts have"))
        return masks


def _clause(text: str, match: re.Match[str]) -> Clause:
    name, op, value, negated = match["name"], match["op"], match["value"], bool(match["negated"])
    where = f"`where` {text!r}: {name}"
    if not (name in _ALL[:-1] or re.fullmatch(r"meta\..*[^.]", name)):
        raise InputError(f"{where} is unknown; " + _nearest(name, _ALL, "there are"))
    if op is None:
        if name != "correct" and not name.startswith("meta."):
            raise InputError(f"{where} is not a condition; compare it, as in {name}{_example(name)}")
        return Clause(name, negated=negated)
    op, literal = "=" if op == "==" else op, _literal(value)
    if op in ("=", "!=") and literal is None:
        return Clause(name, op, None, negated)
    if name in _NUMBERS and (isinstance(literal, str | bool) or literal is None):
        raise InputError(f"{where} is a number, {value} is not")
    if name == "correct" and (op not in ("=", "!=") or not isinstance(literal, bool)):
        raise InputError(f"{where} is true, false or none; write correct, not correct or correct=none")
    if name in _TEXTS:
        if op not in ("=", "!="):
            raise InputError(f"{where} is text and has no order; compare it with = or !=")
        literal = _unquoted(value)
    if op not in ("=", "!=") and (isinstance(literal, str | bool) or literal is None):
        raise InputError(f"{where} can only be ordered by numbers, {value} is not one")
    return Clause(name, op, literal, negated)


def _unquoted(value: str) -> str:
    return value[1:-1] if value[0] in "\"'" else value


def _literal(value: str) -> str | float | bool | None:
    if value != _unquoted(value):
        return _unquoted(value)
    if value in _WORDS:
        return _WORDS[value]
    try:
        number = float(value)
    except ValueError:
        return value
    return number if isfinite(number) else value


def _shown(value: str | float | bool | None) -> str:
    """A value as ``parse`` reads it."""
    if isinstance(value, str):
        plain = isinstance(_literal(value or "''"), str) and re.fullmatch(r"""[^\s<>=!"']+""", value)
        return value if plain else f'"{value}"' if '"' not in value else f"'{value}'"
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).lower()


def _nearest(name: str, good: Iterable[str], all_are: str) -> str:
    near = difflib.get_close_matches(name, [g for g in good if g != "meta.NAME"], n=1)
    return f"did you mean {near[0]}?" if near else f"{all_are} {', '.join(good) or 'no metadata'}"


def _example(name: str) -> str:
    return "<=4096" if name in _NUMBERS else "=stop"


def _on_column(clause: Clause, batch: pa.RecordBatch) -> Any:
    """Boolean Arrow array [N], null where there is no value."""
    values = _column(clause.name, batch)
    if clause.op is None:
        return values
    if clause.value is None:
        return values.is_null() if clause.op == "=" else values.is_valid()
    return call_function(_OPERATORS[clause.op][0], [values, pa.scalar(clause.value)])


def _column(name: str, batch: pa.RecordBatch) -> Any:
    """The values of a name, Arrow array [N]."""
    if name == "correct" or name == "sample_index":
        return batch.column(name)
    if name in _TEXTS:
        return batch.column(_TEXTS[name])
    lengths = batch.column("token_ids").value_lengths()
    if name == "tokens":
        return lengths
    if name == "rows":
        return batch.column("token_logprob").value_lengths()
    bounds = [pa.array(np.zeros(batch.num_rows, np.int32)), *batch.column("sections").flatten(), lengths]
    place = SPANS.index(name)
    return call_function("subtract", [bounds[place + 1], bounds[place]])


def _metadata(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    found = []
    for trace_id, text in zip(batch.column("trace_id"), batch.column("metadata"), strict=True):
        try:
            found.append(metadata_of(text.as_py()))
        except ShardCorruptError as e:
            raise ShardCorruptError(f"trace {trace_id}: {e}") from e
    return found


def _dig(metadata: dict[str, Any], path: str, nothing: Any = None) -> Any:
    """The value at a dotted path, or ``nothing``."""
    if path in metadata:
        return metadata[path]
    name, _, rest = path.partition(".")
    inner = metadata.get(name)
    return _dig(inner, rest, nothing) if rest and isinstance(inner, dict) else nothing


def _on_metadata(clause: Clause, metadata: list[dict[str, Any]]) -> Any:
    """Boolean Arrow array [N], null where there is no value."""
    found = [_dig(m, clause.path or "") for m in metadata]
    if clause.op is not None and clause.value is None:
        return pa.array([(f is None) == (clause.op == "=") for f in found], pa.bool_())
    return pa.array([None if f is None else _holds(clause, f) for f in found], pa.bool_())


def _holds(clause: Clause, found: Any) -> bool:
    if clause.op is None:
        if not isinstance(found, bool):
            raise InputError(
                f"`where` {clause}: {found!r} in a trace is not true or false; compare it, as in {clause.name}=..."
            )
        return found
    compare, wanted = _OPERATORS[clause.op][1], clause.value
    if isinstance(wanted, float):
        try:
            # An integer stays an integer: it may be too large for a float, and compares with floats.
            found = None if isinstance(found, bool) else found if isinstance(found, int) else float(found)
        except (TypeError, ValueError):
            found = None
        if found is None and clause.op not in ("=", "!="):
            raise InputError(
                f"`where` {clause}: a trace has a value there that is not a number; compare it with = or !="
            )
    elif isinstance(wanted, str):
        found = found if isinstance(found, str) else json.dumps(found)
    elif not isinstance(found, bool):
        found = None
    return compare(found, wanted)
