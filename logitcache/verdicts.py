"""Verdicts: is what a trace answers its prompt's gold answer?

``exact`` compares texts and numbers here. ``math`` and ``gym`` hand the answer to packages that compute, and even ``eval``,
what a model wrote. So they run in a process of their own, with a limit of time and of memory, that may not write files,
start programs or open connections. That keeps accidents away; it is no sandbox against an attacker.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import cache
from typing import Any

from logitcache.errors import InputError, first_line

KINDS = ("math", "exact", "gym")
_NEEDS = {"math": ("math_verify", "math-verify"), "gym": ("reasoning_gym", "reasoning-gym")}

_SECONDS, _MEMORY = 3.0, 4 << 30  # for one verdict
_LONGEST, _TAIL = 20_000, 2_000  # characters: a final answer, and what is searched where nothing marks one
_RIGHT = 0.99  # of reasoning-gym's score: whatever it gives less for is near the answer, or holds it

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
        raise InputError(f"--verifier {kind!r} is unknown; {hint}")
    if kind in _NEEDS and find_spec(_NEEDS[kind][0]) is None:
        raise InputError(f"--verifier {kind} needs {_NEEDS[kind][1]}; pip install 'logitcache[{kind}]'")


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
    Returns: None where there is no gold answer, or where scoring failed; that is counted in ``unscored`` and the first
        reason is given in a warning.
    """
    if kind == "gym":
        entry = metadata.get("gym")
        if not isinstance(entry, dict) or "source_dataset" not in entry:
            return _unscored(kind, "the prompt is none of reasoning-gym: its metadata has no gym.source_dataset")
        texts = _gym_answers(answer_text, gold)
        return _judge(kind).ask(texts=texts, gold=gold, entry=entry) if texts else False
    if gold is None:
        return None
    gold = next(iter(_marks(gold)), gold)
    final, marked = _find_final(answer_text)
    right = any(_same(text, gold) for text in ([final] if marked else [final, answer_text]))
    if kind == "exact" or right or not final or _is_words(gold):
        return right
    return _judge(kind).ask(final=final[:_LONGEST], context=(final if marked else answer_text)[-_TAIL:], gold=gold)


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
def _judge(kind: str) -> "_Judge":
    return _Judge(kind)


class _Judge:
    """The process that scores one kind of answers; it starts with the first, and again where one ended it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # a fork must not read its parent's verdicts

    def ask(self, **question: Any) -> bool | None:
        with self._turn:
            right, reason = self._ask(json.dumps(question))
            if reason is not None:
                _unscored(self.kind, reason)
            return right

    def _ask(self, question: str) -> tuple[bool | None, str | None]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process, self._owner = self._start(), os.getpid()
        process, self._process = self._process, None  # until its reply is in hand: an interrupt must leave none behind
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # it ended before the question
            process.stdin.write(question + "\n")
            process.stdin.flush()
            if reply := process.stdout.readline():
                self._process = process
                return tuple(json.loads(reply))
        with suppress(OSError), process:  # closes its pipes
            process.kill()
        if process.returncode == -signal.SIGALRM:
            return None, f"no end within {_SECONDS:g} s"
        return None, f"the scorer ended with code {process.returncode}"

    def _start(self) -> subprocess.Popen[str]:
        import atexit

        process = subprocess.Popen(
            [sys.executable, "-B", "-P", "-c", f"from logitcache.verdicts import _serve; _serve{self.kind, _SECONDS}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            start_new_session=True,  # a Ctrl-C is ours: what is under way is still judged
            text=True,
            encoding="utf-8",
        )
        atexit.register(process.kill)
        return process


def _serve(kind: str, seconds: float) -> None:
    """The judge's life: a question a line in, a verdict and a reason a line out, until its parent is gone."""
    import resource

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a scorer prints is no verdict
    scorer = _math_scorer() if kind == "math" else _gym_scorer()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    sys.addaudithook(_refuse)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # ends this process, whatever it is in
        try:
            reply = (scorer(**json.loads(line)), None)
        except BaseException as e:
            reply = (None, first_line(e))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: a scorer reads its own files, and does nothing else to the machine."""
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    harmless = event in ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
    if writes or (
        event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "signal.")) and not harmless
    ):
        raise PermissionError(f"a scorer may not {event}")


def _math_scorer() -> Callable[..., bool]:
    import logging

    from math_verify import parse, verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    logging.disable(logging.CRITICAL)
    # Their timeouts are ours here, and they work in main threads alone. No fallback: texts were compared before.
    options = {"fallback_mode": "no_fallback", "parsing_timeout": None, "raise_on_error": True}

    def boxed(text: str) -> list[Any]:
        return parse(rf"\boxed{{{_latex(text)}}}", **options)

    def score(final: str, context: str, gold: str) -> bool:
        if not (wanted := boxed(gold)):
            raise ValueError(f"math-verify reads no formula in the gold answer {gold[:80]!r}")
        said = boxed(final) if len(final) <= _TAIL and _balanced(final) else []
        if _PROSE.search(final):
            context = _CURRENCY.sub("", context)
            found = parse(context, [LatexExtractionConfig()], **options)
            if not found and not re.search(r"[\\^]|sqrt", context):  # 2\sqrt{3} without its dollars is not the number 2
                found = parse(context, [ExprExtractionConfig()], **options)
            said += found
        return any(verify(wanted, one, timeout_seconds=None, raise_on_error=True) for one in said)

    return score


_PROSE = re.compile(r"(?<![\\\w])(?!sqrt|sin|cos|tan|log|exp)[^\W\d_]{3,}|\$|\\[(\[]")
_CURRENCY = re.compile(r"\\\$|\$(?=\d[\d,]*+(?:\.\d+)?+(?!\s*[-+*/^=<>\\$(]|\s?\w\b|\w))")


def _latex(text: str) -> str:
    """Plain notation that math-verify does not read, as LaTeX."""
    text = re.sub(r"\\?\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text.strip().strip("$").replace("**", "^"))
    return re.sub(r"(?<!\\)\bpi\b", r"\\pi", text)


def _balanced(text: str) -> bool:
    depth = 0
    for bracket in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if bracket == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def _gym_scorer() -> Callable[..., bool]:
    import reasoning_gym

    dataset = cache(lambda name: reasoning_gym.create_dataset(name, seed=0, size=1))

    def score(texts: list[str], gold: str | None, entry: dict[str, Any]) -> bool:
        task = dataset(entry["source_dataset"])
        forms = [{"question": "", "answer": gold, "metadata": m} for m in (entry, _with_tuples(entry))]
        if not any(task.score_answer(text, form) >= _RIGHT for text in texts for form in forms):
            return False
        if _takes(task, "?", forms[0]):  # game_of_life_halting does
            raise ValueError(f"{entry['source_dataset']} takes any answer for right")
        return True

    return score


def _takes(task: Any, text: str, form: dict[str, Any]) -> bool:
    try:
        return task.score_answer(text, form) >= _RIGHT
    except Exception:
        return False


def _with_tuples(value: Any) -> Any:
    """JSON made lists of tuples, and some tasks compare with those."""
    if isinstance(value, dict):
        return {key: _with_tuples(v) for key, v in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
