from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaModel,
)

from logitcache.errors import StudentError
from logitcache.identity import tokenizer_hash
from logitcache.kernels.reference import sparse_divergence
from logitcache.student.data.dataset import TraceDataset, collate, targets
from logitcache.student.model.head import find_head, lesson_loss, lesson_metrics, taught_hidden
from logitcache.student.model.load import load_student, prune_layers
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TraceDataset(tiny.write_cache(tmp_path_factory.mktemp("cache") / "cache"))


def test_a_student_with_another_tokenizer_is_refused_with_both_hashes(tmp_path):
    path = tiny.save_model(tmp_path, prefix="other")
    with pytest.raises(StudentError, match=f"tokenizer .* {tiny.identity().tokenizer_hash}.*family"):
        load_student(path, tiny.identity())


def test_a_student_with_fewer_rows_than_ids_is_refused_with_the_way_out(tmp_path):
    tiny.model(vocab=60).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=r"has 60 rows, the cache's ids go up to 63.*resize_token_embeddings\(64\)"):
        load_student(tmp_path, tiny.identity())


def test_a_teacher_with_padded_logits_may_teach_a_student_without(tmp_path):
    load_student(tiny.save_model(tmp_path), replace(tiny.identity(), vocab_size=128))


def test_a_missing_model_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "does not exist: give `student`"), ("empty", "is not a causal language model")):
        with pytest.raises(StudentError, match=message) as error:
            load_student(tmp_path / name, tiny.identity())
        assert "\n" not in str(error.value)


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = BertConfig(**sizes, num_attention_heads=2, is_decoder=False)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StudentError, match="is not causal"):
        load_student(tmp_path, tiny.identity())


def test_a_model_without_its_head_is_refused(tmp_path):
    config = tiny.model(tie_word_embeddings=False).config
    LlamaModel(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=r"lacks 1 weights of LlamaForCausalLM, lm_head\.weight"):
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
def test_the_loss_on_taught_rows_is_that_of_the_models_own_logits(data, student, scale, softcap):
    torch.manual_seed(0)
    student = student().eval()
    head = find_head(student)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    batch = collate([data[i] for i in range(6)])
    with torch.no_grad():
        logits = torch.cat([student(input_ids=g, use_cache=False).logits.flatten(0, 1) for g in batch["groups"]])
    value_N = sparse_divergence(logits[batch["taught"]], targets(batch))
    torch.testing.assert_close(lesson_loss(student, head, batch), value_N.sum(), rtol=1e-5, atol=0)
    metrics = lesson_metrics(student, head, batch)
    torch.testing.assert_close(metrics["forward_kl"], value_N, rtol=1e-4, atol=1e-5)
    assert torch.equal(metrics["argmax"], logits[batch["taught"]].argmax(dim=1))


def test_a_trace_has_the_hidden_states_in_a_batch_that_it_has_alone(data):
    student = tiny.model()
    batch = collate([data[i] for i in range(12)])
    assert any(len(g) > 1 for g in batch["groups"])
    alone = [taught_hidden(student, collate([data[data.cache.trace_ids.index(t)]])) for t in batch["trace_ids"]]
    torch.testing.assert_close(taught_hidden(student, batch), torch.cat(alone), rtol=0, atol=1e-5)


def test_a_batch_with_nothing_to_teach_is_a_connected_zero():
    student = tiny.model()
    loss = lesson_loss(student, find_head(student), collate([]))
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    assert dict(student.named_parameters())["model.layers.0.self_attn.q_proj.weight"].grad is not None


def test_pruning_keeps_every_third_layer_and_all_else(tmp_path):
    torch.manual_seed(0)
    deep: dict[str, Any] = SMALL | {"num_hidden_layers": 7, "head_dim": 16}
    Gemma2ForCausalLM(Gemma2Config(**deep)).bfloat16().save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    prune_layers(tmp_path / "teacher", tmp_path / "student", every=3)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype="auto")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert after.dtype == torch.bfloat16
    assert after.config.num_hidden_layers == len(after.config.layer_types) == 3
    assert after.config.layer_types == before.config.layer_types[::3]
    for new, old in enumerate((0, 3, 6)):
        layer = after.model.layers[new]
        assert layer.self_attn.layer_idx == new
        for (_, a), (_, b) in zip(layer.named_parameters(), before.model.layers[old].named_parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / "student")) == tiny.identity().tokenizer_hash


def test_a_model_cannot_be_pruned_by_no_step(tmp_path):
    with pytest.raises(StudentError, match="cannot keep every 0-th layer"):
        prune_layers(tiny.save_model(tmp_path / "m"), tmp_path / "out", every=0)


def test_attention_that_needs_a_gpu_is_not_tried_without_one():
    def gpu_only(*_: object, **__: object) -> None:
        raise AssertionError("this needs a GPU")

    AttentionInterface.register("gpu_only_of_tests", gpu_only)
    student = tiny.model(attn_implementation="gpu_only_of_tests")
    assert find_head(student).softcap is None
    assert student.config._attn_implementation == "gpu_only_of_tests"
