import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache.cache.reader import Cache
from logitcache.commands.text_runs import describe_evaluation
from logitcache.errors import InputError, StudentError
from logitcache.kernels.reference import sparse_divergence
from logitcache.sections import SECTIONS
from logitcache.student.data.dataset import TraceDataset, collate, targets
from logitcache.student.data.sampler import split
from logitcache.student.data.views import View
from logitcache.student.evaluation.evaluate_run import BINS, evaluate, evaluate_run
from logitcache.student.evaluation.options import EvaluationOptions
from logitcache.student.model.head import attach_head
from tests import tiny
from tests.runs import last_lines
from tests.tiny import one_thread  # noqa: F401

NOTHING = {"kl": None, "top1": None, "rows": 0, "ce": None, "ece": None, "tail": {"teacher": None, "student": None}}


@pytest.fixture(scope="module")
def sharp():
    """A teacher of the student's own shape that is sure of what it says."""
    teacher = tiny.model(seed=7, tie_word_embeddings=False)
    with torch.no_grad():
        teacher.lm_head.weight.normal_(std=1.0)
    return teacher


@pytest.fixture(scope="module")
def cache(tmp_path_factory, sharp):
    return tiny.write_cache(tmp_path_factory.mktemp("cache") / "cache", tiny.traces_of(sharp, 16, 8))


def flat(found: dict | list, name: str = "") -> dict:
    """Every number of an evaluation by its path."""
    items = found.items() if isinstance(found, dict) else enumerate(found)
    numbers = {}
    for key, value in items:
        deep = isinstance(value, dict | list)
        numbers |= flat(value, f"{name}{key}.") if deep else {f"{name}{key}": value}
    return numbers


def test_evaluation_is_the_mean_over_all_taught_rows_and_over_those_of_a_part(cache):
    student, data = tiny.model(seed=3), TraceDataset(cache)
    found = evaluate(student, data, tokens_per_batch=100)
    batch = collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        logits = torch.cat([student(input_ids=g, use_cache=False).logits.flatten(0, 1) for g in batch["groups"]])[
            batch["taught"]
        ]
    kl_N = sparse_divergence(logits, targets(batch)).double()
    ce_N = torch.nn.functional.cross_entropy(logits.double(), batch["labels"], reduction="none")
    top_N = (logits.argmax(dim=1) == batch["ids"][batch["offsets"][:-1]]).double()
    assert found["rows"] == len(kl_N) == int(data.pool.lengths.sum()) - len(data)
    parts = {name: (found["sections"][name], batch["sections"] == i) for i, name in enumerate(SECTIONS)}
    parts |= {str(i): (found["positions"][i], batch["tenths"] == i) for i in range(10)}
    parts["all"] = found, batch["sections"] >= 0
    for part, mine in parts.values():
        assert part["rows"] == int(mine.sum()) > 0
        assert part["kl"] == pytest.approx(kl_N[mine].mean().item(), rel=1e-5)
        assert part["ce"] == pytest.approx(ce_N[mine].mean().item(), rel=1e-5)
        assert part["top1"] == pytest.approx(top_N[mine].mean().item(), abs=1e-12)


def test_calibration_is_what_plain_float64_makes_of_whole_distributions(cache, sharp):
    # A student that has learnt half: sure of itself, and not always right.
    student = tiny.model(seed=7, tie_word_embeddings=False)
    noise = torch.randn(student.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        student.lm_head.weight.copy_(sharp.lm_head.weight + 0.5 * noise)
    found = evaluate(student, TraceDataset(cache))
    confidence, teacher, tails = [], [], []
    for trace in cache:
        with torch.no_grad():
            z_TV = student(torch.tensor(trace.token_ids[None, :-1]).long()).logits[0].double().numpy()
        for r, z_V in enumerate(z_TV):
            q_V = np.exp(z_V - z_V.max()) / np.exp(z_V - z_V.max()).sum()
            entries = slice(trace.rows.offsets[r], trace.rows.offsets[r + 1])
            p = dict(zip(trace.rows.ids[entries].tolist(), np.exp(trace.rows.logprobs[entries]), strict=True))
            confidence.append(q_V.max())
            teacher.append(p.get(int(q_V.argmax()), 0.0))
            tails.append((math.exp(trace.rows.log_tail[r]), 1 - q_V[list(p)].sum()))
    confidence, teacher = np.array(confidence), np.array(teacher)
    bins = [(b / BINS < confidence) & (confidence <= (b + 1) / BINS) for b in range(BINS)]
    used = [mine for mine in bins if mine.any()]
    ece = sum(mine.mean() * abs(confidence[mine].mean() - teacher[mine].mean()) for mine in used)
    assert len(used) > 8
    assert (teacher == 0).any()
    assert 0.1 < found["ece"] == pytest.approx(ece, rel=1e-5)
    assert found["tail"]["teacher"] == pytest.approx(np.mean([t for t, _ in tails]), rel=1e-6)
    assert found["tail"]["student"] == pytest.approx(np.mean([s for _, s in tails]), rel=1e-5)


def test_batches_do_not_change_an_evaluation_and_the_student_is_left_as_it_was(cache):
    student, data = tiny.model(seed=3).train(), TraceDataset(cache)
    one, many = evaluate(student, data, tokens_per_batch=10_000), evaluate(student, data, tokens_per_batch=1)
    assert flat(one) == pytest.approx(flat(many), rel=1e-6)
    assert student.training


def test_the_teacher_as_its_own_student_agrees_and_rows_off_by_one_do_not(cache, sharp):
    # The codec keeps rows to within 1e-5 nat on average (its own tests); float32 logits add less.
    aligned = evaluate(sharp, TraceDataset(cache))
    shifted = evaluate(sharp, TraceDataset(cache, view=tiny.Shifted(View())))
    assert aligned["kl"] < 1e-4
    assert aligned["top1"] > 0.99
    assert aligned["ece"] < 1e-3
    assert aligned["tail"]["student"] == pytest.approx(aligned["tail"]["teacher"], rel=1e-3)
    assert shifted["kl"] > 1
    assert shifted["top1"] < 0.5
    assert shifted["ece"] > 0.1


def test_sections_add_up_to_the_whole_and_tenths_to_the_completion(cache):
    found = evaluate(tiny.model(seed=3), TraceDataset(cache))
    sections, tenths = found["sections"], found["positions"]

    def total(parts, *names):
        values = [p[names[0]] if len(names) == 1 else p[names[0]][names[1]] for p in parts]
        return sum(value * p["rows"] for value, p in zip(values, parts, strict=True))

    completion = [sections["reasoning"], sections["answer"]]
    for names in (("kl",), ("top1",), ("ce",), ("tail", "teacher"), ("tail", "student")):
        assert total(sections.values(), *names) == pytest.approx(total([found], *names), rel=1e-12)
        assert total(tenths, *names) == pytest.approx(total(completion, *names), rel=1e-12)
    assert sum(t["rows"] for t in tenths) == sum(s["rows"] for s in completion)


def test_a_part_without_rows_has_no_mean(cache):
    found = evaluate(tiny.model(), TraceDataset(cache, view=View(sections=("answer",))))
    assert found["sections"]["prompt"] == found["positions"][0] == NOTHING
    assert found["kl"] == found["sections"]["answer"]["kl"]


def test_a_token_taught_without_a_row_counts_for_the_cross_entropy_alone(cache):
    student = tiny.model(seed=3)
    found = evaluate(student, TraceDataset(cache, view=View("reasoning-lsp:0.5")))
    assert found["sections"]["answer"] == NOTHING | {"ce": found["sections"]["answer"]["ce"]}
    assert found["sections"]["answer"]["ce"] > 1
    assert found["rows"] == found["sections"]["prompt"]["rows"] + found["sections"]["reasoning"]["rows"]


def test_a_wrapped_student_is_measured_as_told(cache):
    student, data = tiny.model(seed=3), TraceDataset(cache)
    plain = evaluate(student, data)
    attach_head(student)
    assert evaluate(student, data, measure=lambda batch: student(lesson=batch, metrics=True)) == plain


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
    assert found["traces"] == len(held)
    assert (found["held_out"], found["step"], found["view"], found["dtype"]) == (0.05, None, "full", "fp32")
    assert {k: found[k] for k in ("kl", "ece")} == {
        k: v for k, v in evaluate(tiny.model(seed=1), TraceDataset(cache, held)).items() if k in ("kl", "ece")
    }
    json.dumps(found)


@pytest.mark.parametrize(("name", "seed", "step"), [("done", 3, None), ("run", 2, 3), ("run/checkpoint-3", 2, 3)])
def test_a_run_finished_or_not_is_evaluated_on_what_it_held_out(cache, home, name, seed, step):
    found = ask(cache, home / name)
    held = split(cache.prompt_ids, 0.4)[1]
    assert (found["held_out"], found["step"], found["traces"]) == (0.4, step, len(held))
    assert found["kl"] == evaluate(tiny.model(seed=seed), TraceDataset(cache, held))["kl"]


def test_traces_are_chosen_by_where_and_all_takes_every_one(cache, home):
    every = ask(cache, home / "done", everything=True, where="tokens<=25", sections=("answer",), view="lsp:0.9")
    assert every["traces"] == sum(cache.lengths <= 25) > 0
    assert (every["held_out"], every["where"], every["taught"]) == (None, "tokens<=25", ["answer"])
    text = describe_evaluation(every)
    assert f"on {every['traces']} traces of {cache.path} (all, where tokens<=25); view lsp:0.9 on answer" in text
    assert "reasoning " not in text.splitlines()[2]
    assert f"{every['kl']:.4f}" in text


@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("no held-out trace of a share of 0.05 is tokens>99", StudentError, {"where": "tokens>99"}),
        ("did you mean tokens", InputError, {"where": "token>99"}),
        ("either `everything` or `held_out`", StudentError, {"everything": True, "held_out": 0.1}),
        ("between 0 and 1", StudentError, {"held_out": 0.0}),
        ("choose bf16 or fp32", StudentError, {"dtype": "fp8"}),
        ("give at least 1", StudentError, {"tokens_per_batch": 0}),
        ("did you mean 'lsp:0.5'", StudentError, {"view": "lps:0.5"}),
        ("score .*--crop right:0.5", StudentError, {"view": "right:0.5"}),
        ("is a run that is stopped and has no checkpoint; run its command again", StudentError, {"student": "young"}),
        ("does not exist: give `student`", StudentError, {"student": "nowhere"}),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_way_out(cache, home, message, error, options):
    student = options.pop("student", "model")
    with pytest.raises(error, match=message):
        ask(cache, home / student, **options)


def test_a_view_that_teaches_nothing_is_refused(home, tmp_path):
    made = [tiny.trace(i, list(range(3, 20)), tiny.bigram()[9:18], row_start=8, prompts=4) for i in range(8)]
    with pytest.raises(StudentError, match="view full teaches nothing on 2 traces;.*`prompt_logits`"):
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
    assert found["kl"] == pytest.approx(evaluate(merged, TraceDataset(cache))["kl"], rel=1e-6)
    assert found["kl"] != pytest.approx(base["kl"], rel=1e-3)


EVALUATE = """
import json, sys
from pathlib import Path
from logitcache.student.evaluation.evaluate_run import evaluate_run
from logitcache.student.evaluation.options import EvaluationOptions
from logitcache.student.training.distributed import leave
cache, student = sys.argv[1:]
found = evaluate_run(EvaluationOptions(cache=Path(cache), student=student, everything=True, tokens_per_batch=100))
del found["seconds"]
print(json.dumps(found))
leave()
"""


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(cache, home):
    first, second = map(json.loads, last_lines(["-c", EVALUATE, str(cache.path), str(home / "model")]))
    assert first == second
    data = TraceDataset(Cache.open(cache.path))
    one = flat(evaluate(tiny.model(seed=1), data, tokens_per_batch=100))
    # Rows are the same to the bit; only the order of float64 sums differs.
    assert {k: v for k, v in flat(first).items() if k in one} == pytest.approx(one, rel=1e-12)
