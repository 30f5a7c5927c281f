"""Which traces a student sees, and when: mixtures, a reproducible order, optimizer steps.

The order of an epoch is a pure function of seed, epoch and trace ids. An optimizer step takes the next traces of that order
by a budget of tokens. Ranks and gradient accumulation only divide a step's traces, so they change the order of a sum and
nothing else. Tokens are counted on whole traces, before a view cuts them: two runs with different views see the same
traces in the same steps.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


def hash_64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def shuffled(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """int64 [n], a shuffle of n traces: their uint64 keys, hashed with seed and epoch by splitmix64, sorted."""
    mixed = keys ^ _splitmix(np.array([(seed % 2**32) << 32 | epoch], np.uint64))
    return np.lexsort((keys, _splitmix(mixed)))


def _splitmix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The traces to order: every trace once an epoch, or parts of them in given shares."""

    lengths: np.ndarray  # int64 [n], tokens
    keys: np.ndarray  # uint64 [n]
    parts: tuple[slice, ...] = ()  # one per cache, together all of the traces
    shares: tuple[float, ...] | None = None  # of an epoch's tokens, one per part; None: every trace once

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def counts(self) -> list[int]:
        """Traces that an epoch takes from each part: as many as the shares allow without repeating one."""
        if self.shares is None:
            return [len(self)]
        tokens = np.array([self.lengths[part].sum() for part in self.parts], np.float64)
        shares = np.array(self.shares) / sum(self.shares)
        epoch = (tokens / shares).min()
        sizes = np.array([part.stop - part.start for part in self.parts])
        return np.clip(np.rint(shares * epoch / tokens * sizes), 1, sizes).astype(int).tolist()

    @property
    def epoch_tokens(self) -> float:
        """Tokens of an epoch; for a mixture, on average."""
        if self.shares is None:
            return float(self.lengths.sum())
        return sum(count * float(self.lengths[p].mean()) for count, p in zip(self.counts, self.parts, strict=True))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """int64, the traces of an epoch. A part that is used only partly continues with the rest in the next epoch."""
        if self.shares is None:
            return shuffled(self.keys, seed, epoch)
        drawn = []
        for count, part in zip(self.counts, self.parts, strict=True):
            size, start = part.stop - part.start, count * epoch
            rounds = range(start // size, (start + count - 1) // size + 1)
            stream = np.concatenate([shuffled(self.keys[part], seed, r) for r in rounds])
            drawn.append(stream[start - rounds[0] * size :][:count] + part.start)
        chosen = np.concatenate(drawn)
        return chosen[shuffled(self.keys[chosen], seed, epoch)]


def cut(lengths: np.ndarray, parts: int) -> list[slice]:
    """`parts` consecutive slices with about equal token counts, none empty; parts <= len(lengths)."""
    middle = np.cumsum(lengths) - lengths / 2
    first = np.arange(parts + 1)
    bounds = np.searchsorted(middle, first * (lengths.sum() / parts))
    bounds[-1] = len(lengths)
    bounds = np.maximum.accumulate(np.maximum(bounds, first) - first) + first
    bounds = np.minimum(bounds, len(lengths) - parts + first)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)]


def share(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Index arrays of `parts` micro-batches: the longest trace left goes to the one with fewest tokens. Some may be empty."""
    filled: list[list[int]] = [[] for _ in range(parts)]
    tokens = np.zeros(parts, np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        part = int(tokens.argmin())
        filled[part].append(int(i))
        tokens[part] += lengths[i]
    return [np.array(part, np.int64) for part in filled]


class StepSampler(Sampler[list[int]]):
    """Micro-batches of one rank, `accumulation` per step. Every rank and epoch has equally many; some may be empty.

    Trace i is given as `epoch * len(pool) + i`, so that a dataset knows the epoch in whatever process it runs.

    Args:
        tokens_per_batch: tokens of a micro-batch, without padding: a step has at most tokens_per_batch * accumulation *
            world on average, and more where a single trace is longer.
    """

    def __init__(
        self,
        pool: Pool,
        tokens_per_batch: int,
        *,
        seed: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.pool, self.seed = pool, seed
        self.accumulation, self.rank, self.world = accumulation, rank, world
        wanted = -(-pool.epoch_tokens // (tokens_per_batch * accumulation * world))
        self.steps = max(1, min(sum(pool.counts), int(wanted)))  # per epoch, the same in all epochs
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def step_traces(self, epoch: int) -> list[np.ndarray]:
        """The traces of each optimizer step, over all ranks."""
        order = self.pool.order(self.seed, epoch)
        return [order[s] for s in cut(self.pool.lengths[order], self.steps)]

    def __iter__(self) -> Iterator[list[int]]:
        for traces in self.step_traces(self.epoch):
            parts = share(self.pool.lengths[traces], self.accumulation * self.world)
            for i in range(self.accumulation):
                mine = traces[parts[i * self.world + self.rank]]
                yield (mine + self.epoch * len(self.pool)).tolist()


def evaluation_batches(lengths: np.ndarray, tokens: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Every trace once over all ranks, in batches of at most `tokens` padded tokens; a longer trace is a batch alone.

    Every rank has equally many batches, some may be empty: ranks that share a student must all run each forward.
    """
    order, batches, start = np.argsort(-lengths, kind="stable"), [], 0
    while start < len(order):
        stop = min(len(order), start + max(1, tokens // max(int(lengths[order[start]]), 1)))
        batches.append(order[start:stop].tolist())
        start = stop
    batches += [[]] * (-len(batches) % world)
    return batches[rank::world]
