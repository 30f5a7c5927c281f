"""Loading a student and checking that it fits a cache."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logitcache.errors import StudentError, first_line
from logitcache.identity import Identity, tokenizer_hash
from logitcache.student.model.head import find_head
from logitcache.student.model.lora import adapter_base, import_peft


def load_student(
    model: str | Path, identity: Identity, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a student and its tokenizer, and checks that it fits the cache.

    A folder with a LoRA adapter, as a run with `lora_rank` writes it, gives the base model with the adapter merged.

    Args:
        identity: of the cache. attention: transformers' attn_implementation; None: the model's default.
    Raises: StudentError for a model that is missing, incomplete or not causal, or has another tokenizer or too few rows.
    """
    base = adapter_base(model)
    student = _load(base or model, dtype, attention)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as e:
        raise StudentError(f"{model} has no tokenizer that transformers can load: {first_line(e)}") from e
    if base:
        try:
            student = import_peft(model).PeftModel.from_pretrained(student, model).merge_and_unload().requires_grad_()
        except (ValueError, RuntimeError, OSError, SafetensorError) as e:
            raise StudentError(f"{model} has an adapter that does not fit {base}: {first_line(e)}") from e
    check_vocabulary(student, tokenizer, identity)
    find_head(student)
    return student, tokenizer


def _load(model: str | Path, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    if str(model).startswith(("/", ".", "~")) and not Path(model).exists():
        raise StudentError(f"{model} does not exist: give `student` a model folder or a hub id")
    try:
        config = AutoConfig.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise StudentError(f"{model} is not a causal language model that transformers can load: {first_line(e)}") from e
    student, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise StudentError(
            f"{model}: {len(missing)} weights of {type(student).__name__} are missing, such as {missing[0]}, and would be "
            "random; give `student` a complete causal model"
        )
    return student


def check_vocabulary(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: Identity) -> None:
    """Raises: StudentError for a student with another tokenizer than the cache, or without rows for its ids."""
    name = student.config.name_or_path or type(student).__name__
    found = tokenizer_hash(tokenizer)
    if found != identity.tokenizer_hash:
        raise StudentError(
            f"{name} has tokenizer {found}, the cache of {identity.teacher} was made with {identity.tokenizer_hash}: "
            "their token ids differ; use a student and a teacher of one family"
        )
    needed = max(tokenizer.get_vocab().values()) + 1  # ids above it, of a padded teacher, join the tail
    rows = {"embedding": student.get_input_embeddings(), "head": student.get_output_embeddings()}
    for part, module in rows.items():
        if module is None:
            raise StudentError(f"{name} has no {part}: give `student` a causal language model")
        if (have := module.weight.shape[0]) < needed:
            raise StudentError(
                f"{name}: its {part} has {have} rows, the cache's ids go up to {needed - 1}; enlarge it with "
                f"model.resize_token_embeddings({needed}) and save it, or use another student"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' log lines and progress bars, except errors."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar() if bars else None
