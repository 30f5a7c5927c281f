"""Whole runs of training: in this process, and in processes of their own that stop or die where they are told."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, TrainerState

from logitcache.student.training.checkpoints import WORK
from logitcache.student.training.distributed import end_process_group
from logitcache.student.training.options import TrainOptions
from logitcache.student.training.run import train
from logitcache.student.training.run_record import RunRecord
from logitcache.student.training.trainer import DistillTrainer

ROOT = Path(__file__).parents[1]


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(run, name: str) -> list[float]:
    return [entry[name] for entry in run.history if name in entry]


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
    watched = f"{WORK}/checkpoint-{step}"

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


class Rank(NamedTuple):
    code: int
    out: str
    err: str


def ranks(command: list[str], count: int = 2, **environment: str) -> list[Rank]:
    """The ends of `count` Pythons with these arguments, which find one another as torchrun's would.

    Args:
        environment: of each process; {rank} in a value is its number.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes, pipe = [], subprocess.PIPE
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} if count > 1 else {}
        given = {name: value.replace("{rank}", str(rank)) for name, value in environment.items()}
        environ = os.environ | shared | own | given
        processes.append(
            subprocess.Popen([sys.executable, *command], env=environ, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        )
    try:
        said = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [Rank(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


def last_lines(command: list[str], count: int = 2, **environment: str) -> list[str]:
    """What each of the `ranks` printed last, "" for nothing; none may fail."""
    ends = ranks(command, count, **environment)
    assert all(end.code == 0 for end in ends), "\n".join(end.err[-3000:] for end in ends)
    return [end.out.strip().rpartition("\n")[2] for end in ends]


def launch(
    options: TrainOptions, count: int = 1, *, stop: int | None = None, kill: list | None = None, **environment: str
) -> RunRecord | None:
    """The same in processes of its own, `count` of them over gloo; stopped in step `stop`, or killed as `kill_at` does.

    Returns: what the run returned; None for one that was killed.
    """
    given = {k: v for k, v in options.__dict__.items() if v is not None}
    text = json.dumps({"options": given, "stop": stop, "kill": kill}, default=str)
    command = ["-m", "tests.runs", text]
    if kill is not None:
        killed = ranks(command, count, **environment)[0]
        assert killed.code == -signal.SIGKILL, killed.err[-3000:]
        return None
    return RunRecord.from_json(json.loads(last_lines(command, count, **environment)[0]))


def in_a_process(options: TrainOptions) -> multiprocessing.Process:
    """A started process that trains; forked from one that has imported everything, so that it starts quickly."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs"])
    process = context.Process(target=_train_on_one_thread, args=(options,))
    process.start()
    return process


def _train_on_one_thread(options: TrainOptions) -> None:
    torch.set_num_threads(1)
    train(options)


def main() -> None:
    told = json.loads(sys.argv[1])
    if told["stop"]:
        stop_at(told["stop"])
    if told["kill"]:
        kill_at(*told["kill"])
    options = told["options"]
    run = train(TrainOptions(out=Path(options.pop("out")), **options))
    assert "vllm" not in sys.modules, "the student's side imported vllm"
    print(json.dumps(run.to_json(), default=str))
    end_process_group()


if __name__ == "__main__":
    main()


def flat(found: dict | list, name: str = "") -> dict:
    """Every number of an evaluation by its path."""
    items = found.items() if isinstance(found, dict) else enumerate(found)
    numbers = {}
    for key, value in items:
        deep = isinstance(value, dict | list)
        numbers |= flat(value, f"{name}{key}.") if deep else {f"{name}{key}": value}
    return numbers
