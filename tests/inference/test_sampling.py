"""Sampling parameters become vLLM's types before an engine starts."""

import pytest

from logitcache.errors import InputError
from logitcache.inference.sampling import typed

pytestmark = pytest.mark.slow  # vLLM's import


def made(**given):
    from vllm import SamplingParams

    return typed("sampling", given, SamplingParams)


def test_values_become_the_types_that_vllm_declares() -> None:
    assert made(logit_bias={"5": 1, "7": "-2.5"}) == {"logit_bias": {5: 1.0, 7: -2.5}}
    assert made(stop_token_ids=["5", 6], top_k=5.0, top_p="0.9") == {"stop_token_ids": [5, 6], "top_k": 5, "top_p": 0.9}
    assert made(ignore_eos="true", stop="x", min_p=0, bad_words=None) == {
        "ignore_eos": True, "stop": "x", "min_p": 0.0, "bad_words": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("logit_bias", {"a": 1}), ("logit_bias", [5]), ("stop_token_ids", "5"), ("stop_token_ids", ["x"]),
     ("top_k", 5.5), ("top_p", True), ("min_tokens", "x"), ("ignore_eos", "maybe"), ("stop", 5)],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_by_name(name, value) -> None:
    with pytest.raises(InputError, match=f"`sampling` {name}=.*: expected "):
        made(**{name: value})


def test_an_unknown_name_has_the_nearest_and_private_ones_are_unknown() -> None:
    with pytest.raises(InputError, match="`sampling` top_pp: vLLM has no such setting; did you mean top_p"):
        made(top_pp=1)
    with pytest.raises(InputError, match="_eos_token_id: vLLM has no such setting"):
        made(_eos_token_id=1)
