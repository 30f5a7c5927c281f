"""The plugin touches only engines that we started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.inference import vllm_plugin
from logitcache.inference.vllm_plugin import PARENT, PINNED, START_METHOD, marked_environment


@pytest.mark.parametrize("before", [None, "fork"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_environment_is_as_before_once_the_engine_stands(monkeypatch, before, fails) -> None:
    monkeypatch.delenv(START_METHOD, raising=False)
    if before:
        monkeypatch.setenv(START_METHOD, before)
    there = dict(os.environ)
    try:
        with marked_environment((3, 5)):
            assert (os.environ[PARENT], os.environ[PINNED]) == (str(os.getpid()), "3,5")
            assert os.environ[START_METHOD] == "spawn"
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert dict(os.environ) == there


def test_the_callers_process_and_unmarked_processes_are_not_hooked(monkeypatch) -> None:
    hooked = []
    monkeypatch.setattr(vllm_plugin, "pinning", hooked.append)
    vllm_plugin.prepare_process()
    with marked_environment((3,)):
        vllm_plugin.prepare_process()
    assert hooked == []


@pytest.mark.slow
def test_hooks_end_with_their_block() -> None:
    import importlib

    from vllm.v1.sample.sampler import Sampler

    module = importlib.import_module("vllm.v1.worker.gpu.sample.logprob")
    before = Sampler.__dict__["gather_logprobs"], module.compute_topk_scores
    with vllm_plugin.pinning([3]):
        assert Sampler.__dict__["gather_logprobs"] is not before[0]
        assert module.compute_topk_scores is not before[1]
    assert (Sampler.__dict__["gather_logprobs"], module.compute_topk_scores) == before


BESIDE_OURS = """
import os, sys
import vllm

from logitcache.inference.engine import Engine, Rows
from logitcache.inference.model import ModelSpec, Sampling

folder, small = sys.argv[1], dict(max_model_len=64, max_num_seqs=2, enforce_eager=True, kv_cache_memory_bytes=1 << 26)


def rows():
    llm = vllm.LLM(folder, dtype="float32", seed=0, disable_log_stats=True, **small)
    params = vllm.SamplingParams(temperature=0, max_tokens=3, logprobs=5)
    (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [{i: round(p.logprob, 3) for i, p in row.items()} for row in output.outputs[0].logprobs]


def main():
    before, environment = rows(), dict(os.environ)
    ours = Engine(ModelSpec(model=folder, dtype="float32", engine_args=small), Sampling(max_tokens=3), 0, Rows(4, pinned=(7,)))
    assert {n: v for n, v in os.environ.items() if "LOGITCACHE" in n} == {}
    assert environment.get("VLLM_WORKER_MULTIPROC_METHOD") == os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
    ours.submit("a", [1, 2, 3])
    while not (done := ours.step()):
        pass
    assert done[0].pinned_RP.shape[1] == 1
    ours.close()
    assert rows() == before


if __name__ == "__main__":
    main()
"""


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", ["1", "0"])
def test_a_vllm_engine_of_the_caller_gives_the_same_rows_before_and_after_ours(tmp_path: Path, processes) -> None:
    from tests import tiny

    tiny.save_model(tmp_path / "model", head_dim=64)  # smaller heads have no kernel on a CPU
    (tmp_path / "beside.py").write_text(BESIDE_OURS)
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": processes, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    command = [sys.executable, str(tmp_path / "beside.py"), str(tmp_path / "model")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
