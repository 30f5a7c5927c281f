from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.transform.caches import V


@pytest.fixture(scope="module")
def dense() -> list[np.ndarray]:
    """float32 [R, V] each: log-probabilities of six traces, from flat rows to peaked ones; three have bf16 logits."""
    rng, made = np.random.default_rng(0), []
    for i in range(6):
        logits_RV = rng.normal(size=(30 + i, V)) * np.geomspace(0.5, 12, 30 + i)[:, None]
        if i % 2 == 0:
            logits_RV = (logits_RV.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
        shifted_RV = logits_RV - logits_RV.max(axis=1, keepdims=True)
        made.append((shifted_RV - np.log(np.exp(shifted_RV).sum(axis=1, keepdims=True))).astype(np.float32))
    return made


@pytest.fixture
def path(tmp_path) -> Path:
    """24 traces of 12 prompts in 4 shards, with verdicts and metadata; sample 1 of each prompt is right."""
    made = [
        replace(
            t,
            correct=bool(t.sample_index),
            answer=t.prompt_id,
            finish_reason="length" if i % 5 == 0 else "stop",
            metadata={"level": i % 4, "from": {"name": f"set {i % 2}"}},
        )
        for i, t in enumerate(tiny.traces(24, 12))
    ]
    return tiny.write_cache(tmp_path / "c", made, shards=4).path
