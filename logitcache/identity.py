"""What makes two caches comparable: their identity, its hashes, and the first field that differs."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from logitcache.sections import Markers

# Its ids change with any difference in normalisation, splitting or merges that the vocabulary alone does not show.
PROBE = "The 3 cats' naïve  idea:\n\tf(x)=x**2 — 12,345.67 «été» 数学 🙂 <think>don't</think>\r\n\n\n  end"


# Sampling parameters that leave the teacher's distribution at temperature 1 as it is, and values of others that do.
_HARMLESS = {"max_tokens", "seed", "n", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"}


_NEUTRAL = {"temperature": (1,), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "min_tokens": (0,)}


_NEUTRAL |= {"presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,)}


@dataclass(frozen=True)
class Identity:
    """All that makes two caches comparable. Order of fields is the order of messages."""

    teacher: str  # hub id, or the folder's name
    teacher_revision: str  # commit hash, or fingerprint of the weights
    tokenizer_hash: str
    chat_template_hash: str | None
    vocab_size: int  # columns of the teacher's logits; every id is below it
    top_k: int
    top_p: float | None
    min_k: int
    prompt_logits: bool
    sampling: dict[str, Any]  # temperature, max_tokens, seed and whatever else was set
    reasoning_markers: list[str] | None
    answer_regex: str | None
    dtype: str
    engine: str  # name and version
    engine_args: dict[str, Any]  # those that may change a distribution
    pin_tokens: list[int] = field(default_factory=list)  # ids that every row keeps, besides its top_k others
    exact: bool = False  # log-probabilities bit for bit
    derived: list[str] = field(default_factory=list)  # what was done to the traces since the teacher wrote them

    @cached_property
    def digest(self) -> str:
        """Hash of all fields that say something: one that is added later, and empty, leaves it as it was."""
        fields = {name: value for name, value in as_json(asdict(self)).items() if value}
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    @property
    def markers(self) -> Markers:
        """How reasoning and answer are told apart."""
        opening, closing = self.reasoning_markers or (None, None)
        return Markers(opening, closing, self.answer_regex)

    @property
    def sampled_otherwise(self) -> str | None:
        """Why the teacher's tokens are no plain draws from it at temperature 1; None where they are."""
        if "temperature" not in self.sampling:
            return "its tokens were scored, not sampled"
        others = [n for n, v in self.sampling.items() if n not in _HARMLESS and v not in _NEUTRAL.get(n, ())]
        return f"its tokens were sampled with {others[0]} = {self.sampling[others[0]]}" if others else None

    def trace_id(self, prompt_id: str, prompt_digest: str, sample_index: int) -> str:
        """Content address of a trace, known before it is generated: 32 hexadecimal digits."""
        key = "\x00".join((self.digest, prompt_id, prompt_digest, str(sample_index)))
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def as_json(value: Any) -> Any:
    """As JSON reads it back, and 1.0 as 1: they set one temperature, and make one hash."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Name, value found and value wanted of the first field of ``wanted`` that differs; of a field of objects, its key."""
    missing = object()  # null is a value
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
    """1 and 1.0 are, 1 and true are not: as in the hash of an identity."""
    return json.dumps(as_json(there), sort_keys=True) == json.dumps(as_json(here), sort_keys=True)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a transformers tokenizer: its tokens with their ids, so that ids of one mean the same to the other, and the
    ids of a probe text, so that one that splits text differently shows."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    canonical = json.dumps([vocabulary, probe], ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def text_hash(text: str | None) -> str | None:
    return None if text is None else hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def weights_fingerprint(directory: Path) -> str:
    """Hash over a local model's configuration and up to 256 evenly spaced 64 KiB blocks of each weight file: all of a
    file below 16 MiB, and a change of 1% of a larger one is missed with a chance of 0.99^256 = 8%, of 5% never."""
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
