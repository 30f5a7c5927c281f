import json
from pathlib import Path

import pytest
import torch

from logitcache.cache.reader import Cache
from logitcache.commands.text_runs import describe_evaluation
from logitcache.errors import InputError, StudentError
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.data.held_out import split
from logitcache.student.evaluation.evaluate_run import evaluate_run
from logitcache.student.evaluation.options import EvaluationOptions
from logitcache.student.model.metrics import evaluate
from tests import tiny
from tests.runs import flat, last_lines
from tests.tiny import one_thread  # noqa: F401

# The command.


@pytest.fixture(scope="module")
def home(tmp_path_factory, cache) -> Path:
    """A cache, and a run on it that has been going for three steps, with what a kill left of a fourth."""
    home = tmp_path_factory.mktemp("home")
    tiny.save_model(home / "model", seed=1)
    record = {"status": "running", "held_out": 0.4, "student": str(home / "model")}
    for name in ("run", "young"):
        (home / name).mkdir()
        (home / name / "run.json").write_text(json.dumps(record))
    tiny.save_model(home / "run" / "checkpoint-3", seed=2)
    (home / "run" / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "log_history": []}')
    (home / "run" / "checkpoint-4").mkdir()
    tiny.save_model(home / "done", seed=3)
    (home / "done" / "run.json").write_text(json.dumps(record | {"status": "finished"}))
    return home


def ask(cache, student, **options):
    return evaluate_run(EvaluationOptions(cache=cache.path, student=str(student), **options))


def test_a_model_is_evaluated_on_the_traces_that_training_holds_out(cache, home):
    found = ask(cache, home / "model")
    held = split(cache.prompt_ids, 0.05)[1]
    assert found.traces == len(held)
    assert (found.held_out, found.step, found.view, found.dtype) == (0.05, None, "full", "fp32")
    expected = evaluate(tiny.model(seed=1), TraceDataset(cache, held))
    assert found.found == expected
    printed = json.loads(json.dumps(found.to_json()))
    assert (printed["kl"], printed["taught"]) == (expected.kl, ["prompt", "reasoning", "answer"])


@pytest.mark.parametrize(("name", "seed", "step"), [("done", 3, None), ("run", 2, 3), ("run/checkpoint-3", 2, 3)])
def test_a_run_finished_or_not_is_evaluated_on_what_it_held_out(cache, home, name, seed, step):
    found = ask(cache, home / name)
    held = split(cache.prompt_ids, 0.4)[1]
    assert (found.held_out, found.step, found.traces) == (0.4, step, len(held))
    assert found.found.kl == evaluate(tiny.model(seed=seed), TraceDataset(cache, held)).kl


def test_traces_are_chosen_by_where_and_all_takes_every_one(cache, home):
    every = ask(cache, home / "done", everything=True, where="tokens<=25", sections=("answer",), view="lsp:0.9")
    assert every.traces == sum(cache.lengths <= 25) > 0
    assert (every.held_out, every.where, every.sections) == (None, "tokens<=25", ["answer"])
    text = describe_evaluation(every)
    assert f"on {every.traces} traces of {cache.path} (all, where tokens<=25); view lsp:0.9 on answer" in text
    assert "reasoning " not in text.splitlines()[2]
    assert f"{every.found.kl:.4f}" in text


@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("no held-out trace of a share of 0.05 matches `where` tokens>99", StudentError, {"where": "tokens>99"}),
        ("did you mean tokens", InputError, {"where": "token>99"}),
        ("either `everything` or `held_out`", StudentError, {"everything": True, "held_out": 0.1}),
        ("between 0 and 1", StudentError, {"held_out": 0.0}),
        ("choose bf16 or fp32", StudentError, {"dtype": "fp8"}),
        ("give at least 1", StudentError, {"tokens_per_batch": 0}),
        ("did you mean 'lsp:0.5'", StudentError, {"view": "lps:0.5"}),
        ("score .*--crop right:0.5", StudentError, {"view": "right:0.5"}),
        ("this run is stopped and has no checkpoint; run its command again", StudentError, {"student": "young"}),
        ("does not exist: give `student`", StudentError, {"student": "nowhere"}),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_way_out(cache, home, message, error, options):
    student = options.pop("student", "model")
    with pytest.raises(error, match=message):
        ask(cache, home / student, **options)


def test_a_view_that_supervises_nothing_is_refused(home, tmp_path):
    made = [tiny.trace(i, list(range(3, 20)), tiny.bigram()[9:18], row_start=8, prompts=4) for i in range(8)]
    with pytest.raises(StudentError, match="view full supervises no token of 2 traces;.*`prompt_logits`"):
        ask(tiny.write_cache(tmp_path / "bare", made, shards=1), home / "model", sections=("prompt",), held_out=0.01)


@pytest.mark.slow
def test_a_lora_adapter_is_evaluated_on_its_base(cache, home):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny.model(seed=1), peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    adapted.peft_config["default"].base_model_name_or_path = str(home / "model")
    adapted.save_pretrained(home / "adapter")
    tiny.tokenizer().save_pretrained(home / "adapter")
    found, base = ask(cache, home / "adapter", everything=True), ask(cache, home / "model", everything=True)
    merged = adapted.merge_and_unload()
    assert found.found.kl == pytest.approx(evaluate(merged, TraceDataset(cache)).kl, rel=1e-6)
    assert found.found.kl != pytest.approx(base.found.kl, rel=1e-3)


EVALUATE = """
import json, sys
from pathlib import Path
from logitcache.student.evaluation.evaluate_run import evaluate_run
from logitcache.student.evaluation.options import EvaluationOptions
from logitcache.student.training.distributed import end_process_group
cache, student = sys.argv[1:]
found = evaluate_run(EvaluationOptions(cache=Path(cache), student=student, everything=True, tokens_per_batch=100)).to_json()
del found["seconds"]
print(json.dumps(found))
end_process_group()
"""


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(cache, home):
    first, second = map(json.loads, last_lines(["-c", EVALUATE, str(cache.path), str(home / "model")]))
    assert first == second
    data = TraceDataset(Cache.open(cache.path))
    one = flat(evaluate(tiny.model(seed=1), data, tokens_per_batch=100).to_json())
    # Rows are the same to the bit; only the order of float64 sums differs.
    assert {k: v for k, v in flat(first).items() if k in one} == pytest.approx(one, rel=1e-12)
