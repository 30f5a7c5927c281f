"""Existing text -> traces with the teacher's rows: text from a file, or tokens of another cache, whole or cropped."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from logitcache import prompts
from logitcache.cache.reader import Cache
from logitcache.capture.job import Context, JobOptions, Request, Task, Tokens, identify
from logitcache.capture.runner import run
from logitcache.capture.summary import Summary
from logitcache.capture.traces import rows_of, trace_of
from logitcache.errors import InputError, PromptsError
from logitcache.grading.verdicts import check_answers, verdict
from logitcache.identity import Identity
from logitcache.inference import model
from logitcache.inference.engine import Completion
from logitcache.inference.model import ModelFacts, Sampling
from logitcache.inference.rendering import (
    encode_behind,
    given_end,
    remarks,
    render,
    turn_end,
    without_repeated_marker,
)
from logitcache.inference.token_texts import text_behind, token_texts
from logitcache.inference.transcript import transcript
from logitcache.prompts import Messages, Prompt, Reading, SourceCounts
from logitcache.runtime.options import Option
from logitcache.sections import SECTIONS_GROUP, Sections, answer_text
from logitcache.storage.location import Location, locate
from logitcache.trace import Trace

_TAIL = 32  # tokens at the end of a prompt that may hold a section marker


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
            "A source as PROMPTS of generate, with completions: `completion` (text or messages), or the turns after the "
            "last user turn (optional `finish_reason`).",
            positional=True,
        ),
    ] = None
    from_cache: Annotated[
        str | Location | None,
        Option("Score the tokens of this cache's traces instead of the text of a file.", metavar="PATH|URL"),
    ] = None
    crop: Annotated[
        Crop | None,
        Option(
            "Show the teacher only a part of each trace: left, middle or right, such as right:0.5.",
            metavar="SIDE:SHARE",
            default="whole traces",
        ),
    ] = None
    eos: Annotated[
        str,
        Option(
            "The token that ends the completions of a file: auto (what the chat template puts behind an assistant's turn), "
            "none, or a token of the vocabulary.",
            SECTIONS_GROUP,
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eos, bool):
            object.__setattr__(self, "eos", "auto" if self.eos else "none")
        if (self.traces is None) == (self.from_cache is None):
            raise InputError("give either `traces`, a file of prompts with completions, or `from_cache`, a cache")
        if self.from_cache is None:
            if self.crop:
                raise InputError("`crop` cuts the traces of a cache; give `from_cache`")
            return
        object.__setattr__(self, "from_cache", locate(self.from_cache))
        for name in ("reasoning_markers", "answer_regex", "template_args", "columns"):
            if getattr(self, name):
                raise InputError(f"`{name}`: `from_cache` takes tokens and sections as they are; leave it out")
        if self.eos != "auto":
            raise InputError("`eos`: `from_cache` takes tokens as they are; leave it out")

    @property
    def source(self) -> str:
        return str(self.from_cache or self.traces)

    def task(self, *, reading: bool = True) -> tuple[Task, Identity]:
        # The identity's sampling is empty: nothing was sampled from this teacher.
        cache = Cache.open(self.from_cache) if self.from_cache else None
        facts = model.inspect_model(self.spec)
        if cache is not None:
            return self._task_of_cache(cache, facts, reading)
        end = _end(self, facts)
        identity = identify(self, _ending(facts, end), {}, (_words(facts, end),))
        texts = _Texts(self, facts, end, identity.markers.pair)
        if reading and self.verifier:
            asked = (request.content.prompt for request in texts.requests(identity))
            check_answers(self.verifier, self.source, ((p.answer, p.metadata) for p in asked))
        return texts, identity

    def _task_of_cache(self, cache: Cache, facts: ModelFacts, reading: bool) -> tuple[Task, Identity]:
        if reading and self.verifier:
            check_answers(self.verifier, self.source, ((a, {}) for a in cache.column("answer").to_pylist()))
        words = f"score --from-cache {cache.identity.digest}" + (f" --crop {self.crop}" if self.crop else "")
        identity = replace(
            identify(self, facts, {}, (*cache.identity.derived, words)),
            chat_template_hash=cache.identity.chat_template_hash,
            reasoning_markers=cache.identity.reasoning_markers,
            answer_regex=cache.identity.answer_regex,
        )
        return _Traces(self, facts, cache), identity


def score(options: ScoreOptions) -> Summary:
    """Scores existing text with the teacher, and writes the missing traces to the cache ``options.out``.

    Raises: as `generate`.
    """
    return run(options)


def _end(options: ScoreOptions, facts: ModelFacts) -> list[int]:
    """Token ids that end a completion; empty for none."""
    if options.eos == "none":
        return []
    return turn_end(facts, options.template_args) if options.eos == "auto" else given_end(facts, options.eos)


def _ending(facts: ModelFacts, end: list[int]) -> ModelFacts:
    """The facts with the end of the texts among the ends of sequence."""
    return replace(facts, eos_ids=facts.eos_ids | {*end[-1:]})


def _words(facts: ModelFacts, end: list[int]) -> str:
    """The entry of the identity's ``derived``."""
    if not end:
        return "score --no-eos"
    tokenizer: Any = facts.tokenizer
    return "score" if end == [tokenizer.eos_token_id] else f"score --eos {tokenizer.decode(end)}"


@dataclass(frozen=True, slots=True)
class _Text:
    prompt: Prompt
    completion: str | Messages  # messages: the turns after the last user turn
    finish_reason: str


class _Texts:
    """Prompts with completions, as text."""

    scored, sampling = True, Sampling()

    def __init__(self, options: ScoreOptions, facts: ModelFacts, end: list[int], markers: list[str] | None) -> None:
        self.options, self.facts, self.end, self.markers = options, facts, end, markers
        self.ends = _ending(facts, end)
        self.counts = SourceCounts()  # of the whole source, once it was read

    def requests(self, identity: Identity) -> Iterator[Request]:
        reading = Reading(self.options.source, self.options.columns, completed=True)
        contents: dict[str, str] = {}  # of each prompt id
        samples: Counter[str] = Counter()
        repeats: Counter[str] = Counter()
        for i, (where, row) in enumerate(prompts.rows(self.options.source)):
            if i == self.options.limit:
                break
            parsed = reading.parse(where, row)
            prompt, completion, reason = parsed.prompt, parsed.completion, parsed.finish_reason
            assert completion is not None
            if contents.setdefault(prompt.id, prompt.digest()) != prompt.digest():
                raise PromptsError(
                    f"{where}: id {prompt.id!r} is used by another prompt above; give each prompt its own id"
                )
            # By content, not by position, so that inserting a row does not change other ids.
            text = hashlib.blake2b(
                json.dumps([prompt.digest(), completion, reason]).encode(), digest_size=16
            ).hexdigest()
            trace_id = identity.trace_id(prompt.id, text, repeats[text])
            yield Request(trace_id, prompt.id, samples[prompt.id], _Text(prompt, completion, reason))
            reading.count(parsed)
            repeats[text] += 1
            samples[prompt.id] += 1
        self.counts = reading.finish()

    def tokens(self, request: Request) -> Tokens:
        text: _Text = request.content
        said, noted = text.completion, [*remarks(self.facts, text.prompt)]
        if isinstance(said, list) and len(said) == 1 and _is_plain(said[0]):
            said = said[0]["content"]
        if isinstance(said, list):
            found = transcript(self.facts, text.prompt, said, self.options.template_args)
            ids, length, context = found.ids, found.prompt_length, found.context
            noted += [f"completions have {name}, which the chat template does not write" for name in sorted(found.lost)]
        else:
            ids = render(self.facts, text.prompt, self.options.template_args)
            length, context = len(ids), ()
            shown = text_behind(self.facts, [], ids[-_TAIL:])
            said, repeated = without_repeated_marker(shown, said, self.markers)
            if repeated:
                noted.append(f"completions begin with the {repeated} that ends their prompt: it was left out")
            ids = [*ids, *self._completion(ids, said)]
        closed = not context or context[-1][1] < len(ids)  # the last turn is the assistant's
        if closed:
            ids = [*ids[:length], *self._ended(ids[length:], text.finish_reason)]
        return Tokens(ids, length, context, tuple(noted))

    def _completion(self, prompt: list[int], text: str) -> list[int]:
        """Token ids of a completion, without white space behind an end of sequence."""
        ids = encode_behind(self.facts, prompt, text)
        if text[-1:].isspace() and self._is_end(shorter := encode_behind(self.facts, prompt, text.rstrip())):
            return shorter
        return ids

    def _ended(self, ids: list[int], finish_reason: str) -> list[int]:
        """A completion with an end of sequence if it finished; one that it has stays."""
        wanted = finish_reason == "stop" and not self._is_end(ids)
        return [*ids, *self.end] if wanted else ids

    def _is_end(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.ends.eos_ids

    def trace(self, request: Request, completion: Completion, identity: Identity, context: Context) -> Trace:
        text: _Text = request.content
        completion = replace(completion, finish_reason=text.finish_reason)
        return trace_of(request, text.prompt, completion, identity, self.ends, self.options.verifier, context)


def _is_plain(turn: dict[str, Any]) -> bool:
    """Whether a turn is the assistant's text and nothing else."""
    more = {name for name, value in turn.items() if value} - {"role", "content", "name"}
    return turn.get("role") == "assistant" and isinstance(turn.get("content"), str) and not more


class _Traces:
    """Traces of another cache, with their tokens and sections."""

    scored, sampling = True, Sampling()

    def __init__(self, options: ScoreOptions, facts: ModelFacts, cache: Cache) -> None:
        self.options, self.facts, self.cache, self.counts = options, facts, cache, SourceCounts()
        self.crop = options.crop or Crop()
        if isinstance(options.out, Path) and options.out.resolve() == cache.path.resolve():
            raise InputError(f"`out` {options.out} is the cache to score; give a new directory")
        if (there := cache.identity.tokenizer_hash) != facts.tokenizer_hash:
            raise InputError(
                f"{cache.location} was made with tokenizer {there[:12]}, `teacher` {options.teacher} has "
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

    def trace(self, request: Request, completion: Completion, identity: Identity, context: Context) -> Trace:
        trace, verifier = self.cache[request.content], self.options.verifier
        span = self.crop.span(len(trace.token_ids))
        rows = rows_of(completion, identity)
        text, offset, correct = trace.text, trace.answer_offset, trace.correct
        if span != slice(0, len(trace.token_ids)):
            text, offset = self._text(trace, span)
        if verifier:  # grades the whole answer, of which a crop may have only a part
            answer = answer_text(trace.text, trace.sections, identity.markers, trace.answer_offset)
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
            answer_offset=offset,
            context_spans=_cropped_context(trace, span),
            correct=correct,
        )

    def _text(self, trace: Trace, span: slice) -> tuple[str, int | None]:
        """The text of a crop's completion, and its characters before the answer if the trace's own are stored."""
        pieces = token_texts(self.facts, trace.token_ids[span].tolist())
        ended = int(trace.token_ids[span][-1]) in self.facts.eos_ids
        spans = _cropped(trace.sections, span)
        text, before = (
            "".join(piece or "" for piece in pieces[spans.prompt_end : end])
            for end in (len(pieces) - ended, spans.answer_start)
        )
        return text, None if trace.answer_offset is None else min(len(before), len(text))


def _cropped(spans: Sections, span: slice) -> Sections:
    return Sections(*(min(max(bound - span.start, 0), span.stop - span.start) for bound in spans.bounds()))


def _cropped_context(trace: Trace, span: slice) -> np.ndarray:
    """The context spans that a crop reads, int32 [C, 2]."""
    cropped = np.clip(trace.context_spans, span.start, span.stop) - span.start
    return cropped[cropped[:, 0] < cropped[:, 1]].astype(np.int32)
