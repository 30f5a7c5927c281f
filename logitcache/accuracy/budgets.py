"""Accuracy against a budget of reasoning: natural completions, and the same cut short, closed, and answered."""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logitcache import prompts
from logitcache.accuracy.answer_file import NO_ROOM, Answer, AnswerFile, Key, digest_of
from logitcache.accuracy.run import Delimiters, Questions, Run
from logitcache.errors import IdentityError, InputError, NotACacheError, PromptsError
from logitcache.grading import verdicts
from logitcache.identity import first_difference
from logitcache.inference import model
from logitcache.inference.model import ModelFacts, ModelSpec, Sampling
from logitcache.prompts import PromptSet
from logitcache.runtime.files import LOCK, left_behind, publish_json, read_json, taken
from logitcache.runtime.locks import exclusive
from logitcache.sections import Markers

SETTINGS, ANSWERS, RESULTS = "settings.json", "answers.jsonl", "budgets.json"
DEFAULT = ("0", "25%", "50%", "75%", "100%", "none")
CI_METHOD = "95% Wilson interval of the prompts' mean accuracies, of as many trials as their spread is worth"


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a reasoning is kept: so many tokens, a share of its own length, or, with neither, the natural whole."""

    tokens: int | None = None
    percent: float | None = None

    def __str__(self) -> str:
        if self.percent is not None:
            return f"{self.percent:g}%"
        return "none" if self.tokens is None else str(self.tokens)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """``none``, ``128`` or ``12.5%``."""
        text = text.strip()
        if text == "none":
            return cls()
        if text.isdecimal():
            return cls(tokens=int(text))
        if re.fullmatch(r"\d+(\.\d+)?%", text) and float(text[:-1]) <= 100:
            return cls(percent=float(text[:-1]))
        raise InputError(f"`budgets` {text!r}: write tokens such as 128, a share such as 50%, or none")

    def cut(self, length: int) -> int | None:
        """Tokens that are kept of a reasoning of ``length`` tokens; None where it is left to end by itself."""
        if self.percent is not None:
            return int(self.percent / 100 * length + 1e-9)  # 29% of 100 are 29
        return None if self.tokens is None else min(self.tokens, length)


@dataclass(frozen=True)
class BudgetOptions:
    """One call of ``logitcache eval --budgets``."""

    prompts: str  # a source as `logitcache.prompts.load` reads it, with gold answers
    model: str  # a model folder, such as a finished run, or a hub id
    out: Path
    budgets: tuple[str, ...] = DEFAULT
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 2048  # of a natural completion
    answer_tokens: int = 256  # after a forced closing
    verifier: str = "exact"  # one of verdicts.GRADERS
    limit: int | None = None
    seed: int = 0
    markers: Markers | None = None  # None: found in the tokenizer or the chat template
    answer_regex: str | None = None  # for completions without markers
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)
    template_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.answer_tokens < 1 or (self.limit is not None and self.limit < 1):
            raise InputError("`samples`, `answer_tokens` and `limit` must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise InputError(
                f"`samples` {self.samples} at `temperature` 0 are {self.samples} times the same; set one of the two"
            )
        if not self.budgets:
            raise InputError("`budgets` is empty; give some, such as 0,50%,none")
        _ = self.spec, self.drawn, self.parsed  # refuse what they refuse
        Markers(answer_regex=self.answer_regex)
        verdicts.check(self.verifier)

    @property
    def parsed(self) -> list[Budget]:
        """The budgets, each once, in their order."""
        return list(dict.fromkeys(map(Budget.parse, self.budgets)))

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            model=self.model,
            option="student",
            dtype=self.dtype,
            tensor_parallel_size=self.tensor_parallel_size,
            engine_args=self.engine_args,
            template_args=self.template_args,
        )

    @property
    def drawn(self) -> Sampling:
        """How answers are sampled."""
        return Sampling(
            temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed, sampling=self.sampling
        )


def measure(options: BudgetOptions) -> dict[str, Any]:
    """Accuracy of a model on prompts, under each budget of reasoning.

    Every sample is completed naturally once. A budget cuts that reasoning, puts the closing delimiter behind it and has the
    model answer; budgets that cut a sample at one place share its answer. A natural completion that never closed is all
    reasoning, and wrong. So is an answer that could not be scored, and one for which the model's context had no room.

    Answers lie in ``options.out`` as they come. The same call goes on where one stopped; budgets, samples and prompts may be
    added, and all other settings must stay.

    Returns: "budgets": by budget {"accuracy" (pass@1: mean over prompts of the mean over samples), "ci" [lo, hi] (see
        `pass_at_1`), "prompts", "samples", "reasoning_tokens", "answer_tokens", "total_tokens" (means; the total has the
        delimiters after the prompt too), "ended" (share that ended by themselves), "unscored", "no_room" (counts)}, empty
        where a signal ended the call, which "stopped" names; "settings" (of the model and the run), "delimiters" (token ids
        forced, or None), "student", "source", "prompts_digest", "ci_method", "made", "before", "seconds".
    Raises: InputError, IdentityError, CacheBusyError before anything is made; EngineError and WriteError.
    """
    began, out = time.monotonic(), options.out
    source = prompts.load(options.prompts, options.limit)
    _refuse_unjudgeable(options, source)
    facts = _inspect(options)
    markers = options.markers or Markers.detect(facts.tokenizer.get_vocab(), facts.chat_template)
    markers = Markers(markers.opening, markers.closing, options.answer_regex)
    cutting = [budget for budget in options.parsed if budget != Budget()]
    if cutting and not markers.pair:
        raise InputError(
            f"`student` {options.model}: no reasoning markers are known for it, so nothing can be cut or closed; give "
            "`reasoning_markers` OPENING,CLOSING, or `budgets` none"
        )
    model.render(facts, source.prompts[0], options.template_args)  # what it refuses, it refuses now
    settings = _settings(options, facts, markers)
    _match(out, settings)
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
        found = _match(out, settings)
        _refuse_other_prompts(out, file.answers, source)
        before, stopped = len(file.answers), None

        def publish(delimiters: Delimiters | None) -> None:
            forced = asdict(delimiters) if delimiters else None
            publish_json(out / SETTINGS, {"settings": settings, "delimiters": forced})

        if questions.missing(file.answers):
            run = Run(questions, file, Delimiters(**found) if found else None, publish, out)
            stopped = run.work()
        result = {
            "student": options.model,
            "source": options.prompts,
            "prompts_digest": prompts_digest(source),
            "ci_method": CI_METHOD,
            "budgets": {} if stopped else {str(b): _measured(b, questions, file.answers) for b in options.parsed},
            "stopped": stopped,
            "made": len(file.answers) - before,
            "before": before,
            "seconds": time.monotonic() - began,
            **read_json(out / SETTINGS),
        }
        if not stopped:
            publish_json(out / RESULTS, result)
    return result


def pass_at_1(right_PS: np.ndarray) -> tuple[float, list[float]]:
    """Mean over prompts of the mean over samples, and its 95% interval.

    The interval is Wilson's (1927) for a share of n trials. Samples of a prompt are alike, so n is what the spread of the
    prompts' means is worth: P p(1-p) / var, the effective size of a clustered sample (Kish). It is P for one sample a
    prompt, and lies in [P, P S]; where all are right, or none, it is P.

    Args:
        right_PS: bool [P, S], P prompts with S samples each.
    """
    P, S = right_PS.shape
    p, spread = float(right_PS.mean()), float(right_PS.mean(axis=1).var())
    n = P if p in (0, 1) else P * S if spread == 0 else min(P * S, P * p * (1 - p) / spread)
    z = 1.959963984540054
    centre, half = p + z * z / (2 * n), z * float(np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2))
    lo, hi = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return p, [max(0.0, lo), min(1.0, hi)]


def _measured(budget: Budget, questions: Questions, answers: Mapping[Key, Answer]) -> dict[str, Any]:
    chosen = [answers[k._replace(cut=budget.cut(answers[k].reasoning))] for k in questions.natural()]
    right = np.array([answer.correct is True for answer in chosen])
    accuracy, ci = pass_at_1(right.reshape(-1, questions.samples))
    counts = np.array([[a.reasoning, a.answer, a.opening + a.reasoning + a.closing + a.answer] for a in chosen])
    reasoning, answer, total = counts.mean(axis=0).tolist()
    return {
        "accuracy": accuracy,
        "ci": ci,
        "prompts": len(questions.prompts),
        "samples": questions.samples,
        "reasoning_tokens": reasoning,
        "answer_tokens": answer,
        "total_tokens": total,
        "ended": sum(a.finish == "stop" for a in chosen) / len(chosen),
        "unscored": sum(a.correct is None for a in chosen),
        "no_room": sum(a.finish == NO_ROOM for a in chosen),
    }


def _inspect(options: BudgetOptions) -> ModelFacts:
    folder = Path(options.model)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"`student` {folder} is a LoRA adapter, and the engine runs whole models; merge it into its base with peft's "
            "AutoPeftModelForCausalLM (merge_and_unload, then save_pretrained), and give that folder with the tokenizer"
        )
    if (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"`student` {folder} is a run that is not finished; finish it, or give one of its checkpoints")
    return model.inspect_model(options.spec)


def _refuse_unjudgeable(options: BudgetOptions, source: PromptSet) -> None:
    for prompt in source:
        if options.verifier == "gym":
            entry = prompt.metadata.get("gym")
            if not isinstance(entry, dict) or "source_dataset" not in entry:
                raise PromptsError(
                    f"{options.prompts}: prompt {prompt.id!r} is none of reasoning-gym; give `verifier` math or exact"
                )
        elif prompt.answer is None or not prompt.answer.strip():
            raise PromptsError(
                f"{options.prompts}: prompt {prompt.id!r} has no `answer` to judge by; give it one, or leave it out"
            )


def _settings(options: BudgetOptions, facts: ModelFacts, markers: Markers) -> dict[str, Any]:
    """All but the prompts that an answer depends on."""
    return {
        "model": facts.name,
        "model_revision": facts.revision,
        "tokenizer_hash": facts.tokenizer_hash,
        "chat_template_hash": facts.chat_template_hash,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "answer_tokens": options.answer_tokens,
        "seed": options.seed,
        "sampling": options.sampling,
        "verifier": options.verifier,
        "reasoning_markers": markers.pair,
        "answer_regex": markers.answer_regex,
        "dtype": facts.dtype,
        "engine": model.engine_version(),
        "engine_args": options.spec.identity_args(),
    }


def _match(out: Path, settings: dict[str, Any]) -> dict[str, list[int]] | None:
    """The delimiters that the answers in ``out`` were forced with; None where that is not decided, or nothing is there.

    Raises: IdentityError naming the first setting that differs, NotACacheError for a directory of other things.
    """
    foreign = taken(out, left_behind)
    if (out / SETTINGS).is_file():
        there = read_json(out / SETTINGS)
        if difference := first_difference(there.get("settings", {}), settings):
            name, found, wanted = difference
            raise IdentityError(
                f"{out} holds answers made with {name} = {found!r}, this call has {wanted!r}; go back to that, or give "
                "`out` a new directory"
            )
        return there.get("delimiters")
    if foreign:
        raise NotACacheError(f"{out} holds other things than answers; give `out` an empty or a new directory")
    return None


def _refuse_other_prompts(out: Path, answers: Mapping[Key, Answer], source: PromptSet) -> None:
    there = {answer.prompt_id: answer.digest for answer in answers.values()}
    common = [prompt for prompt in source if prompt.id in there]
    changed = next((prompt.id for prompt in common if there[prompt.id] != digest_of(prompt)), None)
    if changed is not None or (there and not common):
        what = "none of these prompts" if changed is None else f"prompt {changed!r} with another text or gold answer"
        raise IdentityError(f"{out} holds answers to {what}; give the prompts as they were, or `out` a new directory")


def prompts_digest(source: PromptSet) -> str:
    """Hash of prompts with all that verdicts read, whatever their order."""
    told = json.dumps(sorted([prompt.id, digest_of(prompt)] for prompt in source))
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
