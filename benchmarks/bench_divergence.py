"""Forward and backward of a student's head with a divergence: ours beside the others, in one run.

    python benchmarks/bench_divergence.py                   the whole table on the GPU, appended to results/<gpu>.csv
    python benchmarks/bench_divergence.py --device cpu      the same table, small
    python benchmarks/bench_divergence.py --json            an object a line
    python benchmarks/bench_divergence.py --plot out.svg    the newest run in results/<machine>.csv, with matplotlib

Needs torch, and triton on a GPU. Others are measured where they are installed and skipped by name where they are not.
All implementations of a case take turns, so that a slow moment of the machine hits each of them. Extra memory is the
peak beyond inputs and gradients: the allocator's on a GPU, the resident set's on Linux CPUs.
"""

import argparse
import csv
import gc
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from logitcache.kernels import linear  # noqa: E402
from logitcache.kernels.linear import linear_sparse_divergence  # noqa: E402
from logitcache.kernels.reference import DIVERGENCES, Objective, SparseTargets  # noqa: E402

# N taught rows, H hidden, V vocabulary, K ids a row.

PEAK = {"H100": 790e12, "H200": 790e12}  # bf16 FLOP/s that long matrix products reach; elsewhere the products are timed
BANDWIDTH = 3.0e12  # bytes/s an H100 streams
GPU_SHAPES = [(4096, 128256), (2048, 128256), (4096, 151936), (2304, 262144)]
GPU_ROWS = [8192, 2048, 16384]
CPU_CASES = [(512, 576, 49152), (2048, 576, 49152), (512, 2048, 49152), (512, 1024, 128256)]


@dataclass(frozen=True)
class Case:
    N: int
    H: int
    V: int
    k: int = 64
    dtype: str = "bfloat16"
    divergence: str = "forward_kl"


@dataclass
class Result:
    impl: str
    case: Case
    ms: list[float] = field(default_factory=list)
    extra_mib: float | None = None
    floor_ms: float | None = None

    def row(self) -> dict:
        low, median, high = (
            (statistics.quantiles(self.ms, n=10)[i] for i in (1, 4, 7)) if len(self.ms) > 1 else self.ms * 3
        )
        share = self.floor_ms / median if self.floor_ms else None
        return {
            "impl": self.impl,
            **asdict(self.case),
            "ms_median": round(median, 3),
            "ms_p20": round(low, 3),
            "ms_p80": round(high, 3),
            "extra_mib": None if self.extra_mib is None else round(self.extra_mib, 1),
            "floor_share": None if share is None else round(share, 3),
        }


class Problem:
    """Inputs of a case, the same for every implementation."""

    def __init__(self, case: Case, device: str):
        torch.manual_seed(0)
        dtype, self.case, self.device = getattr(torch, case.dtype), case, device
        self.hidden_NH = torch.randn(case.N, case.H, device=device, dtype=dtype).requires_grad_()
        self.weight_VH = (torch.randn(case.V, case.H, device=device, dtype=dtype) / case.H**0.5).requires_grad_()
        gaps_NK = torch.randint(1, max(case.V // case.k, 2), (case.N, case.k), device=device)
        self.ids_NK = gaps_NK.cumsum(1) % case.V  # distinct: k gaps below V / k add up to less than V
        self.logp_NK = (2 * torch.randn(case.N, case.k, device=device)).log_softmax(dim=1) - 0.05
        tail_N = torch.full((case.N,), 0.0487706, device=device).log()  # log(1 - e^-0.05)
        self.label_N = self.ids_NK[:, 0].contiguous()
        offsets = torch.arange(case.N + 1, device=device) * case.k
        self.targets = SparseTargets(offsets, self.ids_NK.flatten(), self.logp_NK.flatten(), tail_N, self.label_N)

    def clear(self) -> None:
        self.hidden_NH.grad = self.weight_VH.grad = None

    def gradient_bytes(self) -> int:
        grads = (self.hidden_NH.grad, self.weight_VH.grad)
        return sum(g.numel() * g.element_size() for g in grads if g is not None)


def naive(hidden_NH: Tensor, weight_VH: Tensor, targets: SparseTargets, divergence: str = "forward_kl") -> Tensor:
    """What is written first: log_softmax of whole logits, the bucket as 1 - sum. The tests hold ours against it."""
    return _naive(hidden_NH, weight_VH, *targets.padded(), targets.log_tail, divergence)


def _naive(hidden_NH, weight_VH, ids_NK, log_p_NK, valid_NK, log_tail_N, divergence: str) -> Tensor:
    terms = Objective.of(divergence).loss
    log_q_NV = F.log_softmax((hidden_NH @ weight_VH.t()).float(), dim=-1)
    log_q_NK = log_q_NV.gather(1, ids_NK)
    rest_N = 1 - (log_q_NK.exp() * valid_NK).sum(dim=1)
    support = terms(log_p_NK, log_q_NK).masked_fill(~valid_NK, 0.0).sum()
    return support + terms(log_tail_N, rest_N.clamp(min=1e-7).log()).sum()


Step = Callable[[], None]


def implementations(problem: Problem) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Name and maker of each step; a maker raises ImportError where its package is missing."""
    p, divergence = problem, problem.case.divergence

    def ours() -> Step:
        return lambda: linear_sparse_divergence(p.hidden_NH, p.weight_VH, p.targets, divergence=divergence).backward()

    def torch_eager() -> Step:
        return lambda: naive(p.hidden_NH, p.weight_VH, p.targets, divergence).backward()

    def torch_compiled() -> Step:
        compiled, padded = torch.compile(_naive, dynamic=False), p.targets.padded()
        return lambda: compiled(p.hidden_NH, p.weight_VH, *padded, p.targets.log_tail, divergence).backward()

    def bare_products() -> Step:
        return lambda: products(p)

    def torch_ce() -> Step:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise ImportError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
        chunked = torch.nn.LinearCrossEntropyOptions()
        return lambda: F.linear_cross_entropy(  # pyright: ignore
            p.hidden_NH, p.weight_VH, p.label_N, reduction="sum", options=chunked
        ).backward()

    def liger_ce() -> Step:
        loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda: loss(p.weight_VH, p.hidden_NH, p.label_N).backward()

    def liger_jsd(beta: float) -> Step:
        # a dense teacher, whose own matrix product is part of the step: that is what this loss needs
        loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=beta)
        teacher_NH, teacher_VH = torch.randn_like(p.hidden_NH), p.weight_VH.detach()
        return lambda: loss(p.hidden_NH, p.weight_VH, teacher_NH, teacher_VH, None).backward()

    def cut_ce() -> Step:
        loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return lambda: loss(p.hidden_NH, p.weight_VH, p.label_N, reduction="sum").backward()

    yield "logitcache", ours
    yield "matrix products", bare_products
    yield "torch", torch_eager
    yield "torch.compile", torch_compiled
    yield "torch linear_cross_entropy", torch_ce
    if p.device == "cuda":
        yield "liger linear cross-entropy", liger_ce
        yield "liger linear kl", lambda: liger_jsd(0.0)
        yield "liger linear jsd", lambda: liger_jsd(0.5)
        yield "cut-cross-entropy", cut_ce


def products(p: Problem) -> None:
    """The three matrix products and nothing else: in our chunks on a GPU, of all rows at once on a CPU."""
    hidden_NH, weight_VH = p.hidden_NH.detach(), p.weight_VH.detach()
    device = hidden_NH.device
    rows = linear.default_rows(p.case.N, p.case.V, p.case.H, hidden_NH.dtype, device) if hidden_NH.is_cuda else p.case.N
    logits_CV = hidden_NH.new_empty(min(rows, p.case.N), p.case.V)
    grad_NH, grad_VH = torch.empty_like(hidden_NH), torch.empty_like(weight_VH)
    for start in range(0, p.case.N, rows):
        hidden_CH = hidden_NH[start : start + rows]
        chunk_CV = logits_CV[: len(hidden_CH)]
        torch.mm(hidden_CH, weight_VH.t(), out=chunk_CV)
        torch.mm(chunk_CV, weight_VH, out=grad_NH[start : start + rows])
        if start == 0:
            torch.mm(chunk_CV.t(), hidden_CH, out=grad_VH)
        else:
            grad_VH.addmm_(chunk_CV.t(), hidden_CH)
    p.hidden_NH.grad, p.weight_VH.grad = grad_NH, grad_VH


class Clock:
    """Time and peak memory of a step on one device."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def time(self, step: Step) -> float:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        step()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)

    def extra_mib(self, step: Step, problem: Problem) -> float | None:
        """Peak beyond what is allocated before the step and the gradients it leaves."""
        problem.clear()
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = torch.cuda.max_memory_allocated()
        else:
            reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
            if not reset.exists():
                return None
            reset.write_text("5")  # forget the peak
            before = _kib(status, "VmRSS") * 1024
            step()
            peak = _kib(status, "VmHWM") * 1024
        return (peak - before - problem.gradient_bytes()) / 2**20


def _kib(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def run_case(
    case: Case, device: str, reps: int, steps: dict[str, Callable[[Problem], Step]] | None = None
) -> list[Result]:
    """Every implementation, or the given steps, in turns."""
    problem, clock = Problem(case, device), Clock(device)
    made: list[tuple[Result, Step]] = []
    makers = implementations(problem) if steps is None else [(n, lambda s=s: s(problem)) for n, s in steps.items()]
    for name, make in makers:
        try:
            step = make()
            step()  # compile, allocate workspaces
            made.append((Result(name, case, extra_mib=clock.extra_mib(step, problem)), step))
        except ImportError as error:
            say(f"  {name}: skipped, {error}")
        except torch.OutOfMemoryError:
            say(f"  {name}: out of memory")
        except Exception as error:  # another project's failure must not end the run
            if name == "logitcache":
                raise
            say(f"  {name}: failed, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        problem.clear()
        if device == "cuda":
            torch.cuda.empty_cache()
    for turn in range(reps):
        for result, step in made[turn % len(made) :] + made[: turn % len(made)]:
            try:
                if sum(result.ms) < 30e3:  # a slow one gets fewer turns
                    result.ms.append(clock.time(step))
            except torch.OutOfMemoryError:
                say(f"  {result.impl}: out of memory")
            problem.clear()
    flop = 6 * case.N * case.V * case.H
    bare = [min(r.ms) for r, _ in made if r.impl == "matrix products"]
    rate = peak() if device == "cuda" else None
    floor_ms = flop / rate * 1e3 if rate else min(bare, default=None)
    for result, _ in made:
        result.floor_ms = floor_ms
    return [result for result, _ in made if result.ms]


def peak() -> float | None:
    return next((rate for name, rate in PEAK.items() if name in torch.cuda.get_device_name()), None)


def sweeps(reps: int) -> Iterator[list[Result]]:
    """Chunks, the dtype of dW, k, every divergence; and the row kernel alone by warps and vectors."""
    base = Case(8192, 4096, 128256)

    def ours(**more) -> Callable[[Problem], Step]:
        return lambda p: lambda: linear_sparse_divergence(p.hidden_NH, p.weight_VH, p.targets, **more).backward()

    yield run_case(base, "cuda", reps, {f"logitcache chunk={c}": ours(chunk_rows=c) for c in (512, 1024, 2048, 4096)})
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    yield run_case(base, "cuda", reps, {f"logitcache dW {n}": ours(accumulate=d) for n, d in dtypes.items()})
    tails = {f"logitcache {d}": ours(divergence=d) for d in DIVERGENCES}
    tails["logitcache support"] = ours(tail="support")
    tails["logitcache with cross-entropy"] = ours(ce_weight=0.1)
    yield run_case(base, "cuda", reps, tails)
    for k in (1, 8, 256):
        yield run_case(Case(8192, 4096, 128256, k), "cuda", reps, {"logitcache": ours()})
    from logitcache.kernels.sparse_divergence import sparse_divergence_

    for vocab in (128256, 151936):
        problem, clock = Problem(Case(2048, 64, vocab), "cuda"), Clock("cuda")
        logits_NV = torch.randn(2048, vocab, device="cuda", dtype=torch.bfloat16)
        results = []
        for warps in (8, 16, 32):
            for vectors in (1, 2, 4):
                result = Result(f"row kernel warps={warps} vectors={vectors}", problem.case)
                tile = {"most_k": 64, "num_warps": warps, "vectors": vectors}

                def step(tile=tile, problem=problem, logits_NV=logits_NV):
                    sparse_divergence_(logits_NV, problem.targets, Objective.of(), **tile)

                result.ms = [clock.time(step) for _ in range(reps + 3)][3:]
                result.floor_ms = 2 * logits_NV.nbytes / BANDWIDTH * 1e3
                results.append(result)
        yield results


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(results: list[Result]) -> None:
    case = results[0].case
    print(f"\n{case.divergence}  N={case.N} H={case.H} V={case.V} k={case.k} {case.dtype}")
    print(f"{'':34}{'ms median':>12}{'p20':>10}{'p80':>10}{'extra MiB':>12}{'of floor':>10}")
    for row in (r.row() for r in results):
        extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
        share = "" if row["floor_share"] is None else f"{row['floor_share']:.1%}"
        print(
            f"{row['impl']:34}{row['ms_median']:12.2f}{row['ms_p20']:10.2f}{row['ms_p80']:10.2f}{extra:>12}{share:>10}"
        )


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name.replace(' ', '-').lower()}-{torch.get_num_threads()}-cores"


def save(rows: list[dict], device: str) -> Path:
    path = ROOT / "benchmarks" / "results" / f"{machine(device)}.csv"
    path.parent.mkdir(exist_ok=True)
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = ""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    stamp = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), "commit": commit, "machine": machine(device)}
    stamp |= {"torch": torch.__version__, "triton": triton_version}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*stamp, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows({**stamp, **row} for row in rows)
    return path


def plot(source: Path, out: Path) -> None:
    """Bars of the newest run: time over the floor's, one group a case."""
    import matplotlib.pyplot as plt

    with source.open() as file:
        rows = list(csv.DictReader(file))
    rows = [r for r in rows if r["date"] == rows[-1]["date"] and "=" not in r["impl"]]
    cases = list(dict.fromkeys(f"N={r['N']}\nH={r['H']}\nV={r['V']}" for r in rows))
    names = list(dict.fromkeys(r["impl"] for r in rows))
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(cases), 4), layout="constrained")
    for number, name in enumerate(names):
        mine = [r for r in rows if r["impl"] == name]
        at = [cases.index(f"N={r['N']}\nH={r['H']}\nV={r['V']}") + 0.8 * (number / len(names) - 0.5) for r in mine]
        axes.bar(at, [float(r["ms_median"]) for r in mine], 0.8 / len(names), align="edge", label=name)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("forward + backward, ms")
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    axes.set_title(f"{rows[0]['machine']}, torch {rows[0]['torch']}", fontsize="medium")
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="an object a line, and nothing else on stdout")
    parser.add_argument("--reps", type=int, default=9, help="turns of every implementation")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no new case starts")
    parser.add_argument("--divergence", choices=DIVERGENCES, default="forward_kl")
    parser.add_argument("--case", type=int, nargs=3, action="append", metavar=("N", "H", "V"), help="these cases only")
    parser.add_argument("--no-save", action="store_true", help="append nothing to results/")
    parser.add_argument("--plot", type=Path, help="draw the newest saved run into this file instead of measuring")
    options = parser.parse_args()
    if options.plot:
        plot(ROOT / "benchmarks" / "results" / f"{machine(options.device)}.csv", options.plot)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu measures the same table small")
    started, rows = time.monotonic(), []

    def report(results: list[Result]) -> None:
        rows.extend(result.row() for result in results)
        if options.json:
            for result in results:
                print(json.dumps(result.row()), flush=True)
        else:
            show(results)

    if options.case:
        shapes = [tuple(case) for case in options.case]
    elif options.device == "cuda":
        shapes = [(n, h, v) for n in GPU_ROWS for h, v in GPU_SHAPES]
    else:
        shapes = CPU_CASES
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    work: list[Callable[[], Iterator[list[Result]]]] = [
        lambda s=s: iter([run_case(Case(*s, dtype=dtype, divergence=options.divergence), options.device, options.reps)])
        for s in shapes
    ]
    if options.device == "cuda" and not options.case:
        work.insert(len(GPU_SHAPES), lambda: sweeps(options.reps))  # after N = 8192, before the rest
    for number, some in enumerate(work):
        for results in some():
            report(results)
        if time.monotonic() - started > options.budget and number + 1 < len(work):
            say(f"stopped after {options.budget:.0f} s, {len(work) - number - 1} cases left out: raise --budget")
            break
    if rows and not options.no_save:
        say(f"appended to {save(rows, options.device)}")


if __name__ == "__main__":
    main()
