"""A cache as training data: its traces under a view, from one cache or a mixture of several."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from logitcache.cache.filters import Filter
from logitcache.cache.reader import Cache
from logitcache.errors import StudentError
from logitcache.sparse_rows import SparseRows, fold, keep
from logitcache.student.data.fetch_ahead import in_turn
from logitcache.student.data.sampler import Pool, hash_64
from logitcache.student.data.views import UNSUPERVISED, SupervisedTrace, View, section_of, tenth_of
from logitcache.trace import Trace

# N supervised positions and T input positions of a trace, E entries of all its rows.


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One trace under a view, with the rows of its supervised positions only."""

    trace_id: str
    input_ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [N], supervised input positions, ascending
    rows: SparseRows  # N of them, empty where a token is supervised without its row
    labels: np.ndarray  # int64 [N], the sampled tokens
    kd: np.ndarray  # float32 [N], weights of the divergence
    ce: np.ndarray  # float32 [N], weights of the cross-entropy
    sections: np.ndarray  # int64 [N], index into SECTIONS
    tenths: np.ndarray  # int64 [N], tenth of the completion, -1 in the prompt


class TraceDataset(Dataset[Example]):
    """Traces of a cache under a view, read and decoded on access. Safe in DataLoader workers.

    Index `epoch * len(self) + i` is trace i under the view in that epoch.

    Args:
        indices: which traces of `cache`; None: all.
        vocab: rows of the student's head. Stored ids beyond it, from a padded teacher head, join the tail.
        top_k: most ids per row, besides pinned ones; the rest joins the tail. None: all stored ones.
    Raises: StudentError for a cache without what the view needs, and for a top_k above the cache's.
    """

    def __init__(
        self,
        cache: Cache,
        indices: np.ndarray | None = None,
        view: Callable[[Trace, int], SupervisedTrace] | None = None,
        vocab: int | None = None,
        top_k: int | None = None,
    ):
        self.cache, self.view, self.vocab, self.top_k = cache, view or View(), vocab, top_k
        if isinstance(self.view, View):
            self.view.check(cache.identity, str(cache.location))
        if top_k is not None and not 1 <= top_k <= cache.identity.top_k:
            raise StudentError(
                f"`top_k` {top_k}: {cache.location} stores {cache.identity.top_k} ids per row; give 1 to "
                f"{cache.identity.top_k}"
            )
        self.indices = np.arange(len(cache)) if indices is None else np.asarray(indices)
        lengths, ids = cache.lengths[self.indices].astype(np.int64), cache.trace_ids
        keys = np.array([hash_64(ids[i]) for i in self.indices], np.uint64)
        self.pool = Pool(lengths, keys, shards=cache.shard_numbers[self.indices])

    @property
    def parts(self) -> "list[TraceDataset]":
        """The datasets this one is made of, as Mixture has them: itself."""
        return [self]

    @property
    def remote(self) -> bool:
        """Whether its shards are downloaded when they are read."""
        return self.cache.mirror is not None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Example:
        epoch, i = divmod(place, len(self))
        return self.example(i, epoch)

    def example(self, i: int, epoch: int = 0) -> Example:
        trace = self.cache[int(self.indices[i])]
        seen = self.view(trace, epoch)
        context_L = np.append(trace.is_context, False)  # a view of the caller's own may not know of context spans
        positions = ((seen.target != UNSUPERVISED) & ~context_L[seen.target]).nonzero()[0]
        target_N = seen.target[positions]
        return Example(
            trace.trace_id,
            seen.input_ids,
            positions,
            self._rows(trace, seen.row[positions]),
            trace.token_ids[target_N].astype(np.int64),
            seen.kd[positions],
            seen.ce[positions],
            section_of(trace, target_N),
            tenth_of(trace, target_N),
        )

    def _rows(self, trace: Trace, row_N: np.ndarray) -> SparseRows:
        rows = _take(trace.rows, row_N)
        if self.top_k is not None:
            rows = fold(rows, self.top_k, self.cache.identity.pin_tokens)
        return rows if self.vocab is None else keep(rows, rows.ids < self.vocab)


class Mixture(Dataset[Example]):
    """Several datasets as one: with every trace once, or in given shares of an epoch's tokens.

    With shares, an epoch is as long as it can be without repeating a trace. A dataset that it uses only in part
    continues with the rest in the next epoch.
    Raises: StudentError for caches with different tokenizers, and for shares that are not positive.
    """

    def __init__(self, parts: Sequence[TraceDataset], shares: Sequence[float] | None = None):
        check_tokenizers([part.cache for part in parts])
        if shares is not None and (len(shares) != len(parts) or min(shares) <= 0):
            raise StudentError(f"shares {list(shares)} for {len(parts)} caches: give one number above 0 for each")
        self.parts = list(parts)
        bounds = np.cumsum([0, *(len(part) for part in parts)])
        self._starts = bounds[:-1]
        before = np.cumsum([0, *(len(part.cache.shards) for part in parts)])
        self.pool = Pool(
            np.concatenate([part.pool.lengths for part in parts]),
            np.concatenate([part.pool.keys for part in parts]),
            tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)),
            None if shares is None else tuple(shares),
            np.concatenate(
                [part.cache.shard_numbers[part.indices] + b for part, b in zip(parts, before, strict=False)]
            ),
        )

    @property
    def remote(self) -> bool:
        """Whether shards of any part are downloaded when they are read."""
        return any(part.remote for part in self.parts)

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, place: int) -> Example:
        epoch, i = divmod(place, len(self))
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.parts[part].example(i - int(self._starts[part]), epoch)


ExampleSource = TraceDataset | Mixture


def check_tokenizers(caches: Sequence[Cache]) -> None:
    """Raises: StudentError for caches with different tokenizers."""
    first, *others = caches
    for other in others:
        if other.identity.tokenizer_hash != first.identity.tokenizer_hash:
            raise StudentError(
                f"{first.location} was made with tokenizer {first.identity.tokenizer_hash[:12]}, {other.location} with "
                f"{other.identity.tokenizer_hash[:12]}: their token ids are different; train on one of them"
            )


def matching(cache: Cache, where: str) -> np.ndarray:
    """bool [len(cache)], the traces that match `where`. Raises: InputError, as `filters.Filter` does."""
    masks = Filter.parse(where).select(shard.batch for shard in in_turn(cache))
    return np.concatenate([np.zeros(0, bool), *masks])


def _take(rows: SparseRows, index_N: np.ndarray) -> SparseRows:
    """The rows at `index_N`; for UNSUPERVISED an empty row with all its mass in the tail."""
    if len(index_N) == 0:
        return rows[:0]
    first = int(index_N[0])
    if np.array_equal(index_N, np.arange(first, first + len(index_N))) and first >= 0:
        return rows[first : first + len(index_N)]
    there_N = index_N != UNSUPERVISED
    counts = np.where(there_N, rows.counts[index_N], 0)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    entry_E = np.arange(offsets[-1]) + np.repeat(rows.offsets[index_N] - offsets[:-1], counts)
    log_tail_N = np.where(there_N, rows.log_tail[index_N], np.float32(0))
    return SparseRows(offsets, rows.ids[entry_E], rows.logprobs[entry_E], log_tail_N)
