import functools
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from logitcache.errors import StudentError
from logitcache.sparse_rows import SparseRows
from logitcache.student.data.dataset import Mixture, TraceDataset, _take, collate, groups, loader, matching
from logitcache.student.data.sampler import StepSampler
from logitcache.student.data.views import NOT_TAUGHT, View
from logitcache.student.model.head import check_packing, taught_hidden
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
        nothing.trace_id, nothing.input_ids[:0], nothing.positions[:0], nothing.rows[:0], *[np.zeros(0)] * 5
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
    alone, workers = (loader(data, StepSampler(data.pool, 100), num_workers=n) for n in (0, 2))
    for a, b in zip(alone, workers, strict=True):
        assert a["trace_ids"] == b["trace_ids"]
        assert torch.equal(a["logprobs"], b["logprobs"])


def test_an_index_beyond_the_last_is_the_same_trace_in_a_later_epoch(data):
    ranges = TraceDataset(data.cache, view=View("trsd:0.1-0.9"))
    lengths = {len(ranges[epoch * len(ranges) + 5].input_ids) for epoch in range(20)}
    assert len(lengths) > 1
    assert ranges[3 * len(ranges) + 5].input_ids.tolist() == ranges.example(5, 3).input_ids.tolist()
    assert data[7 * len(data) + 5].trace_id == data[5].trace_id


def test_a_token_without_a_row_has_an_empty_one(data):
    rows = data.cache[0].rows
    taken = _take(rows, np.array([2, NOT_TAUGHT, 4, NOT_TAUGHT]))
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
    with pytest.raises(StudentError, match="keeps 8 ids a row"):
        TraceDataset(data.cache, top_k=9)


def test_several_caches_are_one_dataset(data, tmp_path):
    other = TraceDataset(tiny.write_cache(tmp_path / "other", tiny.traces(10, 5, seed=1)), view=View("trsd:0.1-0.9"))
    both = Mixture([data, other])
    assert len(both) == 34
    assert both[5].trace_id == data[5].trace_id
    late = both[2 * 34 + 24 + 3]
    assert late.input_ids.tolist() == other.example(3, 2).input_ids.tolist()
    sampler = StepSampler(both.pool, 10_000)
    assert sum(len(batch["trace_ids"]) for batch in loader(both, sampler)) == 34
    with pytest.raises(StudentError, match="give each a number above 0"):
        Mixture([data, other], [0.5, 0.0])
    foreign = tiny.write_cache(tmp_path / "foreign", tokenizer_hash="0" * 32)
    with pytest.raises(StudentError, match="token ids mean different tokens"):
        Mixture([data, TraceDataset(foreign)])


def test_traces_are_chosen_by_a_filter(data):
    found = matching(data.cache, "tokens<=20")
    assert found.tolist() == (data.cache.lengths <= 20).tolist()


FAMILIES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma3": functools.partial(
        Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"], sliding_window=4, head_dim=16
    ),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_traces_do_not_see_each_other(data, family, attention):
    torch.manual_seed(0)
    config = FAMILIES[family](
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation=attention,
    )  # fmt: skip
    student = AutoModelForCausalLM.from_config(config).eval()
    check_packing(student)
    examples = [data[i] for i in (3, 0, 7, 9)]
    packed, padded = collate(examples, packed=True), collate(examples)
    assert packed["groups"][0].shape == (1, packed["tokens"]), "no padding"
    assert sum(g.numel() for g in padded["groups"]) > packed["tokens"]
    assert packed["shapes"] == [(1, n) for n in sorted((len(e.input_ids) for e in examples), reverse=True)]
    with torch.no_grad():
        together, apart = taught_hidden(student, packed), taught_hidden(student, padded)
        alone = torch.cat(
            [taught_hidden(student, collate([e])) for e in sorted(examples, key=lambda e: -len(e.input_ids))]
        )
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(apart, alone, rtol=0, atol=2e-6)


def test_a_model_that_cannot_tell_packed_traces_apart_is_refused(monkeypatch):
    student = tiny.model()
    forward = student.model.forward
    monkeypatch.setattr(
        student.model, "forward", lambda *a, position_ids=None, **k: forward(*a, **k | {"position_ids": None})
    )
    with pytest.raises(StudentError, match="lets packed traces see each other; train with `packing` off"):
        check_packing(student)


def test_an_empty_packed_batch_is_a_dummy():
    batch = collate([], packed=True)
    assert batch["groups"][0].shape == batch["position_ids"].shape == (1, 1)
