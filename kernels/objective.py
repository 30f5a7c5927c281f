"""What is minimised: a divergence, what becomes of the tail, and how logits are made of hidden states."""

import difflib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "tv")


TAILS = ("bucket", "support", "sampled")


LOG_FLOOR = (
    -30.0
)  # reverse KL divides by P: a mass below e^-30 is beyond a float32 softmax over 2^18 ids (2^-24 / 2^18)


SAME_LOG = (
    1e-5  # |log Q - log P| below this is rounding of float32 log-probabilities: total variation has no slope there
)


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
