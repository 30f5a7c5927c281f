"""Verdicts: is what a trace answers its prompt's gold answer?

``exact`` compares texts and numbers here, ``math`` and ``gym`` ask a judge (judge.py).
"""

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

from logitcache.errors import InputError
from logitcache.grading.sandbox import TAIL, Judge

KINDS = ("math", "exact", "gym")
_NEEDS = {"math": ("math_verify", "math-verify"), "gym": ("reasoning_gym", "reasoning-gym")}

_LONGEST = 20_000  # characters of a final answer

unscored: Counter[str] = Counter()  # by kind: answers whose scorer failed, all of them verdicts of None


def check(kind: str) -> None:
    """Holds a kind of verdict against what is known and installed, in a moment.

    Raises: InputError naming the nearest kind, or the package to install.
    """
    from difflib import get_close_matches
    from importlib.util import find_spec

    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(KINDS)}"
        raise InputError(f"`verifier` {kind!r} is unknown; {hint}")
    if kind in _NEEDS and find_spec(_NEEDS[kind][0]) is None:
        raise InputError(f"`verifier` {kind} needs {_NEEDS[kind][1]}; pip install 'logitcache[{kind}]'")


def verdict(kind: str, answer_text: str, gold: str | None, metadata: dict[str, Any]) -> bool | None:
    """Whether an answer section says what the gold answer says. Safe in any thread.

    An empty answer, such as that of a trace cut in its reasoning, is wrong.

    exact: the final answer (see ``final_answer``) and the gold answer are one number by value, or one text but for case,
        white space, Unicode form, a closing full stop, and the wrapping of Markdown, LaTeX or "The answer is".
    math: right where ``exact`` says so; else math-verify compares the final answer, or where it is prose the last formula
        or number of it, with the gold answer, plain or LaTeX. A gold answer of words is left to ``exact``.
    gym: reasoning-gym's ``score_answer`` gives 0.99 or more to what stands in <answer> or \\boxed, or else to the final
        answer, or where the gold answer has several lines to the text. Some of its scorers take the first number they
        meet: where the gold answer is a number, a text with several is wrong. Its entry is rebuilt from
        ``metadata["gym"]``, with the task's default options.

    Args:
        kind: one of ``KINDS``.
        answer_text: the text of the answer section.
        gold: the prompt's gold answer; some of reasoning-gym's tasks have none and score by metadata.
        metadata: of the prompt.
    Returns: None where there is no gold answer, or where scoring failed; that is counted in this process's ``unscored``
        and the first reason is given in a warning.
    """
    if kind == "gym":
        entry = metadata.get("gym")
        if not isinstance(entry, dict) or "source_dataset" not in entry:
            return _unscored(kind, "the prompt is none of reasoning-gym: its metadata has no gym.source_dataset")
        texts = _gym_answers(answer_text, gold)
        return _asked(kind, texts=texts, gold=gold, entry=entry) if texts else False
    if gold is None or not gold.strip():
        return None
    gold = next(iter(_marks(gold)), gold)
    final, marked = _find_final(answer_text)
    right = any(_same(text, gold) for text in ([final] if marked else [final, answer_text]))
    if kind == "exact" or right or not final or _is_words(gold):
        return right
    return _asked(kind, final=final[:_LONGEST], context=(final if marked else answer_text)[-TAIL:], gold=gold)


def final_answer(text: str) -> str:
    r"""What a text gives as its answer; "" for an empty text. The first of these that there is:

    1. what the last closed ``\boxed{...}`` holds;
    2. what the last closed ``<answer>...</answer>`` holds;
    3. the rest of the line, or where that is empty the next line, after the last "answer is", "answer:" or "####";
    4. the last line that is not empty.
    """
    return _find_final(text)[0]


def _find_final(text: str) -> tuple[str, bool]:
    """The final answer, and whether something marked it."""
    for answer in _marks(text):
        return answer, True
    return (text.strip().splitlines() or [""])[-1].strip(), False


def _marks(text: str) -> list[str]:
    """The final answers that something marks, best first."""
    return [found for find in (_boxed, _tagged, _announced) if (found := find(text))]


def _boxed(text: str) -> str:
    if "boxed" not in text:  # most texts, at no cost
        return ""
    return _last_closed(text, r"\\f?boxed\s*\{|\{|\}|\\.", lambda token: token[0] == "\\" and len(token) > 2)


def _tagged(text: str) -> str:
    return _last_closed(text, r"<answer>|</answer>", lambda token: token[1] != "/")


def _last_closed(text: str, tokens: str, is_ours: Callable[[str], bool]) -> str:
    """What the last of our brackets to close holds, in one pass over a text of any length."""
    opened: list[tuple[bool, int]] = []
    found = ""
    for match in re.finditer(tokens, text, re.DOTALL | re.IGNORECASE):
        token = match.group()
        if is_ours(token) or token == "{":
            opened.append((token != "{", match.end()))
        elif token[0] in "}<" and opened:
            ours, start = opened.pop()
            found = text[start : match.start()].strip() if ours else found
    return found


_ANNOUNCES = re.compile(r"(?:\banswer[*_]{0,3}\s{0,3}(?:is\b|[:=])[*_]{0,3}:?[*_]{0,3}|####)", re.IGNORECASE)


def _announced(text: str) -> str:
    return next((line.strip() for line in _after_announcement(text).splitlines() if line.strip()), "")


def _after_announcement(text: str) -> str:
    return text[max((m.end() for m in _ANNOUNCES.finditer(text)), default=len(text)) :].strip()


def _gym_answers(text: str, gold: str | None) -> list[str]:
    """The texts that may be the answer, for scorers that take, say, the first number of whatever they are given."""
    if marked := _tagged(text) or _boxed(text):
        texts = [marked]
    elif gold is not None and "\n" not in gold.strip():
        texts = [final_answer(text)]
    else:  # a board or a grid of several lines
        texts = [_FENCE.sub(r"\1", t) for t in (_after_announcement(text), text.strip(), final_answer(text))]
    if gold is not None and _number(_plain(gold)) is not None:
        texts = [t for t in texts if len(_NUMBERS.findall(t)) == 1 or _same(t, gold)]
    return [t for t in dict.fromkeys(texts) if 0 < len(t) <= _LONGEST]


_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_NUMBERS = re.compile(r"\d+(?:[.,]\d+)*+")


def _same(text: str, gold: str) -> bool:
    """One text, or one number."""
    said, wanted = _plain(text), _plain(gold)
    number = _number(said)
    return said != "" and (said == wanted or (number is not None and number == _number(wanted)))


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


def _plain(text: str) -> str:
    """A text without what tells no two answers apart; "" where it is too long to be one."""
    if len(text) > _LONGEST:
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


def _number(text: str) -> Fraction | None:
    """The value of a plain number or fraction such as 1,000.50, -3/4 or 2e-3."""
    if len(text) > 400 or not _NUMBER.fullmatch(text):
        return None
    try:
        top, _, bottom = text.replace(",", "").partition("/")
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def _is_words(gold: str) -> bool:
    """Words are products of symbols to a computer algebra: Siarp would be Paris."""
    plain = _plain(gold)
    return re.search(r"[^\W\d_]{3}", plain) is not None and re.search(r"[\d\\^=+*/()<>]", plain) is None


def _unscored(kind: str, reason: str) -> None:
    unscored[kind] += 1
    if unscored[kind] == 1:
        warnings.warn(f"no verdict of {kind}: {reason}; it counts as none, and so will others like it", stacklevel=2)


@cache
def _judge(kind: str) -> Judge:
    return Judge(kind)


def _asked(kind: str, **question: Any) -> bool | None:
    right, reason = _judge(kind).ask(**question)
    return right if reason is None else _unscored(kind, reason)
