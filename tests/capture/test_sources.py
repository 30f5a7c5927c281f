"""What generate, plan, score and eval say of their source, through the command line and the fake engine."""

import json

import pytest

from logitcache.cache.reader import Cache
from logitcache.inference import rendering
from tests import fake_engine

USER = {"role": "user", "content": "question w1"}
ASSISTANT = {"role": "assistant", "content": "<think> w1 </think> w2"}


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    def conversation(facts, prompt, messages, template_args, *, generate):
        return " ".join(turn["content"] for turn in messages)

    monkeypatch.setattr(rendering, "conversation", conversation)
    return fake_engine.install(monkeypatch)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(*rows) -> str:
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return "p.jsonl"

    return write


JOB = ("--teacher", "fake", "--top-k", "8")


def test_generate_names_what_it_does_not_use(run, source) -> None:
    rows = [
        {"messages": [USER, ASSISTANT], "solution": "1", "completion": "x"},
        {"messages": [USER], "solution": "1"},
        {"messages": [USER | {"content": "question w2"}], "solution": None, "answer": "2"},
    ]
    code, out, _ = run("generate", source(*rows), "--out", "c", *JOB)
    assert code == 0
    assert out.splitlines()[:5] == [
        "1 repeated prompts were read once",
        "1 of 2 prompts ended with an assistant turn, which was dropped: `logitcache score` takes it as the completion",
        "columns not used: completion (1 of 2)",
        "columns kept as metadata only: solution (1 of 2)",
        "1 of 2 prompts have no gold answer; is it --column answer=solution?",
    ]


def test_plan_names_what_it_does_not_use(run, source) -> None:
    rows = [{"question": f"question w{i}", "level": i} for i in range(3)]
    arguments = (source(*rows), *JOB, "--column", "prompt=question")
    code, out, _ = run("plan", *arguments)
    assert code == 0
    assert "columns kept as metadata only: level" in out.splitlines()
    code, out, _ = run("plan", *arguments, "--json")
    assert json.loads(out)["source"]["metadata"] == {"level": 3}


def test_score_takes_the_last_assistant_turn_and_names_what_it_does_not_use(run, source) -> None:
    rows = [
        {"id": "a", "messages": [USER, ASSISTANT], "level": 1},
        {"id": "b", "conversations": [{"from": "human", "value": "question w2"}, {"from": "gpt", "value": "w3"}]},
        {"id": "c", "prompt": [USER], "completion": [ASSISTANT]},
        {"id": "d", "prompt": "question w1", "completion": "w4"},
    ]
    code, out, _ = run("score", source(*rows), "--out", "c", *JOB)
    assert code == 0
    assert out.splitlines()[0] == "columns kept as metadata only: level (1 of 4)"
    texts = {t.prompt_id: t.text.replace(" ", "") for t in Cache.open("c")}
    assert texts == {"a": "<think>w1</think>w2", "b": "w3", "c": "<think>w1</think>w2", "d": "w4"}


def test_score_reads_columns_by_name(run, source) -> None:
    name = source({"question": "question w1", "response": "w2"})
    code, _, err = run("score", name, "--out", "c", *JOB)
    assert (code, "p.jsonl:1: neither" in err, "try --column prompt=question" in err) == (2, True, True)
    code, _, err = run("score", name, "--out", "c", *JOB, "--column", "prompt=question")
    assert (code, "try --column completion=response" in err) == (2, True)
    columns = ("--column", "prompt=question", "--column", "completion=response")
    assert run("score", name, "--out", "c", *JOB, *columns)[0] == 0
    code, _, err = run("score", name, "--out", "d", *JOB, *columns, "--column", "answer=solution")
    assert (code, "--column answer=solution: no row has 'solution'" in err) == (2, True)


def test_eval_takes_alternatives_and_columns(run, source) -> None:
    name = source({"question": "question w1", "gold": ["w1", "w0"], "level": 1}, {"question": "question w2", "gold": 2})
    given = ("--student", "fake", "--out", "e", "--budgets", "none", "--max-tokens", 20)
    code, out, _ = run("eval", "--prompts", name, *given, "--column", "prompt=question", "--column", "answer=gold")
    assert code == 0
    assert "columns kept as metadata only: level (1 of 2)" in out.splitlines()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("prompt", "--column 'prompt': write NAME=THEIRS"),
        ("prompt=", "--column 'prompt=': write NAME=THEIRS"),
        ("promt=x", "--column promt=x: unknown name 'promt'; did you mean prompt?"),
    ],
)
def test_a_column_that_is_none_is_refused(run, source, column, message) -> None:
    code, _, err = run("generate", source({"x": "a"}), "--out", "c", *JOB, "--column", column)
    assert (code, err) == (2, f"logitcache: {message}\n")


def test_a_column_is_given_once_and_its_name_is_text(run, source) -> None:
    name = source({"1": "question w1", "x": "y"})
    assert run("generate", name, "--out", "c", *JOB, "--column", "prompt=1")[0] == 0
    code, _, err = run("generate", name, "--out", "c", *JOB, "--column", "prompt=1", "--column", "prompt=x")
    assert (code, "prompt is given twice" in err) == (2, True)
    code, _, err = run("score", "--from-cache", "c", "--out", "d", *JOB, "--column", "prompt=1")
    assert (code, "--column: --from-cache takes" in err) == (2, True)
