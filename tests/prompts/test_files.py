import functools
import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from logitcache.errors import PromptsError
from logitcache.prompts import load

gz = functools.partial(gzip.compress, mtime=0)  # the same bytes in every process
TWO = b'{"prompt": "a"}\n{"prompt": "b"}\n'


def texts(path) -> list:
    return [prompt.content for prompt in load(str(path))]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.jsonl", TWO),
        ("p.json", TWO),
        ("p.JSONL", TWO),
        ("p.jsonl", b"\xef\xbb\xbf" + TWO.replace(b"\n", b"\r\n")),
        ("p.jsonl", b"\n  \n" + TWO + b"\n\n"),
        ("p.json", b'[{"prompt": "a"}, {"prompt": "b"}]'),
        ("p.jsonl", b'[{"prompt": "a"}, {"prompt": "b"}]'),
        ("p.json", b'\xef\xbb\xbf\n[\n {\n  "prompt": "a"\n },\n {"prompt": "b"}\n]\n'),
        ("p.jsonl.gz", gz(TWO)),
        ("p.jsonl.gz", gz(TWO[:16]) + gz(TWO[16:])),
        ("p.jsonl.gz", TWO),
        ("p.jsonl", gz(TWO)),
        ("p.json.gz", gz(b'[{"prompt": "a"}, {"prompt": "b"}]')),
        ("p.jsonl.zst", zstandard.compress(TWO)),
        ("p.v1.ndjson.zst", zstandard.compress(TWO[:16]) + zstandard.compress(TWO[16:])),
    ],
)
def test_lines_arrays_and_compressed_files_read_alike(tmp_path, name, data) -> None:
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / name) == ["a", "b"]


def test_one_object_over_several_lines_is_one_row(tmp_path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"prompt": "a", "level": 1}, indent=1))
    assert texts(tmp_path / "p.json") == ["a"]


MANY = b"".join(b'{"prompt": "%d"}\n' % i for i in range(3000))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", TWO + b'["c"]', "p.jsonl:3: a list, expected an object"),
        ("p.json", b'["a", "b"]', "p.json:1: text, expected an object"),
        ("p.json", b'[[{"prompt": "a"}]]', "p.json:1: a list, expected an object"),
        ("p.json", b'[\n{"prompt": "a"},\n3]', "p.json:3: a number, expected an object"),
        ("p.json", b"[]", "contains no prompts"),
        ("p.json", b'[\n{"prompt": "a"},\n{"prompt" "b"}\n]', "p.json:3: not valid JSON"),
        ("p.json", b'[\n{"prompt": "a"},\n', "p.json:3: not valid JSON"),
        ("p.json", b'[\n{"prompt": "a"}\n{"prompt": "b"}]', "p.json:3: not valid JSON"),
        ("p.json", b'[{"prompt": "a"}]\n{"prompt": "b"}', "p.json:2: not valid JSON .Extra data behind the array"),
        ("p.json", b'[{"prompt": "\xff"}]', "p.json:1: not valid JSON"),
        ("p.json", b'{\n"prompt": "a",\n}', "p.json:3: not valid JSON"),
        ("p.jsonl", b'[{"role": "user", "content": "a"}]\n' * 2, "a single turn; give one conversation per row"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "p.jsonl:1: not valid JSON .'prompt' is there twice"),
        ("p.jsonl", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "p.jsonl:1: not valid JSON"),
        ("p.jsonl", b'{"prompt": "a", "n": ' + b"[" * 90000 + b"]" * 90000 + b"}", "p.jsonl:1: not valid JSON"),
        ("p.jsonl", b'{"prompt": "a", "n": ' + b"[" * 990 + b"]" * 990 + b"}", "p.jsonl:1: n"),
        ("p.jsonl", b"\0" * 100, "p.jsonl:1: not valid JSON"),
        ("p.jsonl", TWO.decode().encode("utf-16"), "p.jsonl: is UTF-16 text; write it as UTF-8"),
        ("p.jsonl", b"", "contains no prompts"),
        ("p.jsonl.gz", b"", "contains no prompts"),
        ("p.jsonl.gz", gz(MANY)[:-20], "p.jsonl.gz: cannot be read from line .*Truncated"),
        ("p.jsonl.gz", gz(MANY)[:-8] + b"12345678", "p.jsonl.gz: cannot be read from line"),
        ("p.jsonl.zst", zstandard.compress(MANY)[:-20], "p.jsonl.zst: cannot be read from line .*Truncated"),
        ("p.gz", gz(TWO), "unknown file type '.gz'; give one of .jsonl"),
        ("p.csv.gz", gz(TWO), "unknown file type '.csv.gz'"),
        ("p.parquet", b"", "damaged Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name, data, message) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptsError, match=message):
        load(str(tmp_path / name))


def test_two_columns_of_one_name_are_refused(tmp_path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(PromptsError, match="two columns are called 'prompt'"):
        load(str(tmp_path / "p.parquet"))


def conversation(name: str, arguments: dict) -> list[dict]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]


def test_parquet_and_json_lines_give_the_same_prompts(tmp_path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "string"}}}}}
    other = {"type": "function", "function": {"name": "root", "parameters": {"properties": {"x": {"type": "number"}}}}}
    rows = [
        {"messages": conversation("add", {"a": 1, "b": 2}), "tools": [tool], "chat_template_kwargs": {"effort": "low"}},
        {"messages": conversation("root", {"x": 9}), "tools": [other], "chat_template_kwargs": {"depth": 3}},
        {"messages": conversation("now", {}), "level": 2},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist([{"level": None, **row} for row in rows]), tmp_path / "p.parquet")
    lines, table = load(str(tmp_path / "p.jsonl")), load(str(tmp_path / "p.parquet"))
    assert [p.content for p in lines] == [p.content for p in table] == [row["messages"] for row in rows]
    assert [(p.tools, p.template_args) for p in lines] == [(p.tools, p.template_args) for p in table]
    assert [p.digest() for p in lines] == [p.digest() for p in table]
    assert len({p.digest() for p in lines}) == 3


@pytest.mark.parametrize(
    "messages",
    [
        {"role": ["user"], "content": ["hi"]},
        {"role": ["user"], "content": ["hi"], "name": None},
        '[{"role": "user", "content": "hi"}]',
        {"from": ["human"], "value": ["hi"]},
    ],
)
def test_objects_of_lists_and_json_text_are_conversations_too(tmp_path, messages) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "p.parquet")
    assert texts(tmp_path / "p.parquet") == [[{"role": "user", "content": "hi"}]]


def test_lists_of_different_lengths_are_no_conversation(tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"messages": {"role": ["user", "user"], "content": ["hi"]}}')
    with pytest.raises(PromptsError, match=r"p.jsonl:1: `messages` has 2 of role, 1 of content; give as many of each"):
        load(str(tmp_path / "p.jsonl"))


def test_what_is_no_number_is_null(tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "answer": NaN, "level": NaN, "more": {"x": [Infinity, 1]}}\n{"prompt": "b", "answer": -Infinity}'
    )
    rows = [{"prompt": "a", "answer": math.nan, "level": math.inf}, {"prompt": "b", "answer": 3.0, "level": 1.0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    first, second = load(str(tmp_path / "p.jsonl"))
    assert (first.answer, first.metadata, second.answer) == (None, {"level": None, "more": {"x": [None, 1]}}, None)
    first, second = load(str(tmp_path / "p.parquet"))
    assert (first.answer, first.metadata, second.answer) == (None, {"level": None}, "3")
