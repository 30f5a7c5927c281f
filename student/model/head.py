"""The student's head, run on supervised positions only, inside the model's own forward."""

import contextlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcache.errors import StudentError
from logitcache.kernels.fused_linear import linear_sparse_divergence, linear_sparse_metrics
from logitcache.sparse_rows import SparseRows
from logitcache.student.data.collate import Batch, collate
from logitcache.student.data.dataset import Example

# N supervised positions, H hidden, V rows of the head.

PORTABLE_ATTENTION = ("eager", "sdpa")  # runs on any device in any dtype


@dataclass(frozen=True)
class Head:
    """From a hidden state to logits: softcap(logit_scale * (h W^T + b))."""

    module: nn.Linear  # and not its weight, which sharding replaces
    logit_scale: float = 1.0
    softcap: float | None = None

    def options(self) -> dict[str, Any]:
        return {"bias_V": getattr(self.module, "bias", None), "softcap": self.softcap, "logit_scale": self.logit_scale}


@torch.no_grad()
def find_head(student: PreTrainedModel) -> Head:
    """Finds the head and what its model does to logits, by running both on four tokens.

    Raises: StudentError for a model that computes its logits in an unknown way, and for one that is not causal.
    """
    name, module = type(student).__name__, typing.cast(nn.Linear | None, student.get_output_embeddings())
    if module is None or student.base_model is student:
        raise StudentError(f"{name} is not a base model with a head: give `student` a causal language model")
    if hasattr(module, "lora_A"):
        raise StudentError(f"{name}: its head has a LoRA adapter, which the fused head would ignore; merge it first")
    probe = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=student.device) % module.weight.shape[0]
    with _probing(student):
        hidden = student.base_model(input_ids=probe, use_cache=False).last_hidden_state
        logits = student(input_ids=probe, use_cache=False).logits.float()
    close = 1e-3 if student.dtype == torch.float32 else 4e-2
    if not torch.allclose(hidden[0, :3], hidden[1, :3], rtol=close, atol=close * hidden.abs().max().item()):
        raise StudentError(f"{name} is not causal: a later token changes its output at earlier positions")
    plain = module(hidden).float()
    for head in _heads(student, module):
        mine = plain * head.logit_scale
        mine = mine if head.softcap is None else head.softcap * torch.tanh(mine / head.softcap)
        if torch.allclose(mine, logits, rtol=close, atol=close * logits.abs().max().item()):
            return head
    raise StudentError(
        f"{name} computes its logits in a way that the fused head does not know; open an issue with its config.json"
    )


@contextlib.contextmanager
def _probing(student: PreTrainedModel) -> Iterator[None]:
    """Puts the student in evaluation mode, with attention that runs on any device in any dtype."""
    training, attention = student.training, student.config._attn_implementation
    student.eval()
    if attention not in (None, *PORTABLE_ATTENTION):
        student.set_attn_implementation("eager")
    try:
        yield
    finally:
        student.train(training)
        if attention not in (None, *PORTABLE_ATTENTION):
            student.set_attn_implementation(attention)


def _heads(student: PreTrainedModel, module: nn.Linear) -> Iterator[Head]:
    """What published models do to logits: Gemma caps them, Granite divides, Cohere and others multiply."""
    config = student.config.get_text_config()
    caps = [c for c in (getattr(config, "final_logit_softcapping", None),) if c] + [None]
    named = {name: getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "lm_head_multiplier")}
    scales = [float(s) for s in named.values() if s]
    for cap in caps:
        for scale in [*(1 / s for s in scales), *scales, 1.0]:
            yield Head(module, scale, cap)


def causal_model(student: Any) -> PreTrainedModel:
    """The causal model itself, without peft's wrapper."""
    return (
        student.get_base_model() if hasattr(student, "peft_config") and hasattr(student, "get_base_model") else student
    )


def supervised_hidden(student: PreTrainedModel, batch: Batch) -> Tensor:
    """[N, H], the base model's last hidden states at the supervised positions; the head is not run."""
    # No attention mask: padding is on the right only, and packed traces are separated by their position ids, which
    # transformers honours only without a mask and without a KV cache.
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    base = causal_model(student).base_model
    outputs = [base(input_ids=ids_BT, use_cache=False, **positions) for ids_BT in batch.groups]
    return torch.cat([o.last_hidden_state.flatten(0, 1) for o in outputs])[batch.supervised]


def distillation_loss(student: PreTrainedModel, head: Head, batch: Batch, **objective: Any) -> Tensor:
    """Weighted divergence and cross-entropy, summed over the supervised positions: float32 [], nats.

    It has a gradient, zero, even if the batch has no such position. objective: divergence, tail, beta, alpha,
    temperature, as `linear_sparse_divergence` has them.
    """
    return linear_sparse_divergence(
        supervised_hidden(student, batch),
        head.module.weight,
        batch.targets,
        weights_N=batch.kd,
        ce_weights_N=batch.ce,
        check=False,  # the cache has no repeated ids, and the dataset dropped ids beyond the head
        **objective,
        **head.options(),
    )


@torch.no_grad()
def distillation_metrics(student: PreTrainedModel, head: Head, batch: Batch) -> dict[str, Tensor]:
    """Metrics of each supervised position, as `linear_sparse_metrics` gives them."""
    return linear_sparse_metrics(
        supervised_hidden(student, batch), head.module.weight, batch.targets, check=False, **head.options()
    )


def attach_head(student: Any, **objective: Any) -> Head:
    """Makes `student(distill=batch)` return the loss, and `student(distill=batch, metrics=True)` the metrics.

    Both run inside the model's forward, so that wrappers of it (DDP, FSDP, autocast) apply to the head. Other calls are
    unchanged.
    """
    head = find_head(causal_model(student))

    def forward(self: Any, *inputs: Any, distill: Batch | None = None, metrics: bool = False, **named: Any) -> Any:
        if distill is None:
            return type(self).forward(self, *inputs, **named)
        return (
            distillation_metrics(self, head, distill)
            if metrics
            else distillation_loss(self, head, distill, **objective)
        )

    student.forward = types.MethodType(forward, student)
    return head


@torch.no_grad()
def check_packing(student: Any) -> None:
    """Raises: StudentError for a model where packed traces see each other, through attention or other layers.

    A packed trace may differ from the same trace alone by rounding. How much rounding there is, a padded batch shows.
    """
    model = causal_model(student)
    ids = np.arange(5, 60) % model.config.get_text_config().vocab_size
    probes = [_probe(ids[:24]), _probe(ids[24:41]), _probe(ids[41:])]

    def hidden(examples: list[Example], packed: bool = False) -> Tensor:
        return supervised_hidden(model, collate(examples, packed=packed).to(model.device)).float()

    with _probing(model):
        alone, padded, packed = torch.cat([hidden([p]) for p in probes]), hidden(probes), hidden(probes, packed=True)
    noise = (padded - alone).abs().max().item()
    floor = alone.abs().max().item() * (1e-6 if model.dtype == torch.float32 else 1e-2)
    if (packed - alone).abs().max().item() > 4 * max(noise, floor):
        raise StudentError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets packed traces see each "
            "other; train with `packing` off"
        )


def _probe(input_ids: np.ndarray) -> Example:
    """Input ids with every position supervised, and empty rows."""
    none_N, no_rows = np.zeros(len(input_ids), np.int64), SparseRows.concatenate([])
    return Example("", input_ids, np.arange(len(input_ids)), no_rows, *[none_N] * 5)
