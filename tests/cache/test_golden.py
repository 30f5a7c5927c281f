"""A cache of every format version stays readable. `python -m tests.cache.test_golden` writes that of the present one, once."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from logitcache import sparse_rows
from logitcache.cache import manifest, shard
from logitcache.cache.manifest import FORMAT_VERSION
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.errors import FormatVersionError
from logitcache.runtime.files import publish_json, read_json
from logitcache.trace import Trace

GOLDEN = Path(__file__).parents[1] / "golden"


def facts(trace: Trace) -> dict:
    """Everything of a trace, as JSON."""
    fields = {name: getattr(trace, name) for name in Trace.__slots__ if name not in ("rows", "sections")}
    fields |= {"sections": asdict(trace.sections)} | {name: getattr(trace.rows, name) for name in ("offsets", "ids")}
    fields |= {name: getattr(trace.rows, name).view(np.int32) for name in ("logprobs", "log_tail")}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
@pytest.mark.parametrize("kind", ["rounded", "exact"])
def test_a_cache_of_every_version_reads_as_it_did(version, kind) -> None:
    path = GOLDEN / f"cache-{version}-{kind}"
    assert verify(path, workers=1) == []
    cache, wanted = Cache.open(path), json.loads(path.with_suffix(".json").read_text())
    assert (cache.shard(0).table is None) == (kind == "exact")
    assert cache.identity.digest == wanted["digest"], "ids of a cache that grows must stay what they are"
    for trace, said in zip(cache, wanted["traces"], strict=True):
        found = facts(trace)
        # Through exp and log, whose last bit is the machine's.
        for name in ("logprobs", "log_tail"):
            a, b = (np.array(f.pop(name), np.int32).view(np.float32) for f in (found, said))
            np.testing.assert_allclose(a, b, rtol=0, atol=0 if kind == "exact" else 2e-6)
        assert not found.pop("context_spans"), "older caches have none"
        assert found.pop("answer_offset") is None
        assert found == said


def test_a_newer_version_is_refused_by_name(tmp_path) -> None:
    publish_json(tmp_path / "manifest.json", read_json(GOLDEN / "cache-1-exact" / "manifest.json") | {"format": 99})
    with pytest.raises(FormatVersionError, match=r"format version 99, this logitcache .* reads 1; upgrade"):
        Cache.open(tmp_path)


def make() -> None:
    from tests import tiny

    pinned = [2, 60]
    for kind in ("rounded", "exact"):
        path = GOLDEN / f"cache-{FORMAT_VERSION}-{kind}"
        identity = replace(tiny.identity(), pin_tokens=pinned, exact=kind == "exact", min_k=2, top_p=0.9)
        traces = []
        for i, whole in enumerate(tiny.traces(4, 2, top_k=tiny.VOCAB)):
            logp_RV = np.empty((len(whole.rows), tiny.VOCAB), np.float32)
            np.put_along_axis(logp_RV, whole.ids.reshape(logp_RV.shape), whole.logprobs.reshape(logp_RV.shape), axis=1)
            top_RK = np.argsort(-logp_RV, axis=1, kind="stable")[:, : 8 + len(pinned)]
            rows = sparse_rows.from_topk(top_RK, np.take_along_axis(logp_RV, top_RK, axis=1), tiny.VOCAB)
            rows = sparse_rows.pin(rows, 8, pinned, logp_RV[:, pinned])
            if i:  # the first has rows of one length
                rows = sparse_rows.trim(rows, top_p=0.9, min_k=2, pinned_ids=pinned)
            extra = {"answer": "42", "correct": bool(i % 2), "metadata": {"level": i, "text": "é"}} if i else {}
            traces.append(replace(whole, rows=rows, **extra))
        shard._TABLE_ROWS = 1 if kind == "rounded" else 10**9
        manifest.write(path, identity)
        encoded = [shard.EncodedTrace.of(t, identity) for t in traces]
        shard.write(path / shard.DIRECTORY, 0, encoded, identity, {"source": "tests/cache/test_golden.py"})
        cache = Cache.open(path)
        said = {"digest": identity.digest, "traces": [facts(t) for t in cache]}
        path.with_suffix(".json").write_text(json.dumps(said))


if __name__ == "__main__":
    make()
