"""A trace in memory: one prompt, one completion, and the teacher's distribution at each token."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logitcache.sections import Sections
from logitcache.sparse_rows import SparseRows


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt with one completion. L tokens, R rows, nnz kept entries.

    Row r is the teacher's distribution of token ``row_start + r``, given the tokens before it.
    """

    trace_id: str
    prompt_id: str
    sample_index: int
    token_ids: np.ndarray  # int32 [L]
    sections: Sections
    row_start: int
    rows: SparseRows
    token_logprob: np.ndarray  # float32 [R], log-probability of the sampled token, nats at temperature 1
    token_rank: np.ndarray  # int32 [R], rank of the sampled token in the vocabulary, 1 = most likely
    text: str  # the completion
    finish_reason: str
    answer: str | None = None  # gold answer of the prompt
    correct: bool | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def row_offsets(self) -> np.ndarray:
        """int64 [R + 1]: row r has the entries ``row_offsets[r]:row_offsets[r + 1]``."""
        return self.rows.offsets

    @property
    def ids(self) -> np.ndarray:
        """int32 [nnz], kept token ids."""
        return self.rows.ids

    @property
    def logprobs(self) -> np.ndarray:
        """float32 [nnz], log-probabilities, nats at temperature 1, descending in each row."""
        return self.rows.logprobs

    @property
    def log_tail(self) -> np.ndarray:
        """float32 [R], log of the probability mass outside the kept ids, nats."""
        return self.rows.log_tail
