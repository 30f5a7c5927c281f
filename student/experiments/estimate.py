"""What an experiment's runs will cost, before any is made."""

from typing import Any

import numpy as np

from logitcache.capture.score import Crop
from logitcache.student.experiments.catalog import Variant
from logitcache.student.experiments.options import ExperimentOptions
from logitcache.student.experiments.plan import prepare
from logitcache.student.experiments.runner import finished
from logitcache.student.training.flops import Work, work

SAMPLE = 200  # traces that an estimate is made from


def estimate(options: ExperimentOptions, variants: list[Variant]) -> list[dict[str, Any]]:
    """What one run of each variant comes to, by its view of at most SAMPLE training traces. Writes nothing, loads no weights.

    Returns: a dict a variant: "variant", "about", "runs" (of all seeds), "done" (of them), "tokens_fed", "tokens_taught" (of
        lessons, without padding), "flops" (as `cost.work` counts them; None where an adapter learns), "seconds" (mean of
        its finished runs in OUT, else its FLOPs at the speed of all that are finished; None where none is), "scored"
        (tokens that the teacher has yet to read for its crop).
    """
    from logitcache.student.data.dataset import matching
    from logitcache.student.data.sampler import split
    from logitcache.student.data.views import NOT_TAUGHT, View
    from logitcache.student.training.options import TrainOptions, configure

    made = prepare(options)
    cache, prompt_rows = made.cache, made.cache.identity.prompt_logits
    config = configure(TrainOptions(options.cache, options.student, options.out, **options.shared))
    chosen = split(cache.prompt_ids, options.held_out)[0]
    chosen = chosen[matching(cache, made.where)[chosen]] if made.where else chosen
    sample = chosen[np.linspace(0, len(chosen) - 1, min(SAMPLE, len(chosen))).astype(int)]
    needed, views = _work(options), [View(variant.view, variant.sections) for variant in variants]
    sums = np.zeros((len(variants), 3))  # fed, taught, FLOPs
    for trace in (cache[int(i)] for i in sample):
        for variant, view, total in zip(variants, views, sums, strict=True):
            if variant.crop:
                span = Crop.parse(variant.crop).span(len(trace.token_ids))
                first = max(1, 0 if prompt_rows else trace.sections.prompt_end - span.start)
                fed, taught = span.stop - span.start - 1, max(0, span.stop - span.start - first)
            else:
                lesson = view(trace)
                fed, taught = len(lesson.input_ids), int((lesson.target != NOT_TAUGHT).sum())
            total += fed, taught, needed.flops([(1, fed)], taught) if needed else 0
    if config.max_steps > 0:
        times = config.max_steps * config.tokens_per_step / int(cache.lengths[sample].sum())
    else:
        times = config.num_train_epochs * len(chosen) / len(sample)
    table = []
    for variant, (fed, taught, flops) in zip(variants, sums * times, strict=True):
        runs = [found for seed in range(options.seeds) if (found := finished(options.place(variant, seed), variant))]
        table.append(
            {
                "variant": variant.name,
                "about": variant.about,
                "runs": options.seeds,
                "done": len(runs),
                "tokens_fed": round(fed),
                "tokens_taught": round(taught),
                "flops": float(flops) if needed else None,
                "seconds": float(np.mean([found["seconds"] for found in runs])) if runs else None,
                "scored": _to_score(options, variant, cache.lengths),
            }
        )
    return _timed(table)


def _work(options: ExperimentOptions) -> Work | None:
    """Of the student as its config describes it; None with an adapter, where other products are needed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from logitcache.errors import StudentError, first_line
    from logitcache.student.model.load import adapter_base, quiet

    if options.shared.get("lora_rank") is not None:
        return None
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(adapter_base(options.student) or options.student)
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise StudentError(f"{options.student} is no causal model that transformers knows: {first_line(e)}") from e
    if options.shared.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()
    return work(model, training=True)


def _to_score(options: ExperimentOptions, variant: Variant, lengths: np.ndarray) -> int:
    if not variant.crop or options.crop(variant).exists():
        return 0
    spans = (Crop.parse(variant.crop).span(int(length)) for length in lengths)
    return sum(span.stop - span.start for span in spans)


def _timed(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the seconds of variants that have no run yet, by FLOPs."""
    known = [row for row in table if row["seconds"] is not None and row["flops"]]
    if known:
        pace = sum(row["seconds"] for row in known) / sum(row["flops"] for row in known)
        for row in table:
            if row["seconds"] is None and row["flops"] is not None:
                row["seconds"] = pace * row["flops"]
    return table
