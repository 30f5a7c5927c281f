"""The settings of a run: transformers' TrainingArguments and what distillation adds to them."""

import contextlib
import difflib
import enum
import json
import math
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy

from logitcache.errors import StudentError
from logitcache.kernels.divergences import ALPHA, BETA, DIVERGENCES
from logitcache.kernels.objective import Objective
from logitcache.sections import SECTIONS
from logitcache.student.training.options import TrainOptions


@dataclass
class DistillConfig(TrainingArguments):
    """TrainingArguments with what a student needs, and defaults that suit it. Batches are measured in tokens.

    beta and temperature are TRL's; alpha is the skew of the skewed divergences. All as
    `logitcache.kernels.linear_sparse_divergence` has them.
    Raises: ValueError for values that do not go together.
    """

    tokens_per_batch: int = TrainOptions.tokens_per_batch  # on average, per device and micro-batch
    divergence: str = TrainOptions.divergence
    tail: str = TrainOptions.tail
    beta: float = BETA
    alpha: float = ALPHA
    temperature: float = TrainOptions.temperature
    ce_weight: float = TrainOptions.ce_weight  # of the cross-entropy with the sampled tokens
    section_weights: dict[str, float] | None = (
        None  # of the loss in prompt, reasoning and answer; 1 where none is given
    )
    packing: bool | None = None  # None: where attention is flash or flex
    compile: bool = TrainOptions.compile  # torch.compile all but the head
    save_minutes: float | None = 10.0  # between checkpoints; None: save_strategy decides
    learning_rate: float = TrainOptions.learning_rate
    num_train_epochs: float = TrainOptions.epochs
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
    ddp_find_unused_parameters: bool | None = False  # all are used in every batch, an empty one too
    use_cache: bool = True  # of the saved config, for those who generate with it; training passes False itself
    seed: int = TrainOptions.seed
    accelerator_config: dict | str | None = field(default_factory=lambda: {"even_batches": False})

    def __post_init__(self) -> None:
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better = (
                "top1" in self.metric_for_best_model
            )  # Trainer takes more of all but a loss for better
        super().__post_init__()
        if self.tokens_per_batch < 1 or self.gradient_accumulation_steps < 1:
            raise ValueError("tokens_per_batch and gradient_accumulation_steps must be at least 1")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}: give more than 0, or max_steps")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}: give 0 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: give 0 to {2**32 - 1}")
        if self.torch_compile:
            raise ValueError("torch_compile would compile the batches' names along: use compile")
        if not 0 <= self.ce_weight < math.inf:
            raise ValueError(f"ce_weight is {self.ce_weight}: give 0 or more")
        for name, weight in (self.section_weights or {}).items():
            if name not in SECTIONS or not 0 <= weight < math.inf:
                raise ValueError(f"section weight {name}={weight}: give {', '.join(SECTIONS)} numbers from 0 on")
        Objective.of(**self.objective())

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """A warm-up of one step would be a step at rate 0, and nothing else."""
        return steps if (steps := super().get_warmup_steps(num_training_steps)) > 1 else 0

    def unused(self) -> set[str]:
        """Options of an objective that this divergence does not read."""
        return {"beta", "alpha"} - {DIVERGENCES[self.divergence].parameter}

    def objective(self) -> dict[str, Any]:
        names = ("divergence", "tail", "beta", "alpha", "temperature")
        return {name: getattr(self, name) for name in names}

    @property
    def tokens_per_step(self) -> int:
        """Of an optimiser step over all ranks: with the seed and the cache, all that its traces depend on."""
        return self.tokens_per_batch * self.gradient_accumulation_steps * self.world_size


# Options that are fields of DistillConfig, with their names there.
_FIELDS = {"epochs": "num_train_epochs"} | {
    name: name for name in TrainOptions.__dataclass_fields__ if name in DistillConfig.__dataclass_fields__
}
# Fields that `--set` must not touch, and what to use instead.
_FIXED = {
    "output_dir": "`out`",
    "per_device_train_batch_size": "`tokens_per_batch`",
    "per_device_eval_batch_size": "`tokens_per_batch`",
    "auto_find_batch_size": "`tokens_per_batch`",
    "train_sampling_strategy": "`seed`: the order is a function of it",
    "dataloader_drop_last": "`tokens_per_batch`: every trace is used",
    "label_smoothing_factor": "nothing: there are no labels to smooth",
    "remove_unused_columns": "nothing",
    "average_tokens_across_devices": "nothing: they are, always",
    "bf16": "`dtype`",
    "fp16": "`dtype` bf16",
    "torch_compile": "`compile`",
    "bf16_full_eval": "`dtype`",
    "fp16_full_eval": "`dtype`",
    "prediction_loss_only": "nothing: an evaluation measures, and predicts nothing",
    "eval_accumulation_steps": "nothing: an evaluation keeps sums alone",
    "batch_eval_metrics": "nothing: an evaluation keeps sums alone",
    "accelerator_config": "nothing: batches are dealt out by the trainer",
    "save_only_model": "nothing: a run goes on with its optimiser",
    "ignore_data_skip": "nothing: a run goes on with the traces it has not met",
    "use_liger_kernel": "nothing: the head is fused already",
    "resume_from_checkpoint": "the same command again: it resumes",
}
_LOADERS = 4  # processes that read and decode ahead of a step on an accelerator


def wants_bf16(dtype: str | None) -> bool:
    """Whether to compute in bfloat16; None: on CUDA. Raises: StudentError for another name."""
    if dtype not in (None, "bf16", "fp32"):
        raise StudentError(f"`dtype` {dtype!r}: choose bf16 or fp32")
    return dtype == "bf16" or (dtype is None and torch.cuda.is_available())


def configure(options: TrainOptions) -> DistillConfig:
    """Raises: StudentError for an option that does not exist or does not fit, with the nearest good one."""
    bf16 = wants_bf16(options.dtype)
    if options.max_steps is not None and options.max_steps < 1:
        raise StudentError(f"`max_steps` {options.max_steps}: give at least 1")
    if options.lora_alpha is not None and options.lora_rank is None:
        raise StudentError("`lora_alpha` scales an adapter: give `lora_rank` too")
    accelerator = torch.accelerator.is_available()
    given = {there: value for here, there in _FIELDS.items() if (value := getattr(options, here)) not in (None, (), {})}
    given |= {"report_to": list(options.report_to)} if options.report_to else {}
    given |= {
        "bf16": bf16,
        "use_cpu": not accelerator,
        "dataloader_pin_memory": accelerator,
        "dataloader_num_workers": _LOADERS if accelerator else 0,
        "dataloader_persistent_workers": accelerator,
    }
    given |= {name: _parse(name, value) for name, value in options.set.items()}
    given["dataloader_persistent_workers"] &= given["dataloader_num_workers"] > 0
    try:
        config = DistillConfig(output_dir=str(options.out), **given)
        for name in sorted(config.unused()):
            if getattr(options, name) is not None:
                raise ValueError(f"{config.divergence} has no {name}: leave it out")
        for tracker in get_reporting_integration_callbacks(config.report_to):
            tracker()  # says what is missing, before anything is written
        nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        assert not isinstance(config.lr_scheduler_kwargs, str)
        get_scheduler(config.lr_scheduler_type, nothing, 1, 2, config.lr_scheduler_kwargs)  # so does a schedule
        return config
    except (ValueError, TypeError, RuntimeError, ImportError) as e:
        raise StudentError(f"training arguments: {' '.join(str(e).split())}") from e


def _parse(name: str, value: Any) -> Any:
    """The value of a DistillConfig field as the field's type reads it, from text or from what JSON made of it."""
    kinds = {f.name: f.type for f in fields(DistillConfig) if f.init}
    if name in _FIXED:
        raise StudentError(f"`set` {name}: this is not yours to set; use {_FIXED[name]}")
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)[0]
        raise StudentError(f"`set` {name}: there is no such training argument; did you mean {near!r}?")
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
        raise StudentError(f"`set` {name}={text}: did you mean {near!r}? All: {', '.join(choices)}")
    if str in options:
        return text
    raise StudentError(f"`set` {name}={text}: expected {getattr(kind, '__name__', kind)}")
