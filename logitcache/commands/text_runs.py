"""What training, evaluating and comparing found, as text for a person."""

from pathlib import Path
from typing import Any

from logitcache.accuracy.budgets import AccuracyResult
from logitcache.commands.text import columns, shown
from logitcache.student.evaluation.compare import Comparison

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


def describe_comparison(comparison: Comparison) -> str:
    """The text of ``logitcache compare``: a column per run."""
    runs = comparison.runs
    rows = {
        "status": [run.status for run in runs],
        "steps": [shown(run.steps, ",") for run in runs],
        "input tokens": [shown(run.tokens_fed, ",") for run in runs],
        "supervised tokens": [shown(run.tokens_taught, ",") for run in runs],
        "seconds": [shown(run.seconds, ",.1f") for run in runs],
        "tokens/s": [shown(run.tokens_per_second, ",.0f") for run in runs],
    }
    costs = [run.cost or {} for run in runs]
    if any(costs):
        rows["FLOPs"] = [shown(cost.get("flops"), ".3e") for cost in costs]
        rows["peak memory, bytes"] = [shown(cost.get("peak_memory"), ",") for cost in costs]
        spent = [cost.get("seconds") or {} for cost in costs]
        for part in dict.fromkeys(name for each in spent for name in each):
            rows[f"  {part}, s"] = [shown(each.get(part), ",.1f") for each in spent]
    for when, evaluations in (
        ("before", [run.eval_before for run in runs]),
        ("last", [run.eval_after for run in runs]),
    ):
        for name, (label, form) in _MEASURES.items():
            measured = [(each or {}).get(name) for each in evaluations]
            if any(value is not None for value in measured):
                rows[f"{label} {when}"] = [shown(value, form) for value in measured]
    sections = [(run.eval_after or {}).get("sections", {}) for run in runs]
    for name in dict.fromkeys(name for each in sections for name in each):
        rows[f"  KL of {name}"] = [shown(each.get(name, {}).get("kl"), ",.4f") for each in sections]
    rows["  at step"] = [shown(run.eval_step, ",") for run in runs]
    names = [run.name for run in runs]
    lines = columns([["", *names], *([name, *values] for name, values in rows.items())])
    if comparison.differs:
        settings = [[name, *(_short(value) for value in values)] for name, values in comparison.differs.items()]
        lines += ["", *columns([["differing settings", *names], *settings])]
    elif len(runs) > 1:
        lines += ["", "all settings are the same"]
    if unlike := comparison.held_out_differs:
        lines.append(
            f"evaluated on different traces ({', '.join(unlike)}): use `logitcache eval` to evaluate all on the same traces"
        )
    if unlike := comparison.loss_differs:
        lines.append(f"trained with different objectives ({', '.join(unlike)}): compare held-out KL, not training loss")
    return "\n".join([*lines, *(f"curves: {path}" for path in comparison.files)])


def describe_accuracy(result: AccuracyResult) -> str:
    """The text of ``logitcache eval --prompts``."""
    if result.stopped:
        return (
            f"stopped by {result.stopped} with {result.before + result.made:,} answers saved: "
            "run the same command again to resume"
        )
    settings = result.settings
    first = next(iter(result.budgets.values()))
    table = [["budget", "accuracy", "95% interval", "reasoning", "answer", "all tokens", "ended"]]
    for budget, found in result.budgets.items():
        low, high = found.ci
        means = [f"{n:,.1f}" for n in (found.reasoning_tokens, found.answer_tokens, found.total_tokens)]
        table.append([budget, f"{found.accuracy:.1%}", f"{low:.1%} - {high:.1%}", *means, f"{found.ended:.1%}"])
    lines = [
        f"{result.student} @ {settings['model_revision'][:12]} on {first.prompts:,} prompts of {result.source}, "
        f"samples per prompt: {first.samples}, temperature {settings['temperature']:g}; verifier {settings['verifier']}, "
        f"{settings['engine']}, {settings['dtype']}; {result.made:,} answers generated, {result.before:,} reused, "
        f"{result.seconds:.1f} s",
        *columns(table),
        "tokens: mean per sample; ended: share of samples that ended by themselves, not at a token limit",
    ]
    reasons = {
        "could not be graded": {name: found.unscored for name, found in result.budgets.items() if found.unscored},
        "did not fit the model's context": {
            name: found.no_room for name, found in result.budgets.items() if found.no_room
        },
    }
    for reason, counts in reasons.items():
        if counts:
            listed = ", ".join(f"{count} at {budget}" for budget, count in counts.items())
            lines.append(f"counted as wrong because they {reason}: {listed}")
    return "\n".join(lines)


def _short(value: Any, longest: int = 40) -> str:
    """A setting as text; only the end of a long one, such as a path."""
    text = "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= longest else "..." + text[3 - longest :]
