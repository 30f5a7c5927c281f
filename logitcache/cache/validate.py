"""Types and bounds of every field of a manifest and of an index. FORMAT.md lists them."""

import errno
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.errors import FormatVersionError, ShardCorruptError, UnreadableError
from logitcache.sections import SPANS

MAX_VOCAB = 1 << 24
_MAX_PINS = 255
_MAX_LEVELS = 16  # of nested lists and objects in a field whose content is free
_INT32 = 2**31 - 1
_INT63 = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be, in words, and whether a value is that."""

    what: str
    holds: Callable[[Any], bool]
    optional: bool = False  # the field MAY be missing


def whole(least: int, most: int) -> Rule:
    return Rule(f"a whole number from {least:,} to {most:,}", lambda v: type(v) is int and least <= v <= most)


def null_or(rule: Rule) -> Rule:
    return Rule(f"{rule.what}, or null", lambda v: v is None or rule.holds(v))


def list_of(rule: Rule, holds: Callable[[list[Any]], bool], *, optional: bool = False) -> Rule:
    """A list; ``holds`` checks all values at once, since a cache has a million of them."""
    return Rule(f"a list, each {rule.what}", lambda v: isinstance(v, list) and holds(v), optional)


def _are(kind: type, values: list[Any]) -> bool:
    return set(map(type, values)) <= {kind}


def counts(*names: str) -> Rule:
    """An object with exactly these names, and a count for each."""
    count = whole(0, _INT63)
    return Rule(
        f"an object with counts of {', '.join(names)}",
        lambda v: isinstance(v, dict) and v.keys() == set(names) and all(map(count.holds, v.values())),
    )


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _is_hexadecimal(text: str) -> bool:
    try:
        return bytes.fromhex(text).hex() == text  # four times as fast as a regular expression
    except ValueError:
        return False


def is_free(value: Any, levels: int, most: float = math.inf) -> bool:
    """Whether a JSON value has at most that many levels of lists and objects, no integers beyond ``most`` and its negative,
    and only text that UTF-8 can encode."""
    if isinstance(value, dict | list):
        keys, inner = (value.keys(), value.values()) if isinstance(value, dict) else ((), value)
        return levels > 0 and all(map(_is_text, keys)) and all(is_free(v, levels - 1, most) for v in inner)
    if isinstance(value, int):
        return -most <= value <= most
    return _is_text(value) if isinstance(value, str) else True


TEXT = Rule("text", _is_text)
TEXTS = list_of(TEXT, lambda v: _are(str, v) and _is_text("".join(v)))
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
FREE = Rule(
    f"an object of at most {_MAX_LEVELS} levels, its whole numbers of 64 bits",
    lambda v: isinstance(v, dict) and is_free(v, _MAX_LEVELS, _INT63),
)
SHARE = Rule("a number above 0 and at most 1", lambda v: type(v) in (int, float) and 0 < v <= 1)
SUM = Rule("a number of at least 0", lambda v: type(v) in (int, float) and v >= 0 and math.isfinite(v))
MARKERS = Rule(
    "two texts that are not empty", lambda v: isinstance(v, list) and len(v) == 2 and all(_is_text(m) and m for m in v)
)
PINS = Rule(
    f"a list of at most {_MAX_PINS} ids, each once",
    lambda v: isinstance(v, list) and len(v) <= _MAX_PINS and all(map(_ID.holds, v)) and len(set(v)) == len(v),
    optional=True,
)
_ID = whole(0, MAX_VOCAB - 1)


def _matching(what: str, pattern: str) -> Rule:
    matches = re.compile(pattern, re.ASCII).fullmatch
    return Rule(what, lambda v: isinstance(v, str) and matches(v) is not None)


TRACE_ID = _matching("32 hexadecimal digits", "[0-9a-f]{32}")
UNIT = _matching("unit- and 6 digits or more", r"unit-[0-9]{6,18}")
COMPACTED = _matching("indexes- and 6 digits or more", r"indexes-[0-9]{6,18}")

MANIFEST = {"format": whole(1, _INT32), "created": TEXT, "logitcache": TEXT, "identity": FREE}
IDENTITY = {
    "teacher": TEXT,
    "teacher_revision": TEXT,
    "tokenizer_hash": TEXT,
    "chat_template_hash": null_or(TEXT),
    "vocab_size": whole(1, MAX_VOCAB),
    "top_k": whole(1, MAX_VOCAB),
    "top_p": null_or(SHARE),
    "min_k": whole(1, MAX_VOCAB),
    "prompt_logits": FLAG,
    "sampling": FREE,
    "reasoning_markers": null_or(MARKERS),
    "answer_regex": null_or(TEXT),
    "dtype": TEXT,
    "engine": TEXT,
    "engine_args": FREE,
    "pin_tokens": PINS,
    "exact": Rule(FLAG.what, FLAG.holds, optional=True),
    "derived": Rule(TEXTS.what, TEXTS.holds, optional=True),
}
_SHA256 = _matching("64 hexadecimal digits", "[0-9a-f]{64}")
COMPACT = {
    "format": whole(1, _INT32),
    "name": COMPACTED,
    "bytes": whole(1, _INT63),
    "sha256": _SHA256,
    "shards": whole(1, _INT32),
    "traces": whole(1, _INT63),
    "highest": whole(0, 10**18 - 1),
}
INDEX = {
    "format": whole(1, _INT32),
    "name": UNIT,
    "rows": whole(1, _INT32),
    "bytes": whole(1, _INT63),
    "sha256": _SHA256,
    "trace_ids": list_of(TRACE_ID, lambda v: _are(str, v) and set(map(len, v)) == {32} and _is_hexadecimal("".join(v))),
    "prompt_ids": TEXTS,
    "token_lengths": list_of(
        whole(0, _INT32), lambda v: _are(int, v) and 0 <= min(v, default=0) <= max(v, default=0) <= _INT32
    ),
    "taught_rows": whole(0, _INT63),
    "entries": whole(0, _INT63),
    "block_bytes": whole(0, _INT63),
    "tail_mass": SUM,
    "section_tokens": counts(*SPANS),
    "verdicts": counts("correct", "incorrect"),
    "provenance": FREE,
}


def check(found: dict[str, Any], rules: dict[str, Rule], what: str) -> None:
    """Compares the fields of ``what``, such as an index, with their rules.

    Raises: FormatVersionError for a field without a rule: newer versions write it; ShardCorruptError for a missing field
        and for a value of another type or outside its bounds.
    """
    if unknown := sorted(found.keys() - rules.keys()):
        raise FormatVersionError(f"written by a newer logitcache (fields {', '.join(unknown)} of {what}); upgrade")
    for name, rule in rules.items():
        if name not in found:
            if not rule.optional:
                raise ShardCorruptError(f"{what} has no {name}")
        elif not rule.holds(found[name]):
            raise ShardCorruptError(f"{name} of {what} is not {rule.what}")


def check_identity(found: dict[str, Any]) -> None:
    """Raises: as ``check``."""
    check(found, IDENTITY, "the identity")
    if any(pin >= found["vocab_size"] for pin in found.get("pin_tokens", [])):
        raise ShardCorruptError("pin_tokens of the identity are not below vocab_size")


def check_index(found: dict[str, Any]) -> None:
    """Raises: as ``check``, and ShardCorruptError for fields that contradict each other."""
    check(found, INDEX, "the index")
    rows, lengths = found["rows"], found["token_lengths"]
    for name in ("trace_ids", "prompt_ids", "token_lengths"):
        if len(found[name]) != rows:
            raise ShardCorruptError(f"{name} of the index has {len(found[name])} values for {rows} traces")
    if len(set(found["trace_ids"])) < rows:
        raise ShardCorruptError("trace_ids of the index names a trace twice")
    for name, most in (
        ("taught_rows", sum(lengths)),
        ("tail_mass", found["taught_rows"]),
        ("block_bytes", found["bytes"]),
    ):
        if found[name] > most:
            raise ShardCorruptError(f"{name} of the index is {found[name]}, at most {most} are possible")
    if sum(found["section_tokens"].values()) != sum(lengths) or sum(found["verdicts"].values()) > rows:
        raise ShardCorruptError("section_tokens or verdicts of the index do not add up")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """What keeps a file from being read is not damage: such a file is never moved.

    Raises: UnreadableError; FileNotFoundError and NotADirectoryError as they are.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except MemoryError as e:
        raise UnreadableError(f"{path}: could not be read (not enough memory); free some and run again") from e
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.EINVAL):
            raise UnreadableError(
                f"{path}: is a link or not a file; caches are read from regular files only, `cp -rL` makes them"
            ) from e
        raise UnreadableError(f"{path}: could not be read ({e.strerror or e}); fix the cause and run again") from e
