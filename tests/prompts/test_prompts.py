import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache import prompts
from logitcache.errors import PromptsError
from logitcache.prompts import PromptSource, load


def jsonl(path, *rows) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def test_text_and_messages_keep_id_answer_and_other_columns(tmp_path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    source = jsonl(tmp_path / "p.jsonl", {"prompt": "a", "id": 7, "answer": 42, "level": "x"}, "", {"messages": chat})
    first, second = load(source)
    assert (first.id, first.content, first.answer, first.metadata) == ("7", "a", "42", {"level": "x"})
    assert second.content == chat
    assert second.id == second.digest(), "without an id the content is the id"


def test_parquet_reads_like_jsonl(tmp_path) -> None:
    rows = [{"id": "x", "messages": [{"role": "user", "content": "hi"}], "answer": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (prompt,) = load(str(tmp_path / "p.parquet"))
    assert prompt.content == rows[0]["messages"]
    assert prompt.answer is None


def test_dates_and_decimals_become_text_and_nulls_of_messages_disappear(tmp_path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "hi", "name": None}], "day": datetime.date(2026, 1, 2)},
        {"messages": [{"role": "user", "content": "ho", "name": "x"}], "day": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    first, second = load(str(tmp_path / "p.parquet"))
    assert first.content == [{"role": "user", "content": "hi"}]
    assert first.metadata == {"day": "2026-01-02"}
    assert second.content == rows[1]["messages"]
    assert first.digest() == load(jsonl(tmp_path / "p.jsonl", {"messages": first.content})).prompts[0].digest()


def test_repeated_content_without_ids_is_read_once_and_counted(tmp_path) -> None:
    loaded = load(jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}))
    assert (len(loaded), loaded.counts.repeated) == (2, 1)


def test_the_limit_stops_before_what_it_leaves_out(tmp_path) -> None:
    assert len(load(jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"}, "{broken"), limit=2)) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, '{"prompt": '], r"p\.jsonl:2: not valid JSON"),
        ([{"prompt": "a"}, "[1]"], r"p\.jsonl:2: a list, expected an object"),
        ([{"text": "a"}], r"p\.jsonl:1: neither `prompt` nor `messages`"),
        ([{"prompt": "a", "messages": []}], r"p\.jsonl:1: both"),
        ([{"prompt": 3}], r"p\.jsonl:1: `prompt` is a number, expected text"),
        ([{"messages": [{"role": "user"}]}], r"p\.jsonl:1: `messages` turn 1: no `content`"),
        ([{"prompt": ""}], r"p\.jsonl:1: the prompt is empty"),
        (['{"prompt": "half a \\ud83d"}'], r"p\.jsonl:1: not valid Unicode"),
        (['{"prompt": "a", "id": "\\ud83d"}'], r"p\.jsonl:1: not valid Unicode"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], r"p\.jsonl:2: id '1' is already used by .*p\.jsonl:1"),
        ([], r"p\.jsonl: contains no prompts"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, rows, message) -> None:
    with pytest.raises(PromptsError, match=message):
        load(jsonl(tmp_path / "p.jsonl", *rows))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no such file"),
        ("gim:gsm_symbolic?size=2", "no such file or kind of source; did you mean gym:"),
        ("gym:gsm_simbolic?size=2", "did you mean 'gsm_symbolic'"),
        ("gym:gsm_symbolic?size", "cannot read the options"),
        ("gym:gsm_symbolic?sice=3", "not accepted by reasoning-gym"),
    ],
)
def test_a_bad_source_is_named(source, message) -> None:
    with pytest.raises(PromptsError, match=message):
        load(source)


def test_gym_prompts_without_a_seed_are_those_of_seed_0() -> None:
    assert [p.id for p in load("gym:gsm_symbolic?size=1")] == ["gsm_symbolic:0:0"]


def test_a_file_of_another_kind_is_named(tmp_path) -> None:
    with pytest.raises(PromptsError, match="a folder without files of prompts"):
        load(str(tmp_path))
    (tmp_path / "p.csv").write_text("prompt\nhi")
    with pytest.raises(
        PromptsError, match=r"unknown file type '\.csv'; give one of \.jsonl, \.json, \.ndjson, \.parquet"
    ):
        load(str(tmp_path / "p.csv"))
    (tmp_path / "p.parquet").write_text("prompt\nhi")
    with pytest.raises(PromptsError, match="damaged Parquet file, cannot be read from row 0 on"):
        load(str(tmp_path / "p.parquet"))


def test_gym_prompts_are_the_same_each_time_and_keep_their_ids_when_the_size_grows() -> None:
    small, large = load("gym:gsm_symbolic?size=2&seed=3"), load("gym:gsm_symbolic?size=4&seed=3")
    assert [p.id for p in large][:2] == [p.id for p in small] == ["gsm_symbolic:3:0", "gsm_symbolic:3:1"]
    assert large.prompts[0].digest() == small.prompts[0].digest()
    assert small.prompts[0].answer


def test_a_source_is_one_entry_of_the_table(tmp_path, monkeypatch) -> None:
    def lines(source):
        with open(source) as file:
            for number, line in enumerate(file, 1):
                yield f"{source}:{number}", {"prompt": line.strip()}

    monkeypatch.setattr(prompts, "SOURCES", (*prompts.SOURCES, PromptSource(lines, "FILE.txt", suffixes=(".txt",))))
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert [p.content for p in load(str(tmp_path / "p.txt"))] == ["one", "two"]
    (tmp_path / "p.text").write_text("one")
    with pytest.raises(PromptsError, match=r"unknown file type '\.text'; did you mean \.txt"):
        load(str(tmp_path / "p.text"))


def test_a_digest_covers_all_that_the_template_sees() -> None:
    plain = prompts.Prompt("1", [{"role": "user", "content": "hi"}])
    tools = prompts.Prompt("1", plain.content, tools=[{"type": "function"}])
    terse = prompts.Prompt("1", plain.content, template_args={"enable_thinking": False})
    assert len({p.digest() for p in (plain, tools, terse)}) == 3


def test_files_of_a_folder_or_a_pattern_are_read_by_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    for name in ("b", "a", "sub/c"):
        jsonl(tmp_path / "d" / f"{name}.jsonl", {"prompt": name})
    for name in ("README.md", "LICENSE", ".hidden"):
        (tmp_path / "d" / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    assert [p.content for p in load("d")] == ["a", "b", "sub/c"]
    assert [p.content for p in load("d/*.jsonl")] == ["a", "b"]
    assert [p.content for p in load("d/**/[bc].jsonl")] == ["b", "sub/c"]
    assert {p.id for p in load("d/*.jsonl")} < {p.id for p in load("d")}
    jsonl(tmp_path / "d" / "z.jsonl", {"promt": "x"})
    with pytest.raises(PromptsError, match=r"^d/z\.jsonl:1: neither"):
        load("d")
    (tmp_path / "d" / "notes.txt").write_text("x")
    with pytest.raises(
        PromptsError, match=r"d/notes\.txt: unknown file type.*or give a pattern, such as 'd/\*\.jsonl'"
    ):
        load("d")
    with pytest.raises(PromptsError, match="no such file"):
        load("d/*.x")


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path) -> None:
    assert len(load(jsonl(tmp_path / "p[1].jsonl", {"prompt": "a"}))) == 1
