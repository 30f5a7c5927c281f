import subprocess
import sys

import pytest

from logitcache import student


@pytest.mark.parametrize("name", student.__all__)
def test_every_public_name_is_there(name):
    assert getattr(student, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'logitcache.student' has no attribute 'Trainer'"):
        _ = student.Trainer


def test_the_package_is_imported_without_torch():
    script = "import sys, logitcache.student; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
