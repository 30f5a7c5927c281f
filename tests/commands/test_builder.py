"""Options are declared once: the builder makes flags, help and YAML of dataclasses and functions."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
import typer.main

from logitcache.commands.builder import Values, command
from logitcache.errors import InputError, with_flags
from logitcache.runtime.options import Option, parameters
from logitcache.sections import Markers


@dataclass(frozen=True, kw_only=True)
class Base:
    temperature: Annotated[float, Option("Of the sampling.", "Sampling")] = 1.0


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    source: Annotated[str, Option("What to read.", positional=True)]
    top_k: Annotated[int, Option("Ids per row.")] = 64
    out: Annotated[Path | None, Option("Where to write.", default="nowhere")] = None
    exact: Annotated[bool, Option("Bit for bit.", "Rows")] = False
    eos: Annotated[bool, Option("End texts.", "Rows")] = True
    kind: Annotated[Literal["a", "b"], Option("Which.")] = "a"
    names: Annotated[tuple[str, ...], Option("Sections.")] = ("prompt", "answer")
    shares: Annotated[tuple[float, ...] | None, Option("Shares.")] = None
    parts: Annotated[dict[str, float], Option("Shares.", flag="--part")] = field(default_factory=dict)
    extra: Annotated[dict[str, Any], Option("Anything.", flag="--extra-arg")] = field(default_factory=dict)
    markers: Annotated[Markers | None, Option("Markers.", metavar="A,B")] = None
    learning_rate: Annotated[float | None, Option("Rate.", alias="--lr", default="1e-4")] = None
    hidden: int = 3

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"`top_k` {self.top_k}: must be at least 1; see `source` or `exact`")


@dataclass(frozen=True, kw_only=True)
class Colder(Options):
    temperature: float = 0.0


class Ran:
    """A command of one declaration, run as the command line runs it."""

    def __init__(self, declared: Any) -> None:
        self.got: list[Any] = []

        @command(declared)
        def run(options: Any, loud: Annotated[bool, Option("Shout.")] = False) -> int:
            """Do it.

            Example: do it
            """
            self.got = [options, loud]
            return 7

        own = typer.Typer(add_completion=False, rich_markup_mode="rich")
        own.command("do")(run.callback())
        self.app = typer.main.get_command(own)

    def __call__(self, *arguments: str) -> Any:
        code = self.app.main(args=list(arguments), prog_name="do", standalone_mode=False)
        return self.got[0] if code == 7 else code


def test_text_becomes_values_of_the_declared_types() -> None:
    options = Ran(Options)(
        "s", "--top-k", "8", "--out", "x", "--exact", "--no-eos", "--kind", "b", "--names", "reasoning, answer",
        "--shares", "0.25,1", "--part", "a/b=0.5", "--part", "c=2", "--extra-arg", "max-len=3", "--extra-arg",
        "name=x", "--extra-arg", 'deep={"a": [1]}', "--markers", "<t>,</t>", "--lr", "1e-3", "--temperature", "0.5",
    )  # fmt: skip
    assert options == Options(
        source="s", top_k=8, out=Path("x"), exact=True, eos=False, kind="b", names=("reasoning", "answer"),
        shares=(0.25, 1.0), parts={"a/b": 0.5, "c": 2.0}, extra={"max_len": 3, "name": "x", "deep": {"a": [1]}},
        markers=Markers("<t>", "</t>"), learning_rate=1e-3, temperature=0.5,
    )  # fmt: skip


def test_what_is_not_given_has_the_declared_default() -> None:
    assert Ran(Options)("s") == Options(source="s")


def test_a_subclass_changes_a_default_and_inherits_the_help() -> None:
    assert Ran(Colder)("s").temperature == 0.0
    (found,) = (p for p in parameters(Colder) if p.name == "temperature")
    assert (found.default, found.option.help, found.option.group) == (0.0, "Of the sampling.", "Sampling")


def test_a_functions_keywords_are_options_and_it_is_called() -> None:
    def cut(
        cache: Annotated[Path, Option("A cache.", positional=True)], *, top_k: Annotated[int, Option("K.")] = 2
    ) -> str:
        return f"{cache} at {top_k}"

    assert Ran(cut)("c", "--top-k", "9") == "c at 9"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s", "--extra-arg", "x"], "`extra` 'x': write KEY=VALUE"),
        (["s", "--part", "x=y"], "`parts` 'x=y': write NAME=NUMBER"),
        (["s", "--part", "x=1", "--part", "x=2"], "x is given twice"),
        (["s", "--shares", "1,b"], "`shares` '1,b': expected float values"),
        (["s", "--markers", "x"], "OPENING,CLOSING"),
        (["s", "--top-k", "0"], "`top_k` 0: must be at least 1"),
    ],
)
def test_bad_text_is_an_input_error(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Ran(Options)(*arguments)


def test_an_error_shows_the_flags_of_the_command_and_fields_in_python() -> None:
    with pytest.raises(InputError) as caught:
        Ran(Options)("s", "--top-k", "0")
    assert with_flags(str(caught.value)) == "--top-k 0: must be at least 1; see SOURCE or --exact"
    assert str(caught.value) == "`top_k` 0: must be at least 1; see `source` or `exact`"


def test_help_lists_options_by_group_with_their_defaults(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    Ran(Options)("--help")
    text = capsys.readouterr().out
    panels = re.findall(r"─ ([A-Z]\w+) ─", text)
    assert panels == ["Arguments", "Options", "Sampling", "Rows", "Configuration"]
    assert re.search(r"--top-k .*Ids per row\. +\[default: 64\]", text)
    assert re.search(r"--out .*\[default: \(nowhere\)\]", text)
    assert re.search(r"--exact +--no-exact", text)
    assert "--hidden" not in text
    assert "Example: do it" in text


def test_a_config_file_sets_options_and_the_command_line_wins(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text(
        "source: s\ntop-k: 8\nexact: true\nnames: [answer]\nparts: {a: 0.5}\nextra: {n: 3, t: '3', d: {x: [1]}}\n"
        "learning_rate: 1e-3\nmarkers: <t>,</t>\nkind: b\nout: null\n"
    )
    options = Ran(Options)("--config", str(tmp_path / "c.yaml"), "--top-k", "9", "--no-exact")
    assert options == Options(
        source="s", top_k=9, exact=False, names=("answer",), parts={"a": 0.5}, kind="b",
        extra={"n": 3, "t": "3", "d": {"x": [1]}}, learning_rate=1e-3, markers=Markers("<t>", "</t>"),
    )  # fmt: skip


def test_a_printed_config_run_again_gives_the_same_run(tmp_path, capsys) -> None:
    run, path = Ran(Options), tmp_path / "c.yaml"
    given = [
        "s",
        "--extra-arg",
        "n=3",
        "--extra-arg",
        't="3"',
        "--names",
        "answer",
        "--markers",
        "none",
        "--lr",
        "1e-3",
    ]
    wanted = run(*given)
    assert run(*given, "--print-config") == 0
    path.write_text(capsys.readouterr().out)
    assert run("--config", str(path)) == wanted
    assert run("--config", str(path), "--print-config") == 0
    assert capsys.readouterr().out == path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: s\n\ntop_kk: 3\n", r"c\.yaml:3: top_kk is not an option of do; did you mean top_k\?"),
        ("source: s\nsource: t\n", r"c\.yaml:2: source is given twice"),
        ("source: s\nexact: 3\n", r"c\.yaml:2: exact: expected true or false, found 3"),
        ("source: s\ntop_k: [1]\n", r"c\.yaml:2: top_k: expected one value, found a list"),
        ("source: s\ntop_k: true\n", r"c\.yaml:2: top_k: expected a whole number, found true"),
        ("source: s\ntop_k: 8.5\n", r"c\.yaml:2: top_k: expected a whole number, found 8\.5"),
        ("source: s\ntemperature: warm\n", r"c\.yaml:2: temperature: expected a number, found 'warm'"),
        ("source: s\nkind: c\n", r"c\.yaml:2: kind: expected one of a, b, found 'c'"),
        ("source: s\nnames: [a, [b]]\n", r"c\.yaml:2: names: expected one value, found a list"),
        ("source: s\ntop_k: 8\ntop-k: 9\n", r"c\.yaml:3: top-k is given twice"),
        ("source: s\nextra:\n  n: 1\n  n: 2\n", r"c\.yaml:4: n is given twice"),
        ("source: s\nout: 2024-13-45\n", r"c\.yaml:2: out: month must be in 1\.\.12"),
        ("source: !!python/name:os.system\n", r"c\.yaml:1: source: could not determine a constructor"),
        ("? [a]\n: 3\n", r"c\.yaml:1: expected the name of an option"),
        ("source: s\n---\nsource: t\n", r"c\.yaml:2: not valid YAML"),
        ("- a\n", r"c\.yaml:1: expected options and their values"),
        ("a: [\n", r"c\.yaml:2: not valid YAML"),
    ],
)
def test_a_broken_config_file_names_its_line(tmp_path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        Ran(Options)("--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("# only a comment\n", {}),
        ("top_k: '8'\n", {"top_k": 8}),
        ("top_k: &n 8\nextra: {n: *n}\n", {"top_k": 8, "extra": {"n": 8}}),
        ("extra: {a: 1e-4, b: '1e-4', c: 'True', d: null, e: yes}\n",
         {"extra": {"a": 1e-4, "b": "1e-4", "c": "True", "d": None, "e": True}}),
        ("extra: {day: 2024-05-06}\n", {"extra": {"day": "2024-05-06"}}),
        ("temperature: 1e-4\n", {"temperature": 1e-4}),
        ("names: answer\n", {"names": ("answer",)}),
        ("shares: [0.5, 1]\n", {"shares": (0.5, 1.0)}),
        ("parts: {a/b: 5e-1}\n", {"parts": {"a/b": 0.5}}),
        ("out: null\nnames: null\n", {}),
    ],
)  # fmt: skip
def test_what_a_config_file_says_is_what_python_gets(tmp_path, capsys, text: str, wanted: dict) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert Ran(Options)("s", "--config", str(path)) == Options(source="s", **wanted)
    Ran(Options)("s", "--config", str(path), "--print-config")
    path.write_text(capsys.readouterr().out)
    assert Ran(Options)("--config", str(path)) == Options(source="s", **wanted)


def test_a_config_file_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: No such file or directory; give a YAML file"):
        Ran(Options)("s", "--config", str(tmp_path / "none.yaml"))


def test_of_two_declarations_one_counts_and_the_others_options_are_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other:
        source: Annotated[str, Option("What.", positional=True)]
        place: Annotated[Path | None, Option("Where.")]
        top_k: Annotated[int, Option("Ids.")] = 5

    def which(values: Values) -> tuple[Any, str]:
        return (Other, "has no effect with --place") if "place" in values.given else (Options, "needs --place")

    made: list[Any] = []

    @command(Options, Other, choose=which)
    def either(options: Any) -> None:
        made.append(options)

    own = typer.Typer(add_completion=False)
    own.command("do")(either.callback())
    app = typer.main.get_command(own)
    app.main(args=["abc", "--place", "x"], standalone_mode=False)
    app.main(args=["abc", "--exact"], standalone_mode=False)
    assert made == [Other(source="abc", place=Path("x"), top_k=5), Options(source="abc", top_k=64, exact=True)]
    with pytest.raises(InputError, match="`exact` has no effect with --place"):
        app.main(args=["abc", "--place", "x", "--exact"], standalone_mode=False)
    app.main(args=["abc", "--place", "x", "--no-exact"], standalone_mode=False)
    assert made[-1] == Other(source="abc", place=Path("x")), "a default has no effect anyway"


def test_a_mistyped_command_or_option_names_the_nearest_and_version_says_it(run) -> None:
    assert "Did you mean 'generate'?" in run("genrate")[2]
    code, _, err = run("generate", "--teachr", "x")
    assert (code, "--teacher" in err) == (2, True)
    assert run("--version") == (0, "logitcache 0.1.0\n", "")


def test_the_command_line_shows_flags_where_the_library_names_fields(run, tmp_path) -> None:
    code, _, err = run("generate", "p.jsonl", "--teacher", "t", "--out", tmp_path / "c", "--unit-size", 0)
    assert (code, err) == (2, "logitcache: --unit-size 0: must be at least 1\n")
