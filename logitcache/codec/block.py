"""The container of a top-k block: header, byte planes and checksum, as FORMAT.md specifies them."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np

from logitcache.codec import byte_planes
from logitcache.errors import FormatVersionError, ShardCorruptError

# R rows; N entries of all rows, pinned ones excluded; E pinned ids.

VERSION = 1
STORED, EXACT = 1, 2  # flags: planes are not compressed; values are exact

_MAGIC = b"LK"
_LAYOUT = struct.Struct("<2s10B3I")
_CRC = struct.Struct("<I")
LEAST_BYTES = _LAYOUT.size + _CRC.size
_NONE = np.empty(0, np.uint8)


class Columns(NamedTuple):
    """The columns of a block: arrays of unsigned integers in the order of their planes; empty at width 0."""

    tail_R: np.ndarray
    last_R: np.ndarray
    counts_R: np.ndarray
    pins_4E: np.ndarray  # the pinned ids as uint32, byte by byte
    pin_ER: np.ndarray  # flat
    id_N: np.ndarray
    coarse_N: np.ndarray
    fine_N: np.ndarray
    residual_N: np.ndarray

    @property
    def pin_E(self) -> np.ndarray:
        return self.pins_4E.view(np.uint32)


class Header(NamedTuple):
    flags: int
    grid: int  # values are multiples of 2^-grid nat
    fine_bits: int  # steps = coarse << fine_bits + fine
    tail_width: int  # widths are in planes, one byte per value each
    count_width: int  # 0: every row has N / R entries
    id_width: int
    fine_width: int
    residual_width: int
    E: int  # pinned ids: each has one entry per row, not counted in N
    R: int
    N: int
    table_id: int  # 0: ids are stored without a table

    @property
    def exact(self) -> bool:
        return bool(self.flags & EXACT)

    @property
    def sane(self) -> bool:
        flags, grid, fine_bits, tail_width, count_width, id_width, fine_width, residual_width, _, R, N, _ = self
        if R == 0:
            return self[:-1] == (STORED, *[0] * 10)
        return (
            flags <= (STORED | EXACT)
            and grid <= 16
            and fine_bits <= 8
            and tail_width == (4 if flags & EXACT else 2)
            and count_width <= 4
            and 1 <= id_width <= 4
            and fine_width <= 2
            and residual_width <= (4 if flags & EXACT else 0)
            and R <= N
            and (count_width > 0 or N % R == 0)
        )

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """Number of integers and of planes of each column."""
        flags, _, _, value_width, count_width, id_width, fine_width, residual_width, E, R, N, _ = self
        return (
            (R, value_width),
            (R, 4 if flags & EXACT else 0),
            (R, count_width),
            (4 * E, 1),
            (E * R, value_width),
            (N, id_width),
            (N, 1),
            (N, fine_width),
            (N, residual_width),
        )


def seal(header: Header, columns: Columns, level: int) -> bytes:
    """Builds a block; its planes stay uncompressed if compression saves nothing."""
    shapes = zip(columns, header.planes, strict=True)
    parts = [part for column, (count, width) in shapes if count for part in byte_planes.split(column, width)]
    payload = byte_planes.compress(parts, level) if header.N else None
    if payload is None:
        header = header._replace(flags=header.flags | STORED)
        payload = b"".join(parts)
    body = _LAYOUT.pack(_MAGIC, VERSION, *header) + payload
    return body + _CRC.pack(zlib.crc32(body))


def read_header(block: bytes | memoryview) -> Header:
    """Reads the header. Of the rest of the block nothing is verified.

    Raises: ShardCorruptError; FormatVersionError for a later version.
    """
    view = memoryview(block)
    if len(view) < LEAST_BYTES:
        raise ShardCorruptError(f"a top-k block of {len(view)} bytes is shorter than its header")
    magic, version, *fields = _LAYOUT.unpack_from(view)
    if magic != _MAGIC:
        raise ShardCorruptError(f"a top-k block starts with {magic!r}, expected {_MAGIC!r}")
    if version > VERSION:
        raise FormatVersionError(
            f"a top-k block has version {version}, this logitcache reads versions up to {VERSION}; upgrade it"
        )
    header = Header(*fields)
    if version < 1 or not header.sane:
        raise ShardCorruptError("the fields in the header of a top-k block contradict each other")
    return header


def count_entries(data: np.ndarray, starts: np.ndarray) -> int:
    """Entries of all rows of several blocks, pinned ones included, as their headers say.

    Args:
        data: uint8, bytes with the blocks. starts: int64 [n], where they begin; each has a whole header.
    """
    fields = data[starts[:, None] + np.arange(11, 20)]  # E, R, N
    R, N = fields[:, 1:].copy().view("<u4").T.astype(np.int64)
    return int((N + fields[:, 0].astype(np.int64) * R).sum())


def unseal(block: bytes | memoryview) -> tuple[Header, Columns]:
    """Reads header and columns; checks the checksum, and all counts against the size of the block, before it allocates
    memory.

    Raises: as ``read_header``.
    """
    header, view = read_header(block), memoryview(block)
    if zlib.crc32(view[: -_CRC.size]) != _CRC.unpack_from(view, len(view) - _CRC.size)[0]:
        raise ShardCorruptError("a top-k block does not match its checksum")
    payload = view[_LAYOUT.size : -_CRC.size]
    shapes = header.planes
    size = sum([count * width for count, width in shapes])
    if not header.flags & STORED:
        payload = byte_planes.decompress(payload, size)
    elif len(payload) != size:
        raise ShardCorruptError(f"a top-k block has {len(payload)} bytes of planes, its header says {size}")
    raw, start, columns = np.frombuffer(payload, np.uint8), 0, []
    for count, width in shapes:
        if count and width:
            columns.append(byte_planes.join(raw, start, count, width))
            start += count * width
        else:
            columns.append(_NONE)
    return header, Columns._make(columns)
