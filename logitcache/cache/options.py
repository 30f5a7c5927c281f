"""Options that several commands on caches share."""

from pathlib import Path
from typing import Annotated

from logitcache.runtime.options import Option
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
