"""Pairs of answers and gold answers with the verdicts that they must get."""

import pytest

from logitcache.grading import verdicts
from logitcache.grading.verdicts import verdict
from logitcache.prompts import joined_answers

MARKED = [  # how models announce an answer; all say 1/2
    r"The final answer is:" + "\n" + r"\[ \frac{1}{2} \]",
    "So the answer is\n\n$$\\frac{1}{2}$$",
    "The answer is\n$$\n\\frac{1}{2}\n$$\nI hope this helps!",
    "**Final Answer**\n\n\\[\n\\frac{1}{2}\n\\]",
    "**Answer:** 1/2",
    "**Answer**: $\\frac12$",
    "Answer: \\boxed{\\frac{1}{2}}",
    "Answer:\n```\n1/2\n```",
    "The answer is:\n\n```latex\n\\frac{1}{2}\n```\nDone.",
    "### Answer\n\n1/2",
    "#### Final Answer\n1/2",
    "#### 1/2",
    "We compute.\n\\[ \\frac{1}{2} \\]",
    "We compute.\n$$\n\\frac{1}{2}\n$$",
    "We compute.\n```\n1/2\n```",
    "<answer>\n1/2\n</answer>",
    "First \\boxed{3}, then \\boxed{\\dfrac{1}{2}}.",
    "The answer is as follows:\n$$0.5$$",
    "Hence x = \\frac{1}{2}, so the correct value is: $\\frac{1}{2}$.",
]

RIGHT = [
    ("0.333333", "1/3"),
    ("0.5", r"\frac12"),
    (r"\frac{1}{2^{98}}", "2^{-98}"),
    (r"10^{-30}", r"\frac{1}{10^{30}}"),
    ("101_2", "5"),
    ("5", "101_2"),
    ("101_{2}", "101_2"),
    ("(101)_2", "5"),
    ("0x1F", "31"),
    ("101 (base 2)", "5"),
    ("0b101", "5"),
    (r"\mathrm{e}^2", "e^2"),
    (r"\mathrm{e}", "e"),
    (r"5\text{ cm}", "5"),
    (r"50\%", "0.5"),
    ("50%", r"50\%"),
    ("1,234,567", "1234567"),
    (r"1{,}234", "1234"),
    (r"1\,234", "1234"),
    ("1 1/2", "3/2"),
    (r"1\frac{1}{2}", "1.5"),
    (r"1\frac12", r"\frac32"),
    ("-1 1/2", "-3/2"),
    ("[1, 2)", r"[1,2)"),
    (r"(-\infty, 3)", "x<3"),
    (r"\{1, 2\}", r"\{2,1\}"),
    ("(1, 2)", r"\left(1,2\right)"),
    ("\u22125", "-5"),
    ("√2", r"\sqrt{2}"),
    ("2√3", r"2\sqrt3"),
    ("π/2", r"\frac{\pi}{2}"),
    ("2π", r"2\pi"),
    (r"1 \pm \sqrt2", r"1\pm\sqrt{2}"),
    ("(B)", "B"),
    ("B", "(B)"),
    ("B) 42", "B"),
    ("**B**. Paris", "B"),
    (r"\text{(B)}", "B"),
    ("The correct option is (B).", "B"),
    (r"x=5", "5"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\dfrac{3}{4}", "0.75"),
    ("6.02e23", r"6.02\times 10^{23}"),
    (r"2^{100}", "1267650600228229401496703205376"),
    ("3/6", "1/2"),
    ("2 \u00d7 3", "6"),
]

WRONG = [
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    (r"10^{-30}", r"2\cdot10^{-30}"),
    ("0", r"10^{-30}"),
    ("2^{98}", "2^{99}"),
    ("(10^{-30}, 1)", "(2*10^{-30}, 1)"),
    ("0.333", "1/3"),
    ("0.33", "1/3"),
    ("1000000", "1000001"),
    ("3.14", r"\pi"),
    ("10^{20}+1", "10^{20}"),
    ("101_2", "101"),
    ("101", "101_2"),
    ("101_3", "5"),
    ("0x1F", "1"),
    ("102_2", "5"),
    (r"1\frac{1}{2}", "11/2"),
    ("1 1/2", "11/2"),
    (r"1\frac{1}{2}", "1/2"),
    (r"\frac{1+2}{3}", "1+2/3"),
    (r"\frac{1}{2}3", "1/23"),
    ("[1,2]", "[1,2)"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("(2,1)", "(1,2)"),
    ("-5", "5"),
    (r"\sqrt{3}", r"\sqrt{2}"),
    (r"1 + \sqrt2", r"1\pm\sqrt{2}"),
    ("(C)", "B"),
    ("C) B", "B"),
    ("Bob", "B"),
    ("a dog", "A"),
    ("1,23", "123"),
    ("5", r"5\%"),
    (r"\mathrm{e}^3", "e^2"),
    ("x=5", "6"),
    ("x^2+2x+2", "(x+1)^2"),
    ("The answer is 42, or 43", "42"),
    ("1e-5", "1e-6"),
    (r"\frac{1}{3}", "0.3"),
    ("2π", r"\pi"),
]


@pytest.mark.slow
@pytest.mark.parametrize("text", MARKED)
def test_an_announced_answer_is_found(text):
    assert verdict("math", text, r"\frac{1}{2}", {}) is True
    assert verdict("math", text, r"\frac{1}{3}", {}) is False


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "right"), [(RIGHT, True), (WRONG, False)], ids=["right", "wrong"])
def test_pairs_get_their_verdicts(pairs, right):
    verdicts.no_verdict.clear()
    others = {}
    for said, gold in pairs:
        for text in (said, rf"So the answer is\n\n$${said}$$".replace(r"\n", "\n"), rf"\boxed{{{said}}}"):
            if text is not said and " is " in said:  # announced already
                continue
            if (found := verdict("math", text, gold, {})) is not right:
                others[text, gold] = found
    assert others == {}


def test_any_of_several_gold_answers_is_right():
    gold = joined_answers(["204", "two hundred and four"])
    assert verdict("exact", "So it is\n204", gold, {}) is True
    assert verdict("exact", "Two hundred and four.", gold, {}) is True
    assert verdict("exact", "205", gold, {}) is False
    verdicts.no_verdict.clear()
    assert verdict("exact", "205", joined_answers(["204", " "]), {}) is None
    assert verdict("exact", "204", joined_answers([" ", "204"]), {}) is True
    assert verdicts.no_verdict == {"without a gold answer": 1}
