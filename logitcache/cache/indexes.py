"""The indexes of a cache's shards."""

from pathlib import Path

from logitcache.cache.shard import ShardIndex, read_index


def read_indexes(directory: Path) -> list[ShardIndex]:
    """Reads the indexes in CACHE/shards, in the order of their names.

    Raises: ShardCorruptError, FormatVersionError, UnreadableError.
    """
    return [read_index(path) for path in sorted(directory.glob("unit-*.json"))]
