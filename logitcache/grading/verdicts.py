"""Verdicts: is what a trace answers its prompt's gold answer?

``exact`` compares texts and numbers here, ``math`` and ``gym`` ask a judge (judge.py).
"""

import re
import warnings
from collections import Counter
from functools import cache
from typing import Any

from logitcache.errors import InputError
from logitcache.grading.exact import LONGEST, is_words, number_value, plain_text, same_answer
from logitcache.grading.final_answer import after_announcement, boxed, final_answer, find_final, marked_answers, tagged
from logitcache.grading.sandbox import TAIL, Judge

KINDS = ("math", "exact", "gym")
_NEEDS = {"math": ("math_verify", "math-verify"), "gym": ("reasoning_gym", "reasoning-gym")}

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
    gold = next(iter(marked_answers(gold)), gold)
    final, marked = find_final(answer_text)
    right = any(same_answer(text, gold) for text in ([final] if marked else [final, answer_text]))
    if kind == "exact" or right or not final or is_words(gold):
        return right
    return _asked(kind, final=final[:LONGEST], context=(final if marked else answer_text)[-TAIL:], gold=gold)


def _gym_answers(text: str, gold: str | None) -> list[str]:
    """The texts that may be the answer, for scorers that take, say, the first number of whatever they are given."""
    if marked := tagged(text) or boxed(text):
        texts = [marked]
    elif gold is not None and "\n" not in gold.strip():
        texts = [final_answer(text)]
    else:  # a board or a grid of several lines
        texts = [_FENCE.sub(r"\1", t) for t in (after_announcement(text), text.strip(), final_answer(text))]
    if gold is not None and number_value(plain_text(gold)) is not None:
        texts = [t for t in texts if len(_NUMBERS.findall(t)) == 1 or same_answer(t, gold)]
    return [t for t in dict.fromkeys(texts) if 0 < len(t) <= LONGEST]


_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_NUMBERS = re.compile(r"\d+(?:[.,]\d+)*+")


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
