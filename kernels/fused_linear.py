"""The student's head and a sparse divergence in one operator: logits exist for one chunk of rows at a time.

A chunk's logits are one matrix product. They become their own gradient in place (a Triton row kernel on CUDA, the
reference elsewhere), and two more products make dH and dW of it: 6NVH FLOPs, 4NVH for a frozen head, nothing computed
twice. Gradients are computed in the forward and scaled in the backward: one backward, no second derivative. On a CPU a
batch of N <= H rows needs no buffer: its logits use the memory of dW until dW overwrites them.
"""

import functools
import logging
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from logitcache.kernels.divergences import ALPHA, BETA
from logitcache.kernels.objective import Objective
from logitcache.kernels.reference import RowValues, sparse_divergence_, weighted
from logitcache.kernels.targets import SparseTargets, resolve_ce_weights

logger = logging.getLogger(__name__)

# N rows, H hidden, V vocabulary, C rows of a chunk, S ids of a slice of the vocabulary.

CUDA_ROWS, CUDA_BYTES = 2048, 512 << 20  # above 2048 rows the matrix products do not get faster
CPU_ROWS, CPU_BYTES = 512, 256 << 20
BORROW_BYTES = 4 << 20  # of a slice of logits' gradients that dW is about to overwrite
FLOAT32_CHUNKS = 16  # bf16 dW is rounded once a chunk: above this many, accumulate in float32


def linear_sparse_divergence(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: SparseTargets,
    *,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    beta: float = BETA,
    alpha: float = ALPHA,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    weights_N: Tensor | None = None,
    ce_weight: float = 0.0,
    ce_weights_N: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    accumulate: torch.dtype | None = None,
    check: bool = True,
) -> Tensor:
    """Sum over rows of weights_N * divergence + ce weight * cross-entropy of softcap(logit_scale * (h W^T + b)).

    It is a sum, not a mean: the caller divides. `reference.sparse_divergence` defines the options.

    Args:
        hidden_NH: floating [N, H], the hidden states that predict the rows. N may be 0: the loss is then a zero with a gradient.
        weight_VH: [V, H], the head's weight, same dtype (under autocast both are cast). If frozen, dW is skipped.
        bias_V: [V] or None. weights_N, ce_weights_N: float [N] or None.
        vocab_size: rows of the head from here on are padding: no probability, no gradient. None: all are real.
        chunk_rows: rows of logits at a time; None: at most 2048 and 512 MiB on CUDA, 512 and 256 MiB on a CPU.
        accumulate: dtype in which dW adds up; None: the weight's, or float32 for more than 16 chunks.
        check: refuse ids >= V and repeated ids in a row, which waits for the device. Unchecked, their result is undefined.
    Returns: float32 [] (float64 for float64 inputs), nats.
    Raises: ValueError for options or targets that do not fit, TypeError for a head that is not a plain tensor,
        NotImplementedError for a sharded or adapted head and for a second derivative.
    """
    objective = Objective.of(divergence, tail, beta, alpha, temperature, softcap, logit_scale)
    hidden_NH, weight_VH, bias_V = _plain(hidden_NH, weight_VH, bias_V, targets)
    ce_weights_N = resolve_ce_weights(targets, objective, ce_weight, ce_weights_N)
    for name, row_weights in (("weights_N", weights_N), ("ce_weights_N", ce_weights_N)):
        if row_weights is not None and row_weights.shape != (len(targets),):
            raise ValueError(f"{name} is {list(row_weights.shape)}, targets need {[len(targets)]}")
    grad = torch.is_grad_enabled()
    loss, *_ = _linear_sparse_divergence(
        hidden_NH,
        weight_VH,
        bias_V,
        targets.offsets,
        targets.ids,
        targets.logprobs,
        targets.log_tail,
        targets.labels,
        weights_N,
        ce_weights_N,
        objective.divergence,
        objective.tail,
        objective.mix,
        objective.temperature,
        objective.softcap,
        objective.logit_scale,
        _real_rows(weight_VH, vocab_size),
        chunk_rows,
        accumulate,
        check,
        grad and hidden_NH.requires_grad,
        grad and weight_VH.requires_grad,
        grad and bias_V is not None and bias_V.requires_grad,
    )
    return loss


@torch.no_grad()
def linear_sparse_metrics(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: SparseTargets,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    check: bool = True,
) -> dict[str, Tensor]:
    """Per-row values for evaluation, in the same chunks and without gradients.

    Returns: tensors [N]: `forward_kl` (bucketed, nats), `ce` (nats, 0 without a label), `log_tail` (the
    student's log mass outside the support), `log_top` (the student's log-probability of its best id),
    `teacher_log_top` (the teacher's of that id, -inf outside the support), all float32; `argmax` int64, the student's
    best id; `top1` bool, whether it is also the teacher's best id, false if the support is empty.
    """
    objective = Objective.of(softcap=softcap, logit_scale=logit_scale)
    hidden_NH, weight_VH, bias_V = _plain(hidden_NH, weight_VH, bias_V, targets)
    vocab = _real_rows(weight_VH, vocab_size)
    if check:
        targets.check(vocab)
    # The best id replaces the label: its cross-entropy is -log_top, and that of the label is larger by `behind`.
    label_N = torch.full_like(targets.offsets[1:], -1) if targets.labels is None else targets.labels
    best_N = torch.empty_like(targets.offsets[1:])
    bias_V = None if bias_V is None else bias_V[:vocab]
    chunks = _Chunks(hidden_NH, weight_VH[:vocab], bias_V, replace(targets, labels=best_N), chunk_rows)
    behind_N = hidden_NH.new_empty(len(targets), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
    parts = []
    for start, stop in chunks.spans:
        logits_CV = chunks.logits(start, stop)
        best_N[start:stop] = (objective.logits(logits_CV) if logit_scale < 0 else logits_CV).argmax(dim=1)
        pair_C2 = torch.stack([best_N[start:stop], label_N[start:stop].clamp(min=0)], dim=1)
        z_C2 = objective.logits(logits_CV.gather(1, pair_C2).to(behind_N.dtype))
        behind_N[start:stop] = z_C2[:, 0] - z_C2[:, 1]
        parts.append(chunks.divergence_(start, stop, objective, grad=False))
    values = _cat(parts, hidden_NH)
    ids_NK, logp_NK, valid_NK = targets.padded()
    logp_NK = logp_NK.masked_fill(~valid_NK, -torch.inf)
    top_N = ids_NK.masked_fill(~valid_NK, -1).gather(1, logp_NK.argmax(dim=1, keepdim=True))[:, 0]
    is_best_NK = valid_NK & (ids_NK == best_N[:, None])
    return {
        "forward_kl": values.divergence_N,
        "ce": (values.ce_N + behind_N).masked_fill(label_N < 0, 0.0),
        "log_tail": values.log_tail_N,
        "log_top": -values.ce_N,
        "teacher_log_top": logp_NK.masked_fill(~is_best_NK, -torch.inf).amax(dim=1),
        "argmax": best_N,
        "top1": best_N == top_N,
    }


def _plain(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets: SparseTargets
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three tensors in one dtype. Raises: as `linear_sparse_divergence` says."""
    if not isinstance(weight_VH, Tensor):
        if hasattr(weight_VH, "lora_A"):
            raise NotImplementedError(
                "the head has a LoRA adapter, which a fused head would ignore: merge it, remove the head from target_modules, "
                "or train the whole head (modules_to_save)"
            )
        raise TypeError(
            f"weight_VH must be the head's weight tensor [V, H], found {type(weight_VH).__name__}: pass its .weight"
        )
    for name, tensor in (("hidden_NH", hidden_NH), ("weight_VH", weight_VH), ("bias_V", bias_V)):
        if hasattr(tensor, "full_tensor"):
            raise NotImplementedError(f"{name} is a DTensor, sharded over ranks: pass {name}.full_tensor()")
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: dequantise it to a floating dtype first")
    vocab, width = weight_VH.shape
    if hidden_NH.shape != (len(targets), width):
        wanted = [len(targets), width]
        raise ValueError(f"hidden_NH is {list(hidden_NH.shape)}, targets and weight_VH need {wanted}")
    if targets.ids.device != hidden_NH.device:
        raise ValueError(
            f"targets are on {targets.ids.device}, hidden_NH on {hidden_NH.device}: use targets.to(device)"
        )
    if bias_V is not None and bias_V.shape != (vocab,):
        raise ValueError(f"bias_V is {list(bias_V.shape)}, weight_VH needs {[vocab]}")
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden_NH.to(dtype), weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
    if hidden_NH.dtype != weight_VH.dtype or (bias_V is not None and bias_V.dtype != weight_VH.dtype):
        raise TypeError(
            f"hidden_NH is {hidden_NH.dtype}, weight_VH {weight_VH.dtype}"
            f"{'' if bias_V is None else f', bias_V {bias_V.dtype}'}: cast them to one dtype, or use torch.autocast"
        )
    return hidden_NH, weight_VH, bias_V


def _real_rows(weight_VH: Tensor, vocab_size: int | None) -> int:
    if vocab_size is not None and not 0 < vocab_size <= weight_VH.shape[0]:
        raise ValueError(f"vocab_size={vocab_size}, but the head has {weight_VH.shape[0]} rows")
    return vocab_size or weight_VH.shape[0]


@functools.cache
def _triton_rows(device: str, dtype: torch.dtype) -> ModuleType | None:
    """The Triton kernels if they apply, or None for plain torch. Only this function chooses."""
    if device != "cuda" or dtype == torch.float64:
        return None
    try:
        from logitcache.kernels import triton_rows
    except ImportError as error:
        logger.warning("divergences run in plain torch, several times slower: %s; `pip install triton`", error)
        return None
    return triton_rows


class _Chunks:
    """Spans of rows that share one logits buffer, and the conversion of logits to their gradient on this device."""

    def __init__(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets: SparseTargets,
        chunk_rows: int | None,
        grad_weight_VH: Tensor | None = None,
    ):
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows={chunk_rows} must be positive, or None for the default")
        self.hidden_NH, self.weight_VH, self.bias_V, self.targets = hidden_NH, weight_VH, bias_V, targets
        n, vocab = hidden_NH.shape[0], weight_VH.shape[0]
        width = 0 if grad_weight_VH is None else grad_weight_VH.shape[1]
        self.triton = _triton_rows(hidden_NH.device.type, hidden_NH.dtype)
        self.most_k = targets.longest() if self.triton else None
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        narrow = not self.triton and hidden_NH.dtype != wide
        self.borrowed = hidden_NH.device.type == "cpu" and not (self.triton or narrow or chunk_rows) and 0 < n <= width
        rows = min(chunk_rows or default_rows(n, vocab, width, hidden_NH.dtype, hidden_NH.device), max(n, 1))
        if self.borrowed and grad_weight_VH is not None:
            rows, self.buffer_CV = n, grad_weight_VH[:, :n].t()
        else:
            stride = (
                -(-vocab // 16) * 16
            )  # rows start at multiples of 32 bytes: vector loads and aligned products for any V
            self.buffer_CV = hidden_NH.new_empty(rows, stride)[:, :vocab]
        self.spans = [(start, min(start + rows, n)) for start in range(0, n, rows)]
        self.wide_CV = self.buffer_CV.new_empty(rows, vocab, dtype=wide) if narrow else None

    def logits(self, start: int, stop: int) -> Tensor:
        logits_CV, hidden_CH = self.buffer_CV[: stop - start], self.hidden_NH[start:stop]
        if self.bias_V is None:
            return torch.mm(hidden_CH, self.weight_VH.t(), out=logits_CV)
        return torch.addmm(self.bias_V, hidden_CH, self.weight_VH.t(), out=logits_CV)

    def divergence_(
        self,
        start: int,
        stop: int,
        objective: Objective,
        weights_N: Tensor | None = None,
        ce_weights_N: Tensor | None = None,
        grad: bool = True,
    ) -> RowValues:
        """Turns the last `logits` into their gradient; with grad=False it overwrites them."""
        logits_CV, targets = self.buffer_CV[: stop - start], self.targets.rows(start, stop)
        weights_C, ce_weights_C = (None if w is None else w[start:stop] for w in (weights_N, ce_weights_N))
        if self.triton:
            return self.triton.sparse_divergence_(
                logits_CV, targets, objective, weights_C, ce_weights_C, grad=grad, most_k=self.most_k, padding=True
            )
        if self.wide_CV is None:
            return sparse_divergence_(logits_CV, targets, objective, weights_C, ce_weights_C, grad=grad)
        wide_CV = self.wide_CV[: stop - start].copy_(logits_CV)
        values = sparse_divergence_(wide_CV, targets, objective, weights_C, ce_weights_C, grad=grad)
        if grad:
            logits_CV.copy_(wide_CV)
        return values


def default_rows(n: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a chunk: within the device's limits, chunks of nearly equal size. `width` is 0 without dW.

    Autograd on whole logits peaks at 3 N V beside the inputs, or 3 N V - V H beyond dW: on a CPU a chunk is a sixth.
    """
    most, limit, step = (CUDA_ROWS, CUDA_BYTES, 128) if device.type == "cuda" else (CPU_ROWS, CPU_BYTES, 16)
    if device.type != "cuda":
        most = min(most, max((3 * n - width) // 6, n // 6) // step * step)
    most = min(most, limit // (vocab * dtype.itemsize) // step * step)
    most = max(most, step)
    chunks = max(-(-n // most), 1)
    return min(most, max(-(-n // chunks // step) * step, step))


def _cat(parts: list[RowValues], like: Tensor) -> RowValues:
    if not parts:
        empty_N = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        return RowValues(empty_N, empty_N, empty_N)
    return RowValues(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.library.custom_op("logitcache::linear_sparse_divergence", mutates_args=())
def _linear_sparse_divergence(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    offsets: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    log_tail: Tensor,
    labels: Tensor | None,
    weights_N: Tensor | None,
    ce_weights_N: Tensor | None,
    divergence: str,
    tail: str,
    mix: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab: int,
    chunk_rows: int | None,
    accumulate: torch.dtype | None,
    check: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to hidden, weight and bias (empty where not needed)."""
    targets = SparseTargets(offsets, ids, logprobs, log_tail, labels)
    objective = Objective(divergence, tail, mix, temperature, softcap, logit_scale)
    if check:
        targets.check(vocab)
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    bias_V = None if bias_V is None else bias_V[:vocab]
    n, width = hidden_NH.shape
    many = n > FLOAT32_CHUNKS * (chunk_rows or default_rows(n, vocab, width, hidden_NH.dtype, hidden_NH.device))
    grad_hidden_NH = torch.empty_like(hidden_NH) if need_hidden else hidden_NH.new_empty(0)
    dtype = accumulate or (wide if many else weight_VH.dtype)
    grad_weight_VH = weight_VH.new_empty(weight_VH.shape if need_weight else 0, dtype=dtype)
    grad_weight_VH[vocab if n else 0 :].zero_()  # the first chunk writes the rest
    borrow = grad_weight_VH[:vocab] if need_weight else None
    chunks = _Chunks(hidden_NH, weight_VH[:vocab], bias_V, targets, chunk_rows, borrow)
    grad_bias_V = weight_VH.new_zeros(weight_VH.shape[0] if need_bias else 0, dtype=wide)
    parts = []
    for start, stop in chunks.spans:
        grad_CV = chunks.logits(start, stop)
        needed = need_hidden or need_weight or need_bias
        parts.append(chunks.divergence_(start, stop, objective, weights_N, ce_weights_N, needed))
        if need_hidden:
            torch.mm(grad_CV, chunks.weight_VH, out=grad_hidden_NH[start:stop])
        if need_bias:
            grad_bias_V[:vocab] += grad_CV.sum(dim=0, dtype=wide)
        if need_weight and chunks.borrowed:
            slice_SN = grad_CV.new_empty(max(BORROW_BYTES // (n * grad_CV.itemsize), 256), n)
            for grad_SN, grad_SH in zip(
                grad_CV.t().split(len(slice_SN)), grad_weight_VH[:vocab].split(len(slice_SN)), strict=True
            ):
                torch.mm(slice_SN[: len(grad_SN)].copy_(grad_SN), hidden_NH, out=grad_SH)
        elif need_weight:
            _add_product(grad_weight_VH[:vocab], grad_CV, hidden_NH[start:stop], first=start == 0)
    values = _cat(parts, hidden_NH)
    loss = weighted(values.divergence_N, weights_N).sum()
    if ce_weights_N is not None:
        loss = loss + weighted(values.ce_N, ce_weights_N).sum()
    return loss.to(wide), grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), grad_bias_V.to(weight_VH.dtype)


def _add_product(grad_weight_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor, first: bool) -> None:
    """dW = G^T X of the first chunk, dW += G^T X of the others, in dW's dtype."""
    wide, narrow = grad_weight_VH.dtype, grad_CV.dtype
    if wide != narrow and not grad_CV.is_cuda:  # no mixed product on CPUs: by slices of the vocabulary, to stay small
        hidden_CH = hidden_CH.to(wide)
        for start in range(0, grad_weight_VH.shape[0], 8192):
            slice_CV = grad_CV[:, start : start + 8192].to(wide)
            _add_product(grad_weight_VH[start : start + 8192], slice_CV, hidden_CH, first)
        return
    mixed: dict[str, Any] = {} if wide == narrow else {"out_dtype": wide}
    if first:
        torch.mm(grad_CV.t(), hidden_CH, out=grad_weight_VH, **mixed)
    else:
        torch.addmm(grad_weight_VH, grad_CV.t(), hidden_CH, out=grad_weight_VH, **mixed)


@_linear_sparse_divergence.register_fake
def _(hidden_NH, weight_VH, bias_V, *rest):
    need_hidden, need_weight, need_bias = rest[-3:]
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    return (
        hidden_NH.new_empty((), dtype=wide),
        torch.empty_like(hidden_NH) if need_hidden else hidden_NH.new_empty(0),
        weight_VH.new_empty(weight_VH.shape) if need_weight else weight_VH.new_empty(0),
        weight_VH.new_empty(weight_VH.shape[0] if need_bias else 0),
    )


def _keep(ctx, inputs, output):
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.needed = inputs[-3:]
    ctx.inputs = len(inputs)
    ctx.save_for_backward(*grads)


def _scale(ctx, grad_loss, *_):
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            "second backward through linear_sparse_divergence, whose gradients are scaled in place: call it again, or add "
            "the losses before one backward"
        )
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "linear_sparse_divergence has no second derivative: backward without create_graph, or differentiate "
            "logitcache.kernels.reference.sparse_divergence on whole logits"
        )
    ctx.spent = not torch.compiler.is_compiling()
    grads = [
        _scaled_(grad, grad_loss) if needed else None
        for grad, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    ]
    return (*grads, *[None] * (ctx.inputs - 3))


def _scaled_(grad: Tensor, factor: Tensor) -> Tensor:
    """In place, so that dW exists once. On a GPU it costs nothing where the factor is 1: divide in the row weights."""
    rows = _triton_rows(grad.device.type, grad.dtype)
    if rows is None or torch.compiler.is_compiling():
        return grad.mul_(factor)
    return rows.scale_(grad, factor)


_linear_sparse_divergence.register_autograd(_scale, setup_context=_keep)
