"""Reads prompts from a source: files, folders, a dataset of the hub, or a reasoning-gym task.

Each kind of source is an entry of ``SOURCES``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from logitcache.errors import PromptsError, did_you_mean
from logitcache.prompts.answers import alternatives, joined_answers
from logitcache.prompts.files import COMPRESSED, Rows, json_rows, parquet_rows
from logitcache.prompts.gym import gym_rows
from logitcache.prompts.hub import EXAMPLE, hub_rows, is_saved_dataset
from logitcache.prompts.layouts import Columns
from logitcache.prompts.prompt import Messages, Prompt, PromptSet, SourceCounts
from logitcache.prompts.rows import ParsedRow, Reading, parse

__all__ = [
    "SOURCES",
    "Columns",
    "Messages",
    "ParsedRow",
    "Prompt",
    "PromptSet",
    "PromptSource",
    "Reading",
    "Rows",
    "SourceCounts",
    "alternatives",
    "joined_answers",
    "load",
    "parse",
    "rows",
]
_NOT_DATA = ("readme", "license", "licence")  # files beside the data of a folder


def load(source: str, limit: int | None = None, columns: Mapping[str, str] | None = None) -> PromptSet:
    """Reads the prompts of a source.

    Args:
        source: a file, folder or pattern of files with a column ``prompt`` or ``messages``, or what `SOURCES` lists
            besides; the layouts are those of `logitcache.prompts.layouts`. Columns without a meaning become metadata.
        limit: the largest number of prompts to read.
        columns: the source's own names of columns, by ours: ``{"prompt": "question"}``.
    Raises: PromptsError naming the file and the row.
    """
    reading, prompts, places = Reading(source, columns or {}), list[Prompt](), dict[str, str]()
    for place, row in rows(source):
        parsed = reading.parse(place, row)
        prompt = parsed.prompt
        if prompt.id not in places:
            places[prompt.id] = place
            prompts.append(prompt)
            reading.count(parsed)
        elif parsed.has_id:
            raise PromptsError(
                f"{place}: id {prompt.id!r} is already used by {places[prompt.id]}; give each prompt its own id"
            )
        else:
            reading.counts.repeated += 1
        if len(prompts) == limit:
            break
    counts = reading.finish()
    if not prompts:
        raise PromptsError(f"{source}: contains no prompts; give one JSON object per line, with `prompt` or `messages`")
    return PromptSet(prompts, counts)


def rows(source: str) -> Rows:
    """Reads the rows of a source without parsing them. Of several files, in the order of their names.

    Raises: PromptsError if no entry of ``SOURCES`` reads the source, or, while reading, for a damaged row.
    """
    try:
        found = [(each, _find(each)) for each in _listed(source)]
    except PromptsError as e:
        if Path(source).is_dir():
            raise PromptsError(f"{e}; or give a pattern, such as '{source}/*.jsonl'") from None
        raise
    return (row for each, kind in found for row in kind.read(each))


def _listed(source: str) -> list[str]:
    """The files of a folder or a pattern; any other source is itself."""
    path, prefix = Path(source), _prefix(source)
    if prefix in _by_prefix() or path.is_file():
        return [source]
    if path.is_dir():
        if is_saved_dataset(path):
            return [f"hf:{source}"]
        below = [
            p for p in path.rglob("*") if p.is_file() and not any(n.startswith(".") for n in p.relative_to(path).parts)
        ]
        found = sorted(str(p) for p in below if not p.name.lower().startswith(_NOT_DATA))
        if not found:
            raise PromptsError(f"{source}: a folder without files of prompts")
        return found
    return sorted(each for each in glob(source, recursive=True) if Path(each).is_file()) or [source]


def _find(source: str) -> "PromptSource":
    """The entry of ``SOURCES`` that reads a source."""
    prefix, by_prefix = _prefix(source), _by_prefix()
    if prefix in by_prefix:
        return by_prefix[prefix]
    path = Path(source)
    if path.is_file():
        by_suffix = {suffix: kind for kind in SOURCES for suffix in kind.suffixes}
        packed = {suffix + c: kind for suffix, kind in by_suffix.items() if kind.compressed for c in COMPRESSED}
        suffixes = [suffix.lower() for suffix in path.suffixes]
        suffix = "".join(suffixes[-2:] if suffixes[-1:] and suffixes[-1] in COMPRESSED else suffixes[-1:])
        if kind := (by_suffix | packed).get(suffix):
            return kind
        found = f"unknown file type {suffix!r}" if suffix else "a file without a suffix"
        raise PromptsError(f"{source}: {found}; {did_you_mean(suffix, by_suffix)}")
    if prefix and "/" not in prefix:
        raise PromptsError(f"{source}: no such file or kind of source; {did_you_mean(prefix, by_prefix)}")
    raise PromptsError(f"{source}: no such file; give {', '.join(kind.example for kind in SOURCES)}")


def _prefix(source: str) -> str:
    before, colon, _ = source.partition(":")
    return before + colon if colon else ""


def _by_prefix() -> dict[str, "PromptSource"]:
    return {kind.prefix: kind for kind in SOURCES if kind.prefix}


@dataclass(frozen=True, slots=True)
class PromptSource:
    """A kind of source, recognised by the suffix of its files or by a prefix.

    Attributes:
        read: called with the source; yields each row with its place, such as "p.jsonl:3", for messages. It raises
            PromptsError.
        example: how to write such a source, for messages.
        compressed: whether it also reads files that are compressed, such as "p.jsonl.gz".
    """

    read: Callable[[str], Rows]
    example: str
    suffixes: tuple[str, ...] = ()
    prefix: str | None = None
    compressed: bool = False


SOURCES = (
    PromptSource(json_rows, "FILE.jsonl", suffixes=(".jsonl", ".json", ".ndjson"), compressed=True),
    PromptSource(parquet_rows, "FILE.parquet", suffixes=(".parquet",)),
    PromptSource(hub_rows, EXAMPLE, prefix="hf:"),
    PromptSource(gym_rows, "gym:NAME?size=100&seed=1", prefix="gym:"),
)
