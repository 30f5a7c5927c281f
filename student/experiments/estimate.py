"""Estimates what an experiment's runs will cost, before any is started."""

from dataclasses import dataclass, replace

import numpy as np

from logitcache.capture.score import Crop
from logitcache.student.experiments.catalog import Variant
from logitcache.student.experiments.options import ExperimentOptions
from logitcache.student.experiments.plan import plan_experiment
from logitcache.student.experiments.runner import finished_run
from logitcache.student.training.flops import FlopCounts, count_flops

SAMPLE = 200  # traces that an estimate is made from


@dataclass(frozen=True, kw_only=True)
class VariantEstimate:
    """What one run of a variant will cost."""

    variant: str
    runs: int  # of all seeds
    done: int  # of these, finished
    input_tokens: int  # without padding
    supervised_tokens: int
    flops: float | None  # by formula; None: not known for LoRA adapters
    seconds: float | None  # mean of the finished runs, else from FLOPs at their speed; None: no run is finished
    teacher_tokens: int  # that the teacher has yet to score for the variant's crops


def estimate(options: ExperimentOptions) -> list[VariantEstimate]:
    """Estimates the cost of each variant from at most SAMPLE training traces. Writes nothing and loads no weights.

    Raises: as `plan_experiment`.
    """
    from logitcache.student.data.dataset import matching
    from logitcache.student.data.held_out import split
    from logitcache.student.data.views import UNSUPERVISED, View
    from logitcache.student.training.config import configure
    from logitcache.student.training.options import TrainOptions

    plan = plan_experiment(options)
    cache, variants, prompt_rows = plan.cache, plan.variants, plan.cache.identity.prompt_logits
    config = configure(TrainOptions(caches=[options.cache], student=options.student, out=options.out, **options.shared))
    chosen = split(cache.prompt_ids, options.held_out)[0]
    chosen = chosen[matching(cache, plan.where)[chosen]] if plan.where else chosen
    sample = chosen[np.linspace(0, len(chosen) - 1, min(SAMPLE, len(chosen))).astype(int)]
    counts, views = _flop_counts(options), [View(variant.view, variant.sections) for variant in variants]
    sums = np.zeros((len(variants), 3))  # input tokens, supervised tokens, FLOPs
    for trace in (cache[int(i)] for i in sample):
        for variant, view, total in zip(variants, views, sums, strict=True):
            if variant.crop:
                span = Crop.parse(variant.crop).span(len(trace.token_ids))
                first = max(1, 0 if prompt_rows else trace.sections.prompt_end - span.start)
                inputs, supervised = span.stop - span.start - 1, int((~trace.is_context[span][first:]).sum())
            else:
                supervised_trace = view(trace)
                inputs, supervised = (
                    len(supervised_trace.input_ids),
                    int((supervised_trace.target != UNSUPERVISED).sum()),
                )
            total += inputs, supervised, counts.total([(1, inputs)], supervised) if counts else 0
    if config.max_steps > 0:
        times = config.max_steps * config.tokens_per_step / int(cache.lengths[sample].sum())
    else:
        times = config.num_train_epochs * len(chosen) / len(sample)
    estimates = []
    for variant, (inputs, supervised, flops) in zip(variants, sums * times, strict=True):
        places = [options.place(variant, seed) for seed in range(options.seeds)]
        runs = [found for place in places if (found := finished_run(place, variant))]
        estimates.append(
            VariantEstimate(
                variant=variant.name,
                runs=options.seeds,
                done=len(runs),
                input_tokens=round(inputs),
                supervised_tokens=round(supervised),
                flops=float(flops) if counts else None,
                seconds=float(np.mean([found["seconds"] for found in runs])) if runs else None,
                teacher_tokens=_teacher_tokens(options, variant, cache.lengths),
            )
        )
    return _with_seconds(estimates)


def _flop_counts(options: ExperimentOptions) -> FlopCounts | None:
    """From the student's config; None for a LoRA adapter, whose training multiplies other matrices."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from logitcache.errors import StudentError, first_line
    from logitcache.student.model.load import quiet
    from logitcache.student.model.lora import adapter_base

    if options.shared.get("lora_rank") is not None:
        return None
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(adapter_base(options.student) or options.student)
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise StudentError(
            f"`student` {options.student} is not a causal language model that transformers can load: {first_line(e)}"
        ) from e
    if options.shared.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()
    return count_flops(model, training=True)


def _teacher_tokens(options: ExperimentOptions, variant: Variant, lengths: np.ndarray) -> int:
    if not variant.crop or options.crop(variant).exists():
        return 0
    spans = (Crop.parse(variant.crop).span(int(length)) for length in lengths)
    return sum(span.stop - span.start for span in spans)


def _with_seconds(estimates: list[VariantEstimate]) -> list[VariantEstimate]:
    """Estimates the seconds of variants without a finished run from the FLOPs per second of the others."""
    known = [(each.seconds, each.flops) for each in estimates if each.seconds is not None and each.flops]
    if not known:
        return estimates
    pace = sum(seconds for seconds, _ in known) / sum(flops for _, flops in known)
    return [
        replace(each, seconds=pace * each.flops) if each.seconds is None and each.flops is not None else each
        for each in estimates
    ]
