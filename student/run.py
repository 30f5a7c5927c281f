"""One training run: its options, its directory, and what it leaves behind."""

import contextlib
import hashlib
import json
import platform
import typing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, PrinterCallback

import logitcache
from logitcache.cache import Cache
from logitcache.console import Stop
from logitcache.errors import StudentError, TrainingError, WriteError
from logitcache.files import exclusive, publish
from logitcache.manifest import Identity, first_difference
from logitcache.student.checkpoints import LOCK_FILE, RUN_FILE
from logitcache.student.config import DistillConfig
from logitcache.student.data import Lessons, Mixture, TraceDataset, matching
from logitcache.student.head import find_head, plain
from logitcache.student.model import add_lora, load_student, quiet
from logitcache.student.options import TrainOptions, configure
from logitcache.student.order import split
from logitcache.student.progress import Report
from logitcache.student.trainer import DistillTrainer
from logitcache.student.views import View

# Settings that do not change the weights a run ends with: it may be taken up with others.
_FREE = {
    "save_minutes",
    "tokens_per_batch",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "packing",
    "compile",
}
_FREE_PREFIXES = ("dataloader_", "logging_", "log_", "save_", "eval_", "ddp_", "report_to", "run_name", "disable_tqdm")


def train(options: TrainOptions) -> dict[str, Any]:
    """Trains `options.student` from a cache into the directory `options.out`, or goes on where an earlier call stopped.

    OUT then holds the model with its tokenizer, `run.json` (what was done, and how the student stood before and after)
    and checkpoints while it lasts. Works under torchrun.
    Returns: what run.json holds, its "status" "finished" or, after Ctrl-C or SIGTERM, "stopped" with the "signal";
        "again" is true where nothing was left to do.
    Raises: StudentError for a student, an option or an OUT that will not do; CacheError; TrainingError.
    """
    with quiet():
        return _train(options)


def _train(options: TrainOptions) -> dict[str, Any]:
    caches = {path: Cache.open(path) for path in options.caches}
    view, config = View(options.view, tuple(options.sections)), configure(options)
    for path, cache in caches.items():
        view.check(cache.identity, str(path))
    taught, held = _sides(options, caches)
    wanted = _record(options, config, caches)
    before = _claim(options.out, wanted)
    if before.get("status") == "finished":
        return before | {"again": True}
    student, tokenizer = _load(options, config, next(iter(caches.values())).identity)
    vocab = find_head(plain(student)).module.weight.shape[0]
    data = _join(options, [TraceDataset(c, taught[p], view, vocab, options.top_k) for p, c in caches.items()])
    # The same for every run of a cache, whatever it learns from: of whole traces and all their rows.
    held_data = Mixture([TraceDataset(c, held[p], None, vocab) for p, c in caches.items()])
    if not _teaches(data):
        raise StudentError(
            f"{', '.join(map(str, caches))}: no training trace has rows of {', '.join(view.sections)}; teach other "
            f"sections{'' if str(view) == 'full' else f', or another view than {view}'}, or generate with --prompt-logits "
            "for those of the prompt"
        )

    main = config.process_index == 0
    with contextlib.ExitStack() as stack:
        if main:
            options.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(options.out / LOCK_FILE, str(options.out)))
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
        run |= trainer.spent() | {"steps": trainer.state.global_step}
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


def _sides(options: TrainOptions, caches: dict[Path, Cache]) -> tuple[dict[Path, np.ndarray], dict[Path, np.ndarray]]:
    """Of each cache the traces to learn from, and those held out; a prompt that stands in several is on one side."""
    prompt_ids = [prompt for cache in caches.values() for prompt in cache.prompt_ids]
    held = np.isin(np.arange(len(prompt_ids)), split(prompt_ids, options.held_out)[1])
    sides: tuple[dict[Path, np.ndarray], dict[Path, np.ndarray]] = ({}, {})
    start = 0
    for path, cache in caches.items():
        held_i, start = held[start : start + len(cache)], start + len(cache)
        wanted = np.ones(len(cache), bool) if options.where is None else matching(cache, options.where)
        sides[0][path], sides[1][path] = (wanted & ~held_i).nonzero()[0], held_i.nonzero()[0]
        if not len(sides[0][path]):
            raise StudentError(
                f"{path}: no trace is left to learn from"
                + (f" where {options.where}" if options.where else ": all its prompts are held out")
            )
    return sides


def _load(options: TrainOptions, config: DistillConfig, identity: Identity) -> tuple[Any, PreTrainedTokenizerBase]:
    """The student, ready to learn; of one with an adapter only that learns, and the rest need not be float32."""
    if options.lora_rank is None:
        return load_student(options.student, identity, attention=options.attention)
    transformers.set_seed(config.seed)  # an adapter begins with random weights
    student = Path(options.student).resolve() if Path(options.student).exists() else options.student
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model, tokenizer = load_student(student, identity, dtype, options.attention)
    return add_lora(model, options.lora_rank, options.lora_alpha), tokenizer


def _join(options: TrainOptions, parts: list[TraceDataset]) -> Lessons:
    shares = list(options.caches.values())
    return parts[0] if len(parts) == 1 else Mixture(parts, None if None in shares else typing.cast(list[float], shares))


def _teaches(data: Lessons) -> bool:
    return any(len(data[i].positions) for i in range(len(data)))


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


def _record(options: TrainOptions, config: DistillConfig, caches: dict[Path, Cache]) -> dict[str, Any]:
    """All that decides the weights a run ends with, in the order in which a difference is named."""
    record: dict[str, Any] = {"caches": len(caches)}
    for number, (path, cache) in enumerate(caches.items(), 1):
        traces = hashlib.blake2b("\n".join(sorted(cache.trace_ids)).encode(), digest_size=16).hexdigest()
        own = {"cache": asdict(cache.identity), "traces": {"count": len(cache), "digest": traces}}
        own |= {} if (share := options.caches[path]) is None else {"share": share}
        record |= {name if number == 1 else f"{name}_{number}": value for name, value in own.items()}
    student = Path(options.student)
    loose = [n for n in options.set if n in _FREE or n.startswith(_FREE_PREFIXES)]
    return record | {
        "student": str(student.resolve() if student.exists() else options.student),
        "view": str(View(options.view)),
        "sections": list(options.sections),
        "where": options.where,
        "top_k": options.top_k,
        "held_out": options.held_out,
        "bf16": config.bf16,
        "lora_rank": options.lora_rank,
        "lora_alpha": options.lora_alpha,
        **config.objective(),
        "ce_weight": config.ce_weight,
        "section_weights": config.section_weights,
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
        if out.exists() and (not out.is_dir() or any(p.name != LOCK_FILE for p in out.iterdir())):
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
