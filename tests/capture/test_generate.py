import errno
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from logitcache.cache.claim import claim
from logitcache.cache.place import place_of
from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.cache.workers import Worker
from logitcache.capture.filling import Filling
from logitcache.capture.generate import GenerateOptions, generate
from logitcache.capture.job import identify
from logitcache.capture.runner import open_ledger
from logitcache.commands.text_capture import describe_summary
from logitcache.errors import CacheBusyError, EngineError, IdentityError, InputError, ModelError, WriteError
from logitcache.inference import session
from logitcache.sections import Markers
from tests import fake_engine


@pytest.fixture
def engine(monkeypatch):
    return fake_engine.install(monkeypatch)


@pytest.fixture
def prompts(tmp_path):
    def write(count: int, **more) -> str:
        rows = [json.dumps({"id": f"p{i}", "prompt": f"question {i} is odd", "level": i} | more) for i in range(count)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
        return str(tmp_path / "prompts.jsonl")

    return write


def options(source: str, out: Path, **changes) -> GenerateOptions:
    return GenerateOptions(prompts=source, out=out, **{"teacher": "fake", "top_k": 8, "unit_size": 3, **changes})


def keys(cache: Cache) -> list[tuple[str, int]]:
    return sorted((t.prompt_id, t.sample_index) for t in cache)


def test_every_prompt_becomes_a_trace_that_reads_back(engine, prompts, tmp_path) -> None:
    summary = generate(options(prompts(10), tmp_path / "c"))
    cache = Cache.open(tmp_path / "c")
    assert (summary.made, len(cache), len(cache.shards)) == (10, 10, 4)
    assert keys(cache) == [(f"p{i}", 0) for i in range(10)]
    for trace in cache:
        assert trace.row_start == trace.sections.prompt_end == 4
        assert len(trace.rows) == len(trace.token_ids) - trace.row_start == len(trace.token_logprob)
        assert trace.text.startswith("<think>")
        assert not trace.text.endswith("<eos>")
        assert trace.metadata == {"level": int(trace.prompt_id[1:])}
        s = trace.sections
        assert [trace.token_ids[s.opening][0], trace.token_ids[s.closing][0]] == [
            fake_engine.VOCAB - 3,
            fake_engine.VOCAB - 2,
        ]
        np.testing.assert_allclose(
            np.add.reduceat(np.exp(trace.logprobs), trace.row_offsets[:-1]) + np.exp(trace.log_tail), 1, atol=1e-5
        )


def test_the_same_call_again_does_nothing_and_starts_no_engine(engine, prompts, tmp_path) -> None:
    source = prompts(5)
    generate(options(source, tmp_path / "c"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c" / "shards").iterdir()}
    summary = generate(options(source, tmp_path / "c"))
    assert (summary.made, summary.before, engine.started) == (0, 5, 1)
    assert "nothing to do, all 5 traces are present" in describe_summary(summary, tmp_path / "c")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c" / "shards").iterdir()} == before


def test_more_prompts_and_more_samples_make_only_what_is_missing(engine, prompts, tmp_path) -> None:
    generate(options(prompts(4), tmp_path / "c"))
    grown = generate(options(prompts(6), tmp_path / "c", samples=2))
    assert (grown.before, grown.made) == (4, 8)
    assert keys(Cache.open(tmp_path / "c")) == [(f"p{i}", s) for i in range(6) for s in range(2)]


def test_the_engine_always_has_a_queue_until_the_prompts_run_out(engine, prompts, tmp_path) -> None:
    generate(options(prompts(40), tmp_path / "c"))
    started_all = next(i for i, (_, waiting) in enumerate(engine.last.queue_at_step) if waiting == 0)
    assert all(running == 4 and waiting > 0 for running, waiting in engine.last.queue_at_step[:started_all])
    assert sum(1 for r, _ in engine.last.queue_at_step[started_all:]) < 20, "only the last few run without a queue"


def test_no_finished_trace_waits_for_a_longer_one(engine, prompts, tmp_path, monkeypatch) -> None:
    """The first prompt never ends; what ends meanwhile is published when a shard is full."""
    published = []

    class Straggler(engine):
        def step(self):
            for state in self.running.values():
                if state[0][1] == first:
                    state[1] = 0
            published.append(len(list((tmp_path / "c" / "shards").glob("*.json"))))
            if published[-1] == 3:  # 9 of the other 9
                first.clear()
            return super().step()

    first = [fake_engine.token_id(word) for word in ["question", "0", "is", "odd"]]
    monkeypatch.setattr(session, "Engine", Straggler)
    summary = generate(options(prompts(10), tmp_path / "c"))
    assert summary.made == 10
    cache = Cache.open(tmp_path / "c")
    assert [s.trace_count for s in cache.shards] == [3, 3, 3, 1]
    assert cache.prompt_ids[-1] == "p0"


def test_an_engine_that_gets_nothing_now_publishes_what_it_has_before_it_asks_again(engine, prompts, tmp_path) -> None:
    """What the ledger of a cluster hands out may depend on what was published."""
    given = options(prompts(6), tmp_path / "c", unit_size=64)
    task, identity = given.task()
    place = place_of(given.out)
    ledger, first = open_ledger(task, identity, place)
    ledger.join(0)
    assert first

    def ask(method, *args):
        if method == "take" and ledger.status().held:
            return []
        return getattr(ledger, method)(0, *((1,) if method == "take" else args))

    Filling(task, identity, place, ask, first, "").run(6)
    assert [s.trace_count for s in Cache.open(given.out).shards] == [1] * 6


def test_a_shard_of_enough_bytes_takes_no_more_traces(engine, prompts, tmp_path) -> None:
    generate(options(prompts(10), tmp_path / "c", unit_size=64, unit_bytes=1))
    assert [s.trace_count for s in Cache.open(tmp_path / "c").shards] == [1] * 10
    generate(options(prompts(10), tmp_path / "d", unit_size=64, unit_bytes=2000))
    shards = Cache.open(tmp_path / "d").shards
    assert 1 < len(shards) < 10
    assert all(s.block_bytes < 4000 for s in shards)


def test_a_dead_engine_loses_nothing_that_finished(engine, prompts, tmp_path) -> None:
    engine.steps_before_failure, engine.failure = 15, EngineError("vLLM died: boom")
    source = prompts(20)
    with pytest.raises(
        EngineError, match="boom; everything published is safe: fix the cause, then run the same command"
    ):
        generate(options(source, tmp_path / "c"))
    finished = engine.last.made
    assert 0 < len(finished) < 20
    assert sorted(Cache.open(tmp_path / "c").trace_ids) == sorted(finished)
    engine.steps_before_failure = None
    summary = generate(options(source, tmp_path / "c"))
    assert summary.made == 20 - len(finished)
    assert keys(Cache.open(tmp_path / "c")) == sorted((f"p{i}", 0) for i in range(20))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_publishes_what_finished_and_can_be_resumed(engine, prompts, tmp_path, number) -> None:
    class Signalling(engine):
        def step(self):
            if self.steps == 15:
                os.kill(os.getpid(), number)
            return super().step()

    import logitcache.inference.session as module

    source, original = prompts(20), module.Engine
    module.Engine = Signalling
    try:
        summary = generate(options(source, tmp_path / "c"))
    finally:
        module.Engine = original
    assert summary.stopped == number.name
    assert 0 < summary.made == len(Cache.open(tmp_path / "c")) < 20
    assert f"stopped by {number.name}: run the same command to resume" in describe_summary(summary, tmp_path / "c")
    assert generate(options(source, tmp_path / "c")).made == 20 - summary.made


def test_a_full_disk_ends_the_command_and_keeps_the_shards_before(engine, prompts, tmp_path, monkeypatch) -> None:
    source = prompts(12)
    generate(options(source, tmp_path / "c", limit=3))

    def full(descriptor: int, fsync=os.fsync) -> None:
        if "unit-000001.arrow" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"unit-000001\.arrow: No space left on device"):
            generate(options(source, tmp_path / "c"))
    cache = Cache.open(tmp_path / "c")
    assert {p for p, _ in keys(cache)} >= {"p0", "p1", "p2"}
    assert generate(options(source, tmp_path / "c")).made == 12 - len(cache)


def test_a_file_without_an_index_is_not_a_shard(engine, prompts, tmp_path) -> None:
    """What a kill between the two publications leaves."""
    source = prompts(6)
    generate(options(source, tmp_path / "c"))
    (tmp_path / "c" / "shards" / "unit-000001.json").unlink()
    assert len(Cache.open(tmp_path / "c")) == 3
    (tmp_path / "c" / "shards" / "unit-000001.arrow").write_bytes(b"orphan")
    others = tmp_path / "c" / "shards" / ".unit-000009.arrow.logitcache-part"
    others.write_bytes(b"")
    assert generate(options(source, tmp_path / "c", worker=Worker(0, 2))).made < 3
    assert others.exists(), "it is of worker 1 of 2"
    generate(options(source, tmp_path / "c"))
    assert len(Cache.open(tmp_path / "c")) == 6
    shards = list((tmp_path / "c" / "shards").iterdir())
    assert {p.stem for p in shards if p.suffix == ".arrow"} == {p.stem for p in shards if p.suffix == ".json"}
    assert all(p.read_bytes() != b"orphan" for p in shards)
    assert not others.exists()


def test_prompts_longer_than_the_teacher_takes_are_skipped_and_listed(engine, tmp_path) -> None:
    rows = [{"id": "short", "prompt": "a b"}, {"id": "long", "prompt": "a " * 50}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = generate(options(str(tmp_path / "p.jsonl"), tmp_path / "c", samples=2))
    assert summary.skipped == {"long": "50 tokens, the teacher takes 1 to 39; `engine_args` max_model_len=51 takes it"}
    listed = f"1 prompts skipped:\n  long: {summary.skipped['long']}\n"
    assert listed in describe_summary(summary, tmp_path / "c")
    assert summary.made == 2
    again = generate(options(str(tmp_path / "p.jsonl"), tmp_path / "c", samples=2))
    assert engine.started == 1, "what cannot be asked starts no engine a second time"
    assert "nothing to do, all 2 traces are present" in describe_summary(again, tmp_path)
    assert list(again.skipped) == ["long"]


def test_a_changed_setting_is_refused_before_the_engine_starts(engine, prompts, tmp_path) -> None:
    generate(options(prompts(3), tmp_path / "c"))
    with pytest.raises(IdentityError, match=re.escape("top_k = 8, this run has 4; use the same `top_k`")):
        generate(options(prompts(3), tmp_path / "c", top_k=4))
    with pytest.raises(IdentityError, match=re.escape("sampling.temperature = 1.0, this run has 0.5")):
        generate(options(prompts(3), tmp_path / "c", temperature=0.5))
    assert engine.started == 1


def test_rows_that_are_not_a_distribution_fail_only_their_trace(engine, prompts, tmp_path) -> None:
    class Broken(engine):
        def _completion(self, key, prompt_ids, answer, rng):
            completion = super()._completion(key, prompt_ids, answer, rng)
            if len(self.made) == 2:
                completion.logprobs_RK[1] = np.nan
            return completion

    import logitcache.inference.session as module

    original, module.Engine = module.Engine, Broken
    try:
        summary = generate(options(prompts(5), tmp_path / "c"))
    finally:
        module.Engine = original
    assert len(summary.failed) == 1
    assert summary.made == len(Cache.open(tmp_path / "c")) == 4
    assert "1 traces lost:" in describe_summary(summary, tmp_path / "c")
    assert generate(options(prompts(5), tmp_path / "c")).made == 1, "it is asked again"


def test_each_engine_starts_its_sampler_elsewhere(engine, prompts, tmp_path) -> None:
    """Else more samples, or the rest after a stop, would repeat the answers of the first."""
    generate(options(prompts(4), tmp_path / "c"))
    generate(options(prompts(4), tmp_path / "c", samples=2))
    generate(options(prompts(4), tmp_path / "d"))
    first, second, other = engine.seeds
    assert first != second
    assert first == other, "the same call on an empty cache is the same call"


def test_settings_equal_in_value_name_the_same_traces(engine, prompts, tmp_path) -> None:
    generate(options(prompts(3), tmp_path / "c", temperature=1))
    assert generate(options(prompts(3), tmp_path / "c", temperature=1.0)).made == 0


def test_an_engine_that_cannot_start_leaves_no_identity_behind(engine, prompts, tmp_path, monkeypatch) -> None:
    import logitcache.inference.session as module

    def refuse(spec, seed, pinned, scored):
        raise InputError("vLLM refuses these settings")

    monkeypatch.setattr(module, "Engine", refuse)
    with pytest.raises(InputError, match="refuses"):
        generate(options(prompts(3), tmp_path / "c", top_k=4))
    monkeypatch.setattr(module, "Engine", engine)
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert generate(options(prompts(3), tmp_path / "c", top_k=8)).made == 3


def test_messages_without_a_chat_template_are_refused_before_anything_is_made(engine, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(ModelError, match="has no chat template; give `prompt` text"):
        generate(options(str(tmp_path / "p.jsonl"), tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    assert engine.started == 0


def test_a_second_writer_is_refused(engine, prompts, tmp_path) -> None:
    generate(options(prompts(3), tmp_path / "c"))
    with Worker().alone(tmp_path / "c"), pytest.raises(CacheBusyError, match="written by another process"):
        generate(options(prompts(5), tmp_path / "c"))


def test_rows_are_trimmed_to_the_mass_asked_for(engine, prompts, tmp_path) -> None:
    generate(options(prompts(4), tmp_path / "c", top_p=0.8, min_k=2, top_k=30))
    for trace in Cache.open(tmp_path / "c"):
        counts = np.diff(trace.row_offsets)
        assert counts.min() >= 2
        assert counts.max() < 30


def test_every_row_keeps_the_end_of_sequence_and_the_delimiters(engine, prompts, tmp_path) -> None:
    generate(options(prompts(4), tmp_path / "c", top_p=0.5))
    cache = Cache.open(tmp_path / "c")
    delimiters_and_eos = [fake_engine.VOCAB - 3, fake_engine.VOCAB - 2, fake_engine.VOCAB - 1]
    assert cache.identity.pin_tokens == delimiters_and_eos
    for trace in cache:
        assert all((trace.ids == i).sum() == len(trace.rows) for i in delimiters_and_eos)
        assert np.diff(trace.row_offsets).max() < 8 + 3
    assert verify(tmp_path / "c", workers=1) == []


def test_pinned_tokens_are_named_by_id_or_text(engine, prompts, tmp_path) -> None:
    generate(options(prompts(2), tmp_path / "c", pin_tokens="4, <think>"))
    assert Cache.open(tmp_path / "c").identity.pin_tokens == [4, fake_engine.VOCAB - 3]
    with pytest.raises(InputError, match=r"`pin_tokens` '<thonk>': not a token .* did you mean '<think>'\?"):
        generate(options(prompts(2), tmp_path / "d", pin_tokens="<thonk>"))
    generate(options(prompts(2), tmp_path / "e", pin_tokens="none"))
    assert Cache.open(tmp_path / "e").identity.pin_tokens == []
    with pytest.raises(IdentityError, match="use the same `pin_tokens`"):
        generate(options(prompts(2), tmp_path / "c"))


def test_exact_rows_come_back_bit_for_bit(engine, prompts, tmp_path) -> None:
    captured = {}

    class Spy(engine):
        def step(self):
            made = super().step()
            captured.update({c.key: c for c in made})
            return made

    import logitcache.inference.session as module

    module.Engine, original = Spy, module.Engine
    try:
        generate(options(prompts(3), tmp_path / "c", exact=True, pin_tokens="none"))
    finally:
        module.Engine = original
    for trace in Cache.open(tmp_path / "c"):
        completion = captured[trace.trace_id]
        np.testing.assert_array_equal(trace.logprobs, completion.logprobs_RK.ravel())


def test_answers_are_graded_where_a_verifier_is_given(engine, tmp_path) -> None:
    rows = [{"id": f"p{i}", "prompt": f"question {i}", "answer": "w1"} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"id": "no gold", "prompt": "question"}])))
    summary = generate(options(str(tmp_path / "p.jsonl"), tmp_path / "c", verifier="exact"))
    assert "no verdict: 1 without a gold answer" in describe_summary(summary, tmp_path / "c")
    verdicts = {t.prompt_id: t.correct for t in Cache.open(tmp_path / "c")}
    assert verdicts.pop("no gold") is None
    assert set(verdicts.values()) <= {True, False}
    assert sum(Cache.open(tmp_path / "c").info().verdicts.values()) == 3
    with pytest.raises(InputError, match="exact"):
        options("x.jsonl", tmp_path, verifier="exactly")


def test_given_markers_replace_the_found_ones(engine, prompts, tmp_path) -> None:
    generate(options(prompts(2), tmp_path / "c", reasoning_markers=Markers()))
    assert all(t.sections.sizes()["reasoning"] == 0 for t in Cache.open(tmp_path / "c"))


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 0},
        {"samples": 2, "temperature": 0.0},
        {"top_p": 1.5},
        {"unit_size": 0},
        {"min_k": 9},
        {"top_k": 0},
        {"temperature": -1.0},
    ],
)
def test_impossible_options_are_refused(tmp_path, changes) -> None:
    with pytest.raises(InputError):
        options("x.jsonl", tmp_path, **changes)


def test_a_prompt_that_the_engine_refuses_costs_no_other(engine, prompts, tmp_path) -> None:
    class Refusing(engine):
        def submit(self, key, prompt_ids, max_tokens=None):
            if len(self.made) + len(self.waiting) + len(self.running) == 3:
                type(self).refused = key
                type(self).submit = engine.submit
                raise InputError("vLLM refuses a request")
            super().submit(key, prompt_ids)

    import logitcache.inference.session as module

    module.Engine = Refusing
    summary = generate(options(prompts(9), tmp_path / "c"))
    assert (summary.made, summary.skipped_traces) == (8, [Refusing.refused])
    assert len(Cache.open(tmp_path / "c")) == 8


def test_an_answer_that_cannot_be_finished_costs_no_other(engine, prompts, tmp_path, monkeypatch) -> None:
    import logitcache.capture.generate as module

    broken = module.trace_of
    monkeypatch.setattr(module, "trace_of", lambda r, *rest: 1 / 0 if r.prompt_id == "p4" else broken(r, *rest))
    summary = generate(options(prompts(9), tmp_path / "c", samples=2))
    assert (summary.made, len(summary.failed)) == (16, 2)
    assert "2 traces lost:\n  p4: ZeroDivisionError" in describe_summary(summary, tmp_path / "c")


def test_true_and_one_are_two_settings(engine, prompts, tmp_path) -> None:
    source = prompts(2)

    def run(value):
        return generate(options(source, tmp_path / "c", sampling={"ignore_eos": value}))

    run(True)
    with pytest.raises(IdentityError, match=r"sampling\.ignore_eos = True, this run has 1"):
        run(1)


def test_a_verifier_without_any_gold_answer_is_refused_before_the_engine_starts(engine, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "question", "solution": "w1"}))
    with pytest.raises(InputError, match=r"p\.jsonl has an `answer`.*solution; give `columns` answer=solution"):
        generate(options(str(tmp_path / "p.jsonl"), tmp_path / "c", verifier="exact"))
    assert not (tmp_path / "c").exists()


def test_traces_of_an_earlier_call_without_verdicts_are_counted(engine, prompts, tmp_path) -> None:
    source = prompts(3, answer="42")
    generate(options(source, tmp_path / "c"))
    summary = generate(options(source, tmp_path / "c", verifier="exact"))
    text = describe_summary(summary, tmp_path)
    assert "3 traces of earlier calls have no verdict: `logitcache slice --verifier` grades them" in text


def test_a_plan_draws_from_all_of_the_source(engine, prompts, tmp_path) -> None:
    source = prompts(60)
    drawn = [set(), set()]
    for i in range(2):
        generate(options(source, tmp_path / f"{i}", draw=6))
        drawn[i] = set(Cache.open(tmp_path / f"{i}").prompt_ids)
    assert drawn[0] == drawn[1]
    assert max(int(p[1:]) for p in drawn[0]) > 20


def test_a_run_that_makes_no_trace_leaves_no_identity_behind(engine, prompts, tmp_path) -> None:
    engine.steps_before_failure, engine.failure = 0, EngineError("the engine died")
    with pytest.raises(EngineError):
        generate(options(prompts(3), tmp_path / "c", top_k=4))
    assert not (tmp_path / "c" / "manifest.json").exists()
    engine.steps_before_failure = None
    assert generate(options(prompts(3), tmp_path / "c", top_k=8)).made == 3


def test_a_worker_of_other_settings_is_refused_while_no_trace_exists_yet(engine, prompts, tmp_path) -> None:
    out = tmp_path / "c"
    first = options(prompts(3), out, worker=Worker(0, 2))
    other = identify(first, fake_engine.facts(first.spec), {"temperature": 0.5})
    with Worker(0, 2).alone(out), claim(out, Worker(0, 2), other):
        with pytest.raises(IdentityError, match="made with sampling"):
            generate(options(prompts(9), out, worker=Worker(1, 2)))
        assert engine.started == 0
    assert not [*out.glob(".lock-*.json")]
    assert generate(options(prompts(9), out, worker=Worker(1, 2))).made > 0, "a worker that ended holds no claim"


@pytest.mark.parametrize("order", [("system", "user"), ("user", "system")])
def test_rows_that_the_template_refuses_are_skipped_wherever_they_stand(engine, tmp_path, monkeypatch, order) -> None:
    def render(facts, prompt, template_args):
        if "system" in prompt.id:
            raise ModelError(f"prompt {prompt.id!r}: the chat template refuses its messages")
        return [1, 2]

    monkeypatch.setattr("logitcache.capture.generate.render", render)
    rows = {name: f'{{"id": "{name}", "messages": [{{"role": "user", "content": "x"}}]}}' for name in order}
    (tmp_path / "p.jsonl").write_text("\n".join(rows.values()))
    summary = generate(options(str(tmp_path / "p.jsonl"), tmp_path / "c"))
    assert (summary.made, [*summary.skipped]) == (1, ["system"])
    assert "1 prompts skipped:\n  system: prompt 'system': the chat template refuses" in describe_summary(
        summary, tmp_path
    )
    (tmp_path / "q.jsonl").write_text(rows["system"] + "\n" + rows["system"].replace("system", "system2"))
    with pytest.raises(ModelError, match="all 2 requests are refused, the first: prompt 'system'"):
        generate(options(str(tmp_path / "q.jsonl"), tmp_path / "d"))
    assert not (tmp_path / "d").exists()


def test_secrets_reach_neither_the_identity_nor_the_folder(engine, prompts, tmp_path) -> None:
    secret = "hf_" + "Ab1" * 11
    first = {
        "engine_args": {"hf_token": "opensesame", "extra": {"api_key": "swordfish"}},
        "sampling": {"extra_args": {"key": "xyzzyx"}},
    }
    generate(options(prompts(2), tmp_path / "c", **first))
    text = b"".join(path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file())
    for value in (b"opensesame", b"swordfish", b"xyzzyx"):
        assert value not in text
    other = {
        "engine_args": {"hf_token": secret, "extra": {"api_key": "other"}},
        "sampling": {"extra_args": {"key": "k"}},
    }
    assert generate(options(prompts(2), tmp_path / "c", **other)).before == 2
