"""LoRA adapters, by peft: training one, and loading a student that has one."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from logitcache.errors import StudentError, first_line
from logitcache.student.model.head import find_head


def adapter_base(model: str | Path) -> str | None:
    """The base model of a folder with a LoRA adapter; None for a folder without one."""
    path = Path(model) / "adapter_config.json"
    try:
        return json.loads(path.read_text())["base_model_name_or_path"] if path.exists() else None
    except (ValueError, TypeError, KeyError) as e:
        raise StudentError(f"{path} is not an adapter_config.json of peft: {first_line(e)}") from e


def import_peft(what: str | Path) -> Any:
    try:
        import peft
    except ImportError as e:
        raise StudentError(f"{what} needs peft: `pip install 'logitcache[lora]'`") from e
    return peft


def add_lora(
    student: PreTrainedModel, rank: int, alpha: float | None = None, targets: str | list[str] | None = None
) -> Any:
    """The student as a peft model that trains only an adapter.

    Args:
        alpha: scale; None: twice the rank. targets: peft's target_modules; None: all linear layers but the head.
    Raises: StudentError for arguments that peft refuses, and for an adapter on the head.
    """
    peft = import_peft("`lora_rank`")
    try:
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=targets or "all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        adapted = peft.get_peft_model(student, config)
    except ValueError as e:
        raise StudentError(f"`lora_rank` {rank}: {first_line(e)}") from e
    find_head(student)
    return adapted
