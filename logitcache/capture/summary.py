"""The result of one call of `generate` or `score`."""

from dataclasses import dataclass, field

from logitcache.prompts import SourceCounts
from logitcache.sections import Markers, known_pair
from logitcache.trace import Trace


@dataclass
class SectionCounts:
    """What the sections of new traces look like, in traces."""

    markers: str = "none"  # that were searched for
    unmarked: dict[str, int] = field(default_factory=dict)  # known markers that were not searched for, OPENING,CLOSING
    spelled: int = 0  # text that only spells the closing marker, with tokens of its own
    without_reasoning: int = 0  # markers were searched for, none was found
    without_answer: int = 0  # the completion ended before its answer
    with_context: int = 0  # traces with tokens that are never supervised
    context_tokens: int = 0  # those tokens

    def add(self, trace: Trace, markers: Markers) -> None:
        self.markers = str(markers)
        sizes = trace.sections.sizes()
        own_text = "" if len(trace.context_spans) else trace.text  # a tool's result may quote a marker
        delimited = any(sizes[name] for name in ("opening", "reasoning", "closing"))
        pair = None if delimited else known_pair(trace.text)
        if pair and markers.format != Markers(*pair).format:
            name = ",".join(pair)
            self.unmarked[name] = self.unmarked.get(name, 0) + 1
        elif markers.closing and not sizes["closing"] and markers.closing in own_text:
            self.spelled += 1
        self.without_reasoning += bool(markers.pair and not delimited and sizes["answer"])
        self.without_answer += not sizes["answer"]
        self.with_context += bool(len(trace.context_spans))
        self.context_tokens += int(trace.is_context.sum())


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
    source: SourceCounts = field(default_factory=SourceCounts)
    sections: SectionCounts = field(default_factory=SectionCounts)
    unjudged: int = 0  # existing traces without the verdicts that this call gives
    no_verdict: dict[str, int] = field(default_factory=dict)  # traces that could not be graded, by reason
    completed: int = 0  # present traces of shards that had no index: a kill or a full disk left them
    set_aside: list[str] = field(
        default_factory=list
    )  # shards without an index that were not whole, where they are now
    skipped: dict[str, str] = field(default_factory=dict)  # prompt id -> why the teacher cannot take it
    skipped_traces: list[str] = field(default_factory=list)  # their trace ids; later calls skip them too
    failed: dict[str, str] = field(default_factory=dict)  # trace id -> why its completion cannot be stored
    remarks: dict[str, int] = field(default_factory=dict)  # what was read otherwise than it looks -> prompts
    stopped: str | None = None  # the signal that stopped the call

    def skip(self, trace_id: str, prompt_id: str, why: str) -> None:
        """Counts a trace that the teacher cannot take."""
        self.skipped[prompt_id] = why
        self.skipped_traces.append(trace_id)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
