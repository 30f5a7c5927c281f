"""moto's S3 server on loopback behind a proxy that delays every request and counts them, each in a process of its own."""

import contextlib
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from tests.storage.s3_server import S3Server, environment, serve_s3


class SlowStore:
    """An S3 endpoint; `requests` counts up."""

    def __init__(self, server: S3Server, port: int, counted: Any):
        self.server, self.port, self._counted = server, port, counted

    @property
    def requests(self) -> int:
        return self._counted.value

    def url(self, name: str) -> str:
        return f"s3://{self.server.bucket}/{name}"


@contextlib.contextmanager
def slow_store(latency: float) -> Iterator[SlowStore]:
    """s3:// URLs of this process lead to the store during the block. latency: seconds before a request is passed on."""
    context = multiprocessing.get_context("spawn")
    with serve_s3() as server:
        counted, here, there = context.Value("q", 0), *context.Pipe()
        process = context.Process(target=_serve, args=(server.port, latency, counted, there), daemon=True)
        process.start()
        port = here.recv()
        before = dict(os.environ)
        os.environ.update(environment(f"http://127.0.0.1:{port}"))
        try:
            yield SlowStore(server, port, counted)
        finally:
            os.environ.clear()
            os.environ.update(before)
            process.kill()
            process.join()


def _serve(server_port: int, latency: float, counted: Any, ready: Any) -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    ready.send(listening.getsockname()[1])
    while True:
        client, _ = listening.accept()
        threading.Thread(target=_connection, args=(client, server_port, latency, counted), daemon=True).start()


def _connection(client: socket.socket, server_port: int, latency: float, counted: Any) -> None:
    server = socket.create_connection(("127.0.0.1", server_port))
    answered = threading.Event()  # whether what the client sends next begins a request
    answered.set()
    threading.Thread(target=_back, args=(server, client, answered), daemon=True).start()
    with contextlib.suppress(OSError):
        while data := client.recv(1 << 20):
            if answered.is_set():
                answered.clear()
                with counted.get_lock():
                    counted.value += 1
                time.sleep(latency)
            server.sendall(data)
    _close(server)


def _back(server: socket.socket, client: socket.socket, answered: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while data := server.recv(1 << 20):
            answered.set()
            client.sendall(data)
    _close(client)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
