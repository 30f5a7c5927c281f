"""What commands on caches print."""

from pathlib import Path

from logitcache.cache.info import CacheInfo
from logitcache.cache.verify import Problem, VerifyReport
from logitcache.commands.text_caches import (
    describe_import,
    describe_info,
    describe_merge,
    describe_slice,
    describe_split,
    describe_verify,
)
from logitcache.interop.formats import ImportReport
from logitcache.transform.merge import MergeReport
from logitcache.transform.slice import SliceReport
from logitcache.transform.source import CacheSize
from logitcache.transform.split import SplitReport
from tests import tiny

INFO = CacheInfo(
    path=Path("c"),
    identity=tiny.identity(),
    shards=2,
    traces=1200,
    prompts=600,
    tokens=48_000,
    section_tokens={"prompt": 8_000, "opening": 0, "reasoning": 30_000, "closing": 0, "answer": 10_000},
    rows=40_000,
    bytes=4_000_000,
    bytes_per_row=100.0,
    block_bytes_per_row=80.5,
    mean_support=7.96,
    mean_tail_mass=0.0123,
    verdicts={"correct": 900, "incorrect": 100},
)


def test_info_says_what_a_cache_contains() -> None:
    text = describe_info(INFO)
    for line in (
        "c",
        "  support  top-8 of 64; 8.0 ids per row, 1.23% of the mass in the tail",
        "  traces   1,200 of 600 prompts in 2 shards",
        "  tokens   48,000: 8,000 prompt, 30,000 reasoning, 10,000 answer",
        "  size     4,000,000 bytes; 100.0 per row, 80.5 of them top-k",
        "  verdicts 900 of 1,000 graded answers are correct",
    ):
        assert line in text.splitlines()


def test_the_json_of_info_has_the_names_it_always_had() -> None:
    assert list(INFO.to_json()) == [
        *("path", "identity", "shards", "traces", "prompts", "tokens", "section_tokens", "taught_rows", "bytes"),
        *("bytes_per_token", "block_bytes_per_token", "mean_support", "mean_tail_mass", "verdicts", "compacted"),
    ]
    assert INFO.to_json()["taught_rows"] == 40_000
    assert INFO.to_json()["bytes_per_token"] == 100.0


def test_verify_lists_problems_and_moved_files() -> None:
    assert describe_verify(VerifyReport(Path("c"), [])) == "c: OK: all checksums and traces are valid"
    report = VerifyReport(
        Path("c"),
        [Problem("unit-000001", "ab", "wrong")],
        [Path("c/set-aside/unit-000001.json")],
        [Path("c/manifest.json")],
        ["unit-000002"],
    )
    assert describe_verify(report).splitlines() == [
        "unit-000001: trace ab: wrong",
        "moved c/set-aside/unit-000001.json",
        "restored c/manifest.json",
        "unit-000002: has no index, so readers ignore it",
        "c: 1 problem",
    ]
    assert report.to_json() == {
        "problems": [{"shard": "unit-000001", "trace_id": "ab", "what": "wrong", "damaged": True}],
        "moved": ["c/set-aside/unit-000001.json"],
        "restored": ["c/manifest.json"],
        "unindexed": ["unit-000002"],
    }


WHOLE, PART = CacheSize(24, 1000, 50_000), CacheSize(6, 250, 12_500)


def test_slice_merge_and_split_give_sizes() -> None:
    report = SliceReport(Path("s"), WHOLE, PART, {"correct": 4, "incorrect": 0}, ungraded=2)
    sizes = "24 traces, 1,000 rows, 50,000 bytes -> 6 traces, 250 rows, 12,500 bytes"
    assert describe_slice(report) == f"s: {sizes} (4 correct, 2 without a verdict)"
    merged = MergeReport(Path("m"), {Path("a"): PART, Path("b"): PART}, PART, repeated=6, copied=1, rewritten=0)
    assert describe_merge(merged).splitlines() == [
        "a: 6 traces, 250 rows, 12,500 bytes",
        "b: 6 traces, 250 rows, 12,500 bytes",
        "m: 6 traces, 250 rows, 12,500 bytes; 1 shards copied, 0 rewritten; 6 traces were in several caches and are "
        "stored once",
    ]
    split = SplitReport(WHOLE, {Path("p"): PART}, {Path("p"): 3})
    assert describe_split(split).splitlines() == [
        "p: 3 prompts, 6 traces, 250 rows, 12,500 bytes",
        "18 traces are in no part: the shares sum to less than 1",
    ]


def test_an_import_says_what_is_missing() -> None:
    report = ImportReport(Path("i"), texts=3, tokens=900, rows=897, kept=16, fitted=48, unknown=5, skipped=1, shards=1)
    assert describe_import(report).splitlines() == [
        "i: 3 texts, 900 tokens, 897 rows of 16 ids",
        "48 ids per row were stored as a fitted curve: their mass is in the tail",
        "5 tokens are not among the ids of their row: their log-probability is unknown",
        "1 texts of one token have no rows and were skipped",
    ]
