from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from logitcache.errors import StudentError
from logitcache.identity import tokenizer_hash
from logitcache.student.model.prune import prune_layers
from tests import tiny
from tests.tiny import one_thread  # noqa: F401


def test_pruning_keeps_every_third_layer_and_all_else(tmp_path):
    torch.manual_seed(0)
    deep: dict[str, Any] = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 7,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
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
