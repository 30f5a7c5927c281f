"""Training killed at random moments, and what a power cut does to its files."""

import random
import time
from pathlib import Path

import pytest

from logitcache.student.training.checkpoint_files import checkpoint_damage
from logitcache.student.training.checkpoints import checkpoints
from tests.runs import history, in_a_process, same, weights
from logitcache.student.training.run_record import RunRecord
import json

KILLS = 20


def zero_a_file(checkpoint: Path, rng: random.Random) -> None:
    """What a power cut may leave of a file: zeros, its beginning, nothing, or not even its name."""
    path = rng.choice(sorted(checkpoint.iterdir()))
    size = path.stat().st_size
    left = rng.choice([bytes(size), path.read_bytes()[: size // 2], b"", None])
    path.unlink() if left is None else path.write_bytes(left)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_twenty_times_with_zeroed_files_ends_with_the_same_weights(options):
    def given(out: str):
        return options(out, epochs=6, set={"save_strategy": "steps", "save_steps": "1"})

    def read(out: str) -> RunRecord:
        return RunRecord.from_json(json.loads((given(out).out / "run.json").read_text()))

    in_a_process(given("warm")).join()
    began = time.monotonic()
    in_a_process(given("whole")).join()
    duration, expected = time.monotonic() - began, read("whole")
    rng, kills, damaged, runs = random.Random(13), 0, 0, 0
    while kills < KILLS:
        out, runs = f"killed {runs}", runs + 1
        while True:
            process = in_a_process(given(out))
            process.join(rng.uniform(0, duration / 2) if kills < KILLS else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            whole = [c for c in checkpoints(given(out).out) if checkpoint_damage(c) is None]
            if len(whole) > 1 and rng.random() < 0.8:
                zero_a_file(whole[0], rng)
                damaged += 1
        assert process.exitcode == 0
        assert same(weights(given(out).out), weights(given("whole").out))
        assert history(read(out), "loss") == history(expected, "loss")
    print(f"{kills} kills and {damaged} damaged checkpoints in {runs} runs of {duration:.1f} s")
    assert damaged
