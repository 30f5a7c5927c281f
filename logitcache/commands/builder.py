"""Builds commands: flags, ``--config`` keys and ``--help`` from the options that a dataclass or function declares.

    @command(GenerateOptions)
    def generate(options: GenerateOptions) -> int: ...

The declaration is called with the values of its parameters, and the command gets what it returns: an options object, or
the result of a library function. Keywords of the command itself become options too, such as ``--json``.
"""

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import typer

from logitcache.cache.options import use_mirrors
from logitcache.commands.config import CONFIG, PRINT_CONFIG, dump, read_config
from logitcache.errors import InputError, use_flags
from logitcache.runtime.options import EVERYDAY, LAST_GROUPS, NATIVE, REQUIRED, Parameter, parameters
from logitcache.runtime.secrets import without_secrets


def _in_order(options: Iterable[Parameter]) -> list[Parameter]:
    """The order of --help: arguments, required options, everyday options, other groups."""
    options = list(options)
    groups = list(dict.fromkeys([EVERYDAY, *(p.option.group for p in options)]))
    groups = [g for g in groups if g not in LAST_GROUPS] + [g for g in LAST_GROUPS if g in groups]
    return sorted(
        options, key=lambda p: (not p.option.positional, p.default is not REQUIRED, groups.index(p.option.group))
    )


@dataclass(frozen=True, slots=True)
class Values:
    """The options of a command that were given, by name."""

    given: dict[str, Any]
    defaults: dict[str, Any]

    def make(self, declared: Any) -> Any:
        """Calls a declaration with the given values of its options, and its defaults for the others.

        Raises: InputError for a required option that was not given.
        """
        wanted = parameters(declared)
        for p in wanted:
            if p.default is REQUIRED and p.name not in self.given:
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
    also: tuple[
        tuple[Any, tuple[str, ...]], ...
    ] = ()  # further declarations, and the names of the options taken from them
    choose: Choose | None = None
    more: Callable[[], str] | None = None  # text that --help adds

    def parameters(self) -> list[Parameter]:
        """All options, without duplicates. An option is required only if all declarations require it."""
        lists = [parameters(declared) for declared in self.declared]
        found: dict[str, Parameter] = {}
        for each in lists:
            for p in each:
                required = p.default is REQUIRED and all(p.name in {q.name for q in other} for other in lists)
                default = None if p.default is REQUIRED and not required else p.default
                found.setdefault(p.name, replace(p, default=default))
        return _in_order((found | {p.name: p for p in self.own()}).values())

    def own(self) -> list[Parameter]:
        """The options that the command has besides those of its declarations."""
        taken = [p for declared, names in self.also for p in parameters(declared) if p.name in names]
        remote = any(p.is_location for declared in self.declared for p in parameters(declared))
        return [*taken, *parameters(self.handler), *(parameters(use_mirrors) if remote else [])]

    def run(self, context: typer.Context) -> int | None:
        """Calls the handler with the values of the command line and the ``--config`` file.

        Raises: LogitcacheError, whose printed text has the flags of this command.
        """
        options = self.parameters()
        use_flags({p.name: p.flag for p in options})
        given = {p.name: p.value(context.params[p.name]) for p in options if _is_given(context, p.name)}
        values = Values(given, {p.name: p.default for p in options})
        declared = self._chosen(values, options)
        if context.params[PRINT_CONFIG]:
            typer.echo(dump(without_secrets(self._settings(declared, values))))
            return 0
        use_mirrors(given.get("cache_dir"), given.get("cache_bytes"))
        own = {p.name: given.get(p.name, p.default) for p in parameters(self.handler)}
        extra = {"values": values} if "values" in inspect.signature(self.handler).parameters else {}
        return self.handler(values.make(declared), **own, **extra)

    def _settings(self, declared: Any, values: Values) -> dict[str, Any]:
        """The content of a printed configuration: given values, and defaults that are not empty.

        Raises: InputError for values that the command would refuse before it runs.
        """
        if is_dataclass(declared):  # a function would do its work
            values.make(declared)
        defaults = {p.name: p.default for p in (*parameters(declared), *parameters(self.handler))}
        names = dict.fromkeys(p.name for p in (*parameters(declared), *self.own()))
        found = {name: values.given.get(name, defaults.get(name)) for name in names}
        return {name: v for name, v in found.items() if name in values.given or v not in (REQUIRED, None, {}, [], ())}

    def _chosen(self, values: Values, options: list[Parameter]) -> Any:
        """The declaration to use. Raises: InputError if an option of another one was given."""
        if self.choose is None:
            (declared,) = self.declared
            return declared
        declared, why = self.choose(values)
        known = {p.name for p in (*parameters(declared), *self.own())}
        values.refuse([p.name for p in options if p.name not in known], why)
        return declared

    def spelled_out(self, words: Sequence[str]) -> list[str]:
        """A command line in which every flag that may stand alone has its value."""
        bare = {p.flag: p.option for p in self.parameters() if p.option.bare is not None}
        found = []
        for word, following in zip_longest(words, words[1:], fillvalue=""):
            option = bare.get(word)
            alone = option is not None and re.fullmatch(option.value_pattern, following) is None
            found.append(f"{word}={option.bare}" if option and alone else word)
        return found

    def callback(self) -> Any:
        """The function that Typer registers. Its signature has all options."""

        def call(context: typer.Context, **_: Any) -> int | None:
            return self.run(context)

        options = self.parameters()
        signature = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
        for p in options:
            default = _raw_default(p)
            signature.append(
                inspect.Parameter(p.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_annotation(p))
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
        declared: a dataclass or a function. If there are several, ``choose`` returns the one to use, and the reason why options
            of the others are refused.
        also: further declarations, and the names of the options to take from them; a handler with a parameter ``values``
            finds them there.
        more: text that --help adds to the docstring.
    """
    return lambda handler: Command(handler, declared, tuple((also or {}).items()), choose, more)


def _metavar(p: Parameter) -> str | None:
    if p.option.metavar or p.kind in NATIVE or p.origin is Literal:
        return p.option.metavar
    if p.kind is Path:
        return p.flag if p.option.positional else "PATH"
    if p.origin is list:
        return p.flag if p.option.positional else "TEXT"
    if p.origin is dict:
        return "NAME=NUMBER" if typing.get_args(p.kind)[1] is float else "KEY=VALUE"
    return "A,B,..." if p.origin is tuple else None


def _annotation(p: Parameter) -> Any:
    """The annotation of a Typer command's parameter."""
    has_default = p.default not in (REQUIRED, None) and bool(p.text(p.default))
    shown: bool | str = p.option.default or has_default
    help, metavar = _escaped(p.option.help), _metavar(p)
    kind = p.raw_kind if p.default is REQUIRED else p.raw_kind | None
    if p.option.positional:
        argument = typer.Argument(help=help, show_default=shown, metavar=metavar or p.flag)
        return typing.Annotated[kind, argument]
    flags = [p.flag, *([p.option.alias] if p.option.alias else [])]
    if p.kind is bool:
        flags = [f"{p.flag}/{p.off_flag}"]
    panel = p.option.group
    option = typer.Option(*flags, help=help, show_default=shown, metavar=metavar, rich_help_panel=panel)
    return typing.Annotated[kind, option]


def _raw_default(p: Parameter) -> Any:
    """The default as --help shows it."""
    if p.default in (REQUIRED, None) or p.kind in NATIVE or p.origin is Literal:
        return p.default
    return (p.items(p.default) or None) if p.several else p.text(p.default)


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
    """Escapes brackets that rich would read as markup."""
    return re.sub(r"\[(?=[a-z/])", r"\\[", text)
