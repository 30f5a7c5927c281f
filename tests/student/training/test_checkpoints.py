import pytest
import torch

from logitcache.student.training.checkpoints import WORK, checkpoints
from logitcache.student.training.run import train
from logitcache.student.training.trainer import DistillTrainer
from tests import tiny
from tests.runs import CHECKPOINT_FILES, history, launch, same, stop_at, weights
from tests.tiny import one_thread  # noqa: F401

ACROSS_RANKS = 1e-6  # weights of some 0.1: only the order of sums differs
SHORT = {"save_strategy": "steps", "save_steps": "2"}


# In the first epoch, at its end, in the second.
@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_weights(options, monkeypatch, tmp_path, step):
    tiny.save_model(tmp_path / "drops out", attention_dropout=0.2)  # what is drawn goes on, too
    whole, cut = (options(name, student=str(tmp_path / "drops out")) for name in ("whole", "cut"))
    expected = train(whole)
    assert expected.steps == 8
    monkeypatch.setattr(DistillTrainer, "compute_loss", DistillTrainer.compute_loss)  # and back at the end
    stop_at(step)
    stopped = train(cut)
    assert (stopped.status, stopped.signal, stopped.steps) == ("stopped", "SIGTERM", step)
    monkeypatch.undo()
    assert checkpoints(cut.out)[0].name == f"checkpoint-{step}"
    resumed = train(cut)
    assert resumed.status == "finished"
    assert same(weights(whole.out), weights(cut.out))
    assert (resumed.eval_before, resumed.eval_after) == (expected.eval_before, expected.eval_after)
    assert resumed.spent.counts == expected.spent.counts
    assert history(resumed, "loss") == history(expected, "loss")
    assert history(resumed, "eval_kl") == history(expected, "eval_kl"), "at the end of an epoch too"
    assert resumed.spent.total_seconds == pytest.approx(sum(resumed.spent.seconds.values()))


@pytest.mark.slow
def test_a_run_goes_from_one_rank_to_two_and_back_to_the_same_weights(options):
    def given(name: str, ranks: int):
        return options(name, tokens_per_batch=128 // ranks, set={"optim": "sgd"}, learning_rate=0.1)

    whole = train(given("whole", 1))
    for ranks, step in ((1, 2), (2, 6), (1, None)):
        run = launch(given("moved", ranks), ranks, stop=step)
        assert run.status == ("stopped" if step else "finished")
    assert run.steps == whole.steps == 8
    assert history(run, "loss") == pytest.approx(history(whole, "loss"), rel=1e-6)
    assert (run.spent.counts.input_tokens, run.spent.counts.flops) == (
        whole.spent.counts.input_tokens,
        pytest.approx(whole.spent.counts.flops, rel=0.2),
    )
    a, b = weights(given("whole", 1).out), weights(given("moved", 1).out)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=ACROSS_RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("file", CHECKPOINT_FILES[::2] + CHECKPOINT_FILES[-1:])
def test_a_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(options, file):
    opts = options("killed", set=SHORT)
    launch(opts, kill=[6, file])
    assert (opts.out / WORK / "checkpoint-6").exists()
    assert checkpoints(opts.out)[0].name == "checkpoint-4"
    resumed = train(opts)
    expected = train(options("whole", set=SHORT))
    assert same(weights(opts.out), weights(options("whole").out))
    assert history(resumed, "loss") == history(expected, "loss")


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_takes_no_step_more(options):
    opts = options(max_steps=6, set={"save_strategy": "steps", "save_steps": "3"})
    expected, record = train(opts), opts.out / "run.json"
    finished = weights(opts.out)
    (opts.out / "model.safetensors").unlink()
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    resumed = train(opts)
    assert (resumed.status, resumed.steps) == ("finished", 6)
    assert resumed.spent.counts.input_tokens == expected.spent.counts.input_tokens
    assert same(weights(opts.out), finished)
