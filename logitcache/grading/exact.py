"""Whether two answers are one text or one number."""

import re
import unicodedata
from fractions import Fraction

LONGEST = 20_000  # characters of a final answer


def same_answer(text: str, gold: str) -> bool:
    """One text, or one number."""
    said, wanted = plain_text(text), plain_text(gold)
    number = number_value(said)
    return said != "" and (said == wanted or (number is not None and number == number_value(wanted)))


# Minus, dashes, hyphens, quotes, fraction slash.
_DASHES_AND_QUOTES = str.maketrans("\u2212\u2013\u2014\u2010\u2011\u2019\u2018\u201c\u201d\u2044", "-----''\"\"/")
_REPLACED = [(re.compile(pattern), by) for pattern, by in (
    (r"([⁰¹²³⁴-⁹⁻]+)", r"^\1"),  # NFKC would make x2 of x² ...
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),  # ... and 11/2 of 1½
    (r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
    (r"\{,\}|\\[,!;:> ]|\\left\b|\\right\b", lambda m: "," if m.group() == "{,}" else ""),
    (r"\\([%$#&_])", r"\1"),
)]  # fmt: skip
_PREFIX = re.compile(r"(?:the )?(?:final |correct )?answer\s*(?:is|:)[\s:]*", re.IGNORECASE)
_WRAPS = [re.compile(pattern, re.DOTALL) for pattern in (
    r"\$\$(.+)\$\$", r"\$([^$]+)\$?", r"\\\((.+)\\\)", r"\\\[(.+)\\\]", r"(\*{1,3}|_{1,3}|`{1,3})(.+)\1", r"\"(.+)\"", r"'(.+)'",
    r"\((\w+)\)", r"(.+?)(?:[.,;:]|(?<=[^\W\d_]{2})[!?])", r"\\f?boxed\s*\{([^{}]*)\}",
)]  # fmt: skip


def plain_text(text: str) -> str:
    """A text without what tells no two answers apart; "" where it is too long to be one."""
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


_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:(?<=\d)\.|\.\d+)?(?:e[+-]?\d{1,3}|/\d+)?")


def number_value(text: str) -> Fraction | None:
    """The value of a plain number or fraction such as 1,000.50, -3/4 or 2e-3."""
    if len(text) > 400 or not _NUMBER.fullmatch(text):
        return None
    try:
        top, _, bottom = text.replace(",", "").partition("/")
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def is_words(gold: str) -> bool:
    """Words are products of symbols to a computer algebra: Siarp would be Paris."""
    plain = plain_text(gold)
    return re.search(r"[^\W\d_]{3}", plain) is not None and re.search(r"[\d\\^=+*/()<>]", plain) is None
