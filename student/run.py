"""One training run: its options, its directory, and what it leaves behind."""

import contextlib
import difflib
import enum
import hashlib
import json
import platform
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PrinterCallback

import logitcache
from logitcache.cache import Cache
from logitcache.console import Stop
from logitcache.errors import StudentError, TrainingError, WriteError
from logitcache.files import exclusive, publish
from logitcache.manifest import first_difference
from logitcache.student.data import TraceDataset, split
from logitcache.student.model import find_head, load_student
from logitcache.student.trainer import DistillConfig, DistillTrainer, Report
from logitcache.student.views import SECTIONS, View

RUN_FILE = "run.json"


@dataclass(frozen=True)
class TrainOptions:
    """One call of ``logitcache train``. None takes the default of DistillConfig, or what `dtype` says."""

    cache: Path
    student: str
    out: Path
    view: str = "full"
    sections: tuple[str, ...] = tuple(SECTIONS)
    held_out: float = 0.05
    dtype: str | None = None  # "bf16": float32 weights under bfloat16 autocast; "fp32"; None: bf16 on CUDA
    tokens_per_batch: int | None = None
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    set: dict[str, Any] = field(default_factory=dict)  # any other field of DistillConfig


# Fields that `--set` must not touch, and what to use instead.
_FIXED = {
    "output_dir": "--out",
    "per_device_train_batch_size": "tokens_per_batch",
    "per_device_eval_batch_size": "tokens_per_batch",
    "auto_find_batch_size": "tokens_per_batch",
    "train_sampling_strategy": "seed: the order is a function of it",
    "dataloader_drop_last": "tokens_per_batch: every trace is used",
    "label_smoothing_factor": "nothing: there are no labels to smooth",
    "remove_unused_columns": "nothing",
    "average_tokens_across_devices": "nothing: they are, always",
    "bf16": "--dtype",
    "fp16": "--dtype bf16",
    "resume_from_checkpoint": "the same command again: it resumes",
}
# Fields that do not change the weights a run ends with: a run may be taken up with others.
_FREE = {"save_minutes", "tokens_per_batch", "gradient_accumulation_steps", "gradient_checkpointing"}
_FREE_PREFIXES = ("dataloader_", "logging_", "log_", "save_", "eval_", "ddp_", "report_to", "run_name", "disable_tqdm")


def train(options: TrainOptions) -> dict[str, Any]:
    """Trains `options.student` from a cache into the directory `options.out`, or goes on where an earlier call stopped.

    OUT then holds the model with its tokenizer, `run.json` (what was done, and how the student stood before and after)
    and checkpoints while it lasts. Works under torchrun.
    Returns: what run.json holds, its "status" "finished" or, after Ctrl-C or SIGTERM, "stopped" with the "signal";
        "again" is true where nothing was left to do.
    Raises: StudentError for a student, an option or an OUT that will not do; CacheError; TrainingError.
    """
    with _quiet():
        return _train(options)


def _train(options: TrainOptions) -> dict[str, Any]:
    cache, view, config = Cache.open(options.cache), View(options.view, tuple(options.sections)), configure(options)
    taught, held = split(cache.prompt_ids, options.held_out)
    wanted = _record(options, config, cache)
    before = _claim(options.out, wanted)
    if before.get("status") == "finished":
        return before | {"again": True}
    student, tokenizer = load_student(options.student, cache.identity)
    vocab = find_head(student).module.weight.shape[0]
    data, held_data = TraceDataset(cache, taught, view, vocab), TraceDataset(cache, held, view, vocab)
    for side, name in ((data, "training"), (held_data, "held-out")):
        if not any(len(side[i].positions) for i in range(len(side))):
            raise StudentError(
                f"{options.cache}: no {name} trace has rows of {', '.join(view.sections)}; teach other sections, or "
                "generate with --prompt-logits for those of the prompt"
            )

    main = config.process_index == 0
    with contextlib.ExitStack() as stack:
        if main:
            options.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(options.out / ".lock", str(options.out)))
        trainer = DistillTrainer(student, config, data, eval_dataset=held_data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Report(trainer)) if main else None
        run = {"status": "running", **wanted, "eval_before": before.get("eval_before"), "versions": _versions()}
        if run["eval_before"] is None:
            trainer.evaluate()
            run["eval_before"] = trainer.last_evaluation[1]
        trainer.stop = stop = stack.enter_context(Stop())
        stop.patient = True
        if main:
            _publish(options.out, run)
        _fit(trainer)
        run |= trainer.counts | {"steps": trainer.state.global_step}
        run["tokens_per_second"] = run["tokens_fed"] / max(run["seconds"], 1e-9)
        if trainer.state.global_step < trainer.state.max_steps:
            return run | {"status": "stopped", "signal": stop.signal}
        stop.patient = False
        if trainer.last_evaluation[0] != trainer.state.global_step:
            trainer.evaluate()
        run |= {"status": "finished", "eval_after": trainer.last_evaluation[1], "history": trainer.state.log_history}
        trainer.save_model()
        if main:
            _publish(options.out, run)
    return run


def _fit(trainer: DistillTrainer) -> None:
    """Trains on; what the machine lacks becomes one line."""
    try:
        trainer.train(resume_from_checkpoint=True)
    except torch.OutOfMemoryError as e:
        raise TrainingError(
            f"out of memory with {trainer.args.tokens_per_batch} tokens a batch; lower --tokens-per-batch, or "
            "--set gradient_checkpointing=true, and run the same command again"
        ) from e
    except (OSError, SafetensorError) as e:
        raise WriteError(
            f"{trainer.args.output_dir}: {e}; the checkpoint before is whole: mend that and run the same command again"
        ) from e


def configure(options: TrainOptions) -> DistillConfig:
    """Raises: StudentError for an option that does not exist or does not fit, with the nearest good one."""
    if options.dtype not in (None, "bf16", "fp32"):
        raise StudentError(f"--dtype {options.dtype!r}: choose bf16 or fp32")
    accelerator = torch.accelerator.is_available()
    given = {
        "tokens_per_batch": options.tokens_per_batch,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    given |= {
        "bf16": options.dtype == "bf16" or (options.dtype is None and torch.cuda.is_available()),
        "use_cpu": not accelerator,
        "dataloader_pin_memory": accelerator,
    }
    given |= {name: _parse(name, value) for name, value in options.set.items()}
    try:
        return DistillConfig(output_dir=str(options.out), **given)
    except ValueError as e:
        raise StudentError(f"training arguments: {' '.join(str(e).split())}") from e


def _parse(name: str, value: Any) -> Any:
    """The value of a DistillConfig field as the field's type reads it, from text or from what JSON made of it."""
    kinds = {f.name: f.type for f in fields(DistillConfig) if f.init}
    if name in _FIXED:
        raise StudentError(f"--set {name}: this is not yours to set; use {_FIXED[name]}")
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)[0]
        raise StudentError(f"--set {name}: there is no such training argument; did you mean {near!r}?")
    text = value if isinstance(value, str) else json.dumps(value)
    kind = kinds[name]
    options = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    if text.lower() in ("none", "null") and (type(None) in options):
        return None
    for option in options:
        base = typing.get_origin(option) or option
        with contextlib.suppress(ValueError):
            if base is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if base in (int, float):
                return base(text)
            if base in (dict, list) and isinstance(found := json.loads(text), base):
                return found
            if isinstance(base, type) and issubclass(base, enum.Enum):
                return base(text)
    choices = [m.value for o in options if isinstance(o, type) and issubclass(o, enum.Enum) for m in o]
    if choices:
        near = difflib.get_close_matches(text, choices, n=1, cutoff=0.0)[0]
        raise StudentError(f"--set {name}={text}: did you mean {near!r}? All: {', '.join(choices)}")
    if str in options:
        return text
    raise StudentError(f"--set {name}={text}: expected {getattr(kind, '__name__', kind)}")


def _record(options: TrainOptions, config: DistillConfig, cache: Cache) -> dict[str, Any]:
    """All that decides the weights a run ends with, in the order in which a difference is named."""
    traces = hashlib.blake2b("\n".join(sorted(cache.trace_ids)).encode(), digest_size=16).hexdigest()
    student = Path(options.student)
    loose = [n for n in options.set if n in _FREE or n.startswith(_FREE_PREFIXES)]
    return {
        "cache": asdict(cache.identity),
        "traces": {"count": len(cache), "digest": traces},
        "student": str(student.resolve() if student.exists() else options.student),
        "view": options.view,
        "sections": list(options.sections),
        "held_out": options.held_out,
        "bf16": config.bf16,
        "tokens_per_step": config.tokens_per_step,
        "epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "set": {n: v for n, v in options.set.items() if n not in loose},
    }


def _claim(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What run.json of `out` holds, {} for a new run.

    Raises: StudentError for a directory of other things, and for a run made otherwise, naming the difference.
    """
    path = out / RUN_FILE
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(p.name != ".lock" for p in out.iterdir())):
            raise StudentError(f"{out} exists and is not a run; give --out an empty or a new directory")
        return {}
    found = json.loads(path.read_text())
    if difference := first_difference(found, json.loads(json.dumps(wanted, default=str))):
        name, there, here = difference
        raise StudentError(
            f"{out} was made with {name} = {there!r}, this run has {here!r}; set it as it was, or give --out a new "
            "directory"
        )
    return found


def _publish(out: Path, run: dict[str, Any]) -> None:
    publish(out / RUN_FILE, json.dumps(run, indent=1, default=str).encode())


def _versions() -> dict[str, str]:
    return {
        "logitcache": logitcache.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' log lines and bars; errors pass."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar() if bars else None
