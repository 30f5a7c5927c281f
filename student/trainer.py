"""A transformers Trainer whose loss is the divergence from a cache's rows, exact on any number of ranks.

The loss of an optimiser step is the sum over its taught rows, on all ranks and in all accumulated batches, by their
number.
"""

import contextlib
import json
import math
import shutil
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from logitcache.console import Progress, Stop
from logitcache.errors import TrainingError
from logitcache.student.data import Batch, StepSampler, TraceDataset, collate, count_steps
from logitcache.student.evaluate import evaluate
from logitcache.student.model import find_head, lesson_loss

COUNTS_FILE = "counts.json"


@dataclass
class DistillConfig(TrainingArguments):
    """TrainingArguments with what a student needs, and defaults that suit it. Batches are measured in tokens."""

    tokens_per_batch: int = field(default=4096, metadata={"help": "Tokens a device is fed at a time, about."})
    save_minutes: float | None = field(
        default=10.0, metadata={"help": "Minutes between checkpoints; None: save_strategy rules."}
    )
    learning_rate: float = 1e-4
    warmup_steps: float = 0.05  # of all steps
    lr_scheduler_type: SchedulerType | str = "cosine"
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False  # it would hide what stops the run here
    eval_strategy: IntervalStrategy | str = "epoch"
    save_strategy: SaveStrategy | str = "no"
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"
    disable_tqdm: bool | None = True
    log_level: str = "error"
    remove_unused_columns: bool = False
    use_cache: bool = True  # of the saved config, for those who generate with it; training passes False itself
    seed: int = 0
    accelerator_config: dict | str | None = field(default_factory=lambda: {"even_batches": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_batch < 1 or self.gradient_accumulation_steps < 1:
            raise ValueError("tokens_per_batch and gradient_accumulation_steps must be at least 1")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError("num_train_epochs or max_steps must be above 0")

    @property
    def tokens_per_step(self) -> int:
        """Of an optimiser step over all ranks: with the seed and the cache, all that its traces depend on."""
        return self.tokens_per_batch * self.gradient_accumulation_steps * self.world_size


class DistillTrainer(Trainer):
    """A Trainer whose examples are lessons and whose loss is the divergence from a cache's rows.

    Any Trainer argument goes; `train_dataset` and `eval_dataset` are TraceDatasets. Evaluation gives eval_kl and
    eval_top1.
    """

    args: DistillConfig
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, model: PreTrainedModel, args: DistillConfig, train_dataset: TraceDataset, **options: Any):
        if args.n_gpu > 1:  # no DataParallel: one process drives one device, torchrun starts more of them
            args._n_gpu = 1
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collate, **options)
        self.head = head = find_head(model)
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self.stop: Stop | None = None
        self.counts = {"tokens_fed": 0, "tokens_taught": 0, "seconds": 0.0}
        self.last_evaluation: tuple[int | None, dict[str, Any]] = (None, {})  # at which step, what evaluate() found

        # The loss is made inside the forward, so that what wraps the model (DDP, FSDP, autocast) wraps the head.
        def forward(self: PreTrainedModel, *inputs: Any, lesson: Batch | None = None, **named: Any) -> Any:
            return type(self).forward(self, *inputs, **named) if lesson is None else lesson_loss(self, head, lesson)

        model.forward = types.MethodType(forward, model)
        self.add_callback(_Flow(self))

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate, which would deal batches out to ranks: the sampler knows ranks and accumulation.
        self.sampler = StepSampler(
            self.train_dataset,
            self.args.tokens_per_batch,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        return self.train_dataset.loader(
            self.sampler,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """The step's micro-batches, and the taught rows of the whole step over all ranks."""
        self._step_began = time.monotonic()
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor(
            [sum(len(b["taught"]) for b in samples), sum(b["tokens"] for b in samples)], device=device
        )
        self._reduce(counts)
        self.counts["tokens_taught"] += int(counts[0])
        self.counts["tokens_fed"] += int(counts[1])
        return samples, counts[0].clamp(min=1)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over this batch's rows by the step's rows, times the ranks, over which gradients are averaged.

        Raises: TrainingError naming the traces of a batch whose loss is no number.
        """
        loss = model(lesson=inputs)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, in a batch of traces "
                f"{', '.join(inputs['trace_ids'])}; lower the learning rate, or use --dtype fp32"
            )
        rows = len(inputs["taught"]) if num_items_in_batch is None else num_items_in_batch
        loss = loss * (self.args.world_size / max(rows, 1))
        return (loss, None) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        began = time.monotonic()
        found = evaluate(
            self.model,
            self.eval_dataset if eval_dataset is None else eval_dataset,
            head=self.head,
            tokens_per_batch=self.args.tokens_per_batch,
            autocast=torch.bfloat16 if self.args.bf16 else None,
        )
        self.last_evaluation = (self.state.global_step, found)
        metrics = {"kl": found["kl"], "loss": found["kl"], "top1": found["top1"], "rows": found["rows"]}
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.monotonic() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As Trainer.train; True goes on from the newest whole checkpoint in the output folder, if any."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_checkpoint(Path(self.args.output_dir or "."))
            if self.args.should_save:
                drop_after(Path(self.args.output_dir or "."), resume_from_checkpoint)
        if not resume_from_checkpoint:
            return super().train(None, trial, ignore_keys_for_eval)
        path = Path(resume_from_checkpoint)
        if (path / COUNTS_FILE).exists():
            self.counts = json.loads((path / COUNTS_FILE).read_text())
        state = TrainerState.load_from_json(str(path / "trainer_state.json"))
        epoch_steps = count_steps(self.train_dataset.lengths, self.args.tokens_per_step)
        if state.global_step >= (
            self.args.max_steps if self.args.max_steps > 0 else math.ceil(self.args.num_train_epochs * epoch_steps)
        ):
            self._load_from_checkpoint(str(path))  # Trainer would take one step more
            self.state = state
            return None
        return super().train(str(path), trial, ignore_keys_for_eval)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and output_dir and self.args.should_save:
            (Path(output_dir) / COUNTS_FILE).write_text(json.dumps(self.counts))

    def _reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        if self.args.world_size > 1:
            dist.all_reduce(tensor, op)


class _Flow(TrainerCallback):
    """Epochs of the sampler, checkpoints by the clock, and the way out on a signal, agreed upon by all ranks."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer, self.saved, self.stopping = trainer, time.monotonic(), False

    def on_epoch_begin(self, args, state, control, **_: Any) -> None:
        # Trainer's own set_epoch misses a batch sampler that accelerate did not wrap, and a resumed epoch.
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **_: Any) -> None:
        t = self.trainer
        t.counts["seconds"] += time.monotonic() - t._step_began
        stop = t.stop is not None and t.stop.signal is not None
        due = args.save_minutes is not None and time.monotonic() - self.saved > args.save_minutes * 60
        flags = torch.tensor([stop, due], dtype=torch.int32, device=args.device)
        t._reduce(flags, dist.ReduceOp.MAX)
        self.stopping = bool(flags[0]) and not control.should_training_stop
        control.should_training_stop |= self.stopping
        control.should_save |= self.stopping or (bool(flags[1]) and not control.should_training_stop)

    def on_epoch_end(self, args, state, control, **_: Any) -> None:
        if self.stopping:
            control.should_evaluate = False

    def on_save(self, args, state, control, **_: Any) -> None:
        self.saved = time.monotonic()


class Report(TrainerCallback):
    """Steps, speed and losses for a person; the training loop's own dictionaries stay in its history."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer, self.fed = trainer, 0
        self.progress: Any = None

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        self.fed = self.trainer.counts["tokens_fed"]
        self.progress = Progress(sys.stderr, state.max_steps - state.global_step, "steps").__enter__()
        data, held, done = self.trainer.train_dataset, self.trainer.eval_dataset, state.global_step
        self.progress.say(
            f"{len(data)} traces to learn from, {len(held)} held out; {state.max_steps} steps of about "
            f"{args.tokens_per_step:,} tokens" + (f", {done} of them done" if done else "")
        )

    def on_log(self, args, state, control, **found: Any) -> None:
        if self.progress is not None and "loss" in found["logs"]:
            self.progress.what = f"steps, loss {found['logs']['loss']:.3f}"

    def on_step_end(self, args, state, control, **_: Any) -> None:
        fed = self.trainer.counts["tokens_fed"]
        self.progress.add(1, fed - self.fed)
        self.fed = fed

    def on_evaluate(self, args, state, control, **found: Any) -> None:
        metrics = found["metrics"]
        if self.progress is not None and metrics.get("eval_kl") is not None:
            self.progress.say(
                f"epoch {state.epoch:.2g}, step {state.global_step}: held-out KL {metrics['eval_kl']:.4f} nats a row, "
                f"top-1 {metrics['eval_top1']:.1%}"
            )

    def on_train_end(self, args, state, control, **_: Any) -> None:
        self.progress.__exit__(None, None, None)


def latest_checkpoint(run: Path) -> str | None:
    """The newest checkpoint that was written whole: its state is written after all else."""
    for path in sorted(run.glob("checkpoint-*"), key=_step, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
    return None


def drop_after(run: Path, whole: str | None) -> None:
    """Removes checkpoints that were cut short, so that the rotation never takes one for the newest."""
    for path in run.glob("checkpoint-*"):
        if whole is None or _step(path) > _step(Path(whole)):
            shutil.rmtree(path, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
