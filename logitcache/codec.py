"""Sparse rows to bytes and back: the top-k block of one trace, as FORMAT.md specifies it.

Each row's ids are sorted and delta-coded; the values follow in that order, as steps of 2^-6 nat above the row's last.
All is split in byte planes that zstd compresses. Reading sorts (value, id) pairs packed in one integer, about 1 ns an
entry in numpy, and renormalises the support to 1 - tail, so that rounding moves no mass into or out of the tail.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from logitcache import planes
from logitcache.block import EXACT, Header, seal, unseal
from logitcache.errors import CacheError, ShardCorruptError
from logitcache.table import FrequencyTable
from logitcache.topk import SparseRows

# R rows, N entries of all rows together, K entries of a row where all have the same number.

DEFAULT_LEVEL = 8
HIGHEST_LEVEL = 12  # 13 to 22 take longer and save nothing

_GRIDS = (6, 7)  # bits below one nat; the finer where the coarser costs more than _GRID_KL
_GRID_KL = 4e-6  # nats, mean of a block; half a step of 2^-7 costs 2.6e-6 at most
_COARSE_GRID = 4  # bf16 logits are multiples of 2^-4 nat or coarser: the plane of the finer bits is all but zeros
_TAIL_GRID = 7  # a step of 2^-7 in the tail's log odds costs 6e-7 nat on average
_MAX_STEPS = 0xFFFF
_MAX_ID = 0x7FFFFFFF


def encode(
    rows: SparseRows, *, level: int = DEFAULT_LEVEL, exact: bool = False, table: FrequencyTable | None = None
) -> bytes:
    """One self-describing block.

    Args:
        rows: at least one entry in each; ids of a row differ; entries of equal log-probability are read back by id.
        level: of zstd, 1 to 22.
        exact: log-probabilities and tails are read back bit for bit; otherwise to 2^-7 nat against each other, and to
            5e-6 nat of KL over a block's rows.
        table: the order of ids by frequency; reading needs the same.
    Raises: CacheError for rows that no teacher gives: empty, not descending, not finite, an id twice or negative, or
        outside the table's vocabulary.
    """
    table_id = 0 if table is None else table.table_id
    R, N = len(rows), len(rows.ids)
    if R == 0:
        return seal(Header._make([*[0] * 11, table_id]), [], level)
    _check(rows)
    counts, starts, ends = rows.counts, rows.offsets[:-1], rows.offsets[1:] - 1
    K = int(counts[0]) if (counts == counts[0]).all() else 0
    rank_N = (rows.ids if table is None else _ranks(rows.ids, table)).astype(np.int64)
    pair_N = _sort_rows(rank_N << 32 | rows.logprobs.view(np.uint32), rows.offsets, K)  # values go with their ids
    rank_N, logprob_N = pair_N >> 32, pair_N.astype(np.uint32).view(np.float32)
    delta_N = np.diff(rank_N, prepend=0)
    delta_N[starts] = 1
    if not delta_N.all():
        raise CacheError("a row holds an id twice; give the top k without the realised token")
    delta_N[starts] = rank_N[starts]

    last_R = rows.logprobs[ends]
    grid, step_N = _steps(logprob_N, rows.logprobs[starts], last_R, counts, exact)
    coarse_N = np.minimum(step_N >> (grid - _COARSE_GRID), 255)
    fine_N = step_N - (coarse_N << (grid - _COARSE_GRID))
    residual_N = np.zeros(0, np.uint32)
    if exact:
        residual_N = _zigzag(_ordered(logprob_N) - _ordered(_predict(last_R, step_N, grid, counts)))
    widths = (
        4 if exact else 2,
        0 if K else planes.width_of(counts),
        max(1, planes.width_of(delta_N)),
        planes.width_of(fine_N),
        planes.width_of(residual_N),
    )
    parts = [
        *planes.split(rows.log_tail.view(np.uint32) if exact else _tail_codes(rows), widths[0]),
        *planes.split(last_R.view(np.uint32), 4 if exact else 0),
        *planes.split(counts, widths[1]),
        *planes.split(delta_N, widths[2]),
        *planes.split(coarse_N, 1),
        *planes.split(fine_N, widths[3]),
        *planes.split(residual_N, widths[4]),
    ]
    header = Header(EXACT if exact else 0, grid, grid - _COARSE_GRID, *widths, 0, R, N, table_id)
    return seal(header, parts, level)


def decode(block: bytes | memoryview, *, table: FrequencyTable | None = None) -> SparseRows:
    """The rows of one block, each descending, equal values by id.

    What this gives, encode keeps: writing rows again, with any table, loses nothing more.

    Raises: ShardCorruptError where the bytes are not what encode wrote; FormatVersionError for a later version;
        CacheError where the block was written with another table. The caller knows the file and adds its name.
    """
    header, raw = unseal(block)
    if header.table_id != (0 if table is None else table.table_id):
        given = "none was given" if table is None else f"{table.table_id:08x} was given"
        raise CacheError(
            f"a top-k block needs frequency table {header.table_id:08x}, {given}: read it with its shard's"
        )
    R, N = header.R, header.N
    if R == 0:
        return SparseRows.concatenate([])
    cursor = 0

    def take(count: int, width: int) -> np.ndarray:
        nonlocal cursor
        cursor += count * width
        return planes.join(raw, cursor - count * width, count, width)

    tail_R = take(R, header.tail_width)
    last_R = take(R, 4).view(np.float32) if header.exact else None
    counts, K = (take(R, header.count_width).astype(np.int64), 0) if header.count_width else (N // R, N // R)
    offsets = np.arange(0, N + 1, K) if K else np.concatenate([[0], np.cumsum(counts)])
    if not K and (offsets[-1] != N or not np.all(counts)):
        raise ShardCorruptError(f"the rows of a top-k block do not add up to its {N} entries")
    id_N = _ids(take(N, header.id_width), offsets, K, table)
    step_N = take(N, 1).astype(np.int32)
    step_N <<= header.fine_bits
    if header.fine_width:
        step_N += take(N, header.fine_width)
    if last_R is not None:
        ordered_N = _ordered(_predict(last_R, step_N, header.grid, counts)) + _unzigzag(take(N, header.residual_width))
        pair_N = _sort_rows((-ordered_N.astype(np.int64) << 31) + id_N, offsets, K)
        id_N, value_N = (pair_N & 0x7FFFFFFF).astype(np.int32), _ordered((-(pair_N >> 31)).astype(np.int32))
        return SparseRows(offsets, id_N, value_N.view(np.float32), tail_R.view(np.float32))

    most = (255 << header.fine_bits) + 255 if header.fine_width < 2 else int(step_N.max())
    id_bits = (len(table.class_V) - 1 if table is not None else int(id_N.max())).bit_length()
    if most.bit_length() + id_bits > 31:
        step_N = step_N.astype(np.int64)
    step_N <<= id_bits
    pair_N = _sort_rows(id_N - step_N, offsets, K)  # most steps first, then the smallest id
    id_N = (pair_N & ((1 << id_bits) - 1)).astype(np.int32, copy=False)
    pair_N >>= id_bits
    log_tails, log_supports = _tail_tables()
    value_N = _renormalise(pair_N, most * 2.0**-header.grid, header.grid, counts, K, log_supports.take(tail_R))
    return SparseRows(offsets, id_N, value_N, log_tails.take(tail_R))


def _check(rows: SparseRows) -> None:
    if rows.logprobs.dtype != np.float32 or rows.log_tail.dtype != np.float32:
        raise TypeError(f"log-probabilities are float32, not {rows.logprobs.dtype} and {rows.log_tail.dtype}")
    if int(rows.counts.min()) < 1:
        raise CacheError("a row holds no entry; keep at least one")
    if not (np.isfinite(rows.logprobs).all() and (rows.log_tail <= 0).all()):
        raise CacheError("a row holds a log-probability that is not finite, or a tail above 1")
    if int(rows.ids.min()) < 0 or int(rows.ids.max()) > _MAX_ID:
        raise CacheError(f"a row holds an id outside 0..{_MAX_ID}")
    ascent_N = rows.logprobs[1:] > rows.logprobs[:-1]
    ascent_N[rows.offsets[1:-1] - 1] = False
    if ascent_N.any():
        raise CacheError("a row's log-probabilities do not descend; sort it with topk.from_topk")


def _steps(
    logprob_N: np.ndarray, top_R: np.ndarray, last_R: np.ndarray, counts: np.ndarray, exact: bool
) -> tuple[int, np.ndarray]:
    """The grid, and each value as steps of 2^-grid above its row's last, uint32 [N]."""
    starts = np.cumsum(counts) - counts
    above_N = logprob_N.astype(np.float64) - np.repeat(last_R.astype(np.float64), counts)
    prob_N = np.exp(logprob_N)
    grid, step_N = 0, above_N
    for grid in _GRIDS:
        step_N = np.rint(above_N * 2**grid)
        if (step_N > _MAX_STEPS).any():  # 512 nats below the top nothing is left to lose: cut there
            reach_R = np.rint((top_R.astype(np.float64) - last_R) * 2**grid)
            step_N = np.maximum(step_N - np.repeat(np.maximum(reach_R - _MAX_STEPS, 0), counts), 0)
        if exact or _rounding_kl(prob_N, step_N * 2.0**-grid - above_N, starts).mean() <= _GRID_KL:
            break
    return grid, step_N.astype(np.uint32)


def _ranks(id_N: np.ndarray, table: FrequencyTable) -> np.ndarray:
    try:
        return table.rank_of_id.take(id_N)
    except IndexError:
        raise CacheError(
            f"a row holds id {id_N.max()}, its frequency table orders {len(table.class_V)}: build it for this teacher"
        ) from None


def _ids(delta_N: np.ndarray, offsets: np.ndarray, K: int, table: FrequencyTable | None) -> np.ndarray:
    """Ids in ascending order of rank, int32 [N]."""
    if K:
        rank_N = delta_N.reshape(-1, K).cumsum(axis=1, dtype=np.int64).ravel()
    else:
        rank_N = np.cumsum(delta_N, dtype=np.int64)
        start_R = offsets[:-1]
        rank_N -= np.repeat(rank_N[start_R] - delta_N[start_R], np.diff(offsets))
    if table is not None:
        try:
            return table.id_of_rank.take(rank_N)
        except IndexError:
            raise ShardCorruptError("a top-k block holds a rank outside its frequency table") from None
    if int(rank_N.max()) > _MAX_ID:
        raise ShardCorruptError("a top-k block holds an id above 2^31 - 1")
    return rank_N.astype(np.int32)


def _sort_rows(pair_N: np.ndarray, offsets: np.ndarray, K: int) -> np.ndarray:
    """Integers [N] sorted inside each row. Ragged rows are padded: to the longest, or where that takes too much
    memory, to the next power of two."""
    if K:
        pair_N.reshape(-1, K).sort(axis=1)
        return pair_N
    counts = np.diff(offsets)
    width = int(counts.max())
    if len(counts) * width <= 4 * len(pair_N):
        return _sort_padded(pair_N, counts, width)
    bits_R = np.ceil(np.log2(counts)).astype(np.int64)
    row_N = np.repeat(bits_R, counts)
    for bits in np.unique(bits_R):
        pair_N[row_N == bits] = _sort_padded(pair_N[row_N == bits], counts[bits_R == bits], 1 << bits)
    return pair_N


def _sort_padded(pair_N: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    inside = np.arange(width) < counts[:, None]
    padded = np.full(inside.shape, np.iinfo(pair_N.dtype).max, pair_N.dtype)
    padded[inside] = pair_N
    padded.sort(axis=1)
    return padded[inside]


def _rounding_kl(prob_N: np.ndarray, error_N: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """KL that the errors of the log-probabilities cost each row once it is renormalised, to second order; nats [R]."""
    mass_R = np.maximum(np.add.reduceat(prob_N, starts), 1e-30)
    mean_R = np.add.reduceat(prob_N * error_N, starts)
    return (np.add.reduceat(prob_N * error_N * error_N, starts) - mean_R**2 / mass_R) / 2


def _tail_codes(rows: SparseRows) -> np.ndarray:
    """Log odds of the tail on a grid, 1 to 65535; 0 where the row leaves nothing out."""
    starts = rows.offsets[:-1]
    top_R = rows.logprobs[starts].astype(np.float64)
    mass_R = np.add.reduceat(np.exp(rows.logprobs - np.repeat(top_R, rows.counts)), starts)
    code_R = 32768 + np.clip(np.rint((rows.log_tail - top_R - np.log(mass_R)) * 2**_TAIL_GRID), -32767, 32767)
    return np.where(np.isneginf(rows.log_tail), 0, code_R).astype(np.uint32)


@cache
def _tail_tables() -> tuple[np.ndarray, np.ndarray]:
    """Log of the tail's mass and of the support's, float32 [65536] each, for every code."""
    odds = (np.arange(65536) - 32768.0) * 2.0**-_TAIL_GRID
    odds[0] = -np.inf
    return (-np.logaddexp(0, -odds)).astype(np.float32), (-np.logaddexp(0, odds)).astype(np.float32)


def _renormalise(
    minus_step_N: np.ndarray, reach: float, grid: int, counts: np.ndarray | int, K: int, log_support_R: np.ndarray
) -> np.ndarray:
    """Log-probabilities, float32 [N], of rows whose values and masses are given; `reach` nats is the largest value."""
    value_N = minus_step_N.astype(np.float32)
    value_N *= np.float32(-(2.0**-grid))
    if K:
        value_RK = value_N.reshape(-1, K)
        if reach > 64:  # e^88 is float32's last
            value_RK -= value_RK[:, :1].copy()
        mass_R = np.einsum("rk->r", np.exp(value_RK))  # a product with ones would start threads of its own
        value_RK += (log_support_R - np.log(mass_R))[:, None]
        return value_N
    starts = np.cumsum(counts) - counts
    if reach > 64:
        value_N -= np.repeat(value_N[starts], counts)
    mass_R = np.add.reduceat(np.exp(value_N), starts)
    value_N += np.repeat(log_support_R - np.log(mass_R), counts)
    return value_N


def _predict(last_R: np.ndarray, step_N: np.ndarray, grid: int, counts: np.ndarray | int) -> np.ndarray:
    with np.errstate(all="ignore"):  # a forged block may hold anything
        return (np.repeat(last_R.astype(np.float64), counts) + step_N * 2.0**-grid).astype(np.float32)


def _ordered(value_N: np.ndarray) -> np.ndarray:
    """Float32 as int32 in the same order, neighbours next to each other; applied twice, the same bits again."""
    bits_N = value_N.view(np.int32)
    return bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)


def _zigzag(value_N: np.ndarray) -> np.ndarray:
    """Int32 as uint32 with small numbers of either sign small."""
    return ((value_N << 1) ^ (value_N >> 31)).view(np.uint32)


def _unzigzag(code_N: np.ndarray) -> np.ndarray:
    code_N = code_N.astype(np.uint32)
    return ((code_N >> 1) ^ (0 - (code_N & 1))).view(np.int32)
