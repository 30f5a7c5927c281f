"""Where each marker is one token, text that spells it is text; openings and closings in places where models put them."""

import pytest

from logitcache.sections import Markers, answer_text, find, text_offset
from tests.sections.pieces import Vocabulary, found_in, spans_of

THINK, TOKENS = Markers("<think>", "</think>"), ("<think>", "</think>")
COHERE = Markers("<|START_THINKING|>", "<|END_THINKING|>")
GEMMA, GEMMA_TOKENS = Markers("<|channel>thought", "<channel|>"), ("<|channel>", "<channel|>")


@pytest.mark.parametrize(
    ("completion", "reasoning", "answer"),
    [
        ("<think>I end it with ~</think>~ later</think>42", "I end it with </think> later", "42"),
        ("<think>a ~<think>~ b</think>say ~</think>~!", "a <think> b", "say </think>!"),
        ("<think>never ~</think>~ closed", "never </think> closed", ""),
        ("the tags are ~<think>~ and ~</think>~", "", "the tags are <think> and </think>"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_a_spelled_marker_is_text_where_it_has_a_token(completion, reasoning, answer) -> None:
    found, text = spans_of("Q", completion, THINK, TOKENS)
    assert (found["reasoning"], text) == (reasoning, answer)


def test_a_marker_without_a_token_is_found_in_text() -> None:
    assert spans_of("Q", "<think>a</think>42", THINK)[0]["reasoning"] == "a"


def test_a_marker_of_a_token_and_text_needs_the_token() -> None:
    found, text = spans_of("Q", "<|channel>thought\nsay ~<channel|>~<channel|>42", GEMMA, GEMMA_TOKENS)
    assert (found["opening"], found["closing"], text) == ("<|channel>thought", "<channel|>", "42")
    assert spans_of("Q", "~<|channel>thought~\nx", GEMMA, GEMMA_TOKENS)[0]["opening"] == ""


@pytest.mark.parametrize(
    ("prompt", "completion", "opening", "reasoning", "answer"),
    [
        ("Q", "Sure, I think first. <think>a</think>42", "Sure, I think first. <think>", "a", "42"),
        ("Q", "Sure. <think>a", "Sure. <think>", "a", ""),
        ("Q<think>\n", "<think>a</think>42", "<think>\n<think>", "a", "42"),
        ("Q<think>\n", "a <think> b</think>42", "<think>\n", "a <think> b", "42"),
        ("Q", "a</think>42 <think> b", "", "a", "42 <think> b"),
    ],
)
def test_an_opening_may_stand_behind_a_preamble(prompt, completion, opening, reasoning, answer) -> None:
    found, text = spans_of(prompt, completion, THINK, TOKENS)
    assert (found["opening"], found["reasoning"], text) == (opening, reasoning, answer)


def test_text_that_mentions_an_opening_opens_nothing_without_a_closing() -> None:
    assert spans_of("Q", "the tag <think> is HTML", THINK)[0]["answer"] == "the tag <think> is HTML"


@pytest.mark.parametrize(
    ("markers", "tokens", "tail", "opening", "closing"),
    [
        (THINK, TOKENS, "</think>", "", "</think>"),
        (THINK, TOKENS, "</think>\n\n", "", "</think>\n\n"),
        (THINK, (), "</think>\n", "", "</think>\n"),
        (THINK, TOKENS, "<think>\n\n</think>\n\n", "<think>", "</think>\n\n"),
        (Markers("[THINK]", "[/THINK]"), ("[THINK]", "[/THINK]"), "[/THINK]", "", "[/THINK]"),
        (GEMMA, GEMMA_TOKENS, "<|channel>thought\n<channel|>", "<|channel>thought", "<channel|>"),
        (COHERE, (), "<|END_THINKING|><|START_RESPONSE|>", "", "<|END_THINKING|><|START_RESPONSE|>"),
    ],
)  # fmt: skip
def test_a_prompt_that_ends_with_a_closing_has_switched_thinking_off(markers, tokens, tail, opening, closing) -> None:
    found, text = spans_of("Q:" + tail, "4 and <think>no</think> more", markers, tokens)
    assert (found["opening"], found["closing"]) == (opening, closing)
    assert found["answer"] == text == "4 and <think>no</think> more"


TOOL = "<tool>~</think>~ 41</tool>"


@pytest.mark.parametrize(
    ("completion", "opening", "reasoning", "closing", "answer"),
    [
        (
            f"<think>look it up</think>call(){TOOL}<think>now</think>42",
            "<think>",
            "look it up",
            f"</think>call(){TOOL}<think>now</think>",
            "42",
        ),
        (f"<think>look</think>call(){TOOL}42", "<think>", "look", f"</think>call(){TOOL}", "42"),
        (f"<think>look, call(){TOOL}42", "<think>", "look, call()", TOOL, "42"),
        (f"call(){TOOL}<think>now</think>42", f"call(){TOOL}<think>", "now", "</think>", "42"),
        (f"call(){TOOL}<think>now", f"call(){TOOL}<think>", "now", "", ""),
        (f"call(){TOOL}now</think>42", f"call(){TOOL}", "now", "</think>", "42"),
        (f"call(){TOOL}42", "", "", "", f"call(){TOOL}42"),
        (f"<think>look</think>call(){TOOL}", "<think>", "look", f"</think>call(){TOOL}", ""),
    ],
)
def test_the_answer_of_an_agent_is_in_its_last_turn(completion, opening, reasoning, closing, answer) -> None:
    found, graded = spans_of("Q", completion, THINK, (*TOKENS, "<tool>", "</tool>"), [TOOL])
    plain = [text.replace("~", "") for text in (opening, reasoning, closing, answer)]
    assert [found[name] for name in ("opening", "reasoning", "closing", "answer")] == plain
    assert graded == ("" if not found["answer"] else "42"), "results of tools are not graded"


def test_a_marker_in_the_result_of_a_tool_counts_for_nothing() -> None:
    result = "<tool>x</think>y</tool>"
    found, graded = spans_of("Q", f"<think>a {result} b</think>42", THINK, (*TOKENS, "<tool>", "</tool>"), [result])
    assert (found["reasoning"], graded) == ("a ", "42")


@pytest.mark.parametrize(
    ("completion", "tokens"),
    [
        ("<think>quote ~</think>~ here</think>42", TOKENS),
        ("<think>a</think>42", TOKENS),
        ("plain ~</think>~ answer", TOKENS),
        ("<think>a</think>42", ()),
        ("nothing", ()),
    ],
)
def test_the_stored_text_gives_the_same_answer(completion, tokens) -> None:
    vocabulary = Vocabulary(*tokens)
    pieces, ids = vocabulary.encode("Q" + completion)
    found, text = found_in(vocabulary, pieces, ids, 1, THINK), "".join(pieces[1:])
    offset = None if text_offset(text, THINK) == found.answer.start else found.answer.start
    assert answer_text(text, found.sections, THINK, offset) == text[found.answer]


def test_an_answer_that_shares_a_token_with_the_closing_is_graded_whole() -> None:
    vocabulary = Vocabulary()
    pieces = ["Q", "<think>", "a", "</think", ">42", " yes"]
    found = found_in(vocabulary, pieces, [0] * 6, 1, THINK)
    assert found.sections == find(pieces, 1, THINK)
    assert "".join(pieces[1:])[found.answer] == "42 yes"
