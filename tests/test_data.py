import pickle

import numpy as np
import pytest
import torch

from logitcache.errors import StudentError
from logitcache.student.data import (
    StepSampler,
    TraceDataset,
    _take,
    collate,
    cut,
    epoch_order,
    evaluation_batches,
    groups,
    share,
    split,
)
from logitcache.student.views import View
from logitcache.topk import SparseRows
from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TraceDataset(tiny.write_cache(tmp_path_factory.mktemp("cache") / "cache"))


def prompts(count: int) -> list[str]:
    return [f"prompt {i}" for i in range(count)]


def test_no_prompt_is_on_both_sides_of_the_split():
    ids = prompts(5000) * 3
    taught, held = split(ids, 0.1)
    assert sorted([*taught, *held]) == list(range(15_000))
    assert not {ids[i] for i in taught} & {ids[i] for i in held}
    assert len(held) == pytest.approx(1500, rel=0.15)


def test_a_prompt_keeps_its_side_as_the_cache_grows_and_in_any_order():
    few, many = prompts(100), prompts(1000)[::-1]
    held_few = {few[i] for i in split(few, 0.1)[1]}
    held_many = {many[i] for i in split(many, 0.1)[1]}
    assert held_few == held_many & set(few)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
def test_neither_side_is_ever_empty(count, fraction):
    assert all(len(side) for side in split(prompts(count), fraction))


def test_a_single_prompt_cannot_be_split():
    with pytest.raises(StudentError, match="holds 1 prompt"):
        split(["a", "a"], 0.05)
    with pytest.raises(StudentError, match="between 0 and 1"):
        split(prompts(5), 1.0)


def test_the_order_is_a_function_of_seed_epoch_and_traces_alone(data):
    order = epoch_order(data.keys, 0, 0)
    assert sorted(order) == list(range(len(data)))
    assert order.tolist() == epoch_order(data.keys, 0, 0).tolist()
    assert order.tolist() != epoch_order(data.keys, 0, 1).tolist()
    assert order.tolist() != epoch_order(data.keys, 1, 0).tolist()
    backwards = TraceDataset(data.cache, data.indices[::-1])
    assert data.indices[order].tolist() == backwards.indices[epoch_order(backwards.keys, 0, 0)].tolist()


@pytest.mark.parametrize("tokens", [1, 50, 128, 10_000])
def test_every_epoch_has_every_trace_once_in_as_many_steps_none_of_them_empty(data, tokens):
    sampler = StepSampler(data, tokens)
    for epoch in range(5):
        steps = sampler.step_traces(epoch)
        assert len(steps) == sampler.steps == len(sampler)
        assert all(len(step) for step in steps)
        assert sorted(np.concatenate(steps)) == list(range(len(data)))


def test_cut_balances_tokens_even_beside_a_giant():
    lengths = np.array([10, 10, 5000, 10, 10, 10, 10, 10])
    assert [s.stop - s.start for s in cut(lengths, 8)] == [1] * 8
    even = np.full(100, 7)
    assert {s.stop - s.start for s in cut(even, 10)} == {10}


@pytest.mark.parametrize(("accumulation", "world"), [(4, 1), (1, 4), (2, 2)])
def test_ranks_and_accumulation_share_the_same_steps_out(data, accumulation, world):
    whole = StepSampler(data, 200)
    ranks = [StepSampler(data, 50, accumulation=accumulation, rank=r, world=world) for r in range(world)]
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


def test_groups_of_alike_length_cover_all_and_save_padding():
    lengths = np.array([500, 480, 470, 120, 110, 100, 100, 90])
    runs = groups(lengths)
    assert [i for run in runs for i in range(len(lengths))[run]] == list(range(8))
    assert len(runs) == 2
    assert sum((run.stop - run.start) * int(lengths[run.start]) for run in runs) == 3 * 500 + 5 * 120
    assert groups(np.zeros(0, np.int64)) == []


def test_evaluation_batches_hold_every_trace_once_over_all_ranks_within_the_budget(data):
    batches = [b for rank in range(3) for b in evaluation_batches(data.lengths, 100, rank, 3)]
    assert sorted(i for b in batches for i in b) == list(range(len(data)))
    assert all(len(b) * data.lengths[b].max() <= 100 for b in batches)


def test_a_batch_names_for_each_taught_position_the_row_of_the_next_token(data):
    batch = collate([data[i] for i in (3, 0, 7)])
    flat = torch.cat([g.flatten() for g in batch["groups"]])
    traces = {t.trace_id: t for t in map(data.cache.__getitem__, (3, 0, 7))}
    row = 0
    for name in batch["trace_ids"]:
        trace = traces[name]
        for r in range(len(trace.rows)):
            entries = slice(int(batch["offsets"][row]), int(batch["offsets"][row + 1]))
            expected = slice(*trace.rows.offsets[r : r + 2])
            assert batch["ids"][entries].tolist() == trace.rows.ids[expected].tolist()
            assert batch["logprobs"][entries].tolist() == trace.rows.logprobs[expected].tolist()
            assert batch["log_tail"][row] == trace.rows.log_tail[r]
            assert flat[batch["taught"][row]] == trace.token_ids[trace.row_start + r - 1]
            assert batch["labels"][row] == trace.token_ids[trace.row_start + r]
            row += 1
    assert row == len(batch["taught"]) == batch["tokens"]


def test_a_batch_of_traces_with_nothing_to_teach_is_a_dummy(data):
    nothing = TraceDataset(data.cache, view=View(sections=("answer",)))[0]
    nothing = type(nothing)(
        nothing.trace_id, nothing.input_ids[:0], nothing.positions[:0], nothing.rows[:0], *[np.zeros(0)] * 4
    )
    for examples in ([], [nothing]):
        batch = collate(examples)
        assert (len(batch["taught"]), batch["tokens"], batch["groups"][0].shape) == (0, 0, (1, 1))


def test_scattered_rows_are_taken_as_they_are():
    rows = tiny.traces(1, 1)[0].rows
    index = np.array([0, 2, 3, 7])
    taken = _take(rows, index)
    one_by_one = SparseRows.concatenate([rows[int(i) : int(i) + 1] for i in index])
    for name in ("offsets", "ids", "logprobs", "log_tail"):
        assert np.array_equal(getattr(taken, name), getattr(one_by_one, name))


def test_ids_beyond_the_students_head_join_the_tail(data):
    narrow, wide = TraceDataset(data.cache, vocab=40)[0].rows, data[0].rows
    assert narrow.ids.max() < 40 <= wide.ids.max()
    for rows in (narrow, wide):
        mass = np.bincount(np.repeat(np.arange(len(rows)), rows.counts), np.exp(rows.logprobs), minlength=len(rows))
        assert np.allclose(mass + np.exp(rows.log_tail), 1, atol=1e-4)
    untouched = (wide.counts == narrow.counts).nonzero()[0]
    assert np.array_equal(narrow.log_tail[untouched], wide.log_tail[untouched])


def test_a_dataset_survives_pickling_and_workers_give_the_same_batches(data):
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again[5].rows.ids, data[5].rows.ids)


@pytest.mark.slow
def test_loader_workers_give_the_same_batches(data):
    alone, workers = data.loader(StepSampler(data, 100)), data.loader(StepSampler(data, 100), num_workers=2)
    for a, b in zip(alone, workers, strict=True):
        assert a["trace_ids"] == b["trace_ids"]
        assert torch.equal(a["logprobs"], b["logprobs"])
