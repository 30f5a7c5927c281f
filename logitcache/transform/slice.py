"""A part of a cache as a cache of its own: fewer ids, fewer rows or fewer traces, without the teacher.

Shards that stay as they are keep their bytes. What is cut is decoded and encoded again, which loses no more than the
codec's rounding. Trace ids stay the same.
"""

import shlex
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np

from logitcache.cache.filters import Filter
from logitcache.cache.options import CachePath, NewCache, Processes
from logitcache.cache.reader import Cache
from logitcache.cache.writer import new_cache
from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.grading.verdicts import Verifier
from logitcache.identity import Identity
from logitcache.runtime.options import Option
from logitcache.sections import SECTIONS, answer_text
from logitcache.storage.location import Location, locate
from logitcache.transform.compatibility import ends_of, narrowed
from logitcache.transform.rewrite import Cut, Each, Piece, check_unused, processes, write
from logitcache.transform.source import CacheSize, open_source, pieces_of, prompt_position


@dataclass(frozen=True, slots=True)
class SliceReport:
    """What a slice kept."""

    out: Location
    before: CacheSize
    after: CacheSize
    verdicts: dict[str, int]  # kept traces "correct" and "incorrect"
    ungraded: int  # kept traces without a verdict of the verifier; 0 without a verifier


def slice_cache(
    cache: CachePath,
    out: NewCache,
    *,
    top_k: Annotated[
        int | None, Option("Ids kept per row; the mass of the others is added to the tail.", default="all")
    ] = None,
    top_p: Annotated[
        float | None, Option("Trim each row to the ids that hold this share of its mass.", default="not trimmed")
    ] = None,
    min_k: Annotated[int | None, Option("Fewest ids that a trimmed row keeps.", default="as in CACHE")] = None,
    sections: Annotated[
        tuple[str, ...] | None,
        Option("Keep only rows of these adjacent sections: any of prompt,reasoning,answer.", default="all"),
    ] = None,
    where: Annotated[
        str | None,
        Option(
            "Keep only traces that meet conditions such as correct, finish_reason=stop, tokens<=4096, "
            "reasoning<=2048, sample_index<2 or meta.level>=3, joined by `and`.",
            group="Which traces",
            default="all",
        ),
    ] = None,
    limit: Annotated[
        int | None, Option("Keep the traces of at most so many prompts, an unbiased sample.", group="Which traces")
    ] = None,
    verifier: Verifier = None,
    workers: Processes = None,
) -> SliceReport:
    """Writes a part of ``cache`` as the cache ``out``: fewer ids per row, fewer rows per trace, or fewer traces.

    Args:
        top_k: the slice has what a capture at this ``top_k`` would have; pinned ids stay besides these. Of ids that tie
            for the last place the smallest stay, where an engine may take any.
        top_p, min_k: trim rows further, as ``generate`` trims them.
        sections: reasoning includes its delimiters. Tokens stay; rows of tokens outside these sections are dropped.
        where: a ``filters.Filter``; it sees the verdicts of ``verifier``.
        limit: applies to the prompts that ``where`` leaves. The same prompts in every cache of the same prompts, and a
            smaller limit takes a subset of a larger one.
        verifier: grades answers again; one of ``verdicts.GRADERS``.
        workers: each holds one shard in memory.
    Raises: InputError for what the cache cannot give and for a slice that would be empty; CacheError for a damaged
        shard, naming it; WriteError. Nothing is left at ``out`` then.
    """
    cache, out = locate(cache), locate(out)
    opened = open_source(cache, out)
    ends = ends_of(sections, opened.identity)
    identity, words = narrowed(opened.identity, top_k, top_p, min_k)
    chosen = Filter.parse(where) if where is not None else None
    if limit is not None and limit < 1:
        raise InputError(f"`limit` {limit}: give at least 1")
    if verifier is not None:
        verdicts.check(verifier)
        verdicts.check_answers(verifier, str(cache), ((a, {}) for a in opened.column("answer").to_pylist()))
    elif chosen and chosen.needs_verdicts and not any(sum(s.verdicts.values()) for s in opened.shards):
        raise InputError(f"`where` {chosen}: no trace of {cache} has a verdict; give `verifier` to grade them")
    if ends:
        words += ["--sections", ",".join(name for name in SECTIONS if name in (sections or ()))]
        identity = replace(identity, prompt_logits=identity.prompt_logits and ends[0] == "prompt")
    cut = None
    if words:
        # Stored values are rounded: a row trimmed to the same share again might lose one more entry.
        trims = not {"--top-p", "--min-k"}.isdisjoint(words)
        cut = Cut(identity.top_k, identity.top_p if trims else None, identity.min_k, identity.pin_tokens, ends)
    words += ["--where", str(chosen)] if chosen else []
    words += ["--limit", str(limit)] if limit is not None else []
    if words:
        words += ["--verifier", verifier] if verifier else []
        identity = replace(identity, derived=[*identity.derived, shlex.join(["slice", *words])])
    elif verifier is None:
        raise InputError(
            f"the slice would be all of {cache}; give a smaller `top_k` or `top_p`, `sections`, `where` or `limit`"
        )

    with new_cache(out, identity, str(cache)) as writer, processes(workers, opened.shards) as each:
        pieces = _choose(opened, chosen, limit, verifier, each)
        made = write(writer, pieces, each, cut)
        after = CacheSize.of(made)
        if not after.rows:
            empty = f"the {after.traces:,} traces have no rows there" if after.traces else "no trace is left"
            given = {"sections": ",".join(sections or ()), "where": chosen, "limit": limit}
            asked = " and ".join(f"`{name}` {value}" for name, value in given.items() if value)
            raise InputError(f"{cache}: the slice would be empty, {empty}; change {asked}")
    graded = {name: sum(s.verdicts[name] for s in made) for name in ("correct", "incorrect")}
    ungraded = after.traces - sum(graded.values()) if verifier else 0
    return SliceReport(out, CacheSize.of(opened.shards), after, graded, ungraded)


def _choose(cache: Cache, chosen: Filter | None, limit: int | None, verifier: str | None, each: Each) -> list[Piece]:
    """The traces of a slice, graded again if there is a verifier."""
    whole = [Piece(cache.files, cache.identity, index, list(range(index.trace_count))) for index in cache.shards]
    graded: list[Any] = [None] * len(whole)
    if verifier:
        graded = list(each(partial(_grade, verifier=verifier, identity=cache.identity), whole))
    masks = [np.ones(index.trace_count, bool) for index in cache.shards]
    if chosen:
        seen = (replace(piece, correct=correct) for piece, correct in zip(whole, graded, strict=True))
        masks = chosen.select(piece.batch(piece.open()) for piece in seen)
    if limit is not None:
        left = {
            p
            for index, mask in zip(cache.shards, masks, strict=True)
            for p, m in zip(index.prompt_ids, mask, strict=True)
            if m
        }
        taken = set(sorted(left, key=lambda p: (prompt_position(p, b"limit"), p))[:limit])
        for index, mask in zip(cache.shards, masks, strict=True):
            mask &= np.array([p in taken for p in index.prompt_ids], bool)
    pieces = pieces_of(cache, masks, graded)
    check_unused([cache], pieces, each)
    return pieces


def _grade(piece: Piece, verifier: str, identity: Identity) -> list[bool | None]:
    """A verdict on each trace of a shard."""
    opened = piece.open()
    names = [name for name in ("text", "answer", "answer_offset") if name in opened.batch.schema.names]
    columns = opened.batch.select(names).to_pylist()
    return [
        verdicts.verdict(
            verifier,
            answer_text(found["text"], opened.tokens(row)[1], identity.markers, found.get("answer_offset")),
            found["answer"],
            opened.metadata(row),
        )
        for row, found in enumerate(columns)
    ]
