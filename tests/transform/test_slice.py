import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from logitcache.cache import manifest, shard
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.capture.traces import rows_of
from logitcache.codec.block import seal, unseal
from logitcache.errors import CacheBusyError, IdentityError, InputError, NotACacheError, ShardCorruptError
from logitcache.identity import Identity
from logitcache.runtime.locks import exclusive
from logitcache.sparse_rows import bucketed_kl, trim
from logitcache.trace import Trace
from logitcache.transform.slice import merge, slice_cache, split
from tests import tiny

V = 1000
IDENTITY = replace(tiny.identity(), vocab_size=V, top_k=64)


@pytest.fixture(scope="module")
def dense() -> list[np.ndarray]:
    """float32 [R, V] each: log-probabilities of six traces, from flat rows to peaked ones; three have bf16 logits."""
    rng, made = np.random.default_rng(0), []
    for i in range(6):
        logits_RV = rng.normal(size=(30 + i, V)) * np.geomspace(0.5, 12, 30 + i)[:, None]
        if i % 2 == 0:
            logits_RV = (logits_RV.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
        shifted_RV = logits_RV - logits_RV.max(axis=1, keepdims=True)
        made.append((shifted_RV - np.log(np.exp(shifted_RV).sum(axis=1, keepdims=True))).astype(np.float32))
    return made


def capture(dense_RV: np.ndarray, identity: Identity):
    """Rows as `generate` keeps them."""
    ids_RK = np.argsort(-dense_RV, axis=1, kind="stable")[:, : identity.top_k + len(identity.pin_tokens)]
    completion = SimpleNamespace(
        ids_RK=ids_RK,
        logprobs_RK=np.take_along_axis(dense_RV, ids_RK, axis=1),
        pinned_RP=dense_RV[:, identity.pin_tokens],
    )
    return rows_of(completion, identity)  # type: ignore[arg-type]


def write(path: Path, made: list[Trace], identity: Identity, *, per_shard: int = 3, **provenance) -> Cache:
    manifest.create_or_match(path, identity)
    for number, start in enumerate(range(0, len(made), per_shard)):
        encoded = [shard.EncodedTrace.of(t, identity) for t in made[start : start + per_shard]]
        shard.write(path / shard.DIRECTORY, number, encoded, identity, provenance)
    return Cache.open(path)


def captured(path: Path, dense: list[np.ndarray], identity: Identity) -> Cache:
    made = []
    for i, dense_RV in enumerate(dense):
        trace = tiny.trace(i, [3] * (len(dense_RV) + 1), tiny.bigram()[[3] * len(dense_RV)])
        made.append(replace(trace, rows=capture(dense_RV, identity)))
    return write(path, made, identity)


@pytest.fixture
def path(tmp_path) -> Path:
    """24 traces of 12 prompts in 4 shards, with verdicts and metadata; sample 1 of each prompt is right."""
    made = [
        replace(
            t,
            correct=bool(t.sample_index),
            answer=t.prompt_id,
            finish_reason="length" if i % 5 == 0 else "stop",
            metadata={"level": i % 4, "from": {"name": f"set {i % 2}"}},
        )
        for i, t in enumerate(tiny.traces(24, 12))
    ]
    return tiny.write_cache(tmp_path / "c", made, shards=4).path


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def assert_same_rows(a: Trace, b: Trace) -> None:
    for name in ("row_offsets", "ids", "logprobs", "log_tail", "token_logprob", "token_rank", "token_ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.row_start == b.row_start


# --- slice


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
    assert "24 traces" in report.text()
    assert "-> 6 traces" in report.text()
    assert "(6 correct)" in report.text()
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
        assert after.batch.schema.metadata == before.batch.schema.metadata
        assert after.batch.column("topk").to_pylist() == [
            b for i, b in enumerate(before.batch.column("topk").to_pylist()) if i != 2
        ]
        encoded = [shard.EncodedTrace.of(t, cache.identity) for t in map(after.trace, range(4))]
        written, index = shard.write(tmp_path / "w", number, encoded, cache.identity, {}), out.shards[number]
        for name in ("rows", "trace_ids", "prompt_ids", "token_lengths", "taught_rows", "entries", "section_tokens"):
            assert getattr(index, name) == getattr(written, name), name
        assert index.verdicts == written.verdicts
        assert index.tail_mass == pytest.approx(written.tail_mass)
        assert index.block_bytes == sum(map(len, after.batch.column("topk").to_pylist()))
    assert verify(out.path, workers=1) == []


def test_what_two_shards_leave_joins_under_one_table(tmp_path) -> None:
    cache = with_tables(tmp_path / "c")
    slice_cache(cache.path, tmp_path / "out", where="sample_index<2")
    out, whole = Cache.open(tmp_path / "out"), {t.trace_id: t for t in cache}
    assert [s.rows for s in out.shards] == [4]
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


def test_a_verifier_judges_anew_and_where_sees_it(tmp_path, path) -> None:
    made = [replace(t, text=f"The answer is {7 if i % 3 else 8}", answer="7") for i, t in enumerate(Cache.open(path))]
    write(tmp_path / "judged", made, tiny.identity())
    report = slice_cache(tmp_path / "judged", tmp_path / "all", verifier="exact")
    assert report.verdicts == {"correct": 16, "incorrect": 8}
    assert Cache.open(tmp_path / "all").identity == tiny.identity(), "a verdict takes nothing away"
    slice_cache(tmp_path / "judged", tmp_path / "right", verifier="exact", where="correct")
    assert [t.correct for t in Cache.open(tmp_path / "right")] == [True] * 16
    assert verify(tmp_path / "right", workers=1) == []


def test_traces_that_a_verifier_cannot_judge_are_counted(tmp_path, path) -> None:
    made = [replace(t, text="The answer is 7", answer="7" if i % 3 else None) for i, t in enumerate(Cache.open(path))]
    write(tmp_path / "c", made, tiny.identity())
    assert "(16 correct, 8 without a verdict)" in slice_cache(tmp_path / "c", tmp_path / "a", verifier="exact").text()
    assert "without" not in slice_cache(tmp_path / "c", tmp_path / "b", top_k=4).text(), "nobody was asked"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is cut"),
        ({"top_k": 8}, "nothing is cut"),
        ({"top_k": 9}, "`top_k` 9: the cache keeps 8 ids a row; give 1 to 8"),
        ({"top_k": 0}, "`top_k` 0"),
        ({"top_p": 0.95}, r"`top_p` 0.95: rows were trimmed to 0.9; give more than 0 and at most 0.9"),
        ({"top_p": 0.0}, r"`top_p` 0.0: rows were trimmed"),
        ({"top_p": 0.5, "min_k": 3}, "`min_k` 3: rows were trimmed to as little as 2 ids"),
        ({"top_k": 1, "min_k": 2}, "`min_k` 2: `top_k` is 1"),
        ({"sections": ("prompt", "answer")}, "contiguous.*choose sections at training"),
        ({"sections": ("reasonin",)}, "did you mean reasoning"),
        ({"sections": ()}, "keeps nothing"),
        ({"sections": ("prompt",)}, "the cache has no rows of prompts"),
        ({"where": "corect"}, "did you mean correct"),
        ({"where": "correct"}, "no trace of .* has a verdict; give `verifier`"),
        ({"where": "tokens<0"}, "leaves no traces; loosen --where 'tokens<0'"),
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
    with pytest.raises(InputError, match="leaves no rows of reasoning in the 24 traces"):
        slice_cache(tmp_path / "answers", tmp_path / "out", sections=("reasoning",))
    slice_cache(tmp_path / "answers", tmp_path / "out", top_k=2)
    assert Cache.open(tmp_path / "out").identity.derived == ["slice --sections answer", "slice --top-k 2"]
    assert verify(tmp_path / "out", workers=1) == []


# --- merge


def test_a_merge_takes_shards_byte_for_byte_with_where_they_came_from(tmp_path) -> None:
    made = tiny.traces(24, 12)
    a = write(tmp_path / "a", made[:12], tiny.identity(), per_shard=6, source="a.jsonl")
    b = write(tmp_path / "b", made[12:], tiny.identity(), per_shard=6, source="b.jsonl")
    report = merge([a.path, b.path], tmp_path / "out")
    out = Cache.open(tmp_path / "out")
    assert out.identity == a.identity, "generate goes on with it"
    assert out.trace_ids == [t.trace_id for t in made]
    assert [s.sha256 for s in out.shards] == [s.sha256 for s in (*a.shards, *b.shards)]
    assert [s.provenance["source"] for s in out.shards] == ["a.jsonl"] * 2 + ["b.jsonl"] * 2
    assert (report.taken, report.rewritten, report.repeated) == (4, 0, 0)
    assert "24 traces" in report.text()
    assert verify(out.path, workers=1) == []


def test_a_trace_that_stands_in_several_is_kept_once_as_the_first_has_it(tmp_path) -> None:
    made = tiny.traces(24, 12)
    other = [replace(t, finish_reason="length") for t in made[9:]]
    a = write(tmp_path / "a", made[:12], tiny.identity(), per_shard=6, source="a")
    b = write(tmp_path / "b", other, tiny.identity(), per_shard=5, source="b")
    report = merge([a.path, b.path], tmp_path / "out")
    out = Cache.open(tmp_path / "out")
    assert sorted(out.trace_ids) == sorted(t.trace_id for t in made)
    assert {t.trace_id: t.finish_reason for t in out} == {
        t.trace_id: "stop" if i < 12 else "length" for i, t in enumerate(made)
    }
    assert (report.taken, report.rewritten, report.repeated) == (4, 1, 3)
    assert "3 traces stood in several" in report.text()
    assert {s.provenance["source"] for s in out.shards} == {"a", "b"}
    whole = {t.trace_id: t for t in b}
    for trace in out:
        if trace.finish_reason == "length":
            assert_same_rows(trace, whole[trace.trace_id])
    assert verify(out.path, workers=1) == []
    again = merge([a.path, a.path], tmp_path / "twice")
    assert again.after.traces == 12


CHANGES = {
    "engine": "tiny 1",
    "teacher": "other",
    "teacher_revision": "1",
    "tokenizer_hash": "00",
    "vocab_size": 65,
    "top_k": 16,
    "top_p": 0.9,
    "prompt_logits": False,
    "pin_tokens": [2],
    "engine_args": {"max_model_len": 9},
    "sampling": {"temperature": 1.0, "seed": 3},
}


@pytest.mark.parametrize(
    ("field", "allow", "message"),
    [
        ("engine", [], "engine = 'tiny 0', .* with 'tiny 1'; `allow` engine if you mean"),
        ("engine_args", [], "engine_args.max_model_len = None, .* with 9; `allow` engine_args.max_model_len"),
        ("engine_args", ["sampling"], "`allow` engine_args.max_model_len"),
        ("teacher", [], "teacher = 'tiny', .* with 'other'; the rows of two teachers make no cache"),
        ("teacher", ["teacher"], "`allow` teacher: the rows of two teachers make no cache; it cannot differ"),
        ("teacher_revision", ["teacher_revision"], "it cannot differ"),
        ("tokenizer_hash", ["tokenizer_hash"], "its token ids would lose their meaning"),
        ("vocab_size", [], "vocab_size = 64, .* with 65; its token ids would lose their meaning"),
        ("top_k", ["top_k"], r"top_k = 8, .* with 16; `logitcache slice \S+/b --top-k 8` first"),
        ("top_p", [], r"top_p = None, .* with 0.9; `logitcache slice \S+/a --top-p 0.9` first"),
        ("prompt_logits", [], r"`logitcache slice \S+/a --sections reasoning,answer` first"),
        ("pin_tokens", [], "generate one of the two again"),
        ("engine", ["engin"], "`allow` engin is no field .* did you mean engine"),
    ],
)
def test_a_difference_is_refused_by_name_with_the_way_out(tmp_path, field, allow, message) -> None:
    made = tiny.traces(4, 4)
    write(tmp_path / "a", made[:2], tiny.identity())
    manifest.create_or_match(tmp_path / "b", replace(tiny.identity(), **{field: CHANGES[field]}))
    with pytest.raises((IdentityError, InputError), match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", allow=allow)
    assert not (tmp_path / "out").exists()


def test_traces_scored_on_different_crops_do_not_mix(tmp_path) -> None:
    for name in ("left:0.5", "right:0.5"):
        write(tmp_path / name, tiny.traces(2, 2), replace(tiny.identity(), derived=[f"score --crop {name}"]))
    merge([tmp_path / "left:0.5", tmp_path / "left:0.5"], tmp_path / "alike")
    with pytest.raises(IdentityError, match=r"derived = \['score --crop left:0.5'\], .*merge caches whose derived"):
        merge([tmp_path / "left:0.5", tmp_path / "right:0.5"], tmp_path / "out")


def test_imports_that_differ_are_refused_with_what_was_done_to_each(tmp_path) -> None:
    for name, words in (("a", "import --from distillkit"), ("b", "import --from distillkit --exact-part-only")):
        write(
            tmp_path / name, tiny.traces(2, 2), replace(tiny.identity(), derived=[words, f"slice --limit {len(name)}"])
        )
    message = r"derived = \['import --from distillkit', .* \['import --from distillkit --exact-part-only', .*differs in"
    with pytest.raises(IdentityError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_an_allowed_difference_is_written_down(tmp_path) -> None:
    made = tiny.traces(6, 6)
    write(tmp_path / "a", made[:2], tiny.identity())
    changed = {name: CHANGES[name] for name in ("engine", "engine_args", "sampling")}
    write(tmp_path / "b", made[2:4], replace(tiny.identity(), **changed))
    write(tmp_path / "d", made[4:], tiny.identity())
    merge([tmp_path / n for n in "abd"], tmp_path / "out", allow=["engine", "sampling.seed", "engine_args"])
    out = Cache.open(tmp_path / "out")
    words = "merge --allow engine --allow engine_args --allow sampling.seed"
    assert out.identity == replace(tiny.identity(), derived=[words])
    assert verify(out.path, workers=1) == []


def test_the_way_out_of_two_sizes_works(tmp_path, dense) -> None:
    captured(tmp_path / "a", dense[:3], IDENTITY)
    small = replace(IDENTITY, top_k=16)
    made = [replace(t, trace_id=f"{9 - i:032x}") for i, t in enumerate(captured(tmp_path / "x", dense[3:], small))]
    write(tmp_path / "b", made, small)
    slice_cache(tmp_path / "a", tmp_path / "c", top_k=16)
    merge([tmp_path / "b", tmp_path / "c"], tmp_path / "out")
    assert Cache.open(tmp_path / "out").identity == replace(small, derived=["slice --top-k 16"])
    assert verify(tmp_path / "out", workers=1) == []


# --- split


def test_a_split_puts_every_trace_in_one_part_and_no_prompt_in_two(tmp_path, path) -> None:
    parts = [(tmp_path / "train", 0.6), (tmp_path / "dev", 0.2), (tmp_path / "test", 0.2)]
    report = split(path, parts)
    made = [Cache.open(out) for out, _ in parts]
    assert sorted(t for c in made for t in c.trace_ids) == sorted(Cache.open(path).trace_ids)
    prompts = [set(c.prompt_ids) for c in made]
    assert sum(map(len, prompts)) == 12 == len(set.union(*prompts))
    assert [c.identity.derived for c in made] == [["split 0-0.6"], ["split 0.6-0.8"], ["split 0.8-1"]]
    whole = {t.trace_id: t for t in Cache.open(path)}
    for cache in made:
        assert verify(cache.path, workers=1) == []
        for trace in cache:
            assert_same_rows(trace, whole[trace.trace_id])
    assert f"{len(prompts[0])} prompts" in report.text()
    assert "no part" not in report.text()
    merge([out for out, _ in parts], tmp_path / "again")
    assert sorted(Cache.open(tmp_path / "again").trace_ids) == sorted(whole)


def test_a_prompt_goes_where_its_id_says_in_any_cache(tmp_path, path) -> None:
    tiny.write_cache(tmp_path / "more", tiny.traces(40, 20))
    split(path, [(tmp_path / "a", 0.5)])
    report = split(tmp_path / "more", [(tmp_path / "b", 0.5)])
    shared = {f"p{i}" for i in range(12)}
    assert set(Cache.open(tmp_path / "a").prompt_ids) == set(Cache.open(tmp_path / "b").prompt_ids) & shared
    assert "traces are in no part" in report.text()


def test_shares_are_about_what_was_asked(tmp_path) -> None:
    trace = tiny.traces(1, 1)[0]
    made = [replace(trace, trace_id=f"{i:032x}", prompt_id=f"q{i}") for i in range(200)]
    tiny.write_cache(tmp_path / "c", made)
    report = split(tmp_path / "c", [(tmp_path / "a", 0.7), (tmp_path / "b", 0.3)])
    assert sum(report.prompts.values()) == 200
    assert 120 < report.prompts[tmp_path / "a"] < 160


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.7, 0.4], "1 at most together"),
        ([0.5, 0.0], "each above 0"),
        ([0.5, float("nan")], "each above 0"),
        ([1.5], "1 at most"),
        ([0.999, 0.001], r"b: its share of 0.001 gets none of the 12 prompts"),
        ([], "for each part"),
    ],
)
def test_a_split_that_cannot_be_is_refused_before_anything_is_written(tmp_path, path, shares, message) -> None:
    with pytest.raises(InputError, match=message):
        split(path, [(tmp_path / name, share) for name, share in zip("ab", shares, strict=False)])
    with pytest.raises(InputError, match="no directory twice"):
        split(path, [(tmp_path / "a", 0.5), (tmp_path / "a", 0.5)])
    with pytest.raises(InputError, match="a/b lies in another part"):
        split(path, [(tmp_path / "a" / "b", 0.5), (tmp_path / "a", 0.5)])
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# --- whole or not at all


def test_inputs_are_never_touched(tmp_path, path) -> None:
    before = files(path)
    slice_cache(path, tmp_path / "s", top_k=4, where="correct")
    split(path, [(tmp_path / "a", 0.5), (tmp_path / "b", 0.5)])
    merge([path, tmp_path / "a"], tmp_path / "m", allow=[])
    assert files(path) == before
    for run in (
        lambda out: slice_cache(path, out, top_k=4),
        lambda out: merge([tmp_path / "a", path], out),
        lambda out: split(path, [(out, 0.5)]),
    ):
        with pytest.raises(NotACacheError, match="holds something already"):
            run(tmp_path / "s")
        for inside in (path, path / "part"):
            with pytest.raises(InputError, match="give a directory outside it"):
                run(inside)
        with (
            exclusive(tmp_path / ".new.lock", "new"),
            pytest.raises(CacheBusyError, match="is written by another process"),
        ):
            run(tmp_path / "new")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_shard_is_named_and_nothing_is_left(tmp_path, path, workers) -> None:
    tiny.write_cache(tmp_path / "d", tiny.traces(2, 2), shards=1)
    file = path / "shards" / "unit-000002.arrow"
    data = file.read_bytes()
    file.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    for run in (
        lambda out: slice_cache(path, out, top_k=4, workers=workers),
        lambda out: slice_cache(path, out, where="tokens>0", workers=workers),
        lambda out: slice_cache(path, out, verifier="exact", workers=workers),
        lambda out: merge([tmp_path / "d", path], out, workers=workers),
        lambda out: split(path, [(out, 0.5), (tmp_path / "other", 0.5)], workers=workers),
    ):
        with pytest.raises(ShardCorruptError, match=r"unit-000002\.arrow"):
            run(tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"c", "d"}


def test_a_block_that_cannot_be_decoded_is_named_by_shard_and_trace(tmp_path, path, monkeypatch) -> None:
    def fails(*_):
        raise ShardCorruptError("a top-k block does not match its checksum")

    monkeypatch.setattr(shard, "from_batch", fails)
    for run in (lambda: slice_cache(path, tmp_path / "out", top_k=4), lambda: Cache.open(path)[0]):
        with pytest.raises(ShardCorruptError, match=r"unit-000000\.arrow: trace 0{32}: a top-k block"):
            run()


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_a_row_that_holds_an_id_twice_is_found_and_refused_by_shard_and_trace(tmp_path, top_p) -> None:
    """Such a block decodes, but no encoder of ours makes one."""
    made = [replace(t, rows=trim(t.rows, top_p=top_p, min_k=2)) for t in tiny.traces(2, 2)]
    encoded = [shard.EncodedTrace.of(t, tiny.identity()) for t in made]
    header, columns = unseal(encoded[1].record["topk"])
    delta_N, second = columns.id_N.copy(), made[1].row_offsets[3] + 1
    repeated, delta_N[second] = int(delta_N[second - 1]), 0
    encoded[1].record["topk"] = seal(header, columns._replace(id_N=delta_N), 1)
    manifest.create_or_match(tmp_path / "c", tiny.identity())
    shard.write(tmp_path / "c" / shard.DIRECTORY, 0, encoded, tiny.identity(), {})
    (problem,) = verify(tmp_path / "c", workers=1)
    assert str(problem) == f"unit-000000: trace {1:032x}: column topk: row 3 holds id {repeated} twice"
    with pytest.raises(ShardCorruptError, match=rf"unit-000000\.arrow: trace {1:032x}: a row holds an id twice"):
        slice_cache(tmp_path / "c", tmp_path / "out", sections=("prompt", "reasoning"))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"top_k": 4}, {"where": "not correct", "verifier": "exact"}, {"sections": ("answer",)}]
)
def test_several_processes_write_what_one_writes(tmp_path, path, options) -> None:
    made = []
    for workers in (1, 3):
        slice_cache(path, tmp_path / f"{workers}", **options, workers=workers)
        made.append({name: data for name, data in files(tmp_path / f"{workers}").items() if name.endswith(".arrow")})
    assert made[0] == made[1]


HELD = """
import os, time
from pathlib import Path
from logitcache.cache import shard
from logitcache.transform import slice as surgery

def held(*args, publish_index=shard.publish_index):
    publish_index(*args)
    Path(f"pid-{{os.getpid()}}").touch()
    while "HOLD" in os.environ and len(list(Path("out.part/shards").glob("*.json"))) >= 2:
        time.sleep(0.1)

shard.publish_index = held
if __name__ == "__main__":
    surgery.{verb}
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "verb",
    [
        "slice_cache(Path('c'), Path('out'), top_k=4)",
        pytest.param("slice_cache(Path('c'), Path('out'), top_k=4, workers=2)", marks=pytest.mark.slow),
        pytest.param("merge([Path('d'), Path('c')], Path('out'))", marks=pytest.mark.slow),
        pytest.param("split(Path('c'), [(Path('out'), 0.9), (Path('other'), 0.1)])", marks=pytest.mark.slow),
    ],
)
def test_a_kill_leaves_no_cache_and_the_next_run_makes_it(tmp_path, verb) -> None:
    made = tiny.traces(24, 24)
    tiny.write_cache(tmp_path / "c", made, shards=6)
    tiny.write_cache(tmp_path / "d", made[::2], shards=2)
    (tmp_path / "run.py").write_text(HELD.format(verb=verb))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "run.py"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment | {"HOLD": "1"})
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out.part/shards/*.json"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(list(tmp_path.glob("out.part/shards/*.json"))) < 6
    assert not (tmp_path / "out").exists()
    while any(running(int(p.name[4:])) for p in tmp_path.glob("pid-*")):  # its processes end with it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert verify(tmp_path / "out", workers=1) == []
    assert not [*tmp_path.glob("*.part"), *tmp_path.glob(".*.lock")]
