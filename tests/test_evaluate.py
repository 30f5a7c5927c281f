import pytest
import torch

from logitcache.kernels.reference import sparse_divergence
from logitcache.student.data import TraceDataset, collate, targets
from logitcache.student.evaluate import evaluate
from logitcache.student.views import SECTIONS, View
from tests import tiny
from tests.tiny import one_thread  # noqa: F401


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


def test_evaluation_is_the_mean_over_all_taught_rows_and_over_those_of_a_section(cache):
    student, data = tiny.model(seed=3), TraceDataset(cache)
    found = evaluate(student, data, tokens_per_batch=100)
    batch = collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        logits = torch.cat([student(input_ids=g, use_cache=False).logits.flatten(0, 1) for g in batch["groups"]])[
            batch["taught"]
        ]
    kl_N = sparse_divergence(logits, targets(batch)).double()
    top_N = logits.argmax(dim=1) == batch["ids"][batch["offsets"][:-1]]
    assert found["rows"] == len(kl_N) == int(data.lengths.sum()) - len(data)
    assert found["kl"] == pytest.approx(kl_N.mean().item(), rel=1e-5)
    assert found["top1"] == pytest.approx(top_N.double().mean().item(), abs=1e-12)
    for i, name in enumerate(SECTIONS):
        mine = batch["sections"] == i
        assert found["sections"][name]["rows"] == int(mine.sum()) > 0
        assert found["sections"][name]["kl"] == pytest.approx(kl_N[mine].mean().item(), rel=1e-5)


def test_batches_do_not_change_an_evaluation_and_the_student_is_left_as_it_was(cache):
    student, data = tiny.model(seed=3).train(), TraceDataset(cache)
    one, many = evaluate(student, data, tokens_per_batch=10_000), evaluate(student, data, tokens_per_batch=1)
    assert one["kl"] == pytest.approx(many["kl"], rel=1e-6)
    assert one["top1"] == many["top1"]
    assert student.training


def test_the_teacher_as_its_own_student_agrees_and_rows_off_by_one_do_not(cache, sharp):
    # The codec keeps rows to within 1e-5 nat on average (its own tests); float32 logits add less.
    aligned = evaluate(sharp, TraceDataset(cache))
    shifted = evaluate(sharp, TraceDataset(cache, view=tiny.Shifted(View())))
    assert aligned["kl"] < 1e-4
    assert aligned["top1"] > 0.99
    assert shifted["kl"] > 1
    assert shifted["top1"] < 0.5


def test_a_section_without_rows_has_no_mean(cache):
    found = evaluate(tiny.model(), TraceDataset(cache, view=View(sections=("answer",))))
    assert found["sections"]["prompt"] == {"kl": None, "top1": None, "rows": 0}
    assert found["kl"] == found["sections"]["answer"]["kl"]
