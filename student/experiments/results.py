"""The results of an experiment: results.csv, with a row per variant and seed, and functions that read its rows."""

import csv
import io
from statistics import fmean, stdev
from typing import Any

from logitcache.accuracy.budgets import BudgetResult
from logitcache.student.experiments.catalog import ALL, Variant
from logitcache.student.experiments.runner import GroupResult, Measurements

# A row of results.csv by its columns. Some columns depend on the experiment: "accuracy 50%" and "accuracy 50% [GROUP]"
# exist for each budget and group of prompts, "seconds PART" for each part of a training step. None: not measured.
Row = dict[str, Any]
Rows = list[Row]

CSV_FILE = "results.csv"
TENTHS = tuple(f"kl {10 * i}-{10 * i + 10}%" for i in range(10))  # of the completion
NATURAL = "none"  # the budget that does not cut the reasoning
COSTS = {"seconds": "time", "peak_memory": "peak memory", "flops": "FLOPs"}


def row(experiment: str, variant: Variant, seed: int | None, run: dict[str, Any] | None, measured: Measurements) -> Row:
    """A row of results.csv.

    Args:
        run: run.json; None for the untrained student.
    """
    evaluation = measured.evaluation
    sections = evaluation.get("sections", {})
    found: Row = {
        "experiment": experiment,
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
    for part in list(measured.accuracy.values())[:1]:
        found |= {"prompts": part.prompts, "samples": part.samples}
    for budget, part in measured.accuracy.items():
        found |= _accuracy(budget, part)
        found |= {f"answer tokens {budget}": part.answer_tokens, f"total tokens {budget}": part.total_tokens}
        found |= {f"ended {budget}": part.ended}
    for group, budgets in measured.groups.items():
        for budget, part in budgets.items():
            found |= _accuracy(f"{budget} [{group}]", part)
    cost = run["cost"] if run else {}
    found |= {name: run[name] if run else None for name in ("steps", "tokens_fed", "tokens_taught", "seconds")}
    found |= {name: cost.get(name) for name in ("flops", "peak_memory")}
    return found | {f"seconds {part}": spent for part, spent in cost.get("seconds", {}).items()}


def _accuracy(label: str, part: BudgetResult | GroupResult) -> Row:
    low, high = part.ci
    return {
        f"accuracy {label}": part.accuracy,
        f"ci low {label}": low,
        f"ci high {label}": high,
        f"reasoning tokens {label}": part.reasoning_tokens,
    }


def to_csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def from_csv(text: str) -> Rows:
    """The rows of results.csv: numbers as float, empty cells as None."""

    def value(cell: str) -> Any:
        try:
            return float(cell) if cell else None
        except ValueError:
            return cell

    return [{name: value(cell) for name, cell in each.items()} for each in csv.DictReader(io.StringIO(text))]


def columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for each in rows for name in each))


def variants_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(each["variant"] for each in rows))


def values(rows: Rows, variant: str, name: str) -> list[float]:
    """The values of a column in the seeds of a variant."""
    return [each[name] for each in rows if each["variant"] == variant and each.get(name) is not None]


def budgets(rows: Rows) -> list[str]:
    names = [name for name in columns(rows) if name.startswith("accuracy ") and "[" not in name]
    return [name.removeprefix("accuracy ") for name in names]


def groups(rows: Rows) -> list[str]:
    names = [name for name in columns(rows) if name.startswith("accuracy ") and "[" in name]
    return list(dict.fromkeys(name.partition("[")[2].rstrip("]") for name in names))


def relative(rows: Rows, reference: str) -> Rows:
    """Costs and natural accuracy divided by those of the reference with the same seed.

    Seeds that the reference does not have are left out, and so are columns in which it is 0 for some seed.
    """
    base = {each["seed"]: each for each in rows if each["variant"] == reference}
    names = [name for name in columns(rows) if name.startswith(f"accuracy {NATURAL}")]
    names = [n for n in (*names, "tokens_fed", "tokens_taught", *COSTS) if all(each.get(n) for each in base.values())]
    return [
        {"variant": each["variant"], "seed": each["seed"], "kept": each["kept"]}
        | {n: each[n] / base[each["seed"]][n] for n in names if each.get(n) is not None}
        for each in rows
        if each["seed"] in base
    ]


def spread(numbers: list[float], form: str) -> str:
    """Mean ± standard deviation (n - 1), which is omitted if all numbers are the same."""
    if not numbers:
        return "-"
    return f"{fmean(numbers):{form}}" + (f" ± {stdev(numbers):{form}}" if len(set(numbers)) > 1 else "")
