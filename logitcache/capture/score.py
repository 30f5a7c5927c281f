"""Existing text -> traces with the teacher's rows: text from a file, or tokens of another cache, whole or cropped."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from logitcache import prompts
from logitcache.cache.reader import Cache
from logitcache.capture.job import JobOptions, Request, Tokens, identify
from logitcache.capture.runner import fill
from logitcache.capture.summary import Summary
from logitcache.capture.traces import rows_of, trace_of
from logitcache.errors import InputError, PromptsError
from logitcache.grading.verdicts import check_answers, verdict
from logitcache.identity import Identity
from logitcache.inference import model
from logitcache.inference.engine import Completion
from logitcache.inference.model import ModelFacts, Sampling
from logitcache.prompts import Prompt
from logitcache.runtime.options import Option
from logitcache.sections import SECTIONS_GROUP, Sections, answer_text
from logitcache.trace import Trace


@dataclass(frozen=True, slots=True)
class Crop:
    """The part of each trace that the teacher reads: ``left``, ``middle`` or ``right``, and its share."""

    where: str = "left"
    share: float = 1.0

    def __str__(self) -> str:
        return f"{self.where}:{self.share}"

    @classmethod
    def parse(cls, text: str) -> "Crop":
        """``right:0.5`` is the last half of a trace's tokens, prompt included."""
        where, _, share = text.partition(":")
        try:
            crop = cls(where, float(share))
        except ValueError:
            crop = cls("", 0)
        if crop.where not in ("left", "middle", "right") or not 0 < crop.share <= 1:
            raise InputError(f"`crop` {text!r}: write left:SHARE, middle:SHARE or right:SHARE, with 0 < SHARE <= 1")
        return crop

    def span(self, length: int) -> slice:
        """The span of tokens to keep, at least one."""
        kept = max(1, int(self.share * length + 1e-9))  # without 1e-9, 0.29 of 100 would be 28
        start = {"left": 0, "middle": (length - kept) // 2, "right": length - kept}[self.where]
        return slice(start, start + kept)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JobOptions):
    """Options of one call of `score`: for a file of prompts with completions, or for the traces of another cache."""

    traces: Annotated[
        str | None,
        Option(
            "A .jsonl or .parquet file with `prompt` or `messages`, and `completion` (optional `id`, `answer`, "
            "`finish_reason`; other columns are kept as metadata).",
            positional=True,
        ),
    ] = None
    from_cache: Annotated[
        Path | None, Option("Score the tokens of this cache's traces instead of the text of a file.")
    ] = None
    crop: Annotated[
        Crop | None,
        Option(
            "Show the teacher only a part of each trace: left, middle or right, such as right:0.5.",
            metavar="SIDE:SHARE",
            default="whole traces",
        ),
    ] = None
    eos: Annotated[bool, Option("End the completions of a file with the end-of-sequence token.", SECTIONS_GROUP)] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.traces is None) == (self.from_cache is None):
            raise InputError("give either `traces`, a file of prompts with completions, or `from_cache`, a cache")
        if self.from_cache is None:
            if self.crop:
                raise InputError("`crop` cuts the traces of a cache; give `from_cache`")
            return
        object.__setattr__(self, "from_cache", Path(self.from_cache))
        for name in ("reasoning_markers", "answer_regex", "template_args"):
            if getattr(self, name):
                raise InputError(f"`{name}`: `from_cache` takes tokens and sections as they are; leave it out")
        if not self.eos:
            raise InputError("`eos`: `from_cache` takes tokens as they are; leave it out")

    @property
    def source(self) -> str:
        return str(self.from_cache or self.traces)


def score(options: ScoreOptions) -> Summary:
    """Scores existing text with the teacher, and writes the missing traces to the cache ``options.out``.

    Raises: as `generate`.
    """
    cache = Cache.open(options.from_cache) if options.from_cache else None
    facts = model.inspect_model(options.spec)
    # The identity's sampling is empty: nothing was sampled from this teacher.
    if cache is None:
        identity = identify(options, facts, {}, ("score" if options.eos else "score --no-eos",))
        texts = _Texts(options, facts)
        if options.verifier:
            asked = (request.content.prompt for request in texts.requests(identity))
            check_answers(options.verifier, options.source, ((p.answer, p.metadata) for p in asked))
        return fill(texts, identity)
    if options.verifier:
        check_answers(options.verifier, options.source, ((a, {}) for a in cache.column("answer").to_pylist()))
    words = f"score --from-cache {cache.identity.digest}" + (f" --crop {options.crop}" if options.crop else "")
    identity = replace(
        identify(options, facts, {}, (*cache.identity.derived, words)),
        chat_template_hash=cache.identity.chat_template_hash,
        reasoning_markers=cache.identity.reasoning_markers,
        answer_regex=cache.identity.answer_regex,
    )
    return fill(_Traces(options, facts, cache), identity)


@dataclass(frozen=True, slots=True)
class _Text:
    prompt: Prompt
    completion: str
    finish_reason: str


class _Texts:
    """Prompts with completions, as text."""

    scored, sampling = True, Sampling()

    def __init__(self, options: ScoreOptions, facts: ModelFacts) -> None:
        self.options, self.facts = options, facts

    def requests(self, identity: Identity) -> Iterator[Request]:
        contents: dict[str, str] = {}  # of each prompt id
        samples: Counter[str] = Counter()
        repeats: Counter[str] = Counter()
        for i, (where, row) in enumerate(prompts.rows(self.options.source)):
            if i == self.options.limit:
                return
            completion, reason = row.pop("completion", None), row.pop("finish_reason", None) or "stop"
            if not isinstance(completion, str):
                raise PromptsError(f"{where}: `completion` is a {type(completion).__name__}, expected text")
            prompt, _ = prompts.parse(where, row)
            if contents.setdefault(prompt.id, prompt.digest()) != prompt.digest():
                raise PromptsError(
                    f"{where}: id {prompt.id!r} is used by another prompt above; give each prompt its own id"
                )
            # By content, not by position, so that inserting a row does not change other ids.
            text = hashlib.blake2b(
                json.dumps([prompt.digest(), completion, reason]).encode(), digest_size=16
            ).hexdigest()
            trace_id = identity.trace_id(prompt.id, text, repeats[text])
            yield Request(trace_id, prompt.id, samples[prompt.id], _Text(prompt, completion, str(reason)))
            repeats[text] += 1
            samples[prompt.id] += 1

    def tokens(self, request: Request) -> Tokens:
        text: _Text = request.content
        prompt = model.render(self.facts, text.prompt, self.options.template_args)
        tokenizer: Any = self.facts.tokenizer
        completion: list[int] = tokenizer(text.completion, add_special_tokens=False)["input_ids"]
        ended = bool(completion) and completion[-1] in self.facts.eos_ids
        if self.options.eos and text.finish_reason == "stop" and not ended and tokenizer.eos_token_id is not None:
            completion.append(tokenizer.eos_token_id)
        return Tokens([*prompt, *completion], len(prompt))

    def trace(self, request: Request, completion: Completion, identity: Identity) -> Trace:
        text: _Text = request.content
        completion = replace(completion, finish_reason=text.finish_reason)
        return trace_of(request, text.prompt, completion, identity, self.facts, self.options.verifier)


class _Traces:
    """Traces of another cache, with their tokens and sections."""

    scored, sampling = True, Sampling()

    def __init__(self, options: ScoreOptions, facts: ModelFacts, cache: Cache) -> None:
        self.options, self.facts, self.cache = options, facts, cache
        self.crop = options.crop or Crop()
        if options.out.resolve() == cache.path.resolve():
            raise InputError(f"`out` {options.out} is the cache to score; give a new directory")
        if (there := cache.identity.tokenizer_hash) != facts.tokenizer_hash:
            raise InputError(
                f"{cache.path} was made with tokenizer {there[:12]}, `teacher` {options.teacher} has "
                f"{facts.tokenizer_hash[:12]}: its token ids mean other tokens; score the text instead (a .jsonl file)"
            )

    def requests(self, identity: Identity) -> Iterator[Request]:
        ids = zip(self.cache.trace_ids, self.cache.prompt_ids, strict=True)
        for i, (trace_id, prompt_id) in enumerate(ids):
            if i == self.options.limit:
                return
            yield Request(identity.trace_id(prompt_id, trace_id, 0), prompt_id, 0, i)

    def tokens(self, request: Request) -> Tokens:
        token_ids, spans = self.cache.tokens(request.content)
        span = self.crop.span(len(token_ids))
        return Tokens(token_ids[span].tolist(), _cropped(spans, span).prompt_end)

    def trace(self, request: Request, completion: Completion, identity: Identity) -> Trace:
        trace, verifier = self.cache[request.content], self.options.verifier
        span = self.crop.span(len(trace.token_ids))
        rows = rows_of(completion, identity)
        text, correct = trace.text, trace.correct
        if span != slice(0, len(trace.token_ids)):
            text = self._text(trace, span)
        if verifier:  # grades the whole answer, of which a crop may have only a part
            answer = answer_text(trace.text, trace.sections, identity.markers)
            correct = verdict(verifier, answer, trace.answer, trace.metadata)
        return replace(
            trace,
            trace_id=request.trace_id,
            token_ids=completion.token_ids,
            sections=_cropped(trace.sections, span),
            row_start=len(completion.token_ids) - len(rows),
            rows=rows,
            token_logprob=completion.token_logprob,
            token_rank=completion.token_rank,
            text=text,
            correct=correct,
        )

    def _text(self, trace: Trace, span: slice) -> str:
        pieces = model.token_texts(self.facts, trace.token_ids[span].tolist())
        ended = int(trace.token_ids[span][-1]) in self.facts.eos_ids
        start = max(0, trace.sections.prompt_end - span.start)
        return "".join(piece or "" for piece in pieces[start : len(pieces) - ended])


def _cropped(spans: Sections, span: slice) -> Sections:
    return Sections(*(min(max(bound - span.start, 0), span.stop - span.start) for bound in spans.bounds()))
