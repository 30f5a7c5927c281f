"""The command line: one function a verb. Heavy imports live inside the functions, so that --help is quick."""

import atexit
import json
import os
import signal
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from logitcache.errors import InputError, LogitcacheError

# What typer raises for options it does not know; it has no public name of its own.
_USAGE_ERROR: Any = typer.BadParameter.__base__

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run the teacher once, keep what it thought at every token, train as many students as you like from disk.",
)


ACache = Annotated[Path, typer.Argument(metavar="CACHE", help="A cache.")]
NewOut = Annotated[Path, typer.Option(help="A new directory; it appears whole or not at all.")]
Workers = Annotated[int | None, typer.Option(help="Processes. [default: one a core]")]

# Options of every command that runs a teacher.
Teacher = Annotated[str, typer.Option(help="Model folder or hub id.")]
Out = Annotated[Path, typer.Option(help="The cache: a new directory, or one to go on with.")]
TopK = Annotated[int, typer.Option(help="Token ids kept a row, with their log-probabilities.")]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Trim each row to the ids that hold this share of its mass; the rest joins the tail. [default: off]"
    ),
]
MinK = Annotated[int, typer.Option(help="Ids a trimmed row keeps at least.")]
PinTokens = Annotated[
    str,
    typer.Option(
        help="Ids that every row keeps whatever their rank: auto (end of sequence and section delimiters), none, or "
        "tokens and ids, comma-separated."
    ),
]
Exact = Annotated[bool, typer.Option("--exact", help="Keep log-probabilities bit for bit, in about 12% more bytes.")]
Limit = Annotated[int | None, typer.Option(help="Read only so many rows of the source.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the teacher on the hub.")]
TensorParallel = Annotated[int, typer.Option(help="GPUs a teacher is split over.")]
PromptLogits = Annotated[
    bool,
    typer.Option(
        "--prompt-logits/--no-prompt-logits",
        help="Keep rows of the prompt's tokens too: to supervise the prompt section.",
    ),
]
ReasoningMarkers = Annotated[
    str | None,
    typer.Option(
        help="OPENING,CLOSING of the reasoning, or 'none'. [default: found in the tokenizer or chat template]"
    ),
]
AnswerRegex = Annotated[
    str | None,
    typer.Option(help="Where a completion has no markers: its answer begins at this pattern's first match."),
]
Verifier = Annotated[
    str | None,
    typer.Option(help="Judge each answer against the prompt's `answer`: math, exact or gym. [default: no verdict]"),
]
UnitSize = Annotated[int, typer.Option(help="Traces that become one shard. A kill loses unfinished ones.")]
WorkerOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Be worker I (from 0) of N that fill one cache, each with its own share of the prompts. "
        "[default: the place in a Slurm job array, else 0/1]",
    ),
]
EngineArg = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Any other vLLM engine argument, such as max_model_len=32768. Repeatable."),
]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Passed to the chat template, such as enable_thinking=true. Repeatable."),
]
Samples = Annotated[int, typer.Option(help="Completions a prompt.")]
Temperature = Annotated[float, typer.Option(help="Of the sampling; what is stored is always at temperature 1.")]
MaxTokens = Annotated[int, typer.Option(help="Longest completion.")]
Seed = Annotated[int, typer.Option(help="Of the engine's sampler.")]
Sampling = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Any other vLLM sampling parameter, such as top_p=0.95. Repeatable."),
]
Prompts = Annotated[
    str,
    typer.Argument(
        metavar="PROMPTS",
        help="A .jsonl or .parquet file with `prompt` or `messages` (optional `id`, `answer`; other columns are "
        "kept), or gym:NAME?size=100&seed=1 for a reasoning-gym task.",
    ),
]


@app.command(short_help="Have the teacher answer prompts, and cache what it thought.")
def generate(
    prompts: Prompts,
    teacher: Teacher,
    out: Out,
    top_k: TopK = 64,
    top_p: TopP = None,
    min_k: MinK = 1,
    pin_tokens: PinTokens = "auto",
    exact: Exact = False,
    samples: Samples = 1,
    temperature: Temperature = 1.0,
    max_tokens: MaxTokens = 2048,
    seed: Seed = 0,
    prompt_logits: PromptLogits = False,
    limit: Limit = None,
    verifier: Verifier = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    tensor_parallel_size: TensorParallel = 1,
    reasoning_markers: ReasoningMarkers = None,
    answer_regex: AnswerRegex = None,
    unit_size: UnitSize = 64,
    worker: WorkerOption = None,
    sampling: Sampling = None,
    engine_arg: EngineArg = None,
    template_arg: TemplateArg = None,
) -> None:
    """The teacher answers PROMPTS once; its traces and top-k log-probabilities become a cache.

    Run the same command again and only what is missing is made: after a crash, with more prompts, with more samples.

    Example: logitcache generate math.jsonl --teacher Qwen/Qwen3-8B --out math-cache --max-tokens 16384
    """
    from logitcache.capture.generate import generate as run

    _report_fill(run(_generate_options(**locals())), out)


@app.command(short_help="Say what generating will take, from a handful of traces.")
def plan(
    prompts: Prompts,
    teacher: Teacher,
    try_prompts: Annotated[int, typer.Option(help="Prompts to try, drawn from all of them.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="Keep the traces in this cache: generate goes on with it. [default: dropped]")
    ] = None,
    workers: Annotated[int, typer.Option(help="That will share the job.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    top_k: TopK = 64,
    top_p: TopP = None,
    min_k: MinK = 1,
    pin_tokens: PinTokens = "auto",
    exact: Exact = False,
    samples: Samples = 1,
    temperature: Temperature = 1.0,
    max_tokens: MaxTokens = 2048,
    seed: Seed = 0,
    prompt_logits: PromptLogits = False,
    limit: Limit = None,
    verifier: Verifier = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    tensor_parallel_size: TensorParallel = 1,
    reasoning_markers: ReasoningMarkers = None,
    answer_regex: AnswerRegex = None,
    unit_size: UnitSize = 64,
    sampling: Sampling = None,
    engine_arg: EngineArg = None,
    template_arg: TemplateArg = None,
) -> None:
    """The teacher answers a few of PROMPTS; bytes, disk, tokens/s and hours of the whole job follow from them.

    Takes the options of generate. With --out the traces made here are the first of the job's.

    Example: logitcache plan math.jsonl --teacher Qwen/Qwen3-8B --max-tokens 16384 --samples 4 --workers 8
    """
    from logitcache.capture.plan import plan as run

    options: dict[str, Any] = {
        k: v for k, v in locals().items() if k not in ("try_prompts", "workers", "as_json", "run")
    }
    job = run(_generate_options(**options, worker="0/1"), try_prompts, workers, keep=out is not None)
    typer.echo(json.dumps(asdict(job), indent=1) if as_json else job.text())


@app.command(short_help="Cache what the teacher thinks of text that exists.")
def score(
    teacher: Teacher,
    out: Out,
    traces: Annotated[
        str | None,
        typer.Argument(
            metavar="TRACES",
            help="A .jsonl or .parquet file with `prompt` or `messages`, and `completion` (optional `id`, `answer`, "
            "`finish_reason`; other columns are kept).",
        ),
    ] = None,
    from_cache: Annotated[
        Path | None, typer.Option(help="Score the tokens of this cache's traces instead of a file's text.")
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE:SHARE",
            help="Show the teacher only a part of each trace: left, middle or right, such as right:0.5.",
        ),
    ] = None,
    eos: Annotated[bool, typer.Option(help="End completions of a file with the end-of-sequence token.")] = True,
    top_k: TopK = 64,
    top_p: TopP = None,
    min_k: MinK = 1,
    pin_tokens: PinTokens = "auto",
    exact: Exact = False,
    prompt_logits: PromptLogits = False,
    limit: Limit = None,
    verifier: Verifier = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    tensor_parallel_size: TensorParallel = 1,
    reasoning_markers: ReasoningMarkers = None,
    answer_regex: AnswerRegex = None,
    unit_size: UnitSize = 64,
    worker: WorkerOption = None,
    engine_arg: EngineArg = None,
    template_arg: TemplateArg = None,
) -> None:
    """The teacher reads TRACES, or those of another cache, and its top-k log-probabilities of every token become a cache.

    For text of other origin, for a second teacher's opinion, and for crops, whose rows differ from those of the whole.
    Run the same command again to go on after a stop.

    Example: logitcache score --from-cache math-cache --crop right:0.5 --teacher Qwen/Qwen3-8B --out math-right
    """
    from logitcache.capture.score import Crop, ScoreOptions
    from logitcache.capture.score import score as run
    from logitcache.inference.model import ModelSpec

    if (traces is None) == (from_cache is None):
        raise InputError("give either TRACES, a file of prompts with completions, or --from-cache CACHE")
    spec = ModelSpec(
        model=teacher, revision=revision, dtype=dtype, top_k=top_k, prompt_logits=prompt_logits,
        tensor_parallel_size=tensor_parallel_size, engine_args=_pairs("--engine-arg", engine_arg),
        template_args=_pairs("--template-arg", template_arg),
    )  # fmt: skip
    options = ScoreOptions(
        source=str(from_cache or traces), from_cache=from_cache is not None, out=out, spec=spec,
        crop=Crop.parse(crop) if crop else None, eos=eos,
        limit=limit, top_p=top_p, min_k=min_k, pin_tokens=pin_tokens, exact=exact, verifier=verifier,
        markers=_markers(reasoning_markers), answer_regex=answer_regex, unit_size=unit_size, worker=_worker(worker),
    )  # fmt: skip
    _report_fill(run(options), out)


@app.command(short_help="Distil a student from a cache.")
def train(
    caches: Annotated[
        list[str] | None,
        typer.Argument(metavar="CACHE", help="What `logitcache generate` wrote. Of several, each trace counts once."),
    ] = None,
    *,
    student: Annotated[str, typer.Option(help="Model folder or hub id, with the teacher's tokenizer.")],
    out: Annotated[Path, typer.Option(help="The run: a new directory, or one to go on with.")],
    mix: Annotated[
        list[str] | None,
        typer.Option(metavar="CACHE=SHARE", help="A cache and its share of the tokens, such as a=0.7. Repeatable."),
    ] = None,
    view: Annotated[
        str, typer.Option(help="What the student sees of each trace, and learns from it: see above.")
    ] = "full",
    sections: Annotated[
        str, typer.Option(help="Whose tokens it is taught: any of prompt,reasoning,answer.")
    ] = "prompt,reasoning,answer",
    where: Annotated[
        str | None, typer.Option(help="Learn from traces such as 'correct and tokens<=8192' only. [default: all]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Ids of a row; the rest joins the tail. [default: all]")] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the prompts kept for evaluation; none is on both sides.")
    ] = 0.05,
    divergence: Annotated[
        str | None,
        typer.Option(
            help="forward_kl, reverse_kl, jsd, skewed_forward_kl, skewed_reverse_kl or tv. [default: forward_kl]"
        ),
    ] = None,
    tail: Annotated[
        str | None,
        typer.Option(
            help="What becomes of the mass outside a row: bucket (one more outcome), support (both sides renormalised "
            "on the row's ids) or sampled (the token the teacher said carries it). [default: bucket]"
        ),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="The teacher's share of jsd's mixture. [default: 0.5]")] = None,
    alpha: Annotated[float | None, typer.Option(help="Skew of the skewed divergences. [default: 0.1]")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of both sides; other than 1 with --tail support only. [default: 1]")
    ] = None,
    ce_weight: Annotated[
        float | None, typer.Option(help="Of the cross-entropy with the teacher's tokens, added. [default: 0]")
    ] = None,
    section_weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION=WEIGHT",
            help="Of the loss there, such as answer=2; the mean is over all taught rows still. Repeatable. [default: 1]",
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train a LoRA adapter of this rank, by peft. [default: all weights]")
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Its scale. [default: twice the rank]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 (float32 weights, bfloat16 arithmetic) or fp32. [default: bf16 on CUDA]")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="As transformers names it, such as flash_attention_2. [default: the model's]")
    ] = None,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(
            help="Tokens of whole traces that a device takes at a time, whatever the view cuts. [default: 4096]"
        ),
    ] = None,
    packing: Annotated[
        bool | None,
        typer.Option(help="Feed traces behind one another instead of padded. [default: with flash attention]"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Trade time for memory: run each layer twice.")
    ] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile", help="torch.compile the student, all but its head.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="[default: 3]")] = None,
    max_steps: Annotated[int | None, typer.Option(help="So many optimiser steps, whatever --epochs says.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="[default: 1e-4]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of traces. [default: 0]")] = None,
    report_to: Annotated[
        str | None, typer.Option(help="wandb, tensorboard, trackio or another that transformers knows. [default: none]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other training argument of transformers, such as weight_decay=0.1. Repeatable.",
        ),
    ] = None,
) -> None:
    """A student learns the teacher's distributions from a cache; the teacher is never loaded.

    OUT then holds the model with its tokenizer and run.json. Run the same command again to go on after a stop. Under
    torchrun or accelerate every process takes its share of each step, with the same result.

    \b
    VIEW is one of the first eight, and any of the last three behind it (+):
    full                all tokens, every cached row
    lsp:P               the first P of all tokens
    reasoning-lsp:P     the first P of the reasoning; then the answer, by CE
    trsd:DIST           the answer's rows after the reasoning's first part
    trsd-anchored:DIST  the same, and the rows of that part
    left:P              all of a cache of `score --crop left:P`
    middle:P            all of a cache of `score --crop middle:P`
    right:P             all of a cache of `score --crop right:P`
    both-ends:P         the first and the last P/2 of the rows
    random-mask:P       P of the rows, the same in every epoch
    token-matched       as many rows of each section as its smallest has

    Examples:

    logitcache train math-cache --student Qwen/Qwen3-0.6B --out math-student --epochs 2

    logitcache train math-cache --student Qwen/Qwen3-0.6B --out half --view lsp:0.5 --sections reasoning --where correct
    """
    from logitcache.commands.text_runs import describe_run
    from logitcache.student.training.distributed import leave
    from logitcache.student.training.options import TrainOptions
    from logitcache.student.training.run import train as run

    given: dict[str, Any] = {
        name: value for name, value in locals().items() if name in TrainOptions.__dataclass_fields__
    }
    given["sections"] = _names(sections)
    options = TrainOptions(
        **given, cache=_caches(caches, mix), compile=compile_,
        section_weights=_numbers("--section-weight", section_weight) or None, set=_pairs("--set", set_),
    )  # fmt: skip
    finished = run(options)
    leave()
    _echo(describe_run(finished, out))
    if finished["status"] == "stopped":
        raise typer.Exit(_signal_code(finished["signal"]))


@app.command("eval", short_help="Hold a student against its teacher, or against the answers.")
def eval_(
    context: typer.Context,
    cache: Annotated[
        Path | None, typer.Argument(metavar="CACHE", help="A cache whose traces the student is held against.")
    ] = None,
    *,
    student: Annotated[
        str, typer.Option(help="A run, one of its checkpoints, a model folder, a LoRA adapter or a hub id.")
    ],
    held_out: Annotated[
        float | None, typer.Option(help="Share of the prompts, as in train. [default: the run's, or 0.05]")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All traces, not those held out only.")] = False,
    where: Annotated[str | None, typer.Option(help="Only traces such as 'correct'. [default: all of them]")] = None,
    view: Annotated[str, typer.Option(help="What the student sees of each trace.")] = "full",
    sections: Annotated[str, typer.Option(help="Of which tokens: any of prompt,reasoning,answer.")] = (
        "prompt,reasoning,answer"
    ),
    tokens_per_batch: Annotated[int, typer.Option(help="Tokens fed at a time.")] = 4096,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Questions with `answer`, as in generate: the student answers them through vLLM. Options from here on "
            "are for these; merge a LoRA adapter into its model first."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the answers: new, or one to go on with.")] = None,
    budgets: Annotated[
        str,
        typer.Option(
            help="How much of its reasoning the student keeps before it must answer: tokens, shares of its own, or none "
            "for no limit."
        ),
    ] = "0,25%,50%,75%,100%,none",
    samples: Annotated[int, typer.Option(help="Completions a prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of the sampling; 0 takes the likeliest token.")] = 0.0,
    sampling: Sampling = None,
    max_tokens: MaxTokens = 2048,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer after a reasoning that was cut.")] = 256,
    verifier: Annotated[str, typer.Option(help="Judge of the answers: math, exact or gym.")] = "exact",
    limit: Limit = None,
    seed: Seed = 0,
    reasoning_markers: ReasoningMarkers = None,
    answer_regex: AnswerRegex = None,
    tensor_parallel_size: TensorParallel = 1,
    engine_arg: EngineArg = None,
    template_arg: TemplateArg = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 or fp32; with --prompts as in generate. [default: bf16 on CUDA, or auto]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """With CACHE: KL, top-1 agreement, calibration and tail, by section and by place in the completion.

    With --prompts: accuracy, when the student thinks as long as it likes, and when its reasoning is cut at a budget and
    closed for it. Run the same command again to go on after a stop, or with more prompts, samples or budgets.

    Examples:

    logitcache eval math-cache --student math-student

    logitcache eval --student math-student --prompts test.jsonl --verifier math --out math-answers
    """
    if (cache is None) == (prompts is None):
        raise InputError(
            "give either CACHE, to hold the student against the teacher, or --prompts, against the answers"
        )
    of_cache = {"held_out", "everything", "where", "view", "sections", "tokens_per_batch"}
    of_both = {"cache", "student", "prompts", "dtype", "as_json"}
    if cache is not None:
        _refuse_given(context, set(context.params) - of_cache - of_both, "it is of answers to --prompts, not of CACHE")
        from logitcache.commands.text_runs import describe_evaluation
        from logitcache.student.evaluation.evaluate_run import evaluate_run
        from logitcache.student.evaluation.options import EvaluationOptions
        from logitcache.student.training.distributed import leave

        options = EvaluationOptions(
            cache=cache, student=student, held_out=held_out, everything=everything, where=where, view=view,
            sections=_names(sections), tokens_per_batch=tokens_per_batch, dtype=dtype,
        )  # fmt: skip
        found = evaluate_run(options)
        leave()
        _echo(json.dumps(found, indent=1) if as_json else describe_evaluation(found))
        return
    _refuse_given(context, of_cache, "it is of CACHE, not of answers to --prompts")
    from logitcache.accuracy.budgets import measure
    from logitcache.accuracy.options import AccuracyOptions
    from logitcache.commands.text_runs import describe_accuracy

    if prompts is None or out is None:
        raise InputError("--prompts needs --out, a directory where the answers are kept and gone on with")
    options = AccuracyOptions(
        prompts=prompts, student=student, out=out, budgets=_names(budgets), samples=samples, temperature=temperature,
        max_tokens=max_tokens, answer_tokens=answer_tokens, verifier=verifier, limit=limit, seed=seed,
        reasoning_markers=_markers(reasoning_markers), answer_regex=answer_regex, dtype=dtype or "auto",
        tensor_parallel_size=tensor_parallel_size, sampling=_pairs("--sampling", sampling),
        engine_args=_pairs("--engine-arg", engine_arg), template_args=_pairs("--template-arg", template_arg),
    )  # fmt: skip
    result = measure(options)
    typer.echo(json.dumps(result.to_json(), indent=1) if as_json else describe_accuracy(result))
    if result.stopped:
        raise typer.Exit(_signal_code(result.stopped))


@app.command(short_help="Set runs side by side.")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Directories that train wrote, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="A directory for curves.png. [default: no picture]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What runs were set to where they differ, how far they came, and what it cost.

    Example: logitcache compare full lsp-50 answer-only --out figures
    """
    from logitcache.commands.text_runs import describe_comparison
    from logitcache.student.evaluation.compare import compare as run

    found = run(runs, out=out)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else describe_comparison(found))


@app.command(short_help="Train the variants of an experiment from one cache, and report.")
def experiment(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="sections, lsp, halves, token-matched, losses, trsd or first-derivation."),
    ],
    cache: Annotated[Path, typer.Option(help="What all variants learn from.")],
    student: Annotated[str, typer.Option(help="What every run begins with: a model folder or hub id.")],
    out: Annotated[
        Path, typer.Option(help="A new directory, or one to go on with; variants that are done are not run again.")
    ],
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 3,
    points: Annotated[
        str | None, typer.Option(help="Shares of lsp and first-derivation, such as 0.25,0.5,1. [default: theirs]")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="For halves: it reads the crops.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and what it will cost.")] = False,
    prompts: Annotated[
        str | None, typer.Option(help="Questions with `answer`: every run answers them too, through vLLM.")
    ] = None,
    verifier: Annotated[str, typer.Option(help="Judge of the answers: math, exact or gym.")] = "exact",
    budgets: Annotated[str, typer.Option(help="As in eval.")] = "0,25%,50%,75%,100%,none",
    by: Annotated[str, typer.Option(help="Accuracy is told by this column of the prompts as well.")] = "family",
    samples: Annotated[int, typer.Option(help="Completions a prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of the sampling; 0 takes the likeliest token.")] = 0.0,
    max_tokens: MaxTokens = 2048,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer after a reasoning that was cut.")] = 256,
    reasoning_markers: ReasoningMarkers = None,
    engine_arg: EngineArg = None,
    where: Annotated[str | None, typer.Option(help="Learn from traces such as 'correct' only.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the prompts kept for evaluation.")] = 0.05,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32. [default: bf16 on CUDA]")] = None,
    tokens_per_batch: Annotated[int | None, typer.Option(help="As in train. [default: 4096]")] = None,
    epochs: Annotated[float | None, typer.Option(help="[default: 3]")] = None,
    max_steps: Annotated[int | None, typer.Option(help="So many optimiser steps, whatever --epochs says.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="[default: 1e-4]")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in train. Repeatable.")
    ] = None,
) -> None:
    """Each variant is trained from CACHE with every seed, evaluated, and set beside the others: results.csv, report.md, plots.

    The teacher is loaded for nothing but the crops of halves. Run the same command again to go on after a stop, or with
    more seeds, points, prompts or budgets.

    Example: logitcache experiment lsp --cache math-cache --student Qwen/Qwen3-0.6B --out lsp --epochs 2 --dry-run
    """
    if prompts is None:
        of_answers = {"verifier", "budgets", "by", "samples", "temperature", "max_tokens", "answer_tokens"}
        of_answers |= {"reasoning_markers"} | ({"engine_arg"} if teacher is None else set())
        _refuse_given(context, of_answers, "it is of the answers; give --prompts as well")
    from logitcache.commands.text_experiments import describe_estimates, describe_experiment
    from logitcache.student.experiments.estimate import estimate
    from logitcache.student.experiments.experiment import run
    from logitcache.student.experiments.options import ExperimentOptions

    shared = {
        "where": where, "held_out": held_out, "dtype": dtype, "tokens_per_batch": tokens_per_batch, "epochs": epochs,
        "max_steps": max_steps, "learning_rate": learning_rate, "set": _pairs("--set", set_),
    }  # fmt: skip
    answers = {
        "samples": samples, "temperature": temperature, "max_tokens": max_tokens, "answer_tokens": answer_tokens,
        "reasoning_markers": reasoning_markers, "engine_args": _pairs("--engine-arg", engine_arg),
    }  # fmt: skip
    options = ExperimentOptions(
        name, cache, student, out, seeds, _shares(points), prompts, verifier, _names(budgets), by, teacher,
        {key: value for key, value in shared.items() if value not in (None, {})},
        {key: value for key, value in answers.items() if value not in (None, {})},
    )  # fmt: skip
    if dry_run:
        typer.echo(describe_estimates(options, estimate(options)))
        return
    result = run(options)
    typer.echo(describe_experiment(result))
    if result.signal:
        raise typer.Exit(_signal_code(result.signal))


@app.command(short_help="Say what a cache holds.")
def info(
    cache: ACache,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a cache holds: teacher, traces, tokens by section, bytes a token, support and tail."""
    from logitcache.cache.reader import Cache
    from logitcache.commands.text import describe

    facts = Cache.open(cache).info()
    typer.echo(json.dumps(facts, indent=1) if as_json else describe(facts))


@app.command(short_help="Find whatever is wrong with a cache.")
def verify(
    cache: ACache,
    repair: Annotated[
        bool, typer.Option(help="Move broken shards aside, so that their traces can be made again.")
    ] = False,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Reads all of a cache and names whatever is wrong: checksums, columns, spans, ids, probabilities. Exit code 2 if any."""
    from logitcache.cache.verify import repair as set_aside
    from logitcache.cache.verify import verify as find

    problems, moved = set_aside(cache, workers) if repair else (find(cache, workers), [])
    if as_json:
        typer.echo(json.dumps({"problems": [asdict(p) for p in problems], "moved": [str(m) for m in moved]}, indent=1))
    else:
        for line in [*problems, *(f"moved {path}" for path in moved)]:
            typer.echo(str(line))
        typer.echo(
            f"{cache}: {len(problems)} problems" if problems else f"{cache}: every byte and every trace is right"
        )
    if problems:
        raise typer.Exit(2)


@app.command("slice", short_help="Cut a smaller cache out of one.")
def slice_(
    cache: ACache,
    out: NewOut,
    top_k: Annotated[int | None, typer.Option(help="Ids kept a row; the rest joins the tail. [default: all]")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Trim rows to this share of their mass. [default: as they are]")
    ] = None,
    min_k: Annotated[int | None, typer.Option(help="Ids a trimmed row keeps at least.")] = None,
    sections: Annotated[
        str | None, typer.Option(help="Keep rows of these only: any of prompt,reasoning,answer that follow each other.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            help="Keep these traces: conditions such as correct, finish_reason=stop, tokens<=4096, reasoning<=2048, "
            "sample_index<2 or meta.level>=3, joined by `and`."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Keep the traces of so many prompts, a fair sample.")] = None,
    verifier: Verifier = None,
    workers: Workers = None,
) -> None:
    """A part of CACHE becomes a cache of its own, without the teacher: fewer ids, fewer rows, fewer traces.

    A slice at --top-k 16 holds what a capture at 16 would have held. With --verifier answers are judged anew.

    Example: logitcache slice math-cache --out math-right --top-k 32 --where "correct and tokens<=8192"
    """
    from logitcache.transform.slice import slice_cache

    chosen = tuple(name.strip() for name in sections.split(",")) if sections else None
    report = slice_cache(
        cache, out, top_k=top_k, top_p=top_p, min_k=min_k, sections=chosen, where=where, limit=limit,
        verifier=verifier, workers=workers,
    )  # fmt: skip
    typer.echo(report.text())


@app.command(short_help="Make one cache of several.")
def merge(
    caches: Annotated[
        list[Path], typer.Argument(metavar="CACHE", help="Caches of one identity; of a trace in several, the first's.")
    ],
    out: NewOut,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Let this field of the identity differ, such as engine. Repeatable."),
    ] = None,
    workers: Workers = None,
) -> None:
    """All traces of CACHES become one cache; shards keep their bytes. A difference in identity is refused by name.

    Example: logitcache merge part-a part-b --out whole
    """
    from logitcache.transform.slice import merge as run

    typer.echo(run(caches, out, allow=allow or (), workers=workers).text())


@app.command(short_help="Part a cache by prompt.")
def split(
    cache: ACache,
    into: Annotated[
        list[str], typer.Option(metavar="DIR=SHARE", help="A part and its share of the prompts. Repeatable.")
    ],
    workers: Workers = None,
) -> None:
    """CACHE becomes several, no prompt in two of them; where a prompt goes depends on its id alone.

    Example: logitcache split math-cache --into train=0.95 --into test=0.05
    """
    from logitcache.transform.slice import split as run

    parts = [(Path(name), share) for name, share in map(_part, into)]
    typer.echo(run(cache, parts, workers=workers).text())


@app.command(short_help="Write a cache as plain Parquet.")
def export(
    cache: ACache,
    out: NewOut,
    to: Annotated[Literal["parquet"], typer.Option(help="The format.")] = "parquet",
) -> None:
    """CACHE as Parquet files: plain columns, and ids, log-probabilities and log tail as lists, one entry a token.

    Plain Arrow readers open a cache's own columns as they are; only the rows are packed, and unpacked here.

    Example: logitcache export math-cache --to parquet --out math-parquet
    """
    from logitcache.interop.parquet import export_parquet

    typer.echo(export_parquet(cache, out).text(out))


@app.command("import", short_help="Make a cache of another tool's capture.")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Directory of .parquet files, or one of them.")],
    out: NewOut,
    tokenizer: Annotated[str, typer.Option(help="The teacher's: model folder or hub id.")],
    from_: Annotated[Literal["distillkit"], typer.Option("--from", help="The tool.")] = "distillkit",
    teacher: Annotated[str, typer.Option(help="Hub id of the teacher; a capture does not say.")] = "unknown",
    config: Annotated[
        Path | None, typer.Option(help="YAML with the capture's settings. [default: compression_config.yaml beside it]")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Columns of the teacher's logits. [default: as said]")] = None,
    exact_part_only: Annotated[
        bool, typer.Option("--exact-part-only", help="Fold log-probabilities stored as a fitted curve into the tail.")
    ] = False,
) -> None:
    """Published DistillKit captures become a cache: the log-probabilities that stand there as numbers, and their ids.

    What stands there as a fitted curve is nats off, and refused unless --exact-part-only leaves it to the tail.

    Example: logitcache import capture/ --from distillkit --tokenizer Qwen/Qwen3-8B --out cache
    """
    from logitcache.interop.distillkit import import_distillkit

    report = import_distillkit(
        source, out, tokenizer=tokenizer, teacher=teacher, config=config, vocab_size=vocab_size,
        exact_part_only=exact_part_only,
    )  # fmt: skip
    typer.echo(report.text(out))


@app.command(short_help="Put a cache on the Hugging Face hub.")
def push(
    cache: ACache,
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="OWNER/NAME of a dataset repository, made where it is missing.")
    ],
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Make it public, or say that it is; one that is there is never changed. [default: private]"
        ),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to. [default: main]")] = None,
) -> None:
    """CACHE is verified and goes to the hub as it is, with a card that says what it holds; what is there is not sent again.

    Example: logitcache push math-cache me/math-cache
    """
    from logitcache.cache.verify import verify as find
    from logitcache.errors import ShardCorruptError
    from logitcache.interop.hub import push as run

    if problems := find(cache):
        raise ShardCorruptError(
            f"{cache}: {problems[0]}; nothing was sent, `logitcache verify` names all that is wrong"
        )
    typer.echo(run(cache, repo, private=not public, revision=revision))


@app.command(short_help="Fetch a cache from the Hugging Face hub.")
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME of a dataset repository.")],
    out: NewOut,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. [default: main]")] = None,
    workers: Workers = None,
) -> None:
    """A cache on the hub comes to OUT and is verified, every checksum and every trace; OUT appears once it is sound.

    Example: logitcache pull me/math-cache --out math-cache
    """
    from logitcache.interop.hub import pull as run

    typer.echo(run(repo, out, revision=revision, workers=workers))


def _refuse_given(context: typer.Context, names: Collection[str], why: str) -> None:
    """Raises: InputError for an option that was given and would have no effect."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source and source.name == "COMMANDLINE":
            raise InputError(f"{option.opts[0]}: {why}")


def _signal_code(name: str | None) -> int:
    """Exit code of a command that a signal ended, as shells count it."""
    return 128 + signal.Signals[name].value if name else 1


def _report_fill(summary: Any, out: Path) -> None:
    """Says what a command made of a cache; its exit code is the signal's that ended it, or 1 where traces were lost."""
    typer.echo(summary.text(out))
    if summary.stopped:
        raise typer.Exit(_signal_code(summary.stopped))
    if summary.failed:
        raise typer.Exit(1)


def _generate_options(
    *,
    prompts: str,
    teacher: str,
    out: Path | None,
    reasoning_markers: str | None,
    worker: str | None,
    sampling: list[str] | None,
    engine_arg: list[str] | None,
    template_arg: list[str] | None,
    **options: Any,
) -> Any:
    """What generate and plan were asked for. Keywords of the two dataclasses are the options' own names."""
    from logitcache.capture.generate import GenerateOptions
    from logitcache.inference.model import ModelSpec

    of_spec = (
        "top_k",
        "prompt_logits",
        "temperature",
        "max_tokens",
        "seed",
        "dtype",
        "revision",
        "tensor_parallel_size",
    )
    spec = ModelSpec(
        model=teacher,
        sampling=_pairs("--sampling", sampling),
        engine_args=_pairs("--engine-arg", engine_arg),
        template_args=_pairs("--template-arg", template_arg),
        **{name: options.pop(name) for name in of_spec},
    )
    options.pop("run", None)
    return GenerateOptions(
        source=prompts,
        out=out or Path(),
        spec=spec,
        markers=_markers(reasoning_markers),
        worker=_worker(worker),
        **options,
    )


def _echo(text: str) -> None:
    """Says it once, however many processes torchrun started."""
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _shares(text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(float(share) for share in _names(text)) if text else None
    except ValueError:
        raise InputError(f"--points {text!r}: write shares such as 0.25,0.5,1") from None


def _numbers(option: str, given: list[str] | None) -> dict[str, float]:
    """NAME=NUMBER settings."""
    numbers = {}
    for item in given or []:
        name, _, number = item.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            name, value = "", 0.0
        if not name:
            raise InputError(f"{option} {item!r}: write NAME=NUMBER")
        if name in numbers:
            raise InputError(f"{option} {item!r}: {name} is given twice")
        numbers[name] = value
    return numbers


def _caches(given: list[str] | None, mix: list[str] | None) -> Any:
    """Caches each taken whole, or with shares: `--mix a=0.7 b=0.3` and `--mix a=0.7 --mix b=0.3` mean the same."""
    if not mix:
        if not given:
            raise InputError("give a cache to learn from, or several, or --mix CACHE=SHARE")
        return [Path(name) for name in given]
    return {Path(name): share for name, share in _numbers("--mix", [*mix, *(given or [])]).items()}


def _markers(text: str | None) -> Any:
    from logitcache.sections import Markers

    return Markers.parse(text) if text else None


def _worker(text: str | None) -> Any:
    from logitcache.cache.workers import from_environment

    return from_environment(text)


def _part(text: str) -> tuple[str, float]:
    """DIR=SHARE."""
    name, _, share = text.rpartition("=")
    with suppress(ValueError):
        if name:
            return name, float(share)
    raise InputError(f"--into {text!r}: write DIR=SHARE, such as train=0.95")


def _pairs(option: str, given: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE settings; a value is JSON where it can be, else text."""
    pairs: dict[str, Any] = {}
    for item in given or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InputError(f"{option} {item!r}: write KEY=VALUE")
        key = key.replace("-", "_")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return pairs


def main() -> NoReturn:
    """Entry point. The process ends after what Python runs at its exit, and before the interpreter takes itself apart:
    a library's thread that is in C++ then aborts a command that has done its work (pytorch/pytorch#38228)."""
    codes: list[int] = []
    atexit.register(lambda: codes and _leave(codes[0]))  # what is registered first runs last
    codes.append(call())
    sys.exit(codes[0])


def call() -> int:
    """Does what the command line asks for, and returns its exit code.

    A deliberate error is one line; a Ctrl-C is no traceback.
    """
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
    except LogitcacheError as e:
        print(f"logitcache: {e.text(_flags())}", file=sys.stderr)
        code = e.exit_code
    except BrokenPipeError:  # who read it has read enough
        code = 1
    except OSError as e:
        print(f"logitcache: {e.strerror or e}" + (f": {e.filename}" if e.filename else ""), file=sys.stderr)
        code = 1
    except typer.Abort:
        print("logitcache: stopped; run the same command again", file=sys.stderr)
        code = _signal_code("SIGINT")
    except _USAGE_ERROR as e:
        e.show()
        code = e.exit_code
    return code


def _flags() -> dict[str, str]:
    import typer.main

    group: Any = typer.main.get_command(app)
    found = {}
    for command in group.commands.values():
        for parameter in command.params:
            if parameter.opts and parameter.opts[0].startswith("--"):
                found[parameter.name.rstrip("_")] = parameter.opts[0]
    return found | {
        "engine_args": "--engine-arg",
        "template_args": "--template-arg",
        "section_weights": "--section-weight",
    }


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
