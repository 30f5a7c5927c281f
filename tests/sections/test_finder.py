import pytest

from logitcache.errors import InputError
from logitcache.sections import Markers, Sections, TokenText, find

THINK = Markers("<think>", "</think>")


def spans(found: Sections, pieces: list[str | None]) -> list[str]:
    """The text of prompt, opening, reasoning, closing and answer."""
    return [
        "".join(p or "" for p in pieces[found.span(n)]) for n in ("prompt", "opening", "reasoning", "closing", "answer")
    ]


@pytest.mark.parametrize(
    ("pieces", "prompt_length", "expected"),
    [
        pytest.param(
            ["Q:", "<think>", "a", "b", "</think>", "42"], 1, ["Q:", "<think>", "ab", "</think>", "42"], id="both"
        ),
        pytest.param(
            ["Q:", "<think>", "\n", "a", "</think>", "42"],
            3,
            ["Q:", "<think>\n", "a", "</think>", "42"],
            id="the template puts the opening into the prompt",
        ),
        pytest.param(
            ["Q", "<think>", "\n\n", "</think>", "\n\n", "42"],
            5,
            ["Q", "<think>", "\n\n", "</think>\n\n", "42"],
            id="thinking switched off by the template",
        ),
        pytest.param(["Q", "<think>", "a", "b"], 1, ["Q", "<think>", "ab", "", ""], id="cut before the closing"),
        pytest.param(["Q", "<think>", "a", "b"], 2, ["Q", "<think>", "ab", "", ""], id="cut, opened in the prompt"),
        pytest.param(["Q", "a", "</think>", "42"], 1, ["Q", "", "a", "</think>", "42"], id="closing marker alone"),
        pytest.param(["Q", "4", "2"], 1, ["Q", "", "", "", "42"], id="no marker at all"),
        pytest.param(["Q"], 1, ["Q", "", "", "", ""], id="empty completion"),
        pytest.param(
            ["Q", " <", "think", ">\n", "a", ".</", "think", ">", "42"],
            1,
            ["Q", " <think>\n", "a", ".</think>", "42"],
            id="markers of several tokens, which take what shares a token with them",
        ),
        pytest.param(
            ["what does <think>", " mean", "?", "it", " opens"],
            3,
            ["what does <think> mean?", "", "", "", "it opens"],
            id="a marker quoted in the question",
        ),
        pytest.param(
            ["Q", "<think>", "a", "</think>", "b</think>"],
            1,
            ["Q", "<think>", "a", "</think>", "b</think>"],
            id="the first closing marker counts",
        ),
    ],
)
def test_the_five_spans_tile_the_trace(pieces, prompt_length, expected) -> None:
    assert spans(find(pieces, prompt_length, THINK), pieces) == expected


def test_a_marker_of_characters_that_span_tokens_begins_with_their_first_byte() -> None:
    pieces = ["Q", None, None, "◁", "think▷", "é", None, "◁", "/think▷", "4"]
    found = find(pieces, 1, Markers("◁think▷", "◁/think▷"))
    assert found == Sections(1, 5, 6, 9, 10)


def test_a_pattern_begins_the_answer_where_there_are_no_markers() -> None:
    pieces = ["Q #### no", "step", ". ", "####", " 42"]
    assert spans(find(pieces, 1, Markers(answer_regex="####")), pieces) == [pieces[0], "", "step. ", "", "#### 42"]
    assert find(pieces[:3], 1, Markers(answer_regex="####")) == Sections(1, 1, 3, 3, 3), "unreached: all reasoning"
    assert find(pieces, 1, Markers()) == Sections(1, 1, 1, 1, 5), "no pattern: all answer"


def test_a_completion_without_the_models_markers_falls_back_on_the_pattern() -> None:
    both = Markers("<think>", "</think>", "####")
    assert spans(find(["Q", "sum ", "#### 4"], 1, both), ["Q", "sum ", "#### 4"]) == ["Q", "", "sum ", "", "#### 4"]
    assert find(["Q", "<think>", "#### a", "</think>", "4"], 1, both) == Sections(1, 2, 3, 4, 5)


def test_markers_come_in_pairs() -> None:
    with pytest.raises(InputError, match="give both or neither"):
        Markers(None, "</think>")


def test_token_positions_skip_tokens_without_text() -> None:
    text = TokenText(["ab", "", "c"])
    assert [text.token_at(i) for i in range(3)] == [0, 0, 1]
    assert text.token_after(2) == 1


def test_markers_are_found_in_vocabulary_or_template() -> None:
    assert Markers.detect(["a", "</think>"], None) == THINK
    assert Markers.detect(["a"], "{{'<think>'}}..</think>") == THINK
    assert Markers.detect(["[/THINK]"], None) == Markers("[THINK]", "[/THINK]")
    assert Markers.detect(["a"], "plain") == Markers()


def test_markers_are_read_from_an_option() -> None:
    assert Markers.parse("<a>,</a>") == Markers("<a>", "</a>")
    assert Markers.parse("none") == Markers()
    for wrong in ("<a>", "<a>,", ",x"):
        with pytest.raises(InputError, match="OPENING,CLOSING"):
            Markers.parse(wrong)
    with pytest.raises(InputError, match="not a regular expression"):
        Markers(answer_regex="(")
