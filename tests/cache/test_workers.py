"""Several processes, one cache; the last test has real engines and real kills."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.cache.workers import Worker
from logitcache.capture.generate import GenerateOptions, generate
from logitcache.commands.text_capture import describe_summary
from logitcache.errors import CacheBusyError, InputError
from tests import fake_engine, tiny


@pytest.fixture
def run(monkeypatch, tmp_path):
    fake_engine.install(monkeypatch)
    lines = [f'{{"id": "p{i}", "prompt": "question {i}"}}' for i in range(30)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))

    def start(worker: Worker, **changes):
        given = {"teacher": "fake", "top_k": 8, "unit_size": 4, "worker": worker} | changes
        return generate(GenerateOptions(prompts=str(tmp_path / "p.jsonl"), out=tmp_path / "c", **given))

    return start


def test_every_prompt_belongs_to_one_worker_and_all_get_about_as_many() -> None:
    owners = [[w for w in range(5) if Worker(w, 5).owns(f"p{i}")] for i in range(5000)]
    assert all(len(o) == 1 for o in owners)
    counts = Counter(o[0] for o in owners)
    assert min(counts.values()) > 900


def test_unit_numbers_of_workers_never_meet() -> None:
    for count in (1, 3, 8):
        for after in (-1, 0, 6, 7):
            numbers = [Worker(i, count).number_after(after) for i in range(count)]
            assert len(set(numbers)) == count
            assert all(after < n <= after + count for n in numbers)
            assert all(Worker(n % count, count).number_after(n) == n + count for n in numbers)


def test_workers_fill_one_cache_in_any_order(run, tmp_path) -> None:
    made = [run(Worker(i, 3)) for i in (2, 0, 1)]
    assert sum(s.made for s in made) == 30
    assert all(s.made == s.wanted == 30 - s.others for s in made)
    assert f"{made[0].others} traces are left to the other workers" in describe_summary(made[0], tmp_path)
    cache = Cache.open(tmp_path / "c")
    assert sorted(cache.prompt_ids) == sorted(f"p{i}" for i in range(30))
    assert verify(tmp_path / "c", workers=1) == []
    assert run(Worker(1, 3)).made == run(Worker()).made == 0, "another count of workers knows what is there"


def test_workers_that_run_side_by_side_give_their_shards_numbers_of_their_own(run, tmp_path) -> None:
    import threading

    import logitcache.inference.session as module

    barrier = threading.Barrier(3, timeout=30)

    class Together(module.Engine):
        def step(self):
            if self.steps == 0:
                barrier.wait()  # all have read what is there
            return super().step()

    module.Engine = Together
    threads = [threading.Thread(target=run, args=(Worker(i, 3),)) for i in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert Counter(Cache.open(tmp_path / "c").prompt_ids) == Counter(f"p{i}" for i in range(30))
    assert verify(tmp_path / "c", workers=1) == []


def test_those_who_look_at_a_lock_do_not_see_each_other(tmp_path) -> None:
    with Worker().alone(tmp_path):
        pass  # its lock file stays
    for _ in range(20):
        with ExitStack() as stack:
            for i in range(4):
                stack.enter_context(Worker(i, 4).alone(tmp_path))


def test_the_same_worker_twice_and_another_count_are_refused_while_one_runs(run, tmp_path) -> None:
    with Worker(1, 3).alone(tmp_path / "c"):
        with pytest.raises(CacheBusyError, match="worker 1/3, is being written by another process"):
            run(Worker(1, 3))
        with pytest.raises(
            CacheBusyError, match=r"worker 1/3 is running \(pid \d+ on .*\), and worker 0/2 would generate"
        ):
            run(Worker(0, 2))
        with pytest.raises(CacheBusyError, match=r"worker 1/3 is running"):
            run(Worker())
        assert run(Worker(0, 3)).made > 0
    assert run(Worker()).made > 0


@pytest.mark.parametrize("text", ["3/3", "-1/2", "1", "a/b", "0/0"])
def test_a_worker_that_is_none_is_refused(text) -> None:
    with pytest.raises(InputError, match="`worker`"):
        Worker.parse(text)


def test_a_slurm_array_names_the_worker(monkeypatch) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "2"}
    assert Worker.of_slurm(array | {"SLURM_ARRAY_TASK_STEP": "2"}) == Worker(2, 4)
    assert Worker.of_slurm({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}) == Worker(1, 4)
    assert Worker.of_slurm({}) is None
    with pytest.raises(InputError, match="SLURM_ARRAY_TASK_ID=9 is not one of 4 tasks"):
        Worker.of_slurm(array | {"SLURM_ARRAY_TASK_ID": "9"})
    for name, value in array.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert Worker.of_environment() == Worker(1, 4)
    assert str(Worker.parse("0/1")) == "0/1"


@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_three_workers_killed_twenty_times_make_each_trace_once(tmp_path) -> None:
    """Real processes with real engines, ended by SIGKILL: at any moment, and moments after they published something.

    The model is a random one of 64 words, so that generating and writing, not arithmetic, is what the kills interrupt.
    """
    out, rng, count, traces = tmp_path / "c", random.Random(0), 3, 3000
    teacher = tiny.save_model(tmp_path / "teacher", hidden_size=64, num_key_value_heads=2)
    rows = [f'{{"id": "p{i}", "prompt": "w{3 + i % 60} w{3 + i % 7}"}}' for i in range(traces)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    settings = (
        "--max-tokens 16 --unit-size 4 --top-k 16 --engine-arg max_num_seqs=4 --engine-arg max_model_len=64 "
        "--dtype float32 --engine-arg enforce_eager=true --engine-arg kv_cache_memory_bytes=50000000"
    )
    command = [
        str(Path(sys.executable).with_name("logitcache")), "generate", str(tmp_path / "p.jsonl"),
        "--teacher", str(teacher), "--out", str(out), *settings.split(),
    ]  # fmt: skip
    # Three engines on a few cores: threads that are bound to a core and wait by spinning would starve each other.
    one_core = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    logs = [(tmp_path / f"{index}.log").open("ab") for index in range(count)]
    engines: list[psutil.Process] = []

    def start(index: int) -> subprocess.Popen:
        worker = [*command, "--worker", f"{index}/{count}"]
        return subprocess.Popen(worker, stdout=logs[index], stderr=logs[index], env=one_core)

    def units(index: int) -> int:
        return sum(int(p.stem[5:]) % count == index for p in (out / "shards").glob("unit-*.json"))

    running = [start(index) for index in range(count)]
    before = [0] * count
    for kill in range(20):
        while True:
            if kill % 2:  # moments after it published something
                ahead = [i for i in range(count) if units(i) > before[i]]
                time.sleep(rng.uniform(0, 0.5))
            else:  # at any moment, most of them while it starts
                ahead = [rng.randrange(count)]
                time.sleep(rng.uniform(0, 4))
            alive = [i for i in ahead if running[i].poll() is None]
            assert any(process.poll() is None for process in running), "all is made before the last kill"
            if alive:
                break
        index = rng.choice(alive)
        engines += psutil.Process(running[index].pid).children(recursive=True)
        running[index].send_signal(signal.SIGKILL)
        assert running[index].wait() == -signal.SIGKILL
        before[index] = units(index)
        running[index] = start(index)
    assert 0 < len(Cache.open(out)) < traces, "the kills came in the middle"
    codes = [process.wait(timeout=600) for process in running]
    assert codes == [0] * count, [(tmp_path / f"{i}.log").read_text()[-2000:] for i in range(count)]
    assert Counter(Cache.open(out).prompt_ids) == Counter(f"p{i}" for i in range(traces))
    assert verify(out, workers=1) == []
    _, alive = psutil.wait_procs(engines, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], "no engine outlives its command"
