"""A vLLM engine: requests in, completions with their top-k rows out."""

import importlib
import itertools
import os
import re
import threading
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.errors import EngineError, InputError, first_line
from logitcache.inference.model import ModelSpec, Sampling, engine_version
from logitcache.inference.sampling import refuse_unknown, typed
from logitcache.inference.vllm_plugin import marked_environment, pinning, replaced
from logitcache.runtime.secrets import hide

# R rows of a completion, K most likely ids, P pinned ids, L tokens.


@dataclass(frozen=True, slots=True)
class Rows:
    """Which log-probabilities to ask the engine for."""

    top_k: int
    prompt: bool = False  # rows of the prompt's tokens too
    pinned: tuple[int, ...] = ()  # ids whose log-probabilities are returned with every row
    scored: bool = False  # rows of the submitted tokens, without a completion

    @property
    def width(self) -> int:
        """Entries that vLLM returns per row; the hook in its sampler overwrites the last ones with pinned ids."""
        return self.top_k + 2 * len(self.pinned)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. It has R rows: of the completion's tokens, of all tokens but the first, or none if not asked for."""

    key: str
    token_ids: np.ndarray  # int32 [L], prompt and completion
    prompt_length: int
    ids_RK: np.ndarray  # int32 [R, K]; K is top_k, and two more for each pinned id
    logprobs_RK: np.ndarray  # float32 [R, K], nats, before temperature, penalties and filters
    pinned_RP: np.ndarray  # float32 [R, P], log-probabilities of the pinned ids, in their order
    token_logprob: np.ndarray  # float32 [R], of the sampled token
    token_rank: np.ndarray  # int32 [R]
    finish_reason: str

    @property
    def made(self) -> int:
        """Number of tokens of the completion."""
        return len(self.token_ids) - self.prompt_length

    def split_at(self, prompt_length: int, first: int) -> "Completion":
        """The same tokens as a prompt of ``prompt_length`` tokens and its completion, with rows from token ``first`` on."""
        skip = first - (len(self.token_ids) - len(self.token_rank))
        rows = {name: getattr(self, name)[skip:] for name in _ROWS}
        return replace(self, prompt_length=prompt_length, **rows)


_ROWS = ("ids_RK", "logprobs_RK", "pinned_RP", "token_logprob", "token_rank")


class Engine:
    """A vLLM engine: ``submit`` takes requests under a key, ``step`` returns the completions that finished."""

    _hooks: Callable[[], AbstractContextManager[None]] = nullcontext  # what a step in this process needs

    def __init__(self, spec: ModelSpec, sampling: Sampling, seed: int, rows: Rows | None = None) -> None:
        """Loads the model: minutes for a large one.

        Args:
            sampling: how completions are sampled; its seed is not used.
            seed: of the engine's sampler.
            rows: None asks for no log-probabilities.
        Raises: InputError for an option that vLLM does not know or refuses, EngineError if it cannot start.
        """
        pinned = rows.pinned if rows else ()
        with marked_environment(pinned):
            self._start(spec, sampling, seed, rows)
        in_process = not hasattr(self._engine.engine_core, "outputs_queue")
        if in_process and pinned:
            self._hooks = partial(pinning, list(pinned))
        self._killed = False
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._wake_on_death, daemon=True)
        self._watch.start()
        self.max_model_len: int = self._engine.vllm_config.model_config.max_model_len
        self.max_num_seqs: int = self._engine.vllm_config.scheduler_config.max_num_seqs

    def _start(self, spec: ModelSpec, sampling: Sampling, seed: int, rows: Rows | None) -> None:
        import vllm

        self._typed_rows = _typed_rows_work()
        self._rows = rows
        refuse_unknown("engine_args", spec.engine_args, set(vllm.EngineArgs.__dataclass_fields__))
        try:
            self._params = _sampling_params(sampling, rows)
            engine_args = vllm.EngineArgs(**_engine_args(spec, seed, rows))
        except (ValueError, TypeError) as e:
            raise InputError(hide(f"vLLM refuses these settings: {first_line(e)}")) from e
        try:
            self._engine = vllm.LLMEngine.from_engine_args(engine_args)
        except Exception as e:
            reason = "" if "root cause above" in str(e) else f": {first_line(e)}"
            raise EngineError(hide(f"vLLM cannot start{reason}")) from e

    def submit(self, key: str, prompt_ids: list[int], max_tokens: int | None = None) -> None:
        """Queues one request. Requests with the same prompt get different samples, since the sampler's state advances.

        Args:
            max_tokens: limit for this completion and later ones; None keeps the current limit.
        Raises: InputError if vLLM refuses it, EngineError if the engine died.
        """
        if max_tokens not in (None, self._params.max_tokens):
            self._params = self._params.clone()
            self._params.max_tokens = max_tokens
        try:
            with typed_rows_made() if self._typed_rows else nullcontext():
                self._engine.add_request(key, {"prompt_token_ids": prompt_ids}, self._params)
        except ValueError as e:
            raise InputError(hide(f"vLLM refuses a request: {first_line(e)}")) from e
        except Exception as e:
            raise self._died(e) from e

    def step(self) -> list[Completion]:
        """Runs one step of the engine. Returns: the completions that finished in it.

        Raises: EngineError if the engine died.
        """
        try:
            with self._hooks():
                finished: list[Any] = [output for output in self._engine.step() if output.finished]
        except Exception as e:
            raise self._died(e) from e
        # When it is told to stop, the engine returns unfinished completions as if they were finished.
        if broken := [o for o in finished if o.outputs[0].finish_reason not in ("stop", "length", "repetition")]:
            raise EngineError(f"vLLM gave up its requests: {broken[0].outputs[0].finish_reason}")
        finished.reverse()  # each is freed once converted, since many long ones may end in one step
        return [_completion(finished.pop(), self._rows) for _ in range(len(finished))]

    def close(self) -> None:
        """Ends the engine's processes."""
        import psutil  # vLLM's own

        self._closing.set()
        self._watch.join()
        client: Any = self._engine.engine_core
        try:
            client.shutdown()
        except psutil.NoSuchProcess:  # vLLM 0.32 raises if a process ends by itself at this moment
            client.resources()  # the cleanup that vLLM then skipped

    def _died(self, error: Exception) -> EngineError:
        killed = "its process was killed, perhaps for want of memory"
        return EngineError(hide(f"vLLM died: {killed if self._killed else first_line(error)}"))

    def _wake_on_death(self) -> None:
        """Wakes ``step`` when the engine process is killed, for example by the kernel for lack of memory.

        vLLM 0.32 notices the death, but lets a caller of ``step`` wait forever."""
        client: Any = self._engine.engine_core
        if not hasattr(client, "outputs_queue"):
            return  # the engine runs in this process
        while not client.resources.engine_dead:
            if self._closing.wait(1):
                return
        self._killed = client.outputs_queue.empty()  # an engine that failed with an error has reported it there
        client.outputs_queue.put(RuntimeError("the engine is dead"))


def _engine_args(spec: ModelSpec, seed: int, rows: Rows | None) -> dict[str, Any]:
    from vllm.platforms import current_platform

    prompt_rows = rows is not None and (rows.prompt or rows.scored)
    args = {
        "disable_log_stats": True,
        "enable_prefix_caching": not prompt_rows,
        **spec.engine_args,
        "model": spec.model,
        "revision": spec.revision,
        "dtype": spec.dtype,
        "seed": seed,
        "tensor_parallel_size": spec.tensor_parallel_size,
    }
    if rows:
        args |= {"max_logprobs": rows.width, "logprobs_mode": "raw_logprobs"}
    if prompt_rows:
        # When it scores a prompt, vLLM allocates [tokens, vocabulary] in float32 outside its memory profile.
        args.setdefault("max_num_batched_tokens", 2048)
    if current_platform.is_cpu():
        args.setdefault("kv_cache_memory_bytes", min(2 << 30, _available_memory() // 4))
    return args


def _sampling_params(sampling: Sampling, rows: Rows | None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    drawn: dict[str, Any] = {
        **typed("sampling", sampling.sampling, SamplingParams),
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
    }
    scored = rows is not None and rows.scored
    return SamplingParams(
        **({"temperature": 0.0, "max_tokens": 1} if scored else drawn),
        logprobs=rows.width if rows and not scored else None,
        prompt_logprobs=rows.width if rows and (scored or rows.prompt) else None,
        flat_logprobs=True,
        detokenize=bool(sampling.sampling.get("stop")),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any, asked: Rows | None) -> Completion:
    sample, pinned = output.outputs[0], list(asked.pinned) if asked else []
    parts = [p for p in (output.prompt_logprobs, sample.logprobs) if p is not None and len(p.token_ids)]
    if asked and not parts:
        raise EngineError(f"{engine_version()} returned a completion without log-probabilities")
    if asked:
        ids, logprobs, rank = (np.concatenate(c) for c in zip(*(_rows(part) for part in parts), strict=True))
    else:
        ids, logprobs, rank = np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32), np.zeros(0, np.int32)
    top = slice(1, ids.shape[1] - len(pinned))
    if (ids[:, top.stop :] != pinned).any():
        raise EngineError(f"{engine_version()} did not return the rows of the pinned ids; set `pin_tokens` to none")
    scored = asked is not None and asked.scored
    return Completion(
        key=output.request_id,
        token_ids=np.array([*output.prompt_token_ids, *([] if scored else sample.token_ids)], np.int32),
        prompt_length=len(output.prompt_token_ids),
        ids_RK=ids[:, top],
        logprobs_RK=logprobs[:, top],
        pinned_RP=logprobs[:, top.stop :],
        token_logprob=np.ascontiguousarray(logprobs[:, 0]),
        token_rank=rank,
        finish_reason=sample.finish_reason or "unknown",
    )


def _rows(flat: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int32 [R, 1 + K] and log-probabilities float32 [R, 1 + K], the sampled token first, and its rank int32 [R]."""
    counts = np.asarray(flat.end_indices, np.int64) - np.asarray(flat.start_indices, np.int64)
    scored = counts > 0  # a prompt's first token has no row
    width = int(counts.max(initial=0))
    assert (counts[scored] == width).all(), "vLLM gave rows of different widths"
    shape = (int(scored.sum()), width)
    ranks = flat.first_ranks if isinstance(flat, _typed_rows()) else flat.ranks[::width]
    return (
        np.asarray(flat.token_ids, np.int32).reshape(shape),
        np.asarray(flat.logprobs, np.float32).reshape(shape),
        np.asarray(ranks, np.int32),
    )


@cache
def _typed_rows() -> type:
    """vLLM's flat log-probabilities in typed arrays: 8 bytes per entry; Python objects need about 84."""
    from vllm.logprobs import FlatLogprobs

    class TypedRows(FlatLogprobs):
        def __init__(self) -> None:
            super().__init__(array("q"), array("q"), array("i"), array("f"))  # type: ignore[arg-type]
            self.first_ranks = array("i")

        def append_fast(self, token_ids, logprobs, ranks, decoded_tokens) -> None:
            self.start_indices.append(len(self.logprobs))
            self.token_ids.fromlist(token_ids)  # type: ignore[attr-defined] # 6 us per row at k = 64; extend takes 9
            self.logprobs.fromlist(logprobs)  # type: ignore[attr-defined]
            self.first_ranks.append(next(iter(ranks)))
            self.end_indices.append(len(self.logprobs))

    return TypedRows


@contextmanager
def typed_rows_made() -> Iterator[None]:
    """During the block, vLLM's front end makes typed containers for the rows of new requests: the smallest possible hook."""
    typed: Any = _typed_rows()
    module = importlib.import_module("vllm.v1.engine.logprobs")

    def sample_rows(flat_logprobs: bool) -> Any:
        return typed() if flat_logprobs else []

    def prompt_rows(flat_logprobs: bool) -> Any:
        rows = sample_rows(flat_logprobs)
        rows.append(None)
        return rows

    with (
        replaced(module, "create_sample_logprobs", sample_rows),
        replaced(module, "create_prompt_logprobs", prompt_rows),
    ):
        yield


@cache
def _typed_rows_work() -> bool:
    """Whether the installed vLLM fills typed containers; warns if it does not."""
    try:
        module: Any = importlib.import_module("vllm.v1.engine.logprobs")
        trial = _typed_rows()()
        trial.append(None)
        module.append_logprobs_for_next_position(trial, [7, 7, 9], [-0.5, -0.5, -1.5], itertools.repeat(None), 1, 2)
        ids, _, rank = _rows(trial)
        assert ids.tolist() == [[7, 7, 9]]
        assert rank.tolist() == [1]
        with typed_rows_made():
            return True
    except (ImportError, AttributeError, KeyError, TypeError, AssertionError) as e:
        warnings.warn(
            f"{engine_version()} keeps its log-probabilities in another way ({e!r}): "
            "rows take about ten times the memory while in flight",
            stacklevel=2,
        )
        return False


def cause_in(log: Path) -> str | None:
    """The first exception in an engine's log, on one line: the cause of those that follow."""
    report = re.compile(r" ERROR .*\] ((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)")
    with log.open(errors="replace") as lines:
        return next((m.group(1).strip()[:500] for line in lines if (m := report.search(line))), None)


def _available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
