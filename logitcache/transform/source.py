"""What slice, merge and split share: opening their source, choosing prompts, and the size of a cache."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache.cache.reader import Cache
from logitcache.cache.shard import ShardIndex
from logitcache.errors import InputError
from logitcache.storage.location import Location, is_inside
from logitcache.transform.rewrite import Piece


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The size of a cache."""

    traces: int = 0
    rows: int = 0  # top-k rows
    bytes: int = 0  # of shards

    @classmethod
    def of(cls, shards: Sequence[ShardIndex]) -> "CacheSize":
        return cls(sum(s.trace_count for s in shards), sum(s.row_count for s in shards), sum(s.bytes for s in shards))


def open_source(cache: Location, *outs: Location) -> Cache:
    """Opens a cache, after checking that no output lies inside it."""
    for out in outs:
        if is_inside(out, cache):
            raise InputError(f"{out} is inside the cache {cache}; give a directory outside it")
    return Cache.open(cache)


def prompt_position(prompt_id: str, purpose: bytes) -> float:
    """A number in [0, 1), uniform over prompts and determined by the id alone."""
    digest = hashlib.blake2b(prompt_id.encode(), digest_size=6, person=purpose).digest()
    return int.from_bytes(digest, "little") / 2**48


def pieces_of(cache: Cache, masks: Sequence[np.ndarray], graded: Sequence[Any] | None = None) -> list[Piece]:
    """The traces that boolean masks keep, one mask [traces of the shard] per shard; ``graded``: new verdicts per shard."""
    return [
        Piece(cache.files, cache.identity, index, np.flatnonzero(mask).tolist(), correct)
        for index, mask, correct in zip(cache.shards, masks, graded or [None] * len(masks), strict=True)
        if mask.any()
    ]
