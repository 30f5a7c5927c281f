"""Prompt sources -> prompts: JSONL, Parquet, or ``gym:NAME?size=..&seed=..``."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from logitcache.errors import PromptsError

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the teacher is asked: plain text, or messages that the chat template renders."""

    id: str
    content: str | Messages
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Content hash: 32 hexadecimal digits."""
        return _digest(self.content)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in source order, each id once."""

    prompts: list[Prompt]
    repeated: int = 0  # rows dropped because their content, and no id of their own, stood there before

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def load(source: str, limit: int | None = None) -> PromptSet:
    """Reads a prompt source.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file with a column ``prompt`` (text) or ``messages`` (chat), optional
            ``id`` and ``answer``; every other column is kept as metadata. Or ``gym:NAME?size=100&seed=1`` for a
            reasoning-gym task.
        limit: read at most so many prompts.
    Raises: PromptsError naming file and row.
    """
    found = rows(source)
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    repeated = 0
    for where, row in found:
        prompt, own_id = parse(where, row)
        if prompt.id not in seen:
            seen[prompt.id] = where
            prompts.append(prompt)
        elif own_id:
            raise PromptsError(
                f"{where}: id {prompt.id!r} is taken already by {seen[prompt.id]}; give each prompt its own"
            )
        else:
            repeated += 1
        if len(prompts) == limit:
            break
    if not prompts:
        raise PromptsError(f"{source}: no prompts in it; give one JSON object a line with `prompt` or `messages`")
    return PromptSet(prompts, repeated)


def rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a source with where it stands, for messages."""
    if source.startswith("gym:"):
        return _gym_rows(source)
    path = Path(source)
    if not path.is_file():
        raise PromptsError(f"{source}: no such file; give a .jsonl or .parquet file, or gym:NAME?size=100&seed=1")
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise PromptsError(f"{source}: neither .jsonl nor .parquet; convert it, or rename it if it is JSON lines")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as e:  # JSON and UTF-8 errors alike
                raise PromptsError(f"{where}: not a line of JSON ({e}); repair or remove the line") from None
            if not isinstance(row, dict):
                raise PromptsError(f"{where}: a {type(row).__name__}, expected an object with `prompt` or `messages`")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield f"{path} row {number}", row
                number += 1
    except (pa.ArrowInvalid, OSError) as e:
        raise PromptsError(f"{path}: not a whole Parquet file, from row {number} on ({e}); make it again") from None


def _gym_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
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
        raise PromptsError(f"{source}: reasoning-gym refuses it: {_nearest_task(name, str(e))}") from None
    # An entry is a function of (task, its options, seed, position), so its place makes a stable id.
    seed, others = dataset.seed, {k: v for k, v in sorted(options.items()) if k not in ("seed", "size")}
    prefix = name + (f"[{json.dumps(others, sort_keys=True)}]" if others else "") + f":{seed}"
    for i, entry in enumerate(dataset):
        row = {"id": f"{prefix}:{i}", "messages": [{"role": "user", "content": entry["question"]}]}
        gold = entry["answer"]
        yield (
            f"{source} entry {i}",
            row | {"answer": gold, "gym": json.loads(json.dumps(entry["metadata"], default=str))},
        )


def _nearest_task(name: str, reason: str) -> str:
    import difflib

    from reasoning_gym.factory import DATASETS

    if name in DATASETS:
        return reason
    near = difflib.get_close_matches(name, DATASETS, n=1)
    return f"no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def parse(where: str, row: dict[str, Any]) -> tuple[Prompt, bool]:
    """The prompt of a row, and whether it had an id of its own.

    Raises: PromptsError.
    """
    text, messages = row.pop("prompt", None), row.pop("messages", None)
    if (text is None) == (messages is None):
        found = "both `prompt` and" if text is not None else "neither `prompt` nor"
        raise PromptsError(f"{where}: {found} `messages`; give one of the two")
    content: str | Messages = text if text is not None else messages
    if text is not None and not isinstance(text, str):
        raise PromptsError(f"{where}: `prompt` is a {type(text).__name__}, expected text")
    if messages is not None and not _are_messages(messages):
        raise PromptsError(f"{where}: `messages` must be a list of objects with `role` and `content`, at least one")
    if isinstance(content, list):  # Parquet fills fields that a message lacks with null
        content = [{k: v for k, v in message.items() if v is not None} for message in content]
    if not content:
        raise PromptsError(f"{where}: an empty prompt; remove the row")
    given, answer = row.pop("id", None), row.pop("answer", None)
    try:
        identifier = str(given) if given is not None else _digest(content)
        metadata = json.loads(json.dumps(row, default=str))  # dates, decimals and the like become text
        prompt = Prompt(identifier, content, None if answer is None else _text(answer), metadata)
        json.dumps([identifier, content, prompt.answer, metadata], ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as e:
        raise PromptsError(f"{where}: holds what is no text ({e}); remove it") from None
    return prompt, given is not None


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
