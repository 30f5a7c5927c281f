"""A transformers Trainer whose loss is the divergence from a cache's rows, exact on any number of ranks.

The loss of an optimizer step is the mean over its supervised positions, on all ranks and in all accumulated batches.
"""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import IntervalStrategy, PreTrainedModel, TrainerCallback, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback

from logitcache.errors import StudentError, TrainingError
from logitcache.runtime.console import Stop
from logitcache.sections import SECTIONS
from logitcache.student.data.collate import Batch, collate, loader
from logitcache.student.data.dataset import ExampleSource, Mixture, TraceDataset
from logitcache.student.data.sampler import StepSampler
from logitcache.student.model.head import PORTABLE_ATTENTION, attach_head, causal_model, check_packing
from logitcache.student.model.measures import Evaluation
from logitcache.student.model.metrics import evaluate
from logitcache.student.training.checkpoint_files import SPENT_FILE, STATE_FILE
from logitcache.student.training.config import DistillConfig
from logitcache.student.training.flops import count_flops
from logitcache.student.training.run_record import Counts, Spent
from logitcache.student.training.saving import SafeTrainer
from logitcache.student.training.timers import Costs


class DistillTrainer(SafeTrainer):
    """A Trainer that distils from caches. Its loss is the divergence from the cached rows.

    It takes Trainer's arguments. `train_dataset` and `eval_dataset` are TraceDatasets or Mixtures of them; the model is a
    causal model of transformers, or peft's wrapper of one. Evaluation logs eval_kl, eval_top1, eval_ece and eval_rows.
    """

    args: DistillConfig
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, model: PreTrainedModel, args: DistillConfig, train_dataset: ExampleSource, **options: Any):
        if options.get("eval_dataset") is None:
            args.eval_strategy = IntervalStrategy.NO
        if args.n_gpu > 1:  # no DataParallel: one process per device, started by torchrun
            args._n_gpu = 1
        self.head = attach_head(model, **args.objective())
        causal = causal_model(model)
        _check_sampled(train_dataset, args.tail)
        self._fit_to_head(train_dataset)
        self.packed = bool(args.packing)
        if args.packing:
            check_packing(causal)
        elif args.packing is None and (causal.config._attn_implementation or "eager") not in PORTABLE_ATTENTION:
            with contextlib.suppress(StudentError):  # padded rows are exact for any model
                check_packing(causal)
                self.packed = True
        if args.gradient_checkpointing:  # Trainer does this too, but only after FLOPs are counted here
            causal.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=cast(Any, collate), **options
        )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if args.bf16 and plugin is not None and plugin.fsdp_version == 2:
            # accelerate's default would cast the teacher's rows and the loss to bfloat16, and sum gradients in it.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        if args.compile:
            causal.base_model.compile(dynamic=True)
        if self.is_deepspeed_enabled:
            _register_head(model, self.head.module)
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self.flop_counts = count_flops(model, training=True)
        self.costs = Costs(args.device)
        self.counts = Counts()
        self.stop: Stop | None = None
        self.last_evaluation: tuple[int | None, Evaluation | None] = (
            None,
            None,
        )  # the last step evaluated, and the result
        self._step_losses: list[tuple[Tensor, list[str]]] = []  # loss and trace ids of each of the step's batches
        self.add_callback(_Schedule(self))
        for callback in self.callback_handler.callbacks:
            # It sets its folder when training begins, but an evaluation may log earlier.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(Path(args.output_dir or ".") / "tensorboard")

    def _fit_to_head(self, data: ExampleSource) -> None:
        """Stored ids without a row in the head join the tail."""
        for part in data.parts:
            part.vocab = part.vocab or self.head.module.weight.shape[0]

    def make_sampler(self) -> StepSampler:
        return StepSampler(
            self.train_dataset.pool,
            self.args.tokens_per_batch,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world=self.args.world_size,
            window=self.args.shuffle_window,
        )

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate, which would distribute batches over ranks: the sampler does that.
        self.sampler = self.make_sampler()
        return loader(
            self.train_dataset,
            self.sampler,
            self.packed,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """The step's micro-batches, and the number of supervised positions of the step over all ranks."""
        self.costs.switch("data")
        samples: list[Batch] = list(itertools.islice(epoch_iterator, num_batches))
        self.costs.switch("other")
        tokens, supervised = sum(b.tokens for b in samples), sum(len(b.supervised) for b in samples)
        flops = sum(self.flop_counts.total(b.shapes, len(b.supervised)) for b in samples)
        counts = torch.tensor([tokens, supervised, flops], device=device)
        self._reduce(counts)
        self.counts += Counts(*counts.tolist())
        return samples, counts[1].clamp(min=1)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """To the device, with unchanged dtypes: Trainer's own casts the teacher's rows under DeepSpeed."""
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Trainer's own cannot read a Batch; `get_batch_samples` counts."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Likewise."""

    def training_step(self, *inputs: Any, **named: Any) -> Tensor:
        with self.costs.time("backward"):  # except the forward, which is timed inside
            return super().training_step(*inputs, **named)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's sum, divided by the step's supervised positions; times the ranks, since DDP averages gradients."""
        with self.costs.time("forward"):
            loss = model(distill=self._weighted(inputs))
        self._step_losses.append((loss.detach(), inputs.trace_ids))
        rows = len(inputs.supervised) if num_items_in_batch is None else num_items_in_batch
        loss = loss * (self.args.world_size / max(rows, 1))
        return (loss, None) if return_outputs else loss

    def _weighted(self, batch: Batch) -> Batch:
        """The batch, its weights multiplied by those of the configuration."""
        kd, ce = batch.kd, batch.ce
        if self.args.ce_weight:
            ce = self.args.ce_weight * (kd > 0) + (0 if ce is None else ce)
        if self.args.section_weights:
            weight_S = kd.new_tensor([self.args.section_weights.get(name, 1.0) for name in SECTIONS])
            weight_N = weight_S[batch.sections]
            kd, ce = kd * weight_N, None if ce is None else ce * weight_N
        return replace(batch, kd=kd, ce=ce)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer calls this before the weights change.

        Raises: TrainingError with the trace ids of a step whose loss or gradient is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        good = torch.isfinite(torch.stack([loss.float() for loss, _ in self._step_losses]))
        overflown = torch.tensor(norm is not None and not math.isfinite(norm), device=good.device)
        found = torch.stack([~good.all(), overflown]).int()
        self._reduce(found)
        mine = [traces for (_, traces), fine in zip(self._step_losses, good.tolist(), strict=True) if not fine]
        everyone = [traces for _, traces in self._step_losses]
        self._step_losses.clear()
        if found.any():
            names = ", ".join(name for names in (mine if found[0] else everyone) for name in names)
            where = f"in a batch of traces {names}" if names else "in a batch of another process"
            raise TrainingError(
                f"non-finite {'loss' if found[0] else 'gradient'} at step {self.state.global_step + 1}, {where}; lower "
                "`learning_rate`, or use `dtype` fp32"
            )
        return norm

    def log(self, logs: dict[str, float], *inputs: Any, **named: Any) -> None:
        """Adds the counts so far to a loss, as x axes for comparing runs."""
        if "loss" in logs:
            logs = logs | self.counts.to_json() | {"seconds": sum(self.costs.seconds.values())}
        super().log(logs, *inputs, **named)

    def spent(self) -> Spent:
        """What training has cost so far."""
        return Spent(self.counts, self.costs.seconds, self.costs.peak_memory)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        began = time.monotonic()
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(data, TraceDataset | Mixture):
            raise ValueError(f"eval_dataset is a {type(data).__name__}: give a TraceDataset or a Mixture")
        self._fit_to_head(data)
        # A model that FSDP or DeepSpeed will shard is not on the device before training begins.
        parked = self.model.device if self.model.device.type != self.args.device.type else None
        if parked is not None:
            self.model.to(self.args.device)
        with self.costs.other_memory():
            found = evaluate(
                self.model,
                data,
                measure=lambda batch: self.model(distill=batch, metrics=True),
                tokens_per_batch=self.args.tokens_per_batch,
                autocast=torch.bfloat16 if self.args.bf16 else None,
            )
        if parked is not None:
            self.model.to(parked)
        self.last_evaluation = (self.state.global_step, found)
        metrics = {"loss": found.kl, "kl": found.kl, "top1": found.top1, "ece": found.ece, "rows": found.rows}
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.monotonic() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As Trainer.train. True: resume from the newest undamaged checkpoint in the output folder, if there is one.

        Raises: TrainingError if there are checkpoints, but all are damaged, or if the given one is.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.newest_checkpoint()
        if not resume_from_checkpoint:
            return super().train(None, trial, ignore_keys_for_eval)
        path = Path(resume_from_checkpoint)
        if (path / SPENT_FILE).exists():
            spent = Spent.from_json(json.loads((path / SPENT_FILE).read_text()))
            self.counts = spent.counts
            self.costs.resume(spent.seconds, spent.peak_memory)
        state = TrainerState.load_from_json(str(path / STATE_FILE))
        if state.global_step >= (
            self.args.max_steps
            if self.args.max_steps > 0
            else math.ceil(self.args.num_train_epochs * self.make_sampler().steps)
        ):
            self._load_from_checkpoint(str(path))  # Trainer would make one more step
            self.state = state
            return None
        return super().train(str(path), trial, ignore_keys_for_eval)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and output_dir:
            with self.writing(Path(output_dir)):
                if self.args.should_save:
                    (Path(output_dir) / SPENT_FILE).write_text(json.dumps(self.spent().to_json()))

    def _reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        if self.args.world_size > 1:
            dist.all_reduce(tensor, op)


def _check_sampled(data: ExampleSource, tail: str) -> None:
    """Raises: StudentError for tail `sampled` with tokens that the teacher did not sample at temperature 1."""
    for part in data.parts if tail == "sampled" else []:
        identity, sections = part.cache.identity, getattr(part.view, "sections", ())
        what = identity.sampled_otherwise
        if what is None and identity.prompt_logits and "prompt" in sections:
            what = "prompts were not sampled: remove prompt from `sections`"
        if what:
            raise StudentError(
                f"`tail` sampled: {part.cache.location}: {what}; it needs tokens sampled at temperature 1 without filters: use "
                "`tail` bucket"
            )


def _register_head(model: PreTrainedModel, head: nn.Module) -> None:
    """ZeRO-3 gathers a weight for its own module's forward, but the head's is used in the model's."""
    from deepspeed.runtime.zero import register_external_parameter  # pyright: ignore[reportMissingImports]

    for weight in head.parameters(recurse=False):
        register_external_parameter(model, weight)


class _Schedule(TrainerCallback):
    """The sampler's epochs, checkpoints by time, and the stop on a signal, all ranks in agreement."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer, self.saved, self.stopping = trainer, time.monotonic(), False

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        # A run that was stopped at the end of an epoch has no evaluation there.
        ended = state.global_step and state.global_step % self.trainer.make_sampler().steps == 0
        measured = {entry["step"] for entry in state.log_history if "eval_kl" in entry}
        if ended and args.eval_strategy == IntervalStrategy.EPOCH and state.global_step not in measured:
            self.trainer.evaluate()

    def on_epoch_begin(self, args, state, control, **_: Any) -> None:
        # Trainer does not call set_epoch of a batch sampler that accelerate has not wrapped, nor in a resumed epoch.
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, **_: Any) -> None:
        self.trainer.costs.switch("optimizer")

    def on_optimizer_step(self, args, state, control, **_: Any) -> None:
        self.trainer.costs.switch("other")

    def on_step_end(self, args, state, control, **_: Any) -> None:
        t = self.trainer
        t.costs.stop()
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
