"""Commands from declarations: flags, ``--config`` files and ``--help`` are made from the options of a dataclass or function.

    @command(GenerateOptions)
    def generate(options: GenerateOptions) -> int: ...

The declaration is called with the values of its parameters, and the command gets what it returns: an options object, or
the result of a library function. Keywords of the command itself become options too, such as ``--json``.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import typer

from logitcache.commands.config import CONFIG, PRINT_CONFIG, dump, read_config
from logitcache.errors import InputError, use_flags
from logitcache.runtime.options import EVERYDAY, LAST_GROUPS, Option

_REQUIRED: Any = inspect.Parameter.empty
_NATIVE = (str, int, float, bool, Path)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One declared option."""

    name: str
    kind: Any  # its type, without None
    default: Any  # _REQUIRED where it must be given
    option: Option

    @property
    def flag(self) -> str:
        """What the command line calls it: ``--top-k``, or the name of an argument."""
        return self.name.upper() if self.option.positional else self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def origin(self) -> Any:
        return typing.get_origin(self.kind) or self.kind

    @property
    def several(self) -> bool:
        """Whether it may be given more than once."""
        return self.origin in (list, dict)

    @property
    def metavar(self) -> str | None:
        if self.option.metavar or self.kind in _NATIVE or self.origin is Literal:
            return self.option.metavar
        if self.origin is list:
            return self.flag if self.option.positional else "TEXT"
        if self.origin is dict:
            return "NAME=NUMBER" if typing.get_args(self.kind)[1] is float else "KEY=VALUE"
        return "A,B,..." if self.origin is tuple else None

    @property
    def raw_kind(self) -> Any:
        """The type that Typer parses; what it cannot parse comes as text and goes through `value`."""
        if self.several:
            return list[str]
        return self.kind if self.kind in _NATIVE or self.origin is Literal else str

    def annotation(self) -> Any:
        """As a parameter of a Typer command."""
        has_default = self.default not in (_REQUIRED, None) and bool(self.text(self.default))
        shown: bool | str = self.option.default or has_default
        help, metavar = _escaped(self.option.help), self.metavar
        kind = self.raw_kind if self.default is _REQUIRED else self.raw_kind | None
        if self.option.positional:
            argument = typer.Argument(help=help, show_default=shown, metavar=metavar or self.flag)
            return typing.Annotated[kind, argument]
        flags = [self.flag, *([self.option.alias] if self.option.alias else [])]
        if self.kind is bool:
            flags = [f"{self.flag}/--no-{self.flag.removeprefix('--')}"]
        panel = self.option.group
        option = typer.Option(*flags, help=help, show_default=shown, metavar=metavar, rich_help_panel=panel)
        return typing.Annotated[kind, option]

    def raw_default(self) -> Any:
        """The default as --help shows it."""
        if self.default in (_REQUIRED, None) or self.kind in _NATIVE or self.origin is Literal:
            return self.default
        return (self.items(self.default) or None) if self.several else self.text(self.default)

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
            return [f"{key}={_json_text(item)}" for key, item in value.items()]
        return [str(item) for item in value]

    def value(self, raw: Any) -> Any:
        """The value of what was given as text.

        Raises: InputError for text that does not parse.
        """
        if raw is None or (self.several and not raw):
            return self.default
        if self.origin is list:
            (inner,) = typing.get_args(self.kind)
            return [inner(item) for item in raw]
        if self.origin is dict:
            return _numbers(self, raw) if typing.get_args(self.kind)[1] is float else _pairs(self, raw)
        if self.origin is tuple:
            (inner, _) = typing.get_args(self.kind)
            try:
                return tuple(inner(item.strip()) for item in raw.split(","))
            except ValueError:
                raise InputError(f"`{self.name}` {raw!r}: expected {inner.__name__} values, such as 1,2") from None
        return raw if self.kind in _NATIVE or self.origin is Literal else self.kind.parse(raw)

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
            found.append(Parameter(name, _without_none(kind), default, option))
    return found


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
        made = _REQUIRED if field.default_factory is MISSING else field.default_factory()
        found[field.name] = made if field.default is MISSING else field.default
    return found


def _in_order(options: Iterable[Parameter]) -> list[Parameter]:
    """As --help lists them: arguments, required options, the everyday ones, the other groups."""
    options = list(options)
    groups = list(dict.fromkeys([EVERYDAY, *(p.option.group for p in options)]))
    groups = [g for g in groups if g not in LAST_GROUPS] + [g for g in LAST_GROUPS if g in groups]
    return sorted(
        options, key=lambda p: (not p.option.positional, p.default is not _REQUIRED, groups.index(p.option.group))
    )


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return kind


@dataclass(frozen=True, slots=True)
class Values:
    """The options of a command that were given, by name."""

    given: dict[str, Any]
    defaults: dict[str, Any]

    def make(self, declared: Any) -> Any:
        """Calls a declaration with what was given of its options, and its own defaults for the others.

        Raises: InputError for a required option that was not given.
        """
        wanted = parameters(declared)
        for p in wanted:
            if p.default is _REQUIRED and p.name not in self.given:
                raise InputError(f"`{p.name}` is required")
        return declared(**{p.name: self.given.get(p.name, p.default) for p in wanted})

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Raises: InputError for one of these options if it was given and is not its default, as in a printed file."""
        for name in sorted(set(names) & self.given.keys()):
            if self.given[name] != self.defaults[name]:
                raise InputError(f"`{name}` {why}")


Handler = Callable[..., int | None]
Choose = Callable[[Values], tuple[Any, str]]


@dataclass(frozen=True, slots=True)
class Command:
    """A command and the declarations that its options come from."""

    handler: Handler
    declared: tuple[Any, ...]
    also: tuple[tuple[Any, tuple[str, ...]], ...] = ()  # declarations of which some options are taken, and which
    choose: Choose | None = None
    more: Callable[[], str] | None = None  # text that --help adds

    def parameters(self) -> list[Parameter]:
        """All options, each once. One that not all declarations require is not required of the command."""
        lists = [parameters(declared) for declared in self.declared]
        found: dict[str, Parameter] = {}
        for each in lists:
            for p in each:
                required = p.default is _REQUIRED and all(p.name in {q.name for q in other} for other in lists)
                default = None if p.default is _REQUIRED and not required else p.default
                found.setdefault(p.name, replace(p, default=default))
        return _in_order((found | {p.name: p for p in self.own()}).values())

    def own(self) -> list[Parameter]:
        """The options that the command has beside those of its declarations."""
        taken = [p for declared, names in self.also for p in parameters(declared) if p.name in names]
        return [*taken, *parameters(self.handler)]

    def run(self, context: typer.Context) -> int | None:
        """Calls the handler with what the command line and a ``--config`` file say.

        Raises: LogitcacheError.
        """
        options = self.parameters()
        use_flags({p.name: p.flag for p in options})
        given = {p.name: p.value(context.params[p.name]) for p in options if _is_given(context, p.name)}
        values = Values(given, {p.name: p.default for p in options})
        declared = self._chosen(values, options)
        if context.params[PRINT_CONFIG]:
            typer.echo(dump(self._settings(declared, values)))
            return 0
        own = {p.name: given.get(p.name, p.default) for p in parameters(self.handler)}
        extra = {"values": values} if "values" in inspect.signature(self.handler).parameters else {}
        return self.handler(values.make(declared), **own, **extra)

    def _settings(self, declared: Any, values: Values) -> dict[str, Any]:
        """What a printed configuration holds: what was given, and defaults that are not empty.

        Raises: InputError for values that the command would refuse before it runs.
        """
        if is_dataclass(declared):  # a function would do its work
            values.make(declared)
        defaults = {p.name: p.default for p in (*parameters(declared), *parameters(self.handler))}
        names = dict.fromkeys(p.name for p in (*parameters(declared), *self.own()))
        found = {name: values.given.get(name, defaults.get(name)) for name in names}
        return {name: v for name, v in found.items() if name in values.given or v not in (_REQUIRED, None, {}, [], ())}

    def _chosen(self, values: Values, options: list[Parameter]) -> Any:
        """The declaration that counts. Raises: InputError for an option of another one that was given."""
        if self.choose is None:
            (declared,) = self.declared
            return declared
        declared, why = self.choose(values)
        known = {p.name for p in (*parameters(declared), *self.own())}
        values.refuse([p.name for p in options if p.name not in known], why)
        return declared

    def callback(self) -> Any:
        """The function that Typer registers: its signature has all options."""

        def call(context: typer.Context, **_: Any) -> int | None:
            return self.run(context)

        options = self.parameters()
        signature = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
        for p in options:
            default = p.raw_default()
            signature.append(
                inspect.Parameter(p.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=p.annotation())
            )
        signature += _config_parameters(options)
        call.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in signature}
        call.__doc__ = _help_text((inspect.getdoc(self.handler) or "") + (f"\n\n{self.more()}" if self.more else ""))
        return call


def command(
    *declared: Any,
    also: Mapping[Any, tuple[str, ...]] | None = None,
    choose: Choose | None = None,
    more: Callable[[], str] | None = None,
) -> Callable[[Handler], Command]:
    """Makes a `Command` of a function, which is called with what the declaration returns.

    Args:
        declared: a dataclass or a function. Of several, ``choose`` returns the one that counts, and why an option of
            another has no effect.
        also: further declarations, and the names of the options to take from them; a handler with a parameter ``values``
            finds them there.
        more: text that --help adds to the docstring.
    """
    return lambda handler: Command(handler, declared, tuple((also or {}).items()), choose, more)


def _config_parameters(options: list[Parameter]) -> list[inspect.Parameter]:
    known = {p.name: p for p in options}

    def load(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            context.default_map = {**(context.default_map or {}), **read_config(path, known, context.info_name or "")}
        return path

    config = typing.Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file with values of these options by name; the command line wins over it.",
            is_eager=True,
            callback=load,
            rich_help_panel="Configuration",
        ),
    ]
    printed = typing.Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="Print all settings as such a file, and do nothing else.",
            rich_help_panel="Configuration",
        ),
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(CONFIG, keyword, default=None, annotation=config),
        inspect.Parameter(PRINT_CONFIG, keyword, default=False, annotation=printed),
    ]


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP", "ENVIRONMENT")


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


def _help_text(text: str) -> str:
    """A docstring as --help shows it: prose flows, and a long example continues on lines of its own."""
    shown = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("Example:"):
            words = " ".join(paragraph.split()).replace(" --", "\0--").split("\0")
            lines = [words[0]]
            for word in words[1:]:
                if len(lines[-1]) + len(word) > 74:  # within 80 columns, with " \" behind it
                    lines[-1] += " \\"
                    lines.append("    " + word)
                else:
                    lines[-1] += " " + word
            shown.append("\n".join(lines))
        else:
            shown.append(paragraph if paragraph.startswith("\b") else paragraph.replace("\n", " "))
    return _escaped("\n\n".join(shown))


def _escaped(text: str) -> str:
    """Text whose brackets rich does not read as markup."""
    return re.sub(r"\[(?=[a-z/])", r"\\[", text)
