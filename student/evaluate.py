"""How far a student is from its teacher on held-out traces: exact over all taught rows, on any number of ranks."""

from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from logitcache.student.data import TraceDataset, evaluation_batches, to
from logitcache.student.model import Head, find_head, lesson_metrics
from logitcache.student.views import SECTIONS


def evaluate(
    student: PreTrainedModel,
    data: TraceDataset,
    *,
    head: Head | None = None,
    tokens_per_batch: int = 4096,
    workers: int = 0,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Bucketed forward KL and top-1 agreement with the teacher's first entry, each a mean over taught rows.

    Under torch.distributed every rank takes its share and all get the same answer.
    Args:
        autocast: dtype to run in, such as bfloat16; None runs in the student's own.
    Returns: {"kl": nats a row, "top1": fraction, "rows": count, "sections": {name: the same three}}; means of no rows
    are None.
    """
    head = head or find_head(student)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    training, device = student.training, student.device
    student.eval()
    totals = torch.zeros(len(SECTIONS), 3, dtype=torch.float64, device=device)  # KL, agreement, rows
    batches = evaluation_batches(data.lengths, tokens_per_batch, rank, world)
    for batch in data.loader(batches, num_workers=workers):
        batch = to(batch, device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            row = lesson_metrics(student, head, batch)
        columns = torch.stack(
            [row["forward_kl"].double(), row["top1"].double(), torch.ones_like(row["top1"]).double()], dim=1
        )
        totals.index_add_(0, batch["sections"], columns)
    student.train(training)
    if world > 1:
        dist.all_reduce(totals)
    sections = {name: _means(*sums) for name, sums in zip(SECTIONS, totals.tolist(), strict=True)}
    return _means(*totals.sum(dim=0).tolist()) | {"sections": sections}


def _means(kl: float, top1: float, rows: float) -> dict[str, float | int | None]:
    return {"kl": kl / rows if rows else None, "top1": top1 / rows if rows else None, "rows": int(rows)}
