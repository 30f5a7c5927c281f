"""The identity of a cache: the settings that its distributions depend on, their hashes, and how two identities differ."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from logitcache.sections import Markers

# Its ids show differences in normalisation, splitting and merges that the vocabulary does not show.
PROBE = "The 3 cats' naïve  idea:\n\tf(x)=x**2 — 12,345.67 «été» 数学 🙂 <think>don't</think>\r\n\n\n  end"


# Sampling parameters that do not change the distribution at temperature 1, and neutral values of those that can.
_HARMLESS = {"max_tokens", "seed", "n", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"}


_NEUTRAL = {"temperature": (1,), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "min_tokens": (0,)}


_NEUTRAL |= {"presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,)}


@dataclass(frozen=True)
class Identity:
    """The settings that make two caches comparable. Messages name the first field that differs, in this order."""

    teacher: str  # hub id, or the folder's name
    teacher_revision: str  # commit hash, or fingerprint of local weights
    tokenizer_hash: str
    chat_template_hash: str | None
    vocab_size: int  # columns of the teacher's logits; all ids are below it
    top_k: int
    top_p: float | None
    min_k: int
    prompt_logits: bool
    sampling: dict[str, Any]  # temperature, max_tokens, seed and other parameters that were set
    reasoning_markers: list[str] | None
    answer_regex: str | None
    dtype: str
    engine: str  # name and version
    engine_args: dict[str, Any]  # those that can change a distribution
    pin_tokens: list[int] = field(default_factory=list)  # ids that every row keeps besides its top_k others
    exact: bool = False  # log-probabilities are stored bit for bit
    derived: list[str] = field(
        default_factory=list
    )  # transformations of the traces since they were generated, in order

    @cached_property
    def digest(self) -> str:
        """Hash of all fields that are not empty, so that adding a field to this class keeps the hashes of older caches."""
        fields = {name: value for name, value in as_json(asdict(self)).items() if value}
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    @property
    def markers(self) -> Markers:
        """How reasoning and answer are separated."""
        opening, closing = self.reasoning_markers or (None, None)
        return Markers(opening, closing, self.answer_regex)

    @property
    def sampled_otherwise(self) -> str | None:
        """Why the tokens are not plain samples of the teacher at temperature 1, for messages; None if they are."""
        if "temperature" not in self.sampling:
            return "its tokens were scored, not sampled"
        others = [n for n, v in self.sampling.items() if n not in _HARMLESS and v not in _NEUTRAL.get(n, ())]
        return f"its tokens were sampled with {others[0]} = {self.sampling[others[0]]}" if others else None

    def trace_id(self, prompt_id: str, prompt_digest: str, sample_index: int) -> str:
        """The id of a trace, known before it is generated: 32 hexadecimal digits, a hash of all that determines it."""
        key = "\x00".join((self.digest, prompt_id, prompt_digest, str(sample_index)))
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def as_json(value: Any) -> Any:
    """The value as it reads back from JSON, with whole floats as integers: 1.0 and 1 mean the same and hash the same."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Name, value found and value wanted of the first field of ``wanted`` that differs; for an object, of its first key."""
    missing = object()  # None is a valid value
    for name, here in wanted.items():
        there = found.get(name)
        if _same(there, here):
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            key = next(k for k in [*there, *here] if not _same(there.get(k, missing), here.get(k, missing)))
            return f"{name}.{key}", there.get(key), here.get(key)
        return name, there, here
    return None


def _same(there: Any, here: Any) -> bool:
    """Compares as the hash of an identity does: 1 equals 1.0 but not true."""
    return json.dumps(as_json(there), sort_keys=True) == json.dumps(as_json(here), sort_keys=True)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a transformers tokenizer: of its vocabulary and of the ids of a probe text.

    Tokenizers with the same hash give ids the same meaning, and very probably split text in the same way.
    """
    return vocabulary_hash(tokenizer.get_vocab(), tokenizer(PROBE, add_special_tokens=False)["input_ids"])


def vocabulary_hash(vocabulary: dict[str, int], probe: list[int]) -> str:
    """`tokenizer_hash` of a tokenizer with this vocabulary, which makes these ids of PROBE."""
    canonical = json.dumps([sorted(vocabulary.items()), probe], ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def text_hash(text: str | None) -> str | None:
    return None if text is None else hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def weights_fingerprint(directory: Path) -> str:
    """Hash of a local model's configuration and of up to 256 evenly spaced 64 KiB blocks of each weight file.

    Files below 16 MiB are read completely. In larger ones a change of 1% of the blocks is missed with a probability of
    0.99^256 = 8%, a change of 5% practically never.
    """
    digest = hashlib.blake2b(digest_size=16)
    block, blocks = 1 << 16, 256
    for path in sorted(
        p
        for p in directory.iterdir()
        if p.suffix in (".safetensors", ".bin", ".pt", ".gguf") or p.name == "config.json"
    ):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            count = min(blocks, -(-size // block))
            for i in range(count):
                file.seek(i * block if count < blocks else i * (size - block) // (blocks - 1))
                digest.update(file.read(block))
    return digest.hexdigest()
