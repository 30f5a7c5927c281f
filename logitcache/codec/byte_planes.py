"""Byte planes: integers split into bytes by significance; zstd compresses each plane with statistics of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import zstandard

from logitcache.errors import ShardCorruptError

MAX_RATIO = 64  # we write no frame that expands further, so a damaged one cannot allocate more memory
_local = threading.local()  # threads cannot share zstandard's contexts, and a new one costs 10 us


def split(values: np.ndarray, width: int) -> list[bytes]:
    """Splits unsigned integers below 256^width into ``width`` planes, least significant first."""
    return [(values >> 8 * i).astype(np.uint8).tobytes() for i in range(width)]


def width_of(values: np.ndarray) -> int:
    """Bytes that the largest of the unsigned integers needs; 0 if all are 0."""
    return (int(values.max(initial=0)).bit_length() + 7) // 8


def join(data: np.ndarray, start: int, count: int, width: int) -> np.ndarray:
    """Joins the ``width`` planes at data[start:] into ``count`` uint8, uint16 or uint32 integers; none at width 0."""
    end = start + width * count
    if width < 2:
        return data[start:end]
    dtype = np.uint16 if width == 2 else np.uint32
    values = data[end - count : end].astype(dtype)
    while (end := end - count) > start:
        values <<= 8
        values |= data[end - count : end].astype(dtype)  # mixed dtypes take twice as long
    return values


def compress(planes: Sequence[bytes], level: int) -> bytes | None:
    """One zstd frame with one block per plane; None if it saves nothing, or if readers would refuse its ratio."""
    size = sum(map(len, planes))
    compressors = _local.__dict__.setdefault("compressors", {})
    if level not in compressors:
        # Explicit parameters: those that zstd chooses for such short input cost 1 byte per token more. With a frequency
        # table, matches below 6 bytes save nothing (2.5% larger for float32 teachers) and slow reading by 10%.
        parameters = zstandard.ZstdCompressionParameters.from_level(level, min_match=6)
        compressors[level] = zstandard.ZstdCompressor(compression_params=parameters)
    frame = compressors[level].compressobj(size=size)
    parts = []
    for plane in planes:
        parts += frame.compress(plane), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    data = b"".join([*parts, frame.flush()])
    return data if size / MAX_RATIO <= len(data) < size else None


def decompress(data: memoryview, size: int) -> bytes:
    """Decompresses the planes, ``size`` bytes.

    Raises: ShardCorruptError; if the frame declares another size, before memory is allocated.
    """
    try:
        found = zstandard.frame_content_size(data)
        if found != size or size > MAX_RATIO * len(data):
            raise ShardCorruptError(f"a top-k block of {len(data)} bytes expands to {found}, its header says {size}")
        if not hasattr(_local, "decompressor"):
            _local.decompressor = zstandard.ZstdDecompressor()
        return _local.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ShardCorruptError(f"a top-k block does not decompress: {error}") from error
