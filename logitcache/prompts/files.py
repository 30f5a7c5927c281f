"""Rows of files: JSON lines, a JSON array, Parquet; plain or compressed."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from logitcache.errors import PromptsError, first_line
from logitcache.prompts.values import kind_of

Rows = Iterator[tuple[str, dict[str, Any]]]  # each row with its place in the source, for messages
COMPRESSED = (".gz", ".zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


def json_rows(source: str) -> Rows:
    """Rows of a file of JSON lines, or of a file that is one JSON array or object."""
    path, number = Path(source), 0
    try:
        with _opened(path) as file:
            lines = enumerate(file, 1)
            for number, line in lines:
                if number == 1:
                    line = _without_mark(path, line)
                if not line.strip():
                    continue
                # Only an array begins with a bracket, and only an object of several lines with a brace alone.
                if line.lstrip().startswith(b"[") or line.strip() == b"{":
                    yield from _values(path, b"".join([line, *(rest for _, rest in lines)]), number)
                    return
                yield _line(path, number, line)
                break
            for number, line in lines:
                if line.strip():
                    yield _line(path, number, line)
    except OSError as e:
        raise PromptsError(
            f"{path}: cannot be read from line {number + 1} on ({e.strerror or e}); copy it again"
        ) from None


def _opened(path: Path) -> BinaryIO:
    """A file as it was before it was compressed; its first bytes say how, since a download may have unpacked it."""
    with path.open("rb") as file:
        start = file.read(4)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if kind is None:
        return path.open("rb")
    import pyarrow as pa

    stream: Any = pa.CompressedInputStream(pa.OSFile(str(path)), kind)  # reports a file that is cut short
    return io.BufferedReader(stream)


def _without_mark(path: Path, line: bytes) -> bytes:
    if line.startswith(_UTF16_MARKS):
        raise PromptsError(f"{path}: is UTF-16 text; write it as UTF-8")
    return line.removeprefix(_UTF8_MARK)


def _line(path: Path, number: int, line: bytes) -> tuple[str, dict[str, Any]]:
    place = f"{path}:{number}"
    try:
        return place, _checked(place, _DECODER.decode(line.decode()))
    except (ValueError, RecursionError) as e:  # JSON and UTF-8 errors alike
        raise PromptsError(f"{place}: not valid JSON ({e}); fix or remove the line") from None


def _checked(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise PromptsError(f"{place}: {kind_of(row)}, expected an object with `prompt` or `messages`")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_SPACE = re.compile(r"[ \t\r\n]*")


def _values(path: Path, data: bytes, first: int) -> Rows:
    """The rows of a JSON array, or the row that is one JSON object, each with its line.

    Args:
        first: the line of the file where ``data`` begins.
    """
    line, seen = first, 0
    try:
        text = data.decode()
        for start, value in _elements(text):
            line, seen = line + text.count("\n", seen, start), start
            place = f"{path}:{line}"
            yield place, _checked(place, value)
    except (ValueError, RecursionError) as e:
        line = first + e.lineno - 1 if isinstance(e, json.JSONDecodeError) else line
        raise PromptsError(f"{path}:{line}: not valid JSON ({e}); fix the file") from None


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, or the one object, each with its position. Raises: ValueError."""
    at = _after_space(text, 0)
    if text[at] == "{":
        yield at, _DECODER.decode(text)
        return
    at = _after_space(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        value, end = _DECODER.raw_decode(text, at)
        yield at, value
        at = _after_space(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if (end := _after_space(text, at + 1)) < len(text):
        raise json.JSONDecodeError("Extra data behind the array", text, end)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()


def parquet_rows(source: str) -> Rows:
    """Rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, number = Path(source), 0
    try:
        file = pq.ParquetFile(path)
        _check_names(source, file.schema_arrow.names)
        for batch in file.iter_batches():
            for row in table_rows(batch):
                yield f"{path} row {number}", row
                number += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError) as e:
        raise PromptsError(
            f"{path}: damaged Parquet file, cannot be read from row {number} on ({first_line(e)}); write it again"
        ) from None


def _check_names(source: str, names: list[str]) -> None:
    if repeated := [name for name in names if names.count(name) > 1]:
        raise PromptsError(f"{source}: two columns are called {repeated[0]!r}; rename one")


def table_rows(table: Any) -> list[dict[str, Any]]:
    """Rows of an Arrow table or batch; maps become objects. Raises: ValueError."""
    return table.to_pylist(maps_as_pydicts="strict")
