"""A cache as training data: held-out split, an order that anyone can compute again, batches by token budget.

The order of an epoch is a pure function of (seed, epoch, trace ids), and an optimiser step takes its traces from that
order by a budget of tokens alone. Ranks and accumulation only share a step's traces out, so they change the order of a
sum and nothing else. A trace stands in a row of its own, padded on the right: a causal model never looks right, so none
sees padding or another trace, with any attention and without a mask. A micro-batch is fed in a few groups of alike
length to keep padding small.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from logitcache.cache import Cache
from logitcache.errors import StudentError
from logitcache.kernels.reference import SparseTargets
from logitcache.schema import Trace
from logitcache.student.views import NOT_TAUGHT, Lesson, View, section_of
from logitcache.topk import SparseRows, keep

# N taught rows, T input positions of a trace, B traces of a batch, E entries of all its rows.

Batch = dict[str, Any]
GROUP_TOKENS = 256  # padding that a forward of its own is worth: what its launches cost on a GPU, in tokens


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One trace as its view gives it, the untaught rows left out."""

    trace_id: str
    input_ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [N], ascending input positions that are taught
    rows: SparseRows  # N of them
    labels: np.ndarray  # int64 [N], the realised tokens
    kd: np.ndarray  # float32 [N]
    ce: np.ndarray  # float32 [N]
    sections: np.ndarray  # int64 [N], index into views.SECTIONS


class TraceDataset(Dataset[Example]):
    """Some traces of a cache under a view; reads and decodes a trace when asked for it, safe in loader workers.

    Args:
        indices: the traces of `cache`, all by default.
        vocab: rows of the student's head. Kept ids beyond it, which a padded teacher head can give, join the tail.
    """

    def __init__(
        self,
        cache: Cache,
        indices: np.ndarray | None = None,
        view: Callable[[Trace], Lesson] | None = None,
        vocab: int | None = None,
    ):
        self.cache, self.view, self.vocab = cache, view or View(), vocab
        self.indices = np.arange(len(cache)) if indices is None else np.asarray(indices)
        self.lengths = cache.lengths[self.indices].astype(np.int64)  # tokens; a view never feeds more
        ids = cache.trace_ids
        self.keys = np.array([_hash(ids[i]) for i in self.indices], np.uint64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Example:
        trace = self.cache[int(self.indices[i])]
        lesson = self.view(trace)
        positions = (lesson.row != NOT_TAUGHT).nonzero()[0]
        row_N = lesson.row[positions]
        rows = _take(trace.rows, row_N)
        return Example(
            trace.trace_id,
            lesson.input_ids,
            positions,
            rows if self.vocab is None else keep(rows, rows.ids < self.vocab),
            trace.token_ids[row_N + trace.row_start].astype(np.int64),
            lesson.kd[positions],
            lesson.ce[positions],
            section_of(trace, row_N),
        )

    def loader(self, batches: "Sampler[list[int]] | list[list[int]]", **options: Any) -> DataLoader:
        return DataLoader(self, batch_sampler=batches, collate_fn=collate, **options)  # pyright: ignore[reportArgumentType]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _take(rows: SparseRows, index_N: np.ndarray) -> SparseRows:
    """The rows at ascending `index_N`."""
    if len(index_N) == 0 or index_N[-1] - index_N[0] + 1 == len(index_N):
        return rows[int(index_N[0]) : int(index_N[-1]) + 1] if len(index_N) else rows[:0]
    counts = rows.counts[index_N]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    entry_E = np.arange(offsets[-1]) + np.repeat(rows.offsets[index_N] - offsets[:-1], counts)
    return SparseRows(offsets, rows.ids[entry_E], rows.logprobs[entry_E], rows.log_tail[index_N])


def split(prompt_ids: Sequence[str], held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training traces and of the held-out ones; no prompt is on both sides.

    A prompt's side depends on its id alone, so a cache that grows moves none; about `held_out` of the prompts are held
    out, at least one of them, and at least one is trained on.
    Raises: StudentError for a fraction outside (0, 1), and where there is but one prompt.
    """
    if not 0.0 < held_out < 1.0:
        raise StudentError(f"held-out fraction {held_out}: give a number between 0 and 1, such as 0.05")
    place = {p: _hash("held out\0" + p) for p in prompt_ids}
    if len(place) < 2:
        raise StudentError(
            f"the cache holds {len(place)} prompt(s), a held-out split needs two: `logitcache generate` more of them"
        )
    order = sorted(place, key=lambda p: (place[p], p))
    count = sum(place[p] < held_out * 2**64 for p in order)
    chosen = set(order[: min(max(count, 1), len(order) - 1)])
    held = np.array([p in chosen for p in prompt_ids])
    return (~held).nonzero()[0], held.nonzero()[0]


def epoch_order(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """int64 [n], a shuffle of n traces by their uint64 keys: splitmix64 of key, seed and epoch, sorted."""
    mixed = keys ^ _splitmix(np.array([(seed % 2**32) << 32 | epoch], np.uint64))
    return np.lexsort((keys, _splitmix(mixed)))


def _splitmix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def count_steps(lengths: np.ndarray, tokens: int) -> int:
    """Optimiser steps of an epoch at `tokens` a step, the same in every epoch."""
    return max(1, min(len(lengths), -(-int(lengths.sum()) // tokens)))


def cut(lengths: np.ndarray, parts: int) -> list[slice]:
    """`parts` consecutive slices of about equal token counts, none of them empty; parts <= len(lengths)."""
    middle = np.cumsum(lengths) - lengths / 2
    first = np.arange(parts + 1)
    bounds = np.searchsorted(middle, first * (lengths.sum() / parts))
    bounds[-1] = len(lengths)
    bounds = np.maximum.accumulate(np.maximum(bounds, first) - first) + first
    bounds = np.minimum(bounds, len(lengths) - parts + first)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)]


def share(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Index arrays of `parts` micro-batches, some perhaps empty: the longest trace left goes to the fewest tokens."""
    filled: list[list[int]] = [[] for _ in range(parts)]
    tokens = np.zeros(parts, np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        part = int(tokens.argmin())
        filled[part].append(int(i))
        tokens[part] += lengths[i]
    return [np.array(part, np.int64) for part in filled]


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


def _fill(longest: np.ndarray, size: int) -> list[slice]:
    """Descending lengths cut into batches of at most `size` padded tokens; one that is longer stands alone."""
    slices, start = [], 0
    while start < len(longest):
        stop = min(len(longest), start + max(1, size // max(int(longest[start]), 1)))
        slices.append(slice(start, stop))
        start = stop
    return slices


class StepSampler(Sampler[list[int]]):
    """Micro-batches of one rank, `accumulation` of them a step: as many on every rank and in every epoch, some empty.

    Args:
        tokens_per_batch: tokens of a micro-batch on average, padding not counted: a step has at most tokens_per_batch *
            accumulation * world on average, and more where a single trace is longer.
    """

    def __init__(
        self,
        data: TraceDataset,
        tokens_per_batch: int,
        *,
        seed: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.lengths, self.keys, self.seed = data.lengths, data.keys, seed
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self.steps = count_steps(data.lengths, tokens_per_batch * accumulation * world)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def step_traces(self, epoch: int) -> list[np.ndarray]:
        """The traces of each optimiser step, over all ranks."""
        order = epoch_order(self.keys, self.seed, epoch)
        return [order[s] for s in cut(self.lengths[order], self.steps)]

    def __iter__(self) -> Iterator[list[int]]:
        for traces in self.step_traces(self.epoch):
            parts = share(self.lengths[traces], self.accumulation * self.world)
            for i in range(self.accumulation):
                yield traces[parts[i * self.world + self.rank]].tolist()


def evaluation_batches(lengths: np.ndarray, tokens: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Every trace once over all ranks, in batches of at most `tokens` padded tokens."""
    order = np.argsort(-lengths, kind="stable")
    return [order[s].tolist() for s in _fill(lengths[order], tokens)[rank::world]]


def collate(examples: list[Example]) -> Batch:
    """A batch of tensors; N is 0, and a dummy token is fed, where nothing is taught.

    groups: list of int64 [B, T], padded on the right with 0; taught: int64 [N], taught positions in all groups
    flattened and joined (a packed layout would change these two and nothing else); offsets, ids, logprobs, log_tail,
    labels as SparseTargets has them; kd float32 [N]; ce float32 [N], or None where all are 0; sections int64 [N];
    trace_ids; tokens, those fed.
    """
    examples = sorted((e for e in examples if len(e.positions)), key=lambda e: -len(e.input_ids))
    padded, taught, start = [], [], 0
    for group in groups(np.array([len(e.input_ids) for e in examples], np.int64)):
        width = len(examples[group.start].input_ids)
        rows_BT = np.zeros((group.stop - group.start, width), np.int64)
        for row_T, e in zip(rows_BT, examples[group], strict=True):
            row_T[: len(e.input_ids)] = e.input_ids
            taught.append(e.positions + start)
            start += width
        padded.append(torch.from_numpy(rows_BT))
    rows = SparseRows.concatenate([e.rows for e in examples])
    ce = _join([e.ce for e in examples], np.float32)
    return {
        "groups": padded or [torch.zeros(1, 1, dtype=torch.int64)],
        "taught": _join(taught, np.int64),
        "offsets": torch.from_numpy(rows.offsets),
        "ids": torch.from_numpy(rows.ids),
        "logprobs": torch.from_numpy(rows.logprobs),
        "log_tail": torch.from_numpy(rows.log_tail),
        "labels": _join([e.labels for e in examples], np.int64),
        "kd": _join([e.kd for e in examples], np.float32),
        "ce": ce if ce.any() else None,
        "sections": _join([e.sections for e in examples], np.int64),
        "trace_ids": [e.trace_id for e in examples],
        "tokens": sum(len(e.input_ids) for e in examples),
    }


def _join(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]))


def to(batch: Batch, device: torch.device) -> Batch:
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    return moved | {"groups": [g.to(device) for g in batch["groups"]]}


def targets(batch: Batch) -> SparseTargets:
    return SparseTargets(batch["offsets"], batch["ids"], batch["logprobs"], batch["log_tail"], batch["labels"])
