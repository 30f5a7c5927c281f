import pytest

from logitcache.errors import PromptsError
from logitcache.prompts.messages import check_order, template_variables, tool_list, turns

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def turn(role: str, content="x", **others) -> dict:
    return {"role": role, "content": content, **others}


def read(*messages) -> list[dict]:
    found = turns("messages", list(messages))
    check_order(found)
    return found


@pytest.mark.parametrize(
    "content",
    [
        "a\nb",
        ["a", "b"],
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}],
        [{"text": "a"}, {"type": "input_text", "text": "b"}],
        {"type": ["text", "text"], "text": ["a", "b"]},
    ],
)
def test_text_parts_are_joined_by_line_breaks(content) -> None:
    assert read(turn("user", content)) == [turn("user", "a\nb")]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "a"}], "part 1 .* 'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}], "part 2 .* 'input_audio'"),
        ([{"image": "x"}], "part 1 .* 'image'"),
        ([{"type": "tool_result", "content": "x"}], "part 1 .* 'tool_result'"),
        ([3], "part 1 of `content` is a number"),
        ([{"type": "text", "text": None}], "part 1 of `content` has no text"),
        (3, "`content` is a number, expected text or a list of text parts"),
        ({"text": "a"}, "`content` must be a list of objects"),
        (None, "no `content`"),
        ("", "a user turn without text"),
        (" \n", "a user turn without text"),
        ([], "a user turn without text"),
        ([{"type": "text", "text": ""}], "a user turn without text"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_its_turn(content, found) -> None:
    with pytest.raises(PromptsError, match=f"`messages` turn 2: {found}"):
        read(turn("system"), turn("user", content))


@pytest.mark.parametrize(
    "roles",
    [
        "user",
        "system user",
        "developer user",
        "user user",
        "system user assistant user",
        "user assistant",
    ],
)
def test_orders_that_are_taken(roles) -> None:
    assert " ".join(m["role"] for m in read(*map(turn, roles.split()))) == roles


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("user system", "turn 2 is system after user; system comes only once, as the first turn"),
        ("system system user", "turn 2 is system after system"),
        ("system developer user", "turn 2 is developer after system"),
        ("assistant user", "turn 1 is assistant; assistant comes only after user or after tool"),
        ("system assistant", "turn 2 is assistant after system"),
        ("user assistant assistant", "turn 3 is assistant after assistant"),
        ("user tool", "turn 2 is tool after user"),
        ("user assistant tool", "turn 3 is tool after an assistant turn without `tool_calls`"),
        ("system", "no user turn"),
        ("user narrator", "turn 2: unknown role 'narrator'; give one of system, developer, user, assistant, tool"),
        ("human", "turn 1: unknown role 'human'; did you mean user"),
        ("User", "turn 1: unknown role 'User'; did you mean user"),
    ],
)
def test_orders_and_roles_that_are_refused(roles, message) -> None:
    with pytest.raises(PromptsError, match=message):
        read(*map(turn, roles.split()))


def test_tool_calls_have_one_form() -> None:
    want = [turn("user"), turn("assistant", "", tool_calls=[CALL]), turn("tool", "3"), turn("tool", "4")]
    rest = [turn("tool", "3"), turn("tool", "4")]
    text = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    nulls = {"type": "function", "id": None, "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    for call in (CALL, text, nulls, {"name": "add", "arguments": {"a": 1}}):
        assert read(turn("user"), turn("assistant", None, tool_calls=[call]), *rest) == want
    sharegpt = [
        {"from": "human", "value": "x"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "tool", "value": "4"},
    ]
    assert read(*sharegpt) == want
    written = [turn("user"), turn("assistant", "<tool_call>\n{}\n</tool_call>"), turn("tool", "3")]
    assert read(*written) == written


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (turn("user", tool_calls=[CALL]), "a user turn has `tool_calls`"),
        (turn("assistant", tool_calls=["add"]), "`tool_calls` must be a list of objects"),
        (turn("assistant", tool_calls=[{"type": "function", "function": {}}]), "a tool call has no `name`"),
        (turn("assistant", tool_calls=[{"name": "f", "arguments": "{a"}]), "`arguments` is text that is not JSON"),
        (
            turn("assistant", tool_calls=[{"name": "f", "arguments": [1]}]),
            "`arguments` of a call of f must be an object",
        ),
        (turn("user", images=["x"]), "`images`: only text"),
        ({"content": "x"}, "no `role`, found content"),
        ({"role": None, "content": "x"}, "no `role`"),
    ],
)
def test_turns_that_mean_nothing_are_refused(message, found) -> None:
    with pytest.raises(PromptsError, match=found):
        read(message)


def test_tools_have_one_form() -> None:
    flat = {"name": "add", "parameters": {"type": "object", "required": None}}
    for value in (
        [TOOL],
        [flat],
        '[{"name": "add", "parameters": {"type": "object"}}]',
        {"name": ["add"], "type": None},
    ):
        (tool,) = tool_list(value) or []
        assert tool["function"]["name"] == "add"
        assert tool["type"] == "function"
    assert tool_list([flat]) == [TOOL]
    assert [tool_list(value) for value in (None, [], "")] == [None, None, None]
    for value in (["add"], [3], {"name": "add"}, [{"type": "function"}], 3):
        with pytest.raises(PromptsError, match="tools"):
            tool_list(value)


def test_template_variables_are_an_object_of_variables() -> None:
    assert template_variables({"enable_thinking": False, "effort": None}) == {"enable_thinking": False}
    assert template_variables('{"effort": "low"}') == {"effort": "low"}
    assert [template_variables(value) for value in (None, {}, "")] == [{}, {}, {}]
    for value in ([1], 3, {"tokenize": True}, {"chat_template": "x"}, "low"):
        with pytest.raises(PromptsError, match="chat_template_kwargs"):
            template_variables(value)
