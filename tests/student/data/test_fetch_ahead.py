"""Shards are asked for before they are read. `test_remote.py` in `training` does it with a store."""

import numpy as np
import pytest

from logitcache.student.data import fetch_ahead, sampler
from logitcache.student.data.dataset import Mixture, TraceDataset, matching
from logitcache.student.data.fetch_ahead import FetchAhead, in_turn
from logitcache.student.data.sampler import StepSampler, evaluation_batches
from tests import tiny


class Asked:
    """Stands for the mirror of a cache: what it was asked to fetch, by number of the shard."""

    def __init__(self, cache) -> None:
        self.numbers = {index.name: number for number, index in enumerate(cache.shards)}
        self.lists: list[list[int]] = []

    def fetch_ahead(self, indexes) -> None:
        self.lists.append([self.numbers[index.name] for index in indexes])


@pytest.fixture
def caches(tmp_path):
    """Two caches of 24 traces, of 8 and of 6 shards; the first says what it is asked for."""
    here, there = (tiny.write_cache(tmp_path / f"cache-{n}", shards=n) for n in (8, 6))
    return here, there


@pytest.fixture
def watched(caches, monkeypatch):
    mirrors = {}
    for cache in caches[:1]:
        mirrors[str(cache.path)] = Asked(cache)
    monkeypatch.setattr(type(caches[0]), "mirror", property(lambda cache: mirrors.get(str(cache.path))))
    return mirrors[str(caches[0].path)]


def test_batches_are_unchanged_and_their_shards_asked_for_in_the_order_of_use(caches, watched):
    data = TraceDataset(caches[0])
    batches = StepSampler(data.pool, 120, window=2)
    batches.set_epoch(1)
    ahead = FetchAhead(batches, data)
    assert len(ahead) == len(batches)
    assert list(ahead) == list(batches)
    uses = list(dict.fromkeys(int(data.pool.shards[i % 24]) for batch in batches for i in batch))
    assert watched.lists[0] == uses
    for asked in watched.lists[1:]:
        assert asked == uses[len(uses) - len(asked) :], "what is not read yet"
    assert len(watched.lists[-1]) < 3


def test_as_many_are_asked_for_as_may_wait(caches, watched, monkeypatch):
    monkeypatch.setattr(fetch_ahead, "AHEAD", 3)
    data = TraceDataset(caches[0])
    list(FetchAhead(StepSampler(data.pool, 120, window=1), data))
    assert {len(asked) for asked in watched.lists[:-3]} == {3}
    assert {n for asked in watched.lists for n in asked} == set(range(8))


def test_of_a_mixture_the_caches_behind_urls_are_asked(caches, watched):
    data = Mixture([TraceDataset(caches[1], np.arange(5, 24)), TraceDataset(caches[0], np.arange(3, 24))])
    assert data.remote
    batches = evaluation_batches(data.pool.lengths, 200)
    assert list(FetchAhead(batches, data)) == batches
    expected = [data.pool.shards[i] - 6 for batch in batches for i in batch if data.pool.shards[i] >= 6]
    assert watched.lists[0] == list(dict.fromkeys(map(int, expected)))


def test_reading_all_shards_in_turn_asks_for_the_next_ones(caches, watched, monkeypatch):
    monkeypatch.setattr(fetch_ahead, "AHEAD", 4)
    read = [shard.batch.column("trace_id").to_pylist() for shard in in_turn(caches[0])]
    assert read == [index.trace_ids for index in caches[0].shards]
    assert watched.lists == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7]]
    assert matching(caches[0], "tokens>0").all()
    assert not TraceDataset(caches[1]).remote


def test_an_evaluation_by_shards_has_every_trace_once_and_few_shards_at_a_time(caches, monkeypatch):
    monkeypatch.setattr(sampler, "EVALUATED_AT_ONCE", 2)
    pool = TraceDataset(caches[0]).pool
    ranks = [evaluation_batches(pool.lengths, 100, rank, 3, pool.shards) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(24))
    whole = evaluation_batches(pool.lengths, 100, shards=pool.shards)
    assert all(len(batch) * pool.lengths[batch].max() <= 100 for batch in whole)
    pairs = [set((pool.shards[batch] // 2).tolist()) for batch in whole]
    assert pairs == sorted(pairs, key=max), "one pair of shards after the other"
    assert all(len(pair) == 1 for pair in pairs)
