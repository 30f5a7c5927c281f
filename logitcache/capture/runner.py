"""Fills a cache with a task: missing traces go through one engine, and finished ones are published as shards."""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import logitcache
from logitcache.cache import compact, manifest, shard
from logitcache.cache.claim import claim
from logitcache.cache.reader import Cache
from logitcache.cache.repair import adopt, set_aside
from logitcache.cache.shard import EncodedTrace, ShardIndex
from logitcache.cache.workers import Worker
from logitcache.capture.job import Context, Request, Task, Tokens, rows_wanted
from logitcache.capture.summary import Summary
from logitcache.errors import InputError, ShardCorruptError, first_line
from logitcache.grading import verdicts
from logitcache.identity import Identity
from logitcache.inference.engine import Completion
from logitcache.inference.session import EngineRequest, Session
from logitcache.runtime.files import LOGS, publish_json, read_json, remove_parts
from logitcache.runtime.secrets import hide, without_secrets


def fill(task: Task, identity: Identity) -> Summary:
    """Makes this worker's missing traces of the cache ``task.options.out``.

    Finished traces are published even after an error, a signal or the death of the engine. Only SIGKILL loses the traces of
    unfinished shards.

    Raises: InputError for a task without requests, CacheError before anything is written; EngineError and WriteError,
        after which the same call resumes.
    """
    out, worker = task.options.out, task.options.place
    manifest.match(out, identity)
    _refuse_unanswerable(task, identity)
    with worker.alone(out), claim(out, worker, identity) as found:
        summary, missing = Summary(), {}  # ids only, since a source may be larger than memory
        shards = _existing(out, found, worker, summary) if found else []
        present, skipped = {t for s in shards for t in s.trace_ids}, _skipped_before(out)
        for request in task.requests(identity):
            if not worker.owns(request.prompt_id):
                summary.others += 1
                continue
            summary.wanted += 1
            if request.trace_id in present:
                summary.before += 1
            elif why := skipped.get(request.trace_id):
                summary.skip(request.trace_id, request.prompt_id, why)
            else:
                missing[request.trace_id] = None
        if task.options.verifier:
            summary.unjudged = sum(s.trace_count for s in shards if not any(s.verdicts.values()))
        if missing:
            number = worker.number_after(max(compact.highest(out), *(s.number for s in shards), -1))
            _Filling(task, identity, summary, missing, number).run()
        return summary


def _refuse_unanswerable(task: Task, identity: Identity) -> None:
    """Raises: InputError if there is no request, or the teacher can take none of them, with the first reason. Otherwise the
    requests that it cannot take are skipped, wherever they stand."""
    refused: list[InputError] = []
    for request in task.requests(identity):
        try:
            task.tokens(request)
        except InputError as e:
            refused.append(e)
        else:
            return
    if not refused:
        raise InputError(f"{hide(task.options.source)}: holds nothing to ask the teacher")
    every = f"all {len(refused)} requests are refused, the first: " if len(refused) > 1 else ""
    raise type(refused[0])(f"{every}{refused[0]}")


def _existing(out: Path, identity: Identity, worker: Worker, summary: Summary) -> list[ShardIndex]:
    """The shards of the cache. Of this worker's shards that a kill left without an index, whole ones are completed, others
    are set aside: their numbers are used again. No other process can be writing them."""

    def mine(name: str) -> bool:
        number = name.removeprefix("unit-").partition(".")[0]
        return number.isdecimal() and int(number) % worker.count == worker.index

    directory, shards = out / shard.DIRECTORY, Cache.open(out).shards
    remove_parts(directory, mine)
    adopted = adopt(out, identity, (t for s in shards for t in s.trace_ids), mine)
    summary.completed = sum(index.trace_count for index in adopted)
    for name in filter(mine, shard.unindexed(directory)):
        summary.set_aside.append(str(set_aside(out, directory / f"{name}.arrow")))
    return [*shards, *adopted]


def _skipped_before(out: Path) -> dict[str, str]:
    """Trace ids that an earlier call skipped, with the reason. A trace id depends on the identity, so the reason still holds."""
    found: dict[str, str] = {}
    for path in (out / LOGS).glob("generate-*.json"):
        with suppress(ShardCorruptError):  # then skipped traces are tried again
            found |= dict.fromkeys(read_json(path)["skipped_traces"], "as an earlier call found")
    return found


@dataclass
class Unit:
    """A unit in progress: the traces that become one shard."""

    size: int = 0  # requests that joined
    closed: bool = False  # no more requests join
    finished: list[Future[EncodedTrace | None]] = field(default_factory=list)  # None: lost

    @property
    def complete(self) -> bool:
        return self.closed and len(self.finished) == self.size


@dataclass(frozen=True, slots=True)
class _InFlight:
    request: Request
    prompt_length: int
    context: Context
    unit: Unit


class _Filling:
    """The missing traces while they go through one engine."""

    def __init__(self, task: Task, identity: Identity, summary: Summary, missing: dict[str, None], number: int) -> None:
        self.task, self.options, self.identity, self.summary = task, task.options, identity, summary
        self.missing = missing
        self.number = number  # of the next shard
        self.in_flight: dict[str, _InFlight] = {}
        self.open: list[Unit] = []
        self.remarked: defaultdict[str, set[str]] = defaultdict(set)  # remark -> prompt ids

    def run(self) -> None:
        graded = verdicts.no_verdict.copy()
        place = f"worker {self.options.place}: " if self.options.place.count > 1 else ""
        with Session(
            replace(self.options.spec, dtype=self.identity.dtype),
            self.task.sampling,
            rows=rows_wanted(self.identity, self.task.scored),
            out=self.options.out,
            name="generate",
            first=next(iter(self.missing)),
            kept="everything published",
            greeting=f"{place}{self.summary.before} traces present, {len(self.missing)} to make; "
            f"loading {self.identity.teacher}",
        ) as self.session:
            try:
                self.session.run(self._requests(), self._finish, total=len(self.missing), on_refused=self._refused)
            finally:
                self._publish_rest()
                self.summary.no_verdict = dict(verdicts.no_verdict - graded)
                self.summary.load_seconds, self.summary.seconds = self.session.load_seconds, self.session.seconds
                self.summary.stopped = self.session.stopped
                self.summary.remarks = {remark: len(prompts) for remark, prompts in self.remarked.items()}
                publish_json(self.session.log.with_suffix(".json"), without_secrets(asdict(self.summary)))

    def _requests(self) -> Iterator[EngineRequest]:
        """Yields the missing requests to the engine. Requests of the next unit start while the last ones of a unit finish."""
        for request in self.task.requests(self.identity):
            if request.trace_id not in self.missing:
                continue
            try:
                tokens = self._tokens(request)
            except InputError as e:
                self._skip(request, e)
                continue
            for remark in tokens.remarks:
                self.remarked[remark].add(request.prompt_id)
            self.in_flight[request.trace_id] = _InFlight(request, tokens.prompt_length, tokens.context, self._join())
            yield EngineRequest(request.trace_id, tokens.ids)
        if self.open:
            self.open[-1].closed = True
            self._publish_if_complete(self.open[-1])

    def _join(self) -> Unit:
        """The unit of the next request."""
        if not self.open or self.open[-1].closed:
            self.open.append(Unit())
        unit = self.open[-1]
        unit.size += 1
        unit.closed = unit.size >= self.options.unit_size
        return unit

    def _tokens(self, request: Request) -> Tokens:
        tokens = self.task.tokens(request)
        least = 2 if self.task.scored else 1  # the first token of a text has no row
        most = self.session.max_model_len - 1
        if not least <= len(tokens.ids) <= most:
            more = f"; `engine_args` max_model_len={len(tokens.ids) + 1} takes it" if tokens.ids[most:] else ""
            raise InputError(f"{len(tokens.ids)} tokens, the teacher takes {least} to {most}{more}")
        return tokens

    def _skip(self, request: Request, error: InputError) -> None:
        progress = self.session.progress
        assert progress is not None
        if request.prompt_id not in self.summary.skipped:
            progress.print(f"skipped {request.prompt_id}: {error}")
        self.summary.skip(request.trace_id, request.prompt_id, str(error))
        progress.drop()

    def _refused(self, trace_id: str, error: InputError) -> None:
        """Removes a request that vLLM refuses from its unit."""
        flight = self.in_flight.pop(trace_id)
        flight.unit.size -= 1
        self._skip(flight.request, error)
        self._publish_if_complete(flight.unit)

    def _finish(self, completion: Completion) -> int:
        flight = self.in_flight.pop(completion.key)
        if self.task.scored:
            first = 1 if self.identity.prompt_logits else max(1, flight.prompt_length)
            completion = completion.split_at(flight.prompt_length, first)
        flight.unit.finished.append(self.session.later(self._encode, flight.request, completion, flight.context))
        made = len(completion.token_rank) if self.task.scored else completion.made
        self.summary.tokens += made
        self._publish_if_complete(flight.unit)
        return made

    def _publish_if_complete(self, unit: Unit) -> None:
        if unit.complete:
            self.open.remove(unit)
            self.session.later(self._write, self._next_number(), unit)

    def _publish_rest(self) -> None:
        """Publishes finished traces as smaller units, at the end and after an early stop.

        Raises: the error of a background task, after all tasks have run.
        """
        units = [unit for unit in self.open if unit.finished]
        self.session.finish([partial(self._write, self._next_number(), unit) for unit in units])

    def _next_number(self) -> int:
        number, self.number = self.number, self.options.place.number_after(self.number)
        return number

    def _encode(self, request: Request, completion: Completion, context: Context) -> EncodedTrace | None:
        """A trace, encoded. None if that fails: the summary then has the reason, and other traces are not affected."""
        try:
            trace = self.task.trace(request, completion, self.identity, context)
            self.summary.sections.add(trace, self.identity.markers)
            return EncodedTrace.of(trace, self.identity)
        except Exception as e:  # a tokenizer or a grader may raise anything
            self.summary.failed[request.trace_id] = f"{request.prompt_id}: {first_line(e)}"
            return None

    def _write(self, number: int, unit: Unit) -> None:
        traces = [trace for future in unit.finished if (trace := future.result())]
        if not traces:
            return
        provenance: dict[str, Any] = {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "logitcache": logitcache.__version__,
            "source": hide(self.options.source),
            "log": self.session.log.name,
        }
        # Only now, so that a run which makes no trace leaves no identity behind.
        manifest.create_or_match(self.options.out, self.identity)
        shard.write(self.options.out / shard.DIRECTORY, number, traces, self.identity, provenance)
        self.summary.made += len(traces)
