"""Makes a shard right by its checksum, whatever its bytes are."""

import hashlib
from pathlib import Path

from logitcache.cache import shard
from logitcache.runtime.files import publish, publish_json, read_json


def publish_forged(cache: Path, name: str, data: bytes) -> None:
    """Replaces the Arrow file of a shard, and gives its index the size and the checksum of the new one."""
    arrow = cache / shard.DIRECTORY / f"{name}.arrow"
    index = arrow.with_suffix(".json")
    fields = read_json(index) | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    publish(arrow, data)
    publish_json(index, fields)
