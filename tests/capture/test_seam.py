"""Texts of `score` as token ids: where the prompt ends, where the completion begins and ends."""

import json

import pytest

from logitcache.capture import score as module
from logitcache.capture.score import ScoreOptions, score
from logitcache.errors import IdentityError, InputError
from logitcache.inference import model
from logitcache.prompts import Prompt
from tests import fake_engine
from tests.small_tokenizers import CHATML, byte_level, llama_2

USER = [{"role": "user", "content": "q"}]
THINKS = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")


def read(facts, completion, content=USER, reason="stop", **changes):
    """The tokens that the engine gets, as text, and the whole `Tokens`."""
    options = ScoreOptions(traces="t.jsonl", out="o", teacher="t", **changes)  # type: ignore[arg-type]
    end = module._end(options, facts)
    texts = module._Texts(options, facts, end, ["<think>", "</think>"])
    tokens = texts.tokens(module.Request("t", "p", 0, module._Text(Prompt("p", content), completion, reason)))
    return facts.tokenizer.decode(tokens.ids[tokens.prompt_length :], clean_up_tokenization_spaces=False), tokens


@pytest.mark.parametrize(
    ("completion", "reason", "eos", "expected"),
    [
        ("4", "stop", "auto", "4<|im_end|>"),
        ("4", "length", "auto", "4"),
        ("4", "stop", "none", "4"),
        ("4", "stop", "<s>", "4<s>"),
        ("4<|im_end|>", "stop", "auto", "4<|im_end|>"),
        ("4<|im_end|>\n", "stop", "auto", "4<|im_end|>"),
        ("4</s>", "stop", "auto", "4</s>"),
        ("4\n", "stop", "auto", "4\n<|im_end|>"),
        ("", "stop", "auto", "<|im_end|>"),
    ],
)
def test_a_completion_ends_once_with_the_templates_own_end(completion, reason, eos, expected) -> None:
    """The tokenizer's end of sequence is another token, as Gemma's."""
    facts = byte_level(eos="</s>")
    found, tokens = read(facts, completion, reason=reason, eos=eos)
    assert found == expected
    assert tokens.context == ()


def test_an_opening_that_the_prompt_has_is_left_out_and_counted() -> None:
    facts = byte_level(THINKS, more=("<think>", "</think>"))
    found, tokens = read(facts, "<think>\nWell</think>4")
    assert found == "Well</think>4<|im_end|>"
    assert any("<think>" in remark for remark in tokens.remarks)
    assert read(facts, "Well</think>4")[1].remarks == ()


def test_a_sentencepiece_completion_has_no_space_before_it() -> None:
    facts = llama_2()
    _, tokens = read(facts, "It is 4.", content="q:")
    assert facts.tokenizer.convert_ids_to_tokens(tokens.ids)[-7:] == ["It", "▁is", "▁", "4", ".", "</s>"][-7:] or (
        facts.tokenizer.decode(tokens.ids) == "<s> q:It is 4.</s>"
    )


def test_one_plain_turn_is_a_text_and_several_are_a_transcript() -> None:
    facts = byte_level(THINKS)
    assert read(facts, [{"role": "assistant", "content": "<think>\na</think>b"}])[0] == "a</think>b<|im_end|>"
    turns = [
        {"role": "assistant", "content": "look"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "wet"},
    ]
    found, tokens = read(byte_level(), turns)
    ((start, end),) = tokens.context
    assert found == "look<|im_end|>\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\nwet<|im_end|>"
    assert byte_level().tokenizer.decode(tokens.ids[start:end]).startswith("\n<|im_start|>tool")
    assert read(byte_level(), turns[:2])[0].endswith("rain<|im_end|>\n"), "no end behind a tool's result"


def test_the_identity_says_with_what_texts_end(tmp_path, monkeypatch) -> None:
    fake_engine.install(monkeypatch)
    rows = [{"prompt": "q", "completion": "w1"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call = {"traces": str(tmp_path / "t.jsonl"), "out": tmp_path / "c", "teacher": "fake", "top_k": 4}
    assert score(ScoreOptions(**call)).made == 1
    with pytest.raises(IdentityError, match="score --eos <think>"):
        score(ScoreOptions(**call, eos="<think>"))
    with pytest.raises(InputError, match="`eos` 'w1': not a token"):
        score(ScoreOptions(**call, eos="w1"))
    with pytest.raises(InputError, match="`eos`: `from_cache` takes tokens as they are"):
        ScoreOptions(from_cache=tmp_path / "c", out=tmp_path / "d", teacher="fake", eos="none")


def test_the_templates_end_is_pinned_and_cut_from_the_text(monkeypatch) -> None:
    facts = byte_level(eos="</s>")
    monkeypatch.setattr(model, "engine_version", lambda: "fake 1")
    monkeypatch.setattr(model, "inspect_model", lambda spec: facts)
    task, identity = ScoreOptions(traces="t.jsonl", out="o", teacher="t", top_k=4).task(reading=False)
    ids = {facts.tokenizer.convert_tokens_to_ids(t) for t in ("</s>", "<|im_end|>")}
    assert set(identity.pin_tokens) == ids == task.ends.eos_ids
    assert identity.derived == ["score --eos <|im_end|>"]
