"""How well an order by shards mixes traces, and what it downloads, against a shuffle of all traces. A simulation, no files.

    python -m benchmarks.bench_order                  # 100,000 traces; a minute
    python -m benchmarks.bench_order --quick --json

Lengths are heavy-tailed: lognormal with a median of 2,000 tokens, at most 32,768; the longest of a thousand is 11 times the
median. Four traces share a prompt and start one after the other. So many slots generate at a time, each at the same speed;
shards are closed by order of finishing, at 64 traces or 16 MB (100 bytes a token), as `generate` does. With as many slots as
a large cluster has, shards are nearly sorted by length: the hardest case for an order that uses few shards at a time.

Of steps of 131,072 tokens, over all steps of an epoch:

    length spread    standard deviation of the mean length in a step, as a share of the mean length of all
    age spread       the same of the mean time at which a trace was finished, as a share of the whole time
    siblings         share of traces with another trace of their prompt in the same step
    downloads        bytes downloaded in an epoch, as a multiple of the cache's, if the mirror holds a tenth of it and
                     forgets the shards that were used least recently
"""

import argparse
import heapq
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache.student.data.sampler import Pool, StepSampler

SAMPLES, STEP, MIRROR = 4, 131_072, 0.1  # traces of a prompt; tokens; share of the cache
SHARD_TRACES, SHARD_BYTES, TOKEN_BYTES = 64, 16e6, 100
SLOTS, WINDOWS = (256, 16_384), (1, 4, 16, 64, 256, None)


@dataclass(frozen=True)
class Generated:
    """Traces in the order in which they were finished."""

    pool: Pool
    prompts: np.ndarray  # int64 [n]
    finished: np.ndarray  # float64 [n], from 0 to 1

    @property
    def shards(self) -> np.ndarray:
        assert self.pool.shards is not None
        return self.pool.shards


def generate(traces: int, slots: int, seed: int = 0) -> Generated:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(2000), 0.8, traces), 32, 32_768).astype(np.int64)
    free = [0.0] * slots
    finished = np.empty(traces)
    for i, length in enumerate(lengths):
        finished[i] = heapq.heapreplace(free, free[0] + length) + length
    order = np.argsort(finished, kind="stable")
    keys = rng.integers(0, 2**63, traces).astype(np.uint64)
    pool = Pool(lengths[order], keys, shards=close_shards(lengths[order]))
    return Generated(pool, order // SAMPLES, finished[order] / finished.max())


def close_shards(lengths: np.ndarray) -> np.ndarray:
    """int64 [n], the shard of each trace."""
    shards, number, count, size = np.empty(len(lengths), np.int64), 0, 0, 0.0
    for i, length in enumerate(lengths):
        shards[i], count, size = number, count + 1, size + length * TOKEN_BYTES
        if count == SHARD_TRACES or size >= SHARD_BYTES:
            number, count, size = number + 1, 0, 0.0
    return shards


def measure(made: Generated, window: int | None) -> dict[str, Any]:
    sampler = StepSampler(made.pool, STEP, window=window)
    steps = sampler.step_traces(epoch=0)
    lengths = np.array([made.pool.lengths[step].mean() for step in steps])
    ages = np.array([made.finished[step].mean() for step in steps])
    siblings = sum(len(step) - len(np.unique(made.prompts[step])) for step in steps)
    return {
        "steps": len(steps),
        "length_spread": float(lengths.std() / made.pool.lengths.mean()),
        "age_spread": float(ages.std()),
        "siblings": siblings / len(made.pool),
        "downloads": downloaded(made, np.concatenate(steps)),
    }


def downloaded(made: Generated, order: np.ndarray) -> float:
    """Multiples of the cache that an epoch downloads."""
    sizes = np.bincount(made.shards, weights=made.pool.lengths * TOKEN_BYTES)
    most, kept, held, total = MIRROR * sizes.sum(), OrderedDict[int, None](), 0.0, 0.0
    for shard in made.shards[order].tolist():
        if shard not in kept:
            total += sizes[shard]
            held += sizes[shard]
            while held > most and kept:
                held -= sizes[kept.popitem(last=False)[0]]
        kept[shard] = None
        kept.move_to_end(shard)
    return float(total / sizes.sum())


def cases(traces: int, slots: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for count in slots:
        made = generate(traces, count)
        shards = len(np.unique(made.shards))
        for window in WINDOWS:
            yield {"slots": count, "traces": traces, "shards": shards, "window": window} | measure(made, window)


def line(case: dict[str, Any]) -> str:
    window = "all" if case["window"] is None else case["window"]
    return (
        f"{case['slots']:>6,} slots, {case['shards']:,} shards, {window:>4} at a time: length {case['length_spread']:6.2%}, "
        f"age {case['age_spread']:6.2%}, siblings {case['siblings']:6.2%}, downloads {case['downloads']:6.2f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="5,000 traces only")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    args = parser.parse_args()
    for case in cases(5000 if args.quick else args.traces, (256,) if args.quick else SLOTS):
        print(json.dumps(case) if args.json else line(case), flush=True)


if __name__ == "__main__":
    sys.exit(main())
