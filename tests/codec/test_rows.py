import math
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from benchmarks import bench_codec
from logitcache import sparse_rows
from logitcache.cache.writer import new_cache
from logitcache.codec import block as block_module
from logitcache.codec.frequency_table import FrequencyTable, build_table
from logitcache.codec.rows import HIGHEST_LEVEL, decode, encode
from logitcache.errors import CacheError, FormatVersionError, LogitcacheError, ShardCorruptError
from logitcache.identity import Identity
from logitcache.sections import Sections
from logitcache.sparse_rows import SparseRows, bucketed_kl
from logitcache.trace import Trace

# R rows, K kept ids, V vocabulary.
GOLDEN = Path(__file__).parents[1] / "golden"


def rows_from(logprobs_RK, log_tail_R, vocab_size=151_936, seed=0):
    """Rows with ids drawn as a vocabulary is used: few often, most seldom."""
    rng = np.random.default_rng(seed)
    R, K = logprobs_RK.shape
    ids_RK = np.empty((R, K), np.int32)
    for r in range(R):
        drawn = np.unique((vocab_size ** rng.random(4 * K + 64)).astype(np.int64) - 1)
        ids_RK[r] = rng.permutation(drawn)[:K]
    logprobs_RK = -np.sort(-logprobs_RK.astype(np.float32), axis=1)
    return SparseRows(
        np.arange(R + 1, dtype=np.int64) * K, ids_RK.ravel(), logprobs_RK.ravel(), log_tail_R.astype(np.float32)
    )


def normalised(values_RK, tail_R):
    """Log-probabilities in the proportions of e^values that leave `tail_R` out."""
    log_mass_R = np.log(np.exp(values_RK - values_RK.max(axis=1, keepdims=True)).sum(axis=1))
    return values_RK - values_RK.max(axis=1, keepdims=True) + (np.log1p(-tail_R) - log_mass_R)[:, None]


def synthetic(shape, vocab_size=151_936, R=256, K=64, seed=0):
    """Continuous or bf16 rows with tails from 1e-9 to 0.99."""
    rng = np.random.default_rng(seed)
    tail_R = 1 / (1 + np.exp(-rng.uniform(-20.7, 4.6, R)))
    if shape == "power law":
        values_RK = -rng.uniform(0.5, 3, (R, 1)) * np.log(np.arange(1, K + 1)) + rng.normal(0, 0.05, (R, K))
    elif shape == "flat":
        values_RK = rng.uniform(0, 0.05, (R, K))
    elif shape == "peaked":
        values_RK = rng.normal(0, 1.5, (R, K))
        values_RK[:, 0] += rng.uniform(5, 40, R)
    else:
        values_RK = np.sort(rng.normal(12, 3, (R, K)).astype(np.float32)).view(np.uint32) + 0x8000 & 0xFFFF0000
        values_RK = values_RK.astype(np.uint32).view(np.float32).astype(np.float64)
    return rows_from(normalised(values_RK, tail_R), np.log(tail_R), vocab_size, seed)


def ragged(seed=0, R=200):
    """Rows of 1 to 64 entries, among them one of one entry and one complete."""
    rows = sparse_rows.trim(synthetic("power law", R=R, seed=seed), top_p=0.7)
    assert (rows.counts.min(), rows.counts.max()) == (1, 64)
    complete = SparseRows(
        np.array([0, 1]), np.array([7], np.int32), np.zeros(1, np.float32), np.array([-np.inf], np.float32)
    )
    return SparseRows.concatenate([rows[:50], complete, rows[50:]])


def canonical(rows):
    """Entries of equal log-probability by id, as decode gives them."""
    row_N = np.repeat(np.arange(len(rows)), rows.counts)
    order_N = np.lexsort((rows.ids, -rows.logprobs, row_N))
    return rows.ids[order_N], rows.logprobs[order_N].view(np.uint32)


PINS = [2, 151_643, 151_645]


def pinned(above_last, tail=0.01, R=120, K=48, ragged=False, seed=0):
    """Rows of K ids and PINS, these `above_last` nats above the row's smallest; where ragged, of 1 to K and PINS."""
    rng = np.random.default_rng(seed)
    values_RK = -np.sort(-rng.normal(0, 2.5, (R, K)), axis=1)
    log_tail_R = np.full(R, np.log(tail), np.float32)
    pin_values_RE = values_RK[:, -1:] + above_last + rng.normal(0, 1, (R, len(PINS)))
    logprobs_RK = normalised(np.concatenate([values_RK, pin_values_RE], axis=1), np.full(R, tail)).astype(np.float32)
    drawn = rng.permuted(np.tile(np.setdiff1d(np.arange(0, 150_000, 97), PINS), (R, 1))[:, : 4 * K], axis=1)[:, :K]
    ids_RK = np.concatenate([drawn, np.tile(PINS, (R, 1))], axis=1).astype(np.int32)
    order_RK = np.argsort(-logprobs_RK, axis=1, kind="stable")
    ids_RK, logprobs_RK = np.take_along_axis(ids_RK, order_RK, 1), np.take_along_axis(logprobs_RK, order_RK, 1)
    rows = SparseRows(np.arange(R + 1) * (K + len(PINS)), ids_RK.ravel(), logprobs_RK.ravel(), log_tail_R)
    if not ragged:
        return rows
    place_RK = np.cumsum(~np.isin(ids_RK, PINS), axis=1)
    return sparse_rows.keep(rows, (np.isin(ids_RK, PINS) | (place_RK <= 1 + np.arange(R)[:, None] % K)).ravel())


def table_for(rows, vocab_size=151_936):
    return build_table(np.bincount(rows.ids, minlength=vocab_size))


def forged(data, **fields):
    """A block with other header fields and a checksum that fits them."""
    magic, version, *values = block_module._LAYOUT.unpack_from(data)
    header = block_module.Header(*values)._replace(**{k: v for k, v in fields.items() if k != "version"})
    start = block_module._LAYOUT.pack(magic, fields.get("version", version), *header)
    return resealed(start + data[len(start) : -4])


def resealed(body):
    return body + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize("shape", ["power law", "flat", "peaked", "bf16"])
@pytest.mark.parametrize("vocab_size", [151_936, 262_144])
def test_what_is_read_back_is_the_captured_distribution(shape, vocab_size):
    rows = synthetic(shape, vocab_size)
    for table in (None, table_for(rows, vocab_size)):
        kl_R = bucketed_kl(rows, decode(encode(rows, table=table), table=table))
        assert kl_R.mean() <= 1e-5
        assert kl_R.max() <= 1e-3


def test_a_bf16_teacher_loses_next_to_nothing():
    rows = synthetic("bf16")
    assert bucketed_kl(rows, decode(encode(rows))).mean() < 1e-6


def test_rows_that_round_badly_get_the_finer_grid():
    R, K = 64, 64  # a plateau with next to no tail: every entry carries mass, and none is on the grid
    rng = np.random.default_rng(0)
    rows = rows_from(normalised(rng.uniform(0, 1, (R, K)), np.full(R, 1e-9)), np.full(R, np.log(1e-9)))
    data = encode(rows)
    assert block_module.read_header(data).grid == 7
    assert bucketed_kl(rows, decode(data)).mean() <= 5e-6


def test_support_and_tail_sum_to_one():
    for rows in (synthetic("peaked"), ragged()):
        read = decode(encode(rows))
        mass_R = np.add.reduceat(np.exp(read.logprobs.astype(np.float64)), read.offsets[:-1])
        assert np.abs(mass_R + np.exp(read.log_tail.astype(np.float64)) - 1).max() < 3e-6


@pytest.mark.parametrize("log_tail", [-np.inf, -80.0, -20.7, -1.0, -0.01, -1e-4])
def test_tails_of_every_size_survive(log_tail):
    tail_R = np.exp(np.full(3, log_tail))
    rows = rows_from(normalised(-np.ones((3, 1)) * np.arange(16), tail_R), np.full(3, log_tail))
    read = decode(encode(rows))
    assert np.array_equal(np.isneginf(read.log_tail), np.isneginf(rows.log_tail))
    assert bucketed_kl(rows, read).max() < 1e-5


def test_exact_keeps_every_bit():
    for rows in (synthetic("power law"), synthetic("bf16"), synthetic("peaked"), ragged()):
        read = decode(encode(rows, exact=True))
        assert np.array_equal(read.offsets, rows.offsets)
        assert all(map(np.array_equal, canonical(read), canonical(rows)))
        assert np.array_equal(read.log_tail, rows.log_tail)
        assert np.array_equal(canonical(read)[0], read.ids)


def test_ragged_rows_come_back_in_their_lengths_and_order():
    rows = ragged()
    for table in (None, table_for(rows)):
        read = decode(encode(rows, table=table), table=table)
        assert np.array_equal(read.offsets, rows.offsets)
        kl_R = bucketed_kl(rows, read)
        assert kl_R.mean() <= 1e-5
        assert kl_R.max() <= 3.1e-5  # half a step of 2^-6 either way, at worst
        inner_N = np.ones(len(read.ids), bool)
        inner_N[read.offsets[:-1]] = False
        assert (np.diff(read.logprobs, prepend=0)[inner_N] <= 0).all()


@pytest.mark.parametrize("above_last", [-60.0, -20.0, 3.0, 17.0])
@pytest.mark.parametrize("ragged", [False, True])
def test_pinned_ids_of_any_rank_come_back_in_their_places(above_last, ragged):
    for tail in (1e-9, 0.01, 0.99):
        rows = pinned(above_last, tail, ragged=ragged)
        others = rows.ids[~np.isin(rows.ids, PINS)]
        for table in (None, build_table(np.bincount(others, minlength=151_936))):
            read = decode(encode(rows, table=table, pinned=PINS), table=table)
            kl_R = bucketed_kl(rows, read)
            assert kl_R.mean() <= 1e-5
            assert kl_R.max() <= 1e-3
            same = decode(encode(rows))
            assert np.abs(read.logprobs - same.logprobs).max() <= 2.0**-5
            assert np.array_equal(read.log_tail, same.log_tail)
            again = decode(encode(read, pinned=PINS))
            assert np.array_equal(read.ids, again.ids)
            assert np.abs(read.logprobs - again.logprobs).max() < 2e-5
        exact = decode(encode(rows, exact=True, pinned=PINS[::-1]))
        assert all(map(np.array_equal, canonical(exact), canonical(rows)))
        assert np.array_equal(exact.log_tail, rows.log_tail)


def test_a_pinned_id_may_hold_nearly_all_mass_or_none():
    for value in (-3000.0, -400.0, 400.0, 3000.0):
        rows = pinned(value)
        read = decode(encode(rows, pinned=PINS))
        assert np.isfinite(read.logprobs).all()
        assert bucketed_kl(rows, read).max() < 1e-4


def test_pinned_ids_stored_apart_take_less():
    rows = pinned(-20.0)
    assert len(encode(rows, pinned=PINS)) < len(encode(rows)) - 1.5 * len(rows)


def test_rows_without_their_pinned_ids_are_refused():
    rows = pinned(-20.0, R=4)
    table = build_table(np.ones(151_645, np.int64))
    for ids, message in (
        ([*PINS, 5], "the pinned id 5 exactly once"),
        ([-1, 2], "pin at most 255"),
        (range(300), "at most 255"),
    ):
        with pytest.raises(CacheError, match=message):
            encode(rows, pinned=ids)
    with pytest.raises(CacheError, match="in 0..151644"):
        encode(rows, pinned=PINS, table=table)
    alone = sparse_rows.keep(rows, np.isin(rows.ids, PINS))
    with pytest.raises(CacheError, match="only pinned ids"):
        encode(alone, pinned=PINS)


def test_a_pinned_id_twice_or_among_the_others_is_refused():
    rows = pinned(-20.0, R=4, K=4)
    other = int(rows.ids[~np.isin(rows.ids, PINS)][0])
    data = encode(rows, pinned=PINS)
    start = len(data) - 4 - sum(c * w for c, w in block_module.read_header(data).planes) + 4 * 2
    assert block_module.read_header(data).flags == block_module.STORED
    for ids in ([1, 1, 3], [3, 1, 4], [1, 3, 2**31], sorted([other, 200_000, 200_001])):
        bad = bytearray(data[:-4])
        bad[start : start + 12] = struct.pack("<3I", *ids)
        with pytest.raises(ShardCorruptError, match="pin"):
            decode(resealed(bytes(bad)))


def test_one_long_row_among_many_short_ones():
    long = synthetic("power law", R=1, K=4000)
    short = sparse_rows.fold(synthetic("power law", R=600), 1)
    rows = SparseRows.concatenate([short[:300], long, short[300:]])
    read = decode(encode(rows))
    assert np.array_equal(read.offsets, rows.offsets)
    assert bucketed_kl(rows, read).max() < 1e-4


def test_rows_of_one_entry_and_no_rows_at_all():
    one = sparse_rows.fold(synthetic("peaked"), 1)
    assert bucketed_kl(one, decode(encode(one))).max() < 1e-5
    table = table_for(one)
    assert len(decode(encode(one[:0]))) == 0
    assert len(decode(encode(one[:0], table=table, exact=True), table=table)) == 0


def test_ids_up_to_the_end_of_int32_do_not_wrap():
    ids = np.array([2**31 - 1, 0, 131_072, 2**31 - 2, 65_536, 2**24], np.int32)
    rows = SparseRows(
        np.array([0, 6]),
        ids,
        np.log(np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05], np.float32)),
        np.log(np.array([0.1], np.float32)),
    )
    for exact in (False, True):
        assert decode(encode(rows, exact=exact)).ids.tolist() == [2**31 - 1, 0, 131_072, 2**31 - 2, 65_536, 2**24]
    wide = SparseRows(rows.offsets, ids.astype(np.int64) + 1, rows.logprobs, rows.log_tail)
    with pytest.raises(CacheError, match=r"outside 0\.\.2147483647"):
        encode(wide)


def test_values_thousands_of_nats_apart_keep_their_order():
    logprobs = np.array([[0.0, -30.0, -900.0, -5000.0, -80_000.0]])
    rows = rows_from(logprobs, np.array([-90_000.0]))
    read = decode(encode(rows))
    assert read.ids[:2].tolist() == rows.ids[:2].tolist()
    assert np.isfinite(read.logprobs).all()
    assert bucketed_kl(rows, read)[0] < 1e-9


def test_writing_again_what_was_read_loses_nothing_more():
    for rows in (synthetic("power law"), synthetic("bf16"), ragged()):
        once = decode(encode(rows))
        twice = decode(encode(once, table=table_for(rows)), table=table_for(rows))
        assert np.array_equal(once.ids, twice.ids)
        assert np.abs(once.logprobs - twice.logprobs).max() < 1e-5
        assert np.array_equal(once.log_tail, twice.log_tail)


def test_rows_a_thousand_times_the_same_are_read_back():
    row = synthetic("power law", R=1)
    rows = SparseRows.concatenate([row] * 2000)
    data = encode(rows)
    assert np.array_equal(np.tile(decode(encode(row)).ids, 2000), decode(data).ids)


def test_every_level_reads_the_same():
    rows = synthetic("bf16", R=40)
    reads = [decode(encode(rows, level=level)) for level in (1, 3, HIGHEST_LEVEL, 22)]
    assert all(np.array_equal(read.logprobs, reads[0].logprobs) for read in reads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: SparseRows(rows.offsets, rows.ids, rows.logprobs[::-1].copy(), rows.log_tail),
            "not in descending order",
        ),
        (lambda rows: SparseRows(rows.offsets, rows.ids * 0, rows.logprobs, rows.log_tail), "an id twice"),
        (lambda rows: SparseRows(rows.offsets, -1 - rows.ids, rows.logprobs, rows.log_tail), "outside 0"),
        (lambda rows: SparseRows(rows.offsets, rows.ids, rows.logprobs - np.inf, rows.log_tail), "not finite"),
        (lambda rows: SparseRows(rows.offsets, rows.ids, rows.logprobs, rows.log_tail * np.nan), "not finite"),
        (lambda rows: SparseRows(np.insert(rows.offsets, 0, 0), *_one_more(rows)), "no entries"),
    ],
)
def test_rows_no_teacher_gives_are_refused(change, message):
    with pytest.raises(CacheError, match=message):
        encode(change(synthetic("power law", R=3)))


def _one_more(rows):
    return rows.ids, rows.logprobs, np.append(rows.log_tail, rows.log_tail[:1])


def test_a_block_is_read_with_the_table_it_was_written_with():
    rows = synthetic("power law", R=20)
    table = table_for(rows)
    other = table_for(synthetic("power law", R=20, seed=1))
    data = encode(rows, table=table)
    assert np.array_equal(decode(data, table=FrequencyTable.from_bytes(table.to_bytes())).ids, decode(encode(rows)).ids)
    for wrong in (None, other):
        with pytest.raises(CacheError, match=f"needs frequency table {table.table_id:08x}"):
            decode(data, table=wrong)
    with pytest.raises(CacheError, match="its frequency table has 100 ids"):
        encode(rows, table=build_table(np.ones(100, np.int64)))


def test_a_table_makes_blocks_smaller():
    rows = synthetic("bf16")
    assert len(encode(rows, table=table_for(rows))) < 0.95 * len(encode(rows))


def test_a_damaged_table_is_refused():
    data = table_for(synthetic("power law", R=20)).to_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(data)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        try:
            table = FrequencyTable.from_bytes(bytes(bad))
        except ShardCorruptError:
            continue
        assert table.to_bytes() == data  # a bit that zstd does not use
    for bad in (b"", data[:-1], data + b"x"):
        with pytest.raises(ShardCorruptError):
            FrequencyTable.from_bytes(bad)


def test_every_flipped_bit_of_a_block_is_found():
    data = encode(sparse_rows.fold(synthetic("bf16", R=12), 8))
    for position in range(len(data)):
        for bit in range(8):
            bad = bytearray(data)
            bad[position] ^= 1 << bit
            with pytest.raises((ShardCorruptError, FormatVersionError)):
                decode(bytes(bad))


def test_a_block_cut_short_or_grown_is_refused():
    data = encode(synthetic("bf16", R=4))
    for bad in (b"", data[:10], data[:-1], data[:-100], data + b"\0", data * 2):
        with pytest.raises(ShardCorruptError):
            decode(bad)


def test_a_later_version_is_refused_by_name():
    data = forged(encode(synthetic("bf16", R=4)), version=9)
    with pytest.raises(FormatVersionError, match="version 9, this logitcache reads versions up to 1"):
        decode(data)


@pytest.mark.parametrize(
    "fields",
    [
        {"N": 2**32 - 1, "R": 1},
        {"N": 2**32 - 64, "R": 2**26 - 1},
        {"R": 0},
        {"R": 2**32 - 1},
        {"id_width": 0},
        {"id_width": 4},
        {"fine_width": 2},
        {"count_width": 1},
        {"flags": 1},
        {"flags": 2},
        {"grid": 255},
        {"fine_bits": 32},
        {"E": 1},
        {"E": 255},
        {"version": 0},
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(fields):
    data = forged(encode(synthetic("bf16", R=8)), **fields)
    tracemalloc.start()
    with pytest.raises(ShardCorruptError):
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_frame_that_expands_too_far_is_refused():
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    R = (1 << 24) // 4  # one entry a row: two planes of tails, one of ids, one of values
    header = block_module.Header(0, 6, 2, 2, 0, 1, 0, 0, 0, R, R, 0)
    tracemalloc.start()
    with pytest.raises(ShardCorruptError):
        decode(resealed(block_module._LAYOUT.pack(b"LK", 1, *header) + bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_random_and_mutated_blocks_give_an_error_of_ours_or_rows():
    rng = np.random.default_rng(0)
    rows = ragged(R=100)
    table = table_for(rows)
    originals = [
        encode(rows[:30]),
        encode(rows[:30], exact=True),
        encode(rows[60:90], table=table),
        encode(synthetic("bf16", R=20)),
        encode(synthetic("flat", R=1, K=4)),  # stored: too small to compress
        encode(pinned(-20.0, R=20), pinned=PINS),
        encode(pinned(-20.0, R=20, ragged=True), pinned=PINS, table=table),
        encode(pinned(-20.0, R=20), pinned=PINS, exact=True),
    ]
    outcomes = {True: 0, False: 0}
    for i in range(3000):
        data = bytearray(originals[i % 8])
        if i % 10 == 0:
            data = bytearray(rng.bytes(int(rng.integers(0, 400))))
        for _ in range(int(rng.integers(1, 5))):
            if data:
                data[rng.integers(len(data))] = rng.integers(256)
        if i % 3:  # past the checksum, to what lies behind it
            data = bytearray(b"LK\x01") + data[3:-4]
            data = bytearray(resealed(bytes(data)))
        try:
            read = decode(bytes(data), table=table if i % 8 in (2, 6) else None)
        except LogitcacheError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        assert len(read.ids) == len(read.logprobs) == read.offsets[-1] <= 64 * len(data)
        assert len(read.ids) == 0 or read.ids.min() >= 0
    assert min(outcomes.values()) > 50


def second_reader(data, table=b""):
    """Rows of a block as lists of (logprob, id), and log tails: FORMAT.md word for word, nothing of ours."""
    assert data[:3] == b"LK\x01"
    assert zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
    flags, grid, fine_bits, tail_width, count_width, id_width, fine_width, residual_width, E = data[3:12]
    R, N, table_id = struct.unpack("<3I", data[12:24])
    stored, exact = flags & 1, flags & 2
    raw = data[24:-4] if stored else zstandard.ZstdDecompressor().decompress(data[24:-4])
    id_of_rank = None
    if table_id:
        classes = zstandard.ZstdDecompressor().decompress(table)
        assert table_id == zlib.crc32(classes)
        id_of_rank = np.argsort(np.frombuffer(classes, np.uint8), kind="stable").tolist()
    at = 0

    def integers(count, width):
        nonlocal at
        planes = [raw[at + w * count : at + (w + 1) * count] for w in range(width)]
        at += width * count
        return [sum(plane[i] << 8 * w for w, plane in enumerate(planes)) for i in range(count)]

    def as_float(bits):
        return struct.unpack("<f", struct.pack("<I", bits % 2**32))[0]

    def ordered(bits):
        return bits ^ 0x7FFFFFFF if bits & 0x80000000 else bits

    tails = integers(R, tail_width)
    lasts = integers(R, 4) if exact else []
    counts = integers(R, count_width) if count_width else [N // R] * R if R else []
    pins = list(struct.unpack(f"<{E}I", raw[at : at + 4 * E]))
    at += 4 * E
    pin_values = integers(E * R, tail_width)
    distances, coarse = integers(N, id_width), integers(N, 1)
    fine, residuals = integers(N, fine_width), integers(N, residual_width)
    assert at == len(raw)
    rows, log_tails, start = [], [], 0
    for r, count in enumerate(counts):
        row = range(start, start + count)
        start += count
        ranks = np.cumsum([distances[i] for i in row]).tolist()
        ids = (ranks if id_of_rank is None else [id_of_rank[rank] for rank in ranks]) + pins
        steps = [((coarse[i] << fine_bits) + fine[i]) * 2.0**-grid for i in row]
        pinned_here = pin_values[r::R]
        if exact:
            bits = [struct.unpack("<I", struct.pack("<f", as_float(lasts[r]) + step))[0] for step in steps]
            signed = [(residuals[i] >> 1) ^ -(residuals[i] & 1) for i in row]
            logprobs = [as_float(ordered((ordered(b) + s) % 2**32)) for b, s in zip(bits, signed, strict=True)]
            logprobs += map(as_float, pinned_here)
            log_tails.append(as_float(tails[r]))
        else:
            steps += [(value - 32768) * 2.0**-grid for value in pinned_here]
            z = (tails[r] - 32768) / 128 if tails[r] else -math.inf
            log_tails.append(-np.logaddexp(0, -z))
            log_mass = max(steps) + math.log(sum(math.exp(step - max(steps)) for step in steps))
            logprobs = [step - log_mass - np.logaddexp(0, z) for step in steps]
        rows.append(sorted(zip(logprobs, ids, strict=True), key=lambda entry: (-entry[0], entry[1])))
    return rows, log_tails


@pytest.mark.parametrize("exact", [False, True])
def test_a_second_reader_written_from_the_format_text_agrees(exact):
    whole = [ragged(R=60)[40:60], synthetic("bf16", R=8), synthetic("peaked", R=8), ragged()[:0]]
    cases = [(rows, ()) for rows in whole] + [(pinned(-20.0, R=8), PINS), (pinned(9.0, R=8, ragged=True), PINS)]
    for rows, pins in cases:
        for table in (None, build_table(np.bincount(rows.ids % 5000, minlength=151_936))):
            data = encode(rows, exact=exact, table=table, pinned=pins)
            read = decode(data, table=table)
            expected, log_tails = second_reader(data, table.to_bytes() if table else b"")
            assert [len(row) for row in expected] == read.counts.tolist()
            assert [i for row in expected for _, i in row] == read.ids.tolist()
            tolerance = 0 if exact else 1e-5
            assert np.allclose([p for row in expected for p, _ in row], read.logprobs, rtol=0, atol=tolerance)
            assert np.allclose(log_tails, read.log_tail, rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", bench_codec.layouts(), ids=lambda layout: layout.name)
def test_every_layout_of_the_benchmark_reads_what_it_wrote(layout):
    rows = synthetic("bf16", vocab_size=100_000, R=60)
    traces = [rows[:20], sparse_rows.trim(rows[20:50], top_p=0.5), rows[50:]]
    read = layout.open(layout.write(traces))
    for i in (2, 0, 1):
        assert bucketed_kl(traces[i], read(i)).max() < 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_the_benchmark_measures_a_cache_that_pins_ids(tmp_path, exact):
    whole = Identity(
        teacher="t",
        teacher_revision="0",
        tokenizer_hash="0",
        chat_template_hash=None,
        vocab_size=151_936,
        top_k=48,
        top_p=None,
        min_k=1,
        prompt_logits=False,
        sampling={},
        reasoning_markers=None,
        answer_regex=None,
        dtype="float32",
        engine="none",
        engine_args={},
        pin_tokens=PINS,
        exact=exact,
    )
    with new_cache(tmp_path / "cache", whole, "test") as writer:
        for i in range(3):
            writer.add(trace_of(pinned(-20.0, R=30, seed=i), i))
    source = bench_codec.read_cache(tmp_path / "cache", 70)
    assert [len(rows) for rows in source.traces] == [30, 30, 10]
    assert (source.pinned, source.captured) == (PINS, exact)
    results = list(bench_codec.cases(source, [4, 48], [None, 0.9], seconds=0))
    assert len(results) == 4 * len(bench_codec.layouts(PINS, 151_936))
    assert all(r["kl_mean"] <= 1e-5 for r in results if r["layout"].startswith("logitcache"))
    assert all(r["kl_max"] == 0 for r in results if r["layout"] == "logitcache exact")
    path = tmp_path / "results.csv"
    for _ in range(2):
        bench_codec.append(results, source, path)
    assert len(path.read_text().splitlines()) == 1 + 2 * len(results)


def trace_of(rows, i):
    R = len(rows)
    return Trace(
        trace_id=f"{i:032x}",
        prompt_id=str(i),
        sample_index=0,
        token_ids=np.zeros(R + 1, np.int32),
        sections=Sections(1, 1, 1, 1, R + 1),
        row_start=1,
        rows=rows,
        token_logprob=np.full(R, np.nan, np.float32),  # unknown
        token_rank=np.zeros(R, np.int32),
        text="",
        finish_reason="stop",
    )


def test_ids_of_18_bits_are_refused_by_the_17_bit_layout():
    rows = synthetic("bf16", R=1)
    large = SparseRows(rows.offsets, rows.ids % 1000 + 131_072, rows.logprobs, rows.log_tail)
    with pytest.raises(ValueError, match="17 bits"):
        bench_codec.write_packed([large])


@pytest.mark.parametrize(
    "name", ["v1-dense", "v1-ragged", "v1-exact", "v1-table", "v1-empty", "v1-pinned", "v1-pinned-exact"]
)
def test_golden_blocks_of_every_version_stay_readable(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        table = FrequencyTable.from_bytes(golden["table"].tobytes()) if "table" in golden else None
        read = decode(golden["block"].tobytes(), table=table)
        assert np.array_equal(read.offsets, golden["offsets"])
        assert np.array_equal(read.ids, golden["ids"])
        assert np.allclose(read.logprobs, golden["logprobs"], rtol=0, atol=0 if "exact" in name else 1e-5)
        assert np.allclose(read.log_tail, golden["log_tail"], rtol=0, atol=0 if "exact" in name else 1e-5)


def test_rows_that_are_cut_from_a_block_on_the_finer_grid_stay_on_it() -> None:
    """Else a slice of a cache, whose other rows asked for the grid, would move values by half a step."""
    flat, peaked = synthetic("flat", R=300), synthetic("peaked", R=100)
    rows = decode(encode(SparseRows.concatenate([flat, peaked])))
    cut = rows[300:]
    again = decode(encode(cut))
    np.testing.assert_array_equal(again.ids, cut.ids)
    np.testing.assert_allclose(again.logprobs, cut.logprobs, rtol=0, atol=3e-6)


def test_small_blocks_that_are_written_again_lose_nothing() -> None:
    for seed in range(200):
        kind = ("flat", "power law", "peaked", "bf16")[seed % 4]
        rows = decode(encode(synthetic(kind, R=1 + seed % 5, seed=seed)))
        again = decode(encode(rows))
        np.testing.assert_array_equal(again.ids, rows.ids, err_msg=str(seed))
        np.testing.assert_allclose(again.logprobs, rows.logprobs, rtol=0, atol=3e-6, err_msg=str(seed))
