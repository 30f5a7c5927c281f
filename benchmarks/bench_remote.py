"""Times a training loader and the opening of a cache in an object store, beside the same cache in a directory.

    python -m benchmarks.bench_remote                  # 24 shards; a cache of 200 shards opened; five minutes
    python -m benchmarks.bench_remote --open 15625     # a million traces in units of the default size; an hour more
    python -m benchmarks.bench_remote --quick --json

The store is moto's S3 server on loopback, behind a proxy that holds every request back for 20 ms (`--latency`), about what a
store in the same region takes to its first byte. It shares the machine's cores with the loader, so these are no figures of
a real store; what can be compared are the variants, which take turns.

    directory             the cache as it is on disk
    mirror, warm          every shard was downloaded before
    mirror, cold          no shard was; each is downloaded when a trace of it is needed
    ..., fetched ahead    the same, and the next shards of the order are downloaded meanwhile: what `logitcache train` does

The loader has one process. There is no model: after each batch the process sleeps as long as a GPU would take that trains
on 200,000 tokens a second (`--speed`). Each round is an epoch in the order by shards, beginning with the opened cache; `waits`
are the seconds of it in which a trace had to wait for its shard to be downloaded. Opening reads the
manifest and all indexes; `again` finds them in the mirror; `compacted` is after `logitcache compact`.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import obstore
from torch.utils.data import DataLoader

from benchmarks.bench_cache import make
from benchmarks.bench_divergence import say, stamp
from benchmarks.slow_store import SlowStore, slow_store
from logitcache.cache.compact import compact
from logitcache.cache.reader import Cache
from logitcache.cache.shard import ShardIndex
from logitcache.storage.connect import connect
from logitcache.storage.location import Url
from logitcache.student.data.collate import collate, loader
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.data.sampler import StepSampler

TOKENS, WINDOW = 32_768, 16  # of a batch; shards mixed at a time
Case = dict[str, Any]


def upload(cache: Path, url: str, data: bool = True) -> str:
    """Copies a cache into the store. data: also the Arrow files of its shards."""
    store, wanted = connect(Url(url)), [p for p in cache.rglob("*") if p.is_file()]
    wanted = [p for p in wanted if data or not (p.name.startswith("unit-") and p.suffix == ".arrow")]
    with ThreadPoolExecutor(16) as pool:
        made = pool.map(lambda path: store.create(path.relative_to(cache).as_posix(), path.read_bytes()), wanted)
        assert all(made), f"{url} exists"
    return url


def epoch(cache: Cache, ahead: bool, speed: float = math.inf) -> tuple[int, float]:
    """Reads every trace once, as training at `speed` tokens a second does. Returns: traces, and seconds of waiting."""
    data, waited = TraceDataset(cache), 0.0
    batches = StepSampler(data.pool, TOKENS, window=WINDOW)
    if (mirror := cache.mirror) is not None:
        open_shard = mirror.open

        def timed(index: ShardIndex) -> BinaryIO:
            nonlocal waited
            began = time.perf_counter()
            file = open_shard(index)
            waited += time.perf_counter() - began
            return file

        mirror.open = timed
    plain = DataLoader(data, batch_sampler=batches, collate_fn=collate)  # pyright: ignore[reportArgumentType]
    traces = 0
    for batch in loader(data, batches) if ahead else plain:
        time.sleep(batch.tokens / speed)
        traces += len(batch.trace_ids)
    return traces, waited


def emptied(mirrors: Path) -> None:
    for path in mirrors.rglob("*.arrow"):
        path.unlink()
    (mirrors / "bytes").unlink(missing_ok=True)


def loaders(local: Path, store: SlowStore, mirrors: Path, rounds: int, speed: float) -> Iterator[Case]:
    url = upload(local, store.url("loaded"))
    variants = {
        "directory": (local, False, False),
        "mirror, warm": (url, False, False),
        "mirror, cold": (url, True, False),
        "mirror, cold, fetched ahead": (url, True, True),
    }
    epoch(Cache.open(url), True)
    found: dict[str, list[Case]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (place, cold, ahead) in variants.items():
            emptied(mirrors) if cold else None
            if not cold and place == url:
                epoch(Cache.open(url), True)
            cache, before = Cache.open(place), store.requests
            began = time.perf_counter()
            traces, waited = epoch(cache, ahead, speed)
            seconds = time.perf_counter() - began
            round_ = {
                "traces_per_s": traces / seconds,
                "waits": waited,
                "requests": store.requests - before,
            }
            found[name].append(round_)
    size = sum(path.stat().st_size for path in local.rglob("*.arrow"))
    facts = {"shards": len(Cache.open(local).shards), "traces": len(Cache.open(local)), "mb": size / 1e6}
    for name, each in found.items():
        yield facts | {"case": name, **spread("traces_per_s", each), **spread("waits", each), **requests(each)}


def opened(local: Path, store: SlowStore, mirrors: Path, rounds: int) -> Iterator[Case]:
    """Opening the cache, with an index a shard and with a compacted one."""
    compacted = compact_copy(local)
    urls = [upload(path, store.url(path.name), data=False) for path in (local, compacted)]
    variants: dict[str, tuple[Path | str, bool]] = {
        "open, directory": (local, False),
        "open, mirror, first": (urls[0], True),
        "open, mirror, again": (urls[0], False),
        "open, directory, compacted": (compacted, False),
        "open, mirror, compacted": (urls[1], True),
    }
    found: dict[str, list[Case]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (place, first) in variants.items():
            shutil.rmtree(mirrors, ignore_errors=True) if first else None
            before, began = store.requests, time.perf_counter()
            Cache.open(place)
            seconds = time.perf_counter() - began
            found[name].append({"open_s": seconds, "requests": store.requests - before})
    facts = {"shards": len(Cache.open(local).shards), "traces": len(Cache.open(local))}
    for name, each in found.items():
        yield facts | {"case": name, **spread("open_s", each), **requests(each)}


def compact_copy(local: Path) -> Path:
    """A copy of a cache without its data, compacted."""
    path = local.with_name(f"{local.name}-compacted")
    if not path.exists():
        shutil.copytree(local, path, ignore=shutil.ignore_patterns("*.arrow"))
        compact(path)
    return path


def spread(name: str, rounds: list[Case]) -> Case:
    values = [one[name] for one in rounds]
    return {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def requests(rounds: list[Case]) -> Case:
    return {"requests": round(statistics.median(one["requests"] for one in rounds))}


def cases(root: Path, args: argparse.Namespace) -> Iterator[Case]:
    mirrors = root / "mirrors"
    os.environ["LOGITCACHE_CACHE_DIR"] = str(mirrors)
    facts = {"store": "moto on loopback", "latency_ms": args.latency, "python": platform.python_version()}
    facts |= {
        "speed": args.speed,
        "obstore": obstore.__version__,
        **stamp("cpu", datetime.now(UTC).strftime("%Y-%m-%d %H:%M")),
    }
    with slow_store(args.latency / 1e3) as store:
        local = make(root / "loaded", args.shards, 64, rows=args.rows, k=64)
        for case in loaders(local, store, mirrors, args.rounds, args.speed):
            yield case | facts
        for shards in args.open:
            small = make(root / f"opened-{shards}", shards, 64)
            for case in opened(small, store, mirrors, args.rounds):
                yield case | facts


def line(case: Case) -> str:
    name = "traces_per_s" if "traces_per_s_median" in case else "open_s"
    value, low, high = (case[f"{name}_{which}"] for which in ("median", "min", "max"))
    unit = "traces/s" if name == "traces_per_s" else "s"
    digits = 0 if name == "traces_per_s" else 3
    size = f" of {case['mb']:.0f} MB" if "mb" in case else ""
    waits = f", waits {case['waits_median']:.2f} s" if "waits_median" in case else ""
    return (
        f"{case['case']:<28} {case['shards']:>6,} shards{size}: {value:,.{digits}f} {unit} ({low:,.{digits}f} - "
        f"{high:,.{digits}f}){waits}, {case['requests']:,} requests"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=24, help="of the cache that is loaded, of 64 traces each")
    parser.add_argument("--rows", type=int, default=512, help="of each of its traces, of 64 ids")
    parser.add_argument("--open", type=int, nargs="*", default=[200], help="shards of the caches that are opened")
    parser.add_argument("--speed", type=float, default=200_000, help="tokens a second of the training that is not done")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency", type=float, default=20.0, help="ms before a request is passed on")
    parser.add_argument("--dir", type=Path, help="directory of caches and mirrors; default: temporary")
    parser.add_argument("--quick", action="store_true", help="small caches, two rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    args = parser.parse_args()
    if args.quick:
        args.shards, args.rows, args.open, args.rounds = 8, 64, [20], 2
    with contextlib.ExitStack() as stack:
        root = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, case in enumerate(cases(root, args)):
            if number == 0:
                say(
                    f"{case['machine']}, Python {case['python']}, obstore {case['obstore']}; {case['store']}, "
                    f"{case['latency_ms']:g} ms a request"
                )
            print(json.dumps(case) if args.json else line(case), flush=True)


if __name__ == "__main__":
    sys.exit(main())
