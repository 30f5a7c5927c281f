"""Accuracy under reasoning budgets: of full completions, and of answers after a part of the reasoning."""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcache import prompts
from logitcache.accuracy.answer_file import NO_ROOM, Answer, AnswerFile, Key, digest_of
from logitcache.accuracy.options import AccuracyOptions, Budget
from logitcache.accuracy.run import Delimiters, Questions, Run
from logitcache.errors import IdentityError, InputError, NotACacheError, PromptsError
from logitcache.grading import verdicts
from logitcache.identity import first_difference
from logitcache.inference import model
from logitcache.inference.model import ModelFacts
from logitcache.inference.rendering import render
from logitcache.prompts import PromptSet, SourceCounts
from logitcache.runtime.files import LOCK, is_leftover, is_occupied, publish_json, read_json
from logitcache.runtime.locks import exclusive
from logitcache.runtime.secrets import without_secrets
from logitcache.sections import Markers

SETTINGS, ANSWERS, RESULTS = "settings.json", "answers.jsonl", "budgets.json"
CI_METHOD = "95% Wilson interval of the prompts' mean accuracies, of as many trials as their spread is worth"


@dataclass(frozen=True, kw_only=True)
class BudgetResult:
    """What a model reaches under one reasoning budget; token counts are means over samples."""

    accuracy: float  # pass@1: the mean over prompts of the mean over samples
    ci: list[float]  # [low, high], see `pass_at_1`
    prompts: int
    samples: int  # per prompt
    reasoning_tokens: float
    answer_tokens: float
    total_tokens: float  # everything after the prompt, delimiters included
    ended: float  # share of samples that ended with an end-of-sequence token
    unscored: int  # samples whose grading failed; they count as wrong
    no_room: int  # samples that did not fit the model's context; they count as wrong


@dataclass(frozen=True, kw_only=True)
class AccuracyResult:
    """What `measure` found, and the content of budgets.json."""

    student: str
    source: str  # of the prompts, as it was given
    prompts_digest: str
    ci_method: str
    budgets: dict[str, BudgetResult]  # by budget; empty if a signal ended the call
    stopped: str | None  # the signal's name
    made: int  # answers that this call made
    before: int  # answers that existed before
    seconds: float
    no_verdict: dict[str, int]  # answers of this call that could not be graded, by reason
    settings: dict[str, Any]  # of the model and of the sampling: all but the prompts that an answer depends on
    counts: SourceCounts  # of the prompts
    delimiters: dict[str, list[int]] | None  # token ids of the forced opening and closing; None: not decided yet

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(options: AccuracyOptions) -> AccuracyResult:
    """Measures a model's accuracy on prompts under each reasoning budget.

    Each sample is first completed without a limit on its reasoning. For a budget, that reasoning is cut, the closing
    delimiter is appended, and the model answers. Budgets that cut a sample at the same token share its answer. These count
    as wrong: a completion that never closed its reasoning, an answer whose grading failed, an answer that did not fit the
    model's context.

    Answers are appended to a file in ``options.out`` as they arrive. The same call resumes after a stop. Budgets, samples
    and prompts may be added later; every other setting must stay as it was.

    Raises: InputError, IdentityError or CacheBusyError before anything is generated; EngineError and WriteError.
    """
    began, out, graded = time.monotonic(), options.out, verdicts.no_verdict.copy()
    source = prompts.load(options.prompts, options.limit, options.columns)
    _check_gradable(options, source)
    facts = _inspect(options)
    markers = options.reasoning_markers or Markers.detect(facts.tokenizer.get_vocab(), facts.chat_template)
    markers = Markers(markers.opening, markers.closing, options.answer_regex)
    cutting = [budget for budget in options.parsed if budget != Budget()]
    if cutting and not markers.pair:
        raise InputError(
            f"`student` {options.student}: no reasoning markers are known for this model, so its reasoning cannot be cut; "
            "give `reasoning_markers` OPENING,CLOSING, or `budgets` none"
        )
    render(facts, source.prompts[0], options.template_args)  # refuses bad template arguments before the engine loads
    settings = _settings(options, facts, markers)
    _check_directory(out, settings)
    questions = Questions(
        options.spec,
        options.drawn,
        facts,
        markers,
        {prompt.id: prompt for prompt in source},
        options.samples,
        lambda length: {cut for budget in cutting if (cut := budget.cut(length)) is not None},
        options.answer_tokens,
        options.verifier,
    )
    with exclusive(out / LOCK, str(out)), closing(AnswerFile(out / ANSWERS)) as file:
        delimiters = _check_directory(out, settings)
        _check_prompts(out, file.answers, source)
        before, stopped = len(file.answers), None

        def publish(delimiters: Delimiters | None) -> None:
            forced = asdict(delimiters) if delimiters else None
            publish_json(out / SETTINGS, {"settings": settings, "delimiters": forced})

        if questions.missing(file.answers):
            run = Run(questions, file, Delimiters(**delimiters) if delimiters else None, publish, out)
            stopped = run.work()
        result = AccuracyResult(
            student=options.student,
            source=options.prompts,
            prompts_digest=prompts_digest(source),
            counts=source.counts,
            ci_method=CI_METHOD,
            budgets={} if stopped else {str(b): _result(b, questions, file.answers) for b in options.parsed},
            stopped=stopped,
            made=len(file.answers) - before,
            before=before,
            seconds=time.monotonic() - began,
            no_verdict=dict(verdicts.no_verdict - graded),
            **read_json(out / SETTINGS),
        )
        if not stopped:
            publish_json(out / RESULTS, result.to_json())
    return result


def pass_at_1(right_PS: np.ndarray) -> tuple[float, list[float]]:
    """Pass@1, the mean over prompts of the mean over samples, and its 95% confidence interval.

    The interval is Wilson's (1927) for n independent trials. Samples of one prompt are correlated, so n is the effective
    size of a clustered sample (Kish 1965): P p(1-p) / var, where var is the variance of the prompts' means. It lies in
    [P, P S], and is P for one sample per prompt, or if all samples are right, or none.

    Args:
        right_PS: bool [P, S], P prompts with S samples each.
    Returns: the mean and [low, high].
    """
    P, S = right_PS.shape
    p, spread = float(right_PS.mean()), float(right_PS.mean(axis=1).var())
    n = P if p in (0, 1) else P * S if spread == 0 else min(P * S, P * p * (1 - p) / spread)
    z = 1.959963984540054
    centre, half = p + z * z / (2 * n), z * float(np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2))
    lo, hi = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return p, [max(0.0, lo), min(1.0, hi)]


def _result(budget: Budget, questions: Questions, answers: Mapping[Key, Answer]) -> BudgetResult:
    chosen = [answers[k._replace(cut=budget.cut(answers[k].reasoning))] for k in questions.natural()]
    right = np.array([answer.correct is True for answer in chosen])
    accuracy, ci = pass_at_1(right.reshape(-1, questions.samples))
    counts = np.array([[a.reasoning, a.answer, a.opening + a.reasoning + a.closing + a.answer] for a in chosen])
    reasoning, answer, total = counts.mean(axis=0).tolist()
    return BudgetResult(
        accuracy=accuracy,
        ci=ci,
        prompts=len(questions.prompts),
        samples=questions.samples,
        reasoning_tokens=reasoning,
        answer_tokens=answer,
        total_tokens=total,
        ended=sum(a.finish == "stop" for a in chosen) / len(chosen),
        unscored=sum(a.correct is None for a in chosen),
        no_room=sum(a.finish == NO_ROOM for a in chosen),
    )


def _inspect(options: AccuracyOptions) -> ModelFacts:
    folder = Path(options.student)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"`student` {folder} is a LoRA adapter, but vLLM needs a whole model here; merge the adapter with peft's "
            "AutoPeftModelForCausalLM (merge_and_unload, then save_pretrained) and give that folder, with the tokenizer in it"
        )
    if (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"`student` {folder} is an unfinished run; finish it, or give one of its checkpoints")
    return model.inspect_model(options.spec)


def _check_gradable(options: AccuracyOptions, source: PromptSet) -> None:
    verdicts.check_answers(options.verifier, options.prompts, ((p.answer, p.metadata) for p in source))
    for prompt in source:
        if options.verifier == "gym":
            entry = prompt.metadata.get("gym")
            if not isinstance(entry, dict) or "source_dataset" not in entry:
                raise PromptsError(
                    f"{options.prompts}: prompt {prompt.id!r} is not a reasoning-gym task; set `verifier` to math or exact"
                )
        elif prompt.answer is None or not prompt.answer.strip():
            raise PromptsError(
                f"{options.prompts}: prompt {prompt.id!r} has no gold `answer`; add one, or remove the prompt"
            )


def _settings(options: AccuracyOptions, facts: ModelFacts, markers: Markers) -> dict[str, Any]:
    """Everything an answer depends on, except the prompts."""
    return {
        "model": facts.name,
        "model_revision": facts.revision,
        "tokenizer_hash": facts.tokenizer_hash,
        "chat_template_hash": facts.chat_template_hash,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "answer_tokens": options.answer_tokens,
        "seed": options.seed,
        "sampling": without_secrets(options.sampling),
        "verifier": options.verifier,
        "reasoning_markers": markers.pair,
        "answer_regex": markers.answer_regex,
        "dtype": facts.dtype,
        "engine": model.engine_version(),
        "engine_args": options.spec.identity_args(),
    }


def _check_directory(out: Path, settings: dict[str, Any]) -> dict[str, list[int]] | None:
    """Checks that answers with these settings may be added to ``out``.

    Returns: the delimiters in use there; None if they are not decided yet, or if ``out`` holds no answers.
    Raises: IdentityError with the first setting that differs; NotACacheError for a directory with other files.
    """
    foreign = is_occupied(out, is_leftover)
    if (out / SETTINGS).is_file():
        there = read_json(out / SETTINGS)
        if difference := first_difference(there.get("settings", {}), settings):
            name, found, wanted = difference
            raise IdentityError(
                f"{out} holds answers made with {name} = {found!r}, this call has {wanted!r}; use the old value, or set "
                "`out` to a new directory"
            )
        return there.get("delimiters")
    if foreign:
        raise NotACacheError(f"{out} holds files that are not answers; set `out` to an empty or a new directory")
    return None


def _check_prompts(out: Path, answers: Mapping[Key, Answer], source: PromptSet) -> None:
    there = {answer.prompt_id: answer.digest for answer in answers.values()}
    common = [prompt for prompt in source if prompt.id in there]
    changed = next((prompt.id for prompt in common if there[prompt.id] != digest_of(prompt)), None)
    if changed is not None or (there and not common):
        what = "other prompts" if changed is None else f"prompt {changed!r} with another text or gold answer"
        raise IdentityError(f"{out} holds answers to {what}; give the same prompts, or set `out` to a new directory")


def prompts_digest(source: PromptSet) -> str:
    """Hash of the prompts with everything grading reads; their order does not matter."""
    text = json.dumps(sorted([prompt.id, digest_of(prompt)] for prompt in source))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
