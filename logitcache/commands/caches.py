"""info, verify, compact, slice, merge, split."""

from logitcache.cache import reader
from logitcache.cache.compact import CompactReport
from logitcache.cache.compact import compact as compact_cache
from logitcache.cache.info import CacheInfo
from logitcache.cache.verify import VerifyReport, verify_cache
from logitcache.commands.builder import command
from logitcache.commands.results import Json, show, show_json
from logitcache.commands.text_caches import (
    describe_compact,
    describe_info,
    describe_merge,
    describe_slice,
    describe_split,
    describe_verify,
)
from logitcache.transform.merge import MergeReport
from logitcache.transform.merge import merge as merge_caches
from logitcache.transform.slice import SliceReport, slice_cache
from logitcache.transform.split import SplitReport
from logitcache.transform.split import split as split_cache


@command(reader.info)
def info(info: CacheInfo, json: Json = False) -> None:
    """Show what CACHE holds: teacher, traces, tokens by section, bytes per token, support and tail."""
    if json:
        show_json(info.to_json())
    else:
        show(describe_info, info)


@command(verify_cache)
def verify(report: VerifyReport, json: Json = False) -> int:
    """Read all of CACHE and report every problem: checksums, columns, spans, ids, probabilities, counts in indexes.

    The exit code is 2 if there are problems. With --repair a damaged manifest is restored from its second copy and a damaged
    index from its shard. Other damaged shards are moved to CACHE/set-aside, and `generate` makes their traces again. What
    could not be read, and what a newer version wrote, stays where it is.
    """
    if json:
        show_json(report.to_json())
    else:
        show(describe_verify, report)
    return 2 if report.problems else 0


@command(compact_cache)
def compact(report: CompactReport, json: Json = False) -> None:
    """Write one file with the indexes of all shards of CACHE, so that a cache of many shards opens fast.

    The indexes stay, and shards made later are read beside it: run it again when there are many. A cache that another
    process writes to is refused.

    Example: logitcache compact math-cache
    """
    if json:
        show_json(report.to_json())
    else:
        show(describe_compact, report)


@command(slice_cache)
def slice_(report: SliceReport) -> None:
    """Write a part of CACHE as a new cache, without the teacher: fewer ids, fewer rows, fewer traces.

    A slice at --top-k 16 equals a capture at --top-k 16. With --verifier, answers are graded again.

    Example: logitcache slice math-cache --out math-right --top-k 32 --where "correct and tokens<=8192"
    """
    show(describe_slice, report)


@command(merge_caches)
def merge(report: MergeReport) -> None:
    """Join all traces of CACHES into one new cache. Caches with different settings are refused, with the field that differs.

    Example: logitcache merge part-a part-b --out whole
    """
    show(describe_merge, report)


@command(split_cache)
def split(report: SplitReport) -> None:
    """Split CACHE into several new caches by prompt. The part depends only on the prompt's id, so no prompt is in two parts.

    Example: logitcache split math-cache --into train=0.95 --into test=0.05
    """
    show(describe_split, report)
