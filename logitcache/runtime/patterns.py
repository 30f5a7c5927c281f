"""Regular expressions that others chose, on text that others wrote: they end in time, whatever they are."""

import math
import re

from logitcache.errors import InputError

_SECONDS = 1.0  # for a search; an honest pattern needs milliseconds for 32,000 tokens
_LONGEST = 1_000  # characters of a pattern
_MOST = 10_000  # copies that its repetitions such as {2,50} make of a part; compiled, 1e6 take 3 s and 300 MB
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
_LITERAL_BRACE = re.compile(r"(\\.)|\{(?!\d+(?:,\d*)?\}|,\d+\})", re.DOTALL)


def check_pattern(pattern: str) -> None:
    """Raises: ValueError saying what is wrong with a regular expression, in the syntax of Python's ``re``."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"has over {_LONGEST:,} characters")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise ValueError(f"is not a regular expression: {e}") from None
    if math.prod(int(n) for pair in _REPEAT.findall(pattern) if (n := pair[1] or pair[0]) and int(n)) > _MOST:
        raise ValueError(f"repeats a part over {_MOST:,} times; use * or +")


def search(pattern: str, text: str, start: int = 0) -> int | None:
    """Where the first match of a pattern at or behind ``start`` begins; None if there is none.

    Raises: InputError for a pattern that `check_pattern` refuses, and for a search that takes too long.
    """
    import regex  # its searches can be given a time, which those of `re` cannot

    try:
        check_pattern(pattern)
        match = regex.compile(_LITERAL_BRACE.sub(_escaped, pattern)).search(text, start, timeout=_SECONDS)
    except ValueError as e:
        raise InputError(f"`answer_regex` {pattern[:99]!r} {e}") from None
    except TimeoutError:
        raise InputError(
            f"`answer_regex` {pattern[:99]!r} searches a text of {len(text):,} characters for over {_SECONDS:g} s; give one "
            "without repetitions in repetitions"
        ) from None
    return match.start() if match else None


def _escaped(found: re.Match[str]) -> str:
    """A brace that repeats nothing is text to `re`; to `regex` it can ask for an inexact match."""
    return found[1] or r"\{"
