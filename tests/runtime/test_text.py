import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from logitcache.runtime.text import all_visible, code_span, markdown, markdown_table, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ASCII", "plain ASCII"),
        ("naïve 漢字 😀", "naïve 漢字 😀"),
        ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
        ("\x9b2J", r"\x9b2J"),  # the same in one character
        ("\x1b]8;;http://evil\x07click\x1b]8;;\x07", r"\x1b]8;;http://evil\x07click\x1b]8;;\x07"),
        ("a\u202eb\u2066c\u200f", r"a\u202eb\u2066c\u200f"),
        ("a\u200bb\ufeffc\u2060d\u00ade", r"a\u200bb\ufeffc\u2060d\xade"),
        ("a\u3164b\u115fc\ufe0fd", r"a\u3164b\u115fc\ufe0fd"),
        ("\U000e0041\U000e0100", r"\U000e0041\U000e0100"),
        ("one\ntwo\r\vthree\u2028four\x85", r"one\ntwo\r\x0bthree\u2028four\x85"),
        ("\udc80", r"\udc80"),
        ("\x7f\x00\t", r"\x7f\x00\t"),
    ],
)
def test_what_shows_nothing_is_escaped_and_the_rest_kept(text: str, shown: str) -> None:
    assert visible(text) == visible(visible(text)) == shown
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"


class Pair(NamedTuple):
    a: str
    b: int


@dataclass(frozen=True, slots=True)
class Result:
    path: Path
    texts: dict[str, list[str]]
    pair: Pair
    made: list[str] = field(default_factory=list, init=False)


def test_a_result_is_copied_with_all_its_texts_visible() -> None:
    result = Result(Path("a\x1bb"), {"k\n": ["v\u202e", ""]}, Pair("\x07", 3))
    assert all_visible(result) == Result(Path("a\\x1bb"), {"k\\n": ["v\\u202e", ""]}, Pair("\\x07", 3))
    assert result.pair.a == "\x07"


HOSTILE = [
    "a | b",
    "`code` ``",
    "```",
    "[click](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "<img src=x onerror=alert(1)>",
    "<!-- -->",
    "a\n\n# heading\n- item",
    "# heading",
    "*bold* __bold__ ~~gone~~",
    "$\\frac{1}{2}$ &lt; &#60;",
    "1. one",
    "- item",
    "a\\|b",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("form", [markdown, lambda text: code_span(text, in_table=True)], ids=["text", "code"])
def test_markdown_shows_a_cell_as_it_was_written(text: str, form) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    tokens = parser.parse(markdown_table(["a", "b"], [[form(text), "end"]]))
    cells = [t for t in tokens if t.type == "inline"]
    assert [t.content for t in cells[:2]] == ["a", "b"]
    assert len(cells) == 4
    assert cells[3].content == "end"
    assert {child.type for child in cells[2].children} <= {"text", "text_special", "code_inline"}
    if form is markdown:
        assert "".join(child.content for child in cells[2].children) == visible(text).strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_a_paragraph_as_it_was_written(text: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    for form in (markdown, code_span):
        tokens = parser.parse(form(text))
        assert {t.type for t in tokens} <= {"paragraph_open", "inline", "paragraph_close"}
        for child in [child for t in tokens for child in t.children or ()]:
            assert child.type in ("text", "text_special", "code_inline")


def test_json_needs_no_more_than_its_own_escapes() -> None:
    assert json.dumps("\x1b\u202e\x9b\udc80").isprintable()
