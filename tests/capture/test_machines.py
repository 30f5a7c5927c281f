"""Errors before a cluster is reached, and what an engine asks of it."""

import socket
import sys

import pytest

from logitcache.cache.workers import Worker
from logitcache.capture import machines
from logitcache.capture.generate import GenerateOptions
from logitcache.capture.job import Engines
from logitcache.errors import InputError


def options(**changes) -> GenerateOptions:
    return GenerateOptions(**{"prompts": "p.jsonl", "teacher": "t", "out": "c", "ray": "auto"} | changes)


def test_a_number_or_a_range_of_engines() -> None:
    assert Engines.parse("8") == Engines(8, 8)
    assert str(Engines.parse("1-8")) == "1-8"
    for text in ("0", "8-1", "x", "1-", "-2"):
        with pytest.raises(InputError, match="`engines` .*: write N or LEAST-MOST"):
            Engines.parse(text)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ray": None, "engines": Engines(1, 2)}, "`engines`: of the engines of a cluster; give `ray` too"),
        ({"ray": None, "cpus_per_engine": 1}, "`cpus_per_engine`"),
        ({"worker": Worker(0, 2)}, "`worker`: with `ray`, engines share the job by themselves"),
        ({"nodes_per_engine": 2, "tensor_parallel_size": 3}, "3 GPUs do not divide into as many nodes"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        options(**changes)


def test_a_teacher_over_several_machines_is_run_by_vllms_ray_backend() -> None:
    spread = options(nodes_per_engine=2, tensor_parallel_size=8, engine_args={"pipeline_parallel_size": 2})
    assert spread.gpus_per_engine == 16
    assert machines.needs(spread) == ("GPU", 8)
    assert spread.spec.engine_args["distributed_executor_backend"] == "ray"
    assert "distributed_executor_backend" not in options(tensor_parallel_size=8).spec.engine_args
    assert spread.spec.identity_args() == {}, "how an engine is spread changes no distribution"


def test_where_no_cluster_is_one_line_says_how_to_start_one(monkeypatch, run, tmp_path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    given = ["generate", tmp_path / "p.jsonl", "--teacher", "t", "--out", tmp_path / "c", "--ray"]
    code, _, said = run(*given, address)
    assert code == 2
    assert f"--ray {address}: no Ray cluster can be reached" in said
    assert "start one with `ray start --head`" in said
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert "the cluster that this machine joined" in run(*given)[2]
    assert "must run on a machine of the cluster" in run(*given, "ray://head:10001")[2]
    assert not (tmp_path / "c").exists()


def test_without_ray_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"`ray` needs Ray; `pip install 'logitcache\[ray\]'` on every machine"):  # noqa: SIM117
        with machines.connected("auto"):
            pass


def test_a_missing_package_of_a_machine_is_named() -> None:
    error = type("E", (Exception,), {"cause": ModuleNotFoundError("No module named 'vllm'")})()
    assert "lacks a package (ModuleNotFoundError: No module named 'vllm')" in str(machines.cause_of(error))
