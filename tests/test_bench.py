"""The benchmarks run, and what they print can be read; what they find is theirs to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.cache import Cache

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def run(name: str, *options: str) -> list[dict]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_thousand_traces_are_opened_listed_and_read_side_by_side(tmp_path: Path) -> None:
    ours, theirs = run("bench_cache", "--dir", str(tmp_path), "--shards", "4", "--traces", "50", "--no-large")
    assert (ours["case"], theirs["case"]) == ("logitcache", "pyarrow.dataset")
    for case in (ours, theirs):
        assert case["traces"] == 200
        assert 0 < case["read_us_median"] <= case["read_us_p95"]
        assert case["imports_mb"] <= case["peak_mb"]
    assert ours["mappings"] >= 4

    cache = Cache.open(tmp_path / "4x50")
    assert len(set(cache.trace_ids)) == len(cache) == 200, "shards share their bytes and no id"


def test_rows_in_flight_are_counted_by_the_entry(embedded_teacher: Path) -> None:
    ours, vllm = run("bench_generate", "--memory", "--quick", "--teacher", str(embedded_teacher))
    assert ours["entries"] == 16 * 4096 * 65
    assert 8 <= ours["bytes_per_entry"] < vllm["bytes_per_entry"] / 3
    assert ours["peak_mb"] >= ours["held_mb"]


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_plain_vllm_and_generate_make_as_many_tokens_of_the_same_prompts(embedded_teacher: Path) -> None:
    plain, ours = run("bench_generate", "--quick", "--teacher", str(embedded_teacher))
    assert plain["tokens"] == ours["tokens"] == 16 * 16
    assert plain["of_plain_rounds"] == [1.0]
    assert ours["k"] == 64
    assert ours["of_plain"] == pytest.approx(ours["tokens_per_s"] / plain["tokens_per_s"])
