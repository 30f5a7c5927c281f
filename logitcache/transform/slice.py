"""A part of a cache as a cache of its own, without the teacher.

Nothing is computed that the teacher did not say. What stays as it is keeps its bytes; what is cut is decoded and encoded
again, which loses no more than the codec's rounding. Trace ids stay what they were.
"""

import json
import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.cache.filters import Filter
from logitcache.cache.reader import Cache
from logitcache.cache.writer import new_cache
from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.identity import Identity
from logitcache.sections import SECTIONS, Sections, answer_text
from logitcache.transform.compatibility import ends_of, narrowed
from logitcache.transform.rewrite import Cut, Each, Piece, processes, write
from logitcache.transform.source import CacheSize, open_source, pieces_of, prompt_position


@dataclass(frozen=True, slots=True)
class SliceReport:
    """What a slice left, and where."""

    out: Path
    before: CacheSize
    after: CacheSize
    verdicts: dict[str, int]  # traces found correct and incorrect, of those left
    unjudged: int  # of those left, traces that the verifier gave no verdict; 0 without one

    def text(self) -> str:
        counts = self.verdicts | {"without a verdict": self.unjudged}
        judged = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        return f"{self.out}: {self.before} -> {self.after}" + (f" ({judged})" if judged else "")


def slice_cache(
    cache: Path,
    out: Path,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_k: int | None = None,
    sections: tuple[str, ...] | None = None,
    where: str | None = None,
    limit: int | None = None,
    verifier: str | None = None,
    workers: int | None = None,
) -> SliceReport:
    """Writes a part of ``cache`` as the cache ``out``: fewer ids a row, fewer rows a trace, fewer traces.

    Args:
        top_k: ids a row keeps besides pinned ones; the rest joins the tail, as if captured so. Of ids that tie for the
            last place the smallest stay, where an engine takes any.
        top_p, min_k: rows are trimmed further, as `generate` trims them.
        sections: of prompt, reasoning (with its delimiters) and answer; rows of other tokens go, their tokens stay.
        where: which traces stay, a `filters.Filter`; it sees the verdicts of ``verifier``.
        limit: so many prompts stay, of those that ``where`` leaves, with all traces of theirs that it leaves. A sample
            without bias, the same in every cache of the same prompts; a smaller limit's lies in a larger one's.
        verifier: judges answers anew, one of `verdicts.GRADERS`.
        workers: processes; None takes the machine's cores. Memory: a shard each.
    Raises: InputError for what the cache cannot give and for a slice that leaves nothing; CacheError for a damaged
        shard, naming it; WriteError. Nothing is left at ``out`` then.
    """
    opened = open_source(cache, out)
    ends = ends_of(sections, opened.identity)
    identity, words = narrowed(opened.identity, top_k, top_p, min_k)
    chosen = Filter.parse(where) if where is not None else None
    if limit is not None and limit < 1:
        raise InputError(f"`limit` {limit}: a slice of at least 1 prompt")
    if verifier is not None:
        verdicts.check(verifier)
    elif chosen and chosen.asks_verdict and not any(sum(s.verdicts.values()) for s in opened.shards):
        raise InputError(f"`where` {chosen}: no trace of {cache} has a verdict; give `verifier` too")
    if ends:
        words += ["--sections", ",".join(name for name in SECTIONS if name in (sections or ()))]
        identity = replace(identity, prompt_logits=identity.prompt_logits and ends[0] == "prompt")
    cut = None
    if words:
        # What is stored is rounded: trimmed to the same share again, a row might lose an entry more.
        trims = not {"--top-p", "--min-k"}.isdisjoint(words)
        cut = Cut(identity.top_k, identity.top_p if trims else None, identity.min_k, identity.pin_tokens, ends)
    words += ["--where", str(chosen)] if chosen else []
    words += ["--limit", str(limit)] if limit is not None else []
    if words:
        words += ["--verifier", verifier] if verifier else []
        identity = replace(identity, derived=[*identity.derived, shlex.join(["slice", *words])])
    elif verifier is None:
        raise InputError(
            f"nothing is cut from {cache}; give a smaller `top_k` or `top_p`, `sections`, `where` or `limit`"
        )

    with new_cache(out, identity, str(cache)) as writer, processes(workers, opened.shards) as each:
        pieces = _choose(opened, chosen, limit, verifier, each)
        made = write(writer, pieces, each, cut)
        after = CacheSize.of(made)
        if not after.rows:
            what = f"rows of {', '.join(sections or ())} in the {after.traces:,} traces" if after.traces else "traces"
            raise InputError(f"{cache}: the slice leaves no {what}; loosen {shlex.join(words)}")
    judged = {name: sum(s.verdicts[name] for s in made) for name in ("correct", "incorrect")}
    unjudged = after.traces - sum(judged.values()) if verifier else 0
    return SliceReport(out, CacheSize.of(opened.shards), after, judged, unjudged)


def _choose(cache: Cache, chosen: Filter | None, limit: int | None, verifier: str | None, each: Each) -> list[Piece]:
    """The traces of a slice, judged anew where there is a verifier."""
    whole = [Piece(cache.path, index, list(range(index.rows))) for index in cache.shards]
    judged: list[Any] = [None] * len(whole)
    if verifier:
        judged = list(each(partial(_judge, verifier=verifier, identity=cache.identity), whole))
    masks = [np.ones(index.rows, bool) for index in cache.shards]
    if chosen:
        seen = (replace(piece, correct=correct) for piece, correct in zip(whole, judged, strict=True))
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
    return pieces_of(cache, masks, judged)


def _judge(piece: Piece, verifier: str, identity: Identity) -> list[bool | None]:
    """A verdict on each trace of a shard."""
    columns = ("text", "sections", "answer", "metadata")
    rows = piece.open().batch.select(columns).to_pylist()
    return [
        verdicts.verdict(
            verifier,
            answer_text(row["text"], Sections(**row["sections"], length=length), identity.markers),
            row["answer"],
            json.loads(row["metadata"] or "{}"),
        )
        for row, length in zip(rows, piece.index.token_lengths, strict=True)
    ]
