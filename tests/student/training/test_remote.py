"""Training from a cache in an object store gives what training from a directory gives."""

import json
import time
from pathlib import Path

import pytest

from logitcache.cache.reader import Cache
from logitcache.errors import StudentError
from logitcache.storage.connect import connect
from logitcache.storage.location import Url
from logitcache.student.data import fetch_ahead, sampler
from logitcache.student.data.collate import loader
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.data.fetch_ahead import FetchAhead
from logitcache.student.data.sampler import StepSampler
from logitcache.student.training.run import train
from tests import tiny
from tests.runs import history, launch
from tests.tiny import one_thread  # noqa: F401

SHARDS = 6


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    path = tmp_path_factory.mktemp("local") / "cache"
    tiny.write_cache(path, shards=SHARDS)
    return path


@pytest.fixture
def url(s3, local, tmp_path, monkeypatch) -> str:
    """The same cache in a store; its mirrors are in `tmp_path`."""
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(tmp_path / "mirrors"))
    place = s3.url()
    upload(local, place)
    return place


def upload(cache: Path, url: str) -> None:
    store = connect(Url(url))
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        assert store.create(path.relative_to(cache).as_posix(), path.read_bytes())


def shard_bytes(cache: Path) -> list[int]:
    return [path.stat().st_size for path in (cache / "shards").glob("*.arrow")]


def seen(cache: Cache, window: int | None = None, workers: int = 0) -> list[list[str]]:
    data = TraceDataset(cache)
    return [batch.trace_ids for batch in loader(data, StepSampler(data.pool, 120, window=window), num_workers=workers)]


def test_a_loader_gives_the_batches_of_a_directory_and_downloads_each_shard_once(url, local):
    cache = Cache.open(url)
    assert seen(cache) == seen(Cache.open(local))
    assert cache.mirror.downloads == SHARDS


@pytest.mark.slow
def test_loader_processes_read_from_the_store_too(url, local, monkeypatch):
    monkeypatch.setenv("LOGITCACHE_CACHE_BYTES", "1")  # so that they have to download themselves
    assert seen(Cache.open(url), workers=2) == seen(Cache.open(local))


def test_an_order_by_shards_downloads_a_cache_once_that_a_mirror_does_not_hold(url, local, monkeypatch):
    monkeypatch.setenv("LOGITCACHE_CACHE_BYTES", str(2 * max(shard_bytes(local))))
    cache = Cache.open(url)
    assert seen(cache, window=1) == seen(Cache.open(local), window=1)
    assert cache.mirror.downloads == SHARDS


def test_a_run_from_a_url_by_itself_takes_an_order_that_its_mirror_holds(url, options, monkeypatch, local, capfd):
    monkeypatch.setenv("LOGITCACHE_CACHE_BYTES", str(4 * max(shard_bytes(local))))
    there = train(options("there", caches=[url]))
    assert there.settings["shuffle"] == "shards:2"
    assert "order of traces: mixed 2 shards at a time" in capfd.readouterr().err
    here = train(options("here", caches=[local], shuffle="shards:2"))
    assert history(there, "loss") == history(here, "loss")
    assert there.eval_after.kl == pytest.approx(here.eval_after.kl, rel=1e-9), "the order of a sum"


def test_the_command_line_takes_urls(run, monkeypatch):
    seen = []

    def record(options):
        seen.append(options.shares)
        raise StudentError("enough")

    monkeypatch.setattr("logitcache.student.training.run.train", record)
    rest = ("--student", "s", "--out", "o")
    assert run("train", "s3://a/b", "c", *rest)[0] == run("train", "--mix", "s3://a/b=0.7", "c=0.3", *rest)[0] == 2
    assert seen == [{Url("s3://a/b"): None, Path("c"): None}, {Url("s3://a/b"): 0.7, Path("c"): 0.3}]


def test_batches_that_a_resumed_run_skips_are_not_downloaded(url, local, monkeypatch):
    monkeypatch.setattr(fetch_ahead, "AHEAD", 1)
    data = TraceDataset(Cache.open(url))
    batches = list(FetchAhead(StepSampler(data.pool, 60, window=1), data))
    assert {int(data.pool.shards[i]) for batch in batches for i in batch} == set(range(SHARDS))
    deadline = time.monotonic() + 20
    while not data.cache.mirror.downloads and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert 1 <= data.cache.mirror.downloads < SHARDS, "what had begun, and the last ones"


def test_an_evaluation_at_a_url_gives_what_one_of_the_directory_gives(url, local, home, run, monkeypatch):
    monkeypatch.setenv("LOGITCACHE_CACHE_BYTES", str(2 * max(shard_bytes(local))))
    monkeypatch.setattr(sampler, "EVALUATED_AT_ONCE", 2)
    results = [run("eval", cache, "--student", home / "model", "--all", "--json") for cache in (url, local)]
    assert [code for code, _, _ in results] == [0, 0]
    there, here = (json.loads(out) for _, out, _ in results)
    assert (there["cache"], here["cache"]) == (url, str(local))
    assert there["kl"] == pytest.approx(here["kl"], rel=1e-6)
    assert there["rows"] == here["rows"] > 0


@pytest.mark.slow
def test_two_machines_with_mirrors_of_their_own_train_as_one_directory_does(url, options, local, tmp_path):
    def given(name: str, cache, ranks: int):
        changes = {"set": {"optim": "sgd"}, "learning_rate": 0.1, "caches": [cache]}
        return options(name, tokens_per_batch=128 // ranks, **changes)

    mirrors = {"LOGITCACHE_CACHE_DIR": str(tmp_path / "machine-{rank}")}
    there = launch(given("there", url, 2), 2, **mirrors)
    here = launch(given("here", local, 2), 2)
    assert there.settings["shuffle"] == "full"
    assert history(there, "loss") == history(here, "loss")
    assert there.eval_after.kl == pytest.approx(here.eval_after.kl, rel=1e-9)
    for rank in range(2):
        assert list((tmp_path / f"machine-{rank}").rglob("*.arrow")), "each machine has a mirror of its own"
    assert not (tmp_path / "mirrors").exists()
