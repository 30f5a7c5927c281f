"""Reasoning budgets, with answers written by hand; the last test uses the real engine."""

import json
import os
import signal
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from logitcache.accuracy.answer_file import Answer, AnswerFile, Key
from logitcache.accuracy.budgets import ANSWERS, RESULTS, AccuracyResult, BudgetResult, measure, pass_at_1
from logitcache.accuracy.options import AccuracyOptions, Budget
from logitcache.accuracy.run import Delimiters
from logitcache.commands.text_runs import describe_accuracy
from logitcache.errors import (
    CacheBusyError,
    EngineError,
    IdentityError,
    InputError,
    NotACacheError,
    PromptsError,
    ShardCorruptError,
    WriteError,
)
from logitcache.inference import model
from logitcache.inference import session as module
from logitcache.runtime.files import read_json
from logitcache.runtime.locks import exclusive
from logitcache.sections import Markers
from tests import fake_engine
from tests.fake_engine import WORDS, token_id


def ids(words: str) -> list[int]:
    return [token_id(word) for word in words.split()]


def words(token_ids) -> str:
    return " ".join(WORDS[i].strip() for i in token_ids)


# What the model writes of itself, by the prompt's last word; each prompt's gold answer is its own first word.
NATURAL = {
    "w10": "<think> w1 w2 w3 w4 </think> w5 <eos>",
    "w11": "<think> w1 w2 </think> w7 <eos>",
    "w12": "<think> w1 w2 w3 w4 w1 w2 w3 w4 </think> w5 <eos>",
    "w13": "<think> w1 w2 w3 w1 w2 w3 w1 w2 w3 w1 w2 w3",  # cut by the limit of tokens
}


class Scripted(fake_engine.FakeEngine):
    """Writes ``NATURAL``; after a forced closing it is right, and ends, where 2 tokens of reasoning or more were left."""

    sent: list[tuple[str, int]]
    natural = NATURAL

    def submit(self, key, prompt_ids, max_tokens=None) -> None:
        text = words(prompt_ids)
        type(self).sent = [*type(self).sent, (text, max_tokens)]
        self.waiting.append((key, prompt_ids, ids(self.answer(text)), np.random.default_rng(0)))

    def answer(self, text: str) -> str:
        if "</think>" not in text:
            return self.natural[text.split()[1]]
        kept = text.partition("<think>")[2].split().index("</think>")
        return f"{text.split()[0]} <eos>" if kept >= 2 else "w9 w9 w9"

    def _completion(self, key, prompt_ids, answer, rng):
        made = super()._completion(key, prompt_ids, answer, rng)
        return made if WORDS[answer[-1]] == "<eos>" else replace(made, finish_reason="length")


@pytest.fixture
def engine(monkeypatch):
    made = type("Engine", (Scripted,), {"sent": []})
    monkeypatch.setattr(module, "Engine", made)
    monkeypatch.setattr(model, "inspect_model", fake_engine.facts)
    monkeypatch.setattr(model, "engine_version", lambda: "fake 1")
    return made


def write_prompts(path: Path, texts: list[str]) -> str:
    rows = [{"id": f"p{i}", "prompt": text, "answer": text.split()[0]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(engine, tmp_path):
    """Measures the prompts of the given texts, by default those of ``NATURAL`` with gold answer w5."""

    def start(*texts: str, **changes) -> AccuracyResult:
        source = write_prompts(tmp_path / "p.jsonl", list(texts) or [f"w5 {name}" for name in NATURAL])
        given: dict[str, Any] = {"budgets": ("0", "25%", "3", "100%", "none"), "max_tokens": 13, "answer_tokens": 3}
        return measure(AccuracyOptions(prompts=source, student="fake", out=tmp_path / "out", **given | changes))

    return start


def test_a_reasoning_is_cut_at_its_token_and_closed(run, engine) -> None:
    run("w5 w10", budgets=("0", "25%", "3", "7", "100%", "none"))
    assert engine.sent == [
        ("w5 w10", 13),
        ("w5 w10 <think> </think>", 3),
        ("w5 w10 <think> w1 </think>", 3),
        ("w5 w10 <think> w1 w2 w3 </think>", 3),
        ("w5 w10 <think> w1 w2 w3 w4 </think>", 3),  # 7 and 100% alike
    ]


def test_accuracy_and_lengths_are_those_counted_by_hand(run) -> None:
    found = run().budgets
    assert list(found) == ["0", "25%", "3", "100%", "none"]
    # Naturally w10 and w12 are right; reasonings are of 4, 2, 8 and 12 tokens, the last one without an end.
    assert found["none"] == BudgetResult(
        accuracy=0.5,
        ci=pytest.approx([0.15004, 0.84996], abs=1e-5),  # Wilson of 2 in 4
        prompts=4,
        samples=1,
        reasoning_tokens=6.5,  # (4 + 2 + 8 + 12) / 4
        answer_tokens=1.5,  # (2 + 2 + 2 + 0) / 4
        total_tokens=9.75,  # (8 + 6 + 12 + 13) / 4
        ended=0.75,
        unscored=0,
        no_room=0,
    )
    assert found["0"].accuracy == found["0"].ended == 0
    assert found["0"].total_tokens == 2 + 3
    # 25% are 1, 0, 2 and 3 tokens: the last two are right.
    assert [found["25%"].accuracy, found["25%"].reasoning_tokens, found["25%"].answer_tokens] == [0.5, 1.5, 2.5]
    # At most 3: w11's reasoning of 2 stays whole.
    assert [found["3"].accuracy, found["3"].reasoning_tokens] == [1, (3 + 2 + 3 + 3) / 4]
    # Closing it is all that w13 lacked; w11 was wrong naturally, and is right where the script answers.
    assert [found["100%"].accuracy, found["100%"].reasoning_tokens, found["100%"].ended] == [1, 6.5, 1]


@pytest.mark.parametrize(
    ("text", "cuts"),
    [("none", [None, None]), ("0", [0, 0]), ("64", [64, 5]), ("29%", [29, 1]), ("100%", [100, 5]), ("12.5%", [12, 0])],
)
def test_a_budget_is_tokens_a_share_or_none(text, cuts) -> None:
    budget = Budget.parse(text)
    assert str(budget) == text
    assert [budget.cut(length) for length in (100, 5)] == cuts


@pytest.mark.parametrize("text", ["", "-1", "101%", "half", "50 %", "1.5", "%"])
def test_a_budget_that_is_none_of_these_is_refused(text) -> None:
    with pytest.raises(InputError, match="give a number of tokens such as 128, a share such as 50%, or none"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("right_PS", "accuracy", "ci"),
    [
        ([[1], [0]], 0.5, [0.09453, 0.90547]),  # 1/2 +- z / (2 sqrt(2 + z^2))
        ([[1, 1], [0, 0]], 0.5, [0.09453, 0.90547]),  # samples that always agree are worth one
        ([[1, 0], [1, 0]], 0.5, [0.15004, 0.84996]),  # of 4
        ([[1] * 4] * 10, 1.0, [0.72247, 1.0]),  # 10 / (10 + z^2)
        ([[0]], 0.0, [0.0, 0.79345]),  # z^2 / (1 + z^2)
        ([[1, 1], [1, 0], [0, 0]], 0.5, [0.16069, 0.83931]),  # 1/2 +- z / (2 sqrt(4.5 + z^2)), 4.5 = 3 (1/4) / (1/6)
    ],
)
def test_the_interval_is_wilsons_of_the_effective_size(right_PS, accuracy, ci) -> None:
    found, interval = pass_at_1(np.array(right_PS, bool))
    assert found == accuracy
    assert interval == pytest.approx(ci, abs=1e-5)


def test_the_end_of_sequence_within_a_reasoning_is_not_input_before_the_closing(run, engine) -> None:
    engine.natural = {"w10": "<think> w1 w2 <eos>"}
    found = run("w5 w10", budgets=("100%", "none")).budgets
    assert engine.sent[1][0] == "w5 w10 <think> w1 w2 </think>"
    assert [
        found["none"].accuracy,
        found["none"].ended,
        found["none"].reasoning_tokens,
        found["none"].total_tokens,
    ] == [0, 1, 2, 4]
    assert found["100%"].accuracy == 1


def test_an_opening_in_the_prompt_stays_there(run, engine) -> None:
    engine.natural = {"w10": "w1 w2 w3 w4 </think> w5 <eos>"}
    found = run("w5 w10 <think>", budgets=("0", "50%", "none")).budgets
    assert [text for text, _ in engine.sent[1:]] == ["w5 w10 <think> </think>", "w5 w10 <think> w1 w2 </think>"]
    assert found["50%"].total_tokens == 2 + 1 + 2


def test_a_model_that_only_closes_gets_no_opening(run, engine, monkeypatch) -> None:
    engine.natural = {"w10": "w1 w2 </think> w5 <eos>", "w11": "w5 <eos>"}
    monkeypatch.setattr(engine, "answer", lambda self, text: self.natural.get(text.split()[-1], "w5 <eos>"))
    run("w5 w10", "w5 w11", budgets=("50%",))
    assert [text for text, _ in engine.sent[2:]] == ["w5 w10 w1 </think>", "w5 w11 </think>"]


def test_a_sample_without_any_delimiter_is_opened_and_closed(run, engine) -> None:
    engine.natural = NATURAL | {"w11": "w5 <eos>"}
    found = run("w5 w11", "w5 w10", budgets=("50%", "none")).budgets
    assert ("w5 w11 <think> </think>", 3) in engine.sent
    assert found["none"].accuracy == 1
    assert found["50%"].accuracy == 0.5


def test_delimiters_are_those_the_model_writes_most_often() -> None:
    texts = {1: "<think>\n", 2: "</think>", 3: "\n\n", 4: ".</think>", 5: "<thi", 6: "nk>"}

    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [5, 6]}

        def decode(self, form, **options):
            return "".join(texts[i] for i in form)

        def get_vocab(self):
            return {}

    facts: Any = SimpleNamespace(tokenizer=Tokenizer(), known_ids=range(10))

    def natural(opening: list[int], closing: list[int]) -> Answer:
        tokens = [*opening, 9, *closing]
        return Answer("p", 0, None, "", True, len(opening), 1, len(closing), 0, "stop", None, "", array("i", tokens))

    markers = Markers("<think>", "</think>")
    written = [natural([1], [4]), natural([1], [4]), natural([1], [2, 3]), natural([1], [])]
    assert Delimiters.of(written, facts, markers) == Delimiters([1], [2, 3]), "a full stop is no part of a delimiter"
    assert Delimiters.of([natural([], [])], facts, markers) == Delimiters([5, 6], [5, 6])


def test_budgets_that_cut_at_one_token_share_its_answer(run, engine) -> None:
    found = run("w5 w11", budgets=("0", "0%", "10%", "49%", "2", "50", "100%"))
    assert len(engine.sent) == 1 + 2
    assert found.budgets["0"] == found.budgets["49%"]
    assert found.made == 3


def test_more_budgets_samples_and_prompts_ask_only_for_what_is_missing(run, engine) -> None:
    run("w5 w10", budgets=("none",), temperature=1.0)
    assert engine.sent == [("w5 w10", 13)]
    run("w5 w10", budgets=("none", "50%"), temperature=1.0)
    assert engine.sent[1:] == [("w5 w10 <think> w1 w2 </think>", 3)]
    found = run("w5 w10", "w5 w11", budgets=("none", "50%"), temperature=1.0, samples=2)
    assert sorted(text for text, _ in engine.sent[2:]) == [
        "w5 w10",
        "w5 w10 <think> w1 w2 </think>",
        "w5 w11",
        "w5 w11",
        "w5 w11 <think> w1 </think>",
        "w5 w11 <think> w1 </think>",
    ]
    assert (found.before, found.made) == (2, 6)
    assert [found.budgets["none"].prompts, found.budgets["none"].samples, found.budgets["none"].accuracy] == [2, 2, 0.5]
    assert len(set(engine.seeds)) == 3, "no two engines start their sampler alike"
    run("w5 w10", budgets=("50%",), temperature=1.0)
    assert engine.started == 3, "nothing was missing"


def test_a_cut_last_line_is_made_again_and_no_other(run, engine, tmp_path) -> None:
    whole = run()
    path = tmp_path / "out" / ANSWERS
    data, asked = path.read_bytes(), len(engine.sent)
    last = json.loads(data.splitlines()[-1])
    for left in (1, 30, len(data.splitlines()[-1])):  # the newline alone, at most, is missing
        path.write_bytes(data[: len(data) - len(data.splitlines()[-1]) - 1 + left])
        again = run()
        assert (again.made, again.budgets) == (1, whole.budgets)
        assert json.loads(path.read_bytes().splitlines()[-1]) == last
        assert path.read_bytes() == data
    assert len(engine.sent) == asked + 3


def test_a_broken_line_is_named(run, tmp_path) -> None:
    run()
    path = tmp_path / "out" / ANSWERS
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\0\0", *lines[2:]]))
    with pytest.raises(ShardCorruptError, match=r"answers\.jsonl:2: not an answer .*; remove the line"):
        run()


def test_a_full_disk_keeps_the_answers_before(tmp_path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    answer = Answer("p", 0, None, "", True, 0, 0, 0, 1, "stop", True, "", array("i", [1]))
    file = AnswerFile(tmp_path / "a.jsonl")
    file.add(answer)
    file.path, file._file = tmp_path / "full", (tmp_path / "full").open("wb", buffering=0)  # type: ignore[assignment]
    with pytest.raises(
        WriteError, match="full: No space left on device; fix that, then run the same command to resume"
    ):
        file.add(replace(answer, sample=1))
    assert list(AnswerFile(tmp_path / "a.jsonl").answers) == [answer.key]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_tokens": 14}, "max_tokens = 13, this call has 14"),
        ({"temperature": 0.5}, "temperature = 0.0, this call has 0.5"),
        ({"answer_tokens": 4}, "answer_tokens = 3"),
        ({"verifier": "math"}, "verifier = 'exact'"),
        ({"seed": 1}, "seed = 0"),
        ({"reasoning_markers": Markers("w1", "w2")}, "reasoning_markers"),
        ({"engine_args": {"max_model_len": 30}}, "engine_args.max_model_len = None"),
        ({"template_args": {"thinking": True}}, "engine_args.template_args"),
    ],
)
def test_another_setting_is_refused_by_its_name(run, engine, tmp_path, monkeypatch, changes, name) -> None:
    monkeypatch.setattr("logitcache.grading.verdicts.check", lambda kind: None)
    run("w5 w10")
    data = (tmp_path / "out" / ANSWERS).read_bytes()
    with pytest.raises(IdentityError, match=f"out holds answers made with {name}"):
        run("w5 w10", **changes)
    assert (tmp_path / "out" / ANSWERS).read_bytes() == data
    run("w5 w10", engine_args={"max_num_seqs": 2})
    assert engine.started == 1


def test_another_model_is_refused(run, monkeypatch) -> None:
    run("w5 w10")
    monkeypatch.setattr(model, "inspect_model", lambda spec: replace(fake_engine.facts(spec), revision="r2"))
    with pytest.raises(IdentityError, match="model_revision = 'r1', this call has 'r2'"):
        run("w5 w10")


def test_other_prompts_are_refused(run, engine, tmp_path) -> None:
    run("w5 w10", "w5 w11")
    with pytest.raises(IdentityError, match="answers to prompt 'p1' with another text or gold answer"):
        run("w5 w10", "w6 w11")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "x", "prompt": "w5 w10", "answer": "w5"}))
    with pytest.raises(IdentityError, match="answers to other prompts"):
        measure(
            AccuracyOptions(prompts=str(other), student="fake", out=tmp_path / "out", max_tokens=13, answer_tokens=3)
        )
    assert run("w5 w10").budgets["none"].prompts == 1, "a part of them will do"
    assert engine.started == 1


def test_a_prompt_without_a_gold_answer_is_refused_before_anything_is_made(engine, tmp_path, monkeypatch) -> None:
    rows = [{"id": "good", "prompt": "w5 w10", "answer": "w5"}, {"id": "bare", "prompt": "w5 w11"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = AccuracyOptions(prompts=str(tmp_path / "p.jsonl"), student="fake", out=tmp_path / "out", max_tokens=13)
    with pytest.raises(PromptsError, match=r"p\.jsonl: prompt 'bare' has no gold `answer`"):
        measure(options)
    assert measure(replace(options, limit=1)).budgets["none"].accuracy == 1
    monkeypatch.setattr("logitcache.grading.verdicts.check", lambda kind: None)
    with pytest.raises(PromptsError, match="'good' is not a reasoning-gym task; set `verifier` to math or exact"):
        measure(replace(options, verifier="gym", out=tmp_path / "gym"))
    assert not (tmp_path / "gym").exists()


def test_a_model_without_markers_can_only_be_measured_naturally(run, engine) -> None:
    with pytest.raises(
        InputError, match=r"`student` fake: no reasoning markers .* `reasoning_markers` OPENING,CLOSING"
    ):
        run("w5 w10", reasoning_markers=Markers())
    assert engine.started == 0
    found = run("w5 w10", reasoning_markers=Markers(), budgets=("none",))
    assert found.budgets["none"].reasoning_tokens == 0
    assert found.delimiters is None


@pytest.mark.parametrize("end", ["<think> </think>", "</think>"])
@pytest.mark.parametrize("budgets", [("0",), ("512",), ("50%", "none")])
def test_a_lone_closing_at_the_end_of_the_prompt_is_refused_too(run, engine, end, budgets) -> None:
    with pytest.raises(InputError, match="'p0': the chat template closes the reasoning before it begins"):
        run(f"w5 w10 {end}", budgets=budgets)
    assert engine.started == 0


def test_the_forced_closing_of_gpt_oss_is_its_whole_hand_over() -> None:
    from tests.sections.pieces import HARMONY_TOKENS, Vocabulary

    final = "<|end|><|start|>assistant<|channel|>final<|message|>"
    opening = "<|channel|>analysis<|message|>"

    class Tokenizer(Vocabulary):
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [self.number(piece) for piece in self.encode(text)[0]]}

        def number(self, piece: str) -> int:
            return self.ids.get(piece) or ord(piece)

        def decode(self, ids, **options):
            names = {i: token for token, i in self.ids.items()}
            return "".join(names.get(i) or chr(i) for i in ids)

    tokenizer = Tokenizer(*(token for token in HARMONY_TOKENS))
    tokenizer.ids = {token: 1000 + i for i, token in enumerate(HARMONY_TOKENS)}
    facts: Any = SimpleNamespace(tokenizer=tokenizer, known_ids=range(2000))

    def natural(closing: str) -> Answer:
        first, last = (tokenizer(text, False)["input_ids"] for text in (opening, closing))
        tokens = array("i", [*first, 9, *last])
        return Answer("p", 0, None, "", True, len(first), 1, len(last), 0, "stop", None, "", tokens)

    call = "<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    typed = final.replace("<|message|>", " <|constrain|>json<|message|>")
    for closings, forced in (([call, call], final), ([final], final), ([typed, typed, final, call], typed)):
        made = Delimiters.of(map(natural, closings), facts, Markers(opening, final))
        assert tokenizer.decode(made.closing) == forced
        assert tokenizer.decode(made.opening) == opening


def test_a_prompt_that_closes_the_reasoning_is_refused(run, engine) -> None:
    engine.natural = {"w10": "w5 <eos>"}
    with pytest.raises(InputError, match="'p0': the chat template closes the reasoning before it begins"):
        run("w5 w10 <think> </think>")
    assert engine.started == 0
    engine.answer = lambda self, text: "w5 <eos>"
    found = run("w5 w10 <think> </think>", budgets=("none",)).budgets["none"]
    assert [found.accuracy, found.reasoning_tokens, found.total_tokens] == [1, 0, 2]


def test_what_the_context_has_no_room_for_is_wrong_and_counted(run, engine) -> None:
    engine.max_model_len = 16  # of which w13 and its reasoning take 15, and its closing the last
    found = run()
    assert [part.no_room for part in found.budgets.values()] == [0, 0, 0, 1, 0]
    assert found.budgets["100%"].accuracy == 0.75
    assert "counted as wrong because they did not fit the model's context: 1 at 100%" in describe_accuracy(found)


def test_a_prompt_longer_than_the_model_takes_is_refused(run, engine, tmp_path) -> None:
    with pytest.raises(InputError, match=r"'p0': 41 tokens, the model takes 1 to 39; .*`engine_args` max_model_len=42"):
        run("w5 " * 41)
    assert not (tmp_path / "out" / "settings.json").exists()
    run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_answered_and_can_be_resumed(run, engine, monkeypatch, tmp_path, number) -> None:
    class Signalling(engine):
        def step(self):
            if self.steps == 15:
                os.kill(os.getpid(), number)
            return super().step()

    monkeypatch.setattr(module, "Engine", Signalling)
    stopped = run()
    assert stopped.stopped == number.name
    assert stopped.budgets == {}
    assert not (tmp_path / "out" / RESULTS).exists()
    text = describe_accuracy(stopped)
    assert text == f"stopped by {number.name} with {stopped.made} answers saved: run the same command again to resume"
    monkeypatch.setattr(module, "Engine", engine)
    finished = run()
    assert finished.before == stopped.made > 0
    assert finished.made > 0
    result = read_json(tmp_path / "out" / RESULTS)
    assert result == json.loads(json.dumps(finished.to_json()))


def test_a_dead_engine_loses_nothing_that_was_answered(run, engine) -> None:
    engine.steps_before_failure, engine.failure = 15, EngineError("vLLM died: boom")
    with pytest.raises(
        EngineError, match="boom; every answer is safe: fix the cause, then run the same command to resume"
    ):
        run()
    made = len(engine.last.made)
    engine.steps_before_failure = None
    assert run().before == made > 0


def test_a_second_writer_and_a_directory_of_other_things_are_refused(run, tmp_path) -> None:
    with (
        exclusive(tmp_path / "out" / ".lock", "out"),
        pytest.raises(CacheBusyError, match="written by another process"),
    ):
        run()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(NotACacheError, match="holds files that are not answers"):
        run()


def test_adapters_and_unfinished_runs_are_refused(run, engine, tmp_path) -> None:
    source = write_prompts(tmp_path / "p.jsonl", ["w5 w10"])
    for name, message in (
        ("adapter_config.json", "is a LoRA adapter, but vLLM needs a whole model here; merge"),
        ("run.json", "is an unfinished run"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(InputError, match=message):
            measure(AccuracyOptions(prompts=source, student=str(tmp_path / name), out=tmp_path / "out"))
    assert engine.started == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 0},
        {"samples": 2},
        {"answer_tokens": 0},
        {"max_tokens": 0},
        {"limit": 0},
        {"budgets": ()},
        {"budgets": ("0", "some")},
        {"verifier": "exactly"},
        {"temperature": -1.0},
    ],
)
def test_impossible_options_are_refused(tmp_path, changes) -> None:
    with pytest.raises(InputError, match="`"):
        AccuracyOptions(prompts="p.jsonl", student="fake", out=tmp_path, **changes)


def test_the_table_names_model_prompts_and_settings(run) -> None:
    lines = describe_accuracy(run()).splitlines()
    assert lines[0].startswith("fake @ r1 on 4 prompts of ")
    assert "samples per prompt: 1, temperature 0; verifier exact, fake 1, float32; " in lines[0]
    assert lines[1].split() == [
        "budget",
        "accuracy",
        "95%",
        "interval",
        "reasoning",
        "answer",
        "all",
        "tokens",
        "ended",
    ]
    assert lines[-2].split() == ["none", "50.0%", "15.0%", "-", "85.0%", "6.5", "1.5", "9.8", "75.0%"]


ASK = """
import json, sys
from pathlib import Path
from logitcache.inference import session as run
from logitcache.accuracy.budgets import measure
from logitcache.accuracy.options import AccuracyOptions
from logitcache.sections import Markers

sent = []
submit = run.Engine.submit

def spy(self, key, prompt_ids, max_tokens=None):
    sent.append([json.loads(key.replace("None", "null").replace("'", '"')), prompt_ids, max_tokens])
    submit(self, key, prompt_ids, max_tokens)

run.Engine.submit = spy
engine_args = {"max_num_seqs": 4, "max_model_len": 64, "enforce_eager": True, "kv_cache_memory_bytes": 50_000_000}
found = measure(AccuracyOptions(
    prompts=sys.argv[1], student=sys.argv[2], out=Path(sys.argv[3]), budgets=("0", "50%", "100%", "none"), max_tokens=16,
    answer_tokens=5, reasoning_markers=Markers("w10", "w11"), dtype="float32", engine_args=engine_args,
))
print(json.dumps([sent, found.to_json()]))
"""


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_the_real_engine_continues_prompt_cut_reasoning_and_closing(tmp_path) -> None:
    """Compares a random model's answers with transformers' greedy continuations of what should have been sent."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests import tiny

    model = tiny.save_model(tmp_path / "model", hidden_size=64, num_key_value_heads=2)
    source = write_prompts(tmp_path / "p.jsonl", [f"w{20 + i} w{30 + i} w10" for i in range(4)])
    call = [sys.executable, "-c", ASK, source, str(model), str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sent, found = json.loads(done.stdout.splitlines()[-1])
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    closing = tokenizer("w11")["input_ids"]
    prompts = {f"p{i}": tokenizer(f"w{20 + i} w{30 + i} w10")["input_ids"] for i in range(4)}
    answers = AnswerFile(tmp_path / "out" / ANSWERS).answers
    assert len(sent) == len(answers) == found["made"]
    assert {cut for _, _, cut in answers} >= {None, 0}
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for key, ids_sent, limit in sent:
        answer = answers[Key(*key)]
        natural = answers[Key(*key)._replace(cut=None)]
        cut = key[2]
        forced = [] if cut is None else [*natural.tokens[: natural.opening + cut], *closing]
        assert (ids_sent, limit) == ([*prompts[key[0]], *forced], 16 if cut is None else 5)
        made = reference.generate(torch.tensor([ids_sent]), max_new_tokens=limit, do_sample=False, pad_token_id=0)
        assert answer.tokens.tolist() == made[0, len(ids_sent) :].tolist()
        assert cut is None or (answer.reasoning, answer.closing, answer.answer) == (cut, 1, len(answer.tokens))
    lengths = [a.reasoning for a in answers.values() if a.cut is None]
    assert found["budgets"]["50%"]["reasoning_tokens"] == np.mean([length // 2 for length in lengths])
    assert max(lengths) > 8
