"""Prompts -> traces with top-k rows: the teacher answers the prompts whose traces are missing."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from logitcache import prompts
from logitcache.capture.job import Context, JobOptions, PromptOptions, Request, Task, Tokens, identify
from logitcache.capture.runner import run
from logitcache.capture.summary import Summary
from logitcache.capture.traces import trace_of
from logitcache.grading import verdicts
from logitcache.identity import Identity
from logitcache.inference import model
from logitcache.inference.engine import Completion
from logitcache.inference.model import ModelFacts, Sampling
from logitcache.inference.rendering import remarks, render
from logitcache.prompts import Prompt, SourceCounts
from logitcache.runtime.options import at_least
from logitcache.trace import Trace


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(PromptOptions, JobOptions):
    """Options of one call of `generate`."""

    draw: int | None = None  # answer only this many prompts, drawn at random from the whole source

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("draw", self.draw, 1)

    def task(self, *, reading: bool = True) -> tuple[Task, Identity]:
        source = prompts.load(self.prompts, self.limit, self.columns) if reading else None
        if source and self.verifier:
            verdicts.check_answers(self.verifier, self.source, ((p.answer, p.metadata) for p in source))
        facts = model.inspect_model(self.spec)
        identity = identify(self, facts, _recorded(self))
        if source is None:
            return _Answers(self, facts, [], SourceCounts()), identity
        drawn = source.prompts if self.draw is None else sorted(source.prompts, key=_lot)[: self.draw]
        return _Answers(self, facts, drawn, source.counts), identity


def generate(options: GenerateOptions) -> Summary:
    """Generates the missing traces of the cache ``options.out``, which has one trace per prompt and sample.

    Raises: InputError and CacheError before anything is written; EngineError and WriteError, after which the same call
        resumes.
    """
    return run(options)


def _recorded(options: GenerateOptions) -> dict[str, Any]:
    """The sampling parameters as the identity stores them."""
    given = {"temperature": options.temperature, "max_tokens": options.max_tokens, "seed": options.seed}
    return given | options.sampling


def _lot(prompt: Prompt) -> bytes:
    """The prompt's key in a random order that is the same in every run."""
    return hashlib.blake2b(prompt.id.encode(), person=b"draw").digest()


class _Answers:
    """The task of `generate`: completions of prompts."""

    scored = False

    def __init__(
        self, options: GenerateOptions, facts: ModelFacts, prompts: list[Prompt], counts: SourceCounts
    ) -> None:
        self.options, self.facts, self.prompts, self.counts = options, facts, prompts, counts
        self._rendered: tuple[Prompt, Tokens] | None = None

    @property
    def sampling(self) -> Sampling:
        return self.options.drawn

    def requests(self, identity: Identity) -> Iterator[Request]:
        for prompt in self.prompts:
            digest = prompt.digest()
            for sample in range(self.options.samples):
                yield Request(identity.trace_id(prompt.id, digest, sample), prompt.id, sample, prompt)

    def tokens(self, request: Request) -> Tokens:
        prompt = request.content
        if self._rendered is None or self._rendered[0] is not prompt:  # samples of one prompt follow each other
            token_ids = render(self.facts, prompt, self.options.template_args)
            self._rendered = prompt, Tokens(token_ids, len(token_ids), remarks=tuple(remarks(self.facts, prompt)))
        return self._rendered[1]

    def trace(self, request: Request, completion: Completion, identity: Identity, context: Context) -> Trace:
        return trace_of(request, request.content, completion, identity, self.facts, self.options.verifier, context)
