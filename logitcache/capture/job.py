"""What a teacher is asked to fill a cache with: options, identity, requests."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from logitcache.cache.workers import Worker
from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.identity import Identity
from logitcache.inference import model
from logitcache.inference.engine import Completion
from logitcache.inference.model import ModelFacts, ModelSpec
from logitcache.sections import Markers
from logitcache.trace import Trace


@dataclass(frozen=True)
class CacheOptions:
    """What every command says that fills a cache: which teacher, which rows, where to."""

    source: str
    out: Path
    spec: ModelSpec
    top_p: float | None = None
    min_k: int = 1
    pin_tokens: str = "auto"  # or "none", or ids and tokens, comma-separated
    exact: bool = False
    markers: Markers | None = None  # None: found in the tokenizer or the chat template
    answer_regex: str | None = None  # for completions without markers
    verifier: str | None = None  # one of verdicts.KINDS
    limit: int | None = None
    unit_size: int = 64  # traces that become one shard
    worker: Worker = field(default_factory=Worker)

    def __post_init__(self) -> None:
        if self.unit_size < 1 or self.min_k < 1 or (self.limit is not None and self.limit < 1):
            raise InputError("`unit_size`, `min_k` and `limit` must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` {self.top_p}: the share of mass a row keeps lies in (0, 1]")
        if self.min_k > self.spec.top_k:
            raise InputError(f"`min_k` {self.min_k} is above `top_k` {self.spec.top_k}")
        Markers(answer_regex=self.answer_regex)  # refuses a broken pattern
        if self.verifier is not None:
            verdicts.check(self.verifier)


@dataclass(frozen=True, slots=True)
class Request:
    """One trace that is wanted."""

    trace_id: str
    prompt_id: str
    sample_index: int
    content: Any  # what the task makes token ids of


class Tokens(NamedTuple):
    """What the engine gets for a request: of a text that is scored, all of it."""

    ids: list[int]
    prompt_length: int


class Task(Protocol):
    """What the teacher is asked, and what its answers become."""

    @property
    def options(self) -> CacheOptions: ...

    @property
    def scored(self) -> bool:
        """Whether rows of text that exists are asked for, and no completion."""
        ...

    def requests(self, identity: Identity) -> Iterable[Request]:
        """All that is wanted, by all workers; the same each time."""
        ...

    def tokens(self, request: Request) -> Tokens:
        """Raises: InputError where there is nothing to ask."""
        ...

    def trace(self, request: Request, completion: Completion, identity: Identity) -> Trace: ...


def identify(
    options: CacheOptions, facts: ModelFacts, sampling: dict[str, Any], derived: tuple[str, ...] = ()
) -> Identity:
    """The identity of the cache that ``options`` would make."""
    spec, markers = options.spec, options.markers or Markers.detect(facts.tokenizer.get_vocab(), facts.chat_template)
    return Identity(
        teacher=facts.name,
        teacher_revision=facts.revision,
        tokenizer_hash=facts.tokenizer_hash,
        chat_template_hash=facts.chat_template_hash,
        vocab_size=facts.vocab_size,
        top_k=spec.top_k,
        top_p=options.top_p,
        min_k=options.min_k,
        prompt_logits=spec.prompt_logits,
        sampling=sampling,
        reasoning_markers=markers.pair,
        answer_regex=options.answer_regex,
        dtype=facts.dtype,
        engine=model.engine_version(),
        engine_args=spec.identity_args(),
        pin_tokens=model.pinned_ids(options.pin_tokens, facts, markers, spec.top_k),
        exact=options.exact,
        derived=list(derived),
    )
