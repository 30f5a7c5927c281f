import subprocess
import sys
import typing
from pathlib import Path

import pytest

from logitcache.errors import StudentError
from logitcache.runtime.options import Option
from logitcache.student.training.options import TrainOptions


def options(**given) -> TrainOptions:
    return TrainOptions(student="s", out=Path("out"), **given)


def test_caches_are_taken_whole_and_a_mix_has_shares():
    assert options(caches=[Path("a"), Path("b")]).shares == {Path("a"): None, Path("b"): None}
    assert options(mix={"a": 0.7, "b": 0.3}).shares == {Path("a"): 0.7, Path("b"): 0.3}
    assert options(mix={"a": 0.7}, caches=[Path("b=0.3")]).shares == {Path("a"): 0.7, Path("b"): 0.3}


def test_without_a_cache_or_without_a_share_the_error_says_what_to_give():
    with pytest.raises(StudentError, match="give `caches`"):
        _ = options().shares
    with pytest.raises(StudentError, match="give it a share too, such as b=0.5"):
        _ = options(mix={"a": 0.7}, caches=[Path("b")]).shares


def test_every_option_is_declared_with_help():
    for name, kind in typing.get_type_hints(TrainOptions, include_extras=True).items():
        (option,) = kind.__metadata__
        assert isinstance(option, Option), name
        assert option.help.endswith("."), name


def test_the_options_can_be_read_without_torch():
    script = "import sys, logitcache.student.training.options; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
