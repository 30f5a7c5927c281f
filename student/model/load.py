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
from logitcache.identity import Identity
from logitcache.student.model.head import find_head
from logitcache.student.model.lora import adapter_base, import_peft
from logitcache.student.model.vocabulary import Traces, check_vocabulary


def load_student(
    model: str | Path,
    identity: Identity,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    *,
    traces: Traces = (),
    teacher_tokenizer: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a student and its tokenizer, and checks that it fits the cache.

    A folder with a LoRA adapter, as a run with `lora_rank` writes it, gives the base model with the adapter merged.

    Args:
        identity: of the cache. attention: transformers' attn_implementation; None: the model's default.
        traces, teacher_tokenizer: for a student with another tokenizer, as `vocabulary.check_vocabulary` takes them.
    Raises: StudentError for a model that is missing, incomplete or not causal, or to which the ids that the traces hold
        are other tokens.
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
    check_vocabulary(student, tokenizer, identity, traces, teacher_tokenizer)
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
