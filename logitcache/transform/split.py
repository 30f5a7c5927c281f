"""One cache as several, parted by prompt."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from logitcache.cache.writer import new_cache
from logitcache.errors import InputError
from logitcache.transform.rewrite import processes, write
from logitcache.transform.source import CacheSize, open_source, pieces_of, prompt_position


@dataclass(frozen=True, slots=True)
class SplitReport:
    """The parts of a cache."""

    before: CacheSize
    parts: dict[Path, CacheSize]
    prompts: dict[Path, int]

    def text(self) -> str:
        lines = [f"{path}: {self.prompts[path]:,} prompts, {size}" for path, size in self.parts.items()]
        left = self.before.traces - sum(size.traces for size in self.parts.values())
        return "\n".join([*lines, *([f"{left:,} traces are in no part: the shares leave them out"] if left else [])])


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
    opened = open_source(cache, *outs)
    bounds = np.cumsum([0, *shares])
    bounds[-1] = 1 if bounds[-1] > 1 - 1e-9 else bounds[-1]
    found = {
        prompt: int(np.searchsorted(bounds, prompt_position(prompt, b"split"), "right")) - 1
        for prompt in opened.prompt_ids
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
            sizes[outs[i]] = CacheSize.of(write(writer, pieces_of(opened, masks), each))
    return SplitReport(CacheSize.of(opened.shards), sizes, prompts)
