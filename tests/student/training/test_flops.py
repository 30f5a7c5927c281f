import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from logitcache.student.training.flops import count_flops, forward_flops, training_flops
from tests.tiny import one_thread  # noqa: F401

SHAPES, TOKENS, ROWS = [(3, 24), (2, 9)], 90, 31
CPU = torch.device("cpu")


def small(**changes) -> dict:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24}
    return sizes | heads | {"attn_implementation": "eager"} | changes  # the counter knows no fused attention of a CPU


def llama(**config) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**small(tie_word_embeddings=True) | config))


MODELS = {
    "tied Llama": llama,
    "untied Llama with biases": lambda: llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**small())),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **small(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, experts_implementation="eager")
        )
    ),
}


def counted(model: PreTrainedModel, backward: bool) -> int:
    """What torch's counter sees when the head runs on ROWS rows of what SHAPES give."""
    head = model.get_output_embeddings()
    with FlopCounterMode(display=False) as counter:
        ids = [torch.randint(3, 60, shape) for shape in SHAPES]
        hidden = [model.base_model(input_ids=i, use_cache=False).last_hidden_state.flatten(0, 1) for i in ids]
        loss = head(torch.cat(hidden)[:ROWS]).sum()
        loss.backward() if backward else None
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_the_formula_agrees_with_torchs_counter(make):
    model = make().train()
    assert forward_flops(model, SHAPES, ROWS) == counted(model, backward=False)
    assert training_flops(model, SHAPES, ROWS) == counted(model, backward=True)


def test_what_is_frozen_costs_no_dw_and_below_the_first_that_learns_no_backward():
    whole = training_flops(llama(), SHAPES, ROWS)
    model = llama().train()
    for name, weight in model.named_parameters():
        weight.requires_grad = "mlp" not in name
    mlps = 2 * TOKENS * 2 * 3 * 32 * 48
    assert training_flops(model, SHAPES, ROWS) == whole - mlps == counted(model, backward=True)

    model = llama(num_hidden_layers=4).requires_grad_(False).train()
    model.model.layers[2:].requires_grad_()
    tops = training_flops(llama(), SHAPES, ROWS) - 2 * ROWS * 64 * 32  # the head's weight, tied, is frozen too
    assert training_flops(model, SHAPES, ROWS) == tops + forward_flops(llama(), SHAPES, 0)
    assert training_flops(model, SHAPES, ROWS) == counted(model, backward=True)


def test_an_adapter_is_counted_with_the_frozen_weights_it_sits_on():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear")).train()
    first = 2 * TOKENS * 32 * (2 * 48 + 3 * 4)  # q, k, v of the first layer with their adapters
    assert counted(model.base_model.model, backward=True) == training_flops(model, SHAPES, ROWS) - first
    assert forward_flops(model, SHAPES, ROWS) > forward_flops(llama(), SHAPES, ROWS)


def test_gradient_checkpointing_adds_a_forward_of_the_layers():
    model = llama().train()
    plain = training_flops(model, SHAPES, ROWS)
    model.gradient_checkpointing_enable()
    more = training_flops(model, SHAPES, ROWS) - plain
    assert more == forward_flops(model, SHAPES, 0)
    # torch's checkpoint stops once it has what backward needs: the last product of each layer is not run again
    last = 2 * TOKENS * 2 * 48 * 32
    assert counted(model, backward=True) == plain + more - last


def test_a_model_of_six_billion_is_counted_without_weights():
    with torch.device("meta"):
        model = llama(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            vocab_size=32000,
        )
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert count_flops(model).per_token == matrices
    assert training_flops(model, [(1, 1)], 1) == 6 * (matrices + 32000 * 4096 + 2 * 32 * 4096)
