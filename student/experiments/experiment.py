"""Runs one experiment: trains its variants from one cache, evaluates them, measures their accuracy, writes a report.

    OUT/experiment.json          its settings, which a later call must repeat
    OUT/crops/right-0.5/         caches made by `logitcache score --crop`, for halves
    OUT/variants/NAME/seed-N/    a run of `logitcache train`
    OUT/variants/NAME/seed-N-*   its evaluation and its answers, made by `logitcache eval`
    OUT/logs/                    the output of these commands
    OUT/results.csv report.md *.png

Each command runs in a process of its own, so that its peak memory is its own, and vLLM and training do not share one.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from logitcache.accuracy.options import Budget
from logitcache.errors import IdentityError, NotACacheError
from logitcache.identity import first_difference, weights_fingerprint
from logitcache.runtime.console import Stop, say
from logitcache.runtime.files import LOCK, is_leftover, is_occupied, publish_json, read_json
from logitcache.runtime.locks import exclusive
from logitcache.student.experiments import report
from logitcache.student.experiments.catalog import BEFORE, Variant
from logitcache.student.experiments.options import ExperimentOptions
from logitcache.student.experiments.plan import ExperimentPlan, plan_experiment
from logitcache.student.experiments.results import Row, Rows, row
from logitcache.student.experiments.runner import ExperimentRunner, finished_run, measurements
from logitcache.student.experiments.subcommands import Call, in_process_of_its_own

SETTINGS = "experiment.json"


@dataclass(frozen=True)
class ExperimentResult:
    """What one call of `run_experiment` did."""

    out: Path
    signal: str | None  # the signal that stopped it; None: finished
    commands: int  # commands it ran
    rows: Rows  # those of results.csv
    files: list[Path]  # of the report


def run_experiment(
    options: ExperimentOptions, call: Call | None = None, progress: Callable[[str], None] | None = None
) -> ExperimentResult:
    """Runs the missing parts of an experiment and writes the report. A failed run does not stop the others.

    Args:
        call: runs a command of logitcache; None: in a process of its own.
        progress: called after each command with a line that names it; None: prints it to standard error.
    Raises: as `plan_experiment`; IdentityError if `out` holds an experiment with other settings; the error of the first
        command that failed, after all others ran.
    """
    plan = plan_experiment(options)
    with exclusive(options.out / LOCK, str(options.out)), Stop() as stop:
        machines = _claim(options, plan)
        stop.patient = True
        runner = ExperimentRunner(options, plan, call or in_process_of_its_own, stop, progress or _print)
        runner.run()
        rows = list(_rows(options, plan))
        setup = _setup(options, plan, machines, runner)
        files = report.write(options.out, plan.experiment, plan.variants, rows, setup)
    if runner.failed and not runner.stopped:
        first, *others = runner.failed
        more = f", and {len(others)} more failed" if others else ""
        raise type(first)(f"{first}{more}; the report so far: {files[0]}")
    return ExperimentResult(options.out, runner.stopped, runner.commands, rows, files)


def _rows(options: ExperimentOptions, plan: ExperimentPlan) -> Iterator[Row]:
    """A row for the untrained student, then one per finished run.

    Measurements that were made with other settings, such as fewer prompts, are left out.
    """
    places = [(variant, seed) for variant in plan.variants for seed in range(options.seeds)]
    runs = [(v, seed, found) for v, seed in places if (found := finished_run(options.place(v, seed), v))]
    own = next((found["eval_before"] for variant, _, found in runs if not variant.crop), None)
    before = measurements(options, plan, None, None, own)
    if before:
        yield row(options.name, Variant(BEFORE, ""), None, {}, before)
    for variant, seed, found in runs:
        after = measurements(options, plan, variant, seed, found["eval_after"])
        yield row(options.name, variant, seed, found, after)


def _claim(options: ExperimentOptions, plan: ExperimentPlan) -> list[str]:
    """Writes experiment.json: the settings of every run, and the machines that took part.

    Returns: the machines. Raises: IdentityError if `out` holds another experiment, with the first difference;
        NotACacheError if it holds other files.
    """
    cache = plan.cache
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
                f"{options.out} holds an experiment with {name} = {was!r}, this one has {wanted!r}; use the old value, or "
                "set `out` to a new directory"
            )
        if there.get("prompts") and not options.prompts:
            raise IdentityError(
                f"{options.out} holds answers to {there['prompts']}, which the new report would lose; give the same `prompts`, "
                "or set `out` to a new directory"
            )
    elif is_occupied(options.out, is_leftover):
        raise NotACacheError(f"{options.out} holds files that are not an experiment; set `out` to a new directory")
    machines = list(dict.fromkeys([*there.get("machines", ()), _machine()]))
    now = {"settings": settings, "machines": machines, "prompts": options.prompts}
    if now != there:
        publish_json(place, now)
    return machines


def _setup(
    options: ExperimentOptions, plan: ExperimentPlan, machines: list[str], runner: ExperimentRunner
) -> report.Setup:
    identity = plan.cache.identity
    return report.Setup(
        teacher=f"{identity.teacher} @ {identity.teacher_revision[:12]}, top-{identity.top_k}",
        student=options.student,
        traces=len(plan.cache),
        prompt_rows=identity.prompt_logits,
        shared=options.shared,
        seeds=options.seeds,
        held_out=options.held_out,
        where=plan.where,
        evaluated_where=(plan.evaluation or {}).get("where"),
        verifier=options.verifier,
        budgets=list(map(str, dict.fromkeys(map(Budget.parse, options.budgets)))) if options.prompts else [],
        machines=machines,
        versions=_versions(options, plan.variants),
        stopped=runner.stopped,
        failed=list(map(str, runner.failed)),
    )


def _machine() -> str:
    """Processor and GPU, without the machine's name."""
    import torch

    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = f"{names[0]}, {len(names)} cores" if names else model
    return f"{torch.cuda.get_device_name()}; {model}" if torch.cuda.is_available() else model


def _versions(options: ExperimentOptions, variants: list[Variant]) -> list[str]:
    """Versions of the packages that trained the runs, from their run.json."""
    runs = (finished_run(options.place(v, seed), v) for v in variants for seed in range(options.seeds))
    texts = (", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in runs if run)
    return list(dict.fromkeys(texts))


def _print(name: str) -> None:
    say(f"done: {name}", sys.stderr)
