"""Text of `generate`, `score` and `plan`."""

import shlex

from logitcache.capture.plan import Estimate, JobEstimate
from logitcache.capture.summary import SectionCounts, Summary
from logitcache.commands.text_prompts import describe_source
from logitcache.grading.verdicts import listed
from logitcache.runtime.units import BYTES, COUNTS, HOURS, Units, in_bytes, in_units


def describe_summary(summary: Summary, out: object) -> str:
    """The closing lines of `generate` and `score`."""
    lines = describe_source(summary.source)
    if summary.completed:
        lines.append(f"{summary.completed} traces were in shards without an index, which were completed")
    lines += _listed("damaged shards without an index moved", summary.set_aside)
    lines += _listed("prompts skipped", [f"{prompt}: {why}" for prompt, why in summary.skipped.items()])
    lines += _listed("traces lost", list(summary.failed.values()))
    if summary.deaths:
        lines.append(f"{summary.deaths} engines died or were lost; others made their traces")
    lines += _listed(
        "requests set aside: three engines died while they worked on them", list(map(str, summary.deadly.values()))
    )
    if summary.ignored:
        lines.append(
            f"{len(summary.ignored)} shards without an index are left from killed calls: readers ignore them, and their "
            "traces were made again"
        )
    lines += [f"{count} {remark}" for remark, count in summary.remarks.items()]
    lines += describe_sections(summary.sections)
    if summary.no_verdict:
        lines.append(listed(summary.no_verdict))
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


def describe_sections(counts: SectionCounts) -> list[str]:
    """What a user should know about the sections of new traces."""
    searched = "no markers were searched for" if counts.markers == "none" else f"{counts.markers} were searched for"
    lines = [
        f"{count} completions hold the markers {pair}, but {searched}: they count as answer; make the cache again with "
        f"`--reasoning-markers {shlex.quote(pair)}`"
        for pair, count in counts.unmarked.items()
    ]
    if counts.without_reasoning > sum(counts.unmarked.values()):
        lines.append(f"{counts.without_reasoning} completions have no reasoning: {counts.markers} are not in them")
    if counts.spelled:
        lines.append(
            f"{counts.spelled} completions spell the closing marker with ordinary tokens, which closes no reasoning"
        )
    if counts.without_answer:
        lines.append(f"{counts.without_answer} completions ended before their answer")
    if counts.with_context:
        lines.append(
            f"{counts.context_tokens:,} tokens of {counts.with_context} traces, such as results of tools, are never supervised"
        )
    return lines


def _listed(what: str, found: list[str]) -> list[str]:
    if not found:
        return []
    more = [f"  ... and {len(found) - 5} more"] if len(found) > 5 else []
    return [f"{len(found)} {what}:", *(f"  {line}" for line in found[:5]), *more]


def describe_estimate(job: JobEstimate) -> str:
    """The text of `plan`."""
    tokens, one = job.tokens_per_trace, "engine" if job.pulling else "worker"
    workers = f"1 {one}" if job.workers == 1 else f"each of {job.workers} {one}s"
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
    if job.workers > 1 and not job.pulling:
        lines["time"] += "; shares differ in length, so the last worker may take longer: `--ray` shares as they go"
    notes = [*(describe_source(job.source) if job.source else []), *(f"warning: {text}" for text in job.warnings)]
    return "\n".join([*(f"{name:<8}{text}" for name, text in lines.items()), *notes])


def _range(value: Estimate, units: Units) -> str:
    return in_units(value.mean, value.low, value.high, units)
