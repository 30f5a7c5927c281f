"""The objective: a divergence, the treatment of the tail, and how logits are computed from hidden states."""

import difflib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcache.kernels.divergences import ALPHA, BETA, DIVERGENCES, LOG_ZERO, TAILS


@dataclass(frozen=True)
class Objective:
    """A checked combination of options. `mix` is the parameter of the divergence, beta or alpha."""

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
        beta: float = BETA,
        alpha: float = ALPHA,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> "Objective":
        """Makes an objective from the options that a user gives.

        Raises: ValueError for an unknown name, with the nearest one, and for options that cannot be combined.
        """
        for name, value, good in (("divergence", divergence, DIVERGENCES), ("tail", tail, TAILS)):
            if value not in good:
                near = difflib.get_close_matches(value, good, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown `{name}` {value!r}: did you mean {near!r}? All: {', '.join(good)}")
        parameter = DIVERGENCES[divergence].parameter
        mix = {"beta": beta, "alpha": alpha, None: 0.5}[parameter]  # None: the divergence has no parameter
        if not 0.0 < mix < 1.0:
            raise ValueError(
                f"`divergence` {divergence} needs 0 < `{parameter}` < 1, found {mix}; its limits are forward_kl and "
                "reverse_kl; use their names"
            )
        if not temperature > 0.0:
            raise ValueError(f"`temperature` {temperature}: give a number above 0")
        if temperature != 1.0 and tail != "support":
            raise ValueError(
                f"`temperature` {temperature} with `tail` {tail} needs the teacher's log-sum-exp at that temperature, "
                "which top-k rows do not contain; use temperature 1, or tail support, where any temperature is exact"
            )
        if tail == "sampled" and not DIVERGENCES[divergence].linear_in_p:
            linear = ", ".join(name for name, each in DIVERGENCES.items() if each.linear_in_p)
            raise ValueError(
                f"`tail` sampled is unbiased for {linear} only, which is linear in P; use tail bucket for {divergence}"
            )
        if softcap is not None and not softcap > 0.0:
            raise ValueError(f"softcap {softcap}: give a number above 0, or None for off")
        if not (math.isfinite(logit_scale) and logit_scale != 0.0):
            raise ValueError(f"logit_scale {logit_scale}: give a finite number other than 0")
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
        """The term of every bucket, differentiable with respect to log_q."""
        return DIVERGENCES[self.divergence].loss(*self._bounded(log_p, log_q), self.mix)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """h = Q dL/dQ of every bucket: what the gradient is made of, by hand."""
        return DIVERGENCES[self.divergence].slope(*self._bounded(log_p, log_q), self.mix)

    def _bounded(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Both logs without -inf, which would give NaN where a mass of 0 is multiplied by it."""
        infinite = DIVERGENCES[self.divergence].infinite_at_zero
        return log_p.clamp(min=LOG_ZERO), log_q if infinite else log_q.clamp(min=LOG_ZERO)
