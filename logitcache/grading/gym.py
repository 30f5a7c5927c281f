"""The grader ``gym``: reasoning-gym scores answers to its own tasks, in a sandbox."""

import re
from functools import cache
from typing import Any

from logitcache.grading.confinement import SYMPY, import_all
from logitcache.grading.exact import LONGEST, number_value, plain_text, same_answer
from logitcache.grading.final_answer import after_announcement, boxed, final_answer, tagged
from logitcache.grading.sandbox import Sandbox, Unscored

_RIGHT = 0.99  # of reasoning-gym's score: it gives less to answers that are near the right one, or contain it

SANDBOX = Sandbox(f"{__name__}:Scorer")


def grade(answer_text: str, gold: str | None, metadata: dict[str, Any]) -> bool | None:
    """Right where reasoning-gym's ``score_answer`` gives 0.99 or more to the text in <answer> or \\boxed, else to
    the final answer, or to the whole text where the gold answer has several lines.

    Some of its scorers take the first number they find: where the gold answer is a number, a text with several numbers
    is wrong. The entry is rebuilt from ``metadata["gym"]``, with the task's default options.

    Raises: Unscored, also for a prompt that is not of reasoning-gym.
    """
    entry = metadata.get("gym")
    if not isinstance(entry, dict) or "source_dataset" not in entry:
        raise Unscored("the prompt is not of reasoning-gym: its metadata has no gym.source_dataset")
    texts = _candidates(answer_text, gold)
    return SANDBOX.ask(texts=texts, gold=gold, entry=entry) if texts else False


def _candidates(text: str, gold: str | None) -> list[str]:
    """The texts that may be the answer: some scorers take, say, the first number of the text they get."""
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


class Scorer:
    """What the sandbox calls."""

    def __init__(self) -> None:
        import reasoning_gym

        import_all("sympy", *SYMPY)
        self._task = cache(lambda name: reasoning_gym.create_dataset(name, seed=0, size=1))

    def prepare(self, texts: list[str], gold: str | None, entry: dict[str, Any]) -> bool:
        """Loads the task; returns whether it was not loaded yet."""
        loaded = self._task.cache_info().misses
        self._task(entry["source_dataset"])
        return self._task.cache_info().misses > loaded

    def __call__(self, texts: list[str], gold: str | None, entry: dict[str, Any]) -> bool:
        task = self._task(entry["source_dataset"])
        forms = [{"question": "", "answer": gold, "metadata": m} for m in (entry, _with_tuples(entry))]
        if not any(task.score_answer(text, form) >= _RIGHT for text in texts for form in forms):
            return False
        if _accepts(task, "?", forms[0]):  # game_of_life_halting does
            raise ValueError(f"{entry['source_dataset']} accepts any answer")
        return True


def _accepts(task: Any, text: str, form: dict[str, Any]) -> bool:
    try:
        return task.score_answer(text, form) >= _RIGHT
    except Exception:
        return False


def _with_tuples(value: Any) -> Any:
    """With its lists as tuples: JSON turned tuples into lists, and some tasks compare with tuples."""
    if isinstance(value, dict):
        return {key: _with_tuples(v) for key, v in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
