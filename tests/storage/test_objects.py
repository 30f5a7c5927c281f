"""Objects in memory and in a server that speaks S3."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from logitcache.errors import InputError
from logitcache.storage.connect import connect
from logitcache.storage.location import locate
from logitcache.storage.objects import ObjectStore
from logitcache.storage.store import Entry, Store

pytest.importorskip("obstore")


def at(url: str) -> ObjectStore:
    location = locate(url)
    assert not hasattr(location, "exists")
    store = connect(location)  # pyright: ignore[reportArgumentType]
    assert isinstance(store, ObjectStore)
    return store


@pytest.fixture(params=["memory", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "memory":
        return at(f"memory://{tmp_path.name}/cache")
    return at(request.getfixturevalue("s3").url())


def test_an_object_is_created_once_and_read(store) -> None:
    assert store.create("shards/a", b"1")
    assert store.create("shards/a", b"1"), "the same bytes are ours"
    assert not store.create("shards/a", b"2")
    assert store.create("shards/b", memoryview(b"xyz")[1:])
    assert store.create("empty", b"")
    assert [store.get(n) for n in ("shards/a", "shards/b", "empty")] == [b"1", b"yz", b""]


def test_a_listing_is_sorted_and_begins_after_a_name(store) -> None:
    for name in ("shards/c", "shards/a", "other/x", "shards/b", "shardsx"):
        store.create(name, name.encode())
    names = [Entry(f"shards/{n}", 8) for n in "abc"]
    assert store.list("shards") == names
    assert store.list("shards", after="shards/a") == names[1:]
    assert [e.name for e in store.list("")] == ["other/x", "shards/a", "shards/b", "shards/c", "shardsx"]
    assert store.list("nothing") == []


def test_a_missing_object_is_named(store) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{store.url}/shards/no: no such object$"):
        store.get("shards/no")
    store.create("a", b"1")
    with pytest.raises(FileNotFoundError, match="/no: no such object"):
        list(store.get_each(["a", "no"]))
    store.delete("no")


def test_many_objects_are_read_in_parallel(store) -> None:
    wanted = {f"m/{i}": str(i).encode() for i in range(80)}
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(store.create, wanted, wanted.values()))
    assert dict(store.get_each(wanted)) == wanted


def test_only_the_version_that_was_read_is_replaced(store) -> None:
    store.create("lock", b"1")
    data, first = store.get_tagged("lock")
    assert data == b"1"
    second = store.replace("lock", b"2", first)
    assert second
    assert store.get_tagged("lock") == (b"2", second)
    assert store.replace("lock", b"3", first) is None
    assert store.replace("lock", b"2", first) == second, "the same bytes are ours"
    store.delete("lock")
    assert store.replace("lock", b"4", second) is None


def test_one_of_many_threads_creates_an_object(store) -> None:
    for n in range(3):
        with ThreadPoolExecutor(16) as pool:
            made = list(pool.map(lambda i, n=n: store.create(f"race/{n}", str(i).encode()), range(16)))
        assert made.count(True) == 1
        assert store.get(f"race/{n}") == str(made.index(True)).encode()


def test_a_store_connects_again_when_it_is_unpickled(s3) -> None:
    store = at(s3.url())
    store.create("a", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again.url == store.url
    assert again.get("a") == b"1"
    assert b"secret" not in pickle.dumps(store)


def test_memory_is_refused_in_another_process(tmp_path) -> None:
    store = at(f"memory://{tmp_path.name}/cache")
    store.create("a", b"1")
    assert pickle.loads(pickle.dumps(store)).get("a") == b"1"
    code = "import pickle, sys; pickle.load(sys.stdin.buffer)"
    found = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True)
    assert b"in one process only" in found.stderr


def test_a_bucket_that_is_none_is_named(s3) -> None:
    store = at("s3://bucket-that-is-none/cache")
    tag = at(s3.url())
    tag.create("a", b"")
    for verb in (
        lambda: store.get("a"),
        lambda: store.list(""),
        lambda: store.create("a", b""),
        lambda: store.delete("a"),
        lambda: store.replace("a", b"", tag.get_tagged("a")[1]),
    ):
        with pytest.raises(InputError, match="there is no bucket bucket-that-is-none; create it, or correct the name"):
            verb()
