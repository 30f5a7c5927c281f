"""What contradicts itself is refused by `verify` and by every command that reads traces, with shard and trace named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from logitcache.cache import shard
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.errors import LogitcacheError
from logitcache.interop.parquet import export_parquet
from logitcache.runtime.files import publish_json, read_json
from logitcache.sparse_rows import SparseRows
from logitcache.student.data.dataset import TraceDataset
from logitcache.transform.merge import merge
from logitcache.transform.slice import slice_cache
from logitcache.transform.split import split
from tests import tiny
from tests.cache.forging import publish_forged


@pytest.fixture
def path(tmp_path) -> Path:
    tiny.write_cache(tmp_path / "c", tiny.traces(6, 3))
    return tmp_path / "c"


def changed(path: Path, change) -> str:
    """Writes the first shard again with its first trace changed, index and checksums right; returns the trace's id."""
    cache = Cache.open(path)
    opened, index = cache.shard(0), cache.shards[0]
    made = [opened.trace(row) for row in range(index.trace_count)]
    made[0] = change(made[0])
    (path / "shards" / f"{index.name}.json").unlink()
    traces = [shard.EncodedTrace.of(t, cache.identity) for t in made]
    shard.write(path / "shards", 0, traces, cache.identity, {})
    return made[0].trace_id


def shifted(trace):
    """Each row is that of the token before."""
    rows = trace.rows
    order = np.r_[0, np.arange(len(rows) - 1)]
    parts = [slice(rows.offsets[r], rows.offsets[r + 1]) for r in order]
    offsets = np.r_[0, np.cumsum([p.stop - p.start for p in parts])].astype(np.int64)
    ids, logprobs = (np.concatenate([column[p] for p in parts]) for column in (rows.ids, rows.logprobs))
    return replace(trace, rows=SparseRows(offsets, ids, logprobs, rows.log_tail[order]))


def moved(values: np.ndarray, by: float) -> np.ndarray:
    values = values.copy()
    values[len(values) // 2] += by
    return values


FORGERIES = {
    "one token off": shifted,
    "a log-probability": lambda t: replace(t, token_logprob=moved(t.token_logprob, -0.5)),
    "a rank": lambda t: replace(t, token_rank=moved(t.token_rank, 3)),
    "an id beyond the vocabulary": lambda t: replace(t, token_ids=moved(t.token_ids, 1 << 20)),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_contradicts_itself_is_refused_by_all(path, tmp_path, forgery) -> None:
    trace_id = changed(path, FORGERIES[forgery])
    assert {p.trace_id for p in verify(path, 1)} == {trace_id}
    readers = {
        "read": lambda: list(Cache.open(path)),
        "slice": lambda: slice_cache(path, tmp_path / "slice", top_k=2, workers=1),
        "export": lambda: export_parquet(path, tmp_path / "export"),
        "train": lambda: [TraceDataset(Cache.open(path))[i] for i in range(6)],
        "merge": lambda: merge([path, path], tmp_path / "merge", workers=1),
        "split": lambda: split(path, {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}, workers=1),
    }
    for name, read in readers.items():
        with pytest.raises(LogitcacheError, match=trace_id):
            print(name, read())
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["c"], "nothing half-written"


@pytest.mark.parametrize(
    "field", ["rows", "bytes", "taught_rows", "entries", "block_bytes", "tail_mass", "token_lengths", "section_tokens"]
)
def test_an_index_that_lies_is_refused(path, tmp_path, field) -> None:
    place = path / "shards" / "unit-000000.json"
    found = read_json(place)
    value = found[field]
    if isinstance(value, list):
        found[field] = [value[0] + 1, value[1] - 1, *value[2:]]
    elif isinstance(value, dict):
        found[field] = value | {"reasoning": value["reasoning"] + 1, "answer": value["answer"] - 1}
    else:
        found[field] = value * 0.9 if isinstance(value, float) else value - 1
    place.unlink()
    publish_json(place, found)
    assert {p.shard for p in verify(path, 1)} == {"unit-000000"}
    with pytest.raises(LogitcacheError, match="unit-000000"):
        merge([path, path], tmp_path / "merge", workers=1)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_bodies_are_refused_before_they_are_read(path, compression) -> None:
    batch = Cache.open(path).shard(0).batch
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)
    publish_forged(path, "unit-000000", sink.getvalue().to_pybytes())
    assert "compressed" in str(verify(path, 1)[0])
