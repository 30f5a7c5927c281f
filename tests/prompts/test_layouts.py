import json

import pytest

from logitcache.errors import PromptsError
from logitcache.prompts import load, parse

USER = [{"role": "user", "content": "What is 6*7?"}]
ASSISTANT = {"role": "assistant", "content": "42"}
BRIEF = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": "What is 6*7?"}, {"from": "gpt", "value": "42"}]


def source(path, *rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": [*USER, ASSISTANT]}, USER),
        ({"prompt": USER, "completion": [ASSISTANT]}, USER),
        ({"prompt": USER, "completion": "42"}, USER),
        ({"prompt": "What is 6*7?", "completion": "42"}, "What is 6*7?"),
        ({"conversations": SHAREGPT}, USER),
        ({"conversations": SHAREGPT, "system": "Be brief."}, [BRIEF, *USER]),
        ({"messages": [*USER, ASSISTANT], "system": "Be brief."}, [BRIEF, *USER]),
        ({"messages": [BRIEF, *USER, ASSISTANT], "system": "Be brief."}, [BRIEF, *USER]),
        ({"conversations": SHAREGPT, "system": ""}, USER),
        ({"messages": SHAREGPT}, USER),
        ({"conversations": [*USER, ASSISTANT]}, USER),
        ({"instruction": "What is 6*7?", "input": "", "output": "42"}, USER),
        ({"instruction": "What is", "input": "6*7?", "output": "42"}, [{"role": "user", "content": "What is\n\n6*7?"}]),
        ({"messages": [*USER, ASSISTANT], "instruction": "a", "output": "b"}, USER),
        ({"prompt": None, "messages": [*USER, ASSISTANT], "conversations": None}, USER),
    ],
)
def test_layouts_give_a_prompt_and_a_completion(row, prompt) -> None:
    assert parse("p:1", dict(row)).prompt.content == prompt
    found = parse("p:1", dict(row), completed=True)
    assert (found.prompt.content, found.completion) == (prompt, "42")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, "columns with a value are question, answer: try `columns` prompt=question"),
        ({"Problem": "q", "solution": "a"}, "try `columns` prompt=Problem"),
        ({"conversation": USER}, "try `columns` messages=conversation"),
        ({"promt": "q"}, "try `columns` prompt=promt"),
        (
            {"x": 1, "y": None},
            "columns with a value are x: give one of them, or name a column by `columns` prompt=THEIRS",
        ),
        ({}, "are none: give one of them"),
        ({"messages": None}, "are none: give one of them"),
        (USER[0], "a single turn"),
        (
            {"prompt": "a", "messages": USER},
            "both `prompt` and `messages`; choose one of them by `columns` prompt=prompt",
        ),
        ({"prompt": 3}, "`prompt` is a number, expected text or messages"),
        ({"prompt": ["a"]}, "`prompt` must be a list of objects"),
        ({"messages": "hi"}, "`messages` is text that is not JSON: 'hi'"),
        ({"messages": [BRIEF, *USER], "system": "Be long."}, "both a column `system` and a system turn"),
        ({"messages": USER, "system": ["x"]}, "`system` is a list"),
        ({"messages": USER, "images": [{"bytes": "x"}]}, "`images`: only text can be asked"),
        ({"instruction": "a", "input": 3, "output": "b"}, "`instruction` and `input` must be text"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "`history`: earlier turns are not read"),
        ({"prompt": "a", "id": ["x"]}, "`id` is a list"),
    ],
)
def test_a_row_that_says_nothing_or_too_much_is_refused(row, message) -> None:
    with pytest.raises(PromptsError, match=f"^p:1: .*{message}"):
        parse("p:1", dict(row))


def test_columns_take_our_names(tmp_path) -> None:
    rows = [{"question": "a", "solution": "1", "answer": "2"}, {"question": "b", "solution": None}]
    found = load(source(tmp_path / "p.jsonl", *rows), columns={"prompt": "question", "answer": "solution"})
    assert [(p.content, p.answer, p.metadata) for p in found] == [("a", "1", {}), ("b", None, {})]
    assert found.counts.unused == {"answer": 1}, "a column that another one replaces is counted"


def test_columns_may_change_places(tmp_path) -> None:
    (prompt,) = load(
        source(tmp_path / "p.jsonl", {"prompt": "a", "answer": "b"}), columns={"prompt": "answer", "answer": "prompt"}
    )
    assert (prompt.content, prompt.answer) == ("b", "a")


@pytest.mark.parametrize("name", ["prompt", "messages"])
def test_a_column_that_is_named_is_chosen_and_the_other_counted(tmp_path, name) -> None:
    row = {"prompt": "a", "messages": USER}
    found = load(source(tmp_path / "p.jsonl", row), columns={name: name})
    assert found.prompts[0].content == row[name]
    assert found.counts.unused == {"messages" if name == "prompt" else "prompt": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "question"}, "`columns` promt=question: unknown name 'promt'; did you mean prompt"),
        ({"prompt": "qestion"}, "try `columns` prompt=question"),
        ({"prompt": "question", "answer": "solutoin"}, "no row has 'solutoin'; did you mean solution"),
    ],
)
def test_a_column_that_no_row_has_is_refused(tmp_path, columns, message) -> None:
    with pytest.raises(PromptsError, match=message):
        load(source(tmp_path / "p.jsonl", {"question": "a", "solution": "1"}), columns=columns)
