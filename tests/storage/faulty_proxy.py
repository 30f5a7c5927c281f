"""A proxy before a server on loopback that cuts, stalls and answers in the server's place."""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

_SAID = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
_UNAVAILABLE = b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(_SAID), _SAID)


@dataclass
class Faults:
    """What goes wrong. May be changed at any time; connections notice it at their next request or byte."""

    cut_next: int = 0  # so many connections are cut
    cut_every: int = 0  # every n-th connection is cut; 0 for none
    after: int = 0  # bytes, in the direction of ``side``, that still pass on such a connection
    side: str = "down"  # towards the client; "up" towards the server
    stall: bool = False  # such a connection stays silent instead of being cut
    unavailable_until: float = 0.0  # by time.monotonic(): until then every connection is answered 503
    drop_replies: int = 0  # of so many PUTs the server makes what it is asked for, and the client never hears of it
    strip: bytes = b""  # the name of a header that the server does not see
    connections: int = 0  # so far

    def unavailable_for(self, seconds: float) -> None:
        self.unavailable_until = time.monotonic() + seconds


@dataclass
class Proxy:
    endpoint: str
    faults: Faults


@contextlib.contextmanager
def faulty_proxy(target: int) -> Iterator[Proxy]:
    """A proxy before the port ``target``, during the block."""
    faults, loop, ready = Faults(), asyncio.new_event_loop(), threading.Event()
    ports: list[int] = []

    async def serve() -> None:
        server = await asyncio.start_server(lambda r, w: _connection(r, w, target, faults), "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.create_task(serve())
        loop.run_forever()
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield Proxy(f"http://127.0.0.1:{ports[0]}", faults)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _connection(client: asyncio.StreamReader, reply: asyncio.StreamWriter, target: int, faults: Faults) -> None:
    faults.connections += 1
    bad = faults.cut_next > 0 or (faults.cut_every > 0 and faults.connections % faults.cut_every == 0)
    faults.cut_next = max(0, faults.cut_next - 1)
    writers, methods = [reply], []
    try:
        server, request = await asyncio.open_connection("127.0.0.1", target)
        writers.append(request)
        up = asyncio.ensure_future(_pass_on(client, request, faults, "up", bad, reply, methods))
        down = asyncio.ensure_future(_pass_on(server, reply, faults, "down", bad, reply, methods))
        await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        down.cancel()
        await asyncio.gather(up, down, return_exceptions=True)
    except (OSError, asyncio.CancelledError):
        pass
    finally:
        for writer in writers:
            if bad:
                writer.transport.abort()
            writer.close()


async def _pass_on(
    source: asyncio.StreamReader,
    sink: asyncio.StreamWriter,
    faults: Faults,
    side: str,
    bad: bool,
    reply: asyncio.StreamWriter,
    methods: list[bytes],
) -> None:
    passed = 0
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            if side == "up" and time.monotonic() < faults.unavailable_until:
                reply.write(_UNAVAILABLE)
                await reply.drain()
                return
            if side == "down" and faults.drop_replies and methods[-1:] == [b"PUT"]:
                faults.drop_replies -= 1
                sink.transport.abort()
                return
            if side == "up" and (method := re.match(rb"([A-Z]+) /\S* HTTP/1.1\r\n", data)):
                methods.append(method[1])
                if faults.strip:
                    data = re.sub(rb"(?i)\r\n" + faults.strip + rb":[^\r]*", b"", data)
            if bad and side == faults.side and passed + len(data) > faults.after:
                sink.write(data[: faults.after - passed])
                await sink.drain()
                if faults.stall:
                    await asyncio.sleep(3600)
                return
            passed += len(data)
            sink.write(data)
            await sink.drain()
