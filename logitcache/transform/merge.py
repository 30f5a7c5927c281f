"""Several caches as one, without the teacher."""

from dataclasses import dataclass
from typing import Annotated

from logitcache.cache.options import NewCache, Processes
from logitcache.cache.writer import new_cache
from logitcache.errors import InputError
from logitcache.runtime.options import Option
from logitcache.storage.location import Location, locate
from logitcache.transform.compatibility import common
from logitcache.transform.rewrite import Piece, check_unused, processes, write
from logitcache.transform.source import CacheSize, open_source


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote."""

    out: Location
    before: dict[Location, CacheSize]
    after: CacheSize
    repeated: int  # traces that an earlier cache had
    copied: int  # shards, byte for byte
    rewritten: int  # shards


def merge(
    caches: Annotated[
        list[str | Location],
        Option(
            "Caches of one identity. Of a trace in several caches, the first one's is taken.",
            metavar="CACHE",
            positional=True,
        ),
    ],
    out: NewCache,
    *,
    allow: Annotated[
        list[str] | None,
        Option("Let this field of the identity differ, such as engine. Repeatable.", metavar="FIELD", default="none"),
    ] = None,
    workers: Processes = None,
) -> MergeReport:
    """Writes all traces of ``caches`` as the cache ``out``; a trace in several caches is stored once, as in the first.

    Shards keep their bytes and their provenance; those with traces of an earlier cache are rewritten. All that ``verify``
    would report is refused.

    Args:
        allow: fields of the identity, such as engine or engine_args.max_model_len; the first cache's value is kept.
        workers: as for ``slice_cache``.
    Raises: IdentityError naming the field that differs, both values and the way out; else as ``slice_cache``.
    """
    if len(caches) < 2:
        raise InputError("give at least two caches to merge")
    out = locate(out)
    opened = [open_source(locate(cache), out) for cache in caches]
    identity = common(opened, allow or ())
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
            repeated += index.trace_count - len(rows)
            if rows:
                pieces.append(Piece(cache.files, cache.identity, index, rows))
    if not pieces:
        raise InputError(f"{', '.join(map(str, caches))}: none of them has traces")
    with (
        new_cache(out, identity, ", ".join(map(str, caches))) as writer,
        processes(workers, [p.index for p in pieces]) as each,
    ):
        check_unused(opened, pieces, each)
        made = write(writer, pieces, each, join=False)
    copied = sum(p.whole for p in pieces)
    before = {cache.location: CacheSize.of(cache.shards) for cache in opened}
    return MergeReport(out, before, CacheSize.of(made), repeated, copied, len(pieces) - copied)
