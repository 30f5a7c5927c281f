"""Traces to batches of tensors, padded or packed.

Padded, each trace has a row of its own, padded on the right: a causal model never looks right, so no trace sees padding
or another trace, with any attention and without a mask. A micro-batch is run in a few groups of similar length to keep
padding small. Packed, all traces follow one another in one row, separated by their position ids, for attention that
skips other documents (flash attention).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from logitcache.kernels.targets import SparseTargets
from logitcache.sparse_rows import SparseRows
from logitcache.student.data.dataset import Example, ExampleSource
from logitcache.student.data.fetch_ahead import FetchAhead

# N supervised positions of a batch, T input positions of a trace, B traces of a group.

GROUP_TOKENS = 256  # padding that costs as much as a forward of its own: its launches on a GPU, in tokens


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Traces of one micro-batch as tensors. Where nothing is supervised N is 0, and the input is one dummy token."""

    groups: list[Tensor]  # each int64 [B, T], padded on the right with 0; packed: one of [1, T]
    position_ids: Tensor | None  # int64 [1, T], from 0 in each trace; None where padded
    supervised: Tensor  # int64 [N], positions in all groups, flattened and joined
    targets: SparseTargets  # N rows; their labels are the sampled tokens
    kd: Tensor  # float32 [N], weights of the divergence
    ce: Tensor | None  # float32 [N], weights of the cross-entropy; None where all are 0
    sections: Tensor  # int64 [N], index into SECTIONS
    tenths: Tensor  # int64 [N], tenth of the completion, -1 in the prompt
    trace_ids: list[str]
    shapes: list[tuple[int, int]]  # (B, T) of each block that attends within itself
    tokens: int  # input tokens, without padding

    def to(self, device: torch.device | str) -> "Batch":
        return self._moved(lambda tensor: tensor.to(device))

    def pin_memory(self) -> "Batch":
        """For a DataLoader with pin_memory=True."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        moved = {
            name: move(value)
            for name in ("position_ids", "supervised", "kd", "ce", "sections", "tenths")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, groups=[move(group) for group in self.groups], targets=self.targets.map(move), **moved)


def loader(
    data: ExampleSource, batches: Sampler[list[int]] | list[list[int]], packed: bool = False, **options
) -> DataLoader:
    """A DataLoader of `Batch`es. options: others of DataLoader."""
    if data.remote:
        batches = FetchAhead(batches, data)
        if options.get("num_workers"):
            options.setdefault("multiprocessing_context", "spawn")  # a store's threads do not survive a fork
    gather = functools.partial(collate, packed=packed)
    return DataLoader(data, batch_sampler=batches, collate_fn=gather, **options)  # pyright: ignore[reportArgumentType]


def groups(lengths: np.ndarray) -> list[slice]:
    """Cuts descending lengths into the cheapest runs; a run costs its padded tokens and GROUP_TOKENS."""
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
    """The examples as one batch, the longest first; those without a supervised position are dropped."""
    examples = sorted((e for e in examples if len(e.positions)), key=lambda e: -len(e.input_ids))
    lengths = np.array([len(e.input_ids) for e in examples], np.int64)
    blocks, starts = _pack(examples, lengths) if packed else _pad(examples, lengths)
    rows = SparseRows.concatenate([e.rows for e in examples])
    ce = _join([e.ce for e in examples], np.float32)
    return Batch(
        groups=blocks or [torch.zeros(1, 1, dtype=torch.int64)],
        position_ids=_join([np.arange(n) for n in lengths] or [np.zeros(1)], np.int64)[None] if packed else None,
        supervised=_join([e.positions + start for e, start in zip(examples, starts, strict=True)], np.int64),
        targets=SparseTargets(
            *map(torch.from_numpy, (rows.offsets, rows.ids, rows.logprobs, rows.log_tail)),
            labels=_join([e.labels for e in examples], np.int64),
        ),
        kd=_join([e.kd for e in examples], np.float32),
        ce=ce if ce.any() else None,
        sections=_join([e.sections for e in examples], np.int64),
        tenths=_join([e.tenths for e in examples], np.int64),
        trace_ids=[e.trace_id for e in examples],
        shapes=[(1, int(n)) for n in lengths] if packed else [(len(g), g.shape[1]) for g in blocks],
        tokens=int(lengths.sum()),
    )


def _pad(examples: list[Example], lengths: np.ndarray) -> tuple[list[torch.Tensor], list[int]]:
    """Groups of traces of similar length, and where each trace begins in all of them joined."""
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
