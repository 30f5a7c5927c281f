"""Bytes, error and speed of the top-k block beside four other layouts, on rows of a real teacher.

    python benchmarks/bench_codec.py --cache CACHE --quick
    python benchmarks/bench_codec.py --capture CAPTURE.npz --json --plot bytes.png

A cache holds rows that went through the codec once: what it loses shows only on a capture, or on a cache written with
`--exact`. A capture is an .npz with ids int32 [T, K] and logprobs float32 [T, K] as the engine gave them, lengths [n]
of the traces, and vocab_size where it is not 49,152. Every layout reads single traces in random order. Times are the
processor's, all threads together, so that a busy machine changes little: tokens a second are those of one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from logitcache import codec, topk
from logitcache.table import FrequencyTable, build_table
from logitcache.topk import SparseRows

# T tokens, K kept ids of a row.

Reader = Callable[[int], SparseRows]


@dataclass(frozen=True)
class Layout:
    """One way to store traces: all of them to bytes, and a reader of single traces from those bytes."""

    name: str
    write: Callable[[Sequence[SparseRows]], list[bytes]]
    open: Callable[[list[bytes]], Reader]


def write_blocks(traces: Sequence[SparseRows], level: int, exact: bool = False) -> list[bytes]:
    ids = np.concatenate([rows.ids for rows in traces])
    table = build_table(np.bincount(ids))
    return [table.to_bytes(), *(codec.encode(rows, level=level, exact=exact, table=table) for rows in traces)]


def open_blocks(stored: list[bytes]) -> Reader:
    table = FrequencyTable.from_bytes(stored[0])
    return lambda i: codec.decode(stored[i + 1], table=table)


def as_table(rows: SparseRows, dtype: type) -> pa.Table:
    return pa.table(
        {
            "offsets": [rows.offsets.astype(np.int32)],
            "ids": [rows.ids],
            "logprobs": [rows.logprobs.astype(dtype)],
            "log_tail": [rows.log_tail],
        }
    )


def from_columns(columns: pa.Table | pa.RecordBatch) -> SparseRows:
    def flat(name: str) -> np.ndarray:
        column = columns.column(name)
        return (column.chunk(0) if isinstance(column, pa.ChunkedArray) else column).flatten().to_numpy()

    logprobs = flat("logprobs").astype(np.float32)
    return SparseRows(flat("offsets").astype(np.int64), flat("ids"), logprobs, flat("log_tail"))


def write_parquet(traces: Sequence[SparseRows]) -> list[bytes]:
    """A row group a trace, in the encoding that suits it best: 184 bytes a token where Parquet's defaults take 331."""
    sink = pa.BufferOutputStream()
    encoding = {"ids.list.element": "BYTE_STREAM_SPLIT", "logprobs.list.element": "BYTE_STREAM_SPLIT"}
    schema = as_table(traces[0], np.float32).schema
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False, column_encoding=encoding) as writer:
        for rows in traces:
            writer.write_table(as_table(rows, np.float32))
    return [sink.getvalue().to_pybytes()]


def open_parquet(stored: list[bytes]) -> Reader:
    file = pq.ParquetFile(pa.BufferReader(stored[0]))
    return lambda i: from_columns(file.read_row_group(i, use_threads=False))


def write_arrow(traces: Sequence[SparseRows]) -> list[bytes]:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with pa.ipc.new_file(sink, as_table(traces[0], np.float16).schema, options=options) as writer:
        for rows in traces:
            writer.write_table(as_table(rows, np.float16))
    return [sink.getvalue().to_pybytes()]


def open_arrow(stored: list[bytes]) -> Reader:
    options = pa.ipc.IpcReadOptions(use_threads=False)
    file = pa.ipc.open_file(pa.BufferReader(stored[0]), options=options)
    return lambda i: from_columns(file.get_batch(i))


def write_raw(traces: Sequence[SparseRows]) -> list[bytes]:
    return [
        np.array([len(rows), len(rows.ids)], np.uint32).tobytes()
        + rows.counts.astype(np.uint16).tobytes()
        + rows.log_tail.tobytes()
        + rows.ids.astype(np.uint32).tobytes()
        + rows.logprobs.astype(np.float16).tobytes()
        for rows in traces
    ]


def open_raw(stored: list[bytes]) -> Reader:
    def read(i: int) -> SparseRows:
        R, N = np.frombuffer(stored[i], np.uint32, 2)
        counts = np.frombuffer(stored[i], np.uint16, R, 8)
        ids = np.frombuffer(stored[i], np.uint32, N, 8 + 6 * R).astype(np.int32)
        logprobs = np.frombuffer(stored[i], np.float16, N, 8 + 6 * R + 4 * N).astype(np.float32)
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return SparseRows(offsets, ids, logprobs, np.frombuffer(stored[i], np.float32, R, 8 + 2 * R))

    return read


def write_packed(traces: Sequence[SparseRows]) -> list[bytes]:
    """Ids in 17 bits: what holds them wraps above 131,072; here they are refused."""
    stored = []
    for rows in traces:
        if rows.ids.max() >= 1 << 17:
            raise ValueError(f"id {rows.ids.max()} does not fit in 17 bits")
        bits = rows.ids.astype(">u4").view(np.uint8).reshape(-1, 4)
        packed = np.packbits(np.unpackbits(bits, axis=1)[:, 15:]).tobytes()
        head = np.array([len(rows), len(rows.ids)], np.uint32).tobytes() + rows.counts.astype(np.uint16).tobytes()
        body = head + rows.log_tail.tobytes() + rows.logprobs.astype(np.float16).tobytes() + packed
        stored.append(zstandard.ZstdCompressor().compress(body))
    return stored


def open_packed(stored: list[bytes]) -> Reader:
    decompressor = zstandard.ZstdDecompressor()

    def read(i: int) -> SparseRows:
        raw = decompressor.decompress(stored[i])
        R, N = np.frombuffer(raw, np.uint32, 2)
        counts = np.frombuffer(raw, np.uint16, R, 8)
        logprobs = np.frombuffer(raw, np.float16, N, 8 + 6 * R).astype(np.float32)
        bits = np.zeros((N, 32), np.uint8)
        bits[:, 15:] = np.unpackbits(np.frombuffer(raw, np.uint8, -1, 8 + 6 * R + 2 * N), count=17 * N).reshape(N, 17)
        ids = np.packbits(bits, axis=1).view(">u4").ravel().astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return SparseRows(offsets, ids, logprobs, np.frombuffer(raw, np.float32, R, 8 + 2 * R))

    return read


LAYOUTS = (
    Layout("logitcache", partial(write_blocks, level=codec.DEFAULT_LEVEL), open_blocks),
    Layout("logitcache highest", partial(write_blocks, level=codec.HIGHEST_LEVEL), open_blocks),
    Layout("logitcache exact", partial(write_blocks, level=codec.DEFAULT_LEVEL, exact=True), open_blocks),
    Layout("parquet-zstd int32+float32", write_parquet, open_parquet),
    Layout("arrow-zstd int32+float16", write_arrow, open_arrow),
    Layout("raw uint32+float16", write_raw, open_raw),
    Layout("zstd 17-bit+float16", write_packed, open_packed),
)


def measure(layout: Layout, traces: Sequence[SparseRows], seconds: float) -> dict[str, float | int | str]:
    """One case: the best of the repeats that fit in `seconds`, at least two."""
    tokens = sum(map(len, traces))
    stored: list[bytes] = []

    def write() -> None:
        stored[:] = layout.write(traces)

    encode_s = best_of(write, seconds / 2)
    read = layout.open(stored)
    order = np.random.default_rng(0).permutation(len(traces)).tolist()

    def read_all() -> None:
        for i in order:
            read(i)

    decode_s = best_of(read_all, seconds / 2)
    kl = np.concatenate([topk.bucketed_kl(rows, read(i)) for i, rows in enumerate(traces)])
    return {
        "bytes_per_token": round(sum(map(len, stored)) / tokens, 2),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "encode_tokens_per_s": round(tokens / encode_s),
        "decode_tokens_per_s": round(tokens / decode_s),
    }


def best_of(run: Callable[[], None], seconds: float) -> float:
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def cases(traces: Sequence[SparseRows], ks: Sequence[int], top_ps: Sequence[float | None], seconds: float) -> Iterator:
    for k in ks:
        for top_p in top_ps:
            rows = [topk.trim(topk.fold(trace, k), top_p=top_p) for trace in traces]
            for layout in LAYOUTS:
                yield {"layout": layout.name, "k": k, "top_p": top_p, **measure(layout, rows, seconds)}


def read_capture(path: Path) -> list[SparseRows]:
    with np.load(path) as capture:
        vocab_size = int(capture["vocab_size"]) if "vocab_size" in capture else 49_152
        rows = topk.from_topk(capture["ids"], capture["logprobs"], vocab_size)
        ends = np.cumsum(capture["lengths"]).tolist()
    return [rows[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]


def read_cache(path: Path, tokens: int | None) -> list[SparseRows]:
    from logitcache.cache import Cache

    cache = Cache.open(path)
    traces, held = [], 0
    for i in range(len(cache)):
        rows = cache[i].rows
        if len(rows) == 0:
            continue
        traces.append(rows)
        held += len(rows)
        if tokens is not None and held >= tokens:
            break
    return traces


def plot(results: Sequence[dict], path: Path) -> None:
    """Bytes against error, a line a layout through its k; what is kept bit for bit stands at the left edge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for layout in LAYOUTS:
        found = [r for r in results if r["layout"] == layout.name and r["top_p"] is None]
        if not found:
            continue
        errors = [max(r["kl_mean"], 1e-12) for r in found]
        axes.plot(errors, [r["bytes_per_token"] for r in found], "o-", label=layout.name)
        for error, r in zip(errors, found, strict=True):
            axes.annotate(str(r["k"]), (error, r["bytes_per_token"]), xytext=(4, 4), textcoords="offset points", size=7)
    axes.set(xscale="log", yscale="log", xlabel="bucketed KL of what is stored, mean (nats)", ylabel="bytes a token")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cache", type=Path, help="a cache directory")
    source.add_argument("--capture", type=Path, help="an .npz of raw rows")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="as far as the rows go")
    parser.add_argument("--quick", action="store_true", help="k = 64 only, at most 20,000 tokens: under a minute")
    parser.add_argument("--json", action="store_true", help="one object a case")
    parser.add_argument("--plot", type=Path, help="write a picture of bytes against error here")
    args = parser.parse_args()

    limit = 20_000 if args.quick else None
    traces = read_capture(args.capture) if args.capture else read_cache(args.cache, limit)
    if not traces:
        sys.exit("no rows to measure")
    widest = max(int(rows.counts.max()) for rows in traces)
    ks = [min(64, widest)] if args.quick else sorted({min(k, widest) for k in args.k})
    if limit is not None:
        ends = np.cumsum([len(rows) for rows in traces])
        traces = traces[: int(np.searchsorted(ends, limit)) + 1]
    versions = f"numpy {np.__version__}, zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}, pyarrow {pa.__version__}"
    tokens = sum(map(len, traces))
    print(f"{platform.machine()}, {versions}; {tokens:,} tokens in {len(traces)} traces", file=sys.stderr)

    results = []
    for result in cases(traces, ks, [None] if args.quick else [None, 0.99], 1.0 if args.quick else 2.0):
        results.append(result)
        if args.json:
            print(json.dumps(result), flush=True)
            continue
        name = f"{result['layout']}, k={result['k']}" + (f", top-p {result['top_p']}" if result["top_p"] else "")
        print(
            f"{name:<46} {result['bytes_per_token']:8.1f} B/token  "
            f"KL {result['kl_mean']:.1e} / {result['kl_max']:.1e}  "
            f"encode {result['encode_tokens_per_s']:>9,}  decode {result['decode_tokens_per_s']:>10,} tokens/s",
            flush=True,
        )
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
