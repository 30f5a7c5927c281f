"""Several processes that generate one cache, each with its own share of the prompts."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from logitcache.errors import CacheBusyError, InputError
from logitcache.runtime.console import say
from logitcache.runtime.files import LOCK
from logitcache.runtime.locks import exclusive, holder
from logitcache.storage.lease import Lease, holders, lease
from logitcache.storage.store import Store

_LOCK = re.compile(re.escape(LOCK) + r"-(\d+)-of-(\d+)")


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker ``index`` of ``count``, with its own share of the prompts and its own unit numbers."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise InputError(f"`worker` {self.index}/{self.count}: give I/N with 0 <= I < N")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Worker":
        """Parses I/N, with I from 0.

        Raises: InputError.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match:
            raise InputError(f"`worker` {text!r}: write I/N, such as 0/8 for the first of 8 workers")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of_slurm(cls, environment: Mapping[str, str]) -> "Worker | None":
        """The worker of a Slurm array job, for arrays with any first index and step; None outside an array."""
        try:
            task, count = int(environment["SLURM_ARRAY_TASK_ID"]), int(environment["SLURM_ARRAY_TASK_COUNT"])
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
        except (KeyError, ValueError):
            return None
        index, rest = divmod(task - first, step)
        if rest or not 0 <= index < count:
            raise InputError(
                f"SLURM_ARRAY_TASK_ID={task} is not one of {count} tasks from {first} in steps of {step}; "
                "give `worker` I/N"
            )
        return cls(index, count)

    @classmethod
    def of_environment(cls) -> "Worker":
        """The place in a Slurm job array, else the only worker."""
        return cls.of_slurm(os.environ) or cls()

    def owns(self, prompt_id: str) -> bool:
        """Whether the prompt is this worker's. Its id alone decides, so that all workers agree."""
        if self.count == 1:
            return True
        digest = hashlib.blake2b(prompt_id.encode(), digest_size=8, person=b"worker").digest()
        return int.from_bytes(digest, "little") % self.count == self.index

    def number_after(self, number: int) -> int:
        """This worker's first unit number above ``number``."""
        return number + 1 + (self.index - number - 1) % self.count

    @contextmanager
    def alone(self, cache: Path) -> Iterator[None]:
        """Locks the cache for this worker during the block.

        Raises: CacheBusyError if the same worker is running, or a worker of another count.
        """
        with ExitStack() as stack:
            stack.enter_context(exclusive(cache / f"{LOCK}-{self.index}-of-{self.count}", f"{cache}, worker {self},"))
            # Checked after locking: if two workers start at once, at least one sees the other.
            for path in cache.glob(f"{LOCK}-*"):
                match = _LOCK.fullmatch(path.name)
                if match and int(match[2]) != self.count and (who := holder(path)):
                    raise self._other_count(str(cache), f"{match[1]}/{match[2]}", who)
            yield

    @contextmanager
    def alone_in(self, store: Store) -> Iterator[Lease]:
        """Locks a cache in an object store for this worker during the block. Waits where a killed worker may still run.

        Raises: as ``alone``; what the store raises.
        """

        def tell(line: str) -> None:
            say(line, sys.stderr)

        with lease(store, f"{self.index}-of-{self.count}", f"{store.url}, worker {self},", say=tell) as held:
            others = holders(store, lambda name: name.rpartition("-")[2] != str(self.count), say=tell)
            for name, who in others.items():
                raise self._other_count(str(store.url), name.replace("-of-", "/"), who)
            yield held

    def _other_count(self, cache: str, other: str, who: str) -> CacheBusyError:
        return CacheBusyError(
            f"{cache}: worker {other} is running ({who}), and worker {self} would generate the same prompts; stop all workers "
            "before you change N"
        )
