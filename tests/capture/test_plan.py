"""logitcache.capture.plan: the arithmetic from a few traces to a whole job."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from logitcache.cache import shard
from logitcache.cache.reader import Cache
from logitcache.capture.plan import Estimate, JobEstimate, PlanOptions, extrapolate
from logitcache.commands.text_capture import describe_estimate
from logitcache.errors import InputError
from logitcache.trace import Trace
from tests import tiny


def plan(cache: Cache, **options) -> JobEstimate:
    return extrapolate(cache, **{"prompts": 1000, "samples": 2, "tokens_per_s": 100.0, "max_tokens": 64} | options)


def written(trace: Trace) -> int:
    return len(trace.token_ids) - trace.sections.prompt_end


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return tiny.write_cache(tmp_path_factory.mktemp("plan") / "cache")


def test_the_job_is_the_sample_many_times_over(cache):
    job = plan(cache, workers=4)
    tokens = np.mean([written(trace) for trace in cache])
    on_disk = sum(path.stat().st_size for path in (cache.path / shard.DIRECTORY).iterdir())
    assert (job.traces, job.sample_traces, job.sample_prompts) == (2000, 24, 12)
    assert job.tokens_per_trace.mean == pytest.approx(tokens)
    assert job.disk_bytes.mean == pytest.approx(on_disk / 24 * 2000)
    assert job.shard_bytes == pytest.approx(on_disk / 24 * 64)
    assert job.hours.mean == pytest.approx(tokens * 2000 / (100 * 4) / 3600)
    assert job.bytes_per_token == pytest.approx(on_disk / cache.info().rows)
    assert job.block_bytes_per_token == pytest.approx(cache.info().block_bytes_per_row)
    for estimate in (job.tokens_per_trace, job.disk_bytes, job.hours):
        assert 0 < estimate.low < estimate.mean < estimate.high
    assert job == plan(cache, workers=4)


def test_samples_of_one_prompt_are_no_more_prompts(tmp_path):
    lengths = np.random.default_rng(0).integers(12, 60, 10)
    made = [tiny.traces(1, 1, (n, n + 1), seed=i)[0] for i, n in enumerate(np.repeat(lengths, 4))]
    made = [replace(t, trace_id=f"{i:032x}", prompt_id=f"p{i // 4}", sample_index=i % 4) for i, t in enumerate(made)]
    apart = [replace(t, prompt_id=t.trace_id) for t in made]
    together = plan(tiny.write_cache(tmp_path / "together", made)).tokens_per_trace
    separate = plan(tiny.write_cache(tmp_path / "separate", apart)).tokens_per_trace
    assert together.mean == separate.mean
    assert together.high - together.low > 1.5 * (separate.high - separate.low)


def test_a_range_never_exceeds_the_limit_of_a_completion(tmp_path):
    made = [replace(t, prompt_id=f"p{i}") for i, t in enumerate(tiny.traces(3, 3, (12, 80), seed=3))]
    limit = max(map(written, made))
    job = plan(tiny.write_cache(tmp_path / "cache", made, shards=1), max_tokens=limit)
    assert job.tokens_per_trace.high <= limit


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "least"), [(8, 0.85), (32, 0.9)])
def test_the_range_of_a_sample_holds_the_truth_about_as_often_as_promised(monkeypatch, prompts, least):
    from logitcache.capture import plan as module

    monkeypatch.setattr(module, "_DRAWS", 400)
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        values = np.repeat(rng.lognormal(0, 0.5, prompts), 2)
        estimate = module._per_trace(values, np.repeat(np.arange(prompts), 2))
        held += estimate.low <= np.exp(0.125) <= estimate.high
    assert least <= held / 300 <= 1


def test_traces_cut_at_the_limit_suggest_a_larger_one(cache, tmp_path):
    assert not any("`max_tokens`" in warning for warning in plan(cache).warnings)
    made = [replace(t, finish_reason="length" if i % 4 else "stop") for i, t in enumerate(cache)]
    job = plan(tiny.write_cache(tmp_path / "cut", made))
    assert any("75% of the traces were cut at 64 tokens" in w and "`max_tokens`" in w for w in job.warnings)


def test_a_sample_that_is_too_small_asks_for_more(cache, tmp_path):
    assert not any("`try_prompts`" in warning for warning in plan(cache).warnings)
    one = plan(tiny.write_cache(tmp_path / "one", tiny.traces(4, 1), shards=1))
    assert one.tokens_per_trace.low == one.tokens_per_trace.mean == one.tokens_per_trace.high
    assert any("a sample of 1 prompt says" in w and "`try_prompts`" in w for w in one.warnings)
    made = [t for i, n in enumerate((10, 10, 100)) for t in tiny.traces(1, 1, (n, n + 1), seed=i)]
    made = [replace(t, trace_id=f"{i:032x}", prompt_id=f"p{i}") for i, t in enumerate(made)]
    wide = plan(tiny.write_cache(tmp_path / "wide", made, shards=1), max_tokens=1000)
    assert any("3 prompts says little about 2,000 traces" in w for w in wide.warnings)


def test_a_unit_size_that_makes_poor_shards_is_met_with_a_better_one(cache):
    warnings = plan(cache, unit_size=2).warnings
    assert any("shards of" in w and re.search(r"`unit_size` (1024|2048|4096) makes them about", w) for w in warnings)
    huge = plan(cache, prompts=10**9, unit_size=10**8, unit_bytes=10**10).warnings
    assert any("hard to hold in memory" in w and "`unit_bytes`" in w for w in huge)
    assert not any("memory" in w for w in plan(cache, prompts=10**9, unit_size=10**8).warnings)
    assert not any("`unit_size`" in w for w in plan(cache, prompts=10, samples=1).warnings)  # one shard, however small


def test_a_sample_without_a_table_of_ids_warns_that_it_takes_more_than_the_job(cache, tmp_path):
    assert any("14% fewer" in w for w in plan(cache, unit_size=1024).warnings)
    assert not any("fewer" in w for w in plan(cache, unit_size=2).warnings)  # nor would the job's shards have one
    full = tiny.write_cache(tmp_path / "full", tiny.traces(200, 20), shards=1)
    assert full.shard(0).table is not None
    assert not any("fewer" in w for w in plan(full, unit_size=1024).warnings)


def test_the_text_is_one_aligned_screen_in_units_of_people():
    job = JobEstimate(
        12_500, 2, 25_000, 8, 16, Estimate(2143.2, 1801, 2604), 118.3, 101.2, Estimate(6.12e9, 5.2e9, 7.31e9), 15.7e6,
        8123.4, 4, Estimate(130.2, 111, 155), ["take care"],
    )  # fmt: skip
    lines = describe_estimate(job).splitlines()
    assert lines == [
        "job     25,000 traces of 12,500 prompts",
        "sample  16 traces of 8 prompts; ranges are 95% intervals",
        "tokens  2,143 (1,801 to 2,604) per trace, 53.6 million (45.0 to 65.1) in all",
        "size    118 bytes per row, 101 of them top-k; 15.7 MB per shard",
        "disk    6.12 GB (5.20 to 7.31)",
        "speed   8,123 tokens/s, each of 4 workers; a long run is faster, because a small sample leaves",
        "        the engine partly idle at its end",
        "time    5.42 days (4.62 to 6.46), without loading the teacher; shares differ in length, so the last worker may take "
        "longer: `--ray` shares as they go",
        "warning: take care",
    ]


def test_a_plan_is_a_json_object(cache):
    fields = json.loads(json.dumps(asdict(plan(cache))))
    assert set(fields["hours"]) == {"mean", "low", "high"}
    assert fields["traces"] == 2000


def test_what_cannot_be_planned_is_refused(cache, tmp_path: Path):
    for options in ({"prompts": 0}, {"workers": 0}, {"tokens_per_s": 0.0}, {"tokens_per_s": float("nan")}):
        with pytest.raises(InputError, match="above 0"):
            plan(cache, **options)
    tiny.write_cache(tmp_path / "empty", shards=0)
    with pytest.raises(InputError, match="no traces to plan from"):
        plan(Cache.open(tmp_path / "empty"))


def test_engines_of_a_cluster_share_as_workers_do_and_are_called_engines(cache):
    job = plan(cache, workers=8, pulling=True)
    assert "each of 8 engines" in describe_estimate(job)
    assert "--ray" not in describe_estimate(job)
    given = {"prompts": "p.jsonl", "teacher": "t"}
    assert PlanOptions(**given, engines=8).engines == 8
    with pytest.raises(InputError, match="either `workers` or `engines`"):
        PlanOptions(**given, engines=8, workers=2)
