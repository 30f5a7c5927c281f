"""All commands alike: their configuration files, their help, completion, and flags in what they print."""

import os
import subprocess
import sys

import pytest

from logitcache.commands import COMMANDS
from logitcache.commands.results import show
from logitcache.errors import use_flags
from tests import fake_engine

# Arguments that each command accepts before it looks at any file.
ARGUMENTS = [
    "generate p.jsonl --teacher t --out c --sampling top_p=0.9 --reasoning-markers <a>,</a> --worker 1/2",
    "generate p.jsonl --teacher t --out c --column prompt=1 --column answer=true",
    "plan p.jsonl --teacher t --engine-arg max_model_len=99",
    "score t.jsonl --teacher t --out c --eos none",
    "score --from-cache c --crop right:0.5 --teacher t --out o",
    "train a b --student s --out r --lr 1e-5 --set weight_decay=1e-4 --section-weight answer=2",
    "train --mix a=0.7 --mix b=0.3 --student s --out r",
    "eval c --student s --all",
    "eval --student s --prompts p --out o --budgets 0,50% --column prompt=q",
    "compare a b",
    "experiment lsp --cache c --student s --out o --points 0.5,1 --epochs 2",
    "experiment lsp --cache c --student s --out o --prompts p --column prompt=q",
    "info c --json",
    "verify c",
    "compact c",
    "slice c --out o --where tokens<=9 --sections answer",
    "merge a b --out o",
    "split c --into a=0.5 --into b=0.5",
    "export c --out o",
    "import s --out o --tokenizer t --settings x.yaml",
    "push c me/x",
    "pull me/x --out o",
]


def test_every_command_is_covered_here() -> None:
    assert {line.split()[0] for line in ARGUMENTS} == set(COMMANDS)


@pytest.mark.parametrize("line", ARGUMENTS)
def test_a_printed_configuration_prints_itself_again_and_nothing_runs(run, tmp_path, monkeypatch, line) -> None:
    monkeypatch.chdir(tmp_path)
    command, *rest = line.split()
    code, printed, err = run(command, *rest, "--print-config")
    assert (code, err) == (0, "")
    (tmp_path / "settings.yaml").write_text(printed)
    assert run(command, "--config", "settings.yaml", "--print-config") == (0, printed, "")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


def test_a_printed_experiment_without_prompts_is_not_refused_for_its_defaults(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run("experiment", "lsp", "--cache", "c", "--student", "s", "--out", "o", "--print-config")[1]
    (tmp_path / "e.yaml").write_text(printed)
    code, _, err = run("experiment", "--config", "e.yaml", "--dry-run")
    assert (code, "c is not a cache" in err) == (2, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_starts_with_the_everyday_options(run, monkeypatch, name) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = run(name, "--help")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    panels = [line.strip("╭╮─ ") for line in text.splitlines() if line.startswith("╭")]
    assert panels[-1] == "Configuration"
    assert next(p for p in panels if p != "Arguments") == "Options"
    assert "…" not in text, "a flag that is cut"
    for line in text.splitlines():
        if "Example: " in line:
            assert line.strip().startswith("Example: logitcache")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "wanted"),
    [("logitcache gen", "generate"), ("logitcache generate --tea", "--teacher"), ("logitcache slice --to", "--top-k")],
)
def test_the_shell_completes_commands_and_options(words: str, wanted: str) -> None:
    script = "import sys; sys.argv = ['logitcache']; from logitcache.cli import main; main()"
    asked = {"_LOGITCACHE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    ended = subprocess.run([sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True)
    assert wanted in ended.stdout.split(), ended.stderr


def test_results_show_flags_and_python_shows_fields(capsys) -> None:
    text = "9 tokens, the teacher takes 1 to 7; `engine_args` max_model_len=10 takes it"
    show(str, text)
    use_flags({"engine_args": "--engine-arg"})
    show(str, text)
    use_flags({})
    fields, flags = capsys.readouterr().out.splitlines()
    assert fields == text
    assert flags == "9 tokens, the teacher takes 1 to 7; --engine-arg max_model_len=10 takes it"


def test_a_skipped_prompt_names_the_flag_in_the_summary_and_in_the_progress(run, monkeypatch, tmp_path) -> None:
    fake_engine.install(monkeypatch)
    source = tmp_path / "p.jsonl"
    source.write_text(f'{{"id": "a", "prompt": "w1"}}\n{{"id": "long", "prompt": "{"w1 " * 50}"}}\n')
    code, out, err = run("generate", source, "--teacher", "fake", "--out", tmp_path / "c", "--top-k", 4)
    assert code == 0
    assert "--engine-arg max_model_len=51 takes it" in out
    assert "--engine-arg max_model_len=51 takes it" in err
    assert "`engine_args`" not in out + err
