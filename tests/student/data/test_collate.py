import numpy as np
import pytest
import torch

from logitcache.student.data.collate import collate, groups, loader
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.data.sampler import StepSampler
from logitcache.student.data.views import View
from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TraceDataset(tiny.write_cache(tmp_path_factory.mktemp("cache") / "cache"))


def test_groups_of_alike_length_cover_all_and_save_padding():
    lengths = np.array([500, 480, 470, 120, 110, 100, 100, 90])
    runs = groups(lengths)
    assert [i for run in runs for i in range(len(lengths))[run]] == list(range(8))
    assert len(runs) == 2
    assert sum((run.stop - run.start) * int(lengths[run.start]) for run in runs) == 3 * 500 + 5 * 120
    assert groups(np.zeros(0, np.int64)) == []


def test_a_batch_names_for_each_supervised_position_the_row_of_the_next_token(data):
    batch = collate([data[i] for i in (3, 0, 7)])
    flat = torch.cat([g.flatten() for g in batch.groups])
    traces = {t.trace_id: t for t in map(data.cache.__getitem__, (3, 0, 7))}
    row = 0
    for name in batch.trace_ids:
        trace = traces[name]
        for r in range(len(trace.rows)):
            entries = slice(int(batch.targets.offsets[row]), int(batch.targets.offsets[row + 1]))
            expected = slice(*trace.rows.offsets[r : r + 2])
            assert batch.targets.ids[entries].tolist() == trace.rows.ids[expected].tolist()
            assert batch.targets.logprobs[entries].tolist() == trace.rows.logprobs[expected].tolist()
            assert batch.targets.log_tail[row] == trace.rows.log_tail[r]
            assert flat[batch.supervised[row]] == trace.token_ids[trace.row_start + r - 1]
            assert batch.targets.labels[row] == trace.token_ids[trace.row_start + r]
            row += 1
    assert row == len(batch.supervised) == batch.tokens


def test_a_batch_of_traces_with_nothing_to_supervise_is_a_dummy(data):
    nothing = TraceDataset(data.cache, view=View(sections=("answer",)))[0]
    nothing = type(nothing)(
        nothing.trace_id, nothing.input_ids[:0], nothing.positions[:0], nothing.rows[:0], *[np.zeros(0)] * 5
    )
    for examples in ([], [nothing]):
        batch = collate(examples)
        assert (len(batch.supervised), batch.tokens, batch.groups[0].shape) == (0, 0, (1, 1))


@pytest.mark.slow
def test_loader_workers_give_the_same_batches(data):
    alone, workers = (loader(data, StepSampler(data.pool, 100), num_workers=n) for n in (0, 2))
    for a, b in zip(alone, workers, strict=True):
        assert a.trace_ids == b.trace_ids
        assert torch.equal(a.targets.logprobs, b.targets.logprobs)


def test_an_empty_packed_batch_is_a_dummy():
    batch = collate([], packed=True)
    assert batch.groups[0].shape == batch.position_ids.shape == (1, 1)
