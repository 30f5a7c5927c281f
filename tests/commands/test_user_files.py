"""What the user has beside an output survives every command that writes, and so does what a killed one left of others."""

import os
from pathlib import Path

import pytest

from logitcache.cache.reader import Cache
from logitcache.interop.distillkit import import_distillkit
from tests import fake_engine, tiny
from tests.interop.test_distillkit import texts, write_capture
from tests.runtime.test_files import everything


def users(home: Path) -> None:
    """Directories and files with the names that earlier versions used for their own, and with those that look temporary."""
    for name in ("out.part", "a.part", "b.part", ".out.lock", ".out.part", "out.tmp"):
        tiny.write_cache(home / name, tiny.traces(2, 2), shards=1)
        (home / name / "notes.txt").write_text("mine")
        (home / name / "link").symlink_to("notes.txt")


COMMANDS = {
    "generate": "generate p.jsonl --teacher fake --out out --top-k 4",
    "score": "score t.jsonl --teacher fake --out out --top-k 4",
    "answers": "eval --student fake --prompts p.jsonl --out out --budgets none --verifier exact",
    "slice": "slice c --out out --top-k 4",
    "merge": "merge c d --out out",
    "split": "split c --into a=0.5 --into b=0.5",
    "export": "export c --out out",
    "train": "train c --student m --out out --held-out 0.2 --epochs 1 --tokens-per-batch 300",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    fake_engine.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("p.jsonl").write_text(
        '{"id": "a", "prompt": "w1 w2", "answer": "w3"}\n{"id": "b", "prompt": "w4", "answer": "w"}\n'
    )
    Path("t.jsonl").write_text('{"id": "a", "prompt": "w1", "completion": "w2 w3"}\n')
    tiny.write_cache(Path("c"))
    tiny.write_cache(Path("d"), tiny.traces(4, 2))
    tiny.save_model(Path("m"))
    return tmp_path / "work"


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_directories_of_the_user_survive_every_command(run, place: Path, line: str) -> None:
    users(place)
    before = everything(place)
    code, out, err = run(*line.split())
    assert code == 0, out + err
    made = {name for name in everything(place) if not name.startswith(("out/", "a/", "b/"))}
    assert made - before.keys() <= {"out", "a", "b"}, "nothing is left beside the output"
    assert {name: each for name, each in everything(place).items() if name in before} == before


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("stand", ["directory", "file", "link"])
def test_an_output_that_is_the_user_s_is_refused_in_one_line_and_left(run, place: Path, line: str, stand: str) -> None:
    home = place / "home"
    home.mkdir()
    (home / "mine.part").write_text("mine")
    (home / ".lock").write_text("mine")
    for name in ("out", "a"):
        if stand == "directory":
            (place / name).mkdir()
            (place / name / "mine.part").write_text("mine")
            (place / name / ".lock").write_text("mine")
        elif stand == "file":
            (place / name).write_text("mine")
        else:
            (place / name).symlink_to("home")
    before = everything(place)
    code, _, err = run(*line.split())
    assert code in (1, 2)
    assert len(err.splitlines()) == 1, err
    assert everything(place) == before


def test_an_import_spares_them_too(place: Path) -> None:
    users(place)
    before = everything(place)
    tiny.tokenizer().save_pretrained(place.parent / "tokenizer")
    write_capture(place.parent / "capture", texts(2))
    import_distillkit(place.parent / "capture", place / "out", tokenizer=str(place.parent / "tokenizer"))
    assert {name: each for name, each in everything(place).items() if name in before} == before
    assert len(Cache.open(place / "out")) == 2


def test_a_generate_removes_only_its_own_unfinished_files(run, place: Path) -> None:
    line = COMMANDS["generate"].split()
    assert run(*line)[0] == 0
    shards = place / "out" / "shards"
    for name in ("unit-000009.part", "unit-000009.arrow.part", ".unit-000009.arrow.part"):
        (shards / name).write_text("mine")
    (shards / ".unit-000009.arrow.logitcache-part").write_text("half a shard")
    (shards / ".unit-000008.arrow.logitcache-part").mkdir()
    (shards / ".unit-000007.arrow.logitcache-part").symlink_to("/nowhere")
    before = everything(place)
    assert run(*line)[0] == 0
    gone = before.keys() - everything(place).keys()
    assert gone == {"out/shards/.unit-000009.arrow.logitcache-part"}


@pytest.mark.parametrize("name", [".lock-0-of-1", "logs"])
def test_a_link_in_a_stranger_s_cache_writes_nowhere(run, place: Path, name: str) -> None:
    line = COMMANDS["generate"].split()
    assert run(*line)[0] == 0
    (place / "mine").mkdir()
    (place / "mine" / "file").write_text("")
    made = place / "out" / name
    made.unlink() if name != "logs" else [*map(os.remove, made.iterdir()), made.rmdir()]
    made.symlink_to("../mine" if name == "logs" else "../mine/file")
    Path("p.jsonl").write_text('{"id": "c", "prompt": "w1 w2", "answer": "w3"}\n')
    before = everything(place)
    code, _, err = run(*line)
    assert code == 1
    assert "is a link" in err
    assert len(err.splitlines()) == 1
    assert everything(place) == before
