"""What slice, merge and split share: opening a source, where its prompts go, and what a cache holds."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.cache.reader import Cache
from logitcache.cache.shard import ShardIndex
from logitcache.errors import InputError
from logitcache.transform.rewrite import Piece


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What a cache holds."""

    traces: int = 0
    rows: int = 0  # top-k rows
    bytes: int = 0  # of shards

    @classmethod
    def of(cls, shards: Sequence[ShardIndex]) -> "CacheSize":
        return cls(sum(s.rows for s in shards), sum(s.taught_rows for s in shards), sum(s.bytes for s in shards))

    def __str__(self) -> str:
        return f"{self.traces:,} traces, {self.rows:,} rows, {self.bytes:,} bytes"


def open_source(cache: Path, *outs: Path) -> Cache:
    """Opens a cache that nothing is to be written into."""
    for out in outs:
        if cache.resolve() in (out.resolve(), *out.resolve().parents):
            raise InputError(f"`out` {out} lies in {cache}, which stays as it is; give a directory outside it")
    return Cache.open(cache)


def prompt_position(prompt_id: str, purpose: bytes) -> float:
    """Where a prompt stands in [0, 1), evenly and by its id alone."""
    digest = hashlib.blake2b(prompt_id.encode(), digest_size=6, person=purpose).digest()
    return int.from_bytes(digest, "little") / 2**48


def pieces_of(cache: Cache, masks: Sequence[np.ndarray], judged: Sequence[Any] | None = None) -> list[Piece]:
    return [
        Piece(cache.path, index, np.flatnonzero(mask).tolist(), correct)
        for index, mask, correct in zip(cache.shards, masks, judged or [None] * len(masks), strict=True)
        if mask.any()
    ]
