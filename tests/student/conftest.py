"""A teacher, a cache of it, and how evaluations are compared."""

import pytest
import torch

from tests import tiny


@pytest.fixture(scope="module")
def sharp():
    """A teacher of the student's own shape that is sure of what it says."""
    teacher = tiny.model(seed=7, tie_word_embeddings=False)
    with torch.no_grad():
        teacher.lm_head.weight.normal_(std=1.0)
    return teacher


@pytest.fixture(scope="module")
def cache(tmp_path_factory, sharp):
    return tiny.write_cache(tmp_path_factory.mktemp("cache") / "cache", tiny.traces_of(sharp, 16, 8))
