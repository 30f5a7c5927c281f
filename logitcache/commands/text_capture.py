"""Text of `generate`, `score` and `plan`."""

from pathlib import Path

from logitcache.capture.plan import Estimate, JobEstimate
from logitcache.capture.summary import Summary
from logitcache.runtime.units import BYTES, COUNTS, HOURS, Units, in_bytes, in_units


def describe_summary(summary: Summary, out: Path) -> str:
    """The closing lines of `generate` and `score`."""
    lines = []
    if summary.repeated:
        lines.append(f"{summary.repeated} repeated prompts were read once")
    if summary.completed:
        lines.append(f"{summary.completed} traces were in shards without an index, which were completed")
    lines += _listed("damaged shards without an index moved", summary.set_aside)
    lines += _listed("prompts skipped", [f"{prompt}: {why}" for prompt, why in summary.skipped.items()])
    lines += _listed("traces lost", list(summary.failed.values()))
    if summary.unjudged:
        lines.append(
            f"{summary.unjudged} traces of earlier calls have no verdict: `logitcache slice --verifier` grades them"
        )
    if summary.others:
        lines.append(f"{summary.others} traces are left to the other workers")
    if summary.stopped:
        lines.append(f"stopped by {summary.stopped}: run the same command to resume")
    if summary.before + len(summary.skipped_traces) == summary.wanted and not summary.made:
        skipped = f", {len(summary.skipped_traces)} were skipped" if summary.skipped_traces else ""
        lines.append(f"{out}: nothing to do, all {summary.before} traces are present{skipped}")
    else:
        lines.append(
            f"{out}: {summary.made} traces made, {summary.before + summary.made} of {summary.wanted} present; "
            f"{summary.tokens:,} tokens in {summary.seconds:.1f} s, {summary.tokens_per_s:,.0f} tokens/s"
        )
    return "\n".join(lines)


def _listed(what: str, found: list[str]) -> list[str]:
    if not found:
        return []
    more = [f"  ... and {len(found) - 5} more"] if len(found) > 5 else []
    return [f"{len(found)} {what}:", *(f"  {line}" for line in found[:5]), *more]


def describe_estimate(job: JobEstimate) -> str:
    """The text of `plan`."""
    tokens, workers = job.tokens_per_trace, "1 worker" if job.workers == 1 else f"each of {job.workers} workers"
    lines = {
        "job": f"{job.traces:,} traces of {job.prompts:,} prompts",
        "sample": f"{job.sample_traces:,} traces of {job.sample_prompts:,} prompts; ranges are 95% intervals",
        "tokens": f"{_range(tokens, COUNTS)} per trace, {_range(tokens.times(job.traces), COUNTS)} in all",
        "size": f"{job.bytes_per_token:.0f} bytes per row, {job.block_bytes_per_token:.0f} of them top-k; "
        f"{in_bytes(job.shard_bytes)} per shard",
        "disk": _range(job.disk_bytes, BYTES),
        "speed": f"{job.tokens_per_s:,.0f} tokens/s, {workers}; a long run is faster, because a small sample leaves",
        "": "the engine partly idle at its end",
        "time": f"{_range(job.hours, HOURS)}, without loading the teacher",
    }
    return "\n".join(
        [*(f"{name:<8}{text}" for name, text in lines.items()), *(f"warning: {text}" for text in job.warnings)]
    )


def _range(value: Estimate, units: Units) -> str:
    return in_units(value.mean, value.low, value.high, units)
