"""A store that cuts, stalls, refuses, is away or is not there."""

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from logitcache.errors import InputError, UnreadableError, WriteError
from logitcache.storage import faults, patience
from logitcache.storage.connect import connect
from logitcache.storage.faults import fault_of
from logitcache.storage.lease import overwrites, refuse_overwriting
from logitcache.storage.location import Url, locate
from logitcache.storage.objects import ObjectStore
from tests.storage.s3_server import free_port, use

pytest.importorskip("obstore")
MB = 1 << 20


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(patience, "_PAUSES", (0.02, 0.2))


@pytest.fixture
def store(s3_server, proxy, quick) -> ObjectStore:
    return ObjectStore(Url(s3_server.url()), patience=10, first_patience=0.3)


def test_every_third_connection_is_cut_and_nobody_notices(store, proxy) -> None:
    proxy.faults.cut_every = 3
    wanted = {f"a/{i:02}": os.urandom(3000) for i in range(18)}
    for name, data in wanted.items():
        assert store.create(name, data)
    assert [e.name for e in store.list("a")] == sorted(wanted)
    assert dict(store.get_each(wanted)) == wanted
    assert proxy.faults.connections > 8


@pytest.mark.parametrize("side", ["down", "up"])
def test_a_connection_that_is_cut_in_the_middle_of_a_shard(store, proxy, side) -> None:
    data = os.urandom(9 * MB)
    if side == "down":
        store.create("shard", data)
    again = ObjectStore(store.url, patience=10)  # with connections of its own
    proxy.faults.side, proxy.faults.after, proxy.faults.cut_next = side, 5 * MB, 2
    if side == "up":
        assert again.create("shard", data)
        assert proxy.faults.cut_next == 0
    assert again.get("shard") == data
    assert proxy.faults.cut_next == 0


def test_a_download_goes_on_where_it_was_cut(store, proxy) -> None:
    data = os.urandom(20 * MB)
    store.create("shard", data)
    proxy.faults.after, proxy.faults.cut_every = 6 * MB, 1  # no connection carries it whole
    assert store.get("shard") == data
    assert proxy.faults.connections <= 8


def test_a_listing_goes_on_where_it_was_cut(store, monkeypatch) -> None:
    for name in "abcdef":
        store.create(name, b"")
    pages = []
    import obstore

    whole = obstore.list

    def broken(client, prefix, *, offset):
        pages.append(offset)
        for page in whole(client, prefix, offset=offset):
            yield page[:2]
            raise OSError("HTTP error: cut")

    monkeypatch.setattr(obstore, "list", broken)
    assert [e.name for e in store.list("")] == list("abcdef")
    assert [str(offset).rpartition("/")[2] for offset in pages] == ["None", "b", "d", "f"]


def test_a_store_that_stops_answering_is_given_up_and_asked_again(store, proxy) -> None:
    store.create("shard", bytes(9 * MB))
    again = ObjectStore(store.url, patience=10, stall=0.3)
    proxy.faults.after, proxy.faults.stall, proxy.faults.cut_every = 5 * MB, True, 2
    assert again.get("shard") == bytes(9 * MB)


def test_a_store_that_is_unavailable_for_a_while_is_waited_for(store, proxy) -> None:
    proxy.faults.unavailable_for(0.8)  # longer than the patience for a first contact: 503 is an answer
    began = time.monotonic()
    assert store.create("a", b"1")
    assert time.monotonic() - began > 0.7
    proxy.faults.unavailable_for(0.3)
    assert store.get("a") == b"1"
    proxy.faults.unavailable_for(0.3)
    assert [e.name for e in store.list("")] == ["a"]


def test_a_store_that_stays_unavailable_ends_in_one_line(store, proxy) -> None:
    store = ObjectStore(store.url, patience=0.5)
    proxy.faults.unavailable_for(100)
    said = r"503 SlowDown: Please reduce your request rate, for 0 s without progress; .* run the same command "
    with pytest.raises(UnreadableError, match=said + "again$") as read:
        store.get("a")
    with pytest.raises(WriteError, match=said + "to resume$") as written:
        store.create("a", b"1")
    for error in (read, written):
        assert str(store.url) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_creation_whose_reply_was_lost_is_recognised(store, proxy, s3_server, monkeypatch) -> None:
    proxy.faults.drop_replies = 1
    assert store.create("a", b"1")
    assert proxy.faults.drop_replies == 0
    _, tag = store.get_tagged("a")
    proxy.faults.drop_replies = 1
    second = store.replace("a", b"2", tag)
    assert proxy.faults.drop_replies == 0
    assert store.get_tagged("a") == (b"2", second)


@pytest.mark.skipif("LOGITCACHE_TEST_S3" in os.environ, reason="made for a server that takes quotes")
def test_a_server_that_compares_e_tags_without_quotes_is_understood(s3, quick, monkeypatch) -> None:
    import obstore.exceptions

    put, sent = obstore.put, []

    def strict(client, key, data, *, mode, **options):
        if isinstance(mode, dict):
            sent.append(mode["e_tag"][0] == '"')
            if sent[-1]:
                raise obstore.exceptions.PreconditionError("as Ceph's gateway")
            mode = {"e_tag": f'"{mode["e_tag"]}"'}
        return put(client, key, data, mode=mode, **options)

    monkeypatch.setattr(obstore, "put", strict)
    store = ObjectStore(Url(s3.url()), patience=5)
    store.create("a", b"1")
    _, first = store.get_tagged("a")
    second = store.replace("a", b"2", first)
    assert second
    assert store.replace("a", b"3", first) is None
    assert store.replace("a", b"3", second)
    assert sent == [True, False, False, False], "once learned, it is kept"


def test_a_misspelt_endpoint_is_said_after_a_short_wait(monkeypatch, quick) -> None:
    for endpoint, why in (
        (f"http://127.0.0.1:{free_port()}", "connection refused"),
        ("http://no-such-host.invalid", "no such host"),
    ):
        use(monkeypatch, endpoint)
        store = ObjectStore(Url("s3://bucket/cache"), first_patience=0.3)
        for verb in (lambda s: s.list(""), lambda s: s.create("a", b"1")):
            with pytest.raises(
                InputError, match=rf"s3://bucket/cache: {endpoint} cannot be reached \({why}\); check AWS_END"
            ):
                verb(store)


def test_a_store_that_was_there_and_is_away_is_no_mistake_of_the_user(s3, quick, monkeypatch) -> None:
    store = ObjectStore(Url(s3.url()), patience=0.4, first_patience=0)
    store.create("a", b"1")
    use(monkeypatch, f"http://127.0.0.1:{free_port()}")
    store._clients.clear()
    with pytest.raises(UnreadableError, match="cannot be reached .*for 0 s without progress"):
        store.get("a")


class Says(BaseHTTPRequestHandler):
    """Answers everything with the class's status and body."""

    status, body = 403, b""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def says(monkeypatch, quick):
    """Starts a server that says one thing; returns a store that asks it."""
    servers = []

    def start(status: int, code: str, message: str = "") -> ObjectStore:
        body = f"<Error><Code>{code}</Code><Message>{message}</Message><Region>eu-west-1</Region></Error>".encode()
        handler = type("Handler", (Says,), {"status": status, "body": body})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        use(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
        return ObjectStore(Url("s3://bucket/cache"))

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "AccessDenied", r"access denied \(403 AccessDenied\); check the credentials"),
        (403, "InvalidAccessKeyId", r"access denied \(403 InvalidAccessKeyId\); check the credentials"),
        (403, "SignatureDoesNotMatch", r"access denied \(403 SignatureDoesNotMatch\)"),
        (403, "RequestTimeTooSkewed", "the clock of this machine differs from the store's; set it"),
        (301, "PermanentRedirect", "the bucket is in another region.*; set AWS_REGION to it"),
        (400, "AuthorizationHeaderMalformed", "the bucket is in another region eu-west-1; set AWS_REGION to it"),
        (404, "NoSuchBucket", "there is no bucket bucket; create it, or correct the name"),
        (501, "NotImplemented", r"the store refuses the request \(501 NotImplemented: key \[hidden\]\)"),
    ],
)
def test_a_refusal_is_said_as_what_it_is(says, status, code, said) -> None:
    store = says(status, code, "key AKIAABCDEFGHIJKLMNOP")
    for verb in (
        lambda: store.list("shards"),
        lambda: store.get("a"),
        lambda: store.create("a", b"1"),
        lambda: store.delete("a"),
        lambda: list(store.get_each(["a", "b"])),
    ):
        with pytest.raises(InputError, match=f"^s3://bucket/cache: {said}") as raised:
            verb()
        assert "\n" not in str(raised.value)


def test_missing_credentials_are_named(monkeypatch, says) -> None:
    says(404, "NotFound")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(
        InputError, match=r"s3://bucket/cache: no credentials; set AWS_ACCESS_KEY_ID .*profiles .* not read"
    ):
        ObjectStore(Url("s3://bucket/cache")).get("a")


def test_every_scheme_has_a_word_about_credentials() -> None:
    error = Exception("Generic error: Error performing GET http://169.254.169.254/computeMetadata/v1 - kind: Connect")
    for scheme in faults.CREDENTIALS:
        assert fault_of(error, Url(f"{scheme}://bucket")).text.startswith("no credentials; set ")


def test_credentials_in_a_url_are_refused_and_not_shown() -> None:
    with pytest.raises(InputError, match="give credentials in the environment") as raised:
        locate("s3://AKIA:topsecret@bucket/cache")
    assert "topsecret" not in str(raised.value)


def test_a_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(InputError, match=r"^s3://bucket/cache: needs obstore; `pip install 'logitcache\[remote\]'`$"):
        connect(Url("s3://bucket/cache"))


def test_a_forked_process_is_refused_instead_of_waiting_for_ever(s3) -> None:
    code = """
import os, sys
from logitcache.storage.connect import connect
from logitcache.storage.location import Url
store = connect(Url(sys.argv[1]))
store.create("a", b"1")
if pid := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
try:
    store.get("a")
except Exception as e:
    print(e)
    sys.stdout.flush()
    os._exit(7)
"""
    found = subprocess.run([sys.executable, "-c", code, s3.url()], capture_output=True, text=True, timeout=30)
    assert found.returncode == 7, found.stderr
    assert "start it with spawn, not fork" in found.stdout


def test_a_store_that_creates_only_what_is_not_there_is_found_to_do_so(s3, tmp_path) -> None:
    for url in (s3.url(), f"memory://{tmp_path.name}/cache"):
        store = connect(Url(url))
        assert not overwrites(store)
        refuse_overwriting(store)
        assert store.list("") == []


@pytest.mark.skipif("LOGITCACHE_TEST_S3" in os.environ, reason="a server that checks signatures sees what was stripped")
@pytest.mark.parametrize("header", [b"If-None-Match", b"If-Match"])
def test_a_store_that_overwrites_is_refused_to_several_writers(store, proxy, header) -> None:
    proxy.faults.strip = header
    assert overwrites(store)
    with pytest.raises(InputError, match="the store overwrites objects .*; use one, or another store"):
        refuse_overwriting(store)
    lines: list[str] = []
    refuse_overwriting(store, 1, lines.append)
    assert len(lines) == 1
    assert "do not let a second process write there" in lines[0]
    assert store.list("") == []
