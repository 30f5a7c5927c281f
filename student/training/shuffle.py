"""How a run mixes its traces: all of them, or some shards at a time where a cache is larger than its mirror."""

import math
import re
from collections.abc import Sequence

from logitcache.cache.reader import Cache
from logitcache.errors import StudentError
from logitcache.runtime.units import in_bytes

AUTO, FULL, SHARDS = "auto", "full", "shards"
WINDOW = 64  # shards: 1 GB of a mirror at 16 MB a shard


def choose_window(shuffle: str, caches: Sequence[Cache], recorded: str | None = None) -> int | None:
    """Shards that a run mixes at a time; None: all.

    Args:
        shuffle: the option of that name.
        recorded: `window_name` of the run that is resumed, which `auto` repeats; None: a new run.
    Raises: StudentError for another `shuffle`.
    """
    if shuffle == AUTO and recorded is None:
        return _fitting(caches) if _mixed_bytes(math.inf, _sizes(caches)) > _most(caches) else None
    text = recorded or "" if shuffle == AUTO else shuffle
    if text == FULL:
        return None
    found = re.fullmatch(rf"{SHARDS}(?::([1-9]\d*))?", text)
    if found is None:
        raise StudentError(
            f"`shuffle` {text}: choose {AUTO}, {FULL}, {SHARDS} or {SHARDS}:N, such as {SHARDS}:{WINDOW}"
        )
    return int(found[1] or WINDOW)


def window_name(window: int | None) -> str:
    """How run.json names it: ``full``, ``shards:64``."""
    return FULL if window is None else f"{SHARDS}:{window}"


def describe_order(window: int | None, caches: Sequence[Cache]) -> list[str]:
    """What a user should know of the order: lines to print, none where all traces are mixed and stay on this disk."""
    lines = [f"order of traces: mixed {window:,} shards at a time (`shuffle` {window_name(window)})"] if window else []
    sizes, most = _sizes(caches), _most(caches)
    needed = _mixed_bytes(math.inf if window is None else window, sizes)
    if needed > most and window != 1:
        what = "the caches have" if window is None else f"{window:,} shards have"
        lines.append(
            f"{what} {in_bytes(needed)}, mirrors {in_bytes(most)}: shards will be downloaded several times an epoch; "
            f"raise `cache_bytes`, or use `shuffle` {window_name(_fitting(caches))}"
        )
    return lines


# Of the caches behind URLs. All mirrors on a machine share one limit of bytes.


def _most(caches: Sequence[Cache]) -> float:
    return min((cache.mirror.room.most for cache in caches if cache.mirror is not None), default=math.inf)


def _sizes(caches: Sequence[Cache]) -> list[tuple[int, int]]:
    """Shards of each cache, and their bytes."""
    return [
        (len(cache.shards), sum(shard.bytes for shard in cache.shards)) for cache in caches if cache.mirror is not None
    ]


def _mixed_bytes(window: float, sizes: list[tuple[int, int]]) -> float:
    """At most what the shards have that are mixed at a time: so many of each cache, as with shares."""
    return sum(size * min(1, window / max(1, count)) for count, size in sizes)


def _fitting(caches: Sequence[Cache]) -> int:
    """Shards, at most WINDOW, that fit half of the mirrors; the other half is for shards fetched ahead."""
    sizes, most = _sizes(caches), _most(caches)
    return next((n for n in range(WINDOW, 1, -1) if _mixed_bytes(n, sizes) <= most / 2), 1)
