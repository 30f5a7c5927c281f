"""The exceptions of logitcache.

LogitcacheError                 base class; the command line prints the message as one line
├── InputError                  the user's input is wrong: exit code 2
│   ├── PromptsError            a prompts file is wrong: names file and line
│   ├── ModelError              the model cannot be used as asked
│   └── StudentError            the student cannot be trained on this cache
├── CacheError                  a cache cannot be used: exit code 2
│   ├── NotACacheError          the directory is not a cache
│   ├── FormatVersionError      written by a newer logitcache
│   ├── IdentityError           the cache was made with another teacher or other settings
│   ├── CacheBusyError          another process is writing to it
│   ├── ShardCorruptError       a file of a cache is damaged, or contradicts itself or another
│   └── UnreadableError         a file of a cache could not be read: permission, I/O error, shortage, a link
├── EngineError                 the inference engine failed: exit code 1, run again to resume
├── WriteError                  a file could not be written: exit code 1, run again to resume
└── TrainingError               training stopped: exit code 1
"""

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar

# By field name: the flags of the command that runs. Empty in Python.
_FLAGS: ContextVar[Mapping[str, str] | None] = ContextVar("flags", default=None)


class LogitcacheError(Exception):
    """Base class. A message is one line: where, what is wrong, and how to fix it.

    Messages name options by their field in backquotes, as in "`top_k` 9"; the command line shows the flag instead.
    """

    exit_code = 1


class InputError(LogitcacheError):
    exit_code = 2


class PromptsError(InputError):
    pass


class ModelError(InputError):
    pass


class StudentError(InputError):
    pass


class CacheError(LogitcacheError):
    exit_code = 2


class NotACacheError(CacheError):
    pass


class FormatVersionError(CacheError):
    pass


class IdentityError(CacheError):
    pass


class CacheBusyError(CacheError):
    pass


class ShardCorruptError(CacheError):
    pass


class UnreadableError(CacheError):
    pass


class EngineError(LogitcacheError):
    pass


class WriteError(LogitcacheError):
    pass


class TrainingError(LogitcacheError):
    pass


def use_flags(flags: Mapping[str, str]) -> None:
    """From now on `with_flags` shows these flags, by field name; {} shows fields."""
    _FLAGS.set(flags)


def with_flags(text: str) -> str:
    """``text`` with the running command's flags in place of field names in backquotes. In Python it stays as it is."""
    flags = _FLAGS.get() or {}
    return re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), text)


def first_line(error: BaseException) -> str:
    """Type and first line of another library's exception, for a message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or all of them if none is near."""
    from difflib import get_close_matches

    names = list(known)
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"give one of {', '.join(names)}"
