"""What one call of `logitcache train` is given, and the training arguments that come of it."""

import contextlib
import difflib
import enum
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from logitcache.errors import StudentError
from logitcache.sections import SECTIONS
from logitcache.student.training.config import DistillConfig


@dataclass(frozen=True)
class TrainOptions:
    """One call of ``logitcache train``. None takes the default of DistillConfig, or what the comment says."""

    cache: (
        Path | Sequence[Path] | Mapping[Path, float]
    )  # several: each trace once; with shares of the tokens: a mixture
    student: str
    out: Path
    view: str = "full"
    sections: tuple[str, ...] = tuple(SECTIONS)
    where: str | None = (
        None  # which traces to learn from, as logitcache.cache.filters reads it; those held out are not chosen
    )
    top_k: int | None = None  # None: all that the cache keeps
    held_out: float = 0.05
    dtype: str | None = None  # "bf16": float32 weights under bfloat16 autocast; "fp32"; None: bf16 on CUDA
    attention: str | None = None  # transformers' attn_implementation
    lora_rank: int | None = None  # None: all weights learn
    lora_alpha: float | None = None  # None: twice the rank
    tokens_per_batch: int | None = None
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    divergence: str | None = None
    tail: str | None = None
    beta: float | None = None
    alpha: float | None = None
    temperature: float | None = None
    ce_weight: float | None = None
    section_weights: dict[str, float] | None = None
    gradient_checkpointing: bool | None = None
    packing: bool | None = None
    compile: bool | None = None
    report_to: str | list[str] | None = None
    set: dict[str, Any] = field(default_factory=dict)  # any other field of DistillConfig

    @property
    def given_caches(self) -> list[Path]:
        """As they were given, one that was given twice as well."""
        return [Path(path) for path in ([self.cache] if isinstance(self.cache, str | Path) else self.cache)]

    @property
    def caches(self) -> dict[Path, float | None]:
        """Each cache, with its share of the tokens where they are mixed."""
        if isinstance(self.cache, Mapping):
            return {Path(path): share for path, share in self.cache.items()}
        return dict.fromkeys(self.given_caches)


# Options that are fields of DistillConfig, by their names there.
_FIELDS = {"epochs": "num_train_epochs"} | {
    name: name
    for name in (
        "tokens_per_batch", "max_steps", "learning_rate", "seed", "divergence", "tail", "beta", "alpha", "temperature",
        "ce_weight", "section_weights", "gradient_checkpointing", "packing", "compile", "report_to",
    )
}  # fmt: skip
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
    given = {there: value for here, there in _FIELDS.items() if (value := getattr(options, here)) is not None}
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
