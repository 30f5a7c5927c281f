"""The caches of a run: which of their traces it learns from, and which are held out from it."""

import hashlib
import math
import typing
from pathlib import Path

import numpy as np

from logitcache.cache.reader import Cache
from logitcache.errors import StudentError
from logitcache.sections import SECTIONS
from logitcache.student.data.dataset import ExampleSource, Mixture, TraceDataset, check_tokenizers, matching
from logitcache.student.data.held_out import split
from logitcache.student.data.views import View
from logitcache.student.training.config import DistillConfig
from logitcache.student.training.options import TrainOptions

# n traces of a cache.

Sides = dict[Path, tuple[np.ndarray, np.ndarray]]  # of each cache: indices to learn from, and held out


def open_caches(options: TrainOptions, view: View) -> dict[Path, Cache]:
    """Raises: StudentError for a share that is none, a cache given twice, one that cannot serve the view; CacheError."""
    for path, share in options.shares.items():
        if share is not None and not (0 < share < math.inf):
            raise StudentError(f"`mix` {path}={share}: give a share above 0")
    places = [path.resolve() for path in options.shares]
    if len(set(places)) < len(options.caches) + len(options.mix):
        raise StudentError(
            "a cache is given twice: name each once, with `mix` CACHE=SHARE where one is to count for more"
        )
    caches = {path: Cache.open(path) for path in options.shares}
    for path, cache in caches.items():
        view.check(cache.identity, str(path))
    check_tokenizers(list(caches.values()))
    return caches


def sides(options: TrainOptions, caches: dict[Path, Cache]) -> Sides:
    """Each cache is split as it is alone, so that it can be evaluated alone. What is held out of one is learnt from none,
    whatever its prompt is called there, and without shares a trace that stands in several is learnt from once.

    Raises: StudentError where nothing is left.
    """
    several, mixed = len(caches) > 1, None not in options.shares.values()
    held = {path: split(cache.prompt_ids, options.held_out)[1] for path, cache in caches.items()}
    prompts = {path: _prompts(cache) if several else np.array(cache.prompt_ids) for path, cache in caches.items()}
    barred = np.concatenate([prompts[path][held[path]] for path in caches])
    seen: set[str] = set()
    found: Sides = {}
    for path, cache in caches.items():
        taught_n = ~np.isin(prompts[path], barred)
        if options.where is not None:
            taught_n &= matching(cache, options.where)
        if several and not mixed:
            taught_n &= np.array([t not in seen for t in cache.trace_ids], bool)
            seen.update(cache.trace_ids)
        found[path] = (taught_n.nonzero()[0], held[path])
        if not taught_n.any():
            what = f" where {options.where}" if options.where else ", all are held out or stand in a cache before"
            raise StudentError(f"{path}: no trace is left to learn from{what}")
    return found


def _prompts(cache: Cache) -> np.ndarray:
    """[n] digests of the prompts' tokens; of a crop that has none, of its id."""
    digests = []
    for i, prompt_id in enumerate(cache.prompt_ids):
        token_ids, spans = cache.tokens(i)
        prompt = token_ids[: spans.reasoning_start].tobytes() or prompt_id.encode()
        digests.append(hashlib.blake2b(prompt, digest_size=16).hexdigest())
    return np.array(digests)


def datasets(
    options: TrainOptions, config: DistillConfig, caches: dict[Path, Cache], chosen: Sides, view: View
) -> tuple[ExampleSource, ExampleSource]:
    """What to learn from, and what to be evaluated on: whole traces and all their rows, the same for every run of these
    caches, whatever it learns from.

    Raises: StudentError where nothing is taught.
    """
    parts = [TraceDataset(cache, chosen[path][0], view, top_k=options.top_k) for path, cache in caches.items()]
    shares = list(options.shares.values())
    mixed = None if None in shares else typing.cast(list[float], shares)
    taught = parts[0] if len(parts) == 1 else Mixture(parts, mixed)
    weights = dict.fromkeys(SECTIONS, 1.0) | (config.section_weights or {})
    learns = [weights[name] > 0 for name in SECTIONS]
    if not any(np.take(learns, taught[i].sections).any() for i in range(len(taught))):
        names = ", ".join(name for name in view.sections if weights[name] > 0)
        raise StudentError(
            f"{', '.join(map(str, caches))}: no training trace has rows of {names or 'a section with a weight'}; teach "
            f"other sections{'' if str(view) == 'full' else f', or another view than {view}'}, or generate with "
            "`prompt_logits` for those of the prompt"
        )
    return taught, Mixture([TraceDataset(cache, chosen[path][1]) for path, cache in caches.items()])
