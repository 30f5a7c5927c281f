from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitcache.student.data.sampler import Pool, StepSampler, cut, evaluation_batches, share, shuffled


@pytest.fixture
def pool() -> Pool:
    return made(24)


def made(count: int, seed: int = 0, **options) -> Pool:
    rng = np.random.default_rng(seed)
    return Pool(rng.integers(12, 40, count), rng.integers(0, 2**63, count).astype(np.uint64), **options)


def test_the_order_is_that_of_splitmix64_of_key_seed_and_epoch():
    keys = np.arange(1, 9, dtype=np.uint64)  # orders worked out with Python's integers
    assert shuffled(keys, seed=0, epoch=0).tolist() == [0, 3, 4, 6, 5, 2, 1, 7]
    assert shuffled(keys, seed=0, epoch=1).tolist() == [7, 5, 6, 2, 4, 1, 3, 0]
    assert shuffled(keys, seed=1, epoch=0).tolist() == [7, 0, 6, 1, 2, 5, 3, 4]
    assert Pool(np.full(8, 5), keys).order(0, 1).tolist() == [7, 5, 6, 2, 4, 1, 3, 0]


def test_the_order_depends_on_the_traces_and_not_on_their_places(pool):
    order = shuffled(pool.keys, 0, 0)
    assert sorted(order) == list(range(len(pool)))
    backwards = pool.keys[::-1]
    assert pool.keys[order].tolist() == backwards[shuffled(backwards, 0, 0)].tolist()


@pytest.mark.parametrize(("tokens", "expected"), [(1, 24), (50, 13), (128, 5), (10_000, 1)])
def test_every_epoch_has_every_trace_once_in_as_many_steps_none_of_them_empty(pool, tokens, expected):
    assert pool.lengths.sum() == 626
    sampler = StepSampler(pool, tokens)
    assert len(sampler) == expected, "626 / tokens, rounded up, and at most a step per trace"
    for epoch in range(5):
        steps = sampler.step_traces(epoch)
        assert len(steps) == expected
        assert all(len(step) for step in steps)
        assert sorted(np.concatenate(steps)) == list(range(len(pool)))


def test_cut_balances_tokens_even_beside_a_giant():
    lengths = np.array([10, 10, 5000, 10, 10, 10, 10, 10])
    assert [s.stop - s.start for s in cut(lengths, 8)] == [1] * 8
    even = np.full(100, 7)
    assert {s.stop - s.start for s in cut(even, 10)} == {10}


@pytest.mark.parametrize(("accumulation", "world"), [(4, 1), (1, 4), (2, 2)])
def test_ranks_and_accumulation_share_the_same_steps_out(pool, accumulation, world):
    whole = StepSampler(pool, 200)
    ranks = [StepSampler(pool, 50, accumulation=accumulation, rank=r, world=world) for r in range(world)]
    for sampler in [whole, *ranks]:
        sampler.set_epoch(3)
    batches = [list(r) for r in ranks]
    assert {len(b) for b in batches} == {len(whole) * accumulation}
    for step, traces in enumerate(whole):
        shared = [i for b in batches for part in b[step * accumulation : (step + 1) * accumulation] for i in part]
        assert sorted(shared) == sorted(traces)


def test_share_balances_tokens_and_leaves_parts_empty_when_traces_run_out():
    lengths = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1])
    parts = share(lengths, 3)
    assert sorted(np.concatenate(parts)) == list(range(9))
    assert max(int(lengths[part].sum()) for part in parts) <= 16, "at most a third more than 15"
    assert sorted(len(part) for part in share(lengths[:2], 4)) == [0, 0, 1, 1]


def test_evaluation_batches_hold_every_trace_once_over_all_ranks_within_the_budget(pool):
    batches = [b for rank in range(3) for b in evaluation_batches(pool.lengths, 100, rank, 3)]
    assert sorted(i for b in batches for i in b) == list(range(len(pool)))
    assert all(len(b) * pool.lengths[b].max() <= 100 for b in batches if b)


def test_every_rank_evaluates_as_often(pool):
    assert len({len(evaluation_batches(pool.lengths, 100, rank, 5)) for rank in range(5)}) == 1


def test_a_batch_says_which_epoch_it_is_of(pool):
    sampler = StepSampler(pool, 10_000)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        assert sorted(i for batch in sampler for i in batch) == [epoch * len(pool) + i for i in range(len(pool))]


def mixed(shares: tuple[float, ...]) -> Pool:
    return made(130, parts=(slice(0, 100), slice(100, 130)), shares=shares)


def test_a_mixture_keeps_its_shares_of_tokens_and_repeats_nothing_within_an_epoch():
    pool = mixed((0.7, 0.3))
    for epoch in range(20):
        order = pool.order(0, epoch)
        tokens = pool.lengths[order]
        assert tokens[order >= 100].sum() / tokens.sum() == pytest.approx(0.3, abs=0.05)
        assert len(order) == sum(pool.counts)
    assert len(set(pool.order(0, 0))) == len(pool.order(0, 0))
    assert max(count / size for count, size in zip(pool.counts, (100, 30), strict=True)) == 1.0, "one is used up"
    assert pool.order(0, 1).tolist() != pool.order(0, 0).tolist()


def test_a_mixture_of_four_and_two_equal_traces_by_halves_takes_two_and_two():
    pool = Pool(np.full(6, 10), np.arange(6, dtype=np.uint64), (slice(0, 4), slice(4, 6)), (0.5, 0.5))
    first, second = pool.order(0, 0).tolist(), pool.order(0, 1).tolist()
    assert (pool.counts, pool.epoch_tokens) == ([2, 2], 40)
    assert sorted([i for i in first + second if i < 4]) == [0, 1, 2, 3], "the second epoch continues with the rest"
    assert sorted([i for i in first if i >= 4]) == sorted([i for i in second if i >= 4]) == [4, 5]


def test_a_part_of_which_an_epoch_takes_little_is_used_up_in_time():
    pool = mixed((0.1, 0.9))
    taken = pool.counts[0]
    assert taken < 20
    seen = np.concatenate([pool.order(0, epoch) for epoch in range(-(-100 // taken))])
    often = np.bincount(seen[seen < 100], minlength=100)
    assert set(often) <= {1, 2}
    assert often.sum() == taken * -(-100 // taken)


def test_mixed_steps_are_as_many_in_every_epoch():
    sampler = StepSampler(mixed((0.6, 0.4)), 300)
    assert {len(sampler.step_traces(epoch)) for epoch in range(10)} == {sampler.steps}
    tokens = [int(sampler.pool.lengths[step].sum()) for epoch in range(10) for step in sampler.step_traces(epoch)]
    assert np.mean(tokens) == pytest.approx(300, rel=0.15)


# A busy machine makes no difference.
patient = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def sharded(draw) -> Pool:
    """Traces in shards of 1 to 6; from one cache, or in shares from two."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=20))
    rng, count = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), sum(sizes)
    shards = np.repeat(np.arange(len(sizes)), sizes)
    parts, shares = (), None
    if draw(st.booleans()):
        border = sum(sizes[: draw(st.integers(1, len(sizes) - 1))])
        parts, shares = (slice(0, border), slice(border, count)), (draw(st.floats(0.1, 0.9)), 0.5)
    return Pool(rng.integers(1, 100, count), rng.integers(0, 2**63, count).astype(np.uint64), parts, shares, shards)


windows, seeds, epochs = st.integers(1, 25), st.integers(0, 2**32 - 1), st.integers(0, 9)


def most_open(shards: np.ndarray) -> int:
    """The most shards that are in use at once: already read, and needed again."""
    first, last = ({int(s): i for i, s in places} for places in (reversed([*enumerate(shards)]), enumerate(shards)))
    return max(sum(first[s] <= i <= last[s] for s in first) for i in range(len(shards)))


@patient
@given(sharded(), windows, seeds, epochs)
def test_an_order_by_shards_has_the_traces_of_a_full_shuffle_and_is_the_same_each_time(pool, window, seed, epoch):
    order = pool.order(seed, epoch, window)
    assert len(order) == sum(pool.counts)
    if pool.shares is None:
        assert sorted(order) == list(range(len(pool)))
    elif epoch == 0:
        assert len(set(order)) == len(order)
    assert order.tolist() == pool.order(seed, epoch, window).tolist()


@patient
@given(sharded(), windows, seeds, epochs)
def test_every_trace_of_a_mixture_comes_in_turn_also_by_shards(pool, window, seed, epoch):
    for part, count in zip(pool.parts, pool.counts, strict=False):
        size = part.stop - part.start
        seen = np.concatenate([pool.order(seed, e, window) for e in range(-(-size // count))])
        assert set(range(part.start, part.stop)) <= set(seen.tolist())


@patient
@given(sharded(), windows, seeds, epochs)
def test_an_order_by_shards_uses_at_most_a_window_of_them_at_a_time(pool, window, seed, epoch):
    whole = replace(pool, shares=None)
    shards = whole.shards[whole.order(seed, epoch, window)]
    assert most_open(shards) <= window


@patient
@given(sharded(), seeds, epochs)
def test_one_window_of_all_shards_is_a_full_shuffle(pool, seed, epoch):
    whole = replace(pool, shares=None)
    assert whole.order(seed, epoch, window=20).tolist() == whole.order(seed, epoch).tolist()


@patient
@given(sharded(), windows, seeds, epochs)
def test_an_order_by_shards_does_not_depend_on_the_places_of_traces_and_shards(pool, window, seed, epoch):
    moved = np.random.default_rng(seed).permutation(len(pool))
    there = Pool(pool.lengths[moved], pool.keys[moved], shards=97 - 3 * pool.shards[moved])
    here = replace(pool, shares=None)
    assert pool.keys[here.order(seed, epoch, window)].tolist() == there.keys[there.order(seed, epoch, window)].tolist()


@patient
@given(sharded(), windows, seeds, epochs, st.integers(1, 3), st.integers(1, 3))
def test_ranks_and_accumulation_share_the_steps_of_an_order_by_shards(pool, window, seed, epoch, accumulation, world):
    whole = StepSampler(pool, 60 * accumulation * world, seed=seed, window=window)
    options = {"seed": seed, "accumulation": accumulation, "world": world, "window": window}
    ranks = [StepSampler(pool, 60, rank=rank, **options) for rank in range(world)]
    for sampler in [whole, *ranks]:
        sampler.set_epoch(epoch)
    batches = [list(rank) for rank in ranks]
    assert {len(b) for b in batches} == {len(whole) * accumulation}
    for step, traces in enumerate(whole):
        shared = [i for b in batches for part in b[step * accumulation : (step + 1) * accumulation] for i in part]
        assert sorted(shared) == sorted(traces)


def test_epochs_and_seeds_order_the_shards_anew():
    pool = Pool(np.full(400, 10), np.arange(400, dtype=np.uint64), shards=np.arange(400) // 10)
    firsts = {tuple(pool.shards[pool.order(seed, epoch, 1)][::10]) for seed in range(3) for epoch in range(3)}
    assert len(firsts) == 9
