"""Options that several commands on caches share."""

import os
from pathlib import Path
from typing import Annotated

from logitcache.runtime.options import Option
from logitcache.runtime.units import parse_bytes
from logitcache.storage.location import Location

CachePath = Annotated[
    str | Location,
    Option("A cache: a directory, or a URL such as s3://bucket/cache.", metavar="CACHE", positional=True),
]
NewDirectory = Annotated[Path, Option("A new directory. It appears when the command has succeeded.")]
NewCache = Annotated[
    str | Location,
    Option("The new cache: a directory or a URL. It appears when the command has succeeded.", metavar="PATH|URL"),
]
Processes = Annotated[
    int | None, Option("Processes to run in parallel.", group="Speed and memory", default="one per core")
]

CACHE_DIR, CACHE_BYTES = "LOGITCACHE_CACHE_DIR", "LOGITCACHE_CACHE_BYTES"  # in the environment
_REMOTE = "Remote caches"  # a group of options


def use_mirrors(
    cache_dir: Annotated[
        Path | None,
        Option(
            "Where caches behind URLs are mirrored on this machine.",
            _REMOTE,
            default=f"{CACHE_DIR}, else ~/.cache/logitcache",
        ),
    ] = None,
    cache_bytes: Annotated[
        str | None,
        Option(
            "How much of them stays there, such as 20GB.",
            _REMOTE,
            metavar="SIZE",
            default=f"{CACHE_BYTES}, else 100GB or half of the free disk",
        ),
    ] = None,
) -> None:
    """Sets where this process and its children mirror caches behind URLs, and how many bytes of them they keep.

    Raises: InputError for text that is no size.
    """
    if cache_dir is not None:
        os.environ[CACHE_DIR] = str(Path(cache_dir).absolute())
    if cache_bytes is not None:
        os.environ[CACHE_BYTES] = str(parse_bytes(cache_bytes, "cache_bytes"))
