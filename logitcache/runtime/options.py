"""Options are declared once, where they are used: as fields of a dataclass or keywords of a function.

    top_k: Annotated[int, Option("Token ids stored per row.", group="Rows")] = 64

Name, type and default are Python's own. The command line, ``--config`` files and ``--help`` are made from them
(`logitcache.commands.builder`), so this is the only place that knows an option.
"""

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from logitcache.errors import InputError

EVERYDAY = "Options"  # the group that --help shows first
LAST_GROUPS = ("Engine", "Shards and workers", "Cluster", "Remote caches", "Output")  # those that it shows last
REQUIRED: Any = inspect.Parameter.empty  # the default of an option that must be given
NATIVE = (str, int, float, bool)  # types that Typer parses


@dataclass(frozen=True, slots=True)
class Option:
    """What the command line says of an option besides its name, type and default."""

    help: str
    group: str = EVERYDAY  # the panel of --help that lists it
    flag: str | None = None  # None: the name with dashes, --top-k for top_k
    alias: str | None = None  # a second flag, such as --lr
    metavar: str | None = None  # None: from the type
    default: str | None = None  # what --help says where the default is None or is decided later
    positional: bool = False  # an argument instead of a flag
    bare: str | None = None  # the value of the flag where none follows: the next word does not match ``value_pattern``
    value_pattern: str = ""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One declared option."""

    name: str
    kind: Any  # its type, without None
    default: Any  # REQUIRED where it must be given
    option: Option
    is_location: bool = False  # whether it takes a URL as well as a path

    @property
    def flag(self) -> str:
        """What the command line calls it: ``--top-k``, or the name of an argument."""
        return self.name.upper() if self.option.positional else self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def off_flag(self) -> str:
        """What turns a bool off: ``--no-exact``."""
        return "--no-" + self.flag.removeprefix("--")

    @property
    def origin(self) -> Any:
        return typing.get_origin(self.kind) or self.kind

    @property
    def several(self) -> bool:
        """Whether it may be given more than once."""
        return self.origin in (list, dict)

    @property
    def raw_kind(self) -> Any:
        """The type that Typer parses; what it cannot parse comes as text and goes through `value`."""
        if self.several:
            return list[str]
        return self.kind if self.kind in NATIVE or self.origin is Literal else str

    def text(self, value: Any) -> str:
        """A value as the command line writes it."""
        if self.kind is bool:
            return "" if value is False else self.flag if value is True else str(value)
        if self.origin is tuple:
            return ",".join(map(str, value))
        return " ".join(self.items(value)) if self.several else str(value)

    def items(self, value: Any) -> list[str]:
        """A value of several items as the command line writes each."""
        if isinstance(value, Mapping):
            write = str if typing.get_args(self.kind)[1:] == (str,) else _json_text
            return [f"{key}={write(item)}" for key, item in value.items()]
        return [str(item) for item in value]

    def arguments(self, value: Any) -> list[str]:
        """The words that give this option a value on a command line; none for None."""
        if value is None:
            return []
        if self.option.positional:
            return self.items(value) if self.several else [str(value)]
        if self.kind is bool:
            return [self.flag if value else self.off_flag]
        if self.several:
            return [word for item in self.items(value) for word in (self.flag, item)]
        return [self.flag, self.text(value)]

    def value(self, raw: Any) -> Any:
        """The value of what was given as text.

        Raises: InputError for text that does not parse.
        """
        if raw is None or (self.several and not raw):
            return self.default
        if self.origin is list:
            inner = _without_none(typing.get_args(self.kind)[0])
            return [inner(item) for item in raw]
        if self.origin is dict:
            return _READERS.get(typing.get_args(self.kind)[1], _pairs)(self, raw)
        if self.origin is tuple:
            (inner, _) = typing.get_args(self.kind)
            try:
                return tuple(inner(item.strip()) for item in raw.split(","))
            except ValueError:
                raise InputError(f"`{self.name}` {raw!r}: expected {inner.__name__} values, such as 1,2") from None
        if self.kind is Path:
            if "://" in raw:
                raise InputError(f"`{self.name}` {raw}: give a path on this machine, not a URL")
            return Path(raw)
        return raw if self.kind in NATIVE or self.origin is Literal else self.kind.parse(raw)

    def from_file(self, value: Any) -> Any:
        """What a YAML file says, in the form that the command line has it.

        Raises: ValueError naming what was expected.
        """
        if isinstance(value, dict) and self.origin is dict:
            return self.items(value)
        if self.several or self.origin is tuple:
            items = [_single(item) for item in (value if isinstance(value, list) else [value])]
            return items if self.several else ",".join(items)
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"expected true or false, found {value!r}")
            return value
        text = _single(value)
        if isinstance(value, bool) and self.kind is not str:
            raise ValueError(f"expected {_name(self.kind)}, found {text}")
        if self.kind in (int, float):
            try:
                self.kind(text)
            except ValueError:
                raise ValueError(f"expected {_name(self.kind)}, found {value!r}") from None
        if self.origin is Literal and text not in typing.get_args(self.kind):
            raise ValueError(f"expected one of {', '.join(typing.get_args(self.kind))}, found {value!r}")
        return text


def parameters(declared: Any) -> list[Parameter]:
    """The options that a dataclass or a function declares. Fields without an `Option` are not options."""
    found = []
    for name, default in _defaults(declared).items():
        if annotated := _annotated(declared, name):
            kind, option = annotated
            found.append(Parameter(name, _without_none(kind), default, option, _takes_urls(kind)))
    return found


def arguments(declared: Any, settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line that reads back as the same values. A setting of None is left to its default.

    Raises: KeyError for a name that ``declared`` does not declare.
    """
    known = {p.name: p for p in parameters(declared)}
    return [word for name, value in settings.items() for word in known[name].arguments(value)]


def _annotated(declared: Any, name: str) -> tuple[Any, Option] | None:
    """The type and the `Option` of a field or keyword. A subclass may repeat a field with another default alone."""
    for owner in getattr(declared, "__mro__", [declared]):
        hint = typing.get_type_hints(owner, include_extras=True).get(name)
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, Option):
                return typing.get_args(hint)[0], extra
    return None


def _defaults(declared: Any) -> dict[str, Any]:
    if not is_dataclass(declared):
        return {name: p.default for name, p in inspect.signature(declared).parameters.items()}
    found: dict[str, Any] = {}
    for field in fields(declared):
        made = REQUIRED if field.default_factory is MISSING else field.default_factory()
        found[field.name] = made if field.default is MISSING else field.default
    return found


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return kind


def _takes_urls(kind: Any) -> bool:
    """Whether a type, or that of the items of a list, is text or a path: a directory or a URL."""
    items = typing.get_args(kind)
    return {str, Path} <= set(items) or (typing.get_origin(kind) is list and _takes_urls(items[0]))


def _single(value: Any) -> str:
    """A value of a YAML file as text. Raises: ValueError for a list, a mapping or null."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, list | dict):
        found = "null" if value is None else "a list" if isinstance(value, list) else "a mapping"
        raise ValueError(f"expected one value, found {found}")
    return str(value)


def _name(kind: Any) -> str:
    return {int: "a whole number", float: "a number"}.get(kind, "text")


_WORDS = {"True": True, "False": False, "None": None}  # as Python writes them


def _json_text(value: Any) -> str:
    """What `_pairs` reads back as this value: text stays text unless it would read as JSON."""
    if isinstance(value, str) and value not in _WORDS:
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, default=str)


def _pairs(p: Parameter, raw: list[str]) -> dict[str, Any]:
    """KEY=VALUE settings; a value is JSON if it can be, else text."""
    pairs: dict[str, Any] = {}
    for item in raw:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InputError(f"`{p.name}` {item!r}: write KEY=VALUE")
        key = key.replace("-", "_")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = _WORDS.get(value, value)
    return pairs


def _numbers(p: Parameter, raw: list[str]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for item in raw:
        name, _, number = item.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            name, value = "", 0.0
        if not name:
            raise InputError(f"`{p.name}` {item!r}: write NAME=NUMBER")
        if name in numbers:
            raise InputError(f"`{p.name}` {item!r}: {name} is given twice")
        numbers[name] = value
    return numbers


def _texts(p: Parameter, raw: list[str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for item in raw:
        name, _, text = item.partition("=")
        if not name or not text:
            raise InputError(f"`{p.name}` {item!r}: write {p.option.metavar or 'NAME=TEXT'}")
        if name in texts:
            raise InputError(f"`{p.name}` {item!r}: {name} is given twice")
        texts[name] = text
    return texts


_READERS: Mapping[Any, Callable[[Parameter, list[str]], dict[str, Any]]] = {float: _numbers, str: _texts}


def values_of(kind: type, source: Any) -> dict[str, Any]:
    """The values that ``source`` has for the fields of the dataclass ``kind``."""
    return {field.name: getattr(source, field.name) for field in fields(kind)}


def at_least(name: str, value: int | None, least: int) -> None:
    """Raises: InputError for an option below ``least``."""
    if value is not None and value < least:
        raise InputError(f"`{name}` {value}: must be at least {least}")
