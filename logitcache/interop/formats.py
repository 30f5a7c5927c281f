"""The tables of importers (from another tool's capture to a cache) and exporters (from a cache to another format)."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

from logitcache.cache.options import CachePath, NewCache, NewDirectory
from logitcache.errors import InputError, did_you_mean
from logitcache.runtime.options import Option
from logitcache.storage.location import Location, is_url, locate


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an importer wrote and what it dropped."""

    out: Location
    texts: int
    tokens: int
    rows: int
    kept: int  # ids per row
    fitted: int  # ids per row that were stored as a fitted curve: dropped, their mass is in the tail
    unknown: int  # tokens outside the ids of their row: their log-probability is NaN in the cache
    skipped: int  # texts of one token, which have no rows
    shards: int


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an exporter wrote."""

    out: Path
    files: int
    traces: int
    rows: int  # top-k rows
    bytes: int


class Import(Protocol):
    """Makes the cache ``out`` from the capture ``source``; the keywords are those of ``import_capture``.

    Raises: InputError for a keyword that does not apply to this tool's captures.
    """

    def __call__(
        self,
        source: Path,
        out: Location,
        *,
        tokenizer: str,
        teacher: str,
        settings: Path | None,
        vocab_size: int | None,
        exact_part_only: bool,
    ) -> ImportReport: ...


class Export(Protocol):
    """Writes ``cache`` to the new directory ``out``."""

    def __call__(self, cache: Location, out: Path) -> ExportReport: ...


@dataclass(frozen=True, slots=True)
class Format:
    """An importer or an exporter. ``function`` is "module:function"; the module is imported when it is used."""

    about: str
    function: str

    def load(self) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)


IMPORTERS = {  # each function is an Import
    "distillkit": Format("Parquet captures of arcee-ai/DistillKit", "logitcache.interop.distillkit:import_distillkit")
}
EXPORTERS = {  # each function is an Export
    "parquet": Format("plain Parquet files", "logitcache.interop.parquet:export_parquet"),
}


def import_capture(
    source: Annotated[
        Path, Option("A directory of .parquet files, or one of them.", metavar="SOURCE", positional=True)
    ],
    out: NewCache,
    *,
    tokenizer: Annotated[str, Option("The teacher's tokenizer: model folder or hub id.")],
    tool: Annotated[
        str, Option(f"The tool that wrote the capture: {', '.join(IMPORTERS)}.", flag="--from")
    ] = "distillkit",
    teacher: Annotated[str, Option("Hub id of the teacher, which captures do not record.")] = "unknown",
    settings: Annotated[
        Path | None,
        Option("YAML file with the settings of the capture.", default="compression_config.yaml beside the files"),
    ] = None,
    vocab_size: Annotated[
        int | None, Option("Columns of the teacher's logits, padding included.", default="from the settings")
    ] = None,
    exact_part_only: Annotated[
        bool, Option("Fold log-probabilities stored as a fitted curve into the tail, instead of refusing them.")
    ] = False,
) -> ImportReport:
    """Makes a cache from another tool's capture.

    Raises: InputError for an unknown ``tool`` or a capture that cannot be read; NotACacheError if ``out`` is not empty;
        WriteError.
    """
    run: Import = _find(IMPORTERS, "tool", tool).load()
    return run(
        Path(source),  # callers may pass text
        locate(out),
        tokenizer=tokenizer,
        teacher=teacher,
        settings=Path(settings) if settings else None,
        vocab_size=vocab_size,
        exact_part_only=exact_part_only,
    )


def export(
    cache: CachePath,
    out: NewDirectory,
    *,
    format: Annotated[str, Option(f"The format to write: {', '.join(EXPORTERS)}.", flag="--to")] = "parquet",
) -> ExportReport:
    """Writes a cache in another format.

    Raises: InputError for an unknown ``format``; otherwise as the exporter (see ``parquet.export_parquet``).
    """
    run: Export = _find(EXPORTERS, "format", format).load()
    if is_url(out):
        raise InputError(f"`out` {out}: exports are written to a directory; give one, and upload its files")
    return run(locate(cache), Path(out))


def _find(formats: Mapping[str, Format], field: str, name: str) -> Format:
    if name not in formats:
        raise InputError(f"`{field}` {name!r} is unknown; {did_you_mean(name, formats)}")
    return formats[name]
