"""What every trace and every index of a valid cache fulfils. All readers share these checks; FORMAT.md states them.

A function yields one text per fault, in the order in which a reader may rely on what was checked before.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.compute import call_function

from logitcache.cache.validate import TRACE_ID
from logitcache.codec.block import LEAST_BYTES, count_entries, read_header
from logitcache.errors import ShardCorruptError
from logitcache.identity import Identity
from logitcache.sections import SPANS
from logitcache.sparse_rows import MASS_SLACK, SparseRows
from logitcache.trace import Trace

# R rows; N entries of all rows; L tokens.

_MASS = 2 * MASS_SLACK  # how far a row and its tail may be from 1: the kept entries and the tail may each be off
_UNRESOLVED = 1e-5  # mass that a tail cannot resolve
# Half a step of a value and of its row's sum, 2^-7 each, and of the tail, 2^-8 each time that rows are encoded.
_ROUNDING, _TAIL_ROUNDING = 2.0**-6, 2.0**-8
_LEAST_EXACT, _LEAST_ROUNDED = -512.0, -200.0  # nats; the codec raises log-probabilities far below these


def block_faults(block: memoryview, rows: int, identity: Identity) -> Iterator[str]:
    """What is wrong with the header of a top-k block; to be checked before the block takes memory.

    Args:
        rows: how many rows the other columns have.
    Raises: ShardCorruptError, FormatVersionError.
    """
    header = read_header(block)
    if rows != header.R:
        yield f"column topk: {header.R} rows, column token_logprob has {rows}"
    if header.R and len(identity.pin_tokens) != header.E:
        yield f"column topk: {header.E} pinned ids, the cache pins {len(identity.pin_tokens)}"
    if header.R * identity.top_k < header.N:
        yield f"column topk: {header.N} entries in {header.R} rows, the cache stores at most {identity.top_k} per row"
    if header.R and identity.exact and not header.exact:
        yield "column topk: rounded, the cache is exact"


def token_faults(token_ids: np.ndarray, identity: Identity) -> Iterator[str]:
    """What is wrong with the tokens of a trace, int32 [L]."""
    yield from _id_faults("token_ids", token_ids, identity.vocab_size)


def trace_faults(trace: Trace, identity: Identity) -> Iterator[str]:
    """What is wrong with a trace."""
    yield from token_faults(trace.token_ids, identity)
    if not TRACE_ID.holds(trace.trace_id):
        yield f"column trace_id: not {TRACE_ID.what}"
    if trace.sample_index < 0:
        yield f"column sample_index: {trace.sample_index}"
    rows, L = trace.rows, len(trace.token_ids)
    end = trace.row_start + len(rows)
    if trace.row_start < (1 if len(rows) else 0):
        yield f"column row_start: {trace.row_start}, the first token has no row"
    if end > L or (end < L and not identity.derived):  # a slice may have cut the last rows
        yield f"column topk: {len(rows)} rows from token {trace.row_start} on do not end at token {L}"
    for name in ("token_logprob", "token_rank"):
        if len(getattr(trace, name)) != len(rows):
            yield f"column {name}: {len(getattr(trace, name))} values for {len(rows)} rows"
    if not len(rows):
        return
    faults = list(_row_faults(rows, identity))
    yield from faults
    if (
        not faults
        and trace.row_start >= 0
        and end <= L
        and len(trace.token_logprob) == len(trace.token_rank) == len(rows)
    ):
        yield from _sampled_faults(trace, identity)


def _id_faults(column: str, ids: np.ndarray, vocab_size: int) -> Iterator[str]:
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        yield f"column {column}: ids from {ids.min()} to {ids.max()}, the vocabulary size is {vocab_size}"


def _row_faults(rows: SparseRows, identity: Identity) -> Iterator[str]:
    """What is wrong with rows, of which there is one at least. The codec has checked that each has distinct ids."""
    counts, faults = rows.counts, list(_id_faults("topk", rows.ids, identity.vocab_size))
    yield from faults
    if counts.max() > (kept := identity.top_k + len(identity.pin_tokens)):
        yield f"column topk: a row of {counts.max()} ids, the cache stores at most {kept}"
    if (
        not faults
        and identity.pin_tokens
        and np.count_nonzero(_pinned(rows.ids, identity)) != len(rows) * len(identity.pin_tokens)
    ):
        yield f"column topk: not every row contains the pinned ids {', '.join(map(str, identity.pin_tokens))}"
    with np.errstate(over="ignore", invalid="ignore"):  # a forged block may contain any value
        mass_R = _sums(np.exp(rows.logprobs), rows) + np.exp(rows.log_tail)
    wrong_R = ~(np.abs(mass_R - 1) <= _MASS)
    if wrong_R.any():
        worst = int(np.where(wrong_R, np.nan_to_num(np.abs(mass_R - 1), nan=np.inf), -1).argmax())
        yield f"column topk: row {worst} and its tail sum to {mass_R[worst]:.6f}"
    elif not np.isfinite(rows.logprobs).all():
        yield "column topk: a log-probability is not finite"


def _sampled_faults(trace: Trace, identity: Identity) -> Iterator[str]:
    """Where the columns of the sampled tokens contradict the rows. NaN and rank 0 mean unknown.

    Entries above a token in its row are above it in the vocabulary, and all entries that a row leaves out are at most as
    likely as its least entry that is not pinned.
    """
    rows, said_R, rank_R = trace.rows, trace.token_logprob, trace.token_rank
    R, starts = len(rows), rows.offsets[:-1]
    token_R = trace.token_ids[trace.row_start : trace.row_start + R]
    places = np.flatnonzero(_each_row(np.equal, rows.ids, token_R, rows))  # at most one in a row
    there_R = np.zeros(R, bool)
    there_R[np.searchsorted(rows.offsets, places, "right") - 1] = True
    least_R = rows.logprobs[rows.offsets[1:] - 1]
    if identity.pin_tokens:
        others_N = np.where(_pinned(rows.ids, identity), np.float32(np.inf), rows.logprobs)
        least_R = np.minimum.reduceat(others_N, starts)
    value_R = least_R.copy()
    value_R[there_R] = rows.logprobs[places]

    floor = _LEAST_EXACT if identity.exact else _LEAST_ROUNDED
    slack = 0.0 if identity.exact else _ROUNDING + (1 + len(identity.derived)) * _TAIL_ROUNDING
    known_R = ~np.isnan(said_R)
    with np.errstate(invalid="ignore", over="ignore"):
        above_R = np.maximum(said_R, floor) - np.maximum(value_R, floor)
        tail_R = np.exp(said_R) > np.exp(rows.log_tail + slack) + _UNRESOLVED
        wrong_R = known_R & np.where(there_R, ~(np.abs(above_R) <= slack), ~(above_R <= slack) | tail_R)
    if wrong_R.any():
        r = int(wrong_R.argmax())
        what = f"{value_R[r]:.4f} in the row" if there_R[r] else "more than the row leaves to other ids"
        yield f"column token_logprob: row {r}: {said_R[r]:.4f} for token {token_R[r]}, {what}"

    more_R = _leading(_each_row(np.greater, rows.logprobs, value_R, rows), rows)
    most_R = np.full(R, identity.vocab_size)
    sure_R = there_R & (value_R > least_R)  # ties outside the row are possible at its least entry
    most_R[sure_R] = _leading(_each_row(np.greater_equal, rows.logprobs, value_R, rows), rows)[sure_R]
    wrong_R = (rank_R != 0) & ((rank_R < 1 + more_R) | (rank_R > most_R))
    if wrong_R.any():
        r = int(wrong_R.argmax())
        bounds = f"{1 + more_R[r]}" if most_R[r] == 1 + more_R[r] else f"{1 + more_R[r]} to {most_R[r]}"
        yield f"column token_rank: row {r}: {rank_R[r]} for token {token_R[r]}, by the row it is {bounds}"


def _pinned(ids: np.ndarray, identity: Identity) -> np.ndarray:
    """Which ids are pinned ones, bool [N]."""
    pinned_V = np.zeros(identity.vocab_size, bool)
    pinned_V[identity.pin_tokens] = True
    return pinned_V[ids]


def _each_row(compare: Any, values_N: np.ndarray, value_R: np.ndarray, rows: SparseRows) -> np.ndarray:
    """Compares all entries of each row with the row's value, bool [N]."""
    if K := _width(rows):
        return compare(values_N.reshape(-1, K), value_R[:, None]).ravel()
    return compare(values_N, np.repeat(value_R, rows.counts))


def _sums(values_N: np.ndarray, rows: SparseRows) -> np.ndarray:
    """The sum of each row, [R]."""
    if K := _width(rows):
        return np.einsum("rk->r", values_N.reshape(-1, K))  # three times as fast as sum
    return np.add.reduceat(values_N, rows.offsets[:-1])


def _leading(true_N: np.ndarray, rows: SparseRows) -> np.ndarray:
    """How many entries at the beginning of each row are true, [R]; behind them none is."""
    if K := _width(rows):
        true_RK = true_N.reshape(-1, K)
        return np.where(true_RK[:, -1], K, true_RK.argmin(axis=1))  # stops early: six times as fast as a sum
    return np.add.reduceat(true_N, rows.offsets[:-1], dtype=np.int64)


def _width(rows: SparseRows) -> int:
    """Entries of each row if all have the same number, else 0."""
    K = int(rows.offsets[1])
    return K if K * len(rows) == rows.offsets[-1] and (rows.counts == K).all() else 0


def index_faults(index: Any, batch: pa.RecordBatch) -> Iterator[str]:
    """Where the index of a shard contradicts the plain columns and the headers of its blocks."""
    if index.trace_count != batch.num_rows:
        yield f"{batch.num_rows} traces, the index says {index.trace_count}"
        return
    for name, listed in (("trace_id", index.trace_ids), ("prompt_id", index.prompt_ids)):
        if not batch.column(name).equals(pa.array(listed, pa.string())):
            yield f"its index lists other {name}s than the shard"
    for name, found in column_facts(batch).items():
        if found != (said := getattr(index, name)):
            yield f"its index says {name} {_short(said)}, the shard has {_short(found)}"


def column_facts(batch: pa.RecordBatch) -> dict[str, Any]:
    """What an index says of a shard, by field, as its plain columns and the headers of its blocks have it.

    Raises: ShardCorruptError for a block without a header.
    """
    lengths = batch.column("token_ids").value_lengths()
    sections = batch.column("sections")
    ends = [sections.field(i).to_numpy().astype(np.int64) for i in range(sections.type.num_fields)]
    bounds = [np.zeros(len(batch), np.int64), *ends, lengths.to_numpy().astype(np.int64)]
    correct = batch.column("correct")
    right = call_function("sum", [correct]).as_py() or 0
    return {
        "token_lengths": lengths.to_pylist(),
        "row_count": call_function("sum", [batch.column("token_logprob").value_lengths()]).as_py(),
        "entries": _entries(batch.column("topk")),
        "block_bytes": call_function("sum", [call_function("binary_length", [batch.column("topk")])]).as_py(),
        "section_tokens": {
            name: int((end - start).sum()) for name, start, end in zip(SPANS, bounds, bounds[1:], strict=False)
        },
        "verdicts": {"correct": right, "incorrect": len(correct) - correct.null_count - right},
    }


def _entries(blocks: pa.LargeBinaryArray) -> int:
    _, offsets, data = blocks.buffers()
    starts = np.frombuffer(offsets, np.int64, len(blocks) + 1, blocks.offset * 8)
    if (np.diff(starts) < LEAST_BYTES).any():
        raise ShardCorruptError("column topk: a block is shorter than its header")
    return count_entries(np.frombuffer(data, np.uint8), starts[:-1])


def tail_mass_faults(said: float, found: float, rows: int) -> Iterator[str]:
    """The index has the tails before they were rounded, each to 0.4% of its odds.

    Args:
        found: sum of the tails of all rows that the shard holds.
    """
    if not abs(said - found) <= 0.01 * found + _UNRESOLVED * (rows + 1):
        yield f"its index says tail_mass {said:.6g}, the shard has {found:.6g}"


def raise_first(faults: Iterator[str]) -> None:
    """Raises: ShardCorruptError for the first fault."""
    if (fault := next(faults, None)) is not None:
        raise ShardCorruptError(fault)


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 60 else f"{text[:60]}..."
