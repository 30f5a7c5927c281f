"""Files and directories written atomically, and JSON with a checksum."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from logitcache.errors import NotACacheError, ShardCorruptError, WriteError
from logitcache.runtime.locks import exclusive

LOCK, LOGS = ".lock", "logs"  # in every directory that a command writes
MAX_JSON = 16 << 20  # bytes; parsed, hostile JSON takes up to 25 times as much memory


def publish(path: Path, data: bytes | memoryview) -> None:
    """Writes ``path`` atomically: a ``.part`` file, fsync, rename, fsync of the directory.

    Raises: WriteError if it cannot be written; the ``.part`` file is removed.
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
        way_out = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "fix the cause"
        raise WriteError(
            f"{path}: {e.strerror or e} while writing {len(data):,} bytes; {way_out}, then run the same command to resume"
        ) from e


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; follows no link and waits for nothing.

    Raises: OSError; ELOOP for a link, and EINVAL for what is no file, such as a directory or a FIFO.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def sync_directory(path: Path) -> None:
    """Makes renames in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and rename anyway
            raise
    finally:
        os.close(descriptor)


def publish_json(path: Path, fields: dict[str, Any]) -> None:
    """Writes ``fields`` atomically as JSON, one per line; the last field, ``check``, is the SHA-256 of the bytes before it.

    Raises: WriteError, also for more bytes than ``read_json`` takes.
    """
    data = _render(fields)
    if len(data) > MAX_JSON:
        raise WriteError(f"{path}: {len(data):,} bytes, at most {MAX_JSON:,}; make smaller units with `unit_size`")
    publish(path, data)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what ``publish_json`` wrote.

    Raises: ShardCorruptError if it does not match its checksum or is not plain JSON: a key twice, a number that is not
        finite or does not fit in 64 bits, more than ``MAX_JSON`` bytes. OSError, as ``open_regular``.
    """
    with open_regular(path) as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise ShardCorruptError(f"{path}: more than {MAX_JSON:,} bytes")
    body = data[: data.rfind(b' "check"')]
    if data != body + _check(body):
        raise ShardCorruptError(
            f"{path}: does not match its checksum; restore it from a copy, or run `logitcache verify --repair`"
        )
    try:
        fields = json.loads(
            data.decode(),
            object_pairs_hook=_distinct,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as e:
        raise ShardCorruptError(f"{path}: is not plain JSON ({e})") from None
    del fields["check"]
    return fields


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError("a number does not fit in 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is not finite")
    return value


def _render(fields: dict[str, Any]) -> bytes:
    lines = (
        f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False, separators=(',', ':'))},\n" for k, v in fields.items()
    )
    body = ("{\n" + "".join(lines)).encode()
    return body + _check(body)


def _check(body: bytes) -> bytes:
    return f' "check": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def is_occupied(path: Path, own: Callable[[Path], bool] = lambda _: False) -> bool:
    """Whether ``path`` is a file, or a directory with an entry for which ``own`` is false.

    If several processes may start at once, call this before looking for the record of the directory: then the record
    that another process publishes meanwhile explains its entries.
    """
    return path.exists() and not (path.is_dir() and all(map(own, path.iterdir())))


def is_leftover(path: Path) -> bool:
    """Whether a command that ended before it wrote its record leaves such an entry: a lock, a log, a ``.part`` file."""
    return path.name.startswith(LOCK) or path.name == LOGS or path.suffix == ".part"


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Writes the directory ``out`` atomically: yields OUT.part, which is renamed when the block ends without an error.

    Raises: NotACacheError if ``out`` is not an empty directory; CacheBusyError if another process is writing it.
    """
    if is_occupied(out):
        raise NotACacheError(f"{out} is not an empty directory; give `out` a new directory")
    place = out.absolute()
    part, lock = place.with_name(place.name + ".part"), place.with_name(f".{place.name}.lock")
    with exclusive(lock, str(out)), contextlib.ExitStack() as stack:
        stack.callback(lock.unlink, missing_ok=True)
        shutil.rmtree(part, ignore_errors=True)  # left from a killed process
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        try:
            part.rename(place)
            sync_directory(place.parent)
        except OSError as e:
            raise WriteError(f"{out}: {e.strerror or e}; fix the cause, then run the same command again") from e
