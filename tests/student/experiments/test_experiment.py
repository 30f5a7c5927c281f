"""Experiments in miniature: eight traces, one seed, one step; commands run in this process, and no engine."""

import contextlib
import csv
import io
import itertools
import json
import os
import shutil
import signal
import stat
import threading
import time
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from logitcache.accuracy.answer_file import Answer, AnswerFile
from logitcache.accuracy.budgets import ANSWERS, RESULTS, SETTINGS, prompts_digest
from logitcache.cache.reader import Cache
from logitcache.capture.score import Crop, _cropped
from logitcache.cli import app
from logitcache.commands.text_experiments import describe_estimates, describe_experiment
from logitcache.errors import IdentityError, InputError, LogitcacheError, NotACacheError, PromptsError, TrainingError
from logitcache.identity import weights_fingerprint
from logitcache.prompts import load
from logitcache.runtime.console import Stop
from logitcache.runtime.files import publish_json
from logitcache.student.experiments import catalog, report, subcommands
from logitcache.student.experiments.catalog import EXPERIMENTS, CacheFacts, Variant
from logitcache.student.experiments.estimate import estimate
from logitcache.student.experiments.experiment import run_experiment as run
from logitcache.student.experiments.options import ExperimentOptions
from logitcache.student.experiments.plan import plan_experiment
from logitcache.student.experiments.results import from_csv, relative, spread
from logitcache.student.experiments.runner import finished_run
from logitcache.student.training.options import TrainOptions
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

SHARED = {"max_steps": 1, "tokens_per_batch": 128, "held_out": 0.3, "learning_rate": 1e-3}
FAMILIES = ("redundant", "incremental")


def eight() -> list:
    """Traces of eight prompts, of two families."""
    return [replace(t, metadata={"family": FAMILIES[i % 2]}) for i, t in enumerate(tiny.traces(8, 8))]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.write_cache(home / "cache", eight())
    tiny.save_model(home / "model")
    rows = [{"id": f"q{i}", "prompt": f"w{i + 3}", "answer": "w7", "family": FAMILIES[i % 2]} for i in range(4)]
    (home / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


@pytest.fixture
def options(home, tmp_path):
    def make(name: str, **changes) -> ExperimentOptions:
        given = {"cache": home / "cache", "student": str(home / "model"), "out": tmp_path / "out", "seeds": 1}
        given |= {"shared": SHARED, "points": (0.5, 1.0) if EXPERIMENTS[name].points else None}
        return ExperimentOptions(name=name, **given | changes)

    return make


def here(arguments, log, stop) -> tuple[int, str]:
    """Runs a command in this process: errors are raised."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = app(arguments, standalone_mode=False)
    return int(code or 0), out.getvalue()


class Spy:
    """Runs commands here; those of an engine are made up: crops of the cache's own rows, answers that know w7."""

    def __init__(self, home: Path):
        self.home, self.ran, self.asked = home, [], []

    def __call__(self, arguments, log, stop) -> tuple[int, str]:
        self.ran.append(arguments[0] + (" --prompts" if "--prompts" in arguments else ""))
        given = {k: v for k, v in itertools.pairwise(arguments) if k.startswith("--")}
        if arguments[0] == "score":
            return self.score(Path(given["--out"]), given["--crop"])
        if "--prompts" in arguments:
            return self.answer(given["--prompts"], Path(given["--out"]), given["--budgets"].split(","))
        return here(arguments, log, stop)

    def score(self, out: Path, crop: str) -> tuple[int, str]:
        cropped = []
        for trace in Cache.open(self.home / "cache"):
            span = Crop.parse(crop).span(len(trace.token_ids))
            cut = slice(span.start, span.stop - 1)  # rows of all but the crop's first token
            cropped.append(
                replace(
                    trace,
                    token_ids=trace.token_ids[span],
                    sections=_cropped(trace.sections, span),
                    rows=trace.rows[cut],
                    token_logprob=trace.token_logprob[cut],
                    token_rank=trace.token_rank[cut],
                )
            )
        tiny.write_cache(out, cropped, derived=[f"score --from-cache x --crop {crop}"])
        return 0, ""

    def answer(self, prompts: str, out: Path, budgets: list[str]) -> tuple[int, str]:
        """Two of four prompts are right naturally, after 8 tokens of reasoning, and one after 4, where it is cut."""
        self.asked.append(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / ANSWERS).unlink(missing_ok=True)
        file = AnswerFile(out / ANSWERS)
        for i, cut in itertools.product(range(4), (None, 4)):
            counts = {"opening": 1, "reasoning": cut or 8, "closing": 1, "answer": 2}
            right = i < (2 if cut is None else 1)
            told = {"digest": "d", "opened": True, "finish": "stop", "text": "", "tokens": array("i", [1])}
            file.add(Answer(f"q{i}", 0, cut, correct=right, **told, **counts))
        file.close()
        part = {"ci": [0.2, 0.8], "answer_tokens": 2.0, "total_tokens": 12.0, "ended": 1.0, "prompts": 4, "samples": 1}
        part |= {"unscored": 0, "no_room": 0}
        shares = {b: (0.5, 8.0) if b == "none" else (0.25, 4.0) for b in budgets}
        found = {b: part | {"accuracy": a, "reasoning_tokens": n} for b, (a, n) in shares.items()}
        publish_json(out / SETTINGS, {})
        publish_json(out / RESULTS, {"budgets": found, "prompts_digest": prompts_digest(load(prompts))})
        return 0, ""


@pytest.fixture
def spy(home) -> Spy:
    return Spy(home)


def silent(line: str) -> None:
    pass


def table(path: Path) -> list[dict]:
    return list(csv.DictReader((path / "results.csv").open()))


@pytest.mark.parametrize(
    "name", [name if name == "lsp" else pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS]
)
def test_an_experiment_in_miniature_trains_its_variants_and_writes_them_up(options, spy, name):
    asked = options(name, teacher="teacher" if name == "halves" else None)
    catalog = plan_experiment(asked).variants
    found = run(asked, spy, silent)
    assert found.signal is None
    assert spy.ran.count("train") == len(catalog)
    rows = table(asked.out)
    assert [row["variant"] for row in rows] == ["before", *(variant.name for variant in catalog)]
    assert all(float(row["kl"]) > 0 for row in rows)
    assert len({row["rows"] for row in rows}) == 1, "all are evaluated on the same positions"
    assert all(float(row["flops"]) > 0 and float(row["seconds"]) > 0 for row in rows[1:])
    if name == "halves":  # a step has as many traces, whichever half it is of
        inputs = [float(row["tokens_fed"]) for row in rows[1:]]
        assert max(inputs) < 1.2 * min(inputs)
    assert all(row["kl 0-10%"] and row["kl 90-100%"] for row in rows)
    text = (asked.out / "report.md").read_text()
    assert "| variant | 0-10% | 10-20% |" in text
    for variant in catalog:
        assert f"| {variant.name} | `{variant.view}` |" in text
    assert all(f"]({image.name})" in text for image in asked.out.glob("*.png"))
    assert (asked.out / "quality.png").exists()
    assert "Not finished" not in text
    assert describe_experiment(found).count("\n") >= len(catalog) + 1


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_more_may_be_asked(options, spy, home):
    asked = options("lsp", points=(1.0,))
    run(asked, spy, silent)
    record = asked.out / "variants" / "lsp-1" / "seed-0" / "run.json"
    made = record.stat().st_mtime_ns
    found = run(asked, spy, silent)
    assert spy.ran == ["train"]
    assert found.commands == 0
    assert "nothing to do" in describe_experiment(found)
    more = replace(asked, seeds=2, prompts=str(home / "prompts.jsonl"), budgets=("50%", "none"))
    run(more, spy, silent)
    assert sorted(spy.ran) == ["eval --prompts"] * 3 + ["train"] * 2, "the untrained student answers too"
    assert record.stat().st_mtime_ns == made
    again = len(spy.ran)
    found = run(more, spy, silent)
    assert len(spy.ran) == again
    assert [(row["variant"], row["seed"]) for row in found.rows] == [("before", None), ("lsp:1", 0), ("lsp:1", 1)]
    for row in table(asked.out):
        assert (row["accuracy none"], row["accuracy 50%"], row["ci low none"]) == ("0.5", "0.25", "0.2")
        # Of q0, q2 (redundant) one is right, cut or not; of q1, q3 one naturally and none cut.
        assert (row["accuracy none [redundant]"], row["accuracy none [incremental]"]) == ("0.5", "0.5")
        assert (row["accuracy 50% [redundant]"], row["accuracy 50% [incremental]"]) == ("0.5", "0.0")
        assert (row["reasoning tokens none"], row["reasoning tokens 50% [incremental]"]) == ("8.0", "4.0")
    text = (asked.out / "report.md").read_text()
    assert "Prompts of group `redundant`:" in text
    assert (asked.out / "budgets.png").exists()
    assert (asked.out / "length.png").exists()
    with pytest.raises(IdentityError, match="max_steps = 1, this one has 2"):
        run(replace(more, shared=SHARED | {"max_steps": 2}), spy, silent)
    with pytest.raises(IdentityError, match=r"holds answers to .*prompts.jsonl, which the new report would lose"):
        run(asked, spy, silent)
    with pytest.raises(IdentityError, match=r"was made with view = 'lsp:1', but variant lsp:1 has 'lsp:0.9'"):
        finished_run(asked.out / "variants" / "lsp-1" / "seed-0", Variant("lsp:1", "", "lsp:0.9"))


@pytest.mark.slow
def test_a_report_never_mixes_what_was_measured_under_other_settings(options, spy, home):
    asked = options("lsp", points=(1.0,), prompts=str(home / "prompts.jsonl"), budgets=("50%", "none"))
    run(asked, spy, silent)
    assert [row["prompts"] for row in table(asked.out)] == ["4", "4"]
    place = asked.out / "variants" / "lsp-1" / "seed-0"
    (asked.out / "variants" / "lsp-1" / "seed-0-answers" / "old").touch()
    shutil.rmtree(place)
    run(asked, spy, silent)
    assert spy.asked[-1] == place.with_name("seed-0-answers"), "a run made anew is asked anew"
    assert not (place.with_name("seed-0-answers") / "old").exists()

    def stopping(arguments, log, stop):
        return (143, "")

    found = run(replace(asked, answers={"samples": 2, "temperature": 1.0}), stopping, silent)
    assert all(row.get("accuracy none") is None for row in found.rows), "those of one sample are left out"
    assert "Stopped by SIGTERM. Runs that are missing" in (asked.out / "report.md").read_text()


@pytest.mark.slow
def test_prompts_that_change_under_way_are_not_reported(options, spy, home, tmp_path):
    prompts = shutil.copy(home / "prompts.jsonl", tmp_path / "prompts.jsonl")
    asked = options("lsp", points=(1.0,), prompts=str(prompts), budgets=("50%", "none"))

    def changing(arguments, log, stop):
        prompts.write_text((home / "prompts.jsonl").read_text().replace("w7", "w8"))
        return spy(arguments, log, stop)

    with pytest.raises(PromptsError, match=r"prompts.jsonl changed while the experiment ran; run the same command"):
        run(asked, changing, silent)
    assert all("accuracy none" not in row for row in table(asked.out))


@pytest.mark.slow
def test_a_run_that_fails_keeps_no_other_from_its_turn(options, spy):
    asked = options("lsp", points=(0.25, 0.5, 1.0))

    def failing(arguments, log, stop):
        log.write_text("logitcache: non-finite loss\n")
        return (1, "") if "lsp:0.5" in arguments else spy(arguments, log, stop)

    with pytest.raises(TrainingError, match=r"train lsp:0.5 seed 0: non-finite loss.*the report so far: .*report.md"):
        run(asked, failing, silent)
    assert [row["variant"] for row in table(asked.out)] == ["before", "lsp:0.25", "lsp:1"]
    text = (asked.out / "report.md").read_text()
    assert "not measured yet: lsp:0.5 (1). Failed: train lsp:0.5 seed 0: non-finite loss" in text
    assert run(asked, spy, silent).signal is None
    assert "Not finished" not in (asked.out / "report.md").read_text()


@pytest.mark.slow
def test_another_students_weights_are_refused(options, spy, home, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(home / "model", student)
    asked = options("lsp", points=(0.5,), student=str(student))
    run(asked, spy, silent)
    shutil.rmtree(student)
    tiny.save_model(student, seed=5)
    with pytest.raises(IdentityError, match="experiment with weights = "):
        run(asked, spy, silent)


@pytest.mark.slow
def test_a_stopped_experiment_reports_what_is_missing_and_resumes(options, spy):
    asked = options("lsp")

    def stopping(arguments, log, stop):
        return (143, "") if len(spy.ran) == 1 else spy(arguments, log, stop)

    found = run(asked, stopping, silent)
    assert found.signal == "SIGTERM"
    assert "stopped by SIGTERM" in describe_experiment(found)
    assert [row["variant"] for row in found.rows] == ["before", "lsp:0.5"]
    text = (asked.out / "report.md").read_text()
    assert "**Not finished.** Stopped by SIGTERM." in text
    assert "not measured yet: lsp:1 (1)." in text
    assert run(asked, spy, silent).signal is None
    assert spy.ran == ["train", "train"]
    assert "Not finished" not in (asked.out / "report.md").read_text()


@pytest.mark.slow
def test_a_dry_run_writes_nothing_and_counts_what_a_run_then_spends(options, spy, home):
    asked = options("lsp")
    before = sorted(home.rglob("*"))
    expected = estimate(asked)
    assert not asked.out.exists()
    assert sorted(home.rglob("*")) == before
    half, whole = expected
    assert (half.variant, whole.variant, half.runs, half.done, half.seconds) == (
        "lsp:0.5",
        "lsp:1",
        1,
        0,
        None,
    )
    assert 0.4 < half.input_tokens / whole.input_tokens < 0.5
    assert half.flops < whole.flops
    assert "0/1" in describe_estimates(asked, expected)
    alone = {"epochs": 2, "tokens_per_batch": 1, "held_out": 0.3}  # a trace a batch: no padding
    epoch = replace(asked, shared=alone)
    expected = estimate(epoch)
    run(replace(epoch, points=(0.5,)), spy, silent)
    found = json.loads((asked.out / "variants" / "lsp-0.5" / "seed-0" / "run.json").read_text())
    assert found["tokens_fed"] == expected[0].input_tokens
    assert found["tokens_taught"] == expected[0].supervised_tokens
    assert found["cost"]["flops"] == expected[0].flops
    half, whole = estimate(epoch)
    assert (half.done, half.seconds) == (1, pytest.approx(found["seconds"]))
    assert whole.seconds == pytest.approx(found["seconds"] * whole.flops / half.flops)


def test_a_dry_run_of_halves_counts_what_the_teacher_reads(options, home):
    asked = options("halves", teacher="teacher")
    _, middle, right = estimate(asked)
    assert middle.teacher_tokens == right.teacher_tokens == sum(int(n) // 2 for n in Cache.open(home / "cache").lengths)
    assert "tokens of crops to be scored by the teacher" in describe_estimates(asked, [middle, right])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"name": "lps"}, "did you mean 'lsp'", id="an unknown name"),
        pytest.param({"name": "halves", "points": None}, "halves needs `teacher`", id="halves without a teacher"),
        pytest.param({"teacher": "T"}, "lsp uses only the cache; omit it", id="a teacher for nothing"),
        pytest.param({"seeds": 0}, "`seeds` 0", id="no seeds"),
        pytest.param({"points": (0.5, 2.0)}, r"`points` 2.0", id="a point above one"),
        pytest.param({"name": "trsd"}, "variants of trsd are not shares", id="points of no shares"),
        pytest.param({"shared": {"set": {"data_seed": 3}}}, "`set` data_seed: .* omit it", id="one seed for all"),
        pytest.param({"shared": {"set": {"max_steps": 3}}}, "give `max_steps` instead", id="an option by another way"),
        pytest.param(
            {"name": "losses", "points": None, "shared": {"set": {"divergence": "jsd"}}},
            "the runs of losses set it",
            id="one divergence for all",
        ),
        pytest.param(
            {"name": "halves", "points": None, "teacher": "T", "shared": {"where": "tokens<=90"}},
            "tokens would count the tokens of the crops",
            id="a length of crops",
        ),
        pytest.param(
            {"name": "halves", "points": None, "teacher": "MODEL"},
            "was made by tiny @ .*; give the teacher",
            id="another teacher",
        ),
        pytest.param({"shared": {"epoch": 1}}, "did you mean 'epochs'", id="an unknown training option"),
        pytest.param({"shared": {"seed": 1}}, "unknown training option 'seed'", id="a seed"),
        pytest.param({"shared": {"tokens_per_batch": 0}}, "tokens_per_batch` 0: give at least 1", id="an empty batch"),
        pytest.param({"shared": {"set": {"weight_dekay": 1}}}, "did you mean 'weight_decay'", id="an unknown argument"),
        pytest.param(
            {"name": "losses", "points": None, "shared": {"tail": "support"}},
            "`tail`: the variants of losses set it",
            id="what the variants vary",
        ),
        pytest.param({"shared": {"where": "tokens<1"}}, "no training trace matches", id="a filter of nothing"),
        pytest.param({"student": "./nowhere"}, "does not exist", id="no student"),
        pytest.param({"cache": Path("nowhere")}, "nowhere", id="no cache"),
        pytest.param({"prompts": "UNANSWERED"}, "'q' has no gold `answer`", id="prompts without answers"),
        pytest.param({"prompts": "P", "budgets": ("5x",)}, "`budgets` '5x'", id="a broken budget"),
        pytest.param(
            {"prompts": "P", "answers": {"sample": 2}}, "did you mean 'samples'", id="an unknown answer option"
        ),
        pytest.param({"prompts": "P", "shared": {"lora_rank": 4}}, "runs are adapters", id="adapters with prompts"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(options, spy, home, tmp_path, changes, message):
    (tmp_path / "unanswered.jsonl").write_text('{"id": "q", "prompt": "w3"}')
    files = {"UNANSWERED": str(tmp_path / "unanswered.jsonl"), "P": str(home / "prompts.jsonl")}
    files["MODEL"] = str(home / "model")
    changes = {k: files.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    asked = replace(options("lsp"), **changes)
    with pytest.raises(LogitcacheError, match=message) as raised:
        run(asked, spy, silent)
    assert "\n" not in str(raised.value)
    assert not asked.out.exists()


@pytest.mark.slow
def test_a_directory_of_other_things_is_left_alone(options, spy):
    asked = options("lsp")
    asked.out.mkdir()
    (asked.out / "letter.txt").touch()
    with pytest.raises(NotACacheError, match="holds files that are not an experiment"):
        run(asked, spy, silent)
    (asked.out / "letter.txt").rename(asked.out / ".experiment.json.logitcache-part")  # what a kill leaves
    assert run(asked, spy, silent).signal is None


def test_variants_are_those_that_the_cache_can_serve():
    def names(experiment: str, **facts) -> list[str]:
        return [
            variant.name
            for variant in EXPERIMENTS[experiment].variants(CacheFacts(**{"prompt_rows": False, "top_k": 64} | facts))
        ]

    assert names("sections") == ["reasoning+answer", "reasoning", "answer"]
    assert names("sections", prompt_rows=True) == ["all", "reasoning+answer", "reasoning", "answer", "prompt+answer"]
    assert names("lsp") == [f"lsp:{i / 10:g}" for i in range(1, 11)]
    assert names("halves") == ["left", "middle", "right"]
    assert names("token-matched", prompt_rows=True) == ["reasoning", "answer", "prompt"]
    assert names("trsd") == ["full", "trsd:0.1-0.9", "trsd:0.5", "trsd:1", "trsd-anchored"]
    assert names("first-derivation", points=(0.5,)) == ["full", "lsp:0.5", "reasoning-lsp:0.25", "reasoning-lsp:0.5"]
    losses = names("losses", sampled=True)
    assert len(losses) == len(set(losses)) == 6 + 3 + 4
    assert losses[0] == "forward_kl,k=64,bucket"
    assert {"forward_kl,k=1,bucket", "forward_kl,k=4,support", "forward_kl,k=64,sampled"} < set(losses)
    assert "forward_kl,k=64,sampled" not in names("losses")
    folders = [variant.folder for name in EXPERIMENTS for variant in EXPERIMENTS[name].variants(CacheFacts(True, 64))]
    assert not any(set(":/ ") & set(folder) for folder in folders)


def test_the_first_derivation_is_looked_for_where_the_cache_has_families(options, spy, home, tmp_path):
    text = " ".join(subcommands.train(Path("c"), "s", Path("o"), {"where": "meta.family=redundant"}))
    assert text == "train c --student s --out o --where meta.family=redundant"
    tiny.write_cache(tmp_path / "plain", tiny.traces(8, 8))
    assert plan_experiment(options("first-derivation")).where == "meta.family=redundant"
    assert plan_experiment(options("first-derivation")).evaluation["where"] == "meta.family=redundant"
    asked = options("first-derivation", shared=SHARED | {"where": "tokens>1"})
    assert plan_experiment(asked).where == "tokens>1 and meta.family=redundant"
    assert [variant.name for variant in plan_experiment(options("lsp", points=(0.5, 0.50, 0.00001))).variants] == [
        "lsp:0.5",
        "lsp:0.00001",
    ]
    plain = plan_experiment(options("first-derivation", cache=tmp_path / "plain"))
    assert (plain.where, plain.evaluation) == (None, None)


def test_the_command_line_reads_back_every_training_option(monkeypatch):
    from logitcache.student.training import run as module

    settings = {
        "view": "trsd:0.1-0.9", "sections": ("reasoning", "answer"), "where": "correct and tokens<=8", "top_k": 4,
        "held_out": 0.1, "teacher_tokenizer": "t", "dtype": "fp32", "attention": "eager", "lora_rank": 2, "lora_alpha": 3.0,
        "tokens_per_batch": 7, "epochs": 2.0, "max_steps": 5, "learning_rate": 1e-05, "seed": 3, "divergence": "jsd",
        "tail": "support", "beta": 0.25, "alpha": 0.5, "temperature": 2.0, "ce_weight": 0.5,
        "section_weights": {"answer": 2.0}, "gradient_checkpointing": True, "packing": False, "compile": True,
        "shuffle": "shards:3", "report_to": ("tensorboard",),
        "set": {"weight_decay": 0.1, "optim": "sgd", "logging_nan_inf_filter": True},
    }  # fmt: skip
    assert settings.keys() | {"caches", "mix", "student", "out"} == set(TrainOptions.__dataclass_fields__)
    seen = []

    def train(options):
        seen.append(options)
        raise TrainingError("enough")

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(TrainingError):
        here(subcommands.train(Path("c"), "s", Path("o"), settings), Path("log"), Stop())
    (options,) = seen
    assert {name: getattr(options, name) for name in settings} == settings
    assert (options.caches, options.student, options.out) == (["c"], "s", Path("o"))
    off = subcommands.train(
        Path("c"), "s", Path("o"), {"compile": False, "gradient_checkpointing": False, "top_k": None}
    )
    assert off == ["train", "c", "--student", "s", "--out", "o", "--no-compile", "--no-gradient-checkpointing"]


def test_a_crop_has_rows_of_the_caches_kind(home):
    identity = replace(tiny.identity(), pin_tokens=[2, 7], top_p=0.9, teacher="T", teacher_revision="ab" * 20)
    identity = replace(identity, engine_args={"quantization": "fp8", "template_args": {"enable_thinking": False}})
    text = " ".join(subcommands.crop(home, identity, "T", "right:0.5", Path("o"), {"max_model_len": 64}))
    for option in (
        "--crop right:0.5",
        "--teacher T",
        "--top-k 8",
        "--top-p 0.9",
        "--pin-tokens 2,7",
        "--prompt-logits",
    ):
        assert option in text
    assert "--engine-arg max_model_len=64" in text
    assert "--engine-arg quantization=fp8" in text
    assert "template" not in text, "the tokens are rendered already"
    assert "--revision " + "ab" * 20 in text
    assert "--revision" not in subcommands.crop(home, identity, str(home), "right:0.5", Path("o"), {})
    assert "--exact" not in text


@pytest.mark.parametrize(
    "stored",
    [
        {"trust_remote_code": True},
        {"tokenizer": "/tmp/theirs"},
        {"load_format": "runai_streamer"},
        {"worker_cls": "theirs.Worker"},
        {"hf_overrides": {"auto_map": {}}},
        {"quantization": "../theirs"},
        {"max_model_len": "$(id)"},
        {"max_model_len": True},
        {"--out": "x"},
    ],
)
def test_engine_arguments_of_a_cache_are_taken_only_if_they_name_no_code_and_no_file(home, stored):
    identity = replace(tiny.identity(), engine_args=stored, teacher_revision="refs/pr/7", teacher="T")
    with pytest.raises(InputError, match="is not taken from a file; if you trust its value, give it yourself"):
        subcommands.crop(home, identity, "T", "right:0.5", Path("o"), {})
    (name,) = stored
    if name != "--out":
        words = subcommands.crop(home, identity, "T", "right:0.5", Path("o"), {name: "mine"})
        assert f"{name}=mine" in words
        assert "refs/pr/7" not in words


def test_an_import_and_prompts_leave_nothing_for_an_engine(home):
    identity = replace(tiny.identity(), engine_args={"distillkit": {"a": 1}, "template_args": {"b": 2}})
    assert "--engine-arg" not in subcommands.crop(home, identity, "T", "right:0.5", Path("o"), {})


def test_children_do_not_import_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "typer.py").write_text("raise SystemExit('code of the working directory ran')")
    monkeypatch.chdir(tmp_path)
    code, text = subcommands.in_process_of_its_own(["--version"], tmp_path / "x.log", Stop())
    assert (code, text.split()[0]) == (0, "logitcache")


def test_a_command_that_fails_says_why_and_where_its_log_lies(tmp_path):
    log = tmp_path / "x.log"
    code, out = subcommands.in_process_of_its_own(["info", "nowhere"], log, Stop())
    assert (code, out) == (2, "")
    with pytest.raises(InputError, match=r"train lsp:1 seed 0: nowhere.*\(its log: .*x\.log\)"):
        subcommands.check(code, "train lsp:1 seed 0", log)
    assert subcommands.check(143, "x", log) == "SIGTERM"
    log.write_text("12/600 traces\n")
    with pytest.raises(TrainingError, match=r"x was killed by SIGKILL \(out of memory\?\) after '12/600 traces'; run"):
        subcommands.check(137, "x", log)
    with pytest.raises(TrainingError, match="x: 12/600 traces"):
        subcommands.check(255, "x", log)


def test_a_signal_is_passed_on_to_the_command(tmp_path, monkeypatch):
    script = tmp_path / "slow"
    script.write_text("#!/bin/sh\ntrap 'echo passed; exit 143' TERM\necho ready >&2\nwhile :; do sleep 0.05; done\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(subcommands.sys, "executable", str(script))
    log = tmp_path / "x.log"

    def interrupt() -> None:
        while not log.exists() or "ready" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with Stop() as stop:
        stop.patient = True
        thread = threading.Thread(target=interrupt)
        thread.start()
        assert subcommands.in_process_of_its_own(["train"], log, stop) == (143, "passed\n")
        thread.join()


def rows_by_hand() -> list[dict]:
    def of(name: str, seed: int | None, kl: float, accuracy: float, cost: float | None) -> dict:
        known = {"seconds": cost, "flops": cost, "peak_memory": cost, "tokens_fed": cost, "tokens_taught": cost}
        kept = None if cost is None else float(name.partition(":")[2])
        row = {"variant": name, "seed": seed, "kept": kept, "sections": None, "kl": kl, "accuracy none": accuracy}
        return row | (known if cost else dict.fromkeys(known))

    runs = [
        ("lsp:0.5", 0, 1.0, 0.4, 5.0),
        ("lsp:0.5", 1, 2.0, 0.6, 7.0),
        ("lsp:1", 0, 0.5, 0.8, 10.0),
        ("lsp:1", 1, 0.5, 0.8, 10.0),
    ]
    return [of(catalog.BEFORE, None, 3.0, 0.1, None), *(of(*each) for each in runs)]


@pytest.mark.slow
def test_tables_have_means_and_spread_and_shares_of_the_reference(tmp_path):
    rows = rows_by_hand()
    setup = report.Setup(
        teacher="t", student="s", traces=9, prompt_rows=True, shared={}, seeds=2, held_out=0.05, where=None,
        evaluated_where=None, verifier="exact", budgets=["none"], machines=["a machine"], versions=["torch 2"],
    )  # fmt: skip
    shown = [Variant("lsp:0.5", "half", kept=0.5), Variant("lsp:1", "all", kept=1.0)]
    files = report.write(tmp_path, EXPERIMENTS["lsp"], shown, rows, setup)
    assert [file.name for file in files] == ["report.md", "results.csv", "quality.png", "cost.png"]
    text = (tmp_path / "report.md").read_text()
    assert "| before | 3.0000 |" in text
    assert "| lsp:0.5 | 1.5000 ± 0.7071 |" in text
    assert "| lsp:1 | 0.5000 |" in text, "no spread where all seeds agree"
    assert "| lsp:0.5 | 50.0% ± 14.1% |" in text
    assert "| lsp:0.5 | 62.5% ± 17.7% | 60.0% ± 14.1% |" in text, "0.4 and 0.6 of 0.8; 5 and 7 of 10"
    assert "- a machine" in text
    assert "- torch 2" in text
    assert "Not finished" not in text
    assert from_csv((tmp_path / "results.csv").read_text()) == rows
    assert spread([-1e-9], "z.4f") == "0.0000"
    rows[-1]["accuracy none"] = 0.0
    assert all("accuracy none" not in each for each in relative(rows[1:], "lsp:1")), "of nothing, nothing is a share"


@pytest.mark.slow
@pytest.mark.parametrize(
    "evil", ["$\\frac{", "_$a$", "a|b <img src=x>", "\x1b[2J\n# heading\u202e", "[x](javascript:y)"]
)
def test_what_others_wrote_is_text_in_a_report_and_in_its_plots(tmp_path, evil):
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    rows = rows_by_hand()
    shapes = []
    for word in (evil, "good"):
        setup = report.Setup(
            teacher=word, student=word, traces=9, prompt_rows=True, shared={"set": word}, seeds=3, held_out=0.05, where=word,
            evaluated_where=word, verifier=word, budgets=["none", "50%"], machines=[word], versions=[word],
            stopped="SIGTERM", failed=[word],
        )  # fmt: skip
        made = [
            each
            | {f"accuracy {b} [{group}]": 0.5 for b in ("none", "50%") for group in (word, "g")}
            | {"accuracy 50%": 0.5, "reasoning tokens none": 9.0, f"reasoning tokens none [{word}]": 9.0}
            for each in rows
        ]
        for each in made:
            each["variant"] = f"{each['variant']}".replace("lsp:1", word)
        out = tmp_path / f"{len(shapes)}"
        report.write(out, EXPERIMENTS["lsp"], [Variant(word, word, kept=1.0)], made, setup)
        text = (out / "report.md").read_text()
        assert all(line.isprintable() for line in text.split("\n"))
        assert (out / "budgets.png").exists()
        tokens = parser.parse(text)
        tokens += [child for token in tokens for child in token.children or ()]
        shapes.append([token.type for token in tokens if token.type not in ("text", "text_special")])
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_a_plot_that_is_not_ours_is_left(tmp_path):
    (tmp_path / "length.png").write_bytes(b"mine")
    (tmp_path / "budgets.png").write_bytes((b"\x89PNG" + b"x" * 30) + b"tEXtSoftware\0logitcache")
    setup = report.Setup(
        teacher="t", student="s", traces=9, prompt_rows=True, shared={}, seeds=2, held_out=0.05, where=None,
        evaluated_where=None, verifier="exact", budgets=["none"], machines=[], versions=[],
    )  # fmt: skip
    report.write(tmp_path, EXPERIMENTS["lsp"], [Variant("lsp:1", "all", kept=1.0)], rows_by_hand(), setup)
    assert (tmp_path / "length.png").read_bytes() == b"mine"
    assert not (tmp_path / "budgets.png").exists()


@pytest.mark.slow
def test_variants_are_trained_in_processes_of_their_own(options):
    asked = options("lsp", points=(0.5,))
    found = run(asked, progress=silent)
    assert found.signal is None
    assert [row["variant"] for row in found.rows] == ["before", "lsp:0.5"]
    assert (asked.out / "logs" / "train-lsp-0.5-seed-0.log").exists()
    other = tiny.save_model(asked.out.parent / "other", prefix="other")
    with pytest.raises(InputError, match="train lsp:0.5 seed 0: .*has tokenizer") as raised:
        run(replace(asked, out=asked.out.parent / "out2", student=str(other)), progress=silent)
    assert "\n" not in str(raised.value)


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_the_real_engine_scores_a_crop_and_answers_prompts(options, home, tmp_path, monkeypatch):
    right = EXPERIMENTS["halves"].variants(CacheFacts(True, 8))[2:]
    monkeypatch.setitem(EXPERIMENTS, "halves", replace(EXPERIMENTS["halves"], variants=lambda facts: right))
    model = str(tiny.save_model(tmp_path / "model", hidden_size=64, num_key_value_heads=2))
    engine = {"max_model_len": 128, "enforce_eager": True}
    answers = {"max_tokens": 16, "answer_tokens": 5, "reasoning_markers": "w10,w11", "engine_args": engine}
    tiny.write_cache(tmp_path / "cache", eight(), teacher_revision=weights_fingerprint(Path(model)))
    asked = options(
        "halves", cache=tmp_path / "cache", student=model, teacher=model, prompts=str(home / "prompts.jsonl"),
        budgets=("50%", "none"), answers=answers | {"dtype": "float32"},
    )  # fmt: skip
    found = run(asked, progress=silent)
    assert [row["variant"] for row in found.rows] == ["before", "right"]
    assert all(row["reasoning tokens 50%"] <= row["reasoning tokens none"] for row in found.rows)
    cache = Cache.open(asked.out / "crops" / "right-0.5")
    assert len(cache) == 8
    assert cache.identity.derived[-1].endswith("--crop right:0.5")
    assert run(asked, progress=silent).commands == 0
