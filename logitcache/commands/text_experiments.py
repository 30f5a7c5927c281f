"""What an experiment will cost and what it found, as text for a person."""

from typing import Any

from logitcache.commands.text import columns, shown
from logitcache.student.experiments import plots
from logitcache.student.experiments.catalog import experiment
from logitcache.student.experiments.options import ExperimentOptions
from logitcache.student.experiments.report import Rows, spread


def describe_plan(options: ExperimentOptions, table: list[dict[str, Any]]) -> str:
    """The text of ``logitcache experiment --dry-run``."""
    lines = [f"{options.name}: {experiment(options.name).title}; {len(table)} variants, {options.seeds} seeds each"]
    cells = [["variant", "done", "tokens fed", "taught", "FLOPs", "seconds"]]
    for row in table:
        counts = f"{row['done']}/{row['runs']}", f"{row['tokens_fed']:,}", f"{row['tokens_taught']:,}"
        cells.append([row["variant"], *counts, shown(row["flops"], ".2e"), shown(row["seconds"], ",.1f")])
    lines += columns(cells)
    left = [row["runs"] - row["done"] for row in table]
    tokens = sum(n * row["tokens_fed"] for n, row in zip(left, table, strict=True))
    closing = f"of one run each; {sum(left)} of {sum(row['runs'] for row in table)} are left: {tokens:,} tokens"
    if all(row["flops"] is not None for row in table):
        closing += f", {sum(n * row['flops'] for n, row in zip(left, table, strict=True)):.2e} FLOPs"
    if all(row["seconds"] is not None for row in table):
        closing += f", {sum(n * row['seconds'] for n, row in zip(left, table, strict=True)):,.0f} s of training"
    if scored := sum(row["scored"] for row in table):
        closing += f"; the teacher reads {scored:,} tokens of crops"
    if options.prompts:
        closing += f"; answers to {options.prompts} by {sum(row['runs'] for row in table) + 1} models come on top"
    return "\n".join([*lines, closing])


def describe_experiment(found: dict[str, Any]) -> str:
    """The closing lines of ``logitcache experiment``, from what `run` returns."""
    lines = summary(found["rows"])
    if found["status"] == "stopped":
        lines.append(f"stopped by {found['signal']}: run the same command again to go on")
    elif not found["made"]:
        lines.append("nothing to do, this experiment is finished")
    return "\n".join([*lines, f"written: {', '.join(found['files'])}"])


def summary(rows: Rows) -> list[str]:
    """Lines for a terminal: held-out KL, top-1, natural accuracy where it was measured, and seconds."""
    names = {
        "kl": ("KL", "z.4f"),
        "top1": ("top-1", ".1%"),
        "accuracy none": ("accuracy", ".1%"),
        "seconds": ("s", ",.1f"),
    }
    chosen = {name: form for name, form in names.items() if any(each.get(name) is not None for each in rows)}
    table = [["variant", *(label for label, _ in chosen.values())]]
    for variant in plots.variants_of(rows):
        table.append(
            [variant, *(spread(plots.values(rows, variant, name), form) for name, (_, form) in chosen.items())]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
