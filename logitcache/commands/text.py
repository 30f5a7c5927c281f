"""The text of results, and the tables in it."""

from pathlib import Path
from typing import Any

# What an evaluation measures, as tables call it, and how they write it.
_MEASURES = {"kl": ("KL", ",.4f"), "top1": ("top-1", ".2%"), "ce": ("CE", ",.4f"), "ece": ("ECE", ".2%")}


def describe_run(run: dict[str, Any], out: Path) -> str:
    """The closing lines of ``logitcache train``, from what its ``run.json`` holds."""
    if run["status"] == "stopped":
        return f"stopped by {run['signal']} at step {run['steps']}: run the same command again to go on"
    before, after = run["eval_before"], run["eval_after"]
    return (
        ("nothing to do, this run is finished\n" if run.get("again") else "")
        + f"{out}: held-out KL {before['kl']:.4f} -> {after['kl']:.4f} nats a row, "
        f"top-1 agreement {before['top1']:.1%} -> {after['top1']:.1%}; {run['steps']} steps, "
        f"{run['tokens_fed']:,} tokens in {run['seconds']:.1f} s, {run['tokens_per_second']:,.0f} tokens/s\n"
        + _spent(run["cost"])
    )


def _spent(cost: dict[str, Any]) -> str:
    together = max(sum(cost["seconds"].values()), 1e-9)
    parts = ", ".join(f"{name} {seconds / together:.1%}" for name, seconds in cost["seconds"].items())
    peak = cost["peak_memory"]
    return f"{cost['flops']:.3g} FLOPs; " + (f"peak memory {peak / 2**30:.2f} GiB; " if peak else "") + f"time: {parts}"


def describe_evaluation(found: dict[str, Any]) -> str:
    """The text of ``logitcache eval``, from what ``evaluate_run`` returns."""
    which = "all" if found["held_out"] is None else f"held out: {found['held_out']:.3g} of the prompts"
    which += f", where {found['where']}" if found["where"] else ""
    step = "" if found["step"] is None else f" at step {found['step']:,}"
    head = (
        f"{found['student']}{step} on {found['traces']:,} traces of {found['cache']} ({which}); view {found['view']} on "
        f"{', '.join(found['taught'])}; {found['dtype']}, {found['seconds']:.1f} s"
    )
    parts = {"all": found} | found["sections"]
    parts |= {f"{10 * i}-{10 * i + 10}%": part for i, part in enumerate(found["positions"])}
    table = [["", "rows", *(name for name, _ in _MEASURES.values()), "tail of teacher", "of student"]]
    for name, part in parts.items():
        if part["rows"] or part["ce"] is not None:
            measured = [shown(part[key], form) for key, (_, form) in _MEASURES.items()]
            tails = [shown(part["tail"][side], ".2%") for side in ("teacher", "student")]
            table.append([name, f"{part['rows']:,}", *measured, *tails])
    legend = "KL, CE in nats; tail: mean mass outside the teacher's support; 0-10%: tenths of the completion"
    return "\n".join([head, *columns(table), legend])


def describe_comparison(found: dict[str, Any]) -> str:
    """The text of ``logitcache compare``, from what ``compare`` returns: a column a run."""
    runs = found["runs"]
    rows = {
        "status": [run["status"] for run in runs],
        "steps": [shown(run["steps"], ",") for run in runs],
        "tokens fed": [shown(run["tokens_fed"], ",") for run in runs],
        "tokens taught": [shown(run["tokens_taught"], ",") for run in runs],
        "seconds": [shown(run["seconds"], ",.1f") for run in runs],
        "tokens/s": [shown(run["tokens_per_second"], ",.0f") for run in runs],
    }
    costs = [run["cost"] or {} for run in runs]
    if any(costs):
        rows["FLOPs"] = [shown(cost.get("flops"), ".3e") for cost in costs]
        rows["peak memory, bytes"] = [shown(cost.get("peak_memory"), ",") for cost in costs]
        spent = [cost.get("seconds") or {} for cost in costs]
        for part in dict.fromkeys(name for each in spent for name in each):
            rows[f"  {part}, s"] = [shown(each.get(part), ",.1f") for each in spent]
    for when, key in (("before", "eval_before"), ("last", "eval_after")):
        measured = [run[key] or {} for run in runs]
        for name, (label, form) in _MEASURES.items():
            if any(each.get(name) is not None for each in measured):
                rows[f"{label} {when}"] = [shown(each.get(name), form) for each in measured]
    sections = [(run["eval_after"] or {}).get("sections", {}) for run in runs]
    for name in dict.fromkeys(name for each in sections for name in each):
        rows[f"  KL of {name}"] = [shown(each.get(name, {}).get("kl"), ",.4f") for each in sections]
    rows["  at step"] = [shown(run["eval_step"], ",") for run in runs]
    lines = columns([["", *(run["name"] for run in runs)], *([name, *values] for name, values in rows.items())])
    if differs := found["differs"]:
        settings = [[name, *(_short(value) for value in values)] for name, values in differs.items()]
        lines += ["", *columns([["differing settings", *(run["name"] for run in runs)], *settings])]
    elif len(runs) > 1:
        lines += ["", "the runs' settings are the same"]
    if unlike := found["held_out_differs"]:
        lines.append(f"evaluated on different traces: {', '.join(unlike)}; `logitcache eval` measures all on the same")
    if unlike := found["loss_differs"]:
        lines.append(f"training losses are of different objectives: {', '.join(unlike)}; compare held-out KL instead")
    return "\n".join([*lines, *(f"curves: {path}" for path in found["files"])])


def describe_budgets(found: dict[str, Any]) -> str:
    """The text of ``logitcache eval --budgets``, from what ``measure`` returns."""
    if found["stopped"]:
        return (
            f"stopped by {found['stopped']}, {found['before'] + found['made']:,} answers there: "
            "run the same command again to go on"
        )
    settings, measured = found["settings"], found["budgets"]
    one = next(iter(measured.values()))
    table = [["budget", "accuracy", "95% interval", "reasoning", "answer", "all tokens", "ended"]]
    for budget, part in measured.items():
        lo, hi = part["ci"]
        means = [f"{part[f'{name}_tokens']:,.1f}" for name in ("reasoning", "answer", "total")]
        table.append([budget, f"{part['accuracy']:.1%}", f"{lo:.1%} - {hi:.1%}", *means, f"{part['ended']:.1%}"])
    lines = [
        f"{found['student']} @ {settings['model_revision'][:12]} on {one['prompts']:,} prompts of {found['source']}, "
        f"{one['samples']} samples each at temperature {settings['temperature']:g}; verifier {settings['verifier']}, "
        f"{settings['engine']}, {settings['dtype']}; {found['made']:,} answers made, {found['before']:,} there before, "
        f"{found['seconds']:.1f} s",
        *columns(table),
        "tokens are means of a sample; ended: share that ended by themselves, not by a limit",
    ]
    for key, what in (("unscored", "could not be scored"), ("no_room", "had no room in the model's context")):
        if counts := {budget: part[key] for budget, part in measured.items() if part[key]}:
            lines.append(f"counted as wrong, since they {what}: " + ", ".join(f"{n} at {b}" for b, n in counts.items()))
    return "\n".join(lines)


def columns(table: list[list[str]]) -> list[str]:
    """Lines of a table, its first column on the left and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _short(value: Any, longest: int = 40) -> str:
    """A setting as a person reads it; of a path that is too long, its end."""
    text = "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= longest else "..." + text[3 - longest :]
