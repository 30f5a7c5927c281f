"""The result of one call of `generate` or `score`."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

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

    def merge(self, other: "SectionCounts") -> None:
        self.markers = other.markers
        for pair, count in other.unmarked.items():
            self.unmarked[pair] = self.unmarked.get(pair, 0) + count
        for name in ("spelled", "without_reasoning", "without_answer", "with_context", "context_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Counts:
    """What the traces of a new shard are like."""

    traces: int = 0
    tokens: int = 0
    sections: SectionCounts = field(default_factory=SectionCounts)
    no_verdict: Counter[str] = field(default_factory=Counter)
    remarks: dict[str, set[str]] = field(default_factory=dict)  # remark -> prompt ids

    def remark(self, remarks: Iterable[str], prompt_id: str) -> None:
        for remark in remarks:
            self.remarks.setdefault(remark, set()).add(prompt_id)


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
    deadly: dict[str, str] = field(default_factory=dict)  # trace id -> prompt id: three engines died with it
    ignored: list[str] = field(default_factory=list)  # shards without an index that stay where they are
    remarked: dict[str, set[str]] = field(default_factory=dict)  # what was read otherwise than it looks -> prompt ids
    engines: int = 1  # that worked
    deaths: int = 0  # of engines
    stopped: str | None = None  # the signal that stopped the call

    def add(self, counts: Counts) -> None:
        """Counts a published shard."""
        self.made += counts.traces
        self.tokens += counts.tokens
        self.sections.merge(counts.sections)
        for why, count in counts.no_verdict.items():
            self.no_verdict[why] = self.no_verdict.get(why, 0) + count
        for remark, prompts in counts.remarks.items():
            self.remarked.setdefault(remark, set()).update(prompts)

    @property
    def remarks(self) -> dict[str, int]:
        """What was read otherwise than it looks -> prompts."""
        return {remark: len(prompts) for remark, prompts in self.remarked.items()}

    def skip(self, trace_id: str, prompt_id: str, why: str) -> None:
        """Counts a trace that the teacher cannot take."""
        self.skipped[prompt_id] = why
        self.skipped_traces.append(trace_id)

    def to_json(self) -> dict[str, Any]:
        """The record that stays with the logs."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "remarked"}
        return found | {"source": asdict(self.source), "sections": asdict(self.sections), "remarks": self.remarks}

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
