import functools
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    Qwen3Config,
)

from logitcache.errors import StudentError
from logitcache.kernels.reference import sparse_divergence
from logitcache.student.data.collate import collate
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.model.head import (
    check_packing,
    distillation_loss,
    distillation_metrics,
    find_head,
    supervised_hidden,
)
from logitcache.student.model.load import load_student
from tests import tiny
from tests.tiny import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TraceDataset(tiny.write_cache(tmp_path_factory.mktemp("cache") / "cache"))


FAMILIES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma3": functools.partial(
        Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"], sliding_window=4, head_dim=16
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_traces_do_not_see_each_other(data, family, attention):
    torch.manual_seed(0)
    config = FAMILIES[family](
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation=attention,
    )  # fmt: skip
    student = AutoModelForCausalLM.from_config(config).eval()
    check_packing(student)
    examples = [data[i] for i in (3, 0, 7, 9)]
    packed, padded = collate(examples, packed=True), collate(examples)
    assert packed.groups[0].shape == (1, packed.tokens), "no padding"
    assert sum(g.numel() for g in padded.groups) > packed.tokens
    assert packed.shapes == [(1, n) for n in sorted((len(e.input_ids) for e in examples), reverse=True)]
    with torch.no_grad():
        together, apart = supervised_hidden(student, packed), supervised_hidden(student, padded)
        alone = torch.cat(
            [supervised_hidden(student, collate([e])) for e in sorted(examples, key=lambda e: -len(e.input_ids))]
        )
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(apart, alone, rtol=0, atol=2e-6)


def test_a_model_that_cannot_tell_packed_traces_apart_is_refused(monkeypatch):
    student = tiny.model()
    forward = student.model.forward
    monkeypatch.setattr(
        student.model, "forward", lambda *a, position_ids=None, **k: forward(*a, **k | {"position_ids": None})
    )
    with pytest.raises(StudentError, match="lets packed traces see each other; train with `packing` off"):
        check_packing(student)


SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = BertConfig(**sizes, num_attention_heads=2, is_decoder=False)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StudentError, match="is not causal"):
        load_student(tmp_path, tiny.identity())


@pytest.mark.parametrize(
    ("student", "scale", "softcap"),
    [
        (lambda: tiny.model(), 1.0, None),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.5)), 1.0, 0.5),
        (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)), 1 / 8, None),
        (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625)), 0.0625, None),
    ],
    ids=["llama", "gemma", "granite", "cohere"],
)
def test_the_loss_on_supervised_positions_is_that_of_the_models_own_logits(data, student, scale, softcap):
    torch.manual_seed(0)
    student = student().eval()
    head = find_head(student)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    batch = collate([data[i] for i in range(6)])
    with torch.no_grad():
        logits = torch.cat([student(input_ids=g, use_cache=False).logits.flatten(0, 1) for g in batch.groups])
    value_N = sparse_divergence(logits[batch.supervised], batch.targets)
    torch.testing.assert_close(distillation_loss(student, head, batch), value_N.sum(), rtol=1e-5, atol=0)
    metrics = distillation_metrics(student, head, batch)
    torch.testing.assert_close(metrics["forward_kl"], value_N, rtol=1e-4, atol=1e-5)
    assert torch.equal(metrics["argmax"], logits[batch.supervised].argmax(dim=1))


def test_a_trace_has_the_hidden_states_in_a_batch_that_it_has_alone(data):
    student = tiny.model()
    batch = collate([data[i] for i in range(12)])
    assert any(len(g) > 1 for g in batch.groups)
    alone = [supervised_hidden(student, collate([data[data.cache.trace_ids.index(t)]])) for t in batch.trace_ids]
    torch.testing.assert_close(supervised_hidden(student, batch), torch.cat(alone), rtol=0, atol=1e-5)


def test_a_batch_with_nothing_to_supervise_is_a_connected_zero():
    student = tiny.model()
    loss = distillation_loss(student, find_head(student), collate([]))
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    assert dict(student.named_parameters())["model.layers.0.self_attn.q_proj.weight"].grad is not None


def test_attention_that_needs_a_gpu_is_not_tried_without_one():
    def gpu_only(*_: object, **__: object) -> None:
        raise AssertionError("this needs a GPU")

    AttentionInterface.register("gpu_only_of_tests", gpu_only)
    student = tiny.model(attn_implementation="gpu_only_of_tests")
    assert find_head(student).softcap is None
    assert student.config._attn_implementation == "gpu_only_of_tests"
