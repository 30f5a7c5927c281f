"""Times opening, listing and reading caches of 10 to 1,000 shards, each size in a fresh process.

    python -m benchmarks.bench_cache                   # 1,000 traces per shard: 10, 100 and 1,000 shards; two minutes
    python -m benchmarks.bench_cache --quick --json    # 10 shards, one object per case
    python -m benchmarks.bench_cache --shards 15625 --traces 64    # a million traces in units of the default size

The goal: 1,000 shards with 1,000,000 traces open in < 2 s and < 500 MB, and random access does not slow down with size.
Traces are small (16 rows of 4 ids). All shards of a cache have the same traces under different ids. Each size is also measured
with `pyarrow.dataset`. One more case is the first access to a shard of real size: 64 traces of 4,096 rows, k = 64.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache.cache import compact, manifest, shard
from logitcache.cache.reader import Cache
from logitcache.cache.shard import EncodedTrace
from logitcache.cache.shard_files import LocalFiles
from logitcache.identity import Identity
from logitcache.sections import Sections
from logitcache.sparse_rows import from_topk
from logitcache.trace import Trace

SHARDS = (10, 100, 1000)
VOCAB = 49_152
GOAL = {"open_s": 2.0, "peak_mb": 500.0}  # of a million traces in 1,000 shards
Case = dict[str, Any]


def make(path: Path, shards: int, traces: int, rows: int = 16, k: int = 4) -> Path:
    """Makes a cache with that many shards at ``path``, unless it exists."""
    directory = path / shard.DIRECTORY
    if len(list(directory.glob("*.json"))) == shards:
        return path
    if path.exists() and manifest.read(path).teacher != "synthetic":
        raise SystemExit(f"{path} is not a cache of this benchmark; move it away")
    shutil.rmtree(path, ignore_errors=True)
    identity = Identity("synthetic", "0", "0", None, VOCAB, k, None, 1, False, {}, None, None, "float32", "none", {})
    manifest.write(path, identity)
    made = [EncodedTrace.of(synthetic(i, rows, k), identity) for i in range(traces)]
    first = shard.write(directory, 0, made, identity, {})
    batch = shard.read(LocalFiles(path), first, identity).batch
    for number in range(1, shards):
        ids, name = range(number * traces, (number + 1) * traces), f"unit-{number:06d}"
        columns = {"trace_id": [*map(trace_id, ids)], "prompt_id": [*map(prompt_id, ids)]}
        for column, values in columns.items():
            place = batch.schema.get_field_index(column)
            batch = batch.set_column(place, batch.schema.field(place), pa.array(values))
        data = shard.to_bytes(batch, batch.schema.metadata or {})
        (directory / f"{name}.arrow").write_bytes(data)
        checksum = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        listed = {"trace_ids": columns["trace_id"], "prompt_ids": columns["prompt_id"]}
        shard.publish_index(directory, replace(first, name=name, **listed, **checksum))
    return path


def synthetic(i: int, rows: int, k: int) -> Trace:
    """Trace i: 8 prompt tokens, then one token per row."""
    rng = np.random.default_rng(i)
    ids_RK = np.argsort(rng.random((rows, 4 * k)), axis=1)[:, :k].astype(np.int32) * 97
    logprobs_RK = -np.cumsum(rng.gamma(1.0, 0.1, (rows, k)), axis=1)
    logprobs_RK += np.log(0.98) - np.log(np.exp(logprobs_RK).sum(axis=1, keepdims=True))
    logprobs_RK = logprobs_RK.astype(np.float32)
    return Trace(
        trace_id=trace_id(i),
        prompt_id=prompt_id(i),
        sample_index=i % 4,
        token_ids=np.concatenate([np.arange(8, dtype=np.int32), ids_RK[:, 0]]),
        sections=Sections(8, 8, 8, 8, 8 + rows),
        row_start=8,
        rows=from_topk(ids_RK, logprobs_RK, VOCAB),
        token_logprob=logprobs_RK[:, 0],
        token_rank=np.ones(rows, np.int32),
        text="x" * 4 * rows,
        finish_reason="stop",
    )


def trace_id(i: int) -> str:
    return hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest()


def prompt_id(i: int) -> str:
    return f"gsm_symbolic:1:{i // 4}"


def measure_cache(path: Path, reads: int = 2000) -> Case:
    """Opens the cache, lists it, accesses every shard once, and reads random traces."""
    before = memory_mb("VmHWM")
    cache, open_s = timed(lambda: Cache.open(path))
    _, list_s = timed(lambda: (cache.lengths, cache.trace_ids, cache.prompt_ids))
    peak = memory_mb("VmHWM")
    _, info_s = timed(cache.info)
    found = {"open_s": open_s, "list_s": list_s, "info_s": info_s, "peak_mb": peak, "imports_mb": before}

    rng, maps = np.random.default_rng(0), mappings()
    step = len(cache) // len(cache.shards)
    touches = processor_us(cache.__getitem__, rng.permutation(len(cache.shards)) * step)
    return found | {
        "first_read_ms": float(np.median(touches)) / 1e3,
        **of_reads(processor_us(cache.__getitem__, rng.integers(len(cache), size=reads))),
        "touched_anon_mb": memory_mb("RssAnon"),
        "touched_file_mb": memory_mb("RssFile"),
        "mappings": mappings() - maps,
    }


def measure_dataset(path: Path, reads: int = 20) -> Case:
    """The same with `pyarrow.dataset`, which verifies and decodes nothing."""
    import pyarrow.dataset as ds

    before = memory_mb("VmHWM")
    files = [str(p) for p in sorted((path / shard.DIRECTORY).glob("*.arrow"))]
    data, open_s = timed(lambda: ds.dataset(files, format="ipc"))
    table, list_s = timed(lambda: data.to_table(columns=["trace_id", "prompt_id"]))
    peak = memory_mb("VmHWM")
    order = np.random.default_rng(0).integers(table.num_rows, size=reads)
    return {
        "open_s": open_s,
        "list_s": list_s,
        "peak_mb": peak,
        "imports_mb": before,
        **of_reads(processor_us(lambda i: data.take([i]).to_pylist(), order)),
    }


def measure_touch(path: Path) -> Case:
    """Times the first access to a large shard, from disk and from the page cache, and the reads after it."""
    (file,) = (path / shard.DIRECTORY).glob("*.arrow")

    def touch(cold: bool) -> float:
        if cold:
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        cache = Cache.open(path)
        return timed(lambda: cache.shard(0))[1]

    disk, memory = ([touch(cold) for _ in range(5)] for cold in (True, False))
    cache = Cache.open(path)
    cache[0]  # mapped from here on, so its pages would stay in memory
    return {
        "shard_mb": file.stat().st_size / 1e6,
        "first_touch_disk_ms": 1e3 * float(np.median(disk)),
        "first_touch_ms": 1e3 * float(np.median(memory)),
        **of_reads(processor_us(cache.__getitem__, np.random.default_rng(0).permutation(len(cache)))),
    }


MEASURES: dict[str, Callable[[Path], Case]] = {
    "logitcache": measure_cache,
    "compacted": measure_cache,
    "pyarrow.dataset": measure_dataset,
    "first touch": measure_touch,
}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Returns: the result of the call, and its seconds."""
    began = time.perf_counter()
    made = work()
    return made, time.perf_counter() - began


def processor_us(read: Callable[[int], Any], order: np.ndarray) -> list[float]:
    """Processor time of each read, summed over threads: a busy machine changes it little."""
    times = []
    for i in order.tolist():
        began = time.process_time()
        read(i)
        times.append(1e6 * (time.process_time() - began))
    return times


def of_reads(times: list[float]) -> Case:
    return {"read_us_median": float(np.median(times)), "read_us_p95": float(np.quantile(times, 0.95))}


def memory_mb(name: str = "VmRSS") -> float:
    """Memory of this process: VmRSS is current, VmHWM the peak. Unlike getrusage, it does not include the parent's peak."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1e3


def mappings() -> int:
    """Number of memory mappings; the kernel's default limit is 65,530 per process."""
    return Path("/proc/self/maps").read_text().count("\n")


def in_a_fresh_process(what: str, path: Path) -> Case:
    command = [sys.executable, "-m", "benchmarks.bench_cache", "--measure", what, "--dir", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} of {path}:\n{done.stderr}")
    return json.loads(done.stdout)


def cases(root: Path, sizes: list[int], traces: int, large: bool) -> Iterator[Case]:
    for shards in sizes:
        path = make(root / f"{shards}x{traces}", shards, traces)
        for what in ("logitcache", "compacted", "pyarrow.dataset"):
            shutil.rmtree(path / compact.DIRECTORY, ignore_errors=True)
            if what == "compacted":
                compact.compact(path)
            yield {"case": what, "shards": shards, "traces": shards * traces} | in_a_fresh_process(what, path)
    if large:
        path = make(root / "large", 1, 64, rows=4096, k=64)
        yield {"case": "first touch", "shards": 1, "traces": 64} | in_a_fresh_process("first touch", path)


def line(case: Case) -> str:
    head = f"{case['case']:<16} {case['shards']:>6,} shards {case['traces']:>9,} traces "
    if "shard_mb" in case:
        return (
            f"{head} of {case['shard_mb']:.0f} MB: {case['first_touch_disk_ms']:.1f} ms from disk, "
            f"{case['first_touch_ms']:.1f} ms from memory; then a trace {case['read_us_median'] / 1e3:.2f} ms"
        )
    more = (
        f"; info {case['info_s']:.2f} s; a shard's first {case['first_read_ms']:.2f} ms; all shards touched: "
        f"{case['touched_anon_mb']:.0f} MB, {case['touched_file_mb']:.0f} MB of files, {case['mappings']} mappings"
        if "info_s" in case
        else ""
    )
    return (
        f"{head} open {case['open_s']:6.3f} s  ids {case['list_s']:6.3f} s  peak {case['peak_mb']:4.0f} MB  "
        f"a trace {case['read_us_median']:7.0f} us, p95 {case['read_us_p95']:7.0f} us{more}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=SHARDS)
    parser.add_argument("--traces", type=int, default=1000, help="traces per shard")
    parser.add_argument("--dir", type=Path, help="directory of the caches, which are reused; default: temporary")
    parser.add_argument(
        "--large", action=argparse.BooleanOptionalAction, default=True, help="also measure a shard of real size"
    )
    parser.add_argument("--quick", action="store_true", help="10 shards only")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.dir)))
        return
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases(args.dir or Path(temporary), [10] if args.quick else args.shards, args.traces, args.large):
            print(json.dumps(case) if args.json else line(case), flush=True)
            if case["case"] == "logitcache" and (case["shards"], case["traces"]) == (1000, 1_000_000):
                missed = [f"{name} {case[name]:.2f} > {goal}" for name, goal in GOAL.items() if case[name] >= goal]
                print(f"the goal is {'missed: ' + ', '.join(missed) if missed else 'met'}", file=sys.stderr)


if __name__ == "__main__":
    main()
