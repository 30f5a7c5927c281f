"""Marks, and what several test files share."""

import sys
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What may take longest comes first, so that two processes end together.
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("timeout")), default=0))
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


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny cache and a tiny student."""
    from tests import tiny

    home = tmp_path_factory.mktemp("home")
    tiny.write_cache(home / "cache")
    tiny.save_model(home / "model")
    return home


@pytest.fixture
def options(home, tmp_path):
    """TrainOptions of a run of 8 steps in 2 epochs; keywords change it."""
    from logitcache.student.training.options import TrainOptions

    def make(out: str = "run", **changes) -> TrainOptions:
        given = {"caches": [home / "cache"], "student": str(home / "model"), "out": tmp_path / out}
        given |= {"held_out": 0.2, "tokens_per_batch": 130, "epochs": 2, "learning_rate": 1e-2}
        return TrainOptions(**given | changes)

    return make


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs `logitcache ARGUMENTS` in this process: exit code, standard output, standard error."""
    from logitcache import cli
    from logitcache.errors import use_flags

    def call(*arguments) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["logitcache", *map(str, arguments)])
        code = cli.call()
        found = capfd.readouterr()
        return code, found.out, found.err

    yield call
    use_flags({})
