"""One experiment: its variants trained from one cache, held against the teacher and against answers, and written up.

    OUT/experiment.json         what it was told, which a later call must repeat
    OUT/crops/right-0.5/        caches of `logitcache score --crop`, for halves
    OUT/variants/VARIANT/seed-N/        a run of `logitcache train`
    OUT/variants/VARIANT/seed-N-*       its answers and its evaluation, of `logitcache eval`
    OUT/logs/                   what those commands said
    OUT/results.csv report.md *.png

Each command runs in a process of its own: its peak of memory is then its own, and vLLM never meets training. What is
finished is not made again.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from logitcache.accuracy.options import Budget
from logitcache.errors import IdentityError, NotACacheError
from logitcache.identity import first_difference, weights_fingerprint
from logitcache.runtime.console import Stop
from logitcache.runtime.files import LOCK, left_behind, publish_json, read_json, taken
from logitcache.runtime.locks import exclusive
from logitcache.student.experiments import report
from logitcache.student.experiments.catalog import BEFORE, Variant
from logitcache.student.experiments.options import SEED, ExperimentOptions
from logitcache.student.experiments.plan import ExperimentPlan, plan, prepare
from logitcache.student.experiments.runner import ExperimentRunner, finished, measured
from logitcache.student.experiments.subcommands import Call, in_process_of_its_own

__all__ = ["ExperimentOptions", "plan", "run"]
SETTINGS = "experiment.json"


def run(
    options: ExperimentOptions, call: Call | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Makes what OUT lacks of the experiment, and writes up what is there. A run that fails keeps no other from its turn.

    Args:
        call: runs a command of logitcache, by default in a process of its own.
        say: is told of each command that is done; None: standard error.
    Returns: {"experiment", "out", "status": "finished", or "stopped" with the "signal"; "made": commands that were run;
        "rows": those of results.csv; "files": [paths of the report]}.
    Raises: as `plan`; IdentityError for an OUT of other settings; what a command ended with, naming its log.
    """
    made = prepare(options)
    with exclusive(options.out / LOCK, str(options.out)), Stop() as stop:
        about = _claim(options, made)
        stop.patient = True
        work = ExperimentRunner(options, made, call or in_process_of_its_own, stop, say or _say)
        work.all()
        rows = list(_rows(options, made))
        about |= {"stopped": work.stopped, "failed": list(map(str, work.failed))}
        about |= {"where": made.where, "evaluation": made.evaluation}
        files = report.write(
            options.out, made.experiment, made.variants, rows, about, _versions(options, made.variants)
        )
    if work.failed and not work.stopped:
        more = f", and {len(work.failed) - 1} more that failed" if len(work.failed) > 1 else ""
        raise type(work.failed[0])(f"{work.failed[0]}{more}; what is done is written up in {files[0]}")
    status = {"status": "stopped" if work.stopped else "finished", "signal": work.stopped}
    found = {"experiment": options.name, "out": str(options.out), "made": work.made, "rows": rows, "files": files}
    return found | status


def _rows(options: ExperimentOptions, made: ExperimentPlan) -> Iterator[dict[str, Any]]:
    """A row for the student as it was given, then one a variant and seed, of those that are finished.

    What was measured when something else was asked, such as fewer prompts, is left out.
    """
    places = [(variant, seed) for variant in made.variants for seed in range(options.seeds)]
    runs = [
        (variant, seed, found) for variant, seed in places if (found := finished(options.place(variant, seed), variant))
    ]
    own = next((found["eval_before"] for variant, _, found in runs if not variant.crop), None)
    before = measured(options, made, options.place(BEFORE, SEED), options.student, own)
    if any(before):
        yield report.row(options.name, Variant(BEFORE, ""), None, {}, *before)
    for variant, seed, found in runs:
        place = options.place(variant, seed)
        after = measured(options, made, place, str(place), found["eval_after"])
        yield report.row(options.name, variant, seed, found, *after)


def _claim(options: ExperimentOptions, made: ExperimentPlan) -> dict[str, Any]:
    """What experiment.json holds: what decides every run, and the machines that took part.

    Raises: IdentityError for an OUT of another experiment, naming the difference; NotACacheError for other things.
    """
    cache = made.cache
    student = Path(options.student)
    settings = {
        "experiment": options.name,
        "cache": cache.identity.digest,
        "traces": cache.traces_digest,
        "student": str(student.resolve() if student.exists() else options.student),
        "weights": weights_fingerprint(student) if student.is_dir() else None,
        "shared": json.loads(json.dumps(options.shared, default=str)),
    }
    place, there = options.out / SETTINGS, {}
    if place.exists():
        there = read_json(place)
        if difference := first_difference(there["settings"], settings):
            name, was, wanted = difference
            raise IdentityError(
                f"{options.out} holds an experiment with {name} = {was!r}, this one has {wanted!r}; set it as it was, or "
                "give `out` a new directory"
            )
        if there.get("prompts") and not options.prompts:
            raise IdentityError(
                f"{options.out} holds answers to {there['prompts']}, and its report would lose them; give `prompts` as "
                "before, or `out` a new directory"
            )
    elif taken(options.out, left_behind):
        raise NotACacheError(f"{options.out} holds other things than an experiment; give `out` a new directory")
    machines = list(dict.fromkeys([*there.get("machines", ()), _machine()]))
    now = {"settings": settings, "machines": machines, "prompts": options.prompts}
    if now != there:
        publish_json(place, now)
    return {
        "machines": machines,
        "teacher": f"{cache.identity.teacher} @ {cache.identity.teacher_revision[:12]}, top-{cache.identity.top_k}",
        "student": options.student,
        "traces": len(cache),
        "prompt_rows": cache.identity.prompt_logits,
        "shared": options.shared,
        "seeds": options.seeds,
        "held_out": options.held_out,
        "verifier": options.verifier,
        "budgets": list(map(str, dict.fromkeys(map(Budget.parse, options.budgets)))) if options.prompts else [],
    }


def _machine() -> str:
    """Processor or GPU, without a name of the machine."""
    import torch

    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = f"{names[0]}, {len(names)} cores" if names else model
    return f"{torch.cuda.get_device_name()}; {model}" if torch.cuda.is_available() else model


def _versions(options: ExperimentOptions, variants: list[Variant]) -> list[str]:
    """Of the programs that trained the runs, as their run.json say."""
    runs = (finished(options.place(variant, seed), variant) for variant in variants for seed in range(options.seeds))
    texts = (", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in runs if run)
    return list(dict.fromkeys(texts))


def _say(line: str) -> None:
    print(f"done: {line}", file=sys.stderr, flush=True)
