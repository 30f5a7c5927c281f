"""What a call did that filled a cache."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Summary:
    """Counts are of traces. ``stopped`` names the signal that ended the call early."""

    wanted: int = 0  # of this worker
    before: int = 0
    others: int = 0  # for other workers to make
    made: int = 0
    tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    repeated: int = 0  # prompts that the source gives more than once
    unjudged: int = 0  # that were there, without the verdicts that this call gives
    skipped: dict[str, str] = field(default_factory=dict)  # prompt id -> why the teacher cannot be asked
    skipped_traces: list[str] = field(default_factory=list)  # their trace ids: later calls pass them by
    failed: dict[str, str] = field(default_factory=dict)  # trace id -> whose answer cannot be kept, and why
    stopped: str | None = None

    def skip(self, trace_id: str, prompt_id: str, why: str) -> None:
        """The teacher cannot be asked for this one."""
        self.skipped[prompt_id] = why
        self.skipped_traces.append(trace_id)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def text(self, out: Path) -> str:
        """What to tell a person at the end."""
        lines = []
        if self.repeated:
            lines.append(f"{self.repeated} repeated prompts were read once")
        lines += _listed("prompts skipped", [f"{prompt}: {why}" for prompt, why in self.skipped.items()])
        lines += _listed("answers lost", list(self.failed.values()))
        if self.unjudged:
            lines.append(
                f"{self.unjudged} traces of earlier calls have no verdict: `logitcache slice --verifier` judges them"
            )
        if self.others:
            lines.append(f"{self.others} traces are for other workers to make")
        if self.stopped:
            lines.append(f"stopped by {self.stopped}: run the same command again to go on")
        if self.before + len(self.skipped_traces) == self.wanted and not self.made:
            others = f", {len(self.skipped_traces)} were skipped" if self.skipped_traces else ""
            lines.append(f"{out}: nothing to do, all {self.before} traces are there{others}")
        else:
            lines.append(
                f"{out}: {self.made} traces made, {self.before + self.made} of {self.wanted} there; "
                f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.tokens_per_s:,.0f} tokens/s"
            )
        return "\n".join(lines)


def _listed(what: str, found: list[str]) -> list[str]:
    if not found:
        return []
    more = [f"  ... and {len(found) - 5} more"] if len(found) > 5 else []
    return [f"{len(found)} {what}:", *(f"  {line}" for line in found[:5]), *more]
