"""The tables of importers and exporters."""

import subprocess
import sys

import pytest

from logitcache.errors import InputError
from logitcache.interop import formats
from logitcache.interop.formats import EXPORTERS, IMPORTERS, ExportReport, Format, export, import_capture


def test_an_unknown_format_names_the_nearest(tmp_path) -> None:
    with pytest.raises(InputError, match="`format` 'parket' is unknown; did you mean parquet?"):
        export(tmp_path, tmp_path / "out", format="parket")
    with pytest.raises(InputError, match="`tool` 'x' is unknown; give one of distillkit"):
        import_capture(tmp_path, tmp_path / "out", tokenizer="t", tool="x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("found", [*IMPORTERS.values(), *EXPORTERS.values()])
def test_each_entry_names_a_function(found) -> None:
    assert callable(found.load())


def count_files(cache, out) -> ExportReport:
    return ExportReport(out, files=len(list(cache.iterdir())), traces=0, rows=0, bytes=0)


def test_an_exporter_is_one_entry_of_the_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(formats.EXPORTERS, "count", Format("the number of files", f"{__name__}:count_files"))
    (tmp_path / "a").touch()
    assert export(tmp_path, tmp_path / "out", format="count").files == 1


def test_the_tables_import_no_format() -> None:
    code = "import sys, logitcache.interop.formats; print(*{'numpy', 'pyarrow', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == ""
