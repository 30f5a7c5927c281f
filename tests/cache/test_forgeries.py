"""Forged caches: manifests, indexes and Arrow files whose checksums are right and whose content is not.

A child process with limits on memory and time reads each of them. It must end with an error of ours, with a problem that
`verify` names, or with the rows of the honest cache: never with a signal, a traceback, over 1 GiB, or over 10 s.
"""

import functools
import io
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from logitcache.cache import manifest, shard
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.errors import LogitcacheError
from logitcache.runtime.files import publish_json
from tests.cache.forging import publish_forged

GOLDEN = Path(__file__).parents[1] / "golden"
SECONDS, MEMORY = 10, 1 << 30
UNIT = "unit-000000"
HOSTILE = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "x" * 5000,
        "../../etc/passwd",
        "\x1b[2J",
        "\u202e",
        "\ud800",
        [],
        [[]],
        {},
        {"a": 1},
        [None],
        [0] * 1000,
    ),
)


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with one change somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        change = rng.random()
        if change < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if change < 0.2:
            return {**value, rng.choice(("extra", "", key + "s")): rng.choice(HOSTILE)}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        change = rng.random()
        if change < 0.2:
            return value[:i] + value[i + 1 :]
        if change < 0.4:
            return [*value[:i], value[rng.randrange(len(value))], *value[i + 1 :]]
        return [*value[:i], mutated(value[i], rng), *value[i + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1.0000001, float(value)))
    return rng.choice(HOSTILE)


def forge_json(path: Path, rng: random.Random) -> None:
    """Changes a JSON file and gives it a right checksum."""
    found = json.loads(path.read_bytes())
    del found["check"]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = mutated(found, rng)
        if not isinstance(found, dict):
            found = {"format": found}
    path.unlink()
    try:
        publish_json(path, found)
    except (ValueError, UnicodeEncodeError):  # lone surrogates cannot be written
        path.write_bytes(json.dumps(found).encode())


def batch_of(cache: Path) -> pa.RecordBatch:
    with pa.memory_map(str(cache / shard.DIRECTORY / f"{UNIT}.arrow")) as source:
        return pa.ipc.open_file(source).get_batch(0)


def written(batch: Any, options: pa.ipc.IpcWriteOptions | None = None, times: int = 1) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, batch.schema, options=options) as writer:
        for _ in range(times):
            writer.write_batch(batch)
    return buffer.getvalue()


def forge_cells(cache: Path, rng: random.Random) -> None:
    """Changes values of a trace, with the columns' types as they are."""
    batch = batch_of(cache)
    records = batch.to_pylist()
    record = rng.choice(records)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(record))
        value = record[name]
        if isinstance(value, bytes) and value:
            block = bytearray(value)
            for _ in range(rng.choice((1, 2, 8))):
                block[rng.randrange(min(len(block), rng.choice((32, len(block)))))] = rng.randrange(256)
            record[name] = rng.choice((bytes(block), bytes(block[: rng.randrange(len(block))]), bytes(block) * 2, b""))
        elif isinstance(value, list) and value and isinstance(value[0], int | float):
            i = rng.randrange(len(value))
            change = rng.choice((value[i] + 1, -1, 0, 2**31 - 1, float("nan"), -1e30))
            changed = [
                *value[:i],
                int(change) if isinstance(value[i], int) and change == change else change,
                *value[i + 1 :],
            ]
            record[name] = rng.choice((changed, value[:-1], [*value, value[0]], [], value[::-1]))
        else:
            record[name] = mutated(value, rng)
    try:
        table = pa.Table.from_pylist(records, schema=batch.schema.with_metadata(None)).combine_chunks()
    except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError, ValueError):
        return forge_cells(cache, rng)
    publish_forged(cache, UNIT, bytes(shard.to_bytes(table.to_batches()[0], batch.schema.metadata or {})))
    return None


def forge_schema(cache: Path, rng: random.Random) -> None:
    """Changes what the file is made of: columns, types, batches, compression, metadata."""
    batch = batch_of(cache)
    names = batch.schema.names
    i = rng.randrange(len(names))
    column, field = batch.column(i), batch.schema.field(i)

    def other_column(column: Any, field: pa.Field) -> bytes:
        return written(batch.set_column(i, field, column))

    def metadata() -> bytes:
        noise = rng.choice((b"", b"x", b"AAAA", rng.randbytes(64), b"A" * 100_000))
        key = rng.choice((*(batch.schema.metadata or {}), shard.TABLE_KEY, b"other"))
        return written(batch.replace_schema_metadata({**(batch.schema.metadata or {}), key: noise}))

    forgeries: list[Callable[[], bytes]] = [
        metadata,
        lambda: written(batch, times=rng.choice((0, 2))),
        lambda: written(batch, pa.ipc.IpcWriteOptions(compression=rng.choice(("lz4", "zstd")))),
        lambda: written(batch.slice(0, rng.randrange(len(batch)))),
        lambda: written(batch.take(pa.array(rng.choices(range(len(batch)), k=len(batch))))),
        lambda: written(batch.select([n for n in names if n != names[i]])),
        lambda: written(batch.rename_columns([*names[:i], "x", *names[i + 1 :]])),
        lambda: written(batch.select([*names[i:], *names[:i]])) if i else written(batch.append_column("x", column)),
        lambda: other_column(pa.nulls(len(batch), field.type), pa.field(field.name, field.type)),
        lambda: other_column(pa.array([None, *column.to_pylist()[1:]], field.type), field),
        lambda: other_column(column.dictionary_encode(), pa.field(field.name, pa.dictionary(pa.int32(), field.type))),
        lambda: other_column(pa.array(range(len(batch))), pa.field(field.name, pa.int64())),
        lambda: other_column(pa.array(["x" * 70_000] * len(batch)), pa.field(field.name, pa.string())),
    ]
    try:
        data = rng.choice(forgeries)()
    except (pa.ArrowException, TypeError, ValueError, KeyError):
        return forge_schema(cache, rng)
    publish_forged(cache, UNIT, data)
    return None


def forge_bytes(cache: Path, rng: random.Random) -> None:
    """Changes bytes of the Arrow file: its footer, its header, the offsets and values of its columns."""
    data = bytearray((cache / shard.DIRECTORY / f"{UNIT}.arrow").read_bytes())
    start = rng.choice((0, max(0, len(data) - 4000), rng.randrange(len(data))))
    for _ in range(rng.choice((1, 1, 2, 16))):
        at = min(len(data) - 8, start + rng.randrange(4000))
        change = rng.random()
        if change < 0.4:
            data[at] ^= 1 << rng.randrange(8)
        elif change < 0.8:
            at -= at % 4
            data[at : at + 4] = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**31)).to_bytes(4, "little")
        else:
            data[at : at + 8] = rng.choice((2**62, 2**63 - 1, 2**40)).to_bytes(8, "little")
    publish_forged(cache, UNIT, bytes(data) if rng.random() < 0.9 else bytes(data[: rng.randrange(len(data))]))


def forge_index(cache: Path, rng: random.Random) -> None:
    forge_json(cache / shard.DIRECTORY / f"{UNIT}.json", rng)


def forge_manifest(cache: Path, rng: random.Random) -> None:
    forge_json(cache / manifest.FILE_NAME, rng)


FORGERIES = (forge_manifest, forge_index, forge_cells, forge_schema, forge_bytes)


@functools.lru_cache
def honest_rows(path: Path) -> tuple[tuple[np.ndarray, ...], ...]:
    return tuple(rows_of(path))


def rows_of(path: Path) -> list[tuple[np.ndarray, ...]]:
    """The rows of each trace."""
    return [
        (trace.rows.offsets, trace.rows.ids, trace.rows.logprobs, trace.rows.log_tail) for trace in Cache.open(path)
    ]


def outcome(path: Path, honest: Path) -> str:
    """What reading a forged cache ends in. Raises: what must not happen."""
    try:
        problems = verify(path, workers=1)
        found = rows_of(path)
    except LogitcacheError as e:
        return "error" if str(e) else "an error without a word"
    if problems:
        return "problem"
    if (path / manifest.FILE_NAME).read_bytes() != (honest / manifest.FILE_NAME).read_bytes():
        return "other settings"
    same = sum(any(all(map(np.array_equal, rows, each)) for each in honest_rows(honest)) for rows in found)
    assert same == len(found), f"{len(found) - same} traces have other rows, and verify finds nothing wrong"
    return "equal rows"


def read_all(home: Path, seed: int, count: int) -> None:
    """Forges and reads `count` caches; prints the outcomes. Runs in a process of its own."""
    honest, forged, results = home / "honest", home / "forged", Counter()
    honest_rows(honest)  # what reading loads is loaded before memory is limited
    verify(honest, workers=1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"over {SECONDS} s"))
    for i in range(seed, seed + count):
        rng = random.Random(i)
        forge = FORGERIES[i % len(FORGERIES)]
        shutil.rmtree(forged, ignore_errors=True)
        shutil.copytree(honest, forged)
        forge(forged, rng)
        print(f"{forge.__name__} {i}", file=sys.stderr, flush=True)  # the last line names what ended the process
        signal.alarm(SECONDS)
        results[f"{forge.__name__}: {outcome(forged, honest)}"] += 1
        signal.alarm(0)
    print(json.dumps(results))


def run(home: Path, seed: int, count: int, golden: str | None = None) -> Counter[str]:
    from tests import tiny

    if golden:
        shutil.copytree(GOLDEN / golden, home / "honest")
    else:
        tiny.write_cache(home / "honest", tiny.traces(6, 3))
    script = "import sys, pathlib; from tests.cache.test_forgeries import read_all\n"
    script += "read_all(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
    words = [sys.executable, "-c", script, home, str(seed), str(count)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return Counter(json.loads(ended.stdout))


def test_some_forged_caches_are_refused_or_read_alike(tmp_path: Path) -> None:
    found = run(tmp_path, 0, 100)
    assert found.total() == 100
    assert sum(count for name, count in found.items() if "error" in name or "problem" in name) >= 60


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("part", "golden"), [(0, None), (1, None), (2, None), (3, None), (4, "cache-1-exact"), (5, "cache-1-rounded")]
)
def test_forged_caches_are_refused_or_read_alike(tmp_path: Path, part: int, golden: str | None) -> None:
    """The golden caches have pinned ids, rows of different lengths, and exact values or a frequency table."""
    found = run(tmp_path, 1000 + 1300 * part, 1300, golden)
    print(dict(found))
    assert found.total() == 1300
