"""What others wrote cannot steer the terminal, whichever way it is printed."""

import io
import json
import warnings
from pathlib import Path

import pytest

from logitcache.errors import InputError
from logitcache.runtime.console import Progress, say, say_warnings
from tests import fake_engine, tiny

EVIL = "x\x1b[2J\x1b]8;;http://evil\x07\u202ey\u200b\nOK: all checksums and traces are valid\r\x9b1m\u2028\x7f"
SHOWN = r"x\x1b[2J\x1b]8;;http://evil\x07\u202ey\u200b\nOK: all checksums and traces are valid\r\x9b1m\u2028\x7f"


def is_safe(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    fields = {"teacher": EVIL, "engine": EVIL, "sampling": {EVIL: EVIL}, "derived": [EVIL]}
    return tiny.write_cache(tmp_path / "cache", **fields).path


LINES = [
    "info {c}",
    "info {c} --json",
    "merge {c} {d} --out {o}",
    "slice {c} --out {o} --where meta.x=1",
    "train {c} --student {m} --out {o}",
]


@pytest.mark.parametrize("line", LINES)
def test_a_cache_cannot_steer_the_terminal(run, cache: Path, tmp_path: Path, line: str) -> None:
    other = tiny.write_cache(tmp_path / "d").path
    code, out, err = run(*line.format(c=cache, d=other, o=tmp_path / "o", m=tmp_path / f"m{EVIL[:5]}").split(" "))
    assert is_safe(out)
    assert is_safe(err)
    assert not any(text.startswith("OK") for text in (out + err).splitlines()), "no line of its own"
    if line == "info {c}":
        assert SHOWN in out
    if "--json" in line:
        assert json.loads(out)["identity"]["teacher"] == EVIL
    else:
        assert code == 0 or len(err.splitlines()) == 1


def test_a_prompt_cannot_steer_the_terminal(run, tmp_path: Path, monkeypatch) -> None:
    fake_engine.install(monkeypatch)
    rows = [{"id": EVIL, "prompt": "w1 " * 50}, {"id": "b", "prompt": "w1"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("generate", tmp_path / "p.jsonl", "--teacher", "fake", "--out", tmp_path / "c", "--top-k", 4)
    assert code == 0
    assert is_safe(out)
    assert is_safe(err)
    assert SHOWN in out
    assert SHOWN in err


def test_progress_and_warnings_are_safe() -> None:
    out = io.StringIO()
    with Progress(out, total=1) as progress:
        progress.print(EVIL)
    say(EVIL, out)
    assert out.getvalue() == f"{SHOWN}\n" * 2
    before = warnings.formatwarning
    try:
        say_warnings()
        say_warnings()
        text = warnings.formatwarning(UserWarning(EVIL), UserWarning, "file.py", 3, "line")
    finally:
        warnings.formatwarning = before
    assert text == f"file.py:3: UserWarning: {SHOWN}\n  line\n"


def test_an_error_is_one_line_whatever_it_quotes(run, monkeypatch, tmp_path) -> None:
    from logitcache.cache import reader

    def fails(*_):
        raise InputError(f"{EVIL}: no")

    monkeypatch.setattr(reader.Cache, "open", fails)
    assert run("info", tmp_path) == (2, "", f"logitcache: {SHOWN}: no\n")
    monkeypatch.setattr(reader.Cache, "open", lambda *_: Path(str(tmp_path / EVIL)).read_text())
    code, out, err = run("info", tmp_path)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert is_safe(err)
