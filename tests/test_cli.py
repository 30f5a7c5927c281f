"""The command line as a person meets it: what it prints, and its exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fake_engine, tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("teacher") / "tiny")


def prompts(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


GOOD = '{"id": "a", "prompt": "w3 w4"}'


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        pytest.param([GOOD, "{oops"], [], r"p\.jsonl:2: not valid JSON", id="a broken line"),
        pytest.param([""], [], "contains no prompts", id="an empty file"),
        pytest.param([GOOD, GOOD], [], r"p\.jsonl:2: id 'a' is already used by .*p\.jsonl:1", id="a duplicate id"),
        pytest.param([GOOD], ["--teacher", "./nowhere"], "no such folder; give a model", id="a missing model"),
        pytest.param([GOOD], ["--teacher", "tests"], "cannot be read as a model folder", id="a folder of other things"),
        pytest.param([GOOD], ["--top-k", "65"], "vocabulary has 64 tokens", id="k above the vocabulary"),
        pytest.param(['{"messages": [{"role": "user", "content": "x"}]}'], ["--top-k", "0"], "at least|>= 1", id="k 0"),
        pytest.param([GOOD], ["--engine-arg", "seed=3"], "use --seed", id="an engine argument of ours"),
        pytest.param([GOOD], ["--sampling", "top_p"], "write KEY=VALUE", id="a setting without a value"),
        pytest.param([GOOD], ["--answer-regex", "("], "not a regular expression", id="a broken pattern"),
        pytest.param([GOOD], ["--top-p", "2"], "must lie in", id="more than all of the mass"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_with_nothing_written(
    run, teacher, tmp_path, monkeypatch, lines, options, message
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = prompts(tmp_path / "p.jsonl", *lines)
    code, out, err = run("generate", source, "--teacher", teacher, "--out", tmp_path / "c", "--top-k", 8, *options)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"logitcache: .*(?:{message}).*\n", err), err
    assert not (tmp_path / "c").exists()


def test_a_model_that_predicts_no_next_token_is_refused(run, teacher, tmp_path) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 64})
    )
    source = prompts(tmp_path / "p.jsonl", GOOD)
    code, _, err = run("generate", source, "--teacher", folder, "--out", tmp_path / "c")
    assert code == 2
    assert "BertForMaskedLM is not a causal language model" in err


def test_a_directory_that_is_not_a_cache_is_named(run, tmp_path) -> None:
    (tmp_path / "x").mkdir()
    code, _, err = run("info", tmp_path / "x")
    assert (code, err.count("\n")) == (2, 1)
    assert "is not a cache: no manifest.json in it" in err


def test_an_unknown_option_names_the_nearest(run) -> None:
    code, _, err = run("info", "x", "--jsn")
    assert code == 2
    assert "--json" in err


def test_generate_prints_its_summary_and_info_what_it_made(run, monkeypatch, tmp_path) -> None:
    fake_engine.install(monkeypatch)
    source = prompts(tmp_path / "p.jsonl", *(f'{{"id": "p{i}", "prompt": "question {i}"}}' for i in range(5)))
    arguments = ("generate", source, "--teacher", "fake", "--out", tmp_path / "c", "--top-k", 8, "--unit-size", 2)
    code, out, err = run(*arguments)
    assert code == 0
    assert re.search(r"c: 5 traces made, 5 of 5 present; \d+ tokens in", out)
    assert re.search(r"5/5 traces, [\d,]+ tokens/s, 0:00 left", err), "plain lines where there is no terminal"
    assert "nothing to do, all 5 traces are present" in run(*arguments)[1]

    code, out, _ = run("info", tmp_path / "c", "--json")
    facts = json.loads(out)
    assert (code, facts["traces"], facts["shards"], facts["identity"]["top_k"]) == (0, 5, 3, 8)
    text = run("info", tmp_path / "c")[1]
    assert "traces   5 of 5 prompts in 3 shards" in text
    assert "<think> </think>" in text


def test_train_refuses_another_tokenizer_and_a_small_vocabulary(run, tmp_path) -> None:
    tiny.write_cache(tmp_path / "c")
    other = tiny.save_model(tmp_path / "other", prefix="v")
    code, _, err = run("train", tmp_path / "c", "--student", other, "--out", tmp_path / "r")
    assert (code, err.count("\n")) == (2, 1)
    assert "tokenizer" in err
    assert not (tmp_path / "r").exists()

    small = tiny.save_model(tmp_path / "small")
    tiny.model(32).save_pretrained(small)
    code, _, err = run("train", tmp_path / "c", "--student", small, "--out", tmp_path / "r")
    assert (code, err.count("\n")) == (2, 1)
    assert "32" in err
    assert not (tmp_path / "r").exists()


def test_train_names_the_nearest_training_argument(run, tmp_path) -> None:
    tiny.write_cache(tmp_path / "c")
    code, _, err = run("train", tmp_path / "c", "--student", "x", "--out", tmp_path / "r", "--set", "weight_deca=0.1")
    assert code == 2
    assert "did you mean 'weight_decay'" in err


def test_a_cache_is_cut_joined_parted_and_exported(run, tmp_path) -> None:
    tiny.write_cache(tmp_path / "c")
    code, out, err = run("slice", tmp_path / "c", "--out", tmp_path / "s", "--top-k", 4, "--where", "tokens<=30")
    assert code == 0, err
    assert f"{tmp_path / 's'}: 24 traces, " in out
    derived = json.loads(run("info", tmp_path / "s", "--json")[1])["identity"]["derived"]
    assert derived == ["slice --top-k 4 --where 'tokens<=30'"]
    assert "derived  slice --top-k 4" in run("info", tmp_path / "s")[1]

    code, out, err = run(
        "split", tmp_path / "c", "--into", f"{tmp_path / 'a-b'}=0.5", "--into", f"{tmp_path / 'b'}=0.5"
    )
    assert code == 0, err
    assert out.count(" prompts, ") == 2
    code, _, err = run("split", tmp_path / "c", "--into", f"{tmp_path / 'd'}=half")
    assert (code, "--into" in err) == (2, True)

    code, out, err = run("merge", tmp_path / "a-b", tmp_path / "b", "--out", tmp_path / "m")
    assert code == 0, err
    assert "24 traces" in out
    assert run("verify", tmp_path / "m", "--workers", 1)[0] == 0

    code, out, err = run("export", tmp_path / "c", "--to", "parquet", "--out", tmp_path / "p")
    assert code == 0, err
    assert "24 traces" in out
    assert run("slice", tmp_path / "c", "--out", tmp_path / "s", "--top-k", 4)[0] == 2, "OUT holds something"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval CACHE --student S --samples 4", "--samples has an effect only with --prompts, not with CACHE"),
        ("eval CACHE --student S --engine-arg a=b", "--engine-arg has an effect only with --prompts, not with CACHE"),
        ("eval --student S --prompts p --out o --all", "--all has an effect only with CACHE, not with --prompts"),
        (
            "experiment lsp --cache C --student S --out o --by level",
            "--by has an effect only on answers; give --prompts too",
        ),
    ],
)
def test_an_option_without_effect_is_refused(run, command, message) -> None:
    assert run(*command.split()) == (2, "", f"logitcache: {message}\n")


def test_score_takes_one_source(run, tmp_path) -> None:
    for sources in ([], ["t.jsonl", "--from-cache", tmp_path]):
        code, _, err = run("score", *sources, "--teacher", "x", "--out", tmp_path / "o")
        assert (code, "give either TRACES" in err) == (2, True)


def test_a_plan_is_drawn_from_all_prompts_and_its_traces_can_stay(run, monkeypatch, tmp_path) -> None:
    fake_engine.install(monkeypatch)
    source = prompts(tmp_path / "p.jsonl", *(f'{{"id": "p{i}", "prompt": "question {i}"}}' for i in range(40)))
    settings = (source, "--teacher", "fake", "--top-k", 8, "--out", tmp_path / "c")
    code, out, err = run("plan", *settings, "--try-prompts", 6, "--json")
    assert code == 0, err
    assert (json.loads(out)["prompts"], json.loads(out)["sample_traces"]) == (40, 6)
    assert "6 traces present, 34 to make" in run("generate", *settings)[2]
    code, out, _ = run("plan", *settings, "--try-prompts", 6)
    assert (code, out.startswith("job     40 traces of 40 prompts")) == (0, True)


def test_help_has_examples_and_imports_nothing_heavy() -> None:
    command = str(Path(sys.executable).with_name("logitcache"))
    text = subprocess.run([command, "generate", "--help"], capture_output=True, text=True, check=True).stdout
    assert "Example: logitcache generate" in text
    assert "[default: (off)]" in text
    heavy = (
        "import sys, logitcache.cli; print({'torch', 'vllm', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout == "set()\n"


BUSY = """
import sys, threading, torch
from logitcache.cli import main

def busy(numbers=torch.randn(100)):
    while True:
        numbers + numbers

for _ in range(4):
    threading.Thread(target=busy, daemon=True).start()
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["info", "nowhere"], 2)])
def test_a_librarys_thread_aborts_no_command_that_is_done(arguments, code) -> None:
    """Such a thread is sent away when the interpreter ends, and C++ does not take that."""
    ended = subprocess.run([sys.executable, "-c", BUSY, *arguments], capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout or ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_error_and_a_full_disk_is_one() -> None:
    command = str(Path(sys.executable).with_name("logitcache"))
    piped = subprocess.run(f"{command} generate --help | true", shell=True, capture_output=True, text=True)
    assert piped.stderr == ""
    with open("/dev/full", "w") as full:
        ended = subprocess.run([command, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (1, "logitcache: No space left on device\n")
