"""Engines that pull from the real ledger, in simulated time: how long a job takes, and how busy its slots are.

A slot makes one token a unit of time. An engine keeps as many requests as `Session` does, its slots and a quarter more. It
publishes shards of 64 traces in the order in which they finish, and loses the others when it dies. The driver then does what
`cluster` does: it takes the requests back, and starts engines while requests wait.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from logitcache.cache.shard import ShardIndex
from logitcache.cache.workers import Worker
from logitcache.capture.job import Request
from logitcache.capture.ledger import Ledger
from logitcache.capture.summary import Counts, Summary

SLOTS, WINDOW, SHARD, SAMPLES = 256, 320, 64, 4


@dataclass(frozen=True)
class Work:
    """Traces with heavy-tailed lengths: log-normal with sigma 1 and a median of 2,000 tokens, at most 32,768."""

    lengths: list[int]

    @classmethod
    def of(cls, traces: int, seed: int) -> "Work":
        drawn = np.random.default_rng(seed).lognormal(np.log(2000), 1.0, traces)
        return cls(np.clip(drawn, 1, 32_768).astype(np.int64).tolist())

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def requests(self) -> Iterator[Request]:
        """Four samples of each prompt."""
        for i in range(len(self.lengths)):
            yield Request(f"{i:032x}", f"p{i // SAMPLES}", i % SAMPLES, i)


@dataclass(frozen=True)
class Index:
    """What the ledger looks at in a shard's index."""

    trace_ids: list[str]


class Source(Protocol):
    """Where engines get requests. A holder is one engine under a number that is never used again, on a machine."""

    def join(self, holder: int, machine: int) -> None: ...
    def take(self, holder: int, most: int) -> list[Request]: ...
    def publish(self, holder: int, traces: list[Request]) -> None: ...
    def revoke(self, holder: int) -> None: ...

    def waiting(self, machine: int) -> int:
        """Requests that an engine on this machine could take."""
        ...


class Pulled:
    """The ledger of the job."""

    def __init__(self, work: Work, machines: int) -> None:
        numbers = iter(range(len(work.lengths)))
        self.summary = Summary()
        self.ledger = Ledger(work.requests(), len(work.lengths), self.summary, lambda _: None, lambda: next(numbers))

    def join(self, holder: int, machine: int) -> None:
        self.ledger.join(holder)

    def take(self, holder: int, most: int) -> list[Request]:
        return self.ledger.take(holder, most) or []

    def publish(self, holder: int, traces: list[Request]) -> None:
        index = cast(ShardIndex, Index([r.trace_id for r in traces]))
        assert self.ledger.commit(holder, index, Counts(traces=len(traces)))

    def revoke(self, holder: int) -> None:
        self.ledger.revoke(holder, blamed=True)

    def waiting(self, machine: int) -> int:
        return self.ledger.status().waiting


class Shares:
    """Each machine has its own requests from the start."""

    def __init__(self, shares: list[deque[Request]]) -> None:
        self.shares = shares
        self.machine: dict[int, int] = {}
        self.held: dict[int, dict[str, Request]] = {}
        self.summary = Summary()

    @classmethod
    def by_prompt(cls, work: Work, machines: int) -> "Shares":
        """As `--worker I/N`: the prompt's hash decides."""
        shares, workers = [deque[Request]() for _ in range(machines)], [Worker(i, machines) for i in range(machines)]
        owner, mine = "", shares[0]
        for request in work.requests():
            if request.prompt_id != owner:
                owner = request.prompt_id
                mine = next(share for share, worker in zip(shares, workers, strict=True) if worker.owns(owner))
            mine.append(request)
        return cls(shares)

    @classmethod
    def by_block(cls, work: Work, machines: int) -> "Shares":
        """As Ray Data with one input block for each actor: equal counts, in the source's order."""
        every, size = list(work.requests()), -(-len(work.lengths) // machines)
        return cls([deque(every[at : at + size]) for at in range(0, size * machines, size)])

    def join(self, holder: int, machine: int) -> None:
        self.machine[holder], self.held[holder] = machine, {}

    def take(self, holder: int, most: int) -> list[Request]:
        share = self.shares[self.machine[holder]]
        given = [share.popleft() for _ in range(min(most, len(share)))]
        self.held[holder] |= {r.trace_id: r for r in given}
        return given

    def publish(self, holder: int, traces: list[Request]) -> None:
        for request in traces:
            del self.held[holder][request.trace_id]
        self.summary.made += len(traces)

    def revoke(self, holder: int) -> None:
        self.shares[self.machine[holder]].extendleft(reversed(self.held.pop(holder).values()))

    def waiting(self, machine: int) -> int:
        return len(self.shares[machine])


SOURCES = {"pulled": Pulled, "shares by prompt": Shares.by_prompt, "fixed blocks": Shares.by_block}


@dataclass(frozen=True)
class Fate:
    """When engines start, how long a later one loads, and when they die; in units of time."""

    starts: list[float]
    load: float = 0.0
    lifetime: float | None = None  # mean of an exponential; None: they do not die
    deadly: frozenset[int] = frozenset()  # traces at whose end the engine dies


@dataclass
class Outcome:
    """Of a job. Slot times are sums over slots."""

    makespan: float = 0.0
    made: int = 0  # traces published
    finished: int = 0  # published or lost
    deadly: int = 0  # traces set aside
    deaths: int = 0
    up: float = 0.0  # slot time of engines, until the job's end
    busy: float = 0.0  # slot time in which they worked, on traces that were kept or lost
    unpublished: float = (
        0.0  # finished traces that an engine holds, mean when one more is: shards by order of finishing
    )
    unpublished_units: float = 0.0  # the same, if units of 64 that were taken together waited for their longest trace
    most_unpublished_units: int = 0


@dataclass
class _Engine:
    holder: int
    machine: int
    loading: bool = True
    running: dict[str, float] = field(default_factory=dict)  # trace id -> when it began
    queue: deque[Request] = field(default_factory=deque)
    open: list[Request] = field(default_factory=list)
    units: "_Units" = field(default_factory=lambda: _Units())


class _Units:
    """What an engine would hold if each 64 requests that it took one after the other were published together."""

    def __init__(self) -> None:
        self.taken, self.waiting = 0, 0
        self.unit: dict[str, int] = {}
        self.finished: Counter[int] = Counter()

    def take(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.unit[request.trace_id] = self.taken // SHARD
            self.taken += 1

    def finish(self, request: Request) -> None:
        unit = self.unit.pop(request.trace_id)
        self.finished[unit] += 1
        self.waiting += 1
        if self.finished[unit] == SHARD:
            self.waiting -= SHARD


_Event = Callable[[_Engine, Any], None]


class Simulation:
    """One job on ``len(fate.starts)`` machines, each of which holds one engine at a time."""

    def __init__(self, work: Work, source: Source, fate: Fate, seed: int) -> None:
        self.work, self.source, self.fate = work, source, fate
        self.random = np.random.default_rng(seed)
        self.engines: dict[int, _Engine] = {}  # by machine
        self.events: list[tuple[float, int, _Event, _Engine, Any]] = []
        self.counted, self.started, self.now = 0, 0, 0.0
        self.outcome = Outcome()

    def run(self) -> Outcome:
        for machine, start in enumerate(self.fate.starts):
            self._load(machine, start)
        while self.events:
            now, _, happen, engine, request = heapq.heappop(self.events)
            if self.engines.get(engine.machine) is engine:  # it may have died or ended meanwhile
                self.now = now
                happen(engine, request)
        out = self.outcome
        out.makespan = self.now
        out.up = SLOTS * sum(max(0.0, self.now - start) for start in self.fate.starts)
        out.unpublished /= out.finished
        out.unpublished_units /= out.finished
        return out

    def _at(self, when: float, happen: _Event, engine: _Engine, request: Request | None = None) -> None:
        self.counted += 1
        heapq.heappush(self.events, (when, self.counted, happen, engine, request))

    def _load(self, machine: int, ready: float) -> None:
        self.engines[machine] = engine = _Engine(self.started, machine)
        self.started += 1
        self._at(ready, self._loaded, engine)

    def _loaded(self, engine: _Engine, _: None) -> None:
        engine.loading = False
        self.source.join(engine.holder, engine.machine)
        if self.fate.lifetime is not None:
            self._at(self.now + self.random.exponential(self.fate.lifetime), self._died, engine)
        self._fill(engine)

    def _fill(self, engine: _Engine) -> None:
        """Takes requests, runs as many as there are slots, and ends the engine that has none."""
        while (room := WINDOW - len(engine.running) - len(engine.queue)) > 0:
            given = self.source.take(engine.holder, room)
            if not given and not engine.running and engine.open:
                self._publish(engine)  # as `Filling` does, since the ledger may give more then
            elif not given:
                break
            engine.queue.extend(given)
            engine.units.take(given)
        while engine.queue and len(engine.running) < SLOTS:
            request = engine.queue.popleft()
            engine.running[request.trace_id] = self.now
            self._at(self.now + self.work.lengths[request.content], self._finished, engine, request)
        if not engine.running:
            self._publish(engine)
            del self.engines[engine.machine]
            self._start_missing()

    def _finished(self, engine: _Engine, request: Request) -> None:
        if request.content in self.fate.deadly:
            return self._died(engine, None)
        out = self.outcome
        out.finished += 1
        out.busy += self.now - engine.running.pop(request.trace_id)
        engine.open.append(request)
        engine.units.finish(request)
        out.unpublished += len(engine.open)
        out.unpublished_units += engine.units.waiting
        out.most_unpublished_units = max(out.most_unpublished_units, engine.units.waiting)
        if len(engine.open) == SHARD:
            self._publish(engine)
        self._fill(engine)

    def _publish(self, engine: _Engine) -> None:
        if engine.open:
            self.source.publish(engine.holder, engine.open)
            self.outcome.made += len(engine.open)
            engine.open = []

    def _died(self, engine: _Engine, _: None) -> None:
        self.outcome.deaths += 1
        self.outcome.busy += sum(self.now - began for began in engine.running.values())
        del self.engines[engine.machine]
        self.source.revoke(engine.holder)
        self._start_missing()

    def _start_missing(self) -> None:
        """Starts engines on the machines without one, while requests wait that those which load will not take."""
        for machine in range(len(self.fate.starts)):
            if machine not in self.engines and self.source.waiting(machine) > self._for_those_that_load():
                self._load(machine, self.now + self.fate.load)

    def _for_those_that_load(self) -> int:
        loading = sum(engine.loading for engine in self.engines.values())
        return WINDOW * loading if isinstance(self.source, Pulled) else 0
