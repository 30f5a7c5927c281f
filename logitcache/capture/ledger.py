"""Who makes which trace: engines pull requests, and a trace belongs to one of them until it is published."""

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from logitcache.cache.shard import ShardIndex
from logitcache.capture.job import Request
from logitcache.capture.summary import Counts, Summary

DEADLY = 3  # engines that died with a request before it is set aside
_MIXED = 16  # requests of dead engines that an engine gets among others, so that another death accuses few


@dataclass(frozen=True, slots=True)
class Status:
    """A job while it runs; counts are of traces."""

    made: int
    waiting: int  # nobody holds them
    held: int  # engines work on them
    tokens: int  # made by all engines, published or not
    working: int  # engines that have taken requests and still hold some
    joined: frozenset[int]  # engines that have taken requests


class Ledger:
    """Hands out requests and publishes the indexes of finished shards; safe in threads.

    A holder is one engine, under a number that is never used again. After ``revoke`` nothing it sends is accepted, so what
    it wrote is no part of the cache, and no trace is published twice.

    Args:
        requests: the missing ones, read as they are handed out.
        waiting: how many there are.
        publish: makes a shard part of the cache.
        next_number: shard numbers, ascending.
    """

    def __init__(
        self,
        requests: Iterator[Request],
        waiting: int,
        summary: Summary,
        publish: Callable[[ShardIndex], None],
        next_number: Callable[[], int],
    ) -> None:
        self.summary, self._next_number = summary, next_number
        self._requests, self._unread, self._publish = requests, waiting, publish
        self._ahead: Request | None = None  # read, not handed out
        self._returned: deque[Request] = deque()
        self._suspects: deque[Request] = deque()  # one more death, alone, and they are set aside
        self._together = 1  # suspects that an engine may hold when nothing else is left
        self._deaths: Counter[str] = Counter()  # engines that died while they held the trace
        self._machines: defaultdict[str, set[str | None]] = defaultdict(set)  # where they died
        self._held: dict[int, dict[str, Request]] = {}
        self._joined: set[int] = set()
        self._tokens: Counter[int] = Counter()
        self._stopping = False
        self._lock = threading.RLock()

    def join(self, holder: int) -> None:
        """Lets an engine take requests."""
        self._held[holder] = {}

    def take(self, holder: int, most: int) -> list[Request] | None:
        """The next requests for an engine: about ``most``, and all samples of a prompt together, since they share a prefix.

        Returns: an empty list if there is none now, None if the engine shall take no more.
        """
        with self._lock:
            mine = self._held.get(holder)
            if mine is None or self._stopping:
                return None
            self._joined.add(holder)
            given = _first(self._returned, min(most, _MIXED - self._accused(mine, 1)))
            while len(given) < most and self._ahead_or_read():
                given += self._read_prompt()
            given += _first(self._returned, most - len(given))
            # An engine gets one suspect at a time, so that its death tells which of them it was. Where only suspects are left
            # that would take too long.
            suspects = self._together if len(given) < most else 1
            given += _first(self._suspects, suspects - self._accused(mine, DEADLY - 1))
            mine |= {request.trace_id: request for request in given}
            return given or ([] if self._suspects else None)

    def _accused(self, held: Iterable[str], deaths: int) -> int:
        """How many of these traces so many engines died with."""
        return sum(self._deaths[trace_id] >= deaths for trace_id in held) if self._deaths else 0

    def _read_prompt(self) -> list[Request]:
        """The next requests of the source that share a prompt."""
        found = [self._read()]
        while self._ahead_or_read() and self._ahead and self._ahead.prompt_id == found[0].prompt_id:
            found.append(self._read())
        return found

    def _ahead_or_read(self) -> bool:
        """Whether a request is left in the source."""
        if self._ahead is None:
            self._ahead = next(self._requests, None)
        return self._ahead is not None

    def _read(self) -> Request:
        request, self._ahead = self._ahead, None
        assert request is not None
        self._unread -= 1
        return request

    def number(self, holder: int) -> int:
        """A number for a shard that no other shard has."""
        with self._lock:
            return self._next_number()

    def commit(self, holder: int, index: ShardIndex, counts: Counts) -> bool:
        """Makes a shard part of the cache whose Arrow file ``holder`` has written. False if its traces are not its own.

        Raises: WriteError.
        """
        with self._lock:
            mine = self._held.get(holder)
            if mine is None or not mine.keys() >= set(index.trace_ids):
                return False
            self._publish(index)
            if self._accused(index.trace_ids, DEADLY - 1):
                self._together *= 2
            for trace_id in index.trace_ids:
                del mine[trace_id]
            self.summary.add(counts)
            return True

    def skip(self, holder: int, trace_id: str, prompt_id: str, why: str) -> None:
        """Counts a trace that the teacher cannot take."""
        with self._lock:
            if self._held.get(holder, {}).pop(trace_id, None):
                self.summary.skip(trace_id, prompt_id, why)

    def fail(self, holder: int, trace_id: str, why: str) -> None:
        """Counts a trace that cannot be stored."""
        with self._lock:
            if self._held.get(holder, {}).pop(trace_id, None):
                self.summary.failed[trace_id] = why

    def report(self, holder: int, tokens: int) -> bool:
        """Records how many tokens an engine has made. Returns: whether it shall go on."""
        self._tokens[holder] = tokens
        return holder in self._held and not self._stopping

    def revoke(self, holder: int, *, blamed: bool, machine: str | None = None) -> int:
        """Takes back what an engine holds that has died or cannot be reached; nothing it sends is accepted any more.

        Args:
            blamed: whether a request may have caused its death, which a lost machine rules out.
            machine: where it died; None where the cluster has no other machine. A request is set aside only after deaths on
                two machines, since one machine may be broken.
        Returns: how many traces wait again.
        """
        with self._lock:
            mine = self._held.pop(holder, {})
            suspects = self._take_suspects(mine)
            if blamed and suspects:
                self._together = 1
            for request in [*mine.values(), *suspects] if blamed else []:
                self._machines[request.trace_id].add(machine)
            if blamed and len(suspects) == 1 and self._may_be_deadly(suspects[0], machine):
                found = suspects.pop()
                self.summary.deadly[found.trace_id] = found.prompt_id
            self._suspects.extendleft(reversed(suspects))
            if blamed:
                self._deaths.update(mine.keys())
            self._suspects.extend(self._take_suspects(mine))
            self._returned.extendleft(reversed(mine.values()))
            return len(mine) + len(suspects)

    def _may_be_deadly(self, request: Request, machine: str | None) -> bool:
        return machine is None or len(self._machines[request.trace_id]) > 1

    def _take_suspects(self, held: dict[str, Request]) -> list[Request]:
        """Removes those of the requests that one more death will set aside."""
        return [held.pop(t) for t in [*held] if self._deaths[t] >= DEADLY - 1]

    def stop(self) -> None:
        """From now on no request is handed out; engines publish what they have finished and end."""
        self._stopping = True

    def finish(self, seconds: float, load_seconds: float, stopped: str | None, engines: int, deaths: int) -> Summary:
        """The summary, once the engines have ended."""
        summary = self.summary
        summary.seconds, summary.load_seconds, summary.stopped = seconds, load_seconds, stopped
        summary.engines, summary.deaths = engines, deaths
        return summary

    def status(self) -> Status:
        held = [len(mine) for mine in self._held.values()]
        waiting = self._unread + len(self._returned) + len(self._suspects)
        tokens = sum(self._tokens.values())
        return Status(self.summary.made, waiting, sum(held), tokens, sum(map(bool, held)), frozenset(self._joined))


def _first(waiting: deque[Request], count: int) -> list[Request]:
    """Takes up to ``count`` requests."""
    return [waiting.popleft() for _ in range(min(count, len(waiting)))]
