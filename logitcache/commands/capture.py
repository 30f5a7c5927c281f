"""generate, plan, score."""

from logitcache.capture import generate as generating
from logitcache.capture import plan as planning
from logitcache.capture import score as scoring
from logitcache.capture.generate import GenerateOptions
from logitcache.capture.plan import PlanOptions
from logitcache.capture.score import ScoreOptions
from logitcache.capture.summary import Summary
from logitcache.commands.builder import command
from logitcache.commands.results import Json, show, show_json, signal_code
from logitcache.commands.text_capture import describe_estimate, describe_summary


@command(GenerateOptions)
def generate(options: GenerateOptions) -> int:
    """Run the teacher on PROMPTS with vLLM; store its traces and their top-k log-probabilities in a cache.

    Run the same command again to make only the missing traces: after a crash, with more prompts, or with more samples.

    Example: logitcache generate math.jsonl --teacher Qwen/Qwen3-8B --out math-cache --max-tokens 16384
    """
    return _finished(generating.generate(options), options.out)


@command(PlanOptions)
def plan(options: PlanOptions, json: Json = False) -> None:
    """Have the teacher answer a few of PROMPTS, and estimate bytes, disk, tokens/s and hours of the whole job.

    Takes the options of generate. With --out the traces are kept, and generate resumes that cache.

    Example: logitcache plan math.jsonl --teacher Qwen/Qwen3-8B --max-tokens 16384 --samples 4 --workers 8
    """
    job = planning.plan(options)
    if json:
        show_json(job)
    else:
        show(describe_estimate, job)


@command(ScoreOptions)
def score(options: ScoreOptions) -> int:
    """Have the teacher read TRACES, or those of another cache, and store its log-probabilities of every token.

    Use it for existing text, for a second teacher, and for crops, whose rows differ from those of the whole trace.
    Run the same command again to resume.

    Example: logitcache score --from-cache math-cache --crop right:0.5 --teacher Qwen/Qwen3-8B --out math-right
    """
    return _finished(scoring.score(options), options.out)


def _finished(summary: Summary, out: object) -> int:
    """Prints the summary. Returns: the exit code, which is 1 if traces were lost, or that of the signal that stopped the call."""
    show(describe_summary, summary, out)
    return signal_code(summary.stopped) or int(bool(summary.failed or summary.deadly))
