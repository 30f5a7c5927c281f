"""The result of one call of `generate` or `score`."""

from dataclasses import dataclass, field


@dataclass
class Summary:
    """Counts are of traces."""

    wanted: int = 0  # of this worker
    before: int = 0  # present when the call began
    others: int = 0  # traces of other workers
    made: int = 0
    tokens: int = 0  # generated tokens, or scored rows
    seconds: float = 0.0  # without loading
    load_seconds: float = 0.0
    repeated: int = 0  # repeated prompts in the source, used once
    unjudged: int = 0  # existing traces without the verdicts that this call gives
    completed: int = 0  # present traces of shards that had no index: a kill or a full disk left them
    set_aside: list[str] = field(
        default_factory=list
    )  # shards without an index that were not whole, where they are now
    skipped: dict[str, str] = field(default_factory=dict)  # prompt id -> why the teacher cannot take it
    skipped_traces: list[str] = field(default_factory=list)  # their trace ids; later calls skip them too
    failed: dict[str, str] = field(default_factory=dict)  # trace id -> why its completion cannot be stored
    stopped: str | None = None  # the signal that stopped the call

    def skip(self, trace_id: str, prompt_id: str, why: str) -> None:
        """Counts a trace that the teacher cannot take."""
        self.skipped[prompt_id] = why
        self.skipped_traces.append(trace_id)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
