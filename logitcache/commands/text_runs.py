"""Text of training runs, evaluations and comparisons."""

from pathlib import Path
from typing import Any

from logitcache.accuracy.budgets import AccuracyResult
from logitcache.commands.text import columns, shown
from logitcache.commands.text_prompts import describe_source
from logitcache.grading import verdicts
from logitcache.student.evaluation.compare import Comparison
from logitcache.student.evaluation.evaluate_run import StudentEvaluation
from logitcache.student.model.measures import Measures
from logitcache.student.training.run_record import RunRecord, Spent

# What an evaluation measures, as tables call it, and how they write it.
_MEASURES = {"kl": ("KL", ",.4f"), "top1": ("top-1", ".2%"), "ce": ("CE", ",.4f"), "ece": ("ECE", ".2%")}


def describe_run(run: RunRecord, out: Path) -> str:
    """The closing lines of ``logitcache train``."""
    if run.status == "stopped":
        return f"stopped by {run.signal} at step {run.steps}: run the same command to resume"
    before, after, spent = run.eval_before, run.eval_after, run.spent
    assert before is not None
    assert after is not None
    assert spent is not None
    tokens, seconds = spent.counts.input_tokens, spent.total_seconds
    lines = ["nothing to do, this run is finished"] if run.again else []
    lines.append(
        f"{out}: held-out KL {shown(before.kl, '.4f')} -> {shown(after.kl, '.4f')} nats per row, "
        f"top-1 agreement {shown(before.top1, '.1%')} -> {shown(after.top1, '.1%')}; {run.steps} steps, "
        f"{tokens:,} input tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
    )
    return "\n".join([*lines, _spent(spent)])


def _spent(spent: Spent) -> str:
    together = max(sum(spent.seconds.values()), 1e-9)
    parts = ", ".join(f"{name} {seconds / together:.1%}" for name, seconds in spent.seconds.items())
    peak = f"peak memory {spent.peak_memory / 2**30:.2f} GiB; " if spent.peak_memory else ""
    return f"{spent.counts.flops:.3g} FLOPs; {peak}time: {parts}"


def describe_evaluation(evaluation: StudentEvaluation) -> str:
    """The text of ``logitcache eval CACHE``."""
    e = evaluation
    which = "all" if e.held_out is None else f"held out: {e.held_out:.3g} of the prompts"
    which += f", where {e.where}" if e.where else ""
    step = "" if e.step is None else f" at step {e.step:,}"
    head = (
        f"{e.student}{step} on {e.traces:,} traces of {e.cache} ({which}); view {e.view} on "
        f"{', '.join(e.sections)}; {e.dtype}, {e.seconds:.1f} s"
    )
    parts: dict[str, Measures] = {"all": e.found, **e.found.sections}
    parts |= {f"{10 * i}-{10 * i + 10}%": part for i, part in enumerate(e.found.positions)}
    table = [["", "rows", *(name for name, _ in _MEASURES.values()), "tail of teacher", "of student"]]
    for name, part in parts.items():
        if part.rows or part.ce is not None:
            measured = [shown(getattr(part, key), form) for key, (_, form) in _MEASURES.items()]
            tails = [shown(mass, ".2%") for mass in (part.tail.teacher, part.tail.student)]
            table.append([name, f"{part.rows:,}", *measured, *tails])
    legend = "KL, CE in nats; tail: mean mass outside the teacher's ids; 0-10%: tenths of the completion"
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
    if result.no_verdict:
        lines.append(f"of the answers of this call: {verdicts.listed(result.no_verdict)}")
    return "\n".join([*lines, *describe_source(result.counts)])


def _short(value: Any, longest: int = 40) -> str:
    """A setting as text; only the end of a long one, such as a path."""
    text = "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= longest else "..." + text[3 - longest :]
