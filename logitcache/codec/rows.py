"""Encodes the sparse rows of a trace as one top-k block, and decodes it. FORMAT.md specifies the block.

The ids of each row are sorted and delta-coded. The values follow in the same order, in steps of 2^-6 nat above the row's
smallest. Both are split into byte planes, which zstd compresses. The decoder sorts (value, id) pairs packed in one
integer, about 1 ns per entry in numpy, and renormalises the support to 1 - tail, so that rounding moves no mass into or
out of the tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logitcache.codec import byte_planes
from logitcache.codec.block import EXACT, Columns, Header, seal, unseal
from logitcache.codec.frequency_table import FrequencyTable
from logitcache.codec.quantization import COARSE_GRID, PIN_ZERO, renormalise, steps_of, tail_codes, tail_tables
from logitcache.errors import CacheError, ShardCorruptError
from logitcache.sparse_rows import SparseRows

# R rows; N entries of all rows, pinned ones excluded; K entries per row if all rows have the same number, else 0;
# E pinned ids; M = N + E * R.

DEFAULT_LEVEL = 8
HIGHEST_LEVEL = 12  # 13 to 22 take longer and save nothing

_MAX_PINS = 255
_MAX_ID = 0x7FFFFFFF


def encode(
    rows: SparseRows,
    *,
    level: int = DEFAULT_LEVEL,
    exact: bool = False,
    table: FrequencyTable | None = None,
    pinned: Sequence[int] = (),
) -> bytes:
    """Encodes rows as one self-describing block.

    Args:
        rows: each with at least one entry and distinct ids. Entries of equal log-probability are decoded in order of id.
        level: zstd level, 1 to 22.
        exact: keep log-probabilities and tails bit for bit. Otherwise differences between log-probabilities are kept to
            2^-7 nat, and the mean KL over the rows of a block is below 5e-6 nat.
        table: order of ids by frequency; ``decode`` needs the same table. Pinned ids need not be counted in it.
        pinned: up to 255 ids that every row contains whatever their rank, besides at least one other id. They are stored
            separately, since they often lie 10 to 25 nats below the rest. ``decode`` does not need to be told them.
    Raises: CacheError for invalid rows: empty, not descending, not finite, with an id that repeats, is negative or is
        outside the table's vocabulary; without one of the pinned ids, or with only pinned ids.
    """
    table_id = 0 if table is None else table.table_id
    R = len(rows)
    if R == 0:
        return seal(Header._make([*[0] * 11, table_id]), Columns(*[np.zeros(0, np.uint8)] * 9), level)
    _check(rows)
    tail_R = rows.log_tail.view(np.uint32) if exact else tail_codes(rows)
    top_R, pin_E = rows.logprobs[rows.offsets[:-1]], np.array(sorted(set(pinned)), np.int64)
    rows, pin_ER = _set_apart(rows, pin_E, table)
    N = len(rows.ids)
    counts, starts, ends = rows.counts, rows.offsets[:-1], rows.offsets[1:] - 1
    K = int(counts[0]) if (counts == counts[0]).all() else 0
    rank_N = (rows.ids if table is None else _ranks(rows.ids, table)).astype(np.int64)
    # Each value is packed with its rank, so that sorting moves both.
    pair_N = _sort_rows(rank_N << 32 | rows.logprobs.view(np.uint32), rows.offsets, K)
    rank_N, logprob_N = pair_N >> 32, pair_N.astype(np.uint32).view(np.float32)
    delta_N = np.diff(rank_N, prepend=0)
    delta_N[starts] = 1
    if not delta_N.all():
        raise CacheError("a row contains an id twice; pass the top k without the sampled token")
    delta_N[starts] = rank_N[starts]

    last_R = rows.logprobs[ends]
    grid, step_N, pin_step_ER = steps_of(logprob_N, pin_ER, top_R, last_R, counts, exact)
    coarse_N = np.minimum(step_N >> (grid - COARSE_GRID), 255)
    fine_N = step_N - (coarse_N << (grid - COARSE_GRID))
    residual_N = np.zeros(0, np.uint32)
    if exact:
        residual_N = _zigzag(_ordered(logprob_N) - _ordered(_predict(last_R, step_N, grid, counts)))
    widths = (
        4 if exact else 2,
        0 if K else byte_planes.width_of(counts),
        max(1, byte_planes.width_of(delta_N)),
        byte_planes.width_of(fine_N),
        byte_planes.width_of(residual_N),
    )
    header = Header(EXACT if exact else 0, grid, grid - COARSE_GRID, *widths, len(pin_E), R, N, table_id)
    pin_ER = pin_ER.view(np.uint32) if exact else pin_step_ER + PIN_ZERO
    columns = Columns(
        tail_R,
        last_R.view(np.uint32),
        counts,
        pin_E.astype(np.uint32).view(np.uint8),
        pin_ER,
        delta_N,
        coarse_N,
        fine_N,
        residual_N,
    )
    return seal(header, columns, level)


def decode(block: bytes | memoryview, *, table: FrequencyTable | None = None) -> SparseRows:
    """Decodes one block. Rows are in descending order, entries of equal log-probability by id.

    Encoding decoded rows again, with any table, loses nothing more.

    Raises: ShardCorruptError if the bytes are not a valid block; FormatVersionError for a later version; CacheError if the
        block was written with another table. The caller adds the name of the file.
    """
    header, columns = unseal(block)
    if header.table_id != (0 if table is None else table.table_id):
        given = "none was given" if table is None else f"{table.table_id:08x} was given"
        raise CacheError(
            f"a top-k block needs frequency table {header.table_id:08x}, {given}; use the table of its shard"
        )
    if header.R == 0:
        return SparseRows.concatenate([])
    offsets, K = _offsets(header, columns.counts_R)
    id_N = _ids(columns.id_N, offsets, K, table)
    if header.E:
        _check_pins(columns.pin_E, id_N, table)
    step_N = columns.coarse_N.astype(np.int32)
    step_N <<= header.fine_bits
    if header.fine_width:
        step_N += columns.fine_N
    if header.exact:
        return _exact(header, columns, id_N, step_N, offsets, K)
    return _rounded(header, columns, id_N, step_N, offsets, K, table)


def _offsets(header: Header, counts_R: np.ndarray) -> tuple[np.ndarray, int]:
    """Offsets of the rows, int64 [R + 1], and K; 0 if rows differ in length."""
    R, N = header.R, header.N
    if not header.count_width:
        return np.arange(0, N + 1, N // R), N // R
    offsets = np.zeros(R + 1, np.int64)
    np.cumsum(counts_R, out=offsets[1:])
    if offsets[-1] != N or not counts_R.all():
        raise ShardCorruptError(f"the rows of a top-k block do not add up to its {N} entries")
    return offsets, 0


def _exact(
    header: Header, columns: Columns, id_N: np.ndarray, step_N: np.ndarray, offsets: np.ndarray, K: int
) -> SparseRows:
    """Decodes exact rows: the captured bits."""
    ordered_N = _ordered(_predict(columns.last_R.view(np.float32), step_N, header.grid, offsets[1:] - offsets[:-1]))
    if header.residual_width:
        ordered_N += _unzigzag(columns.residual_N)
    pair_N = (-ordered_N.astype(np.int64) << 31) + id_N
    if header.E:
        pin_ER = _ordered(columns.pin_ER.view(np.float32)).astype(np.int64).reshape(header.E, -1)
        pair_N, offsets, K = _insert((-pin_ER << 31) + columns.pin_E[:, None], pair_N, offsets, K)
    pair_N = _sort_rows(pair_N, offsets, K)
    id_N, value_N = (pair_N & 0x7FFFFFFF).astype(np.int32), _ordered((-(pair_N >> 31)).astype(np.int32))
    return SparseRows(offsets, id_N, value_N.view(np.float32), columns.tail_R.view(np.float32))


def _rounded(
    header: Header,
    columns: Columns,
    id_N: np.ndarray,
    step_N: np.ndarray,
    offsets: np.ndarray,
    K: int,
    table: FrequencyTable | None,
) -> SparseRows:
    """Decodes rounded rows. Entries are sorted as one integer each: most steps first, then the smallest id."""
    most = (255 << header.fine_bits) + 255 if header.fine_width < 2 else int(step_N.max())
    most_id = max(int(id_N.max()), *columns.pin_E.tolist(), 0) if table is None else len(table.class_V) - 1
    pin_step_ER = columns.pin_ER.reshape(header.E, -1).astype(np.int64) - PIN_ZERO if header.E else None
    if pin_step_ER is not None:
        most = max(most, int(np.abs(pin_step_ER).max()))
    id_bits = most_id.bit_length()
    if most.bit_length() + id_bits > 31:
        step_N = step_N.astype(np.int64)
    step_N <<= id_bits
    pair_N = np.subtract(id_N, step_N, out=step_N)
    if pin_step_ER is not None:
        pin_pair_ER = columns.pin_E[:, None] - (pin_step_ER << id_bits)
        pair_N, offsets, K = _insert(pin_pair_ER.astype(pair_N.dtype), pair_N, offsets, K)
    pair_N = _sort_rows(pair_N, offsets, K)
    id_N = (pair_N & ((1 << id_bits) - 1)).astype(np.int32, copy=False)
    pair_N >>= id_bits
    log_tails, log_supports = tail_tables()
    log_support_R = log_supports.take(columns.tail_R)
    value_N = renormalise(pair_N, most * 2.0**-header.grid, header.grid, offsets, K, log_support_R)
    return SparseRows(offsets, id_N, value_N, log_tails.take(columns.tail_R))


def _check(rows: SparseRows) -> None:
    if rows.logprobs.dtype != np.float32 or rows.log_tail.dtype != np.float32:
        raise TypeError(f"logprobs and log_tail must be float32, not {rows.logprobs.dtype} and {rows.log_tail.dtype}")
    if int(rows.counts.min()) < 1:
        raise CacheError("a row has no entries; keep at least one")
    if not (np.isfinite(rows.logprobs).all() and (rows.log_tail <= 0).all()):
        raise CacheError("a row contains a log-probability that is not finite, or a tail above 1")
    if int(rows.ids.min()) < 0 or int(rows.ids.max()) > _MAX_ID:
        raise CacheError(f"a row contains an id outside 0..{_MAX_ID}")
    ascent_N = rows.logprobs[1:] > rows.logprobs[:-1]
    ascent_N[rows.offsets[1:-1] - 1] = False
    if ascent_N.any():
        raise CacheError(
            "the log-probabilities of a row are not in descending order; sort them with sparse_rows.from_topk"
        )


def _set_apart(rows: SparseRows, pin_E: np.ndarray, table: FrequencyTable | None) -> tuple[SparseRows, np.ndarray]:
    """Splits rows into those without pinned entries and the log-probabilities of the pinned ids, float32 [E, R]."""
    E, R = len(pin_E), len(rows)
    pin_ER = np.empty((E, R), np.float32)
    if E == 0:
        return rows, pin_ER
    most_id = _MAX_ID if table is None else len(table.class_V) - 1
    if E > _MAX_PINS or pin_E[0] < 0 or pin_E[-1] > most_id:
        raise CacheError(f"{E} pinned ids in {pin_E[0]}..{pin_E[-1]}: pin at most {_MAX_PINS}, in 0..{most_id}")
    other_N = np.ones(len(rows.ids), bool)
    for e, pin in enumerate(pin_E.tolist()):
        here_N = rows.ids == pin
        if (np.add.reduceat(here_N, rows.offsets[:-1], dtype=np.int64) != 1).any():
            raise CacheError(
                f"a row does not contain the pinned id {pin} exactly once; capture its log-probability at every token"
            )
        pin_ER[e] = rows.logprobs[here_N]
        other_N &= ~here_N
    offsets = rows.offsets - E * np.arange(R + 1)
    if not np.diff(offsets).all():
        raise CacheError("a row contains only pinned ids; keep at least one other")
    return SparseRows(offsets, rows.ids[other_N], rows.logprobs[other_N], rows.log_tail), pin_ER


def _ranks(id_N: np.ndarray, table: FrequencyTable) -> np.ndarray:
    try:
        return table.rank_of_id.take(id_N)
    except IndexError:
        raise CacheError(
            f"a row contains id {id_N.max()}, its frequency table has {len(table.class_V)} ids; build it for this teacher"
        ) from None


def _ids(delta_N: np.ndarray, offsets: np.ndarray, K: int, table: FrequencyTable | None) -> np.ndarray:
    """Ids of each row in ascending order of rank, int32 [N].

    Raises: ShardCorruptError for an id that repeats in its row, or that is outside the table or above 2^31 - 1.
    """
    if np.count_nonzero(delta_N) < len(delta_N):
        repeated_N = delta_N == 0
        repeated_N[offsets[:-1]] = False  # a row may begin with id 0
        if repeated_N.any():
            row = int(np.searchsorted(offsets, repeated_N.argmax(), "right")) - 1
            raise ShardCorruptError(f"row {row} of a top-k block contains an id twice")
    most = (K or len(delta_N)) << 8 * delta_N.itemsize
    dtype = np.int32 if most < 2**31 else np.int64  # takes twice as long
    if K:
        rank_N = np.add.accumulate(delta_N.reshape(-1, K), axis=1, dtype=dtype).ravel()
    else:
        rank_N = np.add.accumulate(delta_N, dtype=dtype)
        start_R = offsets[:-1]
        rank_N -= np.repeat(rank_N[start_R] - delta_N[start_R], offsets[1:] - offsets[:-1])
    if table is not None:
        try:
            return table.id_of_rank.take(rank_N)
        except IndexError:
            raise ShardCorruptError("a top-k block contains a rank outside its frequency table") from None
    if int(rank_N.max()) > _MAX_ID:
        raise ShardCorruptError("a top-k block contains an id above 2^31 - 1")
    return rank_N.astype(np.int32, copy=False)


def _check_pins(pin_E: np.ndarray, id_N: np.ndarray, table: FrequencyTable | None) -> None:
    pins = pin_E.tolist()
    if pins != sorted(set(pins)) or pins[-1] > (_MAX_ID if table is None else len(table.class_V) - 1):
        raise ShardCorruptError("a top-k block pins an id twice, or one outside the vocabulary")
    if any(np.count_nonzero(id_N == pin) for pin in pins):
        raise ShardCorruptError("a top-k block contains a pinned id among the others")


def _insert(pin_ER: np.ndarray, value_N: np.ndarray, offsets: np.ndarray, K: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Puts pinned values before the others of their rows: values [M], the offsets of the rows, and K."""
    E, R = pin_ER.shape
    whole_offsets = offsets + E * np.arange(R + 1)
    if K:
        return np.concatenate([pin_ER.T, value_N.reshape(R, K)], axis=1).ravel(), whole_offsets, K + E
    pin_M = np.zeros(whole_offsets[-1], bool)
    pin_M[whole_offsets[:-1, None] + np.arange(E)] = True
    value_M = np.empty(len(pin_M), value_N.dtype)
    value_M[pin_M], value_M[~pin_M] = pin_ER.T.ravel(), value_N
    return value_M, whole_offsets, 0


def _sort_rows(pair_N: np.ndarray, offsets: np.ndarray, K: int) -> np.ndarray:
    """Sorts the integers [N] of each row. Rows of different lengths are padded to the longest, or to the next power of
    two if that takes too much memory."""
    if K:
        pair_N.reshape(-1, K).sort(axis=1)
        return pair_N
    counts = offsets[1:] - offsets[:-1]
    width = int(counts.max())
    if len(counts) * width <= 4 * len(pair_N):
        return _sort_padded(pair_N, counts, width)
    bits_R = np.ceil(np.log2(counts)).astype(np.int64)
    row_N = np.repeat(bits_R, counts)
    for bits in np.unique(bits_R):
        pair_N[row_N == bits] = _sort_padded(pair_N[row_N == bits], counts[bits_R == bits], 1 << int(bits))
    return pair_N


def _sort_padded(pair_N: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    dtype = np.min_scalar_type(width)  # bytes compare three times as fast
    inside = np.arange(width, dtype=dtype) < counts.astype(dtype)[:, None]
    padded = np.full(inside.shape, np.iinfo(pair_N.dtype).max, pair_N.dtype)
    padded[inside] = pair_N
    padded.sort(axis=1)
    return padded[inside]


def _predict(last_R: np.ndarray, step_N: np.ndarray, grid: int, counts: np.ndarray | int) -> np.ndarray:
    with np.errstate(all="ignore"):  # a forged block may contain any value
        return (np.repeat(last_R.astype(np.float64), counts) + step_N * 2.0**-grid).astype(np.float32)


def _ordered(value_N: np.ndarray) -> np.ndarray:
    """Maps the bits of float32 to int32 in the same order, neighbours to neighbours. It is its own inverse."""
    bits_N = value_N.view(np.int32)
    return bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)


def _zigzag(value_N: np.ndarray) -> np.ndarray:
    """Maps int32 to uint32 so that small numbers of either sign stay small."""
    return ((value_N << 1) ^ (value_N >> 31)).view(np.uint32)


def _unzigzag(code_N: np.ndarray) -> np.ndarray:
    code_N = code_N.astype(np.uint32)
    return ((code_N >> 1) ^ (0 - (code_N & 1))).view(np.int32)
