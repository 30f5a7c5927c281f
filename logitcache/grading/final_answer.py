"""The final answer of a text: what it boxes, tags or announces, else its last line."""

import re
from collections.abc import Callable


def final_answer(text: str) -> str:
    r"""The final answer of a text; "" for an empty text. The first of these that is there:

    1. what the last closed ``\boxed{...}`` holds;
    2. what the last closed ``<answer>...</answer>`` holds;
    3. what follows the last "answer is", "answer:", "correct option is", "####" or heading "Answer": a fenced block or
       display math that stands there, else the rest of the line, or where that is empty the next line;
    4. a fenced block or display math at the end of the text;
    5. the last line that is not empty.
    """
    return find_final(text)[0]


def find_final(text: str) -> tuple[str, bool]:
    """The final answer, and whether it was marked."""
    for answer in marked_answers(text):
        return answer, True
    return _last_block(text) or (text.strip().splitlines() or [""])[-1].strip(), False


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


_ANNOUNCES = re.compile(
    r"(?:\b(?:answer|(?:correct|right|best|final) (?:option|choice|result|value))"
    r"[*_]{0,3}\s{0,3}(?:is\b|[:=])[*_]{0,3}:?[*_]{0,3}"
    r"|^[ ]{0,3}#{1,6}[ ]{0,3}(?:the )?(?:final |correct )?answer[ ]{0,3}$|####)",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE, _DISPLAYS = re.compile(r"```[^\n`]*\n"), (("$$", "$$"), ("\\[", "\\]"))


def _announced(text: str) -> str:
    rest = after_announcement(text)
    if found := _first_block(rest.removeprefix("as follows").lstrip(":* \n\t")):
        return found
    return next((line.strip() for line in rest.splitlines() if line.strip()), "")


def after_announcement(text: str) -> str:
    return text[max((m.end() for m in _ANNOUNCES.finditer(text)), default=len(text)) :].strip()


def _first_block(text: str) -> str:
    """What a fenced block or display math at the beginning of a text holds; "" if there is none."""
    fence = _FENCE.match(text)
    for opening, closing in [(fence.group(), "```")] if fence else _DISPLAYS:
        if text.startswith(opening) and (end := text.find(closing, len(opening))) > 0:
            return text[len(opening) : end].strip()
    return ""


def _last_block(text: str) -> str:
    """What a fenced block or display math at the end of a text holds; "" if there is none."""
    text = text.rstrip().removesuffix(".").rstrip()
    for opening, closing in (("```", "```"), *_DISPLAYS):
        if text.endswith(closing) and (start := text.rfind(opening, 0, -len(closing))) >= 0:
            return _first_block(text[start:])
    return ""
