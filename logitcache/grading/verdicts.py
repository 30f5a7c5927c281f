"""Is an answer right? Graders compare the answer of a completion with the gold answer of its prompt.

A grader is one entry of ``GRADERS``.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from logitcache.errors import InputError, did_you_mean
from logitcache.grading import confinement, exact, formula, gym
from logitcache.grading.sandbox import NO_ANSWER, Unscored
from logitcache.prompts import alternatives
from logitcache.runtime.options import Option


@dataclass(frozen=True, slots=True)
class Grader:
    """One way to compare an answer with a gold answer.

    Attributes:
        grade: called with the text of the answer section, the gold answer or None, and the prompt's metadata. Returns
            whether the answer is right, None without a gold answer; raises Unscored where it cannot tell. It must be
            safe in any thread.
        module: the module it needs, None for none; ``pip install 'logitcache[NAME]'`` installs its ``package``.
        needs_answer: whether it gives no verdict without a gold answer.
        evaluates: whether it evaluates texts, which it does in a `Sandbox`.
    """

    name: str
    grade: Callable[[str, str | None, dict[str, Any]], bool | None]
    module: str | None = None
    package: str | None = None
    needs_answer: bool = True
    evaluates: bool = False


GRADERS = {
    grader.name: grader
    for grader in (
        Grader("math", formula.grade, "math_verify", "math-verify", evaluates=True),
        Grader("exact", exact.grade),
        Grader("gym", gym.grade, "reasoning_gym", "reasoning-gym", needs_answer=False, evaluates=True),
    )
}

_HOW = f"Grade each answer against the prompt's `answer`: {', '.join(GRADERS)}."
Verifier = Annotated[str | None, Option(_HOW, group="Grading", default="no verdicts")]  # of commands that may grade
Grading = Annotated[str, Option(_HOW, group="Answers to prompts")]  # of commands that grade

no_verdict: Counter[str] = Counter()  # answers of this process without a verdict, by reason: see `Unscored.why`
_counting = threading.Lock()


def check(name: str) -> None:
    """Checks that a grader exists, that the package it needs is installed, and that this system can confine it.

    Raises: InputError naming the nearest grader, the package to install, or what the system lacks.
    """
    from importlib.util import find_spec

    if name not in GRADERS:
        raise InputError(f"`verifier` {name!r} is unknown; {did_you_mean(name, GRADERS)}")
    grader = GRADERS[name]
    if grader.module is not None and find_spec(grader.module) is None:
        raise InputError(f"`verifier` {name} needs {grader.package}; pip install 'logitcache[{name}]'")
    if grader.evaluates and (why := confinement.unconfinable()):
        raise InputError(
            f"`verifier` {name} evaluates text, and this system cannot confine that ({why}); set `verifier` to exact, or "
            "run on Linux with seccomp and libseccomp"
        )


# What data sets call the column of gold answers.
_LIKELY = ("solution", "final_answer", "expected_answer", "ground_truth", "gold", "gold_answer", "reference_answer",
           "correct_answer", "target", "label", "output", "response", "result", "reward_model", "answers")  # fmt: skip


def check_answers(name: str, source: str, prompts: Iterable[tuple[str | None, dict[str, Any]]]) -> None:
    """Checks that a grader can give a verdict on one of the prompts at least.

    Args:
        source: of the prompts, for the message.
        prompts: the gold answer and the metadata of each; read up to the first with an answer.
    Raises: InputError if it needs gold answers and there is none, naming the columns that may hold them.
    """
    if not GRADERS[name].needs_answer:
        return
    columns: dict[str, None] = {}
    for answer, metadata in prompts:
        if answer and answer.strip():
            return
        columns |= dict.fromkeys(metadata)
    there = list(columns)
    likely = [c for c in there if c.lower() in _LIKELY]
    found = f"; its other columns: {', '.join(there[:12])}" if there else ""
    way = f"give `columns` answer={likely[0]}" if likely else "add a column `answer`, or leave out `verifier`"
    raise InputError(f"`verifier` {name}: no prompt of {source} has an `answer` to compare with{found}; {way}")


def verdict(name: str, answer_text: str, gold: str | None, metadata: dict[str, Any]) -> bool | None:
    """Whether an answer is right. Safe in any thread.

    An empty answer, such as that of a completion cut in its reasoning, is wrong.

    Args:
        name: of a grader, a key of ``GRADERS``; see ``exact.grade``, ``formula.grade`` (math) and ``gym.grade``.
        answer_text: the text of the answer section.
        gold: the prompt's gold answer, or several: see ``prompts.alternatives``. Some reasoning-gym tasks have none and
            score by metadata.
        metadata: of the prompt.
    Returns: True if any gold answer makes it right, False if all make it wrong, else None. ``no_verdict`` counts the last
        by reason, and a warning gives the first error of a grader.
    """
    reasons: list[Unscored] = []
    for one in alternatives(gold) if gold is not None else [None]:
        try:
            right = GRADERS[name].grade(answer_text, one, metadata)
        except Unscored as e:
            reasons.append(e)
            continue
        if right:
            return True
        if right is None:
            reasons.append(Unscored("no gold answer", NO_ANSWER))
    if not reasons:
        return False
    first = reasons[0]
    with _counting:
        no_verdict[first.why] += 1
        news = first.why != NO_ANSWER and no_verdict[first.why] == 1
    if news:
        warnings.warn(f"no verdict of {name}: {first}; this answer and others like it get no verdict", stacklevel=2)
    return None


def listed(counts: dict[str, int]) -> str:
    """Counts of answers without a verdict, such as "no verdict: 12 without a gold answer, 1 timed out"; "" for none."""
    found = ", ".join(f"{count:,} {why}" for why, count in sorted(counts.items(), key=lambda c: -c[1]))
    return f"no verdict: {found}" if found else ""
