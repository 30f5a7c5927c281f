"""Gold answers: one text that holds one answer, or several of which any is right."""

import json
from datetime import date, time
from decimal import Decimal
from typing import Any

from logitcache.errors import PromptsError
from logitcache.prompts.values import kind_of


def gold_answer(value: Any) -> str | None:
    """The gold answer of a row: text, a number, true or false, or a list of these, any of which is right.

    Returns: None for null, text without content, or an empty list.
    Raises: PromptsError for an object, or a list of lists or objects.
    """
    items = value if isinstance(value, list) else [value]
    texts = [_text(item) for item in items if item is not None]
    given = list(dict.fromkeys(text for text in texts if text.strip()))
    return joined_answers(given) if given else None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers with a null becomes one of floats
        return str(int(value))
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Decimal | date | time):
        return str(value)
    what = "a list in a list" if isinstance(value, list) else kind_of(value)
    raise PromptsError(f"`answer` has {what}; give text, a number, or a list of these, any of which is right")


def alternatives(answer: str) -> list[str]:
    """The gold answers in ``Prompt.answer``, any of which is right: several are a JSON array of texts, one is its text."""
    found = _json_texts(answer)
    return [answer] if found is None else found


def joined_answers(answers: list[str]) -> str:
    """The text whose ``alternatives`` are ``answers``, at least one."""
    if len(answers) == 1 and _json_texts(answers[0]) is None:
        return answers[0]
    return json.dumps(answers, ensure_ascii=False)


def _json_texts(text: str) -> list[str] | None:
    """The texts of a JSON array that holds nothing else; None for any other text."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and found and all(isinstance(x, str) for x in found) else None
