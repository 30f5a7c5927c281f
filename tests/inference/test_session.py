"""One engine from start to end: the queue, refusals, stops, failures. The engine is a fake."""

import os
import signal
import threading

import pytest

from logitcache.errors import EngineError, InputError, WriteError
from logitcache.inference.engine import Rows
from logitcache.inference.model import ModelSpec, Sampling
from logitcache.inference.session import EngineRequest, Session, engine_seed, pulled_from
from tests import fake_engine


@pytest.fixture
def engine(monkeypatch) -> type[fake_engine.FakeEngine]:
    return fake_engine.install(monkeypatch)


def session(out, first: str = "r0", seed: int = 0) -> Session:
    return Session(
        ModelSpec(model="fake"),
        Sampling(seed=seed),
        out=out,
        name="test",
        first=first,
        kept="every result",
        greeting="loading fake",
        rows=Rows(4),
    )


def requests(count: int) -> list[EngineRequest]:
    return [EngineRequest(f"r{i}", [1, 2, i]) for i in range(count)]


def test_every_request_is_delivered_once_under_its_key_and_tokens_are_counted(engine, tmp_path) -> None:
    done: dict[str, int] = {}

    def finish(completion) -> int:
        done[completion.key] = completion.made
        return completion.made

    with session(tmp_path) as running:
        running.run(pulled_from(requests(20)), finish, total=20)
    assert sorted(done) == sorted(f"r{i}" for i in range(20))
    assert running.progress is not None
    assert (running.progress.done, running.progress.tokens) == (20, sum(done.values()))
    assert running.stopped is None
    assert running.log.parent == tmp_path / "logs"
    assert running.log.name.startswith("test-")


def test_the_queue_is_kept_full_and_requests_are_read_only_as_it_drains(engine, tmp_path) -> None:
    """The engine runs 4 at a time; 4 + max(8, 4 // 4) = 12 are in flight as long as there are more."""
    finished, ahead = 0, []

    def source():
        for read, request in enumerate(requests(60), 1):
            ahead.append(read - finished)
            yield request

    def finish(completion) -> int:
        nonlocal finished
        finished += 1
        return 1

    with session(tmp_path) as running:
        running.run(pulled_from(source()), finish, total=60)
    assert max(ahead) == 12
    early = [sum(pair) for pair in engine.last.queue_at_step if pair[1]][:20]
    assert set(early) == {12}


def test_a_refused_request_is_reported_and_the_others_run(engine, tmp_path, monkeypatch) -> None:
    submit = engine.submit

    def refuse_r3(self, key, *args):
        if key == "r3":
            raise InputError("too long")
        submit(self, key, *args)

    monkeypatch.setattr(engine, "submit", refuse_r3)
    refused, done = {}, []
    with session(tmp_path) as running:
        running.run(
            pulled_from(requests(6)),
            lambda c: len(done.append(c.key) or "x"),
            total=6,
            on_refused=lambda key, e: refused.update({key: str(e)}),
        )
    assert refused == {"r3": "too long"}
    assert sorted(done) == ["r0", "r1", "r2", "r4", "r5"]
    with session(tmp_path) as running, pytest.raises(InputError, match="too long"):
        running.run(pulled_from(requests(6)), lambda _: 1, total=6)


def test_a_signal_ends_the_run_and_what_was_finished_is_delivered(engine, tmp_path) -> None:
    done = []

    def finish(completion) -> int:
        done.append(completion.key)
        if len(done) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1

    with session(tmp_path) as running:
        running.run(pulled_from(requests(40)), finish, total=40)
    assert running.stopped == "SIGTERM"
    assert 5 <= len(done) < 40


def test_a_dead_engine_says_what_is_safe_and_where_the_log_is(engine, tmp_path) -> None:
    engine.steps_before_failure, engine.failure = 3, EngineError("the engine died")
    with session(tmp_path) as running, pytest.raises(EngineError) as caught:
        running.run(pulled_from(requests(40)), lambda _: 1, total=40)
    assert str(caught.value) == (
        f"the engine died; every result is safe: fix the cause, then run the same command to resume ({running.log})"
    )


def test_background_work_runs_in_order_and_its_failure_reaches_the_caller(engine, tmp_path) -> None:
    order: list[int] = []

    def work(number: int) -> None:
        if number == 3:
            raise WriteError("disk full")
        order.append(number)

    with session(tmp_path) as running:
        for number in range(6):
            running.later(work, number)
        with pytest.raises(WriteError, match="disk full"):
            running.finish()
        running.finish([lambda: order.append(99)])
    assert order == [0, 1, 2, 4, 5, 99]


def test_every_last_task_runs_although_an_earlier_one_failed(engine, tmp_path) -> None:
    ran = threading.Event()

    def fail() -> None:
        raise WriteError("disk full")

    with session(tmp_path) as running, pytest.raises(WriteError, match="disk full"):
        running.finish([fail, ran.set])
    assert ran.is_set()


def test_the_engines_seed_comes_from_the_users_and_the_first_key(engine, tmp_path) -> None:
    """A second session of the same job starts at another request, and must not draw the same numbers."""
    for first, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        with session(tmp_path, first, seed):
            pass
    one, same, other_key, other_seed = engine.seeds
    assert one == same
    assert len({one, other_key, other_seed}) == 3

    assert engine_seed(7, "key") == 2122678801, "the seeds of published caches do not change"
