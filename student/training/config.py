"""What a run is set to: transformers' TrainingArguments and what a student needs besides."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from logitcache.kernels.divergences import DIVERGENCES
from logitcache.kernels.objective import Objective
from logitcache.sections import SECTIONS


@dataclass
class DistillConfig(TrainingArguments):
    """TrainingArguments with what a student needs, and defaults that suit it. Batches are measured in tokens.

    beta and temperature are TRL's; alpha is the skew of the skewed divergences. All as
    `logitcache.kernels.linear_sparse_divergence` has them.
    Raises: ValueError for values that do not go together.
    """

    tokens_per_batch: int = field(default=4096, metadata={"help": "Tokens a device is fed at a time, about."})
    divergence: str = "forward_kl"
    tail: str = "bucket"
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    ce_weight: float = field(default=0.0, metadata={"help": "Of the cross-entropy with the realised tokens."})
    section_weights: dict[str, float] | None = field(
        default=None, metadata={"help": "Of the loss in prompt, reasoning and answer; 1 where none is given."}
    )
    packing: bool | None = field(
        default=None, metadata={"help": "Feed traces behind one another. None: where attention is flash or flex."}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile all but the head."})
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
    ddp_find_unused_parameters: bool | None = False  # all are used in every batch, an empty one too
    use_cache: bool = True  # of the saved config, for those who generate with it; training passes False itself
    seed: int = 0
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
