"""Checks the turns of a conversation and gives all spellings of one conversation the same form."""

from typing import Any

from logitcache.errors import PromptsError
from logitcache.prompts.prompt import Messages
from logitcache.prompts.values import from_json, kind_of, records, without_nulls

# What each turn may follow; "" is the start. An instruction turn is the first and the only one, because templates drop or
# refuse others.
_MAY_FOLLOW = {
    "system": ("",),
    "developer": ("",),
    "user": ("", "system", "developer", "user", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# Names of ShareGPT's `from`.
_SPEAKERS = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # of an assistant turn, by the names that templates use
_CALLS_IN_TEXT = ("<tool_call", "<|tool_call", "[TOOL_CALL", "<function", "<|python_tag|>")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def turns(name: str, value: Any) -> Messages:
    """The turns of a conversation: ``role``, ``content`` as text, and the other entries that are not null.

    Args:
        name: the column, for messages.
        value: what `records` takes, with ``role`` and ``content`` or ShareGPT's ``from`` and ``value``.
    Raises: PromptsError.
    """
    found = []
    for number, record in enumerate(records(name, value), 1):
        try:
            found.append(_turn(without_nulls(record)))
        except PromptsError as e:
            raise PromptsError(f"`{name}` turn {number}: {e}") from None
    if not found:
        raise PromptsError(f"`{name}` has no turns; remove the row")
    return found


def check_order(messages: Messages) -> None:
    """Raises: PromptsError for a turn that cannot follow the turn before it, or if no user speaks."""
    before: dict[str, Any] = {"role": ""}
    for number, turn in enumerate(messages, 1):
        role, last = turn["role"], before["role"]
        if last not in _MAY_FOLLOW[role]:
            allowed = " or ".join(f"after {name}" for name in _MAY_FOLLOW[role] if name) or "once, as the first turn"
            where = f" after {last}" if last else ""
            raise PromptsError(f"turn {number} is {role}{where}; {role} comes only {allowed}")
        if role == "tool" and last == "assistant" and not _calls(before):
            raise PromptsError(f"turn {number} is tool after an assistant turn without `tool_calls`; add them")
        before = turn
    if not any(turn["role"] == "user" for turn in messages):
        raise PromptsError("no user turn; add one, or remove the row")


def _calls(turn: dict[str, Any]) -> bool:
    return "tool_calls" in turn or any(mark in turn["content"] for mark in _CALLS_IN_TEXT)


def _turn(record: dict[str, Any]) -> dict[str, Any]:
    record = dict(record)
    role, content = _role(record), record.pop("content", None)
    for medium in MEDIA:
        if record.get(medium):
            raise PromptsError(f"`{medium}`: only text can be asked")
    if role == "function_call":
        call = from_json("function_call", content)
        record["tool_calls"], role, content = call if isinstance(call, list) else [call], "assistant", ""
    if calls := record.pop("tool_calls", None):
        if role != "assistant":
            raise PromptsError(f"a {role} turn has `tool_calls`; only an assistant turn calls tools")
        record["tool_calls"] = [_call(call) for call in records("tool_calls", calls)]
    if content is None and role == "assistant" and any(record.get(name) for name in ("tool_calls", *REASONING)):
        content = ""
    text = _text(content)
    if role == "user" and not text.strip():
        raise PromptsError("a user turn without text; remove the row")
    return {"role": role, "content": text, **record}


def _role(record: dict[str, Any]) -> str:
    """Removes the role from a record; moves ShareGPT's ``value`` to ``content``."""
    if "role" not in record and "from" in record:
        name, known = record.pop("from"), _SPEAKERS
        record["content"] = record.pop("value", None)
    else:
        name, known = record.pop("role", None), {role: role for role in _MAY_FOLLOW}
    if name is None:
        raise PromptsError(f"no `role`, found {', '.join(map(str, record)) or 'nothing'}; give `role` and `content`")
    if not isinstance(name, str) or name not in known:
        other = _SPEAKERS.get(name.strip().lower()) if isinstance(name, str) else None
        hint = f"did you mean {other}?" if other in known else f"give one of {', '.join(known)}"
        raise PromptsError(f"unknown role {name!r}; {hint}")
    return known[name]


def _text(content: Any) -> str:
    """Content as text. The text parts of a list are joined by line breaks, as vLLM does."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = records("content", content)
    if content is None:
        raise PromptsError("no `content`; give text, or remove the row")
    if not isinstance(content, list):
        raise PromptsError(f"`content` is {kind_of(content)}, expected text or a list of text parts")
    return "\n".join(_part(number, part) for number, part in enumerate(content, 1))


def _part(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise PromptsError(f"part {number} of `content` is {kind_of(part)}, expected text")
    others = [name for name in part if part[name] and name not in ("type", "text")]
    kind = part.get("type", "text" if not others else others[0])
    if kind not in ("text", "input_text", "output_text") or others:
        raise PromptsError(
            f"part {number} of `content` is {others[0] if kind == 'text' else kind!r}; only text can be asked"
        )
    if not isinstance(part.get("text"), str):
        raise PromptsError(f"part {number} of `content` has no text")
    return part["text"]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with ``arguments`` as an object, which is what chat templates take."""
    call, inner = dict(call), call
    if "function" in call:
        if not isinstance(call["function"], dict):
            raise PromptsError("`function` of a tool call must be an object with `name` and `arguments`")
        inner = call["function"] = dict(call["function"])
    else:
        inner = {name: value for name, value in call.items() if name not in ("id", "type")}
        call = {"type": "function", **{k: v for k, v in call.items() if k not in inner}, "function": inner}
    if not isinstance(inner.get("name"), str):
        raise PromptsError("a tool call has no `name`")
    arguments = from_json("arguments", inner.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise PromptsError(f"`arguments` of a call of {inner['name']} must be an object")
    inner["arguments"] = without_nulls(arguments)
    return call


def tool_list(value: Any) -> list[dict[str, Any]] | None:
    """The column ``tools`` as chat templates take it: a list of ``{"type": "function", "function": {...}}``.

    Raises: PromptsError.
    """
    value = from_json("tools", value) if value != "" else None
    if isinstance(value, list):
        value = [from_json("tools", tool) for tool in value]
    return [_tool(without_nulls(tool)) for tool in records("tools", value)] or None if value is not None else None


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise PromptsError("`tools`: each must be an object with `type` and `function`, which has a `name`")
    if "parameters" in function:
        function = function | {"parameters": from_json("parameters", function["parameters"])}
    return tool | {"function": without_nulls(function)}


# Arguments of `apply_chat_template` that are not variables of the template.
RESERVED_VARIABLES = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)


def template_variables(value: Any) -> dict[str, Any]:
    """The column ``chat_template_kwargs``: variables of the chat template by name.

    Raises: PromptsError.
    """
    value = without_nulls(from_json("chat_template_kwargs", value) if value != "" else None) or {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise PromptsError("`chat_template_kwargs` must be an object with a value for each variable of the template")
    if reserved := sorted(RESERVED_VARIABLES & value.keys()):
        raise PromptsError(f"`chat_template_kwargs` {reserved[0]}: it is not a variable of the template; remove it")
    return value
