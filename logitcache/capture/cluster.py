"""A job on a Ray cluster: engines are actors that pull requests from one ledger, itself an actor beside the driver.

Ray Core only: its data sets let engines run dry between batches. An engine's actor is never restarted. One that dies or
cannot be reached is revoked at the ledger, and another is started while requests wait.
"""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from logitcache.cache.place import Place, place_of
from logitcache.capture.actors import Begun, EngineActor, LedgerActor, lock_in
from logitcache.capture.job import JobOptions
from logitcache.capture.ledger import Status
from logitcache.capture.machines import cause_of, connected, get, holding, holds, reason, room, waiting_for
from logitcache.capture.runner import keep
from logitcache.capture.summary import Summary
from logitcache.errors import EngineError
from logitcache.inference.session import log_in
from logitcache.runtime.console import Progress, Stop, say
from logitcache.runtime.secrets import hide

_TRIES = 3  # engines that die before any has taken a request, or between two shards of all engines
_PATIENCE = 60.0  # seconds for engines to publish what they have finished, once the job must end
_EVERY = 10.0  # seconds between lines about engines that wait for a machine


def fill(options: JobOptions) -> Summary:
    """Makes the missing traces of the cache ``options.out`` with engines on a Ray cluster.

    A signal lets engines publish what they have finished. If this process is killed, Ray ends its actors; the same call goes
    on.

    Raises: as `runner.fill`; InputError where there is no cluster and for a machine that differs from this one.
    """
    with connected(options.ray or "auto"):
        return _Job(options, place_of(options.out)).run()


class _Job:
    """The driver: starts engines, and takes back what dead ones held."""

    def __init__(self, options: JobOptions, place: Place) -> None:
        self.options, self.place = options, place
        wanted = options.engines
        self.least, self.most = (wanted.least, wanted.most) if wanted else (1, holds(options))
        self.engines: dict[Any, _Engine] = {}  # by the reference of its work
        self.started = self.deaths = self.fruitless = 0  # fruitless: deaths since a shard, or an engine, was finished
        self.seen: tuple[int, int] = (0, 0)  # shards and engines then
        self.load_seconds, self.told, self.line = 0.0, time.monotonic(), ""
        self.fatal: BaseException | None = None
        self.log = log_in(place.directory, "generate")

    def run(self) -> Summary:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(LedgerActor)
        self.ledger = actor.options(num_cpus=0, max_restarts=0, scheduling_strategy=here).remote()
        try:
            begun = self.ledger.begin.remote(self.options)
            if not ray.wait([begun], timeout=5)[0]:
                say(
                    "reading the prompts and the cache; a lock that a killed command left is watched for 35 s",
                    sys.stderr,
                )
            self.begun: Begun = get(begun)
            self.lock = lock_in(self.options.out)
            if self.begun.waiting:
                self._work()
            return get(self.ledger.summary.remote())
        finally:
            ray.wait([self.ledger.end.remote()], timeout=5)  # a dead one has given the lock back
            ray.kill(self.ledger)

    def _work(self) -> None:
        with Stop() as stop, Progress(sys.stderr, self.begun.waiting) as self.progress:
            stop.patient = True
            asked = f"{self.most} engine{'s'[: self.most > 1]}"
            self.progress.print(
                f"{self.begun.before} traces present, {self.begun.waiting} to make; {asked} of {self.begun.identity.teacher}"
            )
            began = time.monotonic()
            try:
                self._drive(stop)
            finally:
                for engine in [*self.engines.values()]:
                    self._end(engine)
                summary = self._ask(
                    "finish", time.monotonic() - began, self.load_seconds, stop.signal, self.started, self.deaths
                )
                keep(self.place, summary, self.log)
        if self.fatal:
            raise self.fatal

    def _drive(self, stop: Stop) -> None:
        """Until no engine is left: starts engines while requests wait, and shows how far the job is."""
        import ray

        deadline = None
        while True:
            status = self._status()
            ending = (stop.signal or self.fatal) and deadline is None
            if ending:
                deadline = time.monotonic() + _PATIENCE if self.fatal else float("inf")
                self._ask("stop")
            if ending or not (status.waiting or status.held):
                for engine in [e for e in self.engines.values() if e.number not in status.joined]:
                    self._end(engine)  # it still loads, and has nothing to publish
            if deadline is None:
                self._start_missing(status)
            if not self.engines or (deadline and time.monotonic() > deadline):
                return
            self._show(status)
            ended, _ = ray.wait(list(self.engines), timeout=0.5)
            for work in ended:
                self._ended(self.engines[work])

    def _start_missing(self, status: Status) -> None:
        """Starts engines for the requests that wait, unless those that still load will take them."""
        loading = sum(engine.number not in status.joined for engine in self.engines.values())
        size = max(1, status.held // max(1, status.working))  # requests that an engine takes
        wanted = -(-status.waiting // size) - loading
        for _ in range(min(wanted, self.most - len(self.engines))):
            self._start()

    def _start(self) -> None:
        import ray

        number, self.started = self.started, self.started + 1
        actor_class: Any = ray.remote(EngineActor)
        group, where = room(self.options)
        actor = actor_class.options(max_restarts=0, max_task_retries=0, **where).remote()
        self._ask("join", number)
        work = actor.run.remote(number, self.options, self.begun, self.ledger, self.lock)
        self.engines[work] = _Engine(number, work, actor, actor.node.remote(), group)

    def _ended(self, engine: "_Engine") -> None:
        """What to do after an engine's work has ended: nothing, start another, or end the job."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            self.load_seconds = max(self.load_seconds, ray.get(engine.work))
        except RayTaskError as e:
            cause = cause_of(e)
            if isinstance(cause, EngineError):
                self._lost(engine, str(cause), itself=True)
            else:
                self.fatal = self.fatal or cause
        except RayError as e:
            self._lost(engine, reason(e))
        self._end(engine)

    def _lost(self, engine: "_Engine", why: str, *, itself: bool = False) -> None:
        """Takes back what a dead engine held.

        Args:
            itself: it ended with an error of its own, which it will repeat if it could not even load.
        """
        import ray

        before = self._status()
        node = engine.node()
        machine = next((n for n in ray.nodes() if n["NodeID"] == node), None)
        there = machine is None or machine["Alive"]
        waiting = self._ask("revoke", engine.number, blamed=there, machine=node if holding(self.options) > 1 else None)
        self.deaths += 1
        progress = before.made, len(before.joined)
        self.fruitless, self.seen = (self.fruitless + 1 if progress == self.seen else 1), progress
        where = f" on {machine['NodeManagerHostname']}" if machine else ""
        self.progress.print(f"engine {engine.number}{where} died: {hide(why)}; {waiting} traces wait again")
        most = _TRIES * (1 if itself and engine.number not in before.joined else self.most)
        if self.fruitless >= most:
            self.fatal = self.fatal or EngineError(
                f"{self.fruitless} engines died without a new shard between them, the last one: {hide(why)}; everything "
                "published is safe: fix the cause, then run the same command to resume"
            )

    def _end(self, engine: "_Engine") -> None:
        """Gives the engine's machine back."""
        import ray
        from ray.util import remove_placement_group

        self.engines.pop(engine.work, None)
        ray.kill(engine.actor)
        if engine.group is not None:
            remove_placement_group(engine.group)

    def _show(self, status: Status) -> None:
        """One view of all engines; at times a line about those that wait for a machine."""
        progress, working = self.progress, sum(e.number in status.joined for e in self.engines.values())
        progress.note = f"{working} of {len(self.engines)} engines, {status.held} in flight, {status.waiting} waiting"
        progress.note += f", {self.deaths} deaths" if self.deaths else ""
        progress.add(status.made - progress.done, status.tokens - progress.tokens)
        unplaced = [e for e in self.engines.values() if e.node() is None]
        if not unplaced or len(self.engines) - len(unplaced) >= self.least or time.monotonic() - self.told < _EVERY:
            return
        self.told = time.monotonic()
        if (line := waiting_for(self.options)) != self.line:
            self.line = line
            progress.print(line)

    def _status(self) -> Status:
        return self._ask("status")

    def _ask(self, method: str, *args: Any, **more: Any) -> Any:
        return get(self.ledger.call.remote(method, *args, **more))


@dataclass(slots=True)
class _Engine:
    """An engine's actor."""

    number: int
    work: Any  # reference of its result
    actor: Any
    placed: Any  # reference of the machine's id
    group: Any  # its placement group, None if it fits one machine

    def node(self) -> str | None:
        """The id of its machine, None while it waits for one."""
        import ray
        from ray.exceptions import RayError

        ready, _ = ray.wait([self.placed], timeout=0)
        if not ready:
            return None
        with suppress(RayError):
            return ray.get(self.placed)
        return None
