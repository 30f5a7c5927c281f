import os
from pathlib import Path

import pytest

from logitcache.errors import InputError
from logitcache.runtime.yaml_files import construct, read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r":\d+: over 20,000 values, with aliases written out"),
        (MERGES, r":\d+: over 20,000 values, with aliases written out"),
        ("a: &a [1, *a]\n", ":1: an alias in itself"),
        ("a: &a {b: *a}\n", ":1: an alias in itself"),
        ("a: " + "[" * 5000, ": nested too deeply"),
        ("a: " + "{a: " * 5000, ": nested too deeply"),
        ("a: " + "x" * 300_000, ": over 256 KiB"),
        ("a:\n  b: 1\n  c: {d: 1, d: 2}\n", ":3: d is given twice"),
        ("a: \x1b[2J\n", ": not valid YAML"),
        ("a: \x00\n", ": not valid YAML"),
    ],
    ids=["laughs", "merges", "circle", "circle of a mapping", "lists", "mappings", "long", "twice", "escape", "null"],
)
def test_a_file_beyond_the_bounds_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"c\.yaml{message}") as found:
        read_yaml(path)
    assert "\n" not in str(found.value)


def test_a_file_that_is_not_utf8_or_no_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system [x]", "? {a: b}\n: 1", "? [a]\n: 1", "2024-99-99", "!!int x", "!!binary ü"],
)
def test_what_cannot_be_constructed_is_a_value_error_or_yaml_error(tmp_path: Path, text: str) -> None:
    import yaml

    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises((ValueError, yaml.YAMLError)):
        construct(*read_yaml(tmp_path / "c.yaml"))


def test_a_few_aliases_are_taken(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &a {x: 1e-4}\nb: {<<: *a, y: [*a, *a]}\n")
    assert construct(*read_yaml(tmp_path / "c.yaml"))["b"] == {"x": 1e-4, "y": [{"x": 1e-4}] * 2}


def test_a_pipe_is_read_as_a_file(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a: 1\n")
    os.close(writer)
    assert construct(*read_yaml(Path(f"/dev/fd/{reader}"))) == {"a": 1}
    os.close(reader)
