"""What an experiment makes: crops, runs, evaluations and answers, each by a command, in turn, and never twice.

What was measured lies beside its run with all that was asked, so that nothing measured otherwise is taken for it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.accuracy.budgets import ANSWERS, RESULTS, pass_at_1, prompts_digest
from logitcache.accuracy.options import Budget
from logitcache.accuracy.run import AnswerFile, Key
from logitcache.cache.reader import Cache
from logitcache.errors import IdentityError, LogitcacheError, NotACacheError, PromptsError
from logitcache.identity import first_difference
from logitcache.prompts import PromptSet
from logitcache.runtime.console import Stop
from logitcache.runtime.files import LOGS, publish_json, read_json
from logitcache.student.data.views import View
from logitcache.student.experiments import subcommands
from logitcache.student.experiments.catalog import BEFORE, Variant
from logitcache.student.experiments.options import SEED, ExperimentOptions
from logitcache.student.experiments.plan import ExperimentPlan
from logitcache.student.experiments.subcommands import Call
from logitcache.student.training.checkpoints import RUN_FILE


class ExperimentRunner:
    """The commands of an experiment, one after the other, those left out whose work is done."""

    def __init__(
        self, options: ExperimentOptions, made: ExperimentPlan, call: Call, stop: Stop, say: Callable[[str], None]
    ):
        self.options, self.plan, self.call, self.stop, self.say = options, made, call, stop, say
        self.made, self.stopped = 0, None
        self.failed: list[LogitcacheError] = []

    def all(self) -> None:
        """A seed after the other, so that a stop leaves whole sets of variants; ends early where a signal came."""
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
        yield from self._measurements(BEFORE, SEED, self.options.student)
        for seed in range(self.options.seeds):
            for variant in self.plan.variants:
                yield lambda variant=variant, seed=seed: self._train(variant, seed)
                yield from self._measurements(variant, seed, str(self.options.place(variant, seed)))

    def _measurements(self, variant: Variant | str, seed: int, student: str) -> Iterator[Callable[[], None]]:
        if self.plan.evaluation is not None:
            yield lambda: self._evaluate(variant, seed, student)
        if self.plan.prompts is not None:
            yield lambda: self._answer(variant, seed, student)

    def _run(self, what: str, arguments: list[str]) -> str | None:
        """What a command printed; None where a signal ended it."""
        log = self.options.out / LOGS / (what.replace(" ", "-").replace(":", "-").replace("/", "-") + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.made += 1
        code, printed = self.call(arguments, log, self.stop)
        self.stopped = subcommands.check(code, what, log)
        if self.stopped:
            return None
        self.say(what)
        return printed

    def _crop(self, variant: Variant) -> None:
        options, out = self.options, self.options.crop(variant)
        assert variant.crop
        assert options.teacher
        if self._cropped(variant):
            return
        engine = options.answers.get("engine_args", {})
        identity = self.plan.cache.identity
        self._run(
            f"crop {variant.crop}",
            subcommands.crop(options.cache, identity, options.teacher, variant.crop, out, engine),
        )

    def _cropped(self, variant: Variant) -> bool:
        """Raises: IdentityError for a crop that another teacher read."""
        wanted, out = self.plan.cache, self.options.crop(variant)
        try:
            cache = Cache.open(out)
        except NotACacheError:  # not begun
            return False
        if (found := cache.identity.teacher_revision) != wanted.identity.teacher_revision:
            raise IdentityError(
                f"{out} was read by a teacher @ {found}, and {self.options.cache} was made @ "
                f"{wanted.identity.teacher_revision}; remove {out} and give `teacher` the one that made the cache"
            )
        return len(cache) >= len(wanted)

    def _train(self, variant: Variant, seed: int) -> None:
        options, place = self.options, self.options.place(variant, seed)
        if finished(place, variant) or (variant.crop and not self._cropped(variant)):
            return
        if not place.exists():  # what was measured of an earlier run there is not this one's
            for what in ("evaluation", "accuracy"):
                _beside(place, what).unlink(missing_ok=True)
            shutil.rmtree(_answers(place), ignore_errors=True)
        settings = {"seed": seed, **options.shared, **self.plan.settings(variant)}
        cache = options.crop(variant) if variant.crop else options.cache
        self._run(f"train {_name(variant, seed)}", subcommands.train(cache, options.student, place, settings))

    def _evaluate(self, variant: Variant | str, seed: int, student: str) -> None:
        assert self.plan.evaluation is not None
        file = _beside(self.options.place(variant, seed), "evaluation")
        asked = _asked_of_teacher(self.plan, student)
        if _there(file, asked) or not _exists(variant, student):
            return
        printed = self._run(
            f"evaluate {_name(variant, seed)}", subcommands.evaluate(self.options.cache, student, self.plan.evaluation)
        )
        if printed is not None:
            publish_json(file, {"asked": asked, "found": json.loads(printed)})

    def _answer(self, variant: Variant | str, seed: int, student: str) -> None:
        options, place = self.options, self.options.place(variant, seed)
        assert options.prompts
        assert self.plan.prompts
        file, out, asked = _beside(place, "accuracy"), _answers(place), _asked_of_answers(options, self.plan, student)
        if _there(file, asked) or not _exists(variant, student):
            return
        arguments = subcommands.answer(student, options.prompts, out, _of_answers(options))
        if self._run(f"answers of {_name(variant, seed)}", arguments) is None:
            return
        found = read_json(out / RESULTS)
        if found["prompts_digest"] != asked["prompts"]:
            raise PromptsError(f"{options.prompts} has changed since this call began; run the same command again")
        groups = _by_group(options, self.plan.prompts, out)
        publish_json(file, {"asked": asked, "found": found["budgets"], "groups": groups})


def _asked_of_teacher(made: ExperimentPlan, student: str) -> dict[str, Any]:
    """All that an evaluation depends on."""
    return {"student": _weights(student), **(made.evaluation or {})}


def _asked_of_answers(options: ExperimentOptions, made: ExperimentPlan, student: str) -> dict[str, Any]:
    """All that answers depend on, as JSON has it."""
    assert made.prompts
    own = {"student": _weights(student), "prompts": prompts_digest(made.prompts), "by": options.by}
    return json.loads(json.dumps(own | _of_answers(options)))


def _of_answers(options: ExperimentOptions) -> dict[str, Any]:
    return {"budgets": options.budgets, "verifier": options.verifier, **options.answers}


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f"{place.name}-{what}.json")


def _answers(place: Path) -> Path:
    return place.with_name(place.name + "-answers")


def finished(place: Path, variant: Variant) -> dict[str, Any] | None:
    """run.json of a variant's run that is finished.

    Raises: IdentityError for one that a variant of that name made when it meant something else.
    """
    try:
        found = json.loads((place / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None
    if found.get("status") != "finished":
        return None
    view = View(variant.view, variant.sections)
    wanted = {"view": str(view), "sections": list(view.sections), **variant.set}
    if difference := first_difference(found, wanted):
        name, was, here = difference
        raise IdentityError(
            f"{place} was made with {name} = {was!r}, and variant {variant.name} has {here!r}; remove it, or give `out` a new "
            "directory"
        )
    return found


def _exists(variant: Variant | str, student: str) -> bool:
    """Whether there is something to measure: the student as it was given, or a run that came to its end."""
    return not isinstance(variant, Variant) or finished(Path(student), variant) is not None


def _name(variant: Variant | str, seed: int) -> str:
    return f"{variant.name} seed {seed}" if isinstance(variant, Variant) else variant


def _there(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured, where it was asked for just so."""
    if not file.exists():
        return None
    found = read_json(file)
    return found if found["asked"] == asked else None


def _weights(student: str) -> str:
    """Changes where a run was made again; a student that is no run goes by its name."""
    record = Path(student) / RUN_FILE
    return hashlib.blake2b(record.read_bytes()).hexdigest() if record.exists() else student


def _by_group(options: ExperimentOptions, prompts: PromptSet, out: Path) -> dict[str, Any]:
    """Accuracy and length by a column of the prompts, as `measure` has them of all."""
    groups: dict[str, list[str]] = {}
    for prompt in prompts:
        if options.by in prompt.metadata:
            groups.setdefault(str(prompt.metadata[options.by]), []).append(prompt.id)
    if len(groups) < 2:
        return {}
    answers, samples = AnswerFile(out / ANSWERS).answers, options.answers.get("samples", 1)
    found: dict[str, Any] = {}
    for name, ids in groups.items():
        for budget in dict.fromkeys(map(Budget.parse, options.budgets)):
            natural = [answers[Key(i, sample, None)] for i in ids for sample in range(samples)]
            chosen = [answers[a.key._replace(cut=budget.cut(a.reasoning))] for a in natural]
            accuracy, ci = pass_at_1(np.array([a.correct is True for a in chosen]).reshape(-1, samples))
            lengths = {"reasoning_tokens": float(np.mean([a.reasoning for a in chosen]))}
            found.setdefault(name, {})[str(budget)] = {"accuracy": accuracy, "ci": ci, "prompts": len(ids), **lengths}
    return found


def measured(
    options: ExperimentOptions, made: ExperimentPlan, place: Path, student: str, own: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The evaluation, the accuracy by budget, and the same by group; {} for what is not there.

    Args:
        own: what the run itself found, which is the evaluation where variants share none.
    """
    if made.evaluation is not None:
        found = _there(_beside(place, "evaluation"), _asked_of_teacher(made, student))
        own = found and found["found"]
    answers = None
    if made.prompts is not None:
        answers = _there(_beside(place, "accuracy"), _asked_of_answers(options, made, student))
    return own or {}, (answers or {}).get("found", {}), (answers or {}).get("groups", {})
