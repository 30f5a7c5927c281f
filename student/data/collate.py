"""Traces to batches of tensors, padded or packed.

Padded, each trace has a row of its own, padded on the right: a causal model never looks right, so no trace sees padding
or another trace, with any attention and without a mask. A micro-batch is run in a few groups of similar length to keep
padding small. Packed, all traces follow one another in one row, separated by their position ids, for attention that
skips other documents (flash attention).
"""

import functools
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from logitcache.kernels.targets import SparseTargets
from logitcache.sparse_rows import SparseRows
from logitcache.student.data.dataset import Example, Lessons

Batch = dict[str, Any]


GROUP_TOKENS = 256  # padding that a forward of its own is worth: what its launches cost on a GPU, in tokens


def loader(data: Lessons, batches: Sampler[list[int]] | list[list[int]], packed: bool = False, **options) -> DataLoader:
    gather = functools.partial(collate, packed=packed)
    return DataLoader(data, batch_sampler=batches, collate_fn=gather, **options)  # pyright: ignore[reportArgumentType]


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
