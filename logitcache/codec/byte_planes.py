"""Byte planes: integers split by significance, each plane one zstd block with statistics of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import zstandard

from logitcache.errors import ShardCorruptError

MAX_RATIO = 64  # no frame of ours expands further, so a damaged one cannot ask for more memory than this
_local = threading.local()  # zstandard's contexts are not shared between threads, and a fresh one costs 10 us


def split(values: np.ndarray, width: int) -> list[bytes]:
    """Unsigned integers below 256^width as `width` planes, least significant first."""
    return [(values >> 8 * i).astype(np.uint8).tobytes() for i in range(width)]


def width_of(values: np.ndarray) -> int:
    """Bytes the largest of the unsigned integers needs; 0 where all are 0."""
    return (int(values.max(initial=0)).bit_length() + 7) // 8


def join(data: np.ndarray, start: int, count: int, width: int) -> np.ndarray:
    """`count` unsigned integers from the `width` planes at data[start:]: uint8, uint16 or uint32; none at width 0."""
    end = start + width * count
    if width < 2:
        return data[start:end]
    dtype = np.uint16 if width == 2 else np.uint32
    values = data[end - count : end].astype(dtype)
    while (end := end - count) > start:
        values <<= 8
        values |= data[end - count : end].astype(dtype)  # mixed types take twice as long
    return values


def compress(planes: Sequence[bytes], level: int) -> bytes | None:
    """One zstd frame with a block to each plane; None where it saves nothing, or saves too much to be read back."""
    size = sum(map(len, planes))
    compressors = _local.__dict__.setdefault("compressors", {})
    if level not in compressors:
        # parameters named outright: zstd's own choice for so short an input costs 1 byte a token more; shorter matches
        # than 6 bytes save nothing beside a frequency table (float32 teachers: cost 2.5%) and slow reading by a tenth
        parameters = zstandard.ZstdCompressionParameters.from_level(level, min_match=6)
        compressors[level] = zstandard.ZstdCompressor(compression_params=parameters)
    frame = compressors[level].compressobj(size=size)
    parts = []
    for plane in planes:
        parts += frame.compress(plane), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    data = b"".join([*parts, frame.flush()])
    return data if size / MAX_RATIO <= len(data) < size else None


def decompress(data: memoryview, size: int) -> bytes:
    """The planes again, `size` bytes.

    Raises: ShardCorruptError, before any memory is taken where the frame holds another size.
    """
    try:
        found = zstandard.frame_content_size(data)
        if found != size or size > MAX_RATIO * len(data):
            raise ShardCorruptError(f"a top-k block of {len(data)} bytes holds {found}, its counts say {size}")
        if not hasattr(_local, "decompressor"):
            _local.decompressor = zstandard.ZstdDecompressor()
        return _local.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ShardCorruptError(f"a top-k block does not decompress: {error}") from error
