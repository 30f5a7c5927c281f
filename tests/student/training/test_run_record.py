import json

import pytest

from logitcache.student.model.measures import Evaluation, Measures, TailMass
from logitcache.student.training.run_record import Counts, RunRecord, Spent

MEANS = {"kl": 0.5, "top1": 0.75, "rows": 100, "ce": 1.5, "ece": 0.1, "tail": TailMass(0.25, 0.5)}
EVALUATION = Evaluation(**MEANS, sections={"answer": Measures(**MEANS)}, positions=[Measures(**MEANS)])
SPENT = Spent(Counts(input_tokens=300, supervised_tokens=200, flops=7000), {"forward": 1.0, "backward": 2.0}, 4096)


def test_the_keys_of_a_finished_run_on_disk():
    run = RunRecord(
        status="finished", settings={"student": "s", "seed": 1}, eval_before=EVALUATION, versions={"torch": "2"},
        spent=SPENT, steps=3, eval_after=EVALUATION, history=[{"loss": 1.0}],
    )  # fmt: skip
    found = json.loads(json.dumps(run.to_json()))
    assert " ".join(found) == (
        "status student seed eval_before versions tokens_fed tokens_taught seconds tokens_per_second cost steps "
        "eval_after history"
    )
    assert (found["tokens_fed"], found["tokens_taught"], found["seconds"]) == (300, 200, 3.0)
    assert found["tokens_per_second"] == pytest.approx(100)
    assert found["cost"] == {"flops": 7000, "seconds": {"forward": 1.0, "backward": 2.0}, "peak_memory": 4096}
    assert RunRecord.from_json(found) == run


def test_a_run_that_has_just_begun_reads_back():
    run = RunRecord(status="running", settings={"student": "s"}, eval_before=EVALUATION, versions={"torch": "2"})
    assert " ".join(run.to_json()) == "status student eval_before versions"
    assert RunRecord.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_counts_add_up():
    assert Counts(1, 2, 3) + Counts(10, 20, 30) == Counts(11, 22, 33)
