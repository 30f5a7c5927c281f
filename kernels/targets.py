"""The teacher's sparse rows, and the checks of arguments."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcache.kernels.objective import Objective

# N rows, V vocabulary, K ids of a padded row, E entries of all rows together.

IGNORED = -100


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's N rows, ragged: row r has the entries offsets[r]:offsets[r+1]."""

    offsets: (
        Tensor  # int64 [N+1], ascending, within [0, E]; need not start at 0: a slice of rows shares ids and logprobs
    )
    ids: Tensor  # int32 or int64 [E]; an id < 0 is padding and masked; no id twice in a row, none >= V
    logprobs: Tensor  # float32 [E], teacher log-probabilities at T = 1, nats
    log_tail: Tensor  # float32 [N], log of the mass outside the row's ids; -inf if there are no other ids
    labels: Tensor | None = None  # int64 [N], the sampled token, for cross-entropy and the `sampled` tail; -100 = none

    def __len__(self) -> int:
        return self.log_tail.shape[0]

    def map(self, move: Callable[[Tensor], Tensor]) -> "SparseTargets":
        """The same targets with `move` applied to each tensor."""
        labels = None if self.labels is None else move(self.labels)
        return SparseTargets(move(self.offsets), move(self.ids), move(self.logprobs), move(self.log_tail), labels)

    def to(self, device: torch.device | str) -> "SparseTargets":
        return self.map(lambda tensor: tensor.to(device))

    def rows(self, start: int, stop: int) -> "SparseTargets":
        """Rows start:stop, sharing the entries."""
        labels = None if self.labels is None else self.labels[start:stop]
        return SparseTargets(self.offsets[start : stop + 1], self.ids, self.logprobs, self.log_tail[start:stop], labels)

    def longest(self) -> int:
        """Entries of the longest row. Waits for the device."""
        return int(self.offsets.diff().max()) if len(self) else 0

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids int64 [N, K], 0 where masked; log-probabilities [N, K]; mask of real entries, bool [N, K]."""
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
        """Checks that targets fit a vocabulary of `vocab` ids. Waits for the device.

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
                    f"{name} contain {found}, the student's head has {vocab} rows: "
                    "teacher and student must have the same tokenizer"
                )
        slot_K = torch.arange(ids_NK.shape[1], device=ids_NK.device)
        sorted_NK = torch.where(valid_NK, ids_NK, vocab + slot_K).sort(dim=1).values
        twice_N = (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(dim=1)
        if twice_N.any():
            row = int(twice_N.nonzero()[0])
            raise ValueError(f"row {row} has an id twice: merge the entries first (logaddexp of their logprobs)")
        return self


def resolve_ce_weights(
    targets: SparseTargets, objective: Objective, ce_weight: float, ce_weights_N: Tensor | None
) -> Tensor | None:
    """Weight of the cross-entropy for each row, float [N]; None if it is off."""
    if ce_weights_N is not None and ce_weight:
        raise ValueError("give ce_weight, one number for all rows, or ce_weights_N, one per row: not both")
    wanted = bool(ce_weight) or ce_weights_N is not None
    if targets.labels is None and (wanted or objective.tail == "sampled"):
        what = "a cross-entropy weight" if wanted else "tail='sampled'"
        raise ValueError(f"{what} needs targets.labels, the sampled tokens (-100 where there is none)")
    return torch.full_like(targets.log_tail, ce_weight) if ce_weight else ce_weights_N
