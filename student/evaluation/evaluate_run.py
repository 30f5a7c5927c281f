"""How far a student is from its teacher on cached traces: exact over all taught rows, on any number of ranks."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from logitcache.cache.reader import Cache
from logitcache.errors import StudentError
from logitcache.runtime.console import Progress
from logitcache.sections import SECTIONS
from logitcache.student.data.dataset import Batch, Lessons, TraceDataset, loader, matching, to
from logitcache.student.data.sampler import evaluation_batches, split
from logitcache.student.data.views import View
from logitcache.student.evaluation.options import EvaluationOptions
from logitcache.student.model.head import Head, find_head, lesson_metrics, plain
from logitcache.student.model.load import load_student, quiet
from logitcache.student.training.checkpoints import find_run, newest_checkpoint, standing
from logitcache.student.training.options import TrainOptions, wants_bf16

# N taught rows, B bins of confidence, C columns that are summed: five of a teacher's row, B gaps, two of the text.

BINS = 15
TENTHS = 10
PLACES = TENTHS + 1  # tenth -1, a token of the prompt, comes last


def evaluate(
    student: PreTrainedModel,
    data: Lessons,
    *,
    head: Head | None = None,
    measure: Callable[[Batch], dict[str, Tensor]] | None = None,
    tokens_per_batch: int = 4096,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The student beside the teacher: means over all taught rows, over those of a section, and of a tenth.

    ECE is the expected calibration error of Guo et al. (arXiv 1706.04599), right-closed bins of equal width, held
    against the teacher instead of the truth: rows are binned by the student's highest probability, and the distance of
    a bin is |mean of that probability - mean of the teacher's probability of that id|, weighted by its rows. An id
    outside the teacher's support counts as 0 there.

    Under torch.distributed every rank takes its share and all get the same answer.
    Args:
        head: found if not given.
        measure: a batch's rows as `lesson_metrics` gives them, where a wrapped student must be called for them.
        autocast: dtype to run in, such as bfloat16; None runs in the student's own.
        progress: is told of every batch.
    Returns: {"kl": bucketed forward KL, nats; "top1": share of rows whose best id is the teacher's; "rows": rows of the
        teacher; "ce": nats, over taught tokens; "ece"; "tail": {"teacher", "student"}: mean mass outside the support;
        "sections": {name: the same}, "positions": [the same for each tenth of the completion; the prompt is in none]}.
        Means of nothing are None.
    """
    if measure is None:
        measure = functools.partial(lesson_metrics, student, head or find_head(plain(student)))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    training, device = student.training, student.device
    student.eval()
    batches = evaluation_batches(data.pool.lengths, tokens_per_batch, rank, world)
    totals = torch.zeros(len(SECTIONS) * PLACES, 5 + BINS + 2, dtype=torch.float64, device=device)
    if progress is not None:
        progress.total = sum(map(len, batches))
    # A loader draws a seed from the generator it has: of the process's own, training draws.
    feed = loader(data, batches, num_workers=workers, generator=torch.Generator())
    for traces, batch in zip(batches, feed, strict=True):
        batch = to(batch, device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            row = measure(batch)
        totals.index_add_(0, batch["sections"] * PLACES + batch["tenths"] % PLACES, _columns(batch, row))
        if progress is not None:
            progress.add(len(traces), batch["tokens"])
    student.train(training)
    if world > 1:
        dist.all_reduce(totals)
    cells = totals.cpu().view(len(SECTIONS), PLACES, -1)
    sections = {name: _means(c) for name, c in zip(SECTIONS, cells.sum(dim=1), strict=True)}
    positions = [_means(c) for c in cells.sum(dim=0)[:TENTHS]]
    return _means(cells.sum(dim=(0, 1))) | {"sections": sections, "positions": positions}


def _columns(batch: Batch, row: dict[str, Tensor]) -> Tensor:
    """float64 [N, C], what each row adds to the sums; one without a teacher's row (an empty support) adds its text."""
    confidence_N, teacher_N = row["log_top"].double().exp(), row["teacher_log_top"].double().exp()
    bin_N = ((confidence_N * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    gap_NB = confidence_N.new_zeros(len(bin_N), BINS).scatter_(1, bin_N[:, None], (confidence_N - teacher_N)[:, None])
    tails = batch["log_tail"].double().exp(), row["log_tail"].double().exp()
    means = torch.ones_like(confidence_N), row["forward_kl"].double(), row["top1"].double(), *tails
    known_N1 = batch["offsets"].diff()[:, None] > 0
    of_row_NC = torch.cat([torch.stack(means, dim=1), gap_NB], dim=1).masked_fill(~known_N1, 0.0)
    labelled_N = (batch["labels"] >= 0).double()
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
        "tail": {"teacher": mean(teacher), "student": mean(student)},
    }


def evaluate_run(options: EvaluationOptions) -> dict[str, Any]:
    """Evaluates `options.student` on a cache's held-out traces, the same that training with that share holds out.

    Works under torchrun; every rank returns the same.
    Returns: what `evaluate` does, and which traces, weights and view it was: "student" as given, "weights" where they
        lie, "step" of a checkpoint or None, "cache", "traces", "held_out" (None: all), "where", "view", "taught" (the
        sections), "dtype", "seconds".
    Raises: StudentError for a student, a view or a choice of traces that leaves nothing to evaluate; InputError for
        `where`; CacheError.
    """
    from accelerate import PartialState

    began = time.monotonic()
    bf16 = wants_bf16(options.dtype)
    if options.tokens_per_batch < 1:
        raise StudentError(f"`tokens_per_batch` {options.tokens_per_batch}: give at least 1")
    cache, view = Cache.open(options.cache), View(options.view, tuple(options.sections))
    view.check(cache.identity, str(options.cache))
    weights, run, step = _weights(options.student)
    indices, held_out = _choose(options, cache, run)
    state = PartialState(cpu=not torch.accelerator.is_available())
    with quiet():
        student = load_student(weights, cache.identity)[0]
    student.to(state.device)  # pyright: ignore[reportArgumentType]
    head = find_head(student)
    data = TraceDataset(cache, indices, view, head.module.weight.shape[0])
    with contextlib.ExitStack() as stack:
        shown = Progress(sys.stderr, len(data)) if state.is_main_process else None
        found = evaluate(
            student,
            data,
            head=head,
            tokens_per_batch=options.tokens_per_batch,
            autocast=torch.bfloat16 if bf16 else None,
            progress=stack.enter_context(shown) if shown else None,
        )
    if found["kl"] is None and found["ce"] is None:
        raise StudentError(
            f"{options.cache}: view {view} teaches nothing on {len(data)} traces; choose other `sections`, or generate "
            "with `prompt_logits` for those of the prompt"
        )
    return {
        "student": options.student,
        "weights": weights,
        "step": step,
        "cache": str(options.cache),
        "traces": len(data),
        "held_out": held_out,
        "where": options.where,
        "view": str(view),
        "taught": list(view.sections),
        "dtype": "bf16" if bf16 else "fp32",
        "seconds": time.monotonic() - began,
        **found,
    }


def _choose(options: EvaluationOptions, cache: Cache, run: dict[str, Any]) -> tuple[np.ndarray, float | None]:
    """Indices of the traces to evaluate on, and the share that was held out, None for all."""
    if options.everything and options.held_out is not None:
        raise StudentError("give either `everything` or `held_out`, which is a part")
    held_out = run.get("held_out", TrainOptions.held_out) if options.held_out is None else options.held_out
    held_out = None if options.everything else held_out
    indices = np.arange(len(cache)) if held_out is None else split(cache.prompt_ids, held_out)[1]
    if options.where is not None:
        indices = indices[matching(cache, options.where)[indices]]
    if not len(indices):
        which = "no trace" if held_out is None else f"no held-out trace of a share of {held_out}"
        where = f" is {options.where}" if options.where else ""
        raise StudentError(f"{options.cache}: {which}{where}; ask for less, hold out more, or take `everything`")
    return indices, held_out


def _weights(student: str) -> tuple[str, dict[str, Any], int | None]:
    """Where the student's weights lie, run.json of the run they are of ({} for none), and the step of a checkpoint.

    Raises: StudentError for a run that has no weights yet.
    """
    path = Path(student)
    home, run = find_run(path)
    if home is None:
        return student, {}, None
    if home != path:
        step = path.name.removeprefix("checkpoint-")
        return student, run, int(step) if step.isdigit() else None
    if run.get("status") == "finished":
        return student, run, None
    checkpoint, state = newest_checkpoint(home)
    if checkpoint is None:
        now = standing(home, run)
        way_out = "wait for one" if now == "running" else "run its command again"
        raise StudentError(
            f"{student} is a run that is {now} and has no checkpoint; {way_out}, or give `student` {run.get('student')}, "
            "what it began with"
        )
    return str(checkpoint), run, state["global_step"]
