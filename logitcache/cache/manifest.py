"""The manifest of a cache: its identity, written once and compared with that of every later run."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import logitcache
from logitcache.cache.validate import MANIFEST, check, check_identity, reading
from logitcache.errors import CacheError, FormatVersionError, IdentityError, NotACacheError
from logitcache.identity import Identity, as_json, first_difference
from logitcache.runtime.files import LOCK, is_leftover, is_occupied, parse_json, publish, read_json, to_json_bytes
from logitcache.runtime.locks import exclusive

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
BACKUP = "manifest.backup.json"  # the same bytes, for a repair; caches of older versions have none


# Field of an identity -> the options that set it, for messages.
_SETTINGS = {
    "sampling": "`temperature`, `max_tokens`, `seed` or `sampling`",
    "engine_args": "`engine_args` or `template_args`",
}
_SETTINGS |= {
    name: f"`{name}`"
    for name in (
        "teacher", "dtype", "top_k", "top_p", "min_k", "prompt_logits", "reasoning_markers", "answer_regex",
        "pin_tokens", "exact",
    )
}  # fmt: skip


def read(cache: Path) -> Identity:
    """Reads the identity of the cache in the directory ``cache``.

    Raises: NotACacheError, FormatVersionError, ShardCorruptError, UnreadableError.
    """
    try:
        return read_file(cache / FILE_NAME)
    except FileNotFoundError:
        what = f"no {FILE_NAME} in it" if cache.exists() else "no such directory"
        way_out = f"create one with `logitcache generate ... --out {cache}`"
        if (cache / BACKUP).exists():
            way_out = f"`logitcache verify --repair {cache}` restores it from {BACKUP}"
        raise NotACacheError(f"{cache} is not a cache: {what}; {way_out}") from None
    except NotADirectoryError:
        raise NotACacheError(f"{cache} is not a cache: it is a file") from None


def read_file(path: Path) -> Identity:
    """Reads the identity from a manifest or from its second copy.

    Raises: FileNotFoundError, FormatVersionError, ShardCorruptError, UnreadableError.
    """
    with reading(path):
        return _identity(read_json(path), str(path))


def parse(data: bytes, path: str) -> Identity:
    """The identity in a manifest's bytes.

    Args:
        path: of the manifest, for messages.
    Raises: as ``read_file``.
    """
    return _identity(parse_json(data, path), path)


def _identity(found: dict[str, Any], path: str) -> Identity:
    if type(version := found.get("format")) is not int or version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: format version {version}, this logitcache {logitcache.__version__} reads "
            f"{FORMAT_VERSION}; upgrade with `pip install -U logitcache`"
        )
    try:
        check(found, MANIFEST, "the manifest")
        check_identity(found["identity"])
    except CacheError as e:
        raise type(e)(f"{path}: {e}") from None
    return Identity(**found["identity"])


def match(cache: Path, identity: Identity) -> Identity | None:
    """Compares the identity of an existing cache with ``identity`` and returns it; None if there is no cache yet.

    Raises: IdentityError naming the first field that differs, NotACacheError for a directory with other files.
    """
    foreign = is_occupied(cache, is_leftover)
    if (cache / FILE_NAME).exists():
        found = read(cache)
        refuse_difference(cache, found, identity)
        return found
    if foreign:
        raise NotACacheError(f"{cache} exists and is not a cache; give `out` an empty or new directory")
    return None


def create_or_match(cache: Path, identity: Identity) -> Identity:
    """Creates a cache of ``identity``, or compares it with an existing cache; returns the identity on disk.

    Raises: as ``match``.
    """
    if found := match(cache, identity):
        return found
    with exclusive(cache / LOCK, str(cache), wait=True):  # several workers may do this at once
        if not match(cache, identity):
            write(cache, identity)
    return read(cache)


def write(cache: Path, identity: Identity) -> None:
    """Writes the manifest of a new cache, and its second copy."""
    data = content(identity)
    for name in (FILE_NAME, BACKUP):
        publish(cache / name, data)


def content(identity: Identity) -> bytes:
    """The file of a new manifest."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"format": FORMAT_VERSION, "created": created, "logitcache": logitcache.__version__}
    return to_json_bytes(FILE_NAME, facts | {"identity": asdict(identity)})


def refuse_difference(cache: Path | str, found: Identity, wanted: Identity) -> None:
    """Raises: IdentityError naming the first field that differs, both values and the way out."""
    if difference := first_difference(asdict(found), as_json(asdict(wanted))):
        name, there, here = difference
        option = _SETTINGS.get(name.partition(".")[0])
        undo = f"use the same {option}" if option else "use what it was made with"
        if name == "derived":
            raise IdentityError(
                f"{cache} holds traces {', '.join(there) or 'as generated'}, this run would add traces "
                f"{', '.join(here) or 'as generated'}; give `out` a new directory"
            )
        raise IdentityError(
            f"{cache} was made with {name} = {there!r}, this run has {here!r}; {undo}, or give `out` a new directory"
        )
