import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache.cache.reader import Cache
from logitcache.errors import NotACacheError, StudentError, TrainingError
from logitcache.sections import SECTIONS
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.data.held_out import split
from logitcache.student.data.views import View
from logitcache.student.model.load import load_student
from logitcache.student.model.metrics import evaluate
from logitcache.student.training.config import DistillConfig, configure
from logitcache.student.training.options import TrainOptions
from logitcache.student.training.run import train
from logitcache.student.training.run_data import choose_traces
from logitcache.student.training.trainer import DistillTrainer
from tests import tiny
from tests.runs import history, launch, weights
from tests.tiny import one_thread  # noqa: F401


def test_a_student_learns_and_is_saved_with_its_tokenizer(options, home):
    opts = options(epochs=6)
    run = train(opts)
    assert run.status == "finished"
    assert run.eval_after.kl < 0.75 * run.eval_before.kl
    assert run.eval_after.top1 > run.eval_before.top1
    saved = json.loads((opts.out / "run.json").read_text())
    assert saved["steps"] == run.steps == len(history(run, "loss")) == 24, "4 in an epoch"
    assert saved["cache"] == tiny.identity().__dict__
    assert saved["tokens_taught"] == saved["tokens_fed"] > 0
    student = AutoModelForCausalLM.from_pretrained(opts.out)
    assert student.config.use_cache
    assert len(AutoTokenizer.from_pretrained(opts.out)) == tiny.VOCAB
    cache = Cache.open(home / "cache")
    held = TraceDataset(cache, split(cache.prompt_ids, 0.2)[1])
    assert evaluate(student, held).kl == pytest.approx(run.eval_after.kl, rel=1e-6)


def test_a_finished_run_does_nothing_and_one_made_otherwise_is_refused_by_name(options, home):
    opts = options()
    train(opts)
    before = {p.name: p.stat().st_mtime_ns for p in opts.out.iterdir()}
    assert train(opts).again
    assert {p.name: p.stat().st_mtime_ns for p in opts.out.iterdir()} == before
    with pytest.raises(StudentError, match=r"made with learning_rate = 0\.01, this run has 0\.02"):
        train(options(learning_rate=2e-2))
    with pytest.raises(StudentError, match=r"made with set\.weight_decay = None, this run has '0\.1'"):
        train(options(set={"weight_decay": "0.1"}))
    other = home / "other"
    tiny.write_cache(other, tiny.traces(20, 10))
    with pytest.raises(StudentError, match=r"made with traces\.count = 24, this run has 20"):
        train(TrainOptions(**options().__dict__ | {"caches": [other]}))


def test_bad_input_is_refused_before_anything_is_written(options, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    bad = {
        "is not a run; give `out`": (StudentError, {"out": "full"}),
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
        train(TrainOptions(**options().__dict__ | {"caches": [tmp_path / "nowhere"]}))
    assert not options().out.exists()


def test_sections_without_rows_are_refused(options, home):
    bare = home / "bare"
    made = [tiny.trace(i, list(range(3, 20)), tiny.bigram()[9:18], row_start=8, prompts=4) for i in range(8)]
    tiny.write_cache(bare, made)
    with pytest.raises(StudentError, match=r"no training trace has rows of prompt;.*`prompt_logits`"):
        train(TrainOptions(**options(sections=("prompt",)).__dict__ | {"caches": [bare]}))
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
        ("lr_scheduler_type", "cosine_with_min_lr", "training arguments: .*min_lr"),
        ("lr_scheduler_kwargs", '{"cycles": 2}', "training arguments: .*'cycles'"),
        ("per_device_train_batch_size", "8", "use `tokens_per_batch`"),
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
    assert one.steps == many.steps > 4
    assert history(one, "loss") == pytest.approx(history(many, "loss"), rel=1e-6)
    assert history(one, "grad_norm") == pytest.approx(history(many, "grad_norm"), rel=1e-5)
    a, b = weights(whole.out), weights(parts.out)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def test_a_non_finite_loss_stops_the_run_with_the_traces(options, home):
    cache = Cache.open(home / "cache")
    config = DistillConfig(output_dir=str(options().out), use_cpu=True, tokens_per_batch=130, eval_strategy="no")
    student = tiny.model()
    run = DistillTrainer(student, config, TraceDataset(cache))
    with torch.no_grad():
        student.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=f"non-finite loss at step 1, in a batch of traces {0:08x}"):
        run.train()


@pytest.mark.slow
def test_bfloat16_trains_float32_weights(options):
    opts = options(dtype="bf16")
    assert train(opts).eval_after.kl > 0
    assert {w.dtype for w in weights(opts.out).values()} == {torch.float32}


def test_the_lines_of_the_readme_train_a_student(home, tmp_path, monkeypatch):
    text = (Path(__file__).parents[3] / "README.md").read_text()
    lines = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "DistillTrainer" in block)
    monkeypatch.chdir(tmp_path)
    changes = {
        "qwen-cache": str(home / "cache"),
        "Qwen/Qwen3-0.6B": str(home / "model"),
        'report_to="wandb"': "use_cpu=True, learning_rate=1e-2, tokens_per_batch=130",
    }
    for there, here in changes.items():
        assert there in lines
        lines = lines.replace(there, here)
    cache = Cache.open(home / "cache")
    known = {"cache": cache}
    exec(lines, known)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    before = evaluate(tiny.model(), TraceDataset(cache)).kl
    assert evaluate(student, TraceDataset(cache)).kl < 0.9 * before
    assert len(AutoTokenizer.from_pretrained(tmp_path / "student")) == tiny.VOCAB
    assert known["student"](input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, tiny.VOCAB), "called as ever"


def test_ids_beyond_the_head_are_no_matter_to_the_library(home, tmp_path):
    wide = [tiny.trace(i, list(range(3, 20)), tiny.bigram(80)[2:18], prompts=4) for i in range(8)]
    tiny.write_cache(tmp_path / "wide", wide, vocab_size=80)
    data = TraceDataset(Cache.open(tmp_path / "wide"))
    assert max(data[i].rows.ids.max() for i in range(8)) >= tiny.VOCAB
    config = DistillConfig(output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=1)
    DistillTrainer(tiny.model(), config, data).train()
    assert max(data[i].rows.ids.max() for i in range(8)) < tiny.VOCAB


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
        assert run.steps == runs[0].steps
        assert history(run, "loss") == pytest.approx(history(runs[0], "loss"), rel=1e-6)
        assert history(run, "grad_norm") == pytest.approx(history(runs[0], "grad_norm"), rel=1e-5)
        assert run.eval_after.kl == pytest.approx(runs[0].eval_after.kl, rel=1e-6)
        assert run.spent.counts.input_tokens == runs[0].spent.counts.input_tokens
        for tensor in state:
            torch.testing.assert_close(state[tensor], saved[0][tensor], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_training_never_imports_vllm(options):
    assert launch(options()).status == "finished"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_and_another_gives_others(options):
    one, two, other = train(options("one")), train(options("two")), train(options("other", seed=1))
    assert history(one, "loss") == history(two, "loss") != history(other, "loss")
    assert one.eval_after == two.eval_after


def one_step(home, view: View | None = None, traces=None, **config) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch of the first traces."""
    data = TraceDataset(Cache.open(home / "cache"), np.arange(6) if traces is None else traces, view)
    student = tiny.model()
    trainer = DistillTrainer(student, DistillConfig(output_dir=str(home / "unused"), use_cpu=True, **config), data)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.optimizer = None
    student.train()
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in student.named_parameters()}


def assert_same(a, b, atol: float = 1e-6) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-6)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=0, atol=atol)


@pytest.mark.parametrize(
    "config",
    [
        {"packing": True},
        {"gradient_checkpointing": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        {"section_weights": {"prompt": 1.0, "reasoning": 1, "answer": 1}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_how_a_batch_is_computed_changes_neither_loss_nor_gradient(home, config, monkeypatch):
    # What torch.compile makes of a graph is its own affair, and takes a minute here; that the graph is right is ours.
    compile_as_ever = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **k: compile_as_ever(m, backend="aot_eager", **k))
    assert_same(one_step(home), one_step(home, **config))


def test_weights_are_those_of_a_sum_over_sections_and_of_the_cross_entropy(home):
    parts = {name: one_step(home, View(sections=(name,)), section_weights={name: 1.0}) for name in SECTIONS}
    rows = {name: rows_of(home, name) for name in SECTIONS}
    factor = {"prompt": 0.0, "reasoning": 1.0, "answer": 2.5}
    mixed = one_step(home, section_weights={"prompt": 0, "answer": 2.5})
    assert mixed[0] == pytest.approx(
        sum(factor[n] * parts[n][0] * rows[n] for n in SECTIONS) / sum(rows.values()), rel=1e-5
    )
    plain, with_ce = one_step(home), one_step(home, ce_weight=0.5)
    data = TraceDataset(Cache.open(home / "cache"), np.arange(6))
    student, total, count = tiny.model(), 0.0, 0
    for i in range(6):
        ids = torch.from_numpy(data.cache[i].token_ids.astype(np.int64))[None]
        total += torch.nn.functional.cross_entropy(student(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert with_ce[0] - plain[0] == pytest.approx(0.5 * total / count, rel=1e-5)


def rows_of(home, section: str) -> int:
    data = TraceDataset(Cache.open(home / "cache"), np.arange(6), View(sections=(section,)))
    return sum(len(data[i].positions) for i in range(6))


def test_a_token_supervised_without_a_row_counts_its_cross_entropy_alone(home):
    cut, whole = View("reasoning-lsp:0.5", ("answer",)), one_step(home, View("reasoning-lsp:0.5", ("answer",)))
    data = TraceDataset(Cache.open(home / "cache"), np.arange(6), cut)
    student, total, count = tiny.model(), 0.0, 0
    for example in (data[i] for i in range(6)):
        assert len(example.rows.ids) == 0
        assert example.ce.all()
        assert not example.kd.any()
        logits = student(torch.from_numpy(example.input_ids)[None]).logits[0, example.positions]
        total += torch.nn.functional.cross_entropy(logits, torch.from_numpy(example.labels), reduction="sum").item()
        count += len(example.labels)
    assert whole[0] == pytest.approx(total / count, rel=1e-5)


def test_a_batch_with_nothing_to_supervise_changes_nothing(home):
    nothing = tiny.trace(0, [3, 4, 5], tiny.bigram()[[3, 4]])  # too short for an answer's rows
    path = home / "nothing"
    tiny.write_cache(path, [nothing, tiny.trace(1, [3, 4, 5], tiny.bigram()[[3, 4]])])
    data = TraceDataset(Cache.open(path), view=View("trsd:0.5", ("prompt",)))
    trainer = DistillTrainer(tiny.model(), DistillConfig(output_dir=str(home / "unused"), use_cpu=True), data)
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_names_its_traces_and_leaves_the_weights(home, tmp_path, monkeypatch, what):
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, tokens_per_batch=130, eval_strategy="no")
    student = tiny.model()
    run = DistillTrainer(student, config, TraceDataset(Cache.open(home / "cache")))
    if what == "loss":
        forward = student.forward
        monkeypatch.setattr(student, "forward", lambda *a, **k: forward(*a, **k) * float("nan"))
    else:
        student.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    before = {name: p.clone() for name, p in student.named_parameters()}
    with pytest.raises(TrainingError, match=rf"non-finite {what} at step 1, in a batch of traces {0:08x}"):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


@pytest.mark.slow
def test_caches_are_mixed_and_traces_chosen(options, home, tmp_path):
    cache = Cache.open(home / "cache")
    tiny.write_cache(tmp_path / "graded", [replace(t, correct=i % 3 == 0) for i, t in enumerate(cache)])
    opts = options("mixed", where="correct", top_k=4, epochs=1)
    with pytest.raises(StudentError, match="cache: no training trace is left where correct"):
        train(opts)
    run = train(replace(opts, caches=[tmp_path / "graded"]))
    assert 0 < run.spent.counts.input_tokens < 0.6 * train(options("all", epochs=1)).spent.counts.input_tokens
    assert run.eval_before.rows == train(options("all", epochs=1)).eval_before.rows, "held out all the same"
    both = train(options("both", epochs=1, caches=[], mix={str(home / "cache"): 0.5, str(tmp_path / "graded"): 0.5}))
    assert (both.settings["caches"], both.settings["share"], both.settings["traces_2"]["count"]) == (2, 0.5, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 2.0}, "use temperature 1, or tail support"),
        ({"divergence": "reverse_kll"}, "did you mean 'reverse_kl'"),
        ({"divergence": "tv", "tail": "sampled"}, "use tail bucket for"),
        ({"tail": "sampled"}, "remove prompt from `sections`"),
        ({"section_weights": {"answers": 2.0}}, "`section_weights` answers=2.0: give prompt, reasoning, answer"),
        ({"ce_weight": -1.0}, "give 0 or more"),
        ({"learning_rate": float("nan")}, "`learning_rate` nan: give 0 or more"),
        ({"epochs": float("nan")}, "`epochs` nan: give a number above 0"),
        ({"seed": -1}, "`seed` -1: give 0 to"),
        ({"max_steps": 0}, "`max_steps` 0: give at least 1"),
        ({"lora_alpha": 8.0}, "give `lora_rank` too"),
        ({"beta": 0.5}, "forward_kl has no `beta`; remove it"),
        ({"section_weights": {"prompt": 0.0}, "sections": ("prompt",)}, "has rows of a section with a weight"),
        ({"set": {"save_only_model": "true"}}, "resuming needs the optimizer"),
        ({"set": {"use_liger_kernel": "true"}}, "fused already"),
        ({"set": {"optim": "adamw_8bit"}}, "training arguments:|bitsandbytes"),
        ({"set": {"save_strategy": "best"}}, "training arguments:"),
        ({"top_k": 9}, "stores 8 ids per row; give 1 to 8"),
        ({"view": "right:0.5"}, "logitcache score --from-cache"),
        ({"set": {"torch_compile": "true"}}, "use `compile`"),
        ({"report_to": ("tensorbord",)}, "tensorbord"),
        ({"attention": "flash_attention_9"}, "flash_attention_9"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(options, changes, message):
    with pytest.raises(StudentError, match=message):
        train(options(**changes))


@pytest.mark.slow
def test_tails_that_were_not_sampled_plainly_are_refused(home, tmp_path):
    made = [
        replace(t, row_start=4, rows=t.rows[3:], token_logprob=t.token_logprob[3:], token_rank=t.token_rank[3:])
        for t in tiny.traces(24, 12)
    ]
    wrong = {
        "scored, not sampled": {},
        "temperature = 0.6": {"temperature": 0.6},
        "top_p = 0.9": {"temperature": 1.0, "top_p": 0.9},
    }
    given: dict[str, Any] = {"student": str(home / "model"), "out": tmp_path / "run", "tail": "sampled"}
    for place, (message, sampling) in enumerate(wrong.items()):
        tiny.write_cache(tmp_path / str(place), made, sampling=sampling, prompt_logits=False)
        given["caches"] = [tmp_path / str(place)]
        with pytest.raises(StudentError, match=f"`tail` sampled.*{message}.*`tail` bucket"):
            train(TrainOptions(**given))
    tiny.write_cache(tmp_path / "good", made, prompt_logits=False)
    run = train(TrainOptions(**given | {"caches": [tmp_path / "good"], "max_steps": 1}))
    assert run.status == "finished"


@pytest.mark.slow
def test_a_cache_counts_once_however_often_it_is_named(options, home, tmp_path):
    for caches in ([home / "cache", home / "model" / ".." / "cache"], [home / "cache"] * 2):
        with pytest.raises(StudentError, match="a cache is given twice"):
            train(options(caches=caches))
    with pytest.raises(StudentError, match="give a share above 0"):
        train(options(caches=[], mix={str(home / "cache"): float("nan")}))
    made = list(Cache.open(home / "cache"))
    part = tiny.write_cache(tmp_path / "part", made[:20])
    assert len(part) == 20
    both, alone = train(options("both", caches=[tmp_path / "part", home / "cache"], epochs=1)), train(options(epochs=1))
    assert both.spent.counts.input_tokens <= alone.spent.counts.input_tokens


def test_no_prompt_held_out_of_one_cache_is_trained_on_in_another(options, home, tmp_path):
    made = list(Cache.open(home / "cache"))
    renamed = [replace(t, trace_id=f"{i:032x}", prompt_id=f"other {t.prompt_id}") for i, t in enumerate(made, 500)]
    tiny.write_cache(tmp_path / "renamed", renamed)
    opts = options(caches=[home / "cache", tmp_path / "renamed"])
    caches = {path: Cache.open(path) for path in opts.shares}
    chosen = choose_traces(opts, caches)

    def prompts(side: str) -> set[bytes]:
        traces = (caches[path][int(i)] for path, found in chosen.items() for i in getattr(found, side))
        return {t.token_ids[: t.sections.reasoning_start].tobytes() for t in traces}

    assert prompts("training")
    assert not prompts("training") & prompts("held_out")
    for path, found in chosen.items():
        assert found.held_out.tolist() == split(caches[path].prompt_ids, 0.2)[1].tolist(), "as eval chooses them"


@pytest.mark.slow
def test_a_run_that_came_to_nothing_is_begun_anew(options):
    with pytest.raises(TrainingError):
        train(options(learning_rate=1e30))
    assert train(options()).status == "finished"
    with pytest.raises(StudentError, match="made with learning_rate"):
        train(options(learning_rate=2e-2))


def test_what_means_the_same_is_the_same_run(options, home):
    train(options(sections=("reasoning", "answer"), where="tokens<=100", max_steps=2))
    again = options(sections=("answer", "reasoning"), where="tokens <= 100", set={"max_steps": "2"})
    assert train(again).again
    with pytest.raises(
        StudentError, match=r"tokens_per_step = 130, .*`tokens_per_batch` x gradient_accumulation_steps"
    ):
        train(replace(again, tokens_per_batch=140))


@pytest.mark.slow
def test_the_best_weights_are_those_that_are_reported(options, home):
    best = {"load_best_model_at_end": "true", "save_strategy": "epoch", "metric_for_best_model": "eval_kl"}
    opts = options(epochs=8, learning_rate=8e-2, set=best)
    run = train(opts)
    cache = Cache.open(home / "cache")
    held = TraceDataset(cache, split(cache.prompt_ids, 0.2)[1])
    found = evaluate(AutoModelForCausalLM.from_pretrained(opts.out), held).kl
    assert run.eval_after.kl == pytest.approx(found, rel=1e-5)
    assert found == pytest.approx(min(history(run, "eval_kl")), rel=1e-5)


def test_a_run_of_few_steps_learns_in_each_of_them(options):
    run = train(options(max_steps=1))
    assert history(run, "learning_rate") == [1e-2]
    assert run.eval_after.kl != run.eval_before.kl


def test_files_that_are_not_ours_are_named(options, tmp_path):
    opts = options()
    train(opts)
    (opts.out / "checkpoint-old").mkdir()
    assert train(opts).again
    (opts.out / "run.json").write_text("[]")
    with pytest.raises(StudentError, match=r"run\.json was not written by `logitcache train`"):
        train(opts)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(StudentError, match=r"adapter_config\.json is not an adapter_config.json of peft"):
        train(options("other", student=str(tmp_path / "adapter")))


def test_two_tokenizers_are_refused(options, home, tmp_path):
    tiny.write_cache(tmp_path / "other", tokenizer_hash="0" * 32)
    with pytest.raises(StudentError, match="their token ids are different; train on one of them"):
        train(options(caches=[home / "cache", tmp_path / "other"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "tv"])
def test_every_divergence_brings_the_student_nearer(options, name):
    run = train(options(divergence=name, epochs=4))
    assert run.eval_after.kl < run.eval_before.kl


@pytest.mark.slow
def test_an_adapter_learns_alone_and_is_loaded_merged(options, home):
    opts = options(lora_rank=4, epochs=4, learning_rate=3e-2)
    run = train(opts)
    assert run.eval_after.kl < run.eval_before.kl
    assert (opts.out / "adapter_model.safetensors").exists()
    assert not (opts.out / "model.safetensors").exists()
    cache = Cache.open(home / "cache")
    student, _ = load_student(opts.out, cache.identity)
    held = TraceDataset(cache, split(cache.prompt_ids, 0.2)[1])
    assert evaluate(student, held).kl == pytest.approx(run.eval_after.kl, rel=1e-5)


@pytest.mark.slow
def test_an_adapter_on_an_adapter_is_refused(options):
    first = options("first", lora_rank=2, max_steps=1)
    train(first)
    with pytest.raises(StudentError, match="is a LoRA adapter already"):
        train(options("second", student=str(first.out), lora_rank=2))
    assert train(options("whole", student=str(first.out), max_steps=1)).status == "finished"


@pytest.mark.slow
def test_an_adapter_goes_on_where_it_was_stopped(options):
    whole, cut = options("whole", lora_rank=4, gradient_checkpointing=True), options("cut", lora_rank=4)
    expected = train(whole)
    launch(cut, stop=5)
    assert history(train(cut), "loss") == pytest.approx(history(expected, "loss"), rel=1e-5)


@pytest.mark.slow
def test_a_log_goes_where_it_is_sent(options):
    opts = options(report_to=("tensorboard",), set={"max_steps": "2"})
    train(opts)
    assert len(list((opts.out / "tensorboard").glob("events.out.tfevents.*"))) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scheduler_kwargs": "abc"}, "lr_scheduler_kwargs=abc: give a JSON object"),
        ({"optim_args": "foo"}, "with `set` optim_args: ValueError: not enough values"),
        ({"adam_beta1": "2"}, "with `set` adam_beta1: ValueError: Invalid beta"),
        ({"dataloader_num_workers": "-1"}, "with `set` dataloader_num_workers: ValueError"),
    ],
)
def test_a_training_argument_that_fails_only_when_used_is_one_line(options, given, message):
    with pytest.raises(StudentError, match=message) as error:
        train(options(max_steps=1, set=given))
    assert "\n" not in str(error.value)
