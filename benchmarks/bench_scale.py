"""How a job scales over engines: makespans in simulated time, and what the ledger takes.

    python -m benchmarks.bench_scale                   # 1 to 64 engines, a million requests; a quarter of an hour
    python -m benchmarks.bench_scale --quick --json
    python -m benchmarks.bench_scale --csv out.csv     # appended to this file instead of results/scale-<machine>.csv

Simulated engines (`simulated_engines`) pull from the real ledger, or have their share from the start: by the prompt's hash, as
`--worker I/N`, or in equal blocks, as Ray Data with one input block for each actor. Ideal is the sum of all lengths divided
by all slots, from the start on. Engines that die start anew wherever the requests come from. A job of 40 traces a slot is
short: 10% of its time is its longest trace.

The ledger is measured in this process and as a Ray actor on a local cluster, with callers that take 8 requests and commit
shards of 64. A million requests are built from a file of prompts, as `LedgerActor.begin` does, and from pickled requests.
"""

import argparse
import contextlib
import csv
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_cache import memory_mb, timed
from benchmarks.bench_divergence import ROOT, machine, stamp
from benchmarks.simulated_engines import SHARD, SLOTS, SOURCES, Fate, Simulation, Work
from logitcache.cache.shard import ShardIndex
from logitcache.capture.job import Request
from logitcache.capture.ledger import Ledger
from logitcache.capture.summary import Counts, Summary

GOAL = 2000  # requests of the ledger a second
Case = dict[str, Any]


def fates(engines: int, ideal: float, traces: int, seed: int) -> dict[str, Fate]:
    rng, load = np.random.default_rng(seed), 0.02 * ideal
    spread = (0.1 * ideal * rng.random(engines)).tolist()
    return {
        "all from the start": Fate([0.0] * engines),
        "one late by half the job": Fate([ideal / 2] + [0.0] * (engines - 1)),
        "start late, die once a job": Fate(spread, load, lifetime=ideal),
        "one deadly request": Fate([0.0] * engines, load, deadly=frozenset(rng.integers(0, traces, 1).tolist())),
    }


def simulated(engines: int, each: int, rounds: int) -> Iterator[Case]:
    """Every fate with every source, which take turns; spread over seeds."""
    found: dict[tuple[str, str], list[Case]] = {}
    for seed in range(rounds):
        work = Work.of(engines * each, seed)
        ideal = work.total / engines / SLOTS
        for fate_name, fate in fates(engines, ideal, len(work.lengths), seed).items():
            for name, make in SOURCES.items():
                if fate.deadly and name != "pulled":
                    continue  # it would kill its engine for ever
                source = make(work, engines)
                out = Simulation(work, source, fate, seed).run()
                found.setdefault((fate_name, name), []).append(
                    {
                        "of_ideal": out.makespan / ideal,
                        "occupancy": out.busy / out.up,
                        "deaths": out.deaths,
                        "set_aside": len(source.summary.deadly),
                        "unpublished": out.unpublished,
                        "unpublished_units": out.unpublished_units,
                    }
                )
    for (fate_name, name), each_round in found.items():
        values = {key: [one[key] for one in each_round] for key in each_round[0]}
        yield {
            "case": "simulated",
            "engines": engines,
            "traces": engines * each,
            "fate": fate_name,
            "requests": name,
        } | {key: value for name, many in values.items() for key, value in spread(name, many).items()}


def spread(name: str, values: list[float]) -> Case:
    return {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def a_ledger(count: int) -> Ledger:
    numbers = iter(range(count))
    requests = (Request(f"{i:032x}", f"p{i // 4}", i % 4, f"question {i}") for i in range(count))
    return Ledger(requests, count, Summary(), lambda _: None, lambda: next(numbers))


def an_index(number: int, requests: list[Request]) -> ShardIndex:
    ids, prompts, n = [r.trace_id for r in requests], [r.prompt_id for r in requests], len(requests)
    return ShardIndex(
        f"unit-{number:06d}",
        n,
        16 << 20,
        "0" * 64,
        ids,
        prompts,
        [2000] * n,
        2000 * n,
        128_000 * n,
        8 << 20,
        1.0,
        {},
        {},
        {},
    )


def pull(ask: Any, least: int) -> tuple[int, int]:
    """Takes requests and commits shards, as an engine does. Returns: how many traces, and how many calls."""
    open_shard: list[Request] = []
    traces = calls = 0
    while traces < least and (given := ask("take", 8)):
        traces, calls = traces + len(given), calls + 1
        open_shard += given
        if len(open_shard) >= SHARD:
            index = an_index(ask("number"), open_shard[:SHARD])
            assert ask("commit", index, Counts(traces=SHARD, tokens=2000 * SHARD))
            open_shard, calls = open_shard[SHARD:], calls + 2
    return traces, calls


def in_this_process(traces: int, rounds: int) -> Iterator[Case]:
    found = []
    for _ in range(rounds):
        ledger = a_ledger(traces * 2)
        ledger.join(0)
        (made, calls), seconds = timed(lambda at=ledger: pull(lambda method, *a: getattr(at, method)(0, *a), traces))
        found.append((made / seconds, calls / seconds))
    yield rates("in this process", 1, found)


def rates(where: str, callers: int, found: list[tuple[float, float]]) -> Case:
    requests, calls = [r for r, _ in found], [c for _, c in found]
    return (
        {"case": "ledger", "where": where, "callers": callers}
        | spread("requests_per_s", requests)
        | spread("calls_per_s", calls)
    )


class Holder:
    """The ledger in an actor's process, called as `LedgerActor` is."""

    def __init__(self, count: int) -> None:
        self.ledger = a_ledger(count)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.ledger, method)(*args)


class Caller:
    """An engine's place, in a process of its own."""

    def pull(self, ledger: Any, holder: int, least: int) -> tuple[int, int]:
        import ray

        return pull(lambda method, *args: ray.get(ledger.call.remote(method, holder, *args)), least)

    def here(self) -> None:
        pass


def as_an_actor(callers: int, traces: int, rounds: int) -> Case:
    """Requests a second of a ledger on a Ray cluster, from callers that work at the same time."""
    import ray

    holder: Any = ray.remote(Holder)
    caller: Any = ray.remote(Caller)
    engines = [caller.options(num_cpus=0).remote() for _ in range(callers)]
    found = []
    for _ in range(rounds + 1):
        ledger = holder.options(num_cpus=0).remote(2 * traces)
        for number, engine in enumerate(engines):
            ray.get([ledger.call.remote("join", number), engine.here.remote()])
        began = time.perf_counter()
        made = ray.get([e.pull.remote(ledger, number, traces // callers) for number, e in enumerate(engines)])
        seconds = time.perf_counter() - began
        found.append((sum(m for m, _ in made) / seconds, sum(c for _, c in made) / seconds))
        ray.kill(ledger)
    for engine in engines:
        ray.kill(engine)
    return rates("as a Ray actor", callers, found[1:])  # the first one warms up


def on_a_cluster(traces: int, rounds: int) -> Iterator[Case]:
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(ROOT)}  # Ray listens on 127.0.0.1
    import ray

    ray.init(
        address="local",
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=80 << 20,
    )
    try:
        for callers in (1, 4):
            yield as_an_actor(callers, traces, rounds)
    finally:
        ray.shutdown()


def from_options(directory: Path) -> Ledger:
    """The ledger of the prompts of a folder, as `LedgerActor.begin` opens it."""
    from logitcache.cache.place import place_of
    from logitcache.capture.generate import GenerateOptions
    from logitcache.capture.runner import check, open_ledger
    from logitcache.inference import model
    from tests import fake_engine

    model.inspect_model, model.engine_version = fake_engine.facts, lambda: "fake 1"
    source, out = str(directory / "prompts.jsonl"), directory / "cache"
    task, identity = GenerateOptions(prompts=source, out=out, teacher="fake", top_k=8, samples=4).task()
    place = place_of(out)
    check(task, identity, place)
    return open_ledger(task, identity, place)[0]


def from_pickles(directory: Path) -> Ledger:
    """A ledger of requests that were sent to it."""
    requests = pickle.loads((directory / "requests.pickle").read_bytes())
    return Ledger(iter(requests), len(requests), Summary(), lambda _: None, lambda: 0)


OPENED = {"from options": from_options, "from pickled requests": from_pickles}


def open_here(how: str, directory: Path) -> Case:
    before = memory_mb("VmHWM")
    ledger, seconds = timed(lambda: OPENED[how](directory))
    waiting, peak = ledger.status().waiting, memory_mb("VmHWM")
    ledger.join(0)
    began = time.perf_counter()
    while ledger.take(0, 8):
        pass
    return {
        "open_s": seconds,
        "peak_mb": peak,
        "imports_mb": before,
        "requests": waiting,
        "taken_per_s": waiting / (time.perf_counter() - began),
    }


def opened(requests: int, rounds: int, directory: Path) -> Iterator[Case]:
    """Each way in fresh processes, which take turns."""
    with (directory / "prompts.jsonl").open("w") as file:
        for i in range(requests // 4):
            print(json.dumps({"id": f"p{i}", "prompt": f"question {i} " + "words of a prompt " * 10}), file=file)
    from_options(directory).join(0)
    ledger = from_options(directory)
    ledger.join(0)
    every = ledger.take(0, requests)
    (directory / "requests.pickle").write_bytes(pickle.dumps(every))
    del every, ledger
    found: dict[str, list[Case]] = {how: [] for how in OPENED}
    for _ in range(rounds):
        for how in OPENED:
            command = [sys.executable, "-m", "benchmarks.bench_scale", "--open-here", how, "--dir", str(directory)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                sys.exit(f"{how}:\n{done.stderr}")
            found[how].append(json.loads(done.stdout))
    for how, each in found.items():
        yield {"case": "opened", "how": how, "requests": each[0]["requests"]} | {
            key: value
            for name in ("open_s", "peak_mb", "imports_mb", "taken_per_s")
            for key, value in spread(name, [one[name] for one in each]).items()
        }


def cases(args: argparse.Namespace, directory: Path) -> Iterator[Case]:
    for engines in args.engines:
        yield from simulated(engines, args.traces, args.rounds)
    if args.calls:
        yield from in_this_process(args.calls, args.rounds)
    if args.calls and args.ray:
        yield from on_a_cluster(args.calls, args.rounds)
    if args.requests:
        yield from opened(args.requests, args.rounds, directory)


def line(case: Case) -> str:
    def of(name: str, digits: int = 2) -> str:
        median, low, high = (case[f"{name}_{which}"] for which in ("median", "min", "max"))
        return f"{median:,.{digits}f} ({low:,.{digits}f} - {high:,.{digits}f})"

    if case["case"] == "simulated":
        return (
            f"{case['engines']:>3} engines, {case['fate']:<26} {case['requests']:<16} {of('of_ideal')} x ideal, slots busy "
            f"{of('occupancy')}, deaths {of('deaths', 0)}, set aside {of('set_aside', 0)}; finished and unpublished "
            f"{of('unpublished', 0)}, in units {of('unpublished_units', 0)}"
        )
    if case["case"] == "ledger":
        return (
            f"ledger {case['where']}, {case['callers']} callers: {of('requests_per_s', 0)} requests/s, "
            f"{of('calls_per_s', 0)} calls/s"
        )
    return (
        f"{case['requests']:,} requests {case['how']}: {of('open_s')} s, peak {of('peak_mb', 0)} MB of which imports "
        f"{of('imports_mb', 0)}; then {of('taken_per_s', 0)} taken a second"
    )


def save(path: Path, rows: list[Case]) -> None:
    """Appends the cases, one line for each figure, since they have different ones."""
    names = ["date", "commit", "machine", "python", "numpy", "case", "what", "figure", "median", "min", "max"]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        if new:
            writer.writeheader()
        for row in rows:
            shown = [str(v) for k, v in row.items() if k in ("engines", "fate", "requests", "where", "callers", "how")]
            for figure in (name.removesuffix("_median") for name in row if name.endswith("_median")):
                values = {which: round(row[f"{figure}_{which}"], 4) for which in ("median", "min", "max")}
                writer.writerow(row | {"what": ", ".join(shown), "figure": figure} | values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--traces", type=int, default=10_240, help="of each simulated engine, 40 a slot")
    parser.add_argument(
        "--calls", type=int, default=20_000, help="requests taken from a measured ledger; 0 leaves it out"
    )
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the ledger that is opened; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--csv", type=Path, help="default: results/scale-<machine>.csv; nothing is saved by --quick")
    parser.add_argument("--dir", type=Path, help="folder of the prompts; default: temporary")
    parser.add_argument("--quick", action="store_true", help="small and without Ray")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    parser.add_argument("--open-here", choices=OPENED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open_here:
        print(json.dumps(open_here(args.open_here, args.dir)))
        return
    if args.quick:
        args.engines, args.traces, args.calls, args.requests, args.rounds, args.ray = [1, 4], 1024, 2000, 4000, 2, False
    facts = stamp("cpu", datetime.now(UTC).strftime("%Y-%m-%d %H:%M"))
    facts |= {"python": platform.python_version(), "numpy": np.__version__}
    rows = []
    with contextlib.ExitStack() as stack:
        directory = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for case in cases(args, directory):
            rows.append(case | facts)
            print(json.dumps(rows[-1]) if args.json else line(case), flush=True)
    if args.csv or not args.quick:
        save(args.csv or ROOT / "benchmarks" / "results" / f"scale-{machine('cpu')}.csv", rows)


if __name__ == "__main__":
    main()
