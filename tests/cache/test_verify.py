import io
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from logitcache.cache import schema, shard
from logitcache.cache.reader import Cache
from logitcache.cache.repair import repair
from logitcache.cache.verify import verify
from logitcache.capture.generate import generate
from logitcache.codec import encode
from logitcache.errors import CacheError, NotACacheError
from logitcache.sparse_rows import SparseRows
from tests.cache.forging import publish_forged


def rewrite(path: Path, number: int, change) -> None:
    """Publishes a shard again with its first trace changed: right by its checksum, wrong in itself."""
    cache = Cache.open(path)
    records, index = cache.shard(number).batch.to_pylist(), cache.shards[number]
    records[0] |= change(cache.shard(number).trace(0))
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, schema.SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(records, schema=schema.SCHEMA))
    publish_forged(path, index.name, buffer.getvalue())


def moved_ids(trace) -> bytes:
    rows, pins = trace.rows, np.flatnonzero(np.bincount(trace.rows.ids) == len(trace.rows)).tolist()[-3:]
    return encode(
        SparseRows(rows.offsets, rows.ids + 40, rows.logprobs, rows.log_tail), pinned=[pin + 40 for pin in pins]
    )


def test_a_valid_cache_has_no_problems(path) -> None:
    assert verify(path, workers=1) == []


@pytest.mark.slow
def test_processes_find_what_one_process_finds(path) -> None:
    (path / "shards" / "unit-000001.arrow").write_bytes(b"x")
    assert verify(path, workers=2) == verify(path, workers=1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda _: {"row_start": 0}, "column topk: .* rows from token 0 on do not end at token"),
        (lambda _: {"token_rank": [1]}, "column token_rank: 1 values for"),
        (lambda _: {"topk": b"LK"}, "."),
        (lambda t: {"topk": encode(t.rows[:2])}, "column topk: 2 rows, column token_logprob has"),
        (lambda t: {"topk": encode(t.rows)}, "column topk: 0 pinned ids, the cache pins 3"),
        (
            lambda _: {"sections": {"prompt_end": 3, "reasoning_start": 1, "reasoning_end": 4, "answer_start": 5}},
            "are not in ascending order",
        ),
        (lambda t: {"token_ids": t.token_ids + 40}, "column token_ids: ids from .* the vocabulary size is 50"),
        (lambda t: {"topk": moved_ids(t)}, "column topk: ids from .* the vocabulary size is 50"),
        (lambda _: {"trace_id": "0" * 32}, "its index lists other trace_ids"),
    ],
)
def test_what_is_wrong_in_itself_is_named_by_shard_trace_and_column(path, change, what) -> None:
    trace_id = Cache.open(path).shards[1].trace_ids[0]
    rewrite(path, 1, change)
    problems = verify(path, workers=1)
    assert {p.shard for p in problems} == {"unit-000001"}
    assert {p.trace_id for p in problems} <= {trace_id, None}
    assert any(re.search(what, p.what) for p in problems), problems


def test_a_repeated_trace_is_named(path) -> None:
    (path / "shards" / "unit-000007.arrow").write_bytes((path / "shards" / "unit-000000.arrow").read_bytes())
    shard.publish_index(path / "shards", replace(Cache.open(path).shards[0], name="unit-000007"))
    problems = verify(path, workers=1)
    assert {p.what for p in problems} == {"is already in unit-000000"}
    assert {p.shard for p in problems} == {"unit-000007"}, "the first of the two is kept"


def test_a_directory_without_a_manifest_is_not_a_cache(tmp_path) -> None:
    with pytest.raises(NotACacheError):
        verify(tmp_path)


def test_a_repaired_cache_is_filled_up_by_generate(path, options) -> None:
    whole = sorted(Cache.open(path).trace_ids)
    (path / "shards" / "unit-000001.arrow").write_bytes(b"x")
    (path / "shards" / "unit-000002.json").write_text("{}")
    problems = verify(path, workers=1)
    assert {p.shard for p in problems} == {"unit-000001", "unit-000002"}
    assert all(p.damaged for p in problems)
    report = repair(path, 1)
    assert report.problems == problems
    assert {p.name for p in report.moved} == {"unit-000001.arrow", "unit-000001.json", "unit-000002.json"}
    assert report.restored == [path / "shards" / "unit-000002.json"], "its shard is whole"
    assert all(p.parent == path / "set-aside" for p in report.moved)
    assert generate(options).made == 3
    assert sorted(Cache.open(path).trace_ids) == whole
    assert verify(path, workers=1) == []


@pytest.mark.slow
def test_every_one_of_a_thousand_flipped_bytes_is_found(path) -> None:
    """In a shard, its index, or the manifest; reading the shard raises, and never gives numbers."""
    rng = random.Random(0)
    files = [path / "shards" / "unit-000001.arrow", path / "shards" / "unit-000001.json", path / "manifest.json"]
    wholes = [f.read_bytes() for f in files]
    for i in range(1002):
        file, data = files[i % 3], wholes[i % 3]
        place = rng.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :])
        with pytest.raises(CacheError, match=file.name):
            Cache.open(path)[3]
        file.write_bytes(data)
    assert verify(path, workers=1) == []
