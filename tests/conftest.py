"""Marks, and what several test files share."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def embedded_teacher() -> Path:
    """SmolLM2-135M-Instruct as an ordinary model folder, made once a checkout."""
    from benchmarks.embedded import embedded_teacher

    return embedded_teacher(Path(__file__).parents[1] / "demo" / "teacher")
