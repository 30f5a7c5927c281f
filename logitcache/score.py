"""The teacher's rows of text that exists already: of a file, or of another cache's traces, whole or cropped."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logitcache import prompts, teacher
from logitcache.cache import Cache
from logitcache.engine import Completion
from logitcache.errors import InputError, PromptsError
from logitcache.fill import Request, Summary, fill, rows_of
from logitcache.generate import CacheOptions, identify, trace_of
from logitcache.manifest import Identity
from logitcache.prompts import Prompt
from logitcache.schema import Trace
from logitcache.sections import Sections
from logitcache.teacher import TeacherFacts, TeacherSpec


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of each trace, seen by the teacher without the rest: ``left``, ``middle`` or ``right``, and its share."""

    where: str = "left"
    share: float = 1.0

    def __str__(self) -> str:
        return f"{self.where}:{self.share:g}"

    @classmethod
    def parse(cls, text: str) -> "Crop":
        """``right:0.5`` is the last half of a trace's tokens, prompt included."""
        where, _, share = text.partition(":")
        try:
            crop = cls(where, float(share))
        except ValueError:
            crop = cls("", 0)
        if crop.where not in ("left", "middle", "right") or not 0 < crop.share <= 1:
            raise InputError(f"--crop {text!r}: write left:SHARE, middle:SHARE or right:SHARE, with 0 < SHARE <= 1")
        return crop

    def span(self, length: int) -> slice:
        """The tokens it keeps, at least one."""
        kept = max(1, int(self.share * length))
        start = {"left": 0, "middle": (length - kept) // 2, "right": length - kept}[self.where]
        return slice(start, start + kept)


@dataclass(frozen=True)
class ScoreOptions(CacheOptions):
    """One call of ``logitcache score``; ``source`` is a file of prompts with completions, or a cache."""

    crop: Crop | None = None  # of a cache's traces
    eos: bool = True  # ends the completions of a file, which are text


def score(options: ScoreOptions) -> Summary:
    """Fills the cache at ``options.out`` with the teacher's rows of every token of the source, as `fill` does.

    Raises: as `generate`.
    """
    facts = teacher.inspect(options.spec)
    derived = f"score --crop {options.crop}" if options.crop else "score"
    identity = identify(options, facts, {}, (derived,))  # nothing was sampled
    if (Path(options.source) / "manifest.json").exists():
        task: _Texts | _Traces = _Traces(options, facts)
    elif Path(options.source).is_dir():
        raise InputError(f"{options.source} is a directory and no cache; give a .jsonl or .parquet file, or a cache")
    elif options.crop:
        raise InputError("--crop cuts the traces of a cache; give --from-cache CACHE")
    else:
        task = _Texts(options, facts)
    return fill(task, options.target, identity)


@dataclass
class _Scorer:
    options: ScoreOptions
    facts: TeacherFacts
    scored: bool = True

    @property
    def spec(self) -> TeacherSpec:
        return self.options.spec

    @property
    def source(self) -> str:
        return self.options.source


@dataclass(frozen=True, slots=True)
class _Text:
    prompt: Prompt
    completion: str
    finish_reason: str


class _Texts(_Scorer):
    """Prompts with completions, as text."""

    def requests(self, identity: Identity) -> Iterator[Request]:
        seen: Counter[str] = Counter()
        for where, row in prompts.rows(self.source):
            completion, reason = row.pop("completion", None), row.pop("finish_reason", "stop")
            if not isinstance(completion, str):
                raise PromptsError(f"{where}: `completion` is a {type(completion).__name__}, expected text")
            prompt, _ = prompts.parse(where, row)
            sample = seen[prompt.id]
            seen[prompt.id] += 1
            digest = hashlib.blake2b(json.dumps([prompt.digest(), completion]).encode(), digest_size=16).hexdigest()
            trace_id = identity.trace_id(prompt.id, digest, sample)
            yield Request(trace_id, prompt.id, sample, _Text(prompt, completion, str(reason)))
            if sum(seen.values()) == self.options.limit:
                return

    def token_ids(self, request: Request) -> list[int]:
        prompt, completion = self._parts(request.content)
        return [*prompt, *completion]

    def trace(self, request: Request, completion: Completion, identity: Identity) -> Trace:
        text: _Text = request.content
        prompt_length = len(self._parts(text)[0])
        parted = completion.split_at(prompt_length, 1 if identity.prompt_logits else max(1, prompt_length))
        parted = replace(parted, finish_reason=text.finish_reason)
        return trace_of(request, text.prompt, parted, identity, self.facts, self.options.verifier)

    def _parts(self, text: _Text) -> tuple[list[int], list[int]]:
        prompt = teacher.render(self.facts, text.prompt, self.spec.template_args)
        tokenizer: Any = self.facts.tokenizer
        completion: list[int] = tokenizer(text.completion, add_special_tokens=False)["input_ids"]
        eos: Any = tokenizer.eos_token_id
        ends = self.options.eos and text.finish_reason == "stop" and eos is not None and completion[-1:] != [eos]
        if ends:
            completion.append(eos)
        return prompt, completion


class _Traces(_Scorer):
    """Traces of another cache: their tokens, as they are."""

    def __init__(self, options: ScoreOptions, facts: TeacherFacts) -> None:
        super().__init__(options, facts)
        self.cache = Cache.open(options.source)
        self.crop = options.crop or Crop()
        if options.out.resolve() == Path(options.source).resolve():
            raise InputError(f"--out {options.out} is the cache to score; give a new directory")
        if (there := self.cache.identity.tokenizer_hash) != facts.tokenizer_hash:
            raise InputError(
                f"{options.source} was made with tokenizer {there[:12]}, --teacher {options.spec.model} has "
                f"{facts.tokenizer_hash[:12]}: its token ids mean other tokens; score the text instead (a .jsonl file)"
            )

    def requests(self, identity: Identity) -> Iterator[Request]:
        ids = zip(self.cache.trace_ids, self.cache.prompt_ids, strict=True)
        for i, (trace_id, prompt_id) in enumerate(ids):
            if i == self.options.limit:
                return
            yield Request(identity.trace_id(prompt_id, trace_id, 0), prompt_id, 0, i)

    def token_ids(self, request: Request) -> list[int]:
        token_ids = self.cache[request.content].token_ids
        return token_ids[self.crop.span(len(token_ids))].tolist()

    def trace(self, request: Request, completion: Completion, identity: Identity) -> Trace:
        trace = self.cache[request.content]
        span = self.crop.span(len(trace.token_ids))
        bounds = [min(max(b - span.start, 0), span.stop - span.start) for b in trace.sections.bounds()]
        spans = Sections(*bounds)
        first = 1 if identity.prompt_logits else max(1, spans.prompt_end)
        parted = completion.split_at(spans.prompt_end, min(first, spans.length))
        rows = rows_of(parted, identity)
        whole: dict[str, Any] = {} if span == slice(0, len(trace.token_ids)) else {"text": self._text(trace, span)}
        return replace(
            trace,
            trace_id=request.trace_id,
            token_ids=parted.token_ids,
            sections=spans,
            row_start=spans.length - len(rows),
            rows=rows,
            token_logprob=parted.token_logprob,
            token_rank=parted.token_rank,
            **whole,
        )

    def _text(self, trace: Trace, span: slice) -> str:
        pieces = teacher.pieces(self.facts, trace.token_ids[span].tolist())
        ended = len(pieces) and int(trace.token_ids[span][-1]) in self.facts.eos_ids
        start = max(0, trace.sections.prompt_end - span.start)
        return "".join(piece or "" for piece in pieces[start : len(pieces) - bool(ended)])
