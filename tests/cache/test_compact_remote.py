"""The compacted index of a cache in an object store."""

import shutil
import warnings
from pathlib import Path

import pytest

from logitcache.cache import compact, shard
from logitcache.cache.compact import DIRECTORY
from logitcache.cache.mirror import CACHE_DIR, Mirror
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.errors import InputError, NotACacheError
from logitcache.storage.connect import connect
from logitcache.storage.location import Url
from logitcache.storage.objects import ObjectStore
from logitcache.storage.store import Store
from tests import tiny

SHARDS = 30
DATA, HEAD = f"{DIRECTORY}/indexes-000001.arrow", f"{DIRECTORY}/indexes-000001.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("c") / "cache"
    tiny.write_cache(path, tiny.traces(2 * SHARDS, SHARDS), shards=SHARDS)
    return path


def upload(path: Path, store: Store) -> None:
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            assert store.create(str(file.relative_to(path)), file.read_bytes())


@pytest.fixture
def store(whole, tmp_path, monkeypatch) -> Store:
    pytest.importorskip("obstore")
    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "mirrors"))
    store = connect(Url(f"memory://{tmp_path.name}/cache"))
    upload(whole, store)
    return store


@pytest.fixture
def requests(monkeypatch) -> list[str]:
    """What is asked of the store, in order."""
    made: list[str] = []

    def counted(name: str) -> None:
        real = getattr(ObjectStore, name)

        def ask(self, what, *more):
            made.append(f"{name} {what}")
            return real(self, what, *more)

        monkeypatch.setattr(ObjectStore, name, ask)

    for name in ("list", "get"):
        counted(name)
    return made


def opened(store: Store) -> Cache:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Cache.open(store.url)


def test_it_opens_in_few_requests_with_newer_shards_beside_it(store, whole, requests, tmp_path) -> None:
    report = compact.compact(store.url)
    assert (report.shards, report.path, report.removed) == (SHARDS, f"{store.url}/{HEAD}", [])
    local = Cache.open(whole)
    newer = shutil.copytree(whole, tmp_path / "newer")
    traces = tiny.traces(2 * SHARDS + 2, SHARDS + 1)[2 * SHARDS :]
    encoded = [shard.EncodedTrace.of(t, local.identity) for t in traces]
    shard.write(newer / shard.DIRECTORY, SHARDS, encoded, local.identity, {})
    for suffix in (".arrow", ".json"):
        name = f"{shard.DIRECTORY}/unit-{SHARDS:06d}{suffix}"
        store.create(name, (newer / name).read_bytes())

    shutil.rmtree(tmp_path / "mirrors")
    requests.clear()
    cache = opened(store)
    assert len(requests) <= 6, requests
    assert requests.count(f"get {DATA}") == 1
    assert (cache.info().shards, cache.info().compacted) == (SHARDS + 1, SHARDS)
    assert cache.trace_ids == [*local.trace_ids, *(t.trace_id for t in traces)]
    assert [cache[i].text for i in (0, 17, -1)] == [local[0].text, local[17].text, traces[-1].text]

    requests.clear()
    assert len(opened(store)) == len(cache)
    assert requests == ["get manifest.json", f"list {DIRECTORY}", f"list {shard.DIRECTORY}"]
    assert verify(store.url, 1) == []


def test_a_mirror_that_has_the_indexes_goes_on_with_it(store, whole) -> None:
    before = opened(store)
    first = before[0].text
    compact.compact(store.url)
    cache = opened(store)
    assert (cache.info().compacted, cache.trace_ids) == (SHARDS, before.trace_ids)
    assert cache.mirror is not None
    assert cache[0].text == first
    assert cache.mirror.downloads == 0, "its shard is still here"
    for name in (HEAD, DATA):
        store.delete(name)
    assert (opened(store).info().compacted, opened(store).trace_ids) == (0, before.trace_ids)


def test_the_second_takes_the_place_of_the_first(store) -> None:
    compact.compact(store.url)
    old = opened(store)
    report = compact.compact(store.url)
    assert report.removed == [f"{store.url}/{HEAD}", f"{store.url}/{DATA}"]
    assert [e.name for e in store.list(DIRECTORY)] == [n.replace("000001", "000002") for n in (DATA, HEAD)]
    assert opened(store).trace_ids == old.trace_ids
    assert old.mirror is not None
    assert sorted(p.stem for p in (old.mirror.path / DIRECTORY).iterdir()) == ["indexes-000002"] * 2


@pytest.mark.parametrize("name", [DATA, HEAD])
def test_a_damaged_one_is_announced_and_the_indexes_are_read(store, name) -> None:
    compact.compact(store.url)
    data = bytearray(store.get(name))
    data[len(data) // 2] ^= 1
    store.delete(name)
    store.create(name, bytes(data))
    with pytest.warns(UserWarning, match=f"{store.url}/{DIRECTORY}/.*the indexes of the shards are read instead"):
        cache = Cache.open(store.url)
    assert (len(cache), cache.info().compacted) == (2 * SHARDS, 0)
    (problem,) = verify(store.url, 1)
    assert problem.shard == "indexes-000001"
    assert str(store.url) in problem.what


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_copy_in_the_mirror_is_downloaded_again(store, damage) -> None:
    compact.compact(store.url)
    cache = opened(store)
    copy = cache.path / DATA
    if damage == "missing":
        copy.unlink()
    else:
        copy.write_bytes(bytes(reversed(copy.read_bytes())))
    assert opened(store).trace_ids == cache.trace_ids


def test_a_mirror_whose_copy_goes_while_it_is_opened_is_never_a_smaller_cache(store, monkeypatch) -> None:
    compact.compact(store.url)
    real, removed = Mirror.refresh, []

    def refresh(self):
        found = real(self)
        if not removed:
            removed.append((self.path / DATA).unlink())
        return found

    monkeypatch.setattr(Mirror, "refresh", refresh)
    assert (len(opened(store)), removed) == (2 * SHARDS, [None])


def test_bad_urls_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(CACHE_DIR, str(tmp_path))
    with pytest.raises(NotACacheError, match="memory://nothing/here is not a cache"):
        compact.compact("memory://nothing/here")
    with pytest.raises(InputError, match="unknown scheme"):
        compact.compact("s4://bucket/cache")
