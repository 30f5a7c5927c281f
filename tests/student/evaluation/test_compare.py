import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from logitcache.commands.text_runs import describe_comparison
from logitcache.errors import StudentError, WriteError
from logitcache.runtime.locks import exclusive
from logitcache.student.evaluation.compare import Comparison, HeldOutCurve, compare

MEANS = {"kl": 4.0, "top1": 0.1, "rows": 100, "ce": 5.0, "ece": 0.2}
SETTINGS = {"cache": {"teacher": "big", "top_k": 8}, "traces": {"count": 9}, "view": "full", "learning_rate": 1e-3}


def history(steps: int, counted: bool) -> list[dict]:
    """Steps of 100 tokens, 90 of them supervised, in 2 s each; an evaluation every four steps."""
    log = []
    for step in range(1, steps + 1):
        counts = {"tokens_fed": 100 * step, "tokens_taught": 90 * step, "seconds": 2.0 * step, "flops": 7 * step}
        log.append({"step": step, "loss": 4 / step, "grad_norm": 1.0} | (counts if counted else {}))
        if step % 4 == 0:
            log.append({"step": step, "eval_kl": 4 / step, "eval_top1": 0.5, "eval_rows": 100})
    return log


@pytest.fixture
def make(tmp_path):
    """Writes a run of 8 steps as training leaves it; a `status` other than finished leaves a checkpoint only."""

    def run(name: str, status: str = "finished", counted: bool = True, **settings) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        record = {"status": status, **SETTINGS, **settings, "eval_before": MEANS, "versions": {"torch": "2"}}
        spent = {"tokens_fed": 800, "tokens_taught": 720}
        seconds = {"data": 1.0, "forward": 5.0, "backward": 10.0}
        if status == "finished":
            after = MEANS | {"kl": 0.5, "sections": {"answer": MEANS | {"kl": 0.25}, "prompt": {"kl": None}}}
            record |= {"eval_after": after, "history": history(8, counted), "steps": 8, "seconds": 16.0}
            record |= spent | {"cost": {"flops": 5.6e15, "peak_memory": 3 << 30, "seconds": seconds}}
        else:
            checkpoint = path / "checkpoint-8"
            checkpoint.mkdir()
            state = {"global_step": 8, "log_history": history(8, counted)}
            (checkpoint / "trainer_state.json").write_text(json.dumps(state))
            kept = spent | {"seconds": 16.0, "cost": {"flops": 56, "peak_memory": 9, "seconds": seconds}}
            (checkpoint / "spent.json").write_text(json.dumps(kept))
        (path / "run.json").write_text(json.dumps(record))
        return path

    return run


def table(found: Comparison) -> dict[str, list[str]]:
    """The printed rows by their names."""
    rows = (re.split(r" {2,}", line.strip()) for line in describe_comparison(found).splitlines())
    return {name: values for name, *values in rows}


def test_runs_are_compared_and_what_differs_is_named(make):
    found = compare([make("a"), make("b", learning_rate=1e-2, set={"weight_decay": "0.1"}), make("c", view="lsp:0.5")])
    assert found.differs == {
        "view": ["full", "full", "lsp:0.5"],
        "learning_rate": [1e-3, 1e-2, 1e-3],
        "set.weight_decay": [None, "0.1", None],
    }
    assert (found.held_out_differs, found.loss_differs) == ([], ["view"])
    assert [run.name for run in found.runs] == ["a", "b", "c"]
    lines = table(found)
    assert lines["supervised tokens"] == ["720"] * 3
    assert lines["seconds"] == ["16.0"] * 3
    assert lines["tokens/s"] == ["50"] * 3
    assert lines["FLOPs"] == ["5.600e+15"] * 3
    assert lines["peak memory, bytes"] == ["3,221,225,472"] * 3
    assert lines["backward, s"] == ["10.0"] * 3
    assert lines["KL before"] == ["4.0000"] * 3
    assert lines["KL last"] == ["0.5000"] * 3
    assert lines["KL of answer"] == ["0.2500"] * 3
    assert lines["set.weight_decay"] == ["-", "0.1", "-"]
    assert lines["KL of prompt"] == ["-"] * 3
    assert "different objectives (view): " in describe_comparison(found)


def test_runs_of_other_traces_are_not_to_be_compared_by_their_kl(make):
    found = compare([make("a"), make("b", cache={"teacher": "bigger", "top_k": 8}, held_out=0.1)])
    assert found.held_out_differs == ["cache.teacher", "held_out"]
    assert "on different traces (cache.teacher, held_out): use `logitcache eval`" in describe_comparison(found)


def test_one_run_and_equal_runs_are_compared_too(make):
    a = make("a")
    assert compare([a]).differs == {}
    assert "all settings are the same" in describe_comparison(compare([a, make("b")]))


@pytest.mark.parametrize("counted", [True, False])
def test_a_run_that_lasts_or_was_stopped_is_as_its_newest_checkpoint_has_it(make, counted):
    path = make("run", "running", counted)
    (path / "checkpoint-12").mkdir()  # cut short
    with exclusive(path / ".lock", "run"):
        running = compare([path]).runs[0]
    stopped = compare([path]).runs[0]
    assert (running.status, stopped.status) == ("running", "stopped")
    assert replace(running, status="stopped") == stopped
    assert (stopped.steps, stopped.tokens_taught, stopped.seconds) == (8, 720, 16.0)
    assert (stopped.eval_after, stopped.eval_step) == ({"kl": 0.5, "top1": 0.5}, 8)
    assert stopped.cost == {
        "flops": 56,
        "peak_memory": 9,
        "seconds": {"data": 1.0, "forward": 5.0, "backward": 10.0},
    }


@pytest.mark.parametrize("counted", [True, False])
def test_curves_know_tokens_and_seconds_whether_or_not_the_log_does(make, counted):
    run = compare([make("run", counted=counted)]).runs[0]
    training, held_out = run.training, run.held_out
    assert training.step == list(range(1, 9))
    assert training.loss == [4 / step for step in range(1, 9)]
    assert training.tokens_taught == pytest.approx([90 * step for step in range(1, 9)])
    assert training.seconds == pytest.approx([2 * step for step in range(1, 9)])
    assert held_out.step == [0, 4, 8]
    assert held_out.kl == [4.0, 1.0, 0.5]
    assert held_out.tokens_taught == pytest.approx([0, 360, 720])


def test_a_run_before_its_first_checkpoint_has_no_curve_yet(make):
    path = make("run", "running")
    for file in (path / "checkpoint-8").iterdir():
        file.unlink()
    found = compare([path, make("other")])
    run = found.runs[0]
    assert (run.steps, run.tokens_fed, run.eval_after, run.training.step) == (None, None, None, [])
    assert run.held_out == HeldOutCurve(step=[0], kl=[4.0], top1=[0.1], tokens_taught=None, seconds=None)
    assert table(found)["KL last"] == ["-", "0.5000"]


def test_runs_of_one_name_are_told_apart_by_the_directories_above(make):
    assert [r.name for r in compare([make("x/run"), make("y/run")]).runs] == ["x/run", "y/run"]


@pytest.mark.slow
def test_the_picture_is_written_whole_and_wide(make, tmp_path):
    runs = [make("a"), make("b", "stopped", counted=False, learning_rate=1e-2)]
    found = compare(runs, out=tmp_path / "out" / "new")
    (file,) = found.files
    data = Path(file).read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") >= 1200
    assert [p.name for p in (tmp_path / "out" / "new").iterdir()] == ["curves.png"]
    assert f"curves: {file}" in describe_comparison(found)
    with pytest.raises(WriteError, match=r"curves\.png"):
        compare(runs, out=Path(file))


@pytest.mark.slow
def test_losses_at_zero_and_a_run_without_any_are_drawn_too(make, tmp_path):
    path, young = make("a"), make("young", "running")
    (young / "checkpoint-8" / "trainer_state.json").unlink()
    record = json.loads((path / "run.json").read_text())
    record["history"][0]["loss"], record["history"][1]["loss"] = 0.0, math.nan
    (path / "run.json").write_text(json.dumps(record))
    assert compare([path, young], out=tmp_path / "out").files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere is not a run; no such directory; give directories that `logitcache train --out` made"),
        ("empty", r"empty is not a run; it has no run\.json"),
        ("run/checkpoint-8", r"checkpoint-8 is not a run; did you mean .*/run\?"),
        ("other", r"other/run\.json was not written by `logitcache train`"),
        ("list", r"list/run\.json was not written by `logitcache train`"),
    ],
)
def test_a_directory_that_is_not_a_run_is_refused_by_name(make, tmp_path, name, message):
    make("run", "running")
    (tmp_path / "empty").mkdir()
    for folder, text in (("other", '{"sta'), ("list", "[1]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_text(text)
    with pytest.raises(StudentError, match=message):
        compare([tmp_path / "run", tmp_path / name])


def test_curves_without_matplotlib_are_refused_and_the_table_is_not(make, tmp_path, monkeypatch):
    path = make("run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StudentError, match="curves need matplotlib: pip install"):
        compare([path], out=tmp_path / "out")
    assert compare([path]).files == []


def test_comparing_needs_no_torch(make):
    code = "import sys; from pathlib import Path; from logitcache.student.evaluation.compare import compare\n"
    code += "compare([Path(sys.argv[1])]); assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, make("run")], check=True, cwd=Path(__file__).parents[3])


FORGERIES = {
    "number as text": {"steps": "8"},
    "seconds as text": {"seconds": "x\x1b[2J"},
    "tokens as a list": {"tokens_fed": [1]},
    "cost as text": {"cost": "dear"},
    "cost of text": {"cost": {"flops": "many", "peak_memory": None, "seconds": {}}},
    "parts as text": {"cost": {"flops": 1, "peak_memory": 1, "seconds": "long"}},
    "a measure as text": {"eval_after": {"kl": "low", "top1": 0.5}},
    "no measure": {"eval_after": {"top1": 0.5}},
    "sections as numbers": {"eval_after": {"kl": 0.5, "top1": 0.5, "sections": {"answer": 3}}},
    "history as text": {"history": "long"},
    "steps as text": {"history": [{"step": "x", "loss": 1.0}, {"step": 2, "loss": 1.0}]},
    "losses as text": {"history": [{"step": 1, "loss": "low"}]},
}


@pytest.mark.parametrize("forged", FORGERIES.values(), ids=FORGERIES)
def test_a_record_that_no_run_has_is_one_line(run, make, forged):
    path = make("evil")
    record = path / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | forged))
    code, out, err = run("compare", make("good"), path)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert "evil" in err


def test_a_record_nested_without_end_is_one_line(run, make):
    path = make("evil")
    (path / "run.json").write_text('{"status": "finished", "x": ' + "[" * 100_000)
    code, out, err = run("compare", path)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err


def test_settings_of_a_stranger_s_run_cannot_steer_the_terminal(run, make):
    evil = "\x1b[2J\nOK\u202e"
    code, out, _ = run("compare", make("a"), make("b", **{evil: evil}))
    assert code == 0
    assert r"\x1b[2J\nOK\u202e" in out
    assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_a_picture_that_we_did_not_draw_is_not_replaced(make, tmp_path):
    from logitcache.runtime.pictures import is_ours

    for name in ("$a$b", "_c", "d\x1b"):
        make(name)
    runs = [tmp_path / name for name in ("$a$b", "_c", "d\x1b")]
    for _ in range(2):
        compare(runs, out=tmp_path / "plots")
    assert is_ours(tmp_path / "plots" / "curves.png")
    mine = tmp_path / "mine"
    mine.mkdir()
    for content in (b"mine", b"\x89PNG\r\n\x1a\n mine", b""):
        (mine / "curves.png").write_bytes(content)
        with pytest.raises(StudentError, match=r"curves\.png was not drawn by logitcache; move it away"):
            compare(runs, out=mine)
        assert (mine / "curves.png").read_bytes() == content
