"""A plugin that runs inside vLLM's processes: ends them with the command, and adds pinned ids to rows."""

import importlib
import os
import signal
import sys
from contextlib import suppress
from typing import Any

PARENT = "LOGITCACHE_ENGINE_PARENT"


PINNED = "LOGITCACHE_PINNED"


def prepare_process() -> None:
    """The vLLM plugin, which runs in each of its processes. Does nothing unless our `Engine` started them."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if pinned := [int(i) for i in os.environ.get(PINNED, "").split(",") if i]:
        _pin(pinned)
    if os.getpid() != int(parent) and sys.platform.startswith("linux"):
        _end_with(int(parent))


def _end_with(parent: int) -> None:
    """Has the engine process killed when its parent dies; vLLM 0.32 would leave it running.

    vLLM ends the engine's workers itself.
    """
    if os.getppid() == parent:
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGKILL)


def _pin(pinned: list[int]) -> None:
    """Hooks the sampler's gather of a row's most likely ids, and overwrites the last of them with the pinned ids.

    Both of vLLM's model runners are hooked. A row that arrives without its pinned ids is refused.
    """
    P = len(pinned)
    kept: dict[Any, Any] = {}

    def ids_beside(tensor: Any, token_ids: Any) -> Any:
        """The pinned ids on a tensor's device, as int64 like the sampled ids; copied there once."""
        if tensor.device not in kept:
            kept[tensor.device] = tensor.new_tensor(pinned, dtype=token_ids.dtype)
        return kept[tensor.device]

    def overwrite(made: Any, logprobs_NP: Any, ids_P: Any) -> Any:
        made.logprob_token_ids[:, -P:] = ids_P
        made.logprobs[:, -P:] = logprobs_NP
        return made

    with suppress(ImportError, AttributeError):
        from vllm.v1.sample.sampler import Sampler

        gather = Sampler.gather_logprobs

        def gather_pinned(logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
            made = gather(logprobs, num_logprobs, token_ids)
            if num_logprobs <= P:
                return made
            ids_P = ids_beside(logprobs, token_ids)
            return overwrite(made, logprobs.index_select(-1, ids_P), ids_P)

        Sampler.gather_logprobs = staticmethod(gather_pinned)

    with suppress(ImportError, AttributeError):
        module: Any = importlib.import_module("vllm.v1.worker.gpu.sample.logprob")
        score = module.compute_topk_scores

        def score_pinned(logits: Any, num_logprobs: int, sampled_token_ids: Any, *args: Any, **kwargs: Any) -> Any:
            made = score(logits, num_logprobs, sampled_token_ids, *args, **kwargs)
            if num_logprobs <= P:
                return made
            ids_P = ids_beside(logits, sampled_token_ids)
            return overwrite(made, module.compute_token_logprobs(logits, ids_P.expand(len(logits), P)), ids_P)

        for name in ("logprob", "sampler", "prompt_logprob"):
            setattr(importlib.import_module(f"vllm.v1.worker.gpu.sample.{name}"), score.__name__, score_pinned)
