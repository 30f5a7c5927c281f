import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from logitcache.cache import schema, shard
from logitcache.cache.reader import Cache
from logitcache.capture.generate import GenerateOptions, generate
from logitcache.errors import CacheError, FormatVersionError, ShardCorruptError
from logitcache.runtime.files import publish_json, read_json
from tests import fake_engine


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A cache of 9 traces in 3 shards."""
    fake_engine.install(monkeypatch).max_num_seqs = 1  # traces finish in the order of the prompts
    (tmp_path / "p.jsonl").write_text(
        "\n".join(f'{{"id": "p{i}", "prompt": "question {i}", "answer": "{i}"}}' for i in range(9))
    )
    generate(
        GenerateOptions(prompts=str(tmp_path / "p.jsonl"), out=tmp_path / "c", teacher="fake", top_k=8, unit_size=3)
    )
    return tmp_path / "c"


def test_random_access_agrees_with_iteration(path) -> None:
    cache = Cache.open(path)
    traces = list(cache)
    assert len(cache) == len(traces) == 9
    for i in random.Random(0).sample(range(9), 9):
        np.testing.assert_array_equal(cache[i].token_ids, traces[i].token_ids)
        np.testing.assert_array_equal(cache[i].logprobs, traces[i].logprobs)
    assert cache[-1].trace_id == traces[8].trace_id
    assert list(cache.lengths) == [len(t.token_ids) for t in traces]
    assert cache.trace_ids == [t.trace_id for t in traces]
    assert cache.prompt_ids == [t.prompt_id for t in traces] == cache.column("prompt_id").to_pylist()
    assert sorted(cache.prompt_ids) == [f"p{i}" for i in range(9)]
    with pytest.raises(IndexError, match="trace 9 of a cache of 9"):
        cache[9]


def test_types_are_the_documented_ones(path) -> None:
    trace = Cache.open(path)[0]
    types = {
        name: getattr(trace, name).dtype
        for name in ("token_ids", "row_offsets", "ids", "logprobs", "log_tail", "token_logprob", "token_rank")
    }
    assert types == {
        "token_ids": np.int32, "row_offsets": np.int64, "ids": np.int32, "logprobs": np.float32, "log_tail": np.float32,
        "token_logprob": np.float32, "token_rank": np.int32,
    }  # fmt: skip
    assert len(trace.row_offsets) == len(trace.log_tail) + 1 == len(trace.token_ids) - trace.row_start + 1
    assert trace.answer == trace.prompt_id[1:]
    assert trace.correct is None


def test_a_cache_travels_to_worker_processes(path) -> None:
    cache = Cache.open(path)
    first = cache[0]
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again[0].ids, first.ids)


def test_few_shards_stay_mapped_and_none_is_checked_twice(path, monkeypatch) -> None:
    import logitcache.cache.reader as module

    monkeypatch.setattr(module, "_MAPPED", 2)
    reads: list[tuple[str, bool]] = []
    read = shard.read
    monkeypatch.setattr(
        shard, "read", lambda d, i, *more: reads.append((i.name, more[1] is not None)) or read(d, i, *more)
    )
    cache = Cache.open(path)
    assert [cache[i].prompt_id for i in (0, 3, 0, 6, 3, 0)] == [cache.prompt_ids[i] for i in (0, 3, 0, 6, 3, 0)]
    assert reads == [(f"unit-00000{n}", again) for n, again in ((0, 0), (1, 0), (2, 0), (1, 1), (0, 1))]
    assert len(cache._mapped) == 2


def test_many_shards_keep_no_file_open(path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    cache = Cache.open(path)
    assert [cache[i].prompt_id for i in range(9)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_info_adds_up(path) -> None:
    cache = Cache.open(path)
    facts, traces = cache.info(), list(cache)
    assert facts.traces == facts.prompts == 9
    assert facts.tokens == sum(facts.section_tokens.values()) == sum(len(t.token_ids) for t in traces)
    assert facts.rows == sum(len(t.rows) for t in traces)
    assert facts.bytes == sum(p.stat().st_size for p in (path / "shards").glob("*.arrow"))
    tails = np.concatenate([t.log_tail for t in traces])
    # of the rows before they were rounded: a tail is stored to 0.4%, their mean to less
    assert facts.mean_tail_mass == pytest.approx(float(np.exp(tails).mean()), rel=4e-3)
    assert facts.mean_support == 8 + len(cache.identity.pin_tokens) == 11


def test_any_flipped_byte_of_a_shard_or_its_index_is_found(path) -> None:
    """At 60 random places of each file; reading raises, and never gives numbers."""
    rng = random.Random(0)
    for file in (path / "shards" / "unit-000001.arrow", path / "shards" / "unit-000001.json", path / "manifest.json"):
        data = file.read_bytes()
        for place in rng.sample(range(len(data)), 60):
            file.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :])
            with pytest.raises(CacheError, match=file.name):
                Cache.open(path)[3]
        file.write_bytes(data)
    assert Cache.open(path)[3].prompt_id == "p3"


def test_a_truncated_or_missing_shard_is_named_with_the_way_out(path) -> None:
    file = path / "shards" / "unit-000000.arrow"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ShardCorruptError,
        match=r"unit-000000\.arrow: [\d,]+ bytes, its index says [\d,]+; `logitcache verify --repair .*c` sets it aside",
    ):
        Cache.open(path)[0]
    file.unlink()
    with pytest.raises(ShardCorruptError, match="is missing, but its index exists"):
        Cache.open(path)[0]
    assert Cache.open(path)[3].prompt_id == "p3", "other shards stay readable"


def test_an_index_of_another_format_is_refused(path) -> None:
    index = path / "shards" / "unit-000000.json"
    publish_json(index, read_json(index) | {"format": 7})
    with pytest.raises(FormatVersionError, match=r"unit-000000\.json.*newer"):
        Cache.open(path)
    publish_json(index, {k: v for k, v in read_json(index).items() if k != "rows"} | {"format": 1})
    with pytest.raises(ShardCorruptError, match="the index has no rows"):
        Cache.open(path)


def test_an_empty_cache_opens(path) -> None:
    for file in (path / "shards").iterdir():
        file.unlink()
    cache = Cache.open(path)
    assert len(cache) == 0
    assert list(cache) == []
    assert cache.info().traces == 0
    assert len(cache.lengths) == 0


def test_a_shard_opens_in_plain_arrow(path) -> None:
    import pyarrow as pa

    with pa.memory_map(str(path / "shards" / "unit-000000.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.column("prompt_id").to_pylist() == Cache.open(path).prompt_ids[:3]
    assert table.schema.names == schema.SCHEMA.names
