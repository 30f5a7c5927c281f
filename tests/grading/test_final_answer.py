import pytest

from logitcache.grading.final_answer import final_answer


@pytest.mark.parametrize(
    ("text", "final"),
    [
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}. <answer>3</answer> The answer is 4", r"\frac{1}{2}"),
        (r"\boxed{42} and \boxed{4", "42"),
        (r"a brace { and \} then \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        ("<answer>1</answer> <Answer>\n1 2\n3 4\n</Answer> #### 5", "1 2\n3 4"),
        ("<answer>41</answer> then <answer>42", "41"),
        ("The answer is 1. No, the answer is: 2\nBye", "2"),
        ("**Final Answer:**\n\n42\n\nBye", "42"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("Answers vary.\nSo it is\n  7  \n\n", "7"),
        (" \n ", ""),
    ],
)
def test_the_final_answer_is_what_marks_it_else_the_last_line(text, final):
    assert final_answer(text) == final
