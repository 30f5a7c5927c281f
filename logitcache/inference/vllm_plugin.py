"""A plugin that runs inside vLLM's processes: ends them with the command, and adds pinned ids to rows.

Nothing here touches an engine that `Engine` did not start: the marker is in the environment only while one of ours starts,
and a process of ours holds no other engine.
"""

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

PARENT = "LOGITCACHE_ENGINE_PARENT"
PINNED = "LOGITCACHE_PINNED"
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
COPIED = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"  # to the processes of an engine on several machines

_until_the_end = ExitStack()  # hooks of a process that is an engine's


@contextmanager
def marked_environment(pinned: tuple[int, ...]) -> Iterator[None]:
    """Marks the processes that start during the block as those of our engine; the environment is then as before."""
    # spawn: a forked process would not load plugins again, such as `prepare_process`.
    ours = {PARENT: str(os.getpid()), PINNED: ",".join(map(str, pinned)), START_METHOD: "spawn"}
    ours[COPIED] = ",".join(filter(None, (os.environ.get(COPIED), "LOGITCACHE_")))
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def prepare_process() -> None:
    """The vLLM plugin, which runs in each of its processes. Does nothing unless our `Engine` started this one."""
    parent = os.environ.get(PARENT)
    if parent is None or os.getpid() == int(parent):  # the caller's process may hold other engines, see `pinning`
        return
    if pinned := [int(i) for i in os.environ.get(PINNED, "").split(",") if i]:
        _until_the_end.enter_context(pinning(pinned))
    if sys.platform.startswith("linux"):
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


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of a module or class during the block."""
    before = vars(owner)[name]  # a static method as such
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def pinning(pinned: list[int]) -> Iterator[None]:
    """Hooks the sampler's gather of a row's most likely ids, and overwrites the last of them with the pinned ids.

    Both of vLLM's model runners are hooked, during the block. A row that arrives without its pinned ids is refused.
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

    with ExitStack() as hooks:
        with suppress(ImportError, AttributeError):
            from vllm.v1.sample.sampler import Sampler

            gather = Sampler.gather_logprobs

            def gather_pinned(logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
                made = gather(logprobs, num_logprobs, token_ids)
                if num_logprobs <= P:
                    return made
                ids_P = ids_beside(logprobs, token_ids)
                return overwrite(made, logprobs.index_select(-1, ids_P), ids_P)

            hooks.enter_context(replaced(Sampler, "gather_logprobs", staticmethod(gather_pinned)))

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
                user = importlib.import_module(f"vllm.v1.worker.gpu.sample.{name}")
                hooks.enter_context(replaced(user, score.__name__, score_pinned))
        yield
