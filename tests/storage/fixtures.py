"""Fixtures for tests that need an object store. A conftest.py imports those that its folder uses."""

from collections.abc import Iterator

import pytest

from tests.storage.faulty_proxy import Proxy, faulty_proxy
from tests.storage.s3_server import S3Server, serve_s3, use


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One server a session, started when a test first asks for it."""
    pytest.importorskip("obstore")
    with serve_s3() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server; s3:// URLs lead to it during the test."""
    use(monkeypatch, s3_server.endpoint)
    return s3_server


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy with faults before the server; s3:// URLs lead to it during the test."""
    with faulty_proxy(s3_server.port) as proxy:
        use(monkeypatch, proxy.endpoint)
        yield proxy
