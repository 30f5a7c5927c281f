import glob
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from logitcache.cache.reader import Cache
from logitcache.cache.schema import SCHEMA
from logitcache.errors import CacheBusyError, InputError, NotACacheError, ShardCorruptError, WriteError
from logitcache.interop import parquet
from logitcache.interop.parquet import export_parquet
from logitcache.runtime.files import atomic_directory
from tests import tiny


@pytest.fixture
def cache(tmp_path) -> Cache:
    return tiny.write_cache(tmp_path / "cache", shards=3)


def test_every_number_of_the_cache_is_in_the_parquet_files(cache, tmp_path) -> None:
    report = export_parquet(cache.path, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == [f"{s.name}.parquet" for s in cache.shards]
    assert (report.files, report.traces, report.rows) == (3, 24, sum(len(t.rows) for t in cache))
    assert report.bytes == sum(f.stat().st_size for f in files)
    records = [record for f in files for record in pq.read_table(f).to_pylist()]
    for trace, record in zip(cache, records, strict=True):
        rows = trace.rows
        assert record["trace_id"] == trace.trace_id
        assert record["token_ids"] == trace.token_ids.tolist()
        assert record["sections"]["answer_start"] == trace.sections.answer_start
        assert record["row_start"] == trace.row_start
        assert [len(ids) for ids in record["ids"]] == rows.counts.tolist()
        assert np.concatenate(record["ids"]).tolist() == rows.ids.tolist()
        assert np.array_equal(np.concatenate(record["logprobs"]).astype(np.float32), rows.logprobs)
        assert np.array_equal(np.array(record["tail"], np.float32), rows.log_tail)
        assert np.logaddexp.reduce([*record["logprobs"][0], record["tail"][0]]) == pytest.approx(0, abs=1e-5)


def test_the_columns_are_those_of_a_shard_and_plain_lists(cache, tmp_path) -> None:
    export_parquet(cache.path, tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / "unit-000000.parquet")
    assert schema.names == [n for n in SCHEMA.names if n != "topk"] + ["ids", "logprobs", "tail"]
    assert [str(schema.field(n).type) for n in ("ids", "logprobs", "tail")] == [
        "list<element: list<element: int32>>",
        "list<element: list<element: float>>",
        "list<element: float>",
    ]
    assert schema.field("tail").metadata[b"unit"] == b"log of the mass outside ids, nats"
    assert json.loads(schema.metadata[b"logitcache.identity"])["teacher"] == "tiny"
    columns = pq.ParquetFile(tmp_path / "out" / "unit-000000.parquet").metadata.row_group(0)
    assert {columns.column(i).compression for i in range(columns.num_columns)} == {"ZSTD"}


def test_row_groups_are_bounded_and_lose_nothing(cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 3000)
    export_parquet(cache.path, tmp_path / "out")
    file = pq.ParquetFile(tmp_path / "out" / "unit-000001.parquet")
    assert file.num_row_groups >= 3
    table = file.read()
    assert table["trace_id"].to_pylist() == cache.shards[1].trace_ids
    assert [len(t) for t in table["tail"].to_pylist()] == [len(cache[8 + i].rows) for i in range(8)]


def test_pandas_opens_the_files(cache, tmp_path) -> None:
    export_parquet(cache.path, tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out")
    assert len(frame) == 24
    assert frame["logprobs"][0][0].dtype == np.float32


def test_a_directory_that_holds_something_is_refused(cache, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(NotACacheError, match="is not an empty directory"):
        export_parquet(cache.path, tmp_path / "out")


def test_a_place_inside_the_cache_is_refused(cache, tmp_path) -> None:
    (tmp_path / "link").symlink_to(cache.path / "shards")
    for out in (cache.path, cache.path / "shards" / "out", tmp_path / "link" / "out"):
        with pytest.raises(InputError, match="lies in the cache .*; give `out` a directory outside it"):
            export_parquet(cache.path, out)


def test_an_export_beside_another_to_the_same_place_is_refused(cache, tmp_path) -> None:
    with (
        atomic_directory(tmp_path / "out"),
        pytest.raises(CacheBusyError, match="out is being written by another process"),
    ):
        export_parquet(cache.path, tmp_path / "out")


def test_the_empty_directory_one_stands_in_becomes_the_export(cache, tmp_path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert export_parquet(cache.path, Path(".")).files == 3
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_damaged_shard_leaves_nothing_behind(cache, tmp_path) -> None:
    shard = cache.path / "shards" / "unit-000002.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardCorruptError, match="unit-000002"):
        export_parquet(cache.path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


def test_a_disk_that_refuses_leaves_nothing_behind(cache, tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "_write", full)
    with pytest.raises(WriteError, match="No space left on device"):
        export_parquet(cache.path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


@pytest.fixture
def load_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return lambda kind, files: datasets.load_dataset(
        kind, data_files=sorted(glob.glob(files)), split="train", cache_dir=str(tmp_path / "datasets")
    )


@pytest.mark.slow
def test_datasets_opens_the_parquet_files(cache, tmp_path, load_dataset) -> None:
    export_parquet(cache.path, tmp_path / "out")
    loaded = load_dataset("parquet", f"{tmp_path}/out/*.parquet")
    assert len(loaded) == 24
    assert loaded[9]["ids"] == [cache[9].rows[r : r + 1].ids.tolist() for r in range(len(cache[9].rows))]


@pytest.mark.slow
def test_datasets_opens_the_plain_columns_of_a_cache_itself(cache, load_dataset) -> None:
    loaded = load_dataset("arrow", f"{cache.path}/shards/*.arrow")
    assert loaded.column_names == SCHEMA.names
    assert loaded[5]["token_ids"] == cache[5].token_ids.tolist()
    assert loaded[5]["sections"]["prompt_end"] == cache[5].sections.prompt_end
    assert loaded["trace_id"][:] == cache.trace_ids
