"""experiment."""

from dataclasses import replace
from typing import Annotated

from logitcache.accuracy.options import AccuracyOptions
from logitcache.commands.builder import Values, command
from logitcache.commands.results import show, signal_code
from logitcache.runtime.options import Option
from logitcache.student.experiments.options import OF_ANSWERS, OF_TRAINING, ExperimentOptions
from logitcache.student.training.options import TrainOptions


@command(ExperimentOptions, also={TrainOptions: OF_TRAINING, AccuracyOptions: OF_ANSWERS})
def experiment(
    options: ExperimentOptions,
    values: Values,
    dry_run: Annotated[bool, Option("List the variants and what they will cost, and run nothing.")] = False,
) -> int:
    """Train the variants of an experiment from one cache, with several seeds; evaluate and compare them.

    OUT then holds results.csv, report.md and plots. The teacher is loaded only for the crops of halves. Run the same command
    again to resume, or with more seeds, points, prompts or budgets.

    Example: logitcache experiment lsp --cache math-cache --student Qwen/Qwen3-0.6B --out lsp --epochs 2 --dry-run
    """
    if options.prompts is None:
        unused = {"verifier", "budgets", "by", *OF_ANSWERS} - ({"engine_args"} if options.teacher else set())
        values.refuse(unused, "has an effect only on answers; give `prompts` too")
    given = values.given
    options = replace(
        options,
        shared={name: given[name] for name in OF_TRAINING if name in given},
        answers={name: given[name] for name in OF_ANSWERS if name in given},
    )
    if dry_run:
        from logitcache.commands.text_experiments import describe_estimates
        from logitcache.student.experiments.estimate import estimate

        show(describe_estimates, options, estimate(options))
        return 0
    from logitcache.commands.text_experiments import describe_experiment
    from logitcache.student.experiments.experiment import run_experiment

    result = run_experiment(options)
    show(describe_experiment, result)
    return signal_code(result.signal)
