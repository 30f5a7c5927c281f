from dataclasses import replace
from pathlib import Path

import pytest

from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.commands.text_caches import describe_split
from logitcache.errors import InputError
from logitcache.transform.merge import merge
from logitcache.transform.split import split
from tests import tiny
from tests.transform.caches import assert_same_rows


def test_a_split_puts_every_trace_in_one_part_and_no_prompt_in_two(tmp_path, path) -> None:
    parts = {str(tmp_path / "train"): 0.6, str(tmp_path / "dev"): 0.2, str(tmp_path / "test"): 0.2}
    report = split(path, parts)
    made = [Cache.open(out) for out in parts]
    assert sorted(t for c in made for t in c.trace_ids) == sorted(Cache.open(path).trace_ids)
    prompts = [set(c.prompt_ids) for c in made]
    assert sum(map(len, prompts)) == 12 == len(set.union(*prompts))
    assert [c.identity.derived for c in made] == [["split 0-0.6"], ["split 0.6-0.8"], ["split 0.8-1"]]
    whole = {t.trace_id: t for t in Cache.open(path)}
    for cache in made:
        assert verify(cache.path, workers=1) == []
        for trace in cache:
            assert_same_rows(trace, whole[trace.trace_id])
    assert f"{len(prompts[0])} prompts" in describe_split(report)
    assert "no part" not in describe_split(report)
    merge([Path(out) for out in parts], tmp_path / "again")
    assert sorted(Cache.open(tmp_path / "again").trace_ids) == sorted(whole)


def test_a_prompt_goes_where_its_id_says_in_any_cache(tmp_path, path) -> None:
    tiny.write_cache(tmp_path / "more", tiny.traces(40, 20))
    split(path, {str(tmp_path / "a"): 0.5})
    report = split(tmp_path / "more", {str(tmp_path / "b"): 0.5})
    shared = {f"p{i}" for i in range(12)}
    assert set(Cache.open(tmp_path / "a").prompt_ids) == set(Cache.open(tmp_path / "b").prompt_ids) & shared
    assert "traces are in no part" in describe_split(report)


def test_shares_are_about_what_was_asked(tmp_path) -> None:
    trace = tiny.traces(1, 1)[0]
    made = [replace(trace, trace_id=f"{i:032x}", prompt_id=f"q{i}") for i in range(200)]
    tiny.write_cache(tmp_path / "c", made)
    report = split(tmp_path / "c", {str(tmp_path / "a"): 0.7, str(tmp_path / "b"): 0.3})
    assert sum(report.prompts.values()) == 200
    assert 120 < report.prompts[tmp_path / "a"] < 160


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.7, 0.4], "sum to at most 1"),
        ([0.5, 0.0], "give shares above 0"),
        ([0.5, float("nan")], "give shares above 0"),
        ([1.5], "sum to at most 1"),
        ([0.999, 0.001], r"b: a share of 0.001 gets none of the 12 prompts"),
        ([], "for each part"),
    ],
)
def test_a_split_that_cannot_be_is_refused_before_anything_is_written(tmp_path, path, shares, message) -> None:
    with pytest.raises(InputError, match=message):
        split(path, {str(tmp_path / name): share for name, share in zip("ab", shares, strict=False)})
    with pytest.raises(InputError, match="each directory once"):
        split(path, {str(tmp_path / "a"): 0.5, f"{tmp_path}/b/../a": 0.5})
    with pytest.raises(InputError, match="a/b: it is inside another part"):
        split(path, {str(tmp_path / "a" / "b"): 0.5, str(tmp_path / "a"): 0.5})
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
