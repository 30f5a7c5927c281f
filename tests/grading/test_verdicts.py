"""what counts as an answer, what counts as right, and that no scorer can harm the command."""

import random
import sys
import threading
from importlib import util

import pytest

from logitcache import prompts
from logitcache.errors import InputError
from logitcache.grading import formula, sandbox, verdicts
from logitcache.grading.sandbox import Sandbox, Unscored
from logitcache.grading.verdicts import Grader, check, check_answers, listed, verdict

MEGABYTE = 10**6


@pytest.fixture(autouse=True)
def counts_anew():
    verdicts.no_verdict.clear()


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean exact"):
        check("exakt")
    with pytest.raises(InputError, match="math, exact, gym"):
        check("oracle")


def test_a_grader_is_one_entry_of_the_table(monkeypatch):
    def length(answer_text, gold, metadata):
        if "unit" not in metadata:
            raise Unscored("no unit")
        return len(answer_text) == int(gold)

    monkeypatch.setitem(verdicts.GRADERS, "length", Grader("length", length, "no_such_module", "no-such-package"))
    with pytest.raises(
        InputError, match=r"`verifier` length needs no-such-package; pip install 'logitcache\[length\]'"
    ):
        check("length")
    with pytest.raises(InputError, match="did you mean length"):
        check("lenght")
    assert verdict("length", "abc", "3", {"unit": "letters"}) is True
    assert verdict("length", "abc", "4", {"unit": "letters"}) is False
    with pytest.warns(UserWarning, match="no verdict of length: no unit"):
        assert verdict("length", "abc", "3", {}) is None
    assert verdicts.no_verdict == {"not scored": 1}


@pytest.mark.parametrize(("kind", "package"), [("math", "math-verify"), ("gym", "reasoning-gym")])
def test_a_missing_package_is_named_with_the_way_out(monkeypatch, kind, package):
    check(kind)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"{package}; pip install 'logitcache\[{kind}\]'"):
        check(kind)
    check("exact")


def test_a_grader_without_gold_answers_is_refused_and_names_the_likely_column():
    rows = [(None, {"id": 1, "solution": "204", "level": 3}), (" ", {"solution": "3"})]
    with pytest.raises(
        InputError,
        match=r"`verifier` math: no prompt of p has an `answer` .*columns: id, solution, level; give `columns` answer=solution",
    ):
        check_answers("math", "p", rows)
    with pytest.raises(InputError, match="columns: level; add a column `answer`, or leave out `verifier`"):
        check_answers("exact", "p", [(None, {"level": 3})])
    check_answers("exact", "p", [*rows, ("5", {})])
    check_answers("gym", "p", rows)


def test_answers_without_a_verdict_are_listed_by_reason():
    assert listed({}) == ""
    counts = {"timed out": 1, "without a gold answer": 1200}
    assert listed(counts) == "no verdict: 1,200 without a gold answer, 1 timed out"


EXACT = [
    ("42", "42", True),
    ("The answer is 42.", "42", True),
    ("So we have 6 * 7 = 42", "42", False),  # a substring is no answer
    ("142", "42", False),
    ("42 apples", "42", False),
    ("The answer is 42. I hope this helps", "42", False),
    ("answer is 42 or 43", "42", False),
    ("1,000", "1000.0", True),
    ("$1{,}000$", "1000", True),
    ("10,00", "1000", False),
    ("1, 000", "1000", False),
    ("007", "7", True),
    (".5", "0.50", True),
    ("1e3", "1000", True),
    ("1e999999999", "1", False),  # would take all memory
    ("9" * 500, "9" * 500, True),
    ("-5", "5", False),
    ("\u22125", "-5", True),
    ("5!", "5", False),
    (r"\boxed{\frac{3}{4}}", "0.75", True),
    ("1/0", "2/0", False),
    ("x²", "x2", False),
    ("x²", "x^2", True),
    ("1½", "11/2", False),
    ("50%", "50", False),
    (r"$50\%$", "50%", True),
    ("**Paris!**", "paris", True),
    (r"\boxed{\text{Paris}}", "Paris", True),
    ("New  York\n", "new york", True),
    ("`x = 1`", "x = 1", True),
    ("it's", "its", False),
    ("(A)", "A", True),
    ("(1,2)", "[1,2]", False),
    ("_", "_", True),
    ("ﬁne", "fine", True),
    ("STRASSE", "straße", True),
    ("1 2\n3 4", "1 2\n3 4", True),
    ("3 4", "1 2\n3 4", False),
    ("40", "so it is 40 + 2\n#### 42", False),
    ("42", "so it is 40 + 2\n#### 42", True),
    ("", "42", False),
]


@pytest.mark.parametrize(("text", "gold", "right"), EXACT)
def test_exact_compares_the_final_answer_as_a_number_or_a_text(text, gold, right):
    assert verdict("exact", text, gold, {}) is right


MATH = [
    ("0.75", r"\frac{3}{4}", True),
    (r"\boxed{\frac{3}{4}}", "3/4", True),
    ("The answer is $\\frac{3}{4}$, because it is.", "$3/4$", True),
    ("So we get x = 5.\n\nHope this helps!", "5", True),
    ("12 apples", "12", True),
    ("The answer is 12 apples and 3 pears", "12", False),
    ("He pays $5 and $7, so $12 in total.", "12", True),
    ("The price is \\$5.", "5", True),
    ("2\\sqrt{3}", "2", False),
    ("The answer is 2 sqrt(3)", "2", False),
    ("Therefore the result is 2\\sqrt{3}.", "3", False),
    ("The answer is 2 sqrt(3)", "2\\sqrt{3}", True),
    ("\\boxed{(x+1)^2}", "x^2+2x+1", True),
    ("pi/2", "\\frac{\\pi}{2}", True),
    ("x**2", "x^2", True),
    ("\\boxed{2,1}", "{1,2}", True),
    ("(1,2]", "[1,2)", False),
    ("3 < x", "x > 3", True),
    ("\\boxed{Siarp}", "Paris", False),  # one product of symbols
    ("\\boxed{Paris}", "Paris", True),
    ("\\boxed{\\frac{1}{0}}", "5", False),
    ("\\boxed{9**9**9**9}", "5", False),
    ("garbage )( }{ \\frac", "5", False),
    ("\x00\ud800 \\boxed{\x01}", "5", False),
    ("", "5", False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "gold", "right"), MATH)
def test_math_compares_by_value(text, gold, right):
    assert verdict("math", text, gold, {}) is right
    assert not verdicts.no_verdict


def test_no_gold_answer_is_no_verdict():
    for gold in (None, "", " "):
        assert [verdict(kind, "42", gold, {}) for kind in ("exact", "math")] == [None, None]
    assert verdicts.no_verdict == {"without a gold answer": 6}


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["exact", "math"])
def test_a_megabyte_is_graded_in_no_time(kind):
    rng = random.Random(0)
    texts = ["\\boxed{", "<answer>", "answer is ", "1 ", "1", "\n", "$1$ ", "answer     ", "*", "{", "\\text{a", "("]
    texts = [piece * (MEGABYTE // len(piece)) for piece in texts] + [
        "".join(rng.choices("\\{}$ab1 \n<>*_.(,", k=MEGABYTE)),
        *("The answer is " + piece * 4000 for piece in ("**", "$", "((", "1+", "1,", "\\frac{", "answer is ")),
    ]
    verdict(kind, "1 + 1", "2", {})  # the scorer process starts
    for text in texts:
        assert verdict(kind, text, "42", {}) is False
    assert not verdicts.no_verdict


@pytest.mark.slow
def test_verdicts_from_many_threads_are_those_of_one():
    wrong = []

    def grade(kind, table):
        wrong.extend(case for case in table if verdict(kind, case[0], case[1], {}) is not case[2])

    threads = [threading.Thread(target=grade, args=case) for case in [("math", MATH), ("exact", EXACT)] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


TASKS = [
    *("gsm_symbolic", "countdown", "mini_sudoku", "n_queens", "word_ladder", "leg_counting"),
    pytest.param("arc_agi", marks=pytest.mark.slow),  # compares with tuples, which JSON makes lists
]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_own_answers_of_a_reasoning_gym_task_are_right_and_others_are_wrong(task):
    for prompt in prompts.load(f"gym:{task}?size=2&seed=5"):
        gold = prompt.answer
        assert gold is not None
        for text in (gold, f"So.\n<answer>{gold}</answer>\nBye", f"Well then:\nThe answer is\n{gold}"):
            assert verdict("gym", text, gold, prompt.metadata) is True
        for text in ("<answer>1</answer>", "I do not know: 1", "", "1" * MEGABYTE):
            assert not verdict("gym", text, gold, prompt.metadata)


@pytest.mark.slow
def test_the_first_number_of_a_long_answer_is_not_the_answer():
    prompt = next(iter(prompts.load("gym:gsm_symbolic?size=1&seed=5")))
    gold = prompt.answer
    assert gold is not None
    assert verdict("gym", f"{gold} pens at 3 dollars are 999 dollars", gold, prompt.metadata) is False
    assert verdict("gym", f"3 pens and more make\n{gold} dollars.", gold, prompt.metadata) is True


@pytest.mark.slow
def test_an_answer_without_a_gold_answer_is_scored_by_the_entry():
    prompt = next(iter(prompts.load("gym:rubiks_cube?size=1&seed=1")))
    assert prompt.answer is None
    moves = prompt.metadata["gym"]["example_correct_answer"]
    assert verdict("gym", f"<answer>{moves}</answer>", None, prompt.metadata) is True
    assert verdict("gym", "<answer>F F F F</answer>", None, prompt.metadata) is False


def test_a_prompt_of_another_source_has_no_gym_verdict():
    with pytest.warns(UserWarning, match=r"not of reasoning-gym"):
        assert verdict("gym", "42", "42", {"gym": "no entry"}) is None


@pytest.mark.slow
def test_a_scorer_that_takes_any_answer_gives_no_verdict():
    prompt = next(iter(prompts.load("gym:game_of_life_halting?size=1&seed=1")))
    with pytest.warns(UserWarning, match="accepts any answer"):
        assert verdict("gym", f"<answer>{prompt.answer}</answer>", prompt.answer, prompt.metadata) is None


@pytest.mark.slow
def test_a_scorer_that_raises_gives_no_verdict_counts_and_warns_once():
    prompt = next(iter(prompts.load("gym:prime_factorization?size=1&seed=3")))
    with pytest.warns(UserWarning, match=r"no verdict of gym: ValueError: invalid literal"):
        assert verdict("gym", "<answer>five</answer>", prompt.answer, prompt.metadata) is None
    assert verdict("gym", "<answer>six</answer>", prompt.answer, prompt.metadata) is None  # a warning would be an error
    assert verdicts.no_verdict == {"not scored": 2}


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{10^{10^{10}}}",
        pytest.param(r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}", id="nested", marks=pytest.mark.slow),
    ],
)
def test_a_scorer_without_end_is_ended_and_the_next_answer_is_graded(monkeypatch, text):
    monkeypatch.setattr(sandbox, "_SECONDS", 0.5)
    grader = Sandbox(formula.SANDBOX.scorer)
    monkeypatch.setattr(formula, "SANDBOX", grader)
    with pytest.warns(UserWarning, match=r"no verdict of math: no result within 0\.5 s"):
        assert verdict("math", text, "5", {}) is None
    assert verdict("math", r"\boxed{1 + 4}", "5", {}) is True


def test_importing_verdicts_imports_no_scorer():
    import subprocess

    code = "import sys, logitcache.grading.verdicts; assert not {'sympy', 'math_verify', 'reasoning_gym'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
