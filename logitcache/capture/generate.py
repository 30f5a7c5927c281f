"""Prompts -> the teacher's answers, with its rows: what is in the cache is not made again."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from logitcache import prompts, sections
from logitcache.capture.job import CacheOptions, Request, Tokens, identify
from logitcache.capture.runner import fill, rows_of
from logitcache.capture.summary import Summary
from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.identity import Identity
from logitcache.inference import model
from logitcache.inference.engine import Completion
from logitcache.inference.model import ModelFacts
from logitcache.prompts import Prompt
from logitcache.trace import Trace


@dataclass(frozen=True)
class GenerateOptions(CacheOptions):
    """One call of ``logitcache generate``."""

    samples: int = 1
    draw: int | None = None  # only so many of the prompts, from all over the source

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or (self.draw is not None and self.draw < 1):
            raise InputError("`samples` and `try_prompts` must be at least 1")
        if self.samples > 1 and self.spec.temperature == 0:
            raise InputError(
                f"`samples` {self.samples} at `temperature` 0 are {self.samples} times the same; set one of the two"
            )


def generate(options: GenerateOptions) -> Summary:
    """Fills the cache at ``options.out`` with what is missing of prompts times samples, as `fill` does.

    Raises: InputError and CacheError before anything is written; EngineError and WriteError, after which the same call
        goes on where this one stopped.
    """
    spec = options.spec
    source = prompts.load(options.source, options.limit)
    facts = model.inspect_model(spec)
    model.render(facts, source.prompts[0], spec.template_args)  # what it refuses, it refuses now
    sampling = {"temperature": spec.temperature, "max_tokens": spec.max_tokens, "seed": spec.seed, **spec.sampling}
    drawn = source.prompts if options.draw is None else sorted(source.prompts, key=_lot)[: options.draw]
    summary = fill(_Answers(options, facts, drawn), identify(options, facts, sampling))
    summary.repeated = source.repeated
    return summary


def _lot(prompt: Prompt) -> bytes:
    """A prompt's place in a random order that is the same every time."""
    return hashlib.blake2b(prompt.id.encode(), person=b"draw").digest()


class _Answers:
    """The teacher answers prompts."""

    scored = False

    def __init__(self, options: GenerateOptions, facts: ModelFacts, prompts: list[Prompt]) -> None:
        self.options, self.facts, self.prompts = options, facts, prompts
        self.rendered: tuple[Prompt, Tokens] | None = None

    def requests(self, identity: Identity) -> Iterator[Request]:
        for prompt in self.prompts:
            digest = prompt.digest()
            for sample in range(self.options.samples):
                yield Request(identity.trace_id(prompt.id, digest, sample), prompt.id, sample, prompt)

    def tokens(self, request: Request) -> Tokens:
        prompt = request.content
        if self.rendered is None or self.rendered[0] is not prompt:  # samples of one prompt follow each other
            token_ids = model.render(self.facts, prompt, self.options.spec.template_args)
            self.rendered = prompt, Tokens(token_ids, len(token_ids))
        return self.rendered[1]

    def trace(self, request: Request, completion: Completion, identity: Identity) -> Trace:
        return trace_of(request, request.content, completion, identity, self.facts, self.options.verifier)


def trace_of(
    request: Request,
    prompt: Prompt,
    completion: Completion,
    identity: Identity,
    facts: ModelFacts,
    verifier: str | None,
) -> Trace:
    """The trace of a finished completion: sections found, rows sorted and trimmed, the answer judged."""
    token_ids, prompt_length = completion.token_ids, completion.prompt_length
    pieces = model.pieces(facts, token_ids.tolist())
    ended = len(token_ids) > prompt_length and int(token_ids[-1]) in facts.eos_ids
    spans = sections.find(pieces, prompt_length, identity.markers)
    said = pieces[: len(pieces) - ended]
    text, answer = ("".join(p or "" for p in said[start:]) for start in (prompt_length, spans.answer.start))
    rows = rows_of(completion, identity)
    correct = verdicts.verdict(verifier, answer, prompt.answer, prompt.metadata) if verifier else None
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
