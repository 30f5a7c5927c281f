"""What an experiment is asked, and all that can be known, and refused, before anything of it is made."""

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
from logitcache.sections import Markers
from logitcache.student.experiments.catalog import Experiment, Facts, Variant, experiment
from logitcache.student.experiments.options import ExperimentOptions

OF_VARIANT = ("cache", "student", "out", "view", "sections", "seed")  # fields of TrainOptions that no variant shares


@dataclass(frozen=True)
class ExperimentPlan:
    """What an experiment comes to.

    where: the traces that are learnt from. evaluation: options of the held-out evaluation that all variants share, None
    where the one of each run is that already. tokens_per_batch: of whole traces.
    """

    experiment: Experiment
    variants: list[Variant]
    cache: Cache
    where: str | None
    evaluation: dict[str, Any] | None
    prompts: PromptSet | None
    tokens_per_batch: int

    def settings(self, variant: Variant) -> dict[str, Any]:
        """Of TrainOptions, those that the variant does not share. A step on crops has as many traces as one on whole ones."""
        own = {"where": self.where, **variant.set, "view": variant.view, "sections": variant.sections}
        if variant.crop:
            assert variant.kept
            own["tokens_per_batch"] = max(1, round(variant.kept * self.tokens_per_batch))
        return own


def plan(options: ExperimentOptions) -> list[Variant]:
    """The variants, in the order in which they are trained. Nothing is written.

    Raises: InputError, StudentError, PromptsError, CacheError for what cannot be done as asked.
    """
    return prepare(options).variants


def prepare(options: ExperimentOptions) -> ExperimentPlan:
    """As `plan`, with all that was looked up for it."""
    chosen = experiment(options.name)
    if options.seeds < 1:
        raise InputError(f"`seeds` {options.seeds}: give at least 1, and 3 to see the spread")
    if bad := [p for p in options.points or () if not 0 < p <= 1]:
        raise InputError(f"`points` {bad[0]}: a share of the tokens lies in (0, 1]")
    if options.points and not chosen.points:
        raise InputError(f"`points`: the variants of {options.name} are not shares; leave it out")
    if chosen.crops and not options.teacher:
        raise InputError(f"experiment {options.name} has the teacher read parts of traces alone: give `teacher`")
    if options.teacher and not chosen.crops:
        raise InputError(f"`teacher`: experiment {options.name} learns from the cache alone; leave it out")
    cache = Cache.open(options.cache)
    if not len(cache):
        raise NotACacheError(f"{options.cache} holds no trace yet; `logitcache generate` some")
    identity = cache.identity
    drawn = identity.not_drawn is None
    points = tuple(dict.fromkeys(options.points)) if options.points else None
    variants = chosen.variants(
        Facts(identity.prompt_logits, identity.top_k, drawn and not identity.prompt_logits, points)
    )
    _check_shared(options, variants)
    where = options.shared.get("where")
    if chosen.where and _has(cache, chosen.where):
        where = f"{where} and {chosen.where}" if where else chosen.where
    evaluation = _evaluation(options, chosen, cache, where)
    tokens_per_batch = _check_variants(options, variants, cache, where)
    if chosen.crops:
        _check_crops(options, cache, where)
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the report has plots: pip install 'logitcache[plots]'")
    return ExperimentPlan(chosen, variants, cache, where, evaluation, _prompts(options), tokens_per_batch)


def _check_shared(options: ExperimentOptions, variants: list[Variant]) -> None:
    from logitcache.student.training.options import TrainOptions

    good = [f.name for f in fields(TrainOptions) if f.name not in OF_VARIANT]
    for name in options.shared:
        if name not in good:
            near = get_close_matches(name, good, n=1, cutoff=0.0)[0]
            raise StudentError(f"{name!r} is no training option that variants can share: did you mean {near!r}?")
        if any(name in variant.set for variant in variants):
            raise StudentError(f"{name} is what the variants of {options.name} vary: leave it out")
    for name in options.shared.get("set", {}):
        if name in ("seed", "data_seed") or any(name in variant.set for variant in variants):
            raise StudentError(f"`set` {name}: it is what the runs of {options.name} vary; leave it out")
        if name in good:
            raise StudentError(f"`set` {name}: it has an option of its own; give `{name}`")


def _check_variants(options: ExperimentOptions, variants: list[Variant], cache: Cache, where: str | None) -> int:
    """Returns: tokens a batch. Raises: what training would, for the shared settings and for each variant's view."""
    from logitcache.student.data.dataset import matching
    from logitcache.student.data.sampler import split
    from logitcache.student.data.views import View
    from logitcache.student.training.options import TrainOptions, configure

    config = configure(TrainOptions(options.cache, options.student, options.out, **options.shared))
    for variant in variants:
        view = View(variant.view, variant.sections)
        if not variant.crop:
            view.check(cache.identity, str(options.cache))
    taught = split(cache.prompt_ids, options.held_out)[0]
    if where and not matching(cache, where)[taught].any():
        raise StudentError(f"{options.cache}: no trace is left to learn from where {where}")
    if str(options.student).startswith(("/", ".", "~")) and not Path(options.student).exists():
        raise StudentError(f"{options.student} does not exist: give `student` a model folder or a hub id")
    return config.tokens_per_batch


def _check_crops(options: ExperimentOptions, cache: Cache, where: str | None) -> None:
    """Raises: InputError for conditions that a crop would meet otherwise than its trace, and for another teacher."""
    counted = [c.name for c in Filter.parse(where).clauses if c.name in LENGTHS] if where else []
    if counted:
        raise InputError(
            f"`where` {where}: {counted[0]} is another number in a crop than in its trace; `logitcache slice` the cache "
            "by it first"
        )
    teacher, identity = Path(options.teacher or ""), cache.identity
    if teacher.is_dir() and (found := weights_fingerprint(teacher)) != identity.teacher_revision:
        raise IdentityError(
            f"{options.cache} was made by {identity.teacher} @ {identity.teacher_revision}, and `teacher` {teacher} is "
            f"@ {found}; give the teacher that made it"
        )


def _has(cache: Cache, where: str) -> bool:
    """Whether some trace has the column that a condition on metadata is about, with that value."""
    from logitcache.student.data.dataset import matching

    try:
        return bool(matching(cache, where).any())
    except InputError:
        return False


def _evaluation(
    options: ExperimentOptions, chosen: Experiment, cache: Cache, where: str | None
) -> dict[str, Any] | None:
    """Variants on crops are evaluated on the whole traces that the others hold out; those of one kind on that kind."""
    from logitcache.student.data.dataset import matching
    from logitcache.student.data.sampler import split

    shared = {name: options.shared[name] for name in ("dtype", "tokens_per_batch") if name in options.shared}
    if chosen.crops:
        return {"held_out": options.held_out, **shared}
    if where is None or not chosen.where:
        return None
    if not matching(cache, where)[split(cache.prompt_ids, options.held_out)[1]].any():
        raise StudentError(f"{options.cache}: no held-out trace is {where}; hold out more than {options.held_out}")
    return {"held_out": options.held_out, "where": where, **shared}


def _prompts(options: ExperimentOptions) -> PromptSet | None:
    if options.prompts is None:
        return None
    if options.shared.get("lora_rank") is not None:
        raise InputError(
            "`prompts` needs whole models, and variants with `lora_rank` leave adapters: leave one of the two out"
        )
    asked = ("prompts", "student", "out", "budgets", "verifier")
    good = [f.name for f in fields(AccuracyOptions) if f.name not in asked]
    for name in options.answers:
        if name not in good:
            near = get_close_matches(name, good, n=1, cutoff=0.0)[0]
            raise InputError(f"{name!r} is no option of the answers: did you mean {near!r}?")
    given = dict(options.answers)
    if markers := given.pop("reasoning_markers", None):
        given["reasoning_markers"] = Markers.parse(markers)
    AccuracyOptions(
        prompts=options.prompts,
        student=options.student,
        out=options.out,
        budgets=options.budgets,
        verifier=options.verifier,
        **given,
    )
    found = sources.load(options.prompts, options.answers.get("limit"))
    for prompt in found:
        if options.verifier != "gym" and not (prompt.answer or "").strip():
            raise PromptsError(f"{options.prompts}: prompt {prompt.id!r} has no `answer` to judge by; give it one")
    return found
