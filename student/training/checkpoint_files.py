"""The files of a checkpoint: synced and hashed once it is complete, compared with their hashes before it is used."""

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from logitcache.errors import ShardCorruptError
from logitcache.runtime.files import publish_json, read_json, sync_directory

RECORD, STATE_FILE, SPENT_FILE = "files.json", "trainer_state.json", "spent.json"
WEIGHTS = (".safetensors", ".bin")

# Without a record, one file of each of these patterns must be there.
_NEEDED = {"trainer state": (STATE_FILE,), "random state": ("rng_state*.pth",)}
_NEEDED |= {"model": ("*.safetensors", "*_model*.bin", "*/*"), "optimizer": ("optimizer.*", "*/*")}


def seal(folder: Path) -> None:
    """Syncs every file in `folder` to disk; then writes files.json, their sizes and SHA-256.

    Raises: OSError, WriteError.
    """
    (folder / RECORD).unlink(missing_ok=True)
    files = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        files[str(path.relative_to(folder))] = {"bytes": size, "sha256": digest}
    for directory in {folder / Path(name).parent for name in files}:
        sync_directory(directory)
    publish_json(folder / RECORD, {"files": files})


def checkpoint_damage(checkpoint: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, such as "optimizer.pt is empty"; None if it can be resumed from.

    A checkpoint of an earlier version has no record: it must have all its files, and each must look whole.

    Args:
        hashes: read the files completely. False: compare their sizes; without a record, read the trainer state only.
    Raises: OSError for a file that cannot be read.
    """
    try:
        record = _record(checkpoint)
        if record is not None:
            wrong = _first(_changed(checkpoint / name, expected, hashes) for name, expected in record.items())
        else:
            wrong = _incomplete(checkpoint) or _first(map(_malformed, _files(checkpoint))) if hashes else None
        return wrong or _no_state(checkpoint / STATE_FILE)
    except ShardCorruptError:
        return f"{RECORD} is damaged"


def weights_damage(folder: Path) -> str | None:
    """The same for the weights in `folder` alone, whether it is a checkpoint or not."""
    try:
        record = {n: e for n, e in (_record(folder) or {}).items() if Path(n).suffix in WEIGHTS}
    except ShardCorruptError:
        return f"{RECORD} is damaged"
    changed = _first(_changed(folder / name, expected, True) for name, expected in record.items())
    return changed or _first(map(_malformed, sorted(folder.glob("*.safetensors"))))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer state. Raises: OSError, ValueError."""
    state = json.loads((checkpoint / STATE_FILE).read_bytes())
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise ValueError(f"{checkpoint / STATE_FILE} has no global_step")
    return state


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _record(folder: Path) -> dict[str, dict[str, Any]] | None:
    """By file name. Raises: ShardCorruptError."""
    try:
        found = read_json(folder / RECORD).get("files")
    except FileNotFoundError:
        return None
    if isinstance(found, dict) and all(isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in found.values()):
        return found
    raise ShardCorruptError(f"{folder / RECORD} has no list of files")


def _first(found: Iterator[str | None]) -> str | None:
    return next(filter(None, found), None)


def _changed(path: Path, expected: dict[str, Any], hashes: bool) -> str | None:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["bytes"]:
                return f"{path.name} has {size:,} of {expected['bytes']:,} bytes" if size else f"{path.name} is empty"
            if hashes and hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{path.name} does not match its checksum"
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return f"{path.name} is missing"
    return None


def _incomplete(checkpoint: Path) -> str | None:
    missing = [what for what, patterns in _NEEDED.items() if not any(any(checkpoint.glob(p)) for p in patterns)]
    return f"its {missing[0]} is missing" if missing else None


def _malformed(path: Path) -> str | None:
    """The same without a record: JSON, safetensors and torch's zip files show whether they are whole."""
    if not path.stat().st_size:
        return f"{path.name} is empty"
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise ValueError(bad)
    except (ValueError, KeyError, TypeError, struct.error, zlib.error, zipfile.BadZipFile, EOFError, RuntimeError):
        return f"{path.name} is damaged"
    return None


def _check_safetensors(path: Path) -> None:
    """Raises: ValueError if the file is not as long as its header says."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= size - 8:
            raise ValueError("header")
        header = json.loads(file.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if not ends or size != 8 + length + max(ends):
        raise ValueError("data")


def _no_state(path: Path) -> str | None:
    try:
        read_state(path.parent)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except ValueError:
        return f"{path.name} is damaged"
    return None
