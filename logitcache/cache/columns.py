"""Columns of many shards: the values of one shard look like a list, and become Python objects only when they are asked for."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np

Value = TypeVar("Value", str, int)

# N traces of all shards.


class Column(Sequence[Value]):
    """The values ``start`` to ``stop`` of a column. Equals a list of the same values. Pickled, columns share what is whole."""

    __slots__ = ("start", "stop", "whole")
    __hash__ = None  # type: ignore[assignment]  # it equals lists

    def __init__(self, whole: Any, start: int, stop: int) -> None:
        self.whole, self.start, self.stop = whole, start, stop

    def values(self, start: int, stop: int) -> list[Value]:
        """The values from ``start`` to ``stop`` of the whole column."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, i: int) -> Value: ...

    @overload
    def __getitem__(self, i: slice) -> list[Value]: ...

    def __getitem__(self, i: int | slice) -> Value | list[Value]:
        if isinstance(i, slice):
            return list(self)[i]
        place = range(self.start, self.stop)[i]
        return self.values(place, place + 1)[0]

    def __iter__(self) -> Iterator[Value]:
        return iter(self.values(self.start, self.stop))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, list | Column) else NotImplemented

    def __repr__(self) -> str:
        return repr(list(self))


class TraceIds(Column[str]):
    """Trace ids; ``whole`` is uint8 [N, 16]."""

    __slots__ = ()

    def values(self, start: int, stop: int) -> list[str]:
        digits = self.whole[start:stop].tobytes().hex()
        return [digits[i : i + 32] for i in range(0, len(digits), 32)]


class Texts(Column[str]):
    """Text; ``whole`` is an Arrow array of N strings."""

    __slots__ = ()

    def values(self, start: int, stop: int) -> list[str]:
        return self.whole.slice(start, stop - start).to_numpy(zero_copy_only=False).tolist()


class Numbers(Column[int]):
    """Whole numbers; ``whole`` is int32 [N]."""

    __slots__ = ()

    def values(self, start: int, stop: int) -> list[int]:
        return self.whole[start:stop].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.whole[self.start : self.stop], dtype)


def id_bytes(columns: Iterable[Sequence[str]]) -> np.ndarray:
    """Trace ids of several shards as uint8 [N, 16]."""
    parts = (c.whole[c.start : c.stop] if isinstance(c, TraceIds) else _bytes_of(c) for c in columns)
    return np.concatenate([np.empty((0, 16), np.uint8), *parts])


def _bytes_of(ids: Sequence[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(ids)), np.uint8).reshape(-1, 16)


def has_repeats(ids_N16: np.ndarray) -> bool:
    """Whether an id, uint8 [N, 16], occurs twice."""
    halves_N2 = ids_N16.view(np.uint64)
    if not _neighbours_agree(np.sort(halves_N2[:, :1], axis=0)):  # ids are hashes: the first half nearly always decides
        return False
    return _neighbours_agree(halves_N2[np.lexsort(halves_N2.T)])


def _neighbours_agree(rows: np.ndarray) -> bool:
    return bool((rows[1:] == rows[:-1]).all(axis=1).any())
