"""Files and directories written atomically, and JSON with a checksum.

What is being written stands beside its place under a hidden name that ends with PART. A file of that name, and a directory
of that name with the file MARK in it, is ours: a killed process left it, and the next one removes it. Nothing else is ever
removed.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from logitcache.errors import NotACacheError, ShardCorruptError, WriteError
from logitcache.runtime.locks import exclusive, is_lock
from logitcache.runtime.regular_files import is_regular, open_regular

LOCK, LOGS = ".lock", "logs"  # in every directory that a command writes
PART = ".logitcache-part"
MARK = "made-by-logitcache"
_CONTENT = "content"  # beside the mark: the directory that is being written
_CLAIM = re.compile(rf"\{LOCK}-\d+-of-\d+\.json")  # of a worker that fills a cache
_LOG = re.compile(r"[a-z]+-\d{8}T\d{6}Z-[0-9a-f]{6}-\d+\.(log|json)")  # of a session
MAX_JSON = 16 << 20  # bytes; parsed, hostile JSON takes up to 25 times as much memory


def part_of(path: Path) -> Path:
    """Where ``path`` stands until it is complete."""
    return path.with_name(f".{path.name}{PART}")


def is_part(path: Path) -> bool:
    """Whether ``path`` is a file of ours that is not complete."""
    return path.name.startswith(".") and path.name.endswith(PART) and is_regular(path)


def remove_parts(directory: Path, mine: Callable[[str], bool] = lambda _: True) -> None:
    """Removes files that killed processes left unfinished.

    Args:
        mine: whether to remove the part of the file with this name.
    """
    for path in directory.glob(f".*{PART}"):
        if is_part(path) and mine(path.name.removeprefix(".").removesuffix(PART)):
            path.unlink(missing_ok=True)


def publish(path: Path, data: bytes | memoryview) -> None:
    """Writes ``path`` atomically: a hidden file beside it, fsync, rename, fsync of the directory.

    Raises: WriteError if it cannot be written; the hidden file is removed.
    """
    with _written(path, part_of(path), data) as part:
        part.rename(path)


def create(path: Path, data: bytes | memoryview) -> bool:
    """Writes ``path`` as ``publish`` does, but never over another file. False if one is there, which stays as it is.

    Raises: WriteError.
    """
    unique = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PART}")  # another process may write the same path
    made = True
    with _written(path, unique, data) as part:
        try:
            os.link(part, path)
            part.unlink()
        except FileExistsError:
            made = False
            part.unlink()
        except OSError:  # a file system without hard links
            made = not os.path.lexists(path)
            part.rename(path) if made else part.unlink()
    return made


@contextlib.contextmanager
def _written(path: Path, part: Path, data: bytes | memoryview) -> Iterator[Path]:
    """Yields the hidden file ``part`` with the data, for the block to put it at ``path``.

    Raises: WriteError if that fails, in the block too; the hidden file is removed.
    """
    made = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_part(part):  # left from a killed process
            part.unlink(missing_ok=True)
        with part.open("xb") as file:
            made = True
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
        sync_directory(path.parent)
    except OSError as e:
        if made:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free some space" if full else f"move {part} away" if os.path.lexists(part) else "fix the cause"
        raise WriteError(
            f"{path}: {e.strerror or e} while writing {len(data):,} bytes; {way_out}, then run the same command to resume"
        ) from e


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
    publish(path, to_json_bytes(str(path), fields))


def to_json_bytes(name: str, fields: dict[str, Any]) -> bytes:
    """The bytes that ``publish_json`` writes.

    Args:
        name: of the file, for the message.
    Raises: WriteError for more bytes than ``read_json`` takes.
    """
    data = json_bytes(fields)
    if len(data) > MAX_JSON:
        raise WriteError(f"{name}: {len(data):,} bytes, at most {MAX_JSON:,}; make smaller units with `unit_size`")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Reads what ``publish_json`` wrote.

    Raises: ShardCorruptError if it does not match its checksum or is not plain JSON: a key twice, a number that is not
        finite, more than ``MAX_JSON`` bytes. OSError, as ``open_regular``.
    """
    with open_regular(path) as file:
        return parse_json(file.read(MAX_JSON + 1), str(path))


def parse_json(data: bytes, path: str) -> dict[str, Any]:
    """The fields of a file that ``publish_json`` wrote.

    Args:
        path: of the file, for messages.
    Raises: ShardCorruptError, as ``read_json``.
    """
    if len(data) > MAX_JSON:
        raise ShardCorruptError(f"{path}: more than {MAX_JSON:,} bytes")
    body = data[: data.rfind(b' "check"')]
    if data != body + _check(body):
        raise ShardCorruptError(
            f"{path}: does not match its checksum; restore it from a copy, or run `logitcache verify --repair`"
        )
    try:
        fields = plain_json(data.decode())
    except (ValueError, RecursionError) as e:
        raise ShardCorruptError(f"{path}: is not plain JSON ({e})") from None
    del fields["check"]
    return fields


def plain_json(text: str) -> Any:
    """Raises: ValueError or RecursionError for JSON with a key twice or a number that is not finite, and for other text."""
    return json.loads(text, object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_finite)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is not finite")
    return value


def json_bytes(fields: dict[str, Any]) -> bytes:
    """What ``publish_json`` writes."""
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
    """Whether a command that ended before it wrote its record leaves such an entry: a lock, logs, an unfinished file.

    True also for an entry that another process has removed or completed meanwhile.
    """
    if path.name == LOGS and path.is_dir() and not path.is_symlink():
        return all(is_part(each) or _is_log(each) or _is_gone(each) for each in path.iterdir())
    if _CLAIM.fullmatch(path.name) and is_regular(path):
        return True
    return is_part(path) or (path.name.startswith(LOCK) and is_lock(path)) or _is_gone(path)


def _is_log(path: Path) -> bool:
    return _LOG.fullmatch(path.name) is not None and is_regular(path)


def _is_gone(path: Path) -> bool:
    return not os.path.lexists(path)


@contextlib.contextmanager
def atomic_directory(out: Path, *, resume: bool = False) -> Iterator[Path]:
    """Writes the directory ``out`` atomically: yields a directory that takes its place when the block ends without an error.

    Args:
        out: if it is a link to an empty directory, that one is filled.
        resume: yield what a killed or failed call left, and keep it after an error; otherwise begin anew.
    Raises: NotACacheError if ``out`` is not an empty directory; CacheBusyError if another process is writing it; WriteError.
    """
    if is_occupied(out):
        raise NotACacheError(f"{out} is not an empty directory; give `out` a new directory")
    place = Path(os.path.realpath(out))
    if os.path.ismount(place):  # nothing can be renamed to it
        raise WriteError(f"{out} is the root of a file system; give `out` a directory below it")
    with scratch_directory(place, str(out), resume=resume) as part:
        yield part
        try:
            if place.exists():
                shutil.copymode(place, part)
            part.rename(place)
            sync_directory(place.parent)
        except OSError as e:
            raise WriteError(f"{out}: {e.strerror or e}; fix the cause, then run the same command again") from e


@contextlib.contextmanager
def scratch_directory(place: Path, what: str, *, resume: bool = False) -> Iterator[Path]:
    """A directory beside ``place`` for the time of the block.

    Args:
        what: the name of what is made in it, for messages.
        resume: as in ``atomic_directory``.
    Raises: CacheBusyError if another process makes it; WriteError.
    """
    work, lock = part_of(place), place.with_name(f".{place.name}.logitcache-lock")
    with exclusive(lock, what), contextlib.ExitStack() as stack:
        stack.callback(lock.unlink, missing_ok=True)
        part = _begin(work, resume)
        stack.callback(_remove, work, keep=resume)
        yield part


def _begin(work: Path, resume: bool) -> Path:
    """Makes the marked directory ``work`` and returns the one in it to write to. Raises: WriteError where others stand."""
    try:
        if not resume:
            _remove(work)
        if not _is_marked(work):
            if os.path.lexists(work):
                work.rmdir()  # an empty one: killed before it was marked
            work.mkdir(parents=True)
            (work / MARK).touch()
        (work / _CONTENT).mkdir(exist_ok=resume)
    except OSError as e:
        raise WriteError(f"{work}: {e.strerror}; move it away or fix the cause, then run the same command again") from e
    return work / _CONTENT


def _is_marked(work: Path) -> bool:
    return not work.is_symlink() and is_regular(work / MARK)


def _remove(work: Path, keep: bool = False) -> None:
    """Removes a directory with our mark, the mark last: a process that is killed meanwhile leaves a marked one.

    Args:
        keep: keep it if it has content.
    """
    content = work / _CONTENT
    if not _is_marked(work) or (keep and content.exists() and any(content.iterdir())):
        return
    shutil.rmtree(content, ignore_errors=True)
    if not content.exists():
        with contextlib.suppress(OSError):
            (work / MARK).unlink()
            work.rmdir()
