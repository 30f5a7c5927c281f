"""Several caches as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from logitcache.cache.writer import new_cache
from logitcache.errors import InputError
from logitcache.transform.compatibility import common
from logitcache.transform.rewrite import Piece, processes, write
from logitcache.transform.source import CacheSize, open_source


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What became one cache."""

    out: Path
    before: dict[Path, CacheSize]
    after: CacheSize
    repeated: int  # traces that stood in an earlier cache already
    taken: int  # shards whose bytes stayed as they were
    rewritten: int

    def text(self) -> str:
        lines = [f"{path}: {size}" for path, size in self.before.items()]
        lines.append(f"{self.out}: {self.after}; {self.taken} shards as they were, {self.rewritten} rewritten")
        return "\n".join(lines) + (
            f"; {self.repeated:,} traces stood in several and are kept once" * bool(self.repeated)
        )


def merge(caches: Sequence[Path], out: Path, *, allow: Sequence[str] = (), workers: int | None = None) -> MergeReport:
    """Writes all traces of ``caches`` as the cache ``out``, one that stands in several once, as the first has it.

    Shards keep their bytes and where they came from; those with traces that an earlier one has are rewritten. Whole
    shards are held against their checksum only: `verify` looks into their traces.

    Args:
        allow: fields of the identity, such as engine or engine_args.max_model_len, that may differ; the value of the
            first cache stands.
        workers: as for ``slice_cache``.
    Raises: IdentityError naming the field that differs, both values and the way out; else as ``slice_cache``.
    """
    if len(caches) < 2:
        raise InputError("merge takes two caches at least")
    opened = [open_source(path, out) for path in caches]
    identity = common(opened, allow)
    seen: set[str] = set()
    pieces: list[Piece] = []
    repeated = 0
    for cache in opened:
        for index in cache.shards:
            rows = []
            for row, trace_id in enumerate(index.trace_ids):
                if trace_id not in seen:
                    seen.add(trace_id)
                    rows.append(row)
            repeated += index.rows - len(rows)
            if rows:
                pieces.append(Piece(cache.path, index, rows))
    if not pieces:
        raise InputError(f"{', '.join(map(str, caches))}: no trace in any of them")
    with (
        new_cache(out, identity, ", ".join(map(str, caches))) as writer,
        processes(workers, [p.index for p in pieces]) as each,
    ):
        made = write(writer, pieces, each, join=False)
    taken = sum(p.whole for p in pieces)
    before = {cache.path: CacheSize.of(cache.shards) for cache in opened}
    return MergeReport(out, before, CacheSize.of(made), repeated, taken, len(pieces) - taken)
