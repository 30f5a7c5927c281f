"""gpt-oss writes messages on channels."""

import pytest

from logitcache.sections import Finder, Markers
from tests.sections.pieces import HARMONY_TOKENS, Vocabulary, spans_of

ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
MORE = "<|end|><|start|>assistant<|channel|>analysis<|message|>"
HARMONY = Markers(ANALYSIS, FINAL)
PROMPT = "<|start|>user<|message|>Q<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.get <|constrain|>json<|message|>{}<|call|>"
RESULT = "<|start|>functions.get to=assistant<|channel|>commentary<|message|>41<|end|><|start|>assistant"


@pytest.mark.parametrize("tokens", [HARMONY_TOKENS, (*HARMONY_TOKENS, "<|constrain|>"), ()])
@pytest.mark.parametrize(
    ("completion", "opening", "reasoning", "closing", "answer"),
    [
        pytest.param(f"{ANALYSIS}hm{FINAL}42<|return|>", ANALYSIS, "hm", FINAL, "42", id="whole"),
        pytest.param(f"{ANALYSIS}hm", ANALYSIS, "hm", "", "", id="cut in the reasoning"),
        pytest.param(f"{ANALYSIS}hm<|end|>", ANALYSIS, "hm", "<|end|>", "", id="cut after the reasoning"),
        pytest.param(f"{ANALYSIS}hm<|end|><|start|>assi", ANALYSIS, "hm", "<|end|><|start|>assi", "", id="cut header"),
        pytest.param(f"{ANALYSIS}a{MORE}b{MORE}c{FINAL}42", ANALYSIS, f"a{MORE}b{MORE}c", FINAL, "42", id="goes on"),
        pytest.param(
            f"{ANALYSIS}hm<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>[1]<|return|>",
            ANALYSIS, "hm", "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>", "[1]",
            id="an answer of a type",
        ),
        pytest.param(
            f"{ANALYSIS}hm<|end|><|start|>assistant<|channel|>final<|constrain|>json<|message|>[1]",
            ANALYSIS, "hm", "<|end|><|start|>assistant<|channel|>final<|constrain|>json<|message|>", "[1]",
            id="a type without a space",
        ),
        pytest.param(
            f"<|channel|>commentary<|message|>I look.{FINAL}42", "", "", f"<|channel|>commentary<|message|>I look.{FINAL}", "42",
            id="commentary is no reasoning",
        ),
        pytest.param(
            f"<|channel|>commentary<|message|>I look.{MORE}hm{FINAL}42",
            f"<|channel|>commentary<|message|>I look.{MORE}", "hm", FINAL, "42", id="commentary before the reasoning",
        ),
        pytest.param(
            f"{ANALYSIS}hm<|end|><|start|>assistant{CALL}", ANALYSIS, "hm", f"<|end|><|start|>assistant{CALL}", "",
            id="a tool's call is no answer",
        ),
        pytest.param(
            f"{ANALYSIS}hm<|end|><|start|>assistant to=functions.get<|channel|>commentary json<|message|>{{}}<|call|>",
            ANALYSIS, "hm", "<|end|><|start|>assistant to=functions.get<|channel|>commentary json<|message|>{}<|call|>", "",
            id="a recipient in the role",
        ),
        pytest.param(
            f"{ANALYSIS}hm<|end|><|start|>assistant<|channel|>analysis to=browser.search code<|message|>q<|call|>",
            ANALYSIS, "hm", "<|end|><|start|>assistant<|channel|>analysis to=browser.search code<|message|>q<|call|>", "",
            id="a call on the channel of the reasoning",
        ),
        pytest.param("<|channel|>final<|message|>42<|return|>", "", "", "<|channel|>final<|message|>", "42", id="no reasoning"),
        pytest.param("It is 42", "", "", "", "It is 42", id="no channels"),
    ],
)  # fmt: skip
def test_reasoning_and_answer_are_told_by_their_channels(
    completion, opening, reasoning, closing, answer, tokens
) -> None:
    found, text = spans_of(PROMPT, completion, HARMONY, tokens)
    assert [found[name] for name in ("opening", "reasoning", "closing")] == [opening, reasoning, closing]
    assert text == answer
    assert found["answer"].removesuffix("<|return|>") == answer


def test_the_prompt_may_open_either_channel() -> None:
    found, text = spans_of(PROMPT + ANALYSIS, f"hm{FINAL}42", HARMONY, HARMONY_TOKENS)
    assert (found["opening"], found["reasoning"], text) == (ANALYSIS, "hm", "42")
    found, text = spans_of(PROMPT + "<|channel|>final<|message|>", "42", HARMONY, HARMONY_TOKENS)
    assert (found["closing"], found["answer"], text) == ("<|channel|>final<|message|>", "42", "42")


def test_earlier_turns_of_the_prompt_are_prompt() -> None:
    history = f"<|start|>user<|message|>P<|end|><|start|>assistant{ANALYSIS}x{FINAL}y<|end|>"
    found, text = spans_of(history + PROMPT, f"{ANALYSIS}hm{FINAL}42", HARMONY, HARMONY_TOKENS)
    assert (found["prompt"], found["reasoning"], text) == (history + PROMPT, "hm", "42")


@pytest.mark.parametrize("context", [[RESULT], []])
def test_an_agents_transcript_ends_with_its_answer(context) -> None:
    completion = f"{ANALYSIS}look<|end|><|start|>assistant{CALL}{RESULT}{ANALYSIS}now{FINAL}42<|return|>"
    found, text = spans_of(PROMPT, completion, HARMONY, HARMONY_TOKENS, context)
    assert (found["opening"], found["reasoning"], text) == (ANALYSIS, "look", "42")
    assert found["closing"] == f"<|end|><|start|>assistant{CALL}{RESULT}{ANALYSIS}now{FINAL}"


def test_a_quoted_hand_over_is_text() -> None:
    found, text = spans_of(PROMPT, f"{ANALYSIS}I write ~{FINAL}~ then{FINAL}42", HARMONY, HARMONY_TOKENS)
    assert found["reasoning"] == f"I write {FINAL} then"
    assert text == "42"


def test_the_pair_of_older_caches_reads_channels_too() -> None:
    older = Markers(ANALYSIS, "<|channel|>final<|message|>")
    assert spans_of(PROMPT, f"{ANALYSIS}hm{FINAL}42", older, HARMONY_TOKENS)[0]["closing"] == FINAL


def test_a_forced_closing_is_the_whole_hand_over() -> None:
    assert HARMONY.format.hand_over([]) == FINAL
    vocabulary = Vocabulary(*HARMONY_TOKENS)
    finder = Finder.of(vocabulary, HARMONY)
    typed = "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>"
    for text in (FINAL, typed):
        assert finder.is_closing(*vocabulary.encode(text)), text
    for text in ("<|channel|>final<|message|>", f"<|end|><|start|>assistant{CALL}", MORE, f"x{FINAL}", FINAL[:-11]):
        assert not finder.is_closing(*vocabulary.encode(text)), text
    assert finder.is_opening(*vocabulary.encode(ANALYSIS))
    assert not finder.is_opening(*vocabulary.encode(f"<|channel|>commentary<|message|>I look.{MORE}"))


@pytest.mark.parametrize("cut", ["<|end|>", "<|end|><|start|>", "<|end|><|start|>assistant<|channel|>ana", ""])
def test_a_closing_does_not_follow_half_a_header(cut: str) -> None:
    vocabulary = Vocabulary(*HARMONY_TOKENS)
    kept, ids = vocabulary.encode(f"a{MORE}b{cut}")
    assert "".join(kept[: Finder.of(vocabulary, HARMONY).usable(kept, ids)]) == f"a{MORE}b"
    assert Finder.of(vocabulary, Markers("<think>", "</think>")).usable(kept, ids) == len(kept)
