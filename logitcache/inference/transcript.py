"""An agent's transcript as token ids: what the assistant wrote, between turns that it only read."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from logitcache.errors import ModelError
from logitcache.inference.model import ModelFacts
from logitcache.inference.rendering import conversation, encode, encode_behind
from logitcache.prompts import Messages, Prompt


@dataclass(frozen=True, slots=True)
class Transcript:
    """A rendered conversation. Its first ``prompt_length`` tokens are the prompt.

    Attributes:
        context: [start, end) spans of tokens behind the prompt that the assistant read and did not write.
        lost: names of the turns' fields of reasoning that the template does not write.
    """

    ids: list[int]
    prompt_length: int
    context: list[tuple[int, int]]
    lost: set[str]


def transcript(facts: ModelFacts, prompt: Prompt, turns: Messages, template_args: dict[str, Any]) -> Transcript:
    """Token ids of a prompt's messages and the turns that follow them. What the template puts behind the last turn, beyond
    its end, is left out.

    Raises: ModelError if the template refuses the messages, or writes a turn otherwise once others follow.
    """
    assert not isinstance(prompt.content, str)
    whole = conversation(facts, prompt, [*prompt.content, *turns], template_args, generate=False)

    def text(count: int, generate: bool) -> str:
        assert not isinstance(prompt.content, str)
        return conversation(facts, prompt, [*prompt.content, *turns[:count]], template_args, generate=generate)

    bounds: list[int] = []  # where each turn of the assistant begins and ends in the text
    for i, turn in enumerate(turns):
        if turn.get("role") != "assistant":
            continue
        before = text(i, True)
        until = text(i + 1, False)
        parting = _parting(whole, until)
        if not whole.startswith(before) or parting < len(_without_end(facts, until)):
            raise ModelError(
                f"prompt {prompt.id!r}: the chat template writes turn {i + 1} of the completion, or what comes before it, "
                "otherwise once others follow, so they are not its prompt; give `completion` as text, or another template"
            )
        bounds += [len(before), _end_of_turn(facts, whole, len(before), parting)]
    if not bounds:
        raise ModelError(f"prompt {prompt.id!r}: the completion has no turn of the assistant")
    if turns[-1].get("role") != "assistant":
        bounds += [len(whole), len(whole)]
    ids, context = encode(facts, whole[: bounds[0]]), []
    prompt_length = len(ids)
    for i, (start, end) in enumerate(pairwise(bounds)):
        piece = encode_behind(facts, ids, whole[start:end])
        if i % 2 and piece:
            context.append((len(ids), len(ids) + len(piece)))
        ids += piece
    fields = ((name, turn.get(name)) for turn in turns for name in ("reasoning_content", "reasoning", "thinking"))
    lost = {name for name, value in fields if isinstance(value, str) and value.strip() not in whole}
    return Transcript(ids, prompt_length, context, lost)


def _parting(whole: str, until: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(whole, until, strict=False)) if a != b), min(len(whole), len(until)))


def _without_end(facts: ModelFacts, text: str) -> str:
    """A text without the control tokens and white space at its end."""
    tokens = tuple(facts.control_tokens)
    while (shorter := text.rstrip()).endswith(tokens):
        text = shorter.removesuffix(max((t for t in tokens if shorter.endswith(t)), key=len))
    return shorter


def _end_of_turn(facts: ModelFacts, whole: str, start: int, parting: int) -> int:
    """Where a turn ends in the whole text: behind its last control token, or where the texts part. Templates may end the
    last turn of a conversation with another token."""
    ends = [m.end() for m in facts.control_pattern.finditer(whole, start) if m.start() < parting]
    if ends and not whole[ends[-1] : parting].strip():
        return ends[-1]
    return max(parting, start)
