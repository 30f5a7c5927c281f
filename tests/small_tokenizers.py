"""Tokenizers of the kinds that models have, made in memory: no file, no network."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from logitcache.inference.model import ModelFacts

CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(
    template: str | None = CHATML, eos: str = "<|im_end|>", more: tuple[str, ...] = (), around: Any = None
) -> ModelFacts:
    """As GPT-2 and most models since: every byte is a token, control tokens are ids of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return _facts(made, template, eos, more, around)


def llama_2(template: str | None = None, scheme: str | None = None) -> ModelFacts:
    """As Llama 2's: SentencePiece BPE with byte fallback, and a space put before every text that is encoded.

    Args:
        scheme: of the Metaspace pre-tokenizer; None: by a normalizer, as the model's own files do it.
    """
    pieces = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyzIT0123456789.,+=?:",
        "▁I",
        "▁It",
        "It",
        "is",
        "▁is",
        "▁T",
        "Th",
        "The",
        "▁The",
    ]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    merges = [
        ("▁", "I"),
        ("I", "t"),
        ("▁I", "t"),
        ("i", "s"),
        ("▁", "is"),
        ("▁", "T"),
        ("T", "h"),
        ("Th", "e"),
        ("▁", "The"),
    ]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme is None:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    made.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    around = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return _facts(made, template, "</s>", (), around)


def _facts(made: Tokenizer, template: str | None, eos: str, more: tuple[str, ...], around: Any) -> ModelFacts:
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in more])
    if around is not None:
        made.post_processor = around
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=eos, chat_template=template)
    return facts_of(tokenizer)


def facts_of(tokenizer: Any) -> ModelFacts:
    vocab = len(tokenizer)
    eos = frozenset([tokenizer.eos_token_id])
    return ModelFacts("small", "r1", "float32", vocab, tokenizer, "t", tokenizer.chat_template, eos)


class PythonBytes(PreTrainedTokenizer):
    """A tokenizer without a fast backend, as models with code of their own have: token 3 + b is the byte b."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(bos_token="<s>", eos_token="</s>", pad_token="<pad>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return 259

    def get_vocab(self) -> dict[str, int]:
        own = {t: i for i, t in enumerate(["<s>", "</s>", "<pad>"])} | {f"[{b}]": 3 + b for b in range(256)}
        return own | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [f"[{b}]" for b in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 2)

    def _convert_id_to_token(self, index: int) -> str:
        return ["<s>", "</s>", "<pad>"][index] if index < 3 else f"[{index - 3}]"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        known = self.get_vocab()
        parts = [bytes([known[t] - 3]) if 3 <= known[t] < 259 else t.encode() for t in tokens]
        return b"".join(parts).decode(errors="replace")
