"""The final answer of a text: what it boxes, tags or announces, else its last line."""

import re
from collections.abc import Callable


def final_answer(text: str) -> str:
    r"""The final answer of a text; "" for an empty text. The first of these that is there:

    1. what the last closed ``\boxed{...}`` holds;
    2. what the last closed ``<answer>...</answer>`` holds;
    3. the rest of the line, or where that is empty the next line, after the last "answer is", "answer:" or "####";
    4. the last line that is not empty.
    """
    return find_final(text)[0]


def find_final(text: str) -> tuple[str, bool]:
    """The final answer, and whether it was marked."""
    for answer in marked_answers(text):
        return answer, True
    return (text.strip().splitlines() or [""])[-1].strip(), False


def marked_answers(text: str) -> list[str]:
    """The marked final answers, best first."""
    return [found for find in (boxed, tagged, _announced) if (found := find(text))]


def boxed(text: str) -> str:
    if "boxed" not in text:  # most texts, at no cost
        return ""
    return _last_closed(text, r"\\f?boxed\s*\{|\{|\}|\\.", lambda token: token[0] == "\\" and len(token) > 2)


def tagged(text: str) -> str:
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
    return next((line.strip() for line in after_announcement(text).splitlines() if line.strip()), "")


def after_announcement(text: str) -> str:
    return text[max((m.end() for m in _ANNOUNCES.finditer(text)), default=len(text)) :].strip()
