"""What one call of `generate` or `score` did."""

from dataclasses import dataclass, field


@dataclass
class Summary:
    """Counts are of traces."""

    wanted: int = 0  # of this worker
    before: int = 0  # present when the call began
    others: int = 0  # that other workers make
    made: int = 0
    tokens: int = 0  # that the teacher wrote, or rows that it scored
    seconds: float = 0.0  # without loading
    load_seconds: float = 0.0
    repeated: int = 0  # prompts that stand in the source more than once
    unjudged: int = 0  # present without the verdicts that this call gives
    skipped: dict[str, str] = field(default_factory=dict)  # prompt id -> why it cannot be put to the teacher
    skipped_traces: list[str] = field(default_factory=list)  # their trace ids; later calls skip them too
    failed: dict[str, str] = field(default_factory=dict)  # trace id -> why its completion cannot be stored
    stopped: str | None = None  # the signal that ended the call early

    def skip(self, trace_id: str, prompt_id: str, why: str) -> None:
        """Counts a trace that cannot be put to the teacher."""
        self.skipped[prompt_id] = why
        self.skipped_traces.append(trace_id)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
