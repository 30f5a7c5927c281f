"""Downloads shards of caches behind a URL before they are read. Caches in directories are read as they are."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Sampler

from logitcache.cache.reader import Cache
from logitcache.cache.shard import Shard

if TYPE_CHECKING:
    from logitcache.student.data.dataset import ExampleSource

AHEAD = 64  # shards that are asked for at once; a mirror stops at half of its bytes


class FetchAhead(Sampler[list[int]]):
    """The batches of a sampler, as they are; while they are used, the shards that later ones need first are downloaded.

    It runs in the process that makes the batches. Processes on one machine share a mirror, and each shard is downloaded by
    one of them.
    """

    def __init__(self, batches: "Sampler[list[int]] | Sequence[list[int]]", data: "ExampleSource"):
        self.batches, self.pool, self.caches = batches, data.pool, [part.cache for part in data.parts]
        counts = [len(cache.shards) for cache in self.caches]
        self._starts = np.cumsum([0, *counts[:-1]])  # the number of each cache's first shard

    def __len__(self) -> int:
        return len(self.batches)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batches)
        shards, first_batches = self._first_uses(batches)
        for number, batch in enumerate(batches):
            place = np.searchsorted(first_batches, number)
            if number == 0 or place > np.searchsorted(first_batches, number - 1):
                self._fetch(shards[place : place + AHEAD])
            yield batch

    def _first_uses(self, batches: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order in which they are needed, and the batch that needs each first."""
        assert self.pool.shards is not None
        traces = np.fromiter(itertools.chain.from_iterable(batches), np.int64) % len(self.pool)
        batch_of = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        shards, places = np.unique(self.pool.shards[traces], return_index=True)
        order = np.argsort(places)
        return shards[order], batch_of[places[order]]

    def _fetch(self, shards: np.ndarray) -> None:
        owners = np.searchsorted(self._starts, shards, side="right") - 1
        for number, cache in enumerate(self.caches):
            if cache.mirror is not None:
                mine = shards[owners == number] - self._starts[number]
                cache.mirror.fetch_ahead(cache.shards[i] for i in mine)


def in_turn(cache: Cache) -> Iterator[Shard]:
    """All shards of a cache; those behind the one in use are downloaded meanwhile."""
    for number in range(len(cache.shards)):
        if cache.mirror is not None and number % (AHEAD // 2) == 0:
            cache.mirror.fetch_ahead(cache.shards[number : number + AHEAD])
        yield cache.shard(number)
