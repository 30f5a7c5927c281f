"""A trace in memory: one prompt, one completion, and the teacher's distribution at each token."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logitcache.errors import InputError
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
    # int32 [C, 2], half-open token spans of the completion that others wrote, such as the results of tools: they are read,
    # never supervised. Ascending, apart from each other.
    context_spans: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    answer_offset: int | None = (
        None  # characters of the text before the answer; None: as `sections.answer_text` finds it
    )

    def __post_init__(self) -> None:
        bounds = [self.sections.prompt_end, *self.context_spans.ravel().tolist(), len(self.token_ids)]
        starts, ends = bounds[1:-1:2], bounds[2:-1:2]
        if bounds[1:-1] and (bounds != sorted(bounds) or any(a >= b for a, b in zip(starts, ends, strict=True))):
            raise InputError(
                f"context spans {self.context_spans.tolist()} are not ascending spans of the tokens {bounds[0]} to {bounds[-1]}"
            )
        if self.answer_offset is not None and not 0 <= self.answer_offset <= len(self.text):
            raise InputError(f"the answer begins at character {self.answer_offset} of a text of {len(self.text)}")

    @property
    def is_context(self) -> np.ndarray:
        """bool [L], tokens that are never supervised."""
        token_L = np.zeros(len(self.token_ids), bool)
        for start, end in self.context_spans:
            token_L[start:end] = True
        return token_L

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
