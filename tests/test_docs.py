"""The README and the guides: their Python runs, their commands parse, their files exist."""

import re
import shlex
from pathlib import Path

import pytest

from logitcache import cli
from tests import fake_engine, tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FORMAT = ROOT / "logitcache/cache/FORMAT.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def with_python(pages: list[Path]) -> list[Path]:
    return [page for page in pages if blocks(page, "python") and page.name != "extending.md"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A cache of as many traces and tokens as the demo's, and a student of its tokenizer."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.write_cache(folder / "qwen-cache", tiny.traces(112, 28, (150, 350)), shards=4)
    tiny.save_model(folder / "model")
    (folder / "problems.jsonl").write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(6)))
    return folder


def run_page(page: Path, home: Path, monkeypatch) -> None:
    monkeypatch.chdir(home)
    known: dict = {}
    for block in blocks(page, "python"):
        code = block.replace("Qwen/Qwen3-0.6B", str(home / "model")).replace("top_k=16", "top_k=4")
        code = code.replace('report_to="wandb"', "use_cpu=True, max_steps=4")
        exec(compile(code.replace('"Qwen/Qwen3-32B"', '"fake", top_k=8'), str(page), "exec"), known)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_python(PAGES), ids=lambda page: page.name)
def test_the_python_of_a_page_runs_on_a_cache_as_large_as_the_demos(page, home, monkeypatch) -> None:
    fake_engine.install(monkeypatch)
    run_page(page, home, monkeypatch)


def commands(page: Path) -> list[str]:
    """Every `logitcache COMMAND ...` of a page, in its blocks and in its text, comments cut."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (?:\$ )?(logitcache [a-z].*)$", text, re.M) + re.findall(
        r"`(logitcache [a-z]+ -[^`]*)`", text
    )
    return [line.partition("  #")[0].strip() for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_in_a_page_exist(page) -> None:
    for line in commands(page):
        words = shlex.split(line)
        known = {flag for p in cli.load(words[1]).params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
        for word in words[2:]:
            assert not word.startswith("--") or word.partition("=")[0] in known, line


@pytest.mark.parametrize("page", [*PAGES, FORMAT], ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page) -> None:
    text = page.read_text()
    linked = [page.parent / target for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text)]
    homes = [ROOT, ROOT / "logitcache"]
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md))`", text)
    missing = [str(p) for p in linked if not p.exists()]
    missing += [name for name in named if not any((h / name).exists() for h in homes)]
    assert not missing
