"""Is an answer right? Graders compare the answer of a completion with the gold answer of its prompt.

A grader is one entry of ``GRADERS``.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from logitcache.errors import InputError, did_you_mean
from logitcache.grading import exact, formula, gym
from logitcache.grading.sandbox import Unscored
from logitcache.runtime.options import Option


@dataclass(frozen=True, slots=True)
class Grader:
    """One way to compare an answer with a gold answer.

    Attributes:
        grade: called with the text of the answer section, the gold answer or None, and the prompt's metadata. Returns
            whether the answer is right, None without a gold answer; raises Unscored where it cannot tell. It must be
            safe in any thread.
        module: the module it needs, None for none; ``pip install 'logitcache[NAME]'`` installs its ``package``.
    """

    name: str
    grade: Callable[[str, str | None, dict[str, Any]], bool | None]
    module: str | None = None
    package: str | None = None


GRADERS = {
    grader.name: grader
    for grader in (
        Grader("math", formula.grade, "math_verify", "math-verify"),
        Grader("exact", exact.grade),
        Grader("gym", gym.grade, "reasoning_gym", "reasoning-gym"),
    )
}

Verifier = Annotated[  # the option of commands that grade answers
    str | None,
    Option(
        f"Grade each answer against the prompt's `answer`: {', '.join(GRADERS)}.",
        group="Grading",
        default="no verdicts",
    ),
]

unscored: Counter[str] = Counter()  # by grader: answers without a verdict because their grader failed


def check(name: str) -> None:
    """Checks that a grader exists and that the package it needs is installed, without importing it.

    Raises: InputError naming the nearest grader, or the package to install.
    """
    from importlib.util import find_spec

    if name not in GRADERS:
        raise InputError(f"`verifier` {name!r} is unknown; {did_you_mean(name, GRADERS)}")
    grader = GRADERS[name]
    if grader.module is not None and find_spec(grader.module) is None:
        raise InputError(f"`verifier` {name} needs {grader.package}; pip install 'logitcache[{name}]'")


def verdict(name: str, answer_text: str, gold: str | None, metadata: dict[str, Any]) -> bool | None:
    """Whether an answer is right. Safe in any thread.

    An empty answer, such as that of a completion cut in its reasoning, is wrong.

    Args:
        name: of a grader, a key of ``GRADERS``; see ``exact.grade``, ``formula.grade`` (math) and ``gym.grade``.
        answer_text: the text of the answer section.
        gold: the prompt's gold answer; some reasoning-gym tasks have none and score by metadata.
        metadata: of the prompt.
    Returns: None without a gold answer, or where the grader failed; ``unscored`` counts failures in this process, and
        a warning gives the first reason.
    """
    try:
        return GRADERS[name].grade(answer_text, gold, metadata)
    except Unscored as e:
        unscored[name] += 1
        if unscored[name] == 1:
            warnings.warn(f"no verdict of {name}: {e}; this answer and others like it get no verdict", stacklevel=2)
        return None
