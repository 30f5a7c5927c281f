"""Estimates tokens, disk and hours of a whole job from a few of its traces."""

from dataclasses import dataclass, replace
from math import ceil, log2
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pyarrow.compute as pc

from logitcache.cache import shard
from logitcache.cache.reader import Cache
from logitcache.cache.workers import Worker
from logitcache.capture.generate import GenerateOptions, generate
from logitcache.capture.job import PromptOptions
from logitcache.errors import InputError
from logitcache.prompts import SourceCounts, load
from logitcache.runtime.files import LOGS, read_json
from logitcache.runtime.options import Option, at_least, values_of
from logitcache.runtime.units import in_bytes

_DRAWS = 2000  # of the bootstrap
_CUT_SHARE = 0.05  # of traces cut by max_tokens: warn above it
_SMALL, _LARGE, _WELL = 1e6, 2e9, 100e6  # bytes of a shard: too small, too large, and the size that a warning suggests
_TABLE_SAVES = 0.14  # of the top-k block, by the frequency table, which shards below 4,096 rows do not have


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    def times(self, factor: float) -> "Estimate":
        return Estimate(self.mean * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class JobEstimate:
    """The cost of a job of ``prompts`` times ``samples`` traces, extrapolated from a sample of its traces."""

    prompts: int
    samples: int
    traces: int
    sample_prompts: int
    sample_traces: int
    tokens_per_trace: Estimate  # of the completion
    bytes_per_token: float  # of a shard and its index, per row
    block_bytes_per_token: float  # of the top-k block, per row
    disk_bytes: Estimate
    shard_bytes: float
    tokens_per_s: float  # of one worker
    workers: int
    hours: Estimate
    warnings: list[str]
    source: SourceCounts | None = None  # of the prompts


@dataclass(frozen=True, kw_only=True)
class PlanOptions(PromptOptions):
    """Options of one call of `plan`."""

    try_prompts: Annotated[int, Option("Prompts to try, drawn from the whole source.")] = 16
    workers: Annotated[int, Option("Workers that will share the job.")] = 1
    out: Annotated[
        Path | None, Option("Keep the traces in this cache; generate resumes it.", default="they are deleted")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("try_prompts", self.try_prompts, 1)
        at_least("workers", self.workers, 1)

    def job(self, out: Path) -> GenerateOptions:
        """The options of the sample: some of the prompts, one worker."""
        return GenerateOptions(**values_of(PromptOptions, self), out=out, worker=Worker(), draw=self.try_prompts)


def plan(options: PlanOptions) -> JobEstimate:
    """Has the teacher answer some of the prompts and extrapolates to all of them.

    Raises: as `generate`; KeyboardInterrupt if a signal stopped it.
    """
    source = load(options.prompts, options.limit, options.columns)
    with TemporaryDirectory(prefix="logitcache-plan-") as scratch:
        out = Path(options.out or Path(scratch) / "cache")
        summary = generate(options.job(out))
        if summary.stopped:
            raise KeyboardInterrupt
        calls = [read_json(path) for path in (out / LOGS).glob("generate-*.json")]
        tokens, seconds = (sum(call[name] for call in calls) for name in ("tokens", "seconds"))
        if not tokens:
            raise InputError(
                f"{options.prompts}: no trace to plan from, and {out / 'logs'} has no record of how fast any was made; "
                + (next(iter(summary.skipped.values()), None) or "give `out` a new directory")
            )
        job = extrapolate(
            Cache.open(out),
            prompts=len(source),
            samples=options.samples,
            tokens_per_s=tokens / seconds,
            workers=options.workers,
            max_tokens=options.max_tokens,
            unit_size=options.unit_size,
        )
    for what, lost in (("skipped", summary.skipped), ("lost", summary.failed)):
        if lost:
            job.warnings.append(f"{len(lost)} {what}, such as {next(iter(lost.values()))}")
    return replace(job, source=source.counts)


def extrapolate(
    cache: Cache,
    *,
    prompts: int,
    samples: int,
    tokens_per_s: float,
    workers: int = 1,
    max_tokens: int,
    unit_size: int = 64,
) -> JobEstimate:
    """Estimates a job from ``cache``, a sample made with the same options.

    Intervals come from a seeded bootstrap-t that draws prompts with all their traces. Measured on log-normal lengths and 8
    to 64 prompts, the nominal 95% cover the truth in 90 to 95% of samples at sigma 0.5, and in 88 to 92% at sigma 1. They
    apply to prompts like those of the sample, so draw it from the whole source, not from its start.

    Args:
        cache: the sample, some traces of some of the prompts.
        prompts: of the whole job; ``samples`` traces each.
        tokens_per_s: speed of one worker on the sample, without loading; ``Summary.tokens_per_s``.
        workers: number of workers that share the job, each as fast.
        max_tokens: the limit of a completion, in the sample and in the job.
        unit_size: traces that become one shard.
    Raises: InputError for counts below 1 or an empty sample; ShardCorruptError.
    """
    if min(prompts, samples, workers, max_tokens, unit_size) < 1 or not tokens_per_s > 0:
        raise InputError("an estimate needs prompts, samples, workers, tokens/s, `max_tokens` and `unit_size` above 0")
    if not len(cache):
        raise InputError(f"{cache.location}: no traces to plan from; make some with `logitcache plan`")
    facts = _facts(cache)
    traces = prompts * samples
    tokens, size = (_per_trace(facts[name], facts["prompt"]) for name in ("tokens", "bytes"))
    longest = max(
        1.0, max_tokens / max(tokens.mean, 1.0)
    )  # no completion is longer, and bytes are proportional to tokens
    tokens, size = (Estimate(e.mean, e.low, min(e.high, e.mean * longest)) for e in (tokens, size))
    rows = facts["rows"].sum() or 1
    return JobEstimate(
        prompts=prompts,
        samples=samples,
        traces=traces,
        sample_prompts=int(facts["prompt"].max()) + 1,
        sample_traces=len(cache),
        tokens_per_trace=tokens,
        bytes_per_token=float(facts["bytes"].sum() / rows),
        block_bytes_per_token=float(facts["block"].sum() / rows),
        disk_bytes=size.times(traces),
        shard_bytes=size.mean * min(unit_size, traces),
        tokens_per_s=tokens_per_s,
        workers=workers,
        hours=tokens.times(traces / (tokens_per_s * workers * 3600)),
        warnings=_warnings(facts, tokens, size, prompts, traces, max_tokens, unit_size),
    )


def _facts(cache: Cache) -> dict[str, np.ndarray]:
    """For each trace: index of its prompt, completion tokens, rows, bytes of its block, bytes in total, finish reason."""
    parts: list[dict[str, Any]] = []
    for number, index in enumerate(cache.shards):
        loaded = cache.shard(number)
        lengths = np.array(index.token_lengths)
        block = pc.call_function("binary_length", [loaded.batch["topk"]]).to_numpy()
        path = cache.path / shard.DIRECTORY / f"{index.name}.json"
        others = index.bytes + path.stat().st_size - block.sum()  # plain columns, table and index, divided by length
        parts.append(
            {
                "tokens": lengths - loaded.batch["sections"].field("prompt_end").to_numpy(),
                "rows": loaded.batch["token_logprob"].value_lengths().to_numpy(),
                "block": block,
                "bytes": block + others * lengths / lengths.sum(),
                "cut": np.array(loaded.batch["finish_reason"].to_pylist()) == "length",
                "table": np.full(len(lengths), loaded.table is not None),
            }
        )
    facts = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return facts | {"prompt": np.unique(cache.prompt_ids, return_inverse=True)[1]}


def _per_trace(values_N: np.ndarray, prompt_N: np.ndarray) -> Estimate:
    """Mean of a value of N traces, with its interval over P prompts. With one prompt the interval has no width."""
    sums_P, counts_P = np.bincount(prompt_N, weights=values_N), np.bincount(prompt_N)
    n = len(sums_P)

    def mean_and_error(drawn_P: np.ndarray) -> tuple[float, float]:
        traces = drawn_P @ counts_P
        mean = float(drawn_P @ sums_P / traces)
        return mean, float(np.sqrt(drawn_P @ np.square(sums_P - mean * counts_P) * n / max(n - 1, 1)) / traces)

    mean, error = mean_and_error(np.ones(n))
    if error <= 1e-9 * mean:
        return Estimate(mean, mean, mean)
    rng, deviations = np.random.default_rng(0), []
    for _ in range(_DRAWS):  # one at a time, since the sample may be a whole cache
        drawn_mean, drawn_error = mean_and_error(np.bincount(rng.integers(0, n, n), minlength=n))
        # A draw of equal prompts, likely if there are few, says nothing about the mean.
        sure = drawn_error > 1e-9 * mean
        deviations.append((drawn_mean - mean) / drawn_error if sure else np.copysign(np.inf, drawn_mean - mean))
    up, down = np.percentile(deviations, (2.5, 97.5), method="nearest")
    return Estimate(mean, max(mean - float(down) * error, 0.0), mean - float(up) * error)


def _warnings(
    facts: dict[str, np.ndarray],
    tokens: Estimate,
    size: Estimate,
    prompts: int,
    traces: int,
    max_tokens: int,
    unit_size: int,
) -> list[str]:
    found: list[str] = []
    cut, n = float(facts["cut"].mean()), int(facts["prompt"].max()) + 1
    if cut > _CUT_SHARE:
        found.append(
            f"{cut:.0%} of the traces were cut at {max_tokens:,} tokens, so most have no answer; try a larger `max_tokens`"
        )
    width = (tokens.high - tokens.low) / max(tokens.mean, 1e-9)
    if n < 2 or width > 1:
        wanted = min(ceil(n * (width / 0.5) ** 2) if n > 1 else 16, prompts)
        found.append(
            f"a sample of {n:,} prompt{'s'[: n > 1]} says little about {traces:,} traces; try `try_prompts` {wanted}"
        )
    shard_bytes = size.mean * min(unit_size, traces)
    if shard_bytes > _LARGE or (shard_bytes < _SMALL and traces > unit_size):
        what = "hard to hold in memory" if shard_bytes > _LARGE else "many small files"
        found.append(
            f"shards of {in_bytes(shard_bytes)} are {what}; `unit_size` {_unit_size(size.mean, traces)} makes them about "
            f"{in_bytes(size.mean * _unit_size(size.mean, traces))}"
        )
    missing = facts["block"][~facts["table"]].sum() / max(facts["block"].sum(), 1)
    if missing > 0.1 and facts["rows"].mean() * min(unit_size, traces) >= shard._TABLE_ROWS:
        found.append(
            f"the job's shards will be large enough for a table of frequent ids, the sample's were not: expect about "
            f"{_TABLE_SAVES * missing:.0%} fewer top-k bytes"
        )
    return found


def _unit_size(trace_bytes: float, traces: int) -> int:
    """A power of two that makes shards of about 100 MB, or smaller ones for a small job."""
    wanted = min(_WELL / max(trace_bytes, 1.0), max(traces, 1))
    return max(1, 2 ** round(log2(max(wanted, 1.0))))
