"""Measures what storing the teacher's distributions costs during generation: tokens per second, and memory of long traces.

    python -m benchmarks.bench_generate             # plain vLLM and k = 16, 64, 256, in three rounds; 20 minutes
    python -m benchmarks.bench_generate --quick     # k = 64 only, small, one round: a smoke test
    python -m benchmarks.bench_generate --memory    # rows of 64 traces of 32,768 tokens in flight; --traces 256 for all

Speed. The same prompts go through `vllm.LLM.generate` without log-probabilities and through `logitcache.generate`, with
the same engine settings and sampling, and ignore the end of sequence, so that all generate equally many tokens. Variants take
turns, each in a process of its own, and the order rotates every round. Times exclude loading and a short warm-up, since vLLM
compiles the kernel that counts ranks on first use. Seconds are those that `generate` reports; "to the last shard" lasts until
all shards are published, including the imports for that. Processor time is reported separately for the front end (for
`logitcache`: requests, rows, encoding and shards) and the engine. The goal: at k = 64, >= 0.95 times the tokens per second of
plain vLLM.

Memory. A synthetic stream, one row of each trace in turn, passes through vLLM's own front end into the containers of
`logitcache`, and into those of vLLM. Bytes per entry are the growth of the process, including overhead and preallocated space of
the containers. Then all traces end, one after another or in one step (--together), and are encoded. The goal: <= 12 bytes
per entry in flight.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.bench_cache import memory_mb, timed
from benchmarks.embedded import embedded_teacher

TEACHER = Path(__file__).parents[1] / "demo" / "teacher"
PLAIN = "plain vLLM"
GOAL = 0.95  # of plain vLLM's tokens per second, at k = 64
Case = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """The work that every variant does."""

    teacher: str
    source: str = "gym:gsm_symbolic?size=128&seed=1"
    max_tokens: int = 256
    engine_args: dict[str, Any] = field(
        default_factory=lambda: {
            "max_model_len": 2048,
            "max_num_seqs": 64,
            "kv_cache_memory_bytes": 1 << 30,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
        }
    )

    @property
    def warm_up(self) -> list[list[int]]:
        """Token ids of as many prompts as the engine runs at once; none is a prefix of a real one."""
        return [[*range(100 + i, 132 + i)] for i in range(self.engine_args["max_num_seqs"])]


def run_plain(load: Load) -> Case:
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    import vllm

    from logitcache import prompts
    from logitcache.inference import model
    from logitcache.inference.rendering import render

    spec = model.ModelSpec(model=load.teacher)
    facts = model.inspect_model(spec)
    asked: Any = [{"prompt_token_ids": render(facts, p, {})} for p in prompts.load(load.source)]
    llm = vllm.LLM(load.teacher, dtype=facts.dtype, seed=0, **load.engine_args)  # type: ignore[arg-type]
    params = vllm.SamplingParams(temperature=1.0, max_tokens=load.max_tokens, ignore_eos=True)
    few = vllm.SamplingParams(temperature=1.0, max_tokens=4, ignore_eos=True)
    warm_up: Any = [{"prompt_token_ids": ids} for ids in load.warm_up]
    llm.generate(warm_up, few, use_tqdm=False)
    before = processor_s()
    outputs, seconds = timed(lambda: llm.generate(asked, params, use_tqdm=False))
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    return {"tokens": tokens, "seconds": seconds, "published_s": seconds} | since(before)


def run_ours(load: Load, k: int) -> Case:
    from logitcache.capture.generate import GenerateOptions, generate
    from logitcache.inference import session
    from logitcache.inference.engine import Engine

    class WarmEngine(Engine):
        """An engine that is warmed up before its first request; `fill` counts that as loading."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            params, few = self._params, self._params.clone()
            few.max_tokens = 4
            self._params = few
            for i, ids in enumerate(load.warm_up):
                self.submit(f"warm-up {i}", ids)
            left = len(load.warm_up)
            while left:
                left -= len(self.step())
            self._params = params
            self.before, self.began = processor_s(), time.perf_counter()

        def close(self) -> None:  # when the last shard is published
            spent.update(since(self.before), published_s=time.perf_counter() - self.began)
            super().close()

    spent: Case = {}
    session.Engine = WarmEngine
    sampling = {"ignore_eos": True}
    given = {"top_k": k, "max_tokens": load.max_tokens, "sampling": sampling, "engine_args": load.engine_args}
    with tempfile.TemporaryDirectory() as out:
        summary = generate(GenerateOptions(prompts=load.source, teacher=load.teacher, out=Path(out) / "cache", **given))
    return {"tokens": summary.tokens, "seconds": summary.seconds} | spent


def processor_s() -> tuple[float, float]:
    """Processor seconds of this process and its children."""
    import psutil

    here = psutil.Process()
    times = [[p.cpu_times() for p in found] for found in ([here], here.children(recursive=True))]
    front_end, engine = (sum(t.user + t.system for t in found) for found in times)
    return front_end, engine


def since(before: tuple[float, float]) -> Case:
    return dict(zip(("front_end_s", "engine_s"), np.subtract(processor_s(), before).tolist(), strict=True))


def in_a_fresh_process(arguments: Sequence[str]) -> Case:
    """Makes one measurement in a new process of this script. The result comes back in a file, since engines print to stdout."""
    with tempfile.TemporaryDirectory() as directory:
        result, log = Path(directory) / "result.json", Path(directory) / "log"
        command = [sys.executable, "-m", "benchmarks.bench_generate", *arguments, "--result", str(result)]
        # The front end is idle while the CPU engine computes, so the engine may use every core.
        environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **os.environ}
        with log.open("w") as chatter:
            code = subprocess.run(command, stdout=chatter, stderr=chatter, env=environment).returncode
        if code:
            sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-4000:]}")
        return json.loads(result.read_text())


def speed_cases(load: Load, ks: Sequence[int], rounds: int) -> Iterator[Case]:
    variants = [PLAIN, *map(str, ks)]
    found: dict[str, list[Case]] = {variant: [] for variant in variants}
    for i in range(rounds):
        for variant in variants[i % len(variants) :] + variants[: i % len(variants)]:
            done = in_a_fresh_process(["--variant", variant, "--load", json.dumps(asdict(load))])
            found[variant].append(done)
            print(
                f"round {i + 1}, {variant}: {done['tokens'] / done['seconds']:,.1f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    tokens = {done["tokens"] for variant in variants for done in found[variant]}
    assert len(tokens) == 1, f"variants made {tokens} tokens"
    (count,) = tokens
    for variant in variants:
        speeds = [count / done["seconds"] for done in found[variant]]
        ratios, published = (
            [plain[name] / done[name] for done, plain in zip(found[variant], found[PLAIN], strict=True)]
            for name in ("seconds", "published_s")
        )
        yield {
            "case": variant if variant == PLAIN else f"logitcache k={variant}",
            "k": None if variant == PLAIN else int(variant),
            "tokens": count,
            "tokens_per_s": float(np.median(speeds)),
            "tokens_per_s_rounds": speeds,
            "of_plain": float(np.median(ratios)),
            "of_plain_rounds": ratios,
            "published_of_plain": float(np.median(published)),
            "front_end_us_a_token": 1e6 / count * float(np.median([done["front_end_s"] for done in found[variant]])),
            "engine_us_a_token": 1e6 / count * float(np.median([done["engine_s"] for done in found[variant]])),
        }


def measure_memory(kind: str, traces: int, tokens: int, k: int, together: bool, folder: Path) -> Case:
    """Memory of the rows of `traces` traces in flight at once, which are then encoded.

    Args:
        kind: "logitcache" or "vLLM", whose rows the front end fills.
        together: all traces end in one step, and wait in one list for encoding.
    """
    from vllm.v1.outputs import LogprobsLists

    from logitcache.cache.shard import EncodedTrace
    from logitcache.capture import generate
    from logitcache.capture.job import Request, identify
    from logitcache.capture.traces import trace_of
    from logitcache.inference import engine, model
    from logitcache.inference.engine import Completion
    from logitcache.prompts import Prompt

    front_end: Any = importlib.import_module("vllm.v1.engine.logprobs")
    options = generate.GenerateOptions(prompts="", out=Path(), teacher=str(folder), top_k=k, pin_tokens="none")
    facts = model.inspect_model(options.spec)
    identity = identify(options, facts, {})
    ids_PK, logprobs_PK, ranks_P = synthetic_rows(facts.vocab_size, k)
    ranges = [slice(i, i + 1) for i in range(len(ranks_P))]
    rows = [LogprobsLists(ids_PK[at], logprobs_PK[at], ranks_P[at]) for at in ranges]  # as an engine sends them

    with engine.typed_rows_made() if kind == "logitcache" else nullcontext():
        processors = [
            front_end.LogprobsProcessor(None, front_end.create_sample_logprobs(True), None, 0.0, k, None)
            for _ in range(traces)
        ]

    def stream() -> None:
        for step in range(tokens):
            for i, processor in enumerate(processors):
                processor._update_sample_logprobs(rows[(7 * step + i) % len(rows)])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory would be reused without growth of the process
    before = memory_mb()
    _, seconds = timed(stream)
    held = memory_mb() - before

    def output(i: int) -> SimpleNamespace:
        answer = ids_PK[(7 * np.arange(tokens) + i) % len(rows), 0].tolist()
        sample = SimpleNamespace(token_ids=answer, logprobs=processors[i].logprobs, finish_reason="length")
        processors[i].logprobs = None
        return SimpleNamespace(
            request_id=str(i), prompt_token_ids=[1], prompt_logprobs=None, outputs=[sample], finished=True
        )

    steps = iter([[*range(traces)]] if together else [[i] for i in range(traces)])  # which traces end in it
    ours = engine.Engine.__new__(engine.Engine)
    ours._rows = engine.Rows(k)
    ours._engine = SimpleNamespace(step=lambda: [output(i) for i in next(steps)])  # type: ignore[assignment]

    def encode(completion: Completion) -> int:
        prompt = Prompt(completion.key, "")
        request = Request(completion.key, prompt.id, 0, prompt)
        trace = trace_of(request, prompt, completion, identity, facts, None)
        return EncodedTrace.of(trace, identity).row_count

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    ends = 1 if together else traces
    encoded, encode_s = timed(lambda: sum(encode(c) for _ in range(ends) for c in ours.step()))
    assert encoded == traces * tokens
    return {
        "entries": traces * tokens * (k + 1),
        "held_mb": held,
        "bytes_per_entry": 1e6 * held / (traces * tokens * (k + 1)),
        "peak_mb": memory_mb("VmHWM") - before,
        "rows_per_s": traces * tokens / seconds,
        "encode_tokens_per_s": encoded / encode_s,
    }


def synthetic_rows(vocab_size: int, k: int, count: int = 256) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows as the engine returns them: ids int32 and logprobs float32 [count, 1 + k], sampled token first; and its rank."""
    rng = np.random.default_rng(0)
    logits_PV = rng.normal(0, 2, (count, vocab_size)).astype(np.float32) - 1.5 * np.log(np.arange(1, vocab_size + 1))
    order_PK = np.argsort(-logits_PV, axis=1)[:, :k]
    logprobs_PV = logits_PV - np.log(np.exp(logits_PV).sum(axis=1, keepdims=True))
    ids_PK = np.concatenate([order_PK[:, :1], order_PK], axis=1)
    logprobs_PK = np.take_along_axis(logprobs_PV, ids_PK, axis=1)
    return ids_PK.astype(np.int32), logprobs_PK.astype(np.float32), np.ones(count, np.int64)


def memory_cases(folder: Path, traces: int, tokens: int, k: int, together: bool) -> Iterator[Case]:
    # vLLM's rows take ten times as much memory, so the traces are shorter.
    for kind, length in (("logitcache", tokens), ("vLLM", max(1, tokens // 16))):
        case = {"case": f"rows of {kind}", "kind": kind, "traces": traces, "tokens": length, "k": k}
        case |= {"together": together, "folder": str(folder)}
        arguments = ["--memory-of", json.dumps({n: v for n, v in case.items() if n != "case"})]
        yield {n: v for n, v in case.items() if n not in ("kind", "folder")} | in_a_fresh_process(arguments)


def line(case: Case) -> str:
    if "of_plain" in case:
        spread = f"{min(case['tokens_per_s_rounds']):,.0f} - {max(case['tokens_per_s_rounds']):,.0f}"
        ratios = f"{min(case['of_plain_rounds']):.3f} - {max(case['of_plain_rounds']):.3f}"
        return (
            f"{case['case']:<18} {case['tokens_per_s']:>8,.1f} tokens/s ({spread})  "
            f"{case['of_plain']:.3f} of plain ({ratios}), "
            f"{case['published_of_plain']:.3f} to the last shard; processors: front end {case['front_end_us_a_token']:,.0f} us a "
            f"token, engine {case['engine_us_a_token']:,.0f}"
        )
    ended = "in one step" if case["together"] else "one by one"
    return (
        f"{case['case']:<18} {case['traces']} traces x {case['tokens']:,} tokens, k={case['k']}: {case['held_mb']:,.0f} MB "
        f"in flight, {case['bytes_per_entry']:.2f} bytes an entry; encoded {ended}, peak {case['peak_mb']:,.0f} MB; "
        f"in {case['rows_per_s']:,.0f} rows/s, out {case['encode_tokens_per_s']:,.0f} tokens/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a model folder; default: the demo's, made if missing")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="memory of long traces, no engine")
    parser.add_argument("--traces", type=int, default=64, help="traces in flight, with --memory")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens per trace, with --memory")
    parser.add_argument("--together", action="store_true", help="all traces end in one step, with --memory")
    parser.add_argument("--quick", action="store_true", help="k = 64, 16 prompts, 16 tokens, one round; 4,096 tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    for hidden in ("--variant", "--load", "--memory-of", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        if args.memory_of:
            given = json.loads(args.memory_of)
            found = measure_memory(**given | {"folder": Path(given["folder"])})
        else:
            load = Load(**json.loads(args.load))
            found = run_plain(load) if args.variant == PLAIN else run_ours(load, int(args.variant))
        Path(args.result).write_text(json.dumps(found))
        return
    folder = args.teacher or embedded_teacher(TEACHER)
    if args.quick:
        args.prompts, args.max_tokens, args.k, args.rounds, args.traces, args.tokens = 16, 16, [64], 1, 16, 4096
    if args.memory:
        found = memory_cases(folder, args.traces, args.tokens, 64, args.together)
    else:
        load = Load(str(folder), f"gym:gsm_symbolic?size={args.prompts}&seed=1", args.max_tokens)
        found = speed_cases(load, args.k, args.rounds)
    for case in found:
        print(json.dumps(case) if args.json else line(case), flush=True)


if __name__ == "__main__":
    main()
