from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.errors import StudentError
from logitcache.sections import Sections
from logitcache.student.views import NOT_TAUGHT, SECTIONS, View, section_of
from tests import tiny


def hand_made(row_start: int = 1):
    """Tokens 10..19: prompt 10-12, <think> 13, reasoning 14-16, </think> 17, answer 18-19."""
    tokens = list(range(10, 20))
    made = tiny.trace(0, tokens, tiny.bigram()[tokens[row_start - 1 : -1]], row_start=row_start)
    return replace(made, sections=Sections(3, 4, 7, 8, 10))


def taught(lesson) -> dict[int, int]:
    return {t: int(row) for t, row in enumerate(lesson.row) if row != NOT_TAUGHT}


def test_the_full_view_teaches_every_row_one_position_before_its_token():
    lesson = View()(hand_made())
    assert lesson.input_ids.tolist() == list(range(10, 19))
    assert taught(lesson) == {t: t for t in range(9)}
    assert lesson.kd.tolist() == [1.0] * 9
    assert lesson.ce.tolist() == [0.0] * 9


def test_without_prompt_rows_the_first_completion_token_is_taught_at_the_last_prompt_token():
    lesson = View()(hand_made(row_start=3))
    assert taught(lesson) == {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6}
    assert lesson.kd.tolist() == [0.0, 0.0] + [1.0] * 7


def test_both_delimiters_are_taught_with_the_reasoning():
    lesson = View(sections=("reasoning",))(hand_made())
    assert taught(lesson) == {2: 2, 3: 3, 4: 4, 5: 5, 6: 6}
    assert lesson.input_ids.tolist() == list(range(10, 17)), "nothing after the last taught position is fed"


def test_the_answer_is_taught_from_its_first_token_with_all_before_it_as_context():
    assert taught(View(sections=("answer",))(hand_made())) == {7: 7, 8: 8}


def test_a_section_without_rows_gives_an_empty_lesson():
    lesson = View(sections=("prompt",))(hand_made(row_start=3))
    assert len(lesson.input_ids) == len(lesson.row) == 0


def test_an_unknown_view_or_section_names_the_nearest():
    with pytest.raises(StudentError, match="'fulll' is unknown: did you mean 'full'"):
        View("fulll")
    with pytest.raises(StudentError, match="'anwser' is unknown: did you mean 'answer'"):
        View(sections=("anwser",))
    with pytest.raises(StudentError, match="no section is left"):
        View(sections=())


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_view_never_teaches_a_row_whose_context_the_student_was_not_given(data):
    length = data.draw(st.integers(2, 30))
    row_start = data.draw(st.integers(1, length - 1))
    bounds = sorted(data.draw(st.lists(st.integers(0, length), min_size=4, max_size=4)))
    sections = data.draw(st.lists(st.sampled_from(list(SECTIONS)), min_size=1, unique=True))
    tokens = data.draw(st.lists(st.integers(3, 63), min_size=length, max_size=length))
    trace = tiny.trace(0, tokens, tiny.bigram()[tokens[row_start - 1 : -1]], row_start=row_start)
    trace = replace(trace, sections=Sections(bounds[0], bounds[1], bounds[2], bounds[3], length))
    lesson = View(sections=tuple(sections))(trace)
    for position, row in taught(lesson).items():
        assert lesson.input_ids[: position + 1].tolist() == tokens[: row_start + row]
        assert list(SECTIONS)[section_of(trace, np.array([row]))[0]] in sections
