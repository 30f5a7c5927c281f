"""The caches of a run, and which of their traces are for training and which are held out."""

import hashlib
import itertools
import math
import typing
from dataclasses import dataclass

import numpy as np

from logitcache.cache.reader import Cache
from logitcache.errors import StudentError
from logitcache.sections import SECTIONS
from logitcache.storage.location import Location, identified
from logitcache.student.data.dataset import ExampleSource, Mixture, TraceDataset, check_tokenizers, matching
from logitcache.student.data.fetch_ahead import in_turn
from logitcache.student.data.held_out import split
from logitcache.student.data.views import View
from logitcache.student.training.config import DistillConfig
from logitcache.student.training.options import TrainOptions

# n traces of a cache.


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Indices of a cache's traces."""

    training: np.ndarray  # int64
    held_out: np.ndarray  # int64

    @property
    def all(self) -> np.ndarray:
        return np.concatenate([self.training, self.held_out])


def open_caches(options: TrainOptions, view: View) -> dict[Location, Cache]:
    """Raises: StudentError for an invalid share, a cache given twice, one without what the view needs; CacheError."""
    for path, share in options.shares.items():
        if share is not None and not (0 < share < math.inf):
            raise StudentError(f"`mix` {path}={share}: give a share above 0")
    if len({identified(path) for path in options.shares}) < len(options.caches) + len(options.mix):
        raise StudentError("a cache is given twice: name each once, and use `mix` CACHE=SHARE to give one more weight")
    caches = {path: Cache.open(path) for path in options.shares}
    for path, cache in caches.items():
        view.check(cache.identity, str(path))
    check_tokenizers(list(caches.values()))
    return caches


def choose_traces(options: TrainOptions, caches: dict[Location, Cache]) -> dict[Location, Split]:
    """The training and held-out traces of each cache.

    Each cache is split as if it were alone, so that it can be evaluated alone. A prompt that is held out of one cache is
    not in the training traces of any other, even under another id. Without shares, a trace that is in several caches is used
    once.
    Raises: StudentError if no training trace remains.
    """
    several, mixed = len(caches) > 1, None not in options.shares.values()
    held_out = {path: split(cache.prompt_ids, options.held_out)[1] for path, cache in caches.items()}
    prompts = {path: _prompts(cache) if several else np.array(cache.prompt_ids) for path, cache in caches.items()}
    excluded = np.concatenate([prompts[path][held_out[path]] for path in caches])
    seen: set[str] = set()
    chosen: dict[Location, Split] = {}
    for path, cache in caches.items():
        training_n = ~np.isin(prompts[path], excluded)
        if options.where is not None:
            training_n &= matching(cache, options.where)
        if several and not mixed:
            training_n &= np.array([t not in seen for t in cache.trace_ids], bool)
            seen.update(cache.trace_ids)
        chosen[path] = Split(training_n.nonzero()[0], held_out[path])
        if not training_n.any():
            what = f" where {options.where}" if options.where else ": all are held out or in a cache before it"
            raise StudentError(f"{path}: no training trace is left{what}")
    return chosen


def _prompts(cache: Cache) -> np.ndarray:
    """[n] digests of the prompts' tokens; for a crop without prompt tokens, of its prompt id."""
    digests, prompt_ids = [], iter(cache.prompt_ids)
    for shard in in_turn(cache):
        for row, prompt_id in enumerate(itertools.islice(prompt_ids, shard.batch.num_rows)):
            token_ids, spans = shard.tokens(row)
            prompt = token_ids[: spans.reasoning_start].tobytes() or prompt_id.encode()
            digests.append(hashlib.blake2b(prompt, digest_size=16).hexdigest())
    return np.array(digests)


def datasets(
    options: TrainOptions,
    config: DistillConfig,
    caches: dict[Location, Cache],
    chosen: dict[Location, Split],
    view: View,
) -> tuple[ExampleSource, ExampleSource]:
    """The training set, and the evaluation set: whole held-out traces with all their rows, for any view.

    Raises: StudentError if nothing is supervised.
    """
    parts = [TraceDataset(cache, chosen[path].training, view, top_k=options.top_k) for path, cache in caches.items()]
    shares = list(options.shares.values())
    mixed = None if None in shares else typing.cast(list[float], shares)
    training = parts[0] if len(parts) == 1 else Mixture(parts, mixed)
    weights = dict.fromkeys(SECTIONS, 1.0) | (config.section_weights or {})
    learns = [weights[name] > 0 for name in SECTIONS]
    if not any(np.take(learns, training[i].sections).any() for i in range(len(training))):
        names = ", ".join(name for name in view.sections if weights[name] > 0)
        raise StudentError(
            f"{', '.join(map(str, caches))}: no training trace has rows of {names or 'a section with a weight'}; choose "
            f"other `sections`{'' if str(view) == 'full' else f', or another view than {view}'}, or generate with "
            "`prompt_logits` for rows of the prompt"
        )
    return training, Mixture([TraceDataset(cache, chosen[path].held_out) for path, cache in caches.items()])
