"""Options that several commands on caches share."""

from pathlib import Path
from typing import Annotated

from logitcache.runtime.options import Option

CachePath = Annotated[Path, Option("A cache.", metavar="CACHE", positional=True)]
NewDirectory = Annotated[Path, Option("A new directory. It appears when the command has succeeded.")]
Processes = Annotated[
    int | None, Option("Processes to run in parallel.", group="Speed and memory", default="one per core")
]
