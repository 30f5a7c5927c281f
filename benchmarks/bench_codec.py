"""Compares bytes, error and speed of the top-k block with four other layouts, on rows of a real teacher.

    python benchmarks/bench_codec.py --cache CACHE --quick
    python benchmarks/bench_codec.py --capture CAPTURE.npz --json --plot bytes.png --csv results.csv

The rows of a cache went through the codec once, so its error shows only on a capture or on a cache made with `--exact`. A
capture is an .npz with ids int32 [T, K] and logprobs float32 [T, K] as the engine returned them, lengths [n] of the traces,
and vocab_size if it is not 49,152. Every layout reads single traces in random order. Times are processor time summed over
threads, so a busy machine changes them little; tokens per second are those of one core. If a cache has pinned ids, every row
stores them besides its k others, and they are included in the bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from logitcache import codec, sparse_rows
from logitcache.codec.frequency_table import FrequencyTable, build_table
from logitcache.codec.rows import DEFAULT_LEVEL, HIGHEST_LEVEL
from logitcache.sparse_rows import SparseRows

# T tokens, K kept ids of a row.

Reader = Callable[[int], SparseRows]


@dataclass(frozen=True)
class Layout:
    """One way to store traces: a writer of all traces, and a reader of single traces from its bytes."""

    name: str
    write: Callable[[Sequence[SparseRows]], list[bytes]]
    open: Callable[[list[bytes]], Reader]


def write_blocks(
    traces: Sequence[SparseRows], level: int, exact: bool = False, pinned: Sequence[int] = ()
) -> list[bytes]:
    counts_V = np.bincount(np.concatenate([rows.ids for rows in traces]))
    counts_V[list(pinned)] = 0  # stored apart
    table = build_table(counts_V)
    blocks = (codec.encode(rows, level=level, exact=exact, table=table, pinned=pinned) for rows in traces)
    return [table.to_bytes(), *blocks]


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
    """One row group per trace, in the best encoding: 184 bytes per token; Parquet's defaults take 331."""
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
    """Ids in 17 bits. The layout would wrap ids of 131,072 or more; here they are refused."""
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


def layouts(pinned: Sequence[int] = (), vocab_size: int = 0) -> list[Layout]:
    """All layouts; the 17-bit one only if every id fits."""

    def blocks(level: int, exact: bool = False) -> Callable[[Sequence[SparseRows]], list[bytes]]:
        return partial(write_blocks, level=level, exact=exact, pinned=pinned)

    return [
        Layout("logitcache", blocks(DEFAULT_LEVEL), open_blocks),
        Layout("logitcache highest", blocks(HIGHEST_LEVEL), open_blocks),
        Layout("logitcache exact", blocks(DEFAULT_LEVEL, exact=True), open_blocks),
        Layout("parquet-zstd int32+float32", write_parquet, open_parquet),
        Layout("arrow-zstd int32+float16", write_arrow, open_arrow),
        Layout("raw uint32+float16", write_raw, open_raw),
        *([Layout("zstd 17-bit+float16", write_packed, open_packed)] if vocab_size <= 1 << 17 else []),
    ]


def measure(layout: Layout, traces: Sequence[SparseRows], seconds: float) -> dict[str, float | int | str]:
    """Measures one case: the best of as many repeats as fit in `seconds`, at least two."""
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
    kl = np.concatenate([sparse_rows.bucketed_kl(rows, read(i)) for i, rows in enumerate(traces)])
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


@dataclass(frozen=True)
class Source:
    """Rows to measure on.

    captured: whether they are as the teacher returned them; rows of a cache that is not exact went through the codec once.
    """

    traces: list[SparseRows]
    vocab_size: int
    pinned: list[int]
    captured: bool


def cases(source: Source, ks: Sequence[int], top_ps: Sequence[float | None], seconds: float) -> Iterator[dict]:
    for k in ks:
        for top_p in top_ps:
            folded = [sparse_rows.fold(trace, k, source.pinned) for trace in source.traces]
            rows = [sparse_rows.trim(trace, top_p=top_p, pinned_ids=source.pinned) for trace in folded]
            for layout in layouts(source.pinned, source.vocab_size):
                yield {"layout": layout.name, "k": k, "top_p": top_p, **measure(layout, rows, seconds)}


def first(traces: Iterable[SparseRows], tokens: float) -> list[SparseRows]:
    """Traces with rows, up to that many tokens; the last one is cut."""
    kept: list[SparseRows] = []
    for rows in traces:
        if tokens <= 0:
            break
        if len(rows):
            kept.append(rows[: int(min(len(rows), tokens))])
            tokens -= len(rows)
    return kept


def read_capture(path: Path, tokens: float) -> Source:
    with np.load(path) as capture:
        vocab_size = int(capture["vocab_size"]) if "vocab_size" in capture else 49_152
        rows = sparse_rows.from_topk(capture["ids"], capture["logprobs"], vocab_size)
        ends = np.cumsum(capture["lengths"]).tolist()
    traces = (rows[start:end] for start, end in zip([0, *ends], ends, strict=False))
    return Source(first(traces, tokens), vocab_size, [], captured=True)


def read_cache(path: Path, tokens: float) -> Source:
    from logitcache.cache.reader import Cache

    cache = Cache.open(path)
    identity = cache.identity
    traces = first((trace.rows for trace in cache), tokens)
    return Source(traces, identity.vocab_size, identity.pin_tokens, captured=identity.exact)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name.replace(' ', '-').lower()}-{os.cpu_count()}-cores"


def append(results: Sequence[dict], source: Source, path: Path) -> None:
    """Appends rows to a CSV file, one per case."""
    stamp = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "numpy": np.__version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "pyarrow": pa.__version__,
        "tokens": sum(map(len, source.traces)),
        "traces": len(source.traces),
        "vocab_size": source.vocab_size,
        "pinned": len(source.pinned),
        "captured": source.captured,
    }
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*stamp, *results[0]])
        if new:
            writer.writeheader()
        writer.writerows(stamp | result for result in results)


def plot(results: Sequence[dict], source: Source, path: Path) -> None:
    """Plots bytes against error, one line per layout over its k; exact layouts are at the left edge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labelled = {"logitcache": "left", "logitcache exact": "right", "parquet-zstd int32+float32": "left"}
    whole = [r for r in results if r["top_p"] is None]
    least = min((r["kl_mean"] for r in whole if r["kl_mean"] > 0), default=1e-9)
    edge = 10 ** np.floor(np.log10(least) - 1)
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for name, marker in zip(dict.fromkeys(r["layout"] for r in whole), "osD^v<>", strict=False):
        found = [r for r in whole if r["layout"] == name]
        points = [(max(r["kl_mean"], edge), r["bytes_per_token"]) for r in found]
        line = marker + ("-" if name.startswith("logitcache") else "--")
        (drawn,) = axes.plot(*zip(*points, strict=True), line, label=name, markersize=6, markerfacecolor="none")
        for point, r in zip(points, found, strict=True) if name in labelled else ():
            side = labelled[name]
            axes.annotate(
                f"k={r['k']}: {r['bytes_per_token']:.0f}",
                point,
                xytext=(8 if side == "left" else -8, -3),
                textcoords="offset points",
                size=8,
                ha=side,
                color=drawn.get_color(),
            )
    axes.axvline(edge, color="grey", linewidth=0.8, linestyle=":")
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "size": 8, "ha": "center"}
    axes.annotate("bit for bit", (edge, 1), xytext=(0, 3), **place)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(edge / 4, max(*(r["kl_mean"] for r in whole), edge) * 4),
        xlabel="error of what is stored: bucketed KL against the captured rows, mean (nats)",
        ylabel="bytes per token of the top-k block",
    )
    axes.yaxis.set_major_formatter("{x:g}")
    ks = ", ".join(str(k) for k in sorted({r["k"] for r in whole}))
    title = f"{sum(map(len, source.traces)):,} tokens, V = {source.vocab_size:,}; along each line k = {ks}"
    if not source.captured:
        title += "\nrows went through the codec once: its own error does not show"
    axes.set_title(title, fontsize="medium", pad=16)
    axes.legend(fontsize="small", loc="upper center")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--cache", type=Path, help="a cache directory")
    origin.add_argument("--capture", type=Path, help="an .npz of raw rows")
    parser.add_argument(
        "--k", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="values of k, up to that of the rows"
    )
    parser.add_argument("--quick", action="store_true", help="k = 64 only, at most 20,000 tokens: under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    parser.add_argument("--csv", type=Path, help="append the cases to this file, with machine and versions")
    parser.add_argument("--plot", type=Path, help="plot bytes against error into this file")
    args = parser.parse_args()

    limit = 20_000 if args.quick else math.inf
    source = read_capture(args.capture, limit) if args.capture else read_cache(args.cache, limit)
    if not source.traces:
        sys.exit("no rows to measure")
    if not source.captured:
        print("rows of a cache that is not exact: KL is against rows that went through the codec once", file=sys.stderr)
    widest = max(int(rows.counts.max()) for rows in source.traces) - len(source.pinned)
    ks = [min(64, widest)] if args.quick else sorted({min(k, widest) for k in args.k})
    versions = f"numpy {np.__version__}, zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}, pyarrow {pa.__version__}"
    tokens = sum(map(len, source.traces))
    print(f"{machine()}, {versions}; {tokens:,} tokens in {len(source.traces)} traces", file=sys.stderr)

    results = []
    for result in cases(source, ks, [None] if args.quick else [None, 0.99], 0.6 if args.quick else 2.0):
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
    if args.csv:
        append(results, source, args.csv)
    if args.plot:
        plot(results, source, args.plot)


if __name__ == "__main__":
    main()
