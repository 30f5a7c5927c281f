"""A server that speaks S3 over loopback: moto's, in a process of its own, or the one that LOGITCACHE_TEST_S3 names."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

KEY, SECRET = "AKIAEXAMPLE", "secretsecret"


class S3Server:
    """``endpoint`` such as http://127.0.0.1:5555; ``bucket`` exists."""

    bucket = "bucket"

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.port = int(endpoint.rpartition(":")[2])

    def url(self, name: str = "cache") -> str:
        """A URL that no other test uses."""
        return f"s3://{self.bucket}/{name}-{uuid4().hex[:12]}"


@contextlib.contextmanager
def serve_s3() -> Iterator[S3Server]:
    """Starts moto's server; it ends with the block."""
    if endpoint := os.environ.get("LOGITCACHE_TEST_S3"):
        yield S3Server(endpoint)
        return
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        server = S3Server(f"http://127.0.0.1:{port}")
        _make_bucket(server, process)
        yield server
    finally:
        process.kill()
        process.wait()


def environment(endpoint: str) -> dict[str, str]:
    """What a process needs to use the server, directly or behind a proxy."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Stores that are connected from now on are at ``endpoint``, in this process and its children."""
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _make_bucket(server: S3Server, process: subprocess.Popen) -> None:
    request = urllib.request.Request(f"{server.endpoint}/{server.bucket}", method="PUT")
    for _ in range(300):
        assert process.poll() is None, "the server ended; another process may have taken its port"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=10) as reply:
                assert reply.status == 200
                return
        time.sleep(0.1)
    raise TimeoutError("moto's server did not start")
