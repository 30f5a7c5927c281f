import pickle

import numpy as np
import pytest

from logitcache.errors import StudentError
from logitcache.sparse_rows import SparseRows
from logitcache.student.data.collate import loader
from logitcache.student.data.dataset import Mixture, TraceDataset, _take, matching
from logitcache.student.data.sampler import StepSampler
from logitcache.student.data.views import UNSUPERVISED, View
from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TraceDataset(tiny.write_cache(tmp_path_factory.mktemp("cache") / "cache"))


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


def test_an_index_beyond_the_last_is_the_same_trace_in_a_later_epoch(data):
    ranges = TraceDataset(data.cache, view=View("trsd:0.1-0.9"))
    lengths = {len(ranges[epoch * len(ranges) + 5].input_ids) for epoch in range(20)}
    assert len(lengths) > 1
    assert ranges[3 * len(ranges) + 5].input_ids.tolist() == ranges.example(5, 3).input_ids.tolist()
    assert data[7 * len(data) + 5].trace_id == data[5].trace_id


def test_a_token_without_a_row_has_an_empty_one(data):
    rows = data.cache[0].rows
    taken = _take(rows, np.array([2, UNSUPERVISED, 4, UNSUPERVISED]))
    assert taken.counts.tolist() == [rows.counts[2], 0, rows.counts[4], 0]
    assert taken.log_tail.tolist() == [rows.log_tail[2], 0, rows.log_tail[4], 0]
    assert taken.ids.tolist() == [*rows[2:3].ids, *rows[4:5].ids]


def test_fewer_ids_are_the_likeliest_and_the_rest_joins_the_tail(data):
    few, all_of = TraceDataset(data.cache, top_k=3)[0].rows, data[0].rows
    assert set(few.counts) == {3}
    for row in (0, 5):
        assert few[row : row + 1].ids.tolist() == all_of[row : row + 1].ids[:3].tolist()
        rest = np.exp(all_of[row : row + 1].logprobs[3:]).sum() + np.exp(all_of.log_tail[row])
        assert np.exp(few.log_tail[row]) == pytest.approx(rest, rel=1e-5)
    with pytest.raises(StudentError, match="stores 8 ids per row"):
        TraceDataset(data.cache, top_k=9)


def test_several_caches_are_one_dataset(data, tmp_path):
    other = TraceDataset(tiny.write_cache(tmp_path / "other", tiny.traces(10, 5, seed=1)), view=View("trsd:0.1-0.9"))
    both = Mixture([data, other])
    assert len(both) == 34
    assert both[5].trace_id == data[5].trace_id
    late = both[2 * 34 + 24 + 3]
    assert late.input_ids.tolist() == other.example(3, 2).input_ids.tolist()
    sampler = StepSampler(both.pool, 10_000)
    assert sum(len(batch.trace_ids) for batch in loader(both, sampler)) == 34
    with pytest.raises(StudentError, match="give one number above 0 for each"):
        Mixture([data, other], [0.5, 0.0])
    foreign = tiny.write_cache(tmp_path / "foreign", tokenizer_hash="0" * 32)
    with pytest.raises(StudentError, match="their token ids are different"):
        Mixture([data, TraceDataset(foreign)])


def test_traces_are_chosen_by_a_filter(data):
    found = matching(data.cache, "tokens<=20")
    assert found.tolist() == (data.cache.lengths <= 20).tolist()
