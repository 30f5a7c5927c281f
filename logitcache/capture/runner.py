"""Fills a cache with a task: what is missing, and one engine that makes it. With Ray, `cluster` runs several."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from logitcache.cache.place import Existing, Place, place_of
from logitcache.cache.shard import ShardIndex
from logitcache.cache.workers import Worker
from logitcache.capture.filling import Filling
from logitcache.capture.job import JobOptions, Task
from logitcache.capture.ledger import Ledger
from logitcache.capture.summary import Summary
from logitcache.errors import InputError
from logitcache.identity import Identity
from logitcache.runtime.files import publish_json
from logitcache.runtime.secrets import hide, without_secrets

_ONLY = 0  # the number of the engine where there is one


def run(options: JobOptions) -> Summary:
    """Makes the missing traces of the cache ``options.out``, on a cluster if one is given.

    Raises: as `fill`.
    """
    if options.ray is None:
        return fill(*options.task())
    from logitcache.capture import cluster  # which imports this module

    return cluster.fill(options)


def fill(task: Task, identity: Identity) -> Summary:
    """Makes this worker's missing traces of the cache ``task.options.out``.

    Finished traces are published even after an error, a signal or the death of the engine. SIGKILL loses those of the shard
    that is open.

    Raises: InputError for a task without requests, CacheError before anything is written; EngineError and WriteError,
        after which the same call resumes.
    """
    place, worker = place_of(task.options.out), task.options.place
    check(task, identity, place)
    with place.alone(worker, worker.count) as check_lock, place.claim(worker, identity):
        ledger, first = open_ledger(task, identity, place, check_lock)
        summary = ledger.summary
        if first is not None:
            ledger.join(_ONLY)
            _run_one(task, identity, place, ledger, first)
        return summary


def _run_one(task: Task, identity: Identity, place: Place, ledger: Ledger, first: str) -> None:
    summary, missing, worker = ledger.summary, ledger.status().waiting, task.options.place
    who = f"worker {worker}: " if worker.count > 1 else ""
    greeting = f"{who}{summary.before} traces present, {missing} to make; loading {identity.teacher}"

    def ask(method: str, *args: Any) -> Any:
        return getattr(ledger, method)(_ONLY, *args)

    filling = Filling(task, identity, place, ask, first, greeting)
    session = filling.session
    try:
        filling.run(missing)
    finally:
        ledger.finish(session.seconds, session.load_seconds, session.stopped, 1, 0)
        if session.log.exists():  # the engine began to load
            keep(place, summary, session.log)


def keep(place: Place, summary: Summary, log: Path) -> None:
    """Keeps a log with the cache, and what the call did beside it."""
    record = log.with_suffix(".json")
    publish_json(record, without_secrets(summary.to_json()))
    for path in filter(Path.exists, (log, record)):
        place.keep(path)


def check(task: Task, identity: Identity, place: Place) -> None:
    """Raises: IdentityError and NotACacheError as ``manifest.match``; InputError if there is no request, or the teacher can
    take none of them, with the first reason. Otherwise the requests that it cannot take are skipped, wherever they stand."""
    place.match(identity)
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


def open_ledger(
    task: Task, identity: Identity, place: Place, check_lock: Callable[[], None] = lambda: None
) -> tuple[Ledger, str | None]:
    """The ledger of what is missing from this worker's share, and the first missing trace id; None if nothing is missing.

    Args:
        check_lock: called before a shard is published; raises once another process has the cache.
    """

    def publish(index: ShardIndex) -> None:
        check_lock()
        place.create_index(index)

    worker, summary, missing = (
        task.options.place,
        Summary(),
        set[bytes](),
    )  # ids only: a source may be larger than memory
    existing = place.existing(identity, worker) if place.match(identity) else Existing()
    summary.completed, summary.set_aside, summary.ignored = existing.completed, existing.set_aside, existing.ignored
    present, skipped = {bytes.fromhex(t) for s in existing.shards for t in s.trace_ids}, _skipped_before(place)
    first = None
    for request in task.requests(identity):
        if not worker.owns(request.prompt_id):
            summary.others += 1
            continue
        summary.wanted += 1
        if (key := bytes.fromhex(request.trace_id)) in present:
            summary.before += 1
        elif why := skipped.get(request.trace_id):
            summary.skip(request.trace_id, request.prompt_id, why)
        else:
            missing.add(key)
            first = first or request.trace_id
    if task.options.verifier:
        summary.unjudged = sum(s.trace_count for s in existing.shards if not any(s.verdicts.values()))
    summary.source = task.counts
    requests = (r for r in task.requests(identity) if bytes.fromhex(r.trace_id) in missing)
    numbers = _numbers(worker, existing.highest)
    return Ledger(requests, len(missing), summary, publish, lambda: next(numbers)), first


def _numbers(worker: Worker, after: int) -> Iterator[int]:
    """This worker's shard numbers above ``after``."""
    while True:
        after = worker.number_after(after)
        yield after


def _skipped_before(place: Place) -> dict[str, str]:
    """Trace ids that an earlier call skipped, with the reason. A trace id depends on the identity, so the reason still holds."""
    return {t: "as an earlier call found" for record in place.records() for t in record["skipped_traces"]}
