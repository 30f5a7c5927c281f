"""One training run, from its options to the finished directory."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, PrinterCallback

from logitcache.errors import LogitcacheError, StudentError, TrainingError, WriteError, first_line
from logitcache.runtime.console import Stop
from logitcache.runtime.files import LOCK
from logitcache.runtime.locks import exclusive
from logitcache.student.data.views import View
from logitcache.student.model.load import load_student, quiet
from logitcache.student.model.lora import adapter_base, add_lora
from logitcache.student.model.vocabulary import Traces
from logitcache.student.training.callbacks import ShowProgress
from logitcache.student.training.config import DistillConfig, configure
from logitcache.student.training.distributed import agreed, fail_together
from logitcache.student.training.options import TrainOptions
from logitcache.student.training.run_data import choose_traces, datasets, open_caches
from logitcache.student.training.run_record import RunRecord
from logitcache.student.training.run_settings import claim, run_settings, versions, window_of_run, write
from logitcache.student.training.trainer import DistillTrainer


def train(options: TrainOptions) -> RunRecord:
    """Trains `options.student` from caches into the directory `options.out`, or resumes an earlier call.

    OUT then contains the model with its tokenizer, `run.json` (settings, and evaluations before and after) and the last
    checkpoints. Works under torchrun.
    Returns: what run.json contains. Its status is "finished" or, after Ctrl-C or SIGTERM, "stopped" with the signal;
        `again` is true where nothing was left to do.
    Raises: StudentError for a student, an option or an OUT that cannot be used; CacheError; TrainingError.
    """
    with quiet():
        return _train(options)


def _train(options: TrainOptions) -> RunRecord:
    view, config = View(options.view, tuple(options.sections)), configure(options)
    caches = open_caches(options, view)
    config.shuffle_window = agreed(window_of_run(options, list(caches.values())), config.device)
    wanted = run_settings(options, config, caches, view)
    if (before := claim(options.out, wanted)) and before.status == "finished":
        return replace(before, again=True)
    chosen = choose_traces(options, caches)
    traces = [(cache, chosen[path].all) for path, cache in caches.items()]
    student, tokenizer = _load(options, config, traces)
    data, held_data = datasets(options, config, caches, chosen, view)

    main = config.process_index == 0
    with contextlib.ExitStack() as stack:
        with fail_together(config.device):
            if main:
                options.out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(options.out / LOCK, str(options.out)))
        if (before := claim(options.out, wanted)) and before.status == "finished":  # by another process, meanwhile
            return replace(before, again=True)
        with _named_arguments(options.set):
            trainer = _trainer(student, config, data, eval_dataset=held_data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ShowProgress(trainer)) if main else None
        if (eval_before := before and before.eval_before) is None:
            trainer.evaluate()
            eval_before = trainer.last_evaluation[1]
        run = RunRecord(status="running", settings=wanted, eval_before=eval_before, versions=versions())
        trainer.stop = stop = stack.enter_context(Stop())
        stop.patient = True
        if main:
            write(options.out, run)
        with _named_arguments(options.set):
            _fit(trainer)
        run = replace(run, spent=trainer.spent(), steps=trainer.state.global_step)
        if trainer.state.global_step < trainer.state.max_steps:
            return replace(run, status="stopped", signal=stop.signal)
        stop.patient = False
        if trainer.last_evaluation[0] != trainer.state.global_step or config.load_best_model_at_end:
            trainer.evaluate()
        found, history = trainer.last_evaluation[1], trainer.state.log_history
        run = replace(run, status="finished", eval_after=found, history=history)
        trainer.save_model()
        with fail_together(config.device):
            if main:
                write(options.out, run)
    return run


def _trainer(student: Any, config: DistillConfig, data: Any, **options: Any) -> DistillTrainer:
    try:
        return DistillTrainer(student, config, data, **options)
    except (ValueError, ImportError, RuntimeError) as e:
        raise StudentError(f"training arguments: {first_line(e)}") from e


@contextlib.contextmanager
def _named_arguments(given: dict[str, Any]) -> Iterator[None]:
    """Training arguments that transformers and torch check only when they use them: an error there is a StudentError."""
    try:
        yield
    except Exception as e:
        if isinstance(e, LogitcacheError) or not given:
            raise
        raise StudentError(f"training fails with `set` {', '.join(given)}: {first_line(e)}") from e


def _load(options: TrainOptions, config: DistillConfig, traces: Traces) -> tuple[Any, PreTrainedTokenizerBase]:
    """The student to train. With `lora_rank` only an adapter is trained, and the rest need not be float32."""
    load = partial(
        load_student,
        identity=traces[0][0].identity,
        attention=options.attention,
        traces=traces,
        teacher_tokenizer=options.teacher_tokenizer,
    )
    if options.lora_rank is None:
        return load(options.student)
    if adapter_base(options.student):
        raise StudentError(
            f"{options.student} is a LoRA adapter already, and a second one would be saved without it; give `student` its "
            "base model, or a folder with the adapter merged (peft: merge_and_unload, save_pretrained)"
        )
    transformers.set_seed(config.seed)  # of the adapter's random initial weights
    student = Path(options.student).resolve() if Path(options.student).exists() else options.student
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model, tokenizer = load(student, dtype=dtype)
    return add_lora(model, options.lora_rank, options.lora_alpha), tokenizer


def _fit(trainer: DistillTrainer) -> None:
    """Trains. Errors of the machine become errors of one line."""
    try:
        trainer.train(resume_from_checkpoint=True)
    except torch.OutOfMemoryError as e:
        raise TrainingError(
            f"out of memory with {trainer.args.tokens_per_batch} tokens per batch; lower `tokens_per_batch`, or set "
            "`gradient_checkpointing`, then run the same command to resume"
        ) from e
    except ImportError as e:
        raise StudentError(f"training arguments: {first_line(e)}") from e
    except (OSError, SafetensorError) as e:
        raise WriteError(
            f"{trainer.args.output_dir}: {e}; checkpoints are intact: fix the cause, then run the same command to resume"
        ) from e
