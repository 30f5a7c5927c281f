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
    """transformers' TrainingArguments with the options of distillation, and batches measured in tokens.

    divergence, tail, beta, alpha and temperature are those of `logitcache.kernels.fused_linear.linear_sparse_divergence`;
    beta and temperature have the names of TRL's.
    Raises: ValueError for values that do not go together.
    """

    tokens_per_batch: int = TrainOptions.tokens_per_batch  # on average, per device and micro-batch
    divergence: str = TrainOptions.divergence
    tail: str = TrainOptions.tail
    beta: float = BETA
    alpha: float = ALPHA
    temperature: float = TrainOptions.temperature
    ce_weight: float = TrainOptions.ce_weight  # of the cross-entropy with the sampled tokens
    section_weights: dict[str, float] | None = None  # of the loss, by section; 1 where a section has none
    shuffle_window: int | None = None  # shards that an epoch's order mixes at a time; None: all
    packing: bool | None = None  # None: where attention is flash or flex
    compile: bool = TrainOptions.compile  # torch.compile all but the head
    save_minutes: float | None = 10.0  # between checkpoints; None: save_strategy decides
    learning_rate: float = TrainOptions.learning_rate
    num_train_epochs: float = TrainOptions.epochs
    warmup_steps: float = 0.05  # of all steps
    lr_scheduler_type: SchedulerType | str = "cosine"
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False  # it would hide a non-finite loss, which must stop the run
    eval_strategy: IntervalStrategy | str = "epoch"
    save_strategy: SaveStrategy | str = "no"
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"
    disable_tqdm: bool | None = True
    log_level: str = "error"
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False  # all parameters are used in every batch, even in an empty one
    use_cache: bool = True  # in the saved config, for generation; training passes False itself
    seed: int = TrainOptions.seed
    accelerator_config: dict | str | None = field(default_factory=lambda: {"even_batches": False})

    def __post_init__(self) -> None:
        if self.metric_for_best_model and self.greater_is_better is None:
            # Trainer would take more for better in everything but a loss.
            self.greater_is_better = "top1" in self.metric_for_best_model
        super().__post_init__()
        for name in ("tokens_per_batch", "gradient_accumulation_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` {value}: give at least 1")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"`epochs` {self.num_train_epochs}: give a number above 0, or `max_steps`")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` {self.learning_rate}: give 0 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` {self.seed}: give 0 to {2**32 - 1}")
        if self.torch_compile:
            raise ValueError("torch_compile cannot compile the batches: use `compile`")
        if not 0 <= self.ce_weight < math.inf:
            raise ValueError(f"`ce_weight` {self.ce_weight}: give 0 or more")
        for name, weight in (self.section_weights or {}).items():
            if name not in SECTIONS or not 0 <= weight < math.inf:
                raise ValueError(f"`section_weights` {name}={weight}: give {', '.join(SECTIONS)} a number, 0 or more")
        Objective.of(**self.objective())

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """None instead of one: a warm-up of one step would be a step at learning rate 0."""
        return steps if (steps := super().get_warmup_steps(num_training_steps)) > 1 else 0

    def unused(self) -> set[str]:
        """Options that this divergence does not read."""
        return {"beta", "alpha"} - {DIVERGENCES[self.divergence].parameter}

    def objective(self) -> dict[str, Any]:
        """The options of the loss, as the kernels take them."""
        names = ("divergence", "tail", "beta", "alpha", "temperature")
        return {name: getattr(self, name) for name in names}

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks. With the seed and the caches it decides the traces of each step."""
        return self.tokens_per_batch * self.gradient_accumulation_steps * self.world_size


# Options that are fields of DistillConfig, with their names there.
_FIELDS = {"epochs": "num_train_epochs"} | {
    name: name for name in TrainOptions.__dataclass_fields__ if name in DistillConfig.__dataclass_fields__
}
# Fields that `set` must not change, and why.
_FIXED = {
    "output_dir": "use `out`",
    "per_device_train_batch_size": "use `tokens_per_batch`",
    "per_device_eval_batch_size": "use `tokens_per_batch`",
    "auto_find_batch_size": "use `tokens_per_batch`",
    "train_sampling_strategy": "use `seed`: the order is a function of it",
    "shuffle_window": "use `shuffle`",
    "dataloader_drop_last": "every trace is used",
    "label_smoothing_factor": "there are no labels to smooth",
    "remove_unused_columns": "it is always off",
    "average_tokens_across_devices": "it is always on",
    "bf16": "use `dtype`",
    "fp16": "use `dtype` bf16",
    "torch_compile": "use `compile`",
    "bf16_full_eval": "use `dtype`",
    "fp16_full_eval": "use `dtype`",
    "prediction_loss_only": "an evaluation makes no predictions",
    "eval_accumulation_steps": "an evaluation stores sums only",
    "batch_eval_metrics": "an evaluation stores sums only",
    "accelerator_config": "the trainer distributes batches itself",
    "save_only_model": "resuming needs the optimizer's state",
    "ignore_data_skip": "a resumed run continues with the traces it has not seen",
    "use_liger_kernel": "the head is fused already",
    "resume_from_checkpoint": "run the same command again, it resumes",
}
_LOADERS = 4  # DataLoader workers per rank on an accelerator


def wants_bf16(dtype: str | None) -> bool:
    """Whether to compute in bfloat16; None: on CUDA. Raises: StudentError for an unknown name."""
    if dtype not in (None, "bf16", "fp32"):
        raise StudentError(f"`dtype` {dtype!r}: choose bf16 or fp32")
    return dtype == "bf16" or (dtype is None and torch.cuda.is_available())


def configure(options: TrainOptions) -> DistillConfig:
    """The training arguments of a run.

    Raises: StudentError for an unknown option, with the nearest one, and for values that do not fit.
    """
    bf16 = wants_bf16(options.dtype)
    if options.max_steps is not None and options.max_steps < 1:
        raise StudentError(f"`max_steps` {options.max_steps}: give at least 1")
    if options.lora_alpha is not None and options.lora_rank is None:
        raise StudentError("`lora_alpha` is the scale of a LoRA adapter: give `lora_rank` too")
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
                raise ValueError(f"`divergence` {config.divergence} has no `{name}`; remove it")
        for tracker in get_reporting_integration_callbacks(config.report_to):
            tracker()  # raises for a missing package, before anything is written
        nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        if isinstance(config.lr_scheduler_kwargs, str):
            raise ValueError(f"lr_scheduler_kwargs={config.lr_scheduler_kwargs}: give a JSON object")
        get_scheduler(
            config.lr_scheduler_type, nothing, 1, 2, config.lr_scheduler_kwargs
        )  # raises for missing arguments
        return config
    except (ValueError, TypeError, RuntimeError, ImportError) as e:
        raise StudentError(f"training arguments: {' '.join(str(e).split())}") from e


def _parse(name: str, value: Any) -> Any:
    """The value of a DistillConfig field, converted to the field's type from text or from a JSON value."""
    kinds = {f.name: f.type for f in fields(DistillConfig) if f.init}
    if name in _FIXED:
        raise StudentError(f"`set` {name} cannot be changed: {_FIXED[name]}")
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)[0]
        raise StudentError(f"`set` {name}: unknown training argument, did you mean {near!r}?")
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
