"""The student over several processes that each hold a part of it: FSDP2 and ZeRO-3 on CPUs, and what needs GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.runs import ROOT, last_lines

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("home") / "cache"
    tiny.write_cache(path)
    return path


def launched(monkeypatch, name: str) -> dict[str, str]:
    """The environment that `accelerate launch` makes of a configuration."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.chdir(ROOT)
    asked = ["--config_file", str(EXAMPLES / name), "-m", "logitcache.cli", "train"]
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(asked))
    assert args.num_processes == 8
    return prepare_multi_gpu_env(args)


def test_accelerate_takes_the_configuration_of_fsdp2(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import StateDictType

    for name, value in launched(monkeypatch, "fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    model = tiny.model()
    plugin.set_auto_wrap_policy(model)
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.model.layers[0])}


def test_accelerate_takes_the_configurations_of_ddp_and_zero3(monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    assert "ACCELERATE_USE_FSDP" not in launched(monkeypatch, "ddp.yaml")
    config = load_config_from_file(str(EXAMPLES / "zero3.yaml"))
    assert config.distributed_type == DistributedType.DEEPSPEED
    asked = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
    assert asked["zero_optimization"]["stage"] == 3


# Every rank learns from its own batch; the mean of the losses and its gradients are those of one process with both.
COMPARE = """
import copy, json, os, sys
from types import SimpleNamespace
import torch, torch.distributed as dist
from logitcache.cache.reader import Cache
from logitcache.student.data.collate import loader
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.model.head import attach_head
from logitcache.student.training.distributed import end_process_group
from tests import tiny

def compare(cache, shard):
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = list(loader(TraceDataset(Cache.open(cache)), [[0, 1, 2], [3, 4, 5, 6]]))
    found = {}
    for tied in (True, False):
        alone = tiny.model(tie_word_embeddings=tied).train()
        model = copy.deepcopy(alone)
        attach_head(alone)
        expected = sum(alone(distill=b) for b in batches) / world
        expected.backward()
        head = attach_head(model)
        called, backward, gradient, clear = shard(model, head)
        worst = {"loss": 0, "gradient": 0, "kl": 0}
        for turn in range(2):
            with torch.no_grad():
                mine = model(distill=batches[rank], metrics=True)["forward_kl"]
            kl = alone(distill=batches[rank], metrics=True)["forward_kl"]
            loss = called(distill=batches[rank])
            backward(loss)
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            errors = {"kl": (mine - kl).abs().max(), "loss": abs(mean / world - expected) / expected}
            for (name, weight), whole in zip(model.named_parameters(), alone.parameters(), strict=True):
                error = (gradient(weight) - whole.grad).norm() / whole.grad.norm()
                errors["gradient"] = max(errors.get("gradient", 0), error)
            worst = {name: max(worst[name], float(error)) for name, error in errors.items()}
            clear()
        found["tied" if tied else "untied"] = worst
    if rank == 0:
        print(json.dumps(found))
    end_process_group()

torch.set_num_threads(1)
"""

FSDP2 = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def shard(model, head):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    if sys.argv[2] == "by hand":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:  # accelerate shards on GPUs only; what it does there is called with what it would have
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model
        fsdp2_prepare_model(SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin()), mixed_precision="no",
            torch_device_mesh={("shard",): mesh}, parallelism_config=SimpleNamespace(fsdp_dim_names=["shard"]),
        ), model)
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    return model, torch.Tensor.backward, lambda weight: weight.grad.full_tensor(), model.zero_grad

dist.init_process_group("gloo")
compare(sys.argv[1], shard)
sys.stdout.flush()
os._exit(0)  # sharded tensors hold the group, and so gloo's threads, beyond the interpreter's end
"""

ZERO3 = """
import deepspeed
from logitcache.student.training.trainer import _register_head

def shard(model, head):
    _register_head(model, head.module)
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}  # shares out the smallest weights, too
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": stage}
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=still, config=config)
    assert all(weight.numel() == 0 for weight in model.parameters())
    return engine, engine.backward, deepspeed.utils.safe_get_full_grad, engine.step

deepspeed.init_distributed("gloo")
compare(sys.argv[1], shard)
"""


def run(script: str, *arguments: Any, **environment: str) -> str:
    """What rank 0 of two printed last."""
    return last_lines(["-c", script, *map(str, arguments)], **environment)[0]


def check(found: dict[str, dict[str, float]]) -> None:
    print(found)
    assert found.keys() == {"tied", "untied"}
    for tied, worst in found.items():
        assert worst["loss"] < 1e-6, tied
        assert worst["gradient"] < 1e-5, tied
        assert worst["kl"] < 1e-5, tied


UNFINISHED = """
from pathlib import Path
import torch, torch.distributed as dist
from logitcache.student.training.distributed import end_process_group

def work():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    model.itself = model
    [dist.all_reduce(torch.ones(5_000_000), async_op=True) for _ in range(8)]

dist.init_process_group("gloo")
work()
end_process_group()
print([name for path in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := path.read_text())])
"""


@pytest.mark.slow
def test_ranks_part_without_an_abort_whatever_is_under_way():
    assert run(UNFINISHED) == "[]"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["by hand", "by accelerate"])
def test_a_student_shared_out_by_fsdp2_has_the_loss_and_gradients_of_one_process(cache, monkeypatch, how):
    check(json.loads(run(COMPARE + FSDP2, cache, how, **launched(monkeypatch, "fsdp2.yaml"))))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_student_shared_out_by_zero3_has_the_loss_and_gradients_of_one_process(cache):
    pytest.importorskip("deepspeed")
    check(json.loads(run(COMPARE + ZERO3, cache, DS_ACCELERATOR="cpu")))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml", "zero3.yaml"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_on_all_gpus_goes_as_on_one(cache, tmp_path, name, dtype):
    import torch

    if name == "zero3.yaml":
        pytest.importorskip("deepspeed")
    model, gpus = tiny.save_model(tmp_path / "model"), torch.cuda.device_count()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / name)]
    launch += ["--num_processes", str(gpus)]
    runs = []
    for start, count, out in (([sys.executable], 1, "one"), (launch, gpus, "many")):
        train = ["-m", "logitcache.cli", "train", str(cache), "--student", str(model), "--out", str(tmp_path / out)]
        train += ["--tokens-per-batch", str(128 // count), "--held-out", "0.2", "--epochs", "2", "--dtype", dtype]
        visible = {"CUDA_VISIBLE_DEVICES": "0"} if count == 1 else {}
        done = subprocess.run(
            [*start, *train], cwd=ROOT, env=os.environ | visible, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-4000:]
        runs.append(json.loads((tmp_path / out / "run.json").read_text()))
    one, many = ([entry["loss"] for entry in r["history"] if "loss" in entry] for r in runs)
    close = {"fp32": 1e-4, "bf16": 2e-2}[dtype]
    assert many == pytest.approx(one, rel=close)
    assert runs[1]["eval_after"]["kl"] == pytest.approx(runs[0]["eval_after"]["kl"], rel=close)
