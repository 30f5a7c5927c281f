"""What an experiment's runs will cost, before any is made."""

from typing import Any

import numpy as np

from logitcache.capture.score import Crop
from logitcache.student.experiments.catalog import Arm
from logitcache.student.experiments.options import ExperimentOptions
from logitcache.student.experiments.plan import prepare
from logitcache.student.experiments.runner import finished
from logitcache.student.training.flops import Work, work

SAMPLE = 200  # traces that an estimate is made from


def estimate(options: ExperimentOptions, arms: list[Arm]) -> list[dict[str, Any]]:
    """What one run of each arm comes to, by its view of at most SAMPLE training traces. Writes nothing, loads no weights.

    Returns: a dict an arm: "arm", "about", "runs" (of all seeds), "done" (of them), "tokens_fed", "tokens_taught" (of
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
    needed, views = _work(options), [View(arm.view, arm.sections) for arm in arms]
    sums = np.zeros((len(arms), 3))  # fed, taught, FLOPs
    for trace in (cache[int(i)] for i in sample):
        for arm, view, total in zip(arms, views, sums, strict=True):
            if arm.crop:
                span = Crop.parse(arm.crop).span(len(trace.token_ids))
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
    for arm, (fed, taught, flops) in zip(arms, sums * times, strict=True):
        runs = [found for seed in range(options.seeds) if (found := finished(options.place(arm, seed), arm))]
        table.append(
            {
                "arm": arm.name,
                "about": arm.about,
                "runs": options.seeds,
                "done": len(runs),
                "tokens_fed": round(fed),
                "tokens_taught": round(taught),
                "flops": float(flops) if needed else None,
                "seconds": float(np.mean([found["seconds"] for found in runs])) if runs else None,
                "scored": _to_score(options, arm, cache.lengths),
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


def _to_score(options: ExperimentOptions, arm: Arm, lengths: np.ndarray) -> int:
    if not arm.crop or options.crop(arm).exists():
        return 0
    spans = (Crop.parse(arm.crop).span(int(length)) for length in lengths)
    return sum(span.stop - span.start for span in spans)


def _timed(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the seconds of arms that have no run yet, by FLOPs."""
    known = [row for row in table if row["seconds"] is not None and row["flops"]]
    if known:
        pace = sum(row["seconds"] for row in known) / sum(row["flops"] for row in known)
        for row in table:
            if row["seconds"] is None and row["flops"] is not None:
                row["seconds"] = pace * row["flops"]
    return table
