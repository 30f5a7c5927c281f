"""A cache on the hub, read through the real client from a stand-in of its file API on the loopback."""

import pickle

import pytest

from logitcache.errors import InputError, UnreadableError
from logitcache.storage import patience
from logitcache.storage.connect import connect
from logitcache.storage.hub import HubStore
from logitcache.storage.lease import overwrites
from logitcache.storage.location import Url
from logitcache.storage.store import Entry
from tests.interop.hub_server import TOKEN, ask, commit_of

pytest.importorskip("huggingface_hub")
URL = Url("hf://datasets/me/traces")
FILES = {"manifest.json": b"{}", "shards/unit-000001.arrow": bytes(5000), "shards/unit-000000.json": b"[]"}


@pytest.fixture
def traces(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(patience, "_PAUSES", (0.02, 0.1))
    hub.repos["me/traces"] = {"main": [dict(FILES)], "v2": [dict(FILES) | {"manifest.json": b"{2}"}]}
    return hub.repos["me/traces"]


def test_the_files_of_a_revision_are_listed_and_read(traces) -> None:
    store = connect(URL)
    assert store.list("shards") == [Entry("shards/unit-000000.json", 2), Entry("shards/unit-000001.arrow", 5000)]
    assert [e.name for e in store.list("shards", after="shards/unit-000000.json")] == ["shards/unit-000001.arrow"]
    assert len(store.list("")) == 3
    assert dict(store.get_each(FILES)) == FILES
    assert connect(Url("hf://datasets/me/traces@v2")).get("manifest.json") == b"{2}"
    with pytest.raises(FileNotFoundError, match=f"{URL}/no.json: no such file in commit {commit_of(FILES)}"):
        store.get("no.json")


def test_the_commit_is_pinned_also_after_pickling(traces) -> None:
    store = connect(URL)
    traces["main"].append({"manifest.json": b"new"})
    again = pickle.loads(pickle.dumps(store))
    assert [s.get("manifest.json") for s in (store, again, connect(URL))] == [b"{}", b"{}", b"new"]
    assert TOKEN.encode() not in pickle.dumps(store)


def test_the_hub_is_only_read(traces) -> None:
    store = connect(URL)
    for verb in (
        lambda: store.create("a", b"1"),
        lambda: store.replace("a", b"1", store.get_tagged("manifest.json")[1]),
        lambda: store.delete("manifest.json"),
        lambda: overwrites(store),
    ):
        with pytest.raises(InputError, match="only read here; .*then `logitcache push OUT me/traces`"):
            verb()


@pytest.mark.parametrize("text", ["hf://me/traces", "hf://datasets/traces", "hf://datasets/me/traces/folder"])
def test_another_url_is_refused(text) -> None:
    with pytest.raises(
        InputError, match=f"^{text}: write hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME@REVISION$"
    ):
        connect(Url(text))


def test_a_repository_that_is_none_and_a_wrong_token_are_refused(traces, monkeypatch) -> None:
    with pytest.raises(InputError, match="^hf://datasets/me/none: the hub refuses .*; check the name"):
        connect(Url("hf://datasets/me/none"))
    store = connect(URL)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for verb in (lambda: connect(URL), lambda: store.get("manifest.json"), lambda: store.list("")):
        with pytest.raises(InputError, match="^hf://datasets/me/traces: the hub refuses .*hf auth login") as raised:
            verb()
        assert "\n" not in str(raised.value)


def test_a_hub_that_cannot_be_reached_is_said_after_a_short_wait(traces, monkeypatch) -> None:
    store = HubStore(URL, patience=0.3)
    ask(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UnreadableError, match="hf://datasets/me/traces/a: the hub does not answer"):
        store.get("a")
    with pytest.raises(InputError, match="hf://datasets/me/none: the hub cannot be reached .*HF_ENDPOINT"):
        HubStore(Url("hf://datasets/me/none"), first_patience=0.2)
