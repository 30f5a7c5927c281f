"""The reasoner's problems are right, its text has sections, and its training runs."""

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.reasoner import tokenizer as tok
from benchmarks.reasoner.make import SIZES, Size, make
from benchmarks.reasoner.problems import FAMILIES, Problem, Ranges, distinct, problems, side, write_prompts
from benchmarks.reasoner.train import (
    PAD,
    Schedule,
    Shape,
    accuracy,
    again,
    completions,
    exact_traces,
    fit,
    new_model,
    steps,
    train_stream,
)
from logitcache import prompts, sections
from logitcache.grading import verdicts
from tests.tiny import one_thread  # noqa: F401

SMALL = Ranges(digits=(1, 2), terms=(2, 3), factors=((1, 1), (2, 1), (2, 2)))
TINY = Shape(layers=1, hidden=32, heads=1, head_dim=32, intermediate=32)


def some(family: str, count: int = 60) -> list[Problem]:
    """Of every size that a configuration has, both sides."""
    return [
        p
        for size in SIZES.values()
        for which in ("train", "test")
        for p in islice(problems(family, size.ranges, which, 7), count)
    ]


def digits_of(text: str) -> dict[str, str]:
    """A number written as c5b8a0: letter -> digit."""
    return dict(re.findall(r"([a-z])(\d)", text))


def number(text: str) -> int:
    return int("".join(re.findall(r"[a-z](\d)", text)))


def answer_of(question: str) -> int:
    """The answer, computed from the question alone."""
    verb, what = question.split(" ")
    if verb == "add":
        columns = re.findall(r"[a-z](\d)\+(\d)", what)
        return sum(int("".join(column[i] for column in columns)) for i in (0, 1))
    if verb == "sum":
        return sum(map(int, re.findall(r"\d", what))) % 10
    one, two = what.split("*")
    return number(one) * number(two)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_what_python_computes_from_the_question(family: str) -> None:
    for p in some(family):
        assert p.answer == str(answer_of(p.question))
        assert verdicts.verdict("exact", p.answer, p.answer, {})
        assert p.family == family
        assert len(tok.encode(tok.text(p))) <= tok.LONGEST


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_of_a_reasoning_is_true(family: str) -> None:
    for p in some(family):
        equations = [e for e in re.split("[;:]", re.sub(r"\b(so|ok) \w+|[a-z]\d:", "", p.reasoning)) if "=" in e]
        assert equations
        for equation in equations:
            left, *right = re.sub("[a-z]", "", equation).split("=")
            value = eval(re.sub(r"\b0+(?=\d)", "", left))
            for part in right:  # such as 36+4=40: the product, then the carry added to it
                first, _, carry = part.partition("+")
                assert int(first) == value, equation
                value += int(carry or 0)


def test_the_answer_of_a_redundant_trace_is_just_before_its_middle() -> None:
    for p in some("redundant"):
        first, rest = p.reasoning[: p.derived], p.reasoning[p.derived :]
        assert 0.4 < len(tok.encode(first)) / len(tok.encode(p.reasoning)) < 0.5
        assert str(number(first.rpartition("so ")[2])) == str(number(rest.rpartition("ok ")[2])) == p.answer


def test_other_families_have_their_answer_at_the_end_alone() -> None:
    for family in ("incremental", "incompressible"):
        assert all(p.derived == len(p.reasoning) for p in some(family, 50))


def test_reasoning_is_long_enough_for_budgets() -> None:
    for p in (p for family in FAMILIES for p in islice(problems(family, SIZES["cpu"].ranges, "train", 1), 100)):
        assert 30 <= len(tok.encode(p.reasoning)) <= 130


def test_no_question_is_on_both_sides() -> None:
    for family in FAMILIES:
        train, test = (distinct(family, SIZES["cpu"].ranges, which, 0, 100) for which in ("train", "test"))
        assert not {p.question for p in train} & {p.question for p in test}
        assert {side(p.question) for p in test} == {"test"}


def test_a_seed_gives_the_same_problems_and_another_gives_others() -> None:
    one, same, other = (distinct("incremental", SMALL, "train", seed, 20) for seed in (1, 1, 2))
    assert one == same != other


def test_too_many_problems_of_a_small_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"redundant: \d+ different test problems in \d+ draws; ask for fewer than 30"):
        distinct("redundant", Ranges((1,), (1,), ((1, 1),)), "test", 0, 30)


def test_the_tokenizer_comes_back_from_disk_and_decodes_what_it_encodes(tmp_path: Path) -> None:
    tok.make().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(tok.VOCABULARY) < 64
    for p in (p for family in FAMILIES for p in some(family, 5)):
        rendered = tokenizer.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True)
        assert rendered == tok.prompt(p)
        ids = tokenizer(tok.text(p), add_special_tokens=False)["input_ids"]
        assert ids == tok.encode(tok.text(p))
        assert tokenizer.decode(ids) == tok.text(p)
        assert tokenizer.unk_token_id not in ids
        chat = [*p.messages, {"role": "assistant", "content": f"<think>{p.reasoning}</think>{p.answer}"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == tok.text(p)
    assert tokenizer.unk_token_id in tokenizer("What is this?")["input_ids"]


def test_sections_of_a_trace_are_found_by_known_markers() -> None:
    tokenizer = tok.make()
    markers = sections.Markers.detect(tokenizer.get_vocab(), tok.TEMPLATE)
    assert (markers.opening, markers.closing) == ("<think>", "</think>")
    for p in (p for family in FAMILIES for p in some(family, 5)):
        pieces, start = [tok.VOCABULARY[i] for i in tok.encode(tok.text(p))], len(tok.encode(tok.prompt(p)))
        found = sections.find(pieces, start, markers)
        assert "".join(pieces[found.reasoning]) == p.reasoning
        assert "".join(pieces[found.answer]) == f"{p.answer}<|end|>"
        assert "".join(pieces[found.opening]) == "<think>"


def test_prompts_are_read_as_generate_reads_them(tmp_path: Path) -> None:
    chosen = distinct("incompressible", SMALL, "test", 0, 5)
    write_prompts(tmp_path / "prompts.jsonl", chosen)
    for p, read in zip(chosen, prompts.load(str(tmp_path / "prompts.jsonl")), strict=True):
        assert (read.id, read.content, read.answer) == (p.id, p.messages, p.answer)
        assert read.metadata["family"] == "incompressible"
        assert read.metadata["reasoning"] == p.reasoning


def test_a_step_has_every_family_alike_and_little_padding() -> None:
    for groups in islice(steps(train_stream(SIZES["cpu"].ranges, 0), 24), 20):
        rows = [row[row != PAD] for ids in groups for row in ids]
        assert sum(map(len, rows)) / sum(ids.numel() for ids in groups) > 0.75
        assert all(tok.VOCABULARY[row[-1]] == "<|end|>" for row in rows)
        questions = [tok.VOCABULARY[row[1]] for row in rows]
        assert [questions.count(verb) for verb in ("add ", "sum ", "mul ")] == [8, 8, 8]


@pytest.mark.slow
def test_a_model_learns_a_few_traces_by_heart_and_writes_them() -> None:
    few = [next(problems(family, SMALL, "train", 0)) for family in FAMILIES]
    model = new_model(replace(TINY, hidden=64, heads=2), 0)
    losses: list[float] = []
    fit(model, again(few, 0), Schedule(80, 3, 1e-2, 5), lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0] / 4
    assert exact_traces(model, few) == accuracy(model, few) == dict.fromkeys(FAMILIES, 1.0)
    assert completions(model, few) == [f"{p.reasoning}</think>{p.answer}" for p in few]


@pytest.mark.slow
def test_a_folder_is_made_once_part_by_part(tmp_path: Path) -> None:
    short = Schedule(2, 3, 1e-3, 1)
    size = Size(SMALL, SMALL, TINY, short, short, TINY, short, warm_traces=3, train_prompts=4, test_prompts=2)
    said: list[str] = []
    torch.manual_seed(0)
    first = make(size, tmp_path / "r", say=said.append)
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "prompts-train.jsonl", "prompts-test.jsonl", "teacher", "student", "reasoner.json"
    }  # fmt: skip
    assert set(first["teacher"]["greedy"]) == set(FAMILIES)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "student").config.vocab_size == len(tok.VOCABULARY)

    before = (tmp_path / "r" / "teacher" / "model.safetensors").read_bytes()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "r" / "student" / name).unlink()
    (tmp_path / "r" / "student").rename(tmp_path / "elsewhere")
    again_ = make(size, tmp_path / "r", say=said.append)
    assert (tmp_path / "r" / "teacher" / "model.safetensors").read_bytes() == before
    assert again_["teacher"] == first["teacher"]
    assert json.loads((tmp_path / "r" / "reasoner.json").read_text()) == again_
    with pytest.raises(SystemExit, match="another seed"):
        make(size, tmp_path / "r", seed=1)
