"""The grader ``exact``: answers compared as texts and as numbers."""

import re
import unicodedata
from fractions import Fraction
from typing import Any

from logitcache.grading.final_answer import find_final, marked_answers

LONGEST = 20_000  # characters of a final answer


def grade(answer_text: str, gold: str | None, metadata: dict[str, Any]) -> bool | None:
    """Right where the final answer (see ``final_answer``) and the gold answer are the same number, or the same text apart
    from case, white space, Unicode form, a closing full stop, and wrapping in Markdown, LaTeX or "The answer is".

    Returns: None without a gold answer.
    """
    if gold is None or not gold.strip():
        return None
    gold = gold_answer(gold)
    final, marked = find_final(answer_text)
    return any(same_answer(text, gold) for text in ([final] if marked else [final, answer_text]))


def gold_answer(gold: str) -> str:
    """The final answer of a worked solution, else the gold answer itself."""
    return next(iter(marked_answers(gold)), gold)


def same_answer(text: str, gold: str) -> bool:
    """Whether two answers are the same text or the same number."""
    given, wanted = plain_text(text), plain_text(gold)
    if re.fullmatch(r"[a-j]", wanted) and (choice := _CHOICE.match(given)):
        given = choice.group(1)
    number = number_value(given)
    return given != "" and (given == wanted or (number is not None and number == number_value(wanted)))


# Minus, dashes, hyphens, quotes, fraction slash.
_DASHES_AND_QUOTES = str.maketrans("\u2212\u2013\u2014\u2010\u2011\u2019\u2018\u201c\u201d\u2044", "-----''\"\"/")
_REPLACED = [(re.compile(pattern), by) for pattern, by in (
    (r"([⁰¹²³⁴-⁹⁻]+)", r"^\1"),  # NFKC would make x2 of x² ...
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),  # ... and 11/2 of 1½
    (r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"(?<=\d)\s*(?=\\[dt]?frac)", " "),  # 11/2 is not 1\frac{1}{2} ...
    (r"(?<![A-Za-z)}\]])\\[dt]?frac\s*\{\s*(-?(?:[\d.]+|[a-z]))\s*\}\s*\{\s*([\d.]+|[a-z])\s*\}(?!\s*[\w({\\^])", r"\1/\2"),
    (r"\{,\}|\\[,!;:> ]|\\left\b|\\right\b", lambda m: "," if m.group() == "{,}" else ""),
    (r"\\([%$#&_])", r"\1"),
)]  # fmt: skip
_PREFIX = re.compile(r"(?:the )?(?:final |correct )?answer\s*(?:is|:)[\s:]*", re.IGNORECASE)
_WRAPS = [re.compile(pattern, re.DOTALL) for pattern in (
    r"\$\$(.+)\$\$", r"\$([^$]+)\$?", r"\\\((.+)\\\)", r"\\\[(.+)\\\]", r"(\*{1,3}|_{1,3}|`{1,3})(.+)\1", r"\"(.+)\"", r"'(.+)'",
    r"\((\w+)\)", r"(.+?)(?:[.,;:]|(?<=[^\W\d_]{2})[!?])", r"\\f?boxed\s*\{([^{}]*)\}",
)]  # fmt: skip


def plain_text(text: str) -> str:
    """A text normalised for comparison; "" where it is too long to be an answer."""
    if len(text) > LONGEST:
        return ""
    for pattern, by in _REPLACED:
        text = pattern.sub(by, text)
    text = " ".join(unicodedata.normalize("NFKC", text).translate(_DASHES_AND_QUOTES).split())
    for _ in range(8):  # wraps within wraps
        inner = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
        for wrap in _WRAPS:
            if match := wrap.fullmatch(inner):
                inner = match.group(match.lastindex or 0).strip()
        if inner in ("", text):
            break
        text = inner
    return text.casefold()


_CHOICE = re.compile(r"(?:(?:option|choice)\s+)?[(*]{0,3}([a-j])(?:[).:*]|\Z)")  # (B) 42
_BASED = re.compile(r"([+-]?)(?:\((?=\w+\)))?(\d[0-9a-z]*)\)?(?:_\{?(\d{1,2})\}?| ?\(?(?:in )?base[ -](\d{1,2})\)?)")
_PREFIXED = re.compile(r"[+-]?0(?:x[0-9a-f]+|b[01]+|o[0-7]+)")
_MIXED = re.compile(r"([+-]?)(\d+) (\d+)/(\d+)")
_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:(?<=\d)\.|\.\d+)?(?:e[+-]?\d{1,3}|/\d+)?")


def number_value(text: str) -> Fraction | None:
    """The value of a plain number or fraction such as 1,000.50, -3/4, 1 1/2, 2e-3, 0x1f or 101_2."""
    if len(text) > 400:
        return None
    try:
        if based_value(text) is not None:
            return based_value(text)
        if mixed := _MIXED.fullmatch(text):
            sign, whole, top, bottom = mixed.groups()
            return Fraction(f"{sign}1") * (int(whole) + Fraction(int(top), int(bottom)))
        if not _NUMBER.fullmatch(text):
            return None
        top, _, bottom = text.replace(",", "").partition("/")
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def based_value(text: str) -> Fraction | None:
    """The value of a plain numeral with a base, such as 101_2 or 0x1f; None for anything else."""
    try:
        if _PREFIXED.fullmatch(text):
            return Fraction(int(text, 0))
        if match := _BASED.fullmatch(text):
            sign, digits, *bases = match.groups()
            return Fraction(int(sign + digits, int(bases[0] or bases[1])))
    except ValueError:  # a digit that the base does not have
        pass
    return None


def is_words(gold: str) -> bool:
    """Whether it is words, which computer algebra takes for products of symbols: Siarp would equal Paris."""
    plain = plain_text(gold)
    return re.search(r"[^\W\d_]{3}", plain) is not None and re.search(r"[\d\\^=+*/()<>]", plain) is None
