"""One Triton row kernel for every sparse divergence: a chunk of logits becomes its own gradient, in place.

One program handles one row. It gathers the support's logits and sets them to -inf in the row, computes the tail's
log-sum-exp online and the k + 1 buckets in registers, then overwrites the row with the dense factor and its k entries. The
row is read twice and written once; the second pass runs backwards, to start on what is still in cache. `divergences.py`
and `reference.py` define formulas and names. No atomics: two runs agree to the last bit.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false

import logging
import os
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitcache.kernels import divergences
from logitcache.kernels.objective import Objective
from logitcache.kernels.reference import RowValues
from logitcache.kernels.targets import SparseTargets

logger = logging.getLogger(__name__)

# N rows, V vocabulary, K entries of a row (a power of two), E entries of all rows, R x L a tile: R vectors of 16 bytes.

TILES = ((4, 2), (8, 2), (16, 1), (16, 2), (32, 2))  # warps and vectors a thread that compile without spills
LOWEST = tl.constexpr(-3.0e38)  # finite, so that the online maximum of only -inf gives no NaN
LOG_ZERO = tl.constexpr(divergences.LOG_ZERO)
LOG_FLOOR = tl.constexpr(divergences.LOG_FLOOR)
SAME_LOG = tl.constexpr(divergences.SAME_LOG)
MOST_K = 4096  # the entries of a row stay in registers


@triton.jit
def _log_add(a, b):
    top = tl.maximum(a, b)
    return top + tl.log(1.0 + tl.exp(tl.minimum(a, b) - top))


@triton.jit
def _terms(log_p, log_q, mix, DIVERGENCE: tl.constexpr):
    """Loss and h = Q dL/dQ of each bucket: a branch per entry of `divergences.DIVERGENCES`, with the same formulas.

    A bucket without student mass (log_q = -inf) has h = 0, except for forward KL.
    """
    log_p = tl.maximum(log_p, LOG_ZERO)
    if DIVERGENCE != "forward_kl":  # which is infinite there
        log_q = tl.maximum(log_q, LOG_ZERO)
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if DIVERGENCE == "forward_kl":
        loss = p * (log_p - log_q)
        h = -p
    elif DIVERGENCE == "reverse_kl":
        log_qp = log_q - tl.maximum(log_p, LOG_FLOOR)
        loss = q * log_qp
        h = q * (log_qp + 1.0)
    elif DIVERGENCE == "jsd":
        log_m = _log_add(log_p + tl.log(mix), log_q + tl.log(1.0 - mix))
        loss = mix * p * (log_p - log_m) + (1.0 - mix) * q * (log_q - log_m)
        h = (1.0 - mix) * q * (log_q - log_m)
    elif DIVERGENCE == "skewed_forward_kl":
        log_m = _log_add(log_p + tl.log(mix), log_q + tl.log(1.0 - mix))
        loss = p * (log_p - log_m)
        h = -(1.0 - mix) * tl.exp(log_p + log_q - log_m)
    elif DIVERGENCE == "skewed_reverse_kl":
        log_qm = log_q - _log_add(log_p + tl.log(1.0 - mix), log_q + tl.log(mix))
        loss = q * log_qm
        h = q * (log_qm + 1.0 - mix * tl.exp(log_qm))
    else:
        tl.static_assert(DIVERGENCE == "tv")
        gap = log_q - log_p
        sign = tl.where(gap >= SAME_LOG, 1.0, tl.where(gap <= -SAME_LOG, -1.0, 0.0))
        loss = 0.5 * tl.abs(q - p)
        h = 0.5 * q * sign
    return loss, h


@triton.jit
def _logits(raw, scale, softcap, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """z = softcap * tanh(scale * raw / softcap), -inf kept; and tanh, of which dz/draw is made."""
    z = raw
    tanh = tl.zeros_like(raw)
    if SCALE:
        z = z * scale
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 / softcap * z))
        z = softcap * tanh
    if SCALE or SOFTCAP:
        z = tl.where(raw == float("-inf"), float("-inf"), z)
    return z, tanh


@triton.jit
def _chain(grad, tanh, scale, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        grad = grad * (1.0 - tanh * tanh)
    if SCALE:
        grad = grad * scale
    return grad


@triton.jit
def _online(top_R, sum_R, z_RL):
    new_R = tl.maximum(top_R, tl.max(z_RL, axis=1))
    return new_R, sum_R * tl.exp(top_R - new_R) + tl.sum(tl.exp(z_RL - new_R[:, None]), axis=1)


@triton.jit
def _row_kernel(
    logits_ptr,  # [N, V], row stride `stride`, overwritten by the gradient
    offsets_ptr,  # int64 [N+1]
    ids_ptr,  # [E]
    logprobs_ptr,  # float32 [E]
    log_tail_ptr,  # float32 [N]
    labels_ptr,  # int64 [N]
    weights_ptr,  # float32 [N]
    ce_weights_ptr,  # float32 [N]
    divergence_ptr,  # float32 [N], out
    ce_ptr,  # float32 [N], out
    student_tail_ptr,  # float32 [N], out
    stride,
    V,
    stored,  # columns that may be touched, V <= stored <= stride: a multiple of 16 keeps vector loads in the rest
    mix,
    temperature,
    softcap,
    scale,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    LABELS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CE_WEIGHTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALE: tl.constexpr,
    GRAD: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
):
    TILE: tl.constexpr = R * L
    row = tl.program_id(0).to(tl.int64)  # row * stride overflows int32 at 16k rows of 128k ids
    logits_ptr += row * stride
    column_RL = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    full = V // TILE * TILE

    label = -1
    if LABELS:
        label = tl.load(labels_ptr + row).to(tl.int32)
        label = tl.where(label < V, label, -1)
    weight = 1.0
    if WEIGHTS:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    ce_weight = 0.0
    if CE_WEIGHTS:
        ce_weight = tl.where(label >= 0, tl.load(ce_weights_ptr + row).to(tl.float32), 0.0)
    if WEIGHTS:  # noqa: SIM102, one is known to the compiler and one to the device
        if (weight == 0.0) & (ce_weight == 0.0):  # an ignored row is written once and never read
            if GRAD:
                for start in range(0, full, TILE):
                    tl.store(logits_ptr + start + column_RL, tl.zeros([R, L], logits_ptr.dtype.element_ty))
                rest = full + column_RL < stored
                tl.store(logits_ptr + full + column_RL, tl.zeros([R, L], logits_ptr.dtype.element_ty), mask=rest)
            tl.store(divergence_ptr + row, 0.0)
            tl.store(ce_ptr + row, 0.0)
            tl.store(student_tail_ptr + row, 0.0)
            return

    begin = tl.load(offsets_ptr + row)
    slot_K = tl.arange(0, K)
    inside_K = slot_K < tl.load(offsets_ptr + row + 1) - begin
    id_K = tl.load(ids_ptr + begin + slot_K, mask=inside_K, other=-1).to(tl.int32)
    valid_K = (id_K >= 0) & (id_K < V)
    log_p_K = tl.load(logprobs_ptr + begin + slot_K, mask=inside_K, other=0.0).to(tl.float32)
    raw_K = tl.load(logits_ptr + id_K, mask=valid_K, other=0.0).to(tl.float32)
    z_K, tanh_K = _logits(raw_K, scale, softcap, SCALE, SOFTCAP)
    raw_label = tl.load(logits_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
    z_label, tanh_label = _logits(raw_label, scale, softcap, SCALE, SOFTCAP)
    outside = (label >= 0) & (tl.sum(tl.where(valid_K & (id_K == label), 1, 0), axis=0) == 0)
    tl.debug_barrier()  # every thread has gathered
    tl.store(logits_ptr + id_K, tl.full([K], float("-inf"), logits_ptr.dtype.element_ty), mask=valid_K)
    tl.debug_barrier()  # every thread sees the tail alone

    top_R = tl.full([R], LOWEST, tl.float32)
    sum_R = tl.zeros([R], tl.float32)
    for start in range(0, full, TILE):
        z_RL, _ = _logits(tl.load(logits_ptr + start + column_RL).to(tl.float32), scale, softcap, SCALE, SOFTCAP)
        top_R, sum_R = _online(top_R, sum_R, z_RL)
    raw_RL = tl.load(logits_ptr + full + column_RL, mask=full + column_RL < stored, other=0.0).to(tl.float32)
    z_RL, tanh_RL = _logits(raw_RL, scale, softcap, SCALE, SOFTCAP)
    z_RL = tl.where(full + column_RL < V, z_RL, float("-inf"))
    top_R, sum_R = _online(top_R, sum_R, z_RL)
    top_tail = tl.max(top_R, axis=0)
    sum_tail = tl.sum(sum_R * tl.exp(top_R - top_tail), axis=0)
    complete = sum_tail == 0.0

    # The support's logits and all logs are relative to the row's largest logit: those far from 0 lose no precision.
    top = tl.maximum(tl.max(tl.where(valid_K, z_K, LOWEST), axis=0), top_tail)
    z_K = tl.where(valid_K, z_K - top, 0.0)
    lse_tail = tl.where(complete, float("-inf"), top_tail - top + tl.log(sum_tail))
    lse = _log_add(tl.log(tl.sum(tl.where(valid_K, tl.exp(z_K), 0.0), axis=0)), lse_tail)
    log_q_K = z_K - lse
    q_K = tl.exp(log_q_K)
    log_q_tail = lse_tail - lse
    q_tail = tl.exp(log_q_tail)
    ce = tl.where(label >= 0, lse + (top - z_label), 0.0)

    dense = 0.0  # factor of the tail's softmax
    at_label = 0.0  # subtracted from the entry of the label
    if TAIL == "support":
        log_p_K = tl.where(valid_K, log_p_K / temperature, LOWEST)
        log_p_K -= tl.max(log_p_K, axis=0)
        log_p_K -= tl.log(tl.sum(tl.exp(log_p_K), axis=0))
        log_s_K = tl.where(valid_K, z_K / temperature, LOWEST)
        log_s_K -= tl.max(log_s_K, axis=0)
        log_s_K -= tl.log(tl.sum(tl.exp(log_s_K), axis=0))
        loss_K, h_K = _terms(log_p_K, log_s_K, mix, DIVERGENCE)
        h_K = tl.where(valid_K, h_K, 0.0)
        value = tl.sum(tl.where(valid_K, loss_K, 0.0), axis=0) * temperature * temperature
        entry_K = (h_K - tl.exp(log_s_K) * tl.sum(h_K, axis=0)) * temperature
    else:
        loss_K, h_K = _terms(log_p_K, log_q_K, mix, DIVERGENCE)
        h_K = tl.where(valid_K, h_K, 0.0)
        value = tl.sum(tl.where(valid_K, loss_K, 0.0), axis=0)
        c = tl.sum(h_K, axis=0)
        if TAIL == "sampled":
            value += tl.where(outside, ce, 0.0)
            at_label = tl.where(outside, 1.0, 0.0)
            c -= at_label
            dense = -q_tail * c
        else:
            tl.static_assert(TAIL == "bucket")
            log_tail = tl.load(log_tail_ptr + row).to(tl.float32)
            loss_tail, h_tail = _terms(log_tail, log_q_tail, mix, DIVERGENCE)
            value += tl.where(complete, 0.0, loss_tail)
            h_tail = tl.where(complete, 0.0, h_tail)
            c += h_tail
            dense = h_tail - q_tail * c
        entry_K = h_K - q_K * c
    tl.store(divergence_ptr + row, value)
    tl.store(ce_ptr + row, ce)
    tl.store(student_tail_ptr + row, log_q_tail)

    if GRAD:
        entry_K = entry_K * weight + ce_weight * (q_K - tl.where(id_K == label, 1.0, 0.0))
        # The tail's softmax is exp(z - top_tail) / sum_tail.
        dense = tl.where(complete, 0.0, (dense * weight + ce_weight * q_tail) / sum_tail)
        at_label = at_label * weight + ce_weight
        grad_RL = _chain(tl.exp(z_RL - top_tail) * dense, tanh_RL, scale, SCALE, SOFTCAP)
        tl.store(logits_ptr + full + column_RL, grad_RL.to(logits_ptr.dtype.element_ty), mask=full + column_RL < stored)
        for back in range(0, full, TILE):
            at_RL = logits_ptr + (full - TILE - back) + column_RL
            z_RL, tanh_RL = _logits(tl.load(at_RL).to(tl.float32), scale, softcap, SCALE, SOFTCAP)
            grad_RL = _chain(tl.exp(z_RL - top_tail) * dense, tanh_RL, scale, SCALE, SOFTCAP)
            tl.store(at_RL, grad_RL.to(logits_ptr.dtype.element_ty))
        tl.debug_barrier()  # the dense part is written everywhere before the entries overwrite theirs
        entry_K = _chain(entry_K, tanh_K, scale, SCALE, SOFTCAP)
        tl.store(logits_ptr + id_K, entry_K.to(logits_ptr.dtype.element_ty), mask=valid_K)
        if LABELS:
            entry = tl.exp(tl.where(outside, z_label - top_tail, 0.0)) * dense - at_label
            entry = _chain(entry, tanh_label, scale, SCALE, SOFTCAP)
            tl.store(logits_ptr + label, entry.to(logits_ptr.dtype.element_ty), mask=outside)


def tile(
    vocab: int, dtype: torch.dtype, num_warps: int | None = None, vectors: int | None = None
) -> tuple[int, int, int]:
    """Vectors a tile, elements a vector, warps: pinned. Wide rows get one block an SM, for L2 to hold them all."""
    warps = num_warps or (32 if vocab >= 32768 else 16 if vocab >= 8192 else 4)
    return 32 * warps * (vectors or 2), 16 // dtype.itemsize, warps


_fastest: dict[tuple, tuple[int, int]] = {}


def autotuned(key: tuple, logits_NV: Tensor, launch: Callable[[int, int], None]) -> tuple[int, int]:
    """The fastest of TILES, measured on these logits once a process and key; needs as much memory again, once.

    Opt-in by the environment, LOGITCACHE_AUTOTUNE=1: tiles add up in different orders, so processes that choose
    differently differ in the last bits. The pinned tile needs no such run and is the same everywhere.
    """
    if key not in _fastest:
        kept_NV = logits_NV.clone()
        times = {each: milliseconds(lambda each=each: launch(*each)) for each in TILES}
        logits_NV.copy_(kept_NV)
        _fastest[key] = min(times, key=times.__getitem__)
        found = ", ".join(f"{warps}x{vectors} {ms:.3f}" for (warps, vectors), ms in times.items())
        logger.info("row kernel %s: warps x vectors, ms of %d rows: %s", key, len(logits_NV), found)
    return _fastest[key]


def milliseconds(step: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return do_bench(step, warmup=5, rep=25, return_mode="median")  # pyright: ignore[reportReturnType]


@torch.no_grad()
def sparse_divergence_(
    logits_NV: Tensor,
    targets: SparseTargets,
    objective: Objective,
    weights_N: Tensor | None = None,
    ce_weights_N: Tensor | None = None,
    *,
    grad: bool = True,
    most_k: int | None = None,
    padding: bool = False,
    num_warps: int | None = None,
    vectors: int | None = None,
) -> RowValues:
    """`reference.sparse_divergence_` on a CUDA device: bfloat16, float16 or float32 logits become their gradient.

    Rows whose two weights are zero are not read: their values are 0. With grad=False the logits are destroyed.

    Args:
        logits_NV: [N, V], unit column stride. Targets as checked by `SparseTargets.check`: ids >= V are dropped here.
        most_k: entries of the longest row, where known; finding it waits for the device.
        padding: the columns from V to the next multiple of 16 exist and may be written: vector loads for any V.
        num_warps, vectors: the tile; None: pinned, or chosen by `autotuned` where LOGITCACHE_AUTOTUNE=1.
    Raises: ValueError for column strides other than 1, rows of more than 4096 entries, padding that is not there.
    """
    n, vocab = logits_NV.shape
    stride = logits_NV.stride(0)
    if logits_NV.stride(1) != 1:
        raise ValueError(f"logits_NV has column stride {logits_NV.stride(1)}: pass it contiguous")
    stored = -(-vocab // 16) * 16 if padding else vocab
    if n > 1 and stored > stride:
        raise ValueError(
            f"{vocab} columns at a row stride of {stride} have no padding up to {stored}: pass padding=False"
        )
    if most_k is None:
        most_k = targets.longest()
    if most_k > MOST_K:
        raise ValueError(
            f"a row holds {most_k} ids, the kernel at most {MOST_K}: use reference.sparse_divergence for more"
        )
    values = RowValues(*torch.empty(3, n, device=logits_NV.device))
    if n == 0:
        return values
    nothing, both = targets.log_tail, (weights_N, ce_weights_N)
    # The kernel needs contiguous inputs.
    offsets, ids, logprobs, log_tail_N, label_N, weights_N, ce_weights_N = (
        (nothing if tensor is None else tensor).contiguous()
        for tensor in (targets.offsets, targets.ids, targets.logprobs, nothing, targets.labels, *both)
    )
    constants = {
        "DIVERGENCE": objective.divergence,
        "TAIL": objective.tail,
        "LABELS": targets.labels is not None,
        "WEIGHTS": both[0] is not None,
        "CE_WEIGHTS": both[1] is not None,
        "SOFTCAP": objective.softcap is not None,
        "SCALE": objective.logit_scale != 1.0,
        "GRAD": grad,
        "K": max(triton.next_power_of_2(most_k), 16),
    }

    def launch(num_warps: int | None, vectors: int | None) -> None:
        r, lanes, warps = tile(vocab, logits_NV.dtype, num_warps, vectors)
        _row_kernel[(n,)](
            logits_NV,
            offsets,
            ids,
            logprobs,
            log_tail_N,
            label_N,
            weights_N,
            ce_weights_N,
            *values,
            stride,
            vocab,
            stored,
            objective.mix,
            objective.temperature,
            objective.softcap or 1.0,
            objective.logit_scale,
            **constants,
            R=r,
            L=lanes,
            num_warps=warps,
            enable_fp_fusion=True,
        )

    with torch.cuda.device_of(logits_NV):  # Triton launches on the current device, not on that of its arguments
        if os.environ.get("LOGITCACHE_AUTOTUNE") == "1" and num_warps is None and vectors is None:
            key = (vocab, str(logits_NV.dtype), str(logits_NV.device), *constants.values())
            num_warps, vectors = autotuned(key, logits_NV, launch)
        launch(num_warps, vectors)
    return values


@triton.jit
def _scale_kernel(values_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:  # checked on the device, since the host would have to wait for the value
        return
    at_B = values_ptr + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) < size
    values_B = tl.load(at_B, mask=inside_B).to(tl.float32) * factor
    tl.store(at_B, values_B.to(values_ptr.dtype.element_ty), mask=inside_B)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """values *= factor, a one-element tensor; memory is not touched where the factor is 1."""
    if values.numel():
        block = 8192
        with torch.cuda.device_of(values):
            _scale_kernel[(triton.cdiv(values.numel(), block),)](
                values, factor, values.numel(), BLOCK=block, num_warps=8, enable_fp_fusion=True
            )
    return values
