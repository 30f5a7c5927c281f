"""The ledger alone: who holds what, and what a death costs."""

from collections.abc import Iterator

from logitcache.cache.shard import ShardIndex
from logitcache.capture.job import Request
from logitcache.capture.ledger import Ledger
from logitcache.capture.summary import Counts, Summary


def request(i: int, samples: int = 1) -> Request:
    return Request(f"{i:032x}", f"p{i // samples}", i % samples, None)


def ledger(count: int, samples: int = 1) -> tuple[Ledger, list[ShardIndex]]:
    published: list[ShardIndex] = []
    numbers: Iterator[int] = iter(range(1000))
    requests = iter([request(i, samples) for i in range(count)])
    return Ledger(requests, count, Summary(), published.append, lambda: next(numbers)), published


def index(*trace_ids: str) -> ShardIndex:
    found = ShardIndex.__new__(ShardIndex)
    object.__setattr__(found, "trace_ids", list(trace_ids))
    return found


def ids(requests: list[Request] | None) -> list[int]:
    assert requests is not None
    return [int(r.trace_id, 16) for r in requests]


def test_every_request_has_one_holder_until_it_is_published() -> None:
    made, published = ledger(5)
    made.join(0)
    made.join(1)
    assert ids(made.take(0, 2)) == [0, 1]
    assert ids(made.take(1, 9)) == [2, 3, 4]
    assert made.take(0, 1) is None
    assert made.commit(0, index(request(0).trace_id), Counts(traces=1, tokens=7))
    assert not made.commit(0, index(request(0).trace_id), Counts(traces=1)), "once"
    assert not made.commit(0, index(request(2).trace_id), Counts(traces=1)), "another's"
    status = made.status()
    assert (status.made, status.held, status.waiting, status.working) == (1, 4, 0, 2)
    assert (len(published), made.summary.tokens) == (1, 7)


def test_samples_of_a_prompt_go_to_one_engine() -> None:
    made, _ = ledger(12, samples=4)
    made.join(0)
    assert ids(made.take(0, 1)) == [0, 1, 2, 3]
    assert ids(made.take(0, 5)) == [4, 5, 6, 7, 8, 9, 10, 11]


def test_what_a_revoked_engine_sends_is_not_accepted() -> None:
    made, published = ledger(4)
    made.join(0)
    made.take(0, 3)
    assert made.revoke(0, blamed=False) == 3
    assert made.status().waiting == 4
    assert made.take(0, 1) is None
    assert not made.report(0, 5)
    assert not made.commit(0, index(request(0).trace_id), Counts(traces=1))
    made.skip(0, request(1).trace_id, "p1", "too long")
    made.fail(0, request(1).trace_id, "bad")
    assert not made.summary.skipped
    assert not made.summary.failed
    made.join(1)
    assert ids(made.take(1, 9)) == [0, 1, 2, 3], "in their order"
    assert published == []


def test_a_request_that_kills_engines_is_found_among_its_neighbours_and_set_aside() -> None:
    """Request 3 kills every engine that works on it. The others are all made, and nothing else is set aside."""
    made, published = ledger(40)
    holders = deaths = 0
    while True:
        made.join(holders)
        held: list[Request] = []
        while (taken := made.take(holders, 8 - len(held))) is not None:
            held += taken
            if any(r.trace_id == request(3).trace_id for r in held) or not held:
                break
            assert made.commit(holders, index(held.pop(0).trace_id), Counts(traces=1))
        for r in [] if any(r.trace_id == request(3).trace_id for r in held) else held:
            assert made.commit(holders, index(r.trace_id), Counts(traces=1))
            held = []
        if not held:
            break
        made.revoke(holders, blamed=True)
        deaths += 1
        holders += 1
    assert deaths == 3
    assert list(made.summary.deadly.values()) == ["p3"]
    assert len(published) == 39


def test_a_broken_machine_sets_no_request_aside() -> None:
    made, _ = ledger(1)
    for holder in range(6):
        made.join(holder)
        assert ids(made.take(holder, 1)) == [0]
        made.revoke(holder, blamed=True, machine="broken")
    assert not made.summary.deadly
    made.join(7)
    assert ids(made.take(7, 1)) == [0]
    made.revoke(7, blamed=True, machine="another")
    assert list(made.summary.deadly.values()) == ["p0"]
    assert made.status().waiting == 0


def test_a_lost_machine_is_no_requests_fault() -> None:
    made, _ = ledger(2)
    for holder in range(5):
        made.join(holder)
        assert ids(made.take(holder, 2)) == [0, 1]
        made.revoke(holder, blamed=False)
    assert not made.summary.deadly


def test_after_a_stop_nothing_is_handed_out_and_what_finished_is_published() -> None:
    made, published = ledger(4)
    made.join(0)
    made.take(0, 2)
    made.stop()
    assert made.take(0, 2) is None
    assert not made.report(0, 1)
    assert made.commit(0, index(request(0).trace_id), Counts(traces=1))
    assert len(published) == 1


def test_a_second_death_accuses_few_of_those_that_the_first_returned() -> None:
    made, _ = ledger(1000)
    for holder in range(2):
        made.join(holder)
        made.take(holder, 100)
        made.revoke(holder, blamed=True)
    made.join(2)
    accused = [i for i in ids(made.take(2, 1000)) if i < 100]
    assert made.status().waiting == 15, "suspects, of which an engine has one"
    assert accused == [*range(16, 100), 0]


def test_where_only_suspects_are_left_an_engine_gets_more_of_them_with_each_shard() -> None:
    """Otherwise the last hundreds of an unlucky job would be made one after the other."""
    made, _ = ledger(40)
    for holder in range(2):
        made.join(holder)
        made.take(holder, 40)
        made.revoke(holder, blamed=True)
    made.join(2)
    sizes = []
    for _ in range(3):
        taken = made.take(2, 40)
        assert taken
        sizes.append(len(taken))
        assert made.commit(2, index(*(r.trace_id for r in taken)), Counts(traces=len(taken)))
    assert sizes == [1, 2, 4]
    assert len(made.take(2, 40) or []) == 8
    assert made.take(2, 40) == [], "it holds as many as it may"
    assert made.revoke(2, blamed=True) == 8, "its death does not tell which of them it was"
    assert not made.summary.deadly
    made.join(3)
    assert ids(made.take(3, 40)) == [7], "so they come one by one again, first"
    made.revoke(3, blamed=True)
    assert list(made.summary.deadly.values()) == ["p7"]
