"""The benchmarks run, and what they print can be read; what they find is theirs to say."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import divergence_report
from logitcache.cache.reader import Cache
from tests import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(name: str, *options: str) -> list[dict]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_thousand_traces_are_opened_listed_and_read_side_by_side(tmp_path: Path) -> None:
    cases = run("bench_cache", "--dir", str(tmp_path), "--shards", "4", "--traces", "50", "--no-large")
    assert [case["case"] for case in cases] == ["logitcache", "compacted", "pyarrow.dataset"]
    ours = cases[0]
    for case in cases:
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


DIVERGENCE = ["bench_divergence", "--device", "cpu", "--reps", "3", "--case", "24", "16", "500"]


def test_a_head_with_a_divergence_is_measured_saved_and_drawn(tmp_path: Path) -> None:
    into = ["--csv", str(tmp_path / "here.csv")]
    rows = run(*DIVERGENCE, *into, "--case", "8", "32", "500", "--skip", "torch.compile")
    assert [row["N"] for row in rows] == [24] * 4 + [8] * 4
    assert {row["impl"] for row in rows} >= {"logitcache", "torch", "matrix products"}
    for row in rows:
        assert row.keys() >= {"impl", "divergence", "N", "H", "V", "k", "ms_median", "extra_mib", "floor_share"}
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
    run(*DIVERGENCE, *into, "--skip", "torch.compile", "--divergence", "jsd")
    lines = (tmp_path / "here.csv").read_text().splitlines()
    assert len(lines) == 1 + 8 + 4, "runs are appended"

    assert "| logitcache |" in divergence_report.table(tmp_path / "here.csv")
    divergence_report.plot(tmp_path / "here.csv", tmp_path / "here.png")
    assert (tmp_path / "here.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_fails_or_hangs_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from benchmarks import bench_divergence as bench

    made = []

    def broken():
        raise TypeError("got an unexpected keyword argument")

    def missing():
        raise ImportError("No module named 'liger_kernel'")

    def later():
        def step():
            made.append(0)
            if len(made) > 3:
                raise RuntimeError("illegal access\nsecond line")

        return step

    peers = {"broken": broken, "missing": missing, "later": later, "hanging": lambda: lambda: time.sleep(60)}
    ours = bench.implementations
    monkeypatch.setattr(bench, "implementations", lambda p: [*peers.items(), next(ours(p))])
    monkeypatch.setattr(bench, "PATIENCE", 4.0)
    results = bench.run_case(bench.Case(8, 16, 500, k=8, dtype="float32"), "cpu", reps=3)
    assert [result.impl for result in results] == ["logitcache"]
    assert len(results[0].ms) == 3
    said = capsys.readouterr().err
    for line in (
        "broken: skipped, TypeError: got an unexpected keyword argument",
        "missing: skipped, ImportError: No module named 'liger_kernel'",
        "later: skipped, RuntimeError: illegal access\n",
        "hanging: skipped, TimeoutError: no result after 4 s",
    ):
        assert line in said


def test_what_does_not_fit_the_budget_is_left_out_by_name(capsys) -> None:
    from benchmarks import bench_divergence as bench

    assert bench.run_case(bench.Case(8, 16, 500, k=8, dtype="float32"), "cpu", reps=3, until=0.0) == []
    assert "logitcache: skipped, out of time" in capsys.readouterr().err


def test_a_peer_that_takes_the_gpu_with_it_is_left_out_by_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_divergence as bench

    def lost(*_, **__):
        raise bench.Lost("liger linear jsd")

    again = []
    monkeypatch.setattr(bench, "run_case", lost)
    monkeypatch.setattr(bench.os, "execv", lambda _, command: again.append(command))
    monkeypatch.setattr(
        sys, "argv", ["bench_divergence.py", "--device", "cpu", "--no-save", "--case", "8", "16", "500"]
    )
    bench.main()
    assert again[0][1:9] == sys.argv
    options = again[0][9:]
    assert options[:2] == ["--skip", "liger linear jsd"]
    assert 0 < int(options[3]) <= 400
    assert options[-1] == "0"


def test_a_step_from_the_cache_is_compared_with_fine_tuning_and_a_resident_teacher(tmp_path: Path) -> None:
    teacher = tiny.save_model(tmp_path / "teacher", layers=6)
    tiny.write_cache(tmp_path / "cache")
    cases = run("bench_train", "--quick", "--teacher", str(teacher), "--cache", str(tmp_path / "cache"))
    ours, plain, online = cases[:3]
    assert [case["case"] for case in cases[:3]] == ["logitcache", "fine-tuning", "online"]
    assert plain["of_fine_tuning"] == plain["processor_of_fine_tuning"] == online["of_online_peak"] == 1.0
    for case in cases:
        assert case["ms_p20"] <= case["ms_median"] <= case["ms_p80"]
        assert case["fed_a_step"] == pytest.approx(256, rel=0.5)
        assert 0 < case["data_share"] < 1
        assert case["kl"] != case["kl_before"] == plain["kl_before"]
    assert ours["kl"] < ours["kl_before"]


def test_a_loader_and_an_opening_are_timed_from_a_store_and_from_a_directory(tmp_path: Path) -> None:
    cases = {case["case"]: case for case in run("bench_remote", "--quick", "--latency", "1", "--dir", str(tmp_path))}
    ahead, cold, warm = (cases[f"mirror, {name}"] for name in ("cold, fetched ahead", "cold", "warm"))
    assert cases["directory"]["requests"] == warm["requests"] == 0
    assert cold["requests"] == ahead["requests"] == cold["shards"] == 8
    for case in cases.values():
        name = "open_s" if case["case"].startswith("open") else "traces_per_s"
        assert 0 < case[f"{name}_min"] <= case[f"{name}_median"] <= case[f"{name}_max"]
        assert case["store"] == "moto on loopback"
    assert cases["open, mirror, first"]["requests"] > 20 > cases["open, mirror, again"]["requests"]
    assert 0 < cases["open, mirror, compacted"]["requests"] < 20


def test_an_order_by_shards_is_compared_with_a_shuffle_of_all() -> None:
    cases = {case["window"]: case for case in run("bench_order", "--quick")}
    assert cases[None]["siblings"] < cases[1]["siblings"]
    assert cases[1]["downloads"] == pytest.approx(1)
    assert cases[None]["downloads"] > 5


def test_engines_that_pull_are_simulated_beside_fixed_shares_and_the_ledger_is_timed() -> None:
    cases = run("bench_scale", "--quick")
    simulated = {(c["engines"], c["fate"], c["requests"]): c for c in cases if c["case"] == "simulated"}
    late = "one late by half the job"
    pulled, shares = (simulated[4, late, name]["of_ideal_median"] for name in ("pulled", "shares by prompt"))
    assert 1 < pulled < shares
    assert simulated[4, "one deadly request", "pulled"]["set_aside_min"] == 1
    ledger, options, pickled = (c for c in cases if c["case"] != "simulated")
    assert ledger["requests_per_s_min"] > 2000
    assert options["requests"] == pickled["requests"] == 4000
