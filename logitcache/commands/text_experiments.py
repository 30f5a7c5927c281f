"""Text of experiments: estimated costs and results."""

from logitcache.commands.text import columns, shown
from logitcache.student.experiments.catalog import get_experiment
from logitcache.student.experiments.estimate import VariantEstimate
from logitcache.student.experiments.experiment import ExperimentResult
from logitcache.student.experiments.options import ExperimentOptions
from logitcache.student.experiments.results import Rows, spread, values, variants_of

# Columns of the closing table: of results.csv, with their label and format.
_SUMMARY = {
    "kl": ("KL", "z.4f"),
    "top1": ("top-1", ".1%"),
    "accuracy none": ("accuracy", ".1%"),
    "seconds": ("seconds", ",.1f"),
}


def describe_estimates(options: ExperimentOptions, estimates: list[VariantEstimate]) -> str:
    """The text of ``logitcache experiment --dry-run``."""
    title = get_experiment(options.name).title
    table = [["variant", "done", "input tokens", "supervised", "FLOPs", "seconds"]]
    for each in estimates:
        counts = f"{each.done}/{each.runs}", f"{each.input_tokens:,}", f"{each.supervised_tokens:,}"
        table.append([each.variant, *counts, shown(each.flops, ".2e"), shown(each.seconds, ",.1f")])
    left = [each.runs - each.done for each in estimates]
    total = sum(each.runs for each in estimates)
    tokens = sum(n * each.input_tokens for n, each in zip(left, estimates, strict=True))
    flops = [n * each.flops for n, each in zip(left, estimates, strict=True) if each.flops is not None]
    seconds = [n * each.seconds for n, each in zip(left, estimates, strict=True) if each.seconds is not None]
    costs = [f"{tokens:,} input tokens"]
    if len(flops) == len(estimates):
        costs.append(f"{sum(flops):.2e} FLOPs")
    if len(seconds) == len(estimates):
        costs.append(f"{sum(seconds):,.0f} s of training")
    if scored := sum(each.teacher_tokens for each in estimates):
        costs.append(f"{scored:,} tokens of crops to be scored by the teacher")
    if options.prompts:
        costs.append(f"answers of {total + 1} models to {options.prompts}")
    return "\n".join(
        [
            f"{options.name}: {title}; {len(estimates)} variants, {options.seeds} seeds each",
            *columns(table),
            f"costs are per run; {sum(left)} of {total} runs are left: {', '.join(costs)}",
        ]
    )


def describe_experiment(result: ExperimentResult) -> str:
    """The closing lines of ``logitcache experiment``."""
    lines = _summary(result.rows)
    if result.signal:
        lines.append(f"stopped by {result.signal}: run the same command again to resume")
    elif not result.commands:
        lines.append("nothing to do: this experiment is finished")
    return "\n".join([*lines, f"written: {', '.join(map(str, result.files))}"])


def _summary(rows: Rows) -> list[str]:
    chosen = {name: form for name, form in _SUMMARY.items() if any(each.get(name) is not None for each in rows)}
    table = [["variant", *(label for label, _ in chosen.values())]]
    for variant in variants_of(rows):
        table.append([variant, *(spread(values(rows, variant, name), form) for name, (_, form) in chosen.items())])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
