"""Caches out of caches, without the teacher: a part of one, several as one, one in parts by prompt.

Nothing is computed that the teacher did not say. What stays as it is keeps its bytes; what is cut is decoded and encoded
again, which loses no more than the codec's rounding. Trace ids stay what they were.
"""

import hashlib
import json
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.cache.filters import Filter
from logitcache.cache.reader import Cache
from logitcache.cache.shard import ShardIndex
from logitcache.cache.writer import new_cache
from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.identity import Identity
from logitcache.sections import SECTIONS, Sections, answer_text
from logitcache.transform.compatibility import common, ends_of, narrowed
from logitcache.transform.rewrite import Cut, Each, Piece, processes, write


@dataclass(frozen=True, slots=True)
class Size:
    """What a cache holds."""

    traces: int = 0
    rows: int = 0  # top-k rows
    bytes: int = 0  # of shards

    @classmethod
    def of(cls, shards: Sequence[ShardIndex]) -> "Size":
        return cls(sum(s.rows for s in shards), sum(s.taught_rows for s in shards), sum(s.bytes for s in shards))

    def __str__(self) -> str:
        return f"{self.traces:,} traces, {self.rows:,} rows, {self.bytes:,} bytes"


@dataclass(frozen=True, slots=True)
class SliceReport:
    """What a slice left, and where."""

    out: Path
    before: Size
    after: Size
    verdicts: dict[str, int]  # traces found correct and incorrect, of those left
    unjudged: int  # of those left, traces that the verifier gave no verdict; 0 without one

    def text(self) -> str:
        counts = self.verdicts | {"without a verdict": self.unjudged}
        judged = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        return f"{self.out}: {self.before} -> {self.after}" + (f" ({judged})" if judged else "")


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What became one cache."""

    out: Path
    before: dict[Path, Size]
    after: Size
    repeated: int  # traces that stood in an earlier cache already
    taken: int  # shards whose bytes stayed as they were
    rewritten: int

    def text(self) -> str:
        lines = [f"{path}: {size}" for path, size in self.before.items()]
        lines.append(f"{self.out}: {self.after}; {self.taken} shards as they were, {self.rewritten} rewritten")
        return "\n".join(lines) + (
            f"; {self.repeated:,} traces stood in several and are kept once" * bool(self.repeated)
        )


@dataclass(frozen=True, slots=True)
class SplitReport:
    """The parts of a cache."""

    before: Size
    parts: dict[Path, Size]
    prompts: dict[Path, int]

    def text(self) -> str:
        lines = [f"{path}: {self.prompts[path]:,} prompts, {size}" for path, size in self.parts.items()]
        left = self.before.traces - sum(size.traces for size in self.parts.values())
        return "\n".join([*lines, *([f"{left:,} traces are in no part: the shares leave them out"] if left else [])])


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
        verifier: judges answers anew, one of `verdicts.KINDS`.
        workers: processes; None takes the machine's cores. Memory: a shard each.
    Raises: InputError for what the cache cannot give and for a slice that leaves nothing; CacheError for a damaged
        shard, naming it; WriteError. Nothing is left at ``out`` then.
    """
    opened = _open(cache, out)
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
        after = Size.of(made)
        if not after.rows:
            what = f"rows of {', '.join(sections or ())} in the {after.traces:,} traces" if after.traces else "traces"
            raise InputError(f"{cache}: the slice leaves no {what}; loosen {shlex.join(words)}")
    judged = {name: sum(s.verdicts[name] for s in made) for name in ("correct", "incorrect")}
    unjudged = after.traces - sum(judged.values()) if verifier else 0
    return SliceReport(out, Size.of(opened.shards), after, judged, unjudged)


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
    opened = [_open(path, out) for path in caches]
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
    before = {cache.path: Size.of(cache.shards) for cache in opened}
    return MergeReport(out, before, Size.of(made), repeated, taken, len(pieces) - taken)


def split(cache: Path, parts: Sequence[tuple[Path, float]], *, workers: int | None = None) -> SplitReport:
    """Writes a cache for each part, so that all traces of a prompt are in one of them.

    Where a prompt goes depends on its id and the shares alone: another cache of the same prompts is split alike. Whole
    shards are held against their checksum only: `verify` looks into their traces.

    Each part appears whole or not at all, once all are written, the last one first: after a stop just then, such as a
    kill, the last few may stand. They are whole; to go on, remove them or give new names.

    Args:
        parts: where each goes and its share of the prompts, about; shares that sum to less than 1 leave some out.
            Directories lie beside each other, none in another.
        workers: as for ``slice_cache``.
    Raises: InputError for shares that are none, and for a part that gets no prompt; else as ``slice_cache``.
    """
    outs, shares = [out for out, _ in parts], [share for _, share in parts]
    if not parts or len({out.resolve() for out in outs}) < len(outs):
        raise InputError("give split a directory and a share for each part, no directory twice")
    places = {out.resolve() for out in outs}
    if inner := [out for out in outs if not places.isdisjoint(out.resolve().parents)]:
        raise InputError(f"{inner[0]} lies in another part; give each a directory outside the others")
    if not all(0 < share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        raise InputError(f"shares {', '.join(f'{s:g}' for s in shares)}: each above 0, and 1 at most together")
    opened = _open(cache, *outs)
    bounds = np.cumsum([0, *shares])
    bounds[-1] = 1 if bounds[-1] > 1 - 1e-9 else bounds[-1]
    found = {
        prompt: int(np.searchsorted(bounds, _place(prompt, b"split"), "right")) - 1 for prompt in opened.prompt_ids
    }
    prompts = {out: sum(p == i for p in found.values()) for i, out in enumerate(outs)}
    for out, share in parts:
        if not prompts[out]:
            raise InputError(
                f"{out}: its share of {share:g} gets none of the {len(found):,} prompts; give it a larger one"
            )
    with ExitStack() as stack:
        writers = []
        for out, start, stop in zip(outs, bounds, bounds[1:], strict=False):
            derived = [*opened.identity.derived, f"split {start:g}-{stop:g}"]
            made = new_cache(out, replace(opened.identity, derived=derived), str(cache))
            writers.append(stack.enter_context(made))
        each = stack.enter_context(processes(workers, opened.shards))
        sizes = {}
        for i, writer in enumerate(writers):
            masks = [np.array([found[p] == i for p in index.prompt_ids], bool) for index in opened.shards]
            sizes[outs[i]] = Size.of(write(writer, _pieces(opened, masks), each))
    return SplitReport(Size.of(opened.shards), sizes, prompts)


def _open(cache: Path, *outs: Path) -> Cache:
    """Opens a cache that nothing is to be written into."""
    for out in outs:
        if cache.resolve() in (out.resolve(), *out.resolve().parents):
            raise InputError(f"`out` {out} lies in {cache}, which stays as it is; give a directory outside it")
    return Cache.open(cache)


def _place(prompt_id: str, purpose: bytes) -> float:
    """Where a prompt stands in [0, 1), evenly and by its id alone."""
    digest = hashlib.blake2b(prompt_id.encode(), digest_size=6, person=purpose).digest()
    return int.from_bytes(digest, "little") / 2**48


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
        taken = set(sorted(left, key=lambda p: (_place(p, b"limit"), p))[:limit])
        for index, mask in zip(cache.shards, masks, strict=True):
            mask &= np.array([p in taken for p in index.prompt_ids], bool)
    return _pieces(cache, masks, judged)


def _pieces(cache: Cache, masks: Sequence[np.ndarray], judged: Sequence[Any] | None = None) -> list[Piece]:
    return [
        Piece(cache.path, index, np.flatnonzero(mask).tolist(), correct)
        for index, mask, correct in zip(cache.shards, masks, judged or [None] * len(masks), strict=True)
        if mask.any()
    ]


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
