"""The student over several processes that each hold a part of it: FSDP2 on CPUs, and what needs GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]
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
    import torch
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
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_accelerate_takes_the_configurations_of_ddp_and_zero3(monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    assert "ACCELERATE_USE_FSDP" not in launched(monkeypatch, "ddp.yaml")
    config = load_config_from_file(str(EXAMPLES / "zero3.yaml"))
    assert config.distributed_type == DistributedType.DEEPSPEED
    asked = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
    assert asked["zero_optimization"]["stage"] == 3


# Every rank learns from its own batch; the mean of the losses and its gradients are those of one process with both.
SHARDED = """
import copy, json, os, sys
from types import SimpleNamespace
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from logitcache.cache import Cache
from logitcache.student.data import TraceDataset, loader, targets
from logitcache.student.head import attach_head
from tests import tiny

def by_hand(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

def by_accelerate(model, mesh):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    names = SimpleNamespace(fsdp_dim_names=["shard"])
    class Mesh:
        def __getitem__(self, _): return mesh
    fsdp2_prepare_model(SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin()), torch_device_mesh=Mesh(), device=mesh.device_type,
        parallelism_config=names, mixed_precision="no", is_main_process=True), model)

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
data = TraceDataset(Cache.open(sys.argv[1]))
batches = list(loader(data, [[0, 1, 2], [3, 4, 5, 6]]))
assert all(len(b["groups"]) >= 1 for b in batches)
found = {}
for shard in (by_hand, by_accelerate):
    for tied in (True, False):
        alone = tiny.model(tie_word_embeddings=tied).train()
        model = copy.deepcopy(alone)
        attach_head(alone)
        expected = sum(alone(lesson=b) for b in batches) / world
        expected.backward()
        attach_head(model)
        shard(model, mesh)
        worst = {}
        for turn in range(2):
            model.zero_grad()
            with torch.no_grad():
                metrics = model(lesson=batches[rank], metrics=True)
            loss = model(lesson=batches[rank])
            loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            worst["loss"] = max(worst.get("loss", 0), abs(mean.item() / world - expected.item()) / expected.item())
            gradients = dict(alone.named_parameters())
            for name, weight in model.named_parameters():
                assert type(weight).__name__ == "DTensor", name
                mine, theirs = weight.grad.full_tensor(), gradients[name].grad
                error = ((mine - theirs).norm() / theirs.norm()).item()
                worst["gradient"] = max(worst.get("gradient", 0), error)
            kl = alone(lesson=batches[rank], metrics=True)["forward_kl"]
            worst["kl"] = max(worst.get("kl", 0), (metrics["forward_kl"] - kl).abs().max().item())
        found[f"{shard.__name__}, {'tied' if tied else 'untied'}"] = worst
if rank == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


def run(script: str, *arguments: Any, ranks: int = 2, **environment: str) -> str:
    """What rank 0 printed last."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": str(ranks)}
    shared = os.environ | shared | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT, stdout=pipe, stderr=pipe, text=True
        )
        for r in range(ranks)
    ]
    try:
        ends = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(err[-3000:] for _, err in ends)
    return ends[0][0].splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_student_shared_out_by_fsdp2_has_the_loss_and_gradients_of_one_process(cache, monkeypatch):
    found = json.loads(run(SHARDED, cache, **launched(monkeypatch, "fsdp2.yaml")))
    assert found.keys() == {f"by_{how}, {tied}" for how in ("hand", "accelerate") for tied in ("tied", "untied")}
    for case, worst in found.items():
        assert worst["loss"] < 1e-6, case
        assert worst["gradient"] < 1e-5, case
        assert worst["kl"] < 1e-5, case
