"""Orders a vocabulary by frequency; the top-k blocks of a shard share one order.

Most top-k ids of a teacher are among the same few thousand. If ids are ranked by frequency, the sorted ranks of a row
lie close together, which saves 15% of a block at k = 64. The order is coarse on purpose: ids of similar frequency share a
class and are ordered by id inside it. So a table takes about one byte per three ids, and ids never seen take nothing.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import zstandard

from logitcache.errors import CacheError, ShardCorruptError

MAX_VOCAB = 1 << 24  # limits the memory that a damaged table can allocate; real vocabularies are below 2^19


@dataclass(frozen=True, eq=False)
class FrequencyTable:
    """A frequency class per id; an id's rank is its place in the order of (class, id).

    class_V: uint8 [V], 0 for the most frequent ids.
    """

    class_V: np.ndarray

    @cached_property
    def table_id(self) -> int:
        """CRC-32 of the classes; never 0, which means "no table" in a block."""
        return zlib.crc32(self.class_V.tobytes()) or 1

    @cached_property
    def id_of_rank(self) -> np.ndarray:
        """int32 [V]."""
        return np.argsort(self.class_V, kind="stable").astype(np.int32)

    @cached_property
    def rank_of_id(self) -> np.ndarray:
        """int64 [V]."""
        rank_V = np.empty(len(self.class_V), np.int64)
        rank_V[self.id_of_rank] = np.arange(len(rank_V))
        return rank_V

    def to_bytes(self) -> bytes:
        """The classes as one zstd frame."""
        return zstandard.ZstdCompressor(level=15, write_checksum=True).compress(self.class_V.tobytes())

    @staticmethod
    def from_bytes(data: bytes) -> FrequencyTable:
        """Reads what ``to_bytes`` wrote.

        Raises: ShardCorruptError for other bytes.
        """
        try:
            size = zstandard.frame_content_size(data)
            if not 0 < size <= MAX_VOCAB:
                raise ShardCorruptError(f"a frequency table declares {size} ids, expected 1 to {MAX_VOCAB}")
            class_V = np.frombuffer(zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False), np.uint8)
        except zstandard.ZstdError as error:
            raise ShardCorruptError(f"a frequency table does not decompress: {error}") from error
        return FrequencyTable(class_V)


def build_table(count_V: np.ndarray) -> FrequencyTable:
    """Builds a table with four classes per octave of frequency; ids that were never seen get a class too.

    Args:
        count_V: integers [V], how often each id occurs in the rows that will share the table.
    """
    if not 0 < len(count_V) <= MAX_VOCAB:
        raise CacheError(f"a frequency table for {len(count_V)} ids, expected 1 to {MAX_VOCAB}")
    octave_V = np.log2(np.maximum(count_V, 0.5) / max(1, int(np.max(count_V))))
    return FrequencyTable(np.minimum(np.rint(-4 * octave_V), 255).astype(np.uint8))
