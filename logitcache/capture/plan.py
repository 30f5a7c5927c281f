"""What a whole job will take, from a cache of a handful of its traces: tokens, disk, hours."""

from dataclasses import dataclass, replace
from math import ceil, log2
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.compute as pc

from logitcache.cache import shard
from logitcache.cache.reader import Cache
from logitcache.capture.generate import GenerateOptions, generate
from logitcache.errors import InputError
from logitcache.prompts import load
from logitcache.runtime.files import LOGS, read_json

_DRAWS = 2000  # of the bootstrap
_CUT_SHARE = 0.05  # of traces that ended by length: worth a word above it
_SMALL, _LARGE, _WELL = 1e6, 2e9, 100e6  # bytes of a shard: too small, too large, and what is proposed then
_TABLE_SAVES = 0.14  # of the top-k block, by the frequency table that a shard below 4,096 rows lacks


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95% interval."""

    mean: float
    low: float
    high: float

    def times(self, factor: float) -> "Estimate":
        return Estimate(self.mean * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Plan:
    """A job of ``prompts`` times ``samples`` traces, as its sample foretells it."""

    prompts: int
    samples: int
    traces: int
    sample_prompts: int
    sample_traces: int
    tokens_per_trace: Estimate  # that the teacher writes
    bytes_per_token: float  # of a shard and its index, a row
    block_bytes_per_token: float  # of the top-k block, a row
    disk_bytes: Estimate
    shard_bytes: float
    tokens_per_s: float  # of one worker
    workers: int
    hours: Estimate
    warnings: list[str]

    def text(self) -> str:
        """What to tell a person: aligned, one screen."""
        tokens, each = self.tokens_per_trace, "1 worker" if self.workers == 1 else f"each of {self.workers} workers"
        lines = {
            "job": f"{self.traces:,} traces of {self.prompts:,} prompts",
            "sample": f"{self.sample_traces:,} traces of {self.sample_prompts:,} prompts; ranges are 95% intervals",
            "tokens": f"{_range(tokens, _COUNTS)} a trace, {_range(tokens.times(self.traces), _COUNTS)} in all",
            "size": f"{self.bytes_per_token:.0f} bytes a row, {self.block_bytes_per_token:.0f} of them top-k; "
            f"{_bytes(self.shard_bytes)} a shard",
            "disk": _range(self.disk_bytes, _BYTES),
            "speed": f"{self.tokens_per_s:,.0f} tokens/s, {each}, or more: a handful of traces ends with few in flight,",
            "": "a long run keeps the teacher full",
            "time": f"{_range(self.hours, _HOURS)}, loading the teacher apart",
        }
        return "\n".join(
            [*(f"{name:<8}{text}" for name, text in lines.items()), *(f"warning: {text}" for text in self.warnings)]
        )


def plan(options: GenerateOptions, prompts: int, workers: int = 1, keep: bool = False) -> Plan:
    """Has the teacher answer some of the prompts, drawn from all of them, and extrapolates.

    Args:
        options: of the whole job.
        prompts: to try.
        workers: that will share the job.
        keep: the traces, in the cache ``options.out``, which is not touched otherwise.
    Raises: as `generate`; KeyboardInterrupt where a signal ended it.
    """
    if prompts < 1 or workers < 1:
        raise InputError("`try_prompts` and `workers` must be at least 1")
    source = load(options.source, options.limit).prompts
    with TemporaryDirectory(prefix="logitcache-plan-") as scratch:
        out = options.out if keep else Path(scratch) / "cache"
        summary = generate(replace(options, out=out, draw=prompts))
        if summary.stopped:
            raise KeyboardInterrupt
        calls = [read_json(path) for path in (out / LOGS).glob("generate-*.json")]
        tokens, seconds = (sum(call[name] for call in calls) for name in ("tokens", "seconds"))
        if not tokens:
            raise InputError(
                f"{options.source}: no trace to plan from, and no record in {out / 'logs'} of how fast any was made; "
                + (next(iter(summary.skipped.values()), None) or "give `out` a new directory")
            )
        job = extrapolate(
            Cache.open(out),
            prompts=len(source),
            samples=options.samples,
            tokens_per_s=tokens / seconds,
            workers=workers,
            max_tokens=options.spec.max_tokens,
            unit_size=options.unit_size,
        )
    for what, lost in (("skipped", summary.skipped), ("lost", summary.failed)):
        if lost:
            job.warnings.append(f"{len(lost)} {what}, such as {next(iter(lost.values()))}")
    return job


def extrapolate(
    cache: Cache,
    *,
    prompts: int,
    samples: int,
    tokens_per_s: float,
    workers: int = 1,
    max_tokens: int,
    unit_size: int = 64,
) -> Plan:
    """The plan of a job that is made as ``cache`` was.

    Intervals are of a seeded bootstrap of Student's t, which draws prompts with all their traces. Measured on log-normal
    lengths and 8 to 64 prompts, the nominal 95% hold the truth in 90 to 95% of the samples at sigma 0.5, 88 to 92% at 1.
    They speak of the sample's own kind of prompts: draw it from all of the source, not from its head alone.

    Args:
        cache: the sample, some traces of some of the prompts.
        prompts: of the whole job; ``samples`` traces each.
        tokens_per_s: that the sample was made with, loading apart; ``Summary.tokens_per_s``.
        workers: that share the job, each as fast.
        max_tokens: the limit of a completion, in the sample and in the job.
        unit_size: traces that become one shard.
    Raises: InputError for counts below 1 or an empty sample; ShardCorruptError.
    """
    if min(prompts, samples, workers, max_tokens, unit_size) < 1 or not tokens_per_s > 0:
        raise InputError("a plan needs prompts, samples, workers, tokens/s, `max_tokens` and `unit_size` above 0")
    if not len(cache):
        raise InputError(f"{cache.path}: no traces to plan from; make some with `logitcache plan`")
    facts = _facts(cache)
    traces = prompts * samples
    tokens, size = (_per_trace(facts[name], facts["prompt"]) for name in ("tokens", "bytes"))
    longest = max(1.0, max_tokens / max(tokens.mean, 1.0))  # nothing is longer, and bytes go by tokens
    tokens, size = (Estimate(e.mean, e.low, min(e.high, e.mean * longest)) for e in (tokens, size))
    rows = facts["rows"].sum() or 1
    return Plan(
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
    """Of each trace: number of its prompt, tokens written, rows, bytes of its block and in all, how it ended."""
    parts: list[dict[str, Any]] = []
    for number, index in enumerate(cache.shards):
        loaded = cache.shard(number)
        lengths = np.array(index.token_lengths)
        block = pc.call_function("binary_length", [loaded.batch["topk"]]).to_numpy()
        path = cache.path / shard.DIRECTORY / f"{index.name}.json"
        others = index.bytes + path.stat().st_size - block.sum()  # plain columns, table, index: by length
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
    """Mean of a value of N traces with its interval over P prompts; that of one prompt has no width."""
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
    for _ in range(_DRAWS):  # one at a time: a sample may be a whole cache
        drawn_mean, drawn_error = mean_and_error(np.bincount(rng.integers(0, n, n), minlength=n))
        # A draw of alike prompts alone, likely where they are few, says that the mean may be anywhere.
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
            f"{cut:.0%} of the traces were cut at {max_tokens:,} tokens, most without an answer; try a larger `max_tokens`"
        )
    width = (tokens.high - tokens.low) / max(tokens.mean, 1e-9)
    if n < 2 or width > 1:
        wanted = min(ceil(n * (width / 0.5) ** 2) if n > 1 else 16, prompts)
        found.append(
            f"a sample of {n:,} prompt{'s'[: n > 1]} says little of {traces:,} traces; `try_prompts` {wanted} would say more"
        )
    shard_bytes = size.mean * min(unit_size, traces)
    if shard_bytes > _LARGE or (shard_bytes < _SMALL and traces > unit_size):
        what = "hard to hold in memory" if shard_bytes > _LARGE else "many small files"
        found.append(
            f"shards of {_bytes(shard_bytes)} are {what}; `unit_size` {_unit_size(size.mean, traces)} makes them about "
            f"{_bytes(size.mean * _unit_size(size.mean, traces))}"
        )
    lacking = facts["block"][~facts["table"]].sum() / max(facts["block"].sum(), 1)
    if lacking > 0.1 and facts["rows"].mean() * min(unit_size, traces) >= shard._TABLE_ROWS:
        found.append(
            f"the sample's shards are too small for a table of frequent ids, the job's are not: the top-k bytes will be "
            f"about {_TABLE_SAVES * lacking:.0%} fewer"
        )
    return found


def _unit_size(trace_bytes: float, traces: int) -> int:
    """A power of two: shards of about 100 MB, or fewer bytes where the job is small."""
    wanted = min(_WELL / max(trace_bytes, 1.0), max(traces, 1))
    return max(1, 2 ** round(log2(max(wanted, 1.0))))


_Units = tuple[tuple[float, str], ...]
_COUNTS: _Units = ((1, ""), (1e6, " million"), (1e9, " billion"), (1e12, " trillion"))
_BYTES: _Units = ((1, " bytes"), (1e3, " kB"), (1e6, " MB"), (1e9, " GB"), (1e12, " TB"), (1e15, " PB"))
_HOURS: _Units = ((1 / 3600, " s"), (1 / 60, " min"), (1, " hours"), (48, " days"))


def _range(value: Estimate, units: _Units) -> str:
    """Mean and interval in the unit that suits the mean, such as ``1.92 GB (1.70 to 2.11)``."""
    size, name = next((u for u in reversed(units) if value.mean >= u[0] * 0.9995), units[0])
    size = 24 if name == " days" else size
    digits = 0 if units is not _HOURS and size == 1 else max(0, 3 - len(str(int(value.mean / size))))
    mean, low, high = (f"{v / size:,.{digits}f}" for v in (value.mean, value.low, value.high))
    return f"{mean}{name}" + (f" ({low} to {high})" if value.low < value.high else "")


def _bytes(count: float) -> str:
    return _range(Estimate(count, count, count), _BYTES)
