"""Files that appear whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from logitcache.errors import NotACacheError, ShardCorruptError, WriteError
from logitcache.runtime.locks import exclusive

LOCK, LOGS = ".lock", "logs"  # in each directory that a command makes


def publish(path: Path, data: bytes | memoryview) -> None:
    """Writes ``path`` so that a reader, or a crash, sees all of it or nothing: ``.part``, fsync, rename, fsync.

    Raises: WriteError where the disk refuses; the part is removed.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        sync_directory(path.parent)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        way_out = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise WriteError(
            f"{path}: {e.strerror or e} while writing {len(data):,} bytes; {way_out} and run the same command again"
        ) from e


def sync_directory(path: Path) -> None:
    """Makes renames in ``path`` outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # what some network file systems say, and rename all the same
            raise
    finally:
        os.close(descriptor)


def publish_json(path: Path, fields: dict[str, Any]) -> None:
    """Publishes ``fields`` as JSON, one a line; the last line, ``check``, is the SHA-256 of all the lines before it."""
    publish(path, _render(fields))


def read_json(path: Path) -> dict[str, Any]:
    """Reads what ``publish_json`` wrote.

    Raises: ShardCorruptError if a byte differs.
    """
    data = path.read_bytes()
    body = data[: data.rfind(b' "check"')]
    if data == body + _check(body):
        fields = json.loads(data)
        del fields["check"]
        return fields
    raise ShardCorruptError(
        f"{path}: not the bytes that were written, by its checksum; restore it from a copy, "
        "or have `logitcache verify --repair` set its shard aside"
    )


def _render(fields: dict[str, Any]) -> bytes:
    lines = (
        f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False, separators=(',', ':'))},\n" for k, v in fields.items()
    )
    body = ("{\n" + "".join(lines)).encode()
    return body + _check(body)


def _check(body: bytes) -> bytes:
    return f' "check": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def taken(path: Path, own: Callable[[Path], bool] = lambda _: False) -> bool:
    """Whether ``path`` is a file, or a directory that holds something that is not the caller's ``own``.

    Where several processes may begin at once, ask before you look for your own record: what another one publishes
    meanwhile is then known by it.
    """
    return path.exists() and not (path.is_dir() and all(map(own, path.iterdir())))


def left_behind(path: Path) -> bool:
    """Whether it is what a command leaves that ended before it had a record of its own: a lock, a log, a part."""
    return path.name.startswith(LOCK) or path.name == LOGS or path.suffix == ".part"


@contextlib.contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A place to make the directory ``out`` in, which appears when the block ends without an error, and not before.

    Raises: NotACacheError where ``out`` holds something; CacheBusyError where another process makes it.
    """
    if taken(out):
        raise NotACacheError(f"{out} is not an empty directory; give `out` a new directory")
    place = out.absolute()
    part, lock = place.with_name(place.name + ".part"), place.with_name(f".{place.name}.lock")
    with exclusive(lock, str(out)), contextlib.ExitStack() as stack:
        stack.callback(lock.unlink, missing_ok=True)
        shutil.rmtree(part, ignore_errors=True)  # what a kill left
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        try:
            part.rename(place)
            sync_directory(place.parent)
        except OSError as e:
            raise WriteError(f"{out}: {e.strerror or e}; mend that and run the same command again") from e
