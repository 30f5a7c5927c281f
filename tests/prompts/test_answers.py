from datetime import date
from decimal import Decimal

import pytest

from logitcache import prompts
from logitcache.errors import PromptsError
from logitcache.prompts.answers import gold_answer


@pytest.mark.parametrize("answers", [["204"], ["1/2", "0.5"], ['["a"]'], ["[1, 2]"], ["[]"], ["[", "]"]])
def test_alternatives_are_those_that_were_joined(answers) -> None:
    assert prompts.alternatives(prompts.joined_answers(answers)) == answers


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("204", ["204"]),
        (204, ["204"]),
        (204.0, ["204"]),
        (0.5, ["0.5"]),
        (10**30, [str(10**30)]),
        (True, ["true"]),
        (Decimal("1.50"), ["1.50"]),
        (date(2026, 1, 2), ["2026-01-02"]),
        (["204"], ["204"]),
        (["1/2", "0.5"], ["1/2", "0.5"]),
        ([1, 2.5, None, "x", 1.0], ["1", "2.5", "x"]),
        (['["a"]'], ['["a"]']),
        ('["a"]', ['["a"]']),
    ],
)
def test_a_gold_answer_is_a_text_a_number_or_a_list_of_alternatives(value, answers) -> None:
    answer = gold_answer(value)
    assert answer is not None
    assert prompts.alternatives(answer) == answers


@pytest.mark.parametrize("value", [None, "", "  ", [], [None], [""]])
def test_null_and_empty_answers_are_none(value) -> None:
    assert gold_answer(value) is None


@pytest.mark.parametrize(
    ("value", "what"),
    [({"value": 5}, "an object"), ([{"value": 5}], "an object"), ([["1"]], "a list in a list"), (b"1", "a bytes")],
)
def test_other_answers_are_refused(value, what) -> None:
    with pytest.raises(PromptsError, match=f"`answer` has {what}; give text, a number, or a list of these"):
        gold_answer(value)
