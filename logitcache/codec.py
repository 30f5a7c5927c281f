"""Sparse rows to bytes and back: the top-k block of one trace, as FORMAT.md specifies it.

Each row's ids are sorted and delta-coded; the values follow in that order, as steps of 2^-6 nat above the row's last.
All is split in byte planes that zstd compresses. Reading sorts (value, id) pairs packed in one integer, about 1 ns an
entry in numpy, and renormalises the support to 1 - tail, so that rounding moves no mass into or out of the tail.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from logitcache import planes
from logitcache.errors import CacheError, FormatVersionError, ShardCorruptError
from logitcache.table import FrequencyTable, build_table
from logitcache.topk import SparseRows

# R rows, N entries of all rows together, K entries of a row where all have the same number.

DEFAULT_LEVEL = 9
HIGHEST_LEVEL = 19  # 22 saves nothing more
VERSION = 1

_MAGIC = b"LK"
_HEADER = struct.Struct("<2s10B3I")
_CRC = struct.Struct("<I")
_STORED, _EXACT = 1, 2
_GRIDS = (6, 7)  # bits below one nat; the finer where the coarser costs more than _GRID_KL
_GRID_KL = 4e-6  # nats, mean of a block; half a step of 2^-7 costs 2.6e-6 at most
_COARSE_GRID = 4  # bf16 logits are multiples of 2^-4 nat or coarser: the plane of the finer bits is all but zeros
_TAIL_GRID = 7  # a step of 2^-7 in the tail's log odds costs 6e-7 nat on average
_MAX_STEPS = 0xFFFF


class _Header(NamedTuple):
    magic: bytes
    version: int
    flags: int
    grid: int  # values are multiples of 2^-grid nat
    fine_bits: int  # steps = coarse << fine_bits + fine
    tail_width: int  # planes of each kind
    count_width: int  # 0: all rows have N / R entries
    id_width: int
    fine_width: int
    residual_width: int
    reserved: int
    R: int
    N: int
    table_id: int  # 0: ids are stored as they are

    @property
    def exact(self) -> bool:
        return bool(self.flags & _EXACT)

    @property
    def raw_size(self) -> int:
        per_row = self.tail_width + self.count_width + (4 if self.exact else 0)
        return self.R * per_row + self.N * (self.id_width + 1 + self.fine_width + self.residual_width)


def encode(
    rows: SparseRows, *, level: int = DEFAULT_LEVEL, exact: bool = False, table: FrequencyTable | None = None
) -> bytes:
    """One self-describing block.

    Args:
        rows: at least one entry in each; ids of a row differ; entries of equal log-probability are read back by id.
        level: of zstd, 1 to 22.
        exact: log-probabilities and tails are read back bit for bit. Otherwise within 2^-7 nat of each other, and
            5e-6 nat of KL on average.
        table: the order of ids by frequency; reading needs the same.
    Raises: CacheError for rows that no teacher gives: empty, not descending, not finite, an id twice or negative, or
        outside the table's vocabulary.
    """
    R, N = len(rows), len(rows.ids)
    table_id = 0 if table is None else table.table_id
    if R == 0:
        return _seal(_Header(_MAGIC, VERSION, _STORED, *[0] * 10, table_id), b"")
    counts, starts, ends = rows.counts, rows.offsets[:-1], rows.offsets[1:] - 1
    _check(rows)
    K = int(counts[0]) if (counts == counts[0]).all() else 0
    rank_N = rows.ids if table is None else _ranks(rows.ids, table)
    # by rank inside each row, values carried along as their bits
    pair_N = _sort_rows(rank_N.astype(np.int64) << 32 | rows.logprobs.view(np.uint32), rows.offsets, K)
    rank_N, logprob_N = pair_N >> 32, pair_N.astype(np.uint32).view(np.float32)
    delta_N = np.diff(rank_N, prepend=0)
    delta_N[starts] = rank_N[starts]
    inner_N = np.ones(N, bool)
    inner_N[starts] = False
    if not delta_N[inner_N].all():
        raise CacheError("a row holds an id twice; pass the engine's top k without the realised token")

    last_R = rows.logprobs[ends].astype(np.float64)
    above_N = logprob_N.astype(np.float64) - np.repeat(last_R, counts)
    reach_R = rows.logprobs[starts] - last_R
    prob_N = np.exp(logprob_N)
    for grid in _GRIDS:
        # what lies 2^16 steps below the top has no probability left to lose
        excess_R = np.maximum(np.rint(reach_R * 2**grid) - _MAX_STEPS, 0)
        step_N = np.maximum(np.rint(above_N * 2**grid) - np.repeat(excess_R, counts), 0)
        if exact or _rounding_kl(prob_N, step_N * 2.0**-grid - above_N, starts).mean() <= _GRID_KL:
            break
    fine_bits = grid - _COARSE_GRID
    step_N = step_N.astype(np.uint32)
    coarse_N = np.minimum(step_N >> fine_bits, 255)
    fine_N = step_N - (coarse_N << fine_bits)
    residual_N = np.zeros(0, np.uint32)
    if exact:
        residual_N = _zigzag(_ordered(logprob_N) - _ordered(_predict(last_R, step_N, grid, counts)))
        tail_R, extra = rows.log_tail.view(np.uint32), planes.split(rows.logprobs[ends].view(np.uint32), 4)
    else:
        tail_R, extra = _tail_code(rows, starts), []
    widths = (
        4 if exact else 2,
        0 if K else planes.width_of(counts),
        max(1, planes.width_of(delta_N)),
        planes.width_of(fine_N),
        planes.width_of(residual_N),
    )
    parts = [
        *planes.split(tail_R, widths[0]),
        *extra,
        *planes.split(counts, widths[1]),
        *planes.split(delta_N, widths[2]),
        *planes.split(coarse_N, 1),
        *planes.split(fine_N, widths[3]),
        *planes.split(residual_N, widths[4]),
    ]
    payload = planes.compress(parts, level)
    flags = (_EXACT if exact else 0) | (_STORED if payload is None else 0)
    header = _Header(_MAGIC, VERSION, flags, grid, fine_bits, *widths, 0, R, N, table_id)
    return _seal(header, b"".join(parts) if payload is None else payload)


def decode(block: bytes | memoryview, *, table: FrequencyTable | None = None) -> SparseRows:
    """The rows of one block, each descending, equal values by id.

    Raises: ShardCorruptError where the bytes are not what encode wrote; FormatVersionError for a later version;
        CacheError where the block was written with another table. The caller knows the file and adds its name.
    """
    header, raw = _open(block, table)
    R, N = header.R, header.N
    if R == 0:
        return SparseRows.concatenate([])
    at = R * header.tail_width
    tail_R = planes.join(raw, 0, R, header.tail_width)
    last_R = planes.join(raw, at, R, 4).view(np.float32) if header.exact else None
    at += 4 * R if header.exact else 0
    if header.count_width:
        counts, K = planes.join(raw, at, R, header.count_width).astype(np.int64), 0
        if int(counts.sum()) != N or not counts.all():
            raise ShardCorruptError(f"the rows of a top-k block do not add up to its {N} entries")
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    else:
        counts, K = N // R, N // R
        offsets = np.arange(0, N + 1, K)
    at += R * header.count_width
    id_N = _ids(planes.join(raw, at, N, header.id_width), offsets, K, table)
    at += N * header.id_width
    step_N = raw[at : at + N].astype(np.int32)
    if header.fine_bits:
        step_N <<= header.fine_bits
    at += N
    if header.fine_width:
        step_N += planes.join(raw, at, N, header.fine_width)
    at += N * header.fine_width
    if last_R is not None:
        residual_N = planes.join(raw, at, N, header.residual_width)
        ordered_N = _ordered(_predict(last_R.astype(np.float64), step_N, header.grid, counts)) + _unzigzag(residual_N)
        pair_N = _sort_rows((-ordered_N.astype(np.int64) << 31) + id_N, offsets, K)
        id_N = (pair_N & 0x7FFFFFFF).astype(np.int32)
        return SparseRows(offsets, id_N, _unordered((-(pair_N >> 31)).astype(np.int32)), tail_R.view(np.float32))

    id_bits = (len(table.class_V) - 1 if table is not None else int(id_N.max())).bit_length()
    if int(step_N.max()).bit_length() + id_bits > 31:
        step_N = step_N.astype(np.int64)
    step_N <<= id_bits
    pair_N = _sort_rows(id_N - step_N, offsets, K)  # most steps first, then the smallest id
    id_N = (pair_N & ((1 << id_bits) - 1)).astype(np.int32, copy=False)
    pair_N >>= id_bits
    log_tail_R, log_support_R = _tails(tail_R)
    return SparseRows(offsets, id_N, _renormalise(pair_N, header.grid, offsets, K, log_support_R), log_tail_R)


def share_table(
    blocks: Sequence[bytes], vocab_size: int, *, level: int = DEFAULT_LEVEL
) -> tuple[list[bytes], FrequencyTable | None]:
    """Blocks written without a table once more, with the one that fits them; none where it would not pay.

    Nothing is lost on the way: what decode gives, encode keeps. Exact blocks stay exact.
    """
    count_V = np.zeros(vocab_size, np.int64)
    for block in blocks:
        ids = decode(block).ids
        if len(ids) and int(ids.max()) >= vocab_size:
            raise CacheError(f"a row holds id {ids.max()}, outside a vocabulary of {vocab_size}")
        count_V += np.bincount(ids, minlength=vocab_size)
    table = build_table(count_V)
    smaller = [encode(decode(block), level=level, exact=bool(block[3] & _EXACT), table=table) for block in blocks]
    if sum(map(len, smaller)) + len(table.to_bytes()) < sum(map(len, blocks)):
        return smaller, table
    return list(blocks), None


def _seal(header: _Header, payload: bytes) -> bytes:
    body = _HEADER.pack(*header) + payload
    return body + _CRC.pack(zlib.crc32(body))


def _open(block: bytes | memoryview, table: FrequencyTable | None) -> tuple[_Header, np.ndarray]:
    """Header and planes, every count checked against the bytes there are before memory is taken."""
    view = memoryview(block)
    if len(view) < _HEADER.size + _CRC.size:
        raise ShardCorruptError(f"a top-k block of {len(view)} bytes is shorter than its header")
    header = _Header(*_HEADER.unpack_from(view))
    if header.magic != _MAGIC:
        raise ShardCorruptError(f"a top-k block begins with {header.magic!r}, expected {_MAGIC!r}")
    if header.version > VERSION:
        raise FormatVersionError(
            f"a top-k block has version {header.version}, this logitcache reads up to {VERSION}: upgrade it"
        )
    body, payload = view[: -_CRC.size], view[_HEADER.size : -_CRC.size]
    if zlib.crc32(body) != _CRC.unpack_from(view, len(body))[0]:
        raise ShardCorruptError("a top-k block does not match its checksum")
    sane = header.version == VERSION and (
        not any(header[4:13])
        if header.R == 0
        else header.version == VERSION
        and header.flags <= (_STORED | _EXACT)
        and header.grid <= 16
        and header.fine_bits <= 8
        and header.tail_width == (4 if header.exact else 2)
        and header.count_width <= 4
        and 1 <= header.id_width <= 4
        and header.fine_width <= 2
        and header.residual_width <= (4 if header.exact else 0)
        and header.reserved == 0
        and 1 <= header.R <= header.N
        and (header.count_width > 0 or header.N % header.R == 0)
    )
    if not sane:
        raise ShardCorruptError("the header of a top-k block contradicts itself")
    if header.table_id != (0 if table is None else table.table_id):
        given = "none was given" if table is None else f"{table.table_id:08x} was given"
        raise CacheError(
            f"a top-k block needs frequency table {header.table_id:08x}, {given}: read it with its shard's"
        )
    if header.flags & _STORED:
        if len(payload) != header.raw_size:
            raise ShardCorruptError(f"a top-k block holds {len(payload)} bytes, its counts say {header.raw_size}")
        return header, np.frombuffer(payload, np.uint8)
    return header, np.frombuffer(planes.decompress(payload, header.raw_size), np.uint8)


def _check(rows: SparseRows) -> None:
    if int(rows.counts.min()) < 1:
        raise CacheError("a row holds no entry; keep at least one")
    if not (np.isfinite(rows.logprobs).all() and (rows.log_tail <= 0).all()):
        raise CacheError("a row holds a log-probability that is not finite, or a tail above 1")
    if int(rows.ids.min()) < 0:
        raise CacheError("a row holds a negative id")
    ascent_N = rows.logprobs[1:] > rows.logprobs[:-1]
    ascent_N[rows.offsets[1:-1] - 1] = False
    if ascent_N.any():
        raise CacheError("a row's log-probabilities do not descend; sort it with topk.from_topk")


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
        rank_N = np.cumsum(delta_N.reshape(-1, K), axis=1, dtype=np.int64).ravel()
    else:
        rank_N = np.cumsum(delta_N, dtype=np.int64)
        start_R = offsets[:-1]
        rank_N -= np.repeat(rank_N[start_R] - delta_N[start_R], np.diff(offsets))
    if table is not None:
        try:
            return table.id_of_rank.take(rank_N)
        except IndexError:
            raise ShardCorruptError("a top-k block holds a rank outside its frequency table") from None
    if int(rank_N.max()) > 0x7FFFFFFF:
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


def _tail_code(rows: SparseRows, starts: np.ndarray) -> np.ndarray:
    """Log odds of the tail on a grid, 1 to 65535; 0 where the row leaves nothing out."""
    top_R = rows.logprobs[starts].astype(np.float64)
    below_N = rows.logprobs - np.repeat(top_R, rows.counts)
    odds_R = rows.log_tail - (top_R + np.log(np.add.reduceat(np.exp(below_N), starts)))
    code_R = 32768 + np.clip(np.rint(odds_R * 2**_TAIL_GRID), -32767, 32767)
    return np.where(np.isneginf(rows.log_tail), 0, code_R).astype(np.uint32)


def _tails(code_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the tail's mass, float32 [R], and of the support's, float64 [R]."""
    odds_R = (code_R.astype(np.float64) - 32768) * 2.0**-_TAIL_GRID
    odds_R[code_R == 0] = -np.inf
    larger_R = np.log1p(np.exp(-np.abs(odds_R)))  # minus the log of the larger of the two masses
    return (np.minimum(odds_R, 0) - larger_R).astype(np.float32), -np.maximum(odds_R, 0) - larger_R


def _renormalise(
    minus_step_N: np.ndarray, grid: int, offsets: np.ndarray, K: int, log_support_R: np.ndarray
) -> np.ndarray:
    """Log-probabilities, float32 [N], of rows whose steps are sorted and whose masses are given."""
    scale = np.float32(2.0**-grid)
    if K:
        step_RK = minus_step_N.reshape(-1, K)
        value_RK = (step_RK[:, :1] - step_RK).astype(np.float32)
        value_RK *= scale
        mass_R = np.exp(value_RK) @ np.ones(K, np.float32)
        value_RK += (log_support_R - np.log(mass_R)).astype(np.float32)[:, None]
        return value_RK.ravel()
    counts, starts = np.diff(offsets), offsets[:-1]
    value_N = (np.repeat(minus_step_N[starts], counts) - minus_step_N).astype(np.float32)
    value_N *= scale
    mass_R = np.add.reduceat(np.exp(value_N), starts)
    value_N += np.repeat((log_support_R - np.log(mass_R)).astype(np.float32), counts)
    return value_N


def _predict(last_R: np.ndarray, step_N: np.ndarray, grid: int, counts) -> np.ndarray:
    return (np.repeat(last_R, counts) + step_N * 2.0**-grid).astype(np.float32)


def _ordered(value_N: np.ndarray) -> np.ndarray:
    """Float32 as int32 in the same order: neighbouring floats are neighbouring integers."""
    bits_N = value_N.view(np.int32)
    return bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)


def _unordered(bits_N: np.ndarray) -> np.ndarray:
    return (bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)).view(np.float32)


def _zigzag(value_N: np.ndarray) -> np.ndarray:
    """Int32 as uint32 with small numbers of either sign small."""
    return ((value_N << 1) ^ (value_N >> 31)).view(np.uint32)


def _unzigzag(code_N: np.ndarray) -> np.ndarray:
    code_N = code_N.astype(np.uint32)
    return ((code_N >> 1) ^ (0 - (code_N & 1))).view(np.int32)
