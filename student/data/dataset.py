"""A cache as training data: traces under a view, and batches of them as tensors.

A trace stands in a row of its own, padded on the right: a causal model never looks right, so none sees padding or
another trace, with any attention and without a mask. A micro-batch is fed in a few groups of alike length to keep
padding small. Or all traces stand behind one another in one row, told apart by their position ids, for attention that
skips what it must not see.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from logitcache.cache.filters import Filter
from logitcache.cache.reader import Cache
from logitcache.errors import StudentError
from logitcache.kernels.reference import SparseTargets
from logitcache.sparse_rows import SparseRows, fold, keep
from logitcache.student.data.sampler import Pool, hash_64
from logitcache.student.data.views import NOT_TAUGHT, Lesson, View, section_of, tenth_of
from logitcache.trace import Trace

# N taught rows, T input positions of a trace, B traces of a batch, E entries of all its rows.

Batch = dict[str, Any]
GROUP_TOKENS = 256  # padding that a forward of its own is worth: what its launches cost on a GPU, in tokens


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One trace as its view gives it, the untaught rows left out."""

    trace_id: str
    input_ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [N], ascending input positions that are taught
    rows: SparseRows  # N of them, empty where a token is taught without its row
    labels: np.ndarray  # int64 [N], the realised tokens
    kd: np.ndarray  # float32 [N]
    ce: np.ndarray  # float32 [N]
    sections: np.ndarray  # int64 [N], index into views.SECTIONS
    tenths: np.ndarray  # int64 [N], which tenth of the completion, or -1 in the prompt


class TraceDataset(Dataset[Example]):
    """Some traces of a cache under a view; reads and decodes a trace when asked for it, safe in loader workers.

    Index `epoch * len(self) + i` is trace i as the view gives it in that epoch.

    Args:
        indices: the traces of `cache`, all by default.
        vocab: rows of the student's head. Kept ids beyond it, which a padded teacher head can give, join the tail.
        top_k: entries of a row at most, besides pinned ones; the rest joins the tail. None: as the cache has them.
    Raises: StudentError for a cache that cannot serve the view, and for a top_k above the cache's.
    """

    def __init__(
        self,
        cache: Cache,
        indices: np.ndarray | None = None,
        view: Callable[[Trace, int], Lesson] | None = None,
        vocab: int | None = None,
        top_k: int | None = None,
    ):
        self.cache, self.view, self.vocab, self.top_k = cache, view or View(), vocab, top_k
        if isinstance(self.view, View):
            self.view.check(cache.identity, str(cache.path))
        if top_k is not None and not 1 <= top_k <= cache.identity.top_k:
            raise StudentError(
                f"`top_k` {top_k}: {cache.path} keeps {cache.identity.top_k} ids a row; give 1 to "
                f"{cache.identity.top_k}"
            )
        self.indices = np.arange(len(cache)) if indices is None else np.asarray(indices)
        lengths, ids = cache.lengths[self.indices].astype(np.int64), cache.trace_ids
        self.pool = Pool(lengths, np.array([hash_64(ids[i]) for i in self.indices], np.uint64))

    @property
    def parts(self) -> "list[TraceDataset]":
        """As a Mixture has them."""
        return [self]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Example:
        epoch, i = divmod(place, len(self))
        return self.example(i, epoch)

    def example(self, i: int, epoch: int = 0) -> Example:
        trace = self.cache[int(self.indices[i])]
        lesson = self.view(trace, epoch)
        positions = (lesson.target != NOT_TAUGHT).nonzero()[0]
        target_N = lesson.target[positions]
        return Example(
            trace.trace_id,
            lesson.input_ids,
            positions,
            self._rows(trace, lesson.row[positions]),
            trace.token_ids[target_N].astype(np.int64),
            lesson.kd[positions],
            lesson.ce[positions],
            section_of(trace, target_N),
            tenth_of(trace, target_N),
        )

    def _rows(self, trace: Trace, row_N: np.ndarray) -> SparseRows:
        rows = _take(trace.rows, row_N)
        if self.top_k is not None:
            rows = fold(rows, self.top_k, self.cache.identity.pin_tokens)
        return rows if self.vocab is None else keep(rows, rows.ids < self.vocab)


class Mixture(Dataset[Example]):
    """Several datasets as one, in given shares of an epoch's tokens, or with each trace once.

    An epoch is as long as no trace need be repeated in it; a dataset of which it takes a part goes on with the rest in
    the next.
    Raises: StudentError for caches whose token ids mean different things, and for shares that are none.
    """

    def __init__(self, parts: Sequence[TraceDataset], shares: Sequence[float] | None = None):
        check_tokenizers([part.cache for part in parts])
        if shares is not None and (len(shares) != len(parts) or min(shares) <= 0):
            raise StudentError(f"shares {list(shares)} of {len(parts)} caches: give each a number above 0")
        self.parts = list(parts)
        bounds = np.cumsum([0, *(len(part) for part in parts)])
        self._starts = bounds[:-1]
        self.pool = Pool(
            np.concatenate([part.pool.lengths for part in parts]),
            np.concatenate([part.pool.keys for part in parts]),
            tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)),
            None if shares is None else tuple(shares),
        )

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, place: int) -> Example:
        epoch, i = divmod(place, len(self))
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.parts[part].example(i - int(self._starts[part]), epoch)


Lessons = TraceDataset | Mixture


def check_tokenizers(caches: Sequence[Cache]) -> None:
    """Raises: StudentError for caches whose token ids mean different things."""
    first, *others = caches
    for other in others:
        if other.identity.tokenizer_hash != first.identity.tokenizer_hash:
            raise StudentError(
                f"{first.path} was made with tokenizer {first.identity.tokenizer_hash[:12]}, {other.path} with "
                f"{other.identity.tokenizer_hash[:12]}: their token ids mean different tokens; train on one of them"
            )


def matching(cache: Cache, where: str) -> np.ndarray:
    """bool [len(cache)], the traces that meet `where`. Raises: InputError, as `filters.Filter` does."""
    masks = Filter.parse(where).select(cache.shard(i).batch for i in range(len(cache.shards)))
    return np.concatenate([np.zeros(0, bool), *masks])


def loader(data: Lessons, batches: Sampler[list[int]] | list[list[int]], packed: bool = False, **options) -> DataLoader:
    gather = functools.partial(collate, packed=packed)
    return DataLoader(data, batch_sampler=batches, collate_fn=gather, **options)  # pyright: ignore[reportArgumentType]


def _take(rows: SparseRows, index_N: np.ndarray) -> SparseRows:
    """The rows at `index_N`; one with nothing kept and all in its tail for NOT_TAUGHT."""
    if len(index_N) == 0:
        return rows[:0]
    first = int(index_N[0])
    if np.array_equal(index_N, np.arange(first, first + len(index_N))) and first >= 0:
        return rows[first : first + len(index_N)]
    there_N = index_N != NOT_TAUGHT
    counts = np.where(there_N, rows.counts[index_N], 0)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    entry_E = np.arange(offsets[-1]) + np.repeat(rows.offsets[index_N] - offsets[:-1], counts)
    log_tail_N = np.where(there_N, rows.log_tail[index_N], np.float32(0))
    return SparseRows(offsets, rows.ids[entry_E], rows.logprobs[entry_E], log_tail_N)


def groups(lengths: np.ndarray) -> list[slice]:
    """Descending lengths cut into the runs that cost least, a run costing its padded tokens and GROUP_TOKENS."""
    best, cuts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, np.int64)
    starts = np.arange(len(lengths))
    for stop in range(1, len(lengths) + 1):
        cost = best[:stop] + (stop - starts[:stop]) * lengths[:stop] + GROUP_TOKENS
        cuts[stop] = cost.argmin()
        best[stop] = cost[cuts[stop]]
    runs, stop = [], len(lengths)
    while stop:
        runs.append(slice(int(cuts[stop]), stop))
        stop = int(cuts[stop])
    return runs[::-1]


def collate(examples: list[Example], packed: bool = False) -> Batch:
    """A batch of tensors; N is 0, and a dummy token is fed, where nothing is taught.

    groups: list of int64 [B, T], padded on the right with 0, or one [1, T] where `packed`; position_ids: int64 [1, T],
    from 0 in each trace, where packed, else None; taught: int64 [N], taught positions in all groups flattened and
    joined; offsets, ids, logprobs, log_tail, labels as SparseTargets has them; kd float32 [N]; ce float32 [N], or None
    where all are 0; sections, tenths int64 [N]; trace_ids; shapes: (B, T) of what attends to itself; tokens, those fed,
    padding not counted.
    """
    examples = sorted((e for e in examples if len(e.positions)), key=lambda e: -len(e.input_ids))
    lengths = np.array([len(e.input_ids) for e in examples], np.int64)
    fed, starts = _pack(examples, lengths) if packed else _pad(examples, lengths)
    rows = SparseRows.concatenate([e.rows for e in examples])
    ce = _join([e.ce for e in examples], np.float32)
    return {
        "groups": fed or [torch.zeros(1, 1, dtype=torch.int64)],
        "position_ids": _join([np.arange(n) for n in lengths] or [np.zeros(1)], np.int64)[None] if packed else None,
        "taught": _join([e.positions + start for e, start in zip(examples, starts, strict=True)], np.int64),
        "offsets": torch.from_numpy(rows.offsets),
        "ids": torch.from_numpy(rows.ids),
        "logprobs": torch.from_numpy(rows.logprobs),
        "log_tail": torch.from_numpy(rows.log_tail),
        "labels": _join([e.labels for e in examples], np.int64),
        "kd": _join([e.kd for e in examples], np.float32),
        "ce": ce if ce.any() else None,
        "sections": _join([e.sections for e in examples], np.int64),
        "tenths": _join([e.tenths for e in examples], np.int64),
        "trace_ids": [e.trace_id for e in examples],
        "shapes": [(1, int(n)) for n in lengths] if packed else [tuple(g.shape) for g in fed],
        "tokens": int(lengths.sum()),
    }


def _pad(examples: list[Example], lengths: np.ndarray) -> tuple[list[torch.Tensor], list[int]]:
    """Groups of traces of alike length, and where each trace begins in all of them."""
    padded, starts, start = [], [], 0
    for group in groups(lengths):
        width = int(lengths[group.start])
        rows_BT = np.zeros((group.stop - group.start, width), np.int64)
        for row_T, e in zip(rows_BT, examples[group], strict=True):
            row_T[: len(e.input_ids)] = e.input_ids
            starts.append(start)
            start += width
        padded.append(torch.from_numpy(rows_BT))
    return padded, starts


def _pack(examples: list[Example], lengths: np.ndarray) -> tuple[list[torch.Tensor], list[int]]:
    """All traces in one row, and where each begins."""
    row = [_join([e.input_ids for e in examples], np.int64)[None]] if examples else []
    return row, (np.cumsum(lengths) - lengths).tolist()


def _join(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False))


def to(batch: Batch, device: torch.device) -> Batch:
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    return moved | {"groups": [g.to(device) for g in batch["groups"]]}


def targets(batch: Batch) -> SparseTargets:
    return SparseTargets(batch["offsets"], batch["ids"], batch["logprobs"], batch["log_tail"], batch["labels"])
