import json
import math
import operator
from dataclasses import replace

import numpy as np
import pytest
import torch

from logitcache.kernels.reference import sparse_divergence
from logitcache.sections import SECTIONS
from logitcache.student.data.collate import collate
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.data.views import View
from logitcache.student.model.head import attach_head
from logitcache.student.model.measures import Evaluation, Measures, TailMass
from logitcache.student.model.metrics import BINS, evaluate
from tests import tiny
from tests.runs import flat
from tests.tiny import one_thread  # noqa: F401

NOTHING = Measures(kl=None, top1=None, rows=0, ce=None, ece=None, tail=TailMass(None, None))


def test_evaluation_is_the_mean_over_all_supervised_rows_and_over_those_of_a_part(cache):
    student, data = tiny.model(seed=3), TraceDataset(cache)
    found = evaluate(student, data, tokens_per_batch=100)
    batch = collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        logits = torch.cat([student(input_ids=g, use_cache=False).logits.flatten(0, 1) for g in batch.groups])[
            batch.supervised
        ]
    kl_N = sparse_divergence(logits, batch.targets).double()
    ce_N = torch.nn.functional.cross_entropy(logits.double(), batch.targets.labels, reduction="none")
    top_N = (logits.argmax(dim=1) == batch.targets.ids[batch.targets.offsets[:-1]]).double()
    assert found.rows == len(kl_N) == int(data.pool.lengths.sum()) - len(data)
    parts = {name: (found.sections[name], batch.sections == i) for i, name in enumerate(SECTIONS)}
    parts |= {str(i): (found.positions[i], batch.tenths == i) for i in range(10)}
    parts["all"] = found, batch.sections >= 0
    for part, mine in parts.values():
        assert part.rows == int(mine.sum()) > 0
        assert part.kl == pytest.approx(kl_N[mine].mean().item(), rel=1e-5)
        assert part.ce == pytest.approx(ce_N[mine].mean().item(), rel=1e-5)
        assert part.top1 == pytest.approx(top_N[mine].mean().item(), abs=1e-12)


def test_calibration_is_what_plain_float64_makes_of_whole_distributions(cache, sharp):
    # A student that has learned half: sure of itself, and not always right.
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
    assert 0.1 < found.ece == pytest.approx(ece, rel=1e-5)
    assert found.tail.teacher == pytest.approx(np.mean([t for t, _ in tails]), rel=1e-6)
    assert found.tail.student == pytest.approx(np.mean([s for _, s in tails]), rel=1e-5)


def test_batches_do_not_change_an_evaluation_and_the_student_is_left_as_it_was(cache):
    student, data = tiny.model(seed=3).train(), TraceDataset(cache)
    one, many = evaluate(student, data, tokens_per_batch=10_000), evaluate(student, data, tokens_per_batch=1)
    assert flat(one.to_json()) == pytest.approx(flat(many.to_json()), rel=1e-6)
    assert student.training


def test_the_teacher_as_its_own_student_agrees_and_rows_off_by_one_do_not(cache, sharp):
    # The codec keeps rows to within 1e-5 nat on average (its own tests); float32 logits add less.
    aligned = evaluate(sharp, TraceDataset(cache))
    shifted = evaluate(sharp, TraceDataset(cache, view=tiny.Shifted(View())))
    assert aligned.kl < 1e-4
    assert aligned.top1 > 0.99
    assert aligned.ece < 1e-3
    assert aligned.tail.student == pytest.approx(aligned.tail.teacher, rel=1e-3)
    assert shifted.kl > 1
    assert shifted.top1 < 0.5
    assert shifted.ece > 0.1


def test_sections_add_up_to_the_whole_and_tenths_to_the_completion(cache):
    found = evaluate(tiny.model(seed=3), TraceDataset(cache))
    sections, tenths = found.sections, found.positions

    def total(parts, name):
        return sum(operator.attrgetter(name)(p) * p.rows for p in parts)

    completion = [sections["reasoning"], sections["answer"]]
    for name in ("kl", "top1", "ce", "tail.teacher", "tail.student"):
        assert total(sections.values(), name) == pytest.approx(total([found], name), rel=1e-12)
        assert total(tenths, name) == pytest.approx(total(completion, name), rel=1e-12)
    assert sum(t.rows for t in tenths) == sum(s.rows for s in completion)


def test_an_evaluation_reads_back_from_its_json_with_the_keys_it_always_had(cache):
    found = evaluate(tiny.model(seed=3), TraceDataset(cache))
    written = json.loads(json.dumps(found.to_json()))
    assert list(written) == ["kl", "top1", "rows", "ce", "ece", "tail", "sections", "positions"]
    assert list(written["sections"]["answer"]) == ["kl", "top1", "rows", "ce", "ece", "tail"]
    assert Evaluation.from_json(written) == found


def test_a_part_without_rows_has_no_mean(cache):
    found = evaluate(tiny.model(), TraceDataset(cache, view=View(sections=("answer",))))
    assert found.sections["prompt"] == found.positions[0] == NOTHING
    assert found.kl == found.sections["answer"].kl


def test_a_token_supervised_without_a_row_counts_for_the_cross_entropy_alone(cache):
    student = tiny.model(seed=3)
    found = evaluate(student, TraceDataset(cache, view=View("reasoning-lsp:0.5")))
    assert found.sections["answer"] == replace(NOTHING, ce=found.sections["answer"].ce)
    assert found.sections["answer"].ce > 1
    assert found.rows == found.sections["prompt"].rows + found.sections["reasoning"].rows


def test_a_wrapped_student_is_measured_as_told(cache):
    student, data = tiny.model(seed=3), TraceDataset(cache)
    plain = evaluate(student, data)
    attach_head(student)
    assert evaluate(student, data, measure=lambda batch: student(distill=batch, metrics=True)) == plain
