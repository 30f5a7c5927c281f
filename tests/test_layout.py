"""What the repository promises about itself: who imports whom, and what a wheel installs."""

import ast
import functools
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Packages and single modules from the bottom up; docs/architecture.md has the same picture.
LAYERS = [
    {"errors"},
    {"runtime", "sections", "prompts", "sparse_rows", "grading", "kernels"},
    {"codec", "trace", "identity", "storage"},
    {"cache", "inference"},
    {"capture", "accuracy", "transform", "interop"},
    {"student.data"},
    {"student.model"},
    {"student.training"},
    {"student.evaluation", "student.experiments"},
    {"commands"},
    {"cli"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
FACES = {"__init__", "student.__init__"}  # they export names lazily and import nothing themselves


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name below ``logitcache`` and path of every module, subfolders included."""
    homes = {"": root / "logitcache", "student.": root / "student", "kernels.": root / "kernels"}
    for prefix, home in homes.items():
        for folder, below, names in os.walk(home):
            below[:] = [b for b in below if b != "__pycache__" and not (Path(folder) / b).is_symlink()]
            for path in (Path(folder) / n for n in sorted(names) if n.endswith(".py")):
                if not path.is_symlink():
                    yield prefix + ".".join(path.relative_to(home).with_suffix("").parts), path
    yield "cli", root / "cli.py"


def unit_of(name: str) -> str | None:
    """The package or single module that a module belongs to."""
    parts = name.split(".")
    wanted = ".".join(parts[:2]) if parts[0] == "student" else parts[0]
    return wanted if wanted in LEVEL else None


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names that a module imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def uses(path: Path) -> set[str]:
    """The units of logitcache that a module imports."""
    ours = (name.removeprefix("logitcache.") for name in imports(path) if name.startswith("logitcache."))
    return {unit for name in ours if (unit := unit_of(name))}


def broken_rules(root: Path) -> list[str]:
    """Imports that go upward, packages that import each other in a circle, and modules that belong to no layer."""
    found, graph = [], {}
    for name, path in modules(root):
        if name in FACES:
            continue
        unit = unit_of(name)
        if unit is None:
            found.append(f"{name} is in no layer")
            continue
        graph.setdefault(unit, set()).update(uses(path) - {unit})
        found += [f"{name} imports {other}" for other in uses(path) if LEVEL[other] > LEVEL[unit]]
    return found + [f"circle: {' -> '.join(c)}" for c in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    found: list[list[str]] = []

    def follow(unit: str, path: list[str]) -> None:
        if unit in path:
            found.append([*path[path.index(unit) :], unit])
            return
        for other in sorted(graph.get(unit, ())):
            if not found:
                follow(other, [*path, unit])

    for unit in sorted(graph):
        follow(unit, [])
    return found


def test_imports_go_downward_and_in_no_circle() -> None:
    assert len(list(modules(ROOT))) > 80, "subfolders are walked"
    assert broken_rules(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("logitcache/codec/rows.py", "from logitcache.cache import shard", "codec.rows imports cache"),
        ("logitcache/cache/deep/er.py", "def f():\n    import logitcache.cli", "cache.deep.er imports cli"),
        ("student/data/views.py", "from logitcache.student.training import run", "imports student.training"),
        ("logitcache/helpers/x.py", "", "helpers.x is in no layer"),
        ("student/loose.py", "", "student.loose is in no layer"),
    ],
)
def test_a_wrong_import_is_found_in_any_subfolder(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    for folder in ("logitcache", "student", "kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cli.py").touch()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    (problem,) = broken_rules(tmp_path)
    assert complaint in problem


def test_two_packages_of_one_layer_that_import_each_other_are_a_circle(tmp_path: Path) -> None:
    for folder in ("logitcache/capture", "logitcache/transform", "student", "kernels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "cli.py").touch()
    (tmp_path / "logitcache/capture/a.py").write_text("from logitcache.transform import b")
    assert broken_rules(tmp_path) == []
    (tmp_path / "logitcache/transform/b.py").write_text("import logitcache.capture.a")
    assert broken_rules(tmp_path) == ["circle: capture -> transform -> capture"]


def test_only_experiments_run_a_teacher_from_the_student_side() -> None:
    for name, path in modules(ROOT):
        if name.startswith("student.") and not name.startswith("student.experiments."):
            assert not uses(path) & {"capture", "accuracy", "transform", "interop"}, name


def test_kernels_know_nothing_of_caches() -> None:
    for name, path in modules(ROOT):
        if name.startswith("kernels."):
            assert uses(path) <= {"kernels", "errors"}, name


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("vllm", {"inference"}),
        ("torch", {"student", "kernels"}),
        ("triton", {"kernels"}),
        ("typer", {"cli", "commands"}),
    ],
)
def test_each_large_package_is_imported_in_few_places(package: str, homes: set[str]) -> None:
    for name, path in modules(ROOT):
        if any(n.split(".")[0] == package for n in imports(path)):
            assert name.split(".")[0] in homes, f"{name} imports {package}"


@pytest.mark.parametrize("module", ["logitcache", "logitcache.cli", "logitcache.student"])
def test_an_import_loads_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vllm", "triton", "pandas", "pyarrow", "numpy"} & set(loaded)


def test_the_help_of_every_command_loads_no_model_library() -> None:
    script = (
        "import sys; from logitcache import cli; from logitcache.commands import COMMANDS\n"
        "for name in COMMANDS: cli.load(name)\n"
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
    installed = {
        n.removeprefix("logitcache/").removesuffix(".py").replace("/", ".") for n in names if n.endswith(".py")
    }
    assert installed == {name for name, _ in modules(ROOT)}, "pyproject.toml lists every package"
    assert {"logitcache/cache/FORMAT.md", "logitcache/py.typed"} <= set(names)
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    assert b"logitcache = logitcache.cli:main" in zipfile.ZipFile(wheel).read(entry)
