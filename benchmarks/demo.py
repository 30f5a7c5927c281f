"""Runs the whole pipeline on a CPU: a real teacher fills a cache, and a student, a third of it, trains from that cache.

`make demo` runs it and writes to demo/. A second run skips finished stages; `make demo DEMO=--fresh` starts over.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.embedded import embedded_teacher

HERE = Path(__file__).parents[1] / "demo"
TEACHER, CACHE, PRUNED, RUN, TIMES = (HERE / n for n in ("teacher", "cache", "pruned", "run", "times.json"))
LOGITCACHE = str(Path(sys.executable).with_name("logitcache"))

GENERATE = [
    "generate", "gym:gsm_symbolic?size=112&seed=1", "--teacher", str(TEACHER), "--out", str(CACHE),
    "--top-k", "64", "--max-tokens", "256", "--prompt-logits", "--unit-size", "32",
    "--answer-regex", r"(?i)therefore|answer is|in total|\bso\b",
    "--engine-arg", "max_model_len=2048", "--engine-arg", "max_num_seqs=64", "--engine-arg", "enforce_eager=true",
]  # fmt: skip
# A student made of some of its teacher's layers starts far from it: many small steps at a high rate.
TRAIN = [
    "train", str(CACHE), "--student", str(PRUNED), "--out", str(RUN), "--held-out", "0.1",
    "--tokens-per-batch", "512", "--lr", "1e-3", "--epochs", "1",
]  # fmt: skip


def main() -> None:
    if "--fresh" in sys.argv:
        for made in (TEACHER, CACHE, PRUNED, RUN):
            shutil.rmtree(made, ignore_errors=True)
        TIMES.unlink(missing_ok=True)
    HERE.mkdir(exist_ok=True)
    stage("teacher made", lambda: embedded_teacher(TEACHER))
    stage("cache written", lambda: logitcache(*GENERATE))
    stage("student made", prune)
    stage("student trained", lambda: logitcache(*TRAIN))
    print(table(json.loads(TIMES.read_text())))


def stage(name: str, work: Callable[[], Any]) -> None:
    """Runs a stage and records its seconds, unless it was finished before."""
    seconds = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    began = time.monotonic()
    work()
    seconds.setdefault(name, time.monotonic() - began)
    TIMES.write_text(json.dumps(seconds))


def logitcache(*arguments: str, where: Path | None = None) -> None:
    print(f"\n$ logitcache {' '.join(arguments)}", flush=True)
    if code := subprocess.run([LOGITCACHE, *arguments], cwd=where).returncode:
        sys.exit(code)


def prune() -> None:
    """Makes the student: a copy of the teacher with every third layer, 10 of 30."""
    from logitcache.runtime.files import atomic_directory
    from logitcache.student.model.prune import prune_layers

    if not PRUNED.exists():
        with atomic_directory(PRUNED) as part:
            prune_layers(TEACHER, part, every=3)


def table(seconds: dict[str, float]) -> str:
    from logitcache.cache.reader import Cache

    info, run = Cache.open(CACHE).info(), json.loads((RUN / "run.json").read_text())
    calls = [json.loads(path.read_text()) for path in (CACHE / "logs").glob("*.json")]
    speed = sum(c["tokens"] for c in calls) / sum(c["seconds"] for c in calls)
    before, after = run["eval_before"], run["eval_after"]
    rows = [
        ("teacher", f"{info.identity.teacher_revision[:8]} SmolLM2-135M-Instruct, {info.identity.engine}"),
        ("traces", f"{info.traces:,}"),
        ("tokens", f"{info.tokens:,} ({', '.join(f'{n:,} {k}' for k, n in info.section_tokens.items() if n)})"),
        ("bytes per token", f"{info.bytes_per_row:.1f} ({info.block_bytes_per_row:.1f} of them top-64)"),
        ("teacher tokens/s", f"{speed:,.0f}"),
        ("held-out KL, nats", f"{before['kl']:.3f} -> {after['kl']:.3f} ({after['kl'] / before['kl']:.0%})"),
        ("held-out top-1", f"{before['top1']:.1%} -> {after['top1']:.1%}"),
        *((name, f"{s:.0f} s") for name, s in seconds.items()),
        (
            "together",
            f"{sum(seconds.values()):.0f} s on {os.cpu_count()} cores ({platform.machine()}, torch {version('torch')})",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    main()
