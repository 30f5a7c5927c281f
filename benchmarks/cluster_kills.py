"""A job on a Ray cluster under random kills: every trace must be made once, and the cache must verify clean.

    python -m benchmarks.cluster_kills                     # 20 kills, 3,000 traces; some minutes
    python -m benchmarks.cluster_kills --kills 3 --traces 300 --json
    LOGITCACHE_TEST_S3=http://127.0.0.1:5557 python -m benchmarks.cluster_kills      # another server than moto's

A cluster of three machines on this one, with fake engines, writes to an S3 server on loopback. At random times SIGKILL hits
an engine, a machine (its raylet; another one joins), or the driver, after which the same command is given at once.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.storage.s3_server import environment, serve_s3

ROOT = Path(__file__).parents[1]
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_DEDUP_LOGS": "0"}  # Ray listens on 127.0.0.1
MACHINE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}


@contextlib.contextmanager
def cluster_of(machines: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster, and those of its machines that hold an engine."""
    os.environ.update(LOOPBACK)
    from ray.cluster_utils import Cluster

    head = MACHINE | {"num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster, [cluster.add_node(**MACHINE) for _ in range(machines)]
    finally:
        cluster.shutdown()


class Job:
    """The command, given again whenever its driver is killed."""

    def __init__(self, address: str, prompts: Path, url: str, given: dict[str, str], log: Path) -> None:
        self.command = [sys.executable, "-m", "tests.capture.ray_driver", address, "generate", str(prompts)]
        self.command += ["--out", url, "--teacher", "fake", "--top-k", "8", "--unit-size", "16"]
        self.command += ["--ray", "--cpus-per-engine", "1", "--engines", "1-3"]
        self.environment, self.log = os.environ | LOOPBACK | given, log
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()


def engines() -> list[int]:
    """The processes of engines of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::EngineActor"):
                found.append(int(path.parent.name))
    return found


def kill(what: str, job: Job, cluster: Any, machines: list[Any], rng: random.Random) -> bool:
    """False if there is nothing of the kind to kill now."""
    if what == "driver":
        job.kill()
    elif what == "machine":
        cluster.remove_node(machines.pop(rng.randrange(len(machines))), allow_graceful=False)
        machines.append(cluster.add_node(**MACHINE))
    elif found := engines():
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(found), 9)
    else:
        return False
    return True


def torment(job: Job, cluster: Any, machines: list[Any], args: argparse.Namespace) -> Counter[str]:
    """Kills until the job has ended, at most so many times. Returns: how often what was killed.

    A job gives up after kills that come faster than its shards; then its command is given again, too.
    """
    rng, killed = random.Random(args.seed), Counter[str]()
    while job.process.poll() != 0 and killed.total() < args.kills:
        if job.process.poll() is not None:
            job.start()
        time.sleep(rng.uniform(*args.every))
        what = rng.choices(["engine", "machine", "driver"], [6, 2, 2])[0]
        if job.process.poll() is None and kill(what, job, cluster, machines, rng):
            killed[what] += 1
            print(f"{time.strftime('%X')} kill {killed.total()}: {what}", file=sys.stderr, flush=True)
    job.process.wait(args.patience)
    return killed


def result(url: str, traces: int) -> dict[str, Any]:
    from logitcache.cache.reader import Cache
    from logitcache.cache.verify import verify_cache

    cache = Cache.open(url)
    times = Counter(id for index in cache.shards for id in index.trace_ids)
    return {
        "present": len(times),
        "missing": traces - len(set(cache.prompt_ids)),
        "twice": sum(count > 1 for count in times.values()),
        "shards": len(cache.shards),
        "problems": [str(problem) for problem in verify_cache(url, workers=1).problems],
    }


def run(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    prompts = root / "prompts.jsonl"
    rows = ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(args.traces))
    prompts.write_text("\n".join(map(json.dumps, rows)))
    os.environ["LOGITCACHE_CACHE_DIR"] = str(root / "mirror")
    with serve_s3() as server, cluster_of(3) as (cluster, machines):
        given, url = environment(server.endpoint), server.url("kills")
        os.environ.update(given)
        began, job = time.monotonic(), Job(cluster.address, prompts, url, given, root / "log")
        try:
            killed = torment(job, cluster, machines, args)
        finally:
            job.process.kill()
        seconds = time.monotonic() - began
        facts = {"store": os.environ.get("LOGITCACHE_TEST_S3", "moto"), "traces": args.traces, "seed": args.seed}
        found = {"kills": killed.total(), **killed, "seconds": round(seconds), "exit": job.process.returncode}
        try:
            return facts | found | result(url, args.traces)
        finally:
            if job.process.returncode:
                print((root / "log").read_text()[-5000:], file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=float, nargs=2, default=(2.0, 8.0), help="seconds between two kills")
    parser.add_argument("--patience", type=float, default=400.0, help="seconds for the job to end after the last kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder of the prompts and the commands' output; default: temporary")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        found = run(args, root)
    print(json.dumps(found) if args.json else "\n".join(f"{name:<10} {value}" for name, value in found.items()))
    whole = not (found["missing"] or found["twice"] or found["problems"])
    return 0 if whole and found["exit"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
