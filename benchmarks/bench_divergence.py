"""Times forward and backward of a student's head with a divergence: our kernel and alternatives, in one run.

    python benchmarks/bench_divergence.py                   the full table on the GPU, appended to results/<gpu>.csv
    python benchmarks/bench_divergence.py --device cpu      the same table, small
    python benchmarks/bench_divergence.py --json            one object per line
    python benchmarks/bench_divergence.py --plot out.png    the newest runs in results/<machine>.csv, with matplotlib
    python benchmarks/bench_divergence.py --table           the same as a table in Markdown

Needs torch, and triton on a GPU. Alternatives are measured if they are installed. One that is missing, fails or takes too
long is skipped and named. If one leaves the GPU unusable, a fresh process continues without it. All implementations of a case
take turns, so that a slow moment of the machine affects all of them; `of_torch` is the median of the quotients of the turns.
Extra memory is the peak beyond inputs and gradients: the allocator's on a GPU, the resident set's on Linux CPUs.
"""

import argparse
import gc
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "benchmarks"))  # some other package may own the name `benchmarks`

from divergence_report import plot, save, table  # noqa: E402

from logitcache.kernels import fused_linear  # noqa: E402
from logitcache.kernels.divergences import DIVERGENCES  # noqa: E402
from logitcache.kernels.fused_linear import linear_sparse_divergence  # noqa: E402
from logitcache.kernels.objective import Objective  # noqa: E402
from logitcache.kernels.targets import SparseTargets  # noqa: E402  # noqa: E402

# N supervised positions, H hidden, V vocabulary, K ids per row.

PEAK = {"H100": 790e12, "H200": 790e12}  # bf16 FLOP/s of large matrix products; elsewhere they are timed
BANDWIDTH = 3.0e12  # bytes/s an H100 streams
GPU_SHAPES = [(4096, 128256), (2048, 128256), (4096, 151936), (2304, 262144)]
GPU_CASES = [(8192, *s) for s in GPU_SHAPES] + [(n, *s) for s in GPU_SHAPES for n in (2048, 16384)]
CPU_CASES = [(512, 576, 49152), (2048, 576, 49152), (512, 2048, 49152), (2048, 2048, 49152), (512, 1024, 128256)]
PATIENCE = 60.0  # seconds for the first two steps of an implementation, which compile


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
    of_torch: float | None = None

    def row(self) -> dict:
        low, median, high = (
            (statistics.quantiles(self.ms, n=10, method="inclusive")[i] for i in (1, 4, 7))
            if len(self.ms) > 1
            else self.ms * 3
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
            "of_torch": None if self.of_torch is None else round(self.of_torch, 3),
        }


class Lost(Exception):
    """A CUDA error that this process cannot recover from; the argument is the implementation's name."""


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
    """The obvious implementation: log_softmax of full logits, the tail as 1 - sum. Tests compare ours with it."""
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
    """Each implementation's name, and a function that makes its step or raises ImportError if its package is missing."""
    p, divergence = problem, problem.case.divergence

    def ours() -> Step:
        return lambda: linear_sparse_divergence(p.hidden_NH, p.weight_VH, p.targets, divergence=divergence).backward()

    def torch_eager() -> Step:
        return lambda: naive(p.hidden_NH, p.weight_VH, p.targets, divergence).backward()

    def torch_compiled() -> Step:
        torch.compiler.reset()  # after 8 shapes of one function dynamo would fall back to eager
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
        # this loss needs a dense teacher, whose own matrix product is part of the step
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
    """The three matrix products and nothing else: in our chunks on a GPU, for all rows at once on a CPU."""
    hidden_NH, weight_VH = p.hidden_NH.detach(), p.weight_VH.detach()
    device = hidden_NH.device
    rows = (
        fused_linear.default_rows(p.case.N, p.case.V, p.case.H, hidden_NH.dtype, device)
        if hidden_NH.is_cuda
        else p.case.N
    )
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
        """Peak memory beyond what was allocated before the step, and beyond the gradients."""
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


def others(seconds: float = 0.5) -> float:
    """Share of the cores that other processes use while this one sleeps. Linux only."""

    def ticks() -> tuple[int, int]:
        counts = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(counts), counts[3] + counts[4]  # idle, and waiting for a disk

    (total, idle), _ = ticks(), time.sleep(seconds)
    later, idle_later = ticks()
    return 1 - (idle_later - idle) / max(later - total, 1)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    def late(*_):
        raise TimeoutError(f"no result after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def excuse(name: str, error: Exception, device: str) -> None:
    """Prints why an implementation is skipped. Raises: Lost if the GPU no longer responds."""
    text = str(error).strip().splitlines() or [""]
    short = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {text[0]}"
    say(f"  {name}: skipped, {short}")
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            raise Lost(name) from error


def run_case(
    case: Case,
    device: str,
    reps: int,
    steps: dict[str, Callable[[Problem], Step]] | None = None,
    skip: tuple[str, ...] = (),
    until: float = float("inf"),
    quiet: bool = False,
) -> list[Result]:
    """Runs every implementation, or the given steps, in turns; stops early at `until`, a time of `time.monotonic`."""
    problem, clock = Problem(case, device), Clock(device)
    made: list[tuple[Result, Step]] = []
    makers = implementations(problem) if steps is None else [(n, lambda s=s: s(problem)) for n, s in steps.items()]
    for name, make in makers:
        if name in skip or time.monotonic() > until:
            say(f"  {name}: skipped, {'as asked' if name in skip else 'out of time'}")
            continue
        try:
            with patience(min(PATIENCE, until - time.monotonic() + 30)):
                step = make()
                step()  # compile, allocate workspaces
                made.append((Result(name, case, extra_mib=clock.extra_mib(step, problem)), step))
        except Exception as error:  # a failure does not end the run
            excuse(name, error, device)
        problem.clear()
        if device == "cuda":
            torch.cuda.empty_cache()
    turn, slow = 0, float("inf")
    while turn < reps and made and (turn == 0 or time.monotonic() < until):
        for result, step in made[turn % len(made) :] + made[: turn % len(made)]:
            while quiet and time.monotonic() < until and others() > 0.1:
                pass
            if turn > 1 and result.ms[0] > slow:
                continue
            try:
                result.ms.append(clock.time(step))
            except Exception as error:
                excuse(result.impl, error, device)
                made = [(other, its) for other, its in made if other is not result]
            problem.clear()
        turn += 1
        slow = 4 * min((result.ms[0] for result, _ in made), default=0.0)  # a slower one gets two turns
    results = [result for result, _ in made]
    by_name = {result.impl: result for result in results}
    bare, base = by_name.get("matrix products"), by_name.get("torch")
    rate = peak() if device == "cuda" else None
    for result in results:
        result.floor_ms = 6 * case.N * case.V * case.H / rate * 1e3 if rate else min(bare.ms) if bare else None
        if base:
            result.of_torch = statistics.median(a / b for a, b in zip(result.ms, base.ms, strict=False))
    return results


def peak() -> float | None:
    return next((rate for name, rate in PEAK.items() if name in torch.cuda.get_device_name()), None)


def sweeps(reps: int, until: float) -> Iterator[list[Result]]:
    """Varies chunks, the dtype of dW, k and the divergence; and warps and vectors of the row kernel alone."""
    base = Case(8192, 4096, 128256)

    def ours(**more) -> Callable[[Problem], Step]:
        return lambda p: lambda: linear_sparse_divergence(p.hidden_NH, p.weight_VH, p.targets, **more).backward()

    tables = [(base, {f"logitcache chunk={c}": ours(chunk_rows=c) for c in (512, 1024, 2048, 4096)})]
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    tables.append((base, {f"logitcache dW={name}": ours(accumulate=dtype) for name, dtype in dtypes.items()}))
    kinds = {f"logitcache divergence={d}": ours(divergence=d) for d in DIVERGENCES}
    kinds |= {"logitcache tail=support": ours(tail="support"), "logitcache ce=0.1": ours(ce_weight=0.1)}
    tables.append((base, kinds))
    tables += [(replace(base, k=k), {f"logitcache k={k}": ours()}) for k in (1, 8, 64, 256)]
    for case, steps in tables:
        yield run_case(case, "cuda", reps, steps, until=until)
    from logitcache.kernels.triton_rows import sparse_divergence_

    for vocab in (128256, 151936) if time.monotonic() < until else ():
        problem, clock = Problem(Case(2048, 64, vocab), "cuda"), Clock("cuda")
        logits_NV = torch.randn(2048, vocab, device="cuda", dtype=torch.bfloat16)
        results = []
        for warps in (8, 16, 32):
            for vectors in (1, 2, 4):
                result = Result(f"row kernel warps={warps} vectors={vectors}", problem.case)
                tile = {"most_k": 64, "num_warps": warps, "vectors": vectors}

                def step(tile=tile, problem=problem, logits_NV=logits_NV):
                    sparse_divergence_(logits_NV, problem.targets, Objective.of(), **tile)

                try:
                    result.ms = [clock.time(step) for _ in range(reps + 3)][3:]
                except Exception as error:
                    excuse(result.impl, error, "cuda")
                    continue
                result.floor_ms = 2 * logits_NV.nbytes / BANDWIDTH * 1e3
                results.append(result)
        yield results


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(results: list[Result]) -> None:
    case = results[0].case
    print(f"\n{case.divergence}  N={case.N} H={case.H} V={case.V} k={case.k} {case.dtype}")
    heads = f"{'ms median':>12}{'p20':>10}{'p80':>10}{'of torch':>10}{'extra MiB':>12}{'of floor':>10}"
    print(f"{'':34}{heads}")
    for row in (r.row() for r in results):
        ratio, extra, share = (
            "" if row[name] is None else f"{row[name]:{spec}}"
            for name, spec in (("of_torch", ".2f"), ("extra_mib", ".0f"), ("floor_share", ".1%"))
        )
        times = f"{row['ms_median']:12.2f}{row['ms_p20']:10.2f}{row['ms_p80']:10.2f}"
        print(f"{row['impl']:34}{times}{ratio:>10}{extra:>12}{share:>10}", flush=True)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name.replace(' ', '-').lower()}-{torch.get_num_threads()}-cores"


def stamp(device: str, date: str) -> dict[str, str]:
    """What a figure depends on besides its case: date, commit, machine and versions."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = ""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    stamps = {"date": date, "commit": commit, "machine": machine(device)}
    return stamps | {"torch": torch.__version__, "triton": triton_version}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line, and nothing else")
    parser.add_argument("--reps", type=int, default=9, help="turns per implementation")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no new case starts")
    parser.add_argument("--divergence", choices=DIVERGENCES, default="forward_kl")
    parser.add_argument(
        "--case", type=int, nargs=3, action="append", metavar=("N", "H", "V"), help="only this case; repeatable"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="skip an implementation; repeatable"
    )
    parser.add_argument("--quiet", action="store_true", help="start a step only while others use < 10%% of the cores")
    parser.add_argument("--csv", type=Path, help="use this file instead of results/<machine>.csv")
    parser.add_argument("--no-save", action="store_true", help="save nothing")
    parser.add_argument("--plot", type=Path, help="plot the newest saved runs into this file instead of measuring")
    parser.add_argument("--table", action="store_true", help="print the newest saved runs in Markdown")
    parser.add_argument("--resume", nargs=2, metavar=("DATE", "DONE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = options.csv or ROOT / "benchmarks" / "results" / f"{machine(options.device)}.csv"
    if options.plot or options.table:
        if options.plot:
            plot(path, options.plot)
        print(table(path) if options.table else f"drew the newest runs of {path}")
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu measures the same table small")
    if options.case:
        shapes = [tuple(case) for case in options.case]
    elif options.device == "cuda":
        shapes = GPU_CASES
    else:
        shapes = CPU_CASES
    until, skip = time.monotonic() + options.budget, tuple(options.skip)
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    cases = [Case(*shape, dtype=dtype, divergence=options.divergence) for shape in shapes]
    work: list[Callable[[], Iterator[list[Result]]]] = [
        lambda c=c: iter([run_case(c, options.device, options.reps, None, skip, until, options.quiet)]) for c in cases
    ]
    if options.device == "cuda" and not options.case:
        work.insert(len(GPU_SHAPES), lambda: sweeps(options.reps, until))  # after N = 8192, before the rest
    date, done = options.resume or (datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), 0)
    stamps, ours = stamp(options.device, date), True
    for number in range(int(done), len(work)):
        if time.monotonic() > until:
            say(f"stopped after {options.budget:.0f} s, {len(work) - number} cases left out: raise --budget")
            break
        try:
            for results in work[number]():
                ours &= any(result.impl.startswith(("logitcache", "row kernel")) for result in results)
                if not results:
                    continue
                rows = [result.row() for result in results]
                if options.json:
                    print(*map(json.dumps, rows), sep="\n", flush=True)
                else:
                    show(results)
                if not options.no_save:  # at once, so that a later failure cannot lose it
                    save(path, [stamps | row for row in rows])
        except Lost as lost:
            name, left = str(lost), until - time.monotonic()
            if name.startswith(("logitcache", "row kernel")):
                raise
            say(f"  {name} left the GPU unusable: a fresh process continues without it")
            again = ["--skip", name, "--budget", f"{left:.0f}", "--resume", date, str(number)]
            os.execv(sys.executable, [sys.executable, *sys.argv, *again])
    if not options.no_save:
        say(f"appended to {path}")
    if not ours and "logitcache" not in options.skip:
        raise SystemExit("logitcache itself failed in some case: see above")


if __name__ == "__main__":
    main()
