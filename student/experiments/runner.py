"""Runs an experiment's commands: crops, training, evaluations and answers. What is finished is not run again.

Measurements are stored beside their run, together with everything they depend on; a measurement that was made with other
settings is made again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.accuracy.answer_file import AnswerFile, Key
from logitcache.accuracy.budgets import ANSWERS, RESULTS, SETTINGS, BudgetResult, pass_at_1, prompts_digest
from logitcache.accuracy.options import Budget
from logitcache.cache.reader import Cache
from logitcache.errors import IdentityError, LogitcacheError, NotACacheError, PromptsError
from logitcache.identity import first_difference
from logitcache.prompts import PromptSet
from logitcache.runtime.console import Stop
from logitcache.runtime.files import LOGS, publish_json, read_json
from logitcache.runtime.secrets import without_secrets
from logitcache.student.data.views import View
from logitcache.student.experiments import subcommands
from logitcache.student.experiments.catalog import BEFORE, Variant
from logitcache.student.experiments.options import ExperimentOptions
from logitcache.student.experiments.plan import ExperimentPlan
from logitcache.student.experiments.subcommands import Call
from logitcache.student.training.checkpoints import RUN_FILE


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """Accuracy and reasoning length on one group of prompts, under one budget."""

    accuracy: float
    ci: list[float]  # [low, high], see `pass_at_1`
    prompts: int
    reasoning_tokens: float  # mean per sample


@dataclass(frozen=True)
class Measurements:
    """What was measured of one student; empty for what was not measured."""

    evaluation: dict[str, Any] = field(default_factory=dict)  # the JSON of an Evaluation
    accuracy: dict[str, BudgetResult] = field(default_factory=dict)  # by budget
    groups: dict[str, dict[str, GroupResult]] = field(default_factory=dict)  # by group of prompts, then by budget

    def __bool__(self) -> bool:
        return bool(self.evaluation or self.accuracy)


class ExperimentRunner:
    """Runs an experiment's commands one after the other and skips those whose results exist.

    A student is a variant and a seed; None and None is the untrained student.
    """

    def __init__(
        self,
        options: ExperimentOptions,
        plan: ExperimentPlan,
        call: Call,
        stop: Stop,
        report: Callable[[str], None],
    ) -> None:
        self.options, self.plan, self.call, self.stop, self.report = options, plan, call, stop, report
        self.commands = 0  # commands run so far
        self.stopped: str | None = None  # the signal that stopped a command
        self.failed: list[LogitcacheError] = []

    def run(self) -> None:
        """Runs seed by seed, so that a stop leaves complete sets of variants. A failed command does not stop the others."""
        for step in self._steps():
            if self.stopped or self.stop.signal:
                self.stopped = self.stopped or self.stop.signal
                return
            try:
                step()
            except LogitcacheError as e:
                self.failed.append(e)

    def _steps(self) -> Iterator[Callable[[], None]]:
        for variant in self.plan.variants:
            if variant.crop:
                yield lambda variant=variant: self._crop(variant)
        yield from self._measurements(None, None)
        for seed in range(self.options.seeds):
            for variant in self.plan.variants:
                yield lambda variant=variant, seed=seed: self._train(variant, seed)
                yield from self._measurements(variant, seed)

    def _measurements(self, variant: Variant | None, seed: int | None) -> Iterator[Callable[[], None]]:
        if self.plan.evaluation is not None:
            yield lambda: self._evaluate(variant, seed)
        if self.plan.prompts is not None:
            yield lambda: self._answer(variant, seed)

    def _run(self, name: str, arguments: list[str]) -> str | None:
        """Returns: what the command printed; None if a signal stopped it."""
        log = self.options.out / LOGS / (name.replace(" ", "-").replace(":", "-").replace("/", "-") + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.commands += 1
        code, printed = self.call(arguments, log, self.stop)
        self.stopped = subcommands.check(code, name, log)
        if self.stopped:
            return None
        self.report(name)
        return printed

    def _crop(self, variant: Variant) -> None:
        options, out = self.options, self.options.crop(variant)
        assert variant.crop
        assert options.teacher
        if self._is_cropped(variant):
            return
        engine_args = options.answers.get("engine_args", {})
        identity = self.plan.cache.identity
        arguments = subcommands.crop(options.cache, identity, options.teacher, variant.crop, out, engine_args)
        self._run(f"crop {variant.crop}", arguments)

    def _is_cropped(self, variant: Variant) -> bool:
        """Whether the variant's crops are complete. Raises: IdentityError for crops that another teacher scored."""
        wanted, out = self.plan.cache, self.options.crop(variant)
        try:
            cache = Cache.open(out)
        except NotACacheError:  # not started
            return False
        if (found := cache.identity.teacher_revision) != wanted.identity.teacher_revision:
            raise IdentityError(
                f"{out} was scored by a teacher @ {found}, but {self.options.cache} was made @ "
                f"{wanted.identity.teacher_revision}; remove {out} and set `teacher` to the one that made the cache"
            )
        return len(cache) >= len(wanted)

    def _train(self, variant: Variant, seed: int) -> None:
        options, place = self.options, self.options.place(variant, seed)
        if finished_run(place, variant) or (variant.crop and not self._is_cropped(variant)):
            return
        if not place.exists():  # measurements of an earlier run in this place are not of this run
            for kind in ("evaluation", "accuracy"):
                _beside(place, kind).unlink(missing_ok=True)
            if (_answers(place) / SETTINGS).is_file():
                shutil.rmtree(_answers(place), ignore_errors=True)
        settings = {"seed": seed, **options.shared, **self.plan.settings(variant)}
        cache = options.crop(variant) if variant.crop else options.cache
        self._run(f"train {_name(variant, seed)}", subcommands.train(cache, options.student, place, settings))

    def _evaluate(self, variant: Variant | None, seed: int | None) -> None:
        assert self.plan.evaluation is not None
        student = student_of(self.options, variant, seed)
        file = _beside(self.options.place(variant, seed), "evaluation")
        asked = _evaluation_inputs(self.plan, student)
        if _stored(file, asked) or not _exists(variant, student):
            return
        arguments = subcommands.evaluate(self.options.cache, student, self.plan.evaluation)
        printed = self._run(f"evaluate {_name(variant, seed)}", arguments)
        if printed is not None:
            publish_json(file, {"asked": asked, "found": json.loads(printed)})

    def _answer(self, variant: Variant | None, seed: int | None) -> None:
        options, place = self.options, self.options.place(variant, seed)
        assert options.prompts
        assert self.plan.prompts
        student = student_of(options, variant, seed)
        file, out, asked = _beside(place, "accuracy"), _answers(place), _answer_inputs(options, self.plan, student)
        if _stored(file, asked) or not _exists(variant, student):
            return
        arguments = subcommands.answer(student, options.prompts, out, _answer_settings(options))
        if self._run(f"answers of {_name(variant, seed)}", arguments) is None:
            return
        found = read_json(out / RESULTS)
        if found["prompts_digest"] != asked["prompts"]:
            raise PromptsError(f"{options.prompts} changed while the experiment ran; run the same command again")
        groups = _by_group(options, self.plan.prompts, out)
        stored = {name: {budget: asdict(part) for budget, part in parts.items()} for name, parts in groups.items()}
        publish_json(file, {"asked": asked, "found": found["budgets"], "groups": stored})


def student_of(options: ExperimentOptions, variant: Variant | None, seed: int | None) -> str:
    """What `logitcache eval` takes as the student: the run, or the untrained student."""
    return options.student if variant is None else str(options.place(variant, seed))


def measurements(
    options: ExperimentOptions,
    plan: ExperimentPlan,
    variant: Variant | None,
    seed: int | None,
    own: dict[str, Any] | None,
) -> Measurements:
    """Reads what was measured of a student with the plan's settings.

    Args:
        own: the evaluation that training itself made; it counts if the plan has no evaluation of its own.
    """
    place, student = options.place(variant, seed), student_of(options, variant, seed)
    if plan.evaluation is not None:
        stored = _stored(_beside(place, "evaluation"), _evaluation_inputs(plan, student))
        own = stored and stored["found"]
    stored = None
    if plan.prompts is not None:
        stored = _stored(_beside(place, "accuracy"), _answer_inputs(options, plan, student))
    if stored is None:
        return Measurements(own or {})
    accuracy = {budget: BudgetResult(**part) for budget, part in stored["found"].items()}
    groups = {
        name: {budget: GroupResult(**part) for budget, part in parts.items()}
        for name, parts in stored["groups"].items()
    }
    return Measurements(own or {}, accuracy, groups)


def finished_run(place: Path, variant: Variant) -> dict[str, Any] | None:
    """run.json of a variant's run; None if the run is not finished.

    Raises: IdentityError for a run of a variant that had the same name and other settings.
    """
    try:
        found = json.loads((place / RUN_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("status") != "finished":
        return None
    view = View(variant.view, variant.sections)
    wanted = {"view": str(view), "sections": list(view.sections), **variant.set}
    if difference := first_difference(found, wanted):
        name, was, here = difference
        raise IdentityError(
            f"{place} was made with {name} = {was!r}, but variant {variant.name} has {here!r}; remove it, or set `out` to "
            "a new directory"
        )
    return found


def _evaluation_inputs(plan: ExperimentPlan, student: str) -> dict[str, Any]:
    """Everything an evaluation depends on."""
    return {"student": _weights(student), **(plan.evaluation or {})}


def _answer_inputs(options: ExperimentOptions, plan: ExperimentPlan, student: str) -> dict[str, Any]:
    """Everything that answers depend on, as JSON reads it back."""
    assert plan.prompts
    own = {"student": _weights(student), "prompts": prompts_digest(plan.prompts), "by": options.by}
    return json.loads(json.dumps(without_secrets(own | _answer_settings(options))))


def _answer_settings(options: ExperimentOptions) -> dict[str, Any]:
    return {"budgets": options.budgets, "verifier": options.verifier, **options.answers}


def _beside(place: Path, kind: str) -> Path:
    return place.with_name(f"{place.name}-{kind}.json")


def _answers(place: Path) -> Path:
    return place.with_name(place.name + "-answers")


def _exists(variant: Variant | None, student: str) -> bool:
    """Whether there is a student to measure: the untrained one, or a finished run."""
    return variant is None or finished_run(Path(student), variant) is not None


def _name(variant: Variant | None, seed: int | None) -> str:
    return BEFORE if variant is None else f"{variant.name} seed {seed}"


def _stored(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """A stored measurement; None if there is none, or if it was made with other settings."""
    if not file.exists():
        return None
    found = read_json(file)
    return found if found["asked"] == asked else None


def _weights(student: str) -> str:
    """A key that changes when a run is made again; the name of a student that is not a run."""
    record = Path(student) / RUN_FILE
    return hashlib.blake2b(record.read_bytes()).hexdigest() if record.exists() else student


def _by_group(options: ExperimentOptions, prompts: PromptSet, out: Path) -> dict[str, dict[str, GroupResult]]:
    """Results by group, a group being the prompts with the same value of the column `by`. Empty for fewer than two groups."""
    groups: dict[str, list[str]] = {}
    for prompt in prompts:
        if options.by in prompt.metadata:
            groups.setdefault(str(prompt.metadata[options.by]), []).append(prompt.id)
    if len(groups) < 2:
        return {}
    answers, samples = AnswerFile(out / ANSWERS).answers, options.answers.get("samples", 1)
    found: dict[str, dict[str, GroupResult]] = {}
    for name, ids in groups.items():
        for budget in dict.fromkeys(map(Budget.parse, options.budgets)):
            natural = [answers[Key(i, sample, None)] for i in ids for sample in range(samples)]
            chosen = [answers[a.key._replace(cut=budget.cut(a.reasoning))] for a in natural]
            accuracy, ci = pass_at_1(np.array([a.correct is True for a in chosen]).reshape(-1, samples))
            found.setdefault(name, {})[str(budget)] = GroupResult(
                accuracy=accuracy,
                ci=ci,
                prompts=len(ids),
                reasoning_tokens=float(np.mean([a.reasoning for a in chosen])),
            )
    return found
