"""The student: loading it, holding it against a cache, an adapter on it, a smaller one cut out of a teacher."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logitcache.errors import StudentError, first_line
from logitcache.identity import Identity, tokenizer_hash
from logitcache.student.model.head import find_head


def load_student(
    model: str | Path, identity: Identity, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student and its tokenizer, held against the cache that will teach it. A folder with a LoRA adapter, such as a
    run leaves, gives its base model with the adapter merged into it.

    Args:
        attention: transformers' attn_implementation; None: its default.
    Raises: StudentError for a model that is missing, not causal, not whole, of another tokenizer, or of too few ids.
    """
    base = adapter_base(model)
    student = _load(base or model, dtype, attention)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as e:
        raise StudentError(f"{model} has no tokenizer that transformers can load: {first_line(e)}") from e
    if base:
        try:
            student = _peft(model).PeftModel.from_pretrained(student, model).merge_and_unload().requires_grad_()
        except (ValueError, RuntimeError, OSError, SafetensorError) as e:
            raise StudentError(f"{model} holds an adapter that does not fit {base}: {first_line(e)}") from e
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
            f"{model} lacks {len(missing)} weights of {type(student).__name__}, {missing[0]} among them: it would "
            "train from noise; give `student` a whole causal model"
        )
    return student


def adapter_base(model: str | Path) -> str | None:
    """The model that a folder's LoRA adapter belongs on; None for what is no adapter."""
    path = Path(model) / "adapter_config.json"
    try:
        return json.loads(path.read_text())["base_model_name_or_path"] if path.exists() else None
    except (ValueError, TypeError, KeyError) as e:
        raise StudentError(f"{path} is not what peft writes: {first_line(e)}") from e


def _peft(what: str | Path) -> Any:
    try:
        import peft
    except ImportError as e:
        raise StudentError(f"{what} needs peft: `pip install 'logitcache[lora]'`") from e
    return peft


def add_lora(
    student: PreTrainedModel, rank: int, alpha: float | None = None, targets: str | list[str] | None = None
) -> Any:
    """The student as a peft model that trains an adapter of `rank` on `targets`, and nothing else.

    Args:
        alpha: scale, by default twice the rank. targets: as peft has them; all linear layers but the head by default.
    Raises: StudentError for what peft refuses, and for an adapter on the head.
    """
    peft = _peft("`lora_rank`")
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


def check_vocabulary(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: Identity) -> None:
    """Raises: StudentError where the cache's ids do not mean the same to the student, or it has no rows for them."""
    name = student.config.name_or_path or type(student).__name__
    found = tokenizer_hash(tokenizer)
    if found != identity.tokenizer_hash:
        raise StudentError(
            f"{name} has tokenizer {found}, the cache of {identity.teacher} was made with {identity.tokenizer_hash}: "
            "token ids would not mean the same; take a student of the teacher's family, or a teacher of the student's"
        )
    needed = max(tokenizer.get_vocab().values()) + 1  # a padded teacher may give ids above: those join the tail
    rows = {"embedding": student.get_input_embeddings(), "head": student.get_output_embeddings()}
    for part, module in rows.items():
        if module is None:
            raise StudentError(f"{name} has no {part}: give `student` a causal language model")
        if (have := module.weight.shape[0]) < needed:
            raise StudentError(
                f"{name}: its {part} has {have} rows, the cache's ids go up to {needed - 1}; enlarge it with "
                f"model.resize_token_embeddings({needed}) and save it, or take another student"
            )


def prune_layers(model: str | Path, out: str | Path, every: int = 3) -> PreTrainedModel:
    """Writes a copy of `model` with every `every`-th decoder layer to the directory `out`, tokenizer included.

    Layers 0, every, 2 * every ... are kept, in the order they had; all else is copied, in the dtype it had.
    Raises: StudentError for a model without a stack of layers as long as its config says.
    """
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    fields = teacher.config.to_dict()
    depth: int = fields.get("num_hidden_layers") or 0
    stacks = [n for n, m in teacher.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if every < 1 or depth < 1 or len(stacks) != 1:
        raise StudentError(
            f"{model}: cannot keep every {every}-th layer: it has {len(stacks)} stacks of {depth} layers"
        )
    kept = range(0, depth, every)
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == depth:  # layer_types and the like
            fields[name] = [value[i] for i in kept]
    student = AutoModelForCausalLM.from_config(
        type(teacher.config).from_dict(fields | {"num_hidden_layers": len(kept)}), dtype=teacher.dtype
    )
    place = {str(old): new for new, old in enumerate(kept)}
    layer = re.compile(rf"{re.escape(stacks[0])}\.(\d+)\.(.*)")
    weights = {}
    for name, weight in teacher.state_dict().items():
        if found := layer.fullmatch(name):
            if found[1] not in place:
                continue
            name = f"{stacks[0]}.{place[found[1]]}.{found[2]}"
        weights[name] = weight
    student.load_state_dict(weights)
    student.generation_config = teacher.generation_config
    student.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return student


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
