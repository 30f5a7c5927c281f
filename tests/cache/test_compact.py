"""A compacted index says what the indexes say, or is not used; it never decides."""

import hashlib
import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from logitcache.cache import compact, compact_file, shard
from logitcache.cache.columns import has_repeats
from logitcache.cache.compact import DIRECTORY
from logitcache.cache.reader import Cache
from logitcache.cache.repair import repair
from logitcache.cache.verify import verify
from logitcache.cache.workers import Worker
from logitcache.capture.generate import generate
from logitcache.commands.text_caches import describe_info
from logitcache.errors import CacheBusyError, InputError, NotACacheError, ShardCorruptError
from logitcache.runtime.files import publish_json, read_json
from logitcache.transform.merge import merge
from logitcache.transform.slice import slice_cache
from logitcache.transform.split import split
from tests import tiny


def data_of(path: Path) -> Path:
    return path / DIRECTORY / "indexes-000001.arrow"


def head_of(path: Path) -> Path:
    return data_of(path).with_suffix(".json")


def grow(options, prompts: int) -> None:
    """Makes the traces of more prompts."""
    lines = [f'{{"id": "p{i}", "prompt": "question {i}"}}' for i in range(prompts)]
    Path(options.prompts).write_text("\n".join(lines))
    generate(options)


def facts(cache: Cache) -> dict:
    """All that a cache says without decoding traces."""
    return {
        "shards": [index.to_json() for index in cache.shards],
        "trace_ids": cache.trace_ids,
        "prompt_ids": cache.prompt_ids,
        "lengths": cache.lengths.tolist(),
        "digest": cache.traces_digest,
        "info": {name: value for name, value in cache.info().to_json().items() if name not in ("path", "compacted")},
    }


def silently(path: Path) -> Cache:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Cache.open(path)


def test_a_compacted_cache_reads_as_it_did(path, tmp_path) -> None:
    before = Cache.open(path)
    report = compact.compact(path)
    assert (report.shards, report.traces, report.removed) == (3, 9, [])
    assert report.bytes == data_of(path).stat().st_size
    after = silently(path)
    assert (before.info().compacted, after.info().compacted) == (0, 3)
    assert facts(after) == facts(before)
    assert after.shards == before.shards
    assert list(before.shards) == list(after.shards)
    assert [t.text for t in after] == [t.text for t in before]
    assert verify(path, 1) == []
    again = pickle.loads(pickle.dumps(after))
    assert facts(again) == facts(before)
    assert again[4].trace_id == before[4].trace_id


def test_the_lists_of_an_index_behave_like_lists(path) -> None:
    before = Cache.open(path).shards[1]
    compact.compact(path)
    after = Cache.open(path).shards[1]
    for name in ("trace_ids", "prompt_ids", "token_lengths"):
        lazy, plain = getattr(after, name), getattr(before, name)
        assert lazy == plain
        assert plain == lazy
        assert lazy != plain[:-1]
        assert (len(lazy), lazy[0], lazy[-1], lazy[1:]) == (3, plain[0], plain[-1], plain[1:])
        assert plain[2] in lazy
        assert lazy.index(plain[1]) == 1
        assert repr(lazy) == repr(plain)
        assert np.array_equal(np.array(lazy), np.array(plain))
        with pytest.raises(IndexError):
            lazy[3]
    assert np.array(after.token_lengths, np.int32).dtype == np.int32
    assert json.dumps(after.to_json()) == json.dumps(before.to_json())
    assert after.provenance["source"] == before.provenance["source"]
    assert replace(after, name="unit-000009").number == 9


def test_newer_shards_are_read_beside_it(path, options) -> None:
    compact.compact(path)
    grow(options, 14)
    cache = silently(path)
    assert (cache.info().shards, cache.info().compacted) == (5, 3)
    assert [s.name for s in cache.shards] == [f"unit-{i:06d}" for i in range(5)]
    found = facts(cache)
    assert verify(path, 1) == []
    shutil.rmtree(path / DIRECTORY)
    assert facts(Cache.open(path)) == found


def test_a_shard_that_was_removed_does_not_exist_and_its_number_is_not_used_again(path, options) -> None:
    compact.compact(path)
    for suffix in (".json", ".arrow"):
        (path / shard.DIRECTORY / "unit-000002").with_suffix(suffix).unlink()
    cache = silently(path)
    assert [s.name for s in cache.shards] == ["unit-000000", "unit-000001"]
    assert len(cache.trace_ids) == len(cache) == 6
    assert str(verify(path, 1)[0]) == "indexes-000001: covers unit-000002, which has no index"
    generate(options)
    assert [s.name for s in silently(path).shards] == ["unit-000000", "unit-000001", "unit-000003"]
    assert sorted(silently(path).prompt_ids) == sorted(f"p{i}" for i in range(9))
    repair(path, 1)
    assert verify(path, 1) == []
    assert silently(path).info().compacted == 0


def test_a_repair_that_changes_an_index_sets_the_compacted_one_aside(path) -> None:
    compact.compact(path)
    index = path / shard.DIRECTORY / "unit-000001.json"
    index.write_bytes(index.read_bytes()[:-30])
    assert len(silently(path)) == 9, "the copy is right"
    report = repair(path, 1)
    assert {p.name for p in report.moved} == {"indexes-000001.arrow", "indexes-000001.json", "unit-000001.json"}
    assert report.restored == [index]
    assert (silently(path).info().compacted, len(silently(path))) == (0, 9)
    assert verify(path, 1) == []


@pytest.mark.parametrize("name", ["unit-000000", "unit-000002"])
def test_an_index_that_a_resumed_run_makes_again_is_not_hidden_by_it(path, options, name) -> None:
    """Readers of an object store look for new shards above the highest that is covered."""
    index = path / shard.DIRECTORY / f"{name}.json"
    kept = index.read_bytes()
    index.unlink()
    compact.compact(path)
    index.write_bytes(kept)
    generate(options)
    index.unlink()
    generate(options)  # adopts the shard
    assert (path / DIRECTORY / "indexes-000001.json").exists() == (name == "unit-000002")
    assert len(silently(path)) == 9
    assert verify(path, 1) == []


def test_the_second_takes_the_place_of_the_first(path, options) -> None:
    compact.compact(path)
    first = data_of(path).read_bytes()
    grow(options, 12)
    stray = path / DIRECTORY / "indexes-000007.arrow"  # a kill before its head
    stray.write_bytes(b"half")
    report = compact.compact(path)
    assert report.path == str(path / DIRECTORY / "indexes-000008.json")
    assert sorted(p.name for p in (path / DIRECTORY).iterdir()) == ["indexes-000008.arrow", "indexes-000008.json"]
    assert silently(path).info().compacted == 4
    assert Path(report.path).with_suffix(".arrow").read_bytes() != first


def damaged(data: bytes, kind: str) -> bytes:
    if kind == "flipped":
        place = len(data) // 2
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    return {"truncated": data[:-100], "empty": b"", "longer": data + b"\0"}[kind]


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty", "longer", "missing"])
@pytest.mark.parametrize("suffix", [".arrow", ".json"])
def test_a_damaged_one_is_announced_and_the_indexes_are_read(path, kind, suffix) -> None:
    before = facts(Cache.open(path))
    compact.compact(path)
    file = head_of(path).with_suffix(suffix)
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(damaged(file.read_bytes(), kind))
    if (kind, suffix) == ("missing", ".json"):
        assert facts(silently(path)) == before, "it was never published"
        return
    with pytest.warns(
        UserWarning, match=r"indexes-000001.*; the indexes of the shards are read instead.*--repair"
    ) as said:
        reread = facts(Cache.open(path))
    assert (reread, len(said)) == (before, 1)
    problems = verify(path, 1)
    assert [p.shard for p in problems] == ["indexes-000001"]
    assert problems[0].damaged
    report = repair(path, 1)
    assert all(p.name.startswith("indexes-000001") for p in report.moved)
    assert facts(silently(path)) == before
    assert verify(path, 1) == []


def forge(path: Path, change) -> None:
    """Replaces the data by that of changed columns, and makes the head right."""
    batch = pa.ipc.open_file(data_of(path)).get_batch(0)
    columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    change(columns)
    arrays = [pa.array(columns[f.name], f.type) for f in compact_file.SCHEMA]
    with pa.ipc.new_file(data_of(path), compact_file.SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=compact_file.SCHEMA))
    make_right(path)


def make_right(path: Path) -> None:
    data = data_of(path).read_bytes()
    publish_json(
        head_of(path), read_json(head_of(path)) | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    )


def put(name: str, value, row: int = 1):
    def change(columns: dict) -> None:
        columns[name][row] = value(columns[name][row]) if callable(value) else value

    return change


IMPOSSIBLE = {
    "a name": put("name", "../unit-000001"),
    "a name that is not in order": put("name", "unit-000000"),
    "no traces": lambda c: [c[n].__setitem__(1, []) for n in ("trace_ids", "prompt_ids", "token_lengths")],
    "a prompt id more": put("prompt_ids", lambda v: [*v, "p"]),
    "a length less": put("token_lengths", lambda v: v[:-1]),
    "a negative length": put("token_lengths", lambda v: [-1, *v[1:]]),
    "negative bytes": put("bytes", -1),
    "more rows than tokens": put("taught_rows", 10**12),
    "more tail than rows": put("tail_mass", 1e9),
    "no number": put("tail_mass", float("nan")),
    "larger blocks than the file": put("block_bytes", 2**62),
    "sections that do not add up": put("section_tokens", lambda v: v | {"prompt": v["prompt"] + 1}),
    "sections that overflow": put("section_tokens", lambda v: dict.fromkeys(v, 2**62)),
    "a negative section": put("section_tokens", lambda v: v | {"prompt": -(2**63), "answer": 2**62}),
    "more verdicts than traces": put("verdicts", {"correct": 2, "incorrect": 2}),
    "another count than the head": lambda c: [c[n].pop() for n in c],
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_forged_one_is_not_used(path, what) -> None:
    before = facts(Cache.open(path))
    compact.compact(path)
    forge(path, IMPOSSIBLE[what])
    with pytest.warns(UserWarning, match="indexes-000001.*are read instead"):
        assert facts(Cache.open(path)) == before
    assert [p.shard for p in verify(path, 1)] == ["indexes-000001"]


POSSIBLE = {
    "sha256": put("sha256", b"x" * 32),
    "index_sha256": put("index_sha256", b"x" * 32),
    "trace_ids": put("trace_ids", lambda v: [b"y" * 16, *v[1:]]),
    "prompt_ids": put("prompt_ids", lambda v: ["other", *v[1:]]),
    "provenance": put("provenance", '{"source":"nowhere"}'),
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_one_that_says_something_else_is_found_by_verify(path, name) -> None:
    compact.compact(path)
    forge(path, POSSIBLE[name])
    (problem,) = verify(path, 1)
    wanted = "covers another index of unit-000001" if name == "index_sha256" else f"{name} of unit-000001 are not those"
    assert problem.shard == "indexes-000001"
    assert wanted in problem.what
    if name in ("trace_ids", "prompt_ids", "sha256"):  # and by whoever reads the shard
        with pytest.raises(ShardCorruptError, match="unit-000001"):
            Cache.open(path)[4]


@pytest.mark.parametrize(
    "text", ['{"a":', "[]", '{"a":1,"a":2}', '{"a":1e999}', "[" * 5000, '{"a":99999999999999999999}']
)
def test_a_provenance_that_cannot_be_is_refused_when_it_is_read(path, text) -> None:
    compact.compact(path)
    forge(path, put("provenance", text))
    cache = Cache.open(path)
    assert cache[4].trace_id == cache.trace_ids[4]
    with pytest.raises(ShardCorruptError, match="provenance"):
        cache.shards[1].to_json()
    assert [p.shard for p in verify(path, 1)] == ["indexes-000001"]


def test_other_arrow_files_are_not_used(path) -> None:
    before = facts(Cache.open(path))
    compact.compact(path)
    table = pa.ipc.open_file(data_of(path)).read_all()
    files = {
        "a shard": lambda: shutil.copy(path / shard.DIRECTORY / "unit-000000.arrow", data_of(path)),
        "compressed": lambda: write(table, pa.ipc.IpcWriteOptions(compression="zstd")),
        "two batches": lambda: write(pa.concat_tables([table, table])),
        "without a column": lambda: write(table.drop_columns(["sha256"])),
        "no Arrow": lambda: data_of(path).write_bytes(b"x" * 1000),
    }

    def write(table: pa.Table, options: pa.ipc.IpcWriteOptions | None = None) -> None:
        with pa.ipc.new_file(data_of(path), table.schema, options=options) as writer:
            writer.write_table(table)

    for make in files.values():
        make()
        make_right(path)
        with pytest.warns(UserWarning, match="are read instead"):
            assert facts(Cache.open(path)) == before


def test_random_bytes_of_a_forged_file_end_in_a_warning_or_in_what_verify_finds(path) -> None:
    compact.compact(path)
    whole, rng = data_of(path).read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data_of(path).write_bytes(data)
        make_right(path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                cache = Cache.open(path)
                same = [index.to_json() for index in cache.shards]
            except ShardCorruptError:  # two shards with one trace, or a provenance
                same = None
        if not said and same != [shard.read_index(p).to_json() for p in sorted((path / "shards").glob("*.json"))]:
            assert list(compact.faults(path)), "what is read is wrong, and verify does not find it"


def test_a_trace_in_a_covered_and_in_a_newer_shard_is_refused(path) -> None:
    compact.compact(path)
    index = Cache.open(path).shards[0]
    shutil.copy(path / shard.DIRECTORY / "unit-000000.arrow", path / shard.DIRECTORY / "unit-000007.arrow")
    shard.publish_index(path / shard.DIRECTORY, replace(index, name="unit-000007"))
    with pytest.raises(ShardCorruptError, match="is in unit-000000 and in unit-000007"):
        Cache.open(path)
    with pytest.raises(ShardCorruptError, match="a trace is in two shards"):
        compact.compact(path)


def test_repeated_ids_are_found_whatever_they_share() -> None:
    ids = np.random.default_rng(0).integers(256, size=(1000, 16), dtype=np.uint8)
    assert not has_repeats(ids)
    assert has_repeats(np.concatenate([ids, ids[500:501]]))
    halves = ids.copy()
    halves[:, :8] = ids[0, :8]
    assert not has_repeats(halves)
    assert has_repeats(np.concatenate([halves, halves[:1]]))
    assert not has_repeats(ids[:0])
    assert not has_repeats(ids[:1])


def test_it_is_refused_while_a_worker_runs_and_where_there_is_nothing(path, tmp_path) -> None:
    for worker in (Worker(), Worker(2, 3)):
        with worker.alone(path), pytest.raises(CacheBusyError):
            compact.compact(path)
    assert not (path / DIRECTORY).exists()
    with pytest.raises(NotACacheError):
        compact.compact(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    shutil.rmtree(path / shard.DIRECTORY)
    with pytest.raises(InputError, match="has no shards"):
        compact.compact(path)


def test_new_caches_begin_without_one(path, tmp_path) -> None:
    compact.compact(path)
    slice_cache(path, tmp_path / "slice", top_k=4)
    split(path, {tmp_path / "a": 0.5, tmp_path / "b": 0.5})
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    for made in ("slice", "a", "b", "merged"):
        assert not (tmp_path / made / DIRECTORY).exists()
        assert silently(tmp_path / made).info().compacted == 0
    assert sorted(silently(tmp_path / "merged").trace_ids) == sorted(silently(tmp_path / "slice").trace_ids)
    assert verify(tmp_path / "merged", 1) == []


def test_info_says_how_many_it_covers_and_that_there_is_the_command(path) -> None:
    info = Cache.open(path).info()
    assert "indexes" not in describe_info(info)
    assert f"2,001 in files of their own; `logitcache compact {path}` makes one file of them" in describe_info(
        replace(info, shards=2001)
    )
    compact.compact(path)
    info = Cache.open(path).info()
    assert "of 3 shards in one file\n" in describe_info(info) + "\n"
    assert info.to_json()["compacted"] == 3
    assert "of 3 shards in one file, 2 in files of their own" in describe_info(replace(info, shards=5))


KILLED = """
import os, signal, sys
from pathlib import Path
from logitcache.cache import compact
from logitcache.runtime import files

calls, at = 0, int(sys.argv[2])

def count(name, *_):
    global calls
    if name in ("open", "os.rename", "os.remove", "os.mkdir") and "/compact" in str(_):
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
compact.compact(Path(sys.argv[1]))
print(calls)
"""


@pytest.mark.slow
def test_a_compaction_that_is_killed_at_any_moment_leaves_a_cache_that_reads(path, tmp_path) -> None:
    before = facts(Cache.open(path))
    compact.compact(path)
    copy = tmp_path / "copy"
    for at in range(1, 40):
        shutil.copytree(path, copy)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(copy), str(at)], capture_output=True, text=True, timeout=60
        )
        assert facts(silently(copy)) == before
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert verify(copy, 1) == []
        compact.compact(copy)
        left = sorted(p.name for p in (copy / DIRECTORY).iterdir())
        assert len(left) == 2, left
        assert silently(copy).info().compacted == 3
        shutil.rmtree(copy)
    assert 8 < at < 39, "the kills came at every step"


READER = """
import sys, warnings
from logitcache.cache.reader import Cache
warnings.simplefilter("error")
print("ready", flush=True)
opened = 0
while True:
    cache = Cache.open(sys.argv[1])
    assert len(cache) == 9 and len(set(cache.trace_ids)) == 9
    opened += 1
    if opened % 20 == 0:
        print(cache.info().compacted, flush=True)
"""


@pytest.mark.slow
def test_readers_see_a_whole_cache_while_it_is_compacted_again_and_again(path) -> None:
    command = [sys.executable, "-c", READER, str(path)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for reader in readers:
            assert reader.stdout.readline() == "ready\n", reader.stderr.read()
        end = time.monotonic() + 4
        while time.monotonic() < end:
            compact.compact(path)
        assert [reader.poll() for reader in readers] == [None, None]
    finally:
        for reader in readers:
            reader.kill()
        said = [reader.communicate() for reader in readers]
    assert all("3\n" in out and not err for out, err in said), said


def test_a_large_cache_is_opened_without_an_object_per_trace(tmp_path) -> None:
    path = tiny.write_cache(tmp_path / "c", tiny.traces(12, 3), shards=4).path
    compact.compact(path)
    cache = Cache.open(path)
    assert "_made" not in vars(cache.shards), "indexes are made when one is asked for"
    assert cache.shards.trace_counts == [len(index.trace_ids) for index in cache.shards]
