import dataclasses
import threading
from array import array
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from logitcache.errors import InputError
from logitcache.inference import engine, model
from logitcache.inference.engine import cause_in
from logitcache.inference.model import ModelSpec, Sampling
from logitcache.inference.rendering import render
from logitcache.inference.sampling import refuse_unknown
from logitcache.inference.token_texts import token_texts
from logitcache.prompts import Prompt
from logitcache.sections import Markers, find


def test_the_root_cause_is_read_from_an_engines_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    head = "(VllmWorker-0 pid=7) ERROR 11-22 00:18:37 [multiproc_executor.py:953] "
    log.write_text(
        "INFO ValueError: not this\n"
        f"{head}Traceback (most recent call last):\n{head}    raise ValueError(\n{head}ValueError: Available memory is less\n"
        "(EngineCore pid=1) ERROR 11-22 00:18:39 [core.py:1510] Exception: WorkerProc initialization failed\n"
    )
    assert cause_in(log) == "ValueError: Available memory is less"
    log.write_text("all is well\n")
    assert cause_in(log) is None


def test_capacity_settings_are_not_part_of_the_identity() -> None:
    spec = ModelSpec(
        model="m", engine_args={"max_num_seqs": 4, "quantization": "fp8"}, template_args={"enable_thinking": True}
    )
    assert spec.identity_args() == {"quantization": "fp8", "template_args": {"enable_thinking": True}}


def test_settings_that_logitcache_sets_itself_name_the_option_to_use() -> None:
    with pytest.raises(InputError, match="`engine_args` max_logprobs: logitcache sets it itself; use `top_k`"):
        ModelSpec(model="m", engine_args={"max_logprobs": 5})
    with pytest.raises(InputError, match="`sampling` temperature: .*use `temperature`"):
        Sampling(sampling={"temperature": 5})


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(
        InputError, match="`engine_args` max_num_seq: vLLM has no such setting; did you mean max_num_seqs"
    ):
        refuse_unknown("engine_args", {"max_num_seq": 4}, {"max_num_seqs", "model"})


def test_an_engine_that_ends_by_itself_while_it_is_ended_is_ended() -> None:
    """As vLLM 0.32 has it: its process was to be killed after 5 seconds, and the worker below it went first."""
    let_go = []

    class Client:
        resources = staticmethod(lambda: let_go.append(1))

        def shutdown(self) -> None:
            raise psutil.NoSuchProcess(1)

    ended = engine.Engine.__new__(engine.Engine)
    ended._engine = SimpleNamespace(engine_core=Client())
    ended._closing, ended._watch = threading.Event(), threading.Thread(target=lambda: ended._closing.wait())
    ended._watch.start()
    ended.close()
    assert let_go
    assert not ended._watch.is_alive()


@pytest.mark.slow
def test_vllms_rows_arrive_in_typed_arrays_of_8_bytes_an_entry() -> None:
    """Through vLLM's own front end, prompt rows and the first token's missing one included."""
    from vllm.v1.engine import logprobs as front

    before = front.create_sample_logprobs, front.create_prompt_logprobs
    assert engine._typed_rows_work()
    for create, expected in (("create_sample_logprobs", 0), ("create_prompt_logprobs", 1)):
        with engine.typed_rows_made():
            rows = getattr(front, create)(True)
            assert front.create_sample_logprobs(False) == []
        for position in range(3):
            ids, values = [9, 9, 4, position], [-0.25, -0.25, -1.5, -3.0]
            front.append_logprobs_for_next_position(rows, ids, values, iter([None] * 4), 1, 3)
        assert len(rows) == 3 + expected
        assert isinstance(rows.token_ids, array)
        assert rows.token_ids.itemsize + rows.logprobs.itemsize == 8
        ids, logprobs, rank = engine._rows(rows)
        assert ids.tolist() == [[9, 9, 4, p] for p in range(3)]
        assert logprobs.dtype == np.float32
        assert logprobs[0].tolist() == [-0.25, -0.25, -1.5, -3.0]
        assert rank.tolist() == [1, 1, 1]
    assert (front.create_sample_logprobs, front.create_prompt_logprobs) == before


@pytest.mark.slow
def test_sections_are_found_by_the_offsets_of_a_real_tokenizer(embedded_teacher: Path) -> None:
    """Markers that are no tokens of their own, characters of several tokens, and a template that opens the reasoning."""
    facts = model.inspect_model(ModelSpec(model=str(embedded_teacher)))
    opens = facts.chat_template + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    facts.tokenizer.chat_template = opens
    facts = dataclasses.replace(facts, chat_template=opens)
    markers = Markers.detect(facts.tokenizer.get_vocab(), "<think>..</think>")
    prompt = render(facts, Prompt("p", [{"role": "user", "content": "Does <think> mean think? 数学 🙂"}]), {})
    said = facts.tokenizer("2 + 2 is 4 🙂🙂, naïve</think>\n\n**4**<|im_end|>", add_special_tokens=False)["input_ids"]
    ids = prompt + said
    pieces = token_texts(facts, ids)
    assert "".join(p or "" for p in pieces) == facts.tokenizer.decode(ids)
    found = find(pieces, len(prompt), markers)
    text = {name: facts.tokenizer.decode(ids[found.span(name)]) for name in ("opening", "reasoning", "answer")}
    assert text["opening"].strip() == "<think>"
    assert text["reasoning"] == "2 + 2 is 4 🙂🙂, naïve"
    assert text["answer"].endswith("**4**<|im_end|>")
    assert found.reasoning_start == len(prompt)
