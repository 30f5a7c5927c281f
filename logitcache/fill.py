"""Requests -> teacher -> shards: one engine's life over what a cache lacks."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import logitcache
from logitcache import manifest, shard, topk
from logitcache.cache import Cache
from logitcache.console import Progress, Stop, chatter_to
from logitcache.engine import Completion, Engine, cause_in
from logitcache.errors import EngineError, InputError, LogitcacheError, ShardCorruptError, first_line
from logitcache.files import publish_json, read_json
from logitcache.manifest import Identity
from logitcache.schema import Trace
from logitcache.shard import EncodedTrace
from logitcache.teacher import TeacherSpec
from logitcache.topk import SparseRows
from logitcache.workers import Worker

# Finished traces that may wait for the finisher, which encodes ten times faster than one GPU generates: a raw trace of
# 32k tokens at k = 64 takes 17 MB.
_BACKLOG = 64


@dataclass(frozen=True, slots=True)
class Request:
    """One trace that is wanted."""

    trace_id: str
    prompt_id: str
    sample_index: int
    content: Any  # what the task makes token ids of


class Task(Protocol):
    """What the teacher is asked, and what its answers become."""

    scored: bool  # the rows of text that exists, and no completion

    @property
    def spec(self) -> TeacherSpec: ...

    @property
    def source(self) -> str: ...

    def requests(self, identity: Identity) -> Iterable[Request]:
        """All that is wanted, by all workers."""
        ...

    def token_ids(self, request: Request) -> list[int]:
        """What the engine gets. Raises: InputError where there is nothing to ask."""
        ...

    def trace(self, request: Request, completion: Completion, identity: Identity) -> Trace: ...


@dataclass
class Summary:
    """What a call did. ``stopped`` names the signal that ended it early."""

    wanted: int = 0  # of this worker
    before: int = 0
    others: int = 0  # for other workers to make
    made: int = 0
    tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    repeated: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # prompt id -> why the teacher cannot be asked
    skipped_traces: list[str] = field(default_factory=list)  # their trace ids: later calls pass them by
    failed: dict[str, str] = field(default_factory=dict)  # prompt id -> why its answer cannot be kept
    stopped: str | None = None

    def skip(self, request: "Request", why: str) -> None:
        """The teacher cannot be asked for this one."""
        self.skipped[request.prompt_id] = why
        self.skipped_traces.append(request.trace_id)

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
        share = " this worker's" if self.others else ""
        if self.before + len(self.skipped_traces) == self.wanted and not self.made:
            lines.append(f"{out}: nothing to do, all {self.before}{' of' * bool(share)}{share} traces are there")
        else:
            lines.append(
                f"{out}: {self.made} traces made, {self.before + self.made} of{share} {self.wanted} there; "
                f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.tokens_per_s:,.0f} tokens/s"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Target:
    """Where traces go, and who brings them."""

    out: Path
    unit_size: int = 64  # traces that become one shard
    worker: Worker = field(default_factory=Worker)

    def __post_init__(self) -> None:
        if self.unit_size < 1:
            raise InputError("--unit-size must be at least 1")


@dataclass
class Unit:
    """The traces that become one shard, while they are under way."""

    size: int = 0  # requests that joined
    closed: bool = False  # no more requests join
    finished: list[Future[EncodedTrace | None]] = field(default_factory=list)  # None: lost

    @property
    def complete(self) -> bool:
        return self.closed and len(self.finished) == self.size


def fill(task: Task, target: Target, wanted: Identity) -> Summary:
    """Fills the cache at ``target.out`` with what is missing of the task's requests, as far as they are this worker's.

    Finished traces survive whatever ends the call: an error, a signal and a dead engine publish what they had in hand,
    and only a kill that leaves no time to do so loses the units in flight.

    Raises: CacheError before anything is written; EngineError and WriteError, after which the same call goes on where
        this one stopped.
    """
    manifest.match(target.out, wanted)
    with target.worker.alone(target.out):
        shards = Cache.open(target.out).shards if (target.out / manifest.FILE_NAME).exists() else []
        present, passed_by = {t for s in shards for t in s.trace_ids}, _skipped_before(target.out)
        summary, missing = Summary(), []
        for request in task.requests(wanted):
            if not target.worker.owns(request.prompt_id):
                summary.others += 1
                continue
            summary.wanted += 1
            if request.trace_id in present:
                summary.before += 1
            elif why := passed_by.get(request.trace_id):
                summary.skip(request, why)
            else:
                missing.append(request)
        if missing:
            number = target.worker.number_after(max((s.number for s in shards), default=-1))
            _Run(task, target, wanted, summary, number).work(missing)
        return summary


def rows_of(completion: Completion, identity: Identity) -> SparseRows:
    """The rows of a completion as the cache keeps them: sorted, with their tails, pinned ids added, trimmed."""
    rows = topk.from_topk(completion.ids_RK, completion.logprobs_RK, identity.vocab_size)
    if identity.pin_tokens:
        rows = topk.pin(rows, identity.top_k, identity.pin_tokens, completion.pinned_RP)
    return topk.trim(rows, top_p=identity.top_p, min_k=identity.min_k, pinned_ids=identity.pin_tokens)


def _skipped_before(out: Path) -> dict[str, str]:
    """Trace ids that an earlier call could not ask the teacher for, with the reason; the ids bind it to the identity."""
    found: dict[str, str] = {}
    for path in (out / "logs").glob("generate-*.json"):
        with suppress(ShardCorruptError):  # then they are tried again
            found |= dict.fromkeys(read_json(path)["skipped_traces"], "as an earlier call found")
    return found


class _Run:
    """One engine's life over what is missing."""

    def __init__(self, task: Task, target: Target, identity: Identity, summary: Summary, number: int) -> None:
        self.task, self.target, self.identity, self.summary = task, target, identity, summary
        self.number = number  # of the next shard
        self.requests: dict[str, tuple[Request, Unit]] = {}
        self.open: list[Unit] = []
        self.asked: tuple[Any, list[int]] | None = None
        self.backlog: deque[Future[Any]] = deque()
        # One thread finishes traces and writes shards, in order, while the engine steps.
        self.finisher = ThreadPoolExecutor(1, thread_name_prefix="shards")
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self.log = target.out / "logs" / f"generate-{stamp}-{os.getpid()}.log"

    def work(self, missing: list[Request]) -> None:
        with ExitStack() as stack:
            terminal = stack.enter_context(chatter_to(self.log))
            stop = stack.enter_context(Stop())
            who = f"{self.target.worker}: " if self.target.worker.count > 1 else ""
            print(
                f"{who}{self.summary.before} traces there, {len(missing)} to make; "
                f"loading {self.identity.teacher} (log: {self.log})",
                file=terminal,
            )
            began = time.monotonic()
            try:
                engine = Engine(
                    replace(self.task.spec, dtype=self.identity.dtype),
                    self._engine_seed(missing[0]),
                    pinned=self.identity.pin_tokens,
                    scored=self.task.scored,
                )
            except EngineError as e:
                raise self._explain(e) from e
            stack.callback(engine.close)
            # Not before the engine stands: a setting that it refuses leaves no cache behind that holds on to it.
            manifest.create_or_match(self.target.out, self.identity)
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
        key = f"{self.task.spec.seed} {first.trace_id}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") >> 1

    def _submit_next(self, engine: Engine, requests: Iterator[Request]) -> bool:
        """Hands the engine one request more; False when there is none."""
        request = next(requests, None)
        if request is None:
            if self.open:
                self.open[-1].closed = True
                self._publish_if_complete(self.open[-1])
            return False
        try:
            token_ids = self._token_ids(request, engine.max_model_len)
        except InputError as e:
            if request.prompt_id not in self.summary.skipped:
                self.progress.say(f"skipped {request.prompt_id}: {e}")
            self.summary.skip(request, str(e))
            self.progress.drop()
            return True
        if not self.open or self.open[-1].closed:
            self.open.append(Unit())
        unit = self.open[-1]
        unit.size += 1
        unit.closed = unit.size >= self.target.unit_size
        self.requests[request.trace_id] = (request, unit)
        engine.submit(request.trace_id, token_ids)
        return True

    def _token_ids(self, request: Request, max_model_len: int) -> list[int]:
        if self.asked is None or self.asked[0] is not request.content:  # samples of one prompt follow each other
            token_ids = self.task.token_ids(request)
            least = 2 if self.task.scored else 1  # nothing predicts a first token
            if not least <= len(token_ids) < max_model_len:
                raise InputError(f"{len(token_ids)} tokens, the teacher takes {least} to {max_model_len - 1}")
            self.asked = request.content, token_ids
        return self.asked[1]

    def _finish(self, completion: Completion) -> None:
        request, unit = self.requests.pop(completion.key)
        unit.finished.append(self._later(self._encode, request, completion))
        made = len(completion.token_rank) if self.task.scored else len(completion.token_ids) - completion.prompt_length
        self.summary.tokens += made
        self.progress.add(1, made)
        self._publish_if_complete(unit)

    def _publish_if_complete(self, unit: Unit) -> None:
        if unit.complete:
            self.open.remove(unit)
            self._publish(unit)

    def _publish(self, unit: Unit) -> None:
        number, self.number = self.number, self.target.worker.number_after(self.number)
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
        writes = []
        for unit in rest:
            number, self.number = self.number, self.target.worker.number_after(self.number)
            writes.append(self.finisher.submit(self._write, number, unit))
        self.finisher.shutdown(wait=True)
        for future in (*self.backlog, *writes):
            future.result()

    def _encode(self, request: Request, completion: Completion) -> EncodedTrace | None:
        """A trace ready to be written; None, and a line in the summary, where its rows are no distribution."""
        try:
            return EncodedTrace.of(self.task.trace(request, completion, self.identity), self.identity)
        except (LogitcacheError, ValueError) as e:
            self.summary.failed[request.prompt_id] = first_line(e)
            return None

    def _write(self, number: int, unit: Unit) -> None:
        traces = [trace for future in unit.finished if (trace := future.result())]
        if not traces:
            return
        provenance: dict[str, Any] = {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "logitcache": logitcache.__version__,
            "source": self.task.source,
            "log": self.log.name,
        }
        shard.write(self.target.out / shard.DIRECTORY, number, traces, self.identity, provenance)
        self.summary.made += len(traces)

    def _explain(self, error: EngineError) -> EngineError:
        what = ": ".join(filter(None, (str(error), cause_in(self.log))))
        return EngineError(
            f"{what}; everything published is safe: mend that and run the same command again ({self.log})"
        )
