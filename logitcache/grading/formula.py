"""The grader ``math``: answers compared as formulas by math-verify, in a sandbox."""

import re
from collections.abc import Callable
from typing import Any

from logitcache.grading import exact
from logitcache.grading.confinement import SYMPY, import_all
from logitcache.grading.exact import LONGEST, based_value, gold_answer, is_words, plain_text
from logitcache.grading.final_answer import find_final
from logitcache.grading.sandbox import UNREAD, Sandbox, Unscored

_TAIL = 2_000  # characters searched where nothing marks a final answer

SANDBOX = Sandbox(f"{__name__}:make_scorer")


def grade(answer_text: str, gold: str | None, metadata: dict[str, Any]) -> bool | None:
    """Right where ``exact.grade`` says so. Otherwise math-verify compares the final answer with the gold answer, plain
    or LaTeX; of a final answer in prose it compares the last formula or number. Gold answers in words are compared as
    text only.

    Returns: None without a gold answer.
    Raises: Unscored.
    """
    right = exact.grade(answer_text, gold, metadata)
    final, marked = find_final(answer_text)
    if gold is None or right is not False or not final or is_words(gold := gold_answer(gold)):
        return right
    if any(based_value(plain_text(text)) is not None for text in (final, gold)):  # computer algebra reads 101_2 as 101
        return False
    return SANDBOX.ask(final=final[:LONGEST], context=(final if marked else answer_text)[-_TAIL:], gold=gold)


def make_scorer() -> Callable[..., bool]:
    """The scorer that the sandbox calls."""
    import logging

    from math_verify import parse, verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    logging.disable(logging.CRITICAL)
    import_all("sympy", *SYMPY)

    # Their timeouts are ours here, and they work in main threads alone. No fallback: texts were compared before.
    options = {"fallback_mode": "no_fallback", "parsing_timeout": None, "raise_on_error": True}

    def boxed(text: str) -> list[Any]:
        return parse(rf"\boxed{{{_latex(text)}}}", **options)

    def score(final: str, context: str, gold: str) -> bool:
        if not (wanted := boxed(gold)):
            raise Unscored(f"math-verify reads no formula in the gold answer {gold[:80]!r}", UNREAD)
        said = boxed(final) if len(final) <= _TAIL and _balanced(final) else []
        if _PROSE.search(final):
            context = _CURRENCY.sub("", context)
            found = parse(context, [LatexExtractionConfig()], **options)
            if not found and not re.search(r"[\\^]|sqrt", context):  # 2\sqrt{3} without its dollars is not the number 2
                found = parse(context, [ExprExtractionConfig()], **options)
            said += found
        return any(
            verify(wanted, one, timeout_seconds=None, raise_on_error=True) and not _far(wanted[0], one) for one in said
        )

    for said, wanted in _WARM_UP:
        score(said, f"It is ${said}$ dollars", wanted)
    return score


# A confined process imports nothing: these comparisons load what others need.
_WARM_UP = [("(x+1)^2", "x^2+2x+1"), ("[1,2)", "(1,2]"), ("\\frac{x}{2", "3"), ("x<3", "(-\\infty,3)"), ("50\\%", "\\sqrt{8}"),
            ("\\int_0^1 x dx", "1"), ("\\sum_{n=1}^3 n", "7"), ("\\begin{pmatrix}1&2\\end{pmatrix}", "(1,2)")]  # fmt: skip


_TOLERANCE = 1e-5  # of a decimal, relative; math-verify rounds to 6 decimals, which makes 1/2^98 of 1/2^99


def _far(wanted: Any, said: Any) -> bool:
    """Whether two numbers, or those in two tuples, sets or equations, differ by more than decimals are rounded."""
    import sympy

    pairs = [(wanted, said)]
    while pairs:
        a, b = (x.rhs if isinstance(x, sympy.Eq) else x for x in pairs.pop())
        if not (isinstance(a, sympy.Basic) and isinstance(b, sympy.Basic)):
            continue
        if isinstance(a, sympy.Tuple | sympy.FiniteSet | sympy.Interval) and type(a) is type(b):
            pairs += zip(a.args, b.args, strict=False)
        elif a.is_number and b.is_number:
            exact = not a.has(sympy.Float) and not b.has(sympy.Float)
            x, y = (sympy.N(number.doit(), 60) for number in (a, b))
            largest = max(abs(x), abs(y))
            if largest.is_finite and abs(x - y) > largest * (sympy.Float("1e-40") if exact else _TOLERANCE):
                return True
    return False


_PROSE = re.compile(r"(?<![\\\w])(?!sqrt|sin|cos|tan|log|exp)[^\W\d_]{3,}|\$|\\[(\[]")
_CURRENCY = re.compile(r"\\\$|\$(?=\d[\d,]*+(?:\.\d+)?+(?!\s*[-+*/^=<>\\$(]|\s?\w\b|\w))")


_UNICODE = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\(?:mathrm|operatorname|text|mathit)\s*\{\s*([ei])\s*\}", r"\1"),
        (r"(?<=\d)[eE]([+-]?\d{1,3})(?!\w)", r"\\times 10^{\1}"),
        (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"π", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"[\u2212\u2013]", "-"),
        (r"\u00d7", r"\\times "),
        (r"[·⋅]", r"\\cdot "),
        (r"±", r"\\pm "),
        (r"\u222a", r"\\cup "),
        (r"≤", r"\\le "),
        (r"≥", r"\\ge "),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"\\[,;:! ]|~", " "),
    )
]


def _latex(text: str) -> str:
    """Plain notation that math-verify does not read, as LaTeX."""
    for pattern, by in _UNICODE:
        text = pattern.sub(by, text)
    text = re.sub(r"\\?\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text.strip().strip("$").replace("**", "^"))
    return re.sub(r"(?<!\\)\bpi\b", r"\\pi", text)


def _balanced(text: str) -> bool:
    depth = 0
    for bracket in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if bracket == "{" else -1
        if depth < 0:
            return False
    return depth == 0
