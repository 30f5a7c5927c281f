"""Options are declared once, where they are used: as fields of a dataclass or keywords of a function.

    top_k: Annotated[int, Option("Token ids stored per row.", group="Rows")] = 64

Name, type and default are Python's own. The command line, ``--config`` files and ``--help`` are made from them
(`logitcache.commands.builder`), so this is the only place that knows an option.
"""

from dataclasses import dataclass, fields
from typing import Any

EVERYDAY = "Options"  # the group that --help shows first
LAST_GROUPS = ("Engine", "Shards and workers", "Output")  # those that it shows last


@dataclass(frozen=True, slots=True)
class Option:
    """What the command line says of an option besides its name, type and default."""

    help: str
    group: str = EVERYDAY  # the panel of --help that lists it
    flag: str | None = None  # None: the name with dashes, --top-k for top_k
    alias: str | None = None  # a second flag, such as --lr
    metavar: str | None = None  # None: from the type
    default: str | None = None  # what --help says where the default is None or is decided later
    positional: bool = False  # an argument instead of a flag


def values_of(kind: type, source: Any) -> dict[str, Any]:
    """The values that ``source`` has for the fields of the dataclass ``kind``."""
    return {field.name: getattr(source, field.name) for field in fields(kind)}
