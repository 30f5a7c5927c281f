"""Every sparse divergence in plain torch: the definition, the CPU path and the test oracle.

A teacher's row is a support S (k ids with log-probabilities at T = 1) and the log of the mass outside it. With P and Q
over the k + 1 buckets (support entries, tail), h_b = Q_b dL/dQ_b and c = sum_b h_b, the gradient by the logits is

    dL/dz_j = h_b - Q_b c           for an id j that is itself a bucket (the support),
    dL/dz_j = r_j (h_t - Q_t c)     for the rest, r = softmax over the tail alone.

Everything is finite where Q underflows, and one dense factor plus k overwritten entries is the whole gradient. Sources:
GKD (arXiv 2306.13649), DistiLLM (arXiv 2402.03898), Sparse Logit Sampling (arXiv 2503.16870).
"""

import difflib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# N taught rows, V vocabulary, K ids a padded row, E entries of all rows together. Masses are in nats.

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "tv")
TAILS = ("bucket", "support", "sampled")
IGNORED = -100
LOG_FLOOR = (
    -30.0
)  # reverse KL divides by P: a mass below e^-30 is beyond a float32 softmax over 2^18 ids (2^-24 / 2^18)
SAME_LOG = (
    1e-5  # |log Q - log P| below this is rounding of float32 log-probabilities: total variation has no slope there
)


@dataclass(frozen=True)
class SparseTargets:
    """What the teacher said in N rows, ragged: row r owns the entries offsets[r]:offsets[r+1].

    offsets:  int64 [N+1], ascending, within [0, E]; need not start at 0, so a slice of rows shares ids and logprobs.
    ids:      int32 or int64 [E]; an id < 0 is padding and masked. No id twice in a row, none >= V.
    logprobs: float32 [E], teacher log-probabilities at T = 1, nats.
    log_tail: float32 [N], log mass outside the support; -inf where the support is complete.
    labels:   int64 [N], the realised token, for the cross-entropy and the `sampled` tail; -100 = none.
    """

    offsets: Tensor
    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.log_tail.shape[0]

    def to(self, device: torch.device | str) -> "SparseTargets":
        labels = None if self.labels is None else self.labels.to(device)
        entries = self.ids.to(device), self.logprobs.to(device)
        return SparseTargets(self.offsets.to(device), *entries, self.log_tail.to(device), labels)

    def rows(self, start: int, stop: int) -> "SparseTargets":
        """Rows start:stop, sharing the entries."""
        labels = None if self.labels is None else self.labels[start:stop]
        return SparseTargets(self.offsets[start : stop + 1], self.ids, self.logprobs, self.log_tail[start:stop], labels)

    def longest(self) -> int:
        """Entries of the longest row. Waits for the device."""
        return int(self.offsets.diff().max()) if len(self) else 0

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids int64 [N, K] (0 where masked), log-probabilities [N, K] and the bool mask [N, K] of real entries."""
        slot_K = torch.arange(max(self.longest(), 1), device=self.ids.device)
        valid_NK = slot_K < self.offsets.diff()[:, None]
        if self.ids.numel() == 0:
            zeros_NK = torch.zeros(valid_NK.shape, device=self.ids.device)
            return zeros_NK.long(), zeros_NK, valid_NK
        index_NK = (self.offsets[:-1, None] + slot_K).clamp_(max=self.ids.numel() - 1)
        ids_NK = self.ids[index_NK].long()
        valid_NK &= ids_NK >= 0
        return ids_NK.masked_fill_(~valid_NK, 0), self.logprobs[index_NK], valid_NK

    def check(self, vocab: int) -> "SparseTargets":
        """Refuse targets that do not fit a vocabulary of `vocab` ids. Waits for the device.

        Raises: ValueError for shapes that disagree, an id or label >= vocab, an id twice in one row.
        """
        n, e = len(self), self.ids.shape[0]
        labels = self.log_tail if self.labels is None else self.labels
        shapes = (self.offsets.shape, self.logprobs.shape, labels.shape)
        if shapes != ((n + 1,), (e,), (n,)):
            raise ValueError(
                f"targets of {n} rows and {e} ids need offsets [{n + 1}], logprobs [{e}], labels [{n}] or None; "
                f"found {', '.join(str(list(shape)) for shape in shapes)}"
            )
        if n == 0:
            return self
        low, high = self.offsets.aminmax()
        ordered = (self.offsets.diff() >= 0).all()
        if low < 0 or high > e or not ordered:
            raise ValueError(f"offsets must ascend within [0, {e}], the number of ids; found {int(low)}..{int(high)}")
        ids_NK, _, valid_NK = self.padded()
        label = int(labels.max()) if self.labels is not None else -1
        for name, found in (("ids", int(ids_NK.max())), ("labels", label)):
            if found >= vocab:
                raise ValueError(
                    f"{name} hold {found}, the student's head has {vocab} rows: "
                    "teacher and student must share a tokenizer"
                )
        slot_K = torch.arange(ids_NK.shape[1], device=ids_NK.device)
        sorted_NK = torch.where(valid_NK, ids_NK, vocab + slot_K).sort(dim=1).values
        twice_N = (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(dim=1)
        if twice_N.any():
            row = int(twice_N.nonzero()[0])
            raise ValueError(f"row {row} holds an id twice: merge its entries (logaddexp of their logprobs) first")
        return self


@dataclass(frozen=True)
class Objective:
    """What is minimised, resolved and checked. `mix` is beta of jsd or alpha of the skewed ones."""

    divergence: str = "forward_kl"
    tail: str = "bucket"
    mix: float = 0.5
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def of(
        cls,
        divergence: str = "forward_kl",
        tail: str = "bucket",
        beta: float = 0.5,
        alpha: float = 0.1,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> "Objective":
        """Check the options as a user gives them. Raises: ValueError with the nearest good one."""
        for name, value, good in (("divergence", divergence, DIVERGENCES), ("tail", tail, TAILS)):
            if value not in good:
                near = difflib.get_close_matches(value, good, n=1, cutoff=0.0)[0]
                raise ValueError(f"{name}={value!r} is unknown: did you mean {near!r}? All: {', '.join(good)}")
        mix, letter = (beta, "beta") if divergence == "jsd" else (alpha, "alpha")
        if (divergence == "jsd" or divergence.startswith("skewed")) and not 0.0 < mix < 1.0:
            raise ValueError(
                f"{divergence} needs 0 < {letter} < 1, found {mix}: its limits are forward_kl and reverse_kl, "
                "ask for those by name"
            )
        if not temperature > 0.0:
            raise ValueError(f"temperature={temperature} must be positive")
        if temperature != 1.0 and tail != "support":
            raise ValueError(
                f"temperature={temperature} with tail={tail!r} needs the teacher's log-sum-exp at that temperature, "
                "which top-k rows do not hold: use temperature=1.0, or tail='support', where any temperature is exact"
            )
        if tail == "sampled" and divergence != "forward_kl":
            raise ValueError(
                f"tail='sampled' is unbiased for forward_kl only, which is linear in P; "
                f"{divergence} needs tail='bucket'"
            )
        if softcap is not None and not softcap > 0.0:
            raise ValueError(f"softcap={softcap} must be positive, or None for off")
        if not (math.isfinite(logit_scale) and logit_scale != 0.0):
            raise ValueError(f"logit_scale={logit_scale} must be finite and not zero")
        return cls(divergence, tail, float(mix), float(temperature), softcap, float(logit_scale))

    def logits(self, raw: Tensor) -> Tensor:
        """z = softcap(scale * raw), as the student's own forward has it, but a raw -inf stays -inf: a masked id."""
        if self.logit_scale == 1.0 and self.softcap is None:
            return raw
        z = raw * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z.masked_fill(raw == -math.inf, -math.inf)

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence's term of every bucket, differentiable in log_q."""
        log_p = log_p.clamp(min=-1e4)  # exp is 0 and 0 * log_p is 0, where -inf would make NaN
        p, q, a = log_p.exp(), log_q.exp(), self.mix
        if self.divergence == "forward_kl":
            return p * (log_p - log_q)
        if self.divergence == "reverse_kl":
            return q * (log_q - log_p.clamp(min=LOG_FLOOR))
        if self.divergence == "jsd":
            log_m = _log_mean(log_p, log_q, a)
            return a * p * (log_p - log_m) + (1 - a) * q * (log_q - log_m)
        if self.divergence == "skewed_forward_kl":
            return p * (log_p - _log_mean(log_p, log_q, a))
        if self.divergence == "skewed_reverse_kl":
            return q * (log_q - _log_mean(log_p, log_q, 1 - a))
        gap = q - p
        return 0.5 * torch.where((log_q - log_p).abs() < SAME_LOG, gap.detach(), gap).abs()

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """h = Q dL/dQ of every bucket: what the gradient is made of, by hand."""
        log_p = log_p.clamp(min=-1e4)
        q, a = log_q.exp(), self.mix
        if self.divergence == "forward_kl":
            return -log_p.exp()
        if self.divergence == "reverse_kl":
            return q * (log_q - log_p.clamp(min=LOG_FLOOR) + 1)
        if self.divergence == "jsd":
            return (1 - a) * q * (log_q - _log_mean(log_p, log_q, a))
        if self.divergence == "skewed_forward_kl":
            return -(1 - a) * (log_p + log_q - _log_mean(log_p, log_q, a)).exp()
        if self.divergence == "skewed_reverse_kl":
            log_qm = log_q - _log_mean(log_p, log_q, 1 - a)
            return q * (log_qm + 1 - a * log_qm.exp())
        return 0.5 * q * torch.sign(log_q - log_p).masked_fill_((log_q - log_p).abs() < SAME_LOG, 0.0)


def _log_mean(log_p: Tensor, log_q: Tensor, weight_p: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(weight_p), log_q + math.log1p(-weight_p))


def sparse_divergence(
    logits_NV: Tensor,
    targets: SparseTargets,
    *,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
    ce_weight: float = 0.0,
    ce_weights_N: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    check: bool = True,
) -> Tensor:
    """Divergence of each row from its sparse teacher: the definition, differentiable by autograd any number of times.

    tail: `bucket` adds one bucket for all the mass outside the support; `support` renormalises both sides on the
    support; `sampled` lets the realised token carry the mass outside (unbiased gradient of the dense forward KL; its
    value exceeds the KL by the entropy of the teacher's tail), valid only where that token was sampled at T = 1 without
    filters. The loss carries T^2, so gradients keep their size at any temperature. A bucket to which the teacher gives
    no mass counts as e^-30 in the logarithm of reverse_kl. Where the support is all V ids, or all other logits are
    -inf, there is no tail. A logit of -inf is a masked id, also under a softcap, which would give it e^-softcap: it has
    no probability and no gradient. A row without a support has no divergence; its `sampled` tail is a cross-entropy.

    Args:
        logits_NV: floating [N, V], before `logit_scale` and `softcap`. Computed in float32, or float64 if it is.
        beta, alpha: P's share of the mixture in jsd; the skew of the skewed ones. Both in (0, 1).
        weights_N: float [N], factor of each row's divergence, 1 by default.
        ce_weight, ce_weights_N: factor of the cross-entropy with `targets.labels`, for all rows or float [N].
        check: refuse targets that do not fit V; waits for the device.
    Returns: float32 (float64) [N], nats.
    Raises: ValueError for options that do not go together, and for targets that do not fit.
    """
    objective = Objective.of(divergence, tail, beta, alpha, temperature, softcap, logit_scale)
    ce_weights_N = resolve_ce_weights(targets, objective, ce_weight, ce_weights_N)
    n, vocab = logits_NV.shape
    if n != len(targets):
        raise ValueError(f"logits_NV has {n} rows, targets {len(targets)}")
    if check:
        targets.check(vocab)
    z_NV = objective.logits(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)))
    ids_NK, log_p_NK, valid_NK = targets.padded()
    log_p_NK, log_tail_N = log_p_NK.to(z_NV.dtype), targets.log_tail.to(z_NV.dtype)
    z_NK, lse_N = z_NV.gather(1, ids_NK), z_NV.logsumexp(dim=1)
    label_N, outside_N = _labels(targets, ids_NK, valid_NK)
    ce_N = (lse_N - z_NV.gather(1, label_N.clamp(min=0)[:, None])[:, 0]) * (label_N >= 0)

    if tail == "support":
        hidden_NK = ~valid_NK
        log_p_NK = (log_p_NK / temperature).masked_fill(hidden_NK, -1e4).log_softmax(dim=1)
        log_q_NK = (z_NK / temperature).masked_fill(hidden_NK, -1e4).log_softmax(dim=1)
        value_N = objective.loss(log_p_NK, log_q_NK).masked_fill(hidden_NK, 0.0).sum(dim=1) * temperature**2
    else:
        log_q_NK = z_NK - lse_N[:, None]
        value_N = objective.loss(log_p_NK, log_q_NK).masked_fill(~valid_NK, 0.0).sum(dim=1)
        if tail == "sampled":
            value_N = value_N + ce_N * outside_N
        else:
            rows_E, slots_E = valid_NK.nonzero(as_tuple=True)
            rest_NV = z_NV.index_put((rows_E, ids_NK[rows_E, slots_E]), z_NV.new_tensor(-math.inf))
            complete_N = rest_NV.detach().amax(dim=1) == -math.inf
            rest_NV = rest_NV.masked_fill(complete_N[:, None], 0.0)
            tail_N = objective.loss(log_tail_N, rest_NV.logsumexp(dim=1) - lse_N)
            value_N = value_N + tail_N.masked_fill(complete_N, 0.0)
    if weights_N is not None:
        value_N = value_N * weights_N
    return value_N if ce_weights_N is None else value_N + ce_N * ce_weights_N


def resolve_ce_weights(
    targets: SparseTargets, objective: Objective, ce_weight: float, ce_weights_N: Tensor | None
) -> Tensor | None:
    """One factor a row for the cross-entropy, or None where it is off."""
    if ce_weights_N is not None and ce_weight:
        raise ValueError("give ce_weight, one number for all rows, or ce_weights_N, one a row: not both")
    wanted = bool(ce_weight) or ce_weights_N is not None
    if targets.labels is None and (wanted or objective.tail == "sampled"):
        what = "a cross-entropy weight" if wanted else "tail='sampled'"
        raise ValueError(f"{what} needs targets.labels, the realised tokens (-100 where there is none)")
    return torch.full_like(targets.log_tail, ce_weight) if ce_weight else ce_weights_N


def _labels(targets: SparseTargets, ids_NK: Tensor, valid_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [N] (negative = none), and where a label lies outside the support, bool [N]."""
    if targets.labels is None:
        none_N = torch.full_like(targets.offsets[1:], IGNORED)
        return none_N, torch.zeros_like(none_N, dtype=torch.bool)
    label_N = targets.labels.long()
    inside_N = ((ids_NK == label_N[:, None]) & valid_NK).any(dim=1)
    return label_N, (label_N >= 0) & ~inside_N


class RowValues(NamedTuple):
    """Per row, unweighted, nats: the divergence, the cross-entropy (0 without a label), the student's log tail mass."""

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
    """The same by hand and in place: float32 (float64) logits [N, V] become the gradient of the weighted sum.

    No second buffer, but one with a softcap. With grad=False the logits are destroyed. Targets are taken as checked.
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
    lse_tail_N = softmax_(logits_NV)
    lse_N = torch.logaddexp(z_NK.masked_fill(hidden_NK, -math.inf).logsumexp(dim=1), lse_tail_N)
    complete_N = lse_tail_N == -math.inf
    log_q_NK, log_q_tail_N = z_NK - lse_N[:, None], lse_tail_N - lse_N
    q_NK, q_tail_N = log_q_NK.exp(), log_q_tail_N.exp()
    ce_N = (lse_N - z_label_N) * (label_N >= 0)

    dense_N = torch.zeros_like(lse_N)  # factor of the tail's softmax r
    at_label_N = torch.zeros_like(lse_N)  # what the label's own entry loses
    if objective.tail == "support":
        t = objective.temperature
        log_p_NK = (log_p_NK / t).masked_fill_(hidden_NK, -1e4).log_softmax(dim=1)
        log_s_NK = (z_NK / t).masked_fill_(hidden_NK, -1e4).log_softmax(dim=1)
        value_N = objective.loss(log_p_NK, log_s_NK).masked_fill_(hidden_NK, 0.0).sum(dim=1) * t**2
        h_NK = objective.slope(log_p_NK, log_s_NK).masked_fill_(hidden_NK, 0.0)
        entry_NK = (h_NK - log_s_NK.exp() * h_NK.sum(dim=1, keepdim=True)) * t
    else:
        value_N = objective.loss(log_p_NK, log_q_NK).masked_fill_(hidden_NK, 0.0).sum(dim=1)
        h_NK = objective.slope(log_p_NK, log_q_NK).masked_fill_(hidden_NK, 0.0)
        if objective.tail == "sampled":
            value_N += ce_N * outside_N
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


def softmax_(logits_NV: Tensor) -> Tensor:
    """Softmax of each row in place; returns the log-sum-exp [N]. A row of nothing but -inf becomes zeros, and -inf."""
    top_N = logits_NV.amax(dim=1)
    empty_N = top_N == -math.inf
    logits_NV.sub_(top_N.masked_fill(empty_N, 0.0)[:, None]).exp_()
    sum_N = logits_NV.sum(dim=1)
    logits_NV.div_(sum_N.masked_fill(empty_N, 1.0)[:, None])
    return top_N + sum_N.log()
