"""Commands on caches behind URLs do what they do in a directory."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.cache.reader import Cache
from logitcache.cache.repair import repair
from logitcache.cache.upload import MARK
from logitcache.cache.verify import verify
from logitcache.errors import CacheBusyError, InputError, NotACacheError
from logitcache.interop.formats import export
from logitcache.storage.lease import Times, lease
from logitcache.storage.location import Url
from logitcache.storage.objects import ObjectStore
from logitcache.transform.merge import merge
from logitcache.transform.slice import slice_cache
from logitcache.transform.split import split
from tests import tiny
from tests.cache.remote import flipped, swap, upload

SHARDS = 4


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Cache:
    return tiny.write_cache(tmp_path_factory.mktemp("local") / "cache", shards=SHARDS)


@pytest.fixture
def url(s3, local, tmp_path, monkeypatch) -> str:
    """A cache in the store, and an empty directory for mirrors."""
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(tmp_path / "mirrors"))
    url = s3.url()
    upload(local.path, url)
    return url


def objects(url: str) -> dict[str, bytes]:
    store = ObjectStore(Url(url))
    return dict(store.get_each([entry.name for entry in store.list("")]))


def files(path: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not Path(name).name.startswith(".")}


def arrows(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name.endswith(".arrow")}


def test_a_cache_in_the_store_is_valid(url) -> None:
    assert verify(url, 1) == []
    assert verify(url, 2) == []


def test_a_slice_a_merge_and_a_split_are_the_same_as_in_directories(url, local, s3, tmp_path) -> None:
    slice_cache(url, (sliced := s3.url("slice")), top_k=4)
    slice_cache(local.path, tmp_path / "slice", top_k=4)
    assert arrows(objects(sliced)) == arrows(files(tmp_path / "slice"))
    split(url, {(a := s3.url("a")): 0.5, str(tmp_path / "b"): 0.5})
    split(local.path, {str(tmp_path / "a2"): 0.5, str(tmp_path / "b2"): 0.5})
    assert arrows(objects(a)) == arrows(files(tmp_path / "a2"))
    assert arrows(files(tmp_path / "b")) == arrows(files(tmp_path / "b2"))
    report = merge([a, tmp_path / "b"], (merged := s3.url("merged")))
    assert set(report.before) == {Url(a), tmp_path / "b"}
    assert report.after.traces == len(local)
    for made in (sliced, a, merged):
        assert verify(made, 1) == []
        assert {name for name in objects(made) if not name.startswith("shards/")} == {
            "manifest.json",
            "manifest.backup.json",
        }


def test_shards_are_copied_from_a_store_byte_for_byte(url, local, tmp_path) -> None:
    other = tiny.write_cache(tmp_path / "other", shards=1)
    assert len(other)
    report = merge([url, tmp_path / "other"], tmp_path / "merged")
    assert (report.copied, report.repeated) == (SHARDS, len(local))
    assert list(arrows(files(tmp_path / "merged")).values()) == list(arrows(files(local.path)).values())


def test_an_export_reads_from_a_store_and_writes_to_a_directory(url, local, tmp_path) -> None:
    report = export(url, tmp_path / "plain")
    assert report.traces == len(local)
    export(local.path, tmp_path / "plain-too")
    assert files(tmp_path / "plain") == files(tmp_path / "plain-too")
    with pytest.raises(InputError, match="exports are written to a directory"):
        export(url, f"{url}-plain")


def test_an_output_that_is_taken_is_refused(url, local, s3) -> None:
    with pytest.raises(NotACacheError, match=f"^{url}: there is a cache already; give `out` a new URL"):
        slice_cache(local.path, url, top_k=4)
    ObjectStore(Url(other := s3.url("other"))).create("notes.txt", b"mine")
    with pytest.raises(NotACacheError, match=rf"{other}: there is something else \(notes.txt\) already"):
        slice_cache(url, other, top_k=4)
    assert set(objects(other)) == {"notes.txt"}
    for inside in (f"{url}/inside", f"{url}/"):
        with pytest.raises(InputError, match=f"is inside the cache {url}"):
            slice_cache(url, inside, top_k=4)
    with pytest.raises(InputError, match="`logitcache push` uploads it to the hub"):
        slice_cache(url, "hf://datasets/me/cache", top_k=4)


def test_what_an_interrupted_upload_left_is_removed_and_begun_anew(url, s3) -> None:
    store = ObjectStore(Url(out := s3.url("out")))
    for name, data in ((MARK, b""), ("shards/unit-000000.arrow", b"old"), ("shards/unit-000099.json", b"older")):
        store.create(name, data)
    slice_cache(url, out, top_k=4)
    assert verify(out, 1) == []
    assert "shards/unit-000099.json" not in objects(out)
    assert MARK not in objects(out)


def test_an_upload_of_another_process_is_not_touched(url, s3) -> None:
    store = ObjectStore(Url(out := s3.url("out")))
    store.create(MARK, b"")
    with lease(store, "0-of-1", out, times=Times(renew=0.2)), pytest.raises(CacheBusyError, match="being written"):
        slice_cache(url, out, top_k=4)
    assert MARK in objects(out)


def test_a_killed_upload_is_begun_anew(url, s3, tmp_path) -> None:
    out = s3.url("out")
    script = (
        "import sys\n"
        "from logitcache.cache import upload\n"
        "real = upload._create\n"
        "def create(store, name, data):\n"
        "    if name.endswith('2.arrow'): print('there', flush=True); import time; time.sleep(60)\n"
        "    real(store, name, data)\n"
        "upload._create = create\n"
        "from logitcache.transform.slice import slice_cache\n"
        f"slice_cache({url!r}, {out!r}, top_k=4, workers=1)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.readline() == b"there\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = objects(out)
    assert MARK in left
    assert "manifest.json" not in left
    with pytest.raises(NotACacheError):
        Cache.open(out)
    slice_cache(url, out, top_k=4)
    assert verify(out, 1) == []
    assert list((tmp_path / "mirrors" / "out").iterdir()) == []


def test_a_failed_slice_uploads_nothing(url, s3) -> None:
    with pytest.raises(InputError, match="no trace is left"):
        slice_cache(url, (out := s3.url("out")), where="tokens>100000")
    assert objects(out) == {}


def test_verify_names_what_is_damaged_in_the_store_although_the_mirror_is_whole(url, local) -> None:
    list(Cache.open(url))
    store, name = ObjectStore(Url(url)), "shards/unit-000001.arrow"
    swap(store, name, flipped(store.get(name)))
    for workers in (1, 2):
        (problem,) = verify(url, workers)
        assert problem.shard == "unit-000001"
        assert f"{url}/{name}: its bytes do not match the checksum in its index" in str(problem)
    assert [t.trace_id for t in Cache.open(url)] == local.trace_ids  # what the mirror has was checked


def test_verify_evicts_nothing(url, local, monkeypatch) -> None:
    monkeypatch.setenv("LOGITCACHE_CACHE_BYTES", str(local.shards[0].bytes + 10))
    cache = Cache.open(url)
    cache[0]
    assert verify(url, 1) == []
    assert [p.stem for p in cache.path.glob("shards/*.arrow")] == ["unit-000000"]


def test_a_repair_sets_a_damaged_shard_aside_in_the_store(url, local, run) -> None:
    store = ObjectStore(Url(url))
    damaged = flipped(store.get("shards/unit-000001.arrow"))
    swap(store, "shards/unit-000001.arrow", damaged)
    index = store.get("shards/unit-000001.json")
    code, printed, _ = run("verify", url, "--repair", "--workers", 1)
    assert code == 2
    assert f"moved {url}/set-aside/unit-000001.json" in printed
    found = objects(url)
    assert found["set-aside/unit-000001.arrow"] == damaged
    assert found["set-aside/unit-000001.json"] == index
    assert not {"shards/unit-000001.json", "shards/unit-000001.arrow"} & set(found)
    assert verify(url, 1) == []
    assert len(Cache.open(url)) == len(local) - local.shards[1].trace_count


def test_a_repair_makes_a_lost_index_and_a_lost_manifest_again(url, local) -> None:
    store, before = ObjectStore(Url(url)), objects(url)
    store.delete("shards/unit-000002.json")
    swap(store, "shards/unit-000003.json", flipped(before["shards/unit-000003.json"]))
    store.delete("manifest.json")
    report = repair(Url(url), 1)
    assert sorted(map(str, report.restored)) == [
        f"{url}/{name}" for name in ("manifest.json", "shards/unit-000002.json", "shards/unit-000003.json")
    ]
    assert [t.trace_id for t in Cache.open(url)] == local.trace_ids
    assert verify(url, 1) == []
    assert objects(url)["manifest.json"] == before["manifest.json"]
    assert objects(url)["set-aside/unit-000003.json"] == flipped(before["shards/unit-000003.json"])


def test_a_repair_of_a_valid_cache_changes_nothing(url) -> None:
    before = objects(url)
    report = repair(Url(url), 1)
    assert (report.problems, report.moved, report.restored) == ([], [], [])
    assert objects(url) == before


def test_a_repair_of_nothing_makes_nothing(s3, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(tmp_path / "mirrors"))
    with pytest.raises(NotACacheError):
        repair(Url(url := s3.url("nothing")), 1)
    assert objects(url) == {}


def test_commands_take_urls_and_the_options_of_mirrors(url, local, s3, run, tmp_path) -> None:
    where = tmp_path / "elsewhere"
    code, printed, error = run("info", url, "--json", "--cache-dir", where, "--cache-bytes", "1GB")
    assert (code, error) == (0, "")
    assert json.loads(printed)["path"] == url
    assert len(list(where.glob("*/manifest.json"))) == 1
    code, printed, _ = run("slice", url, "--out", (out := s3.url("out")), "--top-k", 4, "--workers", 1)
    assert (code, printed.splitlines()[0].partition(": ")[0]) == (0, out)
    code, _, error = run("info", url, "--cache-bytes", "a lot")
    assert code == 2
    assert "--cache-bytes 'a lot': write a size above 0, such as 20GB" in error
    code, _, error = run("pull", "me/cache", "--out", "s3://bucket/cache")
    assert code == 2
    assert "--out s3://bucket/cache: give a path on this machine, not a URL" in error


def test_only_commands_on_caches_have_the_options_of_mirrors(run) -> None:
    for command in (
        "info",
        "verify",
        "slice",
        "merge",
        "split",
        "export",
        "push",
        "train",
        "eval",
        "experiment",
        "score",
    ):
        assert "--cache-bytes" in run(command, "--help")[1], command
    for command in ("compare", "pull"):
        assert "--cache-bytes" not in run(command, "--help")[1], command
