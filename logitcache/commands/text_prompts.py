"""Text about a source of prompts: what it has and what of it is not used."""

from logitcache.prompts import SourceCounts
from logitcache.prompts.layouts import suggestion


def describe_source(counts: SourceCounts) -> list[str]:
    """A line for each thing in a source that is not used, or not as it may have been meant."""
    lines = []
    if counts.repeated:
        lines.append(f"{counts.repeated:,} repeated prompts were read once")
    if counts.dropped_turns:
        lines.append(
            f"{counts.dropped_turns:,} of {counts.prompts:,} prompts ended with an assistant turn, which was dropped: "
            "`logitcache score` takes it as the completion"
        )
    if counts.unused:
        lines.append(f"columns not used: {_listed(counts.unused, counts.prompts)}")
    if counts.metadata:
        lines.append(f"columns kept as metadata only: {_listed(counts.metadata, counts.prompts)}")
    way_out = suggestion("answer", counts.metadata)
    if counts.unanswered and (way_out or counts.unanswered < counts.prompts):
        hint = f"; is it {way_out}?" if way_out else ""
        lines.append(f"{counts.unanswered:,} of {counts.prompts:,} prompts have no gold answer{hint}")
    return lines


def _listed(columns: dict[str, int], prompts: int) -> str:
    """Columns, with the number of prompts that have each where not all have it."""
    return ", ".join(name if n == prompts else f"{name} ({n:,} of {prompts:,})" for name, n in columns.items())
