"""What an experiment found: results.csv, a row a variant and seed, and report.md with its tables and plots.

A report says what was measured, on what, and how it spreads; what follows from it is the reader's to say.
"""

import csv
import io
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from logitcache.runtime.files import publish
from logitcache.student.experiments import plots
from logitcache.student.experiments.catalog import ALL, BEFORE, Experiment, Variant

CSV_FILE, REPORT_FILE = "results.csv", "report.md"
TENTHS = tuple(f"kl {10 * i}-{10 * i + 10}%" for i in range(10))  # of the completion, as `evaluate` has them
Rows = list[dict[str, Any]]


def row(
    name: str,
    variant: Variant,
    seed: int | None,
    run: dict[str, Any] | None,
    evaluation: dict[str, Any],
    accuracy: dict[str, Any],
    groups: dict[str, Any],
) -> dict[str, Any]:
    """One row of results.csv.

    Args:
        run: run.json; None for the student as it was given.
        evaluation: as `evaluate` has it. accuracy: by budget, as `budgets.measure` has it. groups: the same by group.
    """
    sections = evaluation.get("sections", {})
    found: dict[str, Any] = {
        "experiment": name,
        "variant": variant.name,
        "seed": seed,
        "view": variant.view if run else None,
        "sections": "+".join(run["sections"]) if run else None,
        "kept": variant.kept,
        "kl": evaluation.get("kl"),
        **{f"kl {section}": sections.get(section, {}).get("kl") for section in ALL},
        "top1": evaluation.get("top1"),
        **{f"top1 {section}": sections.get(section, {}).get("top1") for section in ALL},
        "ce": evaluation.get("ce"),
        "ece": evaluation.get("ece"),
        "rows": evaluation.get("rows"),
        **{name: part.get("kl") for name, part in zip(TENTHS, evaluation.get("positions", ()), strict=False)},
    }
    found |= {name: part[name] for part in list(accuracy.values())[:1] for name in ("prompts", "samples")}
    for budget, part in accuracy.items():
        found |= _accuracy(budget, part)
        found |= {f"answer tokens {budget}": part["answer_tokens"], f"total tokens {budget}": part["total_tokens"]}
        found |= {f"ended {budget}": part["ended"]}
    for group, budgets in groups.items():
        for budget, part in budgets.items():
            found |= _accuracy(f"{budget} [{group}]", part)
    cost = run["cost"] if run else {}
    found |= {name: run[name] if run else None for name in ("steps", "tokens_fed", "tokens_taught", "seconds")}
    found |= {name: cost.get(name) for name in ("flops", "peak_memory")}
    return found | {f"seconds {part}": spent for part, spent in cost.get("seconds", {}).items()}


def _accuracy(label: str, part: dict[str, Any]) -> dict[str, Any]:
    low, high = part["ci"]
    return {
        f"accuracy {label}": part["accuracy"],
        f"ci low {label}": low,
        f"ci high {label}": high,
        f"reasoning tokens {label}": part["reasoning_tokens"],
    }


def write(
    out: Path, experiment: Experiment, variants: list[Variant], rows: Rows, about: dict[str, Any], versions: list[str]
) -> list[str]:
    """Publishes results.csv, the plots that its rows allow, and report.md. Returns: their paths."""
    reference = next((name for name in experiment.reference if any(r["variant"] == name for r in rows)), None)
    drawn = plots.draw(experiment.title, rows, reference)
    for stale in plots.FILES:
        if stale not in drawn:
            (out / stale).unlink(missing_ok=True)
    for name, (image, _) in drawn.items():
        publish(out / name, image)
    publish(out / CSV_FILE, to_csv(rows).encode())
    captions = {name: caption for name, (_, caption) in drawn.items()}
    publish(out / REPORT_FILE, report(experiment, variants, rows, about, versions, captions, reference).encode())
    return [str(out / name) for name in (REPORT_FILE, CSV_FILE, *drawn)]


def to_csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def from_csv(text: str) -> Rows:
    """Numbers as numbers, nothing as None."""

    def value(cell: str) -> Any:
        try:
            return float(cell) if cell else None
        except ValueError:
            return cell

    return [{name: value(cell) for name, cell in each.items()} for each in csv.DictReader(io.StringIO(text))]


def columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for each in rows for name in each))


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation (n - 1) over seeds, where they differ."""
    if not values:
        return "-"
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(set(values)) > 1 else "")


def report(
    experiment: Experiment,
    variants: list[Variant],
    rows: Rows,
    about: dict[str, Any],
    versions: list[str],
    captions: dict[str, str],
    reference: str | None,
) -> str:
    shared = ", ".join(f"{k} {v}" for k, v in about["shared"].items()) or "none"
    wanted = {"kl"} | ({f"accuracy {budget}" for budget in about["budgets"]})
    whole = [each["variant"] for each in rows if all(each.get(name) is not None for name in wanted)]
    lacking = {variant.name: n for variant in variants if (n := about["seeds"] - whole.count(variant.name)) > 0}
    parts = [
        f"# {experiment.title}",
        f"Every variant trains the same student, {about['student']}, from one cache of {about['traces']:,} traces "
        f"(teacher {about['teacher']}), {about['seeds']} times with seeds from 0. Settings that all variants share: {shared}; "
        "all others are the defaults of `logitcache train`."
        + (f" They learn from traces where {about['where']}." if about["where"] else "")
        + ("" if about["prompt_rows"] else " The cache has no rows of the prompt, so none of its tokens is taught.")
        + " In the tables, numbers are means over the seeds ± their standard deviation where they differ; "
        f"`{BEFORE}` is the student untrained, as it was given.",
    ]
    if lacking or about["stopped"] or about["failed"]:
        said = [f"It was stopped by {about['stopped']}."] if about["stopped"] else []
        names = ", ".join(f"{name} ({n})" for name, n in lacking.items())
        said += [f"Runs that are missing, or not yet measured: {names}."] if lacking else []
        said += [f"Failed: {each}." for each in about["failed"]]
        parts.append(f"**Not finished.** {' '.join(said)}")
    parts += [
        "## Variants",
        markdown(["variant", "view", "sections", "what it learns from"], _variants(variants, rows)),
    ]
    parts += _fidelity(rows, about) + _answered(rows, about) + _cost(rows, reference)
    parts += ["## Plots"] if captions else []
    for name, caption in captions.items():
        parts.append(f"![{name}]({name})\n\n{caption}")
    parts += ["## Machine", "\n".join(f"- {line}" for line in (*about["machines"], *versions))]
    return "\n\n".join(parts) + "\n"


def _variants(variants: list[Variant], rows: Rows) -> list[list[str]]:
    taught = {each["variant"]: str(each["sections"]).replace("+", ", ") for each in rows if each["sections"]}
    return [
        [variant.name, f"`{variant.view}`", taught.get(variant.name, ", ".join(variant.sections)), variant.about]
        for variant in variants
    ]


def _fidelity(rows: Rows, about: dict[str, Any]) -> list[str]:
    evaluation = about["evaluation"] or {}
    which = f", where {evaluation['where']}" if "where" in evaluation else ""
    text = (
        f"Against the teacher, on whole traces of the {about['held_out']:.3g} of the prompts that no variant learns from{which}: "
        "bucketed forward KL in nats a row, of all rows and by section, and the share of rows whose likeliest token is "
        "the teacher's."
    )
    labels = {"kl": "KL", **{f"kl {name}": f"KL {name}" for name in ALL}, "top1": "top-1"}
    forms = {name: ".1%" if name == "top1" else "z.4f" for name in labels}
    found = ["## Held against the teacher", text, _table(rows, labels, forms)]
    if any(each.get(TENTHS[0]) is not None for each in rows):
        places = {name: name.removeprefix("kl ") for name in TENTHS}
        found += ["The same KL by place in the completion:", _table(rows, places, dict.fromkeys(places, "z.4f"))]
    return found


def _answered(rows: Rows, about: dict[str, Any]) -> list[str]:
    every = plots.budgets(rows)
    if not every:
        return []
    parts = [
        "## Held against the answers",
        f"Share of the test prompts answered rightly (verifier {about['verifier']}), by the budget of reasoning: so many "
        "tokens of the student's own reasoning, or so large a share of it, is kept before it must answer; `none` lets it "
        "go on as it likes. results.csv has each run's 95% interval.",
        _table(rows, {f"accuracy {b}": b for b in every}, {f"accuracy {b}": ".1%" for b in every}),
    ]
    for group in plots.groups(rows):
        labels = {f"accuracy {b} [{group}]": b for b in every}
        parts += [f"Of these, the prompts of {group}:", _table(rows, labels, dict.fromkeys(labels, ".1%"))]
    natural = "none" if "none" in every else every[-1]
    labels = {f"reasoning tokens {b}": f"reasoning, {b}" for b in every}
    labels |= {f"total tokens {natural}": f"all, {natural}", f"ended {natural}": f"ended, {natural}"}
    forms = {name: ".1%" if name.startswith("ended") else ",.1f" for name in labels}
    found = [
        *parts,
        "## Length",
        "Tokens of an answer to a test prompt, its reasoning and all that follows the prompt, as means; ended is the "
        "share of samples that ended by themselves and not by the limit of tokens. A sample that never closes its "
        "reasoning counts as reasoning up to that limit. A share of the reasoning is of the variant's own: where its reasoning "
        "is short, so is half of it.",
        _table(rows, labels, forms),
    ]
    if of := {f"reasoning tokens {natural} [{group}]": group for group in plots.groups(rows)}:
        found += [f"Tokens of the reasoning by group, {natural}:", _table(rows, of, dict.fromkeys(of, ",.1f"))]
    return found


def _cost(rows: Rows, reference: str | None) -> list[str]:
    labels = {"tokens_fed": "tokens fed", "tokens_taught": "tokens taught", "flops": "FLOPs", "seconds": "seconds"}
    labels |= {"peak_memory": "peak memory, MiB"}
    forms = {"tokens_fed": ",.0f", "tokens_taught": ",.0f", "flops": ".3e", "seconds": ",.1f", "peak_memory": ",.1f"}
    trained = [each for each in rows if each["variant"] != BEFORE]
    shown = [each | {"peak_memory": each["peak_memory"] and each["peak_memory"] / 2**20} for each in trained]
    parts = [
        "## Cost of training",
        "Of one run: tokens without padding; FLOPs by formula, of what was fed, padding included; seconds of optimiser "
        "steps, without evaluations and checkpoints; the peak of memory is on CUDA what the allocator handed out at "
        "most, weights included, and on a CPU how far the process's resident set grew after the student was loaded.",
        _table(shown, labels, forms),
    ]
    if reference and (relative := plots.relative(trained, reference)):
        names = {"accuracy none": "accuracy"} | {f"accuracy none [{g}]": f"accuracy, {g}" for g in plots.groups(rows)}
        names |= {name: labels[name].removesuffix(", MiB") for name in labels}
        parts += [
            f"As shares of what {reference} has with the same seed; accuracies are those of natural completions:",
            _table(relative, names, dict.fromkeys(names, ".1%")),
        ]
    spent = [name for name in columns(trained) if name.startswith("seconds ")]
    parts += [
        "Where the seconds went; on a GPU, data is the time in which it stood idle for them.",
        _table(trained, {name: name.removeprefix("seconds ") for name in spent}, dict.fromkeys(spent, ",.2f")),
    ]
    return parts if trained else []


def _table(rows: Rows, labels: dict[str, str], forms: dict[str, str]) -> str:
    """A line a variant; a column for which no variant has a number is left out."""
    there = [name for name in labels if any(each.get(name) is not None for each in rows)]
    lines = [
        [variant, *(spread(plots.values(rows, variant, name), forms[name]) for name in there)]
        for variant in plots.variants_of(rows)
    ]
    return markdown(["variant", *(labels[name] for name in there)], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---" if "view" in head else "---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))
