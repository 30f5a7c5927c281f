"""eval, compare."""

from typing import Any

from logitcache.accuracy.options import AccuracyOptions
from logitcache.commands.builder import Values, command
from logitcache.commands.results import Json, show, show_json, signal_code
from logitcache.errors import InputError
from logitcache.student.evaluation import compare as comparing
from logitcache.student.evaluation.compare import Comparison
from logitcache.student.evaluation.options import EvaluationOptions


def _kind(values: Values) -> tuple[Any, str]:
    """Chooses one of the two evaluations."""
    if ("cache" in values.given) == ("prompts" in values.given):
        raise InputError(
            "give either `cache`, to compare the student with its teacher, or `prompts`, to measure accuracy"
        )
    if "cache" in values.given:
        return EvaluationOptions, "has an effect only with `prompts`, not with `cache`"
    return AccuracyOptions, "has an effect only with `cache`, not with `prompts`"


@command(EvaluationOptions, AccuracyOptions, choose=_kind)
def eval_(options: EvaluationOptions | AccuracyOptions, json: Json = False) -> int:
    """Evaluate a student. With CACHE: against cached teacher distributions. With --prompts: its accuracy.

    With CACHE: KL, top-1 agreement, calibration and tail, by section and by place in the completion.

    With --prompts: the student answers problems with vLLM, with full reasoning and with reasoning cut at budgets. Run the
    same command again to resume, or with more prompts, samples or budgets.

    Example: logitcache eval math-cache --student math-student

    Example: logitcache eval --student math-student --prompts test.jsonl --verifier math --out math-answers
    """
    return _accuracy(options, json) if isinstance(options, AccuracyOptions) else _against_teacher(options, json)


def _against_teacher(options: EvaluationOptions, json: bool) -> int:
    from logitcache.commands.text_runs import describe_evaluation
    from logitcache.student.evaluation.evaluate_run import evaluate_run
    from logitcache.student.training.distributed import end_process_group

    found = evaluate_run(options)
    end_process_group()
    if json:
        show_json(found.to_json())
    else:
        show(describe_evaluation, found)
    return 0


def _accuracy(options: AccuracyOptions, json: bool) -> int:
    from logitcache.accuracy.budgets import measure
    from logitcache.commands.text_runs import describe_accuracy

    result = measure(options)
    if json:
        show_json(result.to_json())
    else:
        show(describe_accuracy, result)
    return signal_code(result.stopped)


@command(comparing.compare)
def compare(comparison: Comparison, json: Json = False) -> None:
    """Compare training runs: the settings that differ, results, and costs. With --out also their curves.

    Example: logitcache compare full lsp-50 answer-only --out figures
    """
    from logitcache.commands.text_runs import describe_comparison

    if json:
        show_json(comparison.to_json())
    else:
        show(describe_comparison, comparison)
