"""Reads prompts from a source: JSON lines, Parquet, or a reasoning-gym task.

Each kind of source is an entry of ``SOURCES``.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from logitcache.errors import PromptsError, did_you_mean

Messages = list[dict[str, Any]]
Rows = Iterator[tuple[str, dict[str, Any]]]  # each row with its place in the source, for messages


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: plain text, or messages that the chat template renders.

    Attributes:
        answer: the gold answer, or several; see ``alternatives``.
        tools: passed to the chat template.
        template_args: variables of the chat template, over those of the whole run.
    """

    id: str
    content: str | Messages
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Content hash of all that the chat template sees: 32 hexadecimal digits."""
        extra = {"tools": self.tools, "chat_template_kwargs": self.template_args}
        given = {name: value for name, value in extra.items() if value}
        return _digest([self.content, given] if given else self.content)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in source order with distinct ids."""

    prompts: list[Prompt]
    repeated: int = 0  # rows that were dropped: without an id, and with the content of an earlier row

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def load(source: str, limit: int | None = None) -> PromptSet:
    """Reads the prompts of a source.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file with a column ``prompt`` (text) or ``messages`` (chat), and optionally
            ``id`` and ``answer``; every other column becomes metadata. Or ``gym:NAME?size=100&seed=1`` for a
            reasoning-gym task.
        limit: the largest number of prompts to read.
    Raises: PromptsError naming the file and the row.
    """
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    repeated = 0
    for place, row in rows(source):
        prompt, has_id = parse(place, row)
        if prompt.id not in places:
            places[prompt.id] = place
            prompts.append(prompt)
        elif has_id:
            raise PromptsError(
                f"{place}: id {prompt.id!r} is already used by {places[prompt.id]}; give each prompt its own id"
            )
        else:
            repeated += 1
        if len(prompts) == limit:
            break
    if not prompts:
        raise PromptsError(f"{source}: contains no prompts; give one JSON object per line, with `prompt` or `messages`")
    return PromptSet(prompts, repeated)


def rows(source: str) -> Rows:
    """Reads the rows of a source without parsing them.

    Raises: PromptsError if no entry of ``SOURCES`` reads the source, or, while reading, for a damaged row.
    """
    return _find(source).read(source)


def _find(source: str) -> "PromptSource":
    """The entry of ``SOURCES`` that reads a source."""
    prefix, colon, _ = source.partition(":")
    by_prefix = {kind.prefix: kind for kind in SOURCES if kind.prefix}
    if prefix + colon in by_prefix:
        return by_prefix[prefix + colon]
    path = Path(source)
    if path.is_file():
        by_suffix = {suffix: kind for kind in SOURCES for suffix in kind.suffixes}
        if path.suffix in by_suffix:
            return by_suffix[path.suffix]
        found = f"unknown file type {path.suffix!r}" if path.suffix else "a file without a suffix"
        raise PromptsError(f"{source}: {found}; {did_you_mean(path.suffix, by_suffix)}")
    if colon and "/" not in prefix:
        raise PromptsError(f"{source}: no such file or kind of source; {did_you_mean(prefix + colon, by_prefix)}")
    raise PromptsError(f"{source}: no such file; give {', '.join(kind.example for kind in SOURCES)}")


def _jsonl_rows(source: str) -> Rows:
    path = Path(source)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as e:  # JSON and UTF-8 errors alike
                raise PromptsError(f"{place}: not valid JSON ({e}); fix or remove the line") from None
            if not isinstance(row, dict):
                raise PromptsError(f"{place}: a {type(row).__name__}, expected an object with `prompt` or `messages`")
            yield place, row


def _parquet_rows(source: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, number = Path(source), 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield f"{path} row {number}", row
                number += 1
    except (pa.ArrowInvalid, OSError) as e:
        raise PromptsError(
            f"{path}: damaged Parquet file, cannot be read from row {number} on ({e}); write it again"
        ) from None


def _gym_rows(source: str) -> Rows:
    try:
        import reasoning_gym
    except ImportError:
        raise PromptsError(f"{source}: reasoning-gym is not installed; pip install 'logitcache[gym]'") from None
    name, _, query = source.removeprefix("gym:").partition("?")
    try:
        options = {key: json.loads(value) for key, value in parse_qsl(query, strict_parsing=bool(query))}
    except ValueError:
        raise PromptsError(f"{source}: cannot read the options; write gym:NAME?size=100&seed=1") from None
    try:
        dataset = reasoning_gym.create_dataset(name, **{"seed": 0} | options)
    except (ValueError, TypeError, AssertionError) as e:
        raise PromptsError(f"{source}: not accepted by reasoning-gym: {_nearest_task(name, str(e))}") from None
    # (task, options, seed, position) determines an entry, so they make a stable id.
    seed, others = dataset.seed, {k: v for k, v in sorted(options.items()) if k not in ("seed", "size")}
    prefix = name + (f"[{json.dumps(others, sort_keys=True)}]" if others else "") + f":{seed}"
    for i, entry in enumerate(dataset):
        row = {"id": f"{prefix}:{i}", "messages": [{"role": "user", "content": entry["question"]}]}
        gold = entry["answer"]
        yield (
            f"{source} entry {i}",
            row | {"answer": gold, "gym": json.loads(json.dumps(entry["metadata"], default=str))},
        )


@dataclass(frozen=True, slots=True)
class PromptSource:
    """A kind of source, recognised by the suffix of its files or by a prefix.

    Attributes:
        read: called with the source; yields each row with its place, such as "p.jsonl:3", for messages. It raises
            PromptsError.
        example: how to write such a source, for messages.
    """

    read: Callable[[str], Rows]
    example: str
    suffixes: tuple[str, ...] = ()
    prefix: str | None = None


SOURCES = (
    PromptSource(_jsonl_rows, "FILE.jsonl", suffixes=(".jsonl", ".json", ".ndjson")),
    PromptSource(_parquet_rows, "FILE.parquet", suffixes=(".parquet",)),
    PromptSource(_gym_rows, "gym:NAME?size=100&seed=1", prefix="gym:"),
)


def _nearest_task(name: str, reason: str) -> str:
    import difflib

    from reasoning_gym.factory import DATASETS

    if name in DATASETS:
        return reason
    near = difflib.get_close_matches(name, DATASETS, n=1)
    return f"no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def parse(place: str, row: dict[str, Any]) -> tuple[Prompt, bool]:
    """Parses a row; returns its prompt and whether the row has an id.

    Args:
        place: where the row is in its source, for messages.
    Raises: PromptsError.
    """
    text, messages = row.pop("prompt", None), row.pop("messages", None)
    if (text is None) == (messages is None):
        found = "both `prompt` and" if text is not None else "neither `prompt` nor"
        raise PromptsError(f"{place}: {found} `messages`; give exactly one of them")
    content: str | Messages = text if text is not None else messages
    if text is not None and not isinstance(text, str):
        raise PromptsError(f"{place}: `prompt` is a {type(text).__name__}, expected text")
    if messages is not None and not _are_messages(messages):
        raise PromptsError(f"{place}: `messages` must be a list of objects with `role` and `content`, at least one")
    if isinstance(content, list):  # Parquet fills missing fields of a message with null
        content = [{k: v for k, v in message.items() if v is not None} for message in content]
    if not content:
        raise PromptsError(f"{place}: the prompt is empty; remove the row")
    given, answer = row.pop("id", None), row.pop("answer", None)
    try:
        identifier = str(given) if given is not None else _digest(content)
        metadata = json.loads(json.dumps(row, default=str))  # dates, decimals and such become text
        prompt = Prompt(identifier, content, None if answer is None else _text(answer), metadata)
        json.dumps([identifier, content, prompt.answer, metadata], ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as e:
        raise PromptsError(f"{place}: not valid Unicode, or not a JSON value ({e}); fix or remove the row") from None
    return prompt, given is not None


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


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


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
