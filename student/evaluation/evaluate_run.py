"""Evaluates a student against its teacher on cached traces, on any number of ranks."""

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache.cache.reader import Cache
from logitcache.errors import StudentError
from logitcache.runtime.console import Progress
from logitcache.student.data.dataset import TraceDataset, matching
from logitcache.student.data.held_out import split
from logitcache.student.data.views import View
from logitcache.student.evaluation.options import EvaluationOptions
from logitcache.student.model.head import find_head
from logitcache.student.model.load import load_student, quiet
from logitcache.student.model.measures import Evaluation
from logitcache.student.model.metrics import evaluate
from logitcache.student.training.checkpoint_files import weights_damage
from logitcache.student.training.checkpoints import find_run, newest_checkpoint, run_status
from logitcache.student.training.config import wants_bf16
from logitcache.student.training.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class StudentEvaluation:
    """The evaluation of a student, and the traces it was made on."""

    student: str  # as it was given
    weights: str  # where its weights are
    step: int | None  # of a checkpoint
    cache: str
    traces: int
    held_out: float | None  # share of the prompts; None: all of them
    where: str | None
    view: str
    sections: list[str]  # evaluated ones
    dtype: str
    seconds: float
    found: Evaluation

    def to_json(self) -> dict[str, Any]:
        """The JSON of `logitcache eval --json`: settings and evaluation."""
        settings = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("sections", "found")
        }
        return settings | {"taught": self.sections} | self.found.to_json()


def evaluate_run(options: EvaluationOptions) -> StudentEvaluation:
    """Evaluates `options.student` on a cache's held-out traces, the ones that training with the same share holds out.

    Works under torchrun; every rank returns the same.
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
        student = load_student(
            weights, cache.identity, traces=[(cache, indices)], teacher_tokenizer=options.teacher_tokenizer
        )[0]
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
    if found.kl is None and found.ce is None:
        raise StudentError(
            f"{options.cache}: view {view} supervises no token of {len(data)} traces; choose other `sections`, or "
            "generate with `prompt_logits` for rows of the prompt"
        )
    return StudentEvaluation(
        student=options.student,
        weights=weights,
        step=step,
        cache=str(options.cache),
        traces=len(data),
        held_out=held_out,
        where=options.where,
        view=str(view),
        sections=list(view.sections),
        dtype="bf16" if bf16 else "fp32",
        seconds=time.monotonic() - began,
        found=found,
    )


def _choose(options: EvaluationOptions, cache: Cache, run: dict[str, Any]) -> tuple[np.ndarray, float | None]:
    """Indices of the traces to evaluate, and the held-out share; None for all traces."""
    if options.everything and options.held_out is not None:
        raise StudentError("give either `everything` or `held_out`, not both")
    held_out = run.get("held_out", TrainOptions.held_out) if options.held_out is None else options.held_out
    held_out = None if options.everything else held_out
    indices = np.arange(len(cache)) if held_out is None else split(cache.prompt_ids, held_out)[1]
    if options.where is not None:
        indices = indices[matching(cache, options.where)[indices]]
    if not len(indices):
        which = "no trace" if held_out is None else f"no held-out trace of a share of {held_out}"
        where = f" matches `where` {options.where}" if options.where else ""
        raise StudentError(f"{options.cache}: {which}{where}; loosen the condition, hold out more, or set `everything`")
    return indices, held_out


def _whole(folder: Path) -> str:
    """Raises: StudentError for weights that are not what training wrote."""
    if wrong := weights_damage(folder):
        raise StudentError(f"{folder} is damaged: {wrong}; restore it from a copy, or evaluate another checkpoint")
    return str(folder)


def _weights(student: str) -> tuple[str, dict[str, Any], int | None]:
    """The folder of the student's weights, the run.json of their run ({} for none), and the step of a checkpoint.

    Raises: StudentError for a run without weights, or with damaged ones.
    """
    path = Path(student)
    home, run = find_run(path)
    if home is None:
        return student, {}, None
    if home != path:
        step = path.name.removeprefix("checkpoint-")
        return _whole(path), run, int(step) if step.isdigit() else None
    if run.get("status") == "finished":
        return _whole(path), run, None
    checkpoint, state = newest_checkpoint(home, weights=True)
    if checkpoint is None:
        now = run_status(home, run)
        way_out = "wait for one" if now == "running" else "run its command again to resume it"
        raise StudentError(
            f"`student` {student}: this run is {now} and has no checkpoint; {way_out}, or give {run.get('student')}, the model "
            "that it started from"
        )
    return str(checkpoint), run, state["global_step"]
