from dataclasses import replace

import pytest

from logitcache.cache import manifest
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.commands.text_caches import describe_merge
from logitcache.errors import IdentityError, InputError
from logitcache.transform.merge import merge
from logitcache.transform.slice import slice_cache
from tests import tiny
from tests.transform.caches import IDENTITY, assert_same_rows, captured, write


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
    assert (report.copied, report.rewritten, report.repeated) == (4, 0, 0)
    assert "24 traces" in describe_merge(report)
    assert verify(out.path, workers=1) == []


def test_a_trace_in_several_caches_is_kept_once_as_the_first_has_it(tmp_path) -> None:
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
    assert (report.copied, report.rewritten, report.repeated) == (4, 1, 3)
    assert "3 traces were in several caches and are stored once" in describe_merge(report)
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
        ("engine", [], "engine = 'tiny 0', .* with 'tiny 1'; `allow` engine to merge them anyway"),
        ("engine_args", [], "engine_args.max_model_len = None, .* with 9; `allow` engine_args.max_model_len"),
        ("engine_args", ["sampling"], "`allow` engine_args.max_model_len"),
        ("teacher", [], "teacher = 'tiny', .* with 'other'; a cache has the rows of one teacher only"),
        ("teacher", ["teacher"], "`allow` teacher: a cache has the rows of one teacher only; it cannot differ"),
        ("teacher_revision", ["teacher_revision"], "it cannot differ"),
        ("tokenizer_hash", ["tokenizer_hash"], "its token ids would lose their meaning"),
        ("vocab_size", [], "vocab_size = 64, .* with 65; its token ids would lose their meaning"),
        ("top_k", ["top_k"], r"top_k = 8, .* with 16; `logitcache slice \S+/b --top-k 8` first"),
        ("top_p", [], r"top_p = None, .* with 0.9; `logitcache slice \S+/a --top-p 0.9` first"),
        ("prompt_logits", [], r"`logitcache slice \S+/a --sections reasoning,answer` first"),
        ("pin_tokens", [], "generate one of the two caches again"),
        ("engine", ["engin"], "`allow` engin: not a field .* did you mean engine"),
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
    message = (
        r"derived = \['import --from distillkit', .* \['import --from distillkit --exact-part-only', .*differs only in"
    )
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
