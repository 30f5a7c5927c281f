"""The markers of published models, as tokens and as text."""

import pytest

from logitcache.sections import FORMATS, Markers, known_pair
from tests.sections.pieces import HARMONY_TOKENS, spans_of

THINK = Markers("<think>", "</think>")
COHERE = Markers("<|START_THINKING|>", "<|END_THINKING|>")


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.pair[0])
@pytest.mark.parametrize("as_tokens", [True, False])
def test_every_format_splits_a_completion(form, as_tokens: bool) -> None:
    opening, closing = form.pair
    tokens = HARMONY_TOKENS if form.harmony else form.literals
    said = f"{opening} so it is {closing} 42"
    found, answer = spans_of("Q:", said, Markers(opening, closing), tokens if as_tokens else ())
    assert [found[name] for name in ("opening", "reasoning", "closing")] == [opening, " so it is ", closing]
    assert found["answer"] == answer == " 42"


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.pair[0])
def test_every_format_is_detected_by_its_closing(form) -> None:
    assert Markers.detect([], f"... {(form.signs or form.closing)[-1]} ...").pair == list(form.pair)
    assert known_pair(f"a {form.closing[0]} b") == form.pair


@pytest.mark.parametrize(
    ("vocabulary", "template", "opening"),
    [
        (["<|channel>", "<channel|>"], "plain", "<|channel>thought"),
        (["<|channel|>", "<|message|>", "<|start|>"], None, "<|channel|>analysis<|message|>"),
        (["[THINK]", "[/THINK]"], "{{ '<think>' }} {{ '</think>' }}", "[THINK]"),
        (["<|START_THINKING|>", "<|END_THINKING|>"], None, "<|START_THINKING|>"),
        ([], "after 'Here is my thought process:' ... 'Here is my response:'", "Here is my thought process:"),
    ],
)
def test_a_token_tells_more_than_a_template(vocabulary, template, opening) -> None:
    assert Markers.detect(vocabulary, template).opening == opening


def test_the_answer_of_cohere_is_inside_its_wrapper() -> None:
    text = "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>42<|END_RESPONSE|>"
    found, answer = spans_of("Q", text, COHERE, COHERE.format.literals)
    assert (found["closing"], answer) == ("<|END_THINKING|><|START_RESPONSE|>", "42")
    assert found["answer"] == "42<|END_RESPONSE|>", "the model learns to close it"


@pytest.mark.parametrize(
    ("closing", "end"), [("</think>\n<answer>\n", "\n</answer>"), ("</think>\n\n<response>\n", "\n</response>\n")]
)
@pytest.mark.parametrize("tokens", [(), ("<think>", "</think>")])
def test_a_wrapped_answer_is_graded_without_its_wrapper(closing: str, end: str, tokens) -> None:
    found, answer = spans_of("Q", f"<think>\nhm\n{closing}42{end}", THINK, tokens)
    assert found["closing"].strip() == closing.strip()
    assert answer.strip() == "42"


def test_an_answer_that_ends_with_such_a_tag_of_its_own_keeps_it() -> None:
    assert spans_of("Q", "<think>hm</think>close it with </answer>", THINK)[1] == "close it with </answer>"


@pytest.mark.parametrize("here", ["Here is", "Here's"])
def test_granite_writes_two_spellings(here: str) -> None:
    said = f"{here} my thought process: hm {here} my response: 42"
    found, answer = spans_of("Q", said, Markers("Here is my thought process:", "Here is my response:"))
    assert (found["reasoning"].strip(), answer.strip()) == ("hm", "42")


def test_a_pair_that_nobody_knows_is_found_as_well() -> None:
    found, answer = spans_of("Q", "<<r>> hm <</r>> 42", Markers("<<r>>", "<</r>>"), ["<<r>>", "<</r>>"])
    assert (found["reasoning"], answer) == (" hm ", " 42")
