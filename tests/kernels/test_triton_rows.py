"""The Triton row kernel: interpreted on a CPU against float64, compiled ahead of time for three GPUs, and run on one.

The interpreter must be asked for before Triton is imported, so the interpreted tests run in a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_triton_rows.py` runs them by hand. `python tests/kernels/test_triton_rows.py`
compiles and prints a line of CSV a case: registers, spills, vector loads.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from logitcache.kernels.divergences import DIVERGENCES, TAILS
from logitcache.kernels.objective import Objective
from logitcache.kernels.reference import sparse_divergence
from logitcache.kernels.targets import SparseTargets

# pyright: reportOptionalMemberAccess=false

# N rows, V vocabulary, K ids of the longest row.

TILES = ((4, 2), (8, 2), (16, 1), (16, 2), (32, 2))  # what may be chosen by autotuning; the last is pinned
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MODES = [(d, t) for d in DIVERGENCES for t in TAILS if t != "sampled" or DIVERGENCES[d].linear_in_p]
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = [] if INTERPRETED else [pytest.mark.gpu]  # the same tests run interpreted and on a GPU
GRID_VOCAB, GRID_K = (33, 1000, 32003, 49152), (1, 8, 64, 256)


def options(divergence: str, tail: str) -> dict:
    return {
        "divergence": divergence,
        "tail": tail,
        "beta": 0.3,
        "alpha": 0.2,
        "temperature": 2.0 if tail == "support" else 1.0,
    }


def teacher(vocab: int, k: int, seed: int = 0) -> SparseTargets:
    """Five rows in float64 on the CPU: of k ids, of none, of k // 2 + 1, of one padded with -1, of k."""
    generator = torch.Generator().manual_seed(seed)
    k = min(k, vocab)
    logp_NV = (3 * torch.randn(5, vocab, generator=generator, dtype=torch.float64)).log_softmax(dim=1)
    order_NV = logp_NV.argsort(dim=1, descending=True)
    sizes = [k, 0, k // 2 + 1, 1, k]
    ids, logp, tails = [], [], []
    for row, order, size in zip(logp_NV, order_NV, sizes, strict=True):
        ids.append(order[:size])
        logp.append(row[order[:size]])
        tails.append(row[order[size:]].logsumexp(0))
    ids[3], logp[3], sizes[3] = torch.tensor([-1, int(ids[3][0]), -1]), torch.stack([logp[3][0]] * 3), 3
    labels = torch.tensor([int(order_NV[0, 0]), 5, -100, vocab - 1, int(order_NV[4, -1])])
    return SparseTargets(
        torch.tensor([0, *sizes]).cumsum(0), torch.cat(ids), torch.cat(logp), torch.stack(tails), labels
    )


def compare(divergence, tail, vocab, k, dtype=torch.float32, padding=True, mask=None, kept=True, **extra):
    """Error against float64 <= plain torch's error + 1e-5 (one rounding of `dtype`), support and tail apart.

    From `mask` on, ids outside the supports (and, if not `kept`, all but the first of each) have a logit of -inf.
    """
    from logitcache.kernels.triton_rows import sparse_divergence_

    exact = teacher(vocab, k)
    generator = torch.Generator().manual_seed(1)
    logits_NV = (2 * torch.randn(5, vocab, generator=generator)).to(dtype)
    if mask is not None:
        ids_NK, _, valid_NK = exact.padded()
        kept_NV = torch.arange(vocab).expand(5, vocab) < mask
        if not kept:
            valid_NK = valid_NK & (valid_NK.cumsum(dim=1) == 1)
        kept_NV.scatter_reduce_(1, ids_NK, valid_NK, "amax")
        kept_NV[range(5), exact.labels.clamp(min=0)] = True
        logits_NV = logits_NV.masked_fill(~kept_NV, -torch.inf)
    weights_N, ce_weights_N = torch.rand(2, 5, generator=generator)
    weights_N[4], ce_weights_N[4] = 0.0, 0.0  # an ignored row
    keywords = {"weights_N": weights_N, "ce_weights_N": ce_weights_N, **options(divergence, tail), **extra}

    def plain(logits_NV, targets):
        leaf_NV = logits_NV.clone().requires_grad_()
        loss_N = sparse_divergence(leaf_NV, targets, **keywords)
        return loss_N.detach().double(), torch.autograd.grad(loss_N.sum(), leaf_NV)[0].double()

    want_N, want_NV = plain(logits_NV.double(), exact)
    targets = SparseTargets(exact.offsets, exact.ids, exact.logprobs.float(), exact.log_tail.float(), exact.labels)
    torch_N, torch_NV = plain(logits_NV, targets)
    stride = -(-vocab // 16) * 16 if padding else vocab
    found_NV = torch.full((5, stride), 7.0, dtype=dtype, device=DEVICE)[:, :vocab].copy_(logits_NV)
    values = sparse_divergence_(
        found_NV,
        targets.to(DEVICE),
        Objective.of(**options(divergence, tail), **extra),
        weights_N.to(DEVICE),
        ce_weights_N.to(DEVICE),
        padding=padding,
    )
    found_NV = found_NV.cpu().double()
    ids_NK, _, valid_NK = targets.padded()
    inside_NV = torch.zeros(5, vocab, dtype=torch.bool)
    inside_NV[valid_NK.nonzero()[:, 0], ids_NK[valid_NK]] = True
    rounding_NV = want_NV.abs() * (torch.finfo(dtype).eps if dtype != torch.float32 else 0.0)
    for part_NV in (inside_NV, ~inside_NV):
        ours_NV, theirs_NV = ((g - want_NV).abs() * part_NV for g in (found_NV, torch_NV))
        assert (ours_NV - rounding_NV).max() <= theirs_NV.max() + 1e-5
    ours_N = (values.divergence_N.cpu() * weights_N + values.ce_N.cpu() * ce_weights_N).double()
    assert (ours_N - want_N).abs().max() <= (torch_N - want_N).abs().max() + 1e-5
    assert found_NV[4].abs().max() == 0.0


class TestInterpretedOrOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("divergence", "tail"), MODES)
    @pytest.mark.parametrize("vocab", GRID_VOCAB)
    @pytest.mark.parametrize("k", GRID_K)
    def test_the_grid(self, divergence, tail, vocab, k):
        compare(divergence, tail, vocab, k)

    @pytest.mark.parametrize(("divergence", "tail"), MODES)
    def test_the_grid_with_softcap_and_scale(self, divergence, tail):
        compare(divergence, tail, 1000, 64, softcap=5.0, logit_scale=0.7)
        compare(divergence, tail, 33, 8, softcap=5.0, logit_scale=-0.7)

    @pytest.mark.parametrize("padding", [False, True])
    def test_the_grid_with_and_without_padding_columns(self, padding):
        compare("forward_kl", "bucket", 1003, 8, padding=padding)

    @pytest.mark.parametrize(("divergence", "tail"), MODES)
    def test_the_grid_of_rows_without_a_support(self, divergence, tail):
        from logitcache.kernels.triton_rows import sparse_divergence_

        logits_NV = torch.randn(2, 1003, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        nothing = torch.zeros(0, device=DEVICE)
        label_N = torch.full((2,), -100, device=DEVICE)
        offsets, log_tail_N = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.zeros(2, device=DEVICE)
        targets = SparseTargets(offsets, nothing.long(), nothing, log_tail_N, label_N)
        values = sparse_divergence_(logits_NV, targets, Objective.of(**options(divergence, tail)))
        assert values.divergence_N.abs().max() <= 1e-6
        assert logits_NV.abs().max() == 0.0

    @pytest.mark.parametrize(("divergence", "tail"), MODES)
    def test_the_grid_of_masked_ids_under_a_softcap(self, divergence, tail):
        compare(divergence, tail, 1003, 8, mask=500, softcap=5.0)
        compare(divergence, tail, 33, 8, mask=17, softcap=5.0, logit_scale=-0.7)

    def test_the_grid_takes_tensors_of_any_stride_and_float_dtype(self):
        from logitcache.kernels.triton_rows import sparse_divergence_

        exact = teacher(1003, 8).to(DEVICE)
        logits_NV = torch.randn(5, 1003, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        found = []
        for spread in (lambda t: t, lambda t: torch.stack([t, t - 7], dim=1)[:, 0]):
            targets = SparseTargets(
                *map(spread, (exact.offsets, exact.ids, exact.logprobs, exact.log_tail, exact.labels))
            )
            weights_N = spread(torch.arange(5.0, device=DEVICE))
            grad_NV = logits_NV.clone()
            values = sparse_divergence_(grad_NV, targets, Objective.of(), weights_N, weights_N)
            found.append((grad_NV, *values))
        for plain, spread in zip(*found, strict=True):
            assert torch.equal(plain, spread)

    def test_the_grid_of_tiles_is_tried_once_where_the_environment_asks_for_it(self, monkeypatch):
        from logitcache.kernels import triton_rows as rows

        tried = []

        def milliseconds(step):
            step()
            tried.append(len(tried))
            return abs(len(tried) - 3)  # the third wins

        monkeypatch.setattr(rows, "milliseconds", milliseconds)
        monkeypatch.setattr(rows, "_fastest", {})
        targets, logits_NV = teacher(1003, 8).to(DEVICE), torch.randn(5, 1003).to(DEVICE)
        found = []
        for asked in ("0", "1", "1"):
            monkeypatch.setenv("LOGITCACHE_AUTOTUNE", asked)
            found.append(logits_NV.clone())
            rows.sparse_divergence_(found[-1], targets, Objective.of())
            assert len(tried) == (0 if asked == "0" else len(rows.TILES))
        rows.sparse_divergence_(logits_NV, targets, Objective.of("tv"), num_warps=8)
        assert len(tried) == len(rows.TILES)  # a tile that was asked for is taken
        assert list(rows._fastest.values()) == [rows.TILES[2]]
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
        assert torch.equal(found[1], found[2])

    @pytest.mark.parametrize(("divergence", "tail"), MODES)
    def test_the_grid_of_shifted_logits(self, divergence, tail):
        """Multiples of 1/64 are exact in float32 at any shift up to 1e4, so nothing may change but the rounding of exp."""
        from logitcache.kernels.triton_rows import sparse_divergence_

        targets = teacher(1003, 8).map(lambda t: t.float() if t.is_floating_point() else t).to(DEVICE)
        logits_NV = (128 * torch.randn(5, 1003, generator=torch.Generator().manual_seed(3))).round().to(DEVICE) / 64
        found, shifts = [], (0.0, 9984.0, -9984.0)
        for shift in shifts:
            grad_NV, ones_N = logits_NV + shift, torch.ones(5, device=DEVICE)
            values = sparse_divergence_(grad_NV, targets, Objective.of(**options(divergence, tail)), ones_N, ones_N)
            found.append((grad_NV, *values))
        for shifted in found[1:]:
            torch.testing.assert_close(shifted, found[0], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("t", [0.1, 0.01])
    def test_the_grid_of_a_low_temperature_far_from_0(self, t):
        from logitcache.kernels.triton_rows import sparse_divergence_

        targets = teacher(33, 8).map(lambda t: t.float() if t.is_floating_point() else t)
        logits_NV = torch.arange(165.0).view(5, 33) % 7 / 64 - 192.0
        want_N = sparse_divergence(logits_NV.double() + 192.0, targets, tail="support", temperature=t)
        values = sparse_divergence_(
            logits_NV.to(DEVICE), targets.to(DEVICE), Objective.of(tail="support", temperature=t)
        )
        torch.testing.assert_close(values.divergence_N.cpu().double(), want_N, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(("divergence", "tail"), MODES)
    def test_the_grid_of_masked_ids_that_the_teacher_kept(self, divergence, tail):
        if DIVERGENCES[divergence].infinite_at_zero:
            pytest.skip("the divergence is infinite there")
        compare(divergence, tail, 1003, 8, mask=500, kept=False)
        compare(divergence, tail, 33, 16, mask=17, kept=False)

    def test_the_grid_leaves_masked_logits_alone(self):
        from logitcache.kernels.triton_rows import sparse_divergence_

        logits_NV = torch.zeros(1, 64, device=DEVICE)
        logits_NV[0, 40:] = -torch.inf
        one = torch.tensor([-0.7], device=DEVICE)
        targets = SparseTargets(torch.tensor([0, 1], device=DEVICE), torch.tensor([3], device=DEVICE), one, one)
        sparse_divergence_(logits_NV, targets, Objective.of(softcap=9.0))
        assert logits_NV.isfinite().all()
        assert logits_NV[0, 40:].abs().max() == 0.0

    def test_the_grid_reaches_rows_beyond_two_to_the_31_elements(self):
        """Row 1 starts where a 32-bit offset would wrap. The pages between are never touched."""
        from logitcache.kernels.triton_rows import sparse_divergence_

        far = 2**31 + 16
        logits_NV = torch.empty(far + 64, device=DEVICE).as_strided((2, 64), (far, 1))
        logits_NV.copy_(torch.arange(128.0).view(2, 64) % 7)
        near_NV = logits_NV.clone()
        targets = teacher(64, 4).rows(2, 4)
        targets = SparseTargets(
            targets.offsets, targets.ids, targets.logprobs.float(), targets.log_tail.float(), targets.labels
        ).to(DEVICE)
        for tensor_NV in (logits_NV, near_NV):
            sparse_divergence_(tensor_NV, targets, Objective.of())
        assert torch.equal(logits_NV, near_NV)

    def test_the_grid_of_a_student_sure_of_one_id(self):
        """The tail is below float32's 1 - sum, and total mass is right all the same."""
        from logitcache.kernels.triton_rows import sparse_divergence_

        logits_NV = torch.zeros(1, 1000, device=DEVICE)
        logits_NV[0, 0] = 40.0
        half = torch.tensor([0.5], device=DEVICE).log()
        zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        targets = SparseTargets(torch.tensor([0, 1], device=DEVICE), zero, half, half)
        values = sparse_divergence_(logits_NV, targets, Objective.of())
        assert float(values.log_tail_N) == pytest.approx(6.906755 - 40.0, abs=1e-4)
        assert float(logits_NV[0, 1:].sum()) == pytest.approx(-0.5, abs=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU, test_linear.py does this")
@pytest.mark.parametrize("vocab", [32, 1003])
def test_the_grid_of_the_fused_head_with_the_kernel_in_its_place(monkeypatch, vocab):
    """What the CUDA path does, launches and gradient scaling included, but for the device."""
    from logitcache.kernels import fused_linear
    from logitcache.kernels import triton_rows as rows

    targets = teacher(vocab, 8)
    targets = SparseTargets(
        targets.offsets, targets.ids, targets.logprobs.float(), targets.log_tail.float(), targets.labels
    )
    generator = torch.Generator().manual_seed(2)
    hidden_NH, weight_VH = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (5, vocab))
    bias_V = torch.randn(vocab, generator=generator).requires_grad_()
    more = {"bias_V": bias_V, "chunk_rows": 2}
    found = []
    for module in (None, rows):
        monkeypatch.setattr(fused_linear, "_triton_rows", lambda *_, module=module: module)
        loss = fused_linear.linear_sparse_divergence(
            hidden_NH, weight_VH, targets, ce_weight=0.3, weights_N=torch.arange(5.0), **more
        )
        metrics = fused_linear.linear_sparse_metrics(hidden_NH, weight_VH, targets, **more)
        grads = torch.autograd.grad(loss / 7, (hidden_NH, weight_VH, bias_V))
        found.append([loss.detach(), *grads, *metrics.values()])
    for reference, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


if not INTERPRETED:

    @pytest.mark.slow
    def test_the_interpreted_kernel_is_no_further_from_float64_than_torch_on_the_whole_grid():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "2"]
        command += [__file__, "-k", "the_grid"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        assert " passed" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(("divergence", "tail"), MODES)
@pytest.mark.parametrize("vocab", [*GRID_VOCAB, 128256, 151936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_half_logits_are_no_further_from_float64_than_torch(divergence, tail, vocab, dtype):
    compare(divergence, tail, vocab, 64, dtype=dtype)
    compare(divergence, tail, vocab, 64, dtype=dtype, softcap=30.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("warps", "vectors"), [(8, 1), (8, 4), (16, 2), (32, 1), (32, 2)])
def test_on_a_gpu_every_tile_gives_the_same_gradient(warps, vectors):
    from logitcache.kernels.triton_rows import sparse_divergence_

    targets = teacher(49152, 64)
    targets = SparseTargets(targets.offsets, targets.ids, targets.logprobs.float(), targets.log_tail.float()).to("cuda")
    logits_NV = torch.randn(5, 49152, device="cuda")
    pinned_NV, tiled_NV = logits_NV.clone(), logits_NV.clone()
    sparse_divergence_(pinned_NV, targets, Objective.of())
    sparse_divergence_(tiled_NV, targets, Objective.of(), num_warps=warps, vectors=vectors)
    torch.testing.assert_close(tiled_NV, pinned_NV, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_on_a_gpu_autotuning_measures_every_tile_and_keeps_the_gradient(monkeypatch):
    from logitcache.kernels import triton_rows as rows

    targets = teacher(49152, 64).to("cuda")
    logits_NV = torch.randn(5, 49152, device="cuda")
    pinned_NV, tuned_NV = logits_NV.clone(), logits_NV.clone()
    rows.sparse_divergence_(pinned_NV, targets, Objective.of())
    monkeypatch.setattr(rows, "_fastest", {})
    monkeypatch.setenv("LOGITCACHE_AUTOTUNE", "1")
    rows.sparse_divergence_(tuned_NV, targets, Objective.of())
    assert set(rows._fastest.values()) < set(TILES)
    torch.testing.assert_close(tuned_NV, pinned_NV, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_on_a_gpu_gradients_are_scaled_unless_the_factor_is_one():
    from logitcache.kernels.triton_rows import scale_

    values = torch.randn(100_003, device="cuda", dtype=torch.bfloat16)
    for factor in (1.0, 0.3):
        want = (values.float() * factor).bfloat16()
        assert torch.equal(scale_(values.clone(), torch.tensor(factor, device="cuda")), want)


def test_the_tiles_compiled_here_are_those_of_autotuning():
    from logitcache.kernels import triton_rows

    assert triton_rows.TILES == TILES


def test_wrong_strides_are_refused_before_a_launch():
    from logitcache.kernels.triton_rows import MOST_K, sparse_divergence_

    targets = teacher(33, 4)
    with pytest.raises(ValueError, match="column stride 5: pass it contiguous"):
        sparse_divergence_(torch.zeros(33, 5).t(), targets, Objective.of())
    with pytest.raises(ValueError, match="no padding up to 48"):
        sparse_divergence_(torch.zeros(5, 33), targets, Objective.of(), padding=True)
    with pytest.raises(ValueError, match=f"at most {MOST_K}"):
        sparse_divergence_(torch.zeros(5, 33), targets, Objective.of(), most_k=MOST_K + 1)


# Ahead-of-time compilation. A case changes the default: bfloat16, forward KL with bucket, 128256 ids, k = 64.
CASES = {
    "default": {},
    "odd vocabulary, padded rows": {"vocab": 50257},
    "float32": {"dtype": torch.float32},
    "k=256, cross-entropy": {"k": 256, "CE_WEIGHTS": True, "LABELS": True},
    "k=256, cross-entropy, softcap": {"k": 256, "CE_WEIGHTS": True, "LABELS": True, "SOFTCAP": True, "SCALE": True},
    "no gradient": {"GRAD": False},
    **{f"{warps} warps, {vectors} vectors": {"warps": warps, "vectors": vectors} for warps, vectors in TILES[:-1]},
}
BUILDS = [(architecture, case, flags) for architecture in (80, 90, 100) for case, flags in CASES.items()]
BUILDS += [
    (90, f"{divergence}, {tail}", {"DIVERGENCE": divergence, "TAIL": tail, "LABELS": tail == "sampled"})
    for divergence, tail in MODES[1:]
]


def compile_rows(
    architecture: int, vocab=128256, dtype=torch.bfloat16, k=64, warps=None, vectors=None, **flags
) -> dict[str, int]:
    """Registers, bytes of spills, 128-bit loads and other wide loads of one compiled row kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from logitcache.kernels.triton_rows import _row_kernel, tile

    r, lanes, warps = tile(vocab, dtype, warps, vectors)
    constants = {
        "DIVERGENCE": "forward_kl",
        "TAIL": "bucket",
        **dict.fromkeys(("LABELS", "CE_WEIGHTS", "SOFTCAP", "SCALE"), False),
        **dict.fromkeys(("WEIGHTS", "GRAD"), True),
        "K": k,
        "R": r,
        "L": lanes,
        **flags,
    }
    types = {"logits_ptr": "*bf16" if dtype == torch.bfloat16 else "*fp32"}
    types |= dict.fromkeys(("offsets_ptr", "ids_ptr", "labels_ptr"), "*i64")
    types |= dict.fromkeys(("stride", "V", "stored"), "i32") | dict.fromkeys(constants, "constexpr")
    names = _row_kernel.arg_names
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "fp32") for name in names}
    aligned = [name for name in names if name.endswith("_ptr") or name in ("stride", "stored")]
    aligned += ["V"] if vocab % 16 == 0 else []
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(_row_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "warps": warps,
        "vectors": r // (32 * warps),
        "registers": registers,
        "spilled": stack + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads_128": len(re.findall(r"\bLDG\.E\.128", code)),
        "loads_16": len(re.findall(r"\bLDG\.E\.U16", code)),
    }


def check_compiled(found: dict[str, int], grad: bool = True) -> None:
    assert found["spilled"] == 0
    assert found["registers"] * found["warps"] * 32 <= 65536  # a block fits a multiprocessor
    assert found["loads_128"] == (3 if grad else 2) * found["vectors"]  # the tiles, the rest, the tiles again
    assert found["loads_16"] <= 4  # the gathers of the support and of the label


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_the_kernel_compiles_for_an_h100_without_spills_and_with_128_bit_loads(own_cache):
    check_compiled(compile_rows(90))


def compile_all(environment: dict[str, str]) -> list[dict]:
    done = subprocess.run(
        [sys.executable, __file__, "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["installed", "LOGITCACHE_TRITON_36"])
def test_every_case_compiles_for_every_gpu_without_spills(folder, tmp_path):
    """LOGITCACHE_TRITON_36 names a folder made by `pip install --target FOLDER --no-deps triton==3.6.0`."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    if folder != "installed":
        if not os.environ.get(folder):
            pytest.skip(f"{folder} is not set")
        environment["PYTHONPATH"] = os.environ[folder]
    rows = compile_all(environment)
    assert len(rows) == len(BUILDS)
    assert folder == "installed" or {row["triton"] for row in rows} == {"3.6.0"}
    for row in rows:
        check_compiled(row, row["case"] != "no gradient")


if __name__ == "__main__":
    import triton

    def build(architecture: int, case: str, flags: dict) -> dict:
        found = compile_rows(architecture, **flags)
        return {"triton": triton.__version__, "sm": architecture, "case": case, **found}

    for number, row in enumerate(ThreadPoolExecutor(2).map(build, *zip(*BUILDS, strict=True))):
        if "--json" in sys.argv:
            print(json.dumps(row))
        else:
            print(
                ",".join(row) + "\n" if number == 0 else "",
                ",".join(f'"{v}"' if "," in str(v) else str(v) for v in row.values()),
                sep="",
            )
