"""Which order a run takes, what it records of it, and how it goes on in it."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from logitcache.errors import StudentError
from logitcache.student.training.run import train
from logitcache.student.training.shuffle import choose_window, describe_order
from tests import tiny
from tests.runs import history, launch
from tests.tiny import one_thread  # noqa: F401


def cache(shards: int, most: int | None) -> Any:
    """A cache of shards of 10 bytes, behind a mirror of `most` bytes; None: in a directory."""
    mirror = None if most is None else SimpleNamespace(room=SimpleNamespace(most=most))
    return SimpleNamespace(shards=[SimpleNamespace(bytes=10)] * shards, mirror=mirror)


@pytest.mark.parametrize(
    ("shuffle", "caches", "window"),
    [
        ("auto", [cache(1000, None)], None),
        ("auto", [cache(1000, 10_000)], None),
        ("auto", [cache(1000, 9_999)], 64),
        ("auto", [cache(1000, 640)], 32),
        ("auto", [cache(1000, 5)], 1),
        ("auto", [cache(500, 9_000), cache(500, 9_000)], 64),
        ("auto", [cache(500, 9_000), cache(300, None)], None),
        ("full", [cache(1000, 10)], None),
        ("shards", [cache(1000, None)], 64),
        ("shards:7", [cache(1000, 10)], 7),
    ],
)
def test_auto_mixes_by_shards_what_is_larger_than_its_mirror(shuffle, caches, window):
    assert choose_window(shuffle, caches) == window


def test_a_resumed_run_keeps_its_order_and_auto_does_not_choose_again():
    small = [cache(1000, 10)]
    assert choose_window("auto", small, recorded="full") is None
    assert choose_window("auto", small, recorded="shards:9") == 9
    assert choose_window("full", small, recorded="shards:9") is None, "and the run refuses it"


@pytest.mark.parametrize("text", ["", "shard", "shards:0", "shards:-1", "shards:", "shards:1.5", "Full"])
def test_another_shuffle_is_refused(text):
    with pytest.raises(StudentError, match=r"`shuffle`.*choose auto, full, shards or shards:N"):
        choose_window(text, [cache(3, None)])


def test_what_will_be_downloaded_again_and_again_is_said():
    assert describe_order(None, [cache(1000, None)]) == describe_order(None, [cache(1000, 10_000)]) == []
    [line] = describe_order(None, [cache(1000, 2_000)])
    assert "the caches have 10.0 kB, mirrors 2.00 kB" in line
    assert "`shuffle` shards:64" in line
    assert describe_order(64, [cache(1000, 2_000)]) == [
        "order of traces: mixed 64 shards at a time (`shuffle` shards:64)"
    ]
    more = describe_order(64, [cache(1000, 320)])[1]
    assert "64 shards have 640 bytes, mirrors 320 bytes" in more
    assert "`shuffle` shards:16" in more


def test_a_run_records_its_order_and_refuses_another(options, capfd):
    done = train(options(shuffle="shards:1", epochs=1))
    assert "order of traces: mixed 1 shards at a time" in capfd.readouterr().err
    assert done.settings["shuffle"] == "shards:1"
    assert train(options(epochs=1)).again, "auto"
    with pytest.raises(StudentError, match="made with shuffle = 'shards:1', this run has 'full'"):
        train(options(shuffle="full", epochs=1))


def test_a_run_of_a_version_without_orders_was_shuffled_fully(options, capfd):
    done = train(options(epochs=1))
    assert "order of traces" not in capfd.readouterr().err
    file = options().out / "run.json"
    found = json.loads(file.read_text())
    assert found.pop("shuffle") == done.settings["shuffle"] == "full"
    file.write_text(json.dumps(found))
    assert train(options(epochs=1)).again
    assert train(options(shuffle="full", epochs=1)).again
    with pytest.raises(StudentError, match="made with shuffle = 'full', this run has 'shards:64'"):
        train(options(shuffle="shards", epochs=1))


def test_the_window_is_not_set_beside_the_option(options):
    with pytest.raises(StudentError, match="`set` shuffle_window cannot be changed: use `shuffle`"):
        train(options(set={"shuffle_window": "3"}))


@pytest.mark.slow
def test_a_run_by_shards_stops_and_goes_on_and_moves_to_two_ranks(options, tmp_path):
    tiny.write_cache(tmp_path / "cache", shards=8)

    def given(name: str, ranks: int, **changes):
        changes |= {"set": {"optim": "sgd"}, "learning_rate": 0.1, "caches": [tmp_path / "cache"]}
        return options(name, tokens_per_batch=128 // ranks, **changes)

    whole = train(given("whole", 1, shuffle="shards:2"))
    launch(given("moved", 1, shuffle="shards:2"), 1, stop=2)
    moved = launch(given("moved", 2), 2)
    assert moved.settings["shuffle"] == "shards:2"
    assert history(moved, "loss") == pytest.approx(history(whole, "loss"), rel=1e-6)
    full = train(given("full", 1))
    assert history(full, "loss") != history(whole, "loss")
    assert np.isfinite(full.eval_after.kl)
