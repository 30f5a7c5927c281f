"""Prompts -> the teacher's answers, with its rows: what is in the cache is not made again."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache import prompts, sections, teacher, verdicts
from logitcache.engine import Completion
from logitcache.errors import InputError
from logitcache.fill import Request, Summary, Target, fill, rows_of
from logitcache.manifest import Identity
from logitcache.prompts import Prompt
from logitcache.schema import Trace
from logitcache.sections import Markers
from logitcache.teacher import TeacherFacts, TeacherSpec
from logitcache.workers import Worker


@dataclass(frozen=True)
class CacheOptions:
    """What every command says that fills a cache: which teacher, which rows, where to."""

    source: str
    out: Path
    spec: TeacherSpec
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
            raise InputError("--unit-size, --min-k and --limit must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: the share of mass a row keeps lies in (0, 1]")
        if self.min_k > self.spec.top_k:
            raise InputError(f"--min-k {self.min_k} is above --top-k {self.spec.top_k}")
        Markers(answer_regex=self.answer_regex)  # refuses a broken pattern
        if self.verifier is not None:
            verdicts.check(self.verifier)

    @property
    def target(self) -> Target:
        return Target(self.out, self.unit_size, self.worker)


@dataclass(frozen=True)
class GenerateOptions(CacheOptions):
    """One call of ``logitcache generate``."""

    samples: int = 1
    draw: int | None = None  # only so many of the prompts, from all over the source

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or (self.draw is not None and self.draw < 1):
            raise InputError("--samples and --traces must be at least 1")
        if self.samples > 1 and self.spec.temperature == 0:
            raise InputError(
                f"--samples {self.samples} at --temperature 0 are {self.samples} times the same; set one of the two"
            )


def generate(options: GenerateOptions) -> Summary:
    """Fills the cache at ``options.out`` with what is missing of prompts times samples, as `fill` does.

    Raises: InputError and CacheError before anything is written; EngineError and WriteError, after which the same call
        goes on where this one stopped.
    """
    spec = options.spec
    source = prompts.load(options.source, options.limit)
    facts = teacher.inspect(spec)
    teacher.render(facts, source.prompts[0], spec.template_args)  # what it refuses, it refuses now
    sampling = {"temperature": spec.temperature, "max_tokens": spec.max_tokens, "seed": spec.seed, **spec.sampling}
    drawn = source.prompts if options.draw is None else sorted(source.prompts, key=_lot)[: options.draw]
    summary = fill(_Answers(options, facts, drawn), options.target, identify(options, facts, sampling))
    summary.repeated = source.repeated
    return summary


def _lot(prompt: Prompt) -> bytes:
    """A prompt's place in a random order that is the same every time."""
    return hashlib.blake2b(prompt.id.encode(), person=b"draw").digest()


def identify(
    options: CacheOptions, facts: TeacherFacts, sampling: dict[str, Any], derived: tuple[str, ...] = ()
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
        reasoning_markers=[markers.opening, markers.closing] if markers.opening and markers.closing else None,
        answer_regex=options.answer_regex,
        dtype=facts.dtype,
        engine=teacher.engine_version(),
        engine_args=spec.identity_args(),
        pin_tokens=teacher.pinned_ids(options.pin_tokens, facts, markers, spec.top_k),
        exact=options.exact,
        derived=list(derived),
    )


@dataclass
class _Answers:
    """The teacher answers prompts."""

    options: GenerateOptions
    facts: TeacherFacts
    prompts: list[Prompt]
    scored: bool = False

    @property
    def spec(self) -> TeacherSpec:
        return self.options.spec

    @property
    def source(self) -> str:
        return self.options.source

    def requests(self, identity: Identity) -> Iterator[Request]:
        for prompt in self.prompts:
            digest = prompt.digest()
            for sample in range(self.options.samples):
                yield Request(identity.trace_id(prompt.id, digest, sample), prompt.id, sample, prompt)

    def token_ids(self, request: Request) -> list[int]:
        return teacher.render(self.facts, request.content, self.spec.template_args)

    def trace(self, request: Request, completion: Completion, identity: Identity) -> Trace:
        return trace_of(request, request.content, completion, identity, self.facts, self.options.verifier)


def trace_of(
    request: Request,
    prompt: Prompt,
    completion: Completion,
    identity: Identity,
    facts: TeacherFacts,
    verifier: str | None,
) -> Trace:
    """The trace of a finished completion: sections found, rows sorted and trimmed, the answer judged."""
    token_ids, prompt_length = completion.token_ids, completion.prompt_length
    pieces = teacher.pieces(facts, token_ids.tolist())
    ended = len(token_ids) > prompt_length and int(token_ids[-1]) in facts.eos_ids
    spans = sections.find(pieces, prompt_length, identity.markers)
    text = "".join(piece or "" for piece in pieces[prompt_length : len(pieces) - ended])
    rows = rows_of(completion, identity)
    correct = None
    if verifier:
        answer = sections.answer_text(text, spans, identity.markers)
        correct = verdicts.verdict(verifier, answer, prompt.answer, prompt.metadata)
    return Trace(
        trace_id=request.trace_id,
        prompt_id=prompt.id,
        sample_index=request.sample_index,
        token_ids=token_ids,
        sections=spans,
        row_start=len(token_ids) - len(rows),
        rows=rows,
        token_logprob=completion.token_logprob,
        token_rank=completion.token_rank,
        text=text,
        finish_reason=completion.finish_reason,
        answer=prompt.answer,
        correct=correct,
        metadata=prompt.metadata,
    )
