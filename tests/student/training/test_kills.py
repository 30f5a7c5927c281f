"""Training killed at random moments, what a power cut does to its files, and a disk that is full."""

import json
import random
import resource
import time
from pathlib import Path

import pytest

from logitcache.errors import WriteError
from logitcache.student.training.checkpoint_files import checkpoint_damage
from logitcache.student.training.checkpoints import WORK, checkpoints
from logitcache.student.training.run import train
from logitcache.student.training.run_record import RunRecord
from logitcache.student.training.saving import SafeTrainer
from tests.runs import history, in_a_process, same, weights
from tests.tiny import one_thread  # noqa: F401

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


# At these sizes the model, the optimizer and the model at the end cannot be written.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "limit"), [("_save_checkpoint", 20_000), ("_save_checkpoint", 100_000), ("save_model", 20_000)]
)
def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(options, monkeypatch, method, limit):
    opts = options(set={"save_strategy": "steps", "save_steps": "2"})
    write = getattr(SafeTrainer, method)

    def full(self, *args, **named):
        if self.state.global_step >= 6 and not named.get("_internal_call"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return write(self, *args, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    monkeypatch.setattr(SafeTrainer, method, full)
    with pytest.raises(WriteError, match=r"not saved: .* MB free; earlier checkpoints are intact") as error:
        train(opts)
    assert "\n" not in str(error.value)
    assert not (opts.out / WORK).exists()
    assert not (opts.out / "model.safetensors").exists()
    assert [checkpoint_damage(c) for c in checkpoints(opts.out)] == [None, None]
    monkeypatch.undo()
    assert train(opts).status == "finished"
