"""Prompts and completions as token ids: the chat template, and the seam between the two."""

import json
from collections.abc import Iterator
from typing import Any

from logitcache.errors import InputError, ModelError, did_you_mean, first_line
from logitcache.inference.model import RESERVED_TEMPLATE_ARGS, ModelFacts, refuse_reserved
from logitcache.inference.token_texts import text_behind
from logitcache.prompts import Messages, Prompt

_PROBE = "logitcache"  # an answer that is found again in a rendered conversation
_ANCHORS = ("\n", ")", "x")  # texts that rarely grow together with what follows


def render(facts: ModelFacts, prompt: Prompt, template_args: dict[str, Any]) -> list[int]:
    """Token ids of a prompt. Messages go through the chat template, with its generation prompt.

    Plain text gets the beginning of sequence that the tokenizer puts before a text, unless it begins with one itself, and
    no end of sequence.

    Raises: ModelError if there is no template, or the template refuses the messages.
    """
    if isinstance(prompt.content, str):
        return _opened(facts.tokenizer, prompt.content)
    return encode(facts, conversation(facts, prompt, prompt.content, template_args, generate=True))


def conversation(
    facts: ModelFacts, prompt: Prompt, messages: Messages, template_args: dict[str, Any], *, generate: bool
) -> str:
    """Messages as the chat template writes them, with the prompt's tools and variables.

    Args:
        template_args: variables of the run; those of the prompt win over them.
        generate: whether the generation prompt follows, which begins the next turn of the assistant.
    Raises: ModelError if there is no template, or the template refuses the messages.
    """
    if facts.chat_template is None:
        raise ModelError(
            f"prompt {prompt.id!r} has `messages`, but {facts.name} has no chat template; give `prompt` text instead"
        )
    try:
        refuse_reserved("template_args", prompt.template_args, RESERVED_TEMPLATE_ARGS)
        tokenizer: Any = facts.tokenizer
        text: str = tokenizer.apply_chat_template(
            _with_parsed_arguments(messages),
            tools=prompt.tools or None,
            tokenize=False,
            add_generation_prompt=generate,
            **{**template_args, **prompt.template_args},
        )
    except InputError as e:
        raise ModelError(f"prompt {prompt.id!r}: {e}") from None
    except Exception as e:  # a template may raise anything
        raise ModelError(f"prompt {prompt.id!r}: the chat template refuses its messages: {first_line(e)}") from None
    return text


def encode(facts: ModelFacts, text: str) -> list[int]:
    """Token ids of a text, without the tokens that a tokenizer puts around one."""
    return list(facts.tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_behind(facts: ModelFacts, before: list[int], text: str) -> list[int]:
    """Token ids of a text that follows the tokens ``before``. Behind them they decode to exactly the text, where the
    tokenizer can: SentencePiece puts a space before a text that is encoded alone."""
    context, best = before[-_CONTEXT:], encode(facts, text)
    score = _fidelity(facts, context, best, text)
    for anchor in _ANCHORS if score < (True, True) else ():
        opening, ids = encode(facts, anchor), encode(facts, anchor + text)
        if ids[: len(opening)] != opening:
            continue
        found = ids[len(opening) :]
        if (better := _fidelity(facts, context, found, text)) > score:
            best, score = found, better
    return best


_CONTEXT = 8  # tokens before a text that can change how its first token decodes


def _fidelity(facts: ModelFacts, context: list[int], ids: list[int], text: str) -> tuple[bool, bool]:
    """Whether the ids decode to the text, and whether they do so in its leading white space."""
    found = text_behind(facts, context, ids)
    return found == text, len(found) - len(found.lstrip()) == len(text) - len(text.lstrip())


def turn_end(facts: ModelFacts, template_args: dict[str, Any]) -> list[int]:
    """The tokens that the chat template puts behind an assistant's turn, up to the one that ends it; the tokenizer's end of
    sequence where there is no template, or it puts none. Empty for a tokenizer without one."""
    eos: Any = facts.tokenizer.eos_token_id
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
    for following in ([], [{"role": "user", "content": "Hi"}]):
        try:
            text = conversation(facts, Prompt("", []), [*turns, *following], template_args, generate=False)
        except ModelError:
            break
        _, found, rest = text.rpartition(_PROBE)
        ids = encode_behind(facts, encode(facts, _PROBE), rest) if found else []
        ends = [i for i, token in enumerate(ids) if token in facts.eos_ids]
        if following:  # a turn that only the next one ends, as in GLM
            ids, ends = ids[:1], [i for i in ends if i == 0]
        elif not ends:
            ends = [i for i, token in enumerate(ids) if token in facts.special_ids]
        if ends:
            return ids[: ends[0] + 1]
    return [] if eos is None else [eos]


def given_end(facts: ModelFacts, token: str) -> list[int]:
    """The token id of an end that the user names.

    Raises: InputError for a text that is no token of the vocabulary.
    """
    vocabulary = facts.tokenizer.get_vocab()
    if token not in vocabulary:
        known = [text for text in vocabulary if vocabulary[text] in facts.special_ids or text in facts.control_tokens]
        raise InputError(f"`eos` {token!r}: not a token of the teacher's vocabulary; {did_you_mean(token, known)}")
    return [vocabulary[token]]


def without_repeated_marker(prompt_text: str, completion: str, markers: list[str] | None) -> tuple[str, str | None]:
    """A completion without the section marker that its prompt already ends with.

    Returns: the completion, and the marker that was left out; None for none.
    """
    head, tail = prompt_text.rstrip(), prompt_text[len(prompt_text.rstrip()) :]
    body = completion.lstrip()
    for marker in markers or ():
        if head.endswith(marker) and body.startswith(marker):
            rest = body.removeprefix(marker)
            while tail and rest.startswith(tail[0]):
                rest, tail = rest[1:], tail[1:]
            return rest, marker
    return completion, None


def remarks(facts: ModelFacts, prompt: Prompt) -> Iterator[str]:
    """What of a prompt was not used, or was read otherwise than it looks, for the summary of a run."""
    if isinstance(prompt.content, str):
        if prompt.tools or prompt.template_args:
            yield "prompts are plain text: no template uses their tools and chat_template_kwargs"
        return
    texts = "\n".join(str(m.get("content") or "") for m in prompt.content if m.get("role") != "assistant")
    if any(token in texts for token in facts.control_tokens):
        yield "prompts spell control tokens in their messages, and the teacher reads them as such"


def _opened(tokenizer: Any, text: str) -> list[int]:
    """Ids of a plain text behind the tokens that the tokenizer puts before one, and without those it puts behind."""
    inner = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    outer = list(tokenizer(text)["input_ids"])
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            opening = outer[:start]
            return inner if inner[:start] == opening else [*opening, *inner]
    return outer


def _with_parsed_arguments(messages: Messages) -> Messages:
    """Messages whose tool calls have their arguments as objects, as templates expect; OpenAI's have them as JSON text."""
    return [
        {**m, "tool_calls": [_parsed(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages
    ]


def _parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
