from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logitcache.cache import shard
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.commands.text_caches import describe_slice
from logitcache.errors import InputError
from logitcache.sparse_rows import bucketed_kl, trim
from logitcache.transform.slice import slice_cache
from tests import tiny
from tests.transform.caches import IDENTITY, assert_same_rows, capture, captured, files, write


@pytest.mark.parametrize("pins", [[], [7, 990]])
def test_a_slice_at_16_of_an_exact_cache_at_64_is_the_capture_at_16(tmp_path, dense, pins) -> None:
    """Ids and log-probabilities bit for bit; the tail knows what ranks 17 to 64 held, which a capture at 16 estimates."""
    identity = replace(IDENTITY, exact=True, pin_tokens=pins)
    sliced_from = captured(tmp_path / "c", dense, identity)
    slice_cache(sliced_from.path, tmp_path / "out", top_k=16)
    out = Cache.open(tmp_path / "out")
    assert (out.identity.top_k, out.identity.derived) == (16, ["slice --top-k 16"])
    for trace, dense_RV in zip(out, dense, strict=True):
        wanted = capture(dense_RV, replace(identity, top_k=16))
        np.testing.assert_array_equal(trace.row_offsets, wanted.offsets)
        np.testing.assert_array_equal(trace.ids, wanted.ids)
        np.testing.assert_array_equal(trace.logprobs, wanted.logprobs)
        tail, wanted_tail = (np.exp(t.astype(np.float64)) for t in (trace.log_tail, wanted.log_tail))
        np.testing.assert_allclose(tail, wanted_tail, atol=3e-6, rtol=3e-6)
        kept = np.add.reduceat(np.exp(wanted.logprobs.astype(np.float64)), wanted.offsets[:-1])
        np.testing.assert_allclose(kept + tail, 1, atol=3e-6)
    assert verify(out.path, workers=1) == []


def test_a_slice_at_16_of_a_rounded_cache_is_the_capture_at_16_to_the_codec_s_rounding(tmp_path, dense) -> None:
    """Ids differ only where the 16th and the 17th lie within a step of the codec's grid, 2^-6 nat, of each other."""
    slice_cache(captured(tmp_path / "c", dense, IDENTITY).path, tmp_path / "out", top_k=16)
    worst = []
    for trace, dense_RV in zip(Cache.open(tmp_path / "out"), dense, strict=True):
        wanted = capture(dense_RV, replace(IDENTITY, top_k=16))
        ids_RK, wanted_RK = (np.sort(rows.ids.reshape(-1, 16), axis=1) for rows in (trace, wanted))
        same_R = (ids_RK == wanted_RK).all(axis=1)
        ranked_RV = -np.sort(-dense_RV, axis=1)
        assert ((ranked_RV[:, 15] - ranked_RV[:, 16])[~same_R] <= 2**-6).all()
        for r in np.flatnonzero(same_R):
            worst.append(bucketed_kl(wanted[r : r + 1], trace.rows[r : r + 1])[0])
    assert len(worst) > 150
    assert np.mean(worst) <= 1e-5
    assert max(worst) <= 1e-3
    assert verify(tmp_path / "out", workers=1) == []


@pytest.mark.parametrize("pins", [[], [7, 990]])
def test_a_smaller_top_p_trims_as_a_capture_with_it_does(tmp_path, dense, pins) -> None:
    identity = replace(IDENTITY, exact=True, pin_tokens=pins, top_p=0.99, min_k=4)
    cache = captured(tmp_path / "c", dense, identity)
    slice_cache(cache.path, tmp_path / "out", top_p=0.9, min_k=2, top_k=32)
    out = Cache.open(tmp_path / "out")
    assert out.identity.derived == ["slice --top-k 32 --top-p 0.9 --min-k 2"]
    for trace, dense_RV in zip(out, dense, strict=True):
        wanted = capture(dense_RV, out.identity)
        np.testing.assert_array_equal(trace.row_offsets, wanted.offsets)
        np.testing.assert_array_equal(trace.ids, wanted.ids)
        np.testing.assert_array_equal(trace.logprobs, wanted.logprobs)
    assert verify(out.path, workers=1) == []
    only_k = slice_cache(cache.path, tmp_path / "k", top_k=2)
    assert Cache.open(tmp_path / "k").identity.min_k == 2, "no row keeps more than top_k"
    assert only_k.after.bytes < only_k.before.bytes


def test_rows_below_the_trimmed_size_stay_as_they_are(tmp_path, dense) -> None:
    cache = captured(tmp_path / "c", dense, replace(IDENTITY, exact=True, top_p=0.5))
    slice_cache(cache.path, tmp_path / "out", top_k=32)
    for before, after in zip(cache, Cache.open(tmp_path / "out"), strict=True):
        small = before.rows.counts <= 32
        np.testing.assert_array_equal(after.rows.counts[small], before.rows.counts[small])
        np.testing.assert_array_equal(after.log_tail[small], before.log_tail[small])


@pytest.mark.parametrize(
    ("sections", "first", "last"),
    [
        (("prompt",), "prompt", "prompt"),
        (("reasoning", "prompt"), "prompt", "closing"),
        (("reasoning",), "opening", "closing"),
        (("reasoning", "answer"), "opening", "answer"),
        (("answer",), "answer", "answer"),
    ],
)
def test_sections_leave_the_rows_of_their_tokens_and_all_tokens(tmp_path, sections, first, last) -> None:
    path = write(tmp_path / "c", tiny.traces(9, 9), replace(tiny.identity(), exact=True)).path
    slice_cache(path, tmp_path / "out", sections=sections)
    out = Cache.open(tmp_path / "out")
    assert out.identity.prompt_logits == ("prompt" in sections)
    for before, after in zip(Cache.open(path), out, strict=True):
        start, stop = max(1, before.sections.span(first).start), before.sections.span(last).stop
        assert (after.row_start, len(after.rows)) == (start, stop - start)
        np.testing.assert_array_equal(after.token_ids, before.token_ids)
        rows = before.rows[start - 1 : stop - 1]
        np.testing.assert_array_equal(after.ids, rows.ids)
        np.testing.assert_array_equal(after.logprobs, rows.logprobs)
        np.testing.assert_array_equal(after.token_logprob, before.token_logprob[start - 1 : stop - 1])
    assert verify(out.path, workers=1) == []


def test_a_trace_that_was_cut_in_its_reasoning_keeps_no_row_of_an_answer(tmp_path) -> None:
    cut = replace(t := tiny.traces(2, 2)[0], sections=replace(t.sections, answer_start=len(t.token_ids)))
    write(tmp_path / "c", [cut, tiny.traces(2, 2)[1]], tiny.identity())
    report = slice_cache(tmp_path / "c", tmp_path / "out", sections=("answer",))
    out = Cache.open(tmp_path / "out")
    assert [len(t.rows) > 0 for t in out] == [False, True]
    assert report.after.rows == len(out[1].rows)
    assert verify(out.path, workers=1) == []


def test_where_keeps_traces_with_their_rows_as_they_were(tmp_path, path) -> None:
    report = slice_cache(path, tmp_path / "out", where="correct  and meta.level<2")
    out, whole = Cache.open(tmp_path / "out"), {t.trace_id: t for t in Cache.open(path)}
    assert out.identity.derived == ["slice --where 'correct and meta.level<2'"]
    assert {t.trace_id for t in out} == {i for i, t in whole.items() if t.correct and t.metadata["level"] < 2}
    for trace in out:
        assert_same_rows(trace, whole[trace.trace_id])
    assert len(out.shards) == 1, "six traces a shard were; the six that are left share one"
    assert "24 traces" in describe_slice(report)
    assert "-> 6 traces" in describe_slice(report)
    assert "(6 correct)" in describe_slice(report)
    assert verify(out.path, workers=1) == []


def with_tables(path: Path) -> Cache:
    """Two shards of five traces of a thousand rows, each shard with a frequency table of its own."""
    made = []
    for i in range(10):
        tokens = np.random.default_rng(i).integers(3 + 30 * (i >= 5), 33 + 30 * (i >= 5), 1001).tolist()
        made.append(tiny.trace(i, tokens, tiny.bigram()[tokens[:-1]]))
        made[-1] = replace(made[-1], sample_index=i % 5, correct=(None, True, False)[i % 3])
    return write(path, made, tiny.identity(), per_shard=5)


def test_shards_that_lose_a_trace_keep_the_blocks_and_the_table_of_the_others(tmp_path) -> None:
    cache = with_tables(tmp_path / "c")
    slice_cache(cache.path, tmp_path / "out", where="sample_index!=2")
    out = Cache.open(tmp_path / "out")
    for number in (0, 1):
        before, after = cache.shard(number), out.shard(number)
        assert before.table is not None
        assert after.batch.schema.metadata[shard.TABLE_KEY] == before.batch.schema.metadata[shard.TABLE_KEY]
        assert after.batch.column("topk").to_pylist() == [
            b for i, b in enumerate(before.batch.column("topk").to_pylist()) if i != 2
        ]
        encoded = [shard.EncodedTrace.of(t, cache.identity) for t in map(after.trace, range(4))]
        written, index = shard.write(tmp_path / "w", number, encoded, cache.identity, {}), out.shards[number]
        for name in (
            "trace_count",
            "trace_ids",
            "prompt_ids",
            "token_lengths",
            "row_count",
            "entries",
            "section_tokens",
        ):
            assert getattr(index, name) == getattr(written, name), name
        assert index.verdicts == written.verdicts
        assert index.tail_mass == pytest.approx(written.tail_mass)
        assert index.block_bytes == sum(map(len, after.batch.column("topk").to_pylist()))
    assert verify(out.path, workers=1) == []


def test_what_two_shards_leave_joins_under_one_table(tmp_path) -> None:
    cache = with_tables(tmp_path / "c")
    slice_cache(cache.path, tmp_path / "out", where="sample_index<2")
    out, whole = Cache.open(tmp_path / "out"), {t.trace_id: t for t in cache}
    assert [s.trace_count for s in out.shards] == [4]
    for trace in out:
        assert_same_rows(trace, whole[trace.trace_id])
    assert verify(out.path, workers=1) == []


def test_shards_that_lose_no_trace_keep_their_bytes(tmp_path, path) -> None:
    slice_cache(path, tmp_path / "out", where="sample_index<1")
    before, after = files(path), files(tmp_path / "out")
    assert after["shards/unit-000000.arrow"] == before["shards/unit-000000.arrow"]
    assert len([name for name in after if name.endswith(".arrow")]) == 2


def test_a_smaller_limit_lies_in_a_larger_one_and_counts_prompts(tmp_path, path) -> None:
    found = []
    for limit in (3, 5, 9):
        slice_cache(path, tmp_path / f"{limit}", limit=limit)
        cache = Cache.open(tmp_path / f"{limit}")
        found.append(set(cache.prompt_ids))
        assert len(found[-1]) == limit
        assert len(cache) == 2 * limit, "both samples of a prompt"
        assert verify(cache.path, workers=1) == []
    assert found[0] < found[1] < found[2]
    assert found[0] != {"p0", "p1", "p2"}
    slice_cache(path, tmp_path / "both", where="correct", limit=3)
    assert set(Cache.open(tmp_path / "both").prompt_ids) == found[0], "every prompt has a right sample: the same sample"
    assert len(Cache.open(tmp_path / "both")) == 3


def test_a_verifier_grades_again_and_where_sees_it(tmp_path, path) -> None:
    made = [replace(t, text=f"The answer is {7 if i % 3 else 8}", answer="7") for i, t in enumerate(Cache.open(path))]
    write(tmp_path / "graded", made, tiny.identity())
    report = slice_cache(tmp_path / "graded", tmp_path / "all", verifier="exact")
    assert report.verdicts == {"correct": 16, "incorrect": 8}
    assert Cache.open(tmp_path / "all").identity == tiny.identity(), "a verdict takes nothing away"
    slice_cache(tmp_path / "graded", tmp_path / "right", verifier="exact", where="correct")
    assert [t.correct for t in Cache.open(tmp_path / "right")] == [True] * 16
    assert verify(tmp_path / "right", workers=1) == []


def test_traces_that_a_verifier_cannot_grade_are_counted(tmp_path, path) -> None:
    made = [replace(t, text="The answer is 7", answer="7" if i % 3 else None) for i, t in enumerate(Cache.open(path))]
    write(tmp_path / "c", made, tiny.identity())
    assert "(16 correct, 8 without a verdict)" in describe_slice(
        slice_cache(tmp_path / "c", tmp_path / "a", verifier="exact")
    )
    assert "without" not in describe_slice(slice_cache(tmp_path / "c", tmp_path / "b", top_k=4)), "nobody was asked"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the slice would be all of"),
        ({"top_k": 8}, "the slice would be all of"),
        ({"top_k": 9}, "`top_k` 9: the cache keeps 8 ids per row; give 1 to 8"),
        ({"top_k": 0}, "`top_k` 0"),
        ({"top_p": 0.95}, r"`top_p` 0.95: the cache was made with 0.9; give more than 0 and at most 0.9"),
        ({"top_p": 0.0}, r"`top_p` 0.0: the cache was made with 0.9"),
        ({"top_p": 0.5, "min_k": 3}, "`min_k` 3: rows of the cache have as few as 2 ids"),
        ({"top_k": 1, "min_k": 2}, "`min_k` 2: `top_k` is 1"),
        ({"sections": ("prompt", "answer")}, "contiguous.*choose sections when training"),
        ({"sections": ("reasonin",)}, "did you mean reasoning"),
        ({"sections": ()}, "`sections` is empty"),
        ({"sections": ("prompt",)}, "the cache has no rows for prompts"),
        ({"where": "corect"}, "did you mean correct"),
        ({"where": "correct"}, "no trace of .* has a verdict; give `verifier`"),
        ({"where": "tokens<0"}, "the slice would be empty, no trace is left; change `where` tokens<0"),
        ({"where": "meta.level>1"}, "no trace has it"),
        ({"limit": 0}, "`limit` 0"),
        ({"verifier": "exakt"}, "did you mean exact"),
        ({"top_k": 4, "workers": 0}, "`workers` 0"),
    ],
)
def test_what_a_cache_cannot_give_is_refused_and_nothing_is_left(tmp_path, options, message) -> None:
    identity = replace(tiny.identity(), top_p=0.9, min_k=2, prompt_logits=False)
    made = [replace(t, rows=trim(t.rows, top_p=0.9, min_k=2)) for t in tiny.traces(4, 4)]
    write(tmp_path / "c", made, identity)
    with pytest.raises(InputError, match=message):
        slice_cache(tmp_path / "c", tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_min_k_alone_says_nothing_of_rows_that_are_not_trimmed(tmp_path, path) -> None:
    with pytest.raises(InputError, match="give `top_p` too"):
        slice_cache(path, tmp_path / "out", min_k=2)


def test_rows_of_a_section_that_an_earlier_slice_took_cannot_be_had(tmp_path, path) -> None:
    slice_cache(path, tmp_path / "answers", sections=("answer",))
    with pytest.raises(
        InputError, match="would be empty, the 24 traces have no rows there; change `sections` reasoning"
    ):
        slice_cache(tmp_path / "answers", tmp_path / "out", sections=("reasoning",))
    slice_cache(tmp_path / "answers", tmp_path / "out", top_k=2)
    assert Cache.open(tmp_path / "out").identity.derived == ["slice --sections answer", "slice --top-k 2"]
    assert verify(tmp_path / "out", workers=1) == []
