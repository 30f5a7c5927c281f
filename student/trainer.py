"""Training a student from a cache: a transformers Trainer with an exact loss, and the run around it.

The loss of an optimiser step is the sum over its taught rows, on all ranks and in all accumulated batches, by their
number.
"""

import contextlib
import difflib
import enum
import hashlib
import json
import math
import platform
import shutil
import sys
import time
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PrinterCallback,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

import logitcache
from logitcache.cache import Cache
from logitcache.console import Progress
from logitcache.errors import StudentError, TrainingError, WriteError
from logitcache.files import exclusive, publish
from logitcache.generate import Stop
from logitcache.student.data import Batch, StepSampler, TraceDataset, collate, count_steps, split
from logitcache.student.evaluate import evaluate
from logitcache.student.model import find_head, lesson_loss, load_student
from logitcache.student.views import SECTIONS, View

RUN_FILE, COUNTS_FILE = "run.json", "counts.json"


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
                _drop_after(Path(self.args.output_dir or "."), resume_from_checkpoint)
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


class _Report(TrainerCallback):
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


@dataclass(frozen=True)
class TrainOptions:
    """One call of ``logitcache train``. None takes the default of DistillConfig, or what `dtype` says."""

    cache: Path
    student: str
    out: Path
    view: str = "full"
    sections: tuple[str, ...] = tuple(SECTIONS)
    held_out: float = 0.05
    dtype: str | None = None  # "bf16": float32 weights under bfloat16 autocast; "fp32"; None: bf16 on CUDA
    tokens_per_batch: int | None = None
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    set: dict[str, Any] = field(default_factory=dict)  # any other field of DistillConfig


# Fields that `--set` must not touch, and what to use instead.
_FIXED = {
    "output_dir": "--out",
    "per_device_train_batch_size": "tokens_per_batch",
    "per_device_eval_batch_size": "tokens_per_batch",
    "auto_find_batch_size": "tokens_per_batch",
    "train_sampling_strategy": "seed: the order is a function of it",
    "dataloader_drop_last": "tokens_per_batch: every trace is used",
    "label_smoothing_factor": "nothing: there are no labels to smooth",
    "remove_unused_columns": "nothing",
    "average_tokens_across_devices": "nothing: they are, always",
    "bf16": "--dtype",
    "fp16": "--dtype bf16",
    "resume_from_checkpoint": "the same command again: it resumes",
}
# Fields that do not change the weights a run ends with: a run may be taken up with others.
_FREE = {"save_minutes", "tokens_per_batch", "gradient_accumulation_steps", "gradient_checkpointing"}
_FREE_PREFIXES = ("dataloader_", "logging_", "log_", "save_", "eval_", "ddp_", "report_to", "run_name", "disable_tqdm")


def train(options: TrainOptions) -> dict[str, Any]:
    """Trains `options.student` from a cache into the directory `options.out`, or goes on where an earlier call stopped.

    OUT then holds the model with its tokenizer, `run.json` (what was done, and how the student stood before and after)
    and checkpoints while it lasts. Works under torchrun.
    Returns: what run.json holds, its "status" "finished" or, after Ctrl-C or SIGTERM, "stopped" with the "signal";
        "again" is true where nothing was left to do.
    Raises: StudentError for a student, an option or an OUT that will not do; CacheError; TrainingError.
    """
    with _quiet():
        return _train(options)


def _train(options: TrainOptions) -> dict[str, Any]:
    cache, view, config = Cache.open(options.cache), View(options.view, tuple(options.sections)), configure(options)
    taught, held = split(cache.prompt_ids, options.held_out)
    wanted = _record(options, config, cache)
    before = _claim(options.out, wanted)
    if before.get("status") == "finished":
        return before | {"again": True}
    student, tokenizer = load_student(options.student, cache.identity)
    vocab = find_head(student).module.weight.shape[0]
    data, held_data = TraceDataset(cache, taught, view, vocab), TraceDataset(cache, held, view, vocab)
    for side, name in ((data, "training"), (held_data, "held-out")):
        if not any(len(side[i].positions) for i in range(len(side))):
            raise StudentError(
                f"{options.cache}: no {name} trace has rows of {', '.join(view.sections)}; teach other sections, or "
                "generate with --prompt-logits for those of the prompt"
            )

    main = config.process_index == 0
    with contextlib.ExitStack() as stack:
        if main:
            options.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(options.out / ".lock", str(options.out)))
        trainer = DistillTrainer(student, config, data, eval_dataset=held_data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Report(trainer)) if main else None
        run = {"status": "running", **wanted, "eval_before": before.get("eval_before"), "versions": _versions()}
        if run["eval_before"] is None:
            trainer.evaluate()
            run["eval_before"] = trainer.last_evaluation[1]
        trainer.stop = stop = stack.enter_context(Stop())
        stop.patient = True
        if main:
            _publish(options.out, run)
        _fit(trainer)
        run |= trainer.counts | {"steps": trainer.state.global_step}
        run["tokens_per_second"] = run["tokens_fed"] / max(run["seconds"], 1e-9)
        if trainer.state.global_step < trainer.state.max_steps:
            return run | {"status": "stopped", "signal": stop.signal}
        stop.patient = False
        if trainer.last_evaluation[0] != trainer.state.global_step:
            trainer.evaluate()
        run |= {"status": "finished", "eval_after": trainer.last_evaluation[1], "history": trainer.state.log_history}
        trainer.save_model()
        if main:
            _publish(options.out, run)
    return run


def _fit(trainer: DistillTrainer) -> None:
    """Trains on; what the machine lacks becomes one line."""
    try:
        trainer.train(resume_from_checkpoint=True)
    except torch.OutOfMemoryError as e:
        raise TrainingError(
            f"out of memory with {trainer.args.tokens_per_batch} tokens a batch; lower --tokens-per-batch, or "
            "--set gradient_checkpointing=true, and run the same command again"
        ) from e
    except (OSError, SafetensorError) as e:
        raise WriteError(
            f"{trainer.args.output_dir}: {e}; the checkpoint before is whole: mend that and run the same command again"
        ) from e


def configure(options: TrainOptions) -> DistillConfig:
    """Raises: StudentError for an option that does not exist or does not fit, with the nearest good one."""
    if options.dtype not in (None, "bf16", "fp32"):
        raise StudentError(f"--dtype {options.dtype!r}: choose bf16 or fp32")
    accelerator = torch.accelerator.is_available()
    given = {
        "tokens_per_batch": options.tokens_per_batch,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    given |= {
        "bf16": options.dtype == "bf16" or (options.dtype is None and torch.cuda.is_available()),
        "use_cpu": not accelerator,
        "dataloader_pin_memory": accelerator,
    }
    given |= {name: _parse(name, value) for name, value in options.set.items()}
    try:
        return DistillConfig(output_dir=str(options.out), **given)
    except ValueError as e:
        raise StudentError(f"training arguments: {' '.join(str(e).split())}") from e


def _parse(name: str, value: Any) -> Any:
    """The value of a DistillConfig field as the field's type reads it, from text or from what JSON made of it."""
    kinds = {f.name: f.type for f in fields(DistillConfig) if f.init}
    if name in _FIXED:
        raise StudentError(f"--set {name}: this is not yours to set; use {_FIXED[name]}")
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)[0]
        raise StudentError(f"--set {name}: there is no such training argument; did you mean {near!r}?")
    text = value if isinstance(value, str) else json.dumps(value)
    kind = kinds[name]
    options = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    if text.lower() in ("none", "null") and (type(None) in options):
        return None
    for option in options:
        base = typing.get_origin(option) or option
        with contextlib.suppress(ValueError):
            if base is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if base in (int, float):
                return base(text)
            if base in (dict, list) and isinstance(found := json.loads(text), base):
                return found
            if isinstance(base, type) and issubclass(base, enum.Enum):
                return base(text)
    choices = [m.value for o in options if isinstance(o, type) and issubclass(o, enum.Enum) for m in o]
    if choices:
        near = difflib.get_close_matches(text, choices, n=1, cutoff=0.0)[0]
        raise StudentError(f"--set {name}={text}: did you mean {near!r}? All: {', '.join(choices)}")
    if str in options:
        return text
    raise StudentError(f"--set {name}={text}: expected {getattr(kind, '__name__', kind)}")


def _record(options: TrainOptions, config: DistillConfig, cache: Cache) -> dict[str, Any]:
    """All that decides the weights a run ends with, in the order in which a difference is named."""
    traces = hashlib.blake2b("\n".join(sorted(cache.trace_ids)).encode(), digest_size=16).hexdigest()
    student = Path(options.student)
    loose = [n for n in options.set if n in _FREE or n.startswith(_FREE_PREFIXES)]
    return {
        "cache": cache.identity.__dict__,
        "traces": {"count": len(cache), "digest": traces},
        "student": str(student.resolve() if student.exists() else options.student),
        "view": options.view,
        "sections": list(options.sections),
        "held_out": options.held_out,
        "bf16": config.bf16,
        "tokens_per_step": config.tokens_per_step,
        "epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "set": {n: v for n, v in options.set.items() if n not in loose},
    }


def _claim(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What run.json of `out` holds, {} for a new run.

    Raises: StudentError for a directory of other things, and for a run made otherwise, naming the difference.
    """
    path = out / RUN_FILE
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(p.name != ".lock" for p in out.iterdir())):
            raise StudentError(f"{out} exists and is not a run; give --out an empty or a new directory")
        return {}
    found = json.loads(path.read_text())
    for name, here in json.loads(json.dumps(wanted, default=str)).items():
        there = found.get(name)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            key = next(k for k in [*there, *here] if there.get(k) != here.get(k))
            name, there, here = f"{name}.{key}", there.get(key), here.get(key)
        raise StudentError(
            f"{out} was made with {name} = {there!r}, this run has {here!r}; set it as it was, or give --out a new "
            "directory"
        )
    return found


def latest_checkpoint(run: Path) -> str | None:
    """The newest checkpoint that was written whole: its state is written after all else."""
    for path in sorted(run.glob("checkpoint-*"), key=_step, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
    return None


def _drop_after(run: Path, whole: str | None) -> None:
    """Removes checkpoints that were cut short, so that the rotation never takes one for the newest."""
    for path in run.glob("checkpoint-*"):
        if whole is None or _step(path) > _step(Path(whole)):
            shutil.rmtree(path, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _publish(out: Path, run: dict[str, Any]) -> None:
    publish(out / RUN_FILE, json.dumps(run, indent=1, default=str).encode())


def _versions() -> dict[str, str]:
    return {
        "logitcache": logitcache.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' log lines and bars; errors pass."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar() if bars else None
