"""Caches to cut and to compare."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from logitcache.cache import manifest, shard
from logitcache.cache.reader import Cache
from logitcache.capture.traces import rows_of
from logitcache.identity import Identity
from logitcache.trace import Trace
from tests import tiny

V = 1000
IDENTITY = replace(tiny.identity(), vocab_size=V, top_k=64)


def capture(dense_RV: np.ndarray, identity: Identity):
    """Rows as `generate` keeps them."""
    ids_RK = np.argsort(-dense_RV, axis=1, kind="stable")[:, : identity.top_k + len(identity.pin_tokens)]
    completion = SimpleNamespace(
        ids_RK=ids_RK,
        logprobs_RK=np.take_along_axis(dense_RV, ids_RK, axis=1),
        pinned_RP=dense_RV[:, identity.pin_tokens],
    )
    return rows_of(completion, identity)  # type: ignore[arg-type]


def write(path: Path, made: list[Trace], identity: Identity, *, per_shard: int = 3, **provenance) -> Cache:
    manifest.create_or_match(path, identity)
    for number, start in enumerate(range(0, len(made), per_shard)):
        encoded = [shard.EncodedTrace.of(t, identity) for t in made[start : start + per_shard]]
        shard.write(path / shard.DIRECTORY, number, encoded, identity, provenance)
    return Cache.open(path)


def captured(path: Path, dense: list[np.ndarray], identity: Identity) -> Cache:
    made = []
    for i, dense_RV in enumerate(dense):
        trace = tiny.trace(i, [3] * (len(dense_RV) + 1), dense_RV)
        made.append(replace(trace, rows=capture(dense_RV, identity)))
    return write(path, made, identity)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def assert_same_rows(a: Trace, b: Trace) -> None:
    for name in ("row_offsets", "ids", "logprobs", "log_tail", "token_logprob", "token_rank", "token_ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.row_start == b.row_start
