"""How far a student is from its teacher on cached traces: exact over all supervised positions, on any number of ranks."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from logitcache.runtime.console import Progress
from logitcache.sections import SECTIONS
from logitcache.student.data.collate import Batch, loader
from logitcache.student.data.dataset import ExampleSource
from logitcache.student.data.sampler import evaluation_batches
from logitcache.student.model.head import Head, causal_model, distillation_metrics, find_head
from logitcache.student.model.measures import Evaluation, Measures, TailMass

# N supervised positions, B bins of confidence, C columns that are summed: five of a teacher's row, B gaps, two of the text.

BINS = 15


TENTHS = 10


PLACES = TENTHS + 1  # tenth -1, a token of the prompt, comes last


def evaluate(
    student: PreTrainedModel,
    data: ExampleSource,
    *,
    head: Head | None = None,
    measure: Callable[[Batch], dict[str, Tensor]] | None = None,
    tokens_per_batch: int = 4096,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compares the student's distributions with the teacher's, over all supervised positions.

    ECE is the expected calibration error of Guo et al. (arXiv 1706.04599), with right-closed bins of equal width, against
    the teacher instead of the truth: rows are binned by the student's highest probability, and the distance of a bin is
    |mean of that probability - mean of the teacher's probability of that id|, weighted by its rows. An id that the
    teacher's row does not contain counts as probability 0 there.

    Under torch.distributed every rank takes its share, and all return the same.
    Args:
        head: found if not given.
        measure: gives a batch's metrics as `distillation_metrics` does, for a student that is wrapped (DDP, FSDP).
        workers: processes that read and decode.
        autocast: dtype to compute in, such as bfloat16; None: the student's own.
        progress: is advanced after every batch.
    """
    if measure is None:
        measure = functools.partial(distillation_metrics, student, head or find_head(causal_model(student)))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    training, device = student.training, student.device
    student.eval()
    batches = evaluation_batches(data.pool.lengths, tokens_per_batch, rank, world, _shards(data, device))
    totals = torch.zeros(len(SECTIONS) * PLACES, 5 + BINS + 2, dtype=torch.float64, device=device)
    if progress is not None:
        progress.total = sum(map(len, batches))
    # DataLoader draws a seed: from a generator of its own, or the draws of training would change.
    feed = loader(data, batches, num_workers=workers, generator=torch.Generator())
    for traces, batch in zip(batches, feed, strict=True):
        batch = batch.to(device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            row = measure(batch)
        totals.index_add_(0, batch.sections * PLACES + batch.tenths % PLACES, _columns(batch, row))
        if progress is not None:
            progress.add(len(traces), batch.tokens)
    student.train(training)
    if world > 1:
        dist.all_reduce(totals)
    cells = totals.cpu().view(len(SECTIONS), PLACES, -1)
    sections = {name: Measures(**_means(c)) for name, c in zip(SECTIONS, cells.sum(dim=1), strict=True)}
    positions = [Measures(**_means(c)) for c in cells.sum(dim=0)[:TENTHS]]
    return Evaluation(**_means(cells.sum(dim=(0, 1))), sections=sections, positions=positions)


def _shards(data: ExampleSource, device: torch.device) -> np.ndarray | None:
    """int64 [n], the shard of each trace, if any rank downloads them; all ranks must make the same batches."""
    remote = torch.tensor(data.remote, dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(remote, dist.ReduceOp.MAX)
    return data.pool.shards if remote else None


def _columns(batch: Batch, row: dict[str, Tensor]) -> Tensor:
    """float64 [N, C], what each position adds to the sums; one without a row adds its cross-entropy only."""
    confidence_N, teacher_N = row["log_top"].double().exp(), row["teacher_log_top"].double().exp()
    bin_N = ((confidence_N * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    gap_NB = confidence_N.new_zeros(len(bin_N), BINS).scatter_(1, bin_N[:, None], (confidence_N - teacher_N)[:, None])
    tails = batch.targets.log_tail.double().exp(), row["log_tail"].double().exp()
    means = torch.ones_like(confidence_N), row["forward_kl"].double(), row["top1"].double(), *tails
    known_N1 = batch.targets.offsets.diff()[:, None] > 0
    of_row_NC = torch.cat([torch.stack(means, dim=1), gap_NB], dim=1).masked_fill(~known_N1, 0.0)
    assert batch.targets.labels is not None
    labelled_N = (batch.targets.labels >= 0).double()
    return torch.cat([of_row_NC, torch.stack([labelled_N, row["ce"].double() * labelled_N], dim=1)], dim=1)


def _means(sums: Tensor) -> dict[str, Any]:
    rows, kl, top1, teacher, student, *gaps, labels, ce = sums.tolist()

    def mean(total: float, count: float = rows) -> float | None:
        return total / count if count else None

    return {
        "kl": mean(kl),
        "top1": mean(top1),
        "rows": int(rows),
        "ce": mean(ce, labels),
        "ece": mean(sum(map(abs, gaps))),
        "tail": TailMass(mean(teacher), mean(student)),
    }
