import re
import time

import pytest

from logitcache.errors import InputError
from logitcache.runtime.patterns import search


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(a|a)*$", "a" * 40 + "b"),
        ("(a|aa)+$", "a" * 60 + "b"),
        (r"(?:\w|\d|a)+!", "a" * 60),
        (r"^(.*?,){30}x", "1," * 60),
    ],
)
def test_a_catastrophic_pattern_ends_in_one_line(pattern: str, text: str) -> None:
    began, said = time.monotonic(), "`answer_regex` searches for over 1 s"
    try:
        assert search(pattern, text) is None
    except InputError as e:
        said = str(e)
    assert re.match("`answer_regex` .*searches .*for over 1 s", said)
    assert "\n" not in said
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "is not a regular expression"),
        ("(?:" * 150 + "a" + ")" * 150 * 900, "has over 1,000 characters"),
        ("((((a{100}){100}){100}){100}){100}", "repeats a part over 10,000 times"),
        ("(a{0,65535}){2}", "repeats a part over 10,000 times"),
        ("a{99999999999999999999}", "is not a regular expression"),
    ],
)
def test_a_pattern_that_cannot_be_compiled_in_time_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(InputError, match=rf"`answer_regex` .* {why}"):
        search(pattern, "aaa")


TEXT = r"So x{e} is \boxed{42} {,3} {} aaa. Therefore the ANSWER is 7"


@pytest.mark.parametrize(
    "pattern",
    [
        "####", "(?i)answer", r"\\boxed{", r"\\boxed\{", "x{e}", "x{e<=2}", "[{]e", "{}", "a{2}", "a{2,}", "a{,2}\\.",
        "(?=Th)", r"(a)\1", "(?s)S.*7$", r"\bTherefore\b|never",
    ],
)  # fmt: skip
def test_a_pattern_means_what_it_means_to_re(pattern: str) -> None:
    for start in (0, 5):
        found = re.compile(pattern).search(TEXT, start)
        assert search(pattern, TEXT, start) == (found.start() if found else None)
