"""Whole runs of training: in this process, and in processes of their own that stop or die where they are told."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainerState

from logitcache.student.options import TrainOptions
from logitcache.student.run import train
from logitcache.student.trainer import DistillTrainer

ROOT = Path(__file__).parents[1]


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(run, name: str) -> list[float]:
    return [entry[name] for entry in run["history"] if name in entry]


def stop_at(step: int) -> None:
    """From now on every run of this process gets a SIGTERM in the middle of that step."""
    compute_loss = DistillTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    DistillTrainer.compute_loss = interrupted


# Files of a checkpoint in the order in which they are written; the last one makes it whole.
CHECKPOINT_FILES = (
    "model.safetensors",
    "spent.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


def kill_at(step: int, file: str) -> None:
    """This process dies while it writes that file of the checkpoint of that step, half of it on disk."""
    watched = f"checkpoint-{step}"

    def die(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple) -> None:
        # Opened for writing after `file`, or `file` itself closed: what stands there then is cut in half.
        if event == "open" and isinstance(args[0], str | os.PathLike) and f"{watched}/" in str(args[0]):
            path = Path(str(args[0]))
            whole = path.parent / file
            if path.name != file and whole.exists():
                die(whole)

    sys.addaudithook(watch)
    save_to_json = TrainerState.save_to_json

    def save(self, json_path: str) -> None:
        save_to_json(self, json_path)
        if watched in json_path and file == "trainer_state.json":
            die(Path(json_path))

    TrainerState.save_to_json = save


def launch(options: TrainOptions, ranks: int = 1, *, stop: int | None = None, kill: list | None = None) -> dict:
    """The same in processes of its own, `ranks` of them over gloo; stopped in step `stop`, or killed as `kill_at` does.

    Returns: what the run returned; {} of one that was killed.
    """
    given = {k: v for k, v in options.__dict__.items() if v is not None}
    text = json.dumps({"options": given, "stop": stop, "kill": kill}, default=str)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.runs", text],
                env=shared | own,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    out, err = processes[0].communicate(timeout=240)
    others = [p.communicate(timeout=60) for p in processes[1:]]
    if kill is not None:
        assert processes[0].returncode == -signal.SIGKILL, err.decode()[-3000:]
        return {}
    assert all(p.returncode == 0 for p in processes), (err.decode()[-3000:], others)
    return json.loads(out.decode().splitlines()[-1])


def main() -> None:
    told = json.loads(sys.argv[1])
    if told["stop"]:
        stop_at(told["stop"])
    if told["kill"]:
        kill_at(*told["kill"])
    options = told["options"]
    run = train(TrainOptions(Path(options.pop("cache")), out=Path(options.pop("out")), **options))
    assert "vllm" not in sys.modules, "the student's side imported vllm"
    print(json.dumps(run, default=str))


if __name__ == "__main__":
    main()
