"""The report of an experiment, report.md with tables and plots. It reports measurements and draws no conclusions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.runtime.files import publish
from logitcache.runtime.pictures import is_ours
from logitcache.runtime.text import code_span, markdown, markdown_table
from logitcache.student.experiments import plots
from logitcache.student.experiments.catalog import ALL, BEFORE, Experiment, Variant
from logitcache.student.experiments.results import (
    CSV_FILE,
    NATURAL,
    TENTHS,
    Rows,
    budgets,
    columns,
    groups,
    relative,
    spread,
    to_csv,
    values,
    variants_of,
)

REPORT_FILE = "report.md"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Facts about an experiment for the report, besides its results."""

    teacher: str
    student: str
    traces: int  # in the cache
    prompt_rows: bool  # whether prompt tokens have rows
    shared: Mapping[str, Any]  # fields of TrainOptions that all variants share
    seeds: int
    held_out: float
    where: str | None  # condition on the training traces
    evaluated_where: str | None  # condition on the held-out traces
    verifier: str
    budgets: list[str]  # empty: no accuracy was asked for
    machines: list[str]
    versions: list[str]
    stopped: str | None = None  # the signal that stopped the experiment
    failed: list[str] | tuple[str, ...] = ()  # messages of runs that failed


def write(out: Path, experiment: Experiment, variants: list[Variant], rows: Rows, setup: Setup) -> list[Path]:
    """Writes results.csv, report.md and the plots that the rows allow. Returns: their paths."""
    reference = next((name for name in experiment.reference if any(r["variant"] == name for r in rows)), None)
    drawn = plots.draw(experiment.title, rows, reference)
    for stale in plots.FILES:
        if stale not in drawn and is_ours(out / stale):
            (out / stale).unlink()
    for name, (image, _) in drawn.items():
        publish(out / name, image)
    publish(out / CSV_FILE, to_csv(rows).encode())
    captions = {name: caption for name, (_, caption) in drawn.items()}
    publish(out / REPORT_FILE, report(experiment, variants, rows, setup, captions, reference).encode())
    return [out / name for name in (REPORT_FILE, CSV_FILE, *drawn)]


def report(
    experiment: Experiment,
    variants: list[Variant],
    rows: Rows,
    setup: Setup,
    captions: dict[str, str],
    reference: str | None,
) -> str:
    """The text of report.md.

    Args:
        captions: by file name of a plot.
        reference: the variant that costs are relative to.
    """
    parts = [f"# {markdown(experiment.title)}", _introduction(setup), *_unfinished(variants, rows, setup)]
    head = ["variant", "view", "sections", "what it trains on"]
    parts += ["## Variants", markdown_table(head, _variants(variants, rows))]
    parts += _fidelity(rows, setup) + _accuracy(rows, setup) + _cost(rows, reference)
    parts += ["## Plots"] if captions else []
    for name, caption in captions.items():
        parts.append(f"![{name}]({name})\n\n{markdown(caption)}")
    parts += ["## Machine", "\n".join(f"- {markdown(line)}" for line in (*setup.machines, *setup.versions))]
    return "\n\n".join(parts) + "\n"


def _introduction(setup: Setup) -> str:
    shared = ", ".join(code_span(f"{k} {v}") for k, v in setup.shared.items()) or "none"
    student, teacher = code_span(setup.student), code_span(setup.teacher)
    return (
        f"Every variant trains the same student, {student}, from one cache of {setup.traces:,} traces (teacher "
        f"{teacher}), with {setup.seeds} seeds from 0. Settings of all variants: {shared}; all others are the "
        "defaults of `logitcache train`."
        + (f" They train on traces that match {code_span(setup.where)}." if setup.where else "")
        + ("" if setup.prompt_rows else " The cache has no rows for prompt tokens, so the prompt is not supervised.")
        + " Tables show the mean over the seeds ± the standard deviation, which is omitted if all seeds agree; "
        f"`{BEFORE}` is the untrained student."
    )


def _unfinished(variants: list[Variant], rows: Rows, setup: Setup) -> list[str]:
    wanted = {"kl"} | {f"accuracy {budget}" for budget in setup.budgets}
    complete = [each["variant"] for each in rows if all(each.get(name) is not None for name in wanted)]
    missing = {v.name: n for v in variants if (n := setup.seeds - complete.count(v.name)) > 0}
    if not (missing or setup.stopped or setup.failed):
        return []
    sentences = [f"Stopped by {setup.stopped}."] if setup.stopped else []
    names = ", ".join(f"{markdown(name)} ({n})" for name, n in missing.items())
    sentences += [f"Runs that are missing or not measured yet: {names}."] if missing else []
    sentences += [f"Failed: {markdown(each)}." for each in setup.failed]
    return [f"**Not finished.** {' '.join(sentences)}"]


def _variants(variants: list[Variant], rows: Rows) -> list[list[str]]:
    supervised = {each["variant"]: str(each["sections"]).replace("+", ", ") for each in rows if each["sections"]}
    return [
        [
            markdown(v.name),
            code_span(v.view, in_table=True),
            markdown(supervised.get(v.name, ", ".join(v.sections))),
            markdown(v.description),
        ]
        for v in variants
    ]


def _fidelity(rows: Rows, setup: Setup) -> list[str]:
    which = f" that match {code_span(setup.evaluated_where)}" if setup.evaluated_where else ""
    text = (
        f"On whole traces{which} of the held-out prompts ({setup.held_out:.3g} of all), on which no variant trains. KL: "
        "bucketed forward KL from teacher to student, nats per position, of all positions and by section. top-1: share of "
        "positions where student and teacher have the same most likely token."
    )
    labels = {"kl": "KL", **{f"kl {name}": f"KL {name}" for name in ALL}, "top1": "top-1"}
    forms = {name: ".1%" if name == "top1" else "z.4f" for name in labels}
    found = ["## Agreement with the teacher", text, _table(rows, labels, forms)]
    if any(each.get(TENTHS[0]) is not None for each in rows):
        places = {name: name.removeprefix("kl ") for name in TENTHS}
        found += ["The same KL by tenths of the completion:", _table(rows, places, dict.fromkeys(places, "z.4f"))]
    return found


def _accuracy(rows: Rows, setup: Setup) -> list[str]:
    every = budgets(rows)
    if not every:
        return []
    parts = [
        "## Accuracy",
        f"Share of the test prompts answered correctly (verifier {code_span(setup.verifier)}), by reasoning budget: the "
        "student's own reasoning is cut after that many tokens, or after that share of it, and the student must answer; with "
        "`none` it is not cut. results.csv has the 95% confidence interval of each run.",
        _table(rows, {f"accuracy {b}": b for b in every}, {f"accuracy {b}": ".1%" for b in every}),
    ]
    for group in groups(rows):
        labels = {f"accuracy {b} [{group}]": b for b in every}
        parts += [f"Prompts of group {code_span(group)}:", _table(rows, labels, dict.fromkeys(labels, ".1%"))]
    natural = NATURAL if NATURAL in every else every[-1]
    labels = {f"reasoning tokens {b}": f"reasoning, {b}" for b in every}
    labels |= {f"total tokens {natural}": f"all, {natural}", f"ended {natural}": f"ended, {natural}"}
    forms = {name: ".1%" if name.startswith("ended") else ",.1f" for name in labels}
    parts += [
        "## Length",
        "Mean tokens per sample: of the reasoning, and of everything after the prompt (all). ended: share of samples that "
        "ended by themselves, not at the token limit. A sample that never closes its reasoning is all reasoning. A share of "
        "the reasoning is a share of the variant's own reasoning, so it is short if that is short.",
        _table(rows, labels, forms),
    ]
    if of := {f"reasoning tokens {natural} [{group}]": group for group in groups(rows)}:
        parts += [f"Reasoning tokens by group, budget {natural}:", _table(rows, of, dict.fromkeys(of, ",.1f"))]
    return parts


def _cost(rows: Rows, reference: str | None) -> list[str]:
    labels = {
        "tokens_fed": "input tokens",
        "tokens_taught": "supervised tokens",
        "flops": "FLOPs",
        "seconds": "seconds",
    }
    labels |= {"peak_memory": "peak memory, MiB"}
    forms = {"tokens_fed": ",.0f", "tokens_taught": ",.0f", "flops": ".3e", "seconds": ",.1f", "peak_memory": ",.1f"}
    trained = [each for each in rows if each["variant"] != BEFORE]
    if not trained:
        return []
    shown = [each | {"peak_memory": each["peak_memory"] and each["peak_memory"] / 2**20} for each in trained]
    parts = [
        "## Cost of training",
        "Per run. Tokens: without padding. FLOPs: by formula, padding included. Seconds: of optimizer steps, without "
        "evaluations and checkpoints. Peak memory: on CUDA the allocator's peak, weights included; on a CPU the growth of "
        "the process's resident set after the student was loaded.",
        _table(shown, labels, forms),
    ]
    if reference and (shares := relative(trained, reference)):
        names = {"accuracy none": "accuracy"} | {f"accuracy none [{g}]": f"accuracy, {g}" for g in groups(rows)}
        names |= {name: labels[name].removesuffix(", MiB") for name in labels}
        parts += [
            f"Relative to {reference} with the same seed; accuracy is that without a reasoning budget:",
            _table(shares, names, dict.fromkeys(names, ".1%")),
        ]
    spent = [name for name in columns(trained) if name.startswith("seconds ")]
    parts += [
        "Where the seconds went. On a GPU, data is the time that it waited for data.",
        _table(trained, {name: name.removeprefix("seconds ") for name in spent}, dict.fromkeys(spent, ",.2f")),
    ]
    return parts


def _table(rows: Rows, labels: dict[str, str], forms: dict[str, str]) -> str:
    """A line per variant; columns that no variant has are left out."""
    present = [name for name in labels if any(each.get(name) is not None for each in rows)]
    lines = [
        [markdown(v), *(spread(values(rows, v, name), forms[name]) for name in present)] for v in variants_of(rows)
    ]
    return markdown_table(["variant", *(markdown(labels[name]) for name in present)], lines, "---:")
