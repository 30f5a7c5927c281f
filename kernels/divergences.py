"""The divergences between a student's row and its teacher's, and the ways to treat the mass outside the teacher's ids.

Each is an entry of a table in this module. Option names, help texts, checks, the plain torch loss with its gradient, and the
tests are made from these tables; the Triton kernel (`triton_rows._terms`) has one branch for each divergence.
docs/extending.md adds one.

P is the teacher, Q the student, over the k + 1 buckets of a row: its k ids, and all other ids together. A loss gives the
term of every bucket; a slope gives h_b = Q_b dL/dQ_b, from which `reference` computes the gradient with respect to the logits.
Sources: GKD (arXiv 2306.13649) for jsd, DistiLLM (arXiv 2402.03898) for the skewed ones.

Losses use tensor methods only, so that this module does not import torch and command help stays quick.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BETA, ALPHA = 0.5, 0.1  # defaults: the teacher's share of jsd's mixture, the skew of the skewed divergences
LOG_ZERO = -1e4  # stands for a log of -inf: exp is 0, and 0 times it is 0
LOG_FLOOR = -30.0  # reverse KL divides by P: e^-30 is below what a float32 softmax over 2^18 ids resolves
SAME_LOG = 1e-5  # |log Q - log P| below this is float32 rounding: total variation has no slope there


@dataclass(frozen=True, slots=True)
class Divergence:
    """One divergence.

    Attributes:
        formula: L, in the words of the module's docstring.
        loss: (log P, log Q, mix) -> term of every bucket, differentiable in log Q. log P is at least LOG_ZERO; so is
            log Q, unless the loss is infinite where Q is 0.
        slope: (log P, log Q, mix) -> Q dL/dQ of every bucket.
        parameter: the option that is its `mix`, "beta" or "alpha", in (0, 1); None where it has none.
        linear_in_p: whether L is linear in P but for a constant, so that a sampled tail is unbiased.
        infinite_at_zero: whether a bucket that only the teacher has makes L infinite.
        in_nats: whether its values are nats.
    """

    formula: str
    loss: Callable[["Tensor", "Tensor", float], "Tensor"]
    slope: Callable[["Tensor", "Tensor", float], "Tensor"]
    parameter: str | None = None
    linear_in_p: bool = False
    infinite_at_zero: bool = False
    in_nats: bool = True


def _log_mean(log_p: "Tensor", log_q: "Tensor", weight_p: float) -> "Tensor":
    """log(weight_p P + (1 - weight_p) Q)"""
    return (log_p + math.log(weight_p)).logaddexp(log_q + math.log1p(-weight_p))


def _forward_kl(log_p: "Tensor", log_q: "Tensor", mix: float) -> "Tensor":
    return log_p.exp() * (log_p - log_q)


def _forward_kl_slope(log_p: "Tensor", log_q: "Tensor", mix: float) -> "Tensor":
    return -log_p.exp()


def _reverse_kl(log_p: "Tensor", log_q: "Tensor", mix: float) -> "Tensor":
    return log_q.exp() * (log_q - log_p.clamp(min=LOG_FLOOR))


def _reverse_kl_slope(log_p: "Tensor", log_q: "Tensor", mix: float) -> "Tensor":
    return log_q.exp() * (log_q - log_p.clamp(min=LOG_FLOOR) + 1)


def _jsd(log_p: "Tensor", log_q: "Tensor", beta: float) -> "Tensor":
    log_m = _log_mean(log_p, log_q, beta)
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def _jsd_slope(log_p: "Tensor", log_q: "Tensor", beta: float) -> "Tensor":
    return (1 - beta) * log_q.exp() * (log_q - _log_mean(log_p, log_q, beta))


def _skewed_forward_kl(log_p: "Tensor", log_q: "Tensor", alpha: float) -> "Tensor":
    return log_p.exp() * (log_p - _log_mean(log_p, log_q, alpha))


def _skewed_forward_kl_slope(log_p: "Tensor", log_q: "Tensor", alpha: float) -> "Tensor":
    return -(1 - alpha) * (log_p + log_q - _log_mean(log_p, log_q, alpha)).exp()


def _skewed_reverse_kl(log_p: "Tensor", log_q: "Tensor", alpha: float) -> "Tensor":
    return log_q.exp() * (log_q - _log_mean(log_p, log_q, 1 - alpha))


def _skewed_reverse_kl_slope(log_p: "Tensor", log_q: "Tensor", alpha: float) -> "Tensor":
    log_qm = log_q - _log_mean(log_p, log_q, 1 - alpha)
    return log_q.exp() * (log_qm + 1 - alpha * log_qm.exp())


def _total_variation(log_p: "Tensor", log_q: "Tensor", mix: float) -> "Tensor":
    gap = log_q.exp() - log_p.exp()
    return 0.5 * gap.detach().where((log_q - log_p).abs() < SAME_LOG, gap).abs()


def _total_variation_slope(log_p: "Tensor", log_q: "Tensor", mix: float) -> "Tensor":
    gap = log_q - log_p
    return 0.5 * log_q.exp() * gap.sign().masked_fill_(gap.abs() < SAME_LOG, 0.0)


DIVERGENCES = {
    "forward_kl": Divergence("sum P log(P/Q)", _forward_kl, _forward_kl_slope, linear_in_p=True, infinite_at_zero=True),
    "reverse_kl": Divergence("sum Q log(Q/P)", _reverse_kl, _reverse_kl_slope),
    "jsd": Divergence("b KL(P, M) + (1-b) KL(Q, M), M = b P + (1-b) Q", _jsd, _jsd_slope, "beta"),
    "skewed_forward_kl": Divergence("KL(P, a P + (1-a) Q)", _skewed_forward_kl, _skewed_forward_kl_slope, "alpha"),
    "skewed_reverse_kl": Divergence("KL(Q, (1-a) P + a Q)", _skewed_reverse_kl, _skewed_reverse_kl_slope, "alpha"),
    "tv": Divergence("1/2 sum |P - Q|", _total_variation, _total_variation_slope, in_nats=False),
}

# What becomes of the probability mass outside a teacher's row, by name, with its help text.
TAILS = {
    "bucket": "one more outcome",
    "support": "both sides are renormalised over the row's ids",
    "sampled": "the sampled token carries it",
}


def divergences_with(parameter: str) -> list[str]:
    """Names of the divergences that read `parameter`, "beta" or "alpha"."""
    return [name for name, divergence in DIVERGENCES.items() if divergence.parameter == parameter]
