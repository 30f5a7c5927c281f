"""Two processes that want one cache in an object store."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from logitcache.errors import CacheBusyError
from logitcache.storage import lease as module
from logitcache.storage import patience
from logitcache.storage.connect import connect
from logitcache.storage.lease import Times, _Content, holders, lease
from logitcache.storage.location import Url
from logitcache.storage.objects import ObjectStore

pytest.importorskip("obstore")
TIMES = Times(renew=0.1, poll=0.05, silence=0.6)
HERE = f"pid {os.getpid()} on "
LOCK = f"{module.FOLDER}/0-of-1"

HOLD = """
import sys, time
from logitcache.storage.connect import connect
from logitcache.storage.lease import Times, lease
from logitcache.storage.location import Url
with lease(connect(Url(sys.argv[1])), "0-of-1", "it", times=Times(0.1, 0.05, 0.6)):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store(s3) -> ObjectStore:
    return ObjectStore(Url(s3.url()), patience=5)


def of_another_machine(monkeypatch) -> None:
    """From now on this process does not see that another one ended."""
    monkeypatch.setattr(module, "_machine", lambda: "another")


def test_a_lock_is_held_during_the_block_and_gone_after_it(store) -> None:
    with lease(store, "0-of-1", "the cache", times=TIMES) as held:
        assert list(holders(store, times=TIMES)) == ["0-of-1"]
        assert holders(store, lambda name: name != "0-of-1", times=TIMES) == {}
        time.sleep(0.3)
        held.check()
        assert _counter(store) >= 1
    assert store.list("") == []
    assert holders(store, times=TIMES) == {}


def test_a_second_process_is_refused_at_once_with_the_holder(store) -> None:
    said: list[str] = []
    with lease(store, "0-of-1", "the cache", times=Times(0.1, 0.05, 60)):
        began = time.monotonic()
        with (
            pytest.raises(
                CacheBusyError, match=f"^the cache is being written by another process .{HERE}.*; wait for it"
            ),
            lease(store, "0-of-1", "the cache", say=said.append, times=Times(0.1, 0.05, 60)),
        ):
            pass
        assert time.monotonic() - began < 5
        assert said[0].startswith(f"the cache: waiting up to 60 s to see whether {HERE}")
        with lease(store, "1-of-2", "another", times=TIMES):
            pass
    with lease(store, "0-of-1", "the cache", times=TIMES):
        pass


@pytest.mark.parametrize("same_machine", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(store, monkeypatch, same_machine) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(store.url)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    if not same_machine:
        of_another_machine(monkeypatch)
    with pytest.raises(CacheBusyError, match=f"pid {holder.pid} on "), lease(store, "0-of-1", "it", times=TIMES):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert store.list(module.FOLDER)
    began = time.monotonic()
    assert holders(store, times=TIMES) == {}
    with lease(store, "0-of-1", "it", times=TIMES if not same_machine else Times(silence=100)) as held:
        taken = time.monotonic() - began
        held.check()
    assert taken < 1 if same_machine else taken > 1.1, "both waited for 0.6 s"


def test_no_clock_is_asked_for_the_time_of_day(store, monkeypatch) -> None:
    with lease(store, "0-of-1", "it", times=TIMES):
        monkeypatch.setattr(time, "time", lambda: pytest.fail("the time of day was asked"))
        with pytest.raises(CacheBusyError), lease(store, "0-of-1", "it", times=TIMES):
            pass
    assert "datetime" not in Path(module.__file__).read_text()


def test_a_holder_whose_clock_is_an_hour_off_is_no_less_a_holder(store, monkeypatch) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    with lease(store, "0-of-1", "it", times=TIMES):
        monkeypatch.setattr(time, "time", now)
        with pytest.raises(CacheBusyError), lease(store, "0-of-1", "it", times=TIMES):
            pass


def test_a_lock_outlives_a_store_that_is_unavailable(s3_server, proxy, monkeypatch) -> None:
    monkeypatch.setattr(patience, "_PAUSES", (0.02, 0.1))
    of_another_machine(monkeypatch)
    store = ObjectStore(Url(s3_server.url()), patience=0.2)  # much shorter than the failure: renewals fail
    watcher = ObjectStore(store.url, patience=10)
    with lease(store, "0-of-1", "it", times=TIMES) as held:
        proxy.faults.unavailable_for(1.5)
        with (
            pytest.raises(CacheBusyError, match="is being written"),
            lease(watcher, "0-of-1", "it", times=Times(0.1, 0.05, 0.6)),
        ):
            pass
        held.check()
    assert store.list("") == []


def test_a_watcher_does_not_count_the_time_in_which_the_store_was_away(s3_server, proxy, monkeypatch) -> None:
    monkeypatch.setattr(patience, "_PAUSES", (0.02, 0.1))
    store = ObjectStore(Url(s3_server.url()), patience=10)
    monkeypatch.setattr(module, "_machine", lambda: "")
    store.create(LOCK, _Content(holder="pid 1 on far").encode())
    began = time.monotonic()

    def away(_: str) -> None:  # after the first look
        proxy.faults.unavailable_for(1)

    with lease(store, "0-of-1", "it", say=away, times=TIMES):
        assert time.monotonic() - began > 1.5


def test_a_lock_that_was_taken_over_is_noticed_and_left_alone(store) -> None:
    with lease(store, "0-of-1", "the cache", times=TIMES) as held:
        store.delete(LOCK)
        store.create(LOCK, _Content(holder="pid 7 on elsewhere").encode())
        time.sleep(0.5)
        with pytest.raises(
            CacheBusyError, match=r"^the cache was taken over by another process \(pid 7 on elsewhere\)"
        ):
            held.check()
    assert b"elsewhere" in store.get(LOCK)


def test_a_lock_that_was_deleted_by_hand_is_made_again(store) -> None:
    with lease(store, "0-of-1", "the cache", times=TIMES) as held:
        store.delete(LOCK)
        time.sleep(0.4)
        held.check()
        assert list(holders(store, times=TIMES)) == ["0-of-1"]
    assert store.list("") == []


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"process": 3}', b'{"process": {}}'])
def test_what_is_no_lock_of_ours_is_taken_over_when_it_does_not_change(store, content) -> None:
    store.create(LOCK, content)
    with lease(store, "0-of-1", "it", times=Times(0.1, 0.05, 0.2)) as held:
        held.check()
        assert _counter(store) == 0


def test_of_many_that_find_a_dead_lock_one_takes_it_over(tmp_path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store = connect(Url(f"memory://{tmp_path.name}/cache"))
    store.create(LOCK, b"")
    times = Times(0.02, 0.01, 0.2)

    def want(_: int) -> bool:
        try:
            with lease(store, "0-of-1", "it", times=times):
                time.sleep(0.5)
                return True
        except CacheBusyError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(want, range(8))).count(True) == 1


def _counter(store: ObjectStore) -> int:
    content = module._decode(store.get(LOCK))
    assert content
    return content.counter
