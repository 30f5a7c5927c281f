"""Every sparse divergence in plain torch: the definition, the CPU path and the test oracle.

A teacher's row is its support S (k ids with log-probabilities at T = 1) and the log of the mass outside it. With P and Q
over the k + 1 buckets (support entries, tail), h_b = Q_b dL/dQ_b and c = sum_b h_b, the gradient by the logits is

    dL/dz_j = h_b - Q_b c           for an id j that is itself a bucket (the support),
    dL/dz_j = r_j (h_t - Q_t c)     for the rest, r = softmax over the tail alone.

Everything is finite where Q underflows, and one dense factor plus k overwritten entries is the whole gradient. Sources:
GKD (arXiv 2306.13649), DistiLLM (arXiv 2402.03898), Sparse Logit Sampling (arXiv 2503.16870).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from logitcache.kernels.divergences import ALPHA, BETA, LOG_ZERO
from logitcache.kernels.objective import Objective
from logitcache.kernels.targets import IGNORED, SparseTargets, resolve_ce_weights

# N rows, V vocabulary, K ids of a padded row, E entries of all rows together. Log masses are in nats.


def sparse_divergence(
    logits_NV: Tensor,
    targets: SparseTargets,
    *,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    beta: float = BETA,
    alpha: float = ALPHA,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
    ce_weight: float = 0.0,
    ce_weights_N: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    check: bool = True,
) -> Tensor:
    """Divergence of each row from its sparse teacher: the definition, differentiable by autograd any number of times.

    Tails. `bucket`: one more bucket for all the mass outside the support. `support`: both sides are renormalised over the
    support. `sampled`: the sampled token carries the mass outside; the gradient is an unbiased estimate of the dense
    forward KL's (the value exceeds the KL by the entropy of the teacher's tail), if the token was sampled at T = 1 without
    filters.

    Edge cases. The loss includes T^2, so gradients keep their size at any temperature. A bucket without teacher mass
    counts as e^-30 in the logarithm of reverse_kl. There is no tail if the support is all V ids, or if all other logits
    are -inf. A logit of -inf is a masked id, also under a softcap (which would give it e^-softcap): it has no probability
    and no gradient. A row without a support has no divergence; its `sampled` tail is a cross-entropy.

    Args:
        logits_NV: floating [N, V], before `logit_scale` and `softcap`. Computed in float32, or float64 if it is.
        beta, alpha: the parameter of the divergence, as `divergences.DIVERGENCES` has it. In (0, 1).
        weights_N: float [N], weight of each row's divergence; None: 1.
        ce_weight, ce_weights_N: weight of the cross-entropy with `targets.labels`, for all rows or float [N].
        check: check the targets against V, which waits for the device.
    Returns: float32 (float64) [N], nats.
    Raises: ValueError for options that cannot be combined, and for targets that do not fit.
    """
    objective = Objective.of(divergence, tail, beta, alpha, temperature, softcap, logit_scale)
    ce_weights_N = resolve_ce_weights(targets, objective, ce_weight, ce_weights_N)
    n, vocab = logits_NV.shape
    if n != len(targets):
        raise ValueError(f"logits_NV has {n} rows, targets {len(targets)}")
    if check:
        targets.check(vocab)
    z_NV = objective.logits(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)))
    z_NV = z_NV - _finite(z_NV.detach().amax(dim=1))[:, None]  # logits far from 0 lose no precision below
    ids_NK, log_p_NK, valid_NK = targets.padded()
    log_p_NK, log_tail_N = log_p_NK.to(z_NV.dtype), targets.log_tail.to(z_NV.dtype)
    z_NK, lse_N = z_NV.gather(1, ids_NK).masked_fill(~valid_NK, 0.0), z_NV.logsumexp(dim=1)
    label_N, outside_N = _labels(targets, ids_NK, valid_NK)
    ce_N = (lse_N - z_NV.gather(1, label_N.clamp(min=0)[:, None])[:, 0]).masked_fill(label_N < 0, 0.0)

    if tail == "support":
        log_p_NK, log_q_NK = (_log_softmax(x_NK / temperature, valid_NK) for x_NK in (log_p_NK, z_NK))
        value_N = objective.loss(log_p_NK, log_q_NK).masked_fill(~valid_NK, 0.0).sum(dim=1) * temperature**2
    else:
        log_q_NK = z_NK - lse_N[:, None]
        value_N = objective.loss(log_p_NK, log_q_NK).masked_fill(~valid_NK, 0.0).sum(dim=1)
        if tail == "sampled":
            value_N = value_N + ce_N.masked_fill(~outside_N, 0.0)
        else:
            rows_E, slots_E = valid_NK.nonzero(as_tuple=True)
            rest_NV = z_NV.index_put((rows_E, ids_NK[rows_E, slots_E]), z_NV.new_tensor(-math.inf))
            complete_N = rest_NV.detach().amax(dim=1) == -math.inf
            rest_NV = rest_NV.masked_fill(complete_N[:, None], 0.0)
            tail_N = objective.loss(log_tail_N, rest_NV.logsumexp(dim=1) - lse_N)
            value_N = value_N + tail_N.masked_fill(complete_N, 0.0)
    value_N = weighted(value_N, weights_N)
    return value_N if ce_weights_N is None else value_N + weighted(ce_N, ce_weights_N)


def weighted(values_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """The values times their weights; None: 1. A weight of 0 makes 0 of any value, inf and NaN included."""
    return values_N if weights_N is None else (values_N * weights_N).masked_fill(weights_N == 0, 0.0)


def _finite(top_N: Tensor) -> Tensor:
    """The largest logit of each row; 0 for a row of only -inf."""
    return top_N.masked_fill(top_N == -math.inf, 0.0)


def _log_softmax(x_NK: Tensor, valid_NK: Tensor) -> Tensor:
    """Log-softmax over the valid entries of each row; the others are finite."""
    hidden_NK = ~valid_NK & valid_NK.any(dim=1, keepdim=True)
    return x_NK.masked_fill(hidden_NK, -math.inf).log_softmax(dim=1).masked_fill(hidden_NK, LOG_ZERO)


def _labels(targets: SparseTargets, ids_NK: Tensor, valid_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [N], negative for none; whether each label is outside the support, bool [N]."""
    if targets.labels is None:
        none_N = torch.full_like(targets.offsets[1:], IGNORED)
        return none_N, torch.zeros_like(none_N, dtype=torch.bool)
    label_N = targets.labels.long()
    inside_N = ((ids_NK == label_N[:, None]) & valid_NK).any(dim=1)
    return label_N, (label_N >= 0) & ~inside_N


class RowValues(NamedTuple):
    """Per row, unweighted, in nats: divergence, cross-entropy (0 without a label), the student's log tail mass."""

    divergence_N: Tensor
    ce_N: Tensor
    log_tail_N: Tensor


@torch.no_grad()
def sparse_divergence_(
    logits_NV: Tensor,
    targets: SparseTargets,
    objective: Objective,
    weights_N: Tensor | None = None,
    ce_weights_N: Tensor | None = None,
    *,
    grad: bool = True,
) -> RowValues:
    """The same loss with a hand-written gradient, in place: float32 (float64) logits [N, V] become the gradient of the sum.

    Needs a second buffer only with a softcap. With grad=False the logits are overwritten. Targets must be checked.
    """
    capped = objective.softcap is not None or objective.logit_scale < 0
    masked_NV = logits_NV == -math.inf if capped else None
    if objective.logit_scale != 1.0:
        logits_NV.mul_(objective.logit_scale)
    chain_NV = None
    if objective.softcap is not None:
        logits_NV.div_(objective.softcap).tanh_()
        chain_NV = 1 - logits_NV * logits_NV if grad else None
        logits_NV.mul_(objective.softcap)
    if masked_NV is not None:
        logits_NV.masked_fill_(masked_NV, -math.inf)
    ids_NK, log_p_NK, valid_NK = targets.padded()
    log_p_NK, hidden_NK = log_p_NK.to(logits_NV.dtype), ~valid_NK
    label_N, outside_N = _labels(targets, ids_NK, valid_NK)
    rows_E, slots_E = valid_NK.nonzero(as_tuple=True)
    ids_E = ids_NK[rows_E, slots_E]

    z_NK = logits_NV.gather(1, ids_NK)
    z_label_N = logits_NV.gather(1, label_N.clamp(min=0)[:, None])[:, 0]
    logits_NV[rows_E, ids_E] = -math.inf
    top_N, lse_tail_N = softmax_(logits_NV)
    # All logits relative to the row's largest: those far from 0 lose no precision.
    base_N = _finite(z_NK.masked_fill(hidden_NK, -math.inf).amax(dim=1).maximum(top_N))
    z_NK, z_label_N, lse_tail_N = z_NK - base_N[:, None], z_label_N - base_N, lse_tail_N + (top_N - base_N)
    lse_N = torch.logaddexp(z_NK.masked_fill(hidden_NK, -math.inf).logsumexp(dim=1), lse_tail_N)
    complete_N = lse_tail_N == -math.inf
    log_q_NK, log_q_tail_N = z_NK - lse_N[:, None], lse_tail_N - lse_N
    q_NK, q_tail_N = log_q_NK.exp(), log_q_tail_N.exp()
    ce_N = (lse_N - z_label_N).masked_fill(label_N < 0, 0.0)

    dense_N = torch.zeros_like(lse_N)  # factor of the tail's softmax r
    at_label_N = torch.zeros_like(lse_N)  # subtracted from the entry of the label
    if objective.tail == "support":
        t = objective.temperature
        log_p_NK, log_s_NK = (_log_softmax(x_NK / t, valid_NK) for x_NK in (log_p_NK, z_NK))
        value_N = objective.loss(log_p_NK, log_s_NK).masked_fill_(hidden_NK, 0.0).sum(dim=1) * t**2
        h_NK = objective.slope(log_p_NK, log_s_NK).masked_fill_(hidden_NK, 0.0)
        entry_NK = (h_NK - log_s_NK.exp() * h_NK.sum(dim=1, keepdim=True)) * t
    else:
        value_N = objective.loss(log_p_NK, log_q_NK).masked_fill_(hidden_NK, 0.0).sum(dim=1)
        h_NK = objective.slope(log_p_NK, log_q_NK).masked_fill_(hidden_NK, 0.0)
        if objective.tail == "sampled":
            value_N += ce_N.masked_fill(~outside_N, 0.0)
            h_tail_N = torch.zeros_like(lse_N)
            c_N = h_NK.sum(dim=1) - outside_N.to(lse_N.dtype)
            at_label_N += outside_N
        else:
            log_tail_N = targets.log_tail.to(lse_N.dtype)
            value_N += objective.loss(log_tail_N, log_q_tail_N).masked_fill_(complete_N, 0.0)
            h_tail_N = objective.slope(log_tail_N, log_q_tail_N).masked_fill_(complete_N, 0.0)
            c_N = h_NK.sum(dim=1) + h_tail_N
        entry_NK = h_NK - q_NK * c_N[:, None]
        dense_N = h_tail_N - q_tail_N * c_N
    values = RowValues(value_N, ce_N, log_q_tail_N)
    if not grad:
        return values

    if weights_N is not None:
        entry_NK, dense_N, at_label_N = entry_NK * weights_N[:, None], dense_N * weights_N, at_label_N * weights_N
    if ce_weights_N is not None:
        ce_w_N = ce_weights_N * (label_N >= 0)
        entry_NK = entry_NK + ce_w_N[:, None] * (q_NK - (ids_NK == label_N[:, None]).to(q_NK.dtype))
        dense_N, at_label_N = dense_N + ce_w_N * q_tail_N, at_label_N + ce_w_N
    logits_NV.mul_(dense_N.masked_fill(complete_N, 0.0)[:, None])
    rows_O = outside_N.nonzero()[:, 0]
    logits_NV[rows_O, label_N[rows_O]] -= at_label_N[rows_O].to(logits_NV.dtype)
    logits_NV[rows_E, ids_E] = entry_NK[rows_E, slots_E].to(logits_NV.dtype)
    if chain_NV is not None:
        logits_NV.mul_(chain_NV)
    if objective.logit_scale != 1.0:
        logits_NV.mul_(objective.logit_scale)
    return values


def softmax_(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of each row in place; a row of only -inf becomes zeros.

    Returns: the largest logit [N] and the log of the sum of exp(logit - largest) [N]; both -inf for a row of only -inf.
    """
    top_N = logits_NV.amax(dim=1)
    sum_N = logits_NV.sub_(_finite(top_N)[:, None]).exp_().sum(dim=1)
    logits_NV.div_(sum_N.masked_fill(sum_N == 0, 1.0)[:, None])
    return top_N, sum_N.log()
