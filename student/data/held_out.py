"""Which prompts are held out for evaluation."""

from collections.abc import Sequence

import numpy as np

from logitcache.errors import StudentError
from logitcache.student.data.sampler import hash_64


def split(prompt_ids: Sequence[str], held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits traces by prompt, so that no prompt is on both sides.

    A prompt's side depends on its id alone: it keeps its side when the cache grows. About `held_out` of the prompts are
    held out, at least one, and at least one remains for training.
    Returns: int64 indices of the training traces, and of the held-out ones.
    Raises: StudentError for a fraction outside (0, 1), and for a single prompt.
    """
    if not 0.0 < held_out < 1.0:
        raise StudentError(f"`held_out` {held_out}: give a number between 0 and 1, such as 0.05")
    place = {p: hash_64("held out\0" + p) for p in prompt_ids}
    if len(place) < 2:
        raise StudentError(
            f"the cache has {len(place)} prompt(s), a held-out split needs at least two; add more with `logitcache generate`"
        )
    order = sorted(place, key=lambda p: (place[p], p))
    count = sum(place[p] < held_out * 2**64 for p in order)
    chosen = set(order[: min(max(count, 1), len(order) - 1)])
    held = np.array([p in chosen for p in prompt_ids])
    return (~held).nonzero()[0], held.nonzero()[0]
