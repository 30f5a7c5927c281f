import json

import pytest

from logitcache.errors import PromptsError
from logitcache.prompts import Prompt, load, parse

USER, OTHER = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
ASSISTANT = {"role": "assistant", "content": "yes"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
CALLING, TOOL = {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}


def source(path, *rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_an_assistant_turn_at_the_end_is_dropped_and_counted(tmp_path) -> None:
    rows = [
        {"id": 1, "messages": [USER, ASSISTANT]},
        {"id": 2, "messages": [USER, ASSISTANT, OTHER, CALLING]},
        {"id": 3, "messages": [USER, CALLING, TOOL]},
    ]
    found = load(source(tmp_path / "p.jsonl", *rows))
    assert [p.content for p in found] == [[USER], [USER, ASSISTANT, OTHER], [USER, CALLING, TOOL]]
    assert found.counts.dropped_turns == 2


def test_what_is_not_used_is_counted_by_name(tmp_path) -> None:
    rows = [
        {"prompt": "a", "completion": "yes", "finish_reason": "stop", "level": 1, "note": None, "answer": "1"},
        {"prompt": "b", "level": 2, "answer": float("nan"), "gym": {"x": 1}},
        {"prompt": "a", "level": 3},
    ]
    counts = load(source(tmp_path / "p.jsonl", *rows)).counts
    assert (counts.prompts, counts.repeated, counts.unanswered) == (2, 1, 1)
    assert counts.metadata == {"level": 2}
    assert counts.unused == {"completion": 1, "finish_reason": 1}


def test_tools_and_template_variables_are_the_prompts_own() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"messages": [USER], "tools": [tool], "chat_template_kwargs": {"enable_thinking": False}, "level": 1}
    prompt = parse("p:1", row).prompt
    assert (prompt.tools, prompt.template_args, prompt.metadata) == ([tool], {"enable_thinking": False}, {"level": 1})
    assert prompt.id == prompt.digest() != Prompt("", [USER]).digest()
    text = parse("p:1", {"prompt": "a", "tools": ["x"]}).prompt
    assert (text.tools, text.metadata) == (None, {"tools": ["x"]}), "text goes through no template"


def test_ids_of_text_and_of_plain_messages_stay_what_they_were() -> None:
    assert parse("p:1", {"prompt": "a"}).prompt.id == Prompt("", "a").digest()
    assert parse("p:1", {"prompt": "a"}).prompt.id.startswith("dbea35bc")
    assert parse("p:1", {"messages": [{"role": "user", "content": "hi"}]}).prompt.id.startswith("ad05dcea")


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": [USER, ASSISTANT]}, [USER], "yes"),
        ({"messages": [USER, ASSISTANT, OTHER, ASSISTANT]}, [USER, ASSISTANT, OTHER], "yes"),
        ({"messages": [USER, CALLING, TOOL, ASSISTANT]}, [USER], [CALLING, TOOL, ASSISTANT]),
        ({"messages": [USER, CALLING, TOOL]}, [USER], [CALLING, TOOL]),
        ({"messages": [USER], "completion": [CALLING, TOOL, ASSISTANT]}, [USER], [CALLING, TOOL, ASSISTANT]),
        ({"messages": [USER, CALLING, TOOL], "completion": "yes"}, [USER, CALLING, TOOL], "yes"),
        (
            {"messages": [USER, ASSISTANT | {"reasoning_content": "hm"}]},
            [USER],
            [ASSISTANT | {"reasoning_content": "hm"}],
        ),
        ({"messages": [USER, ASSISTANT | {"name": None}]}, [USER], "yes"),
    ],
)
def test_a_completion_is_text_or_the_turns_after_the_last_user_turn(row, prompt, completion) -> None:
    found = parse("p:1", row, completed=True)
    assert (found.prompt.content, found.completion, found.dropped_turn) == (prompt, completion, False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "no `completion`, and no assistant turn at the end; give one of them"),
        ({"messages": [USER], "response": "x"}, "no `completion`.*try `columns` completion=response"),
        ({"messages": [USER, ASSISTANT], "completion": "x"}, "both `completion` and an assistant turn"),
        ({"messages": [USER], "completion": [USER]}, "`completion` has a user turn"),
        ({"messages": [USER], "completion": [ASSISTANT, ASSISTANT]}, "turn 3 is assistant after assistant"),
        ({"messages": [USER], "completion": []}, "`completion` has no turns"),
        ({"messages": [USER], "completion": 3}, "`completion` must be a list of objects, found a number"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "`completion` is a list, expected text, as the prompt is"),
        ({"prompt": "a", "completion": " "}, "the completion is empty"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "the completion is empty"),
        ({"prompt": "a", "completion": "x", "finish_reason": 3}, "`finish_reason` is a number"),
    ],
)
def test_a_row_without_one_completion_is_refused(row, message) -> None:
    with pytest.raises(PromptsError, match=f"^p:1: {message}"):
        parse("p:1", row, completed=True)
