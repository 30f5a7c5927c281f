"""Rows of a dataset of the Hugging Face hub, or of one that `datasets` saved in a folder."""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from logitcache.errors import PromptsError, did_you_mean
from logitcache.prompts.files import Rows, table_rows

EXAMPLE = "hf:OWNER/NAME?split=train"
_OPTIONS = ("split", "config", "revision")


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def hub_rows(source: str) -> Rows:
    """Rows of ``hf:NAME?split=...&config=...&revision=...``, where NAME is a hub id or a folder."""
    name, options = _parsed(source)
    dataset = _one_split(source, _loaded(source, name, options), options.get("split"))
    number = 0
    try:
        for table in dataset.with_format("arrow").iter(1000):  # not decoded: images and such stay as they are stored
            for row in table_rows(table):
                yield f"{source} row {number}", row
                number += 1
    except (OSError, ValueError, OverflowError) as e:
        raise PromptsError(f"{source}: cannot be read from row {number} on ({_one_line(e)})") from None


def _parsed(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.removeprefix("hf:").partition("?")
    try:
        options = dict(parse_qsl(query, strict_parsing=bool(query)))
    except ValueError:
        raise PromptsError(f"{source}: cannot read the options; write {EXAMPLE}") from None
    for option in options:
        if option not in _OPTIONS:
            raise PromptsError(f"{source}: unknown option {option!r}; {did_you_mean(option, _OPTIONS)}")
    return name, options


def _loaded(source: str, name: str, options: dict[str, str]) -> Any:
    try:
        import datasets
    except ImportError:
        raise PromptsError(f"{source}: datasets is not installed; pip install 'logitcache[datasets]'") from None
    try:
        if is_saved_dataset(Path(name)):
            return datasets.load_from_disk(name)
        load: Any = datasets.load_dataset
        return load(name, options.get("config"), split=options.get("split"), revision=options.get("revision"))
    except Exception as e:  # a hub, a network and a builder raise anything
        raise PromptsError(
            f"{source}: cannot be loaded ({_one_line(e)}); check the name, the options and the network"
        ) from None


def _one_split(source: str, found: Any, split: str | None) -> Any:
    if not isinstance(found, dict):
        return found
    splits = list(found)
    if split is None and len(splits) == 1:
        return found[splits[0]]
    if split not in found:
        there, way_out = ", ".join(splits), f"{source.partition('?')[0]}?split={splits[0]}"
        raise PromptsError(f"{source}: has the splits {there}; choose one, such as {way_out}")
    return found[split]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + '...'}"
