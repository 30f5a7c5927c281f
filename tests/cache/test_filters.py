import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.cache import filters
from logitcache.cache.filters import Filter
from logitcache.cache.schema import SCHEMA, to_record
from logitcache.codec import encode
from logitcache.errors import InputError
from logitcache.sections import Sections
from tests import tiny

METADATA = [
    {"level": 1, "kind": "sum", "from": {"seed": 3, "deep": {"er": "x"}}, "hard": False},
    {"level": 5, "kind": "two words", "from": {"seed": 4}, "hard": True},
    {"level": "7", "kind": 3, "a.b": 9, "large": 10**400},
    {},
]


@pytest.fixture(scope="module")
def batch() -> pa.RecordBatch:
    """Four traces of 10, 20, 30 and 40 tokens."""
    made = []
    for i, metadata in enumerate(METADATA):
        length = 10 * (i + 1)
        trace = tiny.trace(i, [3] * length, tiny.bigram()[[3] * (length - 1)], prompts=2)
        trace = replace(
            trace,
            sections=Sections(4, 5, 5 + i, 6 + i, length),
            correct=(True, False, None, True)[i],
            answer=("7", "seven", None, "none")[i],
            finish_reason="length" if i == 3 else "stop",
            metadata=metadata,
        )
        made.append(to_record(trace, encode(trace.rows)))
    return pa.Table.from_pylist(made, schema=SCHEMA).combine_chunks().to_batches()[0]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("correct", [0, 3]),
        ("not correct", [1]),
        ("correct=true", [0, 3]),
        ("correct = false", [1]),
        ("not correct=false", [0, 3]),
        ("correct=none", [2]),
        ("correct!=none", [0, 1, 3]),
        ("not correct=none", [0, 1, 3]),
        ("tokens<=20", [0, 1]),
        ("tokens==20", [1]),
        ("tokens!=20 and tokens>1e1", [2, 3]),
        ("not tokens<=20", [2, 3]),
        ("rows>=29", [2, 3]),
        ("sample_index<1", [0, 1]),
        ("prompt=4 and opening=1 and closing=1", [0, 1, 2, 3]),
        ("reasoning<=1", [0, 1]),
        ("answer>20", [2, 3]),
        ("finish_reason=stop", [0, 1, 2]),
        ("finish_reason!='stop'", [3]),
        ("prompt_id=p1", [1, 3]),
        (f"trace_id={2:032x}", [2]),
        ("gold=7", [0]),
        ("gold!=7", [1, 3]),
        ("gold=none", [2]),
        ('gold="none"', [3]),
        ("meta.level>=3", [1, 2]),
        ("meta.level=1", [0]),
        ("not meta.level=1", [1, 2]),
        ("meta.kind=sum", [0]),
        ("meta.kind='two words'", [1]),
        ("meta.kind!=sum", [1, 2]),
        ("meta.kind=3", [2]),
        ("meta.from.seed<4", [0]),
        ("meta.from.deep.er=x", [0]),
        ("meta.a.b=9", [2]),
        ("meta.large>1e300", [2]),
        ("meta.large=5", []),
        ("meta.hard", [1]),
        ("not meta.hard", [0]),
        ("meta.hard=false", [0]),
        ("meta.level=none", [3]),
        ("meta.level!=none", [0, 1, 2]),
        ("  correct   and   tokens<=20 and not  finish_reason=length ", [0]),
    ],
)
def test_a_filter_keeps(batch, text, kept) -> None:
    chosen = Filter.parse(text)
    assert np.flatnonzero(chosen.keeps(batch)).tolist() == kept
    assert Filter.parse(str(chosen)) == chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no condition at ''"),
        ("not", "no condition at 'not'"),
        ("corect", "corect is unknown; did you mean correct"),
        ("finish_reson=stop", "did you mean finish_reason"),
        ("zzz=1", "there are correct, tokens, .*meta.NAME"),
        ("meta.=3", "meta. is unknown"),
        ("tokens", "tokens is not a condition; compare it, as in tokens<=4096"),
        ("tokens<=many", "tokens is a number, many is not"),
        ("tokens<=nan", "tokens is a number, nan is not"),
        ("tokens<='3'", "tokens is a number, '3' is not"),
        ("tokens=<3", "no condition at"),
        ("correct<3", "correct is true, false or none"),
        ("correct=yes", "correct is true, false or none"),
        ("finish_reason<stop", "text and has no order"),
        ("meta.level>=high", "can only be ordered by numbers, high is not one"),
        ("correct or tokens<3", "expected `and`, found 'or tokens<3'"),
        ("correct and", "no condition at ''"),
        ("and correct", "no condition at 'and correct'"),
        ("gold=two words", "quote values with spaces"),
        ("__import__('os').system('true')", "no condition at"),
    ],
)
def test_what_is_not_a_filter_is_refused_with_the_way_out(text, message) -> None:
    with pytest.raises(InputError, match=message):
        Filter.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("meta.kind>2", "meta.kind>2: a trace has a value there that is not a number; compare it with = or !="),
        ("meta.level", "1 in a trace is not true or false; compare it"),
    ],
)
def test_metadata_that_has_no_order_or_truth_is_refused(batch, text, message) -> None:
    with pytest.raises(InputError, match=message):
        Filter.parse(text).keeps(batch)


def test_a_metadata_name_that_no_trace_has_is_refused_with_the_nearest(batch) -> None:
    batches = [batch.slice(0, 1), batch.slice(1, 3)]
    assert [mask.tolist() for mask in Filter.parse("meta.a.b=9").select(batches)] == [[False], [False, True, False]]
    with pytest.raises(InputError, match=r"meta.levle: no trace has it; did you mean meta.level\?"):
        Filter.parse("meta.levle>1 and correct").select(batches)
    with_null = batch.slice(0, 1).set_column(
        (place := SCHEMA.get_field_index("metadata")), SCHEMA.field(place), pa.array(['{"n": null, "in": {"m": null}}'])
    )
    for name in ("n", "in.m"):
        assert Filter.parse(f"meta.{name}=none").select([with_null])[0].tolist() == [True], "there, and null"
    with pytest.raises(InputError, match="the prompts have no metadata"):
        Filter.parse("meta.level>1").select([batch.slice(3, 1)])


def test_metadata_is_parsed_once_a_trace(batch, monkeypatch) -> None:
    parsed = []
    monkeypatch.setattr(filters.json, "loads", lambda text, loads=json.loads: parsed.append(text) or loads(text))
    Filter.parse("meta.level>=1 and meta.hard").select([batch.slice(0, 2)])
    assert len(parsed) == 2


@given(st.text(alphabet="correct not and tokens meta.x<>=!'\" 19.\n\\", max_size=40))
def test_any_text_is_a_filter_that_reads_back_or_refused(text) -> None:
    try:
        chosen = Filter.parse(text)
    except InputError:
        return
    assert Filter.parse(str(chosen)) == chosen
