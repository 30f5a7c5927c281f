"""Requests -> teacher -> shards: one engine's life over what a cache lacks."""

import hashlib
import os
import secrets
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
from logitcache import sparse_rows
from logitcache.cache import manifest, shard
from logitcache.cache.reader import Cache
from logitcache.cache.shard import EncodedTrace
from logitcache.cache.workers import Worker
from logitcache.capture.job import Request, Task, Tokens
from logitcache.capture.summary import Summary
from logitcache.errors import EngineError, InputError, ShardCorruptError, first_line
from logitcache.identity import Identity
from logitcache.inference.engine import Completion, Engine, cause_in
from logitcache.runtime.console import Progress, Stop, chatter_to
from logitcache.runtime.files import LOGS, publish_json, read_json
from logitcache.sparse_rows import SparseRows

# Finished traces that may wait for the finisher, which encodes ten times faster than one GPU generates: a raw trace of
# 32k tokens at k = 64 takes 17 MB.
_BACKLOG = 64


@dataclass
class Unit:
    """The traces that become one shard, while they are under way."""

    size: int = 0  # requests that joined
    closed: bool = False  # no more requests join
    finished: list[Future[EncodedTrace | None]] = field(default_factory=list)  # None: lost

    @property
    def complete(self) -> bool:
        return self.closed and len(self.finished) == self.size


def fill(task: Task, identity: Identity) -> Summary:
    """Fills the cache at ``task.options.out`` with what it lacks of the task's requests, as far as they are this worker's.

    Finished traces survive whatever ends the call: an error, a signal and a dead engine publish what they had in hand,
    and only a kill that leaves no time to do so loses the units in flight.

    Raises: InputError where the task wants nothing, CacheError before anything is written; EngineError and WriteError,
        after which the same call goes on where this one stopped.
    """
    out, worker = task.options.out, task.options.worker
    manifest.match(out, identity)
    if next(iter(task.requests(identity)), None) is None:
        raise InputError(f"{task.options.source}: nothing in it to ask the teacher for")
    with worker.alone(out):
        _sweep(out / shard.DIRECTORY, worker)
        shards = Cache.open(out).shards if (out / manifest.FILE_NAME).exists() else []
        present, passed_by = {t for s in shards for t in s.trace_ids}, _skipped_before(out)
        summary, missing = Summary(), {}  # ids alone: a source may be larger than memory
        for request in task.requests(identity):
            if not worker.owns(request.prompt_id):
                summary.others += 1
                continue
            summary.wanted += 1
            if request.trace_id in present:
                summary.before += 1
            elif why := passed_by.get(request.trace_id):
                summary.skip(request.trace_id, request.prompt_id, why)
            else:
                missing[request.trace_id] = None
        if task.options.verifier:
            summary.unjudged = sum(s.rows for s in shards if not any(s.verdicts.values()))
        if missing:
            number = worker.number_after(max((s.number for s in shards), default=-1))
            _Run(task, identity, summary, number).work(missing)
        return summary


def _sweep(directory: Path, worker: Worker) -> None:
    """Removes what a kill left of this worker's shards: files without an index, which nobody else can be writing."""
    for path in [*directory.glob("unit-*.arrow"), *directory.glob("unit-*.part")]:
        number = path.name.removeprefix("unit-").partition(".")[0]
        whole = path.suffix == ".arrow" and path.with_suffix(".json").exists()
        if not whole and number.isdecimal() and int(number) % worker.count == worker.index:
            path.unlink(missing_ok=True)


def rows_of(completion: Completion, identity: Identity) -> SparseRows:
    """The rows of a completion as the cache keeps them: sorted, with their tails, pinned ids added, trimmed."""
    rows = sparse_rows.from_topk(completion.ids_RK, completion.logprobs_RK, identity.vocab_size)
    if identity.pin_tokens:
        rows = sparse_rows.pin(rows, identity.top_k, identity.pin_tokens, completion.pinned_RP)
    return sparse_rows.trim(rows, top_p=identity.top_p, min_k=identity.min_k, pinned_ids=identity.pin_tokens)


def _skipped_before(out: Path) -> dict[str, str]:
    """Trace ids that an earlier call could not ask the teacher for, with the reason; the ids bind it to the identity."""
    found: dict[str, str] = {}
    for path in (out / LOGS).glob("generate-*.json"):
        with suppress(ShardCorruptError):  # then they are tried again
            found |= dict.fromkeys(read_json(path)["skipped_traces"], "as an earlier call found")
    return found


class _Run:
    """One engine's life over what is missing."""

    def __init__(self, task: Task, identity: Identity, summary: Summary, number: int) -> None:
        self.task, self.options, self.identity, self.summary = task, task.options, identity, summary
        self.number = number  # of the next shard
        self.requests: dict[str, tuple[Request, int, Unit]] = {}  # with the length of the prompt
        self.open: list[Unit] = []
        self.backlog: deque[Future[Any]] = deque()
        # One thread finishes traces and writes shards, in order, while the engine steps.
        self.finisher = ThreadPoolExecutor(1, thread_name_prefix="shards")
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        name = f"generate-{stamp}-{secrets.token_hex(3)}-{os.getpid()}.log"  # of several machines, no two alike
        self.log = self.options.out / LOGS / name

    def work(self, missing: dict[str, None]) -> None:
        with ExitStack() as stack:
            terminal = stack.enter_context(chatter_to(self.log))
            stop = stack.enter_context(Stop())
            who = f"{self.options.worker}: " if self.options.worker.count > 1 else ""
            print(
                f"{who}{self.summary.before} traces there, {len(missing)} to make; "
                f"loading {self.identity.teacher} (log: {self.log})",
                file=terminal,
            )
            began = time.monotonic()
            try:
                engine = Engine(
                    replace(self.options.spec, dtype=self.identity.dtype),
                    self._engine_seed(next(iter(missing))),
                    pinned=self.identity.pin_tokens,
                    scored=self.task.scored,
                )
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

    def _drive(self, engine: Engine, missing: dict[str, None], stop: Stop) -> None:
        # The engine always has a queue behind what it runs: prompts of the next unit enter while stragglers finish.
        window = engine.max_num_seqs + max(8, engine.max_num_seqs // 4)
        requests = (r for r in self.task.requests(self.identity) if r.trace_id in missing)
        exhausted = False
        while not stop.signal:
            while not exhausted and len(self.requests) < window and not stop.signal:
                exhausted = not self._submit_next(engine, requests)
            if not self.requests:
                return
            for completion in engine.step():
                self._finish(completion)
            self.progress.tick()

    def _engine_seed(self, first: str) -> int:
        """The engine's sampler starts anew with each engine: one seed for two of them would repeat its answers."""
        key = f"{self.options.spec.seed} {first}"
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
            tokens = self._tokens(request, engine.max_model_len)
            engine.submit(request.trace_id, tokens.ids)
        except InputError as e:
            if request.prompt_id not in self.summary.skipped:
                self.progress.say(f"skipped {request.prompt_id}: {e}")
            self.summary.skip(request.trace_id, request.prompt_id, str(e))
            self.progress.drop()
            return True
        if not self.open or self.open[-1].closed:
            self.open.append(Unit())
        unit = self.open[-1]
        unit.size += 1
        unit.closed = unit.size >= self.options.unit_size
        self.requests[request.trace_id] = (request, tokens.prompt_length, unit)
        return True

    def _tokens(self, request: Request, max_model_len: int) -> Tokens:
        tokens = self.task.tokens(request)
        least, most = 2 if self.task.scored else 1, max_model_len - 1  # nothing predicts the first token of a text
        if not least <= len(tokens.ids) <= most:
            more = f"; `engine_args` max_model_len={len(tokens.ids) + 1} takes it" if tokens.ids[most:] else ""
            raise InputError(f"{len(tokens.ids)} tokens, the teacher takes {least} to {most}{more}")
        return tokens

    def _finish(self, completion: Completion) -> None:
        request, prompt_length, unit = self.requests.pop(completion.key)
        if self.task.scored:
            first = 1 if self.identity.prompt_logits else max(1, prompt_length)
            completion = completion.split_at(prompt_length, first)
        unit.finished.append(self._later(self._encode, request, completion))
        made = len(completion.token_rank if self.task.scored else completion.token_ids[completion.prompt_length :])
        self.summary.tokens += made
        self.progress.add(1, made)
        self._publish_if_complete(unit)

    def _publish_if_complete(self, unit: Unit) -> None:
        if unit.complete:
            self.open.remove(unit)
            self._publish(unit)

    def _publish(self, unit: Unit) -> None:
        number, self.number = self.number, self.options.worker.number_after(self.number)
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
            number, self.number = self.number, self.options.worker.number_after(self.number)
            writes.append(self.finisher.submit(self._write, number, unit))
        self.finisher.shutdown(wait=True)
        for future in (*self.backlog, *writes):
            future.result()

    def _encode(self, request: Request, completion: Completion) -> EncodedTrace | None:
        """A trace ready to be written; None, and a line in the summary, where its rows are no distribution."""
        try:
            return EncodedTrace.of(self.task.trace(request, completion, self.identity), self.identity)
        except Exception as e:  # of a tokenizer or a scorer too: one trace is lost, and no other
            self.summary.failed[request.trace_id] = f"{request.prompt_id}: {first_line(e)}"
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
