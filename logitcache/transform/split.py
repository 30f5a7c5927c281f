"""A cache as several, split by prompt, without the teacher."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np

from logitcache.cache.options import CachePath, Processes
from logitcache.cache.writer import new_cache
from logitcache.errors import InputError
from logitcache.runtime.options import Option
from logitcache.storage.location import Location, identified, is_inside, locate
from logitcache.transform.rewrite import check_unused, processes, write
from logitcache.transform.source import CacheSize, open_source, pieces_of, prompt_position


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What a split wrote."""

    before: CacheSize
    parts: dict[Location, CacheSize]
    prompts: dict[Location, int]


def split(
    cache: CachePath,
    into: Annotated[
        dict[str, float],
        Option(
            "Directory or URL of a part and its share of the prompts, such as train=0.95. Repeatable.",
            metavar="PATH=SHARE",
        ),
    ],
    *,
    workers: Processes = None,
) -> SplitReport:
    """Writes each part of ``cache`` as a cache of its own; all traces of a prompt are in one part.

    A prompt's id and the shares alone decide its part: another cache of the same prompts is split the same way. All that
    ``verify`` would report is refused.

    Each part is written atomically, when all are complete, the last one first. After a kill at that moment some of the
    last parts may exist. They are complete; remove them or give new names before the next run.

    Args:
        into: directories or URLs, none inside another, and their approximate shares. Shares that sum to less than 1 leave some
            prompts out.
        workers: as for ``slice_cache``.
    Raises: InputError for impossible shares and for a part without prompts; else as ``slice_cache``.
    """
    cache, outs, shares = locate(cache), [locate(name) for name in into], list(into.values())
    places = {identified(out) for out in outs}
    if not outs or len(places) < len(outs):
        raise InputError("`into`: give a directory and a share for each part, and each directory once")
    if inner := [a for a in outs for b in outs if a is not b and is_inside(a, b)]:
        raise InputError(f"`into` {inner[0]}: it is inside another part; give each part a directory outside the others")
    if not all(0 < share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        raise InputError(
            f"`into` {', '.join(f'{share:g}' for share in shares)}: give shares above 0 that sum to at most 1"
        )
    opened = open_source(cache, *outs)
    bounds = np.cumsum([0, *shares])
    bounds[-1] = 1 if bounds[-1] > 1 - 1e-9 else bounds[-1]
    found = {
        prompt: int(np.searchsorted(bounds, prompt_position(prompt, b"split"), "right")) - 1
        for prompt in opened.prompt_ids
    }
    prompts = {out: sum(p == i for p in found.values()) for i, out in enumerate(outs)}
    for out, share in zip(outs, shares, strict=True):
        if not prompts[out]:
            raise InputError(
                f"`into` {out}: a share of {share:g} gets none of the {len(found):,} prompts; give it a larger one"
            )
    with ExitStack() as stack:
        writers = []
        for out, start, stop in zip(outs, bounds, bounds[1:], strict=False):
            derived = [*opened.identity.derived, f"split {start:g}-{stop:g}"]
            made = new_cache(out, replace(opened.identity, derived=derived), str(cache))
            writers.append(stack.enter_context(made))
        each = stack.enter_context(processes(workers, opened.shards))
        sizes = {}
        parts = [
            pieces_of(opened, [np.array([found[p] == i for p in index.prompt_ids], bool) for index in opened.shards])
            for i in range(len(outs))
        ]
        check_unused([opened], [piece for pieces in parts for piece in pieces], each)
        for out, writer, pieces in zip(outs, writers, parts, strict=True):
            sizes[out] = CacheSize.of(write(writer, pieces, each))
    return SplitReport(CacheSize.of(opened.shards), sizes, prompts)
