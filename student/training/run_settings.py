"""The settings that decide a run's weights: a later call on the same directory must repeat them."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import logitcache
from logitcache.cache.filters import Filter
from logitcache.cache.reader import Cache
from logitcache.errors import StudentError
from logitcache.identity import first_difference
from logitcache.runtime.files import is_leftover, is_occupied, publish
from logitcache.storage.location import Location
from logitcache.student.data.views import View
from logitcache.student.training.checkpoints import RUN_FILE, checkpoints, find_run
from logitcache.student.training.config import DistillConfig
from logitcache.student.training.options import TrainOptions
from logitcache.student.training.run_record import OLDER, RunRecord
from logitcache.student.training.shuffle import choose_window, window_name

# Settings that do not change a run's weights: it may be resumed with others.
_FREE = {"tokens_per_batch", "gradient_accumulation_steps", "gradient_checkpointing", "packing", "compile", "report_to"}
_FREE |= {"run_name", "disable_tqdm", "use_cpu", "torch_empty_cache_steps", "project", "trackio_space_id"}
_FREE_PREFIXES = ("dataloader_", "logging_", "log_", "save_", "eval_", "ddp_")
# Settings with a name of their own below, also where they come from `set`.
_NAMED = {"num_train_epochs", "max_steps", "learning_rate", "seed", "ce_weight", "section_weights"}
# Options of settings that have another name.
_OPTIONS = {
    "tokens_per_step": "`tokens_per_batch` x gradient_accumulation_steps x processes",
    "bf16": "`dtype`",
    "cache": "`caches`",
    "traces": "`caches`",
}


def run_settings(
    options: TrainOptions, config: DistillConfig, caches: dict[Location, Cache], view: View
) -> dict[str, Any]:
    """Everything that decides a run's weights. The first difference in this order is reported."""
    found: dict[str, Any] = {"caches": len(caches)}
    shares = [share for share in options.shares.values() if share is not None]
    for number, (path, cache) in enumerate(caches.items(), 1):
        own = {"cache": asdict(cache.identity), "traces": {"count": len(cache), "digest": cache.traces_digest}}
        own |= {} if (share := options.shares[path]) is None else {"share": round(share / sum(shares), 12)}
        found |= {name if number == 1 else f"{name}_{number}": value for name, value in own.items()}
    student = Path(options.student)
    objective = config.objective()
    named = _NAMED | objective.keys()
    loose = [n for n in options.set if n in _FREE | named or n.startswith(_FREE_PREFIXES)]
    return found | {
        "student": str(student.resolve() if student.exists() else options.student),
        "view": str(view),
        "sections": list(view.sections),
        "where": None if options.where is None else str(Filter.parse(options.where)),
        "top_k": options.top_k,
        "held_out": options.held_out,
        "bf16": config.bf16,
        "lora_rank": options.lora_rank,
        "lora_alpha": options.lora_alpha,
        **{name: value for name, value in objective.items() if name not in config.unused()},
        "ce_weight": config.ce_weight,
        "section_weights": config.section_weights,
        "tokens_per_step": config.tokens_per_step,
        "epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "shuffle": window_name(config.shuffle_window),
        "set": {n: v for n, v in options.set.items() if n not in loose},
    }


def window_of_run(options: TrainOptions, caches: Sequence[Cache]) -> int | None:
    """Shards that the run mixes at a time, None for all: those of the run in `out`, if there is one and `shuffle` is auto.

    Raises: StudentError for an invalid `shuffle`.
    """
    _, found = find_run(options.out)
    return choose_window(options.shuffle, caches, (OLDER | found)["shuffle"] if found else None)


def claim(out: Path, wanted: dict[str, Any]) -> RunRecord | None:
    """The run to resume in `out`; None for a new run, or for one that ended before its first checkpoint.

    Raises: StudentError for a directory with other contents, and for a run with other settings, naming the difference.
    """
    foreign = is_occupied(out, is_leftover)
    _, found = find_run(out)
    if not found:
        if foreign:
            raise StudentError(f"{out} exists and is not a run; give `out` an empty or a new directory")
        return None
    if difference := first_difference(OLDER | found, json.loads(json.dumps(wanted, default=str))):
        if found["status"] != "finished" and not checkpoints(out):
            return None
        name, there, here = difference
        option = _OPTIONS.get(name.partition(".")[0].rstrip("_0123456789"))
        raise StudentError(
            f"{out} was made with {name} = {there!r}, this run has {here!r}; use the same setting"
            f"{f' ({option})' if option else ''}, or give `out` a new directory"
        )
    return RunRecord.from_json(found)


def write(out: Path, run: RunRecord) -> None:
    publish(out / RUN_FILE, json.dumps(run.to_json(), indent=1, default=str).encode())


def versions() -> dict[str, str]:
    return {
        "logitcache": logitcache.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
