"""Prompts -> teacher -> shards. What is in the cache is not made again, and what was published is never lost."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import logitcache
from logitcache import manifest, prompts, sections, shard, teacher, topk
from logitcache.cache import Cache
from logitcache.console import Progress, Stop, chatter_to
from logitcache.engine import Completion, Engine, cause_in
from logitcache.errors import EngineError, InputError, LogitcacheError, ShardCorruptError, first_line
from logitcache.files import publish_json, read_json
from logitcache.manifest import Identity
from logitcache.prompts import Prompt
from logitcache.schema import Trace
from logitcache.sections import Markers
from logitcache.shard import EncodedTrace
from logitcache.teacher import TeacherFacts, TeacherSpec
from logitcache.workers import Worker

# Finished traces that may wait for the finisher, which encodes ten times faster than one GPU generates: a raw trace of
# 32k tokens at k = 64 takes 17 MB.
_BACKLOG = 64


@dataclass(frozen=True)
class GenerateOptions:
    """One call of ``logitcache generate``."""

    source: str
    out: Path
    spec: TeacherSpec
    samples: int = 1
    limit: int | None = None
    top_p: float | None = None
    min_k: int = 1
    markers: Markers | None = None  # None: found in the tokenizer or the chat template
    answer_regex: str | None = None  # for completions without markers
    unit_size: int = 64  # traces that become one shard
    worker: Worker = Worker()

    def __post_init__(self) -> None:
        if self.samples < 1 or self.unit_size < 1 or self.min_k < 1 or (self.limit is not None and self.limit < 1):
            raise InputError("--samples, --unit-size, --min-k and --limit must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: the share of mass a row keeps lies in (0, 1]")
        if self.min_k > self.spec.top_k:
            raise InputError(f"--min-k {self.min_k} is above --top-k {self.spec.top_k}")
        if self.samples > 1 and self.spec.temperature == 0:
            raise InputError(
                f"--samples {self.samples} at --temperature 0 are {self.samples} times the same; set one of the two"
            )


@dataclass
class Summary:
    """What a call did. ``stopped`` names the signal that ended it early."""

    wanted: int
    before: int
    made: int = 0
    tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    repeated: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # prompt id -> why the teacher cannot be asked
    skipped_traces: list[str] = field(default_factory=list)  # their trace ids: later calls pass them by
    failed: dict[str, str] = field(default_factory=dict)  # prompt id -> why its answer cannot be kept
    stopped: str | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def text(self, out: Path) -> str:
        """What to tell a person at the end."""
        lines = []
        if self.repeated:
            lines.append(f"{self.repeated} repeated prompts were read once")
        for what, found in (("prompts skipped", self.skipped), ("answers lost", self.failed)):
            if found:
                lines.append(f"{len(found)} {what}:")
                lines += [f"  {prompt}: {why}" for prompt, why in list(found.items())[:5]]
                lines += [f"  ... and {len(found) - 5} more"] if len(found) > 5 else []
        if self.stopped:
            lines.append(f"stopped by {self.stopped}: run the same command again to go on")
        if self.before + len(self.skipped_traces) == self.wanted and not self.made:
            lines.append(f"{out}: nothing to do, all {self.before} traces are there")
        else:
            lines.append(
                f"{out}: {self.made} traces made, {self.before + self.made} of {self.wanted} there; "
                f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.tokens_per_s:,.0f} tokens/s"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Request:
    trace_id: str
    prompt: Prompt
    sample_index: int


@dataclass
class Unit:
    """The traces that become one shard, while they are under way."""

    size: int = 0  # requests that joined
    closed: bool = False  # no more requests join
    finished: list[Future[EncodedTrace | None]] = field(default_factory=list)  # None: lost

    @property
    def complete(self) -> bool:
        return self.closed and len(self.finished) == self.size


def identify(options: GenerateOptions, facts: TeacherFacts) -> Identity:
    """The identity of the cache that ``options`` would make."""
    markers, spec = markers_of(options, facts), options.spec
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
        sampling={"temperature": spec.temperature, "max_tokens": spec.max_tokens, "seed": spec.seed, **spec.sampling},
        reasoning_markers=[markers.opening, markers.closing] if markers.opening and markers.closing else None,
        answer_regex=markers.answer_regex,
        dtype=facts.dtype,
        engine=teacher.engine_version(),
        engine_args=spec.identity_args(),
    )


def markers_of(options: GenerateOptions, facts: TeacherFacts) -> Markers:
    found = options.markers or Markers.detect(facts.tokenizer.get_vocab(), facts.chat_template)
    return Markers(found.opening, found.closing, options.answer_regex)


def generate(options: GenerateOptions) -> Summary:
    """Fills the cache at ``options.out`` with what is missing of prompts times samples.

    Finished traces survive whatever ends the call: an error, a signal and a dead engine publish what they had in hand,
    and only a kill that leaves no time to do so loses the units in flight.

    Raises: InputError and CacheError before anything is written; EngineError and WriteError, after which the same call
        goes on where this one stopped.
    """
    source = prompts.load(options.source, options.limit)
    facts = teacher.inspect(options.spec)
    teacher.render(facts, source.prompts[0], options.spec.template_args)  # what it refuses, it refuses now
    wanted = identify(options, facts)
    manifest.match(options.out, wanted)
    with options.worker.alone(options.out):
        # The identity on disk names the traces: 1 and 1.0 are one temperature and two digests.
        identity = manifest.match(options.out, wanted) or wanted
        shards = Cache.open(options.out).shards if (options.out / manifest.FILE_NAME).exists() else []
        present, passed_by = {t for s in shards for t in s.trace_ids}, _skipped_before(options.out)
        summary = Summary(wanted=len(source) * options.samples, before=0, repeated=source.repeated)
        missing: list[Request] = []
        for prompt in source:
            digest = prompt.digest()
            for sample in range(options.samples):
                request = Request(identity.trace_id(prompt.id, digest, sample), prompt, sample)
                if request.trace_id in present:
                    summary.before += 1
                elif why := passed_by.get(request.trace_id):
                    summary.skipped[prompt.id] = why
                    summary.skipped_traces.append(request.trace_id)
                else:
                    missing.append(request)
        if missing:
            number = 1 + max((s.number for s in shards), default=-1)
            _Run(options, facts, identity, summary, number).work(missing)
        return summary


def _skipped_before(out: Path) -> dict[str, str]:
    """Trace ids that an earlier call could not ask the teacher for, with the reason; the ids bind it to the identity."""
    found: dict[str, str] = {}
    for path in (out / "logs").glob("generate-*.json"):
        with suppress(ShardCorruptError):  # then they are tried again
            found |= dict.fromkeys(read_json(path)["skipped_traces"], "as an earlier call found")
    return found


class _Run:
    """One engine's life over the missing requests."""

    def __init__(
        self, options: GenerateOptions, facts: TeacherFacts, identity: Identity, summary: Summary, number: int
    ) -> None:
        self.options, self.facts, self.identity, self.summary = options, facts, identity, summary
        opening, closing = identity.reasoning_markers or (None, None)
        self.markers = Markers(opening, closing, identity.answer_regex)
        self.number = number  # of the next shard
        self.requests: dict[str, tuple[Request, Unit]] = {}
        self.open: list[Unit] = []
        self.rendered: tuple[Prompt, list[int] | str] | None = None
        self.backlog: deque[Future[Any]] = deque()
        # One thread finishes traces and writes shards, in order, while the engine steps.
        self.finisher = ThreadPoolExecutor(1, thread_name_prefix="shards")
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self.log = options.out / "logs" / f"generate-{stamp}-{os.getpid()}.log"

    def work(self, missing: list[Request]) -> None:
        with ExitStack() as stack:
            terminal = stack.enter_context(chatter_to(self.log))
            stop = stack.enter_context(Stop())
            print(
                f"{self.summary.before} traces there, {len(missing)} to make; "
                f"loading {self.facts.name} (log: {self.log})",
                file=terminal,
            )
            began = time.monotonic()
            try:
                engine = Engine(replace(self.options.spec, dtype=self.facts.dtype), self._engine_seed(missing[0]))
            except EngineError as e:
                raise self._explain(e) from e
            stack.callback(engine.close)
            # Not before the engine stands: a setting that it refuses leaves no cache behind that holds on to it.
            manifest.create_or_match(self.options.out, self.identity)
            self.summary.load_seconds = time.monotonic() - began
            stop.patient = True
            self.progress = stack.enter_context(Progress(terminal, len(missing)))
            try:
                self._drive(engine, missing, stop)
            except EngineError as e:
                if not stop.signal:  # a Ctrl-C reaches the engine's processes too
                    raise self._explain(e) from e
            finally:
                self.summary.seconds = self.progress.seconds
                self._publish_rest()
                self.summary.stopped = stop.signal
                publish_json(self.log.with_suffix(".json"), asdict(self.summary))

    def _drive(self, engine: Engine, missing: list[Request], stop: Stop) -> None:
        # The engine always has a queue behind what it runs: prompts of the next unit enter while stragglers finish.
        window = engine.max_num_seqs + max(8, engine.max_num_seqs // 4)
        requests = iter(missing)
        exhausted = False
        while not stop.signal:
            while not exhausted and len(self.requests) < window and not stop.signal:
                exhausted = not self._submit_next(engine, requests)
            if not self.requests:
                return
            for completion in engine.step():
                self._finish(completion)
            self.progress.tick()

    def _engine_seed(self, first: Request) -> int:
        """The engine's sampler starts anew with each engine: one seed for two of them would repeat its answers."""
        key = f"{self.options.spec.seed} {first.trace_id}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") >> 1

    def _submit_next(self, engine: Engine, requests: Iterator[Request]) -> bool:
        """Hands the engine one request more; False when there is none."""
        request = next(requests, None)
        if request is None:
            if self.open:
                self.open[-1].closed = True
                self._publish_if_complete(self.open[-1])
            return False
        token_ids = self._prompt_ids(request.prompt)
        if isinstance(token_ids, str) or not 0 < len(token_ids) < engine.max_model_len:
            why = f"{len(token_ids)} tokens, the teacher takes 1 to {engine.max_model_len - 1}"
            self._skip(request, token_ids if isinstance(token_ids, str) else why)
            return True
        if not self.open or self.open[-1].closed:
            self.open.append(Unit())
        unit = self.open[-1]
        unit.size += 1
        unit.closed = unit.size >= self.options.unit_size
        self.requests[request.trace_id] = (request, unit)
        engine.submit(request.trace_id, token_ids)
        return True

    def _prompt_ids(self, prompt: Prompt) -> list[int] | str:
        """Token ids, or why there are none."""
        if self.rendered is None or self.rendered[0] is not prompt:  # samples of one prompt follow each other
            try:
                self.rendered = prompt, teacher.render(self.facts, prompt, self.options.spec.template_args)
            except InputError as e:
                self.rendered = prompt, str(e)
        return self.rendered[1]

    def _skip(self, request: Request, why: str) -> None:
        if request.prompt.id not in self.summary.skipped:
            self.progress.say(f"skipped {request.prompt.id}: {why}")
        self.summary.skipped[request.prompt.id] = why
        self.summary.skipped_traces.append(request.trace_id)
        self.progress.drop()

    def _finish(self, completion: Completion) -> None:
        request, unit = self.requests.pop(completion.key)
        unit.finished.append(self._later(self._encode, request, completion))
        made = len(completion.token_ids) - completion.prompt_length
        self.summary.tokens += made
        self.progress.add(1, made)
        self._publish_if_complete(unit)

    def _publish_if_complete(self, unit: Unit) -> None:
        if unit.complete:
            self.open.remove(unit)
            self._publish(unit)

    def _publish(self, unit: Unit) -> None:
        number, self.number = self.number, self.number + 1
        self._later(self._write, number, unit)

    def _later(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Hands work to the finisher. One that failed fails the command here; one that falls behind is waited for."""
        while self.backlog and (self.backlog[0].done() or len(self.backlog) > _BACKLOG):
            self.backlog.popleft().result()
        self.backlog.append(self.finisher.submit(work, *args))
        return self.backlog[-1]

    def _publish_rest(self) -> None:
        """At the end, and at any end that came early: what finished is published, as units smaller than planned.

        Raises: what the finisher met, once it has done all it could.
        """
        rest = [unit for unit in self.open if unit.finished]
        writes = [self.finisher.submit(self._write, self.number + i, unit) for i, unit in enumerate(rest)]
        self.finisher.shutdown(wait=True)
        for future in (*self.backlog, *writes):
            future.result()

    def _encode(self, request: Request, completion: Completion) -> EncodedTrace | None:
        """A trace ready to be written; None, and a line in the summary, where its rows are no distribution."""
        try:
            return EncodedTrace.of(_trace(request, completion, self.facts, self.markers, self.identity), self.identity)
        except (LogitcacheError, ValueError) as e:
            self.summary.failed[request.prompt.id] = first_line(e)
            return None

    def _write(self, number: int, unit: Unit) -> None:
        traces = [trace for future in unit.finished if (trace := future.result())]
        if not traces:
            return
        provenance: dict[str, Any] = {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "logitcache": logitcache.__version__,
            "source": self.options.source,
            "log": self.log.name,
        }
        shard.write(self.options.out / shard.DIRECTORY, number, traces, self.identity, provenance)
        self.summary.made += len(traces)

    def _explain(self, error: EngineError) -> EngineError:
        what = ": ".join(filter(None, (str(error), cause_in(self.log))))
        return EngineError(
            f"{what}; everything published is safe: mend that and run the same command again ({self.log})"
        )


def _trace(
    request: Request,
    completion: Completion,
    facts: TeacherFacts,
    markers: Markers,
    identity: Identity,
) -> Trace:
    """The trace of a finished completion: sections found, rows sorted and trimmed."""
    token_ids, prompt_length = completion.token_ids, completion.prompt_length
    pieces = teacher.pieces(facts, token_ids.tolist())
    ended = len(token_ids) > prompt_length and int(token_ids[-1]) in facts.eos_ids
    rows = topk.from_topk(completion.ids_RK, completion.logprobs_RK, identity.vocab_size)
    if identity.top_p is not None:
        rows = topk.trim(rows, top_p=identity.top_p, min_k=identity.min_k)
    return Trace(
        trace_id=request.trace_id,
        prompt_id=request.prompt.id,
        sample_index=request.sample_index,
        token_ids=token_ids,
        sections=sections.find(pieces, prompt_length, markers),
        row_start=len(token_ids) - len(rows),
        rows=rows,
        token_logprob=completion.token_logprob,
        token_rank=completion.token_rank,
        text="".join(piece or "" for piece in pieces[prompt_length : len(pieces) - ended]),
        finish_reason=completion.finish_reason,
        answer=request.prompt.answer,
        metadata=request.prompt.metadata,
    )
