import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from logitcache.cache import manifest, shard
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.codec.block import seal, unseal
from logitcache.errors import CacheBusyError, InputError, NotACacheError, ShardCorruptError
from logitcache.runtime.locks import exclusive
from logitcache.sparse_rows import trim
from logitcache.transform.merge import merge
from logitcache.transform.slice import slice_cache
from logitcache.transform.split import split
from tests import tiny
from tests.transform.caches import files


def test_inputs_are_never_touched(tmp_path, path) -> None:
    before = files(path)
    slice_cache(path, tmp_path / "s", top_k=4, where="correct")
    split(path, {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5})
    merge([path, tmp_path / "a"], tmp_path / "m", allow=[])
    assert files(path) == before
    for run in (
        lambda out: slice_cache(path, out, top_k=4),
        lambda out: merge([tmp_path / "a", path], out),
        lambda out: split(path, {str(out): 0.5}),
    ):
        with pytest.raises(NotACacheError, match="is not an empty directory"):
            run(tmp_path / "s")
        for inside in (path, path / "part"):
            with pytest.raises(InputError, match="give a directory outside it"):
                run(inside)
        with (
            exclusive(tmp_path / ".new.logitcache-lock", "new"),
            pytest.raises(CacheBusyError, match="is being written by another process"),
        ):
            run(tmp_path / "new")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_shard_is_named_and_nothing_is_left(tmp_path, path, workers) -> None:
    tiny.write_cache(tmp_path / "d", tiny.traces(2, 2), shards=1)
    file = path / "shards" / "unit-000002.arrow"
    data = file.read_bytes()
    file.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    for run in (
        lambda out: slice_cache(path, out, top_k=4, workers=workers),
        lambda out: slice_cache(path, out, where="tokens>0", workers=workers),
        lambda out: slice_cache(path, out, verifier="exact", workers=workers),
        lambda out: merge([tmp_path / "d", path], out, workers=workers),
        lambda out: split(path, {str(out): 0.5, str(tmp_path / "other"): 0.5}, workers=workers),
    ):
        with pytest.raises(ShardCorruptError, match=r"unit-000002\.arrow"):
            run(tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"c", "d"}


def test_a_block_that_cannot_be_decoded_is_named_by_shard_and_trace(tmp_path, path, monkeypatch) -> None:
    def fails(*_):
        raise ShardCorruptError("a top-k block does not match its checksum")

    monkeypatch.setattr(shard, "from_batch", fails)
    for run in (lambda: slice_cache(path, tmp_path / "out", top_k=4), lambda: Cache.open(path)[0]):
        with pytest.raises(ShardCorruptError, match=r"unit-000000\.arrow: trace 0{32}: a top-k block"):
            run()


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_a_row_that_holds_an_id_twice_is_found_and_refused_by_shard_and_trace(tmp_path, top_p) -> None:
    """No encoder of ours makes such a block."""
    made = [replace(t, rows=trim(t.rows, top_p=top_p, min_k=2)) for t in tiny.traces(2, 2)]
    encoded = [shard.EncodedTrace.of(t, tiny.identity()) for t in made]
    header, columns = unseal(encoded[1].record["topk"])
    delta_N, second = columns.id_N.copy(), made[1].row_offsets[3] + 1
    delta_N[second] = 0
    encoded[1].record["topk"] = seal(header, columns._replace(id_N=delta_N), 1)
    manifest.create_or_match(tmp_path / "c", tiny.identity())
    shard.write(tmp_path / "c" / shard.DIRECTORY, 0, encoded, tiny.identity(), {})
    (problem,) = verify(tmp_path / "c", workers=1)
    assert str(problem) == f"unit-000000: trace {1:032x}: row 3 of a top-k block contains an id twice"
    with pytest.raises(
        ShardCorruptError, match=rf"unit-000000\.arrow: trace {1:032x}: row 3 of a top-k block contains an id twice"
    ):
        slice_cache(tmp_path / "c", tmp_path / "out", sections=("prompt", "reasoning"))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"top_k": 4}, {"where": "not correct", "verifier": "exact"}, {"sections": ("answer",)}]
)
def test_several_processes_write_what_one_writes(tmp_path, path, options) -> None:
    made = []
    for workers in (1, 3):
        slice_cache(path, tmp_path / f"{workers}", **options, workers=workers)
        made.append({name: data for name, data in files(tmp_path / f"{workers}").items() if name.endswith(".arrow")})
    assert made[0] == made[1]


HELD = """
import os, time
from pathlib import Path
from logitcache.cache import shard
from logitcache.transform.merge import merge
from logitcache.transform.slice import slice_cache
from logitcache.transform.split import split

def held(*args, publish_index=shard.publish_index):
    publish_index(*args)
    Path(f"pid-{{os.getpid()}}").touch()
    while "HOLD" in os.environ and len(list(Path(".out.logitcache-part/content/shards").glob("*.json"))) >= 2:
        time.sleep(0.1)

shard.publish_index = held
if __name__ == "__main__":
    {verb}
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "verb",
    [
        "slice_cache(Path('c'), Path('out'), top_k=4)",
        pytest.param("slice_cache(Path('c'), Path('out'), top_k=4, workers=2)", marks=pytest.mark.slow),
        pytest.param("merge([Path('d'), Path('c')], Path('out'))", marks=pytest.mark.slow),
        pytest.param("split(Path('c'), {'out': 0.9, 'other': 0.1})", marks=pytest.mark.slow),
    ],
)
def test_a_kill_leaves_no_cache_and_the_next_run_makes_it(tmp_path, verb) -> None:
    made = tiny.traces(24, 24)
    tiny.write_cache(tmp_path / "c", made, shards=6)
    tiny.write_cache(tmp_path / "d", made[::2], shards=2)
    (tmp_path / "run.py").write_text(HELD.format(verb=verb))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "run.py"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment | {"HOLD": "1"})
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob(".out.logitcache-part/content/shards/*.json"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(list(tmp_path.glob(".out.logitcache-part/content/shards/*.json"))) < 6
    assert not (tmp_path / "out").exists()
    while any(running(int(p.name[4:])) for p in tmp_path.glob("pid-*")):  # its processes end with it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert verify(tmp_path / "out", workers=1) == []
    assert not [*tmp_path.glob("*.logitcache-*"), *tmp_path.glob(".*.logitcache-*")]
