"""One vLLM engine from start to end: its log, its queue, its progress, and what happens when it dies or is stopped.

    with Session(spec, sampling, out=out, name="generate", first=trace_id, kept="every published shard") as session:
        session.run(pulled_from(requests), on_completion, total=1000)

`generate`, `score` and the accuracy evaluation are clients of this class.
"""

import hashlib
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Self

from logitcache.errors import EngineError, InputError
from logitcache.inference.engine import Completion, Engine, Rows, cause_in
from logitcache.inference.model import ModelSpec, Sampling
from logitcache.runtime.console import Progress, Stop, redirect_output, say
from logitcache.runtime.files import LOGS
from logitcache.runtime.secrets import hide

# Limit of results that wait for the background thread, which encodes ten times faster than one GPU generates: a raw trace of
# 32k tokens at k = 64 takes 17 MB.
_BACKLOG = 64


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """Token ids for the engine, under a key that the caller chooses."""

    key: str
    token_ids: list[int]
    max_tokens: int | None = None  # None: as in the session's Sampling


# Called with the number of requests that the engine can take now. Returns next ones, rather more than that number than to
# divide what belongs together; an empty list if there is none now, None if nothing is left.
Pull = Callable[[int], Sequence[EngineRequest] | None]


def pulled_from(requests: Iterable[EngineRequest]) -> Pull:
    """Pulls from ``requests``, which is read as the engine's queue drains."""
    waiting = iter(requests)
    return lambda count: list(islice(waiting, count)) or None


class Session:
    """Runs requests through one engine. A context manager: the engine ends with the block.

    Everything that vLLM and its processes print goes to a log file in ``out/logs``. SIGINT and SIGTERM end the session
    early and set ``stopped``; completions that finished before are delivered.

    Args:
        out: directory of the command's output.
        name: first word of the log's file name.
        first: key of the first request. It is hashed into the engine's seed, since every new engine starts its sampler
            anew: one seed for two sessions would repeat the answers.
        kept: what is kept when the engine dies, for the message.
        greeting: the line to print while the model loads.
    """

    def __init__(
        self,
        spec: ModelSpec,
        sampling: Sampling,
        *,
        out: Path,
        name: str,
        first: str,
        kept: str,
        greeting: str,
        rows: Rows | None = None,
    ) -> None:
        self.log = log_in(out, name)
        self._spec, self._sampling, self._rows = spec, sampling, rows
        self._seed, self._kept, self._greeting = engine_seed(sampling.seed, first), kept, greeting
        self._stack, self._stop = ExitStack(), Stop()
        self._backlog: deque[Future[Any]] = deque()
        # One thread works through finished results in order while the engine steps.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="results")
        self.progress: Progress | None = None
        self.seconds = self.load_seconds = 0.0

    def __enter__(self) -> Self:
        """Raises: InputError for a setting that vLLM refuses, EngineError if the engine cannot start."""
        with ExitStack() as stack:
            stack.callback(self._clean_log)
            self._terminal = stack.enter_context(redirect_output(self.log))
            stack.enter_context(self._stop)
            say(f"{self._greeting} (log: {self.log})", self._terminal)
            began = time.monotonic()
            try:
                self._engine = Engine(self._spec, self._sampling, self._seed, self._rows)
            except EngineError as e:
                raise self._explained(e) from e
            stack.callback(self._engine.close)
            stack.callback(self._background.shutdown)
            self.load_seconds = time.monotonic() - began
            self._stack = stack.pop_all()
        self._stop.patient = True
        return self

    def _clean_log(self) -> None:
        """Takes secrets out of the engine's log, in which vLLM may print its settings."""
        with suppress(OSError):
            written = self.log.read_text(errors="replace")
            if (clean := hide(written)) != written:
                self.log.write_text(clean)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def max_model_len(self) -> int:
        """The longest sequence, in tokens, that the engine takes."""
        return self._engine.max_model_len

    @property
    def stopped(self) -> str | None:
        """Name of the signal that ended the session early."""
        return self._stop.signal

    def stop(self, why: str) -> None:
        """Ends the session early, as a signal of that name would."""
        self._stop.signal = self._stop.signal or why

    def run(
        self,
        pull: Pull,
        on_completion: Callable[[Completion], int],
        *,
        total: int,
        what: str = "traces",
        on_refused: Callable[[str, InputError], None] | None = None,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs requests until none is left, keeping a queue behind what the engine works on.

        Args:
            on_completion: returns the number of tokens to count for the progress display.
            total, what: how many results to expect, and what the progress display calls them.
            on_refused: called with the key of a request that vLLM refuses; None raises.
            pulse: called about once a second.
        Raises: EngineError if the engine dies, with the cause found in its log; whatever a background task raised.
        """
        window = self._engine.max_num_seqs + max(8, self._engine.max_num_seqs // 4)
        exhausted, in_flight, beat = False, 0, time.monotonic()
        with Progress(self._terminal, total, what) as self.progress:
            try:
                while not self.stopped:
                    while not exhausted and in_flight < window and not self.stopped:
                        asked = pull(window - in_flight)
                        exhausted = asked is None
                        if not asked:
                            break
                        in_flight += sum(self._submit(request, on_refused) for request in asked)
                    if not in_flight:
                        return
                    for completion in self._engine.step():
                        in_flight -= 1
                        self.progress.add(1, on_completion(completion))
                    self.progress.tick()
                    if time.monotonic() - beat >= 1:
                        beat = time.monotonic()
                        pulse()
            except EngineError as e:
                if not self.stopped:  # a Ctrl-C reaches the engine's processes too
                    raise self._explained(e) from e
            finally:
                self.seconds += self.progress.seconds

    def _submit(self, request: EngineRequest, on_refused: Callable[[str, InputError], None] | None) -> bool:
        try:
            self._engine.submit(request.key, request.token_ids, request.max_tokens)
        except InputError as e:
            if on_refused is None:
                raise
            on_refused(request.key, e)
            return False
        return True

    def later(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Runs ``work`` in the background thread, in order. Waits if that thread falls far behind.

        Raises: what an earlier task raised.
        """
        while self._backlog and (self._backlog[0].done() or len(self._backlog) > _BACKLOG):
            self._backlog.popleft().result()
        self._backlog.append(self._background.submit(work, *args))
        return self._backlog[-1]

    def finish(self, last: Iterable[Callable[[], Any]] = ()) -> None:
        """Runs the ``last`` tasks in the background too, and waits for all tasks.

        Raises: what the first failed task raised, after all have run.
        """
        self._backlog.extend(self._background.submit(task) for task in last)
        wait(self._backlog)
        while self._backlog:
            self._backlog.popleft().result()

    def _explained(self, error: EngineError) -> EngineError:
        what = hide(": ".join(filter(None, (str(error), cause_in(self.log)))))
        return EngineError(
            f"{what}; {self._kept} is safe: fix the cause, then run the same command to resume ({self.log})"
        )


def log_in(out: Path, name: str) -> Path:
    """A new name for a log of the command ``name`` in the directory ``out``, to which several machines may write."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return out / LOGS / f"{name}-{stamp}-{secrets.token_hex(3)}-{os.getpid()}.log"


def engine_seed(seed: int, first: str) -> int:
    """31 bits from the user's seed and the key of the first request."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {first}".encode(), digest_size=4).digest(), "little") >> 1
