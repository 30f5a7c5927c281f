"""What training costs: FLOPs by formula, peak memory, and where the time goes.

Counted are matrix products, two FLOPs a multiply-add, as torch.utils.flop_counter does. A product with a weight runs
once forward, once backward for its input, and once more where the weight learns: the 3 x 2NVH of a head. Attention
counts the whole square of a sequence, masked or not, and twice that backward; that a fused attention computes its scores
again is its own affair, as in "model FLOPs" elsewhere, while gradient checkpointing's second forward is counted.
"""

import contextlib
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Shapes = Iterable[tuple[int, int]]  # (B, T) of each group that is fed

PARTS = ("data", "forward", "backward", "optimizer", "other")
EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a model: of a token, of a pair of positions in one sequence, of a row of the head."""

    token: int
    pair: int
    row: int

    def flops(self, shapes: Shapes, rows: int) -> int:
        shapes = list(shapes)
        tokens, pairs = sum(B * T for B, T in shapes), sum(B * T * T for B, T in shapes)
        return 2 * (self.token * tokens + self.pair * pairs + self.row * rows)


def forward_flops(model: PreTrainedModel, shapes: Shapes, rows: int) -> int:
    """FLOPs of one forward over sequences of these shapes, padding included, with the head on `rows` rows."""
    return work(model).flops(shapes, rows)


def training_flops(model: PreTrainedModel, shapes: Shapes, rows: int) -> int:
    """FLOPs of a forward and its backward, as `work` counts them; the optimiser's, a few a weight, are left out."""
    return work(model, training=True).flops(shapes, rows)


def work(model: PreTrainedModel, training: bool = False) -> Work:
    """Taken once, before the model is wrapped or sharded (shards of DeepSpeed and FSDP2 are read by their whole shape).

    Every weight of two dimensions outside embeddings meets every token, and of a stack of experts as many as the config
    says a token takes. What is frozen costs no dW; layers below the first that learns are only fed forward (in that one
    dX is counted throughout; where adapters alone learn, its first products have none). A layer under gradient
    checkpointing is run forward twice, though torch leaves out its last product.
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
    return Work(token, pair, row)


def _products(module: nn.Module, name: str, weight: torch.Tensor, active: int | None) -> int:
    """Multiply-adds that a token costs in this weight."""
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


class PeakMemory:
    """Peak since it was made, in bytes.

    On CUDA what the allocator handed out at most, weights included. On a Linux CPU the growth of the resident set: the
    peak (VmHWM) over what was resident at the start (VmRSS); where the kernel does not let a process forget its earlier
    peak (/proc/self/clear_refs), that may be in it. None elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.reset()
        self.before = _resident("VmRSS")

    def reset(self) -> None:
        """Forgets the peak, not what was resident at the start."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        peak = _resident("VmHWM")
        return None if peak is None or self.before is None else max(0, peak - self.before)


def _resident(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


class Costs:
    """Seconds of each of PARTS and peak memory of one process, adding up over resumes.

    A clock that is always in one part: inside `time` another `time` takes its share away. On CUDA it reads the device's
    own clock through events and waits for none of them before `seconds` is read: "data" is then what the device stood
    idle for.
    """

    def __init__(self, device: torch.device):
        self.device, self.memory = device, PeakMemory(device)
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._peak = 0
        self._part: str | None = None
        self._since: Any = None
        self._laps: list[tuple[str, Any, Any]] = []  # of events that may not have happened yet

    def stop(self) -> None:
        self.switch(None)

    def switch(self, part: str | None) -> str | None:
        """What ran until now is charged to the part before, which is returned; None halts the clock."""
        assert part is None or part in PARTS, part
        now, before = self._now(), self._part
        if before is not None:
            self._laps.append((before, self._since, now))
        self._part, self._since = part, now
        return before

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    @property
    def seconds(self) -> dict[str, float]:
        """Of each part so far. On CUDA it waits for the device: read it where you log."""
        for part, start, stop in self._laps:
            self._spent[part] += self._between(start, stop)
        self._laps.clear()
        return dict(self._spent)

    @property
    def peak_memory(self) -> int | None:
        now = self.memory.bytes()
        return None if now is None else max(now, self._peak)

    @contextlib.contextmanager
    def other_memory(self) -> Iterator[None]:
        """What is taken inside is not training's."""
        self._peak = self.peak_memory or 0
        try:
            yield
        finally:
            self.memory.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "peak_memory": self.peak_memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what an earlier process counted; what this one has counted so far is dropped."""
        self._laps.clear()
        self._spent = {part: float(state["seconds"].get(part, 0.0)) for part in PARTS}
        self._peak = state["peak_memory"] or 0

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, stop: Any) -> float:
        if self.device.type != "cuda":
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
