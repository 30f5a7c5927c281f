"""Columns that only some shards have."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from logitcache.cache import schema
from logitcache.cache.reader import Cache
from logitcache.cache.schema import SCHEMA
from logitcache.cache.verify import verify
from logitcache.cache.writer import new_cache
from logitcache.errors import CacheError, InputError, ShardCorruptError
from logitcache.interop.parquet import export_parquet
from logitcache.transform.merge import merge
from logitcache.transform.slice import slice_cache
from tests import tiny

SPANS = np.array([[10, 12], [13, 15]], np.int32)


@pytest.fixture
def made() -> list:
    plain, agent = tiny.traces(2, prompts=2, lengths=(20, 21))
    return [plain, replace(agent, context_spans=SPANS, answer_offset=7)]


def write(path: Path, traces: list, per_shard: int = 1) -> Path:
    with new_cache(path, tiny.identity(), "test", per_shard) as writer:
        for trace in traces:
            writer.add(trace)
    return path


def test_context_spans_and_the_answers_offset_are_stored(made, tmp_path) -> None:
    cache = Cache.open(write(tmp_path / "c", made))
    assert [t.context_spans.tolist() for t in cache] == [[], SPANS.tolist()]
    assert cache[1].context_spans.dtype == np.int32
    assert [t.answer_offset for t in cache] == [None, 7]
    assert cache.column("answer_offset").to_pylist() == [None, 7]
    assert cache[1].is_context.nonzero()[0].tolist() == [10, 11, 13, 14]
    assert not cache[0].is_context.any()
    assert verify(cache.path, workers=1) == []


def test_a_shard_without_such_traces_has_the_columns_of_older_caches(made, tmp_path) -> None:
    cache = Cache.open(write(tmp_path / "c", made))
    assert cache.shard(0).batch.schema.names == SCHEMA.names
    assert cache.shard(1).batch.schema.names == [*SCHEMA.names, "context_spans", "answer_offset"]
    both = Cache.open(write(tmp_path / "both", made, per_shard=2))
    assert both.shard(0).batch.column("context_spans").null_count == 1
    assert [t.context_spans.tolist() for t in both] == [[], SPANS.tolist()]


@pytest.mark.parametrize(
    "spans", [[[12, 10]], [[10, 10]], [[2, 6]], [[10, 21]], [[13, 15], [10, 12]], [[10, 13], [12, 15]]]
)
def test_context_spans_must_be_ascending_spans_of_the_completion(made, spans) -> None:
    with pytest.raises(InputError, match="context spans"):
        replace(made[0], context_spans=np.array(spans, np.int32))


def test_an_offset_beyond_the_text_is_refused(made) -> None:
    with pytest.raises(InputError, match="character 9999"):
        replace(made[0], answer_offset=9999)


def test_slices_and_merges_keep_them(made, tmp_path) -> None:
    plain, agent = (write(tmp_path / name, [trace]) for name, trace in zip("pa", made, strict=True))
    merge([plain, agent], tmp_path / "m")
    slice_cache(tmp_path / "m", tmp_path / "k", top_k=4)
    slice_cache(tmp_path / "m", tmp_path / "w", where="tokens>=20")
    for name in "mkw":
        assert [t.context_spans.tolist() for t in Cache.open(tmp_path / name)] == [[], SPANS.tolist()], name
        assert [t.answer_offset for t in Cache.open(tmp_path / name)] == [None, 7], name


def test_all_files_of_an_export_have_the_same_columns(made, tmp_path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    export_parquet(write(tmp_path / "c", made), tmp_path / "out")
    tables = [pq.read_table(path) for path in sorted((tmp_path / "out").iterdir())]
    assert tables[0].schema.equals(tables[1].schema)
    joined = pa.concat_tables(tables)
    assert joined.column("context_spans").to_pylist() == [None, [{"start": 10, "end": 12}, {"start": 13, "end": 15}]]


@pytest.mark.parametrize(
    "text",
    ["[1]", "1", '"x"', "{", '{"a": ' * 5000, '{"a": ' * 100 + "1" + "}" * 100, '{"a": "\\ud800"}', '{"\\udfff": 1}'],
)
def test_metadata_that_is_no_plain_object_is_refused(text) -> None:
    with pytest.raises(ShardCorruptError, match="column metadata: not a JSON object"):
        schema.metadata_of(text)


def test_metadata_that_could_not_be_read_again_is_not_written() -> None:
    deep: dict = {}
    for _ in range(70):
        deep = {"a": deep}
    for metadata in (deep, {"a": "\ud800"}):
        with pytest.raises(CacheError, match="metadata of more than 64 levels, or with text that is not Unicode"):
            schema.to_record(replace(tiny.traces(1, 1)[0], metadata=metadata), b"")
    large = {"a": 10**30, "b": [1, {"c": None}]}
    assert schema.metadata_of(schema.to_record(replace(tiny.traces(1, 1)[0], metadata=large), b"")["metadata"]) == large
