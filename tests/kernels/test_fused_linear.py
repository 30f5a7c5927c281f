"""The fused head against the reference on whole logits, and what it promises around it."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bench_divergence import naive
from logitcache.kernels import fused_linear
from logitcache.kernels.divergences import DIVERGENCES, TAILS
from logitcache.kernels.fused_linear import linear_sparse_divergence, linear_sparse_metrics
from logitcache.kernels.reference import sparse_divergence
from logitcache.kernels.targets import SparseTargets

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportPrivateImportUsage=false

# N rows, H hidden, V vocabulary.

MODES = [(d, t) for d in DIVERGENCES for t in TAILS if t != "sampled" or DIVERGENCES[d].linear_in_p]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROOT = Path(__file__).parents[2]


def problem(n=11, width=16, vocab=57, dtype=torch.float64, device="cpu", k=8, seed=0):
    """hidden [n, width], weight [vocab, width], bias [vocab] that want gradients, and ragged targets with labels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_NH, weight_VH, bias_V = normal(n, width), normal(vocab, width) / width**0.5, normal(vocab)
    logp_NV = (2 * normal(n, vocab)).log_softmax(dim=1)
    sizes_N = torch.randint(0, k + 1, (n,), generator=generator)
    order_NV = logp_NV.argsort(dim=1, descending=True)
    sorted_NV = logp_NV.gather(1, order_NV)
    inside_NV = torch.arange(vocab) < sizes_N[:, None]
    log_tail_N = sorted_NV.masked_fill(inside_NV, -torch.inf).logsumexp(dim=1)
    label_N = torch.randint(0, vocab, (n,), generator=generator)
    label_N[::5] = -100
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes_N.cumsum(0)])
    real = torch.promote_types(dtype, torch.float32)
    targets = SparseTargets(
        offsets, order_NV[inside_NV], sorted_NV[inside_NV].to(real), log_tail_N.to(real), label_N
    ).to(device)
    leaves = [t.to(device, dtype).requires_grad_() for t in (hidden_NH, weight_VH, bias_V)]
    return *leaves, targets


def row_weights(n, device="cpu"):
    weights_N, ce_weights_N = torch.rand(2, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights_N[1::4] = 0.0
    return {"weights_N": weights_N.to(device), "ce_weights_N": ce_weights_N.to(device)}


def options(divergence, tail):
    return {
        "divergence": divergence,
        "tail": tail,
        "beta": 0.3,
        "alpha": 0.2,
        "temperature": 2.0 if tail == "support" else 1.0,
    }


def tensors(targets):
    """Targets and no weights, as the operator takes them."""
    return (targets.offsets, targets.ids, targets.logprobs, targets.log_tail, targets.labels, None, None)


@pytest.mark.parametrize(("divergence", "tail"), MODES)
@pytest.mark.parametrize("chunk_rows", [None, 4])  # None, 11 rows and 16 wide: logits in dW's memory; 4: three chunks
def test_the_fused_head_is_the_reference_on_whole_logits(divergence, tail, chunk_rows):
    hidden_NH, weight_VH, bias_V, targets = problem()
    more = {**options(divergence, tail), **row_weights(11), "softcap": 5.0, "logit_scale": 0.7}
    want = sparse_divergence(hidden_NH @ weight_VH.t() + bias_V, targets, **more).sum() / 3
    found = linear_sparse_divergence(hidden_NH, weight_VH, targets, bias_V=bias_V, chunk_rows=chunk_rows, **more) / 3
    torch.testing.assert_close(found, want)
    leaves = (hidden_NH, weight_VH, bias_V)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize(("divergence", "tail"), MODES)
@pytest.mark.parametrize("vocab", [1000, 32003])
def test_on_a_gpu_bf16_gradients_are_no_worse_than_plain_torch(divergence, tail, vocab):
    more = {**options(divergence, tail), "ce_weight": 0.3, "softcap": 20.0}
    grads = {}
    for name, dtype in (("exact", torch.float64), ("plain", torch.bfloat16), ("ours", torch.bfloat16)):
        hidden_NH, weight_VH, _, targets = problem(300, 128, vocab, torch.bfloat16, "cuda", k=64)
        hidden_NH, weight_VH = (t.detach().to(dtype).requires_grad_() for t in (hidden_NH, weight_VH))
        if name == "ours":
            loss = linear_sparse_divergence(hidden_NH, weight_VH, targets, chunk_rows=128, **more)
        else:
            loss = sparse_divergence(hidden_NH @ weight_VH.t(), targets, **more).sum()
        grads[name] = [g.double() for g in torch.autograd.grad(loss, (hidden_NH, weight_VH))]
    for ours, plain, exact in zip(grads["ours"], grads["plain"], grads["exact"], strict=True):
        # three chunks round dW three times where plain torch rounds once
        assert (ours - exact).norm() <= 1.5 * (plain - exact).norm() + 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_gradients_are_no_worse_than_plain_torch(device):
    grads = {}
    for name, dtype in (("exact", torch.float64), ("plain", torch.bfloat16), ("ours", torch.bfloat16)):
        hidden_NH, weight_VH, _, targets = problem(300, 32, 1003, torch.bfloat16, device, k=16)
        hidden_NH, weight_VH = (t.detach().to(dtype).requires_grad_() for t in (hidden_NH, weight_VH))
        if name == "ours":
            loss = linear_sparse_divergence(hidden_NH, weight_VH, targets, chunk_rows=16)  # 19 chunks: float32 dW
        else:
            loss = sparse_divergence(hidden_NH @ weight_VH.t(), targets).sum()
        grads[name] = [g.double() for g in torch.autograd.grad(loss, (hidden_NH, weight_VH))]
    for ours, plain, exact in zip(grads["ours"], grads["plain"], grads["exact"], strict=True):
        assert (ours - exact).norm() <= plain.sub(exact).norm() * 1.05 + 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_many_chunks_add_up_dw_in_float32_unless_told_otherwise(device):
    hidden_NH, weight_VH, _, targets = problem(64, 16, 57, torch.bfloat16, device)

    def grad(**more):
        loss = linear_sparse_divergence(hidden_NH, weight_VH, targets, **more)
        return torch.autograd.grad(loss, weight_VH)[0].float()

    whole_VH = grad(chunk_rows=64, accumulate=torch.float32)
    fine_VH, coarse_VH = grad(chunk_rows=1), grad(chunk_rows=1, accumulate=torch.bfloat16)
    assert (fine_VH - whole_VH).norm() < 0.5 * (coarse_VH - whole_VH).norm()


def test_logits_never_exist_as_a_whole():
    hidden_NH, weight_VH, _, targets = problem(64, 4, 1000, torch.float32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    flags = ("forward_kl", "bucket", 0.5, 1.0, None, 1.0, 1000, 8, None, False, True, True, False)
    with Watch(), torch.no_grad():
        fused_linear._linear_sparse_divergence._init_fn(hidden_NH, weight_VH, None, *tensors(targets), *flags)
    assert largest <= 8 * 1008 * 4  # one chunk: 8 rows, V rounded up to 16


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_give_a_connected_zero(device):
    hidden_NH, weight_VH, bias_V, targets = problem(0, device=device)
    loss = linear_sparse_divergence(hidden_NH, weight_VH, targets, bias_V=bias_V)
    loss.backward()
    assert loss.item() == 0.0
    assert [float(t.grad.abs().sum()) for t in (hidden_NH, weight_VH, bias_V)] == [0.0, 0.0, 0.0]
    assert linear_sparse_metrics(hidden_NH, weight_VH, targets)["argmax"].shape == (0,)


def test_logits_in_the_memory_of_dw_give_way_to_it_slice_by_slice(monkeypatch):
    monkeypatch.setattr(fused_linear, "BORROW_BYTES", 0)  # 256 ids a slice, four slices
    hidden_NH, weight_VH, _, targets = problem(vocab=1003)
    found = linear_sparse_divergence(hidden_NH, weight_VH, targets)
    want = sparse_divergence(hidden_NH @ weight_VH.t(), targets).sum()
    for a, b in zip(*(torch.autograd.grad(x, (hidden_NH, weight_VH)) for x in (found, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_without_weight_get_no_gradient():
    hidden_NH, weight_VH, _, targets = problem()
    weights_N = torch.zeros(11)
    weights_N[4] = 1.0
    linear_sparse_divergence(hidden_NH, weight_VH, targets, weights_N=weights_N).backward()
    assert hidden_NH.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [4]


def test_a_frozen_head_skips_its_product(monkeypatch):
    hidden_NH, weight_VH, _, targets = problem()
    monkeypatch.setattr(fused_linear, "_add_product", lambda *_, **__: pytest.fail("dW was computed"))
    linear_sparse_divergence(hidden_NH, weight_VH.detach(), targets).backward()
    assert hidden_NH.grad.abs().sum() > 0
    with torch.no_grad():
        linear_sparse_divergence(hidden_NH, weight_VH, targets)


def test_only_the_head_may_be_trained():
    hidden_NH, weight_VH, bias_V, targets = problem()
    linear_sparse_divergence(hidden_NH.detach(), weight_VH, targets, bias_V=bias_V.detach()).backward()
    assert weight_VH.grad.abs().sum() > 0
    assert hidden_NH.grad is None
    assert bias_V.grad is None


def test_a_tied_embedding_gets_both_gradients():
    _, weight_VH, _, targets = problem()
    ids_N = torch.arange(11)
    loss = linear_sparse_divergence(weight_VH[ids_N].tanh(), weight_VH, targets)
    want = sparse_divergence(weight_VH[ids_N].tanh() @ weight_VH.t(), targets).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, weight_VH)[0] for x in (loss, want)))


@pytest.mark.parametrize("device", DEVICES)
def test_the_padding_of_a_head_has_no_probability_and_no_gradient(device):
    hidden_NH, weight_VH, bias_V, targets = problem(vocab=64, dtype=torch.float32, device=device)
    targets = clipped(targets, 60)
    found = linear_sparse_divergence(hidden_NH, weight_VH, targets, bias_V=bias_V, vocab_size=60, chunk_rows=4)
    want = sparse_divergence(hidden_NH @ weight_VH[:60].t() + bias_V[:60], targets).sum()
    leaves = (hidden_NH, weight_VH, bias_V)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (found, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert linear_sparse_metrics(hidden_NH, weight_VH, targets, vocab_size=60)["argmax"].max() < 60
    with pytest.raises(ValueError, match="vocab_size=65, but the head has 64 rows"):
        linear_sparse_divergence(hidden_NH, weight_VH, targets, vocab_size=65)


def clipped(targets, vocab):
    """The same targets with the ids and labels beyond `vocab` masked."""
    return SparseTargets(
        targets.offsets,
        targets.ids.masked_fill(targets.ids >= vocab, -1),
        targets.logprobs,
        targets.log_tail,
        targets.labels.masked_fill(targets.labels >= vocab, -100),
    )


def test_a_second_derivative_is_refused():
    hidden_NH, weight_VH, _, targets = problem()
    loss = linear_sparse_divergence(hidden_NH, weight_VH, targets)
    with pytest.raises(NotImplementedError, match=r"reference\.sparse_divergence on whole logits"):
        torch.autograd.grad(loss, hidden_NH, create_graph=True)


def test_a_second_backward_is_refused():
    hidden_NH, weight_VH, _, targets = problem()
    loss = linear_sparse_divergence(hidden_NH, weight_VH, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="add the losses before one backward"):
        loss.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_agree_to_the_last_bit(device):
    runs = []
    for _ in range(2):
        hidden_NH, weight_VH, _, targets = problem(200, 64, 1003, torch.float32, device, k=32)
        loss = linear_sparse_divergence(hidden_NH, weight_VH, targets, chunk_rows=64)
        runs.append([loss.detach(), *torch.autograd.grad(loss, (hidden_NH, weight_VH))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_the_head_and_gives_gradients_in_its_own_dtype():
    hidden_NH, weight_VH, bias_V, targets = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_sparse_divergence(hidden_NH, weight_VH, targets, bias_V=bias_V)
    loss.backward()
    assert loss.dtype == weight_VH.grad.dtype == hidden_NH.grad.dtype == torch.float32
    torch.testing.assert_close(
        loss, linear_sparse_divergence(hidden_NH, weight_VH, targets, bias_V=bias_V), rtol=0.02, atol=0.1
    )


def test_metrics_are_the_rows_of_the_reference():
    hidden_NH, weight_VH, bias_V, targets = problem()
    logits_NV = hidden_NH @ weight_VH.t() + bias_V
    with torch.no_grad():
        found = linear_sparse_metrics(hidden_NH, weight_VH, targets, bias_V=bias_V, chunk_rows=4)
        torch.testing.assert_close(found["forward_kl"], sparse_divergence(logits_NV, targets))
        both_N = sparse_divergence(logits_NV, targets, ce_weight=1.0)
        torch.testing.assert_close(found["ce"], both_N - found["forward_kl"])
        assert torch.equal(found["argmax"], logits_NV.argmax(dim=1))
        for r, top1 in enumerate(found["top1"].tolist()):
            ids = targets.ids[targets.offsets[r] : targets.offsets[r + 1]]
            mass = 1 - logits_NV.softmax(dim=1)[r, ids].sum()
            torch.testing.assert_close(found["log_tail"][r].exp(), mass)
            assert top1 == (len(ids) > 0 and int(ids[0]) == int(found["argmax"][r]))
            best = int(found["argmax"][r])
            torch.testing.assert_close(found["log_top"][r], logits_NV.log_softmax(dim=1)[r, best])
            inside = (ids == best).nonzero().flatten().tolist()
            want = float(targets.logprobs[targets.offsets[r] + inside[0]]) if inside else -torch.inf
            assert found["teacher_log_top"][r] == want
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("logit_scale", [0.7, -0.7])
def test_metrics_know_the_softcap_and_the_sign_of_the_scale(logit_scale):
    hidden_NH, weight_VH, _, targets = problem()
    with torch.no_grad():
        found = linear_sparse_metrics(hidden_NH, weight_VH, targets, softcap=2.0, logit_scale=logit_scale)
        log_q_NV = (2.0 * torch.tanh(logit_scale * (hidden_NH @ weight_VH.t()) / 2.0)).log_softmax(dim=1)
    torch.testing.assert_close(found["log_top"], log_q_NV.amax(dim=1))
    assert torch.equal(found["argmax"], log_q_NV.argmax(dim=1))
    ce_N = -log_q_NV.gather(1, targets.labels.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(found["ce"], ce_N.masked_fill(targets.labels < 0, 0.0))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_a_support_learn_from_their_token_alone(device):
    hidden_NH, weight_VH, _, targets = problem(dtype=torch.float32, device=device)
    nothing = torch.zeros_like(targets.log_tail)
    targets = SparseTargets(torch.zeros_like(targets.offsets), targets.ids, targets.logprobs, nothing, targets.labels)
    found = linear_sparse_divergence(hidden_NH, weight_VH, targets, ce_weight=1.0)
    want = torch.nn.functional.cross_entropy(hidden_NH @ weight_VH.t(), targets.labels, reduction="sum")
    torch.testing.assert_close(found, want)
    for a, b in zip(*(torch.autograd.grad(x, (hidden_NH, weight_VH)) for x in (found, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    metrics = linear_sparse_metrics(hidden_NH, weight_VH, targets)
    torch.testing.assert_close(metrics["ce"].sum(), want)
    assert not metrics["top1"].any()
    assert (metrics["forward_kl"] == 0).all()
    assert (metrics["log_tail"] == 0).all()
    assert (metrics["teacher_log_top"] == -torch.inf).all()


def test_the_operator_keeps_the_rules_of_torch_library():
    hidden_NH, weight_VH, bias_V, targets = problem(dtype=torch.float32)
    flags = ("forward_kl", "bucket", 0.5, 1.0, None, 1.0, 57, 4, None, True, True, True, True)
    torch.library.opcheck(
        fused_linear._linear_sparse_divergence,
        (hidden_NH, weight_VH, bias_V, *tensors(targets), *flags),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_keeps_it_whole(backend):
    hidden_NH, weight_VH, _, targets = problem(dtype=torch.float32)

    def step(hidden_NH, weight_VH, targets):
        return linear_sparse_divergence(hidden_NH.tanh(), weight_VH, targets, ce_weight=0.1, chunk_rows=4) / 11

    want = torch.autograd.grad(step(hidden_NH, weight_VH, targets), (hidden_NH, weight_VH))
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for _ in range(2):
        found = torch.autograd.grad(compiled(hidden_NH, weight_VH, targets), (hidden_NH, weight_VH))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)


def test_a_head_it_cannot_take_is_refused_with_the_way_out():
    hidden_NH, weight_VH, bias_V, targets = problem()
    head = torch.nn.Linear(16, 57)
    with pytest.raises(TypeError, match=r"pass its \.weight"):
        linear_sparse_divergence(hidden_NH, head, targets)
    head.lora_A = torch.nn.ModuleDict()
    with pytest.raises(NotImplementedError, match="modules_to_save"):
        linear_sparse_divergence(hidden_NH, head, targets)
    with pytest.raises(TypeError, match="dequantise"):
        linear_sparse_divergence(hidden_NH, weight_VH.detach().to(torch.int8), targets)
    with pytest.raises(TypeError, match=r"cast them to one dtype, or use torch\.autocast"):
        linear_sparse_divergence(hidden_NH.float(), weight_VH, targets)
    with pytest.raises(ValueError, match=r"hidden_NH is \[5, 16\], targets and weight_VH need \[11, 16\]"):
        linear_sparse_divergence(hidden_NH[:5], weight_VH, targets)
    with pytest.raises(ValueError, match=r"bias_V is \[7\]"):
        linear_sparse_divergence(hidden_NH, weight_VH, targets, bias_V=bias_V[:7])
    with pytest.raises(ValueError, match=r"ce_weights_N is \[1\], targets need \[11\]"):
        linear_sparse_divergence(hidden_NH, weight_VH, targets, ce_weights_N=torch.ones(1))
    with pytest.raises(ValueError, match="chunk_rows=0"):
        linear_sparse_divergence(hidden_NH, weight_VH, targets, chunk_rows=0)
    with pytest.raises(ValueError, match="head has 40 rows"):
        linear_sparse_divergence(hidden_NH, weight_VH[:40], targets)


def test_a_sharded_head_is_refused_with_the_way_out():
    from torch.distributed.tensor import DTensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        hidden_NH, weight_VH, _, targets = problem()
        sharded = DTensor.from_local(weight_VH, init_device_mesh("cpu", (1,)))
        with pytest.raises(NotImplementedError, match=r"pass weight_VH\.full_tensor\(\)"):
            linear_sparse_divergence(hidden_NH, sharded, targets)
        linear_sparse_divergence(hidden_NH, sharded.full_tensor(), targets).backward()
        assert hidden_NH.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()


def test_the_kernels_import_nothing_but_torch_and_triton():
    good = {"torch", "triton", *sys.stdlib_module_names}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in good or name.startswith("logitcache.kernels"), (
                    f"{path.name} imports {name}"
                )


def test_chunks_stay_within_their_memory():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert fused_linear.default_rows(8192, 128256, 4096, torch.bfloat16, cuda) == 2048
    for vocab in (128256, 151936, 262144):
        rows = fused_linear.default_rows(16384, vocab, 4096, torch.bfloat16, cuda)
        assert rows * vocab * 2 <= fused_linear.CUDA_BYTES
        assert rows * fused_linear.FLOAT32_CHUNKS >= 16384
        assert fused_linear.default_rows(16384, vocab, 576, torch.float32, cpu) * vocab * 4 <= fused_linear.CPU_BYTES
    assert fused_linear.default_rows(1, 10**9, 8, torch.float32, cpu) == 16
    for n in (1, 512, 600, 1100, 2048, 10**6):
        assert fused_linear.default_rows(n, 49152, 576, torch.float32, cpu) <= max(n / 5, (3 * n - 576) / 5, 16)


@pytest.mark.gpu
def test_on_a_gpu_the_extra_memory_stays_below_600_mib():
    hidden_NH = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.randn(128256, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.rand(8192, 2048, device="cuda").topk(64).indices.flatten()
    logprobs = torch.full((8192 * 64,), -5.0, device="cuda")
    targets = SparseTargets(
        torch.arange(8193, device="cuda") * 64, ids, logprobs, torch.full((8192,), -0.5, device="cuda")
    )
    linear_sparse_divergence(hidden_NH[:16], weight_VH, targets.rows(0, 16)).backward()  # the libraries' workspaces
    hidden_NH.grad = weight_VH.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_sparse_divergence(hidden_NH, weight_VH, targets).backward()
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in (hidden_NH, weight_VH))
    assert torch.cuda.max_memory_allocated() - before - gradients <= 600 << 20


def test_the_benchmark_baseline_computes_the_same():
    hidden_NH, weight_VH, _, targets = problem(dtype=torch.float32)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        want = linear_sparse_divergence(hidden_NH, weight_VH, targets, divergence=divergence)
        torch.testing.assert_close(naive(hidden_NH, weight_VH, targets, divergence), want)
