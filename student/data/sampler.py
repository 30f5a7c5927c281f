"""Which traces a student sees, and when: mixtures, a reproducible order, optimizer steps.

The order of an epoch is a pure function of seed, epoch and trace ids; where it uses few shards at a time, also of which
shard holds which trace. An optimizer step takes the next traces of that order by a budget of tokens. Ranks and gradient
accumulation only divide a step's traces, so they change the order of a sum and nothing else. Tokens are counted on whole
traces, before a view cuts them: two runs with different views see the same traces in the same steps.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

EVALUATED_AT_ONCE = 16  # shards of a cache behind a URL: 256 MB of a mirror at 16 MB a shard


def hash_64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def shuffled(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """int64 [n], a shuffle of n traces: their uint64 keys, hashed with seed and epoch by splitmix64, sorted."""
    mixed = keys ^ _splitmix(np.array([(seed % 2**32) << 32 | epoch], np.uint64))
    return np.lexsort((keys, _splitmix(mixed)))


def shuffled_by_shards(keys: np.ndarray, shards: np.ndarray, window: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n], a shuffle of n traces that uses few shards at a time: the shards are shuffled and cut into windows of at
    most `window`, and the traces of a window are shuffled. One window of all shards gives the order of `shuffled`.

    Args:
        shards: int64 [n], the shard of each trace, any numbers.
    """
    numbers, shard_n = np.unique(shards, return_inverse=True)
    first = np.full(len(numbers), 2**64 - 1, np.uint64)
    np.minimum.at(first, shard_n, keys)  # a shard is known by its smallest key, wherever in the cache it is
    windows = -(-len(numbers) // window)
    window_of = np.empty(len(numbers), np.int64)
    window_of[shuffled(_splitmix(first), seed, epoch)] = np.arange(len(numbers)) * windows // len(numbers)
    order = shuffled(keys, seed, epoch)
    return order[np.argsort(window_of[shard_n[order]], kind="stable")]


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
    shards: np.ndarray | None = (
        None  # int64 [n], the shard of each trace, another number in every part; None: not known
    )

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

    def order(self, seed: int, epoch: int, window: int | None = None) -> np.ndarray:
        """int64, the traces of an epoch. A part that is used only partly continues with the rest in the next epoch.

        Args:
            window: shards that are mixed at a time, of each part where there are shares; None: all.
        """
        if self.shares is None:
            return self._shuffled(slice(None), seed, epoch, window)
        drawn = []
        for count, part in zip(self.counts, self.parts, strict=True):
            size, start = part.stop - part.start, count * epoch
            rounds = range(start // size, (start + count - 1) // size + 1)
            stream = np.concatenate([self._shuffled(part, seed, r, window) for r in rounds])
            drawn.append(stream[start - rounds[0] * size :][:count] + part.start)
        chosen = np.concatenate(drawn)
        if window is None:
            return chosen[shuffled(self.keys[chosen], seed, epoch)]
        evenly = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        return chosen[np.argsort(evenly, kind="stable")]

    def _shuffled(self, part: slice, seed: int, epoch: int, window: int | None) -> np.ndarray:
        if window is None:
            return shuffled(self.keys[part], seed, epoch)
        assert self.shards is not None
        return shuffled_by_shards(self.keys[part], self.shards[part], window, seed, epoch)


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
        window: shards that are mixed at a time; None: all.
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
        window: int | None = None,
    ):
        self.pool, self.seed, self.window = pool, seed, window
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
        order = self.pool.order(self.seed, epoch, self.window)
        return [order[s] for s in cut(self.pool.lengths[order], self.steps)]

    def __iter__(self) -> Iterator[list[int]]:
        for traces in self.step_traces(self.epoch):
            parts = share(self.pool.lengths[traces], self.accumulation * self.world)
            for i in range(self.accumulation):
                mine = traces[parts[i * self.world + self.rank]]
                yield (mine + self.epoch * len(self.pool)).tolist()


def evaluation_batches(
    lengths: np.ndarray, tokens: int, rank: int = 0, world: int = 1, shards: np.ndarray | None = None
) -> list[list[int]]:
    """Every trace once over all ranks, in batches of at most `tokens` padded tokens; a longer trace is a batch alone.

    Every rank has equally many batches, some may be empty: ranks that share a student must all run each forward.
    Args:
        shards: int64 [n], the shard of each trace: a few shards at a time. None: the longest traces of all first.
    """
    blocks = [np.arange(len(lengths))] if shards is None else _few_shards(shards)
    batches = [batch for block in blocks for batch in _by_length(lengths, block, tokens)]
    batches += [[]] * (-len(batches) % world)
    return batches[rank::world]


def _few_shards(shards: np.ndarray) -> list[np.ndarray]:
    """The traces of EVALUATED_AT_ONCE shards at a time."""
    block_n = np.unique(shards, return_inverse=True)[1] // EVALUATED_AT_ONCE
    return [(block_n == block).nonzero()[0] for block in range(block_n.max(initial=-1) + 1)]


def _by_length(lengths: np.ndarray, traces: np.ndarray, tokens: int) -> Iterator[list[int]]:
    order, start = traces[np.argsort(-lengths[traces], kind="stable")], 0
    while start < len(order):
        stop = start + max(1, tokens // max(int(lengths[order[start]]), 1))
        yield order[start:stop].tolist()
        start = stop
