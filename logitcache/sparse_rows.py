"""Sparse distributions: top-k rows, each with the log of the probability mass outside its kept ids.

A row is a distribution over k + 1 buckets: its k kept ids, and the tail, which is everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from logitcache.errors import CacheError

# R rows; K ids per row if all rows have the same number; V vocabulary; N entries of all rows.

_UNRESOLVED = 1e-6  # a float32 log-softmax cannot resolve less mass than this
_LEAST = -512.0  # nats, for a pinned id of probability zero
MASS_SLACK = 1e-4  # how far the mass of a distribution at temperature 1 may exceed 1


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Rows of different lengths, stored flat: row r has the entries offsets[r] to offsets[r + 1].

    offsets: int64 [R + 1]; ids: int32 [N]; logprobs: float32 [N], nats at temperature 1, each row descending;
    log_tail: float32 [R], nats, -inf for a row without tail.
    """

    offsets: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    log_tail: np.ndarray

    def __len__(self) -> int:
        return len(self.log_tail)

    def __getitem__(self, rows: slice) -> SparseRows:
        """Consecutive rows as a view.

        Raises: ValueError for a step other than 1.
        """
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}: rows can only be sliced with step 1")
        offsets = self.offsets[start : max(start, stop) + 1]
        span = slice(offsets[0], offsets[-1])
        return SparseRows(
            offsets - offsets[0], self.ids[span], self.logprobs[span], self.log_tail[start : max(start, stop)]
        )

    @property
    def counts(self) -> np.ndarray:
        """int64 [R], number of entries of each row."""
        return np.diff(self.offsets)

    @staticmethod
    def concatenate(parts: Sequence[SparseRows]) -> SparseRows:
        """The rows of all parts, in order; none without parts."""
        if not parts:
            return SparseRows(np.zeros(1, np.int64), np.empty(0, np.int32), *np.empty((2, 0), np.float32))
        return SparseRows(
            np.concatenate([[0], np.cumsum(np.concatenate([part.counts for part in parts]))]).astype(np.int64),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.log_tail for part in parts]),
        )


def from_topk(ids_RK: ArrayLike, logprobs_RK: ArrayLike, vocab_size: int) -> SparseRows:
    """Makes rows of the top k that an engine returned.

    Args:
        ids_RK: integers [R, K], distinct in each row.
        logprobs_RK: float32 [R, K], nats at temperature 1, before any filter, in any order; sorted here, stably.
            Entries of probability zero (-inf) are dropped; such a row has no tail.
        vocab_size: number of ids the teacher can output, padding excluded.
    Raises: CacheError for an id that is outside the vocabulary or repeats in its row, for a NaN, and for rows that are
        not a distribution: with a mass above 1, or with more mass missing than the other ids can have.
    """
    ids_RK, logprobs_RK = np.asarray(ids_RK), np.asarray(logprobs_RK, np.float32)
    if ids_RK.ndim != 2 or ids_RK.shape != logprobs_RK.shape or not ids_RK.shape[1]:
        raise ValueError(f"ids {ids_RK.shape} and logprobs {logprobs_RK.shape} must both be [R, K] with K >= 1")
    R, K = ids_RK.shape
    if R == 0:
        return SparseRows.concatenate([])
    if ids_RK.min() < 0 or ids_RK.max() >= vocab_size:
        row = int(np.argmax(((ids_RK < 0) | (ids_RK >= vocab_size)).any(axis=1)))
        raise CacheError(f"row {row} contains an id outside 0..{vocab_size - 1}: vocab_size is not that of the teacher")
    ids_RK = ids_RK.astype(np.int32)
    ascending_RK = np.sort(ids_RK, axis=1)
    if (repeat_R := (ascending_RK[:, 1:] == ascending_RK[:, :-1]).any(axis=1)).any():
        row = int(np.argmax(repeat_R))
        raise CacheError(f"row {row} contains an id twice; pass the top k without the sampled token")
    if np.isnan(logprobs_RK).any():
        row = int(np.argmax(np.isnan(logprobs_RK).any(axis=1)))
        raise CacheError(
            f"row {row} contains a NaN log-probability: the teacher's logits overflowed; try another dtype"
        )
    if (logprobs_RK[:, 1:] > logprobs_RK[:, :-1]).any():
        order_RK = np.argsort(-logprobs_RK, axis=1, kind="stable")
        ids_RK = np.take_along_axis(ids_RK, order_RK, axis=1)
        logprobs_RK = np.take_along_axis(logprobs_RK, order_RK, axis=1)
    log_tail_R = log_tail(logprobs_RK, vocab_size)
    keep_RK = np.isfinite(logprobs_RK)
    if keep_RK.all():
        return SparseRows(np.arange(R + 1, dtype=np.int64) * K, ids_RK.ravel(), logprobs_RK.ravel(), log_tail_R)
    offsets = np.concatenate([[0], np.cumsum(keep_RK.sum(axis=1))]).astype(np.int64)
    return SparseRows(offsets, ids_RK[keep_RK], logprobs_RK[keep_RK], log_tail_R)


def log_tail(logprobs_RK: np.ndarray, vocab_size: int) -> np.ndarray:
    """Log of the probability mass outside each row's K largest entries.

    The tail is 1 - sum, in float64, as far as a float32 log-softmax resolves it. Every entry is off by half an ulp of its
    log-probability, and all entries by the rounding of their common log-sum-exp: together `slack` of mass, about 1e-6.
    The tail of a peaked row can be smaller than that. There it is estimated from the decay: the power law of the ranks
    K/2..K is continued to rank V, and the estimate is clipped to [1 - sum - slack, 1 - sum + slack]. No other id is more
    likely than the last kept one, so the tail is at most (V - K) p_K.

    Args:
        logprobs_RK: float32 [R, K], nats at temperature 1, each row descending.
        vocab_size: V; a row of K = V entries has no tail.
    Returns: float32 [R], nats; -inf only for a complete row (K = V, or a last entry of probability zero).
    Raises: CacheError for a row that is not a distribution.
    """
    logprobs_RK = np.asarray(logprobs_RK, np.float64)
    R, K = logprobs_RK.shape
    probs_RK = np.exp(logprobs_RK)
    mass_R = probs_RK.sum(axis=1)
    last_R = logprobs_RK[:, -1]
    with np.errstate(divide="ignore"):
        cap_R = last_R + np.log(float(vocab_size - K))
    wrong_R = (mass_R > 1 + MASS_SLACK) | (mass_R + np.exp(cap_R) < 1 - MASS_SLACK)
    if wrong_R.any():
        row = int(np.argmax(wrong_R))
        raise CacheError(
            f"row {row}: its {K} largest probabilities sum to {mass_R[row]:.6f}, the other {vocab_size - K} ids have "
            f"at most {np.exp(cap_R[row]):.3g}: not a distribution at temperature 1; store raw log-probabilities"
        )
    complete_R = np.isneginf(cap_R)
    entropy_R = -np.where(probs_RK > 0, probs_RK * np.where(probs_RK > 0, logprobs_RK, 0), 0).sum(axis=1)
    slack_R = 2.0**-22 * (1 + entropy_R)
    decay_R = (logprobs_RK[:, K // 2 - 1] - last_R) / np.log(K / (K // 2)) if K > 1 else np.ones(R)
    with np.errstate(divide="ignore", invalid="ignore"):
        guess_R = last_R + np.log(K) + _log_power_sum(1 - decay_R, np.log(vocab_size / K))
        floor_R = np.log(np.maximum(1 - mass_R - slack_R, 0))
        ceiling_R = np.minimum(np.log(np.clip(1 - mass_R + slack_R, slack_R, 1)), cap_R)
    tail_R = np.minimum(np.maximum(guess_R, floor_R), ceiling_R)
    return np.where(complete_R, -np.inf, tail_R).astype(np.float32)


def _log_power_sum(exponent_R: np.ndarray, log_span: float) -> np.ndarray:
    """Log of the integral of u^(exponent - 1) from u = 1 to e^log_span."""
    small = np.abs(exponent_R * log_span) < 1e-6
    safe_R = np.where(small, 1.0, exponent_R)
    return np.log(np.where(small, log_span, np.expm1(safe_R * log_span) / safe_R))


def pin(rows: SparseRows, k: int, pinned_ids: Sequence[int], pinned_logprobs_RP: np.ndarray) -> SparseRows:
    """Reduces each row to the pinned ids, whatever their rank, and its k most likely other ids.

    Args:
        rows: the most likely ids of each row; k + P of them guarantee k ids that are not pinned.
        pinned_logprobs_RP: float32 [R, P], nats at temperature 1, of the P pinned ids in their order.
    """
    R, P = len(rows), len(pinned_ids)
    pinned_RP = np.maximum(pinned_logprobs_RP, _LEAST)  # the codec needs finite values
    row_N = np.repeat(np.arange(R), rows.counts)
    rank_N = _other_ranks(rows, pinned_ids)
    others = keep(rows, (rank_N >= 0) & (rank_N < k))
    # The tail gains the mass of the ids that were cut and loses that of pinned ids that were not in the rows.
    cut_N = rank_N >= k
    mass_R = np.exp(rows.log_tail.astype(np.float64))
    mass_R += np.bincount(row_N[cut_N], np.exp(rows.logprobs[cut_N].astype(np.float64)), minlength=R)
    for p, pinned_id in enumerate(pinned_ids):
        outside_R = np.ones(R, bool)
        outside_R[row_N[rows.ids == pinned_id]] = False
        left_R = mass_R - np.where(outside_R, np.exp(pinned_RP[:, p].astype(np.float64)), 0)
        mass_R = np.where(left_R > _UNRESOLVED, left_R, np.minimum(mass_R, _UNRESOLVED))
    with np.errstate(divide="ignore"):
        log_tail_R = np.minimum(np.log(mass_R), 0).astype(np.float32)
    ids = np.concatenate([others.ids, np.tile(np.asarray(pinned_ids, np.int32), R)])
    logprobs = np.concatenate([others.logprobs, pinned_RP.ravel()])
    if (others.counts == others.counts[:1]).all():
        K = int(others.counts[0]) if R else 0
        ids_RK = np.hstack([ids[: R * K].reshape(R, K), ids[R * K :].reshape(R, P)])
        logprobs_RK = np.hstack([logprobs[: R * K].reshape(R, K), logprobs[R * K :].reshape(R, P)])
        order_RK = np.argsort(-logprobs_RK, axis=1, kind="stable")
        ids = np.take_along_axis(ids_RK, order_RK, axis=1).ravel()
        logprobs = np.take_along_axis(logprobs_RK, order_RK, axis=1).ravel()
    else:
        row_N = np.concatenate([np.repeat(np.arange(R), others.counts), np.repeat(np.arange(R), P)])
        order_N = np.lexsort((-logprobs, row_N))
        ids, logprobs = ids[order_N], logprobs[order_N]
    return SparseRows(others.offsets + np.arange(R + 1) * P, ids, logprobs, log_tail_R)


def trim(rows: SparseRows, *, top_p: float | None = None, min_k: int = 1, pinned_ids: Sequence[int] = ()) -> SparseRows:
    """Cuts each row to the smallest prefix whose mass reaches ``top_p``; the tail gains the mass that is cut.

    Args:
        top_p: mass in (0, 1]; None cuts nothing. A row that does not reach it is not cut.
        min_k: the fewest entries that a row keeps besides pinned ones, if it has as many.
        pinned_ids: ids that are never cut.
    """
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: must be above 0 and at most 1")
    if min_k < 1:
        raise ValueError(f"min_k {min_k}: must be at least 1")
    if top_p is None or len(rows) == 0:
        return rows
    probs_N = np.exp(rows.logprobs.astype(np.float64))
    before_N = np.cumsum(probs_N) - probs_N
    before_N -= np.repeat(before_N[rows.offsets[:-1]], rows.counts)  # mass of the entries before it in its row
    return keep(rows, (before_N < top_p) | (_other_ranks(rows, pinned_ids) < min_k))


def fold(rows: SparseRows, k: int, pinned_ids: Sequence[int] = ()) -> SparseRows:
    """Cuts each row to its pinned entries and its k most likely others; the tail gains the mass that is cut.

    The result is what a capture at ``k`` would have stored.
    """
    if k < 1:
        raise ValueError(f"k {k}: must be at least 1")
    return keep(rows, _other_ranks(rows, pinned_ids) < k)


def _other_ranks(rows: SparseRows, pinned_ids: Sequence[int]) -> np.ndarray:
    """Rank of each entry among those of its row that are not pinned, from 0; -1 for pinned entries; int64 [N]."""
    if not len(pinned_ids):
        return np.arange(len(rows.ids)) - np.repeat(rows.offsets[:-1], rows.counts)
    other_N = ~np.isin(rows.ids, pinned_ids)
    before_N = np.cumsum(other_N) - other_N
    return np.where(other_N, before_N - np.repeat(before_N[rows.offsets[:-1]], rows.counts), -1)


def keep(rows: SparseRows, keep_N: np.ndarray) -> SparseRows:
    """Keeps the entries marked in ``keep_N``, bool [N]; the tails gain the mass of the others."""
    if keep_N.all():
        return rows
    row_N = np.repeat(np.arange(len(rows)), rows.counts)
    cut = ~keep_N
    cut_mass_R = np.bincount(row_N[cut], np.exp(rows.logprobs[cut].astype(np.float64)), minlength=len(rows))
    with np.errstate(divide="ignore"):
        log_tail_R = np.logaddexp(rows.log_tail.astype(np.float64), np.log(cut_mass_R))
    log_tail_R = np.where(cut_mass_R > 0, np.minimum(log_tail_R, 0), rows.log_tail).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_N[keep_N], minlength=len(rows)))]).astype(np.int64)
    return SparseRows(offsets, rows.ids[keep_N], rows.logprobs[keep_N], log_tail_R)


def bucketed_kl(captured: SparseRows, stored: SparseRows) -> np.ndarray:
    """KL(captured | stored) over the kept ids and the tail, nats, float64 [R].

    Both need the same ids in every row, in any order. Each bucket adds P log(P / Q) - P + Q. This is never negative, gives
    the KL if both sides sum to 1, and counts mass that does not.
    """
    if not np.array_equal(captured.offsets, stored.offsets):
        raise ValueError("captured and stored rows have different lengths")
    row_N = np.repeat(np.arange(len(captured)), captured.counts)
    order_N, stored_order_N = np.lexsort((captured.ids, row_N)), np.lexsort((stored.ids, row_N))
    if not np.array_equal(captured.ids[order_N], stored.ids[stored_order_N]):
        raise ValueError("captured and stored rows have different ids")
    support_N = _bucket_divergence(captured.logprobs[order_N], stored.logprobs[stored_order_N])
    tail_R = _bucket_divergence(captured.log_tail, stored.log_tail)
    return np.bincount(row_N, support_N, minlength=len(captured)) + tail_R


def _bucket_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    p, q = np.exp(log_p.astype(np.float64)), np.exp(log_q.astype(np.float64))
    with np.errstate(invalid="ignore"):
        delta = np.where(p > 0, log_p.astype(np.float64) - log_q, 0)
    near = np.abs(delta) < 1  # P (delta - 1 + e^-delta) avoids the cancellation of P delta - P + Q
    return np.where(near, p * (delta + np.expm1(-np.where(near, delta, 0))), p * delta - p + q) + np.where(p > 0, 0, q)
