"""generate on a real Ray cluster of several machines on this one, with fake engines and real kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify_cache
from tests.capture.ray_driver import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(180)]
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # without it Ray listens on the address of this machine
COUNT = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    pytest.importorskip("ray")
    os.environ[LOOPBACK] = "0"  # before Ray is imported
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        add_machine(cluster)
    yield cluster
    cluster.shutdown()


def add_machine(cluster, **given):
    return cluster.add_node(**{"num_cpus": 1, "object_store_memory": 80 << 20} | given)


@pytest.fixture
def start(cluster, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a command on the cluster."""
    rows = [{"id": f"p{i}", "prompt": f"question {i}"} for i in range(COUNT)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    running = []

    def run(
        *more: str, out: str | Path = tmp_path / "c", environment: dict[str, str] | None = None
    ) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.capture.ray_driver", cluster.address]
        command += ["generate", str(tmp_path / "p.jsonl"), "--out", str(out), "--teacher", "fake", "--top-k", "8"]
        command += ["--unit-size", "4", "--ray", *(more or ("--cpus-per-engine", "1"))]
        given = os.environ | {LOOPBACK: "0", "RAY_DEDUP_LOGS": "0"} | (environment or {})
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        return running[-1]

    yield run
    for process in running:
        process.kill()


def ended(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out + err


def complete(out: str | Path, count: int = COUNT) -> bool:
    """Whether every prompt has its trace, once, and nothing is wrong with the cache."""
    cache = Cache.open(out)
    assert sorted(cache.prompt_ids) == sorted(f"p{i}" for i in range(count))
    return not verify_cache(out, workers=1).problems


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def shards(out: Path) -> int:
    return len(list((out / "shards").glob("*.json")))


def engines() -> list[psutil.Process]:
    """The processes of engines."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "EngineActor" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def test_two_machines_fill_one_cache_and_the_same_command_has_nothing_to_do(start, tmp_path) -> None:
    code, said = ended(start())
    assert code == 0, said
    assert "0 traces present, 60 to make; 2 engines of fake" in said
    assert f"{COUNT} traces made, {COUNT} of {COUNT} present" in said
    assert complete(tmp_path / "c")
    wait_for(lambda: not engines())  # their machines are free
    code, said = ended(start())
    assert code == 0
    assert f"nothing to do, all {COUNT} traces are present" in said


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_engine_killed_at_a_commit_to_a_store_costs_and_doubles_nothing(start, s3, tmp_path, when: str) -> None:
    from tests.storage.s3_server import environment

    out, fails = s3.url(), {"FAKE_DIES_AT": when, "FAKE_DIED": str(tmp_path / "died")}
    code, said = ended(start(out=out, environment=environment(s3.endpoint) | fails))
    assert code == 0, said
    assert "engine" in said
    assert "traces wait again" in said
    assert "1 engines died or were lost" in said
    assert complete(out)


def test_a_lost_machine_is_replaced_by_the_others(cluster, start, tmp_path) -> None:
    machine = add_machine(cluster)
    process = start("--cpus-per-engine", "1", "--engines", "1-3")
    try:
        wait_for(lambda: shards(tmp_path / "c") >= 2)
    finally:
        cluster.remove_node(machine, allow_graceful=False)  # SIGKILL of its raylet
    code, said = ended(process)
    assert code == 0, said
    assert complete(tmp_path / "c")


def test_a_killed_command_leaves_no_engine_and_goes_on(start, tmp_path) -> None:
    process = start()
    wait_for(lambda: shards(tmp_path / "c") >= 2)
    process.kill()
    process.wait()
    wait_for(lambda: not engines(), 30)
    made = shards(tmp_path / "c")
    code, said = ended(start())
    assert code == 0, said
    assert made * 4 <= int(said.partition(" traces present")[0].split()[-1]) < COUNT
    assert complete(tmp_path / "c")


def test_a_signal_lets_engines_publish_what_they_finished(start, tmp_path) -> None:
    process = start()
    wait_for(lambda: shards(tmp_path / "c") >= 2)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130
    assert "stopped by SIGINT: run the same command to resume" in said
    assert 8 <= len(Cache.open(tmp_path / "c")) < COUNT
    assert ended(start())[0] == 0
    assert complete(tmp_path / "c")


def test_a_second_command_is_refused(start, tmp_path) -> None:
    rows = [
        {"id": f"p{i}", "prompt": f"question {i}"} for i in range(4000)
    ]  # longer than the second one takes to start
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    process = start()
    wait_for(lambda: shards(tmp_path / "c") >= 1)
    code, said = ended(start())
    assert code == 2
    assert "is being written by another process (pid" in said
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130


def test_a_request_that_kills_three_engines_is_set_aside_and_named(start, tmp_path) -> None:
    rows = [{"id": f"p{i}", "prompt": f"question {i} {'' if i != 7 else 'w44'}"} for i in range(COUNT)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, said = ended(start(environment={"FAKE_POISON": "w44"}))
    assert code == 1
    assert "1 requests set aside: three engines died while they worked on them" in said
    assert "  p7" in said
    assert sorted(Cache.open(tmp_path / "c").prompt_ids) == sorted(f"p{i}" for i in range(COUNT) if i != 7)


def test_settings_that_the_engine_refuses_end_the_job(start) -> None:
    code, said = ended(start(environment={"FAKE_REFUSES": "vLLM refuses these settings: no"}))
    assert (code, said.count("logitcache: ")) == (2, 1)
    assert "logitcache: vLLM refuses these settings: no" in said


def test_too_few_gpus_are_said_while_the_job_waits(cluster, start) -> None:
    machine = add_machine(cluster, num_cpus=0, num_gpus=4)
    process = start("--tensor-parallel-size", "8", "--engines", "1")
    try:
        assert process.stderr
        said = ""
        while "waiting for" not in said:
            said = process.stderr.readline()
        assert said == "waiting for a machine with 8 GPUs; the largest has 4\n"
    finally:
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130
        cluster.remove_node(machine, allow_graceful=False)


def test_a_machine_with_another_teacher_ends_the_job_with_the_field(cluster, start) -> None:
    machine = add_machine(cluster, env_vars={"FAKE_REVISION": "r2"})
    try:
        code, said = ended(start("--cpus-per-engine", "1", "--engines", "3"))
        assert code == 2
        assert "differs from the one where the command runs" in said
        assert "teacher_revision = 'r1', this run has 'r2'" in said
    finally:
        cluster.remove_node(machine, allow_graceful=False)


def test_a_dead_ledger_ends_the_command_and_its_engines(start, tmp_path) -> None:
    process = start()
    wait_for(lambda: shards(tmp_path / "c") >= 1)
    for found in psutil.process_iter(["cmdline"]):
        if "LedgerActor" in " ".join(found.info["cmdline"] or []):
            found.kill()
    code, said = ended(process)
    assert code == 1
    assert "the ledger of the job died" in said
    wait_for(lambda: not engines(), 30)
    assert ended(start())[0] == 0
    assert complete(tmp_path / "c")


@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_real_engines_on_a_cluster_one_of_them_killed(cluster, tmp_path) -> None:
    """Two machines, vLLM with a tiny model, and a SIGKILL of one engine's actor after the first shards."""
    from tests import tiny

    teacher = tiny.save_model(tmp_path / "teacher", hidden_size=64, num_key_value_heads=2)
    rows = [{"id": f"p{i}", "prompt": f"w{3 + i % 60} w{3 + i % 7}"} for i in range(160)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = (
        "--max-tokens 16 --unit-size 4 --top-k 16 --engine-arg max_num_seqs=4 --engine-arg max_model_len=64 "
        "--dtype float32 --engine-arg enforce_eager=true --engine-arg kv_cache_memory_bytes=50000000"
    )
    command = [str(Path(sys.executable).with_name("logitcache")), "generate", str(tmp_path / "p.jsonl")]
    command += ["--teacher", str(teacher), "--out", str(tmp_path / "c"), *settings.split()]
    command += ["--ray", cluster.address, "--cpus-per-engine", "1"]
    given = os.environ | {LOOPBACK: "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(command, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: shards(tmp_path / "c") >= 2, 600)
        engines()[0].kill()
        code, said = ended(process, 500)
    finally:
        process.kill()
    assert code == 0, said
    assert "traces wait again" in said
    assert complete(tmp_path / "c", 160)
    wait_for(lambda: not engines(), 30)
