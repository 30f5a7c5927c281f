"""Agents' transcripts: what the assistant wrote, and what it read in between."""

import pytest

from logitcache.errors import ModelError
from logitcache.inference.rendering import render
from logitcache.inference.token_texts import token_texts
from logitcache.inference.transcript import transcript
from logitcache.prompts import Prompt
from tests.small_tokenizers import CHATML, byte_level, llama_2

USER = [{"role": "user", "content": "q"}]
TURNS = [
    {"role": "assistant", "content": "look"},
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "both"},
]


def parts(facts, found) -> tuple[str, list[str], str]:
    """The prompt, the spans that were read, and the rest with a bar for each such span."""
    texts = token_texts(facts, found.ids)
    joined = ["".join(t or "" for t in texts[start:end]) for start, end in found.context]
    for start, end in found.context:
        texts[start:end] = ["|", *[""] * (end - start - 1)]
    return (
        "".join(t or "" for t in texts[: found.prompt_length]),
        joined,
        "".join(t or "" for t in texts[found.prompt_length :]),
    )


def test_tool_turns_and_headers_are_read_and_the_assistants_turns_are_not() -> None:
    facts = byte_level()
    found = transcript(facts, Prompt("p", USER), TURNS, {})
    _prompt, read, written = parts(facts, found)
    assert found.ids[: found.prompt_length] == render(facts, Prompt("p", USER), {})
    assert written == "look<|im_end|>|both<|im_end|>"
    assert read == ["\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>tool\nsun<|im_end|>\n<|im_start|>assistant\n"]


def test_results_that_share_a_turn_and_calls_with_their_arguments() -> None:
    """As Qwen's: tool results stand in one user turn, calls in the assistant's."""
    template = (
        "{%- for m in messages %}{%- if m.role == 'tool' %}"
        "{%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
        "{{- '\\n<r>' + m.content + '</r>' }}"
        "{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
        "{%- for c in m.tool_calls or [] %}{{- '<call>' + (c.function.arguments | tojson) + '</call>' }}{%- endfor %}"
        "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    facts = byte_level(template)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    _, read, written = parts(facts, transcript(facts, Prompt("p", USER), [call, *TURNS[1:]], {}))
    assert written == '<call>{"a": 1}</call><|im_end|>|both<|im_end|>'
    assert read == ["\n<|im_start|>user\n<r>rain</r>\n<r>sun</r><|im_end|>\n<|im_start|>assistant\n"]


def test_a_last_turn_that_ends_with_another_token_than_the_others() -> None:
    """As Harmony's, whose last message ends with <|return|> and a call with <|call|>."""
    template = (
        "{%- for m in messages %}{{- '<|start|>' + m.role + '<|message|>' + m.content }}"
        "{{- '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
    )
    more = ("<|start|>", "<|message|>", "<|return|>", "<|end|>")
    facts = byte_level(template, more=more)
    _, read, written = parts(facts, transcript(facts, Prompt("p", USER), TURNS, {}))
    assert written == "<|message|>look<|end|>|<|message|>both<|return|>"
    assert read[0].startswith("<|start|>tool")


def test_a_transcript_may_end_with_a_result_and_with_sentencepiece() -> None:
    facts = llama_2(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    found = transcript(facts, Prompt("p", USER), TURNS[:2], {})
    _, read, written = parts(facts, found)
    assert (written, read) == ("look</s>|", ["t:rain</s>"])
    assert found.context[-1][1] == len(found.ids)


def test_a_template_that_writes_earlier_turns_otherwise_is_refused_by_row() -> None:
    drops = CHATML.replace("m.content", "(m.content if m.role != 'assistant' or loop.last else '...')")
    with pytest.raises(
        ModelError, match="prompt 'p': the chat template writes turn 1 of the completion, or what comes before it,"
    ):
        transcript(byte_level(drops), Prompt("p", USER), TURNS, {})
    with pytest.raises(ModelError, match="no turn of the assistant"):
        transcript(byte_level(), Prompt("p", USER), TURNS[1:2], {})


def test_reasoning_that_the_template_does_not_write_is_named() -> None:
    turn = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2", "thinking": None}
    assert transcript(byte_level(), Prompt("p", USER), [turn], {}).lost == {"reasoning_content"}
    written = CHATML.replace("m.content", "(m.reasoning_content or '') + m.content")
    found = transcript(byte_level(written), Prompt("p", USER), [turn], {})
    assert found.lost == set()
    assert parts(byte_level(written), found)[2] == "2 and 24<|im_end|>"


def test_a_template_that_drops_the_reasoning_of_earlier_turns_is_refused_by_row() -> None:
    """As Qwen3's and R1's: what the assistant wrote is not what stands there."""
    drops = CHATML.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
    thinks = [{"role": "assistant", "content": "<think>a</think>look"}, *TURNS[1:]]
    with pytest.raises(ModelError, match="writes turn 1 of the completion"):
        transcript(byte_level(drops), Prompt("p", USER), thinks, {})
    assert transcript(byte_level(drops), Prompt("p", USER), TURNS, {}).context


def test_a_generation_prompt_that_the_turn_does_not_begin_with_is_refused_by_row() -> None:
    opens = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")
    with pytest.raises(ModelError, match="writes turn 1 of the completion"):
        transcript(byte_level(opens), Prompt("p", USER), TURNS, {})
