"""The actors of a job on a Ray cluster: the ledger, and one for each engine."""

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.cache import manifest
from logitcache.cache.place import place_of
from logitcache.cache.workers import Worker
from logitcache.capture.filling import Filling
from logitcache.capture.job import JobOptions
from logitcache.capture.machines import get
from logitcache.capture.runner import check, open_ledger
from logitcache.capture.summary import Summary
from logitcache.errors import InputError, LogitcacheError
from logitcache.identity import Identity
from logitcache.runtime.files import LOCK


@dataclass(frozen=True, slots=True)
class Begun:
    """What the ledger found."""

    identity: Identity
    before: int
    waiting: int
    first: str | None


class LedgerActor:
    """The ledger, which reads the source itself: a million requests are not sent.

    It holds the cache's lock too, since it alone publishes: a lock ends with the process that could still write.
    """

    def __init__(self) -> None:
        self.stack = ExitStack()

    def begin(self, options: JobOptions) -> Begun:
        """Raises: as `runner.fill`, before anything is written."""
        task, identity = options.task()
        place = place_of(options.out)
        check(task, identity, place)
        check_lock = self.stack.enter_context(place.alone(Worker(), writers=2))
        self.ledger, first = open_ledger(task, identity, place, check_lock)
        return Begun(identity, self.ledger.summary.before, self.ledger.status().waiting, first)

    def call(self, method: str, *args: Any, **more: Any) -> Any:
        return getattr(self.ledger, method)(*args, **more)

    def summary(self) -> Summary:
        return self.ledger.summary

    def end(self) -> None:
        """Gives the lock back."""
        self.stack.close()


class EngineActor:
    """One engine. Its constructor does nothing: an exception there would look like a death."""

    def node(self) -> str:
        """The id of the machine it was placed on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def run(self, number: int, options: JobOptions, begun: Begun, ledger: Any, lock: str | None) -> float:
        """Works until the ledger has no more requests. Returns: seconds of loading.

        Args:
            lock: what the ledger wrote into the lock of a directory; this machine must see it too.
        Raises: InputError for a machine that differs; as `Filling.run`.
        """
        task, identity = options.task(reading=False)
        machine, place = socket.gethostname(), place_of(options.out)
        try:
            manifest.refuse_difference(str(options.out), begun.identity, identity)
        except LogitcacheError as e:
            raise type(e)(f"the machine {machine} differs from the one where the command runs: {e}") from None
        if lock is not None and lock_in(options.out) != lock:
            raise InputError(
                f"{options.out}: the machine {machine} has another directory there; give `out` one that all machines share, "
                "or s3://BUCKET/NAME"
            )

        def ask(method: str, *args: Any) -> Any:
            return get(ledger.call.remote(method, number, *args))

        filling = Filling(task, identity, place, ask, f"{begun.first} {number}", f"engine {number} on {machine}")
        try:
            filling.run(begun.waiting)
        finally:
            if filling.session.log.exists():  # the engine began to load
                place.keep(filling.session.log)
        return filling.session.load_seconds


def lock_in(out: Any) -> str | None:
    """What the lock of a directory contains; None in an object store."""
    if not isinstance(out, Path):
        return None
    lock = out / f"{LOCK}-0-of-1"
    return lock.read_text() if lock.exists() else ""
