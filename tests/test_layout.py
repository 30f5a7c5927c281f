"""What the repository promises about itself: who imports whom, and what a wheel installs."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels", r"logitcache(?!\.kernels(\.|$))"),
        ("logitcache", r"logitcache\.(kernels|student|cli)|torch|triton"),
        ("student", r"logitcache\.cli|vllm"),
    ],
)
def test_imports_run_one_way(folder: str, forbidden: str) -> None:
    for path in (p for p in (ROOT / folder).glob("*.py") if not p.is_symlink()):
        # `from logitcache import x` names the bare package as well
        found = {n for n in imports(path) if re.match(rf"({forbidden})(\.|$)", n)}
        assert not found, f"{path.name} imports {found}"


def test_only_the_engine_imports_vllm_and_only_inside_functions() -> None:
    for path in [
        *ROOT.glob("logitcache/*.py"),
        *ROOT.glob("student/*.py"),
        *ROOT.glob("kernels/*.py"),
        ROOT / "cli.py",
    ]:
        if any(n.split(".")[0] == "vllm" for n in imports(path)):
            assert path.name == "engine.py"
            top = {
                n
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Import | ast.ImportFrom)
                for n in [ast.unparse(node)]
            }
            assert not any("vllm" in n for n in top)


def test_the_core_needs_neither_torch_nor_transformers_nor_vllm() -> None:
    script = (
        "import sys, logitcache.cache.reader, logitcache.capture.generate, logitcache.commands.text, logitcache.cli; "
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vllm", "triton", "pandas"} & set(loaded)


@pytest.mark.slow
def test_the_wheel_installs_one_top_level_name(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"logitcache"}
    assert {
        "logitcache/cli.py",
        "logitcache/kernels/reference.py",
        "logitcache/student/run.py",
        "logitcache/FORMAT.md",
    } <= set(names)
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    assert b"logitcache = logitcache.cli:main" in zipfile.ZipFile(wheel).read(entry)
