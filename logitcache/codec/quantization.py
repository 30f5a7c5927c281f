"""Rounds values and tails to the grids of the top-k block, and restores log-probabilities (FORMAT.md)."""

from __future__ import annotations

from functools import cache

import numpy as np

from logitcache.sparse_rows import SparseRows

# R rows; N entries of all rows, pinned ones excluded; K entries per row if all rows have the same number; E pinned ids.

COARSE_GRID = 4  # bf16 logits are multiples of 2^-4 nat or coarser, so the plane of the finer bits is mostly zeros
PIN_ZERO = (
    0x8000  # pinned values are stored with this offset: they may lie above or below the row's smallest other value
)

_GRIDS = (6, 7)  # bits below one nat; the finer grid if the coarser costs more than _GRID_KL
_GRID_KL = 4e-6  # nats, mean over a block; half a step of 2^-7 costs at most 2.6e-6
_TAIL_GRID = 7  # steps of 2^-7 in the tail's log odds cost 6e-7 nat on average
_MAX_STEPS = 0xFFFF


def steps_of(
    logprob_N: np.ndarray, pin_ER: np.ndarray, top_R: np.ndarray, last_R: np.ndarray, counts: np.ndarray, exact: bool
) -> tuple[int, np.ndarray, np.ndarray]:
    """The grid; each value in steps of 2^-grid above its row's smallest, uint32 [N]; pinned values, int32 [E, R]."""
    starts = np.cumsum(counts) - counts
    last_R = last_R.astype(np.float64)
    above_N, pin_above_ER = logprob_N.astype(np.float64) - np.repeat(last_R, counts), pin_ER - last_R
    prob_N, pin_prob_ER = np.exp(logprob_N), np.exp(pin_ER)
    most = _MAX_STEPS - PIN_ZERO if len(pin_ER) else _MAX_STEPS
    grid, step_N, pin_step_ER = 0, above_N, pin_above_ER
    # Rows read from the finer grid stay on it, so that encoding them again loses nothing.
    grids = _GRIDS[1:] if not exact and _lie_on(_GRIDS[1], above_N) and not _lie_on(_GRIDS[0], above_N) else _GRIDS
    for grid in grids:
        step_N, pin_step_ER = np.rint(above_N * 2**grid), np.rint(pin_above_ER * 2**grid)
        reach_R = np.rint((top_R - last_R) * 2**grid)
        if reach_R.max() > most:  # at most e^-256 of the top's mass: negligible
            cut_R = np.maximum(reach_R - most, 0)
            step_N, pin_step_ER = np.maximum(step_N - np.repeat(cut_R, counts), 0), pin_step_ER - cut_R
        pin_step_ER = np.maximum(pin_step_ER, -PIN_ZERO)
        error_N, pin_error_ER = step_N * 2.0**-grid - above_N, pin_step_ER * 2.0**-grid - pin_above_ER
        if exact or _rounding_kl(prob_N, error_N, starts, pin_prob_ER, pin_error_ER).mean() <= _GRID_KL:
            break
    return grid, step_N.astype(np.uint32), pin_step_ER.astype(np.int32)


def _lie_on(grid: int, above_N: np.ndarray) -> bool:
    """Whether all values lie on the grid, up to float32 rounding. The first 256 usually show if not."""
    return all(
        np.abs(scaled - np.rint(scaled)).max(initial=0) < 0.01
        for scaled in (part * 2.0**grid for part in (above_N[:256], above_N))
    )


def _rounding_kl(
    prob_N: np.ndarray, error_N: np.ndarray, starts: np.ndarray, pin_prob_ER: np.ndarray, pin_error_ER: np.ndarray
) -> np.ndarray:
    """Second-order KL of each row between its exact and its rounded, renormalised values; nats [R]."""

    def total(value_N: np.ndarray, pin_value_ER: np.ndarray) -> np.ndarray:
        total_R = np.add.reduceat(value_N, starts)
        return total_R + pin_value_ER.sum(axis=0) if len(pin_value_ER) else total_R

    mass_R = np.maximum(total(prob_N, pin_prob_ER), 1e-30)
    mean_R = total(prob_N * error_N, pin_prob_ER * pin_error_ER)
    return (total(prob_N * error_N**2, pin_prob_ER * pin_error_ER**2) - mean_R**2 / mass_R) / 2


def tail_codes(rows: SparseRows) -> np.ndarray:
    """Rounds the log odds of the tail to codes 1 to 65535; 0 for a row without tail."""
    starts = rows.offsets[:-1]
    top_R = rows.logprobs[starts].astype(np.float64)
    mass_R = np.add.reduceat(np.exp(rows.logprobs - np.repeat(top_R, rows.counts)), starts)
    code_R = 32768 + np.clip(np.rint((rows.log_tail - top_R - np.log(mass_R)) * 2**_TAIL_GRID), -32767, 32767)
    return np.where(np.isneginf(rows.log_tail), 0, code_R).astype(np.uint32)


@cache
def tail_tables() -> tuple[np.ndarray, np.ndarray]:
    """Log of the tail's and of the support's mass for every code, float32 [65536] each."""
    odds = (np.arange(65536) - 32768.0) * 2.0**-_TAIL_GRID
    odds[0] = -np.inf
    return (-np.logaddexp(0, -odds)).astype(np.float32), (-np.logaddexp(0, odds)).astype(np.float32)


def renormalise(
    minus_step_N: np.ndarray, reach: float, grid: int, offsets: np.ndarray, K: int, log_support_R: np.ndarray
) -> np.ndarray:
    """Log-probabilities, float32 [N], from the steps and the support mass of rows; ``reach``: the largest value, nats."""
    value_N = minus_step_N.astype(np.float32)
    value_N *= -(2.0**-grid)
    starts = offsets[:-1]
    if reach > 64:  # float32 overflows above e^88
        value_N -= np.repeat(value_N[starts], offsets[1:] - offsets[:-1])
    if K:
        value_RK = value_N.reshape(-1, K)
        mass_R = np.einsum("rk->r", np.exp(value_RK))  # a product with ones would start BLAS threads
        value_RK += (log_support_R - np.log(mass_R))[:, None]
    else:
        mass_R = np.add.reduceat(np.exp(value_N), starts)
        value_N += np.repeat(log_support_R - np.log(mass_R), offsets[1:] - offsets[:-1])
    return value_N
