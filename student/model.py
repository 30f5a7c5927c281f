"""The student: loading it, holding it against a cache, and running its head on the taught rows only."""

import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logitcache.errors import StudentError
from logitcache.kernels.linear import linear_sparse_divergence, linear_sparse_metrics
from logitcache.manifest import Identity, tokenizer_hash
from logitcache.student.data import Batch, targets

# N taught rows, H hidden, V rows of the head.


def load_student(
    model: str | Path, identity: Identity, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student and its tokenizer, held against the cache that will teach it.

    Raises: StudentError for a model that is missing, not causal, not whole, of another tokenizer, or of too few ids.
    """
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise StudentError(f"{model} is not a causal language model that transformers can load: {reason}") from e
    student, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise StudentError(
            f"{model} lacks {len(missing)} weights of {type(student).__name__}, {missing[0]} among them: it would "
            "train from noise; give --student a whole causal model"
        )
    check_vocabulary(student, tokenizer, identity)
    find_head(student)
    return student, tokenizer


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
            raise StudentError(f"{name} has no {part}: give --student a causal language model")
        if (have := module.weight.shape[0]) < needed:
            raise StudentError(
                f"{name}: its {part} has {have} rows, the cache's ids go up to {needed - 1}; enlarge it with "
                f"model.resize_token_embeddings({needed}) and save it, or take another student"
            )


@dataclass(frozen=True)
class Head:
    """From a hidden state to logits: softcap(logit_scale * (h W^T + b)). The module, since its weight may move."""

    module: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    def options(self) -> dict[str, Any]:
        return {"bias_V": getattr(self.module, "bias", None), "softcap": self.softcap, "logit_scale": self.logit_scale}


@torch.no_grad()
def find_head(student: PreTrainedModel) -> Head:
    """The head, with whatever its model does to logits, found by running both on four tokens.

    Raises: StudentError for a model whose logits are made otherwise, and for one that looks ahead.
    """
    name, module = type(student).__name__, typing.cast(nn.Linear | None, student.get_output_embeddings())
    if module is None or student.base_model is student:
        raise StudentError(f"{name} has no base model with a head on it: give --student a causal language model")
    if hasattr(module, "lora_A"):
        raise StudentError(
            f"{name}: its head carries a LoRA adapter, which the fused head would leave out: merge it first"
        )
    training = student.training
    student.eval()
    probe = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=student.device) % module.weight.shape[0]
    hidden = student.base_model(input_ids=probe, use_cache=False).last_hidden_state
    logits = student(input_ids=probe, use_cache=False).logits.float()
    student.train(training)
    close = 1e-3 if student.dtype == torch.float32 else 4e-2
    if not torch.allclose(hidden[0, :3], hidden[1, :3], rtol=close, atol=close * hidden.abs().max().item()):
        raise StudentError(f"{name} is not causal: a later token changes what it says of earlier ones")
    plain = module(hidden).float()
    for head in _heads(student, module):
        mine = plain * head.logit_scale
        mine = mine if head.softcap is None else head.softcap * torch.tanh(mine / head.softcap)
        if torch.allclose(mine, logits, rtol=close, atol=close * logits.abs().max().item()):
            return head
    raise StudentError(
        f"{name} makes its logits in a way that the fused head does not know; open an issue with its config.json"
    )


def _heads(student: PreTrainedModel, module: nn.Linear) -> Iterator[Head]:
    """What published models do: Gemma caps, Granite divides, Cohere and others multiply."""
    config = student.config.get_text_config()
    caps = [c for c in (getattr(config, "final_logit_softcapping", None),) if c] + [None]
    named = {name: getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "lm_head_multiplier")}
    scales = [float(s) for s in named.values() if s]
    for cap in caps:
        for scale in [*(1 / s for s in scales), *scales, 1.0]:
            yield Head(module, scale, cap)


def taught_hidden(student: PreTrainedModel, batch: Batch) -> Tensor:
    """[N, H], the base model's last hidden states at the taught positions; the head is not run."""
    # No mask: rows are padded on the right only. A cache of keys and values would be waste.
    outputs = [student.base_model(input_ids=ids_BT, use_cache=False) for ids_BT in batch["groups"]]
    return torch.cat([o.last_hidden_state.flatten(0, 1) for o in outputs])[batch["taught"]]


def lesson_loss(student: PreTrainedModel, head: Head, batch: Batch) -> Tensor:
    """Weighted forward KL with tail bucket and cross-entropy, summed over taught rows, nats; connected even if none."""
    return linear_sparse_divergence(
        taught_hidden(student, batch),
        head.module.weight,
        targets(batch),
        weights_N=batch["kd"],
        ce_weights_N=batch["ce"],
        check=False,  # the cache's writer refused repeated ids, the dataset dropped those beyond the head
        **head.options(),
    )


@torch.no_grad()
def lesson_metrics(student: PreTrainedModel, head: Head, batch: Batch) -> dict[str, Tensor]:
    """Per taught row, as `linear_sparse_metrics` gives it."""
    return linear_sparse_metrics(
        taught_hidden(student, batch), head.module.weight, targets(batch), check=False, **head.options()
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
