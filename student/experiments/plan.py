"""The plan of an experiment: its options are checked, and refused if need be, before anything runs."""

import importlib.util
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from logitcache import prompts as sources
from logitcache.accuracy.options import AccuracyOptions
from logitcache.cache.filters import LENGTHS, Filter
from logitcache.cache.reader import Cache
from logitcache.errors import IdentityError, InputError, NotACacheError, PromptsError, StudentError
from logitcache.identity import weights_fingerprint
from logitcache.prompts import PromptSet
from logitcache.student.experiments.catalog import CacheFacts, Experiment, Variant, get_experiment
from logitcache.student.experiments.options import ExperimentOptions

# Fields of TrainOptions that belong to a single run.
PER_RUN = ("caches", "mix", "student", "out", "view", "sections", "seed")


@dataclass(frozen=True)
class ExperimentPlan:
    """What an experiment will do; everything that can be refused was refused when it was made."""

    experiment: Experiment
    variants: list[Variant]  # in the order in which they are trained
    cache: Cache
    where: str | None  # condition on the training traces
    # Options of `logitcache eval` on held-out traces that are the same for all variants; None: each run's own evaluation
    # after training is that already.
    evaluation: dict[str, Any] | None
    prompts: PromptSet | None
    tokens_per_batch: int  # of whole traces

    def settings(self, variant: Variant) -> dict[str, Any]:
        """The fields of TrainOptions that differ between variants.

        A batch of crops has fewer tokens, so that it holds as many traces as a batch of whole traces.
        """
        own = {"where": self.where, **variant.set, "view": variant.view, "sections": variant.sections}
        if variant.crop:
            assert variant.kept
            own["tokens_per_batch"] = max(1, round(variant.kept * self.tokens_per_batch))
        return own


def plan_experiment(options: ExperimentOptions) -> ExperimentPlan:
    """Checks the options and looks up what the experiment needs. Writes nothing.

    Raises: InputError, StudentError, PromptsError or CacheError for options that cannot work.
    """
    chosen = get_experiment(options.name)
    if options.seeds < 1:
        raise InputError(f"`seeds` {options.seeds}: give at least 1, and 3 to see the spread")
    if bad := [p for p in options.points or () if not 0 < p <= 1]:
        raise InputError(f"`points` {bad[0]}: give shares of the tokens above 0 and up to 1")
    if options.points and not chosen.points:
        raise InputError(f"`points`: the variants of {options.name} are not shares; omit it")
    if chosen.crops and not options.teacher:
        raise InputError(f"experiment {options.name} needs `teacher`, which scores parts of the traces on their own")
    if options.teacher and not chosen.crops:
        raise InputError(f"`teacher`: experiment {options.name} uses only the cache; omit it")
    cache = Cache.open(options.cache)
    if not len(cache):
        raise NotACacheError(f"{options.cache} has no traces yet; run `logitcache generate` first")
    identity = cache.identity
    sampled = identity.sampled_otherwise is None and not identity.prompt_logits
    points = tuple(dict.fromkeys(options.points)) if options.points else None
    variants = chosen.variants(CacheFacts(identity.prompt_logits, identity.top_k, sampled, points))
    _check_shared(options, variants)
    where = options.shared.get("where")
    if chosen.where and _has(cache, chosen.where):
        where = f"{where} and {chosen.where}" if where else chosen.where
    evaluation = _evaluation(options, chosen, cache, where)
    tokens_per_batch = _check_variants(options, variants, cache, where)
    if chosen.crops:
        _check_crops(options, cache, where)
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the report's plots need matplotlib: pip install 'logitcache[plots]'")
    return ExperimentPlan(chosen, variants, cache, where, evaluation, _prompts(options), tokens_per_batch)


def _check_shared(options: ExperimentOptions, variants: list[Variant]) -> None:
    from logitcache.student.training.options import TrainOptions

    good = [f.name for f in fields(TrainOptions) if f.name not in PER_RUN]
    for name in options.shared:
        if name not in good:
            near = get_close_matches(name, good, n=1, cutoff=0.0)[0]
            raise StudentError(f"unknown training option {name!r}: did you mean {near!r}?")
        if any(name in variant.set for variant in variants):
            raise StudentError(f"`{name}`: the variants of {options.name} set it; omit it")
    for name in options.shared.get("set", {}):
        if name in ("seed", "data_seed") or any(name in variant.set for variant in variants):
            raise StudentError(f"`set` {name}: the runs of {options.name} set it; omit it")
        if name in good:
            raise StudentError(f"`set` {name}: give `{name}` instead, which is an option of its own")


def _check_variants(options: ExperimentOptions, variants: list[Variant], cache: Cache, where: str | None) -> int:
    """Checks what training would: the shared settings, and each variant's view. Returns: tokens per batch."""
    from logitcache.student.data.dataset import matching
    from logitcache.student.data.held_out import split
    from logitcache.student.data.views import View
    from logitcache.student.training.config import configure
    from logitcache.student.training.options import TrainOptions

    config = configure(TrainOptions(caches=[options.cache], student=options.student, out=options.out, **options.shared))
    for variant in variants:
        view = View(variant.view, variant.sections)
        if not variant.crop:
            view.check(cache.identity, str(options.cache))
    training = split(cache.prompt_ids, options.held_out)[0]
    if where and not matching(cache, where)[training].any():
        raise StudentError(f"{options.cache}: no training trace matches `where` {where}")
    if str(options.student).startswith(("/", ".", "~")) and not Path(options.student).exists():
        raise StudentError(f"`student` {options.student} does not exist: give a model folder or a hub id")
    return config.tokens_per_batch


def _check_crops(options: ExperimentOptions, cache: Cache, where: str | None) -> None:
    """Raises: InputError for a condition on lengths, which a crop changes; IdentityError for another teacher."""
    counted = [c.name for c in Filter.parse(where).clauses if c.name in LENGTHS] if where else []
    if counted:
        raise InputError(
            f"`where` {where}: {counted[0]} would count the tokens of the crops; cut the cache with `logitcache slice "
            "--where` first"
        )
    teacher, identity = Path(options.teacher or ""), cache.identity
    if teacher.is_dir() and (found := weights_fingerprint(teacher)) != identity.teacher_revision:
        raise IdentityError(
            f"{options.cache} was made by {identity.teacher} @ {identity.teacher_revision}, but `teacher` {teacher} is "
            f"@ {found}; give the teacher that made the cache"
        )


def _has(cache: Cache, where: str) -> bool:
    """Whether some trace has the column of a condition on metadata, and matches it."""
    from logitcache.student.data.dataset import matching

    try:
        return bool(matching(cache, where).any())
    except InputError:
        return False


def _evaluation(
    options: ExperimentOptions, chosen: Experiment, cache: Cache, where: str | None
) -> dict[str, Any] | None:
    """Crops are evaluated on whole held-out traces; an experiment on traces of one kind, on held-out traces of that kind."""
    from logitcache.student.data.dataset import matching
    from logitcache.student.data.held_out import split

    shared = {name: options.shared[name] for name in ("dtype", "tokens_per_batch") if name in options.shared}
    if chosen.crops:
        return {"held_out": options.held_out, **shared}
    if where is None or not chosen.where:
        return None
    if not matching(cache, where)[split(cache.prompt_ids, options.held_out)[1]].any():
        raise StudentError(
            f"{options.cache}: no held-out trace matches {where}; raise `held_out` above {options.held_out}"
        )
    return {"held_out": options.held_out, "where": where, **shared}


def _prompts(options: ExperimentOptions) -> PromptSet | None:
    if options.prompts is None:
        return None
    if options.shared.get("lora_rank") is not None:
        raise InputError("`prompts` needs whole models, but with `lora_rank` runs are adapters: omit one of the two")
    asked = ("prompts", "student", "out", "budgets", "verifier")
    good = [f.name for f in fields(AccuracyOptions) if f.name not in asked]
    for name in options.answers:
        if name not in good:
            near = get_close_matches(name, good, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown option of the answers {name!r}: did you mean {near!r}?")
    AccuracyOptions(
        prompts=options.prompts,
        student=options.student,
        out=options.out,
        budgets=options.budgets,
        verifier=options.verifier,
        **options.answers,
    )
    found = sources.load(options.prompts, options.answers.get("limit"), options.answers.get("columns"))
    for prompt in found:
        if options.verifier != "gym" and not (prompt.answer or "").strip():
            raise PromptsError(f"{options.prompts}: prompt {prompt.id!r} has no gold `answer`; add one")
    return found
