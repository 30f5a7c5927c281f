"""FLOPs of training, by formula.

Matrix products are counted, with two FLOPs per multiply-add, as torch.utils.flop_counter does. A product with a weight
runs once in the forward, once in the backward for its input, and once more if the weight is trained: 3 x 2NVH for a head.
Attention counts the whole square of a sequence, masked or not, and twice that in the backward. As usual for "model FLOPs"
the recomputation inside fused attention is not counted; the second forward of gradient checkpointing is.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Shapes = Iterable[tuple[int, int]]  # (B, T) of each block that attends within itself

EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class FlopCounts:
    """Multiply-adds of a model."""

    per_token: int
    per_pair: int  # of positions in one sequence
    per_row: int  # of the head

    def total(self, shapes: Shapes, rows: int) -> int:
        """FLOPs of sequences of these shapes, padding included, with the head on `rows` rows."""
        shapes = list(shapes)
        tokens, pairs = sum(B * T for B, T in shapes), sum(B * T * T for B, T in shapes)
        return 2 * (self.per_token * tokens + self.per_pair * pairs + self.per_row * rows)


def forward_flops(model: PreTrainedModel, shapes: Shapes, rows: int) -> int:
    """FLOPs of one forward over sequences of these shapes, padding included, with the head on `rows` rows."""
    return count_flops(model).total(shapes, rows)


def training_flops(model: PreTrainedModel, shapes: Shapes, rows: int) -> int:
    """FLOPs of a forward and its backward. The optimizer's, a few per weight, are not counted."""
    return count_flops(model, training=True).total(shapes, rows)


def count_flops(model: PreTrainedModel, training: bool = False) -> FlopCounts:
    """Counts once, before the model is wrapped or sharded (sharded weights count with their full shape).

    Every two-dimensional weight outside embeddings is multiplied with every token, and of a stack of experts as many as the
    config says are active. A frozen weight costs no dW. Layers below the first trained one have no backward (that one
    counts dX for all its products, though with adapters alone its first ones have none). A layer under gradient
    checkpointing runs its forward twice, though torch skips its last product.
    """
    config: Any = model.config.get_text_config()
    depth: int = getattr(config, "num_hidden_layers", 0)
    stack = next((n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth > 0), None)
    in_stack = re.compile(rf"{re.escape(stack or '')}\.(\d+)\.")
    head, active = model.get_output_embeddings(), _active_experts(config)

    weights: list[tuple[int, int, bool]] = []  # layer, multiply-adds a token, learns
    first, place, seen = depth, -1, {id(head.weight)} if head is not None else set()
    for name, module in model.named_modules():
        if stack is not None and (found := in_stack.match(name + ".")):
            place, layer = depth, int(found[1])
        else:
            layer = place  # -1 before the stack, depth after it
        for own, weight in module.named_parameters(recurse=False):
            first = min(first, layer) if weight.requires_grad else first
            if id(weight) not in seen and not isinstance(module, nn.Embedding):
                weights.append((layer, _products(module, own, weight, active), weight.requires_grad))
            seen.add(id(weight))

    again = _checkpointed(model, stack, depth)
    token = sum(
        count * (1 + training * ((layer >= first) + learns + (layer in again))) for layer, count, learns in weights
    )
    square = _square(config)
    pair = sum(square * (1 + training * (2 * (i >= first) + (i in again))) for i in range(depth) if _attends(config, i))
    row = 0
    if head is not None:
        learns = any(p.requires_grad for p in model.parameters())
        row = _products(head, "weight", head.weight, active) * (1 + training * (learns + head.weight.requires_grad))
    return FlopCounts(token, pair, row)


def _products(module: nn.Module, name: str, weight: torch.Tensor, active: int | None) -> int:
    """Multiply-adds per token of this weight."""
    shape = torch.Size(getattr(weight, "ds_shape", weight.shape))  # what ZeRO-3 has sharded is empty here
    if len(shape) < 2 or "bias" in name:
        return 0
    if isinstance(module, nn.Linear):  # quantised ones pack their weights
        return module.in_features * module.out_features
    if len(shape) == 3 and not isinstance(module, nn.Conv1d):
        return shape[1] * shape[2] * min(active or shape[0], shape[0])
    return shape.numel()


def _active_experts(config: Any) -> int | None:
    values = (getattr(config, name, None) for name in EXPERTS_A_TOKEN)
    return next((v for v in values if isinstance(v, int)), None)


def _square(config: Any) -> int:
    """Multiply-adds of one layer's attention for a query and a key: scores and weighted values, all heads."""
    heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    keys = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    return heads * ((keys or width) + (getattr(config, "v_head_dim", None) or width))


def _attends(config: Any, layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    return not kinds or (kinds[layer].endswith("attention") and kinds[layer] != "linear_attention")


def _checkpointed(model: PreTrainedModel, stack: str | None, depth: int) -> set[int]:
    if stack is None or not getattr(model, "is_gradient_checkpointing", False):
        return set()
    layers: Any = model.get_submodule(stack)
    return {i for i in range(depth) if getattr(layers[i], "gradient_checkpointing", True)}
