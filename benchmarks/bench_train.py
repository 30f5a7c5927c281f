"""Compares a training step from the cache with fine-tuning and with online distillation, the teacher in memory.

    python -m benchmarks.bench_train --cache demo/cache            # SmolLM2-135M; appended to results/train-<machine>.csv
    python -m benchmarks.bench_train --quick --json                # a student of ten layers, short steps; a minute
    python -m benchmarks.bench_train --plot out.png                # the newest saved run, with matplotlib

Every implementation trains the same student on the same traces of the same cache, in a process of its own, with the same
Trainer loop and the same optimizer. They take their steps in turns, so that a slow moment of the machine affects all of them.

    logitcache      DistillTrainer on the cache's rows
    fine-tuning     transformers' Trainer: cross-entropy with the tokens that have rows
    online          the same Trainer with the teacher's forward: forward KL over the full vocabulary, at the same
                    positions only; a plain loop, made as cheap as possible
    online (TRL)    trl's GKDTrainer, lmbda=0, beta=0: the same loss; if trl is installed

The time of a step includes reading the batch, forward, backward, clipping, AdamW and logging. Memory is the peak during
training minus that of the process with the student loaded: gradients, AdamW's moments, activations, logits, and the teacher
if it is in memory. It is the resident set on a CPU, the allocator's figure on a GPU. KL is that of the student on held-out traces
after the steps.
"""

import argparse
import contextlib
import csv
import ctypes
import gc
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.bench_divergence import ROOT, machine, say
from benchmarks.embedded import embedded_teacher
from logitcache.cache.reader import Cache
from logitcache.student.data.collate import Batch
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.data.held_out import split
from logitcache.student.data.sampler import StepSampler
from logitcache.student.model.metrics import evaluate
from logitcache.student.model.prune import prune_layers
from logitcache.student.training.config import DistillConfig
from logitcache.student.training.timers import PeakMemory
from logitcache.student.training.trainer import DistillTrainer

# B traces in a step, T tokens of the longest, N supervised positions, V vocabulary.

FINE_TUNING, ONLINE, TRL = "fine-tuning", "online", "online (TRL)"
GOALS = {"time": 1.10, "memory": 0.60, "data": 0.02}  # of fine-tuning's step, of TRL's or online's peak, of a step
Case = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """The work that every variant does."""

    teacher: str
    student: str
    cache: str
    tokens: int  # per step
    steps: int
    warm_up: int
    held_out: int  # traces
    threads: int
    learning_rate: float = 1e-4

    def traces(self) -> tuple[TraceDataset, TraceDataset]:
        """Training and held-out traces. Training traces have a medium length, so that no variant needs much padding."""
        cache = Cache.open(Path(self.cache))
        training, held = split(cache.prompt_ids, 0.15)
        low, high = np.quantile(cache.lengths[training], [0.3, 0.7])
        medium = training[(cache.lengths[training] >= low) & (cache.lengths[training] <= high)]
        return TraceDataset(cache, medium), TraceDataset(cache, held[: self.held_out])

    def plan(self, data: TraceDataset) -> Iterator[np.ndarray]:
        """The traces of every step, as DistillTrainer chooses them."""
        sampler = StepSampler(data.pool, self.tokens, seed=0)
        epochs = (sampler.step_traces(epoch) for epoch in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), self.steps)

    def arguments(self, out: str) -> Case:
        return {
            "output_dir": out,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": torch.cuda.is_available(),
            "dataloader_pin_memory": False,
            "seed": 0,
        }


class Steps(torch.utils.data.Dataset):
    """Data of the other variants: an item is the traces of a step, as tokens and the place where rows begin."""

    def __init__(self, load: Load, data: TraceDataset):
        traces = [[data.cache[int(data.indices[i])] for i in step] for step in load.plan(data)]
        self.items = [[(t.token_ids.astype(np.int64), t.row_start) for t in step] for step in traces]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> list[tuple[np.ndarray, int]]:
        return self.items[i]


def pad(items: list[list[tuple[np.ndarray, int]]]) -> dict[str, torch.Tensor]:
    """Collates for fine-tuning: ids, mask and labels [B, T]; label -100 where a position is not supervised."""
    (step,) = items
    shape = len(step), max(len(ids) for ids, _ in step)
    input_ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    for row, (ids, start) in enumerate(step):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        labels[row, start : len(ids)] = ids[start:]
    named = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(values) for name, values in named.items()}


class OnlineTrainer(Trainer):
    teacher: PreTrainedModel

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        supervised = inputs["labels"][:, 1:] != -100
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            teacher_NV = self.teacher(**given, use_cache=False).logits[:, :-1][supervised].float().log_softmax(dim=-1)
        student_NV = model(**given, use_cache=False).logits[:, :-1][supervised].float().log_softmax(dim=-1)
        return F.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True) / num_items_in_batch


def logitcache(load: Load, student: PreTrainedModel, data: TraceDataset, out: str) -> Trainer:
    config = DistillConfig(**load.arguments(out), tokens_per_batch=load.tokens, save_minutes=None)
    return DistillTrainer(student, config, data)


def others(load: Load, out: str) -> Case:
    # One item is one step; it must not be shuffled.
    return load.arguments(out) | {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}


def fine_tuning(load: Load, student: PreTrainedModel, data: TraceDataset, out: str) -> Trainer:
    arguments = TrainingArguments(**others(load, out))
    return Trainer(student, arguments, train_dataset=Steps(load, data), data_collator=pad)


def online(load: Load, student: PreTrainedModel, data: TraceDataset, out: str) -> Trainer:
    arguments = TrainingArguments(**others(load, out))
    trainer = OnlineTrainer(student, arguments, train_dataset=Steps(load, data), data_collator=pad)
    trainer.model_accepts_loss_kwargs = True  # the loss divides by the step's supervised positions
    trainer.teacher = load_model(load.teacher).to(arguments.device).eval()  # pyright: ignore[reportArgumentType]
    return trainer


def online_trl(load: Load, student: PreTrainedModel, data: TraceDataset, out: str) -> Trainer:
    import datasets
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

    steps = Steps(load, data)
    numbered = datasets.Dataset.from_dict({"input_ids": [[i] for i in range(len(steps))]})  # it takes no other kind
    off_policy = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "gradient_checkpointing": False}
    arguments = GKDConfig(**{"bf16": False, **others(load, out)}, **off_policy)
    return GKDTrainer(
        student,
        load_model(load.teacher),
        arguments,
        data_collator=lambda items: pad([steps[item["input_ids"][0]] for item in items]),
        train_dataset=numbered,
        processing_class=AutoTokenizer.from_pretrained(load.student),
    )


VARIANTS: dict[str, Callable[[Load, PreTrainedModel, TraceDataset, str], Trainer]] = {
    "logitcache": logitcache,
    FINE_TUNING: fine_tuning,
    ONLINE: online,
    TRL: online_trl,
}


def load_model(folder: str) -> PreTrainedModel:
    """Loads in float32 and copies the weights: pages of a mapped file would count as memory only when first read."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def _shapes(batch: Any) -> list[tuple[int, int]]:
    """(B, T) of each block of a batch: our own, or a plain dict of tensors."""
    if isinstance(batch, Batch):
        return batch.shapes
    return [batch["input_ids"].shape] if "input_ids" in batch else []


class Turns(TrainerCallback):
    """Waits for its turn before every step, and reports the cost of the step."""

    def __init__(self, trainer: Trainer, say: Callable[[Case], None], wait: Callable[[], object]):
        self.say, self.wait, self.data_s, self.inputs = say, wait, 0.0, 0
        batches = trainer.get_batch_samples

        def timed(*given: Any) -> Any:
            began = time.perf_counter()
            samples, count = batches(*given)
            self.data_s = time.perf_counter() - began
            self.inputs = sum(B * T for batch in samples for B, T in _shapes(batch))
            return samples, count

        trainer.get_batch_samples = timed  # pyright: ignore[reportAttributeAccessIssue]
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.say({"ready": True})
        self.go()

    def go(self) -> None:
        self.wait()
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, processor = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        self.say({"seconds": wall, "processor_s": processor, "data_s": self.data_s, "inputs": self.inputs})
        self.go()


def take_part(variant: str, load: Load) -> None:
    """Runs one variant in this process: one step per line on standard input."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stdout
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(load.threads)
    data, held = load.traces()
    student = load_model(load.student)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student.to(device)  # pyright: ignore[reportArgumentType]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory would be reused without growth of the process
    memory = PeakMemory(device)
    before = memory.bytes() or 0
    with tempfile.TemporaryDirectory() as out:
        trainer = VARIANTS[variant](load, student, data, out)
        Turns(trainer, lambda found: print(json.dumps(found), file=lines), input)
        trainer.train()
    peak = memory.bytes()
    del trainer
    found: Case = {"peak_mib": None if peak is None else (peak - before) / 2**20}
    found["kl"] = evaluate(student, held, tokens_per_batch=2048).kl
    if variant == FINE_TUNING:
        found["kl_before"] = evaluate(load_model(load.student).to(device), held, tokens_per_batch=2048).kl  # pyright: ignore
    print(json.dumps(found), file=lines)


class Variant:
    """A process that runs `take_part`, seen from the parent."""

    def __init__(self, name: str, load: Load):
        self.name, self.log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [
            sys.executable,
            "-m",
            "benchmarks.bench_train",
            "--variant",
            name,
            "--load",
            json.dumps(asdict(load)),
        ]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, cwd=ROOT)

    def read(self) -> Case:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        self.log.seek(0)
        sys.exit(
            f"{self.name} ended with {code}{' (out of memory?)' if code == -9 else ''}:\n{self.log.read()[-4000:]}"
        )

    def turn(self) -> Case:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        return self.read()


def measure(load: Load, names: list[str]) -> list[Case]:
    variants = [Variant(name, load) for name in names]
    try:
        for variant in variants:
            variant.read()
            say(f"{variant.name}: ready")
        steps: dict[str, list[Case]] = {name: [] for name in names}
        for i in range(load.steps):
            for variant in variants[i % len(variants) :] + variants[: i % len(variants)]:
                steps[variant.name].append(variant.turn())
            say(f"step {i + 1}: " + ", ".join(f"{name} {steps[name][-1]['seconds']:.2f} s" for name in names))
        ends = {variant.name: variant.turn() for variant in variants}
    finally:
        for variant in variants:
            variant.process.kill()
            variant.process.wait()
    return [row(load, name, steps, ends) for name in names]


def row(load: Load, name: str, steps: dict[str, list[Case]], ends: dict[str, Case]) -> Case:
    mine, plain = steps[name][load.warm_up :], steps[FINE_TUNING][load.warm_up :]
    seconds = [s["seconds"] for s in mine]
    p20, median, p80 = (statistics.quantiles(seconds, n=10)[i] for i in (1, 4, 7))
    ratios = {
        key: statistics.median(a[key] / b[key] for a, b in zip(mine, plain, strict=True))
        for key in ("seconds", "processor_s")
    }
    peaks = {other: end["peak_mib"] for other, end in ends.items()}
    peak = peaks[name]
    return {
        "case": name,
        "student": Path(load.student).name,
        "tokens_a_step": load.tokens,
        "fed_a_step": round(statistics.mean(s["inputs"] for s in mine)),
        "steps": load.steps,
        "ms_median": round(1e3 * median, 1),
        "ms_p20": round(1e3 * p20, 1),
        "ms_p80": round(1e3 * p80, 1),
        "of_fine_tuning": round(ratios["seconds"], 3),
        "processor_of_fine_tuning": round(ratios["processor_s"], 3),
        "data_share": round(statistics.median(s["data_s"] / s["seconds"] for s in mine), 5),
        "data_us_a_token": round(1e6 * statistics.median(s["data_s"] / max(s["inputs"], 1) for s in mine), 2),
        "peak_mib": None if peak is None else round(peak),
        "of_online_peak": round(peak / peaks[ONLINE], 3) if peak else None,
        "of_trl_peak": round(peak / peaks[TRL], 3) if peak and TRL in peaks else None,
        "kl_before": round(ends[FINE_TUNING]["kl_before"], 4),
        "kl": round(ends[name]["kl"], 4),
    }


def make_student(teacher: Path, out: Path, pruned: bool) -> Path:
    """Makes a student of a third of the teacher's layers, or of that third repeated three times: as large as the teacher."""
    prune_layers(teacher, out)
    if pruned:
        return out
    third = AutoModelForCausalLM.from_pretrained(out)
    depth = AutoModelForCausalLM.from_pretrained(teacher).config.num_hidden_layers
    fields = third.config.to_dict() | {"num_hidden_layers": depth}
    whole = AutoModelForCausalLM.from_config(type(third.config).from_dict(fields), dtype=third.dtype)
    whole.load_state_dict(third.state_dict(), strict=False)
    for i, layer in enumerate(whole.model.layers):
        layer.load_state_dict(third.model.layers[i * len(third.model.layers) // depth].state_dict())
    whole.save_pretrained(out)
    return out


def save(rows: list[Case]) -> Path:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = ROOT / "benchmarks" / "results" / f"train-{machine(device)}.csv"
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    stamp = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), "commit": commit, "machine": machine(device)}
    stamp |= {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl_version()}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*stamp, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows({**stamp, **one} for one in rows)
    return path


def trl_version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("trl")
    return ""


def line(case: Case) -> str:
    peak = "" if case["peak_mib"] is None else f"{case['peak_mib']:>7,} MiB"
    shares = {"online's": case["of_online_peak"], "TRL's": case["of_trl_peak"]}
    share = ", ".join(f"{part:.2f} of {whose}" for whose, part in shares.items() if part)
    return (
        f"{case['case']:<14} {case['ms_median']:>9,.0f} ms ({case['ms_p20']:,.0f} - {case['ms_p80']:,.0f})  "
        f"{case['of_fine_tuning']:.3f} of fine-tuning's (processors {case['processor_of_fine_tuning']:.3f})  {peak} "
        f"{share}  data {case['data_share']:.2%}  KL {case['kl_before']:.3f} -> {case['kl']:.3f}"
    )


def goals_met(rows: list[Case]) -> str:
    ours = next(r for r in rows if r["case"] == "logitcache")
    memory = ours["of_trl_peak"] or ours["of_online_peak"]
    found = {"time": ours["of_fine_tuning"], "memory": memory, "data": ours["data_share"]}
    missed = [f"{name} {found[name]} > {goal}" for name, goal in GOALS.items() if found[name] and found[name] > goal]
    return "the goals are met" if not missed else f"missed: {', '.join(missed)}"


def plot(source: Path, out: Path) -> None:
    """Plots time, memory and KL of the newest run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with source.open() as file:
        rows = list(csv.DictReader(file))
    rows = [r for r in rows if r["date"] == rows[-1]["date"]]
    columns = {"ms_median": "ms per step", "peak_mib": "MiB over the loaded student", "kl": "held-out KL, nats per row"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for axis, (name, label) in zip(axes, columns.items(), strict=True):
        axis.bar([r["case"] for r in rows], [float(r[name] or 0) for r in rows], color=["C1"] + ["C7"] * len(rows))
        axis.set_title(label, fontsize="medium")
        axis.tick_params(axis="x", labelsize="small", rotation=15)
    axes[2].axhline(float(rows[0]["kl_before"]), color="C3", linewidth=1, linestyle=":")
    figure.suptitle(
        f"{rows[0]['student']}, {rows[0]['tokens_a_step']} tokens per step, {rows[0]['machine']}", fontsize=9
    )
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "demo" / "cache", help="a cache of the teacher [default: the demo's]"
    )
    parser.add_argument(
        "--teacher", type=Path, default=ROOT / "demo" / "teacher", help="a model folder, made if missing"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per step")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--held-out", type=int, default=12, help="traces whose KL is measured")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads per process; 1 suits a busy machine"
    )
    parser.add_argument("--pruned", action="store_true", help="the student has a third of the teacher's layers")
    parser.add_argument("--quick", action="store_true", help="--pruned, 4 steps of 256 tokens; nothing is saved")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    parser.add_argument("--no-save", action="store_true", help="save nothing in results/")
    parser.add_argument("--plot", type=Path, help="plot the newest saved run into this file instead of measuring")
    for hidden in ("--variant", "--load"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return take_part(args.variant, Load(**json.loads(args.load)))
    if args.plot:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return plot(ROOT / "benchmarks" / "results" / f"train-{machine(device)}.csv", args.plot)
    if args.quick:
        args.pruned, args.tokens, args.steps, args.warm_up, args.held_out = True, 256, 4, 2, 2
    torch.set_num_threads(args.threads)
    names = [name for name in VARIANTS if name != TRL or trl_version()]
    with tempfile.TemporaryDirectory() as folder:
        name = "a third of the teacher" if args.pruned else "as large as the teacher"
        student = make_student(embedded_teacher(args.teacher), Path(folder) / name, args.pruned)
        folders = {"teacher": str(args.teacher), "student": str(student), "cache": str(args.cache)}
        sizes = {n: getattr(args, n) for n in ("tokens", "steps", "warm_up", "held_out", "threads")}
        load = Load(**folders, **sizes)
        rows = measure(load, names)
    for case in rows:
        print(json.dumps(case) if args.json else line(case), flush=True)
    say(goals_met(rows))
    if not (args.quick or args.no_save):
        say(f"appended to {save(rows)}")


if __name__ == "__main__":
    main()
