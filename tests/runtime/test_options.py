"""logitcache.runtime.options: settings become the words of a command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from logitcache.runtime.options import Option, arguments
from logitcache.sections import Markers


@dataclass(frozen=True, kw_only=True)
class Options:
    caches: Annotated[list[Path], Option("Caches.", positional=True)]
    top_k: Annotated[int | None, Option("Ids per row.")] = None
    everything: Annotated[bool, Option("All traces.", flag="--all")] = False
    points: Annotated[tuple[float, ...], Option("Shares.")] = (1.0,)
    weights: Annotated[dict[str, float], Option("Weights.", flag="--weight")] = field(default_factory=dict)
    extra: Annotated[dict[str, Any], Option("More.")] = field(default_factory=dict)
    markers: Annotated[Markers | None, Option("Markers.")] = None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"caches": [Path("a"), Path("b")], "top_k": 8}, ["a", "b", "--top-k", "8"]),
        ({"top_k": None}, []),
        ({"everything": True}, ["--all"]),
        ({"everything": False}, ["--no-all"]),
        ({"points": (0.25, 1e-05)}, ["--points", "0.25,1e-05"]),
        ({"weights": {"answer": 2.0, "prompt": 0.5}}, ["--weight", "answer=2.0", "--weight", "prompt=0.5"]),
        ({"extra": {"a": "x", "b": "3", "c": True}}, ["--extra", "a=x", "--extra", 'b="3"', "--extra", "c=true"]),
        ({"markers": Markers("<t>", "</t>")}, ["--markers", "<t>,</t>"]),
    ],
)
def test_settings_become_words_of_a_command_line(settings: dict[str, Any], words: list[str]) -> None:
    assert arguments(Options, settings) == words


def test_a_setting_that_is_not_declared_is_refused() -> None:
    with pytest.raises(KeyError, match="top_kk"):
        arguments(Options, {"top_kk": 3})
