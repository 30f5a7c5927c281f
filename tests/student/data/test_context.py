"""Tokens that are read and never supervised."""

from dataclasses import replace

import numpy as np
import pytest

from logitcache.student.data.token_masks import STEPS
from logitcache.student.data.views import UNSUPERVISED, SupervisedTrace, View
from tests import tiny

SPANS = np.array([[9, 12], [17, 19]], np.int32)  # in reasoning and closing, and in the answer


@pytest.fixture
def agent():
    return replace(tiny.traces(1, prompts=1, lengths=(20, 21))[0], context_spans=SPANS)


@pytest.mark.parametrize("step", [step.example for step in STEPS.values()])
def test_no_view_supervises_them(agent, step) -> None:
    seen = View(step)(agent)
    supervised = set(seen.target[seen.target != UNSUPERVISED].tolist())
    assert supervised
    assert not supervised & {9, 10, 11, 17, 18}
    assert not seen.kd[seen.target == UNSUPERVISED].any()
    assert not seen.ce[seen.target == UNSUPERVISED].any()


def test_they_are_still_input(agent) -> None:
    assert View()(agent).input_ids.tolist() == agent.token_ids[:-1].tolist()


def test_shares_count_the_tokens_that_can_be_supervised(agent) -> None:
    seen = View("both-ends:0.5")(agent)
    assert (seen.target != UNSUPERVISED).sum() == (19 - 5) // 2


def test_a_view_of_the_callers_own_cannot_supervise_them(agent, tmp_path) -> None:
    from logitcache.cache.reader import Cache
    from logitcache.cache.writer import new_cache
    from logitcache.student.data.dataset import TraceDataset

    with new_cache(tmp_path / "c", tiny.identity(), "test") as writer:
        writer.add(agent)

    def all_of_it(trace, epoch) -> SupervisedTrace:
        n = len(trace.token_ids) - 1
        target = np.arange(1, n + 1)
        return SupervisedTrace(
            trace.token_ids[:-1].astype(np.int64), target, target - 1, np.ones(n, np.float32), np.zeros(n, np.float32)
        )

    example = TraceDataset(Cache.open(tmp_path / "c"), view=all_of_it)[0]
    assert set(np.arange(1, 20)) - set((example.positions + 1).tolist()) == {9, 10, 11, 17, 18}
    assert len(example.rows) == len(example.positions) == 14
