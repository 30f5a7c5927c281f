"""The mirror of a cache in an object store: what is downloaded when, by whom, and what stays on this disk."""

import errno
import multiprocessing
import os
import pickle
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from logitcache.cache import manifest, mirror
from logitcache.cache.mirror import CACHE_BYTES, CACHE_DIR, Mirror
from logitcache.cache.reader import Cache
from logitcache.errors import InputError, NotACacheError, ShardCorruptError, WriteError
from logitcache.runtime.files import publish_json, read_json
from logitcache.storage.location import Url
from logitcache.storage.objects import ObjectStore
from tests import tiny
from tests.cache.remote import flipped, read_all, swap, upload

SHARDS = 6


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Cache:
    return tiny.write_cache(tmp_path_factory.mktemp("local") / "cache", shards=SHARDS)


@pytest.fixture
def url(s3, local, tmp_path, monkeypatch) -> str:
    """A cache in the store, and an empty directory for mirrors."""
    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "mirrors"))
    monkeypatch.delenv(CACHE_BYTES, raising=False)
    url = s3.url()
    upload(local.path, url)
    return url


@pytest.fixture
def requests(monkeypatch) -> list[str]:
    """Names of the objects that this process gets, in order."""
    found: list[str] = []

    def get(self, name: str, real=ObjectStore.get) -> bytes:
        found.append(name)
        return real(self, name)

    monkeypatch.setattr(ObjectStore, "get", get)
    return found


def arrows(cache: Cache) -> list[str]:
    return sorted(path.stem for path in (cache.path / "shards").glob("unit-*.arrow"))


def test_every_trace_is_the_same_as_in_the_directory(url, local) -> None:
    cache = Cache.open(url)
    assert (cache.location, cache.mirror is not None) == (Url(url), True)
    assert [t.trace_id for t in cache] == local.trace_ids
    for mine, theirs in zip(cache, local, strict=True):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        assert mine.rows.logprobs.tobytes() == theirs.rows.logprobs.tobytes()
    assert cache.info().to_json() == local.info().to_json() | {"path": url}


def test_opening_reads_no_shard_and_reopening_reads_only_the_manifest(url, requests) -> None:
    cache = Cache.open(url)
    assert sorted(requests) == ["manifest.json", *(f"shards/unit-{i:06d}.json" for i in range(SHARDS))]
    requests.clear()
    Cache.open(url)
    assert requests == ["manifest.json"]
    assert arrows(cache) == []


def test_a_shard_is_downloaded_when_it_is_touched_and_once(url, requests) -> None:
    cache = Cache.open(url)
    requests.clear()
    cache[0], cache[1], Cache.open(url)[0]
    assert requests == ["shards/unit-000000.arrow", "manifest.json"]
    assert arrows(cache) == ["unit-000000"]


def test_the_oldest_shards_make_room_and_what_is_mapped_stays_readable(url, local, tmp_path) -> None:
    cache = Cache.open(url)
    largest = max(s.bytes for s in cache.shards)
    small = Cache(Mirror(Url(url), tmp_path / "mirrors", int(3.3 * largest)), cache.identity, cache.shards)
    for number in (0, 1, 2):
        small.shard(number)
    os.utime(small.path / "shards" / "unit-000000.arrow")  # used again
    small.shard(3)
    assert "unit-000001" not in arrows(small)
    assert {"unit-000000", "unit-000003"} <= set(arrows(small))
    assert [t.trace_id for t in small] == local.trace_ids
    assert sum(p.stat().st_size for p in small.path.glob("shards/*.arrow")) <= 3.3 * largest


def test_one_shard_is_kept_whatever_the_limit(url, local, tmp_path) -> None:
    opened = Cache.open(url)
    cache = Cache(Mirror(Url(url), tmp_path / "mirrors", 1), opened.identity, opened.shards)
    assert [t.trace_id for t in cache] == local.trace_ids
    assert arrows(cache) == [cache.shards[-1].name]


def test_the_limit_is_of_all_mirrors_together(url, s3, local, tmp_path, monkeypatch) -> None:
    size = sum(s.bytes for s in local.shards)
    monkeypatch.setenv(CACHE_BYTES, str(size + 10))
    upload(local.path, other := s3.url())
    list(Cache.open(url))
    list(Cache.open(other))
    kept = sum(p.stat().st_size for p in (tmp_path / "mirrors").rglob("*.arrow"))
    assert 0 < kept <= size + 10


def test_a_flipped_shard_is_refused_by_name_and_read_once_it_is_mended(url, local) -> None:
    cache, store, name = Cache.open(url), ObjectStore(Url(url)), "shards/unit-000002.arrow"
    whole = store.get(name)
    swap(store, name, flipped(whole))
    first = sum(s.trace_count for s in cache.shards[:2])
    with pytest.raises(ShardCorruptError) as caught:
        cache[first]
    assert str(caught.value) == (
        f"{url}/{name}: its bytes do not match the checksum in its index; `logitcache verify --repair {url}` sets it aside; "
        "then generate its traces again, or copy them"
    )
    assert arrows(cache) == []
    assert cache[0].trace_id == local.trace_ids[0]
    swap(store, name, whole)
    assert cache[first].trace_id == local.trace_ids[first]


def test_a_missing_shard_is_refused_by_name(url) -> None:
    ObjectStore(Url(url)).delete("shards/unit-000000.arrow")
    with pytest.raises(ShardCorruptError, match=f"{url}/shards/unit-000000.arrow is missing, but its index exists"):
        Cache.open(url)[0]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:100], lambda data: bytes(len(data))])
def test_a_copy_that_was_damaged_on_this_disk_is_downloaded_again(url, local, damage) -> None:
    cache = Cache.open(url)
    list(cache)
    for path in cache.path.glob("shards/unit-*"):
        path.write_bytes(damage(path.read_bytes()))
    (cache.path / "manifest.json").write_bytes(damage((cache.path / "manifest.json").read_bytes()))
    assert [t.trace_id for t in Cache.open(url)] == local.trace_ids


def test_an_index_that_is_damaged_in_the_store_is_named_by_its_url(url, local) -> None:
    store, name = ObjectStore(Url(url)), "shards/unit-000001.json"
    whole = store.get(name)
    swap(store, name, flipped(whole))
    with pytest.raises(ShardCorruptError, match=f"^{url}/{name}: does not match its checksum"):
        Cache.open(url)
    swap(store, name, whole)
    assert len(Cache.open(url)) == len(local)


def test_an_index_that_vanished_is_forgotten_and_a_new_one_is_found(url, local) -> None:
    store = ObjectStore(Url(url))
    list(Cache.open(url))
    index = store.get("shards/unit-000005.json")
    store.delete("shards/unit-000005.json")
    assert len(Cache.open(url).shards) == SHARDS - 1
    assert "unit-000005" not in arrows(Cache.open(url))
    store.create("shards/unit-000005.json", index)
    assert len(Cache.open(url)) == len(local)


def test_a_cache_made_anew_at_the_same_url_is_not_mixed_with_the_old_one(url, local, tmp_path) -> None:
    list(Cache.open(url))
    store = ObjectStore(Url(url))
    for each in store.list(""):
        store.delete(each.name)
    made = tiny.write_cache(tmp_path / "new", tiny.traces(6, 3, seed=5), shards=2)
    facts = read_json(made.path / "manifest.json")
    publish_json(made.path / "manifest.json", facts | {"created": "2020-01-01T00:00:00+00:00"})
    upload(made.path, url)
    cache = Cache.open(url)
    assert arrows(cache) == []
    assert [t.token_ids.tolist() for t in cache] == [t.token_ids.tolist() for t in made]


def test_a_mirror_that_is_deleted_while_it_is_used_is_made_again(url, local) -> None:
    cache = Cache.open(url)
    cache[0]
    shutil.rmtree(cache.path.parent)
    assert [t.trace_id for t in cache] == local.trace_ids
    shutil.rmtree(cache.path.parent)
    assert len(Cache.open(url)) == len(local)


def test_no_cache_at_the_url_is_said_with_the_url(url, s3) -> None:
    empty = s3.url("nothing")
    with pytest.raises(NotACacheError, match=f"^{empty} is not a cache: no manifest.json in it; create one"):
        Cache.open(empty)
    ObjectStore(Url(url)).delete(manifest.FILE_NAME)
    with pytest.raises(NotACacheError, match=f"`logitcache verify --repair {url}` restores it"):
        Cache.open(url)


def test_processes_share_one_download_of_each_shard(url, local) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    readers = [context.Process(target=read_all, args=(url, queue)) for _ in range(3)]
    for each in readers:
        each.start()
    found = [queue.get(timeout=60) for _ in readers]
    for each in readers:
        each.join()
    assert [ids for _, ids in found] == [local.trace_ids] * 3
    assert sum(count for count, _ in found) == SHARDS


def test_a_pickled_cache_reads_through_the_same_mirror(url, local, requests) -> None:
    cache = Cache.open(url)
    list(cache)
    requests.clear()
    again = pickle.loads(pickle.dumps(cache))
    assert (again.location, again.path) == (cache.location, cache.path)
    assert [t.trace_id for t in again] == local.trace_ids
    assert requests == []


def test_shards_are_fetched_ahead_in_the_background(url, requests) -> None:
    cache = Cache.open(url)
    requests.clear()
    assert cache.mirror
    cache.mirror.fetch_ahead(cache.shards[:4])
    _wait(lambda: arrows(cache) == [f"unit-{i:06d}" for i in range(4)])
    assert sorted(requests) == [f"shards/unit-{i:06d}.arrow" for i in range(4)]
    cache.mirror.fetch_ahead(cache.shards[:4])
    for number in range(4):
        cache.shard(number)
    assert len(requests) == 4


def test_fetching_ahead_stops_at_half_of_the_bytes(url, tmp_path) -> None:
    cache = Cache.open(url)
    ahead = Mirror(Url(url), tmp_path / "mirrors", 2 * (cache.shards[0].bytes + cache.shards[1].bytes))
    ahead.fetch_ahead(cache.shards)
    _wait(lambda: len(arrows(cache)) == 2)
    time.sleep(0.3)
    assert arrows(cache) == ["unit-000000", "unit-000001"]


def test_errors_of_fetching_ahead_are_raised_by_the_shard_that_is_read(url) -> None:
    cache = Cache.open(url)
    assert cache.mirror
    ObjectStore(Url(url)).delete("shards/unit-000000.arrow")
    cache.mirror.fetch_ahead(cache.shards[:2])
    _wait(lambda: arrows(cache) == ["unit-000001"])
    with pytest.raises(ShardCorruptError, match="missing"):
        cache[0]


def _wait(done) -> None:
    for _ in range(200):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 10 s")


def test_a_full_disk_makes_room_from_the_mirror_itself(url, local, tmp_path, monkeypatch) -> None:
    room, most = 0, 3.3 * max(s.bytes for s in local.shards)
    real = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        used = sum(p.stat().st_size for p in (tmp_path / "mirrors").rglob("*.arrow"))
        if path.name.startswith(".part") and used + len(data) > most - room:
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, data)

    monkeypatch.setattr(mirror.Path, "write_bytes", write_bytes)
    cache = Cache.open(url)
    assert [t.trace_id for t in cache] == local.trace_ids
    assert 0 < len(arrows(cache)) < SHARDS
    room = most  # the disk is full of other things
    with pytest.raises(WriteError) as caught:
        list(Cache.open(url))
    assert f"{tmp_path / 'mirrors'}: No space left on device while storing a shard of" in str(caught.value)
    assert "`cache_dir`" in str(caught.value)
    assert not list((tmp_path / "mirrors").rglob(".part*"))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting needs root")
def test_a_disk_that_is_really_full(url, local, tmp_path, monkeypatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a container without mounts")
    try:
        monkeypatch.setenv(CACHE_DIR, str(small / "mirrors"))
        monkeypatch.setenv(CACHE_BYTES, "1GB")
        cache = Cache.open(url)
        cache.shard(0)
        left = 2 * max(s.bytes for s in local.shards)
        (small / "others").write_bytes(bytes(shutil.disk_usage(small).free - left))
        assert [t.trace_id for t in cache] == local.trace_ids
        assert 0 < len(arrows(cache)) < SHARDS
        for path in cache.path.glob("shards/*.arrow"):
            path.unlink()
        del cache
        _fill(small / "more")
        with pytest.raises(WriteError, match=rf"^{small}.*No space left on device while .*`cache_dir`"):
            list(Cache.open(url))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def _fill(path: Path) -> None:
    """Writes a file until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass


def test_a_directory_that_cannot_be_written_names_cache_dir(url, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "file"))
    with pytest.raises(WriteError, match=r"Not a directory while mirroring .*`cache_dir`"):
        Cache.open(url)


def test_a_limit_is_written_as_a_size(url, monkeypatch) -> None:
    for text, count in (("20GB", 20 * 10**9), ("1.5 tb", 15 * 10**11), ("7", 7), ("300MB", 3 * 10**8)):
        monkeypatch.setenv(CACHE_BYTES, text)
        assert Mirror(Url(url)).room.most == count
    for text in ("much", "-1", "0", "5 apples"):
        monkeypatch.setenv(CACHE_BYTES, text)
        with pytest.raises(InputError, match="`cache_bytes` .* write a size above 0"):
            _ = Mirror(Url(url)).room.most


def test_without_a_limit_half_of_the_disk_may_be_used_and_at_most_100_gb(url, monkeypatch) -> None:
    for free, most in ((10**9, 5 * 10**8), (10**13, 10**11)):
        monkeypatch.setattr(mirror.shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        assert Mirror(Url(url)).room.most == most


def test_names_in_a_listing_that_no_cache_has_are_never_written(url, tmp_path) -> None:
    store = ObjectStore(Url(url))
    for name in ("shards/unit-0000001x.json", "shards/deep/unit-000001.json", "shards/.lock", "shards/other.json"):
        store.create(name, b"{}")
    cache = Cache.open(url)
    assert len(list(cache.path.rglob("*.json"))) == SHARDS + 1
