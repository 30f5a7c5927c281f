"""A cache that the fake engine made."""

from pathlib import Path

import pytest

from logitcache.capture.generate import GenerateOptions, generate
from tests import fake_engine
from tests.storage.fixtures import s3, s3_server  # noqa: F401


@pytest.fixture
def options(tmp_path, monkeypatch) -> GenerateOptions:
    fake_engine.install(monkeypatch).max_num_seqs = 1  # traces finish in the order of the prompts
    (tmp_path / "p.jsonl").write_text("\n".join(f'{{"id": "p{i}", "prompt": "question {i}"}}' for i in range(9)))
    return GenerateOptions(prompts=str(tmp_path / "p.jsonl"), out=tmp_path / "c", teacher="fake", top_k=8, unit_size=3)


@pytest.fixture
def path(options) -> Path:
    """A cache of 9 traces in 3 shards."""
    generate(options)
    return options.out
