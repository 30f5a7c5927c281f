import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache.cache import Cache
from logitcache.errors import NotACacheError, StudentError, TrainingError
from logitcache.student.data import TraceDataset, split
from logitcache.student.evaluate import evaluate
from logitcache.student.model import load_student
from logitcache.student.run import TrainOptions, configure, train
from logitcache.student.trainer import DistillConfig, DistillTrainer, drop_after, latest_checkpoint
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.write_cache(home / "cache")
    tiny.save_model(home / "model")
    return home


@pytest.fixture
def options(home, tmp_path):
    """A run of 8 steps in 2 epochs; keywords change it."""

    def make(out: str = "run", **changes) -> TrainOptions:
        given = {"held_out": 0.2, "tokens_per_batch": 130, "epochs": 2, "learning_rate": 1e-2}
        return TrainOptions(home / "cache", str(home / "model"), tmp_path / out, **given | changes)

    return make


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(run, name: str) -> list[float]:
    return [entry[name] for entry in run["history"] if name in entry]


def test_a_student_learns_and_is_saved_with_its_tokenizer(options, home):
    opts = options(epochs=6)
    run = train(opts)
    assert run["status"] == "finished"
    assert run["eval_after"]["kl"] < 0.75 * run["eval_before"]["kl"]
    assert run["eval_after"]["top1"] > run["eval_before"]["top1"]
    saved = json.loads((opts.out / "run.json").read_text())
    assert saved["steps"] == run["steps"] == 6 * len(history(run, "loss")) // 6
    assert saved["cache"] == tiny.identity().__dict__
    assert saved["tokens_taught"] == saved["tokens_fed"] > 0
    student = AutoModelForCausalLM.from_pretrained(opts.out)
    assert student.config.use_cache
    assert len(AutoTokenizer.from_pretrained(opts.out)) == tiny.VOCAB
    cache = Cache.open(home / "cache")
    held = TraceDataset(cache, split(cache.prompt_ids, 0.2)[1])
    assert evaluate(student, held)["kl"] == pytest.approx(run["eval_after"]["kl"], rel=1e-6)


def test_a_finished_run_does_nothing_and_one_made_otherwise_is_refused_by_name(options, home):
    opts = options()
    train(opts)
    before = {p.name: p.stat().st_mtime_ns for p in opts.out.iterdir()}
    assert train(opts)["again"]
    assert {p.name: p.stat().st_mtime_ns for p in opts.out.iterdir()} == before
    with pytest.raises(StudentError, match=r"made with learning_rate = 0\.01, this run has 0\.02"):
        train(options(learning_rate=2e-2))
    with pytest.raises(StudentError, match=r"made with set\.weight_decay = None, this run has '0\.1'"):
        train(options(set={"weight_decay": "0.1"}))
    other = home / "other"
    tiny.write_cache(other, tiny.traces(20, 10))
    with pytest.raises(StudentError, match=r"made with traces\.count = 24, this run has 20"):
        train(TrainOptions(**options().__dict__ | {"cache": other}))


def test_bad_input_is_refused_before_anything_is_written(options, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    bad = {
        "is not a run; give --out": (StudentError, {"out": "full"}),
        "did you mean 'full'": (StudentError, {"view": "ful"}),
        "choose bf16 or fp32": (StudentError, {"dtype": "fp8"}),
        "did you mean 'weight_decay'": (StudentError, {"set": {"weight_decai": "1"}}),
        "between 0 and 1": (StudentError, {"held_out": 0}),
        "tokens_per_batch": (StudentError, {"tokens_per_batch": 0}),
    }
    for message, (error, changes) in bad.items():
        with pytest.raises(error, match=message):
            train(options(**changes))
    with pytest.raises(NotACacheError):
        train(TrainOptions(**options().__dict__ | {"cache": tmp_path / "nowhere"}))
    assert not options().out.exists()


def test_sections_without_rows_are_refused(options, home):
    bare = home / "bare"
    made = [tiny.trace(i, list(range(3, 20)), tiny.bigram()[9:18], row_start=8, prompts=4) for i in range(8)]
    tiny.write_cache(bare, made)
    with pytest.raises(StudentError, match=r"no training trace has rows of prompt;.*--prompt-logits"):
        train(TrainOptions(**options(sections=("prompt",)).__dict__ | {"cache": bare}))
    assert not options().out.exists()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("weight_decay", "0.1", 0.1),
        ("warmup_steps", 0.1, 0.1),
        ("gradient_accumulation_steps", "4", 4),
        ("gradient_checkpointing", "true", True),
        ("save_minutes", "none", None),
        ("lr_scheduler_type", "linear", "linear"),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("run_name", "7", "7"),
    ],
)
def test_a_setting_is_read_by_its_fields_type(options, name, text, value):
    assert getattr(configure(options(set={name: text})), name) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("weight_decay", "much", "expected float"),
        ("gradient_accumulation_steps", "2.5", "expected int"),
        ("optim", "adamw_torchh", "did you mean 'adamw_torch'"),
        ("lr_scheduler_type", "cosin", "did you mean 'cosine'"),
        ("per_device_train_batch_size", "8", "use tokens_per_batch"),
    ],
)
def test_a_setting_that_does_not_fit_says_what_would(options, name, text, message):
    with pytest.raises(StudentError, match=message):
        configure(options(set={name: text}))


@pytest.mark.parametrize("accumulation", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_accumulated_batches_equal_one_batch(options, accumulation):
    # 130 tokens a step either way; at 5 x 26 some micro-batches hold nothing. Only the order of sums differs.
    plain = {"optim": "sgd", "save_strategy": "no"}
    whole = options("whole", set=plain, learning_rate=0.1)
    parts = options(
        "parts",
        set=plain | {"gradient_accumulation_steps": str(accumulation)},
        tokens_per_batch=130 // accumulation,
        learning_rate=0.1,
    )
    one, many = train(whole), train(parts)
    assert one["steps"] == many["steps"] > 4
    assert history(one, "loss") == pytest.approx(history(many, "loss"), rel=1e-6)
    assert history(one, "grad_norm") == pytest.approx(history(many, "grad_norm"), rel=1e-5)
    a, b = weights(whole.out), weights(parts.out)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def stop_at(monkeypatch, step: int) -> None:
    """SIGTERM in the middle of that step."""
    compute_loss = DistillTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "compute_loss", interrupted)


# In the first epoch, at its end, in the second.
@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_weights(options, monkeypatch, step):
    whole, cut = options("whole"), options("cut")
    expected = train(whole)
    assert expected["steps"] == 8
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        stopped = train(cut)
    assert (stopped["status"], stopped["signal"], stopped["steps"]) == ("stopped", "SIGTERM", step)
    assert latest_checkpoint(cut.out) == str(cut.out / f"checkpoint-{step}")
    resumed = train(cut)
    assert resumed["status"] == "finished"
    assert same(weights(whole.out), weights(cut.out))
    assert resumed["eval_before"] == expected["eval_before"]
    assert resumed["eval_after"] == expected["eval_after"]
    assert resumed["tokens_fed"] == expected["tokens_fed"]
    assert history(resumed, "loss") == history(expected, "loss")


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_takes_no_step_more(options):
    opts = options(max_steps=6, set={"save_strategy": "steps", "save_steps": "3"})
    expected, record = train(opts), opts.out / "run.json"
    finished = weights(opts.out)
    (opts.out / "model.safetensors").unlink()
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    resumed = train(opts)
    assert (resumed["status"], resumed["steps"]) == ("finished", 6)
    assert resumed["tokens_fed"] == expected["tokens_fed"]
    assert same(weights(opts.out), finished)


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"epo')
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    drop_after(tmp_path, latest_checkpoint(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_a_loss_that_is_no_number_stops_the_run_with_the_traces(options, home):
    cache = Cache.open(home / "cache")
    config = DistillConfig(output_dir=str(options().out), use_cpu=True, tokens_per_batch=130, eval_strategy="no")
    student = tiny.model()
    run = DistillTrainer(student, config, TraceDataset(cache))
    with torch.no_grad():
        student.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=f"loss is nan at step 1, in a batch of traces {0:08x}"):
        run.train()


@pytest.mark.slow
def test_bfloat16_trains_float32_weights(options):
    opts = options(dtype="bf16")
    assert train(opts)["eval_after"]["kl"] > 0
    assert {w.dtype for w in weights(opts.out).values()} == {torch.float32}


@pytest.mark.slow
def test_the_five_lines_of_the_library_train_a_student(home, tmp_path):
    cache = Cache.open(home / "cache")
    student, tokenizer = load_student(home / "model", cache.identity)
    taught, held = (TraceDataset(cache, side) for side in split(cache.prompt_ids, 0.2))
    config = DistillConfig(
        str(tmp_path / "out"), num_train_epochs=2, use_cpu=True, tokens_per_batch=130, learning_rate=1e-2
    )
    run = DistillTrainer(student, config, taught, eval_dataset=held, processing_class=tokenizer)
    before = run.evaluate()["eval_kl"]
    run.train()
    assert run.evaluate()["eval_kl"] < before
    assert student(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, tiny.VOCAB), (
        "the model is still called as ever"
    )


TRAIN = """
import sys, json
from pathlib import Path
from logitcache.student.run import TrainOptions, train
options = json.loads(sys.argv[1])
run = train(TrainOptions(Path(options.pop("cache")), out=Path(options.pop("out")), **options))
assert "vllm" not in sys.modules, "the student's side imported vllm"
print(json.dumps(run, default=str))
"""


def launch(options: TrainOptions, ranks: int = 1) -> dict:
    """The same in processes of its own, `ranks` of them over gloo."""
    text = json.dumps({k: v for k, v in options.__dict__.items() if v is not None}, default=str)
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", TRAIN, text],
                env=shared | own,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    out, err = processes[0].communicate(timeout=240)
    others = [p.communicate(timeout=60) for p in processes[1:]]
    assert all(p.returncode == 0 for p in processes), (err.decode()[-3000:], others)
    return json.loads(out.decode().splitlines()[-1])


@pytest.mark.slow
def test_two_ranks_equal_one_with_accumulation(options):
    plain = {"optim": "sgd"}
    runs, saved = [], []
    for name, ranks, accumulation in (("a", 1, 4), ("b", 1, 1), ("c", 2, 2)):
        given = options(
            name,
            set=plain | {"gradient_accumulation_steps": str(accumulation)},
            tokens_per_batch=128 // accumulation // ranks,
            learning_rate=0.1,
        )
        runs.append(launch(given, ranks))
        saved.append(weights(given.out))
    for run, state in zip(runs[1:], saved[1:], strict=True):
        assert run["steps"] == runs[0]["steps"]
        assert history(run, "loss") == pytest.approx(history(runs[0], "loss"), rel=1e-6)
        assert history(run, "grad_norm") == pytest.approx(history(runs[0], "grad_norm"), rel=1e-5)
        assert run["eval_after"]["kl"] == pytest.approx(runs[0]["eval_after"]["kl"], rel=1e-6)
        assert run["tokens_fed"] == runs[0]["tokens_fed"]
        for tensor in state:
            torch.testing.assert_close(state[tensor], saved[0][tensor], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_training_never_imports_vllm(options):
    assert launch(options())["status"] == "finished"
